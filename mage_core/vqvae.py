"""VQ-VAE: images to a grid of discrete tokens and back (Section 3.2, eq. 1).

    image ──encoder──► features ──nearest code──► token ids ──codebook──► code vectors ──decoder──► image

Two shapes of the released implementation: `down=4` for Moving MNIST (64 x 64 pixels to 16 x 16 tokens) and `down=8` for
CATER (128 x 128 to 16 x 16). And a third of our own, `shape="patch"`, that works on patches of down x down pixels from
the first layer on: quick on a CPU, and a token depends on its near surroundings only, or on its own patch alone, so
that still regions give still tokens. How each is trained is in `training`; what keeps the codebook alive (`Codebook`)
is here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mage_core import machine
from mage_core.machine import tf32
from mage_core.tokens import block_grid, check_tokens, code_vectors, join_ids, split_ids

FAINT = 0.05   # a difference from the background that is hardly seen, of pixels in [0, 1]


@dataclass(frozen=True)
class VQVAEConfig:
    """Sizes of a VQ-VAE; `pixel_range` is what the network sees for black and white (the public range is 0 to 1).

    `shape` is "released" or "patch"; the last six fields are those of "patch": channels of a code, residual blocks of
    3 x 3 convolutions in encoder (none: a token sees its own patch alone) and decoder, the encoder's width, the side of
    the images' common background, from which the network sees and makes differences only (0: there is none), and
    `groups`: a token can be several codes, one for each block of its patch (see `tokens`), which share a code vector's
    channels out among them. Raises ValueError, showing the number, where a size cannot be built.
    """

    channels: int
    width: int
    codebook_size: int
    down: int
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    commitment: float = 2.0
    shape: str = "released"
    code_channels: int = 16
    encoder_blocks: int = 3
    decoder_blocks: int = 3
    encoder_width: int = 64
    background: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("channels", "width", "codebook_size", "groups", "encoder_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"VQVAEConfig.{name} is {getattr(self, name)}: it must be at least 1")
        if self.shape not in ("released", "patch"):
            raise ValueError(f"VQVAEConfig.shape is {self.shape!r}: it must be 'released' or 'patch'")
        if self.shape == "patch" and not 1 <= self.code_channels <= self.channels * self.down ** 2:
            raise ValueError(f"VQVAEConfig.code_channels is {self.code_channels}: it must be 1 to the "
                             f"{self.channels * self.down ** 2} numbers of a patch")
        if self.background and (self.shape != "patch" or self.background < 0 or self.background % self.down):
            raise ValueError(f"VQVAEConfig.background is {self.background}: it must be 0, or with the shape 'patch' "
                             f"the side of the images, a multiple of {self.down}")
        if self.down not in (4, 8):
            raise ValueError(f"VQVAEConfig.down is {self.down}: the encoder shrinks images by 4 (MNIST) or 8 (CATER)")
        if self.down == 8 and self.width % 4:
            raise ValueError(f"VQVAEConfig.width is {self.width}: with down=8 it must be a multiple of 4, "
                             "the hidden width of a block being a quarter of its output")
        if self.groups > 1:
            if self.shape != "patch" or self.code_channels % self.groups:
                raise ValueError(f"VQVAEConfig.groups is {self.groups}: more than one needs the shape 'patch' and "
                                 f"code_channels that it divides, which are {self.code_channels}")
            check_tokens("VQVAEConfig", self.codebook_size, self.groups)
            block_grid(self.groups, self.down)
        low, high = self.pixel_range
        if not -1 <= low < high <= 1:
            raise ValueError(f"VQVAEConfig.pixel_range is {self.pixel_range}: it must rise and stay within -1 to 1, "
                             "the range of the decoder's tanh")
        if self.shape == "patch" and low:
            raise ValueError(f"VQVAEConfig.pixel_range is {self.pixel_range}: with the shape 'patch' it must begin at "
                             "0, for a patch that is all 0 is an empty one")

    @property
    def code_width(self) -> int:
        """Channels of a code vector."""
        if self.shape == "patch":
            return self.code_channels
        return self.width if self.down == 4 else 4 * self.width

    @property
    def tokens(self) -> int:
        """How many different tokens there are: `codebook_size`, to the power of `groups`."""
        return self.codebook_size ** self.groups


@dataclass
class VQVAEOutput:
    """What a training step sees: images (b c H W) in [0, 1], token ids (b h w), and eq. 1 term by term.

    The losses are means over all elements, in the network's pixel range; `loss` is
    reconstruction + codebook + `commitment` x commitment. `features` (n e) is what the encoder said for each of the n
    tokens, None where nothing was quantised.
    """

    reconstruction: Tensor
    token_ids: Tensor
    loss: Tensor
    reconstruction_loss: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    features: Tensor | None = None


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
        x = F.relu(x)
        return x + self.residual[1:](x)


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


# ---------------------------------------------------------------- patches: ours, quick on a CPU

class PatchResidual(nn.Module):
    """x + f(x), f being SiLU, 3 x 3, SiLU, 1 x 1; starts as x."""

    def __init__(self, width: int):
        super().__init__()
        self.residual = nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
                                      nn.SiLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


class PatchEncoder(nn.Module):
    """Each patch projected on its principal components, plus what a small network over the patch and those around adds.

    It adds nothing to an empty patch: else the tokens of still background would flicker with what moves beside it.
    Blocks see one patch further each, and the first convolution one. Without blocks it is 1 x 1 as well: a token then
    depends on its own patch alone, and where no pixel changes no token does.
    """

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        patch, width = config.channels * config.down ** 2, config.encoder_width
        reach = 3 if config.encoder_blocks else 1
        self.cut = nn.PixelUnshuffle(config.down)
        self.project = nn.Conv2d(patch, config.code_channels, 1)
        self.context = nn.Sequential(nn.Conv2d(patch, width, reach, padding=reach // 2),
                                     *(PatchResidual(width) for _ in range(config.encoder_blocks)),
                                     nn.SiLU(), nn.Conv2d(width, config.code_channels, 1))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.cut(images)
        # the nearest code is a matter of small differences
        with torch.autocast(images.device.type, enabled=False), tf32(False):
            projected = self.project(patches.float())
        filled = (patches.abs() > 1 / 512).any(1, keepdim=True)   # half a grey level
        return projected + self.context(patches).float() * filled


class PatchDecoder(nn.Module):
    """The mirror image: principal components to patches, plus a correction from the codes around."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        patch, width = config.channels * config.down ** 2, config.width
        self.project = nn.Conv2d(config.code_channels, patch, 1)
        self.context = nn.Sequential(nn.Conv2d(config.code_channels, width, 3, padding=1),
                                     *(PatchResidual(width) for _ in range(config.decoder_blocks)),
                                     nn.SiLU(), nn.Conv2d(width, patch, 1))
        self.paste = nn.PixelShuffle(config.down)

    def forward(self, codes: Tensor) -> Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            projected = self.project(codes.float())
        return self.paste(projected + self.context(codes).float())


