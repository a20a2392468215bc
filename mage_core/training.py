"""Training of both stages: VQ-VAE (3.2), then MAGE on cached tokens (3.3, 4.2). Stop it at any moment and start again.

    python -m mage_core.training --dataset single-mnist --preset quick

A run lives in one folder: `vqvae.pt`, `mage.pt` (checkpoints), `vqvae.jsonl`, `mage.jsonl` (curves),
`weights.safetensors` and its card `weights.json`. The loop itself is in `loop`, what a step sees in `batches`.

Several GPUs share each batch and end where one process would (on a CPU: torchrun --nproc-per-node 2 -m -- ...):

    accelerate launch --num_processes 2 -m mage_core.training --dataset single-mnist --preset gpu

and from a notebook `accelerate.notebook_launcher(training.main, (["--preset", "gpu"],), num_processes=2)`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import operator
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mage_core import machine, metrics, weights
from mage_core.axial import KERNELS, attention_kernel
from mage_core.batches import Clips, DeviceFrames, training_batch
from mage_core.cater import CaterGen
from mage_core.clips import available, encode_frames, frame_pool, load_dataset, token_clips, watched
from mage_core.evaluation import evaluate_all
from mage_core.files import alone_in, cache_folder, data_folder, expanded, write_whole
from mage_core.generate import generate_videos
from mage_core.loop import OtherRecipe, Stage, TrainingStopped, UnusableCheckpoint, fit, optimisers, read_curve, seed_of
from mage_core.machine import autocast, device_of, relaunch_with_fast_allocator, tf32
from mage_core.machine import describe as describe_machine
from mage_core.mage import MAGE, check_start
from mage_core.moving_mnist import MovingMNIST
from mage_core.presets import (
    COMPILE,
    Preset,
    changed,
    describe,
    mage_config,
    preset,
    preset_of_environment,
    sized_like,
    vqvae_config,
)
from mage_core.processes import ALONE, Alone, processes
from mage_core.retokenise import retokenise
from mage_core.tokens import split_ids
from mage_core.vqvae import VQVAE, Codebook

PREPARE_SECONDS = 75.0    # on a GPU, tokens and compilation before the first step: with less left, MAGE is for later
# what a card tells of the weights that its training began with
START = ("dataset", "preset", "command", "commit", "machine", "seconds", "pairs", "first_pair", "curves", "sha256",
         "start", "first_stage", "beside")
CODES_FROM = 65_536       # features of which codes are laid after warm images, drawn from those of 3,000
DEVICE_FRAMES = 200_000   # drawn once for a GPU: of 64 x 64 they take 0.8 GB there


# ---------------------------------------------------------------- first stage

def train_vqvae(chosen: Preset, dataset, folder: Path, *, seed: int = 0, until: float | None = None,
                device: torch.device | str = "cpu", progress: bool = True, team: Alone = ALONE) -> tuple[VQVAE, bool]:
    """Train the VQ-VAE of a preset on the frames of a dataset's training pairs (3.2); (model, whether it is done).

    On a GPU the frames are drawn once and stay there: as many as the recipe's pool, else `DEVICE_FRAMES`, and no more
    than the run sees.
    """
    recipe, device = chosen.vqvae, torch.device(device)
    torch.manual_seed(seed_of(seed, "vqvae start"))
    vqvae = VQVAE(vqvae_config(recipe, dataset)).to(device, memory_format=torch.channels_last)
    if not team.main:
        team.wait()   # until the main process has kept what frames are to be kept
    frames = FrameSource(dataset, chosen.pairs, seed, pool=None if machine.waits(device) else recipe.pool,
                         progress=progress and team.main)
    if team.main:
        team.wait()
    if machine.waits(device):
        count = min(recipe.images, recipe.pool or DEVICE_FRAMES)
        frames = DeviceFrames(frames, count, device, seed, progress=progress and team.main)
    # batch normalisation asks for whole batches: then each process sees them, and all do the same
    whole = any(isinstance(module, nn.BatchNorm2d) for module in vqvae.modules())
    part = slice(None) if whole else team.part(recipe.batch)
    warm_steps, alone_from = recipe.warm_steps, recipe.alone_from
    if recipe.background:
        vqvae.background.copy_(frames.background)
    if not (folder / "vqvae.pt").exists() and (not warm_steps or recipe.shape == "patch"):
        vqvae.initialise(frames.batch(-1, min(3_000, 12 * recipe.codebook_size)).to(device), seed)
    team.copy(vqvae.state_dict().values())
    groups, codes = vqvae.config.groups, vqvae.config.codebook_size
    codebooks = nn.ModuleList(Codebook(vqvae, group=group) for group in range(groups)).to(device)
    vqvae.codebook.requires_grad_(False)
    looks = 256 * 64 ** 2 // dataset.image_size ** 2   # as many pixels for every dataset
    held_out = FrameSource.held_out(dataset, looks, seed, kept=recipe.pool is not None).batch(0, looks).to(device)
    kept: dict[str, object] = {}
    frames_for_codes = max(4, round(1.5 * recipe.codebook_size / 512)) * 512

    def step(number: int) -> tuple[Tensor, dict[str, float]]:
        if number >= alone_from:   # codes and encoder stay: training disturbs what k-means finds
            vqvae.encoder.requires_grad_(False).eval()   # nor do the statistics of its normalisations move
            if number == alone_from:
                with autocast(device):   # as the decoder will get them
                    vqvae.lay_codes((frames.batch(-3 - k, 512).to(device) for k in range(frames_for_codes // 512)),
                                    seed)
                team.copy(vqvae.state_dict().values())
        if warm_steps and number == warm_steps:
            with autocast(device):   # the codes alone: what the networks have learned stays
                vqvae.lay_codes((images.to(device) for images in frames.batch(-1, 3_000).split(64)), seed, CODES_FROM)
            team.copy(vqvae.state_dict().values())
            for codebook in codebooks:
                codebook.restart(vqvae)
        crop = recipe.crop and recipe.crop * vqvae.config.down
        images, behind = (all_of[part].to(device, memory_format=torch.channels_last)
                          for all_of in frames.cut(number, recipe.batch, crop, vqvae.config.down))
        with autocast(device):
            out = vqvae(images, quantise=number >= warm_steps, background=behind)
        kept.update(features=out.features, token_ids=out.token_ids, number=number)
        loss = recipe.reconstruction * out.reconstruction_loss + recipe.commitment * out.commitment_loss
        every = 500 if machine.waits(device) else 20   # counting waits
        counted = number % every == every - 1
        return loss, {"used": float((vqvae.count_codes(out.token_ids) > 0).sum())} if counted else {}

    def after() -> None:
        if kept["features"] is None or kept["number"] >= alone_from:
            return
        features, ids = kept["features"], kept["token_ids"].flatten()
        if not whole:   # of the whole batch, and so the same in every process
            features, ids = team.gather(features), team.gather(ids)
        chosen = split_ids(ids, codes, groups)
        for group, codebook in enumerate(codebooks):
            codebook.update(vqvae, features, chosen[:, group])
            team.copy([codebook.count, codebook.total, vqvae.codebook])   # a GPU sums in any order

    def watch() -> dict[str, float]:
        return vqvae_quality(vqvae, held_out)

    stage = Stage("vqvae", "images", recipe.images, recipe.batch, {"vqvae": vqvae, "codebook": codebooks},
                  optimisers(vqvae, recipe.learning_rate), step, after, watch, max(recipe.batch, recipe.images // 20),
                  seed, _recipe(recipe, dataset, seed, chosen.pairs))
    done = fit(stage, folder, until=until, progress=progress, team=team)
    team.copy(vqvae.state_dict().values())   # to the bit, for the names of caches
    return vqvae.eval(), done


class FrameSource:
    """Random frames of a split's samples, a function of (seed, step): images (b c H W) in [0, 1].

    With a `pool`, that many frames are drawn once and kept on disk (`clips.frame_pool`), and every step takes from
    them: where drawing a frame costs more than training on it. `background` (c H W) is the median of 256 frames, what
    is behind all that moves. ValueError for a split without samples.
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
        """`size` frames; with `crop`, squares of that side, cut on the token grid
        around a random pixel of what moves."""
        return self.cut(step, size, crop, grid)[0]

    def cut(self, step: int, size: int, crop: int | None = None, grid: int = 1) -> tuple[Tensor, Tensor]:
        """`batch`, and what is behind each of its images: both (b c H W)."""
        draw = np.random.Generator(np.random.Philox(seed_of(self.seed, "frames", step)))
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
    return {"psnr": psnr, "codes": float((vqvae.count_codes(ids) > 0).sum())}


