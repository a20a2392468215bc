"""CATER-GEN scenes, actions and captions: the rules of the generator, in every frame; and pictures of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mage_core import captions
from mage_core.cater import CaterGen, Move, SceneObject, referents, scene

NAMES = st.sampled_from(["cater-gen-v1", "cater-gen-v2"])
SPECS = st.builds(scene.draw_spec, NAMES, st.sampled_from(["train", "test"]), st.integers(0, 10**6),
                  st.integers(0, 2**40))
RADIUS = {"small": 0.25, "medium": 0.5, "large": 0.75}


def radius(thing):
    return 0.3 if thing.shape == "snitch" else RADIUS[thing.size]


def contained_pairs(spec):
    return {frozenset((move.subject, move.object)) for move in spec.moves if move.kind == "contain"}


# ------------------------------------------------------------------------------------------- rules


@given(SPECS)
def test_no_two_objects_come_close(spec):
    at, _ = scene.tracks(spec)
    for a, one in enumerate(spec.objects):
        for b in range(a):
            if {a, b} not in contained_pairs(spec):
                apart = np.linalg.norm(at[:, a] - at[:, b], axis=1)
                assert apart.min() >= radius(one) + radius(spec.objects[b]) + 0.25 - 1e-9


@given(SPECS)
def test_after_a_contain_both_share_a_place(spec):
    at, _ = scene.tracks(spec)
    for move in spec.moves:
        if move.kind == "contain":
            cone, other = spec.objects[move.subject], spec.objects[move.object]
            assert cone.shape == "cone" and radius(cone) > radius(other)
            assert other.shape in ("cone", "sphere", "snitch")
            assert (at[move.end:, move.subject, :2] == at[move.end:, move.object, :2]).all()
            assert (at[:, move.object] == at[0, move.object]).all()  # it does not act itself


@given(SPECS)
def test_first_frame_never_depends_on_the_actions(spec):
    at, turned = scene.tracks(spec)
    assert at[0].tolist() == [[thing.x, thing.y, radius(thing)] for thing in spec.objects]
    assert turned[0].tolist() == [[0, 0, thing.yaw] for thing in spec.objects]
    other = next(k for k, thing in enumerate(spec.objects) if thing.shape == "snitch")
    turning = replace(spec, moves=(Move("rotate", other, 20),))
    assert (scene.tracks(turning)[0][0] == at[0]).all() and (scene.tracks(turning)[1][0] == turned[0]).all()


@given(SPECS)
def test_everything_stays_on_the_table_and_stops(spec):
    at, turned = scene.tracks(spec)
    assert at.shape == turned.shape == (31, len(spec.objects), 3)
    assert (abs(at[..., :2]) <= 3 + 1e-9).all()
    assert (at[..., 2] <= [2 + radius(thing) + 1e-9 for thing in spec.objects]).all()
    last = max(move.end for move in spec.moves)
    assert 20 <= last <= 30
    assert (at[last:] == at[last]).all() and (turned[last:] == turned[last]).all()
    moved = {k for k in range(len(spec.objects))
             if np.ptp(at[:, k], axis=0).any() or np.ptp(turned[:, k], axis=0).any()}
    assert moved == {move.subject for move in spec.moves}
    assert (at[-1, :, 2] == at[0, :, 2]).all()


@given(SPECS)
def test_scene_as_the_paper_says(spec):
    shapes = [thing.shape for thing in spec.objects]
    assert shapes.count("snitch") == 1 and 1 <= len(spec.moves) <= 2
    assert len({thing.name for thing in spec.objects}) == len(spec.objects)
    if spec.dataset == "cater-gen-v1":
        assert sorted(thing.name for thing in spec.objects) == ["medium gold metal cone", "small gold metal snitch"]
    else:
        assert 3 <= len(spec.objects) <= 8
        assert {"medium", "large"} <= {thing.size for thing in spec.objects if thing.shape == "cone"}
    sideways, away = np.array([0.65718, 0.75374]), np.array([-0.75374, 0.65718])
    for a, one in enumerate(spec.objects):
        for other in spec.objects[:a]:
            gap = np.array([one.x - other.x, one.y - other.y])
            assert min(abs(gap @ sideways), abs(gap @ away)) >= 0.4 - 1e-9


@given(SPECS)
def test_same_key_same_sample(spec):
    again = scene.draw_spec(spec.dataset, spec.split, spec.index, spec.seed)
    assert again == spec
    assert scene.draw_spec(spec.dataset, spec.split, spec.index + 1, spec.seed).objects != spec.objects


def test_samples_stay_what_they_are():
    """Whatever changes in the code, sample 0 of seed 0 is this one, on every machine."""
    spec = CaterGen("cater-gen-v2").spec("train", 0)
    assert scene.caption(spec) == (
        "the medium purple rubber cone is sliding to (-3, -2). the large red rubber cone is picked up and "
        "containing the medium gray metal sphere.")
    assert scene.caption(CaterGen("cater-gen-v1").spec("train", 0)) == (
        "the snitch is rotating. the cone is sliding to (-3, 2).")


def test_kinds_and_numbers_of_actions_all_occur():
    for name in scene.DATASETS:
        specs = [scene.draw_spec(name, "train", index) for index in range(300)]
        assert {move.kind for spec in specs for move in spec.moves} == set(scene.KINDS)
        assert 0.4 < np.mean([len(spec.moves) == 2 for spec in specs]) < 0.6
        assert {move.end for spec in specs for move in spec.moves} == set(range(20, 31))


# --------------------------------------------------------------------------------- timing of actions


def lone(move, *others):
    snitch = SceneObject("snitch", "small", "gold", "metal", -2.0, -2.0)
    cone = SceneObject("cone", "large", "red", "rubber", 1.0, 1.0, 0.5)
    return scene.tracks(scene.Spec("cater-gen-v2", "train", 0, 0, (snitch, cone, *others), (move,), 0.5))


def test_pick_place_keeps_cater_s_times():
    at, turned = lone(Move("pick-place", 1, 20, 2.0, -1.5))  # n = 21: up to 4, across 5 to 16, down 17 to 20
    height = at[:, 1, 2]
    np.testing.assert_allclose(height[:6], [0.75, 1.25, 1.75, 2.25, 2.75, 2.75])
    np.testing.assert_allclose(height[15:22], [2.75, 2.75, 2.75, 2.75 - 2 / 3, 2.75 - 4 / 3, 0.75, 0.75])
    assert (at[:6, 1, :2] == [1, 1]).all() and (at[16:, 1, :2] == [2, -1.5]).all()
    np.testing.assert_allclose(at[6, 1, :2], [1 + 1 / 11, 1 - 2.5 / 11])
    assert (turned[:, 1] == [0, 0, 0.5]).all()


def test_rotate_turns_about_its_own_y_and_slide_is_linear():
    at, turned = lone(Move("rotate", 0, 30))
    np.testing.assert_allclose(turned[:, 0, 1], np.linspace(0, math.pi / 2, 31))
    assert (at == at[0]).all()
    at, _ = lone(Move("slide", 1, 25, -1.0, 2.0))
    np.testing.assert_allclose(at[:26, 1], np.linspace([1, 1, 0.75], [-1, 2, 0.75], 26))


# ----------------------------------------------------------------------------------------- captions


@given(SPECS)
def test_captions_parse_back(spec):
    for mode in scene.MODES:
        said = scene.clauses(spec, mode)
        assert captions.parse(captions.format_caption(said, spec.dataset), spec.dataset) == said
        assert CaterGen(spec.dataset, mode).caption(spec) == captions.format_caption(said, spec.dataset)
        assert len(captions.encode(scene.caption(spec, mode), spec.dataset)) <= captions.context_length(spec.dataset)


@given(SPECS)
def test_explicit_captions_name_one_object_and_one_cell(spec):
    said = scene.clauses(spec)
    own = tuple((move.subject, move.object) for move in spec.moves)
    assert referents(spec.objects, said) == [own]
    at, _ = scene.tracks(spec)
    for action, move in zip(said, spec.moves):
        if action.place is not None:
            for number, value in zip(action.place, at[-1, move.subject]):
                low, high = (number - 1, number) if number > 0 else (number, number + 1)
                assert low <= value <= high


@given(SPECS)
def test_ambiguous_captions_fit_their_own_objects(spec):
    said = scene.clauses(spec, "ambiguous")
    assert tuple((move.subject, move.object) for move in spec.moves) in referents(spec.objects, said)
    for reading in referents(spec.objects, said):
        for action, (subject, other) in zip(said, reading):
            assert spec.objects[subject].fits(action.subject)
            assert (other is None) == (action.object is None)
            assert other is None or radius(spec.objects[subject]) > radius(spec.objects[other])


def test_all_referents_of_an_ambiguous_name():
    spec = CaterGen("cater-gen-v2").spec("train", 0)
    cones = [k for k, thing in enumerate(spec.objects) if thing.shape == "cone"]
    sentence = captions.parse("the cone is sliding to the first quadrant.", "cater-gen-v2")
    assert [reading[0][0] for reading in referents(spec.objects, sentence)] == cones
    both = captions.parse("the cone is sliding to the first quadrant. the cone is sliding to the third quadrant.",
                          "cater-gen-v2")
    assert len(referents(spec.objects, both)) == len(cones) * (len(cones) - 1)


@pytest.mark.parametrize(("value", "number"), [
    (-3, -3), (-2.5, -3), (-2, -3), (-1.999, -2), (-1, -2), (-0.5, -1), (0, -1), (1e-9, 1), (1, 1), (1.01, 2), (3, 3),
])
def test_cells_as_in_the_released_annotations(value, number):
    assert scene.cell(value) == number


@pytest.mark.parametrize(("x", "y", "name"), [
    (0, 0, "first"), (-0.1, 0, "second"), (-1, -1, "third"), (0, -1, "fourth"), (2, 2, "first")])
def test_quadrants(x, y, name):
    assert scene.quadrant(x, y) == name


@settings(max_examples=40)
@given(SPECS, st.integers(0, 1000), st.sampled_from(scene.MODES))
def test_a_scene_does_what_a_caption_says(spec, seed, mode):
    sentence = scene.caption(spec, mode)
    other = scene.with_caption(spec, sentence, seed=seed)
    assert other.objects == spec.objects and other == scene.with_caption(spec, sentence, seed=seed)
    assert not scene.collide(other.objects, other.moves)
    if mode == "explicit":
        assert scene.caption(other) == sentence
    else:
        assert scene.clauses(other, "ambiguous") == scene.clauses(spec, "ambiguous")


# ------------------------------------------------------------------------------------------- errors


CUBE = SceneObject("cube", "small", "cyan", "metal", 2.0, 2.0)


@pytest.mark.parametrize(("change", "message"), [
    (dict(color="pink"), "unknown color 'pink': use one of gold, gray, red"),
    (dict(shape="torus"), "unknown shape 'torus'"),
    (dict(size="tiny"), "small, medium, large"),
    (dict(material="wood"), "metal, rubber"),
    (dict(x=3.5), "x = 3.5 is off the table: x and y run from -3 to 3"),
    (dict(y=float("nan")), "off the table"),
    (dict(yaw=float("inf")), "radians"),
    (dict(shape="snitch"), "always small, gold and metal"),
])
def test_impossible_objects(change, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        replace(CUBE, **change)


@pytest.mark.parametrize(("move", "message"), [
    (lambda: Move("contain", 1, 20, object=2), "cannot contain the small cyan metal cube: a cone contains a cone, "
                                              "a sphere, a snitch that is strictly smaller"),
    (lambda: Move("contain", 0, 20, object=1), "a snitch cannot contain; allowed: cone"),
    (lambda: Move("rotate", 1, 20), "a cone cannot rotate; allowed: snitch, cylinder, cube"),
    (lambda: Move("slide", 1, 20, 4.0, 0.0), "off the table"),
    (lambda: Move("slide", 1, 20), "needs the place where it ends"),
    (lambda: Move("rotate", 0, 20, 1.0, 1.0), "no place of its own"),
    (lambda: Move("rotate", 0, 19), "from 20 to 30; got 19"),
    (lambda: Move("jump", 0, 20), "use one of rotate, slide, pick-place, contain"),
    (lambda: Move("contain", 1, 20), "a contain has an object"),
    (lambda: Move("rotate", 7, 20), "there is no object 7"),
])
def test_impossible_actions(move, message):
    with pytest.raises(ValueError, match=message):
        lone(move(), CUBE)


def test_captions_that_do_not_fit_the_scene():
    data = CaterGen("cater-gen-v1")
    spec = data.spec("test", 3)
    with pytest.raises(captions.CaptionError, match="cube"):
        data.with_caption(spec, "the cone is picked up and containing the cube.")
    v2 = CaterGen("cater-gen-v2")
    spec = v2.spec("test", 3)
    absent = next(color for color in scene.RGB if not any(
        t.shape == "sphere" and t.color == color for t in spec.objects))
    with pytest.raises(ValueError, match="does not fit the scene, which has: small gold metal snitch"):
        v2.with_caption(spec, f"the {absent} sphere is sliding to the first quadrant.")
    crowded = next(t for t in spec.objects if t.shape == "cone")
    with pytest.raises(ValueError, match="was given to cater-gen-v1"):
        data.with_caption(spec, f"the {crowded.name} is sliding to (1, 1).")


def test_unknown_names():
    for wrong, message in ((lambda: CaterGen("cater"), "cater-gen-v1, cater-gen-v2"),
                           (lambda: CaterGen("cater-gen-v1", "vague"), "explicit, ambiguous"),
                           (lambda: CaterGen("cater-gen-v1", image_size=100), "multiple of 8"),
                           (lambda: CaterGen("cater-gen-v1").spec("val", 0), "'train' or 'test'"),
                           (lambda: CaterGen("cater-gen-v1").spec("test", -1), "negative"),
                           (lambda: scene.caption(scene.draw_spec("cater-gen-v1", "test", 0), "x"), "explicit")):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_sizes_are_the_paper_s():
    assert CaterGen("cater-gen-v1").sizes == {"train": 3500, "test": 1500}
    assert CaterGen("cater-gen-v2").sizes == {"train": 24000, "test": 6000}


# ------------------------------------------------------------------------------------------ pictures


@pytest.fixture(scope="module")
def small():
    return CaterGen("cater-gen-v2", image_size=32)


def test_pictures_are_those_of_the_version_in_every_cache_s_name():
    """The mean colours of the quarters of two frames: where these change, `scene.VERSION` must rise."""
    assert scene.VERSION == 1
    data = CaterGen("cater-gen-v2", image_size=32)
    frames = data.clips([data.spec("train", 0)], np.array([[0, 30]]))[0].astype(float)
    quarters = frames.reshape(2, 2, 16, 2, 16, 3).mean((2, 4))
    expected = [[[[110.2, 110.3, 110.7], [108.8, 107.3, 106.6]], [[132.8, 130.4, 130.6], [147.8, 142.6, 138.9]]],
                [[[110.3, 107.8, 109.5], [109.2, 108.7, 107.9]], [[133.8, 132.7, 131.1], [148.1, 146.0, 142.4]]]]
    assert np.abs(quarters - expected).max() < 0.2


def test_a_frame_hangs_on_scene_and_time_alone(small):
    one, two = small.spec("train", 0), small.spec("train", 1)
    video = small.video(one)
    assert video.shape == (31, 32, 32, 3) and video.dtype == np.uint8
    clips = small.clips([two, one], np.array([[0, 5, 9], [30, 0, 7]]))
    assert clips.shape == (2, 3, 32, 32, 3)
    assert (clips[1] == video[[30, 0, 7]]).all()
    assert (clips[0] == small.clips([two], np.array([[0, 5, 9]]))[0]).all()


def test_still_frames_are_still_and_moving_ones_move(small):
    spec = small.spec("train", 0)
    video, last = small.video(spec), max(move.end for move in spec.moves)
    assert (video[last:] == video[-1]).all()
    assert (video[0] != video[last]).any()


@settings(max_examples=10)
@given(spec=SPECS)
def test_frames_of_any_scene_can_be_drawn(spec):
    data = CaterGen(spec.dataset, image_size=32)
    first = data.clips([spec], np.array([[0, 15]]))[0]
    assume(spec.moves)
    other = next(k for k, thing in enumerate(spec.objects) if thing.shape == "snitch")
    turning = replace(spec, moves=(Move("rotate", other, 20),))
    assert (data.clips([turning], np.array([[0]]))[0, 0] == first[0]).all()


def test_wrong_frames(small):
    spec = small.spec("train", 0)
    for indices, message in ((np.zeros(3, int), "shape"), (np.array([[31]]), "no frame 31"),
                             (np.array([[-1]]), "no frame -1"), (np.array([[0.5]]), "whole numbers")):
        with pytest.raises(ValueError, match=message):
            small.clips([spec], indices)
    with pytest.raises(ValueError, match="given to cater-gen-v2"):
        small.clips([scene.draw_spec("cater-gen-v1", "train", 0)], np.array([[0]]))
