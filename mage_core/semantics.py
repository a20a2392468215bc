"""Does the video do what the text says? Motion accuracy by analysis by synthesis; when motion ends (4.3.2).

PSNR hardly tells a right motion from a wrong one where most pixels are black. Here the clips of all motions
that a caption could have named are simulated, and a generated clip is right if the one of its own caption is
the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from einops import rearrange
from numba import njit
from torch import Tensor

from mage_core import captions
from mage_core.clips import frame_indices
from mage_core.moving_mnist import MovingMNIST, Spec

# Distances closer than this are the same: a clip that is as far from its own candidate as from another one
# (all black, or the first frame for ever) must not be right or wrong by the rounding of a sum.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Candidates:
    """The clips that a caption could have asked for.

    `clips` uint8 (n T H W); `own` the index of the caption's; `names` the motions of each, one a mover.
    """

    clips: np.ndarray
    own: int
    names: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class MotionAccuracy:
    """What `motion_accuracy` found, a value a clip; results of batches add up with `+`.

    `correct` bool (n,); `counted_as_own` int (n,): candidates equal to the caption's own clip in frames 2 to
    T, itself among them; `candidates` int (n,): all of them.
    """

    correct: np.ndarray
    counted_as_own: np.ndarray
    candidates: np.ndarray

    @property
    def n(self) -> int:
        """Clips that were judged."""
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        """The share of clips that are right."""
        return float(self.correct.mean())

    @property
    def chance(self) -> float:
        """The accuracy of answering with one candidate at random."""
        return float((self.counted_as_own / self.candidates).mean())

    @property
    def tied(self) -> float:
        """The share of clips with a second candidate equal to their own to the pixel."""
        return float((self.counted_as_own > 1).mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the accuracy."""
        return wilson_interval(int(self.correct.sum()), self.n)

    def __add__(self, other: MotionAccuracy) -> MotionAccuracy:
        return MotionAccuracy(*(np.concatenate([getattr(self, field), getattr(other, field)])
                                for field in ("correct", "counted_as_own", "candidates")))

    def __str__(self) -> str:
        low, high = self.interval
        return (f"motion accuracy {self.accuracy:.3f} [{low:.3f}, {high:.3f}] on {self.n} clips "
                f"(chance {self.chance:.3f}; {self.tied:.1%} have a second candidate equal to their own)")


def motion_accuracy(videos: Tensor, dataset: MovingMNIST, specs: Sequence[Spec],
                    speeds: Sequence[float] | None = None) -> MotionAccuracy:
    """Which of `videos` (b t c H W), in [0, 1], do what their captions say, by analysis by synthesis.

    A clip is right if the candidate of its caption's motions is nearer, in mean squared error over frames 2
    to T, than every other one. Candidates equal to the caption's own in these frames count as its own.
    `speeds` default to those of the specs. Raises ValueError for shapes that do not fit and values that are
    not finite.
    """
    speeds = [spec.speed for spec in specs] if speeds is None else [float(speed) for speed in speeds]
    expected = (dataset.channels, dataset.image_size, dataset.image_size)
    if videos.ndim != 5 or tuple(videos.shape[2:]) != expected or videos.shape[1] < 2:
        raise ValueError(f"videos of shape {tuple(videos.shape)}: {dataset.name} needs "
                         f"(b t {' '.join(map(str, expected))}) with t of at least 2")
    if not len(videos) == len(specs) == len(speeds) or not len(specs):
        raise ValueError(f"{len(videos)} videos, {len(specs)} specs and {len(speeds)} speeds: they must be "
                         "equal, and at least 1")
    if not videos.is_floating_point() or not torch.isfinite(videos).all():
        raise ValueError(f"videos of type {videos.dtype} with values that may not be finite: "
                         "they must be finite floats in [0, 1]")
    later = rearrange(255 * videos[:, 1:].detach().float().cpu(), "b t c h w -> b (t h w c)").contiguous()
    verdicts = []
    for video, spec, speed in zip(later.numpy(), specs, speeds):
        found = candidate_clips(dataset, spec, speed, clip_length=videos.shape[1])
        verdicts.append((*_judge(video, found), len(found.clips)))
    correct, counted, candidates = (np.array(column) for column in zip(*verdicts))
    return MotionAccuracy(correct, counted, candidates)