@torch.no_grad()
def token_stillness(vqvae: VQVAE, dataset, split: str = "test", count: int = 200, seed: int = 0) -> dict[str, float]:
    """How still the tokens of still regions are, over the clips of `count` pairs of a seed at their own speeds.

    `changed_where_still`: of the tokens whose own patch of pixels equals the one in the frame before, the share that
    changed all the same; `changed`: of all tokens, the share that changed; `moved`: of all patches, the share with a
    pixel that changed; `codes`: how many codes were used.
    """
    batch = metrics.evaluation_batch(dataset, split, range(count), seed)
    frames = rearrange((batch.truth * 255).round().to(torch.uint8), "b t c h w -> b t h w c").numpy()
    ids = torch.from_numpy(encode_frames(vqvae.eval(), frames, next(vqvae.parameters()).device).astype(np.int64))
    down = vqvae.config.down
    moved = (batch.truth[:, 1:] != batch.truth[:, :-1]).any(2).float()
    moved = F.max_pool2d(moved, down).bool()
    changed = ids[:, 1:] != ids[:, :-1]
    return {"changed_where_still": changed[~moved].float().mean().item(), "changed": changed.float().mean().item(),
            "moved": moved.float().mean().item(), "codes": float((vqvae.count_codes(ids) > 0).sum())}


