"""One grammar for all captions: sentence <-> clauses <-> token ids (paper 4.1; the released vocabularies).

Parsing ignores case and spacing; formatting is exact. What does not parse ends in a `CaptionError` that shows
the word, where it stands and what could stand there.

    MNIST       the digit 7 is moving up then down and the digit 2 is moving right .
    CATER-GEN   the medium green rubber cone is picked up and placed to (1, -3). the snitch is rotating.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass

PAD, CLS, SEP = 0, 1, 2

DIRECTIONS = ("up", "left", "down", "right")
_OPPOSITE = {"up": "down", "left": "right", "down": "up", "right": "left"}
_BOUNCING = tuple(f"{there} then {_OPPOSITE[there]}" for there in DIRECTIONS)

SHAPES = ("cone", "snitch", "sphere", "cylinder", "cube")
SIZES = ("small", "medium", "large")
COLORS = ("gold", "gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
MATERIALS = ("metal", "rubber")
CELLS = (-3, -2, -1, 1, 2, 3)
QUADRANTS = ("first", "second", "third", "fourth")

_ATTRIBUTES = {"size": SIZES, "color": COLORS, "material": MATERIALS}
_SNITCH = ("small", "gold", "metal")        # the only look that a snitch has
_ROTATING = ("snitch", "cylinder", "cube")  # a turned cone or sphere looks the same
_CONTAINED = ("cone", "snitch", "sphere")
_VERBS = {"rotating": "rotate", "sliding": "slide", "placed": "pick-place", "containing": "contain"}

_MNIST_WORDS = ("0 1 2 3 4 5 6 7 8 9 the digit and is are bouncing moving here there around jumping up down "
                "left right then .")
_VOCABULARIES = {
    "single-mnist": _MNIST_WORDS,
    "double-mnist": _MNIST_WORDS,
    "modified-mnist": _MNIST_WORDS,
    "cater-gen-v1": "the cone snitch is sliding picked placed containing rotating and to up ( ) 1 2 3 -1 -2 "
                    "-3 , . first second third fourth quadrant",
    "cater-gen-v2": "the cone snitch is sliding picked placed containing and to up sphere cylinder cube "
                    "small medium large metal rubber gold gray red blue green brown purple cyan yellow ( ) 1 "
                    "2 3 -1 -2 -3 , . rotating while contained still first second third fourth quadrant",
}
_VOCABULARIES = {name: ("[PAD]", "[CLS]", "[SEP]", *words.split()) for name, words in _VOCABULARIES.items()}
_IDS = {name: {word: i for i, word in enumerate(words)} for name, words in _VOCABULARIES.items()}
DATASETS = tuple(_VOCABULARIES)

# CATER-GEN: as released. MNIST: the longest caption with [CLS] and [SEP].
_CONTEXT = {"single-mnist": 11, "double-mnist": 20, "modified-mnist": 20, "cater-gen-v1": 32,
            "cater-gen-v2": 38}

_EXAMPLES = {
    "single-mnist": "the digit 7 is moving up then down .",
    "double-mnist": "the digit 7 is moving up then down and the digit 2 is moving left then right .",
    "modified-mnist": "the digit 7 is moving up then down and the digit 2 is moving left .",
    "cater-gen-v1": "the cone is sliding to (1, -3). the snitch is rotating.",
    "cater-gen-v2": "the medium green rubber cone is picked up and containing the small gold metal snitch.",
}


class CaptionError(ValueError):
    """A caption that is not one of its dataset; `word` and its `number` (from 1) where a word is to blame."""

    def __init__(self, message: str, word: str | None = None, number: int | None = None):
        super().__init__(message)
        self.word, self.number = word, number


@dataclass(frozen=True)
class Movement:
    """A clause of a Moving MNIST caption: a digit 0 to 9 and one of `motions(dataset)`."""

    digit: int
    motion: str


@dataclass(frozen=True)
class ObjectName:
    """An object as a CATER-GEN caption names it: its shape, and what is said of size, color and material.

    `attributes` are in the sentence's order; explicit names of v2 say all three, names of v1 none.
    """

    shape: str
    attributes: tuple[str, ...] = ()

    @property
    def size(self) -> str | None:
        """`small`, `medium` or `large`; None where the name does not say."""
        return self._said("size")

    @property
    def color(self) -> str | None:
        """One of `COLORS`; None where the name does not say."""
        return self._said("color")

    @property
    def material(self) -> str | None:
        """`metal` or `rubber`; None where the name does not say."""
        return self._said("material")

    def _said(self, kind: str) -> str | None:
        return next((word for word in self.attributes if word in _ATTRIBUTES[kind]), None)

    def __str__(self) -> str:
        return " ".join((*self.attributes, self.shape))


@dataclass(frozen=True)
class Action:
    """A sentence of a CATER-GEN caption.

    `kind` is rotate, slide, pick-place or contain. `place` is where a slide or a pick-place ends: a cell
    (x, y) of the table, or `first` to `fourth` for a quadrant; `object` is what a contain ends on. Elsewhere
    they are None.
    """

    kind: str
    subject: ObjectName
    place: tuple[int, int] | str | None = None
    object: ObjectName | None = None


Clause = Movement | Action


def vocabulary(dataset: str) -> tuple[str, ...]:
    """The words of a dataset; a word's place is its token id. Raises ValueError for an unknown dataset."""
    return _VOCABULARIES[_known(dataset)]


