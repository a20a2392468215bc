"""Training of both stages: VQ-VAE (3.2), then MAGE on cached tokens (3.3, 4.2). Stop it at any moment and start again.

    python -m mage_core.training --dataset single-mnist --preset quick

All randomness of a step is a function of (seed, stage, step): nothing else needs to be kept to go on after a kill, and
the resumed run ends in the same weights on the same machine and number of threads. A run lives in one folder:
`vqvae.pt`, `mage.pt` (checkpoints), `vqvae.jsonl`, `mage.jsonl` (curves), `weights.safetensors` and `card.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm.auto import tqdm

from mage_core import metrics, weights
from mage_core.cater import CaterGen
from mage_core.clips import TokenClips, available, encode_frames, frame_pool, load_dataset, token_clips, watched
from mage_core.generate import generate_videos
from mage_core.files import cache_folder, write_whole
from mage_core.machine import autocast, describe as describe_machine, relaunch_with_fast_allocator
from mage_core.mage import MAGE
from mage_core.moving_mnist import MovingMNIST
from mage_core.muon import Muon
from mage_core.presets import MAGERecipe, Preset, changed, describe, mage_config, preset, vqvae_config
from mage_core.vqvae import VQVAE, Codebook, varied


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and which checkpoint is the last good one."""


# ---------------------------------------------------------------- one loop for both stages

@dataclass
class Stage:
    """What the loop needs to know of a stage.

    `step(number, done)` computes the loss of a step, and what to show beside it; `watch()` gives numbers to log now and
    then. `parts` are saved and restored; `optimisers` get their base learning rates scaled by the schedule.
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

    @property
    def steps(self) -> int:
        return math.ceil(self.budget / self.batch)


def fit(stage: Stage, folder: Path, *, until: float | None = None, checkpoint_seconds: float = 60.0,
        progress: bool = True) -> bool:
    """Train a stage to the end of its budget, from its checkpoint if there is one; True when it is done.

    `until` (time.monotonic()) stops it early, at a checkpoint. Raises TrainingStopped where the loss or its
    gradient is not a number, ValueError where the checkpoint is of another recipe.
    """
    path, log = folder / f"{stage.name}.pt", folder / f"{stage.name}.jsonl"
    step, seconds, recent = _restore(stage, path)
    curve = [line for line in read_curve(log) if line["step"] <= step]
    started = saved = time.monotonic()
    lasting: dict[str, float] = dict(curve[-1]) if curve else {}

    def save() -> None:   # the curve first: what a kill leaves of it beyond the checkpoint is cut off above
        nonlocal saved
        write_whole(log, lambda temporary: temporary.write_text("".join(json.dumps(line) + "\n" for line in curve)))
        _save(stage, path, step, seconds + time.monotonic() - started, recent)
        saved = time.monotonic()

    for part in stage.parts.values():
        part.train()
    with tqdm(total=stage.budget, initial=min(step * stage.batch, stage.budget), desc=stage.name, unit=stage.unit,
              disable=not progress, smoothing=0.05) as bar:
        while step < stage.steps:
            if until is not None and time.monotonic() > until:
                save()
                return False
            torch.manual_seed(_hash(stage.seed, stage.name, step))
            rate = schedule(step, stage.steps)
            for optimiser in stage.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = group["base"] * rate
            loss, shown = stage.step(step)
            value = loss.item()
            for optimiser in stage.optimisers:
                optimiser.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_([p for group in _groups(stage) for p in group["params"]], 1.0)
            if not (math.isfinite(value) and math.isfinite(norm)):   # before they reach the weights or a checkpoint
                kept = f"the last good checkpoint is {path.name} in {folder.name}" if path.exists() else "no checkpoint yet"
                raise TrainingStopped(f"at step {step} of {stage.name} the loss is {value} and its gradient's norm {norm:g}: "
                                      f"{kept}. The same command would stop here again: train in another folder (--run) "
                                      f"with a lower learning rate (--set {stage.name}.learning_rate=...)")
            for optimiser in stage.optimisers:
                optimiser.step()
            if stage.after is not None:
                stage.after()
            step += 1
            recent = [*recent[-199:], value]
            bar.update(min(stage.batch, stage.budget - bar.n))
            if step % 20 == 0 or step == stage.steps:
                bar.set_postfix({"loss": f"{np.mean(recent[-100:]):.3f}", **{k: f"{v:.2f}" for k, v in shown.items()},
                                 **{k: f"{v:.2f}" for k, v in lasting.items() if k in ("psnr", "motion")}}, refresh=False)
            if step % max(1, stage.watch_every // stage.batch) == 0 or step == stage.steps:
                lasting = {"step": step, stage.unit: step * stage.batch, "loss": float(np.mean(recent)),
                           "seconds": round(seconds + time.monotonic() - started, 1), **shown}
                lasting |= stage.watch() if stage.watch else {}
                curve.append(lasting)
                for part in stage.parts.values():
                    part.train()
            if time.monotonic() - saved > checkpoint_seconds:
                save()
    save()
    return True


def schedule(step: int, steps: int, warm: int = 100, floor: float = 0.02) -> float:
    """The share of the learning rate at a step: a short rise, then a cosine down to `floor`."""
    return min(1.0, (step + 1) / min(warm, max(1, steps // 10))) * (
        floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def read_curve(path: Path) -> list[dict[str, float]]:
    """The curve that a stage wrote, a dict a line; empty where there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _groups(stage: Stage) -> list[dict]:
    return [group for optimiser in stage.optimisers for group in optimiser.param_groups]


