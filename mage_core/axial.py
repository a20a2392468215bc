"""Axial transformer: appearance and motion fused along time, rows and columns in turn (Section 3.3.3, eq. 6).

A block is three layers, one for each axis of the (t h w) volume of tokens. Time is causal, so that a past frame never
changes: during generation only its keys and values on the time axis are kept, and each frame is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mage_core import machine

# ---------------------------------------------------------------- attention

KERNELS = ("plain", "fused")
_forced_kernel: str | None = None


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Use one attention kernel everywhere, `plain` or `fused`, whatever the device (for the benchmark)."""
    global _forced_kernel
    if name not in KERNELS:
        raise ValueError(f"attention kernel {name!r} is unknown: choose one of {KERNELS}")
    before, _forced_kernel = _forced_kernel, name
    try:
        yield
    finally:
        _forced_kernel = before


_as_written = False


@contextmanager
def as_written() -> Iterator[None]:
    """Compute as the released code writes it, with the fused attention kernel: what the benchmark compares with."""
    global _as_written
    _as_written = True
    try:
        with attention_kernel("fused"):
            yield
    finally:
        _as_written = False


def kernel_for(x: Tensor) -> str:
    """The kernel that is fastest where x lies: on a CPU, at an axis' 10 to 16 keys, the plain operations.

    The fused one takes twice as long there, and its backward ten times as long.
    """
    return _forced_kernel or ("fused" if x.is_cuda else "plain")


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(e) + bias) v for q (... m e), k and v (... n e), bias broadcast to (... m n)."""
    if bias is not None:
        bias = bias.to(q.dtype).contiguous()
    if kernel_for(q) == "fused":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attention_weights(q, k, bias) @ v


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(e) + bias): (... m n)."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return softmax(scores)


def softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, in fp32 for bf16: on a CPU three times as fast as in bf16, and exacter."""
    if scores.dtype != torch.bfloat16:
        return scores.softmax(-1)
    return scores.float().softmax(-1).to(scores.dtype)


# ---------------------------------------------------------------- parts shared with the motion anchor

QUICK = 1.702


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), written with SiLU because that is the fast one."""
    return F.silu(QUICK * x) / QUICK


class Dropout(nn.Module):
    """Dropout; on a CPU from eight random bits an element (p is rounded to 256ths), which halves its time."""

    def __init__(self, p: float):
        super().__init__()
        self.p, self.cut = p, min(255, round(256 * p))

    def forward(self, x: Tensor) -> Tensor:
        if _as_written or not self.training or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        if not self.cut:
            return x
        bits = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-2 ** 63, None).view(torch.uint8)
        keep = (bits[:x.numel()] >= self.cut).view(x.shape)
        return x * keep.to(x.dtype).mul_(256 / (256 - self.cut))


class LayerNorm(nn.LayerNorm):
    """torch's; on a GPU it stays in the precision of x (its sums are in fp32 all the same); autocast would not."""

    def forward(self, x: Tensor) -> Tensor:
        if not machine.waits(x.device) or x.dtype == torch.float32:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Linear(nn.Linear):
    """torch's, with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b. Trained in bf16 on a CPU, where it pays, with a gradient that is quicker to compute."""
    wide = min(weight.shape) >= 256 and weight.shape[0] != weight.shape[1]
    if wide and torch.is_grad_enabled() and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return WideLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class WideLinear(torch.autograd.Function):
    """x W^T + b in the precision of x.

    The gradient of W sums over all rows, which oneDNN does in twice the time that a product takes: here the narrower
    factor is first transposed, by a product with the identity, which is the fastest way to transpose it. The gradient
    of b is a product with ones for the same reason.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias.to(x.dtype))

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        d_x = d_out @ weight
        x, d_out = x.flatten(0, -2), d_out.flatten(0, -2)
        if x.shape[1] < d_out.shape[1]:
            d_weight = (transposed(x) @ d_out).t().to(torch.float32, memory_format=torch.contiguous_format)
        else:
            d_weight = (transposed(d_out) @ x).float()
        return d_x, d_weight, (d_out.new_ones(1, len(d_out)) @ d_out)[0].float()


def transposed(x: Tensor) -> Tensor:
    return torch.eye(x.shape[1], dtype=x.dtype) @ x.t()


class QuickMLP(nn.Module):
    """d -> 4 d -> QuickGELU -> d; QuickGELU's two factors go into the weights, which are fewer than the activations."""

    def __init__(self, width: int):
        super().__init__()
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)
        self.folded = False

    @torch.no_grad()
    def fold(self) -> None:
        """Put the factors into the weights for good: for a model that is only used."""
        for tensor in (self.up.weight, self.up.bias):
            tensor *= QUICK
        self.down.weight /= QUICK
        self.folded = True

    def forward(self, x: Tensor) -> Tensor:
        if _as_written:
            x = self.up(x)
            return self.down(x * torch.sigmoid(QUICK * x))
        if self.folded:
            return self.down(F.silu(self.up(x)))
        if x.numel() < self.up.weight.numel():
            return self.down(quick_gelu(self.up(x)))
        x = F.silu(linear(x, QUICK * self.up.weight, QUICK * self.up.bias))
        return linear(x, self.down.weight / QUICK, self.down.bias)


