"""What we added to the released model, each option against a slower or simpler way to say the same."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_core.axial import AxialLayer, FrameCache, Offsets, TimeBias, attention, attention_kernel
from mage_core.clips import frame_indices, load_dataset
from mage_core.mage import MAGE, MAGEConfig
from mage_core.presets import PRESETS, mage_config
from mage_core.weights import released_names

PLAIN = MAGEConfig(codebook_size=13, rows=4, columns=5, clip_length=5, width=16, vocabulary_size=9, context_length=8,
                   head_width=8, axial_layers=3, text_layers=1, dropout=0.0)
EACH = {"shift_attention": True, "time_bias": True, "speed_frequencies": 3, "intervals": (1.0, 2.0),
        "hidden_token": True}   # video_length is tried by itself
ALL = dataclasses.replace(PLAIN, **EACH)
seeds = st.integers(0, 2 ** 32 - 1)
# speeds that are the same number to numpy and to torch: where a video's frames are rounded, half a bit decides
thirty_two_bits = st.floats(2 ** -10, 1 - 2 ** -10, width=32)
few = settings(max_examples=8)


def model(config=ALL, seed=0):
    """A model in which every parameter matters."""
    torch.manual_seed(seed)
    mage = MAGE(config).eval()
    with torch.no_grad():
        for parameter in mage.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return mage


def sample(config=ALL, batch=2, seed=0):
    """Random token ids (b t h w), caption ids (b l) and speeds (b,)."""
    draw = torch.Generator().manual_seed(seed)
    shape = batch, config.clip_length, config.rows, config.columns
    return (torch.randint(config.codebook_size, shape, generator=draw),
            torch.randint(1, config.vocabulary_size, (batch, 6), generator=draw),
            torch.rand(batch, generator=draw).clamp(0.01, 0.99))


def other_tokens(ids, config, seed=1):
    """Other ids of the codebook, each different from what it replaces."""
    draw = torch.Generator().manual_seed(seed)
    return (ids + torch.randint(1, config.codebook_size, ids.shape, generator=draw)) % config.codebook_size


# ---------------------------------------------------------------- shift attention

def gathered(offsets: Offsets, q):
    """The same as `Offsets` with an index in place of a view."""
    m = q.shape[-2]
    places = torch.arange(m)
    by_offset = torch.einsum("nhme,hoe->nhmo", q, offsets.keys) / q.shape[-1] ** 0.5 + offsets.bias[None, :, None]
    return by_offset.gather(-1, (places - places[:, None] + m - 1).expand(*q.shape[:2], m, m))


@few
@given(seeds, st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.integers(1, 3))
def test_offsets_and_their_gradients_are_those_of_a_gather(seed, heads, width, length, n):
    torch.manual_seed(seed)
    offsets = Offsets(heads, width, length)
    torch.nn.init.normal_(offsets.keys)
    torch.nn.init.normal_(offsets.bias)
    # as a layer cuts it: not contiguous
    q = rearrange(torch.randn(n, length, heads * width), "n m (heads e) -> n heads m e", heads=heads).requires_grad_()
    into = torch.randn(n, heads, length, length)
    results = []
    for way in (offsets, lambda query: gathered(offsets, query)):
        scores = way(q)
        results.append([scores, *torch.autograd.grad((scores.tanh() * into).sum(), [q, offsets.keys, offsets.bias])])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


def test_the_gradient_of_offsets_is_the_numerical_one():
    offsets, q = Offsets(2, 3, 4).double(), torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)

    def scores(query, keys, bias):
        return torch.func.functional_call(offsets, {"keys": keys, "bias": bias}, (query,))

    assert torch.autograd.gradcheck(scores, (q, offsets.keys, offsets.bias))


@pytest.mark.parametrize("kernel", ["plain", "fused"])
def test_attention_with_offsets_is_the_same_with_every_kernel_forward_and_back(kernel):
    offsets = Offsets(2, 8, 6)
    q, k, v = (torch.randn(3, 2, 6, 8, requires_grad=True) for _ in range(3))
    results = []
    for bias, name in ((gathered(offsets, q), "plain"), (offsets(q), kernel)):
        with attention_kernel(name):
            read = attention(q, k, v, bias)
        results.append([read, *torch.autograd.grad(read.square().sum(), [q, k, v, offsets.keys, offsets.bias])])
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def copying_layer(axis, distances):
    """A layer whose heads read nothing of the content: each copies from its own distance along the axis."""
    width, length = 4 * len(distances), {"height": 6, "width": 7}[axis]
    layer = AxialLayer(axis, width, 4, 0.0, Offsets(len(distances), 4, length)).eval()
    with torch.no_grad():
        layer.qkv.weight.zero_()
        layer.qkv.bias.zero_()
        layer.qkv.weight[2 * width:] = torch.eye(width)
        layer.out.weight.copy_(torch.eye(width))
        layer.out.bias.zero_()
        layer.offsets.keys.zero_()
        layer.offsets.bias.zero_()
        for head, distance in enumerate(distances):
            layer.offsets.bias[head, distance + length - 1] = 100.0
    return layer


@pytest.mark.parametrize("axis, dim", [("height", 2), ("width", 3)])
def test_shift_attention_can_copy_from_k_places_away(axis, dim):
    distances = (-5, -2, 0, 1, 4)
    layer, x = copying_layer(axis, distances), torch.randn(2, 3, 6, 7, 20)
    read = layer.attend(x, torch.arange(3), None)
    length = x.shape[dim]
    for head, distance in enumerate(distances):
        channels = slice(4 * head, 4 * head + 4)
        here = torch.arange(max(0, -distance), min(length, length - distance))   # from where the place lies inside
        torch.testing.assert_close(read[..., channels].index_select(dim, here),
                                   x[..., channels].index_select(dim, here + distance))


def test_a_query_can_ask_for_a_distance():
    """The keys of the offsets, not the bias: places that ask differently copy from different distances."""
    layer = copying_layer("width", (0,))
    x = torch.zeros(1, 1, 6, 7, 4)
    x[..., 0], x[..., 1] = torch.randn(1, 1, 6, 7), torch.tensor([1.0, -1] * 4)[:7]   # what is copied, what is asked
    with torch.no_grad():
        layer.offsets.bias.zero_()
        layer.qkv.weight[0, 1] = 200.0                       # the query's first number: + on even columns, - on odd
        layer.offsets.keys[0, 6 + 2, 0], layer.offsets.keys[0, 6 - 1, 0] = 1.0, -1.0
    read = layer.attend(x, torch.arange(1), None)[0, 0, :, :, 0]
    torch.testing.assert_close(read[:, :5:2], x[0, 0, :, 2::2, 0])       # even columns from two to the right
    torch.testing.assert_close(read[:, 1::2], x[0, 0, :, :6:2, 0])       # odd ones from one to the left


# ---------------------------------------------------------------- time

@few
@given(seeds, st.integers(0, 4), st.booleans())
def test_a_time_bias_never_looks_into_the_future(seed, now, some):
    torch.manual_seed(seed)
    layer = AxialLayer("time", 16, 8, 0.0, time_bias=TimeBias(2, 7)).eval()
    with torch.no_grad():
        layer.time_bias.table.copy_(1000.0 * torch.randn(2, 7, 7).triu(1))   # it could not want it more
    steps = torch.tensor([0, 1, 3, 4, 6]) if some else torch.arange(5)
    x = torch.randn(2, 5, 3, 2, 16)
    changed = torch.cat([x[:, :now + 1], torch.randn(2, 4 - now, 3, 2, 16)], 1)
    assert torch.equal(layer(x, steps)[:, :now + 1], layer(changed, steps)[:, :now + 1])


def test_a_time_bias_weighs_the_past_as_its_table_says():
    layer = AxialLayer("time", 8, 8, 0.0, time_bias=TimeBias(1, 6)).eval()
    with torch.no_grad():
        layer.qkv.weight[:16] = 0.0   # no content: what is left are the table's weights
        layer.qkv.bias[:16] = 0.0
        torch.nn.init.normal_(layer.time_bias.table)
    steps, x = torch.tensor([0, 1, 4]), torch.randn(2, 3, 2, 2, 8)
    scores = layer.time_bias.table[0][steps][:, steps].masked_fill(torch.ones(3, 3).triu(1).bool(), float("-inf"))
    values = F.linear(x, layer.qkv.weight[16:], layer.qkv.bias[16:])
    expected = torch.einsum("ts,bshwd->bthwd", scores.softmax(-1), values)
    torch.testing.assert_close(layer.attend(x, steps, None), expected)


def test_time_positions_say_how_much_of_the_video_has_passed():
    generator = model().generator
    steps = torch.arange(3)
    slow, fast = (generator.positions(steps, torch.full((1,), eta))[0] for eta in (0.0, 1.0))
    late = generator.positions(2 * steps, torch.zeros(1))[0]
    bare = generator.time_positions
    # at speed 1 twice as many frames pass from one step to the next as at speed 0
    torch.testing.assert_close(fast - bare[steps], late - bare[2 * steps])
    assert not torch.allclose(slow[1:], fast[1:])
    torch.testing.assert_close(slow[0], fast[0])


@few
@given(st.integers(2, 40), thirty_two_bits, thirty_two_bits)
def test_with_a_known_length_time_positions_say_which_frames_are_shown(length, eta, other):
    generator = model(dataclasses.replace(ALL, video_length=length)).generator
    loose = model().generator   # the same weights: a length adds none
    steps = torch.arange(ALL.clip_length)
    shown = torch.from_numpy(frame_indices(length, eta, (1.0, 2.0), ALL.clip_length))
    found = generator.positions(steps, torch.tensor([eta]))[0]
    # frame k of the video is what speed 0 shows at step k where only the interval is known
    for step, frame in enumerate(shown):
        passed = loose.positions(frame[None], torch.zeros(1))[0, 0] - loose.time_positions[frame] if frame < 5 else None
        if passed is not None:
            torch.testing.assert_close(found[step] - generator.time_positions[step], passed, atol=1e-5, rtol=1e-4)
    same = np.array_equal(frame_indices(length, other, (1.0, 2.0), ALL.clip_length), shown.numpy())
    assert torch.equal(found, generator.positions(steps, torch.tensor([other]))[0]) == same


def test_a_length_goes_with_intervals_and_is_a_number_of_frames():
    for length, intervals in ((0, (1.0, 2.0)), (20, None)):
        with pytest.raises(ValueError, match=f"video_length is {length}: it must be at least 1 and needs intervals"):
            dataclasses.replace(PLAIN, video_length=length, intervals=intervals)


def test_weights_without_a_known_length_are_a_start_for_a_model_with_one():
    ours, theirs = model(dataclasses.replace(ALL, video_length=20), seed=1), model()
    ours.start_from(theirs, "abcdefghi", "abcdefghi")
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_speed_waves_are_sines_and_cosines_without_a_bias():
    anchor = model(dataclasses.replace(PLAIN, speed_frequencies=2)).motion_anchor
    eta = 0.3
    angles = torch.tensor([1.0, 2.0]) * torch.pi * eta
    expected = eta * anchor.speed[0] + anchor.speed_waves.weight @ torch.cat([angles.sin(), angles.cos()])
    torch.testing.assert_close(anchor.speed_vector(torch.tensor([eta]))[0], expected)
    assert anchor.speed_waves.bias is None


# ---------------------------------------------------------------- the whole model with every option on

@few
@given(seeds, st.integers(0, 4))
def test_no_option_lets_a_frame_change_the_logits_before_it(seed, frame):
    mage, (ids, text, speed) = model(seed=seed % 3), sample(seed=seed)
    changed = ids.clone()
    changed[:, frame] = other_tokens(ids[:, frame], ALL, seed)
    with torch.no_grad():
        before, after = mage(ids, text, speed).logits, mage(changed, text, speed).logits
    assert torch.equal(before[:, :frame], after[:, :frame])
    assert frame == ALL.clip_length - 1 or not torch.allclose(before[:, frame:], after[:, frame:])


@pytest.mark.parametrize("change", [{}, {"axial_layers": 6}, {"head_width": 4, "rows": 3, "columns": 7},
                                    {"clip_length": 2}, {"stochastic": True, "latent_channels": 3},
                                    *({name: getattr(PLAIN, name)} for name in EACH)],
                         ids=["all", "six layers", "narrow heads", "two frames", "stochastic",
                              *(f"all but {name}" for name in EACH)])
def test_frames_computed_once_are_the_frames_recomputed(change):
    config = dataclasses.replace(ALL, **change)
    mage, (ids, text, speed) = model(config), sample(config, batch=3)
    noise = mage.noise(range(3)) if config.stochastic else None
    once, again = (mage.generate(ids[:, 0], text, speed, prior_noise=noise, recompute=slow) for slow in (False, True))
    assert torch.equal(once, again)
    assert once.max() < config.codebook_size, "the hidden token is never generated"
    with torch.no_grad():   # and both are what the training pass predicts after them
        out = mage(once, text, speed, posterior_noise=noise)
    if not config.stochastic:
        assert torch.equal(out.logits.argmax(-1), once[:, 1:])


@pytest.mark.parametrize("config", [PLAIN, ALL], ids=["plain", "all options"])
def test_all_frames_asked_for_by_name_are_the_plain_forward(config):
    mage, (ids, text, speed) = model(config), sample(config)
    plain, named = mage(ids, text, speed), mage(ids, text, speed, frames=torch.arange(config.clip_length - 1))
    assert torch.equal(plain.logits, named.logits) and torch.equal(plain.loss, named.loss)
    assert torch.equal(plain.motion_anchor, named.motion_anchor)


@pytest.mark.parametrize("frames", [[0], [0, 1], [0, 3], [0, 2, 3]])
def test_left_out_frames_are_as_if_no_later_frame_looked_at_them(frames):
    """Against the whole clip with the left-out steps masked by hand in every time layer."""
    mage, (ids, text, speed) = model(), sample()
    frames = torch.tensor(frames)
    some = mage(ids, text, speed, frames=frames)
    unseen = torch.tensor([step for step in range(1, ALL.clip_length) if step - 1 not in frames.tolist()])
    for layer in mage.generator.layers:
        if layer.axis == "time":
            with torch.no_grad():
                layer.time_bias.table[:, :, unseen] -= 1e9   # the diagonal too, but nobody reads those steps
    whole = mage(ids, text, speed)
    torch.testing.assert_close(some.logits, whole.logits[:, frames])
    torch.testing.assert_close(some.loss, F.cross_entropy(whole.logits[:, frames].flatten(0, -2),
                                                          ids[:, frames + 1].flatten()))


@few
@given(seeds, st.sampled_from([None, [0], [0, 2], [0, 1, 3]]), st.floats(0.05, 1))
def test_the_loss_over_chosen_tokens_is_a_choice_from_the_whole_loss(seed, frames, share):
    mage, (ids, text, speed) = model(), sample(seed=seed)
    frames = None if frames is None else torch.tensor(frames)
    whole = mage(ids, text, speed, frames=frames)
    targets = ids[:, 1:] if frames is None else ids[:, frames + 1]
    predict = torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed)) < share
    predict[0, 0, 0, 0] = True
    some = mage(ids, text, speed, frames=frames, predict=predict)
    each = F.cross_entropy(rearrange(whole.logits, "b s h w k -> b k s h w"), targets, reduction="none")
    torch.testing.assert_close(some.loss, each[predict].mean())
    torch.testing.assert_close(some.logits, whole.logits[predict])
    gradient, expected = (torch.autograd.grad(loss, list(mage.parameters()), allow_unused=True)
                          for loss in (some.loss, each[predict].mean()))
    for found, wanted in zip(gradient, expected):
        assert (found is None) == (wanted is None)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)


# ---------------------------------------------------------------- the hidden token

def test_what_is_hidden_changes_nothing():
    mage, (ids, text, speed) = model(), sample()
    hidden = torch.rand(ids.shape) < 0.5
    hidden[:, 0] = False
    other = torch.where(hidden, other_tokens(ids, ALL), ids)
    outs = [mage(clip.masked_fill(hidden, ALL.hidden_id), text, speed, target_ids=clip) for clip in (ids, other)]
    assert torch.equal(outs[0].logits, outs[1].logits) and torch.equal(outs[0].motion_anchor, outs[1].motion_anchor)
    assert not torch.equal(outs[0].loss, outs[1].loss), "the targets are the true ones all the same"
    seen = mage(other, text, speed).logits
    assert not torch.allclose(mage(ids, text, speed).logits, seen), "and what is not hidden does change something"


def test_the_hidden_token_is_the_one_after_the_codes_and_none_without_the_option():
    mage, (ids, text, speed) = model(), sample()
    assert ALL.hidden_id == ALL.codebook_size and mage(ids, text, speed).logits.shape[-1] == ALL.codebook_size
    with pytest.raises(ValueError, match=r"no hidden token.*hidden_token=True"):
        _ = PLAIN.hidden_id


# ---------------------------------------------------------------- a start that knows the codes

@few
@given(seeds, st.sampled_from([(16, 3), (16, 4), (64, 13), (64, 16)]))
def test_a_start_from_codes_writes_and_reads_the_same_token(seed, sizes):
    width, code_width = sizes
    config = dataclasses.replace(ALL, codebook_size=40, width=width, head_width=min(32, width))
    mage = MAGE(config)
    codes = torch.randn(40, code_width, generator=torch.Generator().manual_seed(seed))
    mage.initialise_from_codes(codes, seed)
    embedding, logits = mage.visual_tokens.embedding, mage.generator.logits
    assert torch.equal(logits(embedding[:40]).argmax(-1), torch.arange(40))
    # and it is the nearest code that the logits name, not any
    between = 0.7 * embedding[3] + 0.3 * embedding[5]
    nearest = (embedding[:40] - between).square().sum(1).argmin()
    assert logits(between).argmax() == nearest
    assert all(parameter.isfinite().all() for parameter in mage.parameters())


def test_a_start_from_codes_is_the_same_every_time_and_needs_the_codebooks_size():
    codes = torch.randn(ALL.codebook_size, 8)
    first, again, other = MAGE(ALL), MAGE(ALL), MAGE(ALL)
    other.load_state_dict(first.state_dict())
    again.load_state_dict(first.state_dict())
    for mage, seed in ((first, 0), (again, 0), (other, 1)):
        mage.initialise_from_codes(codes, seed)
    same = [torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values())]
    assert all(same)
    assert not torch.equal(first.visual_tokens.embedding, other.visual_tokens.embedding)
    with pytest.raises(ValueError, match=f"12 codes given.*codebook has {ALL.codebook_size}"):
        first.initialise_from_codes(codes[:12])


def test_a_start_from_codes_carries_a_token_through_every_head():
    """Value and output projections carry a code's vector unchanged but for a factor, whichever head does it."""
    config = dataclasses.replace(ALL, codebook_size=30, width=32, head_width=16)
    mage = MAGE(config)
    mage.initialise_from_codes(torch.randn(30, 6))
    embedding = mage.visual_tokens.embedding[:30]
    for layer in mage.generator.layers:
        for head in torch.arange(32).split(16):
            value = embedding @ layer.qkv.weight[64 + head].T
            carried = value @ layer.out.weight[:, head].T / MAGE.COPY
            torch.testing.assert_close(carried, embedding, atol=1e-4, rtol=1e-4)