def _save(stage: Stage, path: Path, step: int, seconds: float, recent: list[float]) -> None:
    state = {"step": step, "seconds": seconds, "recent": recent, "recipe": json.dumps(stage.recipe),
             "parts": {name: part.state_dict() for name, part in stage.parts.items()},
             "optimisers": [optimiser.state_dict() for optimiser in stage.optimisers]}
    write_whole(path, lambda temporary: torch.save(state, temporary))


def _restore(stage: Stage, path: Path) -> tuple[int, float, list[float]]:
    """Load a checkpoint into a stage; (step, seconds trained so far, last losses), or (0, 0, []) where there is none."""
    if not path.exists():
        return 0, 0.0, []
    try:
        with zipfile.ZipFile(path) as file:
            if (name := file.testzip()) is not None:   # torch reads past wrong checksums
                raise ValueError(f"the checksum of {name} is wrong")
        state = torch.load(path, weights_only=True)
        recipe = json.loads(state["recipe"])
    except Exception as error:
        raise ValueError(f"{path.name} in {path.parent.name} is not a checkpoint that can be read ({error}): "
                         "delete it to train from nothing") from error
    ours = json.loads(json.dumps(stage.recipe))
    if recipe != ours:
        changed = [key for key in ours.keys() | recipe.keys() if ours.get(key) != recipe.get(key)]
        raise ValueError(f"{path.name} in {path.parent.name} was trained with another recipe ({', '.join(sorted(changed))} "
                         "differ): choose another folder with --run, or delete this one")
    for name, part in stage.parts.items():
        part.load_state_dict(state["parts"][name])
    for optimiser, saved in zip(stage.optimisers, state["optimisers"]):
        optimiser.load_state_dict(saved)
    return state["step"], state["seconds"], state.get("recent", [])


