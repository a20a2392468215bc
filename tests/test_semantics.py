"""Motion accuracy: the truth is right, other motions are wrong, the candidates are what they should be."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_core import semantics
from mage_core.cater.scene import FRAMES, CaterGen, caption, clauses, collide
from mage_core.clips import frame_indices
from mage_core.metrics import evaluation_batch, to_video
from mage_core.moving_mnist import DATASETS, Distractor, Mover, MovingMNIST, Spec
from mage_core.semantics import candidate_clips, candidate_specs, frames_until_still, motion_accuracy, wilson_interval

COUNTS = {"single-mnist": 4, "double-mnist": 16, "modified-mnist": 64}
IMAGES = {digit: int(MovingMNIST("single-mnist").digits.of(digit)[5]) for digit in (3, 4, 5)}


@pytest.fixture(params=DATASETS)
def batch(request):
    return evaluation_batch(MovingMNIST(request.param), "test", range(40))


def single(start_y, motion, speed=0.5):
    mover = Mover(3, IMAGES[3], start_y, 0.4, motion)
    return Spec("single-mnist", "mnist-5k", "test", 0, 0, (mover,), None, speed)


def judged(videos, batch):
    return motion_accuracy(videos, batch.dataset, batch.specs, batch.speeds)


# ----------------------------------------------------------------------------------------------- candidates


def test_candidates_are_all_motions_from_the_same_first_frame(batch):
    for spec, truth in zip(batch.specs, batch.truth[:, :, 0]):
        found = candidate_clips(batch.dataset, spec)
        assert len(found.clips) == len(found.names) == len(set(found.names)) == COUNTS[batch.dataset.name]
        assert found.names[found.own] == tuple(mover.motion for mover in spec.movers)
        assert (found.clips[found.own] == (truth * 255).numpy()).all()
        assert (found.clips[:, 0] == found.clips[found.own, 0]).all()


def test_candidates_of_single_by_hand():
    dataset = MovingMNIST("single-mnist")
    # frame 0 is after the first step: y = 0.5 - 0.2 = 0.3; digits are pasted at floor(36 p)
    spec = single(0.5, "up then down", speed=1e-6)
    found = candidate_clips(dataset, spec, clip_length=5)
    positions = {
        "up then down": [(0.3, 0.4), (0.1, 0.4), (0.0, 0.4), (0.2, 0.4), (0.4, 0.4)],
        "down then up": [(0.3, 0.4), (0.5, 0.4), (0.7, 0.4), (0.9, 0.4), (1.0, 0.4)],
        "left then right": [(0.3, 0.4), (0.3, 0.2), (0.3, 0.0), (0.3, 0.2), (0.3, 0.4)],
        "right then left": [(0.3, 0.4), (0.3, 0.6), (0.3, 0.8), (0.3, 1.0), (0.3, 0.8)],
    }
    digit = dataset.digits.images[IMAGES[3]]
    assert {names[0] for names in found.names} == set(positions)
    for (motion,), clip in zip(found.names, found.clips):
        for (y, x), frame in zip(positions[motion], clip):
            top, left = int(36 * y + 1e-9), int(36 * x + 1e-9)
            expected = np.zeros((64, 64), np.uint8)
            expected[top:top + 28, left:left + 28] = digit
            assert (frame == expected).all(), motion


def test_candidates_of_modified_take_frames_by_their_own_length_and_keep_the_distractor():
    dataset = MovingMNIST("modified-mnist")
    movers = (Mover(3, IMAGES[3], 0.2, 0.5, "up"), Mover(4, IMAGES[4], 0.5, 0.2, "left then right"))
    spec = Spec("modified-mnist", "mnist-5k", "test", 0, 0, movers, Distractor(5, IMAGES[5], 30, 30), 0.9)
    found = candidate_clips(dataset, spec)
    lengths = set()
    for names, clip in zip(found.names, found.clips):
        # frame 0 is at the start here, so the simulator itself draws a candidate from scratch
        other = dataset.with_motions(spec, names)
        length = dataset.length(other)
        lengths.add(length)
        assert (clip == dataset.video(other)[frame_indices(length, 0.9, dataset.interval)]).all()
        assert (clip[:, 30:58, 30:58] >= dataset.digits.images[IMAGES[5]]).all()
    assert len(lengths) > 3


# ------------------------------------------------------------------------------------------ motion accuracy


def test_the_truth_is_right_and_noise_does_not_change_that(batch):
    assert judged(batch.truth, batch).accuracy == 1.0
    noise = 0.3 * torch.randn(batch.truth.shape, generator=torch.Generator().manual_seed(0))
    assert judged((batch.truth + noise).clamp(0, 1), batch).accuracy == 1.0
    assert judged(0.5 * batch.truth + 0.2, batch).accuracy >= 0.95  # faded


def test_clips_of_another_motion_are_wrong_unless_they_equal_the_own(batch):
    clips, tied = [], []
    for place, spec in enumerate(batch.specs):
        found = candidate_clips(batch.dataset, spec)
        other = (found.own + 1 + place % (len(found.clips) - 1)) % len(found.clips)
        clips.append(found.clips[other])
        tied.append((found.clips[other, 1:] == found.clips[found.own, 1:]).all())
    result = judged(to_video(np.stack(clips)), batch)
    assert result.correct.tolist() == tied
    assert sum(tied) < len(tied)


def test_the_verdict_is_the_nearest_candidate_by_plain_arithmetic(batch):
    generator = np.random.default_rng(0)
    videos, expected = [], []
    for spec in batch.specs:
        found = candidate_clips(batch.dataset, spec)
        a, b = generator.integers(len(found.clips), size=2)
        share = generator.uniform(0.2, 0.8)
        a = found.own if generator.random() < 0.5 else a
        video = (share * found.clips[a] + (1 - share) * found.clips[b]) / 255
        errors = ((video[1:] - found.clips[:, 1:] / 255) ** 2).mean(axis=(1, 2, 3))
        own = (found.clips[:, 1:] == found.clips[found.own, 1:]).all(axis=(1, 2, 3))
        expected.append(bool(errors[own].min() < errors[~own].min()))
        videos.append(video)
    result = judged(to_video(np.stack(videos)) * 255, batch)
    assert result.correct.tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_answers_that_never_move_score_low(batch):
    repeated = judged(batch.truth[:, :1].expand_as(batch.truth), batch)
    assert repeated.accuracy <= repeated.chance + 0.2
    black = judged(torch.zeros_like(batch.truth), batch)
    assert black.accuracy <= 0.3
    if batch.dataset.name == "single-mnist":  # as far from every candidate: nothing is nearest
        assert black.accuracy == 0.0


def test_rounding_decides_nothing():
    # halfway between the own clip and another one: as far from both, whatever the last bit of a sum says
    batch = evaluation_batch(MovingMNIST("single-mnist"), "test", range(40))
    found = [candidate_clips(batch.dataset, spec) for spec in batch.specs]
    halves = [each.clips[[each.own, (each.own + 2) % 4]].mean(axis=0) / 255 for each in found]
    tied = [(each.clips[each.own] == each.clips[(each.own + 2) % 4]).all() for each in found]
    result = judged(to_video(np.stack(halves).astype(np.float32)) * 255, batch)
    assert result.correct.tolist() == tied


def test_the_first_frame_does_not_count(batch):
    videos = batch.truth.clone()
    videos[:, 0] = 1 - videos[:, 0]
    assert judged(videos, batch).accuracy == 1.0


def test_every_frame_from_the_second_to_the_last_can_decide():
    dataset, spec = MovingMNIST("single-mnist"), single(0.5, "up then down")
    found = candidate_clips(dataset, spec)
    own, rival = found.clips[found.own] / 255, found.clips[found.names.index(("left then right",))] / 255
    assert (own[1:] != rival[1:]).any(axis=(1, 2)).all()
    videos = np.repeat(((own + rival) / 2)[None], 9, axis=0)   # a tie, but for a frame
    for frame in range(1, 10):
        videos[frame - 1, frame] = own[frame]
    assert motion_accuracy(to_video(videos) * 255, dataset, [spec] * 9).correct.all()


def test_another_speed_is_judged_at_that_speed():
    batch = evaluation_batch(MovingMNIST("modified-mnist"), "test", range(20))
    dataset, fast = batch.dataset, 0.95
    frames = np.stack([frame_indices(dataset.length(spec), fast, dataset.interval) for spec in batch.specs])
    videos = to_video(dataset.clips(batch.specs, frames))
    assert motion_accuracy(videos, dataset, batch.specs, [fast] * 20).accuracy == 1.0


def test_chance_and_ties_count_equal_candidates():
    dataset = MovingMNIST("single-mnist")
    # stepping down from 0.9, the digit is at the border in frame 0 and turns, as "up then down" does
    at_border, inside = single(0.9, "down then up"), single(0.5, "down then up")
    videos = to_video(np.stack([candidate_clips(dataset, spec).clips[2] for spec in (at_border, inside)]))
    result = motion_accuracy(videos, dataset, [at_border, inside])
    assert result.counted_as_own.tolist() == [2, 1]
    assert result.chance == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert result.tied == 0.5
    assert "chance 0.375" in str(result)


def test_batches_add_up(batch):
    videos = batch.truth.roll(1, dims=0)
    whole = judged(videos, batch)
    parts = (motion_accuracy(videos[:7], batch.dataset, batch.specs[:7])
             + motion_accuracy(videos[7:], batch.dataset, batch.specs[7:]))
    assert (parts.correct == whole.correct).all()
    assert (parts.n, parts.chance, parts.tied) == (whole.n, whole.chance, whole.tied)


@pytest.mark.parametrize("change, word", [
    (lambda video: video[0], "b t 1 64 64"), (lambda video: video[:, :1], "at least 2"),
    (lambda video: video[..., :32], "b t 1 64 64"), (lambda video: video[:1], "equal"),
    (lambda video: video / 0, "finite"), (lambda video: video + np.inf, "finite"),
    (lambda video: video.to(torch.uint8), "must be float"), (lambda video: video * 255, "divide by 255"),
    (lambda video: video * 2 - 1, "from -1 to 1"),
])
def test_bad_videos_are_named(change, word):
    batch = evaluation_batch(MovingMNIST("single-mnist"), "test", range(2))
    with pytest.raises(ValueError, match=word):
        judged(change(batch.truth), batch)
    with pytest.raises(ValueError, match="1 speeds: they must be equal"):
        motion_accuracy(batch.truth, batch.dataset, batch.specs, [0.5])


def test_the_interval_is_of_what_is_right_and_chance_the_mean_of_each_sample_s():
    one = np.ones(263, int)
    found = semantics.MotionAccuracy(np.arange(263) < 81, one, 32 * one)
    assert found.interval == pytest.approx((0.2553, 0.3662), abs=5e-5)   # as Newcombe's below
    assert semantics.MotionAccuracy(one[:2] > 0, one[:2], np.array([32, 8])).chance == (1 / 32 + 1 / 8) / 2


def test_wilson_interval_against_published_values():
    # Newcombe 1998, Statistics in Medicine 17, 857 to 872, Table I, method 3
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                    (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(29, 29)[1] == 1.0
    with pytest.raises(ValueError, match="of 0"):
        wilson_interval(0, 0)


# ------------------------------------------------------------------------------------- when the motion ends


def test_frames_until_still_by_hand():
    ids = torch.tensor([[0, 1, 2, 2, 2], [0, 0, 0, 0, 0], [0, 1, 1, 1, 3], [4, 5, 5, 5, 5]])[..., None, None]
    assert frames_until_still(ids).tolist() == [3, 1, 5, 2]
    assert frames_until_still(np.zeros((0, 4, 3))).shape == (0,)
    video = ids[..., None].float() / 10
    assert frames_until_still(video).tolist() == [3, 1, 5, 2]
    flicker = video + 0.02 * (torch.arange(5) % 2)[None, :, None, None, None]
    assert frames_until_still(flicker).tolist() == [3, 1, 5, 2]
    assert frames_until_still(flicker, tolerance=0.01).tolist() == [5, 5, 5, 5]
    with pytest.raises(ValueError, match="b t"):
        frames_until_still(torch.zeros(3))


def test_frames_until_still_finds_the_end_of_the_simulated_motion():
    batch = evaluation_batch(MovingMNIST("modified-mnist"), "test", range(60))
    dataset, expected = batch.dataset, []
    for spec, speed in zip(batch.specs, batch.speeds):
        last = dataset.length(spec) - 1
        picked = frame_indices(last + 1, speed, dataset.interval).tolist()
        expected.append(picked.index(last) + 1 if last in picked else 10)
    assert frames_until_still(batch.truth).tolist() == expected
    assert min(expected) < 8


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=8))
def test_what_comes_after_the_end_is_still_and_what_comes_before_is_not(values):
    frames = np.array(values)[None, :, None, None]
    end = int(frames_until_still(frames)[0])
    assert len(set(values[end - 1:])) == 1
    assert end == 1 or values[end - 2] != values[end - 1]


def test_every_pair_of_motions_is_a_candidate_once():
    spec = MovingMNIST("double-mnist").spec("train", 0)
    names = candidate_clips(MovingMNIST("double-mnist"), spec).names
    four = ("up then down", "left then right", "down then up", "right then left")
    assert set(names) == set(product(four, four))
    assert semantics.ROUNDING < 1e-4


# ------------------------------------------------------------------------------------------------- CATER-GEN

CATER = {name: CaterGen(name, image_size=32) for name in ("cater-gen-v1", "cater-gen-v2")}


def cater_sample(name, index, seed=0):
    return CATER[name].spec("test", index, seed)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(sorted(CATER)), st.integers(0, 400), st.integers(0, 3))
def test_rivals_are_31_other_captions_of_the_same_scene(name, index, seed):
    spec = cater_sample(name, index, seed)
    own, *rivals = candidate_specs(CATER[name], spec)
    assert own == spec and len(rivals) == 31
    said = [frozenset(clauses(each)) for each in (own, *rivals)]
    assert len(set(said)) == 32, "two candidates ask for the same"
    for rival in rivals:
        assert (rival.objects, rival.speed, rival.index) == (spec.objects, spec.speed, spec.index)
        assert len(rival.moves) == len(spec.moves)
        assert sorted(move.end for move in rival.moves) == sorted(move.end for move in spec.moves)
        assert not collide(rival.objects, rival.moves)
        for action, move in zip(clauses(rival), rival.moves):   # what is said alike is done alike
            if action in said[0]:
                assert move == spec.moves[clauses(spec).index(action)]
    assert sum(len(actions & said[0]) == len(spec.moves) - 1 for actions in said[1:]) >= 8


def test_rivals_hold_the_close_ones():
    kinds = set()
    for index in range(4):
        spec = cater_sample("cater-gen-v2", index)
        own = clauses(spec)
        for rival in candidate_specs(CATER["cater-gen-v2"], spec)[1:]:
            (mine, *_), (theirs, *_) = set(own) - set(clauses(rival)), set(clauses(rival)) - set(own)
            if len(set(own) & set(clauses(rival))) == len(own) - 1:
                kinds.add((mine.kind == theirs.kind, mine.subject == theirs.subject, mine.place == theirs.place))
    assert kinds >= {(True, True, False), (True, False, True), (False, True, True)}   # cell, object, action


@pytest.mark.parametrize("name", sorted(CATER))
def test_the_lazy_verdict_is_that_of_whole_clips(name):
    dataset = CATER[name]
    batch = evaluation_batch(dataset, "test", range(3))
    noise = torch.randn(batch.truth.shape, generator=torch.Generator().manual_seed(0))
    found = [candidate_clips(dataset, spec) for spec in batch.specs]
    rivals = torch.stack([to_video(each.clips[1 + 5 * k][None])[0] for k, each in enumerate(found)])
    asked = {"truth": batch.truth, "noisy": batch.truth + 0.1 * noise, "faded": batch.truth / 2,
             "still": batch.truth[:, :1].expand_as(batch.truth), "another caption": rivals,
             "between": (batch.truth + rivals) / 2 + 0.02 * noise, "nearer": 0.45 * batch.truth + 0.55 * rivals}
    right = {}
    for label, videos in asked.items():
        result = judged(videos, batch)
        expected = []
        for video, each in zip(videos, found):
            answer = (255 * video).permute(0, 2, 3, 1).numpy().astype(np.float64)
            errors = ((answer[1:] - each.clips[:, 1:]) ** 2).sum(axis=(1, 2, 3, 4))
            expected.append(bool(errors[0] < errors[1:].min()))
        assert result.correct.tolist() == expected, label
        right[label] = result.accuracy
    assert right["truth"] == right["noisy"] == 1.0
    assert right["still"] == right["another caption"] == right["nearer"] == 0.0
    assert result.chance == 1 / 32 and result.tied == 0


def test_cater_is_judged_at_the_speed_and_length_asked_for_and_a_tie_is_not_right():
    dataset, spec = CATER["cater-gen-v2"], cater_sample("cater-gen-v2", 1)
    own, *rivals = candidate_clips(dataset, spec, 0.95, 6).clips.astype(np.float64) / 255
    for share, right in ((0.55, 31), (0.5, 0), (0.45, 0)):
        videos = to_video(np.stack([share * own + (1 - share) * rival for rival in rivals]).astype(np.float32)) * 255
        assert motion_accuracy(videos, dataset, [spec] * 31, [0.95] * 31).correct.sum() == right, share


def test_a_rival_that_differs_before_the_last_frame_only_is_taken(monkeypatch):
    dataset = CATER["cater-gen-v1"]
    spec = cater_sample("cater-gen-v1", 3)
    later = replace(spec, moves=tuple(replace(move, end=50 - move.end) for move in spec.moves))
    clips = dataset.clips([spec, later], np.tile(frame_indices(FRAMES, spec.speed, dataset.interval), (2, 1)))
    assert (clips[0, -1] == clips[1, -1]).all() and (clips[0] != clips[1]).any()
    monkeypatch.setattr(semantics, "_other_captions", lambda *given: iter([later]))
    assert semantics._question.__wrapped__(dataset, spec, spec.speed, 10).specs == (spec, later)


def test_a_scene_with_nothing_else_to_do_is_named(monkeypatch):
    monkeypatch.setattr(semantics, "_other_captions", lambda *given: iter(()))
    with pytest.raises(ValueError, match="no other caption fits"):
        candidate_specs(CaterGen("cater-gen-v1", image_size=16), cater_sample("cater-gen-v1", 0))


def test_a_rival_that_looks_like_the_own_clip_is_not_taken(monkeypatch):
    spec, dataset = cater_sample("cater-gen-v1", 3), CaterGen("cater-gen-v1", image_size=24)
    whole = semantics._other_captions
    hidden = replace(spec, speed=spec.speed)   # another record of the same clip
    monkeypatch.setattr(semantics, "_other_captions", lambda *given: iter([hidden, *whole(*given)]))
    specs = candidate_specs(dataset, spec)
    assert len(specs) == 32 and not any(each == hidden for each in specs[1:])


def test_the_rivals_never_change():
    # a hash of their sentences and places: what a card says of motion accuracy must stay what it was
    text = "|".join(f"{caption(each)} {[(m.x, m.y, m.end) for m in each.moves]}" for name in sorted(CATER)
                    for index in range(3) for each in candidate_specs(CATER[name], cater_sample(name, index)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "cc6e42ed5c533d55"


def test_ambiguous_captions_are_not_judged():
    dataset = CaterGen("cater-gen-v2", "ambiguous", 32)
    spec = dataset.spec("test", 0)
    assert not semantics.judged(dataset, spec)
    with pytest.raises(ValueError, match="explicit"):
        motion_accuracy(torch.zeros(1, 10, 3, 32, 32), dataset, [spec])


def test_the_first_500_of_v2_are_judged_and_all_of_v1():
    assert [semantics.judged(CATER["cater-gen-v2"], cater_sample("cater-gen-v2", k))
            for k in (499, 500)] == [True, False]
    assert semantics.judged(CATER["cater-gen-v1"], cater_sample("cater-gen-v1", 1_499))
    assert semantics.judged(MovingMNIST("single-mnist"), single(0.5, "up then down"))


def test_frames_that_are_no_numbers_are_not_still():
    with pytest.raises(ValueError, match="not finite"):
        frames_until_still(torch.full((1, 4, 1, 8, 8), math.nan))
