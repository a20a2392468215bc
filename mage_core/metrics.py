"""How near generated clips are to the truth: PSNR, SSIM and motion accuracy of any generator (supplement B).

A generator is any function `(image, caption, speed, seed) -> video`, or its fast form for whole batches
(`batched`). Frames 2 to T count: the first one is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm.auto import tqdm

from mage_core.cater import scene
from mage_core.cater.scene import CaterGen
from mage_core.clips import Dataset, available, frame_indices
from mage_core.draws import Draws
from mage_core.machine import tf32
from mage_core.moving_mnist import FREE_RANGE, MovingMNIST, Spec, _recipe, track
from mage_core.semantics import MotionAccuracy, check_range, judged, motion_accuracy

PSNR_CAP = 50.0  # dB; a frame that is exactly right would count as infinitely many

Generator = Callable[[Tensor, str, float, int], Tensor]


def frame_psnr(generated: Tensor, truth: Tensor) -> Tensor:
    """PSNR of each frame in dB, at most 50: images (... c H W) in [0, 1] -> (...). Data range 1."""
    return _psnr(generated, truth, frame_dims=3)


def clip_psnr(generated: Tensor, truth: Tensor) -> Tensor:
    """PSNR of each clip in dB, at most 50, from its error over all frames: (... t c H W) -> (...)."""
    return _psnr(generated, truth, frame_dims=4)


def _psnr(generated: Tensor, truth: Tensor, frame_dims: int) -> Tensor:
    _check_pair(generated, truth)
    dims = tuple(range(generated.ndim - frame_dims, generated.ndim))
    generated, truth = generated.double(), truth.double()
    psnr = peak_signal_noise_ratio(generated, truth, data_range=1.0, reduction="none", dim=dims)
    return psnr.clamp(max=PSNR_CAP)


def frame_ssim(generated: Tensor, truth: Tensor) -> Tensor:
    """SSIM of each image (Wang et al. 2004, by torchmetrics), data range 1: (b c H W) in [0, 1] -> (b,).

    A Gaussian window of 11 x 11 with sigma 1.5 goes around every pixel; edges are mirrored.
    """
    _check_pair(generated, truth)
    # Single precision, although its rounding may show in the fourth digit: on a CPU the convolution in double
    # takes 7 to 30 times as long and gigabytes. Some images at a time, so that memory is bounded.
    few = max(1, 256 * 64 * 64 // generated[0].numel())
    with tf32(False):   # a variance is a small difference of large numbers
        return torch.cat([structural_similarity_index_measure(a.float(), b.float(), data_range=1.0,
                                                              reduction="none").reshape(len(a))
                          for a, b in zip(generated.split(few), truth.split(few))])


def _check_pair(generated: Tensor, truth: Tensor) -> None:
    if generated.shape != truth.shape:
        raise ValueError(f"generated of shape {tuple(generated.shape)}, truth of shape {tuple(truth.shape)}: "
                         "they must agree")
    if not (generated.is_floating_point() and truth.is_floating_point()):
        raise ValueError(f"generated is {generated.dtype}, truth {truth.dtype}: both must be float in [0, 1]")
    check_range(generated, "generated")
    check_range(truth, "truth")


# ----------------------------------------------------------------------------------------------------------
# Scores of clips


@dataclass(frozen=True)
class VideoScores:
    """Scores of n clips, kept apart so that batches add up with `+`: dB and SSIM of frames 2 to T.

    `frame_psnr` (n, T-1) and `clip_psnr` (n,) in dB, at most 50 each; `frame_ssim` (n, T-1).
    """

    frame_psnr: np.ndarray
    clip_psnr: np.ndarray
    frame_ssim: np.ndarray

    @property
    def n(self) -> int:
        """Clips that were scored."""
        return len(self.clip_psnr)

    @property
    def psnr_frames(self) -> float:
        """Mean over frames and clips of min(PSNR of the frame, 50 dB): the figure that is reported."""
        return float(self.frame_psnr.mean())

    @property
    def psnr_clips(self) -> float:
        """Mean over clips of min(PSNR of the clip, 50 dB), from its mean squared error over frames 2 to T."""
        return float(self.clip_psnr.mean())

    @property
    def ssim(self) -> float:
        """Mean SSIM over frames and clips."""
        return float(self.frame_ssim.mean())

    def __add__(self, other: VideoScores) -> VideoScores:
        return VideoScores(*(np.concatenate([getattr(self, field), getattr(other, field)])
                             for field in ("frame_psnr", "clip_psnr", "frame_ssim")))


def evaluate_videos(generated: Tensor, truth: Tensor) -> VideoScores:
    """PSNR and SSIM of generated clips (b t c H W) in [0, 1] over frames 2 to t.

    Raises ValueError for shapes that do not agree, fewer than two frames, or values that are not finite.
    """
    if generated.ndim != 5 or generated.shape[1] < 2:
        raise ValueError(f"generated of shape {tuple(generated.shape)}: expected (b t c H W), t at least 2")
    _check_pair(generated, truth)
    generated, truth = generated[:, 1:].detach(), truth[:, 1:].to(generated.device)
    ssim = frame_ssim(*(rearrange(video, "b t c h w -> (b t) c h w") for video in (generated, truth)))
    return VideoScores(frame_psnr(generated, truth).cpu().numpy(), clip_psnr(generated, truth).cpu().numpy(),
                       rearrange(ssim, "(b t) -> b t", b=len(generated)).double().cpu().numpy())


# ----------------------------------------------------------------------------------------------------------
# Generators


@dataclass(frozen=True)
class EvaluationBatch:
    """Some samples of a split: what a generator is asked for, and what it should answer.

    `images` (b c H W) and `truth` (b t c H W) in [0, 1]; `seeds` are the samples' indices in their split.
    """

    dataset: Dataset
    specs: tuple
    captions: tuple[str, ...]
    speeds: tuple[float, ...]
    seeds: tuple[int, ...]
    truth: Tensor

    @property
    def images(self) -> Tensor:
        """The first images, (b c H W): a copy, lest a generator that works in place change the truth."""
        return self.truth[:, 0].clone()


@dataclass(frozen=True)
class FromBatch:
    """A generator that takes a whole `EvaluationBatch` and returns its videos (b t c H W)."""

    videos: Callable[[EvaluationBatch], Tensor]


def batched(generate: Callable[[Tensor, Sequence[str], Sequence[float], Sequence[int]], Tensor]) -> FromBatch:
    """The fast form of a generator: `(images (b c H W), captions, speeds, seeds) -> videos (b t c H W)`."""
    return FromBatch(lambda batch: generate(batch.images, batch.captions, batch.speeds, batch.seeds))


def first_frame_repeated() -> FromBatch:
    """The lower baseline: nothing ever moves."""
    return FromBatch(lambda batch: repeat(batch.images, "b c h w -> b t c h w", t=batch.truth.shape[1]))


def reconstruction(vqvae: torch.nn.Module) -> FromBatch:
    """The ceiling that a VQ-VAE sets: its reconstruction of the true frames. It sees the truth."""

    def videos(batch: EvaluationBatch) -> Tensor:
        device = next(vqvae.parameters()).device
        frames = rearrange(batch.truth, "b t c h w -> (b t) c h w").to(device)
        was_training = vqvae.training
        vqvae.eval()
        try:
            decoded = torch.cat([vqvae.decode(vqvae.encode(part)) for part in frames.split(500)])
        finally:
            vqvae.train(was_training)
        return rearrange(decoded, "(b t) c h w -> b t c h w", b=len(batch.truth))

    return FromBatch(videos)


def perfect_predictor() -> FromBatch:
    """The ceiling that image and sentence set: it knows the recipe, reads both without fault, and no more.

    Moving MNIST: a digit's position shows only as floor(36 p). Of the starts that the recipe can draw and that
    lead to the digit's corner in the first image it takes the median: the middle of the pixel for Single, the
    middle one of the two or three hundredths for Double and Modified; at a border, nearly always the border
    itself. Digit images, corners and order of overlapping digits count as known. A later corner has two possible
    values, a pixel apart, and the median start leads to the likelier one.

    CATER-GEN: the scene, its objects and the camera count as known. The caption leaves open where in its cell an
    action ends, and when; it takes the middle of the places that are free, and frame 25, the mean. A blurred mean
    of all that could happen would have a higher PSNR (`mean_of_futures`), but be no video.
    """
    return FromBatch(lambda batch: to_video(np.stack(
        [predicted_clip(batch.dataset, spec, speed, batch.truth.shape[1])
         for spec, speed in zip(batch.specs, batch.speeds)])))


def mean_of_futures(n: int = 32) -> FromBatch:
    """The mean of `n` CATER-GEN videos that fit image and sentence: nothing has less squared error on average.

    Where in its cell an action ends, and when, is drawn as for a new sample.
    """
    def mean(dataset: CaterGen, spec: scene.Spec, speed: float, clip_length: int) -> np.ndarray:
        draws = Draws("futures", spec.dataset, spec.split, spec.index, spec.seed)
        first, last = scene.ENDS
        futures = [dataset.with_caption(spec, scene.caption(spec), seed=1 + k, tries=10_000,
                                        ends=[first + draws.below(last - first + 1) for _ in spec.moves])
                   for k in range(n)]
        indices = frame_indices(scene.FRAMES, speed, dataset.interval, clip_length)
        return dataset.clips(futures, np.tile(indices, (n, 1))).mean(axis=0, dtype=np.float32)

    return FromBatch(lambda batch: to_video(np.stack(
        [mean(batch.dataset, spec, speed, batch.truth.shape[1]) for spec, speed in zip(batch.specs, batch.speeds)])))


def predicted_clip(dataset: MovingMNIST | CaterGen, spec: Spec | scene.Spec, speed: float,
                   clip_length: int) -> np.ndarray:
    """The answer of `perfect_predictor` to a sample: uint8 (clip_length, H, W), of CATER-GEN (clip_length, H, W, c)."""
    if isinstance(dataset, CaterGen):
        indices = frame_indices(scene.FRAMES, speed, dataset.interval, clip_length)
        return dataset.clips([middle_of_what_is_said(spec)], indices[None])[0]
    paths = []
    for mover, corners in zip(spec.movers, dataset.corners(spec)):
        coordinate, starts = _median_starts(dataset.name, mover.motion)
        position = (corners[0] + 0.5) / FREE_RANGE  # any point of the pixel will do where nothing moves
        position[coordinate] = starts[int(corners[0, coordinate])]
        paths.append(track(dataset.name, *position, mover.motion))
    length = max(map(len, paths))
    return dataset.draw(spec, paths, frame_indices(length, speed, dataset.interval, clip_length))


def middle_of_what_is_said(spec: scene.Spec) -> scene.Spec:
    """A CATER-GEN sample with all that its explicit caption leaves open at its middle, whatever the sample's own.

    Every action ends at frame 25. A place is the one nearest to the mean of those in its cell that are free, of a
    grid of 8 x 8: free beside all objects, and the actions before it in the caption.
    """
    moves: tuple[scene.Move, ...] = ()
    for move in spec.moves:
        move = replace(move, end=sum(scene.ENDS) // 2)
        if move.x is not None:
            x, y = (np.ceil(scene.cell(value) - (value > 0)) + (np.arange(8) + 0.5) / 8 for value in (move.x, move.y))
            places = [replace(move, x=float(a), y=float(b)) for a in x for b in y]
            free = [place for place in places if not scene.collide(spec.objects, (*moves, place))] or places
            at = np.array([(place.x, place.y) for place in free])
            move = free[int(((at - at.mean(0)) ** 2).sum(1).argmin())]
        moves += (move,)
    return replace(spec, moves=moves)


@cache
def _median_starts(dataset: str, motion: str) -> tuple[int, dict[int, float]]:
    """The coordinate that a motion moves; for each corner in frame 0 the median start that leads there."""
    hundredths = _recipe(dataset).start_hundredths
    if hundredths is None:  # any start in [0, 1): a hundred to a pixel stand for them
        starts = (np.arange(100 * FREE_RANGE) + 0.5) / (100 * FREE_RANGE)
    else:
        starts = np.arange(*hundredths) / 100
    coordinate = int(np.ptp(track(dataset, 0.5, 0.5, motion), axis=0).argmax())
    corners = np.array([track(dataset, start, start, motion)[0, coordinate] for start in starts])
    leading = {int(corner): starts[corners == corner] for corner in set(corners)}
    return coordinate, {corner: float(found[len(found) // 2]) for corner, found in leading.items()}


# ----------------------------------------------------------------------------------------------------------
# Evaluation of a generator on a split


@dataclass(frozen=True)
class Row:
    """One line of the results: who, on what, how well.

    `motion` is of the samples for which it is defined (`semantics.judged`), None where there are none.
    """

    name: str
    dataset: str
    split: str
    scores: VideoScores
    motion: MotionAccuracy | None
    seconds: float  # that the generator took

    @property
    def n(self) -> int:
        """Samples that were evaluated."""
        return self.scores.n

    def __add__(self, other: Row) -> Row:
        motion = self.motion + other.motion if self.motion and other.motion else self.motion or other.motion
        return replace(self, scores=self.scores + other.scores, motion=motion,
                       seconds=self.seconds + other.seconds)

    def as_dict(self) -> dict[str, object]:
        """The row as plain numbers, for a card: PSNR in dB, shares from 0 to 1."""
        row = {"name": self.name, "dataset": self.dataset, "split": self.split, "n": self.n,
               "psnr_frames": self.scores.psnr_frames, "psnr_clips": self.scores.psnr_clips,
               "ssim": self.scores.ssim, "seconds": self.seconds}
        if self.motion is not None:
            row |= {"motion_accuracy": self.motion.accuracy, "chance": self.motion.chance,
                    "motion_accuracy_interval": list(self.motion.interval), "tied": self.motion.tied,
                    "judged": self.motion.n}
        return row


def evaluation_batch(dataset: Dataset, split: str, indices: Sequence[int],
                     seed: int = 0) -> EvaluationBatch:
    """The samples `indices` of a split, each with the speed of its own seed; the frames are drawn now."""
    specs = tuple(dataset.spec(split, index, seed) for index in indices)
    speeds = tuple(spec.speed for spec in specs)
    frames = np.stack([frame_indices(length, speed, dataset.interval, dataset.clip_length)
                       for length, speed in zip(dataset.lengths(specs), speeds)])
    return EvaluationBatch(dataset, specs, tuple(map(dataset.caption, specs)), speeds, tuple(indices),
                           to_video(dataset.clips(specs, frames)))


def evaluate(generator: Generator | FromBatch, dataset: Dataset, split: str = "test",
             n: int | None = None, *, name: str = "", seed: int = 0, batch_size: int = 50,
             progress: bool = True) -> Row:
    """The results of a generator on the first n samples of a split (by default all of the paper's size).

    `generator` is any `(image (c H W), caption, speed, seed) -> video (t c H W)`, values in [0, 1], or its
    fast form (`batched`, `FromBatch`); its seed is the sample's index. `seed` is the dataset's. Raises
    ValueError for an n or batch size below 1, and for a video of another shape, type or range than the truth.
    """
    n = available(dataset, split) if n is None else n
    if n < 1 or batch_size < 1:
        raise ValueError(f"n is {n} and batch_size {batch_size}: both must be at least 1")
    name = name or getattr(generator, "__name__", type(generator).__name__)
    whole: Row | None = None
    with tqdm(total=n, desc=f"{name} on {dataset.name}", unit="clip", disable=not progress) as bar:
        for first in range(0, n, batch_size):
            batch = evaluation_batch(dataset, split, range(first, min(first + batch_size, n)), seed)
            row = evaluate_batch(generator, batch, name)
            whole = row if whole is None else whole + row
            bar.update(row.n)
    return whole


def evaluate_batch(generator: Generator | FromBatch, batch: EvaluationBatch, name: str = "") -> Row:
    """The results of a generator on one batch; see `evaluate`."""
    start = time.perf_counter()
    with torch.no_grad():
        videos = _generated(generator, batch).cpu()
    seconds = time.perf_counter() - start
    _check_pair(videos, batch.truth)
    videos = videos.float()
    scored = videos.cuda() if torch.cuda.is_available() else videos   # SSIM of a whole split takes minutes on a CPU
    asked = [k for k, spec in enumerate(batch.specs) if judged(batch.dataset, spec)]
    motion = motion_accuracy(videos[asked], batch.dataset, [batch.specs[k] for k in asked],
                             [batch.speeds[k] for k in asked]) if asked else None
    return Row(name, batch.dataset.name, batch.specs[0].split, evaluate_videos(scored, batch.truth), motion, seconds)


def _generated(generator: Generator | FromBatch, batch: EvaluationBatch) -> Tensor:
    if isinstance(generator, FromBatch):
        return generator.videos(batch)
    questions = zip(batch.images, batch.captions, batch.speeds, batch.seeds)
    return torch.stack([torch.as_tensor(generator(*question)) for question in questions])


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; below it the chance level and the share of ties of each dataset and split."""
    lines = ["| | PSNR (frames) | PSNR (clips) | SSIM | motion accuracy | 95 % interval | n |",
             "|---|---|---|---|---|---|---|"]
    notes = []
    for row in rows:
        judged = "– | –"
        if row.motion is not None:
            low, high = row.motion.interval
            judged = f"{row.motion.accuracy:.3f} | {low:.3f} to {high:.3f}"
            some = f" of the first {row.motion.n:,} samples" if row.motion.n < row.n else ""
            note = (f"{row.dataset}, {row.split}: chance level of motion accuracy{some} {row.motion.chance:.3f}; "
                    f"{row.motion.tied:.1%} of the samples have a second candidate equal to their own.")
            notes += [note] if note not in notes else []
        lines.append(f"| {row.name} | {row.scores.psnr_frames:.2f} | {row.scores.psnr_clips:.2f} | "
                     f"{row.scores.ssim:.3f} | {judged} | {row.n:,} |")
    return "\n".join([*lines, "", *notes])


def to_video(frames: np.ndarray) -> Tensor:
    """8-bit frames (b t H W), or (b t H W c), as a video (b t c H W), float in [0, 1]."""
    pattern = "b t h w -> b t 1 h w" if frames.ndim == 4 else "b t h w c -> b t c h w"
    return rearrange(torch.from_numpy(frames), pattern).contiguous().float() / 255
