"""What training does on a GPU, done on a CPU: fixed shapes, seldom looks, resident data, compilation;
and without Jupyter."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mage_core import evaluation, loop, machine, training
from mage_core.axial import LayerNorm, sampled_frames, summed_product
from mage_core.batches import Clips, DeviceFrames, balanced, balanced_weights, training_batch
from mage_core.cater import CaterGen
from mage_core.clips import frame_indices, load_dataset, token_clips
from mage_core.evaluation import evaluate_all
from mage_core.mage import MAGE, VisualTokens
from mage_core.presets import PRESETS, changed, mage_config, vqvae_config
from mage_core.vqvae import VQVAE, Codebook

TINY = changed(PRESETS["smoke"], [
    "pairs=6", "test_clips=3", "watch_clips=2", "vqvae.images=64", "vqvae.codebook_size=16", "mage.samples=24",
    "mage.width=16", "mage.head_width=8", "mage.own_frames=1.0", "compile=off"])


@pytest.fixture(scope="module")
def single():
    return load_dataset("single-mnist")


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Training that believes that it must wait for its device."""
    monkeypatch.setattr(machine, "waits", lambda device: True)
    rate = machine.matmul_rate
    monkeypatch.setattr(machine, "matmul_rate", lambda device: rate(device, 64, 2))


@pytest.fixture(scope="module")
def model(single):
    torch.manual_seed(0)
    vqvae = VQVAE(vqvae_config(TINY.vqvae, single))
    tokens = token_clips(single, vqvae, "train", 6, vqvae_key="of the GPU's tests", progress=False)
    return MAGE(mage_config(TINY.mage, single, 16)), Clips(tokens)


# ---------------------------------------------------------------- a whole run

def test_a_run_as_on_a_gpu_ends_in_weights_and_tells_what_share_of_the_device_it_used(single, like_a_gpu, tmp_path,
                                                                                      monkeypatch, capsys):
    monkeypatch.setattr(training, "DEVICE_FRAMES", 50)
    monkeypatch.setattr(loop, "LOOK", 4)
    trained = training.train(single, TINY, folder=tmp_path, device="cpu", progress=False)
    speed = trained.card["speed"]
    assert speed["samples_per_second"] > 0 and speed["matmul_tflops"] > 0
    assert speed["share"] == pytest.approx(speed["tflops"] / speed["matmul_tflops"])
    config, positions = trained.mage.config, 10 * 256
    least = 6 * positions * 12 * config.width ** 2 * config.axial_layers  # the layers' matrices alone, forward and back
    assert least / 2 < 1e12 * speed["tflop_per_sample"] < 10 * least
    out = capsys.readouterr().out
    assert "samples/s" in out and "attention, a block forward and back: plain" in out and "fused" in out
    state = torch.load(tmp_path / "mage.pt", weights_only=True)
    assert state["step"] == 6 and len(state["recent"]) == 6 and all(map(math.isfinite, state["recent"]))


BLOCKED = """
import importlib.metadata
import sys

ABSENT = {"matplotlib", "imageio", "ipywidgets", "IPython", "jupyterlab", "papermill", "av"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"{name} is absent", name=name)

def from_name(name, real=importlib.metadata.Distribution.from_name):   # where torchmetrics asks what there is
    if name in ABSENT:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)

sys.meta_path.insert(0, Absent())
importlib.metadata.Distribution.from_name = importlib.metadata.distribution = from_name
import mage_core, mage_core.queue
from mage_core import training
training.main(sys.argv[1:])
"""


