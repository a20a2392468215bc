"""The grammar: what is written is read back, what the paper prints is read, and errors point at the word."""

import os
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mage_core import captions
from mage_core.captions import (
    CELLS, COLORS, DATASETS, DIRECTIONS, MATERIALS, QUADRANTS, SIZES, Action, CaptionError, Movement,
    ObjectName, context_length, decode, encode, format_caption, motions, parse, vocabulary,
)

MNIST = ("single-mnist", "double-mnist", "modified-mnist")
CATER = ("cater-gen-v1", "cater-gen-v2")
REFERENCE = Path(os.environ.get("MAGE_REFERENCE_DIR", Path(__file__).resolve().parents[2] / "shared"))


# -------------------------------------------------------------------------------------- strategies


def movements(dataset):
    motion = st.sampled_from(motions(dataset))
    digits = st.permutations(range(10))
    if dataset == "single-mnist":
        return st.builds(lambda order, a: (Movement(order[0], a),), digits, motion)
    return st.builds(lambda order, a, b: (Movement(order[0], a), Movement(order[1], b)),
                     digits, motion, motion)


@st.composite
def names(draw, shapes):
    """A name of v2: any of the attributes before the shape, in any order."""
    shape = draw(st.sampled_from(shapes))
    colors = ("gold",) if shape == "snitch" else COLORS[1:]
    sizes, materials = (("small",), ("metal",)) if shape == "snitch" else (SIZES, MATERIALS)
    said = [draw(st.sampled_from(words)) for words in (sizes, colors, materials)]
    return ObjectName(shape, tuple(draw(st.permutations(said))[:draw(st.integers(0, 3))]))


PLACES = st.one_of(st.tuples(st.sampled_from(CELLS), st.sampled_from(CELLS)), st.sampled_from(QUADRANTS))


@st.composite
def actions_v2(draw):
    kind = draw(st.sampled_from(("rotate", "slide", "pick-place", "contain")))
    if kind == "rotate":
        return Action(kind, draw(names(("cube", "cylinder", "snitch"))))
    if kind != "contain":
        return Action(kind, draw(names(captions.SHAPES)), place=draw(PLACES))
    outer = draw(names(("cone",)).filter(lambda name: name.size != "small"))
    smaller = SIZES[:SIZES.index(outer.size or "large")]
    inner = draw(names(("cone", "sphere", "snitch")).filter(lambda name: (name.size or "small") in smaller))
    return Action(kind, outer, object=inner)


CONE, SNITCH = ObjectName("cone"), ObjectName("snitch")


@st.composite
def captions_v1(draw):
    cone = draw(st.builds(Action, st.sampled_from(("slide", "pick-place")), st.just(CONE), PLACES))
    snitch = draw(st.one_of(
        st.just(Action("rotate", SNITCH)),
        st.builds(Action, st.sampled_from(("slide", "pick-place")), st.just(SNITCH), PLACES)))
    contain = (Action("contain", CONE, object=SNITCH),)
    return draw(st.sampled_from(((cone,), (snitch,), (cone, snitch), (snitch, cone), contain)))


def clauses(dataset):
    if dataset in MNIST:
        return movements(dataset)
    if dataset == "cater-gen-v1":
        return captions_v1()
    return st.lists(actions_v2(), min_size=1, max_size=2).map(tuple).filter(acts_once)


def acts_once(actions):
    """Whether nothing that a name leaves no doubt of has a part in both actions of v2."""
    def alone(name):
        return name.shape if name.shape == "snitch" else frozenset((name.shape, *name.attributes))

    parts = [alone(name) for action in actions for name in (action.subject, action.object)
             if name is not None and (name.shape == "snitch" or len(name.attributes) == 3)]
    return len(set(parts)) == len(parts)


any_caption = st.sampled_from(DATASETS).flatmap(
    lambda dataset: st.tuples(st.just(dataset), clauses(dataset)))


# -------------------------------------------------------------------------------------- there and back