def context_length(dataset: str) -> int:
    """The number of tokens the text encoder has places for, [CLS] and [SEP] included: no caption has more.

    Raises ValueError for an unknown dataset.
    """
    return _CONTEXT[_known(dataset)]


def motions(dataset: str) -> tuple[str, ...]:
    """The motions that a Moving MNIST caption can name; none for CATER-GEN, whose actions have places.

    Raises ValueError for an unknown dataset.
    """
    if _known(dataset) == "modified-mnist":
        return _BOUNCING + DIRECTIONS
    return _BOUNCING if _is_mnist(dataset) else ()


def parse(sentence: str, dataset: str) -> tuple[Clause, ...]:
    """The clauses of a caption: `Movement`s for Moving MNIST, `Action`s for CATER-GEN.

    Case and spacing are ignored. Raises CaptionError, with the word and its place, for a sentence that is not
    in the dataset's grammar or breaks its rules (one digit twice, a rotating cone), ValueError for an unknown
    dataset.
    """
    return _Parser(sentence, _known(dataset)).caption()


def format_caption(clauses: Iterable[Clause], dataset: str) -> str:
    """The caption of some clauses, exactly as the dataset writes it.

    `parse(format_caption(clauses, dataset), dataset)` gives the clauses back. Raises CaptionError for clauses
    that no caption of the dataset has, ValueError for an unknown dataset.
    """
    clauses = tuple(clauses)
    sentence = _joined(_words(clauses, _known(dataset)), dataset)
    parsed = parse(sentence, dataset)  # one set of rules, whichever way a caption comes
    if parsed != clauses:
        raise CaptionError(f"{clauses!r} are not the clauses of any {dataset} caption; the nearest caption, "
                           f"{sentence!r}, has {parsed!r}")
    return sentence


def encode(sentence: str, dataset: str) -> list[int]:
    """The token ids of a caption: [CLS], its words, [SEP]; unpadded. Raises as `parse`."""
    ids = _IDS[_known(dataset)]
    return [CLS, *(ids[word] for word in _words(parse(sentence, dataset), dataset)), SEP]


def decode(ids: Iterable[int], dataset: str) -> str:
    """The caption of token ids: [CLS], words, [SEP] and any padding.

    Raises CaptionError for an id outside the vocabulary, for ids not so framed and for words that are not a
    caption, ValueError for an unknown dataset.
    """
    words = vocabulary(dataset)
    ids = [operator.index(i) for i in ids]
    for place, i in enumerate(ids):
        if not 0 <= i < len(words):
            raise CaptionError(f"token id {i} at place {place} is outside the vocabulary of {dataset}: "
                               f"ids are 0 to {len(words) - 1}")
    while ids and ids[-1] == PAD:
        ids.pop()
    inner = ids[1:-1]
    if len(ids) < 2 or ids[0] != CLS or ids[-1] != SEP or min(inner, default=3) <= SEP:
        raise CaptionError(f"token ids {ids} are not [CLS] ({CLS}), words, [SEP] ({SEP}) and padding ({PAD})")
    return format_caption(parse(" ".join(words[i] for i in inner), dataset), dataset)


