"""Advection against Pillow's shifts of images and against what it is told to learn, and MAGE with it and without."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mage_core import training, weights
from mage_core.advection import Advection, _centre, _sliding, _waves
from mage_core.batches import Clips, training_batch
from mage_core.clips import load_dataset, token_clips
from mage_core.loop import optimisers
from mage_core.mage import MAGE, MAGEConfig
from mage_core.metrics import evaluation_batch
from mage_core.presets import mage_config, preset, vqvae_config
from mage_core.tokens import join_ids
from mage_core.training import FrameSource, generator, train
from mage_core.vqvae import VQVAE

REACH = 6
CONFIG = MAGEConfig(codebook_size=7, groups=4, rows=3, columns=5, clip_length=5, width=16, vocabulary_size=9,
                    context_length=8, head_width=8, axial_layers=3, text_layers=1, dropout=0.0, hidden_token=True,
                    shift_attention=True, time_bias=True, intervals=(1.0, 2.0), advection=REACH, patch=(2, 4))


def shifted(images, down, right):
    """Images (b c H W), each channel moved by Pillow: what comes from outside is black."""
    return torch.stack([torch.stack([
        torch.from_numpy(np.array(Image.fromarray(channel.numpy()).transform(
            (channel.shape[1], channel.shape[0]), Image.Transform.AFFINE, (1, 0, -right, 0, 1, -down))))
        for channel in image]) for image in images])


def centre(image):
    """Row and column of the centre of mass of an image (H W), by NumPy's weighted mean."""
    return [np.average(np.arange(len(profile)), weights=profile) for profile in (image.sum(1), image.sum(0))]


MASKED = dataclasses.replace(CONFIG, masks=True)
CUT_OUT = dataclasses.replace(MASKED, rows=4, columns=6, unet=8, phrases=4)   # see test_phrases
seeds = st.integers(0, 2 ** 32 - 1)
few = settings(max_examples=10, deadline=None)


def part(seed=0, **sizes):
    """An `Advection` whose codes have random pixels, the first none."""
    torch.manual_seed(seed)
    made = Advection(**({"width": 16, "codebook_size": 7, "groups": 4, "patch": (2, 4), "reach": REACH} | sizes))
    made.pixels.uniform_()[:, 0] = 0
    return made


def ids_of(made, shape, seed=0):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(made.codebook_size, size=(*shape, made.groups)))
    return join_ids(codes, made.codebook_size)


