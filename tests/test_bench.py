"""The benchmark's bookkeeping on made-up clocks: no wall time is ever asserted."""

import itertools

import pytest
import torch

from mage_core import axial, bench


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    return clock


def test_ways_take_turns_and_the_first_two_rounds_do_not_count(clock):
    done, slow, fast = [], itertools.count(10), itertools.count(1)

    def way(name, seconds):
        def work():
            done.append(name)
            clock.now += next(seconds)
        return work

    seconds = bench.in_turn({"slow": way("slow", slow), "fast": way("fast", fast)}, rounds=3)
    assert done == ["slow", "fast"] * 5
    assert seconds == {"slow": [12, 13, 14], "fast": [3, 4, 5]}


def test_the_ratio_is_the_median_of_pairs_whatever_the_machine_does(capsys):
    # the machine slows down fourfold in the middle: each pair still says five times
    seconds = {"plain": [5.0, 20.0, 21.0, 5.0, 5.0], "shipped": [1.0, 4.0, 4.2, 1.0, 0.5]}
    assert bench.report("title", seconds, per=2) == pytest.approx(5.0)
    text = capsys.readouterr().out
    assert "title" in text and "ratio 5.0   (5.0 to 10.0)" in text
    plain, shipped = (next(line for line in text.splitlines() if name in line) for name in seconds)
    assert "2.500 s   (2.500 to 10.500)" in plain and "0.500 s   (0.250 to 2.100)" in shipped, "seconds a sample"


@pytest.mark.parametrize("fast", [False, True])
def test_both_training_steps_train(fast):
    mage, clips = bench.paper_model(width=32), bench.random_clips(1)
    before = [parameter.clone() for parameter in mage.parameters()]
    bench.training_step(mage, clips, fast=fast)()
    assert any(not torch.equal(old, new) for old, new in zip(before, mage.parameters()))
    assert all(parameter.isfinite().all() for parameter in mage.parameters())


def test_the_step_of_quick_leaves_out_frames_and_tokens(monkeypatch):
    seen = []
    forward = bench.MAGE.forward
    monkeypatch.setattr(bench.MAGE, "forward", lambda mage, **given: seen.append(given) or forward(mage, **given))
    step = bench.recipe_step(32, 4)
    for _ in range(8):
        step()
    assert all(len(given["frames"]) == 4 and given["predict"].shape == (4, 4, 16, 16) for given in seen)
    share = sum(given["predict"].float().mean() for given in seen) / len(seen)
    assert 0.1 < share < 0.6   # about 15 % of the tokens differ from the first frame's, and as many others count


def test_drawn_clips_are_black_where_the_frames_are():
    dataset = bench.load_dataset("single-mnist")
    clips = bench.drawn_clips(dataset, 3)
    assert clips.token_ids.shape == (3, 20, 16, 16) and clips.token_ids.max() < 512
    frames = dataset.clips([dataset.spec("train", 2)], [range(20)])[0]
    black = frames.reshape(20, 16, 4, 16, 4).max((2, 4)) == 0
    assert ((clips.token_ids[2] == 0) == black).all() and 0.5 < black.mean() < 0.97


@pytest.mark.parametrize("fast", [False, True])
def test_a_training_step_has_the_settings_that_the_table_names(fast, monkeypatch):
    seen, forward = [], bench.MAGE.forward
    monkeypatch.setattr(bench, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))   # as with fast bf16
    monkeypatch.setattr(bench.MAGE, "forward", lambda *given: seen.append(
        (axial._as_written, torch.is_autocast_enabled("cpu"))) or forward(*given))
    bench.training_step(bench.paper_model(width=32), bench.random_clips(1), fast=fast)()
    assert seen == [(not fast, fast)]


def test_one_way_of_generating_recomputes_and_the_other_does_not(monkeypatch):
    seen, generate = [], bench.MAGE.generate
    monkeypatch.setattr(bench.MAGE, "generate", lambda *given, **how: seen.append(
        (axial._as_written, how.get("recompute", False))) or generate(*given, **how))
    monkeypatch.setattr(bench, "in_turn", lambda ways, rounds: {
        name: [way() is None or 1.0] for name, way in ways.items()})
    bench.benchmark_generation(32, 1, torch.device("cpu"))
    assert seen == [(True, True), (False, False)] + [(True, True), (False, False), (False, False)]


def test_the_benchmark_runs_and_says_whether_both_generations_agree(monkeypatch, capsys):
    monkeypatch.setattr(bench, "in_turn", lambda ways, rounds: {name: [1.0 / (1 + i)] for i, name in enumerate(ways)})
    assert bench.benchmark_generation(32, 1, torch.device("cpu")) == pytest.approx(2.0)
    assert "same token ids in fp32, recomputed and computed once: True" in capsys.readouterr().out


@pytest.mark.parametrize("words, told", [(["--width", "100"], "MAGEConfig.width is 100"),
                                         (["--rounds", "0"], "--rounds is 0: it must be at least 1")])
def test_what_cannot_be_timed_is_told_in_a_line(words, told, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(words)
    assert end.value.code == 2 and told in capsys.readouterr().err


def test_rendering_is_timed_a_frame_for_two_and_for_eight_objects(clock, monkeypatch, capsys):
    asked = []

    def clips(self, specs, frames):
        asked.append((self.image_size, {len(spec.objects) for spec in specs}, frames.shape))
        clock.now += 0.01 * frames.size * len(specs[0].objects)

    monkeypatch.setattr(bench.CaterGen, "clips", clips)
    assert bench.benchmark_rendering(3) == {2: pytest.approx(20.0), 8: pytest.approx(80.0)}
    half = len(asked) // 2   # the uncounted rounds are `in_turn`'s own
    assert half > 3 and asked == [(256, {2}, (8, 7))] * half + [(256, {8}, (8, 7))] * half
    out = capsys.readouterr().out
    assert "2 objects (cater-gen-v1)" in out and "20.0 ms" in out and "8 objects (cater-gen-v2)" in out
