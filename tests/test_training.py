"""Training of both stages: killed at any moment and resumed it ends in the same weights; what is trained, on what."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mage_core import batches, loop, metrics, presets, training, weights
from mage_core.batches import Clips, balanced, corrupted, guessed, training_batch
from mage_core.clips import TokenClips, frame_indices, load_dataset, text_ids, token_clips
from mage_core.files import alone_in, write_whole
from mage_core.loop import Stage, TrainingStopped, fit, optimisers, read_curve, schedule
from mage_core.mage import MAGE
from mage_core.presets import PRESETS, changed
from mage_core.processes import Alone
from mage_core.training import (FrameSource, fingerprint, token_key, token_stillness, train_mage, train_vqvae,
                                vqvae_quality)
from mage_core.vqvae import VQVAE, VQVAEConfig

SMOKE = PRESETS["smoke"]
# every source of randomness is on: dropout, hidden tokens, own guesses, left-out frames, chosen targets
TINY = dataclasses.replace(
    SMOKE, name="tiny", pairs=12, test_clips=4, watch_clips=2,
    vqvae=dataclasses.replace(SMOKE.vqvae, images=80, batch=8, codebook_size=16, width=16, encoder_width=8,
                              code_channels=8, decoder_alone=0.4),
    mage=dataclasses.replace(SMOKE.mage, samples=20, batch=2, width=16, head_width=8, dropout=0.1, own_frames=0.9,
                             evaluate_every=6))
# the released shape, with a codebook that is laid in the middle of training
WARM = dataclasses.replace(TINY, vqvae=dataclasses.replace(
    TINY.vqvae, shape="released", warm_images=40, decoder_alone=0.0, reconstruction=1.0, commitment=2.0, crop=None))
# as small as a run can be
SMALL = dataclasses.replace(TINY, name="small", pairs=5, vqvae=dataclasses.replace(TINY.vqvae, images=16),
                            mage=dataclasses.replace(TINY.mage, samples=4))
STAGES = ("vqvae", "mage")


@pytest.fixture(scope="module")
def single():
    return load_dataset("single-mnist")


class Killed(BaseException):
    """Stands for SIGKILL where the moment matters: nothing in the code catches it."""


def saving_every_step():
    """`fit` that writes a checkpoint after each step."""
    return functools.partial(fit, checkpoint_seconds=-1.0)


def kept(folder, stage):
    """All that a stage keeps on disk, but for the seconds that it took."""
    state = torch.load(folder / f"{stage}.pt", weights_only=True)
    curve = read_curve(folder / f"{stage}.jsonl")
    return {key: value for key, value in state.items() if key != "seconds"} | {
        "curve": [{key: value for key, value in line.items() if key not in ("seconds", "rate")} for line in curve]}


def assert_equal(one, other, where="checkpoint"):
    """Equal to the last bit, through dicts, lists and tensors."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for place, (mine, theirs) in enumerate(zip(one, other)):
            assert_equal(mine, theirs, f"{where}[{place}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    else:
        assert one == other, where


def trainer(stage, preset, single, folder, vqvae=None, seed=0):
    """A function that trains a stage in a folder, as often as it takes."""
    if stage == "vqvae":
        return lambda **options: train_vqvae(preset, single, folder, seed=seed, progress=False, **options)
    return lambda **options: train_mage(preset, single, vqvae, folder, seed=seed, progress=False, **options)


@pytest.fixture(scope="module")
def whole(single, tmp_path_factory):
    """Both stages trained without a break: the folder, the models, and what is kept of them."""
    folder = tmp_path_factory.mktemp("whole")
    vqvae, done = trainer("vqvae", TINY, single, folder)()
    mage, also_done = trainer("mage", TINY, single, folder, vqvae)()
    assert done and also_done
    return SimpleNamespace(folder=folder, vqvae=vqvae, mage=mage,
                           kept={stage: kept(folder, stage) for stage in STAGES})


# ---------------------------------------------------------------- killed and resumed

def dying(moment, how):
    """`write_whole` that dies at a moment (counted in files written): before, in the middle of, or after writing."""
    files = itertools.count()

    def write(path, write_file):
        if next(files) != moment:
            return write_whole(path, write_file)

        def half(temporary):
            write_file(temporary)
            os.truncate(temporary, temporary.stat().st_size // 2)
            raise Killed

        if how != "before":
            write_whole(path, half if how == "during" else write_file)
        raise Killed

    return write


@pytest.mark.parametrize("stage, how", [("vqvae", "before"), ("vqvae", "during"), ("vqvae", "after"),
                                        ("mage", "during"), ("mage", "after")])
def test_killed_again_and_again_it_ends_in_the_same_weights_state_and_curve(single, whole, tmp_path, monkeypatch,
                                                                            stage, how):
    train = trainer(stage, TINY, single, tmp_path, whole.vqvae)
    monkeypatch.setattr(training, "fit", saving_every_step())
    steps = [0]
    for moment in itertools.cycle([0, 5, 2, 1, 8, 3]):   # even: the curve's file, odd: the checkpoint's
        monkeypatch.setattr(loop, "write_whole", dying(moment, how))
        torch.manual_seed(moment)   # what another process would begin with
        try:
            _, done = train()
        except Killed:
            if (tmp_path / f"{stage}.pt").exists():   # whole at any time
                steps.append(kept(tmp_path, stage)["step"])
            continue
        break
    assert done and len(steps) >= 4 and steps == sorted(steps) and len(set(steps)) >= 4
    assert_equal(kept(tmp_path, stage), whole.kept[stage])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{stage}.jsonl", f"{stage}.pt"]


class Clock:
    """Time that passes by one second each time somebody looks."""

    def __init__(self):
        self.seconds = itertools.count()

    def monotonic(self):
        return next(self.seconds)


@pytest.mark.parametrize("preset, stage", [(TINY, "vqvae"), (TINY, "mage"), (WARM, "vqvae")],
                         ids=["vqvae", "mage", "vqvae with a codebook laid later"])
def test_out_of_time_at_any_step_it_ends_in_the_same_weights_state_and_curve(single, whole, tmp_path, monkeypatch,
                                                                             preset, stage):
    expected = whole.kept[stage]
    if preset is WARM:
        monkeypatch.setattr(training, "vqvae_quality", cheap_look)
        (tmp_path / "unbroken").mkdir()
        trainer(stage, WARM, single, tmp_path / "unbroken")()
        expected = kept(tmp_path / "unbroken", stage)
        assert len(expected["recent"]) == 10
    folder = tmp_path / "broken"
    folder.mkdir()
    train, steps, done = trainer(stage, preset, single, folder, whole.vqvae), [], False
    for until in itertools.chain([-1, 2, 5], itertools.repeat(4)):
        monkeypatch.setattr(loop, "time", Clock())
        _, done = train(until=until)
        steps.append(kept(folder, stage)["step"])
        if done:
            break
    assert steps[0] == 0 and steps == sorted(steps) and len(set(steps)) >= 5 and steps[-1] == 10
    assert_equal(kept(folder, stage), expected)
    spent = [line["seconds"] for line in read_curve(folder / f"{stage}.jsonl")]   # of every visit, not of the last
    assert spent == sorted(spent) and spent[-1] > 2 * max(2, steps[-1])


def test_another_seed_ends_in_other_weights(single, whole, tmp_path):
    train_vqvae(TINY, single, tmp_path, seed=1, progress=False)
    assert not torch.equal(kept(tmp_path, "vqvae")["parts"]["vqvae"]["codebook"],
                           whole.kept["vqvae"]["parts"]["vqvae"]["codebook"])


def test_a_runs_batches_are_those_of_its_seed(single, whole, tmp_path, monkeypatch):
    seen, made = set(), training.training_batch
    monkeypatch.setattr(training, "training_batch", lambda *given, **more: seen.add(given[3]) or made(*given, **more))
    train_mage(SMALL, single, whole.vqvae, tmp_path, seed=3, progress=False)
    assert seen == {3}


def test_a_finished_stage_is_loaded_and_not_trained_on(single, whole, monkeypatch):
    monkeypatch.setattr(VQVAE, "forward", None)
    monkeypatch.setattr(MAGE, "forward", None)
    vqvae, done = trainer("vqvae", TINY, single, whole.folder)(until=-1.0)
    mage, also_done = trainer("mage", TINY, single, whole.folder, vqvae)(until=-1.0)
    assert done and also_done and not vqvae.training and not mage.training
    assert_equal(dict(vqvae.state_dict()), dict(whole.vqvae.state_dict()))
    assert_equal(dict(mage.state_dict()), dict(whole.mage.state_dict()))


PROGRAM = """
import functools, sys
from pathlib import Path
from mage_core import training
from mage_core.clips import load_dataset
from mage_core.presets import preset
training.fit = functools.partial(training.fit, checkpoint_seconds=-1.0)
training.train(load_dataset("single-mnist"), preset("smoke"), folder=Path(sys.argv[1]), device="cpu", progress=False)
"""


def killed_for_real(repository, folder, stage, steps):
    """Start the program, wait until a stage has taken some steps, kill it by SIGKILL; the step its checkpoint is at."""
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder)], cwd=repository, stderr=subprocess.PIPE)
    try:
        seen = -1
        while seen < steps:
            assert process.poll() is None, process.stderr.read().decode()
            if (folder / f"{stage}.pt").exists():
                seen = torch.load(folder / f"{stage}.pt", weights_only=True)["step"]   # whole, whenever one looks
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    return torch.load(folder / f"{stage}.pt", weights_only=True)["step"]