def model(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    mage = MAGE(config).eval()
    with torch.no_grad():
        for parameter in mage.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        if mage.advection is not None:
            mage.advection.pixels.uniform_()[:, 0] = 0
    return mage


def sample(config=CONFIG, batch=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shape = batch, config.clip_length, config.rows, config.columns
    return (torch.randint(config.codebook_size ** config.groups, shape, generator=draw),
            torch.randint(1, config.vocabulary_size, (batch, 6), generator=draw), torch.tensor([0.3, 0.7])[:batch])


# ---------------------------------------------------------------- what is moved

@few
@given(seeds, st.sampled_from([(1, (1, 4)), (4, (2, 4)), (8, (1, 4)), (2, (3, 8))]), st.data())
def test_every_displacement_is_a_shift_of_the_image(seed, sizes, data):
    groups, patch = sizes
    made = part(seed % 1000, groups=groups, patch=patch)
    ids = ids_of(made, (2, 3, 5), seed)
    image = made.image(ids)
    assert image.shape == (2, patch[0], 3 * patch[1], 5 * patch[1])
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(15, size=(2, 6)))
    brought = made.brought(image, tokens)
    assert brought.shape == (2, 6, patch[0], 2 * (2 * REACH + 1), patch[1], patch[1])
    by, across = data.draw(st.integers(-REACH, REACH)), data.draw(st.booleans())
    for moved, number in ((shifted(image, *((0, by) if across else (by, 0))), across * (2 * REACH + 1) + REACH + by),
                          (image, REACH)):   # no displacement is the image itself
        tiles = rearrange(moved, "b c (h y) (w x) -> b (h w) c y x", h=3, w=5)
        assert torch.equal(brought[:, :, :, number], tiles[torch.arange(2)[:, None], tokens])


@few
@given(seeds, st.sampled_from([(1, (1, 4)), (4, (2, 4)), (8, (1, 4)), (2, (3, 8))]))
def test_images_are_cut_up_as_codes_have_their_pixels(seed, sizes):
    groups, patch = sizes
    made = part(seed % 1000, groups=groups, patch=patch)
    ids = ids_of(made, (2, 2, 3, 5), seed)
    images = torch.stack([made.image(ids[:, time]) for time in range(2)], 1)
    assert torch.equal(made.cut_up(images[:, :, None])[..., 0, :], made.patches(ids))


def test_pixels_of_codes_are_what_the_decoder_projects_them_to():
    dataset, recipe = load_dataset("single-mnist"), preset("quick").vqvae
    vqvae = VQVAE(vqvae_config(recipe, dataset)).eval()
    source = FrameSource(dataset, 50, 0)
    with torch.no_grad():
        vqvae.initialise(source.batch(0, 800))   # so far the decoder is its projection
        made = part(codebook_size=64, groups=8, patch=(1, 4))
        made.pixels.copy_(vqvae.code_pixels())
        ids = vqvae.encode(source.batch(1, 8))
        torch.testing.assert_close(made.image(ids), vqvae.decoder(vqvae.embed(ids)), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="'released' have no pixels.*'patch'"):
        VQVAE(vqvae_config(preset("paper").vqvae, dataset)).code_pixels()


# ---------------------------------------------------------------- displacements

def test_chances_are_a_distribution_and_follow_what_is_looked_at():
    made = part()
    torch.nn.init.normal_(made.chances.weight, std=0.3)
    anchor, ids, times = torch.randn(2, 3, 5, 16), ids_of(made, (2, 3, 5)), torch.randn(2, 4, 16)
    chances, things, *_ = made.displacements(anchor, ids, times)
    assert torch.equal(things, made.image(ids)[:, None].expand(-1, made.THINGS, -1, -1, -1))
    assert chances.shape == (2, 4, made.THINGS, 2 * (2 * REACH + 1))
    torch.testing.assert_close(chances.exp().sum(-1), torch.ones(2, 4, made.THINGS))
    for changed in ((anchor, ids, times + torch.randn(4, 16)), (anchor.flip(1), ids, times),
                    (anchor, ids.flip(1), times)):   # when, what, and where
        assert not torch.allclose(made.displacements(*changed)[0], chances, atol=1e-3)


@few
@given(seeds)
def test_centres_of_mass_are_weighted_means_of_places(seed):
    image = torch.rand(2, 7, 9, generator=torch.Generator().manual_seed(seed))
    found = _centre(image.sum(2), image.sum(1))
    for row, one in zip(found, image):
        np.testing.assert_allclose(row, centre(one.numpy()), atol=1e-4)
    waves, periods = _waves(found, 32), 3.0 * (200.0 / 3.0) ** (np.arange(16) / 15)
    np.testing.assert_allclose(waves[0, :16], np.sin(2 * np.pi * found[0, 0] / periods), atol=1e-4)
    np.testing.assert_allclose(waves[1, 48:], np.cos(2 * np.pi * found[1, 1] / periods), atol=1e-4)
    assert _centre(torch.zeros(1, 7), torch.zeros(1, 9)).isfinite().all(), "nothing has a centre too"


@torch.no_grad()
def test_where_a_thing_is_looked_for_its_centre_is_told():
    made, ids = part(groups=1, patch=(1, 4)), 1 + ids_of(part(groups=1), (1, 3, 5)) % 6   # none empty
    told: list[torch.Tensor] = []
    made.layers[0].register_forward_hook(lambda layer, given, out: told.append(given[0][0, 0, :, 16:80]))
    made.where.weight.zero_()
    made.norm.bias.copy_(torch.arange(16.0))
    anchor = torch.randn(1, 3, 5, 16)
    made.displacements(anchor, ids, torch.randn(1, 1, 16))   # looking everywhere
    expected = torch.tensor(np.array(centre(made.image(ids)[0, 0].numpy())), dtype=torch.float32)
    torch.testing.assert_close(told[0], _waves(expected, 32).expand(3, -1), atol=1e-3, rtol=0)
    anchor.zero_()[0, 1, 2, 3] = 1e3   # the token of row 1, column 2 alone
    made.where.weight[:, 3] = 100.0
    made.displacements(anchor, ids, torch.randn(1, 1, 16))
    expected = torch.tensor(centre(made.image(ids)[0, 0, 4:8, 8:12].numpy()) + np.array([4, 8]), dtype=torch.float32)
    torch.testing.assert_close(told[1], _waves(expected, 32).expand(3, -1), atol=1e-3, rtol=0)


@few
@given(seeds, st.integers(-REACH, REACH))
def test_the_true_displacement_misses_least(seed, by):
    made = part()
    first = ids_of(made, (1, 3, 5), seed)
    image = made.image(first)
    truth = shifted(image, by, 0)
    patches = rearrange(truth, "b c (h gy y) (w gx x) -> b h w (gy gx) (c y x)", h=3, w=5, gy=made.layout["gy"],
                        gx=made.layout["gx"])
    made.pixels = torch.stack([   # codes that can say it exactly
        torch.cat([torch.zeros(1, 8), patches[..., group, :].flatten(0, 2)]) for group in range(4)])
    made.codebook_size = 16
    codes = torch.arange(1, 16).view(1, 3, 5, 1).expand(-1, -1, -1, 4)
    then = join_ids(codes, 16)[:, None]
    misses = [made.misses(F.one_hot(torch.tensor(number), 26).float().log().expand(1, 1, 3, -1), image, then).item()
              for number in range(26)]
    assert misses[REACH + by] == min(misses) and misses[REACH + by] < 1e-3
    assert max(misses) > 3, "others do not fit"
    assert max(misses) < -made.ASTRAY + 1e-3, "but no token costs more than one that comes from nowhere"


def test_background_is_not_asked_and_dice_decide_which_tokens_are(monkeypatch):
    made, ids = part(), ids_of(part(), (2, 4, 3, 5))
    chances, image = torch.randn(2, 4, 3, 26).log_softmax(-1), made.image(ids[:, 0])
    assert made.misses(chances, image, torch.zeros_like(ids)).item() == 0
    monkeypatch.setattr(Advection, "LOOKS", 5)
    dice = torch.rand(ids.shape)
    found = made.misses(chances, image, ids, dice)
    assert torch.equal(found, made.misses(chances, image, ids, dice))
    asked = torch.where(ids != 0, dice, -1.0).flatten(1).topk(5).indices
    rest = torch.ones(2, 60).scatter_(1, asked, 0.0).bool().view(ids.shape)
    assert torch.equal(found, made.misses(chances, image, torch.where(rest, ids.flip(0), ids), dice))
    assert not torch.equal(found, made.misses(chances, image, ids, 1 - dice))


# ---------------------------------------------------------------- masks

def masked(seed=0, **sizes):
    """A `part` with masks, of which nothing is at its start any more."""
    made = part(seed, **({"masks": True, "grid": (3, 5)} | sizes))
    with torch.no_grad():
        for linear in (made.cut, made.places, made.whole, made.chances):
            linear.weight.normal_(std=0.3)
    return made


@few
@given(seeds, st.integers(-REACH, REACH))
def test_a_row_of_chances_as_a_matrix_shifts_what_is_reversed(seed, by):
    image = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(seed))
    matrix = _sliding(F.one_hot(torch.tensor(REACH + by), 2 * REACH + 1).float(), 9)
    assert torch.equal(matrix @ image.flip(-2), shifted(image, by, 0))
    assert torch.equal(image.flip(-1) @ matrix.mT, shifted(image, 0, by))


