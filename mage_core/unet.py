"""A U-Net that cuts out of an image what it is told to look for (an option of advection; not in the paper).

    first image ──► 1/2 ──► 1/4 ──► 1/8 ─┐        what to look for ──► scale and shift of every block's features
                     │       │           ▼
         masks ◄─── 1/2 ◄── 1/4 ◄────── 1/8

Down and up again with what was seen on the way (Ronneberger, Fischer and Brox 2015), each block modulated by what is
looked for (FiLM, Perez et al. 2018).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

NORM_GROUPS = 8   # a U-Net's width is a multiple of it
SHRINKS = 8       # an image's sides are multiples of it


class Block(nn.Module):
    """x + convolutions(x), features (b c h w) scaled and shifted by what is looked for (b e) between the two."""

    def __init__(self, width: int, told: int):
        super().__init__()
        self.norm_1, self.norm_2 = (nn.GroupNorm(NORM_GROUPS, width) for _ in range(2))
        self.conv_1, self.conv_2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.film = nn.Linear(told, 2 * width)
        for zero in (self.conv_2.weight, self.conv_2.bias, self.film.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.film(told)[..., None, None].chunk(2, 1)
        y = self.norm_2(self.conv_1(F.silu(self.norm_1(x)))) * (1 + scale) + shift
        return x + self.conv_2(F.silu(y))


class UNet(nn.Module):
    """Images (b c H W), what to look for in each (b e) -> features (b width H/2 W/2), masks (b things H W) in (0, 1).

    H and W are multiples of 8. One pixel can be in several masks.
    """

    def __init__(self, channels: int, width: int, told: int, things: int):
        super().__init__()
        half, quarter, eighth = width, 2 * width, 4 * width
        self.stem = nn.Conv2d(4 * channels, half, 3, padding=1)
        self.block_2, self.block_4 = Block(half, told), Block(quarter, told)
        self.up_4, self.up_2 = Block(quarter, told), Block(half, told)
        self.blocks_8 = nn.ModuleList(Block(eighth, told) for _ in range(2))
        self.to_4, self.to_8 = nn.Conv2d(half, quarter, 2, stride=2), nn.Conv2d(quarter, eighth, 2, stride=2)
        self.from_8, self.from_4 = nn.Conv2d(eighth, quarter, 1), nn.Conv2d(quarter, half, 1)
        self.norm, self.cut = nn.GroupNorm(NORM_GROUPS, half), nn.Conv2d(half, 4 * things, 1)
        nn.init.zeros_(self.cut.weight)
        nn.init.ones_(self.cut.bias)

    def forward(self, images: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        half = self.block_2(self.stem(F.pixel_unshuffle(images, 2)), told)
        quarter = self.block_4(self.to_4(half), told)
        x = self.to_8(quarter)
        for block in self.blocks_8:
            x = block(x, told)
        x = self.up_4(quarter + F.interpolate(self.from_8(x), scale_factor=2), told)
        x = self.up_2(half + F.interpolate(self.from_4(x), scale_factor=2), told)
        features = F.silu(self.norm(x))
        return features, F.pixel_shuffle(self.cut(features), 2).sigmoid()
