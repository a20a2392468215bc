"""The motion anchor: what moves where, aligned with the first frame (Sections 3.3.1 and 3.3.2, eq. 2 to 5).

    caption ──text encoder──► words ┐
    first frame's tokens ──queries──┴─► cross-attention ──► AdaIN with randomness r ──► + speed ──► motion anchor
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mage_core.axial import Dropout, QuickMLP, attention, attention_weights


def padding_bias(text_ids: Tensor, pad_id: int) -> Tensor:
    """0 at words and -inf at padding, to add to attention scores: (b l) -> (b 1 1 l)."""
    bias = torch.zeros(text_ids.shape, device=text_ids.device)
    return rearrange(bias.masked_fill_(text_ids == pad_id, float("-inf")), "b l -> b 1 1 l")


# ---------------------------------------------------------------- text

class TextLayer(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x)): post-norm, exact GELU."""

    def __init__(self, width: int, head_width: int, dropout: float):
        super().__init__()
        self.heads = width // head_width
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm_2 = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b l (three heads e) -> three b heads l e", three=3, heads=self.heads)
        x = self.norm_1(x + self.dropout(self.out(rearrange(attention(q, k, v, bias), "b heads l e -> b l (heads e)"))))
        return self.norm_2(x + self.dropout(self.down(self.dropout(F.gelu(self.up(x))))))


class TextEncoder(nn.Module):
    """Caption ids (b l) -> word vectors (b l d); those at padding mean nothing and influence no other."""

    def __init__(self, *, vocabulary_size: int, context_length: int, width: int, head_width: int, layers: int,
                 dropout: float, pad_id: int):
        super().__init__()
        self.pad_id = pad_id
        self.words = nn.Parameter(torch.randn(vocabulary_size, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(context_length, width) * 0.02)
        self.norm = nn.LayerNorm(width, eps=1e-8)
        self.layers = nn.ModuleList(TextLayer(width, head_width, dropout) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, width)
        self.dropout = Dropout(dropout)
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, text_ids: Tensor) -> Tensor:
        x = F.embedding(text_ids, self.words) + self.positions[:text_ids.shape[1]]
        x = self.dropout(self.norm(x)).masked_fill((text_ids == self.pad_id)[..., None], 0.0)
        bias = padding_bias(text_ids, self.pad_id)
        for layer in self.layers:
            x = layer(x, bias)
        return self.projection(self.final_norm(x))


# ---------------------------------------------------------------- image-text alignment

