"""VQ-VAE, motion anchor, axial transformer and MAGE against torch's own layers, and the invariants of the paper."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mage_core import axial
from mage_core.axial import (AxialLayer, Dropout, FrameCache, Offsets, QuickMLP, TimeBias, attention, attention_kernel,
                             quick_gelu)
from mage_core.mage import MAGE, MAGEConfig, token_loss
from mage_core.motion_anchor import AdaIN, CrossAttention, Posterior, TextEncoder, kl_from_normal
from mage_core.vqvae import VQVAE, VQVAEConfig, nearest_code

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SMALL = MAGEConfig(codebook_size=11, rows=3, columns=4, clip_length=4, width=32, vocabulary_size=9, context_length=8,
                   head_width=8, dropout=0.0)
VARIANTS = {
    "deterministic": SMALL,
    "all options": dataclasses.replace(SMALL, shift_attention=True, time_bias=True, intervals=(1.0, 2.0),
                                       hidden_token=True, speed_loss=True, speed_frequencies=3),
    "stochastic": dataclasses.replace(SMALL, stochastic=True, latent_channels=5),
    "two anchor layers": dataclasses.replace(SMALL, anchor_layers=2, axial_layers=3, text_layers=1),
}
seeds = st.integers(0, 2 ** 32 - 1)
few = settings(max_examples=10, deadline=None)


def model(config, seed=0):
    """A model with weights large enough for every part to matter."""
    torch.manual_seed(seed)
    mage = MAGE(config).eval()
    with torch.no_grad():
        for parameter in mage.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mage


def sample(config, batch=2, frames=None, length=6, seed=0):
    """Random token ids (b t h w), text ids (b l) and speeds (b,)."""
    generator = torch.Generator().manual_seed(seed)
    frames = frames or config.clip_length
    return (torch.randint(config.codebook_size, (batch, frames, config.rows, config.columns), generator=generator),
            torch.randint(1, config.vocabulary_size, (batch, length), generator=generator),
            torch.rand(batch, generator=generator))


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def mage(request):
    return model(request.param)


# ---------------------------------------------------------------- attention and its parts

@pytest.mark.parametrize("bias", [None, torch.full((3, 5), float("-inf")).triu(3)], ids=["free", "causal"])
def test_both_attention_kernels_are_torchs(bias):
    q, k, v = torch.randn(4, 2, 3, 8), torch.randn(4, 2, 5, 8), torch.randn(4, 2, 5, 8)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    for kernel in axial.KERNELS:
        with attention_kernel(kernel):
            torch.testing.assert_close(attention(q, k, v, bias), expected)
    torch.testing.assert_close(attention(q, k, v, bias), expected)


def test_the_kernel_is_chosen_and_can_be_forced(monkeypatch):
    used = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(axial.F, "scaled_dot_product_attention", lambda *a, **k: used.append(1) or fused(*a, **k))
    q = torch.randn(1, 2, 4)
    attention(q, q, q)
    assert not used, "on a CPU the fused kernel is the slower one"
    with attention_kernel("fused"):
        attention(q, q, q)
        assert len(used) == 1
        with attention_kernel("plain"):
            attention(q, q, q)
    assert len(used) == 1
    with pytest.raises(ValueError, match="'flash'.*plain.*fused"), attention_kernel("flash"):
        pass


SHAPE, HEADS, EACH = (2, 3, 4, 5), 2, 3   # b t h w, heads and their width
LENGTH = dict(zip(axial.AXES, SHAPE[1:]))


@pytest.mark.parametrize("options", ["", "bias", "offsets", "bias offsets"])
@pytest.mark.parametrize("axis", axial.AXES)
def test_attention_along_an_axis_is_torchs_and_its_gradient_the_numerical_one(axis, options):
    qkv, m = torch.randn(*SHAPE, 3 * HEADS * EACH, dtype=torch.float64, requires_grad=True), LENGTH[axis]
    bias = torch.randn(HEADS, m, m, dtype=torch.float64, requires_grad=True) if "bias" in options else None
    offsets = Offsets(HEADS, EACH, m).double() if "offsets" in options else None
    keys, places = (offsets.keys, offsets.bias) if offsets else (None, None)

    def ours(*tensors):
        return axial.AxisAttention.apply(*tensors, axis, HEADS)

    q, k, v = axial.split(qkv, axis, HEADS, 3)
    added = 0 if bias is None else bias[:, None]
    added = added + (offsets(q.transpose(0, 1)).transpose(0, 1) if offsets else 0)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=added if options else None)
    for found, wanted in zip(torch.unbind(ours(qkv, bias, keys, places)),
                             torch.unbind(axial.merge(expected[None], axis, qkv.shape))):
        torch.testing.assert_close(found, wanted)
    assert torch.autograd.gradcheck(ours, (qkv, bias, keys, places))


@pytest.mark.parametrize("axis", axial.AXES)
def test_split_puts_the_places_of_an_axis_in_a_row_and_merge_puts_them_back(axis):
    x = torch.randn(*SHAPE, 3 * HEADS * EACH)
    parts = axial.split(x, axis, HEADS, 3)
    assert parts.is_contiguous() and parts.shape == (3, HEADS, 2 * 3 * 4 * 5 // LENGTH[axis], LENGTH[axis], EACH)
    line = {"time": x[1, :, 2, 3], "height": x[1, 2, :, 3], "width": x[1, 2, 3]}[axis]
    number = {"time": (1 * 4 + 2) * 5 + 3, "height": (1 * 3 + 2) * 5 + 3, "width": (1 * 3 + 2) * 4 + 3}[axis]
    assert torch.equal(parts[1, 1, number], line.unflatten(1, (3, HEADS, EACH))[:, 1, 1])
    assert torch.equal(axial.merge(parts, axis, x.shape), x)


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("spread", [1, 60], ids=["even", "spread until the rest is below the smallest number"])
def test_the_loss_and_its_gradient_are_torchs(dtype, atol, spread):
    n, count, k = 300, 290, 50
    logits = (spread * torch.randn(n, k)).to(dtype).requires_grad_()
    targets = torch.randint(k, (n,))
    found = token_loss(logits, targets, count)
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.cross_entropy(logits[:count].to(wide), targets[:count])
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(2 * loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, atol=atol / count, rtol=2 ** -7 if dtype == torch.bfloat16 else 1e-5)
    assert not gradients[0][count:].any()


def test_as_written_is_the_same_model_in_torchs_own_operations(monkeypatch):
    used = []
    for name in ("scaled_dot_product_attention", "dropout"):
        original = getattr(F, name)
        monkeypatch.setattr(axial.F, name, lambda *a, name=name, original=original, **k:
                            used.append(name) or original(*a, **k))
    mage, sampled = model(dataclasses.replace(SMALL, dropout=0.2)), sample(SMALL)
    expected = mage(*sampled)
    assert not used or set(used) == {"dropout"}
    with pytest.raises(KeyError), axial.as_written():
        found = mage(*sampled)
        used.clear()
        mage.train()(*sampled)
        assert set(used) == {"scaled_dot_product_attention", "dropout"}
        raise KeyError
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    used.clear()
    mage(*sampled)
    assert not used, "and afterwards nothing is left of it"


def test_quick_gelu_is_its_definition():
    x = torch.linspace(-8, 8, 1001)
    torch.testing.assert_close(quick_gelu(x), x * torch.sigmoid(1.702 * x), atol=1e-6, rtol=1e-6)
    mlp = QuickMLP(16)
    for n in (7, 700):   # fewer numbers than the weights have, and more
        y = torch.randn(n, 16)
        hidden = mlp.up(y)
        expected = mlp.down(hidden * torch.sigmoid(1.702 * hidden))
        torch.testing.assert_close(mlp(y), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sizes", [(256, 288), (288, 256), (256, 256), (8, 300)], ids=str)
def test_a_wide_linear_layer_in_bf16_and_its_gradient_are_torchs(sizes):
    ours, theirs = axial.Linear(*sizes), nn.Linear(*sizes)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 50, sizes[0])
    into, found = torch.randn(2, 3, 50, sizes[1]), []
    for layer, kind in ((ours, torch.bfloat16), (theirs, torch.float32)):
        given = x.to(kind).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
            made = layer(given)
        (made.float() * into).sum().backward()
        found.append([made, given.grad, layer.weight.grad, layer.bias.grad])
        assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.is_contiguous()
    for mine, exact in zip(*found):
        assert (mine.float() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_drops_the_share(p):
    torch.manual_seed(0)
    x = torch.ones(1000, 999)
    y = Dropout(p)(x)
    assert abs((y == 0).float().mean() - p) < 0.004
    assert abs(y.mean() - 1) < 0.004
    assert torch.equal(Dropout(p).eval()(x), x) and torch.equal(Dropout(0.0)(x), x)
    assert Dropout(0.999)(x).isfinite().all()


def test_dropout_is_wherever_the_released_code_has_it(monkeypatch):
    """In an encoder layer as torch's own has it, three times; once after the text encoder, and twice in each layer of
    the anchor and of the generator: what attention adds, and what the feed-forward adds."""
    shared = dict(width=16, head_width=8, dropout=0.5)
    layer = nn.TransformerEncoderLayer(16, 2, 64)
    in_a_layer = sum(isinstance(part, nn.Dropout) for part in layer.modules())
    encoder = TextEncoder(vocabulary_size=9, context_length=8, layers=2, pad_id=0, **shared)
    image, words = torch.randn(1, 3, 1, 16), torch.randn(1, 4, 16)
    for part, seen, expected in ((encoder, (torch.tensor([[1, 2, 3, 0]]),), 2 * in_a_layer + 1),
                                 (CrossAttention(**shared), (image, words, torch.zeros(4)), 2),
                                 (AxialLayer("height", **shared), (torch.randn(1, 2, 3, 4, 16), torch.arange(2)), 2)):
        dropped = []
        monkeypatch.setattr(Dropout, "forward", lambda self, x: dropped.append(self.p) or x)
        before = part.train()(*seen)
        assert dropped == [0.5] * expected
        for number in range(expected):   # and each is of what is then added
            left = iter(range(expected))
            monkeypatch.setattr(Dropout, "forward", lambda self, x: 0 * x if next(left) == number else x)
            assert not torch.allclose(part(*seen), before)


def multihead(layer, width, heads):
    """torch's own attention with a layer's weights."""
    theirs = nn.MultiheadAttention(width, heads, batch_first=True)
    theirs.load_state_dict({"in_proj_weight": layer.qkv.weight, "in_proj_bias": layer.qkv.bias,
                            "out_proj.weight": layer.out.weight, "out_proj.bias": layer.out.bias})
    return theirs


@pytest.mark.parametrize("axis", axial.AXES)
def test_axial_layer_is_torchs_attention_along_one_axis(axis):
    b, t, h, w, d = 2, 3, 4, 5, 16
    layer, x = AxialLayer(axis, d, 8, 0.0), torch.randn(b, t, h, w, d)
    theirs = multihead(layer, d, 2)
    mask = torch.triu(torch.ones(t, t, dtype=torch.bool), 1) if axis == "time" else None
    pattern = {"time": "(b h w) t d", "height": "(b t w) h d", "width": "(b t h) w d"}[axis]
    y = rearrange(layer.norm_1(x), f"b t h w d -> {pattern}")
    y = rearrange(theirs(y, y, y, attn_mask=mask, need_weights=False)[0], f"{pattern} -> b t h w d", b=b, t=t, h=h, w=w)
    expected = x + y
    expected = expected + layer.mlp(layer.norm_2(expected))
    torch.testing.assert_close(layer(x, torch.arange(t)), expected)


def test_text_encoder_is_torchs_transformer_on_the_words():
    encoder = TextEncoder(vocabulary_size=9, context_length=8, width=16, head_width=8, layers=2, dropout=0.0, pad_id=0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, activation="gelu", batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for ours, theirs_layer in zip(encoder.layers, theirs.layers):
        theirs_layer.self_attn.load_state_dict(multihead(ours, 16, 2).state_dict())
        for mine, other in ((ours.norm_1, "norm1"), (ours.norm_2, "norm2"),
                            (ours.up, "linear1"), (ours.down, "linear2")):
            getattr(theirs_layer, other).load_state_dict(mine.state_dict())
    ids = torch.tensor([[1, 5, 3, 2, 0, 0], [1, 4, 4, 8, 7, 2]])
    padding = ids == 0
    x = encoder.norm(encoder.words[ids] + encoder.positions[:6]).masked_fill(padding[..., None], 0)
    expected = encoder.projection(encoder.final_norm(theirs(x, src_key_padding_mask=padding)))
    torch.testing.assert_close(encoder(ids)[~padding], expected[~padding])


@pytest.mark.parametrize("heads, length", [(2, 5), (1, 3)])
def test_shift_attention_scores_every_pair_by_its_offset(heads, length):
    offsets, q = Offsets(heads, 8, length), torch.randn(3, heads, length, 8)
    with torch.no_grad():
        offsets.keys.normal_()
        offsets.bias.normal_()
    scores = offsets(q)
    assert scores.shape == (3, heads, length, length)
    for row in range(length):
        for column in range(length):
            place = column - row + length - 1
            expected = torch.einsum("nhe,he->nh", q[:, :, row], offsets.keys[:, place]) / 8 ** 0.5
            torch.testing.assert_close(scores[:, :, row, column], expected + offsets.bias[:, place])


def test_shift_attention_starts_looking_sideways():
    bias = Offsets(heads=5, head_width=8, length=16)(torch.zeros(1, 5, 16, 8))[0]
    assert (bias[:, 8].argmax(-1) - 8).tolist() == [-4, -2, 0, 2, 4]


def test_time_bias_starts_on_anchor_first_frame_now_and_before():
    bias = TimeBias(heads=5, clip_length=6).table
    assert bias[:, 4].argmax(-1).tolist() == [0, 1, 4, 3, 0]


def test_options_are_off_in_the_released_model():
    own = set(model(VARIANTS["all options"]).state_dict()) - set(MAGE(SMALL).state_dict())
    parts = ("offsets", "time_bias", "source_time", "speed_waves")
    assert {part for part in parts for name in own if part in name} == set(parts)
    assert all(any(part in name for part in parts) for name in own)
    assert not any(layer.offsets for layer in model(VARIANTS["all options"]).generator.layers if layer.axis == "time")


# ---------------------------------------------------------------- randomness

def test_kl_is_torchs():
    mean, log_variance = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(kl_from_normal(mean, log_variance), expected.sum((1, 2, 3)).mean())


def test_adain_carries_the_statistics_that_r_sets():
    adain = AdaIN(16, 4)
    with torch.no_grad():
        for network, value in ((adain.scale, 3.0), (adain.shift, -2.0)):
            network[1].weight.zero_()
            network[1].bias.fill_(value)
    out = adain(torch.randn(2, 6, 6, 16) * 5 + 1, torch.randn(2, 4, 6, 6))
    torch.testing.assert_close(out.mean((1, 2)), torch.full((2, 16), -2.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std((1, 2), correction=0), torch.full((2, 16), 3.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("frames", [2, 10, 16])
def test_posterior_folds_up_to_sixteen_frames_into_one_step(frames):
    mean, log_variance = Posterior(16, 5)(torch.randn(1, frames, 3, 4, 16))
    assert mean.shape == log_variance.shape == (1, 5, 3, 4)


def test_noise_belongs_to_the_sample_and_not_to_the_batch():
    mage = model(VARIANTS["stochastic"])
    assert torch.equal(mage.noise([3, 4, 5])[1], mage.noise([4])[0])
    assert mage.noise([3]).shape == (1, 5, 3, 4)


def test_randomness_changes_the_video_and_the_posterior_reads_every_frame():
    mage, (ids, text, speed) = model(VARIANTS["stochastic"]), sample(SMALL)
    noise = mage.noise([0, 1])
    anchor = mage(ids, text, speed, posterior_noise=noise).motion_anchor
    assert not torch.allclose(anchor, mage(ids, text, speed, posterior_noise=mage.noise([2, 3])).motion_anchor)
    for frame in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, frame] = (changed[:, frame] + 1) % SMALL.codebook_size
        assert not torch.allclose(anchor, mage(changed, text, speed, posterior_noise=noise).motion_anchor)


# ---------------------------------------------------------------- MAGE: invariants of the paper

@few
@given(seed=seeds, frame=st.integers(0, 3))
def test_a_frame_changes_no_logits_before_it(seed, frame):
    mage, (ids, text, speed) = model(VARIANTS["all options"]), sample(SMALL, seed=seed)
    changed = ids.clone()
    changed[:, frame] = torch.randint(SMALL.codebook_size, changed[:, frame].shape,
                                      generator=torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        before, after = mage(ids, text, speed), mage(changed, text, speed)
    # logits[:, i] are those of frame i + 2, computed from frames 1 ... i + 1
    torch.testing.assert_close(before.logits[:, :frame], after.logits[:, :frame], atol=1e-5, rtol=0)
    if frame == 0:
        assert torch.equal(ids[:, 0], changed[:, 0]) or not torch.allclose(before.logits, after.logits)
    else:
        assert torch.equal(before.motion_anchor, after.motion_anchor), "the anchor depends on the first frame alone"


@few
@given(seed=seeds, length=st.integers(1, 6))
def test_padding_means_nothing(seed, length):
    mage, (ids, text, speed) = model(SMALL), sample(SMALL, length=length, seed=seed)
    padded = F.pad(text, (0, SMALL.context_length - length))
    with torch.no_grad():
        short, long = mage(ids, text, speed), mage(ids, padded, speed)
    torch.testing.assert_close(short.motion_anchor, long.motion_anchor, atol=1e-5, rtol=0)
    torch.testing.assert_close(short.logits, long.logits, atol=1e-5, rtol=0)


def test_captions_of_different_lengths_do_not_meet_in_a_batch():
    mage, (ids, text, speed) = model(SMALL), sample(SMALL)
    text[0, 3:] = 0
    together = mage(ids, text, speed).motion_anchor
    alone = mage(ids[:1], text[:1, :3], speed[:1]).motion_anchor
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_computing_each_frame_once_gives_the_same_ids(mage, seed):
    ids, text, speed = sample(mage.config, batch=3, seed=seed)
    noise = mage.noise(range(3)) if mage.config.stochastic else None
    once = mage.generate(ids[:, 0], text, speed, prior_noise=noise)
    again = mage.generate(ids[:, 0], text, speed, prior_noise=noise, recompute=True)
    assert once.shape == ids.shape and torch.equal(once[:, 0], ids[:, 0])
    assert torch.equal(once, again)
    assert len(once[:, 1:].unique()) > 1, "a constant video would compare nothing"


def test_generation_is_the_argmax_of_the_training_logits():
    mage, (ids, text, speed) = model(SMALL), sample(SMALL)
    video = mage.generate(ids[:, 0], text, speed)
    with torch.no_grad():
        assert torch.equal(mage(video, text, speed).logits.argmax(-1), video[:, 1:])


def test_generation_is_without_dropout_and_leaves_the_mode_alone():
    mage, (ids, text, speed) = model(dataclasses.replace(SMALL, dropout=0.5)), sample(SMALL)
    video = mage.generate(ids[:, 0], text, speed)
    assert torch.equal(mage.train().generate(ids[:, 0], text, speed), video) and mage.training


def test_the_frame_cache_allocates_once():
    cache, layer = FrameCache(5), nn.Identity()
    whole = torch.randn(2, 5, 3, 4, 8)   # b t h w 2d
    first = cache.extend(layer, whole[:, :2])
    cache.length = 2
    k, v = kept = cache.extend(layer, whole[:, 2:3])
    for found, width in ((k, slice(4)), (v, slice(4, 8))):
        assert torch.equal(found, whole[:, :3, ..., width].transpose(0, 1))
    assert kept.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()


def test_attention_weights_sum_to_one_over_the_words_and_are_the_ones_used(mage):
    config = mage.config
    ids, text, speed = sample(config)
    text[0, 4:] = 0
    r = mage.noise([0, 1]) if config.stochastic else None
    first = mage.visual_tokens(ids[:, :1])[:, 0]
    anchor, weights = mage.anchor(first, text, speed, r, return_attention=True)
    assert weights.shape == (2, config.anchor_layers, config.width // config.head_width,
                             config.rows * config.columns, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert weights[0, ..., 4:].eq(0).all()
    torch.testing.assert_close(anchor, mage.anchor(first, text, speed, r))
    layer, words = mage.motion_anchor.layers[0], mage.text_encoder(text)
    width = config.width
    theirs = multihead(layer, width, width // config.head_width)
    _, expected = theirs(first.flatten(1, 2), words, words, key_padding_mask=text == 0, average_attn_weights=False)
    torch.testing.assert_close(weights[:, 0], expected)


def test_speed_moves_the_anchor_by_one_vector():
    mage, (ids, text, _) = model(SMALL), sample(SMALL)
    slow, fast = (mage(ids, text, torch.full((2,), eta)).motion_anchor for eta in (0.25, 0.75))
    expected = (0.5 * mage.motion_anchor.speed).expand_as(slow.flatten(0, 2))
    torch.testing.assert_close((fast - slow).flatten(0, 2), expected)


def test_speed_waves_add_sines_and_cosines_of_eta():
    anchor, eta = model(VARIANTS["all options"]).motion_anchor, torch.tensor([0.3])
    turns = torch.pi * 0.3 * torch.tensor([1.0, 2.0, 3.0])
    expected = 0.3 * anchor.speed[0] + anchor.speed_waves.weight @ torch.cat([turns.sin(), turns.cos()])
    torch.testing.assert_close(anchor.speed_vector(eta)[0], expected)


# ---------------------------------------------------------------- loss (eq. 7)

def test_loss_by_its_terms():
    ids, text, speed = sample(SMALL)
    for config, beta, alpha in ((SMALL, 0, 0), (dataclasses.replace(SMALL, speed_loss=True), 0, 1),
                                (VARIANTS["stochastic"], 1, 1)):
        config = dataclasses.replace(config, alpha=0.7, beta=0.3)
        mage = model(config)
        noise = mage.noise([0, 1]) if config.stochastic else None
        out = mage(ids, text, speed, posterior_noise=noise)
        prediction = F.cross_entropy(out.logits.flatten(0, -2), ids[:, 1:].flatten())
        vector = speed[:, None] * mage.motion_anchor.speed
        expected = prediction + 0.3 * beta * out.kl_loss + 0.7 * alpha * vector.norm(dim=1).square().mean()
        torch.testing.assert_close(out.loss, expected)
        assert (out.kl_loss > 0) == config.stochastic


def test_corrupted_inputs_and_true_targets():
    mage, (ids, text, speed) = model(SMALL), sample(SMALL)
    truth = (ids + 1) % SMALL.codebook_size
    out = mage(ids, text, speed, target_ids=truth)
    torch.testing.assert_close(out.logits, mage(ids, text, speed).logits)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.flatten(0, -2), truth[:, 1:].flatten()))


def test_the_posterior_sees_the_true_video_whatever_the_model_is_given():
    mage = model(VARIANTS["stochastic"])
    truth, text, speed = sample(mage.config)
    given = truth.clone()
    given[:, 1:] = (given[:, 1:] + 3) % mage.config.codebook_size
    with torch.no_grad():
        mean, log_variance = mage.posterior(mage.visual_tokens.embed(truth))
        normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
        other = mage(truth, text, speed, posterior_noise=mage.noise([0, 1]))
        out = mage(given, text, speed, target_ids=truth, posterior_noise=mage.noise([0, 1]))
    assert out.kl_loss == other.kl_loss and not torch.equal(out.logits, other.logits)
    torch.testing.assert_close(out.kl_loss, expected.flatten(1).sum(1).mean())


def test_loss_over_chosen_tokens_and_frames(mage):
    config = mage.config
    ids, text, speed = sample(config)
    given = {"posterior_noise": mage.noise([0, 1])} if config.stochastic else {}
    whole = mage(ids, text, speed, **given)
    predict = torch.rand(ids[:, 1:].shape) < 0.3
    chosen = mage(ids, text, speed, predict=predict, **given)
    torch.testing.assert_close(chosen.logits, whole.logits[predict])
    torch.testing.assert_close(chosen.prediction_loss, F.cross_entropy(chosen.logits, ids[:, 1:][predict]))

    kept = torch.tensor([0, 2])   # the frame between is not computed: as if nobody looked at it
    some = mage(ids, text, speed, frames=kept, **given)
    assert some.logits.shape[1] == 2
    torch.testing.assert_close(some.logits[:, 0], whole.logits[:, 0])
    torch.testing.assert_close(
        some.prediction_loss, F.cross_entropy(some.logits.flatten(0, -2), ids[:, kept + 1].flatten()))
    changed = ids.clone()
    changed[:, 1] = (changed[:, 1] + 1) % config.codebook_size
    if not config.stochastic:   # the posterior reads it
        torch.testing.assert_close(mage(changed, text, speed, frames=kept).logits, some.logits)


def test_guesses_are_the_argmax_of_the_logits_and_a_stochastic_model_draws_its_randomness():
    mage = model(VARIANTS["all options"])
    ids, text, speed = sample(mage.config)
    frames = torch.tensor([0, 2])
    assert torch.equal(mage.guess(ids, text, speed, frames, 1),
                       mage(ids, text, speed, frames=frames).logits[:, -1:].argmax(-1))
    stochastic = model(VARIANTS["stochastic"])
    guesses = [stochastic.guess(*sample(stochastic.config), frames, 2) for _ in range(2)]
    assert guesses[0].shape == (2, 2, 3, 4) and not torch.equal(*guesses)


def test_a_hidden_frame_says_nothing_of_itself():
    mage = model(VARIANTS["all options"])
    ids, text, speed = sample(mage.config)
    hidden = torch.full_like(ids[:, 1:], mage.config.codebook_size)
    video = mage(torch.cat([ids[:, :1], hidden], 1), text, speed, target_ids=ids)
    assert video.logits.shape[-1] == mage.config.codebook_size and video.loss.isfinite()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_every_parameter_learns_in_fp32_and_in_bf16(mage, autocast, device):
    mage = mage.to(device).train()
    ids, text, speed = (tensor.to(device) for tensor in sample(mage.config))
    noise = mage.noise([0, 1]) if mage.config.stochastic else None
    with torch.no_grad():
        exact = mage(ids, text, speed, posterior_noise=noise).logits
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        out = mage(ids, text, speed, posterior_noise=noise)
        video = mage.generate(ids[:, 0], text, speed, prior_noise=noise)
    out.loss.backward()
    without = [name for name, parameter in mage.named_parameters()
               if parameter.grad is None or not parameter.grad.isfinite().all() or parameter.grad.eq(0).all()]
    mage.zero_grad()
    mage.to("cpu").eval()
    assert not without
    assert out.loss.dtype == torch.float32 and video.shape == ids.shape
    assert (out.logits - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_in_bf16_altogether_generates(mage, device):
    config = mage.config
    half = model(config).to(device, torch.bfloat16)
    ids, text, speed = (tensor.to(device) for tensor in sample(config))
    noise = half.noise([0, 1]) if config.stochastic else None
    assert half.generate(ids[:, 0], text, speed, prior_noise=noise).shape == ids.shape


# ---------------------------------------------------------------- errors show the numbers

@pytest.mark.parametrize("change, message", [
    ({"width": 30}, "width is 30: it must be a multiple of head_width 8"),
    ({"axial_layers": 4}, "axial_layers is 4.*multiple of 3"),
    ({"clip_length": 17}, "clip_length is 17.*2 to 16"),
    ({"codebook_size": 0}, "codebook_size is 0"),
    ({"dropout": 1.0}, r"dropout is 1.0.*\[0, 1\)"),
    ({"pad_id": 9}, "pad_id is 9.*9 words"),
    ({"speed_frequencies": -1}, "speed_frequencies -1"),
    ({"stochastic": True, "width": 24}, "width is 24.*multiple of 16"),
])
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("tokens, text, speed, message", [
    ((2, 4, 3, 3), (2, 6), (2,), r"\(2, 4, 3, 3\).*3, 4"),
    ((2, 5, 3, 4), (2, 6), (2,), "5 frames.*clips have 4"),
    ((2, 1, 3, 4), (2, 6), (2,), "1 frame"),
    ((2, 4, 3, 4), (2, 9), (2,), r"\(2, 9\).*at most 8"),
    ((2, 4, 3, 4), (1, 6), (2,), r"\(1, 6\).*b = 2"),
    ((2, 4, 3, 4), (2, 6), (1,), r"speed has the shape \(1,\).*2 clips"),
])
def test_input_errors(tokens, text, speed, message):
    with pytest.raises(ValueError, match=message):
        model(SMALL)(torch.zeros(tokens, dtype=torch.int64), torch.ones(text, dtype=torch.int64), torch.ones(speed))


def test_noise_and_padding_errors():
    ids, text, speed = sample(SMALL)
    with pytest.raises(ValueError, match="deterministic"):
        model(SMALL)(ids, text, speed, posterior_noise=torch.zeros(2, 64, 3, 4))
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 4\).*\(2, 5, 3, 4\)"):
        model(VARIANTS["stochastic"]).generate(ids[:, 0], text, speed, prior_noise=torch.zeros(2, 4, 3, 4))
    with pytest.raises(ValueError, match="padding"):
        model(SMALL)(ids, torch.zeros_like(text), speed)
    with pytest.raises(ValueError, match=r"target ids.*\(2, 3, 3, 4\)"):
        model(SMALL)(ids, text, speed, target_ids=ids[:, 1:])


# ---------------------------------------------------------------- VQ-VAE

VQVAES = {
    "down 4": VQVAEConfig(channels=1, width=8, codebook_size=16, down=4, pixel_range=(-0.5, 0.5)),
    "down 8": VQVAEConfig(channels=3, width=8, codebook_size=16, down=8),
}


@pytest.fixture(params=VQVAES.values(), ids=VQVAES)
def vqvae(request):
    torch.manual_seed(0)
    vqvae = VQVAE(request.param)
    nn.init.normal_(vqvae.codebook, std=0.3)
    return vqvae


def images(vqvae, batch=3):
    return torch.rand(batch, vqvae.config.channels, 32, 32)


@few
@given(seed=seeds, codes=st.integers(1, 40), width=st.integers(1, 9), empty=st.sampled_from([0, 0.5, 0.95, 1]))
def test_nearest_code_is_the_smallest_distance(seed, codes, width, empty):
    generator = torch.Generator().manual_seed(seed)
    features, codebook = (torch.randn(n, width, generator=generator) for n in (50, codes))
    features[torch.rand(50, generator=generator) < empty] = features[0].clone()
    assert nearest_code(features[:0], codebook).shape == (0,)
    distances = torch.cdist(features, codebook, compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = distances[torch.arange(50), nearest_code(features, codebook)]
    torch.testing.assert_close(chosen, distances.min(1).values, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_public_boundary_is_zero_to_one(vqvae):
    vqvae.eval()
    pixels, (low, high) = images(vqvae), vqvae.config.pixel_range
    ids = vqvae.encode(pixels)
    side = 32 // vqvae.config.down
    assert ids.shape == (3, side, side) and ids.dtype == torch.int64
    assert torch.equal(ids, vqvae.encode_network(pixels * (high - low) + low))
    decoded = vqvae.decode(ids)
    assert decoded.shape == pixels.shape and decoded.min() >= 0 and decoded.max() <= 1
    expected = ((vqvae.reconstruct_network(vqvae.to_network(pixels)) - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(decoded, expected)
    torch.testing.assert_close(vqvae.from_network(vqvae.to_network(pixels)), pixels)


def test_losses_are_equation_1(vqvae):
    vqvae.eval()
    pixels = images(vqvae)
    out = vqvae(pixels)
    assert torch.equal(out.token_ids, vqvae.encode(pixels))
    torch.testing.assert_close(out.reconstruction, vqvae.decode(out.token_ids))
    network = vqvae.to_network(pixels)
    features, codes = vqvae.features(network), vqvae.embed(out.token_ids)
    distance = (features - codes).square().mean()
    torch.testing.assert_close(out.reconstruction_loss, (vqvae.decode_network(out.token_ids) - network).square().mean())
    torch.testing.assert_close(out.codebook_loss, distance)
    torch.testing.assert_close(out.commitment_loss, distance)
    torch.testing.assert_close(out.loss, out.reconstruction_loss + 3 * distance)


def test_straight_through(vqvae):
    """The codebook learns from its own loss alone; the encoder from the reconstruction too."""
    out = vqvae(images(vqvae))
    first = next(vqvae.encoder.parameters())
    gradients = torch.autograd.grad(out.reconstruction_loss, [first, vqvae.codebook],
                                    retain_graph=True, allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1] is None
    gradients = torch.autograd.grad(out.codebook_loss, [first, vqvae.codebook], retain_graph=True, allow_unused=True)
    assert gradients[0] is None and gradients[1].abs().sum() > 0
    gradients = torch.autograd.grad(out.commitment_loss, [first, vqvae.codebook], allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1] is None


@pytest.mark.parametrize("device", DEVICES)
def test_vqvae_learns_in_bf16(vqvae, device):
    vqvae, pixels = vqvae.to(device), images(vqvae).to(device)
    optimiser = torch.optim.Adam(vqvae.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        with torch.autocast(device, torch.bfloat16):
            loss = vqvae(pixels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("change, message", [
    ({"down": 16}, "down is 16.*4.*8"),
    ({"width": 0}, "width is 0"),
    ({"width": 6}, "width is 6.*multiple of 4"),
    ({"pixel_range": (0.5, -0.5)}, r"\(0.5, -0.5\)"),
    ({"pixel_range": (0.0, 255.0)}, "255.0"),
])
def test_vqvae_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(VQVAES["down 8"], **change)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 30, 32), (1, 2, 3, 32, 32)])
def test_vqvae_input_errors(shape):
    with pytest.raises(ValueError, match=r"3.*multiples of 8"):
        VQVAE(VQVAES["down 8"]).encode(torch.rand(shape))


@pytest.mark.parametrize("given, message", [
    ({"predict": torch.ones(2, 1, 16, 16, dtype=torch.bool)}, "predict has the shape"),
    ({"predict": torch.zeros(2, 3, 16, 16, dtype=torch.bool)}, "predict marks no token"),
    ({"weight": torch.ones(1)}, "weight has the shape")])
def test_what_the_loss_is_taken_over_must_fit_the_frames(given, message):
    mage = MAGE(MAGEConfig(codebook_size=8, rows=16, columns=16, clip_length=4, width=16, vocabulary_size=9,
                           context_length=6, head_width=8, axial_layers=3))
    ids = torch.zeros(2, 4, 16, 16, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        mage(ids, torch.tensor([[1, 3, 2]] * 2), torch.tensor([0.3, 0.7]), **given)
