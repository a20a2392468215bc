"""What a training step sees, made where training runs: clips of tokens (4.2), and frames that stay on a GPU.

A batch is a function of (seed, step). Its few numbers (which samples, speeds, frames) are drawn on the host and sent
along; what is drawn for every token is drawn on the device itself, so that a step never waits for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mage_core import machine
from mage_core.axial import sampled_frames
from mage_core.clips import TokenClips
from mage_core.loop import seed_of
from mage_core.machine import autocast
from mage_core.mage import MAGE
from mage_core.presets import MAGERecipe
from mage_core.processes import ALONE, Alone


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """A small array on a device, without waiting for what the device still has to do."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Clips:
    """`TokenClips` on a device: whole batches of clips by index."""

    def __init__(self, source: TokenClips, device: torch.device | str = "cpu"):
        self.source, self.device = source, torch.device(device)
        ids = source.token_ids   # see `tokens.id_dtype`
        self.token_ids = torch.from_numpy(ids.view(np.int16) if ids.dtype == np.uint16 else ids).to(self.device)
        self.text_ids = source.text_ids.to(self.device)

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, samples: np.ndarray, speeds: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """The clips of samples (b,) at speeds (b,), or at those of their own that these stand for: token ids (b T h w)
        int64, text ids (b l), speed (b,)."""
        if self.source.speeds is not None:
            frames, speeds = self.source.at_own_speeds(samples, speeds)
        else:
            frames = sampled_frames(torch.from_numpy(self.source.lengths[samples]), torch.from_numpy(speeds),
                                    self.source.interval, self.source.clip_length).numpy()
        rows = sent(samples, self.device)
        return (self.token_ids[rows[:, None], sent(frames, self.device)].long(), self.text_ids[rows],
                sent(speeds.astype(np.float32), self.device))


# ---------------------------------------------------------------- a step of the second stage

