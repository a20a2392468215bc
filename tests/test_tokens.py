"""Tokens of several codes: ids as numbers of several digits, and both stages with them against plainer ways."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mage_core.mage import MAGE, MAGEConfig, likely_mean, with_still
from mage_core.tokens import block_grid, check_tokens, code_vectors, id_dtype, join_ids, split_ids
from mage_core.vqvae import VQVAE, Codebook, VQVAEConfig

GROUPED = MAGEConfig(codebook_size=7, groups=3, rows=4, columns=5, clip_length=5, width=16, vocabulary_size=9,
                     context_length=8, head_width=8, axial_layers=3, text_layers=1, dropout=0.0, hidden_token=True,
                     shift_attention=True, time_bias=True)
PATCH = VQVAEConfig(channels=1, width=16, codebook_size=12, groups=4, down=4, pixel_range=(0.0, 1.0), shape="patch",
                    code_channels=16, encoder_width=8, encoder_blocks=0, decoder_blocks=1)
seeds = st.integers(0, 2 ** 32 - 1)


def model(config=GROUPED, seed=0):
    torch.manual_seed(seed)
    mage = MAGE(config).eval()
    with torch.no_grad():
        for parameter in mage.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return mage


def sample(config=GROUPED, batch=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shape = batch, config.clip_length, config.rows, config.columns
    return (torch.randint(config.codebook_size ** config.groups, shape, generator=draw),
            torch.randint(1, config.vocabulary_size, (batch, 6), generator=draw), torch.tensor([0.3, 0.7])[:batch])


def pictures(count=60, seed=0):
    """Images (b 1 64 64) of a few soft blobs on black."""
    draw = np.random.default_rng(seed)
    images = torch.zeros(count, 1, 64, 64)
    for image in images:
        for y, x in draw.integers(0, 50, (3, 2)):
            image[0, y:y + 12, x:x + 12] = torch.from_numpy(draw.random((12, 12)).astype(np.float32))
    return F.avg_pool2d(images, 3, 1, 1)


# ---------------------------------------------------------------- ids

@given(seeds, st.integers(1, 300), st.integers(1, 8))
def test_ids_are_numbers_of_as_many_digits_as_groups(seed, codebook_size, groups):
    assume(codebook_size ** groups <= 2 ** 62)
    codes = torch.from_numpy(np.random.default_rng(seed).integers(codebook_size, size=(5, 2, groups)))
    ids = join_ids(codes, codebook_size)
    assert ids.shape == (5, 2) and torch.equal(split_ids(ids, codebook_size, groups), codes)
    by_hand = [sum(int(digit) * codebook_size ** place for place, digit in enumerate(row))
               for row in codes.view(-1, groups)]
    assert ids.flatten().tolist() == by_hand and 0 <= min(by_hand) and max(by_hand) < codebook_size ** groups


@given(st.integers(1, 64), st.sampled_from([4, 8]))
def test_a_patch_is_cut_into_equal_blocks_as_square_as_can_be(groups, down):
    possible = [(a, b) for a, b in itertools.product(range(1, down + 1), repeat=2)
                if a * b == groups and down % a == down % b == 0]
    if not possible:
        with pytest.raises(ValueError, match=f"groups is {groups}: .*{down} x {down}"):
            block_grid(groups, down)
        return
    found = block_grid(groups, down)
    assert found in possible and abs(found[0] - found[1]) == min(abs(a - b) for a, b in possible)


def test_ids_that_would_not_fit_are_refused_and_small_ones_kept_small():
    check_tokens("it", 2, 62)
    for make in (lambda: check_tokens("it", 2, 63),
                 lambda: dataclasses.replace(PATCH, codebook_size=256, groups=8),
                 lambda: dataclasses.replace(GROUPED, codebook_size=256, groups=8)):
        with pytest.raises(ValueError, match="more than 62 bits; take fewer"):
            make()
    assert (id_dtype(2 ** 15), id_dtype(2 ** 15 + 1)) == (np.uint16, np.int64)


@pytest.mark.parametrize("change, told", [({"groups": 0}, "groups is 0"), ({"groups": 3}, "groups is 3"),
                                          ({"groups": 16, "code_channels": 8}, "code_channels"),
                                          ({"groups": 2, "shape": "released", "code_channels": 16}, "'patch'")])
def test_groups_that_cannot_be_are_told(change, told):
    with pytest.raises(ValueError, match=told):
        dataclasses.replace(PATCH, **change)


# ---------------------------------------------------------------- first stage

@torch.no_grad()
def test_each_block_of_a_patch_has_the_nearest_code_of_its_own():
    vqvae, images = VQVAE(PATCH).eval(), pictures()
    vqvae.initialise(images)
    features = vqvae.features(images[:5])
    ids = vqvae.encode(images[:5])
    codes = split_ids(ids, 12, 4)
    for group in range(4):
        part = rearrange(features[:, 4 * group:4 * group + 4], "b e h w -> (b h w) e")
        book = vqvae.codebook[:, 4 * group:4 * group + 4]
        assert torch.equal(codes[..., group].flatten(), torch.cdist(part, book).argmin(1))
        torch.testing.assert_close(code_vectors(ids, vqvae.codebook, 4)[..., 4 * group:4 * group + 4],
                                   book[codes[..., group]])
    torch.testing.assert_close(vqvae.embed(ids), rearrange(code_vectors(ids, vqvae.codebook, 4), "b h w e -> b e h w"))
    assert (ids[(F.max_pool2d(images[:5], 4) == 0)[:, 0]] == 0).all(), "an empty patch is token 0"


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16])
def test_a_codes_channels_see_its_own_block_alone(groups):
    vqvae, images = VQVAE(dataclasses.replace(PATCH, groups=groups)).eval(), pictures(80)
    vqvae.initialise(images)
    rows, columns = block_grid(groups, 4)
    image, other = images[:1].clone(), images[:1].clone()
    other[..., 24:24 + 4 // rows, 20:20 + 4 // columns] += 0.5   # the first block of the patch at row 6, column 5
    changed = (vqvae.features(image) != vqvae.features(other))[0]
    assert changed[:16 // groups, 6, 5].any() and changed.sum() == changed[:16 // groups, 6, 5].sum()


@torch.no_grad()
def test_more_groups_say_more_with_as_many_codes():
    images, errors = pictures(200), []
    for groups in (1, 2, 4, 8):
        vqvae = VQVAE(dataclasses.replace(PATCH, groups=groups, codebook_size=24)).eval()
        vqvae.initialise(images[:150])
        errors.append(F.mse_loss(vqvae.decode(vqvae.encode(images[150:])), images[150:]).item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 4


@torch.no_grad()
def test_an_update_moves_the_codes_of_its_group_alone():
    vqvae = VQVAE(PATCH)
    before = vqvae.codebook.clone()
    features, codes = torch.randn(30, 16), torch.randint(12, (30,))
    Codebook(vqvae, decay=0.9, group=2).update(vqvae, features, codes)
    others = [channel for channel in range(16) if not 8 <= channel < 12]
    assert torch.equal(vqvae.codebook[:, others], before[:, others])
    code = int(codes.bincount().argmax())
    mine = features[codes == code, 8:12]
    expected = (0.9 * 2 * before[code, 8:12] + 0.1 * mine.sum(0)) / (0.9 * 2 + 0.1 * len(mine))
    torch.testing.assert_close(vqvae.codebook[code, 8:12], expected)


def test_codes_are_counted_group_by_group():
    vqvae = VQVAE(PATCH)
    count = vqvae.count_codes(join_ids(torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 5]]), 12))
    assert count.shape == (4, 12) and count.sum() == 12
    assert count[0, :2].tolist() == [1, 2] and count[1:, 0].tolist() == [3, 3, 2] and count[3, 5] == 1
    plain = VQVAE(dataclasses.replace(PATCH, groups=1)).count_codes(torch.tensor([[3, 3], [7, 3]]))
    assert plain.nonzero().tolist() == [[0, 3], [0, 7]] and plain[0, 3] == 3


# ---------------------------------------------------------------- second stage

@torch.no_grad()
def test_a_tokens_embedding_is_the_sum_of_its_codes_and_the_hidden_one_is_apart():
    mage, (ids, *_) = model(), sample()
    ids[:, 1] = GROUPED.hidden_id
    table, codes = mage.visual_tokens.embedding, split_ids(ids, 7, 3)
    expected = sum(table[7 * group:7 * (group + 1)][codes[..., group]] for group in range(3))
    expected[:, 1] = 3 * table[21]
    torch.testing.assert_close(mage.visual_tokens.embed(ids), expected)
    plain = mage.visual_tokens(ids)
    mage.visual_tokens.tabulate()
    torch.testing.assert_close(mage.visual_tokens(ids), plain, atol=1e-5, rtol=1e-5)


def test_the_loss_of_a_token_is_the_sum_over_its_codes():
    mage, (ids, text, speed) = model(), sample()
    out = mage(ids, text, speed)
    assert out.logits.shape == (2, 4, 4, 5, 3, 7)
    codes = split_ids(ids[:, 1:], 7, 3)
    each = F.cross_entropy(rearrange(out.logits, "... groups k -> (...) k groups"), codes.flatten(0, -2),
                           reduction="none").sum(1).view(2, 4, 4, 5)
    torch.testing.assert_close(out.loss, each.mean())
    counted = torch.rand(each.shape) < 0.4
    torch.testing.assert_close(mage(ids, text, speed, predict=counted).loss, each[counted].mean())
    weight = torch.rand(each.shape)
    torch.testing.assert_close(mage(ids, text, speed, weight=weight).loss, (weight * each).sum())


@settings(max_examples=6)
@given(seeds)
def test_frames_computed_once_are_the_frames_recomputed(seed):
    mage, (ids, text, speed) = model(seed=seed), sample(seed=seed)
    once, again = (mage.generate(ids[:, 0], text, speed, recompute=slow) for slow in (False, True))
    assert torch.equal(once, again) and once.max() < GROUPED.hidden_id
    with torch.no_grad():
        logits = mage(once, text, speed).logits
    assert torch.equal(join_ids(logits.argmax(-1), 7), once[:, 1:])


@settings(max_examples=10)
@given(seeds)
def test_a_start_from_codes_writes_and_reads_the_same_token(seed):
    config = dataclasses.replace(GROUPED, codebook_size=9, width=64, head_width=32)
    draw = torch.Generator().manual_seed(seed)
    codes, ids = torch.randn(9, 12, generator=draw), torch.randint(9 ** 3, (50,), generator=draw)
    assume(min(torch.pdist(part).min() for part in codes.split(4, 1)) > 0.1)
    mage = MAGE(config)
    mage.initialise_from_codes(codes, seed)
    logits = mage.generator.logits(mage.visual_tokens.embed(ids[None, None])[0, 0]).unflatten(-1, (3, 9))
    assert torch.equal(join_ids(logits.argmax(-1), 9), ids)


def test_the_mean_code_is_taken_group_by_group():
    logits, codes = torch.randn(6, 2, 3, 7), torch.randn(7, 12)
    found = likely_mean(logits, codes, groups=3)
    for group in range(3):
        part = likely_mean(logits[:, :, group], codes[:, 4 * group:4 * group + 4])
        torch.testing.assert_close(found[..., 4 * group:4 * group + 4], part)
    ids = torch.randint(7 ** 3, (5,))
    sure = 1e4 * F.one_hot(split_ids(ids, 7, 3), 7).float()
    assert torch.equal(likely_mean(sure, codes, groups=3), code_vectors(ids, codes, 3))
    mage, (ids, text, speed) = model(), sample()
    tokens, means = mage.generate(ids[:, 0], text, speed, codes=codes)
    assert torch.equal(means[:, 0], code_vectors(tokens[:, 0], codes, 3)) and means.shape == (*tokens.shape, 12)


@settings(max_examples=30)
@given(seeds, st.sampled_from([1, 2, 3]), st.floats(0.1, 20), st.booleans())
def test_that_a_token_stays_is_decided_as_a_whole_against_brute_force(seed, groups, nats, likely):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, groups, 5, generator=draw)
    start = logits.argmax(-1) if likely else torch.randint(5, (4, groups), generator=draw)
    found = with_still(logits if groups > 1 else logits[:, 0], start, nats).view(4, groups, 5)
    for row in range(4):
        chances = logits[row].double().softmax(-1)
        joint = {codes: math.prod(chances[group, code].item() for group, code in enumerate(codes))
                 for codes in itertools.product(range(5), repeat=groups)}
        own = tuple(start[row].tolist())
        stays = joint.pop(own)
        if math.exp(nats) * stays > 1 - stays:
            assert torch.equal(found[row].softmax(-1), F.one_hot(start[row], 5).float())
            continue
        assert tuple(found[row].argmax(-1).tolist()) != own
        given = torch.tensor([[sum(chance for codes, chance in joint.items() if codes[group] == code)
                               for code in range(5)] for group in range(groups)]) / sum(joint.values())
        if tuple(given.argmax(-1).tolist()) == own:   # then one code, which has to be another, is surely another
            forced = found[row].gather(-1, start[row, :, None])[:, 0].isinf()
            assert forced.sum() == 1
            given[forced] = given[forced].scatter(-1, start[row, forced, None], 0.0)
            given = given / given.sum(-1, keepdim=True)
        torch.testing.assert_close(found[row].softmax(-1), given, rtol=0, atol=1e-5)


def test_generation_stays_at_the_first_frame_where_it_must():
    mage, (ids, text, speed) = model(), sample()
    made = mage.generate(ids[:, 0], text, speed)
    assert (made != made[:, :1]).any()
    with torch.autocast("cpu", torch.bfloat16):
        mage.generate(ids[:, 0], text, speed)
    mage.config = dataclasses.replace(mage.config, still=99.0)
    with torch.autocast("cpu", torch.bfloat16):   # whose copy of the weights is kept
        assert torch.equal(mage.generate(ids[:, 0], text, speed), made[:, :1].expand_as(made))
    assert torch.equal(mage.generate(ids[:, 0], text, speed), made[:, :1].expand_as(made))
    assert torch.equal(mage.generate(ids[:, 0], text, speed, recompute=True), made[:, :1].expand_as(made))
    for wrong in (-1.0, 100.0):
        with pytest.raises(ValueError, match=f"still is {wrong}: it must be 0 or more nats"):
            dataclasses.replace(mage.config, still=wrong)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_that_is_not_autoregressive_makes_each_frame_from_the_first_alone(recompute):
    mage, (ids, text, speed) = model(), sample()
    mage.config = dataclasses.replace(mage.config, autoregressive=False)
    made = mage.generate(ids[:, 0], text, speed, recompute=recompute)
    given = torch.cat([ids[:, :1], torch.full_like(ids[:, 1:], mage.config.hidden_id)], 1)
    later = mage.config.clip_length - 1
    assert torch.equal(made[:, 1:], mage.guess(given, text, speed, torch.arange(later), last=later))
    mage.config = dataclasses.replace(mage.config, autoregressive=True)
    other = mage.generate(ids[:, 0], text, speed, recompute=recompute)
    assert torch.equal(other[:, :2], made[:, :2]) and not torch.equal(other, made)
    with pytest.raises(ValueError, match="autoregressive is False and hidden_token False"):
        dataclasses.replace(mage.config, autoregressive=False, hidden_token=False)
