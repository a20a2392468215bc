"""VQ-VAE: images to a grid of discrete tokens and back (Section 3.2, eq. 1).

    image ──encoder──► features ──nearest code──► token ids ──codebook──► code vectors ──decoder──► image

Two shapes, both those of the released implementation: `down=4` for Moving MNIST (64 x 64 pixels to 16 x 16 tokens) and
`down=8` for CATER (128 x 128 to 16 x 16).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of a VQ-VAE; `pixel_range` is what the network sees for black and white (the public range is 0 to 1).

    Raises ValueError, showing the number, where a size cannot be built.
    """

    channels: int
    width: int
    codebook_size: int
    down: int
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    commitment: float = 2.0

    def __post_init__(self) -> None:
        for name in ("channels", "width", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"VQVAEConfig.{name} is {getattr(self, name)}: it must be at least 1")
        if self.down not in (4, 8):
            raise ValueError(f"VQVAEConfig.down is {self.down}: the encoder shrinks images by 4 (MNIST) or 8 (CATER)")
        if self.down == 8 and self.width % 4:
            raise ValueError(f"VQVAEConfig.width is {self.width}: with down=8 it must be a multiple of 4, "
                             "the hidden width of a block being a quarter of its output")
        low, high = self.pixel_range
        if not -1 <= low < high <= 1:
            raise ValueError(f"VQVAEConfig.pixel_range is {self.pixel_range}: it must rise and stay within -1 to 1, "
                             "the range of the decoder's tanh")

    @property
    def code_width(self) -> int:
        """Channels of a code vector."""
        return self.width if self.down == 4 else 4 * self.width


@dataclass
class VQVAEOutput:
    """What a training step sees: images (b c H W) in [0, 1], token ids (b h w), and eq. 1 term by term.

    The losses are means over all elements, in the network's pixel range; `loss` is
    reconstruction + codebook + `commitment` x commitment.
    """

    reconstruction: Tensor
    token_ids: Tensor
    loss: Tensor
    reconstruction_loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor


# ---------------------------------------------------------------- down 4: Moving MNIST

class RectifiedResidual(nn.Module):
    """relu(x) + f(relu(x)): the released ReLU works in place, so that its skip carries relu(x) too."""

    def __init__(self, width: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width),
            nn.ReLU(), nn.Conv2d(width, width, 1), nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        relu, *rest = self.residual
        x = relu(x)
        return x + nn.Sequential(*rest)(x)


def _down_4(config: VQVAEConfig) -> tuple[nn.Sequential, nn.Sequential]:
    width = config.width
    encoder = nn.Sequential(
        nn.Conv2d(config.channels, width, 4, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 4, stride=2, padding=1),
        RectifiedResidual(width), RectifiedResidual(width),
    )
    decoder = nn.Sequential(
        RectifiedResidual(width), RectifiedResidual(width), nn.ReLU(),
        nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.ConvTranspose2d(width, config.channels, 4, stride=2, padding=1), nn.Tanh(),
    )
    return encoder, decoder


# ---------------------------------------------------------------- down 8: CATER