# ---------------------------------------------------------------- second stage

def train_mage(chosen: Preset, dataset, vqvae: VQVAE, folder: Path, *, seed: int = 0, until: float | None = None,
               device: torch.device | str = "cpu", progress: bool = True, start: weights.Trained | None = None,
               team: Alone = ALONE) -> tuple[MAGE, bool]:
    """Train the MAGE of a preset on tokens of a dataset's training pairs (4.2, eq. 7); (model, whether it is done).

    `start` gives the weights to begin with, in place of fresh ones (`MAGE.start_from`).
    """
    recipe, device = chosen.mage, torch.device(device)
    vqvae = vqvae.to(device).eval()
    torch.manual_seed(seed_of(seed, "mage start"))
    mage = MAGE(mage_config(recipe, dataset, vqvae.config.codebook_size, vqvae.config.groups))
    if start is not None:
        mage.start_from(start.mage, dataset.vocabulary, start.dataset.vocabulary)
    elif recipe.code_initialisation:
        mage.initialise_from_codes(vqvae.codebook, seed_of(seed, "codes"))
    if mage.advection is not None:
        mage.advection.pixels.copy_(vqvae.code_pixels())
    mage = mage.to(device)
    for name, part in mage.named_children():
        part.requires_grad_(recipe.only in ("", name))
    if not team.main:
        team.wait()   # until the main process has written the tokens
    pairs = pairs_of(chosen, dataset)
    tokens = token_clips(dataset, vqvae, "train", len(pairs), vqvae_key=token_key(vqvae), first_pair=pairs.start,
                         speeds=chosen.speeds, progress=progress and team.main)
    if team.main:
        team.wait()
    team.copy(mage.state_dict().values())
    clips = Clips(tokens, device)

    def loss_of(forward: Callable, guess: Callable, number: int) -> Tensor:
        batch = training_batch(clips, mage, recipe, seed, number, team=team, guess=guess)
        with autocast(device):
            return forward(**{name: value for name, value in batch.items() if value is not None}).loss

    looked_at = metrics.evaluation_batch(dataset, *watched(dataset, chosen.watch_clips))

    def watch() -> dict[str, float]:
        # frame by frame, every length would be compiled anew
        with torch.compiler.set_stance("force_eager") if by_layer else nullcontext():
            row = metrics.evaluate_batch(generator(vqvae, mage), looked_at)
        return {"psnr": row.scores.psnr_frames} | ({"motion": row.motion.accuracy} if row.motion else {})

    steps = math.ceil(recipe.samples / recipe.batch)
    kernel = fastest_kernel(mage, recipe.batch) if machine.waits(device) else None   # a CPU's is known
    # compiled under the very flags that hold in `fit`: else all would be compiled once more there
    with tf32(True), attention_kernel(kernel) if kernel else nullcontext():
        with buffers_kept(mage):   # tried, not trained
            made, by_layer = compiled(mage, chosen.compile, device, lambda made: loss_of(*made, steps).backward())
        mage.zero_grad(set_to_none=True)
        stage = Stage("mage", "samples", recipe.samples, recipe.batch, {"mage": mage},
                      optimisers(mage, recipe.learning_rate, muon=recipe.muon, weight_decay=recipe.weight_decay,
                                 convolutions=mage.advection.inner_convolutions() if mage.config.unet else (),
                                 unet_muon=recipe.unet_muon),
                      lambda number: (loss_of(*made, number), {}), None, watch, recipe.evaluate_every, seed,
                      _recipe(recipe, dataset, seed, chosen.pairs)
                      | {"first_pair": chosen.first_pair, "speeds": chosen.speeds, "vqvae": fingerprint(vqvae)}
                      | ({"start": fingerprint(start.mage)} if start is not None else {}),
                      apart=mage.advection.taught_apart() if mage.advection is not None else [])
        done = fit(stage, folder, until=until, progress=progress, team=team)
        as_they_were(mage.generator.layers)
        if done and team.main and machine.waits(device):
            with buffers_kept(mage):
                _write_speed(folder, recipe.batch // team.count, lambda: loss_of(mage, mage.guess, 0), device)
            mage.zero_grad(set_to_none=True)
    return mage.eval(), done


def pairs_of(chosen: Preset, dataset) -> range:
    """Which training pairs the second stage of a preset uses: no more than it could see. ValueError for none, and for
    pairs without a speed."""
    recipe, first = chosen.mage, chosen.first_pair
    if chosen.speeds is not None and chosen.speeds < 1:
        raise ValueError(f"speeds is {chosen.speeds}: each pair needs at least 1 of its own, or None for all")
    seen = recipe.samples + math.ceil(recipe.samples / recipe.batch) * recipe.more_anchors
    last = available(dataset, "train", None if chosen.pairs is None else first + chosen.pairs)
    if not available(dataset, "train"):
        raise ValueError(f"{dataset.name} has no training pairs: give its training list an entry or more")
    if not 0 <= first < last:
        raise ValueError(f"first_pair is {first} and pairs {chosen.pairs}: {dataset.name}, of "
                         f"{dataset.sizes['train']:,} training pairs counted from 0, has none there; begin with an "
                         "earlier one, or name as pairs how many to use from there on")
    return range(first, min(last, first + seen))


def compiled(mage: MAGE, wanted: str, device: torch.device,
             attempt: Callable[[tuple[Callable, ...]], object]) -> tuple[tuple[Callable, ...], bool]:
    """What trains a MAGE, its `forward` and `guess`, compiled as `wanted`; and whether its layers now are.

    "layers" compiles each of the transformer's layers where it is, which takes a fraction of the time that "on" takes
    for the whole of both; "auto" is "layers" on a GPU and "off" on a CPU. `attempt` takes a training step with them:
    compilation happens in the first pass forward and back, so that it fails here or not at all. A failure is printed,
    and training goes on without; so it does where a step is no faster, but with "on". ValueError for another word.
    """
    if wanted not in COMPILE:
        raise ValueError(f"compile is {wanted!r}: it must be one of {', '.join(COMPILE)}")
    plain = mage, mage.guess
    if wanted == "off" or wanted == "auto" and not machine.waits(device):
        return plain, False
    start, layers, whole = time.monotonic(), mage.generator.layers, wanted == "on"
    try:
        # by axis, number of steps and whether gradients are asked for, a layer is compiled anew
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        made = plain
        if whole:
            made = tuple(torch.compile(function, dynamic=False) for function in plain)
        else:
            for layer in layers:
                layer.compile(dynamic=False)
        attempt(made)
        took, fast = time.monotonic() - start, _seconds(lambda: attempt(made), device)
        with torch.compiler.set_stance("force_eager"):
            slow = _seconds(lambda: attempt(plain), device)
        print(f"compiled in {took:.0f} s: a step in {1e3 * fast:.1f} ms, without {1e3 * slow:.1f} ms", flush=True)
        if fast < slow or whole:
            return made, not whole
    except Exception as error:   # a compiler fails in as many ways as there are machines
        print(f"torch.compile failed ({type(error).__name__}: "
              f"{(str(error).splitlines() or ['no reason given'])[0][:200]}): training goes on without it", flush=True)
        torch.compiler.reset()
    as_they_were(layers)
    return plain, False


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """A model's buffers, such as the means of batch normalisation, stay through passes that are not training's."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])


def as_they_were(layers: Iterable[nn.Module]) -> None:
    """Layers that `compiled` has compiled, no longer so."""
    for layer in layers:
        layer._compiled_call_impl = None


def _seconds(step: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """The time of a step, after one to warm up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    step()
    wait()
    start = time.perf_counter()
    for _ in range(rounds):
        step()
    wait()
    return (time.perf_counter() - start) / rounds


def fastest_kernel(mage: MAGE, batch: int) -> str | None:
    """The attention kernel that trains a block of a model's layers fastest where it lies, measured;
    None if none runs."""
    config, device = mage.config, next(mage.parameters()).device
    x = torch.randn(batch, config.clip_length, config.rows, config.columns, config.width, device=device)
    steps, seconds = torch.arange(config.clip_length, device=device), {}

    def block() -> None:
        y = x.clone().requires_grad_()
        for layer in mage.generator.layers[:3]:
            y = layer(y, steps)
        y.float().square().mean().backward()

    for name in KERNELS:
        try:
            with attention_kernel(name), autocast(device):
                seconds[name] = _seconds(block, device)
        except RuntimeError as error:
            print(f"attention {name}: {str(error).splitlines()[0][:200]}", flush=True)
    mage.zero_grad(set_to_none=True)
    print("attention, a block forward and back: "
          + ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in seconds.items()), flush=True)
    return min(seconds, key=seconds.get, default=None)


