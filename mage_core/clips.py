"""From whole videos to the clips that the model sees: speed, frame indices, batches, token caches (4.2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from mage_core import captions
from mage_core.draws import Draws
from mage_core.files import cache_folder, write_whole
from mage_core.machine import autocast, has_fast_bf16
from mage_core.tokens import id_dtype

WATCHED = 1_000_000   # see `watched`
CLIPS_AT_ONCE = 20    # videos whose pixels are in memory together while tokens are made


def check_speed(speed: float) -> float:
    """The speed eta as a float; a ValueError unless it lies in the open interval (0, 1)."""
    try:
        value = float(speed)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0.0 < value < 1.0:
        raise ValueError(f"speed is {speed!r}: it must lie inside the open interval (0, 1); "
                         "0.1 is slow, 0.5 the middle, 0.9 fast")
    return value


def frame_indices(length: int, speed: float, interval: tuple[float, float], clip_length: int = 10) -> np.ndarray:
    """Which frames of a video of `length` frames make the clip: (clip_length,) int64 (4.2, supplement C.2).

    The sampling interval is lo + eta (hi - lo) frames; the clip takes every interval-th frame from the
    first, and repeats the last one where the video ends early. Raises ValueError for eta outside (0, 1).
    """
    lo, hi = interval
    step = lo + check_speed(speed) * (hi - lo)
    count = max(1, round(length / step))   # at least the first frame, however short the video
    picked = _evenly(length, count)[:clip_length]
    return np.pad(picked, (0, clip_length - len(picked)), mode="edge")


def _evenly(length: int, count: int) -> np.ndarray:
    """`count` frames of a video, evenly from its first to its last (4.2)."""
    return np.floor(np.linspace(0, length - 1, count)).astype(np.int64)


# ---------------------------------------------------------------- datasets

class Dataset(Protocol):
    """What the rest of the house asks of a dataset: `MovingMNIST`, `CaterGen` and `VideoFolder` all have it.

    `name` says how captions read; `image_size` (pixels), `channels`, `interval` (frames from one sampled frame to the
    next at speed 0 and 1), `clip_length`, `video_length` (the frames of every whole video, None where they differ) and
    `longest` (the most that one has) say what a clip is; `sizes` the number of samples of each split, beyond which
    `spec` goes on where the dataset is `endless`. `content` tells apart what frames are made of (it is part of every
    cache's name), `source` is a short word of it for the names of runs, and `about` is what a card tells of it.
    `vocabulary` and `context_length` are those of `encode`.
    """

    name: str
    image_size: int
    channels: int
    interval: tuple[float, float]
    clip_length: int
    endless: bool

    @property
    def video_length(self) -> int | None: ...
    @property
    def longest(self) -> int: ...
    @property
    def sizes(self) -> dict[str, int]: ...
    @property
    def content(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def about(self) -> dict: ...
    @property
    def vocabulary(self) -> tuple[str, ...]: ...
    @property
    def context_length(self) -> int: ...

    def spec(self, split: str, index: int, seed: int = 0):
        """The sample at an index of a split: small, frozen, with a `speed` in (0, 1) and its `split`."""

    def caption(self, spec) -> str:
        """The sentence of a sample."""

    def lengths(self, specs: Sequence) -> np.ndarray:
        """The frames of some samples' videos: int (b,)."""

    def video(self, spec) -> np.ndarray:
        """A whole video: uint8 (n H W) or (n H W c)."""

    def clips(self, specs: Sequence, indices: np.ndarray) -> np.ndarray:
        """The frames `indices` (b T) of b samples and no others: uint8 (b T H W) or (b T H W c)."""

    def encode(self, sentence: str) -> list[int]:
        """Token ids of a sentence, [CLS] and [SEP] around it; ValueError for one that is none."""

    def tidy(self, sentence: str) -> str:
        """A sentence as the dataset writes it; ValueError for one that is none."""


def load_dataset(name: str, digit_set: str = "mnist-5k", *, mode: str = "explicit",
                 videos: str | Path | None = None) -> Dataset:
    """The dataset of a name, on a digit set (Moving MNIST) or with captions of a mode (CATER-GEN: explicit, ambiguous).

    With `videos`, a folder of videos with captions: the authors' layout for cater-gen-v1 and v2, any footage under any
    other name (`cater.folders`). ValueError for a name, digit set or mode that is unknown or the dataset has none of,
    FileNotFoundError for a folder or list that is not there.
    """
    from mage_core import cater, moving_mnist

    drawn = (*moving_mnist.DATASETS, *cater.DATASETS)
    if videos is not None:
        if name in moving_mnist.DATASETS:
            raise ValueError(f"{name} is drawn here and has no folder of videos: leave the folder out, or choose "
                             f"{' or '.join(cater.DATASETS)}, or a new name for footage of your own")
        if digit_set != "mnist-5k":
            raise ValueError(f"{name} of a folder shows no digits of ours: leave the digit set {digit_set!r} out")
        if mode != "explicit" and name not in cater.DATASETS:
            raise ValueError(f"{name} has the captions of its folder's lists: leave {mode!r} out, or choose "
                             f"{' or '.join(cater.DATASETS)}")
        return cater.VideoFolder(videos, name, mode)
    if name in cater.DATASETS:
        if digit_set != "mnist-5k":
            raise ValueError(f"{name} shows no digits: leave the digit set {digit_set!r} out")
        return cater.CaterGen(name, mode)
    if name in moving_mnist.DATASETS:
        if mode != "explicit":
            raise ValueError(f"{name} has captions of one kind: leave {mode!r} out, or choose "
                             f"{' or '.join(cater.DATASETS)}")
        return moving_mnist.MovingMNIST(name, digit_set)
    raise ValueError(f"unknown dataset {name!r}: choose one of {', '.join(drawn)}; footage of your own needs its "
                     "folder (videos=FOLDER, on the command line --videos FOLDER)")


def described(about: dict) -> Dataset:
    """The dataset that a card tells of (`Dataset.about`): for a folder of videos its `cater.folders.Language` only.

    KeyError where the card leaves out what must be there, ValueError for a dataset that is unknown.
    """
    from mage_core import cater

    if "videos" in about:
        told = about["videos"]
        return cater.Language(about["dataset"], tuple(told["vocabulary"]), told["context_length"], told["image_size"],
                              tuple(told["interval"]), about["mode"])
    if about["dataset"] in cater.DATASETS:
        return cater.CaterGen(about["dataset"], about.get("mode", "explicit"), about.get("image_size", 128))
    return load_dataset(about["dataset"], about["digit_set"])


def available(dataset: Dataset, split: str, wanted: int | None = None) -> int:
    """How many samples of a split to use: `wanted`, or the dataset's own number; of a folder no more than it has.

    ValueError for an unknown split."""
    if split not in dataset.sizes:
        raise ValueError(f"unknown split {split!r}: {dataset.name} has {', '.join(dataset.sizes)}")
    own = dataset.sizes[split]
    return own if wanted is None else wanted if dataset.endless else min(wanted, own)


def watched(dataset: Dataset, count: int) -> tuple[str, range]:
    """Samples to look at during training, never those of the results table: their split and indices.

    Test samples from the millionth on where the dataset is endless; of a folder those of its validation list, or of
    its training list where it has none.
    """
    if dataset.endless:
        return "test", range(WATCHED, WATCHED + count)
    split = "validation" if dataset.sizes.get("validation") else "train"
    return split, range(min(count, dataset.sizes[split]))


def text_ids(captions_: Sequence[str], dataset: Dataset | str) -> torch.Tensor:
    """Sentences as token ids (b l), int64, padded with 0; ValueError for a sentence that does not parse.

    `dataset` is one, or the name of one of the project's own.
    """
    encode = (lambda sentence: captions.encode(sentence, dataset)) if isinstance(dataset, str) else dataset.encode
    rows = [encode(sentence) for sentence in captions_]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


# ---------------------------------------------------------------- tokens, made once

@dataclass(frozen=True)
class TokenClips:
    """n pairs as tokens, with their captions: what the second stage trains on.

    `token_ids` (n, frames, h, w) of `tokens.id_dtype`, shorter videos padded; `lengths` (n,) frames of each; `text_ids`
    (n l) int64. With `speeds` (n k) a pair has no other speeds than these k, and its frames are those of one clip after
    the other.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    text_ids: torch.Tensor
    interval: tuple[float, float]
    clip_length: int
    speeds: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def at_own_speeds(self, samples: np.ndarray, speeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each pair has k speeds: which frames of the `token_ids` of some samples (b,) show the clips (b T), and
        the speeds (b,), for speeds (b,) that were asked for: each k-th part of (0, 1) stands for one of them."""
        which = (speeds * self.speeds.shape[1]).astype(np.int64)
        return which[:, None] * self.clip_length + np.arange(self.clip_length), self.speeds[samples, which]

    def batch(self, samples: Sequence[int], speeds: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The clips of some samples at some speeds: token ids (b T h w) int64, text ids (b l), speed (b,). Training
        takes them from `batches.Clips`, on its device."""
        samples = np.asarray(samples)
        if self.speeds is not None:
            frames, speeds = self.at_own_speeds(samples, np.asarray(speeds))
        else:
            frames = np.stack([frame_indices(self.lengths[sample], speed, self.interval, self.clip_length)
                               for sample, speed in zip(samples, speeds)])
        return (torch.from_numpy(self.token_ids[samples[:, None], frames].astype(np.int64)),
                self.text_ids[torch.from_numpy(samples)], torch.tensor(speeds, dtype=torch.float32))


def cache_key(*what: object) -> str:
    """A short name for what made a cache: the same parts give the same name, any other part another."""
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:16]


def token_clips(dataset: Dataset, vqvae, split: str, count: int, *, vqvae_key: str, seed: int = 0, first_pair: int = 0,
                speeds: int | None = None, chunk: int = 100, progress: bool = True) -> TokenClips:
    """`count` samples of a split from `first_pair` on as tokens, from the cache or made and kept there.

    Only frames that some speed shows are drawn; the others get the tokens of the frame before. With `speeds`, each pair
    has so many speeds of its own, drawn from its seed, and only their frames are drawn. The cache's name is a hash of
    the dataset, its content, the split, seed, `vqvae_key` (`training.token_key` of the VQ-VAE), `first_pair` and
    `speeds` where given, of a folder which frames are shown, and whether the device encodes in bf16; it lies in parts
    of `chunk` samples (`in_parts`), which runs with more or fewer samples share. Captions are not in it: they are read
    anew.
    """
    specs = [dataset.spec(split, index, seed) for index in range(first_pair, first_pair + count)]
    own = None if speeds is None else np.array([
        [draws.inside() for _ in range(speeds)] for draws in (
            Draws("speeds", dataset.name, split, first_pair + index, seed) for index in range(count))])
    lengths = np.asarray(dataset.lengths(specs))
    device = next(vqvae.parameters()).device
    side = dataset.image_size // vqvae.config.down

    def drawn(k: int, padded: int) -> np.ndarray:
        length, shown_as = int(lengths[k]), (dataset.interval, dataset.clip_length)
        if own is None:
            return _shown(length, *shown_as, padded)
        return np.concatenate([frame_indices(length, speed, *shown_as) for speed in own[k]])

    def make(first: int, end: int) -> np.ndarray:
        vqvae.eval()
        longest, made = lengths[first:end].max(), []
        for at in range(first, end, CLIPS_AT_ONCE):   # pixels of a few videos at a time, however many there are
            few = range(at, min(end, at + CLIPS_AT_ONCE))
            frames = np.stack([drawn(k, int(longest)) for k in few])
            made.append(encode_frames(vqvae, dataset.clips([specs[k] for k in few], frames), device))
        return np.concatenate(made)

    # what shows frames is a folder's own choice; of what is drawn here it comes with the name
    shown = () if dataset.endless else (dataset.interval, dataset.clip_length)
    some = (((first_pair,) if first_pair else ()) + (("speeds", speeds) if speeds else ())
            + (("bf16",) if has_fast_bf16(device) else ()))
    key = cache_key("tokens 3", dataset.name, dataset.content, split, seed, vqvae_key, *shown, *some)
    dtype = id_dtype(vqvae.config.tokens)

    def frames_of(first: int, end: int) -> int:
        return int(lengths[first:end].max()) if speeds is None else speeds * dataset.clip_length

    tokens = np.zeros((count, frames_of(0, count), side, side), dtype)
    for first, part in in_parts(
            cache_folder() / f"tokens-{dataset.name}-{split}-{key}", count, make, chunk=chunk, dtype=dtype,
            shape=lambda first, end: (end - first, frames_of(first, end), side, side),
            title=f"tokens of {dataset.name}, {split}", unit="video", progress=progress):
        tokens[first:first + len(part), :part.shape[1]] = part
        tokens[first:first + len(part), part.shape[1]:] = part[:, -1:]
    return TokenClips(tokens, lengths, text_ids([dataset.caption(spec) for spec in specs], dataset),
                      dataset.interval, dataset.clip_length, own)


@cache
def _shown(length: int, interval: tuple[float, float], clip_length: int, padded: int) -> np.ndarray:
    """For each frame of a video, padded with its last: the latest up to it that a clip at some speed shows; (n,)."""
    counts = range(max(1, round(length / interval[1])), max(1, round(length / interval[0])) + 1)
    shown = np.unique(np.concatenate([_evenly(length, count)[:clip_length] for count in counts]))
    return shown[np.searchsorted(shown, np.minimum(np.arange(padded), length - 1), side="right") - 1]


def frame_pool(dataset: Dataset, split: str, indices: range, count: int, seed: int = 0, *, chunk: int = 250,
               progress: bool = True) -> np.ndarray:
    """`count` frames of some samples of a split, drawn once: uint8 (count H W) or (count H W c).

    The samples come in turn, each time with another random frame. Kept on disk as `token_clips` keeps tokens.
    """
    key = cache_key("frames 1", dataset.name, dataset.content, split, indices.start, len(indices),
                    *[indices.step] * (indices.step != 1), seed)   # as it always was for a step of 1
    draw = np.random.Generator(np.random.Philox(int(key, 16))).random(count)
    specs = [dataset.spec(split, index) for index in indices[:count]]
    lengths = np.asarray(dataset.lengths(specs))

    def make(first: int, end: int) -> np.ndarray:
        places = np.arange(first, end) % len(specs)
        frames = (draw[first:end] * lengths[places]).astype(np.int64)
        return dataset.clips([specs[place] for place in places], frames[:, None])[:, 0]

    size = (dataset.image_size,) * 2 + ((dataset.channels,) if dataset.channels > 1 else ())
    parts = in_parts(cache_folder() / f"frames-{dataset.name}-{split}-{key}", count, make, chunk=chunk, dtype=np.uint8,
                     shape=lambda first, end: (end - first, *size), title=f"frames of {dataset.name}, {split}",
                     unit="frame", progress=progress)
    pool = np.empty((count, *size), np.uint8)
    for first, part in parts:
        pool[first:first + len(part)] = part
    return pool


def in_parts(folder: Path, count: int, make: Callable[[int, int], np.ndarray], *, chunk: int, dtype: type,
             shape: Callable[[int, int], tuple[int, ...]], title: str, unit: str,
             progress: bool = True) -> Iterator[tuple[int, np.ndarray]]:
    """A long array part by part, as (first row, rows): each from its file in a folder, or made and kept there.

    `make(first, end)` makes the rows from `first` up to and without `end`. Each file is written whole, so that a run
    that is killed goes on where it was; one that is missing, damaged or of another `shape(first, end)` is made again.
    """
    with tqdm(total=count, desc=title, unit=unit, disable=not progress) as bar:
        for first in range(0, count, chunk):
            end = min(count, first + chunk)
            path = folder / f"{first:06d}-{end:06d}.npz"
            part = _cached(path, shape(first, end), dtype)
            if part is None:
                part = make(first, end)
                write_whole(path, lambda temporary: np.savez_compressed(temporary, rows=part))
            yield first, part
            bar.update(end - first)


@torch.no_grad()
def encode_frames(vqvae, frames: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """8-bit frames (b t H W) or (b t H W c) as token ids (b t h w); a frame equal to its predecessor once."""
    b, t = frames.shape[:2]
    flat = frames.reshape(b * t, *frames.shape[2:])
    again = np.zeros(b * t, bool)
    for k in range(1, b * t):
        again[k] = np.array_equal(flat[k], flat[k - 1])
    first, made = np.flatnonzero(~again), []
    for start in range(0, len(first), 256):   # memory is bounded by these, not by the number of frames
        images = torch.from_numpy(flat[first[start:start + 256]]).to(device).float() / 255
        images = images[:, None] if frames.ndim == 4 else images.permute(0, 3, 1, 2)
        with autocast(device):
            made.append(vqvae.encode(images.contiguous(memory_format=torch.channels_last))
                        .cpu().numpy().astype(id_dtype(vqvae.config.tokens)))
    ids = np.concatenate(made)
    return ids[np.cumsum(~again) - 1].reshape(b, t, *ids.shape[1:])


def _cached(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray | None:
    """The array of a cache file, or None where there is none of that shape that can be read."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            array = file["rows"]   # a .npz carries a checksum of its content
    except Exception:   # foreign bytes fail in as many ways as there are bytes
        return None
    return array if array.shape == shape and array.dtype == dtype else None