@torch.no_grad()
def test_a_mask_cuts_a_thing_out_of_the_first_image_and_all_together_are_the_brightest():
    made = masked()
    anchor, ids, times = torch.randn(2, 3, 5, 16), ids_of(made, (2, 3, 5)), torch.randn(2, 4, 16)
    chances, things, *_ = made.displacements(anchor, ids, times)
    image = made.image(ids)
    shares = (things / image[:, None])[image[:, None].expand_as(things) > 0]
    assert shares.min() > 0 and shares.max() < 1 and shares.std() > 0.01
    torch.testing.assert_close(things[:, :, 0] * image[:, None, 1], things[:, :, 1] * image[:, None, 0])
    shown = made.things(chances.exp(), things)
    assert shown.shape == (2, 4, 3, 5, made.THINGS + 1, 32)
    assert torch.equal(shown[..., -1, :], shown[..., :-1, :].amax(-2))

    plain = part()
    made.cut.weight.zero_()
    made.cut.bias.fill_(100.0)   # all of the image
    for parameter in made.places.parameters():
        parameter.zero_()
    plain.load_state_dict({name: tensor for name, tensor in made.state_dict().items() if name in plain.state_dict()})
    chances, things, *_ = made.displacements(anchor, ids, times)
    _, whole, *_ = plain.displacements(anchor, ids, times)
    assert torch.equal(things, whole)
    torch.testing.assert_close(made.things(chances.exp(), things)[..., :-1, :], plain.things(chances.exp(), whole))


@torch.no_grad()
def test_a_cut_out_thing_is_told_by_its_own_centre():
    made, told = masked(), []
    made.layers[0].register_forward_hook(lambda layer, given, out: told.append(given[0][0, 0, :, 16:80]))
    made.cut.weight.mul_(10)
    _, things, *_ = made.displacements(torch.randn(1, 3, 5, 16), ids_of(made, (1, 3, 5)), torch.randn(1, 1, 16))
    expected = torch.tensor(np.array([centre(thing.mean(0).numpy()) for thing in things[0]]), dtype=torch.float32)
    torch.testing.assert_close(told[0], _waves(expected, 32), atol=1e-3, rtol=0)
    assert expected.std(0).min() > 0.02


