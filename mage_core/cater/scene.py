"""CATER-GEN-v1 and v2 as specs: what stands on the table, what it does, what is said of it (paper 4.1, A.1).

A sample is a small frozen `Spec`, a pure function of (dataset, split, index, seed); captions, tracks and frames
are pure functions of the spec. Rules and sizes are those of CATER's generator and of the authors' annotations;
where these are silent the choice is ours and stands in the dataset card.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mage_core import captions
from mage_core.captions import MATERIALS, QUADRANTS, SHAPES, Action, ObjectName
from mage_core.draws import Draws

VERSION = 1          # of rules and pictures, in every cache's name: raise it when a spec or a picture changes
LARGER = ".1"        # the same of pictures larger than 128 x 128
TABLE = 3.0          # x and y run from -3 to 3
FRAMES = 31          # of every video, 0 to 30, at 24 a second
ENDS = (20, 30)      # an action ends at a frame in this range, both included
LIFT = 2.0           # how high an object is picked up
CLEARANCE = 0.25     # between any two objects that are not a contained pair, in any frame
MARGIN = 0.4         # between two objects of a new scene, along the camera's left-right and front-behind
TRIES = 100          # places drawn for one action before another action is drawn

RADII = {"small": 0.25, "medium": 0.5, "large": 0.75}
SNITCH_RADIUS = 0.3
RGB = {  # CATER hands the values of a picture file to the renderer as linear light
    "gray": (87, 87, 87), "red": (173, 35, 35), "blue": (42, 75, 215), "green": (29, 105, 20),
    "brown": (129, 74, 25), "purple": (129, 38, 192), "cyan": (41, 208, 208), "yellow": (255, 238, 51),
}
GOLD = (1.0, 0.843, 0.0)

KINDS = ("rotate", "slide", "pick-place", "contain")
ABLE = {  # who can do what
    "cube": ("rotate", "slide", "pick-place"), "cylinder": ("rotate", "slide", "pick-place"),
    "snitch": ("rotate", "slide", "pick-place"), "sphere": ("slide", "pick-place"),
    "cone": ("slide", "pick-place", "contain"),
}
_CONTAINED = ("cone", "sphere", "snitch")
_SIZES = {"cater-gen-v1": (3_500, 1_500), "cater-gen-v2": (24_000, 6_000)}
_GOLDEN = ("medium gold metal cone", "small gold metal snitch")  # a scene of v1; v2 has the snitch alone
_WHOLE, _NUMBER = (int, np.integer), (float, int, np.floating, np.integer)
DATASETS = tuple(_SIZES)
MODES = ("explicit", "ambiguous")

# The camera's right and far side, along the table.
_SIDEWAYS = np.array([[0.65718, 0.75374], [-0.75374, 0.65718]])


@dataclass(frozen=True)
class SceneObject:
    """Something on the table, and where it first stands; `yaw` is in radians.

    Raises ValueError for a shape, size, color or material that CATER has not, a snitch that is not small, gold
    and metal, anything else in gold but the medium metal cone of v1, or a place off the table.
    """

    shape: str
    size: str
    color: str
    material: str
    x: float
    y: float
    yaw: float = 0.0

    def __post_init__(self):
        if self.shape == "snitch":
            if (self.size, self.color, self.material) != ("small", "gold", "metal"):
                raise ValueError(f"a snitch is always small, gold and metal; got {self.name}")
        else:
            for what, allowed in (("shape", SHAPES), ("size", tuple(RADII)), ("material", MATERIALS),
                                  ("color", tuple(RGB))):
                if getattr(self, what) not in allowed and self.name != _GOLDEN[0]:
                    wrong = f"unknown {what} {getattr(self, what)!r}"
                    if self.color == "gold" and what == "color":
                        wrong = f"there is no {self.name}, only a snitch and the {_GOLDEN[0]} of cater-gen-v1 are gold"
                    raise ValueError(f"{wrong}: use one of {', '.join(allowed)}")
        check_place(self.x, self.y)
        if not (isinstance(self.yaw, _NUMBER) and math.isfinite(self.yaw)):
            raise ValueError(f"yaw {self.yaw!r} is no angle: give a number, in radians")

    @property
    def name(self) -> str:
        """The explicit name: size, color, material, shape."""
        return f"{self.size} {self.color} {self.material} {self.shape}"

    @property
    def radius(self) -> float:
        """CATER's size number: the scale of the shape, the height of its centre, and its radius in collisions."""
        return SNITCH_RADIUS if self.shape == "snitch" else RADII[self.size]

    @property
    def rgb(self) -> tuple[float, float, float]:
        """The color as linear RGB in [0, 1]."""
        return GOLD if self.color == "gold" else tuple(value / 255 for value in RGB[self.color])

    def fits(self, name: ObjectName) -> bool:
        """Whether a name, explicit or ambiguous, can be said of this object."""
        return name.shape == self.shape and set(name.attributes) <= {self.size, self.color, self.material}


