"""A trained MAGE with other tokens: what it knew is read and written as before, as far as the tokens can say it."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mage_core import retokenise as room
from mage_core.clips import load_dataset
from mage_core.mage import MAGE
from mage_core.presets import mage_config, preset, vqvae_config
from mage_core.retokenise import retokenise
from mage_core.tokens import code_vectors, join_ids
from mage_core.training import FrameSource, train
from mage_core.vqvae import VQVAE
from mage_core.weights import Trained

SMOKE = preset("smoke")


@pytest.fixture(scope="module")
def dataset():
    return load_dataset("single-mnist")


def first_stage(dataset, **fields):
    torch.manual_seed(0)
    vqvae = VQVAE(vqvae_config(dataclasses.replace(SMOKE.vqvae, **fields), dataset)).eval()
    with torch.no_grad():
        vqvae.initialise(FrameSource(dataset, 50, 0).batch(0, 400))
    return vqvae


@pytest.fixture(scope="module")
def start(dataset):
    vqvae = first_stage(dataset, codebook_size=300, groups=1)
    torch.manual_seed(0)
    mage = MAGE(mage_config(dataclasses.replace(SMOKE.mage, width=64, head_width=32, masks=True), dataset,
                            300)).eval()
    mage.initialise_from_codes(vqvae.codebook)
    with torch.no_grad():   # training has moved all of them together
        mage.visual_tokens.embedding.add_(torch.randn(64))
        mage.advection.whole.weight.normal_()
    return Trained(vqvae, mage, dataset.about)


@torch.no_grad()
def test_new_logits_are_fitted_to_the_next_frame_of_true_and_of_generated_clips(dataset, start, monkeypatch):
    monkeypatch.setattr(room, "CLIPS", 2 * room.AT_ONCE)
    shown, ids, encode = [], [], room.encode_frames
    monkeypatch.setattr(room, "encode_frames", lambda *given: ids.append(encode(*given)) or ids[-1])
    monkeypatch.setattr(MAGE, "generate", lambda mage, first, *given: first[:, None].expand(-1, 10, -1, -1) + 1_000)
    # what the model says of a token is the token itself
    monkeypatch.setattr(MAGE, "_features", lambda mage, token_ids, *given: (
        shown.append(token_ids) or token_ids[..., None], None))
    _, _, features, targets = room._looked_at(start, start.vqvae, 0, torch.Generator().manual_seed(0))
    true, generated = shown
    assert torch.equal(true, torch.from_numpy(ids[0].astype(int))[:, :-1])
    assert (generated == generated[:, :1]).all() and (generated >= 1_000).all()
    of_true = features[:, 0] < 1_000
    found = set(zip(features[of_true, 0].int().tolist(), targets[of_true].tolist()))
    assert found <= set(zip(ids[0][:, :-1].ravel().tolist(), ids[0][:, 1:].ravel().tolist()))
    assert any(now != later for now, later in found)   # a token is not its own successor


@torch.no_grad()
def test_a_model_that_does_not_see_its_own_frames_is_fitted_without_them(start, monkeypatch):
    blind = MAGE(dataclasses.replace(start.mage.config, autoregressive=False)).eval()
    monkeypatch.setattr(room, "CLIPS", 2 * room.AT_ONCE)
    shown, features = [], MAGE._features
    monkeypatch.setattr(MAGE, "_features", lambda mage, token_ids, *given: (
        shown.append(token_ids) or features(mage, token_ids, *given)))
    room._looked_at(dataclasses.replace(start, mage=blind), start.vqvae, 0, torch.Generator().manual_seed(0))
    assert len(shown) == 2
    for given in shown:
        assert (given[:, 1:] == blind.config.hidden_id).all() and (given[:, 0] != blind.config.hidden_id).all()


@torch.no_grad()
@pytest.mark.parametrize("groups, codes", [(1, 200), (4, 64)])
def test_new_tokens_read_and_write_what_the_old_ones_did(dataset, start, monkeypatch, groups, codes):
    monkeypatch.setattr(room, "CLIPS", 40)
    vqvae = first_stage(dataset, codebook_size=codes, groups=groups)
    made = retokenise(start, vqvae)
    assert (made.config.codebook_size, made.config.groups) == (codes, groups)
    assert dataclasses.replace(made.config, codebook_size=300, groups=1) == start.mage.config
    for name, tensor in start.mage.state_dict().items():
        if not any(part in name for part in ("embedding", "logits", "pixels", "shown", "whole")):
            assert torch.equal(made.state_dict()[name], tensor), name
    assert torch.equal(made.advection.pixels, vqvae.code_pixels()), "advection knows the new codes"
    for name in ("shown", "whole"):   # and shows in each block what it showed in all
        shown = getattr(made.advection, name).weight.unflatten(0, (groups, -1))
        torch.testing.assert_close(shown, getattr(start.mage.advection, name).weight.expand_as(shown))

    frames = FrameSource(dataset, None, 1, "test").batch(0, 60)
    old, new = start.vqvae.encode(frames)[:, None], vqvae.encode(frames)[:, None]
    filled = new != 0
    before, after = (model.visual_tokens.embed(ids)[filled] for model, ids in ((start.mage, old), (made, new)))
    left = (after - before).square().sum() / (before - before.mean(0)).square().sum()
    assert left < 0.35, "the embedding of a patch is much what it was"
    hidden = torch.full((1, 1, 2, 2), made.config.hidden_id)
    torch.testing.assert_close(made.visual_tokens.embed(hidden)[0, 0],
                               start.mage.visual_tokens.embedding[300].expand(2, 2, -1))


@torch.no_grad()
def test_logits_name_the_code_that_features_point_to(dataset):
    torch.manual_seed(0)
    vqvae = first_stage(dataset, codebook_size=32, groups=4)
    ids = vqvae.encode(FrameSource(dataset, 50, 2).batch(0, 100)).flatten()
    ids = ids[ids != 0]
    vectors, turn = code_vectors(ids, vqvae.codebook, 4), torch.randn(16, 48)
    features = vectors @ turn + 0.02 * torch.randn(len(ids), 48)   # what a sure model would say
    weight, bias = room._logits(vqvae, features, ids)
    found = join_ids((features @ weight.T + bias).unflatten(-1, (4, 32)).argmax(-1), 32)
    assert (found == ids).float().mean() > 0.9
    blind, shares = room._logits(vqvae, torch.randn(len(ids), 48), ids)   # features that say nothing: the shares
    nats = F.cross_entropy(shares.unflatten(0, (4, 32)), torch.stack(
        [ids // 32 ** group % 32 for group in range(4)], 1).mode(0).values)
    assert blind.abs().mean() < 0.2 * weight.abs().mean() and nats < torch.tensor(32.0).log()


def test_logits_are_those_of_a_linear_discriminant():
    """log(share x density) of each code, by numpy's least squares and torch's normal distribution."""
    torch.manual_seed(0)
    codebook, shares = torch.randn(5, 3), torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    targets = torch.multinomial(shares, 4_000, replacement=True)
    features = codebook[targets] @ torch.randn(3, 6) + torch.randn(4_000, 6)
    vqvae = SimpleNamespace(codebook=codebook, config=SimpleNamespace(codebook_size=5, groups=1))
    weight, bias = room._logits(vqvae, features, targets)

    given, wanted = np.c_[features.numpy(), np.ones(4_000)], codebook[targets].numpy()
    said = given @ np.linalg.lstsq(given, wanted, rcond=None)[0]
    spread = torch.from_numpy((wanted - said).T @ (wanted - said) / 4_000)
    normal = torch.distributions.MultivariateNormal(torch.from_numpy(said)[:, None], spread)
    expected = normal.log_prob(codebook.double()) + (targets.bincount() / 4_000).log()
    torch.testing.assert_close((features @ weight.T + bias).log_softmax(1).double(), expected.log_softmax(1),
                               atol=0.02, rtol=0.01)   # a ridge keeps spreads apart from nothing


def test_other_grids_are_refused(start):
    other = VQVAE(vqvae_config(dataclasses.replace(SMOKE.vqvae, groups=1), load_dataset("cater-gen-v1")))
    with pytest.raises(ValueError, match="8 x 8 pixels in 3 channels cannot replace those of 4 x 4 in 1"):
        retokenise(start, other)


@pytest.mark.parametrize("world, width, told", [("cater-gen-v1", 64, "64 x 64 pixels of 1 channels cannot be a start"),
                                                ("single-mnist", 32, "width 64 for 32")])
def test_what_cannot_go_over_is_refused_before_any_work(start, tmp_path, world, width, told):
    chosen = dataclasses.replace(SMOKE, mage=dataclasses.replace(SMOKE.mage, width=width, head_width=32))
    with pytest.raises(ValueError, match=told):
        train(load_dataset(world), chosen, start=start, new_tokens=True, folder=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_with_new_tokens_and_stops_and_goes_on_the_same(dataset, start, monkeypatch, tmp_path):
    monkeypatch.setattr(room, "CLIPS", 20)
    chosen = dataclasses.replace(SMOKE, pairs=20, watch_clips=1, vqvae=dataclasses.replace(
        SMOKE.vqvae, images=64, codebook_size=16, groups=2),
        mage=dataclasses.replace(SMOKE.mage, samples=16, width=64, head_width=32, masks=True))
    runs = []
    for name in ("straight", "stopped"):
        given = {"start": start, "new_tokens": True, "folder": tmp_path / name, "progress": False}
        if name == "stopped":
            assert train(dataset, chosen, minutes=1e-4, **given) is None
        runs.append(train(dataset, chosen, **given))
    assert (runs[0].mage.config.codebook_size, runs[0].mage.config.groups) == (16, 2)
    assert runs[0].card["start"]["dataset"] == "single-mnist" and "vqvae" in runs[0].card["curves"]
    for one, other in zip(runs[0].mage.state_dict().values(), runs[1].mage.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    other = dataclasses.replace(start, mage=copy.deepcopy(start.mage))
    with torch.no_grad():
        other.mage.text_encoder.words.add_(1.0)
    given = {"new_tokens": True, "folder": tmp_path / "straight", "progress": False}
    with pytest.raises(ValueError, match="another recipe"):   # not taken for the one before
        train(dataset, chosen, start=other, **given)
    (tmp_path / "straight" / "mage.pt").unlink()
    anew = train(dataset, chosen, start=other, **given)
    assert any(not torch.equal(one, two) for one, two in zip(anew.mage.state_dict().values(),
                                                             runs[0].mage.state_dict().values()))
    with pytest.raises(ValueError, match="none are given: name some.*--start"):
        train(dataset, chosen, new_tokens=True, folder=tmp_path / "none")
