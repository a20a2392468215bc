"""Loading checkpoints under the released names: strict, and errors that name the file, the rule and the remedy."""

import dataclasses
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from mage_core.mage import MAGE, MAGEConfig
from mage_core.vqvae import VQVAE, VQVAEConfig
from mage_core.weights import (CheckpointError, load_released, load_released_vqvae, read_tensors, released_names,
                               to_released)

VQVAE_CONFIG = VQVAEConfig(channels=1, width=4, codebook_size=7, down=4, pixel_range=(-0.5, 0.5))
MAGE_CONFIG = MAGEConfig(codebook_size=7, rows=3, columns=5, clip_length=4, width=32, vocabulary_size=9,
                         context_length=8, stochastic=True, latent_channels=6)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return VQVAE(VQVAE_CONFIG), MAGE(MAGE_CONFIG)


@pytest.fixture
def tensors(models):
    """What a released file holds: our tensors under their names, and norms that their forward never reads."""
    unread = (f"ma_encoder.blocks.0.{norm}.{part}" for norm in ("ln_q", "ln_kv") for part in ("weight", "bias"))
    return ({name: tensor.clone() for name, tensor in to_released(*models).items()}
            | {name: torch.ones(32) for name in unread})


def saved(path, tensors):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("file", ["released.safetensors", "released.pth", "released.ckpt"])
def test_round_trip(models, tensors, tmp_path, file):
    vqvae, mage = load_released(saved(tmp_path / file, tensors))
    assert (vqvae.config, mage.config) == (VQVAE_CONFIG, MAGE_CONFIG)
    assert not vqvae.training and not mage.training
    for ours, loaded in zip(models, (vqvae, mage)):
        state = loaded.state_dict()
        assert state.keys() == ours.state_dict().keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())
        assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())


def test_names_are_one_to_one(models):
    for model in models:
        names = released_names(model)
        assert len(set(names.values())) == len(names) == len(model.state_dict())


def test_options_of_our_own_have_no_released_name(models):
    own = MAGE(dataclasses.replace(MAGE_CONFIG, shift_attention=True))
    with pytest.raises(ValueError, match="no released name for generator.layers.1.offsets.*released"):
        to_released(models[0], own)
    for option in ({"hidden_token": True}, {"groups": 2}, {"still": 2.0}):
        with pytest.raises(ValueError, match=f"has the option {next(iter(option))}, which the released code lacks"):
            to_released(models[0], MAGE(dataclasses.replace(MAGE_CONFIG, **option)))


def test_what_shapes_cannot_tell_is_given(tensors, tmp_path):
    path = saved(tmp_path / "released.safetensors", tensors)
    vqvae, mage = load_released(path, pixel_range=(-1, 1), alpha=0.5, beta=0.25)
    assert (vqvae.config.pixel_range, mage.config.alpha, mage.config.beta) == ((-1, 1), 0.5, 0.25)
    config = dataclasses.replace(MAGE_CONFIG, dropout=0.3, head_width=16)
    assert load_released(path, mage_config=config)[1].config is config


def test_half_precision_and_missing_counters_are_filled(models, tensors, tmp_path):
    tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
               if not name.endswith("num_batches_tracked")}
    vqvae, mage = load_released(saved(tmp_path / "half.pth", tensors))
    assert {tensor.dtype for tensor in mage.state_dict().values()} == {torch.float32}
    assert vqvae.encoder[1].num_batches_tracked == 0
    torch.testing.assert_close(vqvae.codebook, models[0].codebook, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "module.first_stage_model.", "module."])
def test_first_stage_alone(models, tmp_path, prefix):
    names, state = released_names(models[0]), models[0].state_dict()
    renamed = {prefix + names[name]: tensor for name, tensor in state.items()}
    path = saved(tmp_path / "first.pt", {"state_dict": renamed})
    loaded = load_released_vqvae(path)
    assert loaded.config == VQVAE_CONFIG
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in state.items())


def test_first_stage_out_of_a_whole_checkpoint(models, tensors, tmp_path):
    loaded = load_released_vqvae(saved(tmp_path / "released.pth", tensors))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in models[0].state_dict().items())


# ---------------------------------------------------------------- errors

def refused(path, *rules, load=load_released, **options):
    with pytest.raises(CheckpointError) as error:
        load(path, **options)
    for rule in (re.escape(str(path)), *rules):
        assert re.search(rule, str(error.value)), f"{rule!r} is not in: {error.value}"


def test_a_tensor_too_few_or_too_many(tensors, tmp_path):
    gone = tensors.pop("generate_model.blocks.3.mlp.c_fc.bias")
    refused(saved(tmp_path / "a.pth", tensors), r"missing: generate_model\.blocks\.3\.mlp\.c_fc\.bias", "undamaged")
    tensors["generate_model.blocks.3.mlp.c_fc.bias"] = gone
    tensors["generate_model.surprise"] = torch.ones(1)
    refused(saved(tmp_path / "b.pth", tensors), "not part of the model: generate_model.surprise")
    del tensors["generate_model.surprise"]
    tensors["first_stage_model.surprise"] = torch.ones(1)
    refused(saved(tmp_path / "c.pth", tensors), "not part of the model: first_stage_model.surprise")