@torch.no_grad()
def test_a_place_that_is_known_is_a_displacement_from_the_centre():
    made = masked()
    places = torch.zeros(1, 1, 1, 12 + 20 + 4 * REACH)
    places[..., REACH + 7] = 5.0                     # of rows, the place 7
    places[..., 12 + 2 * REACH + REACH + 11] = 3.0   # of columns, the place 11
    found = made._by_place(places, torch.tensor([[[4.0, 11.25]]]))[0, 0, 0]
    wanted = torch.zeros(2, 2 * REACH + 1)
    wanted[0, REACH + 3] = 5.0      # three rows down; between two pixels the value of both
    wanted[1, REACH - 1], wanted[1, REACH] = 0.75, 2.25
    torch.testing.assert_close(found, wanted.flatten())
    outside = made._by_place(torch.randn(1, 1, 1, 12 + 20 + 4 * REACH), torch.tensor([[[11.0, 0.0]]]))
    assert outside.isfinite().all()


def test_the_error_of_the_picture_is_its_squared_distance_and_moves_masks():
    made = masked()
    anchor, ids, times = torch.randn(2, 3, 5, 16), ids_of(made, (2, 5, 3, 5)), torch.randn(2, 4, 16)
    chances, things, *_ = made.displacements(anchor, ids[:, 0], times)
    shown, error, _ = made.picture_error(chances.exp(), things, ids[:, 1:])
    assert torch.equal(shown, made.pictures(chances.exp(), things))
    apart = (made.cut_up(shown)[..., -1, :] - made.patches(ids[:, 1:])).square().sum((2, 3, 4))
    torch.testing.assert_close(error, apart.mean())
    error.backward()
    for linear in (made.cut, made.key, made.query, made.places, made.chances):
        assert linear.weight.grad.any()


def test_cut_out_things_learn_from_displacements_alone():
    mage, (ids, text, speed) = model(MASKED), sample()
    parts = [mage.advection.cut.weight, mage.advection.chances.weight]
    dice = torch.rand(ids[:, 1:].shape)
    out = mage(ids, text, speed, dice=dice)
    chances, things, *_ = mage.displacements(out.motion_anchor, ids[:, 0], text, speed)
    made = mage.advection
    misses = made.misses(chances, made.image(ids[:, 0]), ids[:, 1:], dice)
    _, error, _ = made.picture_error(chances.exp(), things, ids[:, 1:])
    torch.testing.assert_close(out.displacement_loss, misses + made.PICTURE * error)
    assert torch.autograd.grad(out.prediction_loss, parts, retain_graph=True, allow_unused=True) == (None, None)
    assert all(gradient.any() for gradient in torch.autograd.grad(out.displacement_loss, parts))
    frames = torch.tensor([0, 3])   # of the frames that are asked for alone
    _, error, _ = made.picture_error(chances[:, frames].exp(), things, ids[:, frames + 1])
    some = mage(ids, text, speed, dice=dice, frames=frames)
    torch.testing.assert_close(some.displacement_loss, misses + made.PICTURE * error)
    plain = model()
    part, = torch.autograd.grad(plain(ids, text, speed).prediction_loss, [plain.advection.chances.weight])
    assert part.any()


# ---------------------------------------------------------------- a U-Net

def test_with_a_u_net_more_clips_cost_no_motion_anchor(monkeypatch):
    monkeypatch.setattr(Advection, "BLUR", 5.0)   # so that random displacements explain something
    mage, (ids, text, speed) = model(CUT_OUT), sample(CUT_OUT)
    more = tuple(torch.cat([tensor] * 2) for tensor in sample(CUT_OUT, seed=1))
    dice, seen = torch.rand(6, *ids.shape[1:])[:, 1:], []
    mage.motion_anchor.register_forward_hook(lambda module, given, out: seen.append(len(out)))
    with torch.no_grad():   # what things are asked tells their displacements
        mage.advection.chances.weight.mul_(30)
    out = mage(ids, text, speed, more=more, dice=dice)
    assert seen == [2]
    ids, text, speed = (torch.cat(pair) for pair in zip((ids, text, speed), more))
    whole = mage(ids, text, speed, dice=dice)
    torch.testing.assert_close(out.displacement_loss, whole.displacement_loss)
    others = mage(ids, torch.cat([text[:2], text[:1].expand(4, -1)]), speed, dice=dice)
    assert (others.displacement_loss - whole.displacement_loss).abs() > 1e-3, "each clip's own words"
    parts = [mage.advection.unet.cut.weight, mage.advection.asked, mage.advection.word_vectors.weight]
    assert all(gradient.any() for gradient in torch.autograd.grad(out.displacement_loss, parts))