@pytest.fixture(scope="module")
def smoke(single, tmp_path_factory):
    """The smoke preset in one go."""
    folder = tmp_path_factory.mktemp("smoke")
    return SimpleNamespace(folder=folder, trained=training.train(single, SMOKE, folder=folder, device="cpu",
                                                                 progress=False))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
def test_a_process_killed_in_both_stages_and_resumed_by_another_ends_in_the_same_file(repository, single, smoke,
                                                                                      tmp_path):
    assert 2 <= killed_for_real(repository, tmp_path, "vqvae", 2) <= 20
    assert 2 <= killed_for_real(repository, tmp_path, "mage", 2) <= 16
    training.train(single, SMOKE, folder=tmp_path, device="cpu", progress=False)
    for stage in STAGES:
        assert_equal(kept(tmp_path, stage), kept(smoke.folder, stage))
    assert (tmp_path / "weights.safetensors").read_bytes() == (smoke.folder / "weights.safetensors").read_bytes()


# ---------------------------------------------------------------- losses that are no numbers

def poisoned(monkeypatch, stage, at, how):
    """From the training step `at` on, a stage's loss or its gradient is not a number."""
    kind, field = (VQVAE, "reconstruction_loss") if stage == "vqvae" else (MAGE, "loss")
    forward, steps = kind.forward, itertools.count()

    def wrong(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if not torch.is_grad_enabled() or next(steps) < at:   # a model's own guesses do not count
            return out
        value = getattr(out, field)
        setattr(out, field, {"loss": value * math.nan, "infinite": value * math.inf,
                             "gradient": value + (value * 0).sqrt()}[how])
        return out

    monkeypatch.setattr(kind, "forward", wrong)


@pytest.mark.parametrize("stage, how", [("vqvae", "loss"), ("vqvae", "gradient"),
                                        ("mage", "infinite"), ("mage", "gradient")])
def test_a_loss_that_is_no_number_stops_and_names_the_last_good_checkpoint(single, whole, tmp_path, stage, how):
    train = trainer(stage, TINY, single, tmp_path, whole.vqvae)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fit", saving_every_step())
        poisoned(patch, stage, 4, how)
        with pytest.raises(TrainingStopped, match=f"at step 4 of {stage} .*(nan|inf).*lower learning rate") as stopped:
            train()
        assert f"the last good checkpoint is {stage}.pt in {tmp_path.name}" in str(stopped.value)
    state = kept(tmp_path, stage)
    assert state["step"] == 4
    assert all(tensor.isfinite().all() for part in state["parts"].values() for tensor in part.values())
    train()   # and it still loads: without the poison it goes on as if nothing had been
    assert_equal(kept(tmp_path, stage), whole.kept[stage])


def test_a_loss_that_is_no_number_before_any_checkpoint_says_so(single, tmp_path, monkeypatch):
    poisoned(monkeypatch, "vqvae", 0, "loss")
    with pytest.raises(TrainingStopped, match="at step 0 of vqvae the loss is nan.*no checkpoint yet"):
        train_vqvae(TINY, single, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- checkpoints that do not belong

def started(folder, single, whole, stage, preset=TINY, **options):
    """Begin a stage and stop at once."""
    if stage == "vqvae":
        return train_vqvae(preset, single, folder, until=-1.0, progress=False, **options)
    return train_mage(preset, single, options.pop("vqvae", whole.vqvae), folder, until=-1.0, progress=False, **options)


def of(stage, **fields):
    return dataclasses.replace(TINY, **{stage: dataclasses.replace(getattr(TINY, stage), **fields)})


@pytest.mark.parametrize("stage, change, named", [
    ("vqvae", {"preset": of("vqvae", learning_rate=1e-4)}, "learning_rate"),
    ("vqvae", {"preset": of("vqvae", batch=4, crop=None)}, "batch, crop"),
    ("vqvae", {"preset": dataclasses.replace(TINY, pairs=11)}, "pairs"),
    ("vqvae", {"seed": 1}, "seed"),
    ("vqvae", {"single": load_dataset("double-mnist")}, "dataset"),
    ("mage", {"preset": of("mage", width=32)}, "width"),
    ("mage", {"preset": dataclasses.replace(TINY, first_pair=1, speeds=2)}, "first_pair, speeds"),
    ("mage", {"vqvae": "another"}, "vqvae"),
    ("mage", {"start": "given"}, "start"),
])
def test_a_checkpoint_of_another_recipe_is_refused_with_what_differs(single, whole, tmp_path, stage, change, named):
    started(tmp_path, single, whole, stage)
    before = (tmp_path / f"{stage}.pt").read_bytes()
    if "vqvae" in change:
        change = {"vqvae": VQVAE(whole.vqvae.config)}
    if "start" in change:
        change = {"start": SimpleNamespace(mage=whole.mage, dataset=single)}
    with pytest.raises(ValueError, match=rf"^{stage}\.pt in {tmp_path.name} was trained with another recipe \({named} "
                                         r"differ\): choose another folder with --run, or delete this one"):
        started(**{"folder": tmp_path, "single": single, "whole": whole, "stage": stage} | change)
    assert (tmp_path / f"{stage}.pt").read_bytes() == before


class Unsafe:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


@pytest.mark.parametrize("damage", ["empty", "text", "half", "flipped", "list", "other names", "code"])
def test_a_damaged_or_foreign_checkpoint_is_named_with_the_remedy(single, whole, tmp_path, capfd, damage):
    path = tmp_path / "vqvae.pt"
    sound = (whole.folder / "vqvae.pt").read_bytes()
    middle = len(sound) // 2
    content = {"empty": b"", "text": b"not a checkpoint", "half": sound[:middle],
               "flipped": sound[:middle] + bytes([sound[middle] ^ 255]) + sound[middle + 1:]}.get(damage)
    if content is not None:
        path.write_bytes(content)
    else:
        torch.save({"list": [1, 2], "other names": {"state_dict": {}}, "code": {"recipe": Unsafe()}}[damage], path)
    with pytest.raises(ValueError, match=rf"^vqvae\.pt in {tmp_path.name} is not a checkpoint that can be read"
                                         r"(?s:.*)delete it to train from nothing"):
        started(tmp_path, single, whole, "vqvae")
    assert "ran" not in capfd.readouterr().out


# ---------------------------------------------------------------- the loop

def line_stage(steps=10, batch=4, **changes):
    """The smallest stage: one number that is to become 3."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    def step(number):
        return (model(torch.ones(1, 1)) - 3).square().mean(), {"shown": float(number)}

    return Stage(**{"name": "line", "unit": "samples", "budget": steps * batch, "batch": batch,
                    "parts": {"line": model}, "optimisers": optimisers(model, 0.1), "step": step, "after": None,
                    "watch": lambda: {"psnr": 12.5}, "watch_every": 2 * batch, "seed": 0, "recipe": {"a": 1}} | changes)


def test_parts_go_on_learning_after_they_were_looked_at(tmp_path):
    plain, modes = line_stage(steps=9), []
    model = plain.parts["line"]

    def step(number):
        modes.append(model.training)
        return plain.step(number)

    assert fit(dataclasses.replace(plain, step=step, watch=lambda: model.eval() and {}), tmp_path, progress=False)
    assert len(read_curve(tmp_path / "line.jsonl")) > 3 and modes == [True] * 9


def test_the_loss_of_a_curve_is_the_mean_of_the_last_two_hundred_steps(tmp_path):
    plain, losses = line_stage(steps=300, watch_every=100 * 4), []

    def step(number):
        loss, shown = plain.step(number)
        losses.append(loss.item())
        return loss, shown

    assert fit(dataclasses.replace(plain, step=step), tmp_path, progress=False)
    told = [(line["step"], line["loss"]) for line in read_curve(tmp_path / "line.jsonl")]
    assert [number for number, _ in told] == [100, 200, 300]
    for number, loss in told:
        assert loss == pytest.approx(np.mean(losses[max(0, number - 200):number]), rel=1e-6)


def test_gradients_apart_are_clipped_by_themselves(tmp_path):
    for apart, moved in (([], 1e-3), (["bias"], 1.0)):
        model = nn.Linear(1, 1)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        stage = line_stage(steps=1, batch=1, parts={"line": model}, watch=None,
                           apart=[model.get_parameter(name) for name in apart],
                           step=lambda number: (1000 * model.weight.sum() + 1.0 * model.bias.sum(), {}),
                           optimisers=[torch.optim.SGD([{"params": list(model.parameters()), "base": 1.0}], lr=1.0)])
        assert fit(stage, tmp_path / str(len(apart)), progress=False)
        torch.testing.assert_close(model.weight.item(), -1.0, atol=1e-4, rtol=0)
        torch.testing.assert_close(model.bias.item(), -moved, atol=1e-4, rtol=0)


def test_a_checkpoint_whose_parameters_come_in_another_order_is_told(tmp_path):
    def stage(order):
        model = nn.ModuleDict({name: nn.Linear(1, size) for name, size in order})
        return line_stage(parts={"line": model}, optimisers=optimisers(model, 0.1),
                          step=lambda number: (sum(p.square().sum() for p in model.parameters()), {}))

    assert fit(stage([("a", 1), ("b", 2)]), tmp_path, progress=False)
    assert fit(stage([("a", 1), ("b", 2)]), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"line\.pt .*another version of this code.*--run"):
        fit(stage([("b", 2), ("a", 1)]), tmp_path, progress=False)


@pytest.mark.parametrize("other", [{"parts": {"line": nn.Linear(1, 2)}}, {"parts": {"lines": nn.Linear(1, 1)}}])
def test_a_checkpoint_of_other_parameters_is_told(tmp_path, other):
    assert fit(line_stage(), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"line\.pt .*another version of this code.*--run"):
        fit(line_stage(**other), tmp_path, progress=False)


def test_the_curve_has_a_line_for_each_look_and_what_was_shown(tmp_path):
    stage = line_stage(steps=7)
    assert fit(stage, tmp_path, progress=False)
    curve = read_curve(tmp_path / "line.jsonl")
    assert [line["step"] for line in curve] == [2, 4, 6, 7] and [line["samples"] for line in curve] == [8, 16, 24, 28]
    assert all(line["psnr"] == 12.5 and line["seconds"] >= 0 for line in curve)
    assert [line["shown"] for line in curve] == [1.0, 3.0, 5.0, 6.0]
    losses = torch.load(tmp_path / "line.pt", weights_only=True)["recent"]
    assert [line["loss"] for line in curve] == pytest.approx([np.mean(losses[:step]) for step in (2, 4, 6, 7)])
    assert losses[0] == pytest.approx(9.0) and losses[-1] < losses[0]
    assert read_curve(tmp_path / "nothing.jsonl") == []


def test_a_curve_that_a_kill_left_ahead_of_its_checkpoint_is_cut_back(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "time", Clock())
    assert not fit(line_stage(), tmp_path, until=6, progress=False)
    step = torch.load(tmp_path / "line.pt", weights_only=True)["step"]
    log = tmp_path / "line.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": step + 1, "loss": -1.0}) + "\n")
    assert fit(line_stage(), tmp_path, progress=False)
    lines = [line["step"] for line in read_curve(log)]
    assert lines == [2, 4, 6, 8, 10] and min(line["loss"] for line in read_curve(log)) >= 0


def test_a_budget_counts_samples_and_the_last_batch_may_go_over(tmp_path):
    assert line_stage(budget=41).steps == 11 and line_stage(budget=40).steps == 10 and line_stage(budget=1).steps == 1
    assert fit(line_stage(budget=41), tmp_path, progress=False)
    assert torch.load(tmp_path / "line.pt", weights_only=True)["step"] == 11


def test_the_bar_shows_loss_psnr_and_samples(tmp_path, capfd):
    fit(line_stage(steps=40), tmp_path)
    shown = capfd.readouterr().err
    assert all(part in shown for part in ("line", "160/160", "loss=", "psnr=12.50", "samples/s"))
    fit(line_stage(steps=40), tmp_path, progress=False)
    assert not capfd.readouterr().err


def test_randomness_is_a_function_of_seed_stage_and_step(tmp_path):
    def drawn(**changes):
        numbers = []
        stage = line_stage(steps=3, **changes)
        inner = stage.step
        stage.step = lambda number: (numbers.append(torch.rand(()).item()), inner(number))[1]
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        torch.manual_seed(len(folder.name))
        fit(stage, folder, progress=False)
        return numbers

    first = drawn()
    assert len(set(first)) == 3 and first == drawn()
    assert not set(first) & set(drawn(seed=1)) and not set(first) & set(drawn(name="other"))


@given(st.integers(1, 100_000), st.data())
def test_the_schedule_rises_shortly_then_falls_to_its_floor(steps, data):
    step = data.draw(st.integers(0, steps - 1))
    warm = min(100, max(1, steps // 10))
    rate, later = schedule(step, steps), schedule(step + 1, steps)
    assert 0 < rate <= 1
    if step >= warm:
        assert 0.02 <= later <= rate
    elif steps > 1000 and step < warm - 1:   # from the top of the rise on it falls
        assert later > rate
    assert schedule(steps, steps) == pytest.approx(0.02)


def test_each_step_has_the_rate_of_a_short_rise_and_a_cosine(tmp_path):
    plain, rates = line_stage(steps=40), []
    groups = [group for optimiser in plain.optimisers for group in optimiser.param_groups]

    def step(number):
        rates.append([group["lr"] / 0.1 for group in groups])
        return plain.step(number)

    assert fit(dataclasses.replace(plain, step=step), tmp_path, progress=False)
    steps = np.arange(40)
    cosine = 0.02 + 0.98 * (1 + np.cos(np.pi * steps / 40)) / 2
    np.testing.assert_allclose(rates, (np.minimum(1, (steps + 1) / 4) * cosine)[:, None])
    assert groups[0]["betas"] == (0.9, 0.98)   # as the released code has it


@pytest.mark.parametrize("muon", [0.0, 3.0])
def test_every_parameter_has_one_optimiser_and_muon_gets_the_inner_matrices(whole, muon):
    mage = whole.mage
    made = optimisers(mage, 0.01, muon=muon, weight_decay=0.05)
    groups = [group for optimiser in made for group in optimiser.param_groups]
    owned = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(owned) == sorted(id(parameter) for parameter in mage.parameters())
    names = {id(parameter): name for name, parameter in mage.named_parameters()}
    assert [type(optimiser).__name__ for optimiser in made] == ["AdamW", "Muon"][:1 + bool(muon)]
    assert [group["base"] for group in groups] == [0.01, 0.03][:len(made)]
    assert [group["weight_decay"] for group in groups] == ([0.0, 0.05] if muon else [0.05])
    if muon:
        assert {"generator.anchor_in.weight", "generator.frames_in.weight"} <= {
            names[id(parameter)] for parameter in made[1].param_groups[0]["params"]}
        inner = {names[id(parameter)] for parameter in made[1].param_groups[0]["params"]}
        assert all(dict(mage.named_parameters())[name].ndim == 2 for name in inner)
        assert "generator.layers.0.qkv.weight" in inner and "generator.frames_in.weight" in inner
        assert not inner & {"visual_tokens.embedding", "generator.logits.weight", "text_encoder.words"}


# ---------------------------------------------------------------- the first stage learns

@pytest.fixture(scope="module")
def images(single):
    """Held-out frames."""
    return FrameSource.held_out(single, 256, 0).batch(1, 256)


def cheap_look(vqvae, images):
    """What takes the place of looking at 256 frames every step."""
    return {"psnr": vqvae.codebook.square().mean().item()}


def whole_loss(vqvae, recipe, images):
    with torch.no_grad():
        out = vqvae.eval()(images)
    return (recipe.reconstruction * out.reconstruction_loss + recipe.commitment * out.commitment_loss).item()


def test_smoke_training_lowers_the_loss_and_most_codes_are_used(single, smoke, images, tmp_path):
    before, _ = train_vqvae(SMOKE, single, tmp_path, until=-1.0, progress=False)
    vqvae, last = smoke.trained.vqvae, read_curve(smoke.folder / "vqvae.jsonl")[-1]
    start, end = (whole_loss(model, SMOKE.vqvae, images) for model in (before, vqvae))
    assert end < start
    found = vqvae_quality(vqvae, images)
    assert found["codes"] >= 0.8 * SMOKE.vqvae.codebook_size, "a collapsed codebook"
    assert found["psnr"] > vqvae_quality(before, images)["psnr"] and abs(found["psnr"] - last["psnr"]) < 2


def test_in_the_last_share_of_images_the_decoder_trains_alone_on_codes_laid_anew(single, tmp_path, monkeypatch):
    seen, laid = [], []

    def look(vqvae, images):
        seen.append({name: tensor.clone() for name, tensor in vqvae.state_dict().items()})
        return {}

    lay_codes = VQVAE.lay_codes
    monkeypatch.setattr(VQVAE, "lay_codes", lambda self, *given: (lay_codes(self, *given), laid.append(len(seen)))[0])
    monkeypatch.setattr(training, "vqvae_quality", look)
    train_vqvae(TINY, single, tmp_path, progress=False)   # ten steps, the last four with the decoder alone
    assert len(seen) == 10 and laid == [6]
    for name, still_from in (("encoder.project.weight", 6), ("codebook", 7), ("decoder.project.weight", 10)):
        changes = [not torch.equal(one[name], other[name]) for one, other in zip(seen, seen[1:])]
        assert changes == [step < still_from for step in range(1, 10)], name


@pytest.mark.parametrize("shape", ["patch", "released"])
def test_after_warm_images_codes_are_laid_and_nothing_else_changes(single, tmp_path, monkeypatch, shape):
    recipe = dataclasses.replace(WARM.vqvae, shape=shape, images=64, batch=16, warm_images=32, codebook_size=32)
    changed_then, lay_codes = [], VQVAE.lay_codes

    def laying(vqvae, *given):
        before = {name: tensor.clone() for name, tensor in vqvae.state_dict().items()}
        lay_codes(vqvae, *given)
        changed_then.append([name for name, now in vqvae.state_dict().items() if not torch.equal(now, before[name])])

    monkeypatch.setattr(VQVAE, "lay_codes", laying)
    monkeypatch.setattr(training, "vqvae_quality", cheap_look)
    train_vqvae(dataclasses.replace(WARM, vqvae=recipe), single, tmp_path, progress=False)
    assert changed_then == [["codebook"]]


def test_the_released_encoder_is_as_it_was_while_the_decoder_learns_alone(single, tmp_path, monkeypatch):
    recipe = dataclasses.replace(WARM.vqvae, images=64, batch=16, warm_images=16, codebook_size=32, decoder_alone=0.5)
    seen, lay_codes = [], VQVAE.lay_codes
    monkeypatch.setattr(VQVAE, "lay_codes", lambda self, *given: (
        lay_codes(self, *given), seen.append({name: tensor.clone() for name, tensor in self.state_dict().items()})))
    monkeypatch.setattr(training, "vqvae_quality", cheap_look)
    made, _ = train_vqvae(dataclasses.replace(WARM, vqvae=recipe), single, tmp_path, progress=False)
    moved = [name for name, then in seen[-1].items() if not torch.equal(made.state_dict()[name], then)]
    assert len(seen) == 2 and moved and all(name.startswith("decoder.") for name in moved), moved


@pytest.mark.parametrize("laying", ["initialise", "lay_codes"])
def test_large_images_go_through_the_released_encoder_a_few_at_a_time(laying):
    vqvae, sizes = VQVAE(VQVAEConfig(channels=3, width=4, codebook_size=8, down=8)), []
    vqvae.encoder.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    images = torch.rand(130, 3, 16, 16)
    getattr(vqvae, laying)(images if laying == "initialise" else images.split(64))
    assert sizes == [64, 64, 2]
    assert vqvae.encoder.training


def test_the_released_shape_learns_too_and_its_codebook_does_not_collapse(single, images, tmp_path, monkeypatch):
    recipe = dataclasses.replace(WARM.vqvae, images=400, codebook_size=32, warm_images=160, learning_rate=4e-3)
    monkeypatch.setattr(training, "vqvae_quality", cheap_look)
    vqvae, done = train_vqvae(dataclasses.replace(WARM, vqvae=recipe), single, tmp_path, progress=False)
    losses = torch.load(tmp_path / "vqvae.pt", weights_only=True)["recent"]
    assert done and np.mean(losses[15:20]) < 0.6 * np.mean(losses[:3]), "before there are codes"
    found = vqvae_quality(vqvae, images)
    assert found["psnr"] > 16 and found["codes"] >= 16


def test_still_regions_have_still_tokens_after_smoke_training(single, smoke):
    found = token_stillness(smoke.trained.vqvae, single, count=20)
    assert found["changed_where_still"] < 0.01 and 0.05 < found["changed"] < 0.3 and found["codes"] > 30
    others = metrics.evaluation_batch(single, "test", range(20), 3).truth
    moved = nn.functional.max_pool2d((others[:, 1:] != others[:, :-1]).float().flatten(0, 1), 4).mean()
    assert token_stillness(smoke.trained.vqvae, single, count=20, seed=3)["moved"] == pytest.approx(moved.item())


@pytest.mark.parametrize("crop", [None, 20, 44, 64])
def test_frames_are_a_function_of_seed_and_step_and_crops_lie_on_the_token_grid(single, crop):
    source = FrameSource(single, 6, seed=3)
    images = source.batch(5, 9, crop, 4)
    assert torch.equal(images, FrameSource(single, 6, seed=3).batch(5, 9, crop, 4))
    assert not torch.equal(images, source.batch(6, 9, crop, 4))
    assert not torch.equal(images, FrameSource(single, 6, seed=4).batch(5, 9, crop, 4))
    frames = source.batch(5, 9)
    videos = torch.cat([training.to_images(single.video(single.spec("train", index))) for index in range(6)])
    side = min(crop or 64, 64)
    assert images.shape == (9, 1, side, side)
    for image, frame in zip(images, frames):
        assert (videos == frame).flatten(1).all(1).any(), "a frame of one of the pairs"
        tops = range(0, 64 - side + 1, 4)
        places = [(top, left) for top in tops for left in tops
                  if torch.equal(image, frame[:, top:top + side, left:left + side])]
        assert places and image.max() > 0.02, "on the grid, with something of the digit in it"


# ---------------------------------------------------------------- still tokens, counted

class Patches(nn.Module):
    """A token is the sum of its patch; with `reach`, of the patches around it as well."""

    def __init__(self, reach=0):
        super().__init__()
        self.config, self.reach = SimpleNamespace(down=4, tokens=60_000), reach
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, images):
        sums = nn.functional.avg_pool2d(images.sum(1, keepdim=True).float(), 4) * 16 * 255
        window = 2 * self.reach + 1
        around = nn.functional.avg_pool2d(sums, window, 1, self.reach) * window ** 2
        return around[:, 0].round().long() % 60_000

    def count_codes(self, token_ids):
        return token_ids.flatten().bincount()[None]


def stillness(monkeypatch, truth, reach=0):
    monkeypatch.setattr(training.metrics, "evaluation_batch", lambda *args: SimpleNamespace(truth=truth))
    return token_stillness(Patches(reach), None, count=1)


def test_a_video_that_stands_still_has_still_tokens(monkeypatch):
    picture = torch.randint(256, (2, 1, 1, 64, 64)) / 255
    assert stillness(monkeypatch, picture.expand(2, 10, 1, 64, 64)) == {
        "changed_where_still": 0.0, "changed": 0.0, "moved": 0.0,
        "codes": float(len(Patches().encode(picture[:, 0]).unique()))}


def test_tokens_that_change_are_counted_exactly(monkeypatch):
    truth = torch.zeros(2, 3, 1, 64, 64)
    truth[0, 1:, 0, 21, 33] = 1.0   # one pixel of one patch, from frame 2 on
    truth[1, 2, 0, 40:48, 8:12] = 0.5   # two patches in frame 3
    total, moved = 2 * 2 * 16 * 16, 3
    exact = stillness(monkeypatch, truth)
    assert exact == {"changed_where_still": 0.0, "changed": pytest.approx(moved / total),
                     "moved": pytest.approx(moved / total), "codes": 3.0}
    # tokens that look one patch around change in 3 x 3 places for the first, in 4 x 3 for the two
    leaky = stillness(monkeypatch, truth, reach=1)
    assert leaky["changed"] == pytest.approx(21 / total) and leaky["moved"] == exact["moved"]
    assert leaky["changed_where_still"] == pytest.approx((21 - 3) / (total - 3))


# ---------------------------------------------------------------- batches of the second stage

HIDDEN = 60_000
pretend = SimpleNamespace(config=SimpleNamespace(hidden_id=HIDDEN, longest=0))   # all that a batch asks of a model


@pytest.fixture(scope="module")
def numbered():
    """Made-up tokens of ten videos, each 100 x its video's number + its frame's: what comes out can be traced."""
    lengths = np.array([20, 20, 13, 20, 9, 20, 17, 20, 20, 11])
    tokens = 100 * np.arange(10)[:, None] + np.minimum(np.arange(20), lengths[:, None] - 1)
    tokens = np.broadcast_to(tokens[..., None, None], (10, 20, 4, 4)).astype(np.uint16)
    text = text_ids([f"the digit {digit} is moving up then down ." for digit in range(10)], "single-mnist")
    return Clips(TokenClips(tokens, lengths, text, (1.0, 2.0), 10))


def dice(seed):
    return torch.Generator().manual_seed(seed)


def recipe(**changes):
    """A recipe that takes clips as they are, but for some changes."""
    plain = {"batch": 3, "later_frames": None, "hide_all": 0.0, "hide_some": 0.0, "own_frames": 0.0, "balanced": False,
             "advection": 0, "more_anchors": 0}
    return dataclasses.replace(TINY.mage, **plain | changes)


def assert_same_batch(one, other):
    assert one.keys() == other.keys()
    for name in one:
        parts = [batch[name] if isinstance(batch[name], tuple) else (batch[name],) for batch in (one, other)]
        for ours, theirs in zip(*parts, strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs)


ALL = {"later_frames": 3, "hide_all": 0.3, "hide_some": 0.4, "balanced": True, "advection": 36, "more_anchors": 6}


def test_a_batch_is_a_function_of_seed_and_step(numbered):
    before = torch.get_rng_state()
    steps = [7, 0, 31, 7]
    batches = [training_batch(numbered, pretend, recipe(**ALL), 5, step) for step in steps]
    torch.rand(3)
    np.random.rand(3)
    for step, batch in zip(steps, batches):
        assert_same_batch(batch, training_batch(numbered, pretend, recipe(**ALL), 5, step))
    torch.set_rng_state(before)
    for other in ((5, 8), (6, 7)):
        batch = training_batch(numbered, pretend, recipe(**ALL), *other)
        assert not torch.equal(batch["speed"], batches[0]["speed"])
        assert not torch.equal(batch["dice"], batches[0]["dice"])
    some = recipe(hide_some=1.0)   # of every clip: where, is a function of both as well
    hidden = [training_batch(numbered, pretend, some, *which)["token_ids"] == HIDDEN
              for which in ((5, 7), (5, 8), (6, 7))]
    assert all(0 < where.float().mean() < 1 for where in hidden)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(hidden, 2))


def test_every_pair_comes_once_an_epoch_in_a_new_order_and_at_a_new_speed(numbered):
    batches = [training_batch(numbered, pretend, recipe(), 0, step) for step in range(10)]   # three epochs, by threes
    clips = torch.cat([batch["token_ids"] for batch in batches])
    samples = (clips[:, 0, 0, 0] // 100).tolist()
    epochs = [samples[start:start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    first = torch.cat([training_batch(numbered, pretend, recipe(), 1, step)["token_ids"] for step in range(4)])
    assert (first[:10, 0, 0, 0] // 100).tolist() != epochs[0], "another seed, another order"
    speeds, text = (torch.cat([batch[name] for batch in batches]) for name in ("speed", "text_ids"))
    assert len(speeds.unique()) == 30 and 0 < speeds.min() < 0.2 and 0.8 < speeds.max() < 1
    for clip, sample, speed, words in zip(clips, samples, speeds.tolist(), text):
        frames = frame_indices(numbered.source.lengths[sample], speed, numbered.source.interval)
        assert (clip[:, 0, 0] - 100 * sample).tolist() == frames.tolist()
        assert torch.equal(words, numbered.text_ids[sample])
    for batch in batches:
        assert torch.equal(batch["token_ids"], batch["target_ids"]) and batch["frames"] is batch["predict"] is None


def test_clips_whose_displacements_alone_are_learned_are_whole_and_shared_evenly(numbered):
    class Second(Alone):
        index, count = 1, 2

    wanted = recipe(batch=2, advection=36, more_anchors=6)
    asking, seen = SimpleNamespace(config=SimpleNamespace(hidden_id=HIDDEN, longest=20)), []
    for step in range(20):
        batch = training_batch(numbered, pretend, wanted, 0, step)
        ids, text, speed = batch["more"]
        assert len(ids) == len(text) == len(speed) == 6 and batch["dice"].shape == (8, 9, 4, 4)
        for clip, words, eta in zip(ids, text, speed.tolist()):
            sample = int(clip[0, 0, 0]) // 100
            frames = frame_indices(numbered.source.lengths[sample], eta, numbered.source.interval)
            assert (clip[:, 0, 0] - 100 * sample).tolist() == frames.tolist()
            assert torch.equal(words, numbered.text_ids[sample])
            seen.append(sample)
        half = training_batch(numbered, pretend, wanted, 0, step, team=Second())
        assert_same_batch({"more": half["more"], "dice": half["dice"]}, {
            "more": (ids[3:], text[3:], speed[3:]), "dice": batch["dice"][[1, 5, 6, 7]]})
        assert batch["lengths"] is None
        timed, later = (training_batch(numbered, asking, wanted, 0, step, team=team) for team in (Alone(), Second()))
        samples = torch.cat([clips[:, 0, 0, 0] // 100 for clips in (timed["token_ids"], timed["more"][0])]).numpy()
        assert np.array_equal(timed["lengths"], numbered.source.lengths[samples])
        assert torch.equal(later["lengths"], timed["lengths"][[1, 5, 6, 7]])
        plain = training_batch(numbered, pretend, recipe(batch=2), 0, step)
        assert plain["more"] is plain["dice"] is None and torch.equal(plain["token_ids"], batch["token_ids"])
    assert set(seen) == set(range(10))
    assert training_batch(numbered, pretend, recipe(advection=36), 0, 0)["dice"].shape == (3, 9, 4, 4)


@pytest.mark.parametrize("later", [0, 1, 3, 7, 8, 20])
def test_later_frames_are_drawn_anew_and_the_first_is_always_there(numbered, later):
    drawn = [training_batch(numbered, pretend, recipe(later_frames=later), 0, step)["frames"] for step in range(80)]
    if later >= 8:   # all of the nine input frames
        assert drawn == [None] * 80
        return
    for frames in drawn:
        assert frames.shape == (1 + later,) and frames[0] == 0 and (frames.diff() > 0).all() and frames[-1] <= 8
    assert later == 0 or len(set(map(tuple, (frames.tolist() for frames in drawn)))) > 3
    assert later == 0 or set(torch.cat(drawn).tolist()) == set(range(9))


@settings(max_examples=30)
@given(st.integers(0, 2 ** 32), st.floats(0, 1), st.floats(0, 1))
def test_corrupted_clips_keep_the_first_frame_and_hide_the_rest_whole_or_in_part(seed, hide_all, hide_some):
    hide_some *= 1 - hide_all
    ids = torch.arange(6 * 10 * 16).view(6, 10, 4, 4)
    given = corrupted(ids, pretend, recipe(hide_all=hide_all, hide_some=hide_some), dice(seed))
    assert torch.equal(ids, torch.arange(6 * 10 * 16).view(6, 10, 4, 4)) and given.data_ptr() != ids.data_ptr()
    assert torch.equal(given[:, 0], ids[:, 0])
    assert ((given == ids) | (given == HIDDEN)).all()
    if hide_all == hide_some == 0:
        assert torch.equal(given, ids)


@pytest.mark.parametrize("fields, whole_share, part_share", [
    ({"hide_all": 1.0}, 1, 0), ({"hide_some": 1.0}, 0, 1), ({"hide_all": 0.3, "hide_some": 0.5}, 0.3, 0.5), ({}, 0, 0)])
def test_the_shares_of_clips_that_are_hidden_are_the_recipes(fields, whole_share, part_share):
    ids = torch.ones(1000, 10, 4, 4, dtype=torch.long)
    hidden = corrupted(ids, pretend, recipe(**fields), dice(0))[:, 1:].flatten(1) == HIDDEN
    entirely, untouched = hidden.all(1), ~hidden.any(1)
    assert abs(entirely.float().mean() - whole_share) < 0.05
    assert abs((~entirely & ~untouched).float().mean() - part_share) < 0.05
    if part_share:   # from nothing to half of a clip's tokens, a quarter on average
        shares = hidden[~entirely & ~untouched].float().mean(1)
        assert shares.max() < 0.65 and abs(shares.mean() - 0.25) < 0.03


@settings(max_examples=30)
@given(st.integers(0, 2 ** 32), st.floats(0.01, 0.9), st.booleans())
def test_balanced_targets_are_all_that_changed_and_as_many_of_the_others(seed, share, some):
    draw = np.random.default_rng(seed)
    ids = torch.zeros(4, 10, 16, 16, dtype=torch.long)
    ids[:, 1:] = torch.from_numpy(draw.random((4, 9, 16, 16)) < share).long()
    frames = torch.tensor([0, 2, 7]) if some else None
    predict = balanced(ids, frames, dice(seed))
    targets = ids[:, 1:] if frames is None else ids[:, frames + 1]
    assert predict.shape == targets.shape and predict.dtype == torch.bool
    changed = targets != 0
    assert predict[changed].all()
    expected = min(changed.sum().item(), (~changed).sum().item())
    assert abs((predict & ~changed).sum().item() - expected) <= 5 * math.sqrt(expected) + 1


def test_balanced_targets_where_nothing_or_everything_changed():
    still = torch.ones(2, 10, 4, 4, dtype=torch.long)
    assert balanced(still, None, dice(0)).all(), "a loss over nothing would not be a number"
    still[:, 1:] = 2
    assert balanced(still, torch.tensor([0, 3]), dice(0)).all()


# ---------------------------------------------------------------- the model's own guesses

@pytest.fixture(scope="module")
def clips(single, whole):
    tokens = token_clips(single, whole.vqvae, "train", 12, vqvae_key="of the tests", progress=False)
    return Clips(tokens), tokens.batch([0, 1, 2], [0.2, 0.5, 0.8])


@pytest.fixture
def fp32(monkeypatch):
    """Without bf16: guesses are compared with a pass of another shape."""
    monkeypatch.setattr(batches, "autocast", lambda device: torch.autocast("cpu", enabled=False))


def test_guesses_are_the_arg_max_of_a_direct_pass_from_the_first_frame(fp32, clips, whole):
    (ids, text, speed), mage = clips[1], whole.mage.eval()
    hidden = torch.cat([ids[:, :1], torch.full_like(ids[:, 1:], mage.config.hidden_id)], 1)
    given = guessed(ids, text, speed, mage, None)
    with torch.no_grad():
        direct = mage(hidden, text, speed, target_ids=ids).logits.argmax(-1)
    assert torch.equal(given[:, 0], ids[:, 0]) and torch.equal(given[:, 1:9], direct[:, :8])
    assert (given[:, 9] == mage.config.hidden_id).all(), "the last frame is never an input"
    assert not torch.equal(given[:, 1:9], ids[:, 1:9])


@pytest.mark.parametrize("frames", [[0, 1], [0, 4], [0, 1, 2, 5], [0, 3, 8], [0]])
def test_guesses_hide_the_frames_that_were_not_asked_for(fp32, clips, whole, frames):
    (ids, text, speed), mage = clips[1], whole.mage.eval()
    given = guessed(ids, text, speed, mage, np.array(frames))
    others = [frame for frame in range(1, 10) if frame not in frames]
    assert torch.equal(given[:, 0], ids[:, 0]) and (given[:, others] == mage.config.hidden_id).all()
    if frames == [0]:
        return
    hidden = torch.cat([ids[:, :1], torch.full_like(ids[:, 1:], mage.config.hidden_id)], 1)
    sources = sorted({0, *(frame - 1 for frame in frames[1:])})
    with torch.no_grad():
        direct = mage(hidden, text, speed, target_ids=ids, frames=torch.tensor(sources)).logits.argmax(-1)
    for frame in frames[1:]:
        assert torch.equal(given[:, frame], direct[:, sources.index(frame - 1)])
    assert len(guessed(ids[:0], text[:0], speed[:0], mage, None)) == 0


def test_own_frames_take_the_place_of_some_inputs_and_of_no_target(fp32, clips, whole):
    tokens, mage = clips[0], whole.mage.eval()
    plain, own = recipe(batch=6, samples=60), recipe(batch=6, samples=60, own_frames=1.0)
    shares = []
    for step in range(10):
        before, batch = (training_batch(tokens, mage, which, 0, step) for which in (plain, own))
        assert torch.equal(batch["target_ids"], before["target_ids"])
        assert torch.equal(batch["target_ids"], before["token_ids"]), "the truth is untouched"
        assert torch.equal(batch["token_ids"][:, 0], batch["target_ids"][:, 0])
        shares.append((batch["token_ids"] != batch["target_ids"]).flatten(1).any(1).float().mean().item())
        guesses = guessed(before["token_ids"], before["text_ids"], before["speed"], mage, None)
        replaced = (batch["token_ids"] != batch["target_ids"]).flatten(1).any(1)
        assert torch.equal(batch["token_ids"][replaced], guesses[replaced])
    assert shares[0] == 0 and np.mean(shares[:5]) < np.mean(shares[5:]), "more of them the more the model knows"


def test_a_recipe_with_own_frames_alone_trains(single, whole, tmp_path):
    chosen = of("mage", hide_all=0.0, hide_some=0.0, own_frames=1.0, later_frames=None, balanced=False, samples=4)
    _, done = train_mage(chosen, single, whole.vqvae, tmp_path, progress=False)
    assert done


# ---------------------------------------------------------------- a run, and where models come from

def test_a_fingerprint_is_of_the_configuration_and_every_weight(whole):
    vqvae = whole.vqvae
    same = VQVAE(vqvae.config)
    same.load_state_dict(vqvae.state_dict())
    assert fingerprint(same) == fingerprint(vqvae) and len(fingerprint(vqvae)) == 16
    for parameter in same.parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 0.001
            assert fingerprint(same) != fingerprint(vqvae)
            parameter.copy_(before)
    other = VQVAE(dataclasses.replace(vqvae.config, commitment=0.5))
    other.load_state_dict(vqvae.state_dict())
    assert fingerprint(other) != fingerprint(vqvae)


@pytest.mark.parametrize("precision", ["half", "int8"])
def test_saved_weights_take_up_the_tokens_of_the_run_that_made_them(whole, tmp_path, precision):
    vqvae = VQVAE(whole.vqvae.config)
    vqvae.load_state_dict(whole.vqvae.state_dict())
    with torch.no_grad():   # what fp16 cannot hold
        for parameter in vqvae.parameters():
            parameter.mul_(1 + 1e-5)
    about = {"dataset": "single-mnist", "digit_set": "mnist-5k"}
    saved = weights.save(tmp_path / "half.safetensors", vqvae, whole.mage, about, precision=precision).vqvae
    assert fingerprint(saved) != fingerprint(vqvae) and token_key(saved) == token_key(vqvae)
    for name, parameter in saved.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 0.001
            assert (token_key(saved) == token_key(vqvae)) == name.startswith("decoder."), name
            parameter.copy_(before)


def test_a_run_stops_in_time_goes_on_and_ends_in_weights_with_a_card(single, tmp_path):
    assert training.train(single, SMALL, folder=tmp_path, minutes=-1, device="cpu", progress=False) is None
    assert not (tmp_path / "weights.safetensors").exists()
    trained = training.train(single, SMALL, folder=tmp_path, device="cpu", progress=False)
    again = weights.load(tmp_path / "weights.safetensors")
    assert_equal(dict(again.mage.state_dict()), dict(trained.mage.state_dict()))
    card = again.card
    told = {"dataset": "single-mnist", "digit_set": "mnist-5k", "preset": "small", "seed": 0}
    assert {name: card[name] for name in told} == told
    assert card["pairs"] == 5 and card["recipe"] == json.loads(json.dumps(dataclasses.asdict(SMALL)))
    assert set(card["seconds"]) == set(STAGES)
    rows = training.results(trained, 3, progress=False)
    assert [row.name for row in rows] == ["MAGE", "first frame repeated", "VQ-VAE reconstruction", "perfect predictor"]
    assert all(row.n == 3 and math.isfinite(row.scores.psnr_frames) for row in rows)
    repeated = metrics.evaluate(metrics.first_frame_repeated(), single, "test", 3, seed=7)
    others = training.results(trained, 3, seed=7, progress=False)[1]
    assert others.scores.psnr_frames == repeated.scores.psnr_frames != rows[1].scores.psnr_frames


def test_a_run_sees_the_pairs_from_its_first_on_each_at_its_own_speeds(single, whole, tmp_path, monkeypatch):
    asked = []

    def seen(*args, **options):
        asked.append((args[2:], options["first_pair"], options["speeds"]))
        return token_clips(*args, **options)

    monkeypatch.setattr(training, "token_clips", seen)
    train_mage(dataclasses.replace(SMALL, first_pair=3, speeds=2), single, whole.vqvae, tmp_path, progress=False)
    assert asked == [(("train", 5), 3, 2)]


@pytest.mark.parametrize("chosen, which", [
    (SMALL, range(5)), (dataclasses.replace(SMALL, first_pair=20_000), range(20_000, 20_005)),
    (dataclasses.replace(SMALL, pairs=None, first_pair=9_997), range(9_997, 10_000)),
    (changed(SMALL, ["pairs=None", "first_pair=7", "mage.samples=6", "mage.more_anchors=0"]), range(7, 13)),
], ids=["from the first", "beyond the paper's", "to the paper's last", "no more than it sees"])
def test_which_pairs_a_preset_trains_on(single, chosen, which):
    assert training.pairs_of(chosen, single) == which


@pytest.mark.parametrize("change, message", [
    ({"pairs": None, "first_pair": 10_000}, "first_pair is 10000 and pairs None: single-mnist, of 10,000 training"),
    ({"first_pair": -1}, "first_pair is -1"), ({"pairs": 0}, "and pairs 0: "),
    ({"speeds": 0}, "speeds is 0: each pair needs at least 1"),
])
def test_pairs_that_are_not_there_are_told_before_any_work(single, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        training.train(single, dataclasses.replace(SMALL, **change), folder=tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "vqvae.pt").exists()


def test_a_curve_that_cannot_be_read_is_named_with_its_remedy(tmp_path):
    (curve := tmp_path / "mage.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(ValueError, match=r"mage.jsonl in .* is not a curve that can be read .*delete it, and training"):
        read_curve(curve)
    curve.unlink()
    assert read_curve(curve) == []


@pytest.mark.parametrize("change, message", [
    ("precision=hlaf", "precision is 'hlaf': it must be one of full, half, int8"),
    ("compile=yes", "compile is 'yes': it must be one of auto, on"),
    ("test_clips=-3", "test_clips is -3: .*at least 1"),
    ("watch_clips=0", "watch_clips is 0"), ("mage.samples=0", "mage.samples is 0"), ("mage.batch=0", "mage.batch is 0"),
    ("mage.later_frames=-1", "mage.later_frames is -1"), ("vqvae.images=0", "vqvae.images is 0"),
    ("mage.width=100", "width is 100"), ("mage.dropout=1.5", "dropout is 1.5"), ("mage.axial_layers=4", "layers is 4"),
    ("vqvae.code_channels=0", "code_channels is 0")])
def test_what_no_training_can_do_is_told_before_any_work(tmp_path, change, message, capsys):
    with pytest.raises(SystemExit):
        training.main(["--preset", "smoke", "--run", str(tmp_path), "--set", change])
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "message"), [
    (["--test-clips", "0"], "0 samples of single-mnist's split 'test'"),
    (["--set", "first_pair=-1"], "of 10,000 training pairs counted from 0, has none there"),
    (["--new-tokens"], "new tokens are for weights to go on from, and none are given"),
    (["--dataset", "double-mnits"], "unknown dataset 'double-mnits'"), (["--start", "none"], "none"),
    (["--dataset", "mine", "--videos", "no-such-folder"], "no folder no-such-folder"),
    (["--dataset", "mine", "--videos", ".", "--captions", "ambiguous"], "mine has the captions of its folder's lists"),
    (["--dataset", "mine", "--videos", ".", "--digit-set", "mnist-70k"], "shows no digits of ours")])
def test_what_is_asked_for_wrongly_is_told_in_a_line_before_any_work(tmp_path, words, message, capsys):
    with pytest.raises(SystemExit):
        training.main(["--preset", "smoke", "--run", str(tmp_path), *words])
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert not list(tmp_path.iterdir())


def test_a_run_from_given_weights_keeps_their_vqvae_and_trains_their_mage_on(single, smoke, tmp_path):
    chosen = dataclasses.replace(SMOKE, mage=dataclasses.replace(SMOKE.mage, samples=8))
    more = training.train(single, chosen, folder=tmp_path, device="cpu", progress=False, start=smoke.trained)
    assert fingerprint(more.vqvae) == fingerprint(smoke.trained.vqvae) and not (tmp_path / "vqvae.pt").exists()
    start, end = smoke.trained.mage.state_dict(), more.mage.state_dict()
    moved = max((start[name] - end[name]).abs().max().item() for name in start)
    other = MAGE(more.mage.config).state_dict()
    fresh = max((start[name] - other[name]).abs().max().item() for name in start)
    assert 0 < moved < fresh


@pytest.mark.parametrize("only", ["advection", "generator"])
def test_one_part_alone_is_trained(single, smoke, tmp_path, only):
    chosen = changed(SMOKE, ["mage.samples=8", f"mage.only={only}", "precision=full"])
    more = training.train(single, chosen, folder=tmp_path, progress=False, start=smoke.trained)
    for name, tensor in smoke.trained.mage.named_parameters():
        if not name.startswith(only):
            assert torch.equal(more.mage.state_dict()[name], tensor), name
    assert not torch.equal(*(dict(trained.mage.named_parameters())[f"{only}.layers.0.weight" if only == "advection" else
                                                                   "generator.logits.weight"]
                             for trained in (more, smoke.trained)))


def test_no_statistic_of_a_part_that_does_not_learn_moves(tmp_path):
    """Of the U-Net, normalisation and the words' skill are buffers, which no optimiser sees."""
    double, found = load_dataset("double-mnist"), []
    for only in ("generator", "advection"):
        chosen = changed(PRESETS["smoke"], ["pairs=4", "watch_clips=1", "mage.samples=4", "mage.batch=2",
                                            "mage.width=16", "mage.masks=True", "mage.unet=8", f"mage.only={only}"])
        vqvae = VQVAE(presets.vqvae_config(chosen.vqvae, double)).eval()
        vqvae.initialise(FrameSource(double, 4, 0).batch(0, 64))
        mage, _ = train_mage(chosen, double, vqvae, tmp_path / only, progress=False)
        found.append(mage.advection.unet)
    resting, learning = found
    assert resting.steps == 0 < learning.steps
    assert not resting.down_2[1].running_mean.any() and learning.down_2[1].running_mean.any()


def test_a_first_stage_is_taken_as_it_is_and_the_second_trained_from_nothing(single, smoke, tmp_path):
    chosen = changed(PRESETS["smoke"], ["pairs=6", "watch_clips=1", "mage.samples=8", "mage.width=16"])
    made = training.train(single, chosen, first_stage=smoke.trained, folder=tmp_path, progress=False)
    assert not (tmp_path / "vqvae.pt").exists() and made.mage.config.width == 16
    assert torch.equal(made.vqvae.codebook, smoke.trained.vqvae.codebook)
    assert made.card["first_stage"]["sha256"] == smoke.trained.card["sha256"] and "start" not in made.card
    (tmp_path / "speed.json").write_text("")   # as a machine leaves it that stopped while it was written
    (tmp_path / "on").mkdir()
    (tmp_path / "on/speed.json").write_text("{")
    on = training.train(single, changed(chosen, ["first_pair=2", "pairs=3"]), start=made, folder=tmp_path / "on",
                        progress=False)
    assert on.card["start"]["first_stage"] == made.card["first_stage"] and "speed" not in on.card
    assert (on.card["first_pair"], on.card["pairs"], on.card["start"]["first_pair"]) == (2, 5, 0)
    with pytest.raises(ValueError, match="a first stage alone"):
        training.train(single, chosen, start=smoke.trained, first_stage=smoke.trained, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="64 x 64 pixels of 1 channels cannot be a start for cater-gen-v1"):
        training.train(load_dataset("cater-gen-v1"), chosen, first_stage=smoke.trained, folder=tmp_path, progress=False)


def test_weights_of_one_dataset_are_a_start_for_another(smoke, tmp_path):
    chosen = dataclasses.replace(SMOKE, mage=dataclasses.replace(SMOKE.mage, samples=4, learning_rate=1e-9))
    double = load_dataset("double-mnist")
    more = training.train(double, chosen, folder=tmp_path, device="cpu", progress=False, start=smoke.trained)
    start, end = (trained.mage.state_dict() for trained in (smoke.trained, more))
    longer = start["text_encoder.positions"].shape[0], end["text_encoder.positions"].shape[0]
    assert longer == (11, 20)   # the captions of two digits
    for name, tensor in start.items():
        assert torch.allclose(end[name][:len(tensor)] if tensor.ndim else end[name], tensor, atol=2e-3), name
    assert fingerprint(more.vqvae) == fingerprint(smoke.trained.vqvae)
    told = more.card["start"]
    assert told["dataset"] == "single-mnist" and told["sha256"] == smoke.trained.card["sha256"]


def test_weights_that_do_not_fit_are_refused_as_a_start_before_any_work(single, smoke, tmp_path):
    with pytest.raises(ValueError, match="64 x 64 pixels of 1 channels cannot be a start for cater-gen-v1"):
        training.train(load_dataset("cater-gen-v1"), SMOKE, folder=tmp_path, progress=False, start=smoke.trained)
    wider = dataclasses.replace(SMOKE, mage=dataclasses.replace(SMOKE.mage, width=64))
    with pytest.raises(ValueError, match=r"width 32 for 64"):
        training.train(single, wider, folder=tmp_path, progress=False, start=smoke.trained)
    assert not list(tmp_path.glob("*"))


def test_on_the_command_line_a_start_brings_its_sizes(smoke, tmp_path, capsys):
    start = tmp_path / "start.safetensors"
    weights.save(start, smoke.trained.vqvae, smoke.trained.mage, smoke.trained.card)
    training.main(["--preset", "quick", "--start", str(start), "--run", str(tmp_path / "run"), "--minutes", "0",
                   "--set", "pairs=8", "--set", "mage.samples=8"])
    out = capsys.readouterr().out
    sizes = smoke.trained.mage.config
    assert f"mage: width {sizes.width}, samples 8" in out and f"axial_layers {sizes.axial_layers}," in out
    assert "preset quick" in out and "time is up" in out


@pytest.fixture
def notebook(monkeypatch, tmp_path):
    """What a notebook finds: an empty cache, no shipped weights, and a preset that is quick."""
    monkeypatch.setenv("MAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "data_folder", lambda: tmp_path / "data")
    monkeypatch.setattr(training, "preset", lambda name, dataset_name: SMALL)
    return tmp_path


def test_ready_trains_once_reuses_it_and_trains_again_where_the_preset_changed(notebook, capsys, monkeypatch):
    first = training.ready("single-mnist", progress=False)
    assert "training single-mnist with the preset small: nothing was found" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", None)
        again = training.ready("single-mnist", progress=False)
    assert "reused the small run of single-mnist" in capsys.readouterr().out
    assert fingerprint(again.mage) == fingerprint(first.mage)
    (kept := next(notebook.rglob("weights.json"))).unlink()   # by a kill between the two files
    with monkeypatch.context() as patch:
        patch.setattr(training.shutil, "rmtree", None)   # the checkpoints are gone on with
        again = training.ready("single-mnist", progress=False)
    assert fingerprint(again.mage) == fingerprint(first.mage) and kept.exists()
    kept.with_suffix(".safetensors").write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        patch.setattr(training.shutil, "rmtree", None)
        again = training.ready("single-mnist", progress=False)
    assert fingerprint(again.mage) == fingerprint(first.mage)
    capsys.readouterr()
    monkeypatch.setattr(training, "preset", lambda name, dataset_name: dataclasses.replace(SMALL, pairs=4))
    other = training.ready("single-mnist", progress=False)
    assert "training single-mnist" in capsys.readouterr().out and fingerprint(other.mage) != fingerprint(first.mage)
    for file in next(notebook.rglob("weights.json")).parent.glob("weights.*"):   # as a run that was stopped before
        file.unlink()
    monkeypatch.setattr(training, "preset", lambda name, dataset_name: SMALL)
    assert fingerprint(training.ready("single-mnist", progress=False).mage) == fingerprint(first.mage)


def test_ready_takes_shipped_weights_only_where_no_preset_was_asked_for(notebook, capsys, monkeypatch, whole, single):
    about = {"dataset": "single-mnist", "digit_set": "mnist-5k", "preset": "long"}
    weights.save(notebook / "data" / "weights" / "single-mnist.safetensors", whole.vqvae, whole.mage, about)
    monkeypatch.delenv("MAGE_PRESET")
    monkeypatch.setattr(training, "train", lambda *args, **options: "trained now")
    assert training.ready("single-mnist").card["preset"] == "long"
    assert "the weights that ship for single-mnist" in capsys.readouterr().out
    assert training.ready("single-mnist", "smoke") == "trained now"
    assert training.ready("single-mnist", weights_name="train") == "trained now"
    with pytest.MonkeyPatch.context() as patch:   # other digits than those weights know
        patch.setattr(training, "load_dataset", lambda name, digit_set, **options: single)
        assert training.ready("single-mnist", digit_set="mnist-70k") == "trained now"
    assert training.ready("double-mnist") == "trained now"
    monkeypatch.setenv("MAGE_PRESET", " auto ")
    assert training.ready("single-mnist").card["preset"] == "long"
    monkeypatch.setenv("MAGE_PRESET", "smoke")
    assert training.ready("single-mnist") == "trained now"
    assert training.ready("single-mnist", weights_name="single-mnist").card["preset"] == "long"
    with pytest.raises(ValueError, match="are of single-mnist and the dataset is double-mnist"):
        training.ready("double-mnist", weights_name="single-mnist")
    with pytest.raises(ValueError, match="no weights are named 'mine': there are single-mnist"):
        training.ready(weights_name="mine")


def test_two_runs_in_one_folder_come_one_after_the_other(single, tmp_path, capsys):
    pytest.importorskip("fcntl")
    with alone_in(tmp_path):
        thread = threading.Thread(target=training.train, args=(single, SMALL),
                                  kwargs={"folder": tmp_path, "progress": False})
        thread.start()
        thread.join(1.0)
        assert thread.is_alive() and not any(tmp_path.iterdir())
    thread.join()
    assert (tmp_path / "weights.json").exists() and "waiting until that is done" in capsys.readouterr().out


def test_the_commit_is_this_projects_own(tmp_path, monkeypatch):
    def git(*words, where=tmp_path):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=where, check=True,
                       capture_output=True)

    monkeypatch.setattr(training, "data_folder", lambda: tmp_path / "data")
    assert training.commit() is None
    git("init")
    (tmp_path / "file").touch()
    git("add", ".")
    git("commit", "-m", "one")
    assert re.fullmatch("[0-9a-f]{12}", made := training.commit())
    (tmp_path / "file").write_text("changed")
    assert training.commit() == made + "+"
    (inside := tmp_path / "venv" / "site").mkdir(parents=True)
    monkeypatch.setattr(training, "data_folder", lambda: inside / "data")
    assert training.commit() is None, "another project's"


def test_the_command_line_stops_in_time_goes_on_and_prints_the_table(tmp_path, capsys):
    command = ["--preset", "smoke", "--run", str(tmp_path), "--test-clips", "3", "--set", "pairs=8"]
    command += [word for change in ("vqvae.images=32", "mage.samples=8", "watch_clips=2") for word in ("--set", change)]
    training.main([*command, "--minutes", "0"])
    out = capsys.readouterr().out
    assert out.startswith("machine: ") and "preset smoke" in out and "vqvae: " in out and "samples 8" in out
    assert "dataset single-mnist (mnist-5k), seed 0" in out and "time is up: the run is kept" in out
    training.main(command)
    out = capsys.readouterr().out
    assert "single-mnist, 3 held-out test pairs" in out and "motion accuracy" in out
    for name in ("MAGE", "first frame repeated", "VQ-VAE reconstruction"):
        assert f"| {name} |" in out
    card = json.loads((tmp_path / "weights.json").read_text())
    assert [row["name"] for row in card["results"]][:2] == ["MAGE", "first frame repeated"]
    with pytest.MonkeyPatch.context() as patch:   # whoever trains nothing is not who made the weights
        patch.setattr(training, "commit", lambda: "another")
        training.main(command)
    assert json.loads((tmp_path / "weights.json").read_text())["commit"] == card["commit"]
    capsys.readouterr()
    (tmp_path / "file").touch()
    for words, code, told in ((["--set", "mage.samples=12"], 1, r"another recipe .*samples differ.*--run"),
                              (["--run", str(tmp_path / "file")], 2, "--run is .*file, which is a file: name a folder"),
                              (["--digit-set", "mnist-70k"], 2, "mnist-70k")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr("mage_core.digits.data_folder", lambda: tmp_path)   # without the 70,000
            training.main([*command, *words])
        assert end.value.code == code and re.search(told, capsys.readouterr().err)


# ---------------------------------------------------------------- what the stages are made of

def test_before_its_first_step_mage_knows_the_codes_and_their_pixels(single, whole, tmp_path):
    made, done = train_mage(TINY, single, whole.vqvae, tmp_path, until=-1, progress=False)
    assert not done
    torch.manual_seed(training.seed_of(0, "mage start"))
    expected = MAGE(made.config)
    fresh = expected.visual_tokens.embedding.clone()
    expected.initialise_from_codes(whole.vqvae.codebook, training.seed_of(0, "codes"))
    expected.advection.pixels.copy_(whole.vqvae.code_pixels())
    assert not torch.equal(expected.visual_tokens.embedding, fresh)
    assert_equal(dict(made.state_dict()), dict(expected.state_dict()))


def test_what_is_watched_in_training_is_in_no_table_and_not_trained_on(single, whole, tmp_path, monkeypatch):
    asked, batch, held_out = [], training.metrics.evaluation_batch, FrameSource.held_out.__func__
    monkeypatch.setattr(training.metrics, "evaluation_batch", lambda *given: asked.append(given[1:]) or batch(*given))
    train_mage(TINY, single, whole.vqvae, tmp_path, until=-1, progress=False)
    split, indices = training.watched(single, TINY.watch_clips)
    assert asked == [(split, indices)] and split == "test" and min(indices) >= single.sizes["test"]
    sources = []
    monkeypatch.setattr(FrameSource, "held_out", classmethod(
        lambda cls, *given, **how: sources.append(held_out(cls, *given, **how)) or sources[-1]))
    train_vqvae(TINY, single, tmp_path, until=-1, progress=False)
    assert [(spec.split, spec.index >= single.sizes["test"]) for spec in sources[0].specs] == [("test", True)] * 256


def test_commitment_is_part_of_the_first_stages_loss(single, tmp_path):
    losses = []
    for commitment in (0.0, 10.0, 20.0):
        preset = of("vqvae", images=8, commitment=commitment, decoder_alone=0.0)
        train_vqvae(preset, single, tmp_path / str(commitment), progress=False)
        losses.append(kept(tmp_path / str(commitment), "vqvae")["recent"][0])
    assert losses[1] > losses[0] and losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-3)


def test_the_first_stages_loss_is_its_reconstructions_times_the_recipes_weight(single, tmp_path):
    losses = []
    for weight in (1.0, 3.0):
        preset = of("vqvae", images=8, reconstruction=weight, commitment=0.0, decoder_alone=0.0)
        train_vqvae(preset, single, tmp_path / str(weight), progress=False)
        losses.append(kept(tmp_path / str(weight), "vqvae")["recent"][0])
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-3) and losses[0] > 0


def test_the_rows_of_a_table_are_made_by_what_they_are_named_after(single, whole):
    trained = weights.Trained(whole.vqvae.eval(), whole.mage.eval(), single.about)
    rows = {row.name: row for row in training.results(trained, 3, progress=False)}
    for name, maker in (("MAGE", training.generator(whole.vqvae, whole.mage)),
                        ("first frame repeated", training.metrics.first_frame_repeated()),
                        ("VQ-VAE reconstruction", training.metrics.reconstruction(whole.vqvae)),
                        ("perfect predictor", training.metrics.perfect_predictor())):
        found = training.metrics.evaluate(maker, single, "test", 3)
        np.testing.assert_allclose(rows[name].scores.frame_psnr, found.scores.frame_psnr, atol=1e-3)
    assert len({row.scores.psnr_frames for row in rows.values()}) == 4
    others = training.results(trained, 3, seed=5, progress=False)
    expected = training.metrics.evaluate(training.metrics.first_frame_repeated(), single, "test", 3, seed=5)
    repeated, = (row.scores.frame_psnr for row in others if row.name == "first frame repeated")
    np.testing.assert_allclose(repeated, expected.scores.frame_psnr, atol=1e-3)
    assert np.abs(repeated - rows["first frame repeated"].scores.frame_psnr).min() > 1e-3, "those of another seed"


def test_a_card_tells_of_no_first_stage_that_the_run_did_not_take(single, whole, tmp_path):
    train_vqvae(SMALL, single, tmp_path, until=-1, progress=False)   # begun, and left
    (tmp_path / "vqvae.jsonl").write_text(json.dumps({"step": 1, "seconds": 99.0}) + "\n")
    given = weights.Trained(whole.vqvae, whole.mage, {**single.about, "preset": "tiny"})
    trained = training.train(single, SMALL, folder=tmp_path, first_stage=given, progress=False)
    assert list(trained.card["curves"]) == list(trained.card["seconds"]) == ["mage"]


def test_a_command_keeps_its_options_and_loses_its_folders():
    words = ["--run=runs/x", "--videos=my/clips", "--start", "a/b.safetensors", "--set", "pairs=5"]
    assert training.without_paths(words) == [
        "--run=x", "--videos=clips", "--start", "b.safetensors", "--set", "pairs=5"]


def test_minutes_in_which_a_gpu_cannot_begin_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        training.main(["--preset", "smoke", "--minutes", "1"])
    assert "--minutes is 1: on a GPU the second stage needs 75 seconds" in capsys.readouterr().err
