"""Axial transformer: appearance and motion fused along time, rows and columns in turn (Section 3.3.3, eq. 6).

A block is three layers, one for each axis of the (t h w) volume of tokens. Time is causal, so that a past frame never
changes: during generation only its keys and values on the time axis are kept, and each frame is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

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


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(e) + bias) v for q (... m e), k and v (... n e), bias broadcast to (... m n).

    Trained on a CPU as three plain operations: at an axis' 10 to 16 keys the fused kernel's backward is ten times slower.
    """
    kernel = _forced_kernel or ("fused" if q.is_cuda or not torch.is_grad_enabled() else "plain")
    if bias is not None:
        bias = bias.to(q.dtype)
    if kernel == "fused":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attention_weights(q, k, bias) @ v


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(e) + bias): (... m n)."""
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores.softmax(-1)


# ---------------------------------------------------------------- parts shared with the motion anchor

QUICK = 1.702


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), written with SiLU because that is the fast one."""
    return F.silu(QUICK * x) / QUICK


class QuickMLP(nn.Module):
    """d -> 4 d -> QuickGELU -> d."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.down(quick_gelu(self.up(x)))
        # the same with QuickGELU's two factors in the weights: while training they are few beside the activations
        x = F.silu(F.linear(x, QUICK * self.up.weight, QUICK * self.up.bias))
        return F.linear(x, self.down.weight / QUICK, self.down.bias)


# ---------------------------------------------------------------- the axial layer

AXES = ("time", "height", "width")
SPLIT = {
    "time": "b t h w (three heads e) -> three (b h w) heads t e",
    "height": "b t h w (three heads e) -> three (b t w) heads h e",
    "width": "b t h w (three heads e) -> three (b t h) heads w e",
}
MERGE = {
    "time": "(b h w) heads t e -> b t h w (heads e)",
    "height": "(b t w) heads h e -> b t h w (heads e)",
    "width": "(b t h) heads w e -> b t h w (heads e)",
}


class RelativeBias(nn.Module):
    """A learned bias for each head by relative offset, clipped to +-`reach`: scores (heads m n) for m = n positions.

    Starts as peaks, head by head "look k tokens away" with k spread evenly over -(reach - 1) ... reach - 1, so that
    moving content can be copied from the first step on (the last offsets stand for everything beyond, too).
    """

    PEAK = 4.0

    def __init__(self, heads: int, reach: int):
        super().__init__()
        self.reach = reach
        self.table = nn.Parameter(torch.zeros(heads, 2 * reach + 1))
        offsets = torch.linspace(1 - reach, reach - 1, heads).round().long()
        with torch.no_grad():
            self.table[torch.arange(heads), offsets + reach] = self.PEAK

    def forward(self, length: int) -> Tensor:
        position = torch.arange(length, device=self.table.device)
        offset = (position[None, :] - position[:, None]).clamp(-self.reach, self.reach)
        return self.table[:, offset + self.reach]


class FrameCache:
    """Keys and values on the time axis of the `length` frames so far, for each time layer; allocated once, all frames."""

    def __init__(self, frames: int) -> None:
        self.frames, self.length = frames, 0
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new frames' k and v (n heads t e) behind the known ones; all of them come back."""
        if layer not in self._kept:
            shape = (*k.shape[:2], self.frames, k.shape[3])
            self._kept[layer] = (k.new_empty(shape), v.new_empty(shape))
        end = self.length + k.shape[2]
        for kept, new in zip(self._kept[layer], (k, v)):
            kept[:, :, self.length:end] = new
        return tuple(kept[:, :, :end] for kept in self._kept[layer])


class AxialLayer(nn.Module):
    """x + attention(norm(x)) along one axis, then x + mlp(norm(x)); x is (b t h w d) throughout."""

    def __init__(self, axis: str, width: int, head_width: int, dropout: float, relative_offsets: int):
        super().__init__()
        self.axis, self.heads = axis, width // head_width
        self.norm_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = QuickMLP(width)
        self.dropout = nn.Dropout(dropout)
        self.offsets = RelativeBias(self.heads, relative_offsets) if relative_offsets and axis != "time" else None

    def attend(self, x: Tensor, bias: Tensor | None, cache: FrameCache | None) -> Tensor:
        b, t, h, w, _ = x.shape
        q, k, v = rearrange(self.qkv(x), SPLIT[self.axis], three=3, heads=self.heads)
        if cache is not None and self.axis == "time":
            k, v = cache.extend(self, k, v)
        return self.out(rearrange(attention(q, k, v, bias), MERGE[self.axis], b=b, t=t, h=h, w=w))

    def forward(self, x: Tensor, causal: Tensor | None, cache: FrameCache | None = None) -> Tensor:
        if self.axis == "time":
            bias = causal
        else:
            bias = self.offsets(x.shape[2 if self.axis == "height" else 3]) if self.offsets else None
        x = x + self.dropout(self.attend(self.norm_1(x), bias, cache))
        return x + self.dropout(self.mlp(self.norm_2(x)))


# ---------------------------------------------------------------- the transformer

class AxialTransformer(nn.Module):
    """[anchor, z_1 ... z_i] -> logits of the next frame's tokens at every z (eq. 6)."""

    def __init__(self, *, width: int, head_width: int, layers: int, clip_length: int, codebook_size: int,
                 dropout: float, relative_offsets: int = 0):
        super().__init__()
        self.clip_length = clip_length
        self.anchor_in = nn.Linear(width, width)
        self.frames_in = nn.Linear(width, width)
        self.time_positions = nn.Parameter(torch.randn(clip_length, 1, 1, width) * width ** -0.5)
        self.layers = nn.ModuleList(
            AxialLayer(AXES[i % 3], width, head_width, dropout, relative_offsets) for i in range(layers))
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

    def forward(self, anchor: Tensor | None, frames: Tensor, cache: FrameCache | None = None) -> Tensor:
        """anchor (b h w d), embedded frames (b t h w d) -> logits (b t h w k), of the frame after each.

        With a `cache` only the frames not seen yet are given, and the anchor at the first call alone.
        ValueError where anchor and frames together are more than `clip_length`.
        """
        x = self.frames_in(frames)
        if anchor is not None:
            x = torch.cat([self.anchor_in(anchor)[:, None], x], 1)
        start = cache.length if cache is not None else 0
        end = start + x.shape[1]
        if end > self.clip_length:
            raise ValueError(f"{end - 1} frames and the motion anchor are {end} time steps: the model's clip length "
                             f"of {self.clip_length} leaves room for {self.clip_length - 1} frames")
        x = x + self.time_positions[start:end]
        causal = causal_bias(start, end, x.device) if x.shape[1] > 1 else None   # the newest frame may look at all
        for layer in self.layers:
            x = layer(x, causal, cache)
        if cache is not None:
            cache.length = end
        return self.logits(x[:, x.shape[1] - frames.shape[1]:])


def causal_bias(start: int, end: int, device: torch.device) -> Tensor:
    """0 where a frame of start ... end - 1 may look at one of 0 ... end - 1, -inf in its future: (end - start, end)."""
    now, then = torch.arange(start, end, device=device), torch.arange(end, device=device)
    return torch.zeros(end - start, end, device=device).masked_fill_(then > now[:, None], float("-inf"))
