"""A closer look at what each phrase of a caption names (an option of advection's U-Net; not in the paper).

The U-Net finds a thing wherever it is in the image, and cuts it out by what is near each pixel. Where two digits cross,
what is missing is what such a digit looks like as a whole. In a window around its centre a thing is always at about the
same place, so that this can be learned place by place, as in a dictionary of shapes (the crops of AIR, Eslami et al.
2016, are such windows). What the window shows corrects the thing's mask, and where its centre is: digits of MNIST were
centred by whole pixels, so that it guesses at rows and columns.

    window of: image, thing, the other things, the rest, U-Net's features ──► 1/2 ──► 1/4 ──► 1/8 ──► the centre
    words that say how it looks ───────────────────────────────────────────────┘ │       │       │
                                                        correction of the mask ◄─┴───────┴───────┘
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mage_core.phrases import SHRINKS, Residual, convolution


def cropped(images: Tensor, corners: Tensor, side: int) -> Tensor:
    """Windows of images (n c H W) from top left corners (n 2), which may lie outside: (n c side side). What is not in
    the image is empty."""
    rows, columns, inside = _places(corners, side, images.shape[2:])
    image = torch.arange(len(images), device=images.device)[:, None, None]
    return (images[image, :, rows, columns] * inside[..., None]).movedim(3, 1)


def put_back(windows: Tensor, corners: Tensor, sides: tuple[int, int]) -> Tensor:
    """The reverse of `cropped`: windows (n side side) in images (n H W) that are 0 elsewhere."""
    rows, columns, inside = _places(corners, windows.shape[-1], sides)
    image = torch.arange(len(windows), device=windows.device)[:, None, None]
    return windows.new_zeros(len(windows), *sides).index_put((image, rows, columns), windows * inside, accumulate=True)


def _places(corners: Tensor, side: int, sides: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (n side 1) and columns (n 1 side) of windows, moved to the border where they lie outside of an image, and
    which of a window's places are inside (n side side)."""
    along = torch.arange(side, device=corners.device)
    rows, columns = (corners[:, axis, None] + along for axis in (0, 1))
    inside = [(0 <= places) & (places < size) for places, size in zip((rows, columns), sides)]
    rows, columns = (places.clamp(0, size - 1) for places, size in zip((rows, columns), sides))
    return rows[:, :, None], columns[:, None], inside[0][:, :, None] & inside[1][:, None]


class CloserLook(nn.Module):
    """Images (b c H W), the masks of things (b n H W) in (0, 1), the U-Net's features (b n d H/2 W/2), where centres
    are (b n 2), caption ids (b l) and how much each word of a phrase says of looks (b n l) -> better masks (b n H W),
    and guesses at centres: log chances of whole rows, and columns, near them, and which these are (b n 2 k).

    `side` is that of a window in pixels, a multiple of 8, `width` that of its layers and `seen` the U-Net's d. It
    begins with the masks as they are, and with normal distributions around the centres.
    """

    AROUND = 5   # rows and columns on either side of a window's middle that are guessed at
    ABOUT = 0.5  # standard deviation, in pixels, of a centre before it is looked at more closely

    def __init__(self, channels: int, seen: int, width: int, vocabulary_size: int, side: int):
        super().__init__()
        self.side, eighth = side, side // SHRINKS
        self.enter = nn.Conv2d(4 * 4 * channels + seen, width, 3, 1, 1)
        self.places_2 = nn.Parameter(torch.zeros(width, side // 2, side // 2))
        self.word = nn.Embedding(vocabulary_size, width)
        self.at_2 = Residual(width)
        self.at_4 = nn.Sequential(convolution(width, 2 * width, 2), Residual(2 * width))
        self.at_8 = convolution(2 * width, 2 * width, 2)
        self.places_8 = nn.Parameter(torch.zeros(2 * width, eighth, eighth))
        self.whole = Residual(2 * width)
        self.centre = nn.Linear(2 * width * eighth ** 2, 2 * (2 * self.AROUND + 1))
        self.from_8, self.over_4 = nn.Conv2d(2 * width, 2 * width, 1), Residual(2 * width)
        self.from_4, self.over_2 = nn.Conv2d(2 * width, width, 1), Residual(width)
        self.cut = nn.Conv2d(width, 4, 1)
        for new in (self.word.weight, self.centre.weight, self.centre.bias, self.cut.weight, self.cut.bias):
            nn.init.zeros_(new)

    def forward(self, image: Tensor, masks: Tensor, features: Tensor, centres: Tensor, text_ids: Tensor,
                telling: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (b, n), sides = masks.shape[:2], masks.shape[2:]
        corners = 2 * ((centres.detach() - self.side / 2) / 2).round().long()   # features are half as large
        at = corners.flatten(0, 1)

        def window(what: Tensor) -> Tensor:
            return cropped(what.flatten(0, 1), at, self.side)

        image, own = image[:, None].expand(-1, n, -1, -1, -1), window(masks[:, :, None])
        others = torch.stack([torch.cat([masks[:, :k], masks[:, k + 1:]], 1).amax(1) for k in range(n)], 1)
        rest = (1 - masks).prod(1, keepdim=True).expand(-1, n, -1, -1)
        shown = window(image)
        x = torch.cat([shown, shown * own, shown * window(others[:, :, None]), shown * window(rest[:, :, None])], 1)
        x = torch.cat([F.pixel_unshuffle(x, 2), cropped(features.flatten(0, 1), at // 2, self.side // 2)], 1)
        words = torch.einsum("bnl,bld->bnd", telling, self.word(text_ids)).flatten(0, 1)
        x = self.enter(x.contiguous(memory_format=torch.channels_last)) + self.places_2 + words[:, :, None, None]
        half = self.at_2(x)
        quarter = self.at_4(half)
        whole = self.whole(self.at_8(quarter) + self.places_8)
        along = torch.arange(-self.AROUND, self.AROUND + 1, device=masks.device)
        places = corners[..., None] + self.side // 2 + along
        guesses = self.centre(whole.flatten(1)).view(places.shape)
        guesses = guesses - 0.5 * ((places - centres[..., None]) / self.ABOUT).square()
        x = self.over_4(quarter + F.interpolate(self.from_8(whole), scale_factor=2))
        x = self.over_2(half + F.interpolate(self.from_4(x), scale_factor=2))
        better = put_back(F.pixel_shuffle(self.cut(x), 2)[:, 0], at, sides).unflatten(0, (b, n))
        return (masks.logit(1e-6) + better).sigmoid(), guesses.log_softmax(-1), places.to(guesses.dtype)

    def inner_convolutions(self) -> list[nn.Parameter]:
        """The weights of all convolutions but the one that makes masks."""
        return [part.weight for part in self.modules() if isinstance(part, nn.Conv2d) and part is not self.cut]
