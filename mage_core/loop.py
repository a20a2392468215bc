"""The loop that trains a stage: steps, schedule, checkpoints, the curve; stop it at any moment and start again.

All randomness of a step is a function of (seed, stage, step): nothing else needs to be kept to go on after a kill. On a
CPU the resumed run ends in the same weights, to the bit, on the same machine and number of threads. On a GPU the host
does not wait for each step: losses are looked at every `LOOK` steps, and always before a checkpoint is written.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mage_core import machine
from mage_core.files import write_whole
from mage_core.machine import tf32
from mage_core.muon import Muon
from mage_core.processes import ALONE, Alone

LOOK = 50   # steps on a GPU from one look at the losses to the next: each look waits for the GPU


class UnusableCheckpoint(ValueError):
    """A checkpoint cannot be gone on from; the message says why, and what to do."""


class OtherRecipe(UnusableCheckpoint):
    """A checkpoint is of another recipe than the run that finds it; the message says in what they differ."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and which checkpoint is the last good one."""


@dataclass
class Stage:
    """What the loop needs to know of a stage.

    `step(number)` computes the loss of a step, and what to show beside it; `watch()` gives numbers to log now and
    then. `parts` are saved and restored; `optimisers` get their base learning rates scaled by the schedule. Gradients
    are clipped to a norm of 1: those of the parameters `apart` by themselves, so that what a loss of their own teaches
    them does not shrink where another's is large.
    """

    name: str
    unit: str
    budget: int
    batch: int
    parts: dict[str, nn.Module]
    optimisers: list[torch.optim.Optimizer]
    step: Callable[[int], tuple[Tensor, dict[str, float]]]
    after: Callable[[], None] | None
    watch: Callable[[], dict[str, float]] | None
    watch_every: int
    seed: int
    recipe: dict
    apart: list[nn.Parameter] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return math.ceil(self.budget / self.batch)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for optimiser in self.optimisers for group in optimiser.param_groups for p in group["params"]]


