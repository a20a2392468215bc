"""From whole videos to the clips that the model sees: speed, frame indices, batches, token caches (4.2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from mage_core import captions
from mage_core.files import cache_folder, write_whole
from mage_core.machine import autocast


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
    picked = np.floor(np.linspace(0, length - 1, count)).astype(np.int64)[:clip_length]
    return np.pad(picked, (0, clip_length - len(picked)), mode="edge")


def load_dataset(name: str, digit_set: str = "mnist-5k"):
    """The dataset of a name; ValueError for an unknown one."""
    from mage_core import moving_mnist

    if name in moving_mnist.DATASETS:
        return moving_mnist.MovingMNIST(name, digit_set)
    raise ValueError(f"unknown dataset {name!r}: choose one of {', '.join(moving_mnist.DATASETS)}")


def text_ids(captions_: Sequence[str], dataset_name: str) -> torch.Tensor:
    """Sentences as token ids (b l), int64, padded with 0; CaptionError for a sentence that does not parse."""
    rows = [captions.encode(sentence, dataset_name) for sentence in captions_]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


# ---------------------------------------------------------------- tokens, made once

@dataclass(frozen=True)
class TokenClips:
    """All frames of n pairs as tokens, with their captions: what the second stage trains on.

    `token_ids` (n, frames, h, w) uint16, shorter videos padded; `lengths` (n,) frames of each; `text_ids` (n l) int64.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    text_ids: torch.Tensor
    interval: tuple[float, float]
    clip_length: int

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, samples: Sequence[int], speeds: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The clips of some samples at some speeds: token ids (b T h w) int64, text ids (b l), speed (b,)."""
        rows = [self.token_ids[sample, frame_indices(self.lengths[sample], speed, self.interval, self.clip_length)]
                for sample, speed in zip(samples, speeds)]
        return (torch.from_numpy(np.stack(rows).astype(np.int64)), self.text_ids[torch.as_tensor(samples)],
                torch.tensor(speeds, dtype=torch.float32))


def cache_key(*what: object) -> str:
    """A short name for what made a cache: the same parts give the same name, any other part another."""
    return hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:16]


def token_clips(dataset, vqvae, split: str, count: int, *, vqvae_key: str, seed: int = 0, chunk: int = 100,
                progress: bool = True) -> TokenClips:
    """The first `count` samples of a split as tokens, from the cache or made and kept there.

    The cache's name is a hash of the dataset, its digit set and checksum, the split, count, seed and `vqvae_key` (what
    made the VQ-VAE). A cache that is missing, damaged or of another size is made again; it is written whole.
    """
    specs = [dataset.spec(split, index, seed) for index in range(count)]
    lengths = np.asarray(dataset.lengths(specs))
    device = next(vqvae.parameters()).device
    shape = (count, int(lengths.max()), *(dataset.image_size // vqvae.config.down,) * 2)
    key = cache_key("tokens 2", dataset.name, dataset.digit_set, dataset.digits.checksum, split, count, seed, vqvae_key)
    path = cache_folder() / f"tokens-{dataset.name}-{split}-{key}.npz"
    tokens = _cached(path, shape)
    if tokens is None:
        tokens = np.zeros(shape, np.uint16)
        vqvae.eval()
        starts = range(0, count, chunk)
        for start in tqdm(starts, desc=f"tokens of {dataset.name}, {split}", unit_scale=chunk, unit="video",
                          disable=not progress):
            part, ends = specs[start:start + chunk], lengths[start:start + chunk]
            frames = np.minimum(np.arange(shape[1]), ends[:, None] - 1)
            tokens[start:start + chunk] = encode_frames(vqvae, dataset.clips(part, frames), device)
        write_whole(path, lambda temporary: np.savez(temporary, tokens=tokens))
    return TokenClips(tokens, lengths, text_ids([dataset.caption(spec) for spec in specs], dataset.name),
                      dataset.interval, dataset.clip_length)


@torch.no_grad()
def encode_frames(vqvae, frames: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """8-bit frames (b t H W) or (b t H W c) as token ids (b t h w) uint16; a frame equal to its predecessor once."""
    b, t = frames.shape[:2]
    flat = frames.reshape(b * t, *frames.shape[2:])
    rows, again = flat.reshape(b * t, -1), np.zeros(b * t, bool)
    again[1:] = (rows[1:] == rows[:-1]).all(1)
    images = torch.from_numpy(flat[~again]).to(device).float() / 255
    images = images[:, None] if frames.ndim == 4 else images.permute(0, 3, 1, 2)
    images = images.contiguous(memory_format=torch.channels_last)
    with autocast(device):
        ids = torch.cat([vqvae.encode(part) for part in images.split(256)]).cpu().numpy().astype(np.uint16)
    return ids[np.cumsum(~again) - 1].reshape(b, t, *ids.shape[1:])


def _cached(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array of a cache file, or None where there is none of that shape that can be read."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            array = file["tokens"]   # a .npz carries a checksum of its content
    except Exception:   # foreign bytes fail in as many ways as there are bytes
        return None
    return array if array.shape == shape and array.dtype == np.uint16 else None
