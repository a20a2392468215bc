"""The closer look: windows against NumPy's slices, what moves with what, and MAGE with and without it."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_core import weights
from mage_core.closer import CloserLook, cropped, put_back
from mage_core.clips import load_dataset
from mage_core.loop import optimisers
from mage_core.mage import MAGE, MAGEConfig
from mage_core.phrases import phrases_of
from mage_core.presets import changed, mage_config, preset, sized_like, vqvae_config
from mage_core.training import train_mage
from mage_core.vqvae import VQVAE

AND, WORDS = 4, 9
CONFIG = MAGEConfig(codebook_size=5, groups=2, rows=4, columns=6, clip_length=4, width=16, vocabulary_size=WORDS,
                    context_length=7, axial_layers=3, head_width=16, dropout=0.0, shift_attention=True,
                    intervals=(1.0, 2.0), advection=5, patch=(1, 4), masks=True, unet=8, phrases=AND)
CLOSER = dataclasses.replace(CONFIG, window=16)
few = settings(max_examples=30, deadline=None)


def closer(seed=0):
    """One in use, with random weights: for images (2 24 32), two things and features (8 12 16)."""
    torch.manual_seed(seed)
    made = CloserLook(2, 8, 16, WORDS, 16).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def mage_of(config, seed=0):
    """A model in use, all of whose parts do something."""
    torch.manual_seed(seed)
    made = MAGE(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        made.advection.pixels.uniform_()
        made.advection.unet.share.fill_(0.5)
    return made


def given_to_mage():
    """Token ids of two clips, caption ids, speeds."""
    ids = torch.randint(CONFIG.codebook_size ** CONFIG.groups, (2, 4, 4, 6), generator=torch.Generator().manual_seed(0))
    return ids, torch.tensor([[1, 2, 3, AND, 5, 6], [1, 7, 2, AND, 8, 3]]), torch.tensor([0.3, 0.7])


def looked_at(seed=0):
    """What a closer look is given: image, masks, features, centres, caption ids, how much words tell."""
    draw = torch.Generator().manual_seed(seed)
    text = torch.tensor([[1, 2, 3, AND, 5, 6], [1, 7, 2, AND, 8, 3]])
    telling = phrases_of(text, AND, 0)[0] * torch.rand(2, 1, 6, generator=draw)
    return (torch.rand(2, 2, 24, 32, generator=draw), 0.1 + 0.8 * torch.rand(2, 2, 24, 32, generator=draw),
            torch.randn(2, 2, 8, 12, 16, generator=draw), 8 + 8 * torch.rand(2, 2, 2, generator=draw), text, telling)


# ---------------------------------------------------------------- windows

corners_ = st.lists(st.tuples(st.integers(-9, 12), st.integers(-9, 15)), min_size=1, max_size=3)


@few
@given(corners_, st.integers(0, 99))
def test_a_window_is_a_slice_of_the_padded_image(corners, seed):
    images = np.random.default_rng(seed).random((len(corners), 2, 10, 13), np.float32)
    padded = np.pad(images, ((0, 0), (0, 0), (20, 20), (20, 20)))
    expected = [image[:, 20 + y:28 + y, 20 + x:28 + x] for image, (y, x) in zip(padded, corners)]
    found = cropped(torch.from_numpy(images), torch.tensor(corners), 8)
    np.testing.assert_array_equal(found.numpy(), np.stack(expected))


@few
@given(corners_, st.integers(0, 99))
def test_what_is_put_back_comes_from_where_it_was(corners, seed):
    draw, at = torch.Generator().manual_seed(seed), torch.tensor(corners)
    windows = torch.rand(len(at), 8, 8, generator=draw)
    images = put_back(windows, at, (10, 13))
    inside = cropped(torch.ones(len(at), 1, 10, 13), at, 8)[:, 0]
    torch.testing.assert_close(cropped(images[:, None], at, 8)[:, 0], windows * inside)
    torch.testing.assert_close(images.sum(), (windows * inside).sum())   # and nothing else is there


# ---------------------------------------------------------------- what it finds

@torch.no_grad()
def test_it_begins_as_no_change():
    torch.manual_seed(0)
    given_ = looked_at()
    masks, chances, places = CloserLook(2, 8, 16, WORDS, 16).eval()(*given_)
    torch.testing.assert_close(masks, given_[1], atol=1e-5, rtol=0)
    assert places.shape == (2, 2, 2, 11) and torch.equal(places, places.round())
    torch.testing.assert_close(places.diff(), torch.ones(2, 2, 2, 10))
    likely = torch.distributions.Normal(given_[3][..., None], 0.5).log_prob(places)
    torch.testing.assert_close(chances, likely - likely.logsumexp(-1, keepdim=True), atol=1e-4, rtol=1e-4)
    assert ((chances.exp() * places).sum(-1) - given_[3]).abs().max() < 0.1   # and so are centres, nearly


@torch.no_grad()
@pytest.mark.parametrize("down, right", [(2, 0), (-2, 4), (4, -2)])
def test_what_it_finds_moves_with_the_image(down, right):
    """By even numbers of pixels: features are half as large. Centres are in the middle, so that no window leaves."""
    made, (image, masks, features, _, text, telling) = closer(), looked_at()
    centres = torch.tensor([12.0, 16.0]) + torch.tensor([[[0.3, -0.2], [0.7, 0.1]], [[-0.4, 0.9], [0.2, -0.6]]])

    def moved(what, scale=1):
        return what.roll((down // scale, right // scale), (-2, -1))

    better, chances, places = made(image, masks, features, centres, text, telling)
    assert (better - masks).abs().max() > 0.05
    there, same, others = made(moved(image), moved(masks), moved(features, 2), centres + torch.tensor([down, right]),
                               text, telling)
    torch.testing.assert_close(there, moved(better), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(same, chances, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(others, places + torch.tensor([down, right])[:, None])


@torch.no_grad()
def test_what_lies_outside_of_a_window_is_neither_seen_nor_changed():
    made, (image, masks, features, _, text, telling) = closer(), looked_at()
    centres = torch.tensor([10.0, 12.0]).expand(2, 2, 2)   # windows are rows 2 to 17, columns 4 to 19
    better, chances, _ = made(image, masks, features, centres, text, telling)
    outside = torch.ones(24, 32, dtype=torch.bool)
    outside[2:18, 4:20] = False
    torch.testing.assert_close(better[..., outside], masks[..., outside])
    assert ((better - masks).abs()[..., ~outside] > 1e-4).float().mean() > 0.9
    image[..., outside], masks[..., outside], features[..., outside[::2, ::2]] = 0.2, 0.3, 0.4
    again, same, _ = made(image, masks, features, centres, text, telling)
    torch.testing.assert_close(again[..., ~outside], better[..., ~outside])
    torch.testing.assert_close(same, chances)


@torch.no_grad()
def test_it_is_the_same_for_every_thing():
    made, (image, masks, features, centres, text, telling) = closer(), looked_at()
    found = made(image, masks, features, centres, text, telling)
    turned = made(image, masks.flip(1), features.flip(1), centres.flip(1), text, telling.flip(1))
    alone = made(image[:1], masks[:1], features[:1], centres[:1], text[:1], telling[:1])
    for part, expected, first in zip(turned, found, alone):
        torch.testing.assert_close(part, expected.flip(1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(first, expected[:1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_every_thing_sees_itself_the_others_and_the_rest():
    made, given_ = closer(), looked_at()
    better, chances, _ = made(*given_)
    for thing in range(2):
        masks = given_[1].clone()
        masks[:, thing] = 0.5
        found, guesses, _ = made(given_[0], masks, *given_[2:])
        other = 1 - thing
        assert (found[:, other] - better[:, other]).abs().amax() > 1e-3
        assert (guesses[:, other] - chances[:, other]).abs().amax() > 1e-3
    # where the things that are not this one have the same outline, and so has the rest, it is the same
    masks = torch.cat([given_[1], given_[1][:, 1:]], 1)
    masks[:, 1:] = 1.0
    two = made(given_[0], masks[:, :2], *given_[2:])
    more = made(given_[0], masks, torch.cat([given_[2], given_[2][:, 1:]], 1),
                torch.cat([given_[3], given_[3][:, 1:]], 1), given_[4], torch.cat([given_[5], given_[5][:, 1:]], 1))
    torch.testing.assert_close(more[0][:, :1], two[0][:, :1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_words_count_by_what_they_tell():
    made, (image, masks, features, centres, text, telling) = closer(), looked_at()
    better, *_ = made(image, masks, features, centres, text, telling)
    other = text.clone()
    other[:, 1] = 8   # of the first phrase
    found, *_ = made(image, masks, features, centres, other, telling)
    assert (found[:, 0] - better[:, 0]).abs().max() > 1e-3
    torch.testing.assert_close(found[:, 1], better[:, 1])
    telling[:, :, 1] = 0
    torch.testing.assert_close(made(image, masks, features, centres, other, telling),
                               made(image, masks, features, centres, text, telling))


@torch.no_grad()
def test_what_it_finds_is_added_to_odds():
    made, (image, masks, features, centres, text, telling) = closer(), looked_at()
    made.cut.weight.zero_()
    made.cut.bias.fill_(0.7)
    made.centre.weight.zero_()
    made.centre.bias.zero_()[[2, 11 + 7]] = 9.0   # row and column: 3 up, 2 to the right of the window's middle
    centres = torch.tensor([12.0, 16.0]).expand(2, 2, 2) + torch.tensor([0.4, -0.3])
    better, chances, places = made(image, masks, features, centres, text, telling)
    inside = better[..., 4:20, 8:24].logit() - masks[..., 4:20, 8:24].logit()
    torch.testing.assert_close(inside, torch.full_like(inside, 0.7), atol=1e-4, rtol=0)
    odds = chances - chances[..., 5:6]   # against the middle
    expected = [9 - (0.4 + 3) ** 2 / 0.5 + 0.4 ** 2 / 0.5, 9 - (-0.3 - 2) ** 2 / 0.5 + 0.3 ** 2 / 0.5]
    for axis, k in ((0, 2), (1, 7)):
        torch.testing.assert_close(odds[:, :, axis, k], torch.full((2, 2), expected[axis]), atol=1e-3, rtol=0)
    assert torch.equal(places[0, 0, :, 5], torch.tensor([12.0, 16.0]))


@torch.no_grad()
def test_it_is_given_the_image_cut_into_thing_others_and_rest_and_the_features_there():
    made, (image, masks, features, _, text, telling) = closer(), looked_at()
    given_ = []
    made.enter.register_forward_hook(lambda layer, got, out: given_.append(got[0].unflatten(0, (2, 2))))
    centres = torch.tensor([12.0, 16.0]).expand(2, 2, 2)
    made(image, masks, features, centres, text, telling)
    rest = (1 - masks[:, :1]) * (1 - masks[:, 1:])
    for thing in range(2):
        own, other = (masks[:, k, None, 4:20, 8:24] for k in (thing, 1 - thing))
        shown = image[:, :, 4:20, 8:24]
        expected = torch.cat([shown, shown * own, shown * other, shown * rest[:, :, 4:20, 8:24]], 1)
        pixels = expected.unflatten(3, (8, 2)).unflatten(2, (8, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        torch.testing.assert_close(given_[0][:, thing, :32], pixels)
        torch.testing.assert_close(given_[0][:, thing, 32:], features[:, thing, :, 2:10, 4:12])


@torch.no_grad()
def test_masks_see_finer_features_beside_what_comes_from_coarser_ones():
    made, given_ = closer(), looked_at()
    for over, coarser, skipped in ((made.over_4, made.from_8, made.at_4), (made.over_2, made.from_4, made.at_2)):
        seen, hooks = {}, []
        for name, layer in (("coarse", coarser), ("fine", skipped)):
            hooks.append(layer.register_forward_hook(lambda layer, got, out, name=name: seen.update({name: out})))
        hooks.append(over.register_forward_hook(lambda layer, got, out: seen.update(sum=got[0])))
        made(*given_)
        larger = seen["coarse"].repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(seen["sum"], seen["fine"] + larger)
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------- in MAGE

@torch.no_grad()
def test_a_centre_is_the_likeliest_guess_and_a_thing_is_what_the_better_mask_cuts_out():
    mage, (ids, text, speed) = mage_of(CLOSER), given_to_mage()
    made, looks, told = mage.advection, [], []
    made.closer.register_forward_hook(lambda closer, given, found: looks.append((given, found)))
    made.layers[0].register_forward_hook(lambda layer, given, out: told.append(given[0][:, 0, :, 16:80]))
    _, things, *_ = mage.displacements(None, ids[:, 0], text, speed)
    (image, masks, _, before, _, telling), (better, chances, places) = looks[0]
    centres = torch.from_numpy(np.take_along_axis(places.numpy(), chances.numpy().argmax(-1)[..., None], -1)[..., 0])
    assert (better - masks).abs().max() > 0.01 and (centres - before).abs().max() > 0.1
    torch.testing.assert_close(things[:, :2], image[:, None] * better[:, :, None])
    torch.testing.assert_close(things[:, 2], image * (1 - better).prod(1)[:, None])
    periods = 3.0 * (200.0 / 3.0) ** (np.arange(16) / 15)
    rows = centres[..., :1].double().numpy()
    np.testing.assert_allclose(told[0][..., :16], np.sin(2 * np.pi * rows / periods), atol=1e-3)
    skill = made.unet.skill()
    torch.testing.assert_close(telling, phrases_of(text, AND, 0)[0] * skill[text][:, None])
    assert skill.any()


def test_the_displacement_loss_reaches_all_of_it_and_what_it_looks_at():
    mage, (ids, text, speed) = mage_of(CLOSER).train(), given_to_mage()
    mage(ids, text, speed).displacement_loss.backward()
    made = mage.advection
    for name, parameter in made.closer.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    assert made.unet.finer[0][1].weight.grad.any()
    apart = {id(parameter) for parameter in made.taught_apart()}
    assert apart >= {id(parameter) for parameter in made.closer.parameters()}


@torch.no_grad()
@pytest.mark.parametrize("shift", [(0, 0), (2, -3)])
def test_displacements_are_a_mean_over_the_likeliest_guesses_wherever_the_image_is_shifted(shift):
    mage, (ids, text, _) = mage_of(CLOSER), given_to_mage()
    made, reach = mage.advection, CLOSER.advection
    made.closer.centre.weight.mul_(0.03)   # so that no guess is certain
    made.closer.centre.bias.mul_(0.03)
    chances, _, _, _, (what, centres, times), (likely, places) = made.displacements(
        None, ids[:, 0], torch.randn(2, 3, CONFIG.width, generator=torch.Generator().manual_seed(0)), text, shift)
    likely, expected = likely.double().exp().numpy(), np.zeros((2, 3, 2, 2, 2 * reach + 1))   # b t things axis m
    order = np.argsort(-likely, -1)
    for thing, rank in np.ndindex(2, made.GUESSED):
        at = np.stack([[places[b, thing, axis, order[b, thing, axis, rank]] for axis in range(2)] for b in range(2)])
        there = centres.clone()
        there[:, thing] = torch.from_numpy(at).float()
        found = made._moved(what, there, times)[:, :, thing].double().exp().numpy().reshape(2, 3, 2, -1)
        weight = np.take_along_axis(likely[:, thing], order[:, thing], -1)[..., rank]
        expected[:, :, thing] += weight[:, None, :, None] * found
    expected /= expected.sum((-2, -1), keepdims=True)
    np.testing.assert_allclose(chances[:, :, :2].exp().numpy(), expected.reshape(2, 3, 2, -1), rtol=1e-4, atol=1e-6)
    best = np.take_along_axis(places.numpy(), order[..., :1], -1)[..., 0]
    np.testing.assert_array_equal(centres.numpy(), best)
    one_place = made._moved(what, centres, times).exp()
    assert (chances[:, :, :2].exp() - one_place).abs().max() > 0.003


@torch.no_grad()
def test_a_guess_that_is_certain_is_where_a_thing_moves_from():
    mage, (ids, text, speed) = mage_of(CLOSER), given_to_mage()
    made = mage.advection
    made.closer.centre.weight.zero_()
    made.closer.centre.bias.zero_()[[2, 11 + 7]] = 300.0
    found = mage.displacements(None, ids[:, 0], text, speed)
    what, centres, times = found.told
    chances, places = found.guesses
    torch.testing.assert_close(centres, torch.stack([places[:, :, 0, 2], places[:, :, 1, 7]], -1))
    torch.testing.assert_close(found.chances[:, :, :2], made._moved(what, centres, times), atol=1e-4, rtol=1e-4)


def test_guesses_at_centres_learn_what_they_are_once_motion_is_seen():
    """The gradient is that of the negative log-likelihood of what is seen under a mixture over guesses (EM)."""
    mage, (ids, text, speed) = mage_of(CLOSER), given_to_mage()
    made, frames = mage.advection, torch.tensor([0, 2])
    displaced = mage.displacements(None, ids[:, 0], text, speed)
    likely, places = (part.detach() for part in displaced.guesses)
    likely.requires_grad_()
    displaced = displaced._replace(guesses=(likely, places))
    seen = torch.rand(2, 2, 3, 22, generator=torch.Generator().manual_seed(1)) ** 9
    seen = seen / seen.sum(-1, keepdim=True)
    gradient, = torch.autograd.grad(made.off_centre(displaced, frames, seen), likely)

    what, centres, times = (told.detach() for told in displaced.told)
    fits = np.zeros(places.shape)
    for b, thing, axis, k in np.ndindex(*places.shape):
        there = centres[b:b + 1].clone()
        there[0, thing, axis] = places[b, thing, axis, k]
        found = made._moved(what[b:b + 1], there, times[b:b + 1, frames])[0, :, thing].detach()
        fits[b, thing, axis, k] = (seen[b, :, thing] * found.clamp_min(made.ASTRAY)).sum()
    fits = torch.from_numpy(fits).float()
    assert fits.std(-1).max() > 0.01
    again = likely.detach().clone().requires_grad_()
    mixture = -(again + fits).logsumexp(-1).sum((1, 2)).mean()
    torch.testing.assert_close(gradient, torch.autograd.grad(mixture, again)[0], atol=1e-5, rtol=1e-3)


def test_its_convolutions_learn_by_muon_but_for_the_one_that_cuts():
    mage = mage_of(CLOSER)
    made = optimisers(mage, 0.01, weight_decay=0.0, convolutions=mage.advection.inner_convolutions(), unet_muon=2.0)
    inner = {id(parameter) for group in made[1].param_groups for parameter in group["params"]}
    look = mage.advection.closer
    of_four = {id(parameter) for parameter in look.parameters() if parameter.ndim == 4}
    assert of_four - inner == {id(look.cut.weight)} and inner & of_four
    assert {id(weight) for weight in mage.advection.unet.inner_convolutions()} < inner


def test_weights_without_it_are_a_start_for_a_model_with_it_and_not_the_reverse():
    theirs, ours = mage_of(CONFIG, seed=1), MAGE(CLOSER).eval()
    ours.start_from(theirs, "abcdefghi", "abcdefghi")
    ids, text, speed = given_to_mage()
    with torch.no_grad():
        found, expected = (mage.displacements(None, ids[:, 0], text, speed) for mage in (ours, theirs))
    assert (found.told[1] - expected.told[1]).abs().max() <= 0.5   # the nearest whole rows and columns
    torch.testing.assert_close(found.chances.exp(), expected.chances.exp(), atol=0.04, rtol=0)
    torch.testing.assert_close(found.things, expected.things, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="window 16 for 0"):
        theirs.start_from(ours, "abcdefghi", "abcdefghi")
    sized = sized_like(preset("quick", "double-mnist"), CLOSER)
    assert sized.mage.window == 16 and sized_like(preset("quick", "double-mnist"), CONFIG).mage.window == 0


@pytest.mark.parametrize("precision", ["half", "int8"])
def test_weights_with_it_are_the_same_when_read_again(tmp_path, precision):
    dataset = load_dataset("double-mnist")
    chosen = changed(preset("smoke", "double-mnist"), ["mage.window=16", "pairs=8", "mage.samples=4", "mage.batch=2"])
    config = mage_config(chosen.mage, dataset, chosen.vqvae.codebook_size, chosen.vqvae.groups)
    assert config.window == 16
    torch.manual_seed(0)
    vqvae = VQVAE(vqvae_config(chosen.vqvae, dataset))
    mage, done = train_mage(chosen, dataset, vqvae, tmp_path, seed=1, progress=False)
    assert done and mage.advection.closer.cut.weight.any()   # it has learned something
    made = weights.save(tmp_path / "made.safetensors", vqvae, mage, {"dataset": dataset.name, **dataset.about},
                        precision=precision)
    for name, tensor in mage.state_dict().items():
        torch.testing.assert_close(made.mage.state_dict()[name], tensor, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("fields, message", [
    ({"window": 12}, "window is 12 for images of 16 x 24.*multiple of 8"),
    ({"window": 24}, "window is 24 for images of 16 x 24.*fits in"), ({"window": -8}, "window is -8"),
    ({"window": 8, "unet": 0, "phrases": 0}, "window is 8 and unet 0.*set unet too")])
def test_windows_that_cannot_be_are_told(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)