# ------------------------------------------------------------------------------------------------- writing


def _words(clauses: tuple[Clause, ...], dataset: str) -> list[str]:
    """The words of clauses, without a look at the rules: `parse` does that."""
    kind = Movement if _is_mnist(dataset) else Action
    for clause in clauses:
        if not isinstance(clause, kind):
            raise CaptionError(f"{clause!r} is no clause of {dataset}: its captions are of {kind.__name__}s")
    if kind is Action:
        return [word for clause in clauses for word in _action_words(clause)]
    words = []
    for clause in clauses:
        words += ["and"] if words else []
        words += ["the", "digit", str(clause.digit), "is", "moving", *str(clause.motion).split()]
    return [*words, "."]


def _action_words(action: Action) -> list[str]:
    start = ["the", *str(action.subject).split(), "is"]
    if action.kind == "rotate":
        return [*start, "rotating", "."]
    if action.kind == "slide":
        return [*start, "sliding", "to", *_place_words(action.place), "."]
    if action.kind == "pick-place":
        return [*start, "picked", "up", "and", "placed", "to", *_place_words(action.place), "."]
    if action.kind == "contain":
        return [*start, "picked", "up", "and", "containing", "the", *str(action.object).split(), "."]
    raise CaptionError(f"unknown kind of action {action.kind!r}: use one of {', '.join(_VERBS.values())}")


def _place_words(place: tuple[int, int] | str | None) -> list[str]:
    if isinstance(place, str):
        return ["the", place, "quadrant"]
    if isinstance(place, tuple) and len(place) == 2:
        return ["(", str(place[0]), ",", str(place[1]), ")"]
    raise CaptionError(f"{place!r} is no place: give a cell (x, y) or one of {', '.join(QUADRANTS)}")


def _joined(words: list[str], dataset: str) -> str:
    """MNIST captions have a blank around every word; CATER-GEN's are spaced as in a book."""
    sentence = " ".join(words)
    return sentence if _is_mnist(dataset) else re.sub(r" (?=[.,)])|(?<=\() ", "", sentence)


# ------------------------------------------------------------------------------------------------- reading


# A number with its minus (also the typographic ones), a word, or any other character.
_TOKEN = re.compile(r"[-\u2212\u2013]\s*\d+|\d+|[^\W\d_]+|\S")
_AS_TYPED = str.maketrans({"\u2212": "-", "\u2013": "-", " ": None})


