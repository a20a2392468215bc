"""How fast this machine trains and generates: two ways of the same work, in turn, in one process.

    python -m mage_core.bench [--width 512] [--rounds 5]

Training: one step at the paper's width in fp32 with the fused attention kernel, dropout and QuickGELU as the released
code writes them and torch's plain Adam, against the settings that this project trains with on this machine; then the
same step against one of the preset `quick`, which leaves out frames and tokens that teach little. Generation: one
video, recomputing every frame at every step, against each frame computed once. Rendering: a frame of CATER-GEN, with
two objects and with eight. Times are medians of rounds, which alternate between two ways of the same, so that a
machine whose speed drifts slows both. The models are random: the time of a step does not depend on what was learned.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import numba
import numpy as np
import torch
from einops import reduce

from mage_core import captions
from mage_core.axial import as_written
from mage_core.batches import Clips, training_batch
from mage_core.cater import CaterGen
from mage_core.clips import TokenClips, load_dataset, text_ids
from mage_core.machine import (autocast, describe, fast_allocator_environment, has_fast_bf16,
                               relaunch_with_fast_allocator)
from mage_core.mage import MAGE, MAGEConfig
from mage_core.moving_mnist import MovingMNIST
from mage_core.presets import PRESETS, mage_config
from mage_core.training import optimisers


def paper_config(width: int = 512) -> MAGEConfig:
    """The released sizes for Single Moving MNIST, at some width; ValueError for one that cannot be built."""
    return MAGEConfig(codebook_size=512, rows=16, columns=16, clip_length=10, width=width,
                      vocabulary_size=len(captions.vocabulary("single-mnist")),
                      context_length=captions.context_length("single-mnist"))


def paper_model(width: int = 512, device: torch.device | str = "cpu") -> MAGE:
    """A random MAGE of these sizes."""
    torch.manual_seed(0)
    return MAGE(paper_config(width)).to(device)


def random_clips(batch: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids (b 10 16 16), caption ids (b l) and speeds (b,) that cost what real ones cost."""
    torch.manual_seed(1)
    text = captions.encode("the digit 7 is moving up then down .", "single-mnist")
    return (torch.randint(512, (batch, 10, 16, 16), device=device), torch.tensor([text] * batch, device=device),
            torch.rand(batch, device=device).clamp(0.01, 0.99))


def training_step(mage: MAGE, clips: tuple[torch.Tensor, ...], *, fast: bool) -> Callable[[], None]:
    """A function that does one training step, with the shipped settings or the plain ones."""
    device = clips[0].device
    made = optimisers(mage, 5e-5) if fast else [torch.optim.Adam(mage.parameters(), lr=5e-5)]

    def step() -> None:
        with (nullcontext() if fast else as_written()), (autocast(device) if fast else nullcontext()):
            loss = mage.train()(*clips).loss
        _descend(loss, made)

    return step