def test_training_and_evaluation_need_neither_jupyter_nor_matplotlib(repository, tmp_path):
    changes = ["pairs=4", "watch_clips=1", "vqvae.images=16", "mage.samples=4"]
    command = [sys.executable, "-c", BLOCKED, "--preset", "smoke", "--run", str(tmp_path), "--test-clips", "2"]
    ended = subprocess.run([*command, *(word for change in changes for word in ("--set", change))], cwd=repository,
                           capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "2 held-out test pairs" in ended.stdout and "| MAGE |" in ended.stdout
    card = json.loads((tmp_path / "weights.json").read_text())
    assert card["command"].startswith("python -m mage_core.training --preset smoke")
    assert str(tmp_path) not in json.dumps(card), "a card holds no path"


# ---------------------------------------------------------------- seldom looks

def line_stage(poisoned=math.inf, **changes):
    model_ = nn.Linear(1, 1, bias=False)

    def step(number):
        return (model_(torch.ones(1, 1)) - 3).square().mean() * (math.nan if number >= poisoned else 1), {}

    return loop.Stage(**{"name": "line", "unit": "samples", "budget": 40, "batch": 2, "parts": {"line": model_},
                         "optimisers": loop.optimisers(model_, 0.1), "step": step, "after": None, "watch": None,
                         "watch_every": 1000, "seed": 0, "recipe": {}} | changes)


@pytest.mark.parametrize("poisoned", [0, 5, 9, 17])
@pytest.mark.parametrize("look", [1, 4, 50])
def test_a_loss_that_is_no_number_never_reaches_a_checkpoint_however_seldom_one_looks(like_a_gpu, monkeypatch, tmp_path,
                                                                                      look, poisoned):
    monkeypatch.setattr(loop, "LOOK", look)
    with pytest.raises(loop.TrainingStopped, match=f"at step {poisoned} of line the loss is nan"):
        loop.fit(line_stage(poisoned), tmp_path, checkpoint_seconds=-1.0, progress=False)
    if (tmp_path / "line.pt").exists():
        state = torch.load(tmp_path / "line.pt", weights_only=True)
        assert state["step"] <= poisoned and state["parts"]["line"]["weight"].isfinite().all()
        assert all(map(math.isfinite, state["recent"])) and len(state["recent"]) == state["step"]


def test_looking_seldom_changes_nothing(like_a_gpu, monkeypatch, tmp_path):
    found = []
    for look in (1, 7, 50):
        monkeypatch.setattr(loop, "LOOK", look)
        (tmp_path / str(look)).mkdir()
        torch.manual_seed(3)
        assert loop.fit(line_stage(), tmp_path / str(look), progress=False)
        found.append(torch.load(tmp_path / str(look) / "line.pt", weights_only=True))
    assert all(state["recent"] == found[0]["recent"] and len(state["recent"]) == 20 for state in found)
    assert all(torch.equal(state["parts"]["line"]["weight"], found[0]["parts"]["line"]["weight"]) for state in found)


# ---------------------------------------------------------------- batches of fixed shapes

@given(st.lists(st.tuples(st.integers(1, 80), st.floats(1e-6, 1 - 1e-6)), min_size=1, max_size=20),
       st.sampled_from([(1.0, 2.0), (3.0, 6.0), (1.0, 1.0), (2.5, 7.0)]), st.integers(2, 16))
def test_frames_of_many_clips_are_those_of_each(samples, interval, clip_length):
    lengths, speeds = (np.array(column) for column in zip(*samples))
    found = sampled_frames(torch.from_numpy(lengths), torch.from_numpy(speeds), interval, clip_length)
    for row, length, speed in zip(found, lengths.tolist(), speeds.tolist()):
        assert row.tolist() == frame_indices(length, speed, interval, clip_length).tolist()


def test_weights_of_targets_are_what_drawing_them_is_on_average():
    torch.manual_seed(1)
    ids = torch.where(torch.rand(2, 6, 4, 4) < 0.2, 1, 0)
    ids[:, 0] = 0
    frames = torch.tensor([0, 2, 3])
    weight = balanced_weights(ids, frames)
    drawn = [balanced(ids, frames, torch.Generator().manual_seed(seed)).float() for seed in range(3000)]
    mean = torch.stack(drawn).mean(0)
    torch.testing.assert_close(weight, mean / mean.sum(), atol=0.002, rtol=0.05)
    assert weight.sum().item() == pytest.approx(1)
    changed_ = ids[:, frames + 1] != 0
    assert weight[changed_].sum().item() == pytest.approx(0.5)
    still = torch.ones(2, 6, 4, 4, dtype=torch.long)
    assert torch.allclose(balanced_weights(still, None), torch.full((2, 5, 4, 4), 1 / 160))
    still[:, 1:] = 2
    assert torch.allclose(balanced_weights(still, None), torch.full((2, 5, 4, 4), 1 / 160))


def test_a_loss_by_weights_is_the_loss_over_the_chosen(model):
    mage, clips = model
    ids, text, speed = clips.batch(np.array([0, 1, 2]), np.array([0.2, 0.5, 0.8]))
    frames = torch.tensor([0, 3])
    predict = balanced(ids, frames, torch.Generator().manual_seed(0))
    losses = [mage(ids, text, speed, frames=frames, **how).loss
              for how in ({"predict": predict}, {"weight": predict / predict.sum()})]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, mage.generator.logits.weight)[0] for loss in losses]
    torch.testing.assert_close(*gradients)