def test_a_start_from_another_vocabulary_says_the_same_to_the_same_sentence():
    words = ("[PAD]", "[CLS]", "[SEP]", "up", "down", "left", "then", "the", "digit")
    order = [0, 1, 2, 8, 3, 7, 5, 6, 4]   # of the other model's words in ours, which knows one word more
    other_words = tuple(words[i] for i in order)
    larger = dataclasses.replace(ALL, vocabulary_size=10, context_length=11)
    other, ours = model(seed=1), model(larger, seed=2)
    unknown, later = ours.text_encoder.words[9].clone(), ours.text_encoder.positions[8:].clone()
    ours.start_from(other, (*words, "and"), other_words)
    ids, text, speed = sample()
    with torch.no_grad():
        expected = other(ids, torch.tensor([order.index(i) for i in text.flatten()]).view_as(text), speed).logits
        assert torch.equal(ours(ids, text, speed).logits, expected)
        assert not torch.equal(model(larger, seed=2)(ids, text, speed).logits, expected)
    assert torch.equal(ours.text_encoder.words[9], unknown) and torch.equal(ours.text_encoder.positions[8:], later)


@pytest.mark.parametrize("field, value",
                         [("width", 24), ("axial_layers", 6), ("codebook_size", 14), ("time_bias", False)])
