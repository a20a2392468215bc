"""Advection: most of what comes next is what the first image shows, moved (an option; not in the paper).

The axial transformer writes every token anew, and learns slowly to render what moves by part of a token. With this
option the motion anchor, once the transformer has seen it, also says of a few things how far each has moved at each
time step: the chances of every displacement along rows and along columns. The first image moved by these is what a
thing looks like then (dynamic neural advection, Finn, Goodfellow and Levine 2016). Features say which of the things a
token shows, if any, and how sure that is; a code's logit falls with its squared distance from it. A thing looks like
the mean over all displacements; in a generated video it can be where it likeliest is.

    motion anchor ──where──► a few things ──how far, when──► first image, moved ┐
    features of a token ──which, how sure───────────────────────────────────────┴─► more logits for its codes
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mage_core.axial import sinusoids
from mage_core.tokens import block_grid, split_ids


class Advection(nn.Module):
    """Displacements from the motion anchor, and logits of codes from what is displaced.

    `patch` is a token's (channels, side in pixels), `reach` the longest displacement in pixels, `pixels` (groups k n)
    each code's pixels (`VQVAE.code_pixels`), which whoever makes the model fills in. Below, m counts displacements:
    -reach ... reach pixels down, then as many to the right.
    """

    THINGS = 3    # that may move, each its own way
    WAVES = 32    # in which a thing's centre is told
    BLUR = 0.1    # standard deviation of a pixel from what a displacement brings there
    ASTRAY = -9.0   # log-likelihood of a token that no displacement explains
    LOOKS = 64   # tokens of a clip at which displacements are compared with the truth, for each training step

    def __init__(self, *, width: int, codebook_size: int, groups: int, patch: tuple[int, int], reach: int):
        super().__init__()
        (channels, side), self.reach, self.codebook_size, self.groups = patch, reach, codebook_size, groups
        rows, columns = block_grid(groups, side)
        self.side, self.layout = side, {"gy": rows, "gx": columns, "c": channels, "y": side // rows,
                                        "x": side // columns}
        self.register_buffer("pixels", torch.zeros(groups, codebook_size, channels * side * side // groups))
        self.norm, self.what, self.when = (nn.LayerNorm(width) for _ in range(3))
        self.where = nn.Linear(width, self.THINGS)
        self.layers = nn.ModuleList([nn.Linear(2 * width + 2 * self.WAVES, 4 * width),
                                     nn.Linear(4 * width, 4 * width)])
        self.chances = nn.Linear(4 * width, 2 * (2 * reach + 1))
        self.shown = nn.Linear(width, groups * (self.THINGS + 1))   # nothing of these, or one of the things
        self.sure = nn.Linear(width, 1)
        for linear, std in ((self.where, width ** -0.5), (self.shown, 0.1 * width ** -0.5), (self.chances, 0.0),
                            (self.sure, 0.0)):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    # ---- pixels

    def patches(self, token_ids: Tensor) -> Tensor:
        """Token ids (...) -> the pixels of their codes (... p), block by block."""
        codes = split_ids(token_ids, self.codebook_size, self.groups)
        return self.pixels[torch.arange(self.groups, device=codes.device), codes].flatten(-2)

    def image(self, token_ids: Tensor) -> Tensor:
        """Token ids (b h w) -> their pixels, each in its place (b c H W)."""
        return rearrange(self.patches(token_ids), "b h w (gy gx c y x) -> b c (h gy y) (w gx x)", **self.layout)

    def moved(self, token_ids: Tensor) -> Tensor:
        """The patches of an image's ids (b h w) after every displacement (b m h w p); what comes from outside is
        empty."""
        image, parts = self.image(token_ids), []
        steps = torch.arange(-self.reach, self.reach + 1, device=image.device)
        for axis, border in ((2, (0, 0, self.reach, self.reach)), (3, (self.reach, self.reach, 0, 0))):
            places = torch.arange(0, image.shape[axis], self.side, device=image.device)
            starts = (places + self.reach - steps[:, None]).flatten()
            cut = F.pad(image, border).unfold(axis, self.side, 1).index_select(axis, starts)
            cut = cut.unflatten(axis, (len(steps), len(places)))
            if axis == 2:
                parts.append(rearrange(cut, "b c m h (w x) y -> b m h w c y x", x=self.side))
            else:
                parts.append(rearrange(cut, "b c (h y) m w x -> b m h w c y x", y=self.side))
        return rearrange(torch.cat(parts, 1), "b m h w c (gy y) (gx x) -> b m h w (gy gx c y x)",
                         gy=self.layout["gy"], gx=self.layout["gx"])

    # ---- displacements

    def displacements(self, anchor: Tensor, token_ids: Tensor, times: Tensor) -> Tensor:
        """The motion anchor (b h w d), as the transformer has seen it, the first frame's ids (b h w), time positions
        (b t d) -> log chances of every displacement, at each time, of each thing (b t things m)."""
        with torch.autocast(anchor.device.type, enabled=False):
            x = self.norm(anchor.float())
            looked = self.where(x).flatten(1, 2).softmax(1)   # (b (h w) things)
            told = [self.what(torch.einsum("bnk,bnd->bkd", looked, x.flatten(1, 2))), *self._centres(looked, token_ids)]
            told, times = torch.cat(told, -1)[:, None], self.when(times.float())[:, :, None]
            y = torch.cat([told.expand(-1, times.shape[1], -1, -1), times.expand(-1, -1, told.shape[2], -1)], -1)
            for layer in self.layers:
                y = F.silu(layer(y))
            return self.chances(y).log_softmax(-1)

    def _centres(self, looked: Tensor, token_ids: Tensor) -> list[Tensor]:
        """Waves of the row and of the column of the centre of mass of what is looked at: two of (b things waves)."""
        h, w = token_ids.shape[1:]
        looked = looked.unflatten(1, (h, w))
        mass = rearrange(self.image(token_ids).abs().mean(1), "b (h y) (w x) -> b h w y x", h=h, w=w)
        waves = []
        for profile in (torch.einsum("bhwk,bhwyx->bkhy", looked, mass), torch.einsum("bhwk,bhwyx->bkwx", looked, mass)):
            profile = profile.flatten(2)
            places = torch.arange(profile.shape[-1], device=profile.device, dtype=profile.dtype)
            waves.append(sinusoids((profile @ places) / profile.sum(-1).clamp_min(1e-6), self.WAVES, 3.0, 200.0))
        return waves

    def misses(self, chances: Tensor, moved: Tensor, token_ids: Tensor, dice: Tensor | None = None) -> Tensor:
        """How badly log chances (b t things m) of the `moved` first frame explain the true ids (b t h w): nats a token.

        Each token's pixels are a mixture of what all things' displacements bring there, or come from nowhere. Of each
        clip some tokens that are not background are asked, those with the highest `dice` (b t h w) in [0, 1).
        """
        dice = torch.rand(token_ids.shape, device=moved.device) if dice is None else dice
        drawn = torch.where(token_ids != 0, dice.to(moved.dtype), -1.0).flatten(1)
        drawn, picked = drawn.topk(min(self.LOOKS, drawn.shape[1]))   # (b n)
        clip, tokens = torch.arange(len(picked), device=picked.device)[:, None], token_ids[0, 0].numel()
        there = rearrange(moved, "b m h w p -> b (h w) m p")[clip, picked % tokens]
        apart = (there - self.patches(token_ids.flatten(1).gather(1, picked))[:, :, None]).square().sum(-1)
        fits = chances[clip, picked // tokens] - apart[:, :, None] / (2 * self.BLUR ** 2)   # (b n things m)
        fits = fits.flatten(2).logsumexp(2) - math.log(fits.shape[2])   # each thing as likely
        fits = torch.logaddexp(fits, torch.full_like(fits, self.ASTRAY))
        asked = drawn >= 0
        return -((fits * asked).sum(1) / asked.sum(1).clamp_min(1)).mean()

    def things(self, chances: Tensor, moved: Tensor) -> Tensor:
        """What each thing looks like by chances (b t things m) of the `moved` first frame: (b t h w things p)."""
        with torch.autocast(moved.device.type, enabled=False):   # pixels are a matter of small differences
            found = chances.flatten(1, 2).float() @ moved.flatten(2).float()
        return rearrange(found, "b (t k) (h w p) -> b t h w k p", t=chances.shape[1], h=moved.shape[2],
                         w=moved.shape[3])

    # ---- logits

    def forward(self, features: Tensor, things: Tensor, trust: float = 1.0) -> Tensor:
        """Features (... d), what the things look like there (... things p) -> logits (... groups k), `trust` times as
        sure as was learned."""
        with torch.autocast(features.device.type, enabled=False):
            features, things = features.float(), things.float()
            shown = self.shown(features).unflatten(-1, (self.groups, -1)).softmax(-1)[..., 1:]
            seen = (shown.mT[..., None] * things.unflatten(-1, (self.groups, -1))).sum(-3)
            near = torch.einsum("...gn,gkn->...gk", seen, self.pixels) - 0.5 * self.pixels.square().sum(-1)
            return near * (trust * self.sure(features).clamp(max=7.0).exp())[..., None]