def test_guesses_are_made_for_a_fixed_number_of_clips_in_a_rising_share_of_the_steps(model, monkeypatch):
    mage, clips = model
    recipe = dataclasses.replace(TINY.mage, batch=8, samples=800, own_frames=0.4, hide_all=0.0, hide_some=0.0,
                                 later_frames=None)
    monkeypatch.setattr(machine, "waits", lambda device: True)
    shares, sizes = [], set()

    def guess(given_, text, speed, sources, count):
        sizes.add(len(given_))
        return torch.full((len(given_), count, 16, 16), 7)

    for step in range(100):
        batch = training_batch(clips, mage, recipe, 0, step, guess=guess)
        own = (batch["token_ids"][:, 1:9] == 7).flatten(1).all(1)
        assert own.sum() in (0, 3) and batch["predict"] is None and batch["weight"] is not None
        assert torch.equal(batch["token_ids"][~own], batch["target_ids"][~own])
        shares.append(own.float().mean().item())
    assert sizes == {3} and np.mean(shares[:30]) < np.mean(shares[-30:])
    assert np.mean(shares) == pytest.approx(0.4 * 0.5, abs=0.06)   # as on a CPU: a rising share, own_frames at the end


def test_frames_that_stay_on_a_device_are_the_sources_and_cut_on_the_grid_around_what_moves(single):
    source = training.FrameSource(single, 6, seed=3)
    resident = DeviceFrames(source, 40, "cpu", 3, chunk=16, progress=False)
    videos = torch.cat([training.to_images(single.video(single.spec("train", index))) for index in range(6)])
    assert resident.frames.shape == (40, 1, 64, 64) and resident.frames.dtype == torch.uint8
    whole, cut = (resident.batch(5, 9, *crop) for crop in ((), (44, 4)))
    assert torch.equal(cut, resident.batch(5, 9, 44, 4)) and not torch.equal(cut, resident.batch(6, 9, 44, 4))
    assert cut.shape == (9, 1, 44, 44)
    for image, frame in zip(cut, whole):
        assert (videos == frame).flatten(1).all(1).any(), "a frame of one of the pairs"
        assert any(torch.equal(image, frame[:, top:top + 44, left:left + 44])
                   for top in range(0, 21, 4) for left in range(0, 21, 4)) and image.max() > 0.02
    assert torch.equal(resident.batch(5, 9, 64, 4), whole)


def test_what_is_behind_a_cut_frame_in_colour_is_cut_alike(single):
    draw = np.random.default_rng(0)
    frames = torch.from_numpy(draw.integers(256, size=(3, 3, 24, 24), dtype=np.uint8)).float() / 255
    source = SimpleNamespace(batch=lambda step, size: frames[:size],
                             background=torch.from_numpy(draw.random((3, 24, 24), np.float32)))
    resident, places = DeviceFrames(source, 3, "cpu", 1, progress=False), set()
    assert all((frames == image).flatten(1).all(1).any() for image in resident.batch(0, 5))
    for step in range(6):
        for image, behind in zip(*resident.cut(step, 5, 16, 8)):
            found = {(top, left) for top in (0, 8) for left in (0, 8) for frame in frames
                     if torch.equal(image, frame[:, top:top + 16, left:left + 16])}
            assert len(found) == 1
            (top, left), = found
            assert torch.equal(behind, source.background[:, top:top + 16, left:left + 16])
            places |= found
    assert len(places) == 4, "around any pixel of what moves"


def test_rare_codes_restart_where_a_gpu_is_not_asked_how_many_there_are(monkeypatch, single):
    vqvae = VQVAE(vqvae_config(TINY.vqvae, single))
    found = []
    for wait in (False, True):
        monkeypatch.setattr(machine, "waits", lambda device, wait=wait: wait)
        torch.manual_seed(5)
        codebook, ours = Codebook(vqvae), VQVAE(vqvae.config)
        ours.load_state_dict(vqvae.state_dict())
        codebook.count[[2, 5, 11]] = 0.0
        features = torch.randn(200, vqvae.config.code_width)
        ids = torch.randint(16, (200,))
        ids[(ids == 2) | (ids == 5) | (ids == 11)] = 0
        codebook.update(ours, features, ids)
        fresh = codebook.total[[2, 5, 11]]
        assert (codebook.count[[2, 5, 11]] == 1).all()
        assert all((features == row).all(1).any() for row in fresh) and len(fresh.unique(dim=0)) == 3
        others = torch.ones(16, dtype=torch.bool)
        others[[2, 5, 11]] = False
        found.append((codebook.count[others], codebook.total[others]))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