@settings(deadline=None)  # no test hangs on a wall time
@given(any_caption)
def test_what_is_written_is_read_back(case):
    dataset, structure = case
    sentence = format_caption(structure, dataset)
    assert parse(sentence, dataset) == structure
    ids = encode(sentence, dataset)
    assert decode(ids, dataset) == sentence
    assert decode(ids + [0, 0, 0], dataset) == sentence
    assert ids[0] == 1 and ids[-1] == 2 and all(3 <= i < len(vocabulary(dataset)) for i in ids[1:-1])
    assert len(ids) <= context_length(dataset)


@settings(deadline=None)
@given(any_caption, st.randoms(use_true_random=False))
def test_case_and_spacing_do_not_matter(case, random):
    dataset, structure = case
    sentence = format_caption(structure, dataset)
    mangled = re.sub(r" ", lambda _: random.choice([" ", "   ", "\n", "\t\u00a0"]), sentence)
    spaced = [" {} ", " {}", "{} ", "{}"]
    mangled = re.sub(r" ?([.,()]) ?", lambda mark: random.choice(spaced).format(mark[1]), mangled)
    mangled = "".join(random.choice([letter.lower(), letter.upper()]) for letter in mangled)
    mangled = mangled.replace("-", random.choice(["-", "\u2212", "\u2013", "- "]))
    assert parse(f"  {mangled} ", dataset) == structure
    assert encode(mangled, dataset) == encode(sentence, dataset)


@settings(deadline=None)
@given(any_caption, st.data())
def test_a_misspelt_word_is_found(case, data):
    dataset, structure = case
    tokens = [vocabulary(dataset)[i] for i in encode(format_caption(structure, dataset), dataset)[1:-1]]
    at = data.draw(st.integers(0, len(tokens) - 1))
    longer = f"{tokens[at]}q" if tokens[at].isalpha() else "q"
    wrong = data.draw(st.sampled_from([longer, "zzz", "7000", "#"]))
    sentence = " ".join([*tokens[:at], wrong, *tokens[at + 1:]])
    with pytest.raises(CaptionError) as error:
        parse(sentence, dataset)
    assert (error.value.word, error.value.number) == (wrong, at + 1)
    shown, carets = str(error.value).split("\n")[1:3]
    assert [letter for letter, caret in zip(shown, carets) if caret == "^"] == list(wrong)
    nearest = re.search(r"nearest known words: (.*)", str(error.value))[1].split(", ")
    if wrong == longer and len(tokens[at]) > 3:
        assert nearest[0] == tokens[at]


@settings(deadline=None)
@given(any_caption, st.data())
def test_a_missing_word_is_no_caption_or_another_one(case, data):
    dataset, structure = case
    tokens = [vocabulary(dataset)[i] for i in encode(format_caption(structure, dataset), dataset)[1:-1]]
    at = data.draw(st.integers(0, len(tokens) - 1))
    shorter = " ".join(tokens[:at] + tokens[at + 1:])
    try:
        other = parse(shorter, dataset)  # an attribute, for example, can be left away
    except CaptionError as error:
        assert 1 <= error.number <= len(tokens) + 1
    else:
        assert other != structure and encode(format_caption(other, dataset), dataset)[1:-1] != tokens


@settings(deadline=None)
@given(st.text(), st.sampled_from(DATASETS))
@example("the digit \u0664 is moving up then down .", "single-mnist")
@example("\u0130 the digit", "single-mnist")
def test_any_text_ends_in_a_caption_error(text, dataset):
    with pytest.raises(CaptionError):
        parse(text, dataset)


@settings(deadline=None)
@given(st.lists(st.integers(-2, 60), max_size=40), st.sampled_from(DATASETS))
def test_any_ids_end_in_a_caption_or_a_caption_error(ids, dataset):
    try:
        sentence = decode(ids, dataset)
    except CaptionError:
        return
    assert encode(sentence, dataset) == [i for i in ids if i]


