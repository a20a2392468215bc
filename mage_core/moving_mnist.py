"""Single, Double and Modified Double Moving MNIST: specs, captions and frames (paper 4.1 and A.1).

A sample is a small frozen `Spec`, a pure function of (dataset, digit set, split, index, seed); its caption
and its frames are pure functions of the spec. The tracks are those of the released generators, to the pixel.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numba import njit, prange

from mage_core import captions
from mage_core.digits import DigitSet, check_name, load_digits
from mage_core.draws import Draws

IMAGE_SIZE = 64
DIGIT_SIZE = 28
FREE_RANGE = IMAGE_SIZE - DIGIT_SIZE  # pixels that a corner can move
DISTRACTOR_OVERLAP = 0.7              # largest box IoU of the distractor with a moving digit's first box

# motion -> (coordinate: 0 is y and 1 is x, heading at the start: 1 is down or right, whether it bounces)
_MOTIONS = {
    "up then down": (0, -1, True), "left then right": (1, -1, True),
    "down then up": (0, 1, True), "right then left": (1, 1, True),
    "up": (0, -1, False), "left": (1, -1, False), "down": (0, 1, False), "right": (1, 1, False),
}


@dataclass(frozen=True)
class _Recipe:
    """What makes one dataset differ from another."""

    sizes: tuple[int, int]                # pairs for training and for testing
    movers: int
    start_hundredths: tuple[int, int] | None  # starts are k/100 with lowest <= k < end; None: any in [0, 1)
    step: float                           # of the free range, a frame
    frame_0_after_step: bool
    bounces: int                          # of a motion that bounces; -1: for ever
    most_frames: int
    distractor: bool


_RECIPES = {
    "single-mnist": _Recipe((10_000, 2_000), 1, None, 0.2, True, -1, 20, False),
    "double-mnist": _Recipe((10_000, 2_000), 2, (15, 85), 0.2, True, -1, 20, False),
    "modified-mnist": _Recipe((24_000, 6_000), 2, (15, 86), 0.1, False, 1, 21, True),
}
DATASETS = tuple(_RECIPES)


@dataclass(frozen=True)
class Mover:
    """A moving digit: its number, its image in the digit set, its start in [0, 1] of the free range."""

    digit: int
    image: int
    start_y: float
    start_x: float
    motion: str


@dataclass(frozen=True)
class Distractor:
    """A still digit that no caption names; `top` and `left` are its corner in pixels."""

    digit: int
    image: int
    top: int
    left: int


@dataclass(frozen=True)
class Spec:
    """All that a sample is. `speed` is eta of the paper, in the open interval (0, 1)."""

    dataset: str
    digit_set: str
    split: str
    index: int
    seed: int
    movers: tuple[Mover, ...]
    distractor: Distractor | None
    speed: float


@dataclass(frozen=True)
class MovingMNIST(captions.Spoken):
    """One of the three datasets, on a named digit set. Raises ValueError for an unknown name of either."""

    name: str
    digit_set: str = "mnist-5k"
    image_size = IMAGE_SIZE
    channels = 1
    interval = (1.0, 2.0)  # frames from one sampled frame to the next, at speed 0 and at speed 1 (paper 4.2)
    clip_length = 10
    endless = True

    def __post_init__(self):
        _recipe(self.name)
        check_name(self.digit_set)

    @property
    def content(self) -> str:
        """The digit set and its checksum: what frames are made of."""
        return f"{self.digit_set} {self.digits.checksum}"

    @property
    def source(self) -> str:
        """The digit set's name, for the name of a run."""
        return self.digit_set

    @property
    def about(self) -> dict:
        """What a card tells of the dataset; `clips.described` makes it again."""
        return {"dataset": self.name, "digit_set": self.digit_set}

    @property
    def digits(self) -> DigitSet:
        """The digit set, loaded when first asked for."""
        return load_digits(self.digit_set)

    @property
    def video_length(self) -> int | None:
        """The frames of every video; None where they differ, for a video ends when its digits are still."""
        recipe = _recipe(self.name)
        return recipe.most_frames if recipe.bounces < 0 else None

    @property
    def longest(self) -> int:
        """The most frames that a video has."""
        return _recipe(self.name).most_frames

    @property
    def sizes(self) -> dict[str, int]:
        """The paper's number of pairs in each split; `spec` goes on beyond it."""
        return dict(zip(("train", "test"), _recipe(self.name).sizes))

    def spec(self, split: str, index: int, seed: int = 0) -> Spec:
        """The sample at `index` of `split`: a pure function of its arguments, the same on every machine.

        Any seed, any index from 0 on. Splits never share a combination of digit(s) and motion axis, whatever
        the seeds. Raises ValueError for an unknown split or a negative index, TypeError for a fraction.
        """
        recipe = _recipe(self.name)
        if split not in ("train", "test"):
            raise ValueError(f"unknown split {split!r}: use 'train' or 'test'")
        index, seed = operator.index(index), operator.index(seed)
        if index < 0:
            raise ValueError(f"index {index} of split {split!r} is negative: samples are numbered from 0 on")
        # The digit set is not in the key: another set gives other pictures of the same digits and paths.
        draws = Draws("sample", self.name, split, index, seed)
        speed = draws.inside()
        numbers = draws.distinct(3, 10)
        moving = numbers[:recipe.movers]
        axes = [draws.below(2) for _ in moving[1:]] + [_axis(self.name, split, moving)]
        movers = tuple(self._mover(recipe, draws, digit, axis) for digit, axis in zip(moving, axes))
        distracted = recipe.distractor and draws.below(2) == 1
        distractor = self._distractor(draws, numbers[2], movers) if distracted else None
        return Spec(self.name, self.digit_set, split, index, seed, movers, distractor, speed)

    def _mover(self, recipe: _Recipe, draws: Draws, digit: int, axis: int) -> Mover:
        image = self._image(draws, digit)
        if recipe.start_hundredths is None:
            start_y, start_x = draws.uniform(), draws.uniform()
        else:
            lowest, end = recipe.start_hundredths
            start_y, start_x = ((lowest + draws.below(end - lowest)) / 100 for _ in range(2))
        named = [motion for motion in captions.motions(self.name) if _MOTIONS[motion][0] == axis]
        return Mover(digit, image, start_y, start_x, named[draws.below(len(named))])

    def _distractor(self, draws: Draws, digit: int, movers: tuple[Mover, ...]) -> Distractor:
        image = self._image(draws, digit)
        boxes = [(int(FREE_RANGE * mover.start_y), int(FREE_RANGE * mover.start_x)) for mover in movers]
        while True:  # at most two boxes are in the way, so this ends soon
            corner = draws.below(FREE_RANGE), draws.below(FREE_RANGE)  # the same as floor(36 u)
            if all(_overlap(corner, box) <= DISTRACTOR_OVERLAP for box in boxes):
                return Distractor(digit, image, *corner)

    def _image(self, draws: Draws, digit: int) -> int:
        indices = self.digits.of(digit)
        return int(indices[draws.below(len(indices))])

    def caption(self, spec: Spec) -> str:
        """The sentence of a sample, e.g. `the digit 7 is moving up then down .`"""
        clauses = tuple(captions.Movement(mover.digit, mover.motion) for mover in spec.movers)
        return captions.format_caption(clauses, self.name)

    def corners(self, spec: Spec) -> list[np.ndarray]:
        """Each mover's own track, unpadded: int64 (n, 2), rows of (top, left) in pixels."""
        return [track(self.name, mover.start_y, mover.start_x, mover.motion) for mover in spec.movers]

    def length(self, spec: Spec) -> int:
        """The number of frames of a sample's video: those of its longest track."""
        return int(self.lengths([spec])[0])

    def lengths(self, specs: Sequence[Spec]) -> np.ndarray:
        """The number of frames of each sample's video: int64 (b,). Raises ValueError for specs as `clips`."""
        return self._walked(specs)[2].max(axis=1)

    def video(self, spec: Spec) -> np.ndarray:
        """The whole video of a sample: uint8 (n, 64, 64)."""
        corners = self.corners(spec)
        return self.draw(spec, corners, np.arange(max(map(len, corners))))

    def clips(self, specs: Sequence[Spec], indices: np.ndarray) -> np.ndarray:
        """The frames `indices` (b, T) of b samples, and no others: uint8 (b, T, 64, 64), on all cores.

        A digit that is still before the other waits. Raises ValueError for a spec of another dataset or digit
        set or with an impossible value, for indices of another shape, and for a frame that a video has not.
        """
        return self._drawn(*self._walked(specs), indices)

    def with_motions(self, spec: Spec, motions: Sequence[str]) -> Spec:
        """The same digits, starts, distractor and speed with other motions, one a mover, of whichever split.

        Raises ValueError for a motion that the dataset has not, or another number of them than of movers.
        """
        self._check(spec)
        motions = tuple(motions)
        if len(motions) != len(spec.movers):
            raise ValueError(f"{len(motions)} motions {motions!r} for {len(spec.movers)} movers: one each")
        for motion in motions:
            _check_motion(self.name, motion)
        movers = tuple(replace(mover, motion=motion) for mover, motion in zip(spec.movers, motions))
        return replace(spec, movers=movers)

    def candidate_corners(self, spec: Spec, motions: Sequence[str]) -> list[np.ndarray]:
        """Tracks that start where the sample's first frame shows its digits and go on by other motions.

        One int64 (n, 2) a mover, of its own length; the first row is the sample's own. The position is the
        float that the simulator holds at frame 0, so the sample's own motions give `corners(spec)`. A digit
        that stands at a border turns there if its motion heads out. Raises as `with_motions`.
        """
        others = self.with_motions(spec, motions)
        recipe = _recipe(self.name)
        tracks = []
        for own, other in zip(spec.movers, others.movers):
            start = [own.start_y, own.start_x]
            if recipe.frame_0_after_step:
                coordinate, heading, _ = _MOTIONS[own.motion]
                start[coordinate] = min(max(start[coordinate] + heading * recipe.step, 0.0), 1.0)
            tracks.append(track(self.name, *start, other.motion, from_frame_0=True))
        return tracks

    def draw(self, spec: Spec, corners: Sequence[np.ndarray], indices: np.ndarray) -> np.ndarray:
        """The frames `indices` (T,) of a sample whose digits go along `corners`: uint8 (T, 64, 64).

        `corners` holds one track (n, 2) a mover; the shorter waits for the longer; the distractor is kept.
        Raises ValueError for another number of tracks than of movers, a corner that leaves the frame, and a
        frame that the longest track has not.
        """
        if len(corners) != len(spec.movers):
            raise ValueError(f"{len(corners)} tracks for {len(spec.movers)} moving digits: give one each")
        pictures, _, _, fixed = self._packed([spec])
        lengths = np.ones(pictures.shape, np.int64)
        packed = np.zeros((*pictures.shape, max(map(len, corners)), 2), np.int64)
        packed[..., 0, :] = fixed
        for place, rows in enumerate(corners):
            rows = np.asarray(rows)
            if rows.ndim != 2 or rows.shape[1] != 2 or not len(rows):
                raise ValueError(f"track {place} has shape {rows.shape}: give (n, 2), rows of (top, left)")
            if rows.dtype.kind not in "iu":
                raise ValueError(f"track {place} is {rows.dtype}: corners are whole pixels, give integers")
            if rows.min() < 0 or rows.max() > FREE_RANGE:
                raise ValueError(f"track {place} goes from {rows.min()} to {rows.max()}: a corner is in 0 to "
                                 f"{FREE_RANGE}, or the digit leaves the frame")
            packed[0, place, :len(rows)] = rows
            lengths[0, place] = len(rows)
        return self._drawn(pictures, packed, lengths, np.asarray(indices)[None])[0]

    def _walked(self, specs: Sequence[Spec]) -> tuple[np.ndarray, ...]:
        """Images (b, places), tracks (b, places, frames, 2) and their own lengths (b, places)."""
        recipe = _recipe(self.name)
        pictures, starts, motions, fixed = self._packed(specs)
        corners = np.empty((*pictures.shape, recipe.most_frames, 2), np.int64)
        lengths = np.empty(pictures.shape, np.int64)
        _walk_all(starts, motions, fixed, recipe.step, recipe.frame_0_after_step, corners, lengths)
        return pictures, corners, lengths

    def _packed(self, specs: Sequence[Spec]) -> tuple[np.ndarray, ...]:
        """Specs as arrays: a place for each mover, then the distractor's (its image is -1 for none)."""
        places = _recipe(self.name).movers + 1
        pictures = np.full((len(specs), places), -1, np.int64)
        numbers = np.zeros((len(specs), places), np.int64)
        starts = np.zeros((len(specs), places, 2))
        motions = np.zeros((len(specs), places, 3), np.int64)  # coordinate, heading (0: still), bounces
        fixed = np.zeros((len(specs), places, 2), np.int64)
        for row, spec in enumerate(specs):
            self._check(spec)
            for place, mover in enumerate(spec.movers):
                pictures[row, place], numbers[row, place] = mover.image, mover.digit
                starts[row, place] = mover.start_y, mover.start_x
                motions[row, place] = _codes(self.name, mover.motion)
            if spec.distractor is not None:
                pictures[row, -1], numbers[row, -1] = spec.distractor.image, spec.distractor.digit
                fixed[row, -1] = spec.distractor.top, spec.distractor.left
        self._check_ranges(specs, pictures, numbers, starts, fixed)
        return pictures, starts, motions, fixed

    def _check_ranges(self, specs, pictures, numbers, starts, fixed) -> None:
        """Compiled code follows any index it is given, so a spec made by hand must not reach outside."""
        labels = self.digits.labels
        shown = pictures != -1
        known = shown & (pictures >= 0) & (pictures < len(labels))
        rules = (
            (shown & ~known, f"an image of the digit set {self.digit_set} is 0 to {len(labels) - 1}"),
            (known & (labels[np.where(known, pictures, 0)] != numbers), "an image must show its digit"),
            (~((starts >= 0) & (starts <= 1)).all(axis=2), "starts are in [0, 1] of the free range"),
            (((fixed < 0) | (fixed > FREE_RANGE)).any(axis=2), f"a corner is in 0 to {FREE_RANGE}"),
        )
        for broken, rule in rules:
            if broken.any():
                raise ValueError(f"impossible spec: {rule}; got {specs[np.argwhere(broken)[0, 0]]}")

    def _drawn(self, pictures, corners, lengths, indices) -> np.ndarray:
        indices = np.asarray(indices)
        if indices.ndim != 2 or len(indices) != len(pictures) or indices.dtype.kind not in "iu":
            raise ValueError(f"indices are {indices.dtype} of shape {indices.shape}: expected whole numbers, "
                             f"({len(pictures)}, T), a row for each of the {len(pictures)} samples")
        indices = indices.astype(np.int64)
        frames = lengths.max(axis=1)
        wrong = (indices < 0) | (indices >= frames[:, None])
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(f"sample {row} has no frame {indices[row, column]}: its video has frames 0 to "
                             f"{frames[row] - 1}")
        clips = np.zeros((*indices.shape, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
        _draw_all(self.digits.images, pictures, corners, lengths, indices, clips)
        return clips

    def _check(self, spec: Spec) -> None:
        if (spec.dataset, spec.digit_set) != (self.name, self.digit_set):
            raise ValueError(f"a spec of {spec.dataset} on {spec.digit_set} was given to {self.name} on "
                             f"{self.digit_set}: draw it with the dataset that made it")
        if len(spec.movers) != _recipe(self.name).movers:
            raise ValueError(f"a spec of {self.name} has {_recipe(self.name).movers} movers; got {spec}")


def track(
    dataset: str, start_y: float, start_x: float, motion: str, *, from_frame_0: bool = False
) -> np.ndarray:
    """One digit's track until it is still, or 20 frames (Modified: 21): int64 (n, 2), rows of (top, left) in pixels.

    Starts are in [0, 1] of the free range. With `from_frame_0` they are the position in frame 0 itself, where
    Single and Double otherwise make their first step before it. Raises ValueError for an unknown dataset or
    motion, or a start outside [0, 1].
    """
    recipe = _recipe(dataset)
    for name, start in (("start_y", start_y), ("start_x", start_x)):
        if not 0.0 <= start <= 1.0:
            raise ValueError(f"{name} {start} is outside [0, 1], the free range: 0 is the top or left border")
    corners = np.empty((1, 1, recipe.most_frames, 2), np.int64)
    lengths = np.empty((1, 1), np.int64)
    starts = np.array([[[start_y, start_x]]], np.float64)
    motions = np.array([[_codes(dataset, motion)]], np.int64)
    first_step = recipe.frame_0_after_step and not from_frame_0
    _walk_all(starts, motions, np.zeros((1, 1, 2), np.int64), recipe.step, first_step, corners, lengths)
    return corners[0, 0, :lengths[0, 0]].copy()


# ------------------------------------------------------------------------------------ rules and draws


def _recipe(dataset: str) -> _Recipe:
    if dataset not in _RECIPES:
        raise ValueError(f"unknown dataset {dataset!r}: Moving MNIST has {', '.join(DATASETS)}")
    return _RECIPES[dataset]


def _check_motion(dataset: str, motion: str) -> None:
    if motion not in captions.motions(dataset):
        known = ", ".join(captions.motions(dataset))
        raise ValueError(f"{dataset} has no motion {motion!r}: use one of {known}")


def _codes(dataset: str, motion: str) -> tuple[int, int, int]:
    _check_motion(dataset, motion)
    coordinate, heading, bounces = _MOTIONS[motion]
    return coordinate, heading, _RECIPES[dataset].bounces if bounces else 0


@cache
def _axes(dataset: str) -> dict[tuple[int, ...], int]:
    """The training axis of the last moving digit for each combination of digits: a constant of the dataset.

    It alternates over a random order of the combinations, which depends on the dataset's name and on no seed.
    """
    if _recipe(dataset).movers == 1:
        combinations = [(digit,) for digit in range(10)]
    else:
        combinations = [(first, second) for first in range(10) for second in range(10) if first != second]
    draws = Draws("training axes", dataset)
    for last in range(len(combinations) - 1, 0, -1):  # Fisher and Yates
        other = draws.below(last + 1)
        combinations[last], combinations[other] = combinations[other], combinations[last]
    return {combination: rank % 2 for rank, combination in enumerate(combinations)}


def _axis(dataset: str, split: str, moving: tuple[int, ...]) -> int:
    trained = _axes(dataset)[moving]
    return trained if split == "train" else 1 - trained


def _overlap(corner: tuple[int, int], other: tuple[int, int]) -> float:
    """Intersection over union of two digit boxes, given by their corners."""
    height, width = (max(0, DIGIT_SIZE - abs(a - b)) for a, b in zip(corner, other))
    return height * width / (2 * DIGIT_SIZE**2 - height * width)


# -------------------------------------------------------------------------------------------- kernels


@njit(cache=True)
def _walk(position, heading, step, first_step, bounces, pixels):
    """Fill `pixels` with floor(36 position), frame by frame; the number of frames until the digit is still.

    The float is carried from frame to frame as in the released generators: ten steps of 0.1 from 0 end below
    1, and a pixel depends on that.
    """
    for frame in range(len(pixels)):
        if frame > 0 or first_step:
            position += heading * step
        if (heading < 0 and position <= 0.0) or (heading > 0 and position >= 1.0):
            position = 0.0 if heading < 0 else 1.0
            if bounces == 0:
                pixels[frame] = int(FREE_RANGE * position)
                return frame + 1
            heading = -heading
            bounces -= 1
        pixels[frame] = int(FREE_RANGE * position)
    return len(pixels)


@njit(parallel=True, cache=True)
def _walk_all(starts, motions, fixed, step, first_step, corners, lengths):
    """Tracks (b, places, frames, 2) and lengths (b, places); a place of heading 0 keeps its fixed corner."""
    for sample in prange(starts.shape[0]):
        for place in range(starts.shape[1]):
            coordinate, heading, bounces = motions[sample, place]
            if heading == 0:
                corners[sample, place, 0] = fixed[sample, place]
                lengths[sample, place] = 1
                continue
            still = 1 - coordinate
            corners[sample, place, :, still] = int(FREE_RANGE * starts[sample, place, still])
            lengths[sample, place] = _walk(
                starts[sample, place, coordinate], heading, step, first_step, bounces,
                corners[sample, place, :, coordinate])


@njit(parallel=True, cache=True)
def _draw_all(images, pictures, corners, lengths, indices, clips):
    """Paste the digits into black `clips` (b, T, 64, 64), the brighter pixel above."""
    for sample in prange(clips.shape[0]):
        for moment in range(clips.shape[1]):
            frame = clips[sample, moment]
            for place in range(pictures.shape[1]):
                if pictures[sample, place] < 0:
                    continue
                image = images[pictures[sample, place]]
                at = min(indices[sample, moment], lengths[sample, place] - 1)
                top, left = corners[sample, place, at]
                for y in range(DIGIT_SIZE):
                    for x in range(DIGIT_SIZE):
                        frame[top + y, left + x] = max(frame[top + y, left + x], image[y, x])