# ---------------------------------------------------------------- the axial layer

AXES = ("time", "height", "width")
TOGETHER, APART = "b t h w (parts heads e)", {   # heads first, for a head's offsets are one matrix product
    "time": "parts heads (b h w) t e",
    "height": "parts heads (b t w) h e",
    "width": "parts heads (b t h) w e",
}


def split(x: Tensor, axis: str, heads: int, parts: int) -> Tensor:
    """(b t h w (parts heads e)) -> (parts heads n m e), contiguous: n sequences along an axis of m places."""
    return rearrange(x, f"{TOGETHER} -> {APART[axis]}", heads=heads, parts=parts).contiguous()


def merge(x: Tensor, axis: str, shape: torch.Size) -> Tensor:
    """The inverse of `split`; `shape` begins with b t h w."""
    return rearrange(x, f"{APART[axis]} -> {TOGETHER}", **dict(zip("bthw", shape)))


class AxisAttention(torch.autograd.Function):
    """Attention along an axis, queries, keys and values in one tensor (b t h w 3d): (b t h w d), and its gradient.

    Written out because three quarters of the plain operations' time went into copies between layouts and into bf16
    softmax. `bias` (heads or 1, m, m) is added to the scores; `keys` (heads 2m-1 e) and `places` (heads 2m-1) are those
    of `Offsets`.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, bias: Tensor | None, keys: Tensor | None, places: Tensor | None, axis: str,
                heads: int) -> Tensor:
        parts = split(qkv, axis, heads, 3)
        q, k, v = parts
        scale = q.shape[-1] ** -0.5
        wide = torch.float32 if q.dtype == torch.bfloat16 else q.dtype
        scores = torch.matmul(q, k.mT).to(wide).mul_(scale)
        if bias is not None:
            scores += bias[:, None]
        if keys is not None:   # one offset more, which no pair has: matrices of an even width are multiplied faster
            keys, places = F.pad((keys * scale).to(q.dtype), (0, 0, 0, 1)), F.pad(places.to(q.dtype), (0, 1))
            scores += by_place(torch.baddbmm(places[:, None], q.flatten(1, 2), keys.mT), scores.shape)
        weights = scores.softmax(-1).to(q.dtype)
        ctx.save_for_backward(parts, weights, keys)
        ctx.axis, ctx.shape, ctx.wide, ctx.scale, ctx.bias = axis, qkv.shape, wide, scale, bias
        return merge((weights @ v)[None], axis, qkv.shape)

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        parts, weights, keys = ctx.saved_tensors
        q, k, v = parts
        d_out = split(d_out, ctx.axis, len(q), 1)[0]
        d_parts, flat = torch.empty_like(parts), [part.flatten(0, 1) for part in (*parts, weights, d_out)]
        d_q, d_k, d_v = d_parts.flatten(1, 2)
        torch.bmm(flat[3].mT, flat[4], out=d_v)
        d_weights = torch.matmul(d_out, v.mT).to(ctx.wide)
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights.to(ctx.wide), -1, ctx.wide)
        d_bias = d_scores.sum_to_size(ctx.bias[:, None].shape)[:, 0] if ctx.needs_input_grad[1] else None
        d_keys = d_places = None
        narrow = (d_scores * ctx.scale).to(q.dtype).flatten(0, 1)
        torch.bmm(narrow, flat[1], out=d_q)
        torch.bmm(narrow.mT, flat[0], out=d_k)
        if keys is not None:
            d_offsets = q.new_zeros(len(q), q.shape[1] * q.shape[2], keys.shape[1])
            by_place(d_offsets, d_scores.shape).copy_(d_scores)
            d_q.view(len(q), -1, q.shape[-1]).baddbmm_(d_offsets, keys)
            d_keys = summed_product(d_offsets, q.flatten(1, 2)).to(ctx.wide).mul_(ctx.scale)[:, :-1]
            d_places = d_offsets.sum(1, dtype=ctx.wide)[:, :-1]
        return merge(d_parts, ctx.axis, ctx.shape), d_bias, d_keys, d_places, None, None


def summed_product(x: Tensor, y: Tensor, parts: int = 64) -> Tensor:
    """x^T y for x (b n k) and y (b n l), n being large: (b k l).

    A GPU sums over `parts` of the rows at a time, for its products of few numbers take one after another.
    """
    if not machine.waits(x.device) or x.shape[1] % parts:
        return torch.bmm(x.mT, y)
    x, y = (z.unflatten(1, (parts, -1)).flatten(0, 1) for z in (x, y))
    return torch.bmm(x.mT, y).unflatten(0, (-1, parts)).sum(1, dtype=torch.float32)


def by_place(by_offset: Tensor, shape: torch.Size) -> Tensor:
    """A view of values by offset (heads (n m) l), -(m-1) first, as values of pairs, of `shape` (heads n m m).

    Key j lies at offset j - i from query i, in column j - i + m - 1: in the row of all numbers of n, rows that are one
    number shorter, from number m - 1 on, begin with it. l is at least the 2m-1 offsets.
    """
    heads, n, m, _ = shape
    length = by_offset.shape[-1]
    if length == 1:
        return by_offset.view(shape)
    numbers = by_offset.view(heads, n, m * length)
    return numbers[..., m - 1:m - 1 + m * (length - 1)].unflatten(-1, (m, length - 1))[..., :m]


class Offsets(nn.Module):
    """Attention that looks k places away: scores by relative offset, learned, for `length` positions of an axis.

    A key vector for every offset (Shaw et al. 2018), so that a query can ask for a distance, and a bias for every
    offset. The keys start as sines and cosines of the offset, head by head the biases as a soft peak, the peaks
    spread over +-4: moving content can be found sideways from the first step on.
    """

    PEAK, SPREAD = 0.5, 4.0

    def __init__(self, heads: int, head_width: int, length: int):
        super().__init__()
        offsets = torch.arange(1 - length, length)
        self.keys = nn.Parameter(0.7 * sinusoids(offsets, head_width).repeat(heads, 1, 1))
        peaks = torch.linspace(-self.SPREAD, self.SPREAD, heads).round() if heads > 1 else torch.zeros(1)
        self.bias = nn.Parameter(-self.PEAK * (offsets[None] - peaks[:, None]).abs())

    def forward(self, q: Tensor) -> Tensor:
        """Queries (n heads m e) -> what to add to their scores (n heads m m)."""
        by_offset = torch.einsum("nhme,hoe->hnmo", q, (self.keys * q.shape[-1] ** -0.5).to(q.dtype))
        by_offset = by_offset + self.bias[:, None, None].to(q.dtype)   # row i holds offsets -(m-1) ... m-1
        n, heads, m, _ = q.shape
        return by_place(by_offset.contiguous().flatten(1, 2), (heads, n, m, m)).transpose(0, 1)


class TimeBias(nn.Module):
    """A learned bias for every head and pair of time steps: (heads clip_length clip_length).

    Starts as peaks, in turn on the anchor, the first frame, the step itself and the one before it.
    """

    PEAK = 3.0

    def __init__(self, heads: int, clip_length: int):
        super().__init__()
        table, now = torch.zeros(heads, clip_length, clip_length), torch.arange(clip_length)
        for head in range(heads):
            then = (torch.zeros_like(now), now.clamp(max=1), now, (now - 1).clamp(min=0))[head % 4]
            table[head, now, then] = self.PEAK
        self.table = nn.Parameter(table)


def sinusoids(positions: Tensor, width: int, shortest: float = 2 * math.pi, longest: float = 200 * math.pi) -> Tensor:
    """Sines and cosines of positions (...) at periods from `shortest` to `longest`, geometrically: (... width)."""
    waves = width // 2
    periods = shortest * (longest / shortest) ** (torch.arange(waves, device=positions.device) / max(1, waves - 1))
    angles = positions[..., None] * (2 * math.pi / periods)
    return F.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, width % 2))


class FrameCache:
    """Keys and values on the time axis of the `length` frames so far, for each time layer; allocated once for all."""

    def __init__(self, frames: int) -> None:
        self.frames, self.length = frames, 0
        self._kept: dict[nn.Module, Tensor] = {}

    def extend(self, layer: nn.Module, new: Tensor) -> Tensor:
        """Store the new frames' keys and values (b t h w 2d) behind the known ones; all come back, (2 t b h w d)."""
        new = rearrange(new, "b t h w (two d) -> two t b h w d", two=2)
        if layer not in self._kept:
            self._kept[layer] = new.new_empty(2, self.frames, *new.shape[2:])
        end = self.length + new.shape[1]
        self._kept[layer][:, self.length:end] = new
        return self._kept[layer][:, :end]