# -------------------------------------------------------------------------------------- the released words


def test_vocabularies_are_the_released_ones():
    """Ids as in the released code: reference_implementation.md, `Text`."""
    mnist = ("0 1 2 3 4 5 6 7 8 9 the digit and is are bouncing moving here there around jumping "
             "up down left right then .")
    for dataset in MNIST:
        assert vocabulary(dataset) == ("[PAD]", "[CLS]", "[SEP]", *mnist.split())
        assert len(vocabulary(dataset)) == 30
        assert [vocabulary(dataset).index(str(digit)) for digit in range(10)] == list(range(3, 13))
    v1, v2 = (vocabulary(dataset) for dataset in CATER)
    assert (len(v1), len(v2)) == (30, 50)
    assert len(set(v1)) == 30 and len(set(v2)) == 50
    some = {"the": 3, "cone": 4, "rotating": 11, "(": 15, "1": 17, "-3": 22, ",": 23, ".": 24, "quadrant": 29}
    assert {word: v1.index(word) for word in some} == some
    some = {"the": 3, "up": 13, "sphere": 14, "small": 17, "gold": 22, "yellow": 30, "(": 31, "-1": 36,
            ".": 40, "rotating": 41, "while": 42, "contained": 43, "still": 44, "first": 45, "quadrant": 49}
    assert {word: v2.index(word) for word in some} == some


def test_one_caption_in_ids():
    ids = [1, 13, 14, 10, 16, 19, 24, 28, 25, 29, 2]
    assert encode("the digit 7 is moving up then down .", "single-mnist") == ids
    ids = [1, 3, 4, 6, 7, 13, 15, 17, 23, 22, 16, 24, 2]
    assert encode("the cone is sliding to (1, -3).", "cater-gen-v1") == ids


def test_captions_are_spaced_exactly():
    cases = {
        "single-mnist": "the digit 7 is moving up then down .",
        "modified-mnist": "the digit 7 is moving up and the digit 2 is moving left then right .",
        "cater-gen-v1":
            "the cone is picked up and placed to (-1, -1). the snitch is sliding to the third quadrant.",
        "cater-gen-v2":
            "the medium green rubber cone is picked up and containing the small gold metal snitch.",
    }
    for dataset, sentence in cases.items():
        assert format_caption(parse(sentence, dataset), dataset) == sentence


def test_context_lengths():
    assert (context_length("cater-gen-v1"), context_length("cater-gen-v2")) == (32, 38)  # released
    longest = Movement(7, "up then down"), Movement(2, "left then right")
    for dataset, structure in zip(MNIST, (longest[:1], longest, longest)):
        assert len(encode(format_caption(structure, dataset), dataset)) == context_length(dataset)


def test_motions():
    assert [len(motions(dataset)) for dataset in MNIST] == [4, 4, 8]
    assert set(motions("modified-mnist")) - set(motions("single-mnist")) == set(DIRECTIONS)
    assert motions("cater-gen-v1") == ()


def test_every_caption_that_the_paper_prints_is_read():
    paper = REFERENCE / "paper" / "make_it_move.txt"
    if not paper.exists():
        pytest.skip(f"the paper's text is not in {REFERENCE} ($MAGE_REFERENCE_DIR)")
    text = paper.read_text()
    found = re.findall(r"The digit \d is moving [a-z ]*and the digit \d is moving [a-z ]*\.", text)
    for sentence in found:
        assert format_caption(parse(sentence, "modified-mnist"), "modified-mnist") == \
            sentence.lower().replace(".", " .")
    assert len(found) >= 3
    shapes, verbs = "cone|snitch|cube|cylinder|sphere", "rotating|sliding|picked"
    found = re.findall(rf"The [a-z ]*(?:{shapes}) is (?:{verbs})[^.\n]*\.", text)
    for sentence in found:
        words = set(re.findall(r"[a-z]+", sentence.lower()))
        dataset = "cater-gen-v1" if words <= set(vocabulary("cater-gen-v1")) else "cater-gen-v2"
        assert format_caption(parse(sentence, dataset), dataset) == sentence.lower()
    assert len(found) >= 15


