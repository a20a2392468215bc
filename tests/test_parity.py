"""Parity with the authors' released code: small random models of theirs, their inputs, and all that they computed."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mage_core.weights import UNREAD, load_released, load_released_vqvae, to_released

REFERENCE = Path(os.environ.get("MAGE_REFERENCE_DIR", Path(__file__).resolve().parents[2] / "shared"))
FILES = sorted((REFERENCE / "reference_parity").glob("*.safetensors"))
HERE = pytest.param(None, marks=pytest.mark.skip(
    reason=f"the released code's fixtures are not in {REFERENCE} ($MAGE_REFERENCE_DIR)"))


@pytest.fixture(scope="module", params=FILES or [HERE], ids=lambda path: path and path.stem)
def case(request, tmp_path_factory):
    """(released weights, inputs, outputs, config, our VQ-VAE, our MAGE) of one file."""
    tensors = load_file(request.param)
    with safe_open(request.param, "pt") as file:
        config = json.loads(file.metadata()["config"])
    weights, inputs, outputs = (
        {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
        for part in ("weights.", "in.", "out."))
    path = tmp_path_factory.mktemp("released") / "released.safetensors"
    save_file(weights, path)
    vqvae, mage = load_released(path, alpha=config["alpha"], beta=config["beta"])
    return weights, inputs, outputs, config, vqvae, mage


def assert_close(ours, theirs):
    """Within 1e-4 x max(1, |value|), element by element."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs() / theirs.abs().clamp(min=1)
    assert error.max() <= 1e-4, f"largest error {error.max():.2e}"


def frames(images):
    return images.flatten(0, 1)


@torch.no_grad()
def test_vqvae(case):
    _, inputs, outputs, _, vqvae, _ = case
    images = inputs["images"]
    token_ids = vqvae.encode_network(frames(images)).unflatten(0, images.shape[:2])
    assert torch.equal(token_ids, outputs["token_ids"])
    assert_close(vqvae.reconstruct_network(frames(images)).unflatten(0, images.shape[:2]),
                 outputs["vqvae_reconstruction"])


@pytest.mark.parametrize("gradients", [False, True], ids=["evaluating", "with gradients"])
def test_motion_anchor_logits_and_losses(case, gradients):
    _, inputs, outputs, _, _, mage = case
    with torch.set_grad_enabled(gradients):   # the two choose different kernels
        ours = mage(outputs["token_ids"], inputs["text_ids"], inputs["speed"],
                    posterior_noise=inputs.get("posterior_noise"))
    pairs = {"motion_anchor": ours.motion_anchor, "logits": ours.logits, "kl_loss": ours.kl_loss, "loss": ours.loss,
             "final_loss": ours.loss, "prediction": ours.prediction_loss}
    for name, value in pairs.items():
        if name in outputs:
            assert_close(value.detach(), outputs[name].reshape(value.shape))
    compared = {"token_ids", "vqvae_reconstruction", "generated_video", *pairs}
    assert set(outputs) <= compared, f"the fixture holds more than this compares: {set(outputs) - compared}"


@pytest.mark.parametrize("recompute", [False, True], ids=["each frame once", "recomputing"])
@torch.no_grad()
def test_generated_video(case, recompute):
    _, inputs, outputs, _, vqvae, mage = case
    images = inputs["images"]
    token_ids = mage.generate(outputs["token_ids"][:, 0], inputs["text_ids"], inputs["speed"],
                              prior_noise=inputs.get("prior_noise"), recompute=recompute)
    video = vqvae.decode_network(frames(token_ids)).unflatten(0, images.shape[:2])
    video[:, 0] = images[:, 0]
    assert_close(video, outputs["generated_video"])


def test_sizes_are_read_from_the_shapes(case):
    _, _, _, config, vqvae, mage = case
    first, text, axial = (config[f"{part}_config"]["params"]
                          for part in ("first_stage", "text_encoder", "generate_decoder"))
    assert (vqvae.config.channels, vqvae.config.width, vqvae.config.down, vqvae.config.codebook_size) == \
        (first["input_dim"], first["dim"], first["down_ratio"], first["K"])
    ours = mage.config
    assert (ours.codebook_size, ours.rows, ours.columns, ours.clip_length, ours.width) == \
        (config["codebook_size"], config["image_resolution"], config["image_resolution"], config["frames_length"],
         config["vision_width"])
    assert (ours.vocabulary_size, ours.context_length, ours.text_layers, ours.pad_id) == \
        (text["vocab_size"], text["context_length"], text["transformer_layers"], text["padding_idx"])
    assert (ours.anchor_layers, ours.axial_layers, ours.stochastic) == \
        (config["ma_config"]["params"]["layers"], axial["layers"], config["randomness"])


def test_round_trip_under_the_released_names(case):
    weights, _, _, _, vqvae, mage = case
    back = to_released(vqvae, mage)
    assert set(back) <= set(weights)
    for name in set(weights) - set(back):
        assert any(re.fullmatch(rule, name) for rule in UNREAD), name
    assert all(torch.equal(back[name], weights[name]) for name in back)


def test_torch_file_with_wrapper_and_prefix(case, tmp_path):
    weights, _, _, _, vqvae, mage = case
    torch.save({"epoch": 7, "state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}},
               tmp_path / "released.pth")
    again = load_released(tmp_path / "released.pth")
    for model, same in zip((vqvae, mage), again):
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values()))


def test_first_stage_alone(case, tmp_path):
    weights, _, _, _, vqvae, _ = case
    prefix = "first_stage_model."
    alone = {f"module.{name.removeprefix(prefix)}": tensor for name, tensor in weights.items()
             if name.startswith(prefix)}
    torch.save(alone, tmp_path / "best.pt")
    same = load_released_vqvae(tmp_path / "best.pt")
    assert same.config == vqvae.config
    assert all(torch.equal(a, b) for a, b in zip(vqvae.state_dict().values(), same.state_dict().values()))
