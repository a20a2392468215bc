"""Does the video do what the text says? Motion accuracy by analysis by synthesis; when motion ends (4.3.2).

PSNR hardly tells a right motion from a wrong one where most pixels stand still. Here clips of other captions
are simulated, from the same first image, and a generated clip is right if the one of its own caption is the
nearest. Moving MNIST: all motions that the caption could have named. CATER-GEN: 31 other explicit captions of
the scene, close ones among them.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from einops import rearrange
from numba import njit
from torch import Tensor

from mage_core import captions
from mage_core.captions import CELLS, Action
from mage_core.cater import scene
from mage_core.cater.scene import CaterGen
from mage_core.clips import frame_indices
from mage_core.draws import Draws
from mage_core.moving_mnist import MovingMNIST, Spec

# Distances closer than this are the same: a clip that is as far from its own candidate as from another one
# (all black, or the first frame for ever) must not be right or wrong by the rounding of a sum.
ROUNDING = 1e-6
FAR_OUT = 0.5   # beyond [0, 1]: further than a network's last layer overshoots, it is another range
RIVALS = 31   # other captions of a CATER-GEN scene

# How many of the first samples of a split are judged, where it is not all of them.
JUDGED = {"cater-gen-v2": 500}


@dataclass(frozen=True)
class Candidates:
    """The clips that a caption could have asked for.

    `clips` uint8 (n T H W), of CATER-GEN (n T H W c); `own` the index of the caption's; `names` the motions of
    each, one a mover, or the sentences of each.
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


def judged(dataset: object, spec: object) -> bool:
    """Whether motion accuracy is defined for a sample: all of Moving MNIST, CATER-GEN with explicit captions.

    Of CATER-GEN-v2 the first 500 samples of a split are judged; ambiguous captions have many right answers.
    """
    if isinstance(dataset, CaterGen):
        return dataset.mode == "explicit" and spec.index < JUDGED.get(dataset.name, math.inf)
    return isinstance(dataset, MovingMNIST)


def check_range(videos: Tensor, name: str) -> None:
    """ValueError for values, of any shape, that are not finite, or so far from [0, 1] that they have another range."""
    if not torch.isfinite(videos).all():
        raise ValueError(f"{name} has values that are not finite: check what made it")
    low, high = (videos.min().item(), videos.max().item()) if videos.numel() else (0, 1)
    if low < -FAR_OUT or high > 1 + FAR_OUT:
        raise ValueError(f"{name} has values from {low:g} to {high:g}: they must be in [0, 1]; divide by 255 where "
                         "they are 8-bit, or map -1 to 1 on it by (x + 1) / 2")


def motion_accuracy(videos: Tensor, dataset: MovingMNIST | CaterGen, specs: Sequence[Spec | scene.Spec],
                    speeds: Sequence[float] | None = None) -> MotionAccuracy:
    """Which of `videos` (b t c H W), in [0, 1], do what their captions say, by analysis by synthesis.

    A clip is right if the candidate of its own caption is nearer, in mean squared error over frames 2 to T,
    than every other one (`candidate_clips`). Candidates equal to the caption's own in these frames count as its
    own. `speeds` default to those of the specs. Raises ValueError for shapes that do not fit, values that are
    not finite or far from [0, 1], and ambiguous captions.
    """
    speeds = [spec.speed for spec in specs] if speeds is None else [float(speed) for speed in speeds]
    expected = (dataset.channels, dataset.image_size, dataset.image_size)
    if videos.ndim != 5 or tuple(videos.shape[2:]) != expected or videos.shape[1] < 2:
        raise ValueError(f"videos of shape {tuple(videos.shape)}: {dataset.name} needs "
                         f"(b t {' '.join(map(str, expected))}) with t of at least 2")
    if not len(videos) == len(specs) == len(speeds) or not len(specs):
        raise ValueError(f"{len(videos)} videos, {len(specs)} specs and {len(speeds)} speeds: they must be "
                         "equal, and at least 1")
    if not videos.is_floating_point():
        raise ValueError(f"videos are {videos.dtype}: they must be float in [0, 1]")
    check_range(videos, "videos")
    if getattr(dataset, "mode", "explicit") != "explicit":
        raise ValueError(f"{dataset.name} with {dataset.mode} captions: many videos are right, so that none of the "
                         "candidates is; judge with mode='explicit'")
    clip_length = videos.shape[1]
    verdicts = []
    for video, spec, speed in zip(videos, specs, speeds):
        later = (255 * video[1:].detach().float().cpu()).permute(0, 2, 3, 1).contiguous().numpy()
        if isinstance(dataset, CaterGen):
            question = _question(dataset, spec, speed, clip_length)
            verdicts.append((_own_is_nearest(later, question), 1, len(question.specs)))
        else:
            found = candidate_clips(dataset, spec, speed, clip_length)
            verdicts.append((*_judge(later.reshape(-1), found), len(found.clips)))
    correct, counted, candidates = (np.array(column) for column in zip(*verdicts))
    return MotionAccuracy(correct, counted, candidates)