def _write_speed(folder: Path, batch: int, loss: Callable[[], Tensor], device: torch.device) -> None:
    """What share of the GPU's measured matrix rate training reached: printed, and kept in `speed.json`. `loss` is that
    of the `batch` samples that this process sees of a step; of the first, which makes no guesses at frames: their work
    is not counted."""
    rate = float(np.median([line["rate"] for line in read_curve(folder / "mage.jsonl") if "rate" in line] or [0.0]))
    try:
        with FlopCounterMode(display=False) as counter:
            loss().backward()
        flop, peak = counter.get_total_flops() / batch, machine.matmul_rate(device)
    except RuntimeError as error:   # no room left, say: what was trained is worth more than its rate
        print(f"{rate:,.0f} samples/s; not compared with the GPU's rate ({str(error).splitlines()[0][:200]})",
              flush=True)
        return
    told = {"samples_per_second": rate, "tflop_per_sample": flop / 1e12, "tflops": rate * flop / 1e12,
            "matmul_tflops": peak / 1e12, "share": rate * flop / peak}
    print(f"{rate:,.0f} samples/s x {told['tflop_per_sample']:.4f} TFLOP = {told['tflops']:.0f} TFLOP/s, "
          f"{told['share']:.1%} of the {told['matmul_tflops']:.0f} TFLOP/s of a bf16 product of 8192 x 8192",
          flush=True)
    write_whole(folder / "speed.json", lambda temporary: temporary.write_text(json.dumps(told) + "\n"))