@dataclass(frozen=True)
class Move:
    """What one object does from frame 0 to frame `end`; then it stays.

    `subject` and `object` are places in the scene's list of objects; `x, y` is where a slide or a pick-place
    ends; a contain ends on its `object`. `said` holds what an ambiguous caption says of the subject and of the
    object, in order. Raises ValueError for an unknown kind, an end that is no whole number from 20 to 30, a place
    off the table, a place or an object that the kind does not take, or a `said` that is no pair of tuples.
    """

    kind: str
    subject: int
    end: int
    x: float | None = None
    y: float | None = None
    object: int | None = None
    said: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"unknown action {self.kind!r}: use one of {', '.join(KINDS)}")
        if not (isinstance(self.end, _WHOLE) and ENDS[0] <= self.end <= ENDS[1]):
            raise ValueError(f"an action ends at a frame, a whole number from {ENDS[0]} to {ENDS[1]}; got {self.end!r}")
        for what, value in (("subject", self.subject), ("object", self.object)):
            if value is not None and not isinstance(value, _WHOLE) or value is None and what == "subject":
                raise ValueError(f"{what} {value!r} is no place in the scene's list of objects: give a whole number "
                                 "from 0 on")
        if not (isinstance(self.said, tuple) and len(self.said) == 2
                and isinstance(self.said[0], tuple) and isinstance(self.said[1], tuple)):
            raise ValueError("said is a pair of tuples, words of the subject and words of the object, e.g. "
                             f"(('red',), ()); got {self.said!r}")
        if (self.object is not None) != (self.kind == "contain"):
            raise ValueError(f"a contain has an object and no other action has; got {self}")
        if self.kind in ("slide", "pick-place"):
            if self.x is None or self.y is None:
                raise ValueError(f"a {self.kind} needs the place where it ends, x and y; got {self}")
            check_place(self.x, self.y)
        elif self.x is not None or self.y is not None:
            raise ValueError(f"a {self.kind} has no place of its own: leave x and y out; got {self}")