def candidate_clips(dataset: MovingMNIST | CaterGen, spec: Spec | scene.Spec, speed: float | None = None,
                    clip_length: int | None = None) -> Candidates:
    """The clips that a sample is judged with: of all motions that the caption could have named, or of CATER-GEN.

    Moving MNIST has 4 for Single, 16 Double, 64 Modified. All start where the digits stand in the sample's first
    frame, keep the distractor and have the same speed (by default the spec's); each takes its frames by its own
    length. CATER-GEN has 32, see `candidate_specs`. Raises ValueError for eta outside (0, 1).
    """
    speed = spec.speed if speed is None else speed
    clip_length = dataset.clip_length if clip_length is None else clip_length
    if isinstance(dataset, CaterGen):
        specs = candidate_specs(dataset, spec, speed, clip_length)
        indices = frame_indices(scene.FRAMES, speed, dataset.interval, clip_length)
        clips = dataset.clips(specs, np.tile(indices, (len(specs), 1)))
        return Candidates(clips, 0, tuple((scene.caption(each),) for each in specs))
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


# ------------------------------------------------------------------------------------------ CATER-GEN


def candidate_specs(dataset: CaterGen, spec: scene.Spec, speed: float | None = None,
                    clip_length: int | None = None) -> tuple[scene.Spec, ...]:
    """The sample itself, and the same scene doing what 31 other explicit captions say: what it is judged with.

    The others have as many actions, of the same durations, and no two of them ask for the same. Their places are drawn
    inside the named cells by a fixed seed, but for what their captions share with the sample's: the same action is
    done as in the sample, and another one that ends in a cell of the sample's ends at the sample's own point (drawn
    anew only where objects would collide), so that the verdict depends on the rest. Up to 8 differ in the cell of one
    action, up to 8 in the object, up to 8 in what an object does, as many as are found; all others are any captions of
    the scene; there are fewer than 31 where no more are found. One that equals the own clip to the pixel in frames 2
    to T is not taken. Raises ValueError for eta outside (0, 1), or a scene that has nothing else to do.
    """
    speed = spec.speed if speed is None else speed
    return _question(dataset, spec, speed, dataset.clip_length if clip_length is None else clip_length).specs


@dataclass(frozen=True)
class _Question:
    """A CATER-GEN sample with its rivals: specs, the own one first, and the pictures that any answer needs.

    `numbers` (n, T-1) are the frames of each, the first of those that look alike. `own` uint8 (T-1, H, W, c);
    `last` holds the last frame of each, what differs from the own one alone and packed, since a test split has
    thousands.
    """

    dataset: CaterGen
    specs: tuple[scene.Spec, ...]
    numbers: np.ndarray
    own: np.ndarray
    last: tuple[bytes, ...]

    def last_frames(self) -> np.ndarray:
        """The last frame of each: uint8 (n, H, W, c)."""
        packed = np.frombuffer(b"".join(map(zlib.decompress, self.last)), np.uint8)
        return packed.reshape(-1, *self.own.shape[1:]) ^ self.own[-1]