class Bottleneck(nn.Module):
    """skip(x) + f(x), f being four times ReLU and convolution, through a quarter of the output's width."""

    def __init__(self, width_in: int, width_out: int, kernels: tuple[int, int, int, int]):
        super().__init__()
        hidden = width_out // 4
        widths = (width_in, hidden, hidden, hidden, width_out)
        layers = []
        for kernel, before, after in zip(kernels, widths, widths[1:]):
            layers += [nn.ReLU(), nn.Conv2d(before, after, kernel, padding=kernel // 2)]
        self.residual = nn.Sequential(*layers)
        self.skip = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.residual(x)


def _down_8(config: VQVAEConfig) -> tuple[nn.Sequential, nn.Sequential]:
    width, reading, writing = config.width, (3, 3, 3, 1), (1, 3, 3, 3)
    encoder = nn.Sequential(
        nn.Conv2d(config.channels, width, 7, padding=3),
        Bottleneck(width, width, reading), nn.MaxPool2d(2),
        Bottleneck(width, width, reading), nn.MaxPool2d(2),
        Bottleneck(width, 2 * width, reading), nn.MaxPool2d(2),
        Bottleneck(2 * width, 4 * width, reading), nn.ReLU(),
    )
    decoder = nn.Sequential(
        Bottleneck(4 * width, 2 * width, writing), nn.Upsample(scale_factor=2),
        Bottleneck(2 * width, width, writing), nn.Upsample(scale_factor=2),
        Bottleneck(width, width, writing), nn.Upsample(scale_factor=2),
        Bottleneck(width, width, writing), nn.ReLU(),
        nn.Conv2d(width, config.channels, 1), nn.Tanh(),
    )
    return encoder, decoder


def build_autoencoder(config: VQVAEConfig) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder (b c H W) -> (b code_width h w) and decoder back, both in the network's pixel range."""
    return _down_4(config) if config.down == 4 else _down_8(config)


# ---------------------------------------------------------------- the autoencoder

def nearest_code(features: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code: features (n e), codebook (k e) -> (n,) int64, in fp32 by one matrix product."""
    with torch.autocast(features.device.type, enabled=False):
        features, codebook = features.float(), codebook.float()
        # |f - c|^2 without |f|^2, which is the same for every code
        return torch.addmm(codebook.square().sum(1), features, codebook.T, alpha=-2).argmin(1)


class VQVAE(nn.Module):
    """Images (b c H W) in [0, 1] <-> token ids (b h w) int64, h = H / down, w = W / down (Section 3.2, eq. 1)."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = build_autoencoder(config)
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.code_width))
        nn.init.uniform_(self.codebook, -1 / config.codebook_size, 1 / config.codebook_size)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    # ---- public boundary: pixels in [0, 1]

    def encode(self, images: Tensor) -> Tensor:
        """Images (b c H W) in [0, 1] -> token ids (b h w); ValueError for channels or sizes that do not fit."""
        return self.encode_network(self.to_network(images))

    def decode(self, token_ids: Tensor) -> Tensor:
        """Token ids (b h w) -> images (b c H W), clipped to [0, 1]."""
        return self.from_network(self.decode_network(token_ids))

    def forward(self, images: Tensor) -> VQVAEOutput:
        """Images (b c H W) in [0, 1] -> reconstruction, token ids and the losses of eq. 1."""
        images = self.to_network(images)
        features = self.features(images)
        token_ids = self.nearest(features)
        codes, features = self.embed(token_ids).float(), features.float()
        # straight-through: the decoder sees the code, the encoder gets the decoder's gradient
        reconstruction = self.decoder(features + (codes - features).detach()).float()
        reconstruction_loss = F.mse_loss(reconstruction, images.float())
        codebook_loss = F.mse_loss(codes, features.detach())
        commitment_loss = F.mse_loss(features, codes.detach())
        loss = reconstruction_loss + codebook_loss + self.config.commitment * commitment_loss
        return VQVAEOutput(self.from_network(reconstruction.detach()), token_ids, loss,
                           reconstruction_loss, codebook_loss, commitment_loss)

    # ---- the same in the network's own pixel range

    def to_network(self, images: Tensor) -> Tensor:
        """[0, 1] -> `pixel_range`."""
        low, high = self.config.pixel_range
        return images * (high - low) + low

    def from_network(self, images: Tensor) -> Tensor:
        """`pixel_range` -> [0, 1], clipped."""
        low, high = self.config.pixel_range
        return ((images.float() - low) / (high - low)).clamp(0, 1)

    def encode_network(self, images: Tensor) -> Tensor:
        """Images (b c H W) in `pixel_range` -> token ids (b h w)."""
        return self.nearest(self.features(images))

    def decode_network(self, token_ids: Tensor) -> Tensor:
        """Token ids (b h w) -> images (b c H W), unclipped, nominally in `pixel_range`."""
        return self.decoder(self.embed(token_ids))

    def reconstruct_network(self, images: Tensor) -> Tensor:
        """Images (b c H W) in `pixel_range` -> the same through the tokens."""
        return self.decode_network(self.encode_network(images))

    # ---- parts

    def features(self, images: Tensor) -> Tensor:
        """Encoder output e_x (b e h w) for images (b c H W) in `pixel_range`."""
        channels, down = self.config.channels, self.config.down
        if images.ndim != 4 or images.shape[1] != channels or images.shape[2] % down or images.shape[3] % down:
            raise ValueError(f"VQVAE got images of shape {tuple(images.shape)}: it takes (b c H W) with c = {channels} "
                             f"and H and W multiples of {down}; flatten time into the batch and resize first")
        return self.encoder(images)

    def nearest(self, features: Tensor) -> Tensor:
        """Features (b e h w) -> token ids (b h w)."""
        b, _, h, w = features.shape
        ids = nearest_code(rearrange(features, "b e h w -> (b h w) e"), self.codebook)
        return rearrange(ids, "(b h w) -> b h w", b=b, h=h, w=w)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids (b h w) -> code vectors (b e h w)."""
        return rearrange(F.embedding(token_ids, self.codebook), "b h w e -> b e h w")