def _patch(config: VQVAEConfig) -> tuple[nn.Module, nn.Module]:
    return PatchEncoder(config), PatchDecoder(config)


def build_autoencoder(config: VQVAEConfig) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder (b c H W) -> (b code_width h w) and decoder back, both in the network's pixel range."""
    if config.shape == "patch":
        return _patch(config)
    return _down_4(config) if config.down == 4 else _down_8(config)


# ---------------------------------------------------------------- the autoencoder

def nearest_code(features: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code: features (n e), codebook (k e) -> (n,) int64, in fp32 by one matrix product."""
    with torch.autocast(features.device.type, enabled=False):
        features, codebook = features.detach().float(), codebook.detach().float()

        # |f - c|^2 without |f|^2, which is the same for every code
        if features.is_cuda:
            length = codebook.square().sum(1)
            with tf32(False):   # a part's products take at most 1 GiB
                return torch.cat([torch.addmm(length, part, codebook.T, alpha=-2).argmin(1)
                                  for part in features.split(max(1, 2 ** 28 // len(codebook)))])
        # most patches of a picture are its empty background, like its first: one of them is enough
        same = (features == features[:1]).all(1)
        same[:1] = False
        asked = (~same).nonzero()[:, 0]
        # numpy's arg-min is vectorised, 16 times faster than torch's; a few rows at a time stay in the cache; and |c|^2
        # as one more column costs less than a bias that is copied to every row first
        rows = F.pad(features[asked], (0, 1), value=1.0)
        codes = torch.cat([-2 * codebook, codebook.square().sum(1, keepdim=True)], 1).T.contiguous()
        found = torch.from_numpy(np.concatenate([(part @ codes).numpy().argmin(1) for part in rows.split(128)]))
        return found[:1].repeat(len(features)).index_copy_(0, asked, found)


class VQVAE(nn.Module):
    """Images (b c H W) in [0, 1] <-> token ids (b h w) int64, h = H / down, w = W / down (Section 3.2, eq. 1)."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = build_autoencoder(config)
        self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.code_width))
        nn.init.uniform_(self.codebook, -1 / config.codebook_size, 1 / config.codebook_size)
        if config.background:   # (c H W) in [0, 1]
            self.register_buffer("background", torch.zeros(config.channels, config.background, config.background))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():   # what is added to a skip starts at nothing
            if isinstance(module, (PatchResidual, PatchEncoder, PatchDecoder)):
                nn.init.zeros_((module.residual if isinstance(module, PatchResidual) else module.context)[-1].weight)

    @torch.no_grad()
    def initialise(self, images: Tensor, seed: int = 0) -> None:
        """Start from data: images (b c H W) in [0, 1], a few thousand patches or more.

        The patch shape's projections become principal components, of each group's block for itself, so that it begins
        as PCA; then, for every shape, the codebook becomes the k-means centres of the encoder's features, the commonest
        one (an empty background) exactly.
        """
        images = self.to_network(images)
        # Before a background most of what differs is the rim of some shadow: left out, lest it take most of the codes.
        least = FAINT if self.config.background else 1e-3
        if self.config.shape == "patch":
            patches = rearrange(self.encoder.cut(images), "b p h w -> (b h w) p")
            some = varied(patches, least)
            patches = patches[some] if some.any() else patches   # where nothing moves, of what stands there
            mean, axes = patches.mean(0), patches.new_zeros(patches.shape[1], self.config.code_channels)
            for block, part in zip(self._blocks(), self._parts()):
                spread = (patches - mean)[:, block]
                main = torch.linalg.eigh(spread.T @ spread).eigenvectors.flip(1)
                axes[block, part] = main[:, :part.stop - part.start]
            self.encoder.project.weight.copy_(axes.T[:, :, None, None])
            self.decoder.project.weight.copy_(axes[:, :, None, None])
            self.decoder.project.bias.copy_(mean - axes @ (axes.T @ mean))
        few = images.split(64) if self.config.shape == "released" else [images]   # one of 128 x 128 takes 50 MiB there
        self._lay(torch.cat([self.features(part) for part in few]), seed, least)

    @torch.no_grad()
    def lay_codes(self, images: Iterable[Tensor], seed: int = 0, most: int | None = None) -> None:
        """The codebook becomes the k-means centres of the encoder's features of all images, batches (b c H W) in
        [0, 1], or of `most` of these features; features as they are in evaluation.

        ValueError for fewer features than codes.
        """
        training = self.encoder.training
        self.encoder.eval()
        features = torch.cat([self.features(self.to_network(batch)).float() for batch in images])
        self.encoder.train(training)
        self._lay(features, seed, FAINT if self.config.background else 1e-3, most=most)

    def _lay(self, features: Tensor, seed: int, least: float, **limit: int | None) -> None:
        vectors = rearrange(features, "b e h w -> (b h w) e").float()
        for part in self._parts():
            self.codebook[:, part] = kmeans(vectors[:, part], self.config.codebook_size, seed=seed, least=least,
                                            **limit)

    def _parts(self) -> list[slice]:
        """The channels of each group's codes."""
        each = self.config.code_width // self.config.groups
        return [slice(each * group, each * (group + 1)) for group in range(self.config.groups)]

    def _blocks(self) -> Tensor:
        """Which of a patch's numbers (c y x) are in the block of each group: (groups n)."""
        config, (rows, columns) = self.config, block_grid(self.config.groups, self.config.down)
        return rearrange(torch.arange(config.channels * config.down ** 2),
                         "(c rows y columns x) -> (rows columns) (c y x)",
                         c=config.channels, rows=rows, columns=columns, x=config.down // columns)

    # ---- public boundary: pixels in [0, 1]

    def encode(self, images: Tensor) -> Tensor:
        """Images (b c H W) in [0, 1] -> token ids (b h w); ValueError for channels or sizes that do not fit."""
        return self.encode_network(self.to_network(images))

    def decode(self, token_ids: Tensor) -> Tensor:
        """Token ids (b h w) -> images (b c H W), clipped to [0, 1]."""
        return self.from_network(self.decode_network(token_ids))

    def forward(self, images: Tensor, *, quantise: bool = True, background: Tensor | None = None) -> VQVAEOutput:
        """Images (b c H W) in [0, 1] -> reconstruction, token ids and the losses of eq. 1.

        Without `quantise` the decoder sees the features themselves: a plain autoencoder, before there is a codebook.
        `background` (b c H W) is what is behind parts of images, cut as they are; see `VQVAEConfig`.
        """
        images = self.to_network(images, background)
        features = self.features(images)
        if not quantise:
            b, _, h, w = features.shape
            reconstruction = self.decoder(features).float()
            loss, none = F.mse_loss(reconstruction, images.float()), features.new_zeros((), dtype=torch.float32)
            return VQVAEOutput(self.from_network(reconstruction.detach(), background),
                               torch.zeros(b, h, w, dtype=torch.long), loss, loss, none, none)
        token_ids = self.nearest(features)
        codes, features = self.embed(token_ids).float(), features.float()
        # straight-through: the decoder sees the code, the encoder gets the decoder's gradient
        reconstruction = self.decoder(features + (codes - features).detach()).float()
        reconstruction_loss = F.mse_loss(reconstruction, images.float())
        codebook_loss = F.mse_loss(codes, features.detach())
        commitment_loss = F.mse_loss(features, codes.detach())
        loss = reconstruction_loss + codebook_loss + self.config.commitment * commitment_loss
        return VQVAEOutput(self.from_network(reconstruction.detach(), background), token_ids, loss,
                           reconstruction_loss, codebook_loss, commitment_loss,
                           rearrange(features.detach(), "b e h w -> (b h w) e"))

    # ---- the same in the network's own pixel range

    def to_network(self, images: Tensor, background: Tensor | None = None) -> Tensor:
        """[0, 1] -> `pixel_range`, less the background where there is one."""
        low, high = self.config.pixel_range
        return (images - self._behind(images, background)) * (high - low) + low

    def from_network(self, images: Tensor, background: Tensor | None = None) -> Tensor:
        """`pixel_range` -> [0, 1], clipped, before the background where there is one."""
        low, high = self.config.pixel_range
        return ((images.float() - low) / (high - low) + self._behind(images, background)).clamp(0, 1)

    def _behind(self, images: Tensor, background: Tensor | None) -> Tensor | float:
        if not self.config.background:
            return 0.0
        if background is None and images.shape[-2:] != self.background.shape[-2:]:
            raise ValueError(f"images of shape {tuple(images.shape)}: this VQ-VAE knows the background of whole "
                             f"images, {' x '.join(map(str, self.background.shape))}; for parts of them give "
                             "`background` too")
        return self.background if background is None else background

    def encode_network(self, images: Tensor) -> Tensor:
        """Images (b c H W) in `pixel_range` -> token ids (b h w)."""
        return self.nearest(self.features(images))

    def decode_network(self, token_ids: Tensor) -> Tensor:
        """Token ids (b h w) -> images (b c H W), unclipped, nominally in `pixel_range`."""
        return self.decoder(self.embed(token_ids))

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Code vectors (b h w e), not necessarily of the codebook -> images (b c H W), clipped to [0, 1]."""
        return self.from_network(self.decoder(rearrange(codes, "b h w e -> b e h w")))

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
        vectors = rearrange(features, "b e h w -> (b h w) e")
        codes = torch.stack([nearest_code(vectors[:, part], self.codebook[:, part]) for part in self._parts()], -1)
        return rearrange(join_ids(codes, self.config.codebook_size), "(b h w) -> b h w", b=b, h=h, w=w)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids (b h w) -> code vectors (b e h w)."""
        return rearrange(code_vectors(token_ids, self.codebook, self.config.groups), "b h w e -> b e h w")

    @torch.no_grad()
    def code_pixels(self) -> Tensor:
        """Each code's pixels in its block of a patch (groups k n), as the decoder's projection alone paints them.

        ValueError for another shape than "patch", whose codes have no pixels of their own.
        """
        if self.config.shape != "patch":
            raise ValueError(f"the codes of a VQ-VAE of the shape {self.config.shape!r} have no pixels of their own: "
                             "train one of the shape 'patch', or leave MAGEConfig.advection at 0")
        weight, bias = self.decoder.project.weight[:, :, 0, 0], self.decoder.project.bias
        return torch.stack([self.codebook[:, part] @ weight[block][:, part].T + bias[block]
                            for part, block in zip(self._parts(), self._blocks())])

    def count_codes(self, token_ids: Tensor) -> Tensor:
        """How often token ids (...) hold each code: (groups k)."""
        k, groups = self.config.codebook_size, self.config.groups
        codes = split_ids(token_ids, k, groups) + k * torch.arange(groups, device=token_ids.device)
        return torch.bincount(codes.flatten(), minlength=groups * k).unflatten(0, (groups, k))


# ---------------------------------------------------------------- a codebook that stays alive

def varied(vectors: Tensor, least: float = 1e-3) -> Tensor:
    """Which vectors (n e) differ from the commonest one: (n,) bool. A background is most of an image, and one code."""
    return (vectors - vectors.median(0).values).abs().amax(1) > least


def kmeans(vectors: Tensor, k: int, *, rounds: int = 10, most: int | None = 65_536, seed: int = 0,
           least: float = 1e-3) -> Tensor:
    """k-means centres (k e) of vectors (n e), the first being the commonest vector (the median) itself.

    Lloyd's rounds over at most `most` (None: all) of the others (`varied` by `least`), drawn with `seed`; an empty
    cluster restarts on a vector that its centre serves worst. ValueError for fewer than k vectors.
    """
    if len(vectors) < k:
        raise ValueError(f"{len(vectors)} vectors cannot make {k} codes: give more images")
    draw = torch.Generator(vectors.device).manual_seed(seed)
    background, others = vectors.median(0).values, vectors[varied(vectors, least)]
    if k == 1:
        return background[None]
    if len(others) < k:
        others = vectors
    others = others[torch.randperm(len(others), generator=draw, device=vectors.device)[:most]]
    centres = others[: k - 1].clone()
    for _ in range(rounds):
        nearest = nearest_code(others, centres)
        count = torch.bincount(nearest, minlength=k - 1)
        centres = torch.zeros_like(centres).index_add_(0, nearest, others) / count.clamp_min(1)[:, None]
        empty = (count == 0).nonzero()[:, 0]
        if len(empty):
            worst = (others - centres[nearest]).square().sum(1).topk(len(empty)).indices
            centres[empty] = others[worst]
    return torch.cat([background[None], centres])


class Codebook(nn.Module):
    """Keeps a VQ-VAE's codes (of one group) at the moving mean of the features that choose them, restarts the unused.

    The exponential moving average of van den Oord et al. (2017, appendix A.1) in place of eq. 1's codebook loss: it
    follows the encoder without a learning rate of its own. A code that fewer than `rare` features chose of late
    restarts on one of the batch's features that are served worst, so that no code dies.
    """

    def __init__(self, vqvae: VQVAE, decay: float = 0.99, rare: float = 0.05, group: int = 0):
        super().__init__()
        self.decay, self.rare, self.part = decay, rare, vqvae._parts()[group]
        self.register_buffer("count", torch.empty(vqvae.config.codebook_size))
        self.register_buffer("total", torch.empty_like(vqvae.codebook[:, self.part]))
        self.restart(vqvae)

    @torch.no_grad()
    def restart(self, vqvae: VQVAE) -> None:
        """Begin again from the codebook as it is."""
        self.count.fill_(2.0)
        self.total.copy_(vqvae.codebook[:, self.part] * 2.0)

    @torch.no_grad()
    def update(self, vqvae: VQVAE, features: Tensor, token_ids: Tensor) -> None:
        """Features (n e) and the numbers (n,) of their codes in this group, from a training step, move the codebook."""
        features, codes = features[:, self.part].float(), vqvae.codebook[:, self.part]
        # bincount would wait for a GPU
        count = torch.zeros_like(self.count).index_add_(
            0, token_ids, torch.ones_like(token_ids, dtype=self.count.dtype))
        total = torch.zeros_like(self.total).index_add_(0, token_ids, features)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        if machine.waits(features.device):
            self._restart_some(codes, features, token_ids)
        elif len(rare := (self.count < self.rare).nonzero()[:, 0]):
            error = (features - codes[token_ids]).square().sum(1)
            worst = error.topk(min(4 * len(rare), len(error))).indices
            fresh = features[worst[torch.randperm(len(worst), device=worst.device)[:len(rare)]]]
            self.total[rare[:len(fresh)]], self.count[rare[:len(fresh)]] = fresh, 1.0
        codes.copy_(self.total / self.count.clamp_min(1e-6)[:, None])

    def _restart_some(self, codes: Tensor, features: Tensor, token_ids: Tensor, most: int = 64) -> None:
        """The same for the `most` rarest codes at a time, without asking how many are rare: a GPU is not waited for."""
        most = min(most, len(self.count), len(features))
        rarest = self.count.topk(most, largest=False).indices
        error = (features - codes[token_ids]).square().sum(1)
        worst = error.topk(min(4 * most, len(error))).indices
        fresh = features[worst[torch.rand(len(worst), device=worst.device).topk(most).indices]]
        rare = self.count[rarest] < self.rare
        self.total[rarest] = torch.where(rare[:, None], fresh, self.total[rarest])
        self.count[rarest] = torch.where(rare, 1.0, self.count[rarest])