class _Parser:
    """Recursive descent over the words of one sentence."""

    def __init__(self, sentence: str, dataset: str):
        if not isinstance(sentence, str):
            raise CaptionError(f"a caption is a sentence, not {sentence!r}; for {dataset}, write e.g. "
                               f"{_EXAMPLES[dataset]!r}")
        self.dataset = dataset
        self.sentence = re.sub(r"\s", " ", sentence)  # one line, so that a caret can stand below a word
        self.spans = [match.span() for match in _TOKEN.finditer(self.sentence)]
        self.words = [self.sentence[a:b].translate(_AS_TYPED).lower() for a, b in self.spans]
        self.at = 0

    def caption(self) -> tuple[Clause, ...]:
        return self.movements() if _is_mnist(self.dataset) else self.actions()

    # Moving MNIST

    def movements(self) -> tuple[Movement, ...]:
        first = self.movement(None)
        if self.dataset == "single-mnist":
            self.take(".")
            return self.whole((first,))
        self.take("and")
        second = self.movement(first.digit)
        self.take(".")
        return self.whole((first, second))

    def movement(self, taken: int | None) -> Movement:
        self.take("the")
        self.take("digit")
        digit = int(self.take(*"0123456789"))
        if digit == taken:
            self.fail(f"the two digits must differ, and the first is {taken}", back=1)
        self.take("is")
        self.take("moving")
        there = self.take(*DIRECTIONS)
        if self.dataset != "modified-mnist":
            self.take("then", note=f"in {self.dataset} every digit bounces")
        else:
            after = "and" if taken is None else "."
            if self.peek() == after:
                return Movement(digit, there)
            self.take("then", after)
        back = self.take(_OPPOSITE[there], note="a digit bounces straight back")
        return Movement(digit, f"{there} then {back}")

    # CATER-GEN

    def actions(self) -> tuple[Action, ...]:
        first = self.action(None)
        if self.at == len(self.words):
            return (first,)
        second = self.action(first)
        return self.whole((first, second))

    def action(self, earlier: Action | None) -> Action:
        self.take("the")
        subject = self.name()
        self.must_act_once(subject, earlier)
        self.take("is")
        if self.peek() == "picked":
            self.take("picked")
            self.take("up")
            self.take("and")
            verb = self.take("placed", "containing")
        else:
            verb = self.take("rotating", "sliding", "picked")
        place = other = None
        if verb == "rotating" and subject.shape not in _ROTATING:
            self.fail(f"a {subject.shape} does not rotate; a {', a '.join(_ROTATING)} does", back=1)
        if verb == "containing":
            other = self.contained(subject, earlier)
        elif verb != "rotating":
            self.take("to")
            place = self.place()
        self.take(".")
        return Action(_VERBS[verb], subject, place, other)

    def contained(self, subject: ObjectName, earlier: Action | None) -> ObjectName:
        if subject.shape != "cone":
            self.fail(f"a {subject.shape} cannot contain anything; only a cone can", back=1)
        self.take("the")
        other = self.name()
        if other.shape not in _CONTAINED or (self.dataset == "cater-gen-v1" and other.shape == "cone"):
            able = ("snitch",) if self.dataset == "cater-gen-v1" else _CONTAINED
            self.fail(f"a cone cannot contain a {other.shape}; it can contain a {', a '.join(able)}", back=1)
        # Where a size is not said, any size that fits will do. A snitch is a little larger than small objects
        # and smaller than medium ones, so "small" serves for it here.
        smallest = SIZES.index(other.size or "small")
        largest = SIZES.index(subject.size or "large")
        if largest <= smallest:
            self.fail(f"a cone must be strictly larger than what it contains, and no {subject} is "
                      f"larger than a {other}", back=1)
        if earlier is not None and self.same(earlier.subject, other):
            self.fail(f"the {other} is contained here, so it has no action of its own", back=1)
        if earlier is not None and self.same(earlier.object, other):
            self.fail(f"the {other} is contained in the first sentence already", back=1)
        return other

    def must_act_once(self, subject: ObjectName, earlier: Action | None) -> None:
        if earlier is not None and (self.same(earlier.subject, subject) or self.same(earlier.object, subject)):
            self.fail(f"the {subject} is in the first sentence already: two actions, two objects", back=1)

    def same(self, one: ObjectName | None, other: ObjectName) -> bool:
        """Whether both names must be of one object: in v2 the same words may be said of two, unless they say all."""
        if one is None or one.shape != other.shape:
            return False
        if self.dataset == "cater-gen-v1" or one.shape == "snitch":
            return True
        return set(one.attributes) == set(other.attributes) and len(one.attributes) == len(_ATTRIBUTES)

    def name(self) -> ObjectName:
        shapes = SHAPES[:2] if self.dataset == "cater-gen-v1" else SHAPES
        left = {} if self.dataset == "cater-gen-v1" else dict(_ATTRIBUTES)
        attributes = []
        while True:
            word = self.take(*(word for words in left.values() for word in words), *shapes)
            if word not in shapes:
                attributes.append(word)
                left = {kind: words for kind, words in left.items() if word not in words}
                continue
            if word == "snitch" and not set(attributes) <= set(_SNITCH):
                self.fail(f"a snitch is always {' '.join(_SNITCH)}, and here {' '.join(attributes)}", back=1)
            if word != "snitch" and "gold" in attributes:
                self.fail(f"only a snitch is gold, a {word} is not", back=1)
            return ObjectName(word, tuple(attributes))

    def place(self) -> tuple[int, int] | str:
        if self.take("(", "the") == "the":
            quadrant = self.take(*QUADRANTS)
            self.take("quadrant")
            return quadrant
        cells = tuple(map(str, CELLS))
        x = int(self.take(*cells))
        self.take(",")
        y = int(self.take(*cells))
        self.take(")")
        return x, y

    # Words and errors

    def peek(self) -> str | None:
        return self.words[self.at] if self.at < len(self.words) else None

    def take(self, *expected: str, note: str = "") -> str:
        """The next word, which must be one of `expected`."""
        word = self.peek()
        if word not in expected:
            wanted = " or ".join(filter(None, (", ".join(map(repr, expected[:-1])), repr(expected[-1]))))
            self.fail(f"expected {wanted}{f' ({note})' if note else ''}", expected)
        self.at += 1
        return word

    def whole(self, clauses: tuple[Clause, ...]) -> tuple[Clause, ...]:
        if self.at < len(self.words):
            self.fail(f"the caption should end before it: {self.dataset} has "
                      f"{'one clause' if self.dataset == 'single-mnist' else 'at most two clauses'}")
        return clauses

    def fail(self, reason: str, expected: tuple[str, ...] = (), back: int = 0) -> None:
        """Raise a CaptionError about the next word, or about the one `back` words before it."""
        at = self.at - back
        ended = at >= len(self.words)
        begin, end = (len(self.sentence.rstrip()),) * 2 if ended else self.spans[at]
        word = None if ended else self.sentence[begin:end]
        what = f"it ends before word {at + 1}" if ended else f"word {at + 1} is {word[:40]!r}"
        lines = [f"not a caption of {self.dataset}: {what}; {reason}",
                 *self.shown(begin, max(end, begin + 1))]
        if not ended and self.words[at] not in _IDS[self.dataset]:
            nearest = _nearest(self.words[at], expected, self.dataset)
            lines.append(f"nearest known words: {', '.join(nearest)}")
        lines.append(f"a caption reads: {_EXAMPLES[self.dataset]}")
        raise CaptionError("\n".join(lines), word, at + 1)

    def shown(self, begin: int, end: int) -> tuple[str, str]:
        """The sentence around a word and a line of carets below it."""
        end = min(end, begin + 40)
        first, last = 0, len(self.sentence)
        if last > 200:  # all captions are shorter
            first, last = max(0, begin - 100), min(last, end + 60)
        before, after = "..." if first else "", "..." if last < len(self.sentence) else ""
        carets = " " * (len(before) + begin - first) + "^" * (end - begin)
        return f"  {before}{self.sentence[first:last]}{after}", f"  {carets}"