def test_on_a_gpu_embeddings_normalisation_and_gradients_of_offsets_are_what_they_are_elsewhere(monkeypatch):
    torch.manual_seed(2)
    tokens = VisualTokens(5, 4, 4, 16, groups=3, hidden_token=True)
    ids = torch.randint(0, 5 ** 3 + 1, (2, 3, 4, 4))
    ids[0, 0] = 5 ** 3   # hidden
    norm, x = LayerNorm(16), torch.randn(3, 4, 16).bfloat16()
    wide, tall = torch.randn(2, 256, 7), torch.randn(2, 256, 5)
    found = []
    for wait in (False, True):
        monkeypatch.setattr(machine, "waits", lambda device, wait=wait: wait)
        tokens.zero_grad()
        embedded = tokens.embed(ids)
        embedded.square().sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            normalised = norm(x)
        assert normalised.dtype == torch.bfloat16
        found.append((embedded.detach(), tokens.embedding.grad.clone(), summed_product(wide, tall),
                      normalised.detach().float()))
    *exact, (one, other) = zip(*found)
    for pair in exact:
        torch.testing.assert_close(*pair)
    torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)   # bf16 in one way, rounded to it in the other


# ---------------------------------------------------------------- compilation

class Pretended(nn.Module):
    """What `training.compiled` asks of a MAGE."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Module()
        self.generator.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def guess(self):
        return 1


@pytest.mark.parametrize("wanted", ["on", "layers"])
def test_where_compilation_fails_training_goes_on_without(monkeypatch, capsys, wanted):
    def broken(function, **options):
        raise RuntimeError("no compiler\nand much more")

    mage, cpu = Pretended(), torch.device("cpu")
    plain = (mage, mage.guess), False
    monkeypatch.setattr(torch, "compile", broken)
    assert training.compiled(mage, wanted, cpu, lambda made: None) == plain
    assert "torch.compile failed (RuntimeError: no compiler)" in capsys.readouterr().out
    assert training.compiled(mage, "auto", cpu, None) == training.compiled(mage, "off", cpu, None) == plain
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def fails_later(made):
        raise ValueError

    assert training.compiled(mage, wanted, cpu, fails_later) == plain
    assert all(layer._compiled_call_impl is None for layer in mage.generator.layers)
    assert "no reason given" in capsys.readouterr().out
    with pytest.raises(ValueError, match="'maybe'.*auto"):
        training.compiled(mage, "maybe", cpu, None)


@pytest.mark.parametrize("fast", [True, False])
def test_layers_stay_compiled_where_a_step_is_faster(monkeypatch, capsys, fast):
    mage, cpu = Pretended(), torch.device("cpu")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(machine, "waits", lambda device: True)
    seconds = iter([0.1, 0.2] if fast else [0.2, 0.1])
    monkeypatch.setattr(training, "_seconds", lambda step, device: next(seconds))
    made, by_layer = training.compiled(mage, "auto", cpu, lambda made: None)
    assert made == (mage, mage.guess) and by_layer == fast
    assert all((layer._compiled_call_impl is not None) == fast for layer in mage.generator.layers)
    assert f"a step in {'100' if fast else '200'}.0 ms, without" in capsys.readouterr().out


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                    reason="torch.compile needs a C++ compiler here")
def test_a_compiled_layer_is_the_layer(model):
    """One layer with every option, forward and back, and it is one graph: the whole model takes minutes to compile."""
    layer, steps = model[0].generator.layers[-1], torch.arange(3)
    assert layer.offsets is not None
    x = torch.randn(1, 3, 16, 16, 16)
    found = []
    for compile_it in (False, True):
        if compile_it:
            layer.compile(dynamic=False, fullgraph=True)
        layer.zero_grad(set_to_none=True)
        y = layer(x, steps)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in layer.parameters())])
    training.as_they_were([layer])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


# ---------------------------------------------------------------- TF32, rates, evaluation in parts

def test_tf32_is_as_it_was_afterwards():
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    with machine.tf32(True):
        with machine.tf32(False):
            assert [flag.allow_tf32 for flag in flags] == [False, False]
        assert [flag.allow_tf32 for flag in flags] == [True, True]
    assert [flag.allow_tf32 for flag in flags] == before
    assert machine.matmul_rate("cpu", 32, 1) > 0


def test_an_evaluation_that_was_stopped_goes_on_and_ends_as_one_in_one_go(single, tmp_path, monkeypatch):
    rows = {"still": training.metrics.first_frame_repeated(), "ceiling": training.metrics.perfect_predictor()}
    options = {"batch_size": 2, "keep": tmp_path / "evaluation.npz", "progress": False}
    whole = evaluate_all(rows, single, "test", 5, batch_size=5, progress=False)
    seen = []
    real = training.metrics.evaluation_batch
    monkeypatch.setattr(training.metrics, "evaluation_batch",
                        lambda *asked: (seen.append(list(asked[2])), real(*asked))[1])
    clock = iter([0.0, 0.0, 0.0])   # time is up after a batch
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "time", SimpleNamespace(monotonic=lambda: next(clock, 100.0)))
        assert evaluate_all(rows, single, "test", 5, until=50.0, **options) is None
    again = evaluate_all(rows, single, "test", 5, **options)
    assert seen == [[0, 1], [2, 3], [4]], "nothing is judged twice"
    for one, other in zip(whole, again):
        for name, value in one.as_dict().items():
            assert name == "seconds" or other.as_dict()[name] == (
                value if isinstance(value, str) else pytest.approx(value)), name
    seen.clear()
    evaluate_all(rows, single, "test", 5, key="other weights", **options)
    assert seen == [[0, 1], [2, 3], [4]]
    (tmp_path / "evaluation.npz").write_bytes(b"damaged")
    assert len(evaluate_all(rows, single, "test", 5, **options)) == 2


def test_an_evaluation_is_kept_whole_and_never_taken_for_another(single, tmp_path):
    seen = []

    def videos(batch):
        seen.append([spec.seed for spec in batch.specs])
        return batch.truth

    made, options = training.metrics.FromBatch(videos), {"keep": tmp_path / "evaluation.npz", "progress": False}
    question = {"truth": made}, single, "test", 3
    first, = evaluate_all(*question, **options)
    others = (({"another": made}, *question[1:]), (question[0], load_dataset("double-mnist"), "test", 3),
              (question[0], single, "train", 3), (question[0], single, "test", 2))
    for other in others:
        seen.clear()
        again, = evaluate_all(*question, **options)
        assert not seen and again.as_dict() == first.as_dict()
        row, = evaluate_all(*other, **options)
        assert len(seen) == 1 and (row.name, row.dataset, row.split, row.n) == (*other[0], other[1].name, *other[2:])
        first, = evaluate_all(*question, **options)
    seen.clear()
    evaluate_all(*question, seed=5, **options)
    assert seen == [[5, 5, 5]], "those of another seed"
    with pytest.raises(ValueError, match="at least 1"):
        evaluate_all(*question[:3], 0, **options)
    evaluate_all(*question, keep=tmp_path / "kept", progress=False)   # a name without an ending
    seen.clear()
    evaluate_all(*question, keep=tmp_path / "kept", progress=False)
    assert not seen and {path.name for path in tmp_path.iterdir()} == {"evaluation.npz", "kept"}


def test_a_killed_evaluation_keeps_its_batches_where_no_motion_is_judged_too(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "KEEP_SECONDS", -1.0)
    seen = []

    def videos(batch):
        seen.append(batch.seeds)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return batch.truth

    question = {"truth": training.metrics.FromBatch(videos)}, CaterGen("cater-gen-v1", "ambiguous", 32), "test", 2
    options = {"batch_size": 1, "keep": tmp_path / "evaluation.npz", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        evaluate_all(*question, **options)
    row, = evaluate_all(*question, **options)
    assert seen == [(0,), (1,), (1,)] and row.n == 2 and row.motion is None


def test_what_is_saved_is_what_was_trained(like_a_gpu, tmp_path, monkeypatch):
    """Measuring the speed, and trying to compile, are passes too: training's statistics stay as they were."""
    monkeypatch.setattr(training, "DEVICE_FRAMES", 50)
    preset = changed(PRESETS["smoke"], ["pairs=6", "watch_clips=2", "vqvae.images=64", "mage.samples=8", "mage.unet=8",
                                        "mage.masks=True", "compile=off", "precision=full"])
    trained = training.train(load_dataset("double-mnist"), preset, folder=tmp_path, device="cpu", progress=False)
    kept = torch.load(tmp_path / "mage.pt", weights_only=True)["parts"]["mage"]
    assert "speed" in trained.card and any("running_mean" in name for name in kept)
    differing = [name for name, tensor in trained.mage.state_dict().items() if not torch.equal(tensor, kept[name])]
    assert not differing


def test_an_evaluation_is_not_taken_for_that_of_other_captions_or_another_size(tmp_path):
    rows = {}
    for mode, size in (("explicit", 32), ("ambiguous", 32), ("explicit", 48)):
        world = CaterGen("cater-gen-v1", mode, size)
        (rows[mode, size],) = evaluate_all({"still": training.metrics.first_frame_repeated()}, world, "test", 1,
                                           keep=tmp_path / "kept.npz", progress=False)
    assert rows["explicit", 32].motion is not None and rows["ambiguous", 32].motion is None
    assert rows["explicit", 48].scores.psnr_frames != rows["explicit", 32].scores.psnr_frames