def training_batch(clips: Clips, mage: MAGE, recipe: MAGERecipe, seed: int, step: int, *, team: Alone = ALONE,
                   guess: Callable | None = None) -> dict[str, Tensor | None]:
    """The arguments of `MAGE.forward` for a step: clips, captions, speeds, and what is hidden, left out or weighed.

    Every pair comes once an epoch, in an order of the epoch's; its speed is drawn anew each time (4.2). Of a `team`'s
    batch this is the process' own part. `guess` makes the model's own guesses (default: `MAGE.guess`).

    With `MAGERecipe.more_anchors` there are clips besides of which displacements alone are learned, drawn anew each
    step. On a GPU shapes never depend on what was drawn: all targets get a weight in place of some being chosen, and
    guesses are made for a fixed number of clips, in a rising share of the steps.
    """
    size, pairs, device = recipe.batch, len(clips), clips.device
    places = np.arange(step * size, (step + 1) * size)
    samples = np.array([_order(seed, int(epoch), pairs)[place]
                        for epoch, place in zip(places // pairs, places % pairs)])
    draw = np.random.Generator(np.random.Philox(seed_of(seed, "clips", step)))
    dice = torch.Generator(device).manual_seed(seed_of(seed, "tokens", step))
    ids, text, speed = clips.batch(samples, draw.random(size).clip(1e-6, 1 - 1e-6))
    frames, later, inputs = None, recipe.later_frames, ids.shape[1] - 1
    if later is not None and later < inputs - 1:
        frames = np.append(0, 1 + np.sort(draw.choice(inputs - 1, later, replace=False)))
    given = corrupted(ids, mage, recipe, dice)
    fixed = machine.waits(device)
    own = _own(recipe, step, draw, fixed)
    kept = None if frames is None else sent(frames, device)
    predict = weight = None
    if fixed:
        weight = balanced_weights(ids, kept) if recipe.balanced else None
    elif recipe.balanced:
        predict = balanced(ids, kept, dice)
    if team.count > 1:   # the mean over processes of what each sums is to be the whole batch's mean
        if predict is not None:
            predict, weight = None, predict / predict.sum()
        weight = None if weight is None else weight * team.count
    part = team.part(size)
    looks = more = None
    lengths = clips.source.lengths[samples[part]]
    if recipe.advection:
        looks = torch.rand(ids[:, 1:].shape, generator=dice, device=device)[part]
        if recipe.more_anchors:   # an anchor costs little beside a clip
            others, some = recipe.more_anchors, team.part(recipe.more_anchors)
            also = draw.integers(pairs, size=others)[some]
            more = clips.batch(also, draw.random(others).clip(1e-6, 1 - 1e-6)[some])
            asked = torch.rand((others, *ids[0, 1:].shape), generator=dice, device=device)
            looks = torch.cat([looks, asked[some]])
            lengths = np.append(lengths, clips.source.lengths[also])
    ids, given, text, speed = ids[part], given[part], text[part], speed[part]
    predict, weight = (None if chosen is None else chosen[part] for chosen in (predict, weight))
    own = own[(own >= part.start) & (own < part.stop)] - part.start if team.count > 1 else own
    if len(own):   # the step's own weights guess
        rows = sent(own, device)
        given[rows] = guessed(ids[rows], text[rows], speed[rows], mage, frames, guess)
    return {"token_ids": given, "text_ids": text, "speed": speed, "target_ids": ids, "frames": kept,
            "predict": predict, "weight": weight, "dice": looks, "more": more,
            "lengths": sent(lengths, device) if mage.config.longest else None}


def _own(recipe: MAGERecipe, step: int, draw: np.random.Generator, fixed: bool) -> np.ndarray:
    """The clips of a step that get the model's own guesses: more of them as there is more to learn from them.

    As many either way, on average: each clip by itself, or (`fixed`) always the same number of them, or none.
    """
    if not recipe.own_frames:
        return np.zeros(0, np.int64)
    progress = min(1.0, step * recipe.batch / recipe.samples)
    if not fixed:
        return np.flatnonzero(draw.random(recipe.batch) < recipe.own_frames * progress)
    number = max(1, round(recipe.own_frames * recipe.batch))
    chosen = np.sort(draw.choice(recipe.batch, number, replace=False))
    return chosen if draw.random() < progress * recipe.own_frames * recipe.batch / number else chosen[:0]


def corrupted(ids: Tensor, mage: MAGE, recipe: MAGERecipe, dice: torch.Generator) -> Tensor:
    """Clips (b t h w) as the model is shown them: in some, the frames after the first are hidden, all or in part.

    In training the model sees true frames, in generation its own: what it cannot see, it cannot lean on.
    """
    given = ids.clone()
    if not (recipe.hide_all or recipe.hide_some):
        return given
    kind, share, token = (torch.rand(shape, generator=dice, device=ids.device)
                          for shape in (len(ids), len(ids), given[:, 1:].shape))
    kind, share = kind[:, None, None, None], share[:, None, None, None]
    partly = (kind >= recipe.hide_all) & (kind < recipe.hide_all + recipe.hide_some) & (token < share / 2)
    given[:, 1:].masked_fill_((kind < recipe.hide_all) | partly, mage.config.hidden_id)
    return given


@torch.no_grad()
def guessed(ids: Tensor, text: Tensor, speed: Tensor, mage: MAGE, frames: np.ndarray | None,
            guess: Callable | None = None) -> Tensor:
    """Clips (b t h w) whose later frames are the model's own guesses from the first frame alone.

    What generation feeds back is much like this, mistakes included, and it takes one forward pass. With `frames`, only
    those input frames are guessed, and the others hidden.
    """
    given = ids.clone()
    given[:, 1:] = mage.config.hidden_id
    wanted = np.arange(1, ids.shape[1] - 1) if frames is None else frames[1:]
    if not len(ids) or not len(wanted):
        return given
    sources = wanted - 1 if wanted[0] == 1 else np.append(0, wanted - 1)
    with autocast(ids.device):
        guesses = (guess or mage.guess)(given, text, speed, sent(sources, ids.device), len(wanted))
    given[:, sent(wanted, ids.device)] = guesses
    return given


def balanced(ids: Tensor, frames: Tensor | None, dice: torch.Generator) -> Tensor:
    """Which targets count (b s h w): all that differ from the first frame's token, and as many of the others, drawn.

    All of them where none differs: a loss over nothing is not a number.
    """
    changed = _changed(ids, frames)
    if not changed.any():
        return ~changed
    share = changed.float().mean() / (~changed).float().mean().clamp_min(1e-6)
    return changed | (torch.rand(changed.shape, generator=dice, device=ids.device) < share)


def balanced_weights(ids: Tensor, frames: Tensor | None) -> Tensor:
    """The weight of each target (b s h w), 1 in all: its expected one where `balanced` draws. Waits for nothing."""
    changed = _changed(ids, frames)
    number = changed.sum()
    share = (number / (changed.numel() - number).clamp_min(1)).clamp_max(1.0)
    weight = torch.where(changed, 1.0, torch.where(number > 0, share, 1.0))
    return weight / weight.sum()


def _changed(ids: Tensor, frames: Tensor | None) -> Tensor:
    return (ids[:, 1:] if frames is None else ids[:, frames + 1]) != ids[:, :1]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, pairs: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed_of(seed, "order", epoch))).permutation(pairs)


# ---------------------------------------------------------------- frames of the first stage, on a GPU

class DeviceFrames:
    """A `FrameSource` for a GPU: some of its frames, drawn once, stay there in 8 bits; each step's batch is cut there.

    `count` frames are drawn on all cores.
    """

    def __init__(self, source, count: int, device: torch.device | str, seed: int, *, chunk: int = 1_000,
                 progress: bool = True):
        self.seed, self.device = seed, torch.device(device)
        parts = []
        with tqdm(total=count, desc="frames", unit="frame", disable=not progress) as bar:
            for number, start in enumerate(range(0, count, chunk)):
                size = min(chunk, count - start)
                parts.append((source.batch(-10 - number, size) * 255).round().to(torch.uint8).to(self.device))
                bar.update(size)
        self.frames = torch.cat(parts)
        self.background = source.background.to(self.device)

    def batch(self, step: int, size: int, crop: int | None = None, grid: int = 1) -> Tensor:
        """`size` frames (b c H W) in [0, 1], or squares of them: as `FrameSource.batch`, drawn by the device."""
        return self.cut(step, size, crop, grid)[0]

    def cut(self, step: int, size: int, crop: int | None = None, grid: int = 1) -> tuple[Tensor, Tensor]:
        """`batch`, and what is behind each of its images: both (b c H W)."""
        dice = torch.Generator(self.device).manual_seed(seed_of(self.seed, "frames", step))
        chosen = torch.randint(len(self.frames), (size,), generator=dice, device=self.device)
        images = self.frames[chosen].float() / 255
        behind, side = self.background.expand_as(images), images.shape[-1]
        if crop is None or crop >= side:
            return images, behind
        content = (images - behind).abs().amax(1) > 0.02
        luck = torch.rand(content.shape, generator=dice, device=self.device)
        place = (content * luck).flatten(1).argmax(1)   # a random pixel of what moves; the first where nothing does
        top, left = (((v - crop // 2).div(grid, rounding_mode="floor") * grid).clamp(0, side - crop)
                     for v in (place // side, place % side))
        span = torch.arange(crop, device=self.device)
        each = torch.arange(size, device=self.device)[:, None, None]
        rows, columns = (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]
        return tuple(whole[each, :, rows, columns].permute(0, 3, 1, 2) for whole in (images, behind))