def test_a_start_without_a_u_net_gives_what_both_have():
    theirs, ours = model(dataclasses.replace(CUT_OUT, unet=0, phrases=0), seed=1), model(CUT_OUT, seed=2)
    fresh = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.start_from(theirs, "abcdefghi", "abcdefghi")
    taken = {"advection." + name for name in ("pixels", "what.weight", "what.bias", "when.weight", "when.bias",
                                              "shown.weight", "shown.bias", "sure.weight", "sure.bias",
                                              "whole.weight", "whole.bias", "chances.bias", "places.bias")}
    for name, tensor in ours.state_dict().items():
        kept = name.startswith("advection.") and name not in taken and not name.endswith(".bias")
        if name.startswith("advection.layers") or kept:
            assert torch.equal(tensor, fresh[name]), name
        elif not name.startswith("advection.") or name in taken:
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    again = model(CUT_OUT, seed=3)
    again.start_from(ours, "abcdefghi", "abcdefghi")
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(ValueError, match="unet 8 for 0"):
        theirs.start_from(ours, "abcdefghi", "abcdefghi")


@pytest.mark.parametrize("config, apart", [(CONFIG, False), (MASKED, True), (CUT_OUT, True)],
                         ids=["plain", "masks", "unet"])
def test_what_displacements_alone_teach_is_what_the_next_tokens_do_not(config, apart):
    mage, (ids, text, speed) = model(config), sample(config)
    names, parameters = zip(*mage.advection.named_parameters())
    gradients = torch.autograd.grad(mage(ids, text, speed).prediction_loss, parameters, allow_unused=True)
    untaught = [name for name, gradient in zip(names, gradients) if gradient is None or not gradient.any()]
    found = {id(parameter) for parameter in mage.advection.taught_apart()}
    assert [name for name, parameter in zip(names, parameters) if id(parameter) in found] == untaught * apart
    assert bool(found) == apart


def test_training_clips_them_by_themselves(monkeypatch, tmp_path):
    stages = []
    monkeypatch.setattr(training, "fit", lambda stage, *_, **__: stages.append(stage))
    dataset, chosen = load_dataset("double-mnist"), preset("smoke", "double-mnist")
    vqvae = VQVAE(vqvae_config(chosen.vqvae, dataset)).eval()
    monkeypatch.setenv("MAGE_CACHE", str(tmp_path))
    training.train_mage(dataclasses.replace(chosen, pairs=2, watch_clips=1), dataset, vqvae, tmp_path, progress=False)
    mage = stages[0].parts["mage"]
    assert mage.config.unet and [id(p) for p in stages[0].apart] == [id(p) for p in mage.advection.taught_apart()]


def test_masks_learn_to_tell_apart_two_things_that_move_apart():
    """Of two marks side by side, one goes down and the other to the right; which, features of the tokens tell."""
    made = part(groups=1, patch=(1, 4), masks=True, grid=(3, 5))
    made.pixels = (torch.arange(7.0)[:, None] / 6).expand(1, 7, 16).contiguous()
    first = torch.zeros(1, 3, 5, dtype=torch.long)
    first[0, 0, 1], first[0, 0, 2] = 3, 6
    then = torch.zeros_like(first)
    then[0, 1, 1], then[0, 0, 3] = 3, 6   # one token, four pixels
    chances = torch.zeros(1, 1, made.THINGS, 26)
    chances[..., 0, REACH + 4] = chances[..., 1, 13 + REACH + 4] = chances[..., 2, 13 + REACH + 4] = 1
    x = torch.randn(1, 3, 5, 16)
    optimiser = torch.optim.Adam(made.parameters(), 0.02)
    told = torch.randn(1, made.THINGS, 16 + 2 * made.WAVES)
    for _ in range(150):
        things = made.image(first)[:, None] * made._masks(x, told)[:, :, None]
        _, error, _ = made.picture_error(chances, things, then[:, None])
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
    masks = made._masks(x, told)[0]
    assert error < 0.1, "from 9 and more"
    assert masks[0, :4, 4:8].min() > 0.9 and masks[0, :4, 8:12].max() < 0.1, "the first thing is the first mark"
    assert masks[1:, :4, 4:8].max() < 0.1 and masks[1:, :4, 8:12].amax(0).min() > 0.9


# ---------------------------------------------------------------- logits