def test_a_name_says_what_it_says():
    action, = parse("the rubber medium cone is sliding to the first quadrant.", "cater-gen-v2")
    assert action == Action("slide", ObjectName("cone", ("rubber", "medium")), "first")
    assert (action.subject.size, action.subject.color, action.subject.material) == ("medium", None, "rubber")
    assert str(action.subject) == "rubber medium cone"


# -------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("dataset, sentence, number, says", [
    ("single-mnist", "the digit 7 is movng up then down .", 5, "nearest known words: moving"),
    ("single-mnist", "the digit 7 is moving up .", 7, "every digit bounces"),
    ("double-mnist", "the digit 7 is moving up and the digit 2 is ...", 7, "every digit bounces"),
    ("single-mnist", "the digit 7 is moving up then left .", 8, "expected 'down'"),
    ("single-mnist", "the digit 7 is moving up then down", 9, "ends before word 9"),
    ("single-mnist", "", 1, "ends before word 1"),
    ("single-mnist", "the digit seven is moving up then down .", 3, "'8' or '9'"),
    ("single-mnist", "the digit 7 is moving up then down and the digit 2 is ...", 9, "expected '.'"),
    ("single-mnist", "the digit 7 is moving up then down . .", 10, "one clause"),
    ("double-mnist", "the digit 7 is moving up then down .", 9, "expected 'and'"),
    ("double-mnist", "the digit 7 is moving up then down and the digit 7 is ...", 12, "differ"),
    ("modified-mnist", "the digit 7 is moving up .", 7, "'then' or 'and'"),
    ("modified-mnist", "the digit 7 is moving up and the digit 7 is moving down .", 10, "first is 7"),
    ("cater-gen-v1", "the cone is rotating.", 4, "a cone does not rotate"),
    ("cater-gen-v1", "the snitch is sliding to (0, 3).", 7, "'-3', '-2', '-1', '1', '2' or '3'"),
    ("cater-gen-v1", "the snitch is sliding to (4, 3).", 7, "expected"),
    ("cater-gen-v1", "the red cone is sliding to (1, 3).", 2, "'cone' or 'snitch'"),
    ("cater-gen-v1", "the snitch is rotating. the snitch is sliding to (1, 2).", 7, "two objects"),
    ("cater-gen-v1", "the cone is picked up and containing the snitch. the snitch is", 12, "two objects"),
    ("cater-gen-v1", "the snitch is rotating. the cone is picked up and containing the snitch.", 14, "no a"),
    ("cater-gen-v1", "the cone is picked up and containing the cone.", 9, "cannot contain a cone"),
    ("cater-gen-v2", "the snitch is picked up and containing the cone.", 7, "only a cone"),
    ("cater-gen-v2", "the cone is picked up and containing the cube.", 9, "cannot contain a cube"),
    ("cater-gen-v2", "the medium cone is picked up and containing the medium cone.", 11, "strictly larger"),
    ("cater-gen-v2", "the small cone is picked up and containing the snitch.", 10, "strictly larger"),
    ("cater-gen-v2", "the cone is picked up and containing the large sphere.", 10, "strictly larger"),
    ("cater-gen-v2", "the red blue cone is sliding to (1, 1).", 3, "expected 'small'"),
    ("cater-gen-v2", "the large snitch is rotating.", 3, "always small gold metal"),
    ("cater-gen-v2", "the gold cube is rotating.", 3, "only a snitch is gold"),
    ("cater-gen-v2", "the cube is rotating. the cube is rotating. the cube is rotating.", 11, "at most two"),
    ("cater-gen-v2", "the snitch is rotating. the small gold metal snitch is sliding to (1, 1).", 10, "two objects"),
    ("cater-gen-v2", "the cone is picked up and containing the snitch. the snitch is rotating.", 12, "two objects"),
    ("cater-gen-v2", "the snitch is rotating. the cone is picked up and containing the snitch.", 14, "no action"),
    ("cater-gen-v2",
     "the cone is picked up and containing the snitch. the cone is picked up and containing the snitch.", 19,
     "contained in the first"),
    ("cater-gen-v2", "the red large metal cube is rotating. the large red metal cube is sliding to (1, 1).", 13,
     "two objects"),
    ("cater-gen-v2", "the cone is sliding to the fifth quadrant.", 7, "nearest known words: first"),
])
def test_broken_rules_point_at_the_word(dataset, sentence, number, says):
    with pytest.raises(CaptionError, match=re.escape(says)) as error:
        parse(sentence, dataset)
    assert error.value.number == number
    with pytest.raises(CaptionError):
        encode(sentence, dataset)