class CrossAttention(nn.Module):
    """Eq. 2: every token of the first frame reads the words; x = q + attention(q, words), x + mlp(norm(x))."""

    def __init__(self, width: int, head_width: int, dropout: float):
        super().__init__()
        self.heads = width // head_width
        self.qkv = nn.Linear(width, 3 * width)   # queries from the image, keys and values from the words
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.mlp = QuickMLP(width)
        self.dropout = Dropout(dropout)

    def project(self, image: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = image.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = rearrange(F.linear(image, weight[:d], bias[:d]), "b h w (heads e) -> b heads (h w) e", heads=self.heads)
        k, v = rearrange(F.linear(words, weight[d:], bias[d:]), "b l (two heads e) -> two b heads l e",
                         two=2, heads=self.heads)
        return q, k, v

    def forward(self, image: Tensor, words: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.project(image, words)
        read = rearrange(attention(q, k, v, bias), "b heads (h w) e -> b h w (heads e)", h=image.shape[1])
        x = image + self.dropout(self.out(read))
        return x + self.dropout(self.mlp(self.norm(x)))

    def weights(self, image: Tensor, words: Tensor, bias: Tensor) -> Tensor:
        """How much each token attends to each word (Fig. 11): (b heads (h w) l)."""
        q, k, _ = self.project(image, words)
        return attention_weights(q, k, bias)


# ---------------------------------------------------------------- implicit randomness

class VideoResidual(nn.Module):
    """relu(f(x) + shortcut(x)) over (b d t h w), halving time; f is convolution, norm, ReLU, convolution, norm."""

    def __init__(self, width: int):
        super().__init__()
        halving = (2, 1, 1)
        self.conv_1 = nn.Conv3d(width, width, 3, stride=halving, padding=1, bias=False)
        self.norm_1 = nn.GroupNorm(16, width)
        self.conv_2 = nn.Conv3d(width, width, 3, padding=1, bias=False)
        self.norm_2 = nn.GroupNorm(16, width)
        self.shortcut = nn.Sequential(nn.Conv3d(width, width, 3, stride=halving, padding=1, bias=False),
                                      nn.GroupNorm(16, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_2(self.conv_2(F.relu(self.norm_1(self.conv_1(x)))))
        return F.relu(y + self.shortcut(x))


class Posterior(nn.Module):
    """Eq. 4: the embedded video (b t h w d) -> mean and log-variance of r, each (b c h w); t is at most 16."""

    def __init__(self, width: int, latent_channels: int):
        super().__init__()
        self.blocks = nn.Sequential(*(VideoResidual(width) for _ in range(4)))
        self.mean = nn.Conv2d(width, latent_channels, 3, padding=1)
        self.log_variance = nn.Conv2d(width, latent_channels, 3, padding=1)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        x = rearrange(self.blocks(rearrange(video, "b t h w d -> b d t h w")), "b d 1 h w -> b d h w")
        return self.mean(x).float(), self.log_variance(x).float()


def kl_from_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)), summed over all dimensions, averaged over the batch (eq. 7)."""
    terms = mean.square() + log_variance.exp() - 1 - log_variance
    return 0.5 * terms.flatten(1).sum(1).mean()


class AdaIN(nn.Module):
    """Eq. 5: the anchor (b h w d), normalised over its positions, scaled and shifted by r (b c h w) at each of them."""

    def __init__(self, width: int, latent_channels: int):
        super().__init__()
        def convolutions() -> nn.Sequential:
            return nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(2)))
        self.widen = nn.Conv2d(latent_channels, width, 3, padding=1, bias=False)
        self.scale, self.shift = convolutions(), convolutions()

    def forward(self, anchor: Tensor, r: Tensor) -> Tensor:
        r = self.widen(r.to(self.widen.weight.dtype))
        anchor = F.instance_norm(rearrange(anchor, "b h w d -> b d h w"))
        return rearrange(anchor * self.scale(r) + self.shift(r), "b d h w -> b h w d")


# ---------------------------------------------------------------- the motion anchor

class MotionAnchor(nn.Module):
    """First frame, words, randomness and speed in one map (b h w d) (eq. 2, 3 and 5)."""

    def __init__(self, *, width: int, head_width: int, layers: int, dropout: float, latent_channels: int | None,
                 speed_frequencies: int = 0):
        super().__init__()
        self.layers = nn.ModuleList(CrossAttention(width, head_width, dropout) for _ in range(layers))
        self.adain = AdaIN(width, latent_channels) if latent_channels else None
        self.speed = nn.Parameter(torch.randn(1, width) * width ** -0.5)
        self.speed_waves = nn.Linear(2 * speed_frequencies, width, bias=False) if speed_frequencies else None

    def forward(self, image: Tensor, words: Tensor, bias: Tensor, speed: Tensor, r: Tensor | None = None, *,
                return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Embedded first frame (b h w d), words (b l d), padding bias (b 1 1 l), speed (b,), r (b c h w) -> (b h w d).

        With `return_attention` also the weights (b layers heads (h w) l) of Fig. 11. ValueError where r is missing from
        a stochastic model, or given to a deterministic one.
        """
        if (r is None) != (self.adain is None):
            raise ValueError("a stochastic motion anchor needs the randomness r" if r is None else
                             "this motion anchor is deterministic and takes no randomness r")
        x, seen = image, []
        for layer in self.layers:
            if return_attention:
                seen.append(layer.weights(x, words, bias))
            x = layer(x, words, bias)
        if self.adain is not None:
            x = self.adain(x, r)
        x = x + rearrange(self.speed_vector(speed), "b d -> b 1 1 d")
        return (x, torch.stack(seen, 1)) if return_attention else x

    def speed_vector(self, speed: Tensor) -> Tensor:
        """Eq. 3: c = phi(eta), without a bias: speed (b,) -> (b d);
        optionally with sin and cos of pi eta, 2 pi eta ..."""
        eta = rearrange(speed, "b -> b 1")
        vector = eta.to(self.speed.dtype) * self.speed
        if self.speed_waves is None:
            return vector
        turns = math.pi * eta * torch.arange(1, self.speed_waves.in_features // 2 + 1, device=speed.device)
        return vector + self.speed_waves(torch.cat([turns.sin(), turns.cos()], 1).to(self.speed.dtype))