def test_a_start_from_a_model_of_another_kind_is_refused(field, value):
    ours = model(dataclasses.replace(ALL, **{field: value}))
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    with pytest.raises(ValueError, match=f"{field} {getattr(ALL, field)} for {value}.*train from nothing"):
        ours.start_from(model(), "abcdefghi", "abcdefghi")
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())


# ---------------------------------------------------------------- off in the released model

OWN = {"shift_attention": ("offsets",), "time_bias": ("time_bias",), "speed_frequencies": ("speed_waves",),
       "intervals": ("source_time",), "hidden_token": ()}


@pytest.mark.parametrize("option", EACH)
def test_an_option_brings_its_own_parameters_and_no_others(option):
    plain = MAGE(PLAIN).state_dict()
    own = MAGE(dataclasses.replace(PLAIN, **{option: EACH[option]})).state_dict()
    new = set(own) - set(plain)
    assert set(plain) <= set(own) and bool(new) == bool(OWN[option])
    assert all(any(part in name for part in OWN[option]) for name in new)
    resized = {name for name in plain if own[name].shape != plain[name].shape}
    assert resized == ({"visual_tokens.embedding"} if option == "hidden_token" else set())


def test_the_released_configuration_has_no_parameter_of_ours():
    dataset = load_dataset("single-mnist")
    with torch.device("meta"):
        released = MAGE(mage_config(PRESETS["paper"].mage, dataset, 512))
        ours = MAGE(mage_config(PRESETS["quick"].mage, dataset, 512))
    assert not [name for name in released.state_dict() for parts in OWN.values() if any(part in name for part in parts)]
    assert len(released_names(released)) == len(released.state_dict())
    assert released.visual_tokens.embedding.shape == (512, 512)
    with pytest.raises(ValueError, match="no released name for .*options of our own"):
        released_names(ours)