def test_logits_fall_with_the_squared_distance_from_what_is_shown():
    made = part()
    things = torch.rand(6, made.THINGS, 32)
    with torch.no_grad():
        made.shown.weight.zero_()
        made.shown.bias.copy_(torch.tensor([-50.0, -50.0, 50.0, -50.0]).repeat(4))   # the second thing, for sure
        made.sure.bias.fill_(1.5)
        features = torch.randn(6, 16)
        logits = made(features, things)
    apart = (things[:, 1].unflatten(1, (4, 8))[:, :, None] - made.pixels).square().sum(-1)
    wanted = -0.5 * np.exp(1.5) * apart
    torch.testing.assert_close(logits - logits[..., :1], wanted - wanted[..., :1], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        made.sure.bias.add_(np.log(3.0))
    torch.testing.assert_close(made(features, things), 3 * logits)
    made.sure.bias.data.sub_(np.log(3.0))
    torch.testing.assert_close(made(features, things, 3.0), 3 * logits)


@torch.no_grad()
def test_all_things_together_are_on_offer_with_masks():
    made, things, features = masked(), torch.rand(6, 4, 32), torch.randn(6, 16)
    made.whole.bias.fill_(100.0)
    made.sure.bias.fill_(2.0)
    logits = made(features, things)
    apart = (things[:, 3].unflatten(1, (4, 8))[:, :, None] - made.pixels).square().sum(-1)
    wanted = -0.5 * np.exp(2.0) * apart
    torch.testing.assert_close(logits - logits[..., :1], wanted - wanted[..., :1], atol=1e-3, rtol=1e-4)


# ---------------------------------------------------------------- MAGE with it

@pytest.mark.parametrize("config", [CONFIG, MASKED, CUT_OUT], ids=["plain", "masks", "unet"])
def test_generation_is_the_same_frame_by_frame_and_in_bf16_nearly(config):
    mage, (ids, text, speed) = model(config), sample(config)
    once = mage.generate(ids[:, 0], text, speed)
    assert torch.equal(once, mage.generate(ids[:, 0], text, speed, recompute=True))
    still = model(config)
    with torch.no_grad():
        still.advection.sure.bias.fill_(-100.0)
    assert not torch.equal(once, still.generate(ids[:, 0], text, speed)), "advection has a say"
    with torch.autocast("cpu", torch.bfloat16):
        rounded = mage.generate(ids[:, 0], text, speed)
    assert (rounded == once).float().mean() > 0.5


def test_under_autocast_it_trains_and_what_things_look_like_stays_exact():
    mage, (ids, text, speed) = model(), sample()
    with torch.autocast("cpu", torch.bfloat16):
        anchor = mage.anchor(mage.visual_tokens(ids[:, :1])[:, 0], text, speed)
        assert mage._things(anchor, ids[:, 0], text, speed).dtype == torch.float32
        mage(ids, text, speed).loss.backward()
    assert mage.advection.shown.weight.grad.isfinite().all() and mage.advection.shown.weight.grad.any()


@torch.no_grad()
def test_in_generation_a_thing_can_be_where_it_likeliest_is():
    mage, (ids, text, speed) = model(), sample()
    first = ids[:, 0]
    anchor = mage.anchor(mage.visual_tokens(ids[:, :1])[:, 0], text, speed)
    chances, *_ = mage.displacements(anchor, first, text, speed)
    things = mage._things(anchor, first, text, speed, at_one_place=True)
    assert things.shape == (2, 4, 3, 5, 3, 32) and len(chances.argmax(-1).unique()) > 3
    image, layout = mage.advection.image(first), mage.advection.layout
    for clip, frame, thing in np.ndindex(2, 4, 3):
        by = chances[clip, frame, thing].argmax().item()
        down, right = (by - REACH, 0) if by <= 2 * REACH else (0, by - 3 * REACH - 1)
        wanted = rearrange(shifted(image[clip:clip + 1], down, right),
                           "1 c (h gy y) (w gx x) -> h w (gy gx c y x)", h=3, w=5, gy=layout["gy"], gx=layout["gx"])
        assert torch.equal(things[clip, frame, :, :, thing], wanted)
    trusting = model(dataclasses.replace(CONFIG, trust=50.0))
    assert not torch.equal(trusting.generate(first, text, speed), mage.generate(first, text, speed))
    with pytest.raises(ValueError, match="trust is 0.5: it must be at least 1"):
        dataclasses.replace(CONFIG, trust=0.5)


@pytest.mark.parametrize("config", [CONFIG, MASKED, CUT_OUT], ids=["plain", "masks", "unet"])
@torch.no_grad()
def test_teacher_forcing_says_what_generation_does_where_it_trusts_as_was_learned(config):
    mage, (ids, text, speed) = model(config), sample(config)
    made = mage.generate(ids[:, 0], text, speed)
    trusting = model(dataclasses.replace(config, trust=50.0))
    trusting.advection.chances.weight.mul_(1e4)   # one displacement for each thing
    unsure = trusting.generate(ids[:, 0], text, speed)
    assert not torch.equal(trusting._likeliest(trusting(unsure, text, speed).logits), unsure[:, 1:])
    out = mage(made, text, speed)
    assert torch.equal(mage._likeliest(out.logits), made[:, 1:])
    assert torch.equal(out.loss, out.prediction_loss + out.displacement_loss) and out.displacement_loss > 0
    frames = torch.tensor([0, 2, 3])
    torch.testing.assert_close(mage(made, text, speed, frames=torch.tensor([0, 1, 2, 3])).logits, out.logits)
    predict = torch.rand(2, 3, config.rows, config.columns) < 0.5
    some = mage(made, text, speed, frames=frames, predict=predict)
    whole = mage(made, text, speed, frames=frames)
    torch.testing.assert_close(some.logits, whole.logits[predict])
    guess = mage.guess(made, text, speed, frames, 2)
    assert torch.equal(guess, mage._likeliest(whole.logits)[:, -2:])


@torch.no_grad()
def test_the_anchor_is_looked_at_as_among_the_frames_by_all_layers_but_the_last():
    mage, (ids, text, speed) = model(dataclasses.replace(CONFIG, axial_layers=6)), sample()
    embedded = mage.visual_tokens(ids[:, :-1])
    anchor = mage.anchor(embedded[:, 0], text, speed)
    kept, (first, *middle, _) = [], mage.generator.layers
    hook = first.register_forward_hook(lambda layer, given, made: kept.append(made[:, :1]))
    mage.generator(anchor, embedded, speed=speed)
    hook.remove()
    x = kept[0]   # the first step after the first layer, with frames behind it
    for layer in middle:
        x = layer(x, torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(mage.generator.look(anchor, speed), x[:, 0])


def test_a_start_without_advection_keeps_what_it_knew_and_gets_fresh_advection():
    plain, ours = model(dataclasses.replace(CONFIG, advection=0, patch=None), seed=1), model(seed=2)
    fresh = {name: tensor.clone() for name, tensor in ours.state_dict().items() if name.startswith("advection.")}
    ours.start_from(plain, "abcdefghi", "abcdefghi")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in fresh else plain.state_dict()[name]), name
    again = model(seed=3)
    again.start_from(ours, "abcdefghi", "abcdefghi")
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(ValueError, match="advection 6 for 0.*train from nothing"):
        plain.start_from(ours, "abcdefghi", "abcdefghi")


def test_a_start_without_masks_keeps_what_it_knew_and_gets_fresh_ones():
    plain, ours = model(seed=1), model(MASKED, seed=2)
    fresh = {name: tensor.clone() for name, tensor in ours.state_dict().items() if name not in plain.state_dict()}
    assert {name.split(".")[1] for name in fresh} == {"key", "query", "cut", "places", "whole"}
    ours.start_from(plain, "abcdefghi", "abcdefghi")
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in fresh else plain.state_dict()[name]), name
    with pytest.raises(ValueError, match="masks True for False"):
        plain.start_from(ours, "abcdefghi", "abcdefghi")


