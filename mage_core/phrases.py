"""A U-Net that cuts out of an image what each phrase of its caption names (an option of advection; not in the paper).

    first image ──► 1/2 ──► 1/4 ──► 1/8 ──► logits of every word at each place
                     │       │       │                   │ a phrase's words, added up
                     ▼       ▼       ▼                   ▼
         masks ◄─── 1/2 ◄── 1/4 ◄── 1/8 ◄── where they are likely, and where the others' are

Which part of an image a word means is learned from images and captions alone: a word that the caption holds is likely
at some place, any other at none (weakly supervised localisation, Oquab et al. 2015). Words that the image does not
tell, such as where things will go, say nothing of places: each counts by how much better than its share in captions
the image predicts it, measured as training goes. Batch normalisation is what makes it learn (notebooks/search_log.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

PHRASES = 2   # of a caption, each of which names one thing
SHRINKS = 8   # an image's sides are multiples of it


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose statistics are those of training steps: a pass without gradients never counts, nor one
    in which this layer does not learn."""

    def forward(self, x: Tensor) -> Tensor:
        learning = self.training and torch.is_grad_enabled() and self.weight.requires_grad
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, learning, self.momentum,
                            self.eps)


def convolution(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    """relu(norm(3 x 3 convolution)): (b channels h w) -> (b width h/stride w/stride)."""
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1, bias=False), BatchNorm(width), nn.ReLU())