def _nearest(word: str, expected: tuple[str, ...], dataset: str) -> list[str]:
    """Up to three words of the dataset that look like `word`, those expected here first; never none."""
    known = vocabulary(dataset)[3:]
    word = word[:40]  # a long run of letters is no word, and would take long to compare
    fitting = difflib.get_close_matches(word, expected, 3, 0.6)
    fitting += [other for other in difflib.get_close_matches(word, known, 3, 0.6) if other not in fitting]
    return (fitting or list(expected[:3]) or difflib.get_close_matches(word, known, 3, 0.0))[:3]


def _is_mnist(dataset: str) -> bool:
    return dataset.endswith("-mnist")


def _known(dataset: str) -> str:
    if dataset not in _VOCABULARIES:
        raise ValueError(f"unknown dataset {dataset!r}: captions are known for {', '.join(DATASETS)}")
    return dataset


class Spoken:
    """The captions' side of a dataset of this grammar, which has a `name`."""

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """The words of the captions; a word's place is its token id."""
        return vocabulary(self.name)

    @property
    def context_length(self) -> int:
        """The most tokens of a caption, [CLS] and [SEP] included."""
        return context_length(self.name)

    def encode(self, sentence: str) -> list[int]:
        """Token ids of a sentence; CaptionError for one that does not parse."""
        return encode(sentence, self.name)

    def tidy(self, sentence: str) -> str:
        """A sentence as the dataset's captions are written; CaptionError for one that does not parse."""
        return format_caption(parse(sentence, self.name), self.name)