@pytest.mark.parametrize("fields, message", [
    ({"patch": None}, "patch None.*such as"), ({"patch": (0, 4)}, r"patch \(0, 4\)"),
    ({"advection": 12}, "advection is 12.*12 pixels"), ({"advection": -1}, "advection is -1"),
    ({"groups": 5}, "groups is 5.*power of two")])
def test_sizes_that_cannot_be_are_told(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_codes_without_pixels_are_refused_before_any_work(tmp_path):
    chosen = dataclasses.replace(preset("smoke"), vqvae=preset("paper").vqvae)
    with pytest.raises(ValueError, match="mage.advection is 36.*'released'.*vqvae.shape=patch"):
        train(load_dataset("single-mnist"), chosen, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_without_advection_names_no_displacements():
    mage, (ids, text, speed) = model(dataclasses.replace(CONFIG, advection=0, patch=None)), sample()
    anchor = mage.anchor(mage.visual_tokens(ids[:, :1])[:, 0], text, speed)
    with pytest.raises(ValueError, match="moves nothing by pixels.*advection="):
        mage.displacements(anchor, ids[:, 0], text, speed)
    assert mage(ids, text, speed).displacement_loss == 0


def test_weights_with_advection_are_the_same_when_read_again(tmp_path):
    dataset, chosen = load_dataset("single-mnist"), preset("smoke")
    vqvae = VQVAE(vqvae_config(chosen.vqvae, dataset)).eval()
    with torch.no_grad():
        vqvae.initialise(FrameSource(dataset, 50, 0).batch(0, 400))
    torch.manual_seed(0)
    recipe = dataclasses.replace(chosen.mage, advection=36)
    mage = MAGE(mage_config(recipe, dataset, chosen.vqvae.codebook_size, chosen.vqvae.groups)).eval()
    mage.initialise_from_codes(vqvae.codebook)
    mage.advection.pixels.copy_(vqvae.code_pixels())
    for precision in weights.PRECISIONS:
        saved = weights.save(tmp_path / "w.safetensors", vqvae, mage, dataset.about, precision=precision)
        assert saved.mage.config == mage.config and saved.mage.config.patch == (1, 4)
        assert torch.equal(saved.mage.advection.pixels, mage.advection.pixels), "of pixels every bit is kept"
    batch, read = evaluation_batch(dataset, "test", range(2)), weights.load(tmp_path / "w.safetensors")
    assert torch.equal(*(generator(found.vqvae, found.mage).videos(batch) for found in (saved, read)))


def test_displacements_are_learned_in_seconds():
    """The motion anchor alone, of a model that is otherwise never right, learns where a single digit is."""
    dataset, chosen = load_dataset("single-mnist"), preset("smoke")
    vqvae = VQVAE(vqvae_config(chosen.vqvae, dataset)).eval()
    with torch.no_grad():
        vqvae.initialise(FrameSource(dataset, 50, 0).batch(0, 400))
    torch.manual_seed(0)
    recipe = dataclasses.replace(chosen.mage, advection=36, batch=8)
    mage = MAGE(mage_config(recipe, dataset, chosen.vqvae.codebook_size, chosen.vqvae.groups))
    mage.initialise_from_codes(vqvae.codebook)
    mage.advection.pixels.copy_(vqvae.code_pixels())
    clips = Clips(token_clips(dataset, vqvae, "train", 200, vqvae_key="test", progress=False))
    both = optimisers(mage, 2e-3, muon=recipe.muon)
    losses = []
    for step in range(60):
        batch = training_batch(clips, mage, recipe, 0, step)
        loss = mage(**batch).displacement_loss
        mage.zero_grad()
        loss.backward()
        for optimiser in both:
            optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < np.mean(losses[:5]) - 0.4, losses


def test_a_generated_thing_is_at_one_place_where_what_is_displaced_is_trusted(monkeypatch):
    """As likely as it is where it is not trusted more than was learned; a guess in training has never decided."""
    ids, text, speed = sample()
    for trust, decided in ((1.0, 0), (10.0, 1)):
        made, called = model(dataclasses.replace(CONFIG, trust=trust)), []
        least = made.advection.least_error
        monkeypatch.setattr(made.advection, "least_error", lambda *given: called.append(given) or least(*given))
        made.guess(ids, text, speed, torch.arange(2), 1)
        assert not called
        made.generate(ids[:, 0], text, speed)
        assert len(called) == decided


def test_a_guess_sees_things_where_they_are_in_the_frames_that_it_guesses(monkeypatch):
    made, (ids, text, speed), seen = model(), sample(), []
    monkeypatch.setattr(made, "_logits", lambda features, things, *rest, real=made._logits: seen.append(things) or
                        real(features, things, *rest))
    made.guess(ids, text, speed, torch.tensor([0, 2]), 1)
    anchor = made.anchor(made.visual_tokens(ids[:, :1])[:, 0], text, speed)
    every = made._things(anchor, ids[:, 0], text, speed)
    torch.testing.assert_close(seen[0], every[:, [2]])
    assert not torch.allclose(every[:, 2], every[:, 3])


def test_each_clip_counts_as_much_however_many_of_its_tokens_are_asked():
    made = part()
    ids = ids_of(made, (2, 3, 3, 5))
    ids[0] = ids[0, 0]   # all rests in the first clip, and of the second three tokens are not background
    ids[1].view(-1)[3:] = 0
    image, dice = made.image(ids[:, 0]), torch.rand(2, 3, 3, 5)
    chances = torch.randn(2, 3, 2, 4 * REACH + 2).log_softmax(-1)
    whole = made.misses(chances, image, ids, dice)
    alone = [made.misses(chances[k:k + 1], image[k:k + 1], ids[k:k + 1], dice[k:k + 1]) for k in range(2)]
    assert not torch.isclose(*alone) and torch.isclose(whole, torch.stack(alone).mean())


def test_logits_from_what_is_displaced_stay_exact_under_autocast():
    made = part()
    torch.nn.init.normal_(made.shown.weight)
    features, things = torch.randn(20, 16), torch.rand(20, 3, 32)
    exact = made(features, things)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(features, things), exact)
    torch.nn.init.constant_(made.sure.bias, 200.0)   # however sure it is
    assert made(features, things).isfinite().all()


def test_displacements_stay_exact_under_autocast_and_what_is_seen_of_them_teaches_nothing():
    mage, (ids, text, speed) = model(CUT_OUT), sample(CUT_OUT)
    steps = torch.arange(1, CUT_OUT.clip_length)
    asked = None, ids[:, 0], mage.generator.positions(steps, speed)[..., 0, 0, :].expand(2, -1, -1), text
    exact = mage.advection.displacements(*asked)
    with torch.autocast("cpu", torch.bfloat16):
        found = mage.advection.displacements(*asked)
    assert exact.chances.requires_grad and torch.equal(found.chances, exact.chances)
    truth = mage.advection.image(ids[:, 1:].flatten(0, 1)).unflatten(0, ids[:, 1:].shape[:2])
    assert not mage.advection.explained(exact.chances.exp(), exact.things, truth).requires_grad