@pytest.mark.parametrize("config", [PLAIN, ALL], ids=["released", "options"])
def test_features_that_nobody_asks_for_change_none_that_somebody_does(config):
    mage, draw = model(config), torch.Generator().manual_seed(3)
    shape = 2, 4, config.rows, config.columns, config.width
    frames, anchor = torch.randn(shape, generator=draw), torch.randn(shape[:1] + shape[2:], generator=draw)
    speed = torch.tensor([0.3, 0.8])
    whole = mage.generator(anchor, frames, speed=speed)
    for last in (1, 3):
        torch.testing.assert_close(mage.generator(anchor, frames, speed=speed, last=last), whole[:, -last:])
    places = torch.tensor([5, 0, 39, 27, 5])
    torch.testing.assert_close(mage.generator(anchor, frames, speed=speed, places=places),
                               whole.flatten(0, 3)[places])
    torch.testing.assert_close(mage.generator(anchor, frames, speed=speed, last=2, places=places),
                               whole[:, -2:].flatten(0, 3)[places])


@pytest.mark.parametrize("bias", [None, TimeBias(2, 6)], ids=["free", "time bias"])
@pytest.mark.parametrize("steps", [(1, 5), (2, 1, 1, 2), (3, 3)])
def test_looking_back_is_attention_over_all_frames_so_far(bias, steps):
    layer = AxialLayer("time", 16, 8, 0.0, time_bias=bias).eval()
    x, cache, made = torch.randn(2, 6, 2, 3, 16), FrameCache(6), []
    for new in x.split(steps, 1):
        made.append(layer(new, torch.arange(cache.length, cache.length + new.shape[1]), cache))
        cache.length += new.shape[1]
    torch.testing.assert_close(torch.cat(made, 1), layer(x, torch.arange(6)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [{}, EACH, {"stochastic": True, "latent_channels": 4}],
                         ids=["released", "options", "stochastic"])
def test_the_copy_in_bf16_is_the_model_rounded(change):
    mage = model(dataclasses.replace(PLAIN, **change))
    ids, text, speed = sample(mage.config)
    noise = mage.noise([0, 1]) if mage.config.stochastic else None
    assert mage.in_bf16() is mage, "only where autocast asks for it"
    with torch.autocast("cpu", torch.bfloat16):
        half = mage.in_bf16()
        assert half is not mage and mage.in_bf16() is half, "made once"
        made = mage.generate(ids[:, 0], text, speed, prior_noise=noise)
    assert made.shape == ids.shape and torch.equal(made[:, 0], ids[:, 0])
    assert set(mage.state_dict()) == {name for name, _ in mage.named_parameters()}, "it is no part of the model"
    assert all(parameter.dtype == torch.float32 for parameter in mage.parameters())
    # the same numbers but for rounding
    frames = torch.randint(mage.config.codebook_size + mage.config.hidden_token, ids.shape)
    found, exact = half.visual_tokens(frames).float(), mage.visual_tokens(frames)
    assert (found - exact).abs().mean() < 0.01 * exact.abs().mean()
    anchor = mage.anchor(exact[:, 0], text, speed, noise)
    features = mage.generator(anchor, exact[:, :-1], speed=speed)
    rounded = half.generator(anchor.bfloat16(), exact[:, :-1].bfloat16(), speed=speed).float()
    assert (features - rounded).abs().mean() < 0.03 * features.abs().mean()
    with torch.no_grad():
        mage.generator.logits.weight.add_(1.0)
    with torch.autocast("cpu", torch.bfloat16):
        changed = mage.in_bf16()
        assert changed is not half, "a weight has changed"
    optimiser = torch.optim.AdamW(mage.parameters(), lr=0.1, fused=True)   # which counts no version
    mage.train()(ids, text, speed).loss.backward()
    optimiser.step()
    mage.eval()
    with torch.autocast("cpu", torch.bfloat16):
        trained = mage.in_bf16()
    assert trained is not changed
    now = mage.generator.logits.weight
    torch.testing.assert_close(trained.generator.logits.weight.float(), now, rtol=0.01, atol=0.01)


def test_a_table_of_neighbours_is_embedding_and_convolution():
    mage = model()
    ids = torch.randint(ALL.codebook_size + 1, (2, 3, ALL.rows, ALL.columns))
    expected = mage.visual_tokens(ids)
    mage.visual_tokens.tabulate()
    torch.testing.assert_close(mage.visual_tokens(ids), expected, atol=1e-5, rtol=1e-5)