def _read_speed(folder: Path) -> dict[str, float] | None:
    """What `_write_speed` kept; None where there is nothing, or nothing whole."""
    try:
        return json.loads((folder / "speed.json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        print(f"speed.json is damaged ({error}): the card will not tell how fast training was", flush=True)
        return None


def generator(vqvae: VQVAE, mage: MAGE) -> metrics.FromBatch:
    """A trained pair as a generator of whole batches, for `metrics.evaluate`."""
    return metrics.FromBatch(lambda batch: generate_videos(
        vqvae, mage, batch.dataset, batch.images, batch.captions, batch.speeds, batch.seeds))


def fingerprint(model: nn.Module, leave_out: str | None = None) -> str:
    """A hash of a model's configuration and every weight; without the weights whose names begin with `leave_out`."""
    found = hashlib.sha256(repr(model.config).encode())
    for name, tensor in model.state_dict().items():
        if leave_out and name.startswith(leave_out):
            continue
        found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def token_key(vqvae: VQVAE) -> str:
    """A VQ-VAE's part of the name of a cache of tokens: what they depend on, which is all but the decoder.

    Saved weights, whose decoder alone is rounded (`weights.save`), thus take up the tokens of the run that made them.
    """
    return fingerprint(vqvae, "decoder.")


def _recipe(recipe, dataset, seed: int, pairs: int | None) -> dict:
    return {**dataclasses.asdict(recipe), **dataset.about, "seed": seed, "pairs": pairs}


# ---------------------------------------------------------------- both stages, and the table

def run_folder(dataset, chosen: Preset, seed: int) -> Path:
    """Where a run lives unless told otherwise."""
    return cache_folder() / "runs" / f"{dataset.name}-{chosen.name}-{dataset.source}-seed{seed}"


def check(dataset, chosen: Preset, *, start: weights.Trained | None = None, new_tokens: bool = False,
          first_stage: weights.Trained | None = None, team: Alone = ALONE) -> None:
    """ValueError for what cannot be trained, before any work: arguments as `train`.

    Such are a start and a first stage at once, new tokens without a start, weights for other images, sizes that cannot
    be built, advection without patches, a U-Net in several processes, batches that these cannot share evenly, pairs
    that a dataset has not, and videos of a folder that cannot be read.
    """
    if chosen.mage.advection and chosen.mage.unet and team.count > 1:
        raise ValueError(f"mage.unet is {chosen.mage.unet}, and {team.count} processes share the work: its batch "
                         "normalisation asks for whole batches, so train in one process, or without (--set "
                         "mage.unet=0)")
    batches = [chosen.mage.batch] + [chosen.mage.more_anchors] * (chosen.mage.advection > 0)
    if chosen.vqvae.shape == "patch" and (new_tokens or (start is None and first_stage is None)):
        batches.append(chosen.vqvae.batch)   # of the other shape each process sees the whole
    for size in batches:
        team.part(size)
    pairs_of(chosen, dataset)
    if not dataset.endless:
        _ = dataset.video_length   # whether each video of a folder can be read
    if new_tokens and start is None:
        raise ValueError("new tokens are for weights to go on from, and none are given: name some (on the command line "
                         "--start), or leave this out")
    if start is not None and first_stage is not None:
        raise ValueError("weights to go on from bring their own VQ-VAE: give those, or a first stage alone")
    if (given := start or first_stage) is not None:
        old, side = given.vqvae.config, 16 * given.vqvae.config.down
        if (old.channels, side) != (dataset.channels, dataset.image_size):
            raise ValueError(f"weights for {side} x {side} pixels of {old.channels} channels cannot be a "
                             f"start for {dataset.name}, of {dataset.image_size} x {dataset.image_size} and "
                             f"{dataset.channels}: start from others, or from nothing")
    shape = given.vqvae.config.shape if given is not None and not new_tokens else chosen.vqvae.shape
    if chosen.mage.advection and shape != "patch":
        raise ValueError(f"mage.advection is {chosen.mage.advection} and the VQ-VAE is of the shape {shape!r}, whose "
                         "codes have no pixels of their own: set mage.advection=0, or vqvae.shape=patch")
    tokens = vqvae_config(chosen.vqvae, dataset) if given is None or new_tokens else given.vqvae.config
    sizes = mage_config(chosen.mage, dataset, tokens.codebook_size, tokens.groups)
    if new_tokens:
        check_start(sizes, start.mage.config, "codebook_size", "groups")


def train(dataset, chosen: Preset, *, seed: int = 0, folder: Path | None = None, minutes: float | None = None,
          device: torch.device | str | None = None, progress: bool = True, start: weights.Trained | None = None,
          new_tokens: bool = False, first_stage: weights.Trained | None = None, command: str | None = None,
          team: Alone | None = None) -> weights.Trained | None:
    """Both stages of a preset on a dataset, from the run's checkpoints if it has any; None where time ran out first.

    The weights and their card end up in the run's folder; a run that is complete is loaded from there. With `start`,
    its VQ-VAE is taken as it is and its MAGE is trained on; with `new_tokens` the preset's own VQ-VAE is trained, and
    the MAGE goes over to its tokens first (`retokenise`). With `first_stage` its VQ-VAE is taken as it is, and MAGE
    trained from nothing. `command` is what the card says that made them. Processes that Accelerate started
    (`processes`) share the work, and all get the result. Where another run works in the folder, it waits for that.
    Raises ValueError, before any work, for what cannot be trained (`check`), and TrainingStopped as `loop.fit`.
    """
    seed = operator.index(seed)   # numpy's numbers read otherwise, and would seed otherwise
    team = processes(device) if team is None else team
    check(dataset, chosen, start=start, new_tokens=new_tokens, first_stage=first_stage, team=team)
    device = team.device or device_of(device)
    folder = Path(folder or run_folder(dataset, chosen, seed))
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder) if team.main else nullcontext():   # two runs would write over one another's checkpoints
        until = None if minutes is None else time.monotonic() + 60 * minutes
        shared = {"seed": seed, "until": until, "device": device, "progress": progress, "team": team}
        pairs, given = pairs_of(chosen, dataset), start or first_stage
        if new_tokens:
            start = _with_frames(start, dataset)
        if given is None or new_tokens:
            vqvae, done = train_vqvae(chosen, dataset, folder, **shared)
            if not done:
                return None
            if new_tokens:
                start = _with_tokens_of(vqvae, start, folder, seed, team)
        else:
            vqvae = given.vqvae
        if until is not None and machine.waits(device) and team.any(until - time.monotonic() < PREPARE_SECONDS):
            return None
        mage, done = train_mage(chosen, dataset, vqvae, folder, start=start, **shared)
        if not done:
            return None
        path = folder / "weights.safetensors"
        if team.main:
            stages = ("vqvae", "mage") if given is None or new_tokens else ("mage",)   # of what lies there
            curves = {stage: curve for stage in stages if (curve := read_curve(folder / f"{stage}.jsonl"))}
            about = {**dataset.about, "preset": chosen.name, "seed": seed,
                     "recipe": dataclasses.asdict(chosen), "first_pair": pairs.start, "pairs": pairs.stop,
                     "command": command or "mage_core.training.train",
                     "commit": commit(), "machine": describe_machine(), "processes": team.count, "curves": curves,
                     "seconds": {stage: curve[-1]["seconds"] for stage, curve in curves.items()}}
            for name, source in (("start", start), ("first_stage", first_stage)):
                if source is not None:
                    about[name] = {key: source.card[key] for key in START if key in source.card}
            if (speed := _read_speed(folder)) is not None:
                about["speed"] = speed
            # who trained nothing changes nothing
            if not _is_of(path, about, *dataset.about, "seed", "recipe", "curves"):
                weights.save(path, vqvae, mage, about, precision=chosen.precision)
        team.wait()
        trained = weights.load(path)
        trained.dataset = dataset   # a card only describes a folder of videos
        return trained


def _is_of(path: Path, about: dict, *names: str) -> bool:
    """Whether whole weights lie at a path, whose card says the same under some names."""
    try:
        card, about = weights.load(path).card, json.loads(json.dumps(about))
    except weights.CheckpointError:
        return False
    return all(card.get(name) == about.get(name) for name in names)


def _with_frames(start: weights.Trained, dataset) -> weights.Trained:
    """Weights to go on from with samples of what they were trained on: of a folder of videos, a card has none."""
    if hasattr(start.dataset, "clips"):
        return start
    if start.dataset.vocabulary != dataset.vocabulary:
        raise ValueError(f"new tokens are fitted on the videos of {start.dataset.name} that the weights to go on from "
                         f"were trained on, and the captions of {dataset.name} that are given have other words: give "
                         "those videos, or go on without new tokens")
    found = dataclasses.replace(start)
    found.dataset = dataset
    return found


def _with_tokens_of(vqvae: VQVAE, start: weights.Trained, folder: Path, seed: int, team: Alone) -> weights.Trained:
    """Weights to go on from with the tokens of another VQ-VAE, kept in the run's folder: the same after every stop."""
    path, card = folder / "start.safetensors", start.card
    about = {**card, "made_of": [fingerprint(model) for model in (start.vqvae, start.mage, vqvae)]}
    if team.main and not _is_of(path, about, "made_of"):
        weights.save(path, vqvae, retokenise(start, vqvae.cpu(), seed), about, precision="full")
    team.wait()
    made = weights.load(path)
    made.card, made.dataset = card, start.dataset
    return made


def commit() -> str | None:
    """The commit that this code is of, with "+" where files have changed since; None outside of a git checkout, or
    inside of another project's."""
    top = data_folder().parent
    try:
        asked = [subprocess.run(["git", *words], cwd=top, capture_output=True, text=True, check=True).stdout.strip()
                 for words in (["rev-parse", "--show-prefix", "HEAD"],
                               ["status", "--porcelain", "--untracked-files=no"])]
    except (OSError, subprocess.CalledProcessError):
        return None
    *inside, head = asked[0].splitlines()
    return None if inside else head[:12] + ("+" if asked[1] else "")


def results(trained: weights.Trained, n: int | None = None, *, split: str = "test", seed: int = 0,
            progress: bool = True, keep: Path | None = None, until: float | None = None,
            device: torch.device | str | None = None) -> list[metrics.Row] | None:
    """The table of supplement B for one model: MAGE, the first frame repeated,
    the VQ-VAE's reconstruction, the ceiling.

    The first n samples of a split drawn with `seed`, by default all; of a folder no more than it has. The ceiling is
    known for what the simulators draw. `keep` and `until` are those of `evaluation.evaluate_all`: None where time ran
    out. Runs on a GPU where there is one.
    """
    device = device_of(device)
    dataset, vqvae, mage = trained.dataset, trained.vqvae.to(device), trained.mage.to(device)
    rows = {"MAGE": generator(vqvae, mage), "first frame repeated": metrics.first_frame_repeated(),
            "VQ-VAE reconstruction": metrics.reconstruction(vqvae)}
    if isinstance(dataset, (MovingMNIST, CaterGen)):
        rows["perfect predictor"] = metrics.perfect_predictor()
    with tf32(False):
        return evaluate_all(rows, dataset, split, available(dataset, split, n),
                            seed=seed, batch_size=250 if device.type == "cuda" else 50, keep=keep, until=until,
                            key=f"{fingerprint(vqvae)} {fingerprint(mage)}", progress=progress)


def ready(dataset_name: str = "single-mnist", preset_name: str = "auto", *, seed: int = 0,
          weights_name: str = "shipped", digit_set: str = "mnist-5k", mode: str = "explicit",
          videos: str | Path | None = None, progress: bool = True) -> weights.Trained:
    """A trained model for a notebook, from the nearest place: shipped weights, this machine's run, or trained now.

    `weights_name` is "shipped" (the weights that ship for the dataset, where there are any and the preset was left at
    auto), "train" (never those), or a name or file for `weights.load`. `digit_set`, `mode` and `videos` are those of
    `clips.load_dataset`. A run in the preset's own folder that another recipe made, or other captions, done or not, is
    deleted and trained anew: give runs with `--set` a `--run` of their own. Weights there that are damaged are made
    again from the run's checkpoints. Prints what was used; ValueError for weights of another dataset.
    """
    if weights_name not in ("shipped", "train"):
        found = weights.load(weights_name)
        if found.dataset.name != dataset_name:
            raise ValueError(f"the weights {weights_name} are of {found.dataset.name} and the dataset is "
                             f"{dataset_name}: ask for the one that they are of, or for other weights")
        print(f"weights {weights_name}")
        return found
    explicit = preset_name != "auto" or preset_of_environment() != "auto"
    # what the weights that ship were trained on
    shipped = mode == "explicit" and videos is None and digit_set == "mnist-5k"
    if weights_name == "shipped" and shipped and not explicit and dataset_name in weights.names():
        print(f"the weights that ship for {dataset_name}")
        return weights.load(dataset_name)
    chosen, dataset = preset(preset_name, dataset_name), load_dataset(dataset_name, digit_set, mode=mode, videos=videos)
    folder = run_folder(dataset, chosen, seed)
    kept = folder / "weights.safetensors"
    about = {**dataset.about, "recipe": dataclasses.asdict(chosen)}
    if _is_of(kept, about, *about):
        found = weights.load(kept)
        found.dataset = dataset
        print(f"reused the {chosen.name} run of {dataset_name} that is on disk")
        return found
    print(f"training {dataset_name} with the preset {chosen.name}: nothing was found to reuse")
    if _is_of(kept, {}) and "recipe" in weights.load(kept).card:   # the preset has changed since, or the captions
        shutil.rmtree(folder)
    try:
        return train(dataset, chosen, seed=seed, folder=folder, progress=progress)
    except OtherRecipe:   # of a run that was not done
        shutil.rmtree(folder)
        return train(dataset, chosen, seed=seed, folder=folder, progress=progress)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mage_core.training", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="single-mnist")
    parser.add_argument("--digit-set", default="mnist-5k", help="mnist-5k ships; mnist-70k must be downloaded first")
    parser.add_argument("--captions", default="explicit", help="of CATER-GEN: explicit or ambiguous")
    parser.add_argument("--videos", type=Path, metavar="FOLDER",
                        help="train on a folder of videos with captions: a CATER-GEN download, or footage of your own")
    parser.add_argument("--preset", default="auto", help="smoke, quick, gpu, paper or auto")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.FIELD=VALUE", dest="changes",
                        help="change a field of the preset, e.g. mage.samples=100_000 (name a --run of its own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help="the run's folder (default: in data/cache/runs)")
    parser.add_argument("--minutes", type=float, help="stop at a checkpoint after this time; start again to go on")
    parser.add_argument("--test-clips", type=int, help="test pairs in the table (default: the preset's)")
    parser.add_argument("--start", help="weights to go on from, by name or file, of this dataset or of one "
                        "whose images are of the same kind, in place of training from nothing; sizes are theirs")
    parser.add_argument("--first-stage", metavar="NAME_OR_FILE", help="weights whose VQ-VAE is taken as it is: MAGE "
                        "alone is trained, from nothing")
    parser.add_argument("--new-tokens", action="store_true", help="with --start: train the preset's own VQ-VAE, and "
                        "let MAGE go over to its tokens, in place of taking the VQ-VAE of those weights")
    given = parser.parse_args(arguments)
    if given.minutes is not None and math.isnan(given.minutes):
        parser.error("--minutes is nan: give a number of minutes, or leave it out")
    if given.minutes is not None and torch.cuda.is_available() and 60 * given.minutes <= PREPARE_SECONDS:
        parser.error(f"--minutes is {given.minutes:g}: on a GPU the second stage needs {PREPARE_SECONDS:g} seconds "
                     "before its first step; give it more")

    try:   # what was asked for wrongly is told in a line
        if given.run is not None:
            given.run = expanded(given.run)
            if given.run.exists() and not given.run.is_dir():
                raise ValueError(f"--run is {given.run}, which is a file: name a folder")
        start, first_stage = (weights.load(name) if name else None for name in (given.start, given.first_stage))
        chosen = preset(given.preset, given.dataset)
        chosen = changed(chosen if start is None else sized_like(chosen, start.mage.config), given.changes)
        dataset = load_dataset(given.dataset, given.digit_set, mode=given.captions, videos=given.videos)
        count = available(dataset, "test", chosen.test_clips if given.test_clips is None else given.test_clips)
        if count < 1:
            raise ValueError(f"{count} samples of {dataset.name}'s split 'test' are to be in the table: it needs 1 or "
                             "more")
        team = processes()
        check(dataset, chosen, start=start, new_tokens=given.new_tokens, first_stage=first_stage, team=team)
        dataset.spec("train", pairs_of(chosen, dataset).start)   # for which there must be digits
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    if team.main:
        print(describe_machine(), describe(chosen), f"dataset {dataset.name} ({dataset.source}), seed {given.seed}",
              *([f"{team.count} processes"] if team.count > 1 else []), sep="\n", flush=True)
    command = "python -m mage_core.training " + " ".join(
        without_paths(sys.argv[1:] if arguments is None else arguments))
    try:
        trained = train(dataset, chosen, seed=given.seed, folder=given.run, minutes=given.minutes, team=team,
                        command=command, start=start, new_tokens=given.new_tokens, first_stage=first_stage)
    except (UnusableCheckpoint, TrainingStopped) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if not team.main:
        return
    if trained is None:
        print("time is up: the run is kept; the same command goes on with it")
        return
    rows = results(trained, count)
    trained.add_results(rows)
    print(f"\n{dataset.name}, {rows[0].n} held-out test pairs\n\n{metrics.table(rows)}")


def without_paths(words: list[str]) -> list[str]:
    """A command's words as a card may tell them: of a path, only its last part."""
    def told(word: str) -> str:
        option, mark, value = word.partition("=") if word.startswith("--") else ("", "", word)
        return option + mark + (Path(value).name if "/" in value or os.sep in value else value)

    return [told(word) for word in words]


if __name__ == "__main__":
    relaunch_with_fast_allocator()
    main()