@pytest.mark.parametrize("name", ["codebook.embedding.weight", "encoder.0.weight"])
def test_a_first_stage_without_what_tells_its_size(tensors, tmp_path, name):
    del tensors["first_stage_model." + name]
    refused(saved(tmp_path / "a.pth", tensors))


@pytest.mark.parametrize("name", ["visual_token_embedding.weight", "H_positional_embedding", "W_positional_embedding",
                                  "generate_model.T_positional_embedding", "text_encoder.token_embedding.weight",
                                  "text_encoder.positions.weight"])
def test_a_generator_without_what_tells_its_size(tensors, tmp_path, name):
    shape = tensors[name].shape
    tensors[name] = tensors[name][None]
    refused(saved(tmp_path / "a.pth", tensors), name, re.escape(str((1, *shape))), f"{len(shape)} dimensions")
    del tensors[name]
    refused(saved(tmp_path / "b.pth", tensors), f"lacks the tensor {name}")


def test_another_shape(tensors, tmp_path):
    tensors["speed_embedding"] = torch.ones(1, 31)
    refused(saved(tmp_path / "a.safetensors", tensors), r"of another shape: speed_embedding \(1, 31\) for \(1, 32\)")


def test_a_config_that_does_not_belong(tensors, tmp_path):
    path = saved(tmp_path / "a.pth", tensors)
    refused(path, r"H_positional_embedding \(1, 3, 1, 32\) for \(1, 4, 1, 32\)", "rows=4",
            mage_config=dataclasses.replace(MAGE_CONFIG, rows=4))
    refused(path, "not part of the model: adain", mage_config=dataclasses.replace(MAGE_CONFIG, stochastic=False))
    refused(path, "missing: generate_model.blocks.6", mage_config=dataclasses.replace(MAGE_CONFIG, axial_layers=9))
    refused(path, "codebook.embedding.weight", vqvae_config=dataclasses.replace(VQVAE_CONFIG, codebook_size=8))


def test_a_model_that_cannot_be_built(tensors, tmp_path):
    fewer = {name: tensor for name, tensor in tensors.items() if not name.startswith("generate_model.blocks.5")}
    refused(saved(tmp_path / "a.pth", fewer), "cannot be built", "axial_layers is 5")
    tensors["first_stage_model.encoder.0.weight"] = torch.ones(4, 1, 5, 5)
    refused(saved(tmp_path / "b.pth", tensors), "first convolution is 5 wide")


def test_stages_of_two_models(tensors, tmp_path):
    tensors["first_stage_model.codebook.embedding.weight"] = torch.ones(8, 4)
    refused(saved(tmp_path / "a.pth", tensors),
            "MAGE's tokens are of 1 x 7 codes, the VQ-VAE's of 1 x 8: the two stages do not belong together")


def test_values_that_are_not_finite(tensors, tmp_path):
    tensors["conv.0.weight"][0, 0, 0, 0] = float("nan")
    refused(saved(tmp_path / "a.safetensors", tensors), "not finite: conv.0.weight")


def test_mage_plus(tensors, tmp_path):
    kl = {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage_model.")}
    kl |= {"first_stage_model.encoder.conv_in.weight": torch.ones(8, 3, 3, 3),
           "first_stage_model.quant_conv.weight": torch.ones(8, 8, 1, 1)}
    rules = (r"MAGE\+", "KL autoencoder", "no codebook", "take the checkpoint of MAGE")
    kl = {"state_dict": {f"module.{name}": value for name, value in kl.items()}}
    refused(saved(tmp_path / "plus.pth", kl), *rules)
    refused(tmp_path / "plus.pth", *rules, load=load_released_vqvae)


def test_a_foreign_model(tmp_path):
    torch.manual_seed(0)
    path = saved(tmp_path / "resnet.pth", torch.nn.Sequential(torch.nn.Linear(2, 2)).state_dict())
    refused(path, "first_stage_model", "load_released_vqvae")
    refused(path, "no codebook.embedding.weight", "0.weight, 0.bias", load=load_released_vqvae)


@pytest.mark.parametrize("file", ["a.safetensors", "a.pth"])
def test_damaged_files(tensors, tmp_path, file):
    path = saved(tmp_path / file, tensors)
    whole = path.read_bytes()
    for damaged in (b"", b"not a checkpoint", whole[:len(whole) // 2], bytes(reversed(whole))):
        path.write_bytes(damaged)
        refused(path, "cannot be read", "Download it again", load=read_tensors)


def test_missing_files_and_folders(tmp_path):
    refused(tmp_path / "nothing.pth", "not a file", "give the path")
    refused(tmp_path, "not a file")


class Runs:
    """Pickles as a call, as hostile checkpoints do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_runs_from_a_file(tmp_path):
    path, trace = tmp_path / "hostile.pth", tmp_path / "trace"
    torch.save({"state_dict": Runs(trace)}, path)
    refused(path, "cannot be read", "tensors alone")
    path.write_bytes(pickle.dumps(Runs(trace), protocol=2))
    refused(path, "cannot be read")
    assert not trace.exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {}, {"state_dict": {}}, torch.ones(3)])
def test_files_without_named_tensors(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "without named tensors|a checkpoint is a dictionary")


def test_entries_that_are_no_tensors(tmp_path):
    torch.save({"epoch": 3, "model": {"a": torch.ones(2)}}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "not tensors: epoch, model", "state_dict alone")