def phrases_of(text_ids: Tensor, separator: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Caption ids (b l) -> which words are in each phrase (b PHRASES l) bool, and each word's place in its own (b l).

    A phrase begins at a `separator`, such as "and"; one that a caption has not is empty, and those after PHRASES are
    left out.
    """
    starts = text_ids == separator
    number = starts.long().cumsum(1)
    places = torch.arange(text_ids.shape[1], device=text_ids.device).expand_as(text_ids)
    begun = torch.where(starts, places, torch.zeros_like(places)).cummax(1).values
    inside = torch.stack([(number == phrase) & (text_ids != pad_id) for phrase in range(PHRASES)], 1)
    return inside, places - begun


class Residual(nn.Sequential):
    """x + two convolutions of it, which begin as no change: (b width h w), the same."""

    def __init__(self, width: int):
        super().__init__(convolution(width, width), nn.Conv2d(width, width, 3, 1, 1))
        nn.init.zeros_(self[1].weight)
        nn.init.zeros_(self[1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class PhraseUNet(nn.Module):
    """Images (b c H W), caption ids (b l), the words of each phrase (b n l) -> features (b n width H/2 W/2), masks
    (b n H W) in (0, 1), the logits of every word at each place (b v H/8 W/8).

    H and W are multiples of 8. One pixel can be in several masks. Every phrase is looked for by the same weights, told
    where its own words and where the others' are likely.
    """

    AT_MOST = 4.0     # by which logits tell one phrase's places from another's at the start of a mask
    POOLED = 2.0      # taken from the log-sum of a word's odds over places
    KEPT = 0.98       # of what is known of words' skill, from one training step to the next
    LEAST = 0.05      # nats: a word of nearly every caption, or of none, has no skill; a skill below it is chance
    FINER = 2         # residual blocks between half-size features and masks: which stroke is whose, where digits cross

    def __init__(self, channels: int, width: int, vocabulary_size: int):
        super().__init__()
        half, quarter, eighth = width, 2 * width, 4 * width
        self.down_2 = convolution(4 * channels, half)
        self.down_4 = nn.Sequential(convolution(half, quarter, 2), convolution(quarter, eighth))
        self.down_8 = nn.Sequential(convolution(eighth, eighth, 2), convolution(eighth, 2 * eighth),
                                    convolution(2 * eighth, eighth))
        self.word = nn.Conv2d(eighth, vocabulary_size, 1)
        self.from_8, self.over_4 = nn.Conv2d(eighth + 2, quarter, 1), nn.Conv2d(eighth, quarter, 1)
        self.up_4 = nn.Sequential(convolution(quarter, quarter), nn.Conv2d(quarter, half, 1))
        self.over_2 = nn.Conv2d(half, half, 1)
        self.up_2 = nn.Sequential(BatchNorm(half), nn.ReLU(), convolution(half, half))
        self.finer = nn.Sequential(*(Residual(half) for _ in range(self.FINER)))
        self.cut = nn.Conv2d(half, 4, 1)
        for name in ("share", "cost"):   # of the captions with a word, and nats that it costs
            self.register_buffer(name, torch.zeros(vocabulary_size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        nn.init.normal_(self.word.weight, std=0.02)
        nn.init.constant_(self.word.bias, -3.0)
        nn.init.zeros_(self.cut.weight)
        nn.init.zeros_(self.cut.bias)

    def forward(self, images: Tensor, text_ids: Tensor, phrases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = self.down_2(F.pixel_unshuffle(images, 2).contiguous(memory_format=torch.channels_last))
        quarter = self.down_4(half)
        eighth = self.down_8(quarter)
        words = self.word(eighth)
        telling = (words * self.skill()[:, None, None]).flatten(2)
        telling = telling.gather(1, text_ids[:, :, None].expand(-1, -1, telling.shape[2]))   # (b l places)
        own = torch.einsum("bnl,blp->bnp", phrases.to(telling.dtype), telling).unflatten(2, words.shape[2:])
        others = own.sum(1, keepdim=True) - own

        count = phrases.shape[1]
        x = torch.cat([eighth[:, None].expand(-1, count, -1, -1, -1), own[:, :, None], others[:, :, None]], 2)
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)   # faster on a CPU
        x = F.interpolate(self.from_8(x), scale_factor=2)
        x = self.up_4(x + self.over_4(quarter).repeat_interleave(count, 0))
        x = F.interpolate(x, scale_factor=2) + self.over_2(half).repeat_interleave(count, 0)
        features = self.finer(self.up_2(x))
        start = F.interpolate((own - others).clamp(-self.AT_MOST, self.AT_MOST), scale_factor=8, mode="bilinear")
        cut = rearrange(F.pixel_shuffle(self.cut(features), 2), "(b n) 1 h w -> b n h w", n=count)
        return rearrange(features, "(b n) c h w -> b n c h w", n=count), (start + cut).sigmoid(), words

    def inner_convolutions(self) -> list[nn.Parameter]:
        """The weights of all convolutions but those that make logits: of words, and of masks."""
        return [part.weight for part in self.modules() if isinstance(part, nn.Conv2d)
                and part not in (self.word, self.cut)]

    def skill(self) -> Tensor:
        """How well the image predicts each word (v,) in [0, 1]: 0 is hardly better than its share in captions, a
        twentieth of what that leaves open, and 1 eleven twentieths, or more."""
        share = self.share.float().clamp(1e-3, 1 - 1e-3)
        open_ = -(share * share.log() + (1 - share) * (1 - share).log())
        gained = 2 * (1 - self.cost.float() / open_ - self.LEAST)
        return (gained * (open_ > self.LEAST)).clamp(0, 1)

    def word_loss(self, words: Tensor, text_ids: Tensor) -> Tensor:
        """Logits of words at places (b v h w), caption ids (b l) -> nats by which the words of a caption are missed:
        the sum over all words of the binary cross-entropy, the mean over captions. In training it adds to what is known
        of their skill."""
        held = torch.zeros(words.shape[:2], device=words.device).scatter_(1, text_ids, 1.0)
        likely = words.float().flatten(2).logsumexp(2) - self.POOLED
        nats = F.binary_cross_entropy_with_logits(likely, held, reduction="none").mean(0)
        if self.training and torch.is_grad_enabled() and self.word.weight.requires_grad:
            with torch.no_grad():
                kept = (self.steps / (self.steps + 1)).clamp_max(self.KEPT)
                self.share.lerp_(held.mean(0), 1 - kept)
                self.cost.lerp_(nats, 1 - kept)
                self.steps += 1
        return nats.sum()