def recipe_step(width: int, batch: int, device: torch.device | str = "cpu") -> Callable[[], None]:
    """A function that does one step as the preset `quick` does it halfway through, on Single, at some width and batch.

    It sees the first frame and three of the later ones, its loss is over the tokens that differ from the first frame's
    and as many others, and for a quarter of the clips it first makes its own guesses of the frames.
    """
    recipe = replace(PRESETS["quick"].mage, width=width, batch=batch, advection=0, more_anchors=0)
    dataset = load_dataset("single-mnist")
    torch.manual_seed(0)
    mage = MAGE(mage_config(recipe, dataset, 512)).to(device).train()
    made = optimisers(mage, recipe.learning_rate, muon=recipe.muon, weight_decay=recipe.weight_decay)
    clips, numbers = Clips(drawn_clips(dataset, 64), device), itertools.count(recipe.samples // recipe.batch // 2)

    def step() -> None:
        given = training_batch(clips, mage, recipe, 0, next(numbers))
        with autocast(clips.device):
            loss = mage(**{name: value for name, value in given.items() if value is not None}).loss
        _descend(loss, made)

    return step


def drawn_clips(dataset: MovingMNIST, count: int) -> TokenClips:
    """Training pairs as tokens without a VQ-VAE, of 512 kinds: which of them change is as it is in training."""
    specs = [dataset.spec("train", index) for index in range(count)]
    lengths = np.asarray(dataset.lengths(specs))
    frames = dataset.clips(specs, np.tile(np.arange(lengths.max()), (count, 1)))
    sums = reduce(frames.astype(np.int64), "n t (h y) (w x) -> n t h w", "sum", y=4, x=4)
    captions_ = [dataset.caption(spec) for spec in specs]
    return TokenClips((np.sign(sums) * (1 + sums % 511)).astype(np.uint16), lengths, text_ids(captions_, dataset),
                      dataset.interval, dataset.clip_length)


def _descend(loss: torch.Tensor, made: list[torch.optim.Optimizer]) -> None:
    for optimiser in made:
        optimiser.zero_grad(set_to_none=True)
    loss.backward()
    for optimiser in made:
        optimiser.step()
    _wait(loss.device)


def in_turn(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way of doing something, `rounds` times, one after the other after two uncounted rounds.

    In the first two steps memory still grows, and products of new sizes are compiled.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for counted in [False] * 2 + [True] * rounds:
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            if counted:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: dict[str, list[float]], per: int = 1) -> float:
    """Print medians and spreads in seconds, and how many times faster the second way is, pair by pair; that ratio."""
    slow, fast = seconds.values()
    ratios = [a / b for a, b in zip(slow, fast)]
    print(f"\n{title}")
    for name, values in seconds.items():
        values = [value / per for value in values]
        print(f"  {name:<58} {statistics.median(values):8.3f} s   ({min(values):.3f} to {max(values):.3f})")
    print(f"  ratio {statistics.median(ratios):.1f}   ({min(ratios):.1f} to {max(ratios):.1f})", flush=True)
    return statistics.median(ratios)


def benchmark_training(width: int, rounds: int, batch: int, device: torch.device) -> tuple[float, float]:
    """Plain settings against shipped ones for the same training step, and against a step of `quick`; both ratios."""
    clips, precision = random_clips(batch, device), "bf16" if has_fast_bf16(device) else "fp32"
    plain = {"fp32, fused attention, plain Adam": training_step(paper_model(width, device), clips, fast=False)}
    shipped = {f"shipped, {precision}": training_step(paper_model(width, device), clips, fast=True)}
    quick = {f"as quick trains, {precision}": recipe_step(width, batch, device)}
    title = f"training, a sample (width {width}, batch {batch}), "
    return (report(title + "the same work", in_turn(plain | shipped, rounds), per=batch),
            report(title + "without what teaches little", in_turn(plain | quick, rounds), per=batch))


@torch.no_grad()
def benchmark_generation(width: int, rounds: int, device: torch.device) -> float:
    """Every frame recomputed in fp32 with the fused kernel against each computed once as shipped; returns the ratio."""
    mage = paper_model(width, device).eval()
    ids, text, speed = random_clips(1, device)
    first = ids[:, 0]

    def recomputed() -> torch.Tensor:
        with as_written():
            made = mage.generate(first, text, speed, recompute=True)
        _wait(device)
        return made

    def shipped() -> torch.Tensor:
        with autocast(device):
            made = mage.generate(first, text, speed)
        _wait(device)
        return made

    ratio = report(f"generation, one video of 10 frames (width {width})",
                   in_turn({"fp32, fused attention, every frame recomputed": recomputed,
                            "shipped, each frame computed once": shipped}, rounds))
    slow, once, fast = recomputed(), mage.generate(first, text, speed), shipped()
    print(f"  same token ids in fp32, recomputed and computed once: {bool((slow == once).all())}")
    print(f"  share of equal ids, shipped against fp32: {(fast == once)[:, 1:].float().mean():.3f} (a random model, "
          "whose codes are nearly tied, and whose frames feed on each other)")
    return ratio


def benchmark_rendering(rounds: int, size: int = 256) -> dict[int, float]:
    """Milliseconds a frame of CATER-GEN on all cores, by the number of objects: 2 (v1) and 8 (scenes of v2)."""
    found = {}
    print(f"\nrendering, a frame of {size} x {size} on {numba.get_num_threads()} threads")
    for name, objects in (("cater-gen-v1", 2), ("cater-gen-v2", 8)):
        world = CaterGen(name, image_size=size)
        drawn = (world.spec("train", index) for index in itertools.count())
        specs = list(itertools.islice((spec for spec in drawn if len(spec.objects) == objects), 8))
        frames = np.tile(np.arange(0, 20, 3), (len(specs), 1))   # something moves up to frame 20 at least
        seconds = in_turn({"": lambda: world.clips(specs, frames)}, rounds)[""]
        milliseconds = [1000 * value / frames.size for value in seconds]
        found[objects] = statistics.median(milliseconds)
        print(f"  {objects} objects ({name}){'':<38} {found[objects]:8.1f} ms  ({min(milliseconds):.1f} to "
              f"{max(milliseconds):.1f})", flush=True)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mage_core.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    given = parser.parse_args(arguments)
    for name in ("width", "rounds", "batch"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} is {getattr(given, name)}: it must be at least 1")
    try:
        paper_config(given.width)
    except ValueError as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(describe())
    print("allocator settings: " + (", ".join(fast_allocator_environment().values()) or "the machine's own"))
    benchmark_training(given.width, given.rounds, given.batch, device)
    benchmark_generation(given.width, given.rounds, device)
    benchmark_rendering(given.rounds)


if __name__ == "__main__":
    relaunch_with_fast_allocator()
    main()