@lru_cache(maxsize=500)  # about half a MB each: several generators are judged with the same pictures
def _question(dataset: CaterGen, spec: scene.Spec, speed: float, clip_length: int) -> _Question:
    indices = frame_indices(scene.FRAMES, speed, dataset.interval, clip_length)[1:]
    own = dataset.clips([spec], indices[None])[0]
    specs, last = [spec], [own[-1]]
    others = _other_captions(dataset, spec)
    while len(specs) <= RIVALS:
        more = [other for _, other in zip(range(RIVALS + 1 - len(specs)), others)]
        if not more:
            break
        for other, picture in zip(more, dataset.clips(more, np.full((len(more), 1), indices[-1]))[:, 0]):
            if (picture != own[-1]).any() or (dataset.clips([other], indices[None])[0] != own).any():
                specs.append(other)
                last.append(picture)
    if len(specs) == 1:
        raise ValueError(f"{scene.caption(spec)!r}: no other caption fits this scene, "
                         "so that nothing can be told apart")
    numbers = np.stack([scene.first_alike(*scene.tracks(each))[indices] for each in specs])
    return _Question(dataset, tuple(specs), numbers, own,
                     tuple(zlib.compress((picture ^ own[-1]).tobytes(), 1) for picture in last))


def _own_is_nearest(video: np.ndarray, question: _Question) -> bool:
    """Whether frames 2 to T (t H W c), float32 in 0 to 255, are nearest to the own clip.

    A rival is out as soon as some of its frames are farther than all of the own ones. The last frame, which is
    often there more than once, settles most, and the others' further frames are never drawn.
    """
    own = sum(map(_squared, video, question.own))

    def add(rivals, frames):
        pictures = question.dataset.clips([question.specs[rival] for rival in rivals], np.array(frames)[:, None])
        for rival, frame, (picture,) in zip(rivals, frames, pictures):
            reached[rival] += sum(_squared(video[t], picture) for t in np.flatnonzero(question.numbers[rival] == frame))

    left = [sorted(set(numbers[:-1]) - {numbers[-1]}) for numbers in question.numbers.tolist()]
    reached = [sum(_squared(video[t], picture) for t in np.flatnonzero(numbers == numbers[-1]))
               for numbers, picture in zip(question.numbers, question.last_frames())]
    nearest = 1 + int(np.argmin(reached[1:]))   # drawn first and to its end: where it wins, no more is needed
    if not own < reached[nearest] * (1 - ROUNDING):
        add([nearest] * len(left[nearest]), left[nearest])
        left[nearest] = []
    while True:
        ahead = [rival for rival in range(1, len(reached)) if not own < reached[rival] * (1 - ROUNDING)]
        if any(not left[rival] for rival in ahead):
            return False
        if not ahead:
            return True
        add(ahead, [left[rival].pop(len(left[rival]) // 2) for rival in ahead])


def _other_captions(dataset: CaterGen, spec: scene.Spec) -> Iterator[scene.Spec]:
    """The scene of `spec` doing what other explicit captions say, each another thing, until nothing more is found."""
    draws = Draws("rivals", spec.dataset, spec.split, spec.index, spec.seed)
    own = scene.clauses(spec)
    seen = {frozenset(own)}
    for change, wanted in ((_another_cell, 8), (_another_object, 8), (_another_action, 8), (_anything, math.inf)):
        found = 0
        for _ in range(60 if wanted < math.inf else 100 * RIVALS):
            if found == wanted:
                break
            actions = change(draws, spec, own)
            if actions is None or frozenset(actions) in seen:
                continue
            seen.add(frozenset(actions))
            other = _as_captioned(dataset, spec, own, actions)
            if other is not None:
                found += 1
                yield other


def _as_captioned(dataset: CaterGen, spec: scene.Spec, own: tuple[Action, ...],
                  actions: tuple[Action, ...]) -> scene.Spec | None:
    """The scene doing `actions`; None where that cannot be. What the own caption says too is as in the sample."""
    kept = dict(zip(own, spec.moves))
    ends = [move.end for action, move in kept.items() if action not in actions]
    ends = [kept[action].end if action in kept else ends.pop(0) for action in actions]
    places = {action.place: {"x": move.x, "y": move.y} for action, move in kept.items() if action.place}
    for seed in range(4):
        try:
            sentence = captions.format_caption(actions, spec.dataset)
            other = dataset.with_caption(spec, sentence, seed=seed, ends=ends, tries=10)
        except ValueError:  # against CATER's rules, or no room for it
            return None
        for shared in (places, {}):
            moves = tuple(kept.get(action) or replace(move, **shared.get(action.place, {}))
                          for action, move in zip(actions, other.moves))
            if not scene.collide(spec.objects, moves):
                return replace(spec, moves=moves)
    return None


def _another_cell(draws: Draws, spec: scene.Spec, own: tuple[Action, ...]) -> tuple[Action, ...] | None:
    """One action ends in another cell."""
    which = draws.below(len(own))
    if own[which].place is None:
        return None
    return _with(own, which, replace(own[which], place=_any_cell(draws)))


def _another_object(draws: Draws, spec: scene.Spec, own: tuple[Action, ...]) -> tuple[Action, ...] | None:
    """One action is done by, or ends on, another object; an object that acts already changes roles with it."""
    which = draws.below(len(own))
    others = [action for action in _able(spec) if action.kind == own[which].kind]
    other = others[draws.below(len(others))]
    changed = _with(own, which, replace(other, place=own[which].place))
    for k, action in enumerate(own):
        if k != which and action.subject == other.subject:
            changed = _with(changed, k, replace(action, subject=own[which].subject))
    return changed


def _another_action(draws: Draws, spec: scene.Spec, own: tuple[Action, ...]) -> tuple[Action, ...] | None:
    """One object does something else; a slide and a pick-place end in the same cell."""
    which = draws.below(len(own))
    others = [action for action in _able(spec) if action.subject == own[which].subject]
    other = others[draws.below(len(others))]
    if other.kind in _ENDING_SOMEWHERE:
        other = replace(other, place=own[which].place or _any_cell(draws))
    return _with(own, which, other)


def _anything(draws: Draws, spec: scene.Spec, own: tuple[Action, ...]) -> tuple[Action, ...] | None:
    """As many actions, of any object, with any end."""
    able = _able(spec)
    chosen = (able[draws.below(len(able))] for _ in own)
    return tuple(replace(action, place=_any_cell(draws)) if action.kind in _ENDING_SOMEWHERE else action
                 for action in chosen)


_ENDING_SOMEWHERE = ("slide", "pick-place")


def _able(spec: scene.Spec) -> list[Action]:
    """What each object of a scene can do, without places."""
    names = [scene.object_name(spec, number, "explicit", ()) for number in range(len(spec.objects))]
    able = []
    for subject, thing in zip(names, spec.objects):
        for kind in scene.ABLE[thing.shape]:
            ends_on = [None] if kind != "contain" else [
                name for name, other in zip(names, spec.objects) if scene.can_contain(thing, other)]
            able += [Action(kind, subject, object=name) for name in ends_on]
    return able


def _any_cell(draws: Draws) -> tuple[int, int]:
    return CELLS[draws.below(len(CELLS))], CELLS[draws.below(len(CELLS))]


def _with(actions: tuple[Action, ...], which: int, action: Action) -> tuple[Action, ...]:
    return (*actions[:which], action, *actions[which + 1:])


@njit(cache=True, fastmath={"reassoc", "contract"})
def _squared_sum(frame, picture):
    total = 0.0
    for pixel in range(len(frame)):
        error = np.float64(frame[pixel]) - np.float64(picture[pixel])
        total += error * error
    return total


def _squared(frame: np.ndarray, picture: np.ndarray) -> float:
    """The squared distance of two pictures of any shape, float32 and uint8."""
    return _squared_sum(frame.reshape(-1), np.ascontiguousarray(picture).reshape(-1))


# ------------------------------------------------------------------------------- when motion ends


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
    values = values.flatten(2)
    if not torch.isfinite(values).all():
        raise ValueError("the frames have values that are not finite: check what made them")
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