@pytest.mark.parametrize("dataset, structure", [
    ("single-mnist", ()),
    ("cater-gen-v2", ()),
    ("single-mnist", (Movement(10, "up then down"),)),
    ("single-mnist", (Movement("7", "up then down"),)),
    ("single-mnist", (Movement(7, "up  then down"),)),
    ("single-mnist", (Movement(7, "up"),)),
    ("double-mnist", (Movement(7, "up then down"),)),
    ("double-mnist", (Movement(7, "up then down"), Movement(7, "up then down"))),
    ("single-mnist", (Action("rotate", SNITCH),)),
    ("cater-gen-v1", (Movement(7, "up"),)),
    ("cater-gen-v1", (Action("jump", SNITCH),)),
    ("cater-gen-v1", (Action("slide", SNITCH),)),
    ("cater-gen-v1", (Action("slide", SNITCH, (0, 1)),)),
    ("cater-gen-v1", (Action("slide", SNITCH, "fifth"),)),
    ("cater-gen-v1", (Action("rotate", SNITCH, (1, 1)),)),
    ("cater-gen-v1", (Action("contain", CONE),)),
    ("cater-gen-v2", (Action("rotate", ObjectName("cube", ("red", "blue"))),)),
    ("cater-gen-v2", (Action("rotate", ObjectName("cube", ("red metal",))),)),
])
def test_clauses_that_no_caption_has_are_refused(dataset, structure):
    with pytest.raises(CaptionError):
        format_caption(structure, dataset)


@pytest.mark.parametrize("ids", [
    [], [1], [1, 2], [2, 1], [13, 14, 10], [1, 13, 14, 10, 16, 19, 24, 28, 25, 29], [0, 1, 2],
    [1, 13, 14, 10, 16, 19, 24, 28, 0, 25, 29, 2], [1, 13, 99, 2], [1, -1, 2],
])
def test_ids_that_are_no_caption_are_refused(ids):
    with pytest.raises(CaptionError):
        decode(ids, "single-mnist")


def test_unknown_datasets_are_refused_with_those_known():
    for call in (vocabulary, context_length, motions, lambda dataset: parse("a", dataset),
                 lambda dataset: encode("a", dataset), lambda dataset: decode([1, 2], dataset),
                 lambda dataset: format_caption((), dataset)):
        with pytest.raises(ValueError, match="unknown dataset 'mnist': .*single-mnist"):
            call("mnist")
    with pytest.raises(CaptionError, match="not 3"):
        parse(3, "single-mnist")


def test_a_long_sentence_is_shown_in_part():
    with pytest.raises(CaptionError) as error:
        parse("the digit " + "x" * 100_000, "single-mnist")
    assert len(str(error.value)) < 1000


def test_two_things_of_one_look_may_act_where_the_words_leave_it_open():
    for sentence in ("the cube is rotating. the cube is sliding to (1, 1).",
                     "the red cube is rotating. the red cube is rotating.",
                     "the cone is picked up and containing the sphere. the sphere is sliding to (1, 1)."):
        assert len(parse(sentence, "cater-gen-v2")) == 2
