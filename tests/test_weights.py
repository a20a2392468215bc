"""Our own weights by name and file: what is saved comes back, damage and foreign files are told apart and named."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mage_core import metrics, training, weights
from mage_core.clips import load_dataset
from mage_core.mage import MAGE
from mage_core.presets import PRESETS, mage_config, vqvae_config
from mage_core.vqvae import VQVAE
from mage_core.weights import CheckpointError

ABOUT = {"dataset": "single-mnist", "digit_set": "mnist-5k", "preset": "smoke", "seed": 3}


@pytest.fixture(scope="module")
def images():
    """Frames in which a digit moves, (n 1 64 64)."""
    dataset = load_dataset("single-mnist")
    specs = [dataset.spec("test", index) for index in range(60)]
    frames = dataset.clips(specs, torch.arange(0, 20, 4).expand(60, -1).numpy())
    return torch.from_numpy(frames).flatten(0, 1)[:, None].float() / 255


@pytest.fixture(scope="module", params=["patch", "released"])
def models(request, images):
    torch.manual_seed(0)
    dataset, chosen = load_dataset("single-mnist"), PRESETS["smoke"]
    vqvae = VQVAE(vqvae_config(dataclasses.replace(chosen.vqvae, shape=request.param), dataset)).eval()
    with torch.no_grad():
        for parameter in vqvae.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for buffer in vqvae.buffers():   # of the released shape's normalisations
            if buffer.is_floating_point():
                buffer.add_(0.1 * torch.rand_like(buffer))
    vqvae.initialise(images)
    mage = MAGE(mage_config(chosen.mage, dataset, vqvae.config.codebook_size)).eval()
    torch.nn.init.normal_(mage.advection.chances.weight)   # nothing is nought
    mage.advection.pixels.uniform_()
    return vqvae, mage


def as_given(tensor):
    return tensor


def through_half(tensor):
    return tensor.half().float() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("precision", ["full", "half"])
def test_models_come_back_as_they_were_saved(models, tmp_path, precision):
    path = tmp_path / "folder" / "some.safetensors"
    trained = weights.save(path, *models, ABOUT, precision=precision)
    again = weights.load(path)
    for found in (trained, again):
        for ours, theirs in zip(models, (found.vqvae, found.mage)):
            assert theirs.config == ours.config and type(theirs.config) is type(ours.config) and not theirs.training
            assert theirs.state_dict().keys() == ours.state_dict().keys()
            for name, tensor in ours.state_dict().items():
                stored = theirs.state_dict()[name]
                whole = precision == "full" or (theirs is found.vqvae and name.startswith(("encoder.", "codebook")))
                whole = whole or name == "advection.pixels"
                assert stored.dtype == tensor.dtype
                assert torch.equal(stored, (as_given if whole else through_half)(tensor)), name
        assert found.card.items() >= ABOUT.items() and found.path == path
        assert found.dataset == load_dataset("single-mnist", "mnist-5k")
    assert sorted(file.name for file in path.parent.iterdir()) == ["some.json", "some.safetensors"]


def test_half_the_size_keeps_every_token(models, images, tmp_path):
    trained = weights.save(tmp_path / "half.safetensors", *models, ABOUT)
    weights.save(tmp_path / "whole.safetensors", *models, ABOUT, precision="full")
    assert torch.equal(trained.vqvae.encode(images), models[0].encode(images))
    half, whole = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "whole"))
    assert half < 0.8 * whole


def test_in_8_bits_mages_matrices_are_within_half_a_step_of_their_row_and_all_else_is_as_in_half(
        models, images, tmp_path):
    trained = weights.save(tmp_path / "int8.safetensors", *models, ABOUT, precision="int8")
    half = weights.save(tmp_path / "half.safetensors", *models, ABOUT)
    assert torch.equal(trained.vqvae.encode(images), models[0].encode(images))
    whole_numbers = 0
    for name, tensor in models[1].state_dict().items():
        stored = trained.mage.state_dict()[name]
        if tensor.ndim == 2 and tensor.numel() > 1_000:
            step = tensor.abs().amax(1, keepdim=True) / 127
            assert ((stored - tensor).abs() <= 0.5001 * step).all() and not torch.equal(stored, tensor), name
            whole_numbers += tensor.numel()
        else:
            assert torch.equal(stored, half.mage.state_dict()[name]), name
    sizes = {name: (tmp_path / f"{name}.safetensors").stat().st_size for name in ("int8", "half")}
    assert whole_numbers > 0 and sizes["half"] - sizes["int8"] == pytest.approx(whole_numbers, rel=0.2)
    assert trained.card["precision"] == "int8"
    with pytest.raises(ValueError, match="precision is 'int4'.*half"):
        weights.save(tmp_path / "int4.safetensors", *models, ABOUT, precision="int4")


def test_the_card_holds_what_was_told_the_configurations_and_the_checksum(models, tmp_path):
    trained = weights.save(tmp_path / "some.safetensors", *models, ABOUT)
    card = json.loads((tmp_path / "some.json").read_text())
    assert card == json.loads(json.dumps(trained.card)) and len(card["sha256"]) == 64
    assert card["configs"]["mage"]["width"] == models[1].config.width
    row = type("Row", (), {"as_dict": lambda self: {"name": "MAGE", "ssim": 0.5}})()
    trained.add_results([row, row])
    assert weights.load(tmp_path / "some.safetensors").card["results"] == [row.as_dict()] * 2
    # without the card the file still says what it is
    (tmp_path / "some.json").unlink()
    assert weights.load(tmp_path / "some.safetensors").card == {"dataset": "single-mnist", "digit_set": "mnist-5k"}


def test_saving_over_weights_never_leaves_half_a_file(models, tmp_path, monkeypatch):
    path = tmp_path / "some.safetensors"
    weights.save(path, *models, ABOUT)
    before = path.read_bytes()

    def torn(tensors, temporary, metadata):
        temporary.write_bytes(before[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", torn)
    with pytest.raises(KeyboardInterrupt):
        weights.save(path, *models, ABOUT)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    weights.load(path)


def test_the_same_weights_make_the_same_file(models, tmp_path):
    paths = [tmp_path / name for name in ("one.safetensors", "other.safetensors")]
    for path in paths:
        weights.save(path, *models, ABOUT)
    assert len({path.read_bytes() for path in paths}) == 1
    assert len({weights.load(path).card["sha256"] for path in paths}) == 1


@pytest.mark.parametrize("place", [0, 3, 60, 5000, -1])
def test_a_flipped_bit_is_found_wherever_it_is(models, tmp_path, place):
    path = tmp_path / "some.safetensors"
    weights.save(path, *models, ABOUT)
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError,
                       match=r"some\.safetensors (is damaged|cannot be read|is not a file of this).*again"):
        weights.load(path)


def test_a_card_of_another_dataset_is_refused_and_one_that_is_missing_is_not(models, tmp_path):
    vqvae, mage = models
    path = tmp_path / "some.safetensors"
    card = weights.save(path, vqvae, mage, {"dataset": "single-mnist", "digit_set": "mnist-5k"}).card
    path.with_suffix(".json").write_text(json.dumps(card | {"dataset": "double-mnist"}))
    with pytest.raises(CheckpointError, match=r"some.json says that dataset is 'double-mnist', and some.safetensors its"
                                              r"elf 'single-mnist': .*delete it"):
        weights.load(path)
    path.with_suffix(".json").unlink()
    assert weights.load(path).card == {"dataset": "single-mnist", "digit_set": "mnist-5k"}


def test_a_truncated_file_and_a_broken_card_are_named(models, tmp_path):
    path = tmp_path / "some.safetensors"
    weights.save(path, *models, ABOUT)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"some\.safetensors cannot be read"):
        weights.load(path)
    path.write_bytes(content)
    for card in ("{", "[]", '"a card"'):
        (tmp_path / "some.json").write_text(card)
        with pytest.raises(CheckpointError, match=r"some\.json is not a card"):
            weights.load(path)


def test_names_are_those_of_the_folder_and_a_missing_one_lists_them(models, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "data_folder", lambda: tmp_path)
    with pytest.raises(CheckpointError, match=r"no weights are named 'mine': there are none yet; or give the path"):
        weights.load("mine")
    for name in ("single-mnist", "another"):
        weights.save(tmp_path / "weights" / f"{name}.safetensors", *models, ABOUT)
    assert weights.names() == ["another", "single-mnist"]
    assert weights.load("another").card["seed"] == 3
    for wrong in ("mine", "single", "some/where.pt"):
        with pytest.raises(CheckpointError, match=f"{wrong!r}: there are another, single-mnist"):
            weights.load(wrong)
    with pytest.raises(CheckpointError, match=r"gone\.safetensors is not a file"):
        weights.load(tmp_path / "gone.safetensors")


def test_foreign_files_get_the_remedy(models, tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file(weights.to_released(VQVAE(vqvae_config(PRESETS["paper"].vqvae, load_dataset("single-mnist"))),
                                  MAGE(dataclasses.replace(models[1].config, shift_attention=False, time_bias=False,
                                                           speed_frequencies=0, intervals=None,
                                                           video_length=None, advection=0, hidden_token=False,
                                                           groups=1))), foreign)
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors is not a file of this project.*load_released"):
        weights.load(foreign)
    # ours, but of a model that lacks a part
    trained = weights.save(tmp_path / "some.safetensors", *models, ABOUT)
    configs = trained.card["configs"]
    tensors = {f"{stage}.{name}": tensor for stage in ("vqvae", "mage")
               for name, tensor in getattr(trained, stage).state_dict().items()}
    tensors.pop("mage.motion_anchor.speed")
    save_file(tensors, foreign, metadata={"about": json.dumps({"configs": configs} | ABOUT)})
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors is not a file of this project"):
        weights.load(foreign)


def test_a_curve_goes_on_from_that_of_the_weights_it_began_with_on_the_same_dataset():
    def card(dataset, *values, **more):
        lines = [{"samples": 10 * (k + 1), "seconds": 1.5, "psnr": value} for k, value in enumerate(values)]
        return {"dataset": dataset, "curves": {"mage": lines}} | more

    first = card("double-mnist", 1.0, start=card("single-mnist", 9.0))
    last = card("double-mnist", 3.0, 4.0, start=card("double-mnist", 2.0, start=first))
    told = weights.Trained(None, None, last).curve
    assert [(line["samples"], line["seconds"], line["psnr"]) for line in told] == [
        (10, 1.5, 1.0), (20, 3.0, 2.0), (30, 4.5, 3.0), (40, 4.5, 4.0)]
    assert weights.Trained(None, None, {"dataset": "double-mnist"}).curve == []


@pytest.mark.parametrize("name", weights.names())
def test_weights_that_ship_still_do_what_their_card_says(name):
    """A change of the code that old weights do not fit would show here, and in no other test:
    notebooks run on smoke."""
    shipped = weights.load(name)
    rows = {row["name"]: row for row in shipped.card["results"]}
    batch = metrics.evaluation_batch(shipped.dataset, "test", range(12))
    makers = (metrics.reconstruction(shipped.vqvae), training.generator(shipped.vqvae, shipped.mage),
              metrics.first_frame_repeated())
    found, made, still = (metrics.evaluate_videos(each.videos(batch), batch.truth) for each in makers)
    assert abs(found.psnr_frames - rows["VQ-VAE reconstruction"]["psnr_frames"]) < 1.5
    gain = rows["MAGE"]["psnr_frames"] - rows["first frame repeated"]["psnr_frames"]
    assert gain > 0 and made.psnr_frames > still.psnr_frames + gain / 2


@pytest.mark.parametrize("name", ["single-mnist", "w.json", "foo", "w.pt", ""])
def test_weights_are_saved_under_a_name_that_loads_them_or_not_at_all(models, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"does not end in \.safetensors"):
        weights.save(name, *models, ABOUT)
    assert not list(tmp_path.iterdir())


def test_weights_are_saved_in_ones_own_folder(models, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved = weights.save("~/w.safetensors", *models, ABOUT)
    assert saved.path == tmp_path / "w.safetensors" and weights.load("~/w.safetensors").card == saved.card


def test_a_card_that_is_a_folder_is_told(models, tmp_path):
    weights.save(tmp_path / "w.safetensors", *models, ABOUT)
    (tmp_path / "w.json").unlink()
    (tmp_path / "w.json").mkdir()
    with pytest.raises(CheckpointError, match="w.json is not a card"):
        weights.load(tmp_path / "w.safetensors")


@pytest.mark.parametrize("told, rule", [({"note": object()}, "note that is not JSON"), ({"dataset": None}, "dataset"),
                                        ({"digit_set": None}, "digit")])
def test_what_cannot_be_a_card_leaves_the_old_weights(models, tmp_path, told, rule):
    path = tmp_path / "a.safetensors"
    weights.save(path, *models, ABOUT)
    before = path.read_bytes()
    about = {key: value for key, value in {**ABOUT, **told}.items() if value is not None}
    with pytest.raises(ValueError, match=rule):
        weights.save(path, *models, about, precision="full")
    assert path.read_bytes() == before and weights.load(path).card["seed"] == 3


def test_what_fp16_cannot_hold_is_kept_whole_and_what_is_not_finite_is_refused(models, tmp_path):
    vqvae, mage = models[0], copy.deepcopy(models[1])
    bias = mage.generator.logits.bias
    with torch.no_grad():
        bias[0] = 1e6
    again = weights.save(tmp_path / "a.safetensors", vqvae, mage, ABOUT).mage
    assert torch.equal(again.generator.logits.bias, bias) and again.generator.logits.weight.isfinite().all()
    with torch.no_grad():
        bias[0] = math.nan
    with pytest.raises(ValueError, match="mage.generator.logits.bias holds values that are not finite"):
        weights.save(tmp_path / "b.safetensors", vqvae, mage, ABOUT)
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("more, rule", [({"extra.x": torch.zeros(2)}, "no part of it takes extra.x"),
                                        ({"mage.generator.logits.bias": None}, "logits.bias.*not finite")])
def test_a_file_of_more_or_of_what_is_not_finite_is_refused(models, tmp_path, more, rule):
    path = tmp_path / "a.safetensors"
    weights.save(path, *models, ABOUT)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    tensors |= {name: torch.full_like(tensors[name], math.nan) if value is None else value
                for name, value in more.items()}
    save_file(tensors, path, metadata=about)
    path.with_suffix(".json").unlink()
    with pytest.raises(CheckpointError, match=rule):
        weights.load(path)
