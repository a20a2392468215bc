"""Advection: most of what comes next is what the first image shows, moved (an option; not in the paper).

The axial transformer writes every token anew, and learns slowly to render what moves by part of a token. With this
option the motion anchor, once the transformer has seen it, also says of a few things how far each has moved at each
time step: the chances of every displacement along rows and along columns. The first image moved by these is what a
thing looks like then (dynamic neural advection, Finn, Goodfellow and Levine 2016). Features say which of the things a
token shows, if any, and how sure that is; a code's logit falls with its squared distance from it. A thing looks like
the mean over all displacements; in a generated video it can be where it likeliest is.

With `masks` a thing is not all of the first image but what a mask of its own cuts out of it, and all things together,
the brighter in front, make a picture that is on offer too: what two digits need, that cover one another.

    motion anchor ──where──► a few things ──how far, when──► first image (its part of it), moved ┐
    features of a token ──which, how sure───────────────────────────────────────────────────────┴─► more logits
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
    -reach ... reach pixels down, then as many to the right. With `masks`, `grid` is the rows and columns of tokens.
    """

    THINGS = 3    # that may move, each its own way
    WAVES = 32    # in which a thing's centre is told
    BLUR = 0.1    # standard deviation of a pixel from what a displacement brings there
    ASTRAY = -9.0   # log-likelihood of a token that no displacement explains
    LOOKS = 64   # tokens of a clip at which displacements are compared with the truth, for each training step
    PICTURE = 0.05   # weight of the squared error of all things together, beside nats a token

    def __init__(self, *, width: int, codebook_size: int, groups: int, patch: tuple[int, int], reach: int,
                 masks: bool = False, grid: tuple[int, int] = (16, 16)):
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
        self.masks = masks
        if not masks:
            return
        self.key, self.query = nn.Linear(width, width), nn.Linear(width + 2 * self.WAVES, width)
        self.cut = nn.Linear(width, side * side)
        self.sides = tuple(count * side for count in grid)   # of the image
        self.places = nn.Linear(4 * width, sum(self.sides) + 4 * reach)
        self.whole = nn.Linear(width, groups)   # all things together
        for linear in (self.cut, self.places, self.whole):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.ones_(self.cut.bias)

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

    def displacements(self, anchor: Tensor, token_ids: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """The motion anchor (b h w d), as the transformer has seen it, the first frame's ids (b h w), time positions
        (b t d) -> log chances of every displacement, at each time, of each thing (b t things m); what each thing is in
        the first frame (b things c H W)."""
        with torch.autocast(anchor.device.type, enabled=False):
            x, image = self.norm(anchor.float()), self.image(token_ids)
            looked = self.where(x).flatten(1, 2).softmax(1)   # (b (h w) things)
            mass = rearrange(image.abs().mean(1), "b (h y) (w x) -> b h w y x", h=x.shape[1], w=x.shape[2])
            looked_at = looked.unflatten(1, x.shape[1:3])
            centres = _centre(torch.einsum("bhwk,bhwyx->bkhy", looked_at, mass).flatten(2),
                              torch.einsum("bhwk,bhwyx->bkwx", looked_at, mass).flatten(2))
            what, things = self.what(torch.einsum("bnk,bnd->bkd", looked, x.flatten(1, 2))), image[:, None]
            if self.masks:   # then the centre is the part's own
                told = torch.cat([what, _waves(centres, self.WAVES)], -1)
                things = things * self._masks(x, told)[:, :, None]
                mass = things.abs().mean(2)
                centres = _centre(mass.sum(3), mass.sum(2))
            told = torch.cat([what, _waves(centres, self.WAVES)], -1)[:, None]
            times = self.when(times.float())[:, :, None]
            y = torch.cat([told.expand(-1, times.shape[1], -1, -1), times.expand(-1, -1, told.shape[2], -1)], -1)
            for layer in self.layers:
                y = F.silu(layer(y))
            chances = self.chances(y)
            if self.masks:
                chances = chances + self._by_place(self.places(y), centres)
            return chances.log_softmax(-1), things.expand(-1, self.THINGS, -1, -1, -1)

    def _masks(self, x: Tensor, told: Tensor) -> Tensor:
        """Features of tokens (b h w d) and of things (b things e) -> how much of a pixel is a thing's: (b things H W)
        in (0, 1). One pixel can be several things'."""
        y = F.silu(self.key(x)[:, None] + self.query(told)[:, :, None, None])
        return rearrange(self.cut(y).sigmoid(), "b k h w (y x) -> b k (h y) (w x)", y=self.side)

    def _by_place(self, places: Tensor, centres: Tensor) -> Tensor:
        """What is to be added to the chances (b t things m) where a centre's place is known, not its displacement.

        `places` (b t things n): values for a row's places from -reach to H + reach, then a column's; `centres`
        (b things 2), between two pixels the value of both.
        """
        reach, found = self.reach, []
        span = torch.arange(2 * reach + 1, device=places.device)
        for axis, part in enumerate(places.split([side + 2 * reach for side in self.sides], -1)):
            centre = centres[..., axis].clamp(0, self.sides[axis] - 1)[:, None, :, None].expand(*part.shape[:-1], 1)
            low = centre.detach().floor()
            values = F.pad(part, (0, 1))
            index = low.long() + span
            found.append(torch.lerp(values.gather(-1, index), values.gather(-1, index + 1), centre - low))
        return torch.cat(found, -1)

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

    def pictures(self, chances: Tensor, things: Tensor) -> Tensor:
        """How each thing looks at each time by chances (b t things m), from what it is in the first frame (b things c H
        W): (b t things c H W). With `masks` there is one more, the last: all of them, the brighter in front."""
        with torch.autocast(things.device.type, enabled=False):   # pixels are a matter of small differences
            down, across = chances.float()[..., None, :].chunk(2, -1)
            things = things.float()[:, None]
            found = (_shift_matrices(down, things.shape[-2]) @ things
                     + things @ _shift_matrices(across, things.shape[-1]).mT)
            return torch.cat([found, found.amax(2, keepdim=True)], 2) if self.masks else found

    def things(self, chances: Tensor, things: Tensor) -> Tensor:
        """The same, each token's pixels together: (b t h w things p)."""
        return self._patches(self.pictures(chances, things))

    def picture_error(self, chances: Tensor, things: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`things`, and the squared error of all of them together against the true frames' ids (b t h w): its sum over
        a frame's pixels, the mean over frames."""
        found = self.pictures(chances, things)
        truth = self.image(token_ids.flatten(0, 1)).unflatten(0, token_ids.shape[:2])
        return self._patches(found), (found[:, :, -1] - truth).square().flatten(2).sum(2).mean()

    def _patches(self, images: Tensor) -> Tensor:
        """Images (b t k c H W) -> their tokens' pixels (b t h w k p), block by block."""
        return rearrange(images, "b t k c (h gy y) (w gx x) -> b t h w k (gy gx c y x)",
                         **{name: size for name, size in self.layout.items() if name != "c"})

    # ---- logits

    def forward(self, features: Tensor, things: Tensor, trust: float = 1.0) -> Tensor:
        """Features (... d), what the things look like there (... things p; see `things`) -> logits (... groups k),
        `trust` times as sure as was learned."""
        with torch.autocast(features.device.type, enabled=False):
            features, things = features.float(), things.float()
            shown = self.shown(features).unflatten(-1, (self.groups, -1))
            if self.masks:
                shown = torch.cat([shown, self.whole(features)[..., None]], -1)
            shown = shown.softmax(-1)[..., 1:]
            seen = (shown.mT[..., None] * things.unflatten(-1, (self.groups, -1))).sum(-3)
            near = torch.einsum("...gn,gkn->...gk", seen, self.pixels) - 0.5 * self.pixels.square().sum(-1)
            return near * (trust * self.sure(features).clamp(max=7.0).exp())[..., None]


def _centre(rows: Tensor, columns: Tensor) -> Tensor:
    """Mass by row (... H) and by column (... W) -> the row and the column of its centre (... 2)."""
    places = [torch.arange(mass.shape[-1], device=mass.device, dtype=mass.dtype) for mass in (rows, columns)]
    return torch.stack([mass @ place / mass.sum(-1).clamp_min(1e-6)
                        for mass, place in zip((rows, columns), places)], -1)


def _waves(centres: Tensor, count: int) -> Tensor:
    """Waves of the row, then of the column, of centres (... 2): (... 2 count)."""
    return sinusoids(centres, count, 3.0, 200.0).flatten(-2)


def _shift_matrices(chances: Tensor, side: int) -> Tensor:
    """Chances of -reach ... reach pixels (... m) -> matrices (... side side): row i has at j the chance of i - j."""
    beyond = side - 1 - chances.shape[-1] // 2
    place = torch.arange(side, device=chances.device)
    return F.pad(chances, (beyond, beyond))[..., place[:, None] - place + side - 1]