@dataclass(frozen=True)
class Spec:
    """All that a sample is. `speed` is eta of the paper, in the open interval (0, 1).

    Raises ValueError for an unknown dataset or split, a negative index, and for objects or moves that break CATER's
    rules, with what is allowed: which objects a scene has (v1 the gold cone and the snitch; v2 3 to 8, the snitch
    among them), no two of one name or less than 0.25 apart on the table, who can do what, who can contain whom, no
    object in two actions, nothing said that is not true. Whether moves collide is for `check_room`, which
    `CaterGen.clips` calls. CATER's margin along the camera's directions binds drawn scenes alone.
    """

    dataset: str
    split: str
    index: int
    seed: int
    objects: tuple[SceneObject, ...]
    moves: tuple[Move, ...]
    speed: float

    def __post_init__(self):
        _check_key(self.dataset, self.split, self.index, self.seed)
        object.__setattr__(self, "objects", tuple(self.objects))
        object.__setattr__(self, "moves", tuple(self.moves))
        if not (isinstance(self.speed, _NUMBER) and 0.0 < self.speed < 1.0):
            raise ValueError(f"speed {self.speed!r} is no number in the open interval (0, 1)")
        names = [thing.name for thing in self.objects]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"there are {names.count(name)} objects called {name!r}: each object of a scene "
                                 "needs a size, color, material and shape of its own")
        if self.dataset == "cater-gen-v1":
            if sorted(names) != list(_GOLDEN):
                raise ValueError(f"a scene of cater-gen-v1 has a {' and a '.join(_GOLDEN)}, no more and no other; got "
                                 f"{', '.join(names)}")
        elif not 3 <= len(names) <= 8 or _GOLDEN[1] not in names or _GOLDEN[0] in names:
            raise ValueError(f"a scene of cater-gen-v2 has 3 to 8 objects, a {_GOLDEN[1]} among them and nothing else "
                             f"in gold; got {len(names)}: {', '.join(names)}")
        for number, thing in enumerate(self.objects):
            for other in self.objects[:number]:
                free = _free(thing, other)
                if free < CLEARANCE:
                    raise ValueError(f"the {thing.name} and the {other.name} stand {free:.2f} apart, their radii taken "
                                     f"off, and must stand {CLEARANCE} apart: move one of them")
        if not 1 <= len(self.moves) <= 2:
            raise ValueError(f"a video has one or two actions; got {len(self.moves)}")
        for move in self.moves:
            check_rules(self.objects, move)
        taken = [move.subject for move in self.moves] + [m.object for m in self.moves if m.object is not None]
        for number in taken:
            if taken.count(number) > 1:
                raise ValueError(f"the {names[number]} has a part in two actions: each object acts once, and the "
                                 "object of a contain not at all")


def check_place(x: float, y: float) -> None:
    """Raise ValueError for a place off the table."""
    for what, value in (("x", x), ("y", y)):
        if not isinstance(value, _NUMBER):
            raise ValueError(f"{what} = {value!r} is no number: give one from {-TABLE:g} to {TABLE:g}")
        if not -TABLE <= value <= TABLE:
            raise ValueError(f"{what} = {value} is off the table: x and y run from {-TABLE:g} to {TABLE:g}")


def check_rules(objects: Sequence[SceneObject], move: Move) -> None:
    """Raise ValueError for a move that no object of the scene could make, or that says what is not true of it."""
    for number in (move.subject, move.object):
        if number is not None and not 0 <= number < len(objects):
            raise ValueError(f"there is no object {number}: the scene has 0 to {len(objects) - 1}")
    subject = objects[move.subject]
    if move.kind not in ABLE[subject.shape]:
        able = ", ".join(shape for shape in SHAPES if move.kind in ABLE[shape])
        raise ValueError(f"a {subject.shape} cannot {move.kind}; allowed: {able}")
    if move.kind == "contain":
        other = objects[move.object]
        if not can_contain(subject, other):
            raise ValueError(f"the {subject.name} cannot contain the {other.name}: a cone contains a "
                             f"{', a '.join(_CONTAINED)} that is strictly smaller than itself")
    for number, said in zip((move.subject, move.object), move.said):
        thing = None if number is None else objects[number]
        true = () if thing is None else (thing.size, thing.color, thing.material)
        if said and (any(word not in true for word in said) or len(set(said)) < len(said)):
            raise ValueError(f"{said} cannot be said of the {thing.name}: use some of {', '.join(true)}, each once"
                             if thing else f"{said} is said of an object, and a {move.kind} has none: leave it ()")


def can_contain(cone: SceneObject, other: SceneObject) -> bool:
    """CATER's rule: a cone contains a strictly smaller cone, sphere or snitch."""
    return cone.shape == "cone" and other.shape in _CONTAINED and other.radius < cone.radius


def cell(value: float) -> int:
    """The cell coordinate of x or y, by the rule of the released annotations: -3 to 3 without 0."""
    if value == -TABLE:
        return -3
    return math.ceil(value) if value > 0 else math.ceil(value - 1)