def candidate_clips(dataset: MovingMNIST, spec: Spec, speed: float | None = None,
                    clip_length: int | None = None) -> Candidates:
    """The clips of all motions that the caption could have named: 4 for Single, 16 Double, 64 Modified.

    All start where the digits stand in the sample's first frame, keep the distractor and have the same speed
    (by default the spec's); each takes its frames by its own length. Raises ValueError for eta outside
    (0, 1).
    """
    speed = spec.speed if speed is None else speed
    clip_length = dataset.clip_length if clip_length is None else clip_length
    motions = captions.motions(dataset.name)
    movers = len(spec.movers)
    tracks = {motion: dataset.candidate_corners(spec, [motion] * movers) for motion in motions}
    names = tuple(product(motions, repeat=movers))
    own = names.index(tuple(mover.motion for mover in spec.movers))
    indices: dict[int, np.ndarray] = {}
    paths: list[list[np.ndarray]] = [[] for _ in range(movers)]
    for candidate in names:
        chosen = [tracks[motion][mover] for mover, motion in enumerate(candidate)]
        length = max(map(len, chosen))
        if length not in indices:
            indices[length] = frame_indices(length, speed, dataset.interval, clip_length)
        for path, corners in zip(paths, chosen):
            path.append(corners[np.minimum(indices[length], len(corners) - 1)])
    # all candidates end to end, as one long video of the same digits: one call draws them
    frames = dataset.draw(spec, [np.concatenate(path) for path in paths], np.arange(len(names) * clip_length))
    return Candidates(rearrange(frames, "(n t) h w -> n t h w", t=clip_length), own, names)


def frames_until_still(frames: Tensor | np.ndarray, tolerance: float = 0.05) -> np.ndarray:
    """In which frame, counted from 1, each clip reaches the picture that it keeps: int64 (b,) (Fig. 6).

    `frames` (b t ...) are videos, float in [0, 1], where a pixel must change by more than `tolerance` to
    count as motion, or whole numbers (token ids, 8-bit frames), where any change counts. 1: nothing moves; t:
    the motion lasts to the end, or goes on after it. Raises ValueError for another rank.
    """
    values = torch.as_tensor(frames).detach().cpu()
    if values.ndim < 3 or values.shape[1] < 1:
        raise ValueError(f"frames of shape {tuple(values.shape)}: expected clips (b t ...); "
                         "add the b of a single clip with frames[None]")
    values = values.reshape(*values.shape[:2], -1)
    if values.is_floating_point():
        moved = ((values[:, 1:] - values[:, :-1]).abs() > tolerance).any(dim=-1)
    else:
        moved = (values[:, 1:] != values[:, :-1]).any(dim=-1)
    numbered = moved * torch.arange(2, values.shape[1] + 1)
    return torch.cat([torch.ones(len(values), 1, dtype=torch.int64), numbered], dim=1).amax(dim=1).numpy()


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share (Wilson 1927, eq. for z standard deviations; 95 % by default)."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}: n must be at least 1, the successes from 0 to n")
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def _judge(video: np.ndarray, found: Candidates) -> tuple[bool, int]:
    """Whether frames 2 to T, float32 (pixels,) in 0 to 255, are nearest to the own candidate; its equals."""
    later = np.ascontiguousarray(found.clips[:, 1:]).reshape(len(found.clips), -1)
    distances, equal = _distances(video, later, found.own)
    rivals = distances[~equal]
    correct = not len(rivals) or bool(distances[found.own] < rivals.min() * (1 - ROUNDING))
    return correct, int(equal.sum())


@njit(cache=True, fastmath={"reassoc", "contract"})
def _distances(video, candidates, own):
    """Squared distance of `video` (pixels,) to each candidate (n, pixels); which equal the own one."""
    distances = np.empty(len(candidates))
    equal = np.empty(len(candidates), np.bool_)
    for candidate in range(len(candidates)):
        total, different = 0.0, 0
        for pixel in range(len(video)):
            error = np.float64(video[pixel]) - np.float64(candidates[candidate, pixel])
            total += error * error
            different += candidates[candidate, pixel] != candidates[own, pixel]
        distances[candidate] = total
        equal[candidate] = different == 0
    return distances, equal