def fit(stage: Stage, folder: Path, *, until: float | None = None, checkpoint_seconds: float = 60.0,
        progress: bool = True, team: Alone = ALONE) -> bool:
    """Train a stage to the end of its budget, from its checkpoint if there is one; True when it is done.

    `until` (time.monotonic()) stops it early, at a checkpoint. Of a `team` of processes, the main one writes. Raises
    TrainingStopped where the loss or its gradient is not finite, ValueError where the checkpoint cannot be read or is
    of another recipe.
    """
    path, log = folder / f"{stage.name}.pt", folder / f"{stage.name}.jsonl"
    team.wait()   # nobody reads what another may still write
    step, seconds, recent = _restore(stage, path)
    parameters = stage.parameters
    alone = set(stage.apart)
    together = [p for p in parameters if p not in alone]
    look_every = LOOK if machine.waits(parameters[0].device) else 1
    curve = [line for line in read_curve(log) if line["step"] <= step]
    started = saved = rated = time.monotonic()
    rated_step = step
    lasting: dict[str, float] = dict(curve[-1]) if curve else {}
    unseen: list[tuple[int, Tensor]] = []   # step, and its loss and gradient's norm, since the last look

    def look() -> None:   # before they reach a checkpoint; on a CPU before they reach the weights
        if not unseen:
            return
        values = torch.stack([value for _, value in unseen])
        team.average([values])
        steps = [number for number, _ in unseen]
        unseen.clear()
        for number, (value, norm) in zip(steps, values.tolist()):
            if not (math.isfinite(value) and math.isfinite(norm)):
                kept = (f"the last good checkpoint is {path.name} in {folder.name}" if path.exists()
                        else "no checkpoint yet")
                raise TrainingStopped(f"at step {number} of {stage.name} the loss is {value} and its gradient's norm "
                                      f"{norm:g}: {kept}. The same command would stop here again: train in another "
                                      "folder (--run) with a lower learning rate "
                                      f"(--set {stage.name}.learning_rate=...)")
            recent.append(value)
        del recent[:-200]

    def save() -> None:   # the curve first: what a kill leaves of it beyond the checkpoint is cut off above
        nonlocal saved
        look()
        if team.main:
            write_whole(log, lambda temporary: temporary.write_text("".join(json.dumps(line) + "\n" for line in curve)))
            _save(stage, path, step, seconds + time.monotonic() - started, recent)
        saved = time.monotonic()

    for part in stage.parts.values():
        part.train()
    with tf32(True), tqdm(total=stage.budget, initial=min(step * stage.batch, stage.budget), desc=stage.name,
                          unit=stage.unit, disable=not (progress and team.main), smoothing=0.05) as bar:
        while step < stage.steps:
            if until is not None and step % look_every == 0 and team.any(time.monotonic() > until):
                save()
                return False
            torch.manual_seed(seed_of(stage.seed, stage.name, step, *([team.index] if team.index else [])))
            rate = schedule(step, stage.steps)
            for optimiser in stage.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = group["base"] * rate
            loss, shown = stage.step(step)
            for optimiser in stage.optimisers:
                optimiser.zero_grad(set_to_none=True)
            loss.backward()
            team.average([p.grad for p in parameters if p.grad is not None])
            norms = [nn.utils.clip_grad_norm_(some, 1.0) for some in (together, stage.apart) if some]
            norm = torch.stack([each.to(loss.device) for each in norms]).amax()   # of no gradients, it is on the CPU
            unseen.append((step, torch.stack([loss.detach().float(), norm.float()])))
            looked = (step + 1) % look_every == 0
            if looked:
                look()
            for optimiser in stage.optimisers:
                optimiser.step()
            if stage.after is not None:
                stage.after()
            step += 1
            bar.update(min(stage.batch, stage.budget - bar.n))
            if step == stage.steps or looked and step % 20 == 0 or looked and look_every > 20:
                look()
                bar.set_postfix({"loss": f"{np.mean(recent[-100:]):.3f}", **{k: f"{v:.2f}" for k, v in shown.items()},
                                 **{k: f"{v:.2f}" for k, v in lasting.items() if k in ("psnr", "motion")}},
                                refresh=False)
            if step % max(1, stage.watch_every // stage.batch) == 0 or step == stage.steps:
                look()
                now = time.monotonic()
                lasting = {"step": step, stage.unit: step * stage.batch, "loss": float(np.mean(recent)),
                           "seconds": round(seconds + now - started, 1),
                           "rate": round((step - rated_step) * stage.batch / max(now - rated, 1e-9), 2), **shown}
                if team.main and stage.watch:
                    lasting |= stage.watch()
                curve.append(lasting)
                for part in stage.parts.values():
                    part.train()
                rated, rated_step = time.monotonic(), step
            if step % look_every == 0 and team.any(time.monotonic() - saved > checkpoint_seconds):
                save()
    save()
    team.wait()
    return True


def schedule(step: int, steps: int, warm: int = 100, floor: float = 0.02) -> float:
    """The share of the learning rate at a step: a short rise, then a cosine down to `floor`."""
    return min(1.0, (step + 1) / min(warm, max(1, steps // 10))) * (
        floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def read_curve(path: Path) -> list[dict[str, float]]:
    """The curve that a stage wrote, a dict a line; empty where there is none, ValueError where it cannot be read."""
    try:
        return [dict(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    except (TypeError, ValueError) as error:
        raise UnusableCheckpoint(f"{path.name} in {path.parent.name} is not a curve that can be read ({error}): delete "
                                 "it, and training goes on without") from error


def _save(stage: Stage, path: Path, step: int, seconds: float, recent: list[float]) -> None:
    state = {"step": step, "seconds": seconds, "recent": recent, "recipe": json.dumps(stage.recipe),
             "parts": {name: part.state_dict() for name, part in stage.parts.items()},
             "optimisers": [optimiser.state_dict() for optimiser in stage.optimisers]}
    write_whole(path, lambda temporary: torch.save(state, temporary))


def _restore(stage: Stage, path: Path) -> tuple[int, float, list[float]]:
    """Load a checkpoint into a stage; (step, seconds trained so far, last losses),
    or (0, 0, []) where there is none."""
    if not path.exists():
        return 0, 0.0, []
    try:
        with zipfile.ZipFile(path) as file:
            if (name := file.testzip()) is not None:   # torch reads past wrong checksums
                raise ValueError(f"the checksum of {name} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)   # made on a GPU, it goes on anywhere
        recipe = json.loads(state["recipe"])
    except Exception as error:
        raise UnusableCheckpoint(f"{path.name} in {path.parent.name} is not a checkpoint that can be read ({error}): "
                                 "delete it to train from nothing") from error
    ours = json.loads(json.dumps(stage.recipe))
    if recipe != ours:
        differing = [key for key in ours.keys() | recipe.keys() if ours.get(key) != recipe.get(key)]
        raise OtherRecipe(f"{path.name} in {path.parent.name} was trained with another recipe "
                          f"({', '.join(sorted(differing))} differ): choose another folder with --run, "
                          "or delete this one")
    try:
        for name, part in stage.parts.items():
            part.load_state_dict(state["parts"][name])
        for optimiser, saved in zip(stage.optimisers, state["optimisers"]):   # none once it is done
            optimiser.load_state_dict(saved)
            for parameter, kept in optimiser.state.items():
                if any(tensor.ndim and tensor.shape != parameter.shape for tensor in kept.values()):
                    raise ValueError("what its optimisers remember comes in another order")
    except (KeyError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UnusableCheckpoint(f"{path.name} in {path.parent.name} was written by another version of this code, "
                                 f"whose parameters are others ({why}): go on with that version, choose another "
                                 "folder with --run, or delete the file to train from nothing") from error
    return state["step"], state["seconds"], state.get("recent", [])


def seed_of(*what: object) -> int:
    """A 63-bit seed that depends on all parts."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "big") >> 1


def optimisers(model: nn.Module, learning_rate: float, *, muon: float = 0.0, weight_decay: float = 0.0,
               convolutions: Sequence[nn.Parameter] = (), unet_muon: float = 0.0) -> list[torch.optim.Optimizer]:
    """AdamW; with `muon` > 0, Muon (orthogonalised momentum) for what is a matrix inside the attention and MLP layers
    (the biases of offsets along an axis are, a row a head), at as many times the learning rate, and with `unet_muon` >
    0, at as many, for `convolutions`."""
    inner, other, among = [], [], {id(parameter) for parameter in convolutions if unet_muon}
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and ("layers." in name or name.endswith(("anchor_in.weight", "frames_in.weight")))
        if id(parameter) not in among:
            (inner if muon and matrix else other).append(parameter)
    made = [torch.optim.AdamW(other, lr=learning_rate, betas=(0.9, 0.98), eps=1e-8, fused=True,
                              weight_decay=0.0 if muon else weight_decay)]
    if inner:
        made.append(Muon(inner, muon * learning_rate, weight_decay=weight_decay))
    if among:
        made.append(Muon(convolutions, unet_muon * learning_rate, weight_decay=weight_decay))
    for optimiser in made:
        for group in optimiser.param_groups:
            group["base"] = group["lr"]
    return made