class AxialLayer(nn.Module):
    """x + attention(norm(x)) along one axis, then x + mlp(norm(x)); x is (b t h w d) throughout."""

    def __init__(self, axis: str, width: int, head_width: int, dropout: float, offsets: nn.Module | None = None,
                 time_bias: nn.Module | None = None):
        super().__init__()
        self.axis, self.heads = axis, width // head_width
        self.norm_1 = LayerNorm(width)
        self.qkv = Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = LayerNorm(width)
        self.mlp = QuickMLP(width)
        self.dropout = Dropout(dropout)
        self.offsets, self.time_bias = offsets, time_bias   # options, None in the released model

    def attend(self, x: Tensor, steps: Tensor, cache: FrameCache | None) -> Tensor:
        """What the heads read, (b t h w d) like x, before the output projection."""
        qkv, time = self.qkv(x), self.axis == "time"
        if cache is not None and time:
            kept = cache.extend(self, qkv[..., x.shape[-1]:])
            if cache.length:
                return self.look_back(qkv[..., :x.shape[-1]], kept, steps)
        # the first frame alone may look at all
        bias = self.causal(steps) if time and (len(steps) > 1 or self.time_bias is not None) else None
        if kernel_for(x) == "plain" and not torch.compiler.is_compiling():   # a compiler writes its own gradient
            keys, places = (self.offsets.keys, self.offsets.bias) if self.offsets is not None else (None, None)
            bias = bias[None] if bias is not None and bias.ndim == 2 else bias
            return AxisAttention.apply(qkv, bias, keys, places, self.axis, self.heads)
        q, k, v = split(qkv, self.axis, self.heads, 3).transpose(1, 2)
        if self.offsets is not None:
            bias = self.offsets(q)
        return merge(attention(q, k, v, bias).transpose(0, 1)[None], self.axis, x.shape)

    def look_back(self, q: Tensor, kept: Tensor, steps: Tensor) -> Tensor:
        """Attention of a few new frames, q (b t h w d), to all (2 s b h w d), their own among them: (b t h w d).

        One query has too few numbers for a matrix product, which would only copy keys and values into its own layout.
        """
        e = q.shape[-1] // self.heads
        each = torch.eye(self.heads, dtype=q.dtype, device=q.device).repeat_interleave(e, 0)   # sums over a head's d
        read = []
        for i, step in enumerate(steps):
            k, v = kept[:, :kept.shape[1] - len(steps) + i + 1]
            scores = ((k * q[:, i]) @ each).float() * e ** -0.5   # (s b h w heads)
            if self.time_bias is not None:
                scores = scores + rearrange(self.time_bias.table[:, step, :len(k)], "heads s -> s 1 1 1 heads")
            weights = scores.softmax(0).to(v.dtype)[..., None]
            read.append((weights * v.unflatten(-1, (self.heads, e))).sum(0).flatten(-2))
        return torch.stack(read, 1)

    def causal(self, steps: Tensor) -> Tensor:
        """0, or the time bias, where a step may look at another and -inf in its future: (t t) or (heads t t)."""
        if self.time_bias is None:
            bias = torch.zeros((), device=steps.device)
        else:
            bias = self.time_bias.table[:, steps][..., steps]
        return bias.masked_fill(steps > steps[:, None], float("-inf"))

    def forward(self, x: Tensor, steps: Tensor, cache: FrameCache | None = None,
                places: Tensor | None = None) -> Tensor:
        """(b t h w d) -> the same; with `places` (n,), of the (b t h w) in a row, only what comes out there: (n d)."""
        read = self.attend(self.norm_1(x), steps, cache)
        if places is not None:
            x, read = (y.flatten(0, -2).index_select(0, places) for y in (x, read))
        x = x + self.dropout(self.out(read))
        return x + self.dropout(self.mlp(self.norm_2(x)))