def _hash(*what: object) -> int:
    """A 63-bit seed that hangs on all parts."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "big") >> 1


def optimisers(model: nn.Module, learning_rate: float, *, muon: float = 0.0,
               weight_decay: float = 0.0) -> list[torch.optim.Optimizer]:
    """AdamW; with `muon` > 0, Muon (orthogonalised momentum) for the matrices inside the attention and MLP layers."""
    inner, other = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and ("layers." in name or name.endswith(("anchor_in.weight", "frames_in.weight")))
        (inner if muon and matrix else other).append(parameter)
    made = [torch.optim.AdamW(other, lr=learning_rate, betas=(0.9, 0.98), eps=1e-8, fused=True,
                              weight_decay=0.0 if muon else weight_decay)]
    if inner:
        made.append(Muon(inner, muon * learning_rate, weight_decay=weight_decay))
    for optimiser in made:
        for group in optimiser.param_groups:
            group["base"] = group["lr"]
    return made


# ---------------------------------------------------------------- first stage

def train_vqvae(chosen: Preset, dataset, folder: Path, *, seed: int = 0, until: float | None = None,
                device: torch.device | str = "cpu", progress: bool = True) -> tuple[VQVAE, bool]:
    """Train the VQ-VAE of a preset on the frames of a dataset's training pairs (3.2); (model, whether it is done)."""
    recipe, device = chosen.vqvae, torch.device(device)
    torch.manual_seed(_hash(seed, "vqvae start"))
    vqvae = VQVAE(vqvae_config(recipe, dataset)).to(device, memory_format=torch.channels_last)
    frames = FrameSource(dataset, chosen.pairs, seed, pool=recipe.pool, progress=progress)
    warm_steps = math.ceil(recipe.warm_images / recipe.batch)
    if recipe.background:
        vqvae.background.copy_(frames.background)
    if not (folder / "vqvae.pt").exists() and not warm_steps:
        vqvae.initialise(frames.batch(-1, min(3_000, 12 * recipe.codebook_size)).to(device), seed)
    codebook = Codebook(vqvae).to(device)
    vqvae.codebook.requires_grad_(False)
    looks = 256 * 64 ** 2 // dataset.image_size ** 2   # as many pixels for every dataset
    held_out = FrameSource.held_out(dataset, looks, seed, kept=recipe.pool is not None).batch(0, looks).to(device)
    kept: dict[str, Tensor] = {}

    def step(number: int) -> tuple[Tensor, dict[str, float]]:
        if warm_steps and number == warm_steps:
            vqvae.initialise(frames.batch(-1, 3_000).to(device), seed)
            codebook.restart(vqvae)
        crop = recipe.crop and recipe.crop * vqvae.config.down
        images, behind = (part.to(device, memory_format=torch.channels_last)
                          for part in frames.cut(number, recipe.batch, crop, vqvae.config.down))
        with autocast(device):
            out = vqvae(images, quantise=number >= warm_steps, background=behind)
        kept.update(features=out.features, token_ids=out.token_ids)
        loss = recipe.reconstruction * out.reconstruction_loss + recipe.commitment * out.commitment_loss
        return loss, {"used": float(out.token_ids.unique().numel())} if number % 20 == 19 else {}

    def after() -> None:
        if kept["features"] is not None:
            codebook.update(vqvae, kept["features"], kept["token_ids"].flatten())

    def watch() -> dict[str, float]:
        return vqvae_quality(vqvae, held_out)

    stage = Stage("vqvae", "images", recipe.images, recipe.batch, {"vqvae": vqvae, "codebook": codebook},
                  optimisers(vqvae, recipe.learning_rate), step, after, watch, max(recipe.batch, recipe.images // 20), seed,
                  _recipe(recipe, dataset, seed, chosen.pairs))
    done = fit(stage, folder, until=until, progress=progress)
    return vqvae.eval(), done


class FrameSource:
    """Random frames of a split's samples, a function of (seed, step): images (b c H W) in [0, 1].

    With a `pool`, that many frames are drawn once and kept on disk (`clips.frame_pool`), and every step takes from them:
    where drawing a frame costs more than training on it. `background` (c H W) is the median of 256 frames, what
    is behind all that moves.
    """

    def __init__(self, dataset, pairs: int | None, seed: int, split: str = "train", *, indices: range | None = None,
                 pool: int | None = None, progress: bool = False):
        indices = range(available(dataset, split, pairs)) if indices is None else indices
        if not indices:
            raise ValueError(f"{dataset.name} has no sample in its split {split!r}: there is nothing to train on")
        self.dataset, self.seed = dataset, seed
        self.pool = None if pool is None else frame_pool(dataset, split, indices, pool, seed, progress=progress)
        if pool is None:
            self.specs = [dataset.spec(split, index) for index in indices]
            self.lengths = np.asarray(dataset.lengths(self.specs))
        self.background = self.batch(-2, 256).median(0).values

    @classmethod
    def held_out(cls, dataset, count: int, seed: int, *, kept: bool = False) -> FrameSource:
        """Frames of samples to look at during training (`clips.watched`), with `kept` drawn once and kept on disk."""
        split, indices = watched(dataset, count)
        return cls(dataset, None, seed, split, indices=indices, pool=count if kept else None)

    def batch(self, step: int, size: int, crop: int | None = None, grid: int = 1) -> Tensor:
        """`size` frames; with `crop`, squares of that side, cut on the token grid around a random pixel of what moves."""
        return self.cut(step, size, crop, grid)[0]

    def cut(self, step: int, size: int, crop: int | None = None, grid: int = 1) -> tuple[Tensor, Tensor]:
        """`batch`, and what is behind each of its images: both (b c H W)."""
        draw = np.random.Generator(np.random.Philox(_hash(self.seed, "frames", step)))
        samples = draw.integers(len(self.specs) if self.pool is None else len(self.pool), size=size)
        if self.pool is None:
            frames = draw.integers(self.lengths[samples])
            images = to_images(self.dataset.clips([self.specs[sample] for sample in samples], frames[:, None])[:, 0])
        else:
            images = to_images(self.pool[samples])
        if crop is None or crop >= images.shape[-1]:
            return images, self.background.expand_as(images) if step != -2 else images
        content = (images - self.background).abs().amax(1) > 0.02
        cut, behind = [], []
        for image, where, u in zip(images, content, draw.random(size)):
            places = where.nonzero()
            y, x = places[int(u * len(places))].tolist() if len(places) else (0, 0)
            top, left = (min(max(0, (v - crop // 2) // grid * grid), images.shape[-1] - crop) for v in (y, x))
            for whole, parts in ((image, cut), (self.background, behind)):
                parts.append(whole[:, top:top + crop, left:left + crop])
        return torch.stack(cut), torch.stack(behind)


def to_images(frames: np.ndarray) -> Tensor:
    """8-bit frames (b H W) or (b H W c) as images (b c H W) in [0, 1]."""
    images = torch.from_numpy(frames).float() / 255
    return images[:, None] if images.ndim == 3 else rearrange(images, "b h w c -> b c h w")


@torch.no_grad()
def vqvae_quality(vqvae: VQVAE, images: Tensor) -> dict[str, float]:
    """How well a VQ-VAE does on images (b c H W): mean PSNR in dB (each at most 50) and the number of codes used."""
    vqvae.eval()
    ids = vqvae.encode(images)
    psnr = metrics.frame_psnr(vqvae.decode(ids), images).mean().item()
    return {"psnr": psnr, "codes": float(ids.unique().numel())}


@torch.no_grad()
def token_stillness(vqvae: VQVAE, dataset, split: str = "test", count: int = 200) -> dict[str, float]:
    """How still the tokens of still regions are, over the clips of `count` pairs at their own speeds.

    `changed_where_still`: of the tokens whose own patch of pixels equals the one in the frame before, the share that
    changed all the same; `changed`: of all tokens, the share that changed; `codes`: how many codes were used.
    """
    batch = metrics.evaluation_batch(dataset, split, range(count))
    frames = rearrange((batch.truth * 255).round().to(torch.uint8), "b t c h w -> b t h w c").numpy()
    ids = torch.from_numpy(encode_frames(vqvae.eval(), frames, next(vqvae.parameters()).device).astype(np.int64))
    down = vqvae.config.down
    moved = (batch.truth[:, 1:] != batch.truth[:, :-1]).any(2).float()
    moved = F.max_pool2d(moved, down).bool()
    changed = ids[:, 1:] != ids[:, :-1]
    return {"changed_where_still": changed[~moved].float().mean().item(), "changed": changed.float().mean().item(),
            "moved": moved.float().mean().item(), "codes": float(ids.unique().numel())}


# ---------------------------------------------------------------- second stage

def train_mage(chosen: Preset, dataset, vqvae: VQVAE, folder: Path, *, seed: int = 0, until: float | None = None,
               device: torch.device | str = "cpu", progress: bool = True, start: MAGE | None = None) -> tuple[MAGE, bool]:
    """Train the MAGE of a preset on tokens of a dataset's training pairs (4.2, eq. 7); (model, whether it is done).

    `start` gives the weights to begin with, in place of fresh ones.
    """
    recipe, device = chosen.mage, torch.device(device)
    vqvae = vqvae.to(device).eval()
    pairs = min(available(dataset, "train", chosen.pairs), recipe.samples)   # more would never be seen
    tokens = token_clips(dataset, vqvae, "train", pairs, vqvae_key=fingerprint(vqvae), progress=progress)
    torch.manual_seed(_hash(seed, "mage start"))
    mage = MAGE(mage_config(recipe, dataset, vqvae.config.codebook_size))
    if start is not None:
        mage.load_state_dict(start.state_dict())
    elif recipe.code_initialisation:
        mage.initialise_from_codes(vqvae.codebook, _hash(seed, "codes"))
    mage = mage.to(device)

    def step(number: int) -> tuple[Tensor, dict[str, float]]:
        batch = training_batch(tokens, mage, recipe, seed, number)
        with autocast(device):
            out = mage(**{name: value.to(device) for name, value in batch.items() if value is not None})
        return out.loss, {}

    looked_at = metrics.evaluation_batch(dataset, *watched(dataset, chosen.watch_clips))

    def watch() -> dict[str, float]:
        row = metrics.evaluate_batch(generator(vqvae, mage), looked_at)
        return {"psnr": row.scores.psnr_frames} | ({"motion": row.motion.accuracy} if row.motion else {})

    stage = Stage("mage", "samples", recipe.samples, recipe.batch, {"mage": mage},
                  optimisers(mage, recipe.learning_rate, muon=recipe.muon, weight_decay=recipe.weight_decay), step, None,
                  watch, recipe.evaluate_every, seed,
                  _recipe(recipe, dataset, seed, chosen.pairs) | {"vqvae": fingerprint(vqvae)}
                  | ({"start": fingerprint(start)} if start is not None else {}))
    done = fit(stage, folder, until=until, progress=progress)
    return mage.eval(), done


def training_batch(tokens: TokenClips, mage: MAGE, recipe: MAGERecipe, seed: int, step: int) -> dict[str, Tensor | None]:
    """The arguments of `MAGE.forward` for a step: clips, captions, speeds, and what is hidden or left out.

    Every pair comes once an epoch, in an order of the epoch's; its speed is drawn anew each time (4.2).
    """
    size, pairs = recipe.batch, len(tokens)
    places = np.arange(step * size, (step + 1) * size)
    samples = [int(_order(seed, epoch, pairs)[place]) for epoch, place in zip(places // pairs, places % pairs)]
    draw = np.random.Generator(np.random.Philox(_hash(seed, "clips", step)))
    ids, captions_, speed = tokens.batch(samples, [min(max(u, 1e-6), 1 - 1e-6) for u in draw.random(size)])
    frames, later = None, recipe.later_frames
    inputs = ids.shape[1] - 1
    if later is not None and later < inputs - 1:
        frames = torch.from_numpy(np.append(0, 1 + np.sort(draw.choice(inputs - 1, later, replace=False))))
    given = corrupted(ids, mage, recipe, draw)
    if recipe.own_frames:   # more of them as there is more to learn from them
        own = torch.from_numpy(draw.random(size) < recipe.own_frames * step * size / recipe.samples)
        given[own] = guessed(ids[own], captions_[own], speed[own], mage, frames)
    predict = balanced(ids, frames, draw) if recipe.balanced else None
    return {"token_ids": given, "text_ids": captions_, "speed": speed, "target_ids": ids, "frames": frames,
            "predict": predict}


def corrupted(ids: Tensor, mage: MAGE, recipe: MAGERecipe, draw: np.random.Generator) -> Tensor:
    """Clips (b t h w) as the model is shown them: the first frame whole, of later ones in some clips all or a part hidden.

    In training the model sees true frames, in generation its own: what it cannot see, it cannot lean on.
    """
    given = ids.clone()
    for clip in given if recipe.hide_all or recipe.hide_some else ():
        kind, share = draw.random(2)
        hidden = torch.from_numpy(draw.random(clip[1:].shape) < share / 2)
        if kind < recipe.hide_all:
            clip[1:] = mage.config.hidden_id
        elif kind < recipe.hide_all + recipe.hide_some:
            clip[1:][hidden] = mage.config.hidden_id
    return given


@torch.no_grad()
def guessed(ids: Tensor, captions_: Tensor, speed: Tensor, mage: MAGE, frames: Tensor | None) -> Tensor:
    """Clips (b t h w) whose later frames are the model's own guesses from the first frame alone.

    What generation feeds back is much like this, mistakes included, and it takes one forward pass. With `frames`, only
    those input frames are guessed, and the others hidden.
    """
    given = ids.clone()
    given[:, 1:] = mage.config.hidden_id
    if not len(ids):
        return given
    wanted = torch.arange(1, ids.shape[1] - 1) if frames is None else frames[1:]
    if not len(wanted):
        return given
    sources = wanted - 1
    sources = sources if sources[0] == 0 else F.pad(sources, (1, 0))
    device = next(mage.parameters()).device
    with autocast(device):
        guesses = mage.guess(given.to(device), captions_.to(device), speed.to(device), sources.to(device), len(wanted))
    given[:, wanted] = guesses.to(given.device)
    return given


def balanced(ids: Tensor, frames: Tensor | None, draw: np.random.Generator) -> Tensor:
    """Which targets count (b s h w): all that differ from the first frame's token, and as many of the others, drawn.

    All of them where none differs: a loss over nothing is not a number.
    """
    targets = ids[:, 1:] if frames is None else ids[:, frames + 1]
    changed = targets != ids[:, :1]
    if not changed.any():
        return ~changed
    share = changed.float().mean() / (~changed).float().mean().clamp_min(1e-6)
    return changed | torch.from_numpy(draw.random(targets.shape) < share.item())


def _order(seed: int, epoch: int, pairs: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(_hash(seed, "order", int(epoch)))).permutation(pairs)


def generator(vqvae: VQVAE, mage: MAGE) -> metrics.FromBatch:
    """A trained pair as a generator of whole batches, for `metrics.evaluate`."""
    return metrics.FromBatch(lambda batch: generate_videos(
        vqvae, mage, batch.dataset, batch.images, batch.captions, batch.speeds, batch.seeds))


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's configuration and every weight."""
    found = hashlib.sha256(repr(model.config).encode())
    for name, tensor in model.state_dict().items():
        found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _recipe(recipe, dataset, seed: int, pairs: int | None) -> dict:
    return {**dataclasses.asdict(recipe), **dataset.about, "seed": seed, "pairs": pairs}


# ---------------------------------------------------------------- both stages, and the table

def run_folder(dataset, chosen: Preset, seed: int) -> Path:
    """Where a run lives unless told otherwise."""
    return cache_folder() / "runs" / f"{dataset.name}-{chosen.name}-{dataset.source}-seed{seed}"


def train(dataset, chosen: Preset, *, seed: int = 0, folder: Path | None = None, minutes: float | None = None,
          device: torch.device | str | None = None, progress: bool = True,
          start: weights.Trained | None = None) -> weights.Trained | None:
    """Both stages of a preset on a dataset, from the run's checkpoints if it has any; None where time ran out first.

    The weights and their card end up in the run's folder; a run that is complete is loaded from there. With `start`,
    its VQ-VAE is taken as it is and its MAGE is trained on.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = folder or run_folder(dataset, chosen, seed)
    folder.mkdir(parents=True, exist_ok=True)
    until = None if minutes is None else time.monotonic() + 60 * minutes
    if start is None:
        vqvae, done = train_vqvae(chosen, dataset, folder, seed=seed, until=until, device=device, progress=progress)
        if not done:
            return None
    else:
        vqvae = start.vqvae
    mage, done = train_mage(chosen, dataset, vqvae, folder, seed=seed, until=until, device=device, progress=progress,
                            start=start.mage if start else None)
    if not done:
        return None
    about = {**dataset.about, "preset": chosen.name, "seed": seed,
             "recipe": dataclasses.asdict(chosen), "machine": describe_machine(),
             "curves": (curves := {stage: curve for stage in ("vqvae", "mage")
                                   if (curve := read_curve(folder / f"{stage}.jsonl"))}),
             "seconds": {stage: curve[-1]["seconds"] for stage, curve in curves.items()}}
    trained = weights.save(folder / "weights.safetensors", vqvae, mage, about)
    trained.dataset = dataset   # a card only describes a folder of videos
    return trained


def results(trained: weights.Trained, n: int | None = None, *, split: str = "test", progress: bool = True) -> list[metrics.Row]:
    """The table of supplement B for one model: MAGE, the first frame repeated, the VQ-VAE's reconstruction, the ceiling.

    The first n samples of a split, by default all; of a folder no more than it has. The ceiling is known for what
    the simulators draw.
    """
    dataset = trained.dataset
    rows = {"MAGE": generator(trained.vqvae, trained.mage), "first frame repeated": metrics.first_frame_repeated(),
            "VQ-VAE reconstruction": metrics.reconstruction(trained.vqvae)}
    if isinstance(dataset, (MovingMNIST, CaterGen)):
        rows["perfect predictor"] = metrics.perfect_predictor()
    n = available(dataset, split, n)
    return [metrics.evaluate(made, dataset, split, n, name=name, progress=progress) for name, made in rows.items()]


def ready(dataset_name: str = "single-mnist", preset_name: str = "auto", *, seed: int = 0, weights_name: str = "shipped",
          digit_set: str = "mnist-5k", mode: str = "explicit", videos: str | Path | None = None,
          progress: bool = True) -> weights.Trained:
    """A trained model for a notebook, from the nearest place: shipped weights, this machine's run, or trained now.

    `weights_name` is "shipped" (the weights that ship for the dataset, where there are any and the preset was left at
    auto), "train" (never those), or a name or file for `weights.load`. `digit_set`, `mode` and `videos` are those of
    `clips.load_dataset`. Prints what was used.
    """
    if weights_name not in ("shipped", "train"):
        found = weights.load(weights_name)
        print(f"weights {weights_name}")
        return found
    explicit = preset_name != "auto" or os.environ.get("MAGE_PRESET")
    shipped = mode == "explicit" and videos is None   # what the weights that ship were trained on
    if weights_name == "shipped" and shipped and not explicit and dataset_name in weights.names():
        print(f"the weights that ship for {dataset_name}")
        return weights.load(dataset_name)
    chosen, dataset = preset(preset_name, dataset_name), load_dataset(dataset_name, digit_set, mode=mode, videos=videos)
    folder = run_folder(dataset, chosen, seed)
    kept = folder / "weights.safetensors"
    if kept.exists():
        found = weights.load(kept)
        if found.card.get("recipe") == json.loads(json.dumps(dataclasses.asdict(chosen))):
            found.dataset = dataset
            print(f"reused the {chosen.name} run of {dataset_name} that is on disk")
            return found
        shutil.rmtree(folder)   # the preset has changed since
    print(f"training {dataset_name} with the preset {chosen.name}: nothing was found to reuse")
    return train(dataset, chosen, seed=seed, folder=folder, progress=progress)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mage_core.training", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="single-mnist")
    parser.add_argument("--digit-set", default="mnist-5k", help="mnist-5k ships; mnist-70k must be downloaded first")
    parser.add_argument("--captions", default="explicit", help="of CATER-GEN: explicit or ambiguous")
    parser.add_argument("--videos", type=Path, metavar="FOLDER",
                        help="train on a folder of videos with captions: a CATER-GEN download, or footage of your own")
    parser.add_argument("--preset", default="auto", help="smoke, quick, paper or auto")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.FIELD=VALUE", dest="changes",
                        help="change a field of the preset, e.g. mage.samples=100_000 (name a --run of its own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="the run's folder (default: in data/cache/runs)")
    parser.add_argument("--minutes", type=float, help="stop at a checkpoint after this time; start again to go on")
    parser.add_argument("--test-clips", type=int, help="test pairs in the table (default: the preset's)")
    parser.add_argument("--start", help="weights to go on from, by name or file, in place of training from nothing")
    given = parser.parse_args(arguments)

    chosen = changed(preset(given.preset, given.dataset), given.changes)
    dataset = load_dataset(given.dataset, given.digit_set, mode=given.captions, videos=given.videos)
    print(describe_machine(), describe(chosen), f"dataset {dataset.name} ({dataset.source}), seed {given.seed}",
          sep="\n", flush=True)
    trained = train(dataset, chosen, seed=given.seed, folder=given.run, minutes=given.minutes,
                    start=weights.load(given.start) if given.start else None)
    if trained is None:
        print("time is up: the run is kept; the same command goes on with it")
        return
    rows = results(trained, given.test_clips or chosen.test_clips)
    trained.add_results(rows)
    print(f"\n{dataset.name}, {rows[0].n} held-out test pairs\n\n{metrics.table(rows)}")


if __name__ == "__main__":
    relaunch_with_fast_allocator()
    main()
