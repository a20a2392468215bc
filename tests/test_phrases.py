"""What a phrase names: words and phrases against Python's split, losses against NumPy, and MAGE with phrases."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Bernoulli

from mage_core import weights
from mage_core.advection import Advection, Displaced
from mage_core.clips import frame_indices, load_dataset
from mage_core.loop import optimisers, seed_of
from mage_core.mage import MAGE, MAGEConfig
from mage_core.phrases import BatchNorm, PhraseUNet, phrases_of
from mage_core.presets import changed, mage_config, preset, vqvae_config
from mage_core.processes import Alone
from mage_core.training import train, train_mage
from mage_core.vqvae import VQVAE

AND, WORDS = 4, 9
CONFIG = MAGEConfig(codebook_size=7, groups=4, rows=4, columns=6, clip_length=5, width=16, vocabulary_size=WORDS,
                    context_length=8, head_width=8, axial_layers=3, text_layers=1, dropout=0.0, hidden_token=True,
                    shift_attention=True, time_bias=True, intervals=(1.0, 2.0), advection=6, patch=(2, 4), masks=True,
                    unet=8, phrases=AND)
few = settings(max_examples=20, deadline=None)


def unet(seed=0, **buffers):
    """A `PhraseUNet` in use, with random weights and skilled in every word but where `buffers` say otherwise."""
    torch.manual_seed(seed)
    made = PhraseUNet(2, 8, WORDS).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        made.word.weight.mul_(20)
    made.share.fill_(0.5)
    for name, values in buffers.items():
        getattr(made, name).copy_(values)
    return made


def model(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    mage = MAGE(config).eval()
    with torch.no_grad():
        for parameter in mage.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        mage.advection.pixels.uniform_()[:, 0] = 0
        mage.advection.chances.weight.mul_(5)
        mage.advection.unet.share.fill_(0.5)
    return mage


def sample(seed=0):
    draw = torch.Generator().manual_seed(seed)
    shape = 2, CONFIG.clip_length, CONFIG.rows, CONFIG.columns
    ids = torch.randint(CONFIG.codebook_size ** CONFIG.groups, shape, generator=draw)
    return ids, torch.tensor([[1, 2, 3, AND, 5, 6], [1, 7, 2, AND, 8, 3]]), torch.tensor([0.3, 0.7])


# ---------------------------------------------------------------- captions

@few
@given(st.lists(st.lists(st.sampled_from([1, 2, 3, 5, 6, 7, 8]), min_size=1, max_size=4), min_size=1, max_size=3),
       st.integers(0, 3))
def test_a_caption_is_split_as_python_splits_it(phrases, padding):
    sentence = f" {AND} ".join(" ".join(map(str, phrase)) for phrase in phrases)
    ids = torch.tensor([[int(word) for word in sentence.split()] + [0] * padding])
    inside, places = phrases_of(ids, AND, 0)
    found = [[int(word) for word in ids[0][row]] for row in inside[0]]
    expected = [[int(word) for word in part.split()] for part in sentence.split(f" {AND} ")]
    assert found[0] == expected[0]
    assert found[1] == ([AND, *expected[1]] if len(expected) > 1 else [])
    length = len(ids[0]) - padding
    starts = [place for place in range(length) if ids[0, place] == AND]
    assert places[0, :length].tolist() == [place - max([s for s in starts if s <= place], default=0)
                                           for place in range(length)]


def test_batches_that_teach_nothing_leave_their_mark_on_no_statistics():
    torch.manual_seed(0)
    ours, theirs, x = BatchNorm(3), nn.BatchNorm2d(3), 2 + 3 * torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var) and not torch.equal(ours.running_mean, torch.zeros(3))
    with torch.no_grad():   # a guess in the midst of training
        guessed, before = ours(x), ours.running_mean.clone()
    torch.testing.assert_close(guessed, theirs.eval()(x))
    assert torch.equal(ours.running_mean, before)


# ---------------------------------------------------------------- words

def test_words_missed_are_cross_entropies_of_a_soft_maximum_over_places():
    torch.manual_seed(0)
    made, logits = unet(), 2 * torch.randn(3, WORDS, 2, 3)
    text = torch.tensor([[1, 2, AND, 5, 0], [1, 1, AND, 8, 6], [3, 0, 0, 0, 0]])
    likely = 1 / (1 + np.exp(made.POOLED) / np.exp(logits.double().numpy()).sum((2, 3)))
    held = np.array([[word in caption for word in range(WORDS)] for caption in text.tolist()])
    expected = -np.log(np.where(held, likely, 1 - likely)).sum(1).mean()
    np.testing.assert_allclose(made.word_loss(logits, text), expected, rtol=1e-5)


def test_a_words_skill_is_what_the_image_tells_beyond_its_share():
    share, cost = torch.tensor([0.5, 0.1, 0.3, 0.2, 1.0, 0.0, 0.5, 0.7, 0.4]), torch.rand(WORDS) / 3
    made = unet(share=share, cost=cost)
    cost[1], cost[2] = 0.01, 5.0   # nearly all is told, and less than nothing
    made.cost.copy_(cost)
    expected = (2 * (1 - cost / Bernoulli(share).entropy() - made.LEAST)).clamp(0, 1)
    expected[[4, 5]] = 0   # every caption has the one, none the other
    torch.testing.assert_close(made.skill(), expected)
    assert made.skill()[1] == 1 and made.skill()[2] == 0


def test_skill_is_measured_in_training_alone_and_of_the_latest_steps():
    torch.manual_seed(0)
    made, texts = PhraseUNet(2, 8, WORDS), torch.tensor([[1, 2, AND, 5], [1, 2, AND, 6]])
    logits = torch.randn(2, WORDS, 2, 3, requires_grad=True)
    with torch.no_grad():
        made.word_loss(logits, texts)
    made.eval().word_loss(logits, texts)
    assert made.steps == 0 and not made.share.any() and not made.skill().any()
    made.train()
    shares = []
    for step in range(120):
        made.word_loss(logits, texts if step < 60 else texts.flip(1) * 0 + 7)
        shares.append(made.share[5].item())
    assert shares[0] == shares[50] == 0.5, "a mean from the first step on"
    np.testing.assert_allclose(shares[-1], 0.5 * made.KEPT ** 60, rtol=1e-4)
    assert made.steps == 120


# ---------------------------------------------------------------- masks

@torch.no_grad()
def test_the_same_phrases_in_another_order_cut_out_the_same_things():
    made, images = unet(), torch.rand(1, 2, 16, 24)
    there, back = torch.tensor([[1, 2, AND, 1, 3]]), torch.tensor([[1, 3, AND, 1, 2]])
    made.share[AND] = 1.0   # the word between them names nothing
    outs = [made(images, text, phrases_of(text, AND, 0)[0]) for text in (there, back)]
    for first, second in zip(outs[0][:2], outs[1][:2]):
        torch.testing.assert_close(first, second.flip(1))
        assert not torch.allclose(first, first.flip(1), atol=1e-3)
    assert outs[0][0].shape == (1, 2, 8, 8, 12) and outs[0][1].shape == (1, 2, 16, 24)
    assert outs[0][2].shape == (1, WORDS, 2, 3) and torch.equal(outs[0][2], outs[1][2])


@torch.no_grad()
def test_each_image_of_a_batch_has_its_own_caption():
    made, images, text = unet(), torch.rand(2, 2, 16, 24), torch.tensor([[1, 2, AND, 1, 3], [5, 6, 7, AND, 8]])
    whole = made(images, text, phrases_of(text, AND, 0)[0])
    for row in range(2):
        alone = made(images[row:row + 1], text[row:row + 1], phrases_of(text[row:row + 1], AND, 0)[0])
        for ours, its in zip(whole, alone):
            torch.testing.assert_close(ours[row:row + 1], its, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_words_without_skill_say_nothing_of_places():
    made, images = unet(), torch.rand(1, 2, 16, 24)
    made.cost[[6, 7]] = 1.0
    texts = [torch.tensor([[1, 2, AND, 3, word]]) for word in (6, 7, 8)]
    masks = [made(images, text, phrases_of(text, AND, 0)[0])[1] for text in texts]
    assert torch.equal(masks[0], masks[1]) and not torch.allclose(masks[0], masks[2], atol=1e-3)


@torch.no_grad()
def test_a_mask_begins_where_its_own_words_are_likelier_than_the_others():
    torch.manual_seed(0)
    made, images = PhraseUNet(2, 8, WORDS).eval(), torch.rand(1, 2, 16, 24)
    made.share.fill_(0.5)
    nn.init.normal_(made.word.weight, std=1.0)
    text = torch.tensor([[1, 2, AND, 3, 5]])
    inside, _ = phrases_of(text, AND, 0)
    _, masks, words = made(images, text, inside)
    own = [sum(words[0, word] for word in phrase) for phrase in ((1, 2), (AND, 3, 5))]
    by = torch.stack([own[0] - own[1], own[1] - own[0]]).clamp(-made.AT_MOST, made.AT_MOST)
    assert by.std() > 0.1
    torch.testing.assert_close(masks[0], F.interpolate(by[None], (16, 24), mode="bilinear")[0].sigmoid())


# ---------------------------------------------------------------- displacements

@torch.no_grad()
def test_each_thing_hears_its_own_phrase_and_the_rest_stays_where_it_is():
    mage, (ids, text, speed) = model(), sample()
    mage.advection.unet.cost.fill_(1.0)   # no word says anything of places
    chances, things, *_ = mage.displacements(None, ids[:, 0], text, speed)
    assert chances.shape == (2, 4, 3, 26) and things.shape == (2, 3, 2, 16, 24)
    torch.testing.assert_close(chances.exp().sum(-1), torch.ones(2, 4, 3))
    image, masks = mage.advection.image(ids[:, 0])[:, None], []
    masks = (things / image).masked_fill(image == 0, float("nan"))
    torch.testing.assert_close(masks[:, 2], (1 - masks[:, 0]) * (1 - masks[:, 1]), equal_nan=True, atol=1e-4, rtol=0)
    for place, heard in ((1, 0), (5, 1)):
        words = text.clone()
        words[:, place] = 7 if place == 5 else 8
        others, parts, *_ = mage.displacements(None, ids[:, 0], words, speed)
        torch.testing.assert_close(parts, things)
        assert not torch.allclose(others[:, :, heard], chances[:, :, heard], atol=1e-2)
        torch.testing.assert_close(others[:, :, 1 - heard], chances[:, :, 1 - heard])
    still = torch.zeros(2, 4, 26)
    still[..., 6] = 1
    torch.testing.assert_close(chances[:, :, 2].exp(), still)
    padded = mage.displacements(None, ids[:, 0], F.pad(text, (0, 2)), speed)
    torch.testing.assert_close(padded[:2], (chances, things), atol=1e-5, rtol=1e-4)
    slow, *_ = mage.displacements(None, ids[:, 0], text, speed / 2)
    assert not torch.allclose(slow, chances, atol=1e-3)


@torch.no_grad()
def test_what_one_phrase_says_another_says_as_well():
    mage, (ids, _, speed) = model(), sample()
    mage.advection.unet.cost.fill_(1.0)   # no word says anything of places
    mage.advection.word_vectors.weight[1] = mage.advection.word_vectors.weight[AND]   # how a phrase begins
    chances, things, *_ = mage.displacements(None, ids[:, 0], torch.tensor([[1, 2, 3, AND, 2, 3]] * 2), speed)
    torch.testing.assert_close(things[:, 0], things[:, 1])
    torch.testing.assert_close(chances[:, :, 0], chances[:, :, 1], atol=1e-4, rtol=1e-4)
    chances, *_ = mage.displacements(None, ids[:, 0], torch.tensor([[1, 2, 3, AND, 3, 2]] * 2), speed)
    assert not torch.allclose(chances[:, :, 0], chances[:, :, 1], atol=1e-2)


@torch.no_grad()
def test_a_centre_is_a_things_own_and_corrected_by_what_is_seen_of_it():
    mage, (ids, text, speed) = model(), sample()
    made, told, seen = mage.advection, [], []
    made.layers[0].register_forward_hook(lambda layer, given, out: told.append(given[0][:, 0, :, 16:80]))
    made.votes.register_forward_hook(lambda layer, given, out: seen.append(out))
    _, things, *_ = mage.displacements(None, ids[:, 0], text, speed)
    mass = things[:, :2].mean(2).double().numpy()
    centres = np.stack([(mass * place).sum((2, 3)) / mass.sum((2, 3)) for place in np.indices(mass.shape[2:])], -1)
    centres += seen[0].numpy()
    assert seen[0].std() > 0.01
    periods = 3.0 * (200.0 / 3.0) ** (np.arange(16) / 15)
    np.testing.assert_allclose(told[0][..., :16], np.sin(2 * np.pi * centres[..., :1] / periods), atol=1e-3)
    np.testing.assert_allclose(told[0][..., 48:], np.cos(2 * np.pi * centres[..., 1:] / periods), atol=1e-3)


@torch.no_grad()
def test_how_a_thing_moves_is_for_words_to_say_and_not_for_its_looks():
    mage, (ids, text, speed) = model(), sample()
    made = mage.advection
    made.votes.weight.zero_()
    before = mage.displacements(None, ids[:, 0], text, speed)
    made.unet.register_forward_hook(lambda unet, given, found: (3 * found[0].flip(1) - 1, *found[1:]))
    torch.testing.assert_close(mage.displacements(None, ids[:, 0], text, speed)[:2], before[:2])
    text[:, 2] = 8
    assert not torch.allclose(mage.displacements(None, ids[:, 0], text, speed)[0], before[0], atol=1e-2)


@torch.no_grad()
def test_a_caption_of_one_phrase_has_another_thing_that_hears_it_too():
    mage, (ids, text, speed) = model(), sample()
    text[:, 3] = 3   # no "and" any more
    chances, things, *_ = mage.displacements(None, ids[:, 0], text, speed)
    assert chances.isfinite().all() and things.isfinite().all()
    text[:, 0] = 5
    others, *_ = mage.displacements(None, ids[:, 0], text, speed)
    assert all(not torch.allclose(others[:, :, thing], chances[:, :, thing], atol=1e-2) for thing in range(2))


def shifted(image, far, axis):
    """An image (H W) moved by some pixels along an axis; what comes from outside is empty."""
    out, size = np.zeros_like(image), image.shape[axis]
    there = np.arange(size) - far
    inside = (there >= 0) & (there < size)
    np.moveaxis(out, axis, 0)[inside] = np.moveaxis(image, axis, 0)[there[inside]]
    return out


@few
@given(st.integers(0, 2 ** 31))
def test_what_is_seen_of_things_tells_where_they_are(seed):
    draw = np.random.default_rng(seed)
    made, (b, t, m) = model().advection, (2, 3, 26)
    things = draw.random((b, 3, 2, 16, 24)).astype(np.float32) * (draw.random((b, 3, 1, 16, 24)) < 0.1)
    chances = np.exp(draw.normal(size=(b, t, 3, m)))
    chances = (chances / chances.sum(-1, keepdims=True)).astype(np.float32)
    truth, expected = draw.random((b, t, 2, 16, 24)).astype(np.float32), chances.copy()
    for clip, time, thing in np.ndindex(b, t, 2):
        prior = chances[clip, time, thing]
        posterior = np.zeros(m)
        for tried in np.argsort(-prior)[:made.TRIED]:
            there = np.stack([shifted(channel, tried % 13 - 6, tried // 13) for channel in things[clip, thing]])
            posterior[tried] = prior[tried] * np.exp(-2 * (np.maximum(there - truth[clip, time], 0) ** 2).sum())
        expected[clip, time, thing] = posterior / posterior.sum()
    found = made.explained(*(torch.from_numpy(array) for array in (chances, things, truth)))
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-3)


def test_masks_learn_where_things_are_seen_to_be_whatever_was_expected():
    torch.manual_seed(0)
    mage, (ids, text, speed) = model(), sample()
    made = mage.advection
    ids = ids.clone()
    ids[:, 1:] = ids[:, :1]   # nothing moves
    chances, things, *_ = mage.displacements(None, ids[:, 0], text, speed)
    wrong = torch.full_like(chances, 1e-4).index_fill(-1, torch.tensor([8]), 1.0)   # 2 pixels down, it says
    right = torch.full_like(chances, 1e-4).index_fill(-1, torch.tensor([6, 19]), 1.0)
    pictures, error, _ = made.picture_error(wrong, things, ids[:, 1:])
    torch.testing.assert_close(pictures, made.pictures(wrong, things))
    truth = made.image(ids[:, 1])[:, None]
    expected = made.pictures(made.explained(wrong, things, truth.expand(-1, 4, -1, -1, -1)), things)[:, :, -1] - truth
    torch.testing.assert_close(error, expected.square().flatten(2).sum(2).mean())
    still = (made.pictures(right / right.sum(-1, keepdim=True), things)[:, :, -1] - truth).square().flatten(2).sum(2)
    moved = (pictures[:, :, -1] - truth).square().flatten(2).sum(2).mean()
    assert error < 0.5 * moved and error > 0.9 * still.mean()
    gradient, = torch.autograd.grad(error, [made.unet.cut.weight])
    assert gradient.any()


@few
@given(st.lists(st.sampled_from([-4, -3, -2, -1, 0, 1, 2, 3]), min_size=4, max_size=4), st.sampled_from([0, 1]))
def test_centres_learn_where_what_was_seen_says_that_they_are(off, axis):
    """Things whose displacement tells their row, or their column: it is the number of it modulo 13, at every time."""
    made, asked = model().advection, []
    what, times, frames = torch.randn(2, 2, 16), torch.randn(2, 4, 16), torch.tensor([0, 2])

    def moved(what, centres, times):
        asked.append(times)
        number = centres[..., axis].round().long() % 13 + 13 * axis
        chances = F.one_hot(number, 26).float().clamp_min(1e-12)
        return chances.log()[:, None].expand(-1, times.shape[1], -1, -1)

    made._moved, off = moved, torch.tensor(off).view(2, 2).float()
    centres = torch.tensor([[[4.0, 8.0], [8.0, 12.0]]] * 2) + 0.3
    there = centres.clone()
    there[..., axis] += off
    seen = moved(what, there, times[:, frames]).exp()
    centres.requires_grad_()
    loss = made.off_centre(Displaced(seen, seen, told=(what, centres, times)), frames, seen)
    assert all(torch.equal(given, times[:, frames]) for given in asked[1:])
    near = torch.where(off.abs() <= made.OFFSETS, off, 0.0)   # farther off than is looked, nothing is said
    torch.testing.assert_close(loss, 0.5 * near.square().sum(1).mean(), atol=1e-4, rtol=1e-3)
    loss.backward()
    expected = torch.zeros(2, 2, 2)
    expected[..., axis] = -near / 2   # each clip is half of the mean
    torch.testing.assert_close(centres.grad, expected, atol=1e-3, rtol=1e-3)
    either = seen + moved(what, there + 1, times[:, frames]).exp()   # within half a pixel it says nothing
    within = Displaced(seen, seen, told=(what, there, times))
    assert made.off_centre(within, frames, either / 2) == 0


def test_of_places_that_explain_as_much_the_nearer_counts_more():
    made, centres = model().advection, torch.full((1, 2, 2), 5.0)
    fits = torch.full((1, 2, 2, 2 * made.OFFSETS + 1), -50.0)
    fits[..., [made.OFFSETS + 1, made.OFFSETS + 3]] = 0.0   # one pixel on, or three
    made._fits = lambda *given: fits
    displaced = Displaced(fits, fits, told=(None, centres, None))
    near, far = np.exp(-0.5 * (np.array([1, 3]) / made.ABOUT) ** 2)
    off = (near + 3 * far) / (near + far)
    assert float(made.off_centre(displaced, None, None)) == pytest.approx(0.5 * 4 * off ** 2, rel=1e-5)


def test_what_is_seen_though_it_could_not_be_says_so_much_and_no_more():
    made = model().advection
    impossible = torch.full((1, 3, 2, 26), -100.0)
    made._moved = lambda what, centres, times: impossible[:, :times.shape[1]]
    told = torch.zeros(1, 2, 16), torch.zeros(1, 2, 2), torch.zeros(1, 3, 4)
    displaced = Displaced(impossible, impossible, told=told)
    seen = torch.zeros(1, 2, 3, 26)
    seen[..., 4] = 1.0
    fits = made._fits(displaced, torch.tensor([0, 2]), seen, torch.zeros(1, 2, 2, 5))
    torch.testing.assert_close(fits, torch.full((1, 2, 2, 5), 2 * made.ASTRAY))


def test_until_words_are_known_little_else_is_learned():
    mage, (ids, text, speed) = model(), sample()
    made, dice = mage.advection, torch.rand(2, 4, 4, 6)
    displaced = mage.displacements(None, ids[:, 0], text, speed)
    chances, things, logits, endings, *_ = displaced
    assert endings is None
    words = made.unet.word_loss(logits, text)
    misses = made.misses(chances, made.image(ids[:, 0]), ids[:, 1:], dice)
    _, picture, seen = made.picture_error(chances.exp(), things, ids[:, 1:])
    off = made.off_centre(displaced, torch.arange(4), seen)
    for cost, known in ((torch.ones(WORDS), 0.0), (torch.where(torch.arange(WORDS) == 7, 0.0, 1.0), 0.25),
                        (torch.zeros(WORDS), 1.0)):   # none, the 7 of one of four phrases, all
        made.unet.cost.copy_(cost)
        expected = (0.1 + 0.9 * known) * (misses + made.NAMED[0] * picture + made.CENTRE * off) + made.NAMED[1] * words
        torch.testing.assert_close(made.error(misses, picture, displaced, text, None, off), expected)
    made.unet.cost.zero_()
    out = mage(ids, text, speed, dice=dice)
    torch.testing.assert_close(out.displacement_loss, made.error(misses, picture, displaced, text, None, off))
    out.displacement_loss.backward()
    for part in (made.unet.word, made.unet.cut, made.word_vectors, made.word_places, made.votes, made.unet.down_2[0]):
        assert part.weight.grad.any()


def test_finer_blocks_change_nothing_until_they_learn(monkeypatch):
    """Weights of a U-Net without them go on from where they were."""
    torch.manual_seed(0)
    made = PhraseUNet(1, 4, WORDS)
    nn.init.normal_(made.cut.weight)
    monkeypatch.setattr(PhraseUNet, "FINER", 0)
    without = PhraseUNet(1, 4, WORDS)
    fresh = without.load_state_dict(made.state_dict(), strict=False)
    assert not fresh.missing_keys and all(name.startswith("finer.") for name in fresh.unexpected_keys)
    images, text = torch.rand(2, 1, 16, 24), torch.tensor([[1, 5, AND, 6], [1, 6, AND, 7]])
    told = images, text, phrases_of(text, AND, 0)[0]
    for found, expected in zip(made(*told), without(*told)):
        torch.testing.assert_close(found, expected)
    made(*told)[1].square().sum().backward()
    assert all(block[1].weight.grad.any() for block in made.finer)


def test_muon_gets_the_convolutions_that_make_no_logits():
    mage = model()
    unet = mage.advection.unet
    made = optimisers(mage, 0.01, weight_decay=0.05, convolutions=unet.inner_convolutions(), unet_muon=2.0)
    groups = [group for optimiser in made for group in optimiser.param_groups]
    owned = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(owned) == sorted(id(parameter) for parameter in mage.parameters())
    assert [type(optimiser).__name__ for optimiser in made] == ["AdamW", "Muon"]
    assert [(group["base"], group["weight_decay"]) for group in groups] == [(0.01, 0.05), (0.02, 0.05)]
    inner = {id(parameter) for parameter in groups[1]["params"]}
    of_four = {id(parameter) for parameter in unet.parameters() if parameter.ndim == 4}
    assert of_four - inner == {id(unet.word.weight), id(unet.cut.weight)} and inner < of_four


def test_training_moves_convolutions_at_a_rate_of_their_own(tmp_path):
    dataset, seed = load_dataset("double-mnist"), 3
    chosen = changed(preset("smoke", "double-mnist"), [
        "pairs=8", "mage.samples=4", "mage.batch=2", "mage.learning_rate=1e-9", "mage.unet_muon=1e7"])
    torch.manual_seed(seed)
    vqvae = VQVAE(vqvae_config(chosen.vqvae, dataset))
    torch.manual_seed(seed_of(seed, "mage start"))
    start = dict(MAGE(mage_config(chosen.mage, dataset, vqvae.config.codebook_size, vqvae.config.groups))
                 .advection.named_parameters())
    mage, done = train_mage(chosen, dataset, vqvae, tmp_path, seed=seed, progress=False)
    assert done
    convolutions = {id(parameter) for parameter in mage.advection.unet.inner_convolutions()}
    moved = {name: id(parameter) in convolutions for name, parameter in mage.advection.named_parameters()
             if (parameter - start[name]).abs().max() > 1e-4}
    assert "unet.down_2.0.weight" in moved and all(moved.values()), moved   # masks begin with no gradient


def test_a_guess_in_training_changes_no_statistics():
    mage, (ids, text, speed) = model().train(), sample()
    before = {name: tensor.clone() for name, tensor in mage.named_buffers()}
    mage.guess(ids, text, speed, torch.arange(4), 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mage.named_buffers())
    mage(ids, text, speed)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in mage.named_buffers() if "running" in name)


def test_what_words_an_image_shows_is_learned_in_seconds():
    """Two of four glyphs in each image, a caption of both, and of a third thing that no image shows."""
    torch.manual_seed(0)
    draw, side = np.random.default_rng(0), 24
    glyphs = np.zeros((4, 7, 7), np.float32)
    glyphs[0, 2:5], glyphs[1, :, 2:5], glyphs[2], glyphs[3, ::2, ::2] = 1, 1, 1, 1
    made = PhraseUNet(1, 16, WORDS)

    def batch(count):
        images, text = np.zeros((count, 1, side, side), np.float32), []
        for image in images:
            kinds, cells = draw.permutation(4)[:2], draw.permutation(4)[:2]
            corners = np.stack([cells // 2, cells % 2], 1) * 12 + draw.integers(0, 6, (2, 2))
            for kind, (y, x) in zip(kinds, corners):
                image[0, y:y + 7, x:x + 7] = glyphs[kind]
            text.append([1, 5 + kinds[0], AND, 5 + kinds[1], draw.integers(2, 4)])
        return torch.from_numpy(images), torch.tensor(text)

    optimiser = torch.optim.AdamW(made.parameters(), lr=3e-3)
    for _ in range(300):   # by 200 all is known
        images, text = batch(32)
        _, _, words = made(images, text, phrases_of(text, AND, 0)[0])
        loss = made.word_loss(words, text)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert made.skill()[5:].min() > 0.5 and made.skill()[:5].max() < 0.1


# ---------------------------------------------------------------- videos that end when their last thing rests

LONGEST = 9
ENDS = dataclasses.replace(CONFIG, longest=LONGEST)


def ending(seed=0):
    """A model that tells how many frames a video has, and is fairly sure."""
    mage = model(ENDS, seed)
    with torch.no_grad():
        mage.advection.ends[-1].weight.normal_(std=1.2)
    return mage


@torch.no_grad()
def test_a_video_ends_when_the_last_of_its_things_rests():
    mage, (ids, text, speed), heard = ending(), sample(), []
    made = mage.advection
    made.ends.register_forward_hook(lambda layer, given, out: heard.append((given[0], out)))
    made.layers[0].register_forward_hook(lambda layer, given, out: heard.append(given[0][:, 0]))
    endings = mage.displacements(None, ids[:, 0], text, speed).endings
    (given, logits), told = heard
    assert torch.equal(given, told[:, :2, :80]), "what each phrase names, and where it is; not the rest of the image"
    rests = logits.double().softmax(-1).numpy()
    expected = np.zeros((2, LONGEST))
    for one, other in np.ndindex(LONGEST, LONGEST):
        expected[:, max(one, other)] += rests[:, 0, one] * rests[:, 1, other]
    expected = (1 - made.ANY) * expected + made.ANY / LONGEST
    assert expected.max() > 2 / LONGEST, "far from even"
    np.testing.assert_allclose(endings.exp(), expected, atol=1e-6)
    made.ends[-1].weight.mul_(1e4)   # certain of what does not happen: never more than so wrong
    endings = mage.displacements(None, ids[:, 0], text, speed).endings
    assert endings.isfinite().all() and endings.min() > np.log(0.9 * made.ANY / LONGEST)


@torch.no_grad()
def test_where_things_are_is_a_mean_over_the_lengths_that_a_video_may_have():
    mage, (ids, text, _) = ending(), sample()
    for speed in (torch.tensor([0.1, 0.9]), torch.tensor([0.5, 0.3])):
        mixed = mage.displacements(None, ids[:, 0], text, speed)
        expected, known = 0, []
        for length in range(1, LONGEST + 1):
            known.append(mage.displacements(None, ids[:, 0], text, speed, torch.full((2,), length)).chances.exp())
            expected = expected + mixed.endings[:, length - 1].exp()[:, None, None, None] * known[-1]
        torch.testing.assert_close(mixed.chances.exp(), expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(known[3], known[8], atol=1e-2)
        torch.testing.assert_close(mixed.chances.exp().sum(-1), torch.ones(2, 4, 3))


@few
@given(st.integers(1, LONGEST), st.integers(1, LONGEST), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
@torch.no_grad()
def test_with_a_known_length_only_the_frames_shown_count(length, other_length, eta, other):
    for frames, at in ((length, eta), (other_length, other)):   # one frame more or less: not a matter of the last bit
        assume(abs(frames / (CONFIG.intervals[0] + at * np.diff(CONFIG.intervals)[0]) % 1 - 0.5) > 1e-4)
    mage, (ids, text, _) = ending(), sample()
    shown = [frame_indices(frames, at, CONFIG.intervals, CONFIG.clip_length)[1:]
             for frames, at in ((length, eta), (other_length, other))]
    found = mage.displacements(None, ids[:1, 0].expand(2, -1, -1), text[:1].expand(2, -1), torch.tensor([eta, other]),
                               torch.tensor([length, other_length])).chances
    for same, one, two in zip(shown[0] == shown[1], *found):
        assert torch.allclose(one, two, atol=1e-5) == same


def test_how_many_frames_a_video_has_is_learned():
    mage, (ids, text, speed) = ending(), sample()
    made, dice, lengths = mage.advection, torch.rand(2, 4, 4, 6), torch.tensor([4, 7])
    displaced = mage.displacements(None, ids[:, 0], text, speed, lengths)
    misses = made.misses(displaced.chances, made.image(ids[:, 0]), ids[:, 1:], dice)
    _, picture, seen = made.picture_error(displaced.chances.exp(), displaced.things, ids[:, 1:])
    off = made.off_centre(displaced, torch.arange(4), seen)
    missed = -np.mean([displaced.endings[0, 3].item(), displaced.endings[1, 6].item()])
    assert missed > 0.5
    made.unet.cost.zero_()
    out = mage(ids, text, speed, dice=dice, lengths=lengths)
    torch.testing.assert_close(out.displacement_loss, misses + made.ENDING * missed + made.NAMED[0] * picture
                               + made.CENTRE * off + made.NAMED[1] * made.unet.word_loss(displaced.words, text))
    gradients = torch.autograd.grad(out.displacement_loss, [made.ends[-1].weight, made.ends[0].weight])
    assert all(gradient.any() for gradient in gradients)
    twice = mage(ids, text, speed, dice=torch.cat([dice] * 2), more=(ids, text, speed), lengths=lengths.repeat(2))
    torch.testing.assert_close(twice.displacement_loss, out.displacement_loss)
    for wrong, message in ((None, "no lengths of videos are given for 2 clips"),
                           (lengths[:1], "1 lengths.* for 2 clips")):
        with pytest.raises(ValueError, match=message):
            mage(ids, text, speed, lengths=wrong)


def test_when_things_rest_is_learned_in_seconds():
    """Two things that a phrase says the number of, which rest after as many frames: the larger ends the video."""
    torch.manual_seed(0)
    made = ending().advection
    words = nn.Embedding(LONGEST, 80)
    optimiser = torch.optim.AdamW([*made.ends.parameters(), *words.parameters()], lr=1e-2)
    for _ in range(150):
        numbers = torch.randint(LONGEST, (32, 2))
        loss = F.nll_loss(made._endings(words(numbers)), numbers.amax(1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    numbers = torch.cartesian_prod(torch.arange(LONGEST), torch.arange(LONGEST))
    assert (made._endings(words(numbers)).argmax(1) == numbers.amax(1)).float().mean() > 0.9


@torch.no_grad()
def test_a_clip_is_generated_of_a_video_whose_length_nobody_says():
    mage, (ids, text, speed) = ending(), sample()
    made = mage.generate(ids[:, 0], text, speed)
    assert made.shape == ids.shape and torch.equal(made, mage.generate(ids[:, 0], text, speed, recompute=True))


def test_weights_that_ask_for_no_length_are_a_start_for_some_that_do():
    theirs, ours = model(seed=1), ending(seed=2)
    ends = [parameter.clone() for parameter in ours.advection.ends.parameters()]
    ours.start_from(theirs, "abcdefghi", "abcdefghi")
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert all(map(torch.equal, ends, ours.advection.ends.parameters()))
    with pytest.raises(ValueError, match="longest 9 for 0"):
        theirs.start_from(ours, "abcdefghi", "abcdefghi")


@pytest.mark.parametrize("name, longest", [("single-mnist", 0), ("double-mnist", 0), ("modified-mnist", 21)])
def test_lengths_are_asked_for_where_they_differ(name, longest):
    dataset, chosen = load_dataset(name), preset("gpu", name)
    found = mage_config(chosen.mage, dataset, 64, 1)
    assert found.longest == longest and (found.unet > 0) == (name != "single-mnist")
    assert mage_config(changed(chosen, ["mage.unet=0"]).mage, dataset, 64, 1).longest == 0
    assert dataset.longest == max(dataset.lengths([dataset.spec("train", index) for index in range(400)]))


# ---------------------------------------------------------------- in the house

def test_a_start_brings_each_word_to_its_own_number():
    theirs, ours = model(seed=1), model(dataclasses.replace(CONFIG, phrases=2, context_length=10), seed=2)
    kept = ours.advection.word_places.weight[8:].clone()
    ours.start_from(theirs, "abecdfghx", "abcdefghi")
    for module, other in ((ours, theirs),):
        for name in ("advection.word_vectors.weight", "advection.unet.word.weight", "advection.unet.cost",
                     "text_encoder.words"):
            mine, its = module.state_dict()[name], other.state_dict()[name]
            assert torch.equal(mine[[0, 1, 2, 3, 4, 5]], its[[0, 1, 4, 2, 3, 5]])
    assert torch.equal(ours.advection.word_places.weight[:8], theirs.advection.word_places.weight)
    assert torch.equal(ours.advection.word_places.weight[8:], kept)
    plain = model(seed=3)
    without = MAGE(dataclasses.replace(CONFIG, phrases=0, unet=0))
    plain.start_from(without, "abcdefghi", "abcdefghi")
    with pytest.raises(ValueError, match="unet 8 for 0, phrases 4 for 0"):
        without.start_from(theirs, "abcdefghi", "abcdefghi")


@pytest.mark.parametrize("precision", ["full", "half", "int8"])
def test_weights_with_phrases_are_the_same_when_read_again(tmp_path, precision):
    dataset, chosen = load_dataset("modified-mnist"), changed(preset("smoke", "modified-mnist"),
                                                              ["mage.unet=8"])
    config = mage_config(chosen.mage, dataset, chosen.vqvae.codebook_size, chosen.vqvae.groups)
    assert dataset.vocabulary[config.phrases] == "and"
    torch.manual_seed(0)
    mage, vqvae = MAGE(config), VQVAE(vqvae_config(chosen.vqvae, dataset))
    mage.advection.unet.share.uniform_()
    mage.advection.unet.steps += 3
    made = weights.save(tmp_path / "made.safetensors", vqvae, mage, {"dataset": dataset.name, **dataset.about},
                        precision=precision)
    near = 0 if precision == "full" else 0.05
    for name, tensor in mage.state_dict().items():
        torch.testing.assert_close(made.mage.state_dict()[name], tensor, atol=near, rtol=near)


@pytest.mark.parametrize("fields, message", [
    ({"phrases": 9}, "phrases 9.* one of 9"), ({"phrases": -1}, "phrases -1"), ({"phrases": 0}, "both or neither"),
    ({"unet": 0}, "unet is 0 and phrases 4"), ({"pad_id": 4}, "padding \\(4\\) begins no phrase"),
    ({"masks": False}, "unet is 8.*masks False.*needs both"), ({"advection": 0}, "unet is 8, advection 0.*needs both"),
    ({"rows": 3}, "unet is 8 for images of 12 x 24.*multiples of 8"),
    ({"longest": 1}, "longest is 1.*2 frames or more"),
    ({"longest": 9, "unet": 0, "phrases": 0}, "longest is 9, unet 0.*needs a U-Net"),
    ({"longest": 9, "intervals": None}, "intervals None"),
    ({"longest": 9, "video_length": 9}, "video_length 9.*no one length of all")])
def test_phrases_that_cannot_be_are_told(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **fields)


def test_a_word_that_no_caption_has_begins_no_phrase():
    chosen = changed(preset("smoke", "double-mnist"), ["mage.unet=8", "mage.phrases=while"])
    with pytest.raises(ValueError, match="'while'.*captions of double-mnist"):
        mage_config(chosen.mage, load_dataset("double-mnist"), 64, 1)


def test_batches_are_shared_by_no_processes(tmp_path):
    class Half(Alone):
        index, count = 1, 2

    chosen = changed(preset("smoke", "double-mnist"), ["mage.unet=8"])
    with pytest.raises(ValueError, match="mage.unet is 8, and 2 processes.*whole batches"):
        train(load_dataset("double-mnist"), chosen, folder=tmp_path, device="cpu", team=Half())
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- several looks at an image

LOOKS = dataclasses.replace(CONFIG, looks=5, trust=10.0)


@given(st.integers(1, 40))
@few
def test_looks_are_spread_evenly(looks):
    shifts, most = Advection.shifts(looks), Advection.SHIFT
    assert len(shifts) == looks and np.abs(shifts).max() <= most
    assert looks > 1 or shifts == [(0, 0)]
    rows, columns = np.transpose(shifts)
    assert np.abs(rows.mean()) < 0.5 and np.abs(columns.mean()) < 1 + most / looks
    if looks >= 2 * (2 * most + 1):   # each place is as likely, the outermost half as much
        assert set(rows) == set(columns) == set(range(-most, most + 1))


@torch.no_grad()
def test_a_look_is_at_the_image_farther_down_and_to_the_right(monkeypatch):
    """All but the outermost pixels are empty there, so that nothing is lost; what is found is back in its place."""
    mage, (ids, text, _) = model(), sample()
    image = F.pad(torch.rand(2, 2, 10, 18), (3, 3, 3, 3))
    monkeypatch.setattr(mage.advection, "image", lambda token_ids: image)
    times = torch.randn(2, 3, 16)
    for shift in ((2, -3), (0, 1), (-1, 0)):
        found = mage.advection.displacements(None, ids[:, 0], times, text, shift)
        monkeypatch.setattr(mage.advection, "image", lambda token_ids: image.roll(shift, (2, 3)))
        apart = mage.advection.displacements(None, ids[:, 0], times, text)
        monkeypatch.setattr(mage.advection, "image", lambda token_ids: image)
        torch.testing.assert_close(found.things, apart.things.roll((-shift[0], -shift[1]), (3, 4)))
        torch.testing.assert_close(found.told[0], apart.told[0])
        torch.testing.assert_close(found.told[1], apart.told[1] - torch.tensor(shift))
        assert not torch.allclose(found.things, mage.advection.displacements(None, ids[:, 0], times, text).things)


@pytest.mark.parametrize("longest", [0, 9])
@torch.no_grad()
def test_several_looks_find_the_mean_of_what_each_finds(longest):
    mage, (ids, text, speed) = model(dataclasses.replace(LOOKS, longest=longest)), sample()
    found = mage.displacements(None, ids[:, 0], text, speed, looks=5)
    alone = [mage._displacements(None, ids[:, 0], text, speed, None, shift) for shift in Advection.shifts(5)]
    assert not torch.allclose(alone[0].chances, alone[1].chances, atol=1e-3)
    for name in ("chances", "things", "endings")[:3 if longest else 2]:
        each = np.stack([np.asarray(getattr(look, name), np.float64) for look in alone])
        each = each.mean(0) if name == "things" else np.log(np.exp(each).mean(0))
        np.testing.assert_allclose(getattr(found, name), each, rtol=1e-3, atol=1e-4)
    assert found.endings is None or longest


@torch.no_grad()
def test_a_thing_is_where_the_error_expected_is_least():
    """Against every picture at every displacement, all of them inside the image."""
    mage = model().advection
    things = torch.zeros(2, 3, 2, 16, 24)
    things[..., 6:10, 7:17] = torch.rand(2, 3, 2, 4, 10)
    chances = torch.randn(2, 4, 3, 26).softmax(-1)
    found = mage.least_error(chances, things)
    everywhere = torch.eye(26)[None, :, None].expand(2, -1, 3, -1)
    pictures = mage.pictures(everywhere, things)[:, :, :3].flatten(3).double()   # (b m things p)
    apart = (pictures[:, :, None] - pictures[:, None]).square().sum(-1)      # (b m m things)
    errors = torch.einsum("btkn,bmnk->btkm", chances.double(), apart)
    assert found.shape == chances.shape and torch.equal(found.sum(-1), torch.ones(2, 4, 3))
    least = errors.min(-1).values
    torch.testing.assert_close((errors * found).sum(-1), least)
    assert (errors.gather(-1, chances.argmax(-1, keepdim=True))[..., 0] > least + 0.1).float().mean() > 0.1


@torch.no_grad()
def test_generation_looks_several_times_and_training_once():
    one, several, (ids, text, speed) = model(dataclasses.replace(LOOKS, looks=1)), model(LOOKS), sample()
    assert not torch.equal(several.generate(ids[:, 0], text, speed), one.generate(ids[:, 0], text, speed))
    dice = torch.rand(2, 4, 4, 6)
    losses = [mage(ids, text, speed, dice=dice).loss for mage in (one, several)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="looks is 3 and unet 0: a U-Net looks at the first frame once or more"):
        dataclasses.replace(CONFIG, unet=0, phrases=0, looks=3)
    with pytest.raises(ValueError, match="looks is 0"):
        dataclasses.replace(CONFIG, looks=0)
    assert mage_config(preset("smoke", "double-mnist").mage, load_dataset("double-mnist"), 64).looks == 8
    assert mage_config(preset("smoke", "single-mnist").mage, load_dataset("single-mnist"), 64).looks == 1