# ---------------------------------------------------------------- the transformer

def sampled_frames(lengths: Tensor | int, speed: Tensor, interval: tuple[float, float], clip_length: int) -> Tensor:
    """`clips.frame_indices` of many videos at once, on any device: frames (b,) or one number, speed (b,) in (0, 1)
    -> (b clip_length) int64 (4.2, supplement C.2)."""
    low, high = interval
    last = torch.as_tensor(lengths, device=speed.device).expand(len(speed))[:, None] - 1
    count = ((last + 1) / (low + speed[:, None].double() * (high - low))).round().clamp_(min=1)
    place = torch.arange(clip_length, device=speed.device).minimum(count - 1)
    # as np.linspace counts: multiples of the step, and the end itself at the end
    picked = (place * (last / (count - 1).clamp(min=1))).floor()
    return torch.where((place == count - 1) & (count > 1), last, picked).long()


class AxialTransformer(nn.Module):
    """[anchor, z_1 ... z_i] -> logits of the next frame's tokens at every z (eq. 6).

    Options, all off in the released model: `shift_attention` (`Offsets`), `time_bias` (`TimeBias`), and `intervals`,
    the dataset's frames from one sampled frame to the next at speeds 0 and 1: then time positions say, too, how much
    time of the video has passed at each step. With `video_length`, where all videos have as many frames, they say it
    to the frame (`sampled_frames`).
    """

    WAVES = 64

    def __init__(self, *, width: int, head_width: int, layers: int, clip_length: int, rows: int, columns: int,
                 codebook_size: int, dropout: float, shift_attention: bool = False, time_bias: bool = False,
                 intervals: tuple[float, float] | None = None, video_length: int | None = None):
        super().__init__()
        self.clip_length, self.intervals, self.video_length = clip_length, intervals, video_length
        self.anchor_in = nn.Linear(width, width)
        self.frames_in = nn.Linear(width, width)
        self.time_positions = nn.Parameter(torch.randn(clip_length, 1, 1, width) * width ** -0.5)
        self.source_time = nn.Linear(self.WAVES, width) if intervals else None
        heads, lengths = width // head_width, {"height": rows, "width": columns}
        self.layers = nn.ModuleList()
        for axis in (AXES[i % 3] for i in range(layers)):
            offsets = Offsets(heads, head_width, lengths[axis]) if shift_attention and axis != "time" else None
            bias = TimeBias(heads, clip_length) if time_bias and axis == "time" else None
            self.layers.append(AxialLayer(axis, width, head_width, dropout, offsets, bias))
        self.logits = nn.Linear(width, codebook_size)
        self._initialise(width)

    def _initialise(self, width: int) -> None:
        """Normal weights; what is added to the residual stream shrinks with the number of layers (as in CLIP)."""
        added = width ** -0.5 * (2 * len(self.layers)) ** -0.5
        for layer in self.layers:
            for linear, std in ((layer.qkv, width ** -0.5), (layer.out, added),
                                (layer.mlp.up, (2 * width) ** -0.5), (layer.mlp.down, added)):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)

    def forward(self, anchor: Tensor | None, frames: Tensor, cache: FrameCache | None = None, *,
                speed: Tensor | None = None, steps: Tensor | None = None, last: int | None = None,
                places: Tensor | None = None) -> Tensor:
        """anchor (b h w d), embedded frames (b t h w d) -> features (b t h w d); their `logits` name the frame after.

        With `last` only those of the last few frames, with `places` (n,) only those at places of the (b t h w) in a
        row, (n d): what nobody asks for is not computed.

        With a `cache` only the frames not seen yet are given, and the anchor at the first call alone. `speed` (b,) is
        needed with `intervals`. `steps` (1 + t,) are the places in the clip where frames were left out: 0 for the
        anchor, i for frame i. ValueError where anchor and frames together are more than `clip_length`.
        """
        x = self.frames_in(frames)
        if anchor is not None:
            x = torch.cat([self.anchor_in(anchor)[:, None].to(x.dtype), x], 1)
        start = cache.length if cache is not None else 0
        end = start + x.shape[1]
        if end > self.clip_length:
            raise ValueError(f"{end - 1} frames and the motion anchor are {end} time steps: the model's clip length "
                             f"of {self.clip_length} leaves room for {self.clip_length - 1} frames")
        steps = torch.arange(start, end, device=x.device) if steps is None else steps
        # where autocast made x bf16, it stays so: half the memory traffic
        x = x + self.positions(steps, speed).to(x.dtype)
        last = frames.shape[1] if last is None else last
        for index, layer in enumerate(self.layers):
            x = layer(x, steps, cache, places if index == len(self.layers) - 1 else None)
            if index == len(self.layers) - len(AXES):   # the last layer that looks into the past: it is done with
                x = x[:, x.shape[1] - last:]
        if cache is not None:
            cache.length = end
        return x

    def look(self, anchor: Tensor, speed: Tensor | None = None) -> Tensor:
        """The anchor (b h w d) as all layers but the last make it, which see nothing else at its time step."""
        steps = torch.zeros(1, dtype=torch.long, device=anchor.device)
        x = self.anchor_in(anchor)[:, None]
        x = x + self.positions(steps, speed).to(x.dtype)
        for layer in self.layers[:-1]:
            x = layer(x, steps)
        return x[:, 0]

    def positions(self, steps: Tensor, speed: Tensor | None) -> Tensor:
        """Time positions of the steps (t,): (t 1 1 d), or (b t 1 1 d) where they depend on the speed (b,)."""
        positions = self.time_positions[steps]
        if self.source_time is None:
            return positions
        low, high = self.intervals
        if self.video_length is None:
            passed = steps * (low + speed[:, None].float() * (high - low))
        else:   # step i asks for frame i of the clip, counted from 0
            passed = sampled_frames(self.video_length, speed, self.intervals, self.clip_length)[:, steps].float()
        return positions + self.passed(passed)[:, :, None, None]

    def passed(self, frames: Tensor) -> Tensor:
        """What time positions say of the frames (b t) of a video that have passed: (b t d). Only with `intervals`."""
        waves = sinusoids(frames / self.intervals[0], self.WAVES, 1.5, 60.0)
        return self.source_time(waves.to(self.source_time.weight.dtype))