def quadrant(x: float, y: float) -> str:
    """`first` to `fourth`; 0 counts as positive here, although it lies in cell -1."""
    return QUADRANTS[(0 if x >= 0 else 1) if y >= 0 else (3 if x >= 0 else 2)]


# ------------------------------------------------------------------------------------------- tracks


def tracks(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """Centres and Euler angles (about x, then y, then z, in radians) in every frame: two float (31, n, 3)."""
    return _tracks(spec.objects, spec.moves)


def _tracks(objects, moves) -> tuple[np.ndarray, np.ndarray]:
    at = np.empty((FRAMES, len(objects), 3))
    turned = np.zeros_like(at)
    for number, thing in enumerate(objects):
        at[:, number] = thing.x, thing.y, thing.radius
        turned[:, number, 2] = thing.yaw
    for move in moves:
        place, angle = at[:, move.subject], turned[:, move.subject]
        if move.kind == "rotate":
            angle[:, 1] = np.pi / 2 * _ramp(0, move.end)
            continue
        target = (move.x, move.y) if move.object is None else (objects[move.object].x, objects[move.object].y)
        if move.kind == "slide":
            across = _ramp(0, move.end)
        else:
            frames = move.end + 1
            raised, over = int(0.2 * frames), int(0.8 * frames)
            across = _ramp(raised + 1, over)
            place[:, 2] += LIFT * (_ramp(0, raised) - _ramp(over + 1, move.end))
        start = place[0, :2].copy()
        place[:, :2] = start + across[:, None] * (np.array(target) - start)
        place[across == 1.0, :2] = target
    return at, turned


def _ramp(first: int, last: int) -> np.ndarray:
    """0 up to frame `first`, 1 from frame `last` on, linear between: (31,)."""
    return np.clip((np.arange(FRAMES) - first) / (last - first), 0.0, 1.0)


def gaps(objects: Sequence[SceneObject], moves: Sequence[Move]) -> np.ndarray:
    """The least free distance of each two objects over all frames, inf for a contained pair: (n, n).

    CATER's rule: the distance of the centres in space less both size numbers.
    """
    at, _ = _tracks(objects, moves)
    radii = np.array([thing.radius for thing in objects])
    distances = np.sqrt(((at[:, :, None] - at[:, None]) ** 2).sum(-1)).min(0)
    free = distances - radii[:, None] - radii[None]
    np.fill_diagonal(free, np.inf)
    for move in moves:
        if move.object is not None:
            free[move.subject, move.object] = free[move.object, move.subject] = np.inf
    return free


def collide(objects: Sequence[SceneObject], moves: Sequence[Move]) -> bool:
    """Whether two objects that are not a contained pair come closer than 0.25 in any frame."""
    return bool(gaps(objects, moves).min() < CLEARANCE)


def check_room(spec: Spec) -> None:
    """Raise ValueError where two objects collide.

    A sample's scene may: a guess at what the sample's own caption leaves open, as metrics make, is any that fits it.
    """
    free = gaps(spec.objects, spec.moves)
    if free.min() < CLEARANCE:
        own = draw_spec(spec.dataset, spec.split, spec.index, spec.seed)
        if own.objects != spec.objects or clauses(own) != clauses(spec):
            one, other = (spec.objects[k].name for k in divmod(int(free.argmin()), len(free)))
            raise ValueError(f"the {one} and the {other} collide: {free.min():.2f} is left between them in some frame, "
                             f"and it must be {CLEARANCE} in all; choose another place, or another end")


# ------------------------------------------------------------------------------------------ samples


def draw_spec(dataset: str, split: str, index: int, seed: int = 0) -> Spec:
    """The sample at `index` of `split`: a pure function of its arguments, the same on every machine.

    Any seed, any index from 0 on. Raises ValueError for an unknown dataset or split, or a negative index.
    """
    index, seed = operator.index(index), operator.index(seed)
    _check_key(dataset, split, index, seed)
    # The scene has a stream of its own, so that the first frame never depends on the actions.
    scene = Draws("scene", dataset, split, index, seed)
    speed = scene.inside()
    objects = _draw_objects(scene, dataset)
    moves = _draw_moves(Draws("actions", dataset, split, index, seed), objects, dataset)
    return Spec(dataset, split, index, seed, objects, moves, speed)


def _draw_objects(draws: Draws, dataset: str) -> tuple[SceneObject, ...]:
    looks = [("snitch", "small", "gold", "metal")]
    if dataset == "cater-gen-v1":
        looks.append(("cone", "medium", "gold", "metal"))
    else:
        count = 3 + draws.below(6)
        while len(looks) < count:
            shape = "cone" if len(looks) < 3 else _one(draws, ("cube", "sphere", "cylinder", "cone"))
            size = ("medium", "large")[len(looks) - 1] if len(looks) < 3 else _one(draws, tuple(RADII))
            look = (shape, size, _one(draws, tuple(RGB)), _one(draws, MATERIALS))
            if look not in looks:
                looks.append(look)
    while True:
        placed: list[SceneObject] = []
        for _ in range(TRIES * len(looks)):
            x, y = (2 * draws.uniform() - 1) * TABLE, (2 * draws.uniform() - 1) * TABLE
            thing = SceneObject(*looks[len(placed)], x, y, 2 * math.pi * draws.uniform())
            if all(_apart(thing, other) for other in placed):
                placed.append(thing)
                if len(placed) == len(looks):
                    return tuple(placed)


def _free(thing: SceneObject, other: SceneObject) -> float:
    # the sizes differ in height too, so that the rule in space is the weaker one at the start
    return math.hypot(thing.x - other.x, thing.y - other.y) - thing.radius - other.radius


def _apart(thing: SceneObject, other: SceneObject) -> bool:
    if _free(thing, other) < CLEARANCE:
        return False
    dx, dy = thing.x - other.x, thing.y - other.y
    return all(abs(a * dx + b * dy) >= MARGIN for a, b in _SIDEWAYS)


def _draw_moves(draws: Draws, objects: tuple[SceneObject, ...], dataset: str) -> tuple[Move, ...]:
    count = 1 + draws.below(2)
    while True:
        moves: tuple[Move, ...] = ()
        for _ in range(8 * count):
            move = _draw_move(draws, objects, moves, dataset)
            if move is not None:
                moves += (move,)
            if len(moves) == count:
                return moves


def _draw_move(draws, objects, moves, dataset) -> Move | None:
    """One more action beside `moves`; None if no place for it was found."""
    taken = {m.subject for m in moves} | {m.object for m in moves}
    free = [number for number in range(len(objects)) if number not in taken]
    if not free:
        return None
    subject = free[draws.below(len(free))]
    targets = [number for number in free if number != subject and can_contain(objects[subject], objects[number])]
    kinds = [k for k in ABLE[objects[subject].shape] if k != "contain" or targets]
    kind = kinds[draws.below(len(kinds))]
    end = ENDS[0] + draws.below(ENDS[1] - ENDS[0] + 1)
    said = (_some(draws, objects[subject], dataset),)
    if kind == "contain":
        other = targets[draws.below(len(targets))]
        said += (_some(draws, objects[other], dataset),)
        move = Move(kind, subject, end, object=other, said=said)
        return None if collide(objects, (*moves, move)) else move
    said += ((),)
    if kind == "rotate":
        return Move(kind, subject, end, said=said)
    for _ in range(TRIES):
        x, y = (2 * draws.uniform() - 1) * TABLE, (2 * draws.uniform() - 1) * TABLE
        move = Move(kind, subject, end, x, y, said=said)
        if not collide(objects, (*moves, move)):
            return move
    return None


def _one(draws: Draws, words: Sequence[str]) -> str:
    return words[draws.below(len(words))]


def _some(draws: Draws, thing: SceneObject, dataset: str) -> tuple[str, ...]:
    """What an ambiguous v2 name says: 0 to 3 of size, color, material, in any order."""
    if dataset == "cater-gen-v1":
        return ()
    left = [thing.size, thing.color, thing.material]
    return tuple(left.pop(draws.below(len(left))) for _ in range(draws.below(4)))


# ----------------------------------------------------------------------------------------- captions


def clauses(spec: Spec, mode: str = "explicit") -> tuple[Action, ...]:
    """The caption of a sample as structure. Raises ValueError for another mode than explicit or ambiguous."""
    if mode not in MODES:
        raise ValueError(f"unknown captions {mode!r}: use one of {', '.join(MODES)}")
    said = []
    for move in spec.moves:
        place = None
        if move.x is not None:
            place = (cell(move.x), cell(move.y)) if mode == "explicit" else quadrant(move.x, move.y)
        subject = object_name(spec, move.subject, mode, move.said[0])
        other = None if move.object is None else object_name(spec, move.object, mode, move.said[1])
        said.append(Action(move.kind, subject, place, other))
    return tuple(said)


def caption(spec: Spec, mode: str = "explicit") -> str:
    """The sentences of a sample, e.g. `the cone is sliding to (1, -3). the snitch is rotating.`"""
    return captions.format_caption(clauses(spec, mode), spec.dataset)


def object_name(spec: Spec, number: int, mode: str, said: tuple[str, ...]) -> ObjectName:
    """How a caption of `mode` names an object of a scene: `said` are the words that an ambiguous one of v2 uses."""
    thing = spec.objects[number]
    if spec.dataset == "cater-gen-v1":
        return ObjectName(thing.shape)
    return ObjectName(thing.shape, said if mode == "ambiguous" else (thing.size, thing.color, thing.material))


def referents(
    objects: Sequence[SceneObject], actions: Sequence[Action]
) -> list[tuple[tuple[int, int | None], ...]]:
    """All that a caption can mean in a scene: for each reading, (subject, object or None) of each sentence.

    A reading gives every name an object that it fits, lets each act by CATER's rules, and uses none twice. An
    explicit caption of the scene has one reading; no reading means that the caption is not about this scene.
    """
    choices = []
    for action in actions:
        subjects = [k for k, thing in enumerate(objects)
                    if thing.fits(action.subject) and action.kind in ABLE[thing.shape]]
        if action.object is None:
            choices.append([(k, None) for k in subjects])
        else:
            choices.append([(k, other) for k in subjects for other, thing in enumerate(objects)
                            if thing.fits(action.object) and can_contain(objects[k], thing)])
    readings = []
    for reading in itertools.product(*choices):
        used = [number for pair in reading for number in pair if number is not None]
        if len(used) == len(set(used)):
            readings.append(reading)
    return readings


def with_caption(spec: Spec, sentence: str, *, seed: int = 0, ends: Sequence[int] | None = None,
                 tries: int = TRIES) -> Spec:
    """The same scene doing what a caption says, explicit or ambiguous.

    What the caption leaves open (which of several objects, where in a cell or a quadrant) is drawn by `seed`
    so that nothing collides; `ends` are the last frames of the actions, the sample's own (the first for both,
    where there are fewer) if left out. Where `tries` draws find no room, and the caption fits what the scene does
    already, it goes on doing that. Raises CaptionError for a sentence that does not parse and ValueError for one
    that names no object of the scene or has no room.
    """
    actions = captions.parse(sentence, spec.dataset)
    readings = referents(spec.objects, actions)
    if not readings:
        raise ValueError(f"{sentence!r} does not fit the scene, which has: "
                         f"{', '.join(thing.name for thing in spec.objects)}")
    seed, own_ends = operator.index(seed), ends is None
    if own_ends:
        ends = [spec.moves[min(k, len(spec.moves) - 1)].end for k in range(len(actions))]
    given = len(ends) if hasattr(ends, "__len__") else repr(ends)
    if given != len(actions):
        raise ValueError(f"{given} ends for {len(actions)} actions: give a list of one each")
    said = captions.format_caption(actions, spec.dataset)   # case and spacing draw nothing
    draws = Draws("caption", spec.dataset, spec.split, spec.index, spec.seed, seed, said)
    for _ in range(tries):
        reading = readings[draws.below(len(readings))]
        moves = tuple(_as_said(draws, action, pair, end) for action, pair, end in zip(actions, reading, ends))
        if not collide(spec.objects, moves):
            return replace(spec, moves=moves)
    for order in itertools.permutations(spec.moves):
        if tuple((move.subject, move.object) for move in order) in readings and all(map(_fits, order, actions)):
            moves = tuple(replace(move, said=_said(action), end=move.end if own_ends else end)
                          for move, action, end in zip(order, actions, ends))
            if not collide(spec.objects, moves):
                return replace(spec, moves=moves)
    raise ValueError(f"no room in this scene for {sentence!r}: after {tries} tries two objects still come closer "
                     f"than {CLEARANCE}; choose another place")


def _fits(move: Move, action: Action) -> bool:
    """Whether a move does what an action says, if it is about the same objects."""
    places = (None,) if move.x is None else ((cell(move.x), cell(move.y)), quadrant(move.x, move.y))
    return move.kind == action.kind and action.place in places


def _said(action: Action) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return action.subject.attributes, action.object.attributes if action.object else ()


def _as_said(draws: Draws, action: Action, pair: tuple[int, int | None], end: int) -> Move:
    subject, other = pair
    said = _said(action)
    if action.place is None:
        return Move(action.kind, subject, end, object=other, said=said)
    if isinstance(action.place, str):
        right, up = action.place in ("first", "fourth"), action.place in ("first", "second")
        x, y = ((TABLE * draws.inside()) * (1 if positive else -1) for positive in (right, up))
    else:
        x, y = (_inside_cell(draws, number) for number in action.place)
    return Move(action.kind, subject, end, x, y, said=said)


def _inside_cell(draws: Draws, number: int) -> float:
    return (number - 1 if number > 0 else number) + draws.inside()


def _check_dataset(name: str) -> None:
    if name not in _SIZES:
        raise ValueError(f"unknown dataset {name!r}: CATER-GEN has {', '.join(DATASETS)}")


def _check_key(dataset: str, split: str, index: int, seed: int) -> None:
    _check_dataset(dataset)
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: use 'train' or 'test'")
    for what, value in (("index", index), ("seed", seed)):
        if not isinstance(value, _WHOLE):
            raise ValueError(f"{what} {value!r} is no whole number: give one, e.g. 0")
    if index < 0:
        raise ValueError(f"index {index} of split {split!r} is negative: samples are numbered from 0 on")


# ------------------------------------------------------------------------------------------ dataset


@dataclass(frozen=True)
class CaterGen(captions.Spoken):
    """CATER-GEN-v1 or v2, with explicit or ambiguous captions, drawn at `image_size`.

    Raises ValueError for an unknown name or mode, or an image size that is no multiple of 8 from 16 to 1024.
    """

    name: str
    mode: str = "explicit"
    image_size: int = 128
    channels = 3
    interval = (3.0, 6.0)  # frames from one sampled frame to the next, at speed 0 and at speed 1 (paper 4.2)
    clip_length = 10
    video_length = longest = FRAMES
    endless = True

    def __post_init__(self):
        _check_dataset(self.name)
        if self.mode not in MODES:
            raise ValueError(f"unknown captions {self.mode!r}: use one of {', '.join(MODES)}")
        if not (isinstance(self.image_size, int) and 16 <= self.image_size <= 1024 and self.image_size % 8 == 0):
            raise ValueError(f"image size {self.image_size}: use a multiple of 8 from 16 to 1024, e.g. 128 or 256")

    @property
    def sizes(self) -> dict[str, int]:
        """The paper's number of videos in each split; `spec` goes on beyond it."""
        return dict(zip(("train", "test"), _SIZES[self.name]))

    @property
    def content(self) -> str:
        """What frames are made of: rules and renderer in their version, and the size."""
        return f"drawn by version {VERSION}{LARGER * (self.image_size > 128)} at {self.image_size}"

    @property
    def source(self) -> str:
        """The mode of the captions, for the name of a run."""
        return self.mode if self.image_size == 128 else f"{self.mode}-{self.image_size}"

    @property
    def about(self) -> dict:
        """What a card tells of the dataset; `clips.described` makes it again."""
        return {"dataset": self.name, "mode": self.mode, "image_size": self.image_size, "version": VERSION}

    def spec(self, split: str, index: int, seed: int = 0) -> Spec:
        """The sample at `index` of `split`; see `draw_spec`."""
        return draw_spec(self.name, split, index, seed)

    def caption(self, spec: Spec) -> str:
        """The sentences of a sample in this dataset's mode."""
        self._check(spec)
        return caption(spec, self.mode)

    def length(self, spec: Spec) -> int:
        """The frames of a sample's video: 31."""
        self._check(spec)
        return FRAMES

    def lengths(self, specs: Sequence[Spec]) -> np.ndarray:
        """The frames of several videos: int64 (b,), 31 each."""
        return np.array([self.length(spec) for spec in specs], np.int64)

    def video(self, spec: Spec) -> np.ndarray:
        """The whole video of a sample: uint8 (31, H, W, 3)."""
        return self.clips([spec], np.arange(FRAMES)[None])[0]

    def clips(self, specs: Sequence[Spec], indices: np.ndarray) -> np.ndarray:
        """The frames `indices` (b, T) of b samples, and no others: uint8 (b, T, H, W, 3), on all cores.

        A frame that comes more than once is drawn once. Raises ValueError for a spec of another dataset, for
        one in which objects collide (`check_room`), for indices of another shape, and for a frame that a video has
        not.
        """
        from mage_core.cater.render import render_scenes  # compiled code: only where pictures are drawn

        indices = np.asarray(indices)
        if indices.ndim != 2 or len(indices) != len(specs) or indices.dtype.kind not in "iu":
            raise ValueError(f"indices are {indices.dtype} of shape {indices.shape}: expected whole numbers, "
                             f"({len(specs)}, T), a row for each of the {len(specs)} samples")
        wrong = (indices < 0) | (indices >= FRAMES)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(f"sample {row} has no frame {indices[row, column]}: its video has frames 0 to "
                             f"{FRAMES - 1}")
        scenes, where = [], np.empty(indices.shape, np.int64)
        start = 0
        for row, spec in enumerate(specs):
            self._check(spec)
            check_room(spec)
            at, turned = tracks(spec)
            # frames in which nothing has moved since the one before are one picture
            frames, back = np.unique(first_alike(at, turned)[indices[row]], return_inverse=True)
            scenes.append((spec.objects, at[frames], turned[frames]))
            where[row] = start + back
            start += len(frames)
        pictures = render_scenes(scenes, self.image_size)
        return pictures[where]

    def with_caption(self, spec: Spec, sentence: str, *, seed: int = 0, ends: Sequence[int] | None = None,
                     tries: int = TRIES) -> Spec:
        """The same scene doing what a caption says; see `with_caption` of this module."""
        self._check(spec)
        return with_caption(spec, sentence, seed=seed, ends=ends, tries=tries)

    def _check(self, spec: Spec) -> None:
        if spec.dataset != self.name:
            raise ValueError(f"a spec of {spec.dataset} was given to {self.name}: draw it with the dataset that "
                             "made it")


def first_alike(at: np.ndarray, turned: np.ndarray) -> np.ndarray:
    """For each frame the first of the run of frames that are the same as it: (31,)."""
    same = (at[1:] == at[:-1]).all((1, 2)) & (turned[1:] == turned[:-1]).all((1, 2))
    first = np.arange(len(at))
    for frame in range(1, len(at)):
        if same[frame - 1]:
            first[frame] = first[frame - 1]
    return first
