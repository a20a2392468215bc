"""Advection: most of what comes next is what the first image shows, moved (an option; not in the paper).

The axial transformer writes every token anew, and learns slowly to render what moves by part of a token. With this
option the motion anchor, once the transformer has seen it, also says of a few things how far each has moved at each
time step: the chances of every displacement along rows and along columns. The first image moved by these is what a
thing looks like then (dynamic neural advection, Finn, Goodfellow and Levine 2016). Features say which of the things a
token shows, if any, and how sure that is; a code's logit falls with its squared distance from it. A thing looks like
the mean over all displacements; in a generated video it can be at one place, where the error expected is least.

With `masks` a thing is not all of the first image but what a mask of its own cuts out of it, and all things together,
the brighter in front, make a picture that is on offer too: what two digits need, that cover one another. With `unet`
each thing is what one phrase of the caption names, cut out by a U-Net that sees the first image itself, and the last is
the rest of it, which stays where it is (see `phrases`); the motion anchor is then not asked, the words are read anew,
each phrase by itself, and a clip's displacements cost so little that training can show many. What the U-Net saw of a
thing corrects the thing's centre, as votes do (Hough forests, Gall and Lempitsky 2009): where something is covered, the
centre of what is left of it is elsewhere. With `window` it takes a closer look at each thing besides (see `closer`),
and how a thing moves is a mean over guesses at its centre. A video of Modified Moving MNIST ends when its last digit
rests, and which of its frames a clip shows hangs on that: there each thing also says when it comes to rest, and where
it is in a clip is a mean over all lengths that the video may have. What the U-Net finds is not quite the same when the
image is a pixel or two elsewhere: for a generated video it can look several times, each at the image shifted, and the
mean counts (test-time augmentation).

    motion anchor ──where──► a few things ──how far, when──► first image (its part of it), moved ┐
    features of a token ──which, how sure───────────────────────────────────────────────────────┴─► more logits
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mage_core.axial import sinusoids
from mage_core.closer import CloserLook
from mage_core.motion_anchor import CrossAttention
from mage_core.phrases import PHRASES, PhraseUNet, phrases_of
from mage_core.tokens import block_grid, split_ids


@dataclass(frozen=True)
class CaptionSizes:
    """What is to be known of captions to look for their phrases: sizes, and the ids of padding and of the word at which
    a phrase begins."""

    vocabulary_size: int
    context_length: int
    pad_id: int
    separator: int


class Displaced(NamedTuple):
    """Where things are: log `chances` of every displacement, at each time, of each thing (b t things m), and what the
    `things` are in the first frame (b things c H W). With a U-Net the logits of all `words` at each place (b v H/8
    W/8); with `longest` the log chances that the video ends after 1, 2 ... frames (b longest). What was `told` of the
    things that may move (b things d), their centres (b things 2) and the times (b t d). With `window` the `guesses` at
    these: log chances of rows and of columns, and which these are (b things 2 k); a centre is the likeliest."""

    chances: Tensor
    things: Tensor
    words: Tensor | None = None
    endings: Tensor | None = None
    told: tuple[Tensor, Tensor, Tensor] | None = None
    guesses: tuple[Tensor, Tensor] | None = None


class Advection(nn.Module):
    """Displacements from the motion anchor, and logits of codes from what is displaced.

    `patch` is a token's (channels, side in pixels), `reach` the longest displacement in pixels, `pixels` (groups k n)
    each code's pixels (`VQVAE.code_pixels`), which whoever makes the model fills in. Below, m counts displacements:
    -reach ... reach pixels down, then as many to the right. With `masks`, `grid` is the rows and columns of tokens, and
    `unet` the width of the U-Net that looks for the phrases of a `language`, 0 where features of tokens make masks, and
    `window` > 0 the side of those in which it takes a closer look;
    `longest` > 0 are the most frames of a video, where it is asked how many one has.
    """

    THINGS = PHRASES + 1   # that may move, each its own way; with a U-Net what phrases name, and the rest of the image
    WAVES = 32    # in which a thing's centre is told
    BLUR = 0.1    # standard deviation of a pixel from what a displacement brings there
    ASTRAY = -9.0   # log-likelihood of a token that no displacement explains
    LOOKS = 64   # tokens of a clip at which displacements are compared with the truth, for each training step
    PICTURE = 0.05   # weight of the squared error of all things together, beside nats a token
    NAMED = (0.05, 0.2)   # with `unet` that weight, and the one of the nats by which a caption's words are missed
    TRIED, SLACK = 12, 0.5   # displacements compared with what is seen, and the standard deviation of a pixel there
    CENTRE = 0.5   # weight of how far off centres are, in squared pixels, or of the nats by which guesses miss
    OFFSETS, ABOUT = 3, 2.0   # pixels by which a centre is tried elsewhere, and the standard deviation expected
    GUESSED = 3    # likeliest guesses at a row, or a column, that displacements are a mean over
    STILL = -30.0  # log chance of a displacement of what stays where it is
    SHIFT = 3      # pixels along each axis, the most by which an image is shifted to be looked at once more
    ENDING = 0.3   # weight of the nats by which a video's number of frames is missed, where it is asked
    ANY = 1e-3     # the chance that a video ends just anywhere

    def __init__(self, *, width: int, codebook_size: int, groups: int, patch: tuple[int, int], reach: int,
                 masks: bool = False, grid: tuple[int, int] = (16, 16), unet: int = 0, window: int = 0,
                 longest: int = 0, head_width: int = 8, language: CaptionSizes | None = None):
        super().__init__()
        self.language = language if unet else None
        (channels, side), self.reach, self.codebook_size, self.groups = patch, reach, codebook_size, groups
        rows, columns = block_grid(groups, side)
        self.side, self.layout = side, {"gy": rows, "gx": columns, "c": channels, "y": side // rows,
                                        "x": side // columns}
        self.register_buffer("pixels", torch.zeros(groups, codebook_size, channels * side * side // groups))
        self.masks, hidden = masks, (2 if unet else 4) * width
        self.what, self.when = (nn.LayerNorm(width) for _ in range(2))
        self.norm, self.where = (None, None) if unet else (nn.LayerNorm(width), nn.Linear(width, self.THINGS))
        self.layers = nn.ModuleList([nn.Linear(2 * width + 2 * self.WAVES, hidden), nn.Linear(hidden, hidden)])
        self.chances = nn.Linear(hidden, 2 * (2 * reach + 1))
        self.shown = nn.Linear(width, groups * (self.THINGS + 1))   # nothing of these, or one of the things
        self.sure = nn.Linear(width, 1)
        _fresh((self.where, width ** -0.5), (self.shown, 0.1 * width ** -0.5), (self.chances, 0.0), (self.sure, 0.0))
        self.unet, self.closer, self.ends = None, None, None
        if not masks:
            return
        if unet:
            self.asked = nn.Parameter(torch.randn(1, width))   # of a phrase's words
            self.words, self.read = nn.LayerNorm(width), CrossAttention(width, head_width, 0.0)
            self.unet = PhraseUNet(channels, unet, language.vocabulary_size)
            if window:
                self.closer = CloserLook(channels, unet, 2 * unet, language.vocabulary_size, window)
            self.word_vectors = nn.Embedding(language.vocabulary_size, width)
            self.word_places = nn.Embedding(language.context_length, width)
            self.meant = nn.LayerNorm(width)
            self.votes = nn.Linear(unet, 2)   # how far a thing's centre is from what is seen of it
            _fresh((self.votes, 0.0))
            if longest:
                self.ends = nn.Sequential(nn.Linear(width + 2 * self.WAVES, width), nn.SiLU(), nn.Linear(width, width),
                                          nn.SiLU(), nn.Linear(width, longest))
                _fresh((self.ends[-1], 0.0))
        else:
            self.key, self.query = nn.Linear(width, width), nn.Linear(width + 2 * self.WAVES, width)
            self.cut = nn.Linear(width, side * side)
            _fresh((self.cut, 0.0))
            nn.init.ones_(self.cut.bias)
        self.sides = tuple(count * side for count in grid)   # of the image
        self.places = nn.Linear(hidden, sum(self.sides) + 4 * reach)
        self.whole = nn.Linear(width, groups)   # all things together
        _fresh((self.places, 0.0), (self.whole, 0.0))

    def taught_apart(self) -> list[nn.Parameter]:
        """The parameters that learn from the displacement loss alone: with masks all but those of the logits."""
        return [parameter for name, parameter in self.named_parameters()
                if self.masks and name.partition(".")[0] not in ("shown", "sure", "whole")]

    def inner_convolutions(self) -> list[nn.Parameter]:
        """The weights of the U-Net's convolutions, and of the closer look's, but for those that make logits."""
        return [weight for part in (self.unet, self.closer) if part is not None for weight in part.inner_convolutions()]

    # ---- pixels

    def patches(self, token_ids: Tensor) -> Tensor:
        """Token ids (...) -> the pixels of their codes (... p), block by block."""
        codes = split_ids(token_ids, self.codebook_size, self.groups)
        return self.pixels[torch.arange(self.groups, device=codes.device), codes].flatten(-2)

    def image(self, token_ids: Tensor) -> Tensor:
        """Token ids (b h w) -> their pixels, each in its place (b c H W)."""
        return rearrange(self.patches(token_ids), "b h w (gy gx c y x) -> b c (h gy y) (w gx x)", **self.layout)

    def brought(self, image: Tensor, tokens: Tensor) -> Tensor:
        """What every displacement of images (b c H W) brings to some tokens (b n), counted row by row: their pixels
        (b n c m y x). What comes from outside is empty."""
        side, reach, found = self.side, self.reach, []
        clip, columns = torch.arange(len(tokens), device=tokens.device)[:, None], image.shape[3] // side
        places = (tokens // columns, tokens % columns)
        for axis, border in ((2, (0, 0, reach, reach)), (3, (reach, reach, 0, 0))):
            lengths = [side, side]
            lengths[axis - 2] += 2 * reach
            strips = F.pad(image, border).unfold(2, lengths[0], side).unfold(3, lengths[1], side)
            strips = strips[clip, :, places[0], places[1]]   # (b n c length side), of columns (b n c side length)
            found.append(rearrange(strips.unfold(axis + 1, side, 1), "b n c m x y -> b n c m y x" if axis == 2 else
                                   "b n c y m x -> b n c m y x").flip(3))
        return torch.cat(found, 3)

    # ---- displacements

    def displacements(self, anchor: Tensor | None, token_ids: Tensor, times: Tensor, text_ids: Tensor | None = None,
                      shift: tuple[int, int] = (0, 0)) -> Displaced:
        """The motion anchor (b h w d), as the transformer has seen it, the first frame's ids (b h w), time positions
        (b t d) -> where things are at each time. With `unet` the captions' ids (b l) are asked for in place of the
        anchor, and the U-Net sees the image by `shift` pixels farther down and to the right (see `shifts`)."""
        with torch.autocast(token_ids.device.type, enabled=False):
            image, words, endings, guesses = self.image(token_ids), None, None, None
            if self.unet is not None:
                what, centres, things, words, guesses = self._cut_out(text_ids, _shifted(image, *shift))
                away = torch.tensor(shift, dtype=centres.dtype, device=centres.device)
                centres, guesses = centres - away, guesses and (guesses[0], guesses[1] - away[:, None])
                things = _shifted(things, -shift[0], -shift[1])
            else:
                what, centres, things = self._found(anchor.float(), image)
            if self.ends is not None:
                endings = self._endings(torch.cat([what, _waves(centres, self.WAVES)], -1))
            times = self.when(times.float())
            chances = self._moved(what, centres, times) if guesses is None else self._by_guesses(what, guesses, times)
            if self.unet is not None:   # what no phrase names stays where it is
                still = torch.full_like(chances[:, :, :1], self.STILL)
                still[..., self.reach] = 0.0
                chances = torch.cat([chances, still], 2)
            return Displaced(chances, things.expand(-1, self.THINGS, -1, -1, -1), words,
                             endings, (what, centres, times), guesses)

    def _moved(self, what: Tensor, centres: Tensor, times: Tensor) -> Tensor:
        """What things are (b things d), where (b things 2), and times (b t d) -> log chances (b t things m)."""
        told = torch.cat([what, _waves(centres, self.WAVES)], -1)[:, None]
        times = times[:, :, None]
        y = torch.cat([told.expand(-1, times.shape[1], -1, -1), times.expand(-1, -1, told.shape[2], -1)], -1)
        for layer in self.layers:
            y = F.silu(layer(y))
        chances = self.chances(y)
        if self.masks:
            chances = chances + self._by_place(self.places(y), centres)
        return chances.log_softmax(-1)

    def _by_guesses(self, what: Tensor, guesses: tuple[Tensor, Tensor], times: Tensor) -> Tensor:
        """`_moved`, the mean over the `GUESSED` likeliest guesses at centres: over rows of how far a thing moves down,
        over columns of how far to the right, since where it is along one axis says nothing of the other."""
        likely, best = guesses[0].topk(self.GUESSED, -1)
        centres = guesses[1].gather(-1, best)
        moved = torch.stack([self._moved(what, centres[..., k], times) for k in range(self.GUESSED)])
        likely = rearrange(likely, "b n side k -> k b 1 n side 1")
        return (moved.unflatten(-1, (2, -1)) + likely).logsumexp(0).flatten(-2).log_softmax(-1)

    def _endings(self, told: Tensor) -> Tensor:
        """What is told of things that may move (b things e) -> log chances of how many frames a video has (b longest):
        each thing comes to rest in one of them, by itself, and the last of them ends it."""
        over = self.ends(told).softmax(-1).cumsum(-1).prod(1)
        ends_here = over.diff(dim=1, prepend=torch.zeros_like(over[:, :1]))
        return ((1 - self.ANY) * ends_here.clamp_min(0) + self.ANY / over.shape[1]).log()

    @staticmethod
    def mixed(displaced: Displaced, frames: Tensor) -> Displaced:
        """Displacements in every frame of a video (b longest things m), frames (b longest t) of the video that a clip
        shows, if that has 1, 2 ... `longest` frames -> displacements at each time of the clip (b t things m)."""
        lengths = displaced.endings.softmax(1)[:, :, None].expand(frames.shape)
        shares = torch.zeros(len(frames), frames.shape[2], frames.shape[1], device=frames.device)
        shares = shares.scatter_add(2, frames.mT, lengths.mT)   # of a frame at a time
        chances = torch.einsum("btf,bfkm->btkm", shares, displaced.chances.exp())
        return displaced._replace(chances=chances.clamp_min(1e-30).log())

    @classmethod
    def shifts(cls, looks: int) -> list[tuple[int, int]]:
        """Pixels down and to the right by which an image is shifted for each of so many looks at it. They are spread
        evenly: rows in equal steps, columns by the golden ratio; one alone is not shifted."""
        golden = (5 ** 0.5 - 1) / 2
        return [tuple(round(cls.SHIFT * (2 * place - 1)) for place in ((k + 0.5) / looks, (0.5 + k * golden) % 1))
                for k in range(looks)]

    @staticmethod
    def together(looks: Sequence[Displaced]) -> Displaced:
        """What several looks at the same images find, on average: chances, things, and when videos end."""
        def mean(chances: Sequence[Tensor]) -> Tensor:
            return torch.stack(chances).logsumexp(0) - math.log(len(chances))

        endings = None if looks[0].endings is None else mean([look.endings for look in looks])
        return Displaced(mean([look.chances for look in looks]), torch.stack([look.things for look in looks]).mean(0),
                         endings=endings)

    @torch.no_grad()
    def least_error(self, chances: Tensor, things: Tensor) -> Tensor:
        """One displacement for each thing (b things c H W) at each time, from chances (b t things m): that at which its
        picture has the least squared error on average, as 1 among 0 (b t things m).

        A thing's pictures at d and d' differ by twice its autocorrelation at 0 less that at d - d'. Many neighbours
        that are likely together can thus outweigh a likelier one far from them. Without `unet` it is the likeliest: on
        Single Moving MNIST there was nothing to gain (notebooks/search_log.md).
        """
        if self.unet is not None:
            with torch.autocast(things.device.type, enabled=False):
                reach, zeros = self.reach, torch.zeros(2 * self.reach + 1, dtype=torch.long, device=things.device)
                along = torch.arange(-reach, reach + 1, device=things.device)
                down, across = torch.cat([along, zeros]), torch.cat([zeros, along])
                sides = [side + 2 * reach for side in things.shape[-2:]]
                alike = torch.fft.irfft2(torch.fft.rfft2(things.float(), s=sides).abs().square().sum(2), s=sides)
                alike = alike[:, :, (down[:, None] - down) % sides[0], (across[:, None] - across) % sides[1]]
                chances = torch.einsum("btkm,bkmn->btkn", chances.float(), alike)
        return F.one_hot(chances.argmax(-1), chances.shape[-1]).float()

    def _found(self, anchor: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where the anchor (b h w d) of images (b c H W) looks: what is there (b things d), the centres (b things 2),
        and the things (b things c H W), or (b 1 c H W) where all are the whole image."""
        x = self.norm(anchor)
        looked = self.where(x).flatten(1, 2).softmax(1)   # (b (h w) things)
        mass = rearrange(image.abs().mean(1), "b (h y) (w x) -> b h w y x", h=x.shape[1], w=x.shape[2])
        looked_at = looked.unflatten(1, x.shape[1:3])
        centres = _centre(torch.einsum("bhwk,bhwyx->bkhy", looked_at, mass).flatten(2),
                          torch.einsum("bhwk,bhwyx->bkwx", looked_at, mass).flatten(2))
        what, things = self.what(torch.einsum("bnk,bnd->bkd", looked, x.flatten(1, 2))), image[:, None]
        if self.masks:   # then the centre is the part's own
            things = things * self._masks(x, torch.cat([what, _waves(centres, self.WAVES)], -1))[:, :, None]
            mass = things.abs().mean(2)
            centres = _centre(mass.sum(3), mass.sum(2))
        return what, centres, things

    def _cut_out(self, text_ids: Tensor,
                 image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """What each phrase of captions (b l) names in images (b c H W), and the rest of them among things, the last: as
        `_found`, the logits of every word at each place, and the guesses at centres (`Displaced`).

        How a thing moves is for words to say, not for its looks: told by these as well, with its true centre, it was 5
        pixels off or more in one case of 20, and by words alone in one of 500 (notebooks/search_log.md).
        """
        language = self.language
        phrases, places = phrases_of(text_ids, language.separator, language.pad_id)
        features, masks, logits = self.unet(image, text_ids, phrases)
        seen, centres = _looks(image[:, None] * masks[:, :, None], features)
        centres, guesses = centres + self.votes(seen), None
        if self.closer is not None:
            telling = phrases * self.unet.skill()[text_ids][:, None]
            masks, *guesses = self.closer(image, masks, features, centres, text_ids, telling)
            centres = guesses[1].gather(-1, guesses[0].argmax(-1, keepdim=True))[..., 0]   # the likeliest
        things = image[:, None] * torch.cat([masks, (1 - masks).prod(1, keepdim=True)], 1)[:, :, None]
        everything = (text_ids != language.pad_id)[:, None]   # a phrase without words is told all
        heard = torch.where(phrases.any(2, keepdim=True), phrases, everything)
        bias = torch.zeros(heard.shape, device=image.device).masked_fill_(~heard, float("-inf"))[:, None]
        words = self.words(self.word_vectors(text_ids) + self.word_places(places))
        meant = self.meant(self.read(self.asked.expand(len(words), 1, PHRASES, -1), words, bias)[:, 0])
        return self.what(meant), centres, things, logits, guesses

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

    def misses(self, chances: Tensor, image: Tensor, token_ids: Tensor, dice: Tensor | None = None) -> Tensor:
        """How badly log chances (b t things m) of how the first image (b c H W) is displaced explain the true ids
        (b t h w): nats a token.

        Each token's pixels are a mixture of what all things' displacements bring there, or come from nowhere. Of each
        clip some tokens that are not background are asked, those with the highest `dice` (b t h w) in [0, 1).
        """
        dice = torch.rand(token_ids.shape, device=chances.device) if dice is None else dice
        drawn = torch.where(token_ids != 0, dice.to(chances.dtype), -1.0).flatten(1)
        drawn, picked = drawn.topk(min(self.LOOKS, drawn.shape[1]))   # (b n)
        tokens = token_ids[0, 0].numel()
        there = self.brought(image, picked % tokens)
        truth = rearrange(self.patches(token_ids.flatten(1).gather(1, picked)),
                          "b n (gy gx c y x) -> b n c 1 (gy y) (gx x)", **self.layout)
        apart = (there - truth).square().sum((2, 4, 5))
        clip = torch.arange(len(picked), device=picked.device)[:, None]
        fits = chances[clip, picked // tokens] - apart[:, :, None] / (2 * self.BLUR ** 2)   # (b n things m)
        fits = fits.flatten(2).logsumexp(2) - math.log(fits.shape[2])   # each thing as likely
        fits = torch.logaddexp(fits, torch.full_like(fits, self.ASTRAY))
        asked = drawn >= 0
        return -((fits * asked).sum(1) / asked.sum(1).clamp_min(1)).mean()

    def pictures(self, chances: Tensor, things: Tensor) -> Tensor:
        """How each thing looks at each time by chances (b t things m), from what it is in the first frame (b things c H
        W): (b t things c H W). With `masks` there is one more, the last: all of them, the brighter in front."""
        with torch.autocast(things.device.type, enabled=False):   # pixels are a matter of small differences
            down, across = chances.float().chunk(2, -1)
            things = things.float()[:, None]
            found = (_sliding(down[..., None, :], things.shape[-2]) @ things.flip(-2)
                     + things.flip(-1) @ _sliding(across[..., None, :], things.shape[-1]).mT)
            return torch.cat([found, found.amax(2, keepdim=True)], 2) if self.masks else found

    def off_centre(self, displaced: Displaced, frames: Tensor, seen: Tensor) -> Tensor:
        """How far the centres of what phrases name are from where displacements say that they are: half the squared
        pixels, the mean over clips; or the nats by which guesses at centres miss it.

        `seen` are the chances of displacements in some of the frames (b s things m), once it is seen where things are
        (`explained`). A centre a pixel off has others: of some offsets, up to `OFFSETS` pixels along either axis, those
        that make what was seen likely count. Within half a pixel the gradient through waves says it better, and beyond
        says nothing. Guesses are taught what they are once that is seen (expectation and maximisation, as in
        `explained`).
        """
        centres = displaced.told[1].detach()
        if displaced.guesses is not None:
            likely, places = displaced.guesses
            fits = self._fits(displaced, frames, seen, places)
            return -((likely.detach() + fits).softmax(-1) * likely).sum((1, 2, 3)).mean()
        offsets = torch.arange(-self.OFFSETS, self.OFFSETS + 1, device=centres.device)
        fits = self._fits(displaced, frames, seen, centres[..., None] + offsets)
        off = ((fits - 0.5 * (offsets / self.ABOUT).square()).softmax(-1) * offsets).sum(-1)
        target = centres + off * (off.abs() > 0.5)
        return 0.5 * (displaced.told[1] - target).square().sum((1, 2)).mean()

    @torch.no_grad()
    def _fits(self, displaced: Displaced, frames: Tensor, seen: Tensor, places: Tensor) -> Tensor:
        """How likely, in nats, what is seen (b s things m) of displacements in some frames would be if one coordinate
        of a centre were another, each of those in `places` (b things 2 k): the same shape."""
        what, centres, times = displaced.told
        seen, fits = seen[:, :, :PHRASES], torch.empty_like(places)
        with torch.autocast(what.device.type, enabled=False):
            for axis in range(2):
                for k in range(places.shape[-1]):
                    elsewhere = centres.clone()
                    elsewhere[..., axis] = places[:, :, axis, k]
                    found = self._moved(what, elsewhere, times[:, frames])
                    fits[:, :, axis, k] = (seen * found.clamp_min(self.ASTRAY)).sum((1, 3))
        return fits

    def error(self, misses: Tensor, picture: Tensor, displaced: Displaced, text_ids: Tensor,
              lengths: Tensor | None, off_centre: Tensor | None) -> Tensor:
        """What is minimised: `misses` and the `picture_error`, each by its weight. With `unet` also the words missed,
        and how far centres are `off_centre`, and as long as none of a phrase's words (b l) is known, little else; where
        it is asked how many frames a video has (b,), the nats by which that is missed."""
        if displaced.words is None:
            return misses + self.PICTURE * picture
        if displaced.endings is not None:
            misses = misses + self.ENDING * F.nll_loss(displaced.endings, lengths - 1)
        inside, _ = phrases_of(text_ids, self.language.separator, self.language.pad_id)
        known = (inside * self.unet.skill()[text_ids][:, None]).amax(2).mean()
        return ((0.1 + 0.9 * known) * (misses + self.NAMED[0] * picture + self.CENTRE * off_centre)
                + self.NAMED[1] * self.unet.word_loss(displaced.words, text_ids))

    def picture_error(self, chances: Tensor, things: Tensor,
                      token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """`pictures`, and the squared error of all of them together against the true frames' ids (b t h w): its sum
        over a frame's pixels, the mean over frames. With `unet` that of pictures by where things are seen to be, and
        these chances as well: masks learn little where a thing is not, and displacements do not learn from pictures.
        """
        found = self.pictures(chances, things)
        truth = self.image(token_ids.flatten(0, 1)).unflatten(0, token_ids.shape[:2])
        seen = self.explained(chances, things, truth) if self.unet is not None else None
        pictures = found if seen is None else self.pictures(seen, things)
        return found, (pictures[:, :, -1] - truth).square().flatten(2).sum(2).mean(), seen

    @torch.no_grad()
    def explained(self, chances: Tensor, things: Tensor, truth: Tensor) -> Tensor:
        """Chances of displacements (b t things m) once it is seen where the things (b things c H W) then are in the
        true frames (b t c H W), of the `TRIED` that were likeliest: brighter things can cover it, but where it is, no
        frame is darker than it (the expectation step of Dempster, Laird and Rubin 1977)."""
        chances, rest = chances.split([PHRASES, chances.shape[2] - PHRASES], 2)   # what no phrase names stays as it is
        reach, things, (b, _, count) = self.reach, things[:, :PHRASES], chances.shape[:3]
        likely, tried = chances.clamp_min(1e-9).log().topk(min(self.TRIED, chances.shape[-1]), -1)
        far, axis = tried % (2 * reach + 1) - reach, tried // (2 * reach + 1)
        windows = F.pad(things, 4 * (reach,)).unfold(3, things.shape[3], 1).unfold(4, things.shape[4], 1)
        clip, thing = (torch.arange(size, device=things.device) for size in (b, count))
        moved = windows[clip[:, None, None, None], thing[:, None], :, reach - far * (axis == 0),
                        reach - far * (axis == 1)]   # (b t things tried c H W)
        over = (moved - truth[:, :, None, None]).relu().square().flatten(4).sum(4)
        likely = (likely - over / (2 * self.SLACK ** 2)).softmax(-1)
        return torch.cat([torch.zeros_like(chances).scatter(-1, tried, likely), rest], 2)

    def cut_up(self, images: Tensor) -> Tensor:
        """Images (b t k c H W) -> their tokens' pixels (b t h w k p), block by block."""
        return rearrange(images, "b t k c (h gy y) (w gx x) -> b t h w k (gy gx c y x)",
                         **{name: size for name, size in self.layout.items() if name != "c"})

    def things(self, chances: Tensor, things: Tensor) -> Tensor:
        """`pictures`, each token's pixels together: (b t h w things p)."""
        return self.cut_up(self.pictures(chances, things))

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


def _fresh(*linears: tuple[nn.Linear | None, float]) -> None:
    """Normal weights of a standard deviation, no bias, for each layer that there is."""
    for linear, std in linears:
        if linear is not None:
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)


def _centre(rows: Tensor, columns: Tensor) -> Tensor:
    """Mass by row (... H) and by column (... W) -> the row and the column of its centre (... 2)."""
    places = [torch.arange(mass.shape[-1], device=mass.device, dtype=mass.dtype) for mass in (rows, columns)]
    return torch.stack([mass @ place / mass.sum(-1).clamp_min(1e-6)
                        for mass, place in zip((rows, columns), places)], -1)


def _looks(things: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of features (b k d H/2 W/2) over each thing (b k c H W) by its light (b k d), and the thing's centre of
    mass (b k 2)."""
    mass = things.abs().mean(2)
    shares = F.avg_pool2d(mass, 2)
    shares = shares / shares.sum((2, 3), keepdim=True).clamp_min(1e-3)
    return torch.einsum("bkyx,bkdyx->bkd", shares, features), _centre(mass.sum(3), mass.sum(2))


def _waves(centres: Tensor, count: int) -> Tensor:
    """Waves of the row, then of the column, of centres (... 2): (... 2 count)."""
    return sinusoids(centres, count, 3.0, 200.0).flatten(-2)


def _shifted(images: Tensor, down: int, right: int) -> Tensor:
    """Images (... H W) farther down and to the right by so many pixels; what comes from outside is empty."""
    return F.pad(images, (right, -right, down, -down))


def _sliding(chances: Tensor, side: int) -> Tensor:
    """Chances of -reach ... reach pixels (... m) -> (... side side): row i has at j the chance of i + j - (side - 1),
    which shifts what is given in reverse order. A view: its gradient on a GPU needs no sort."""
    beyond = side - 1 - chances.shape[-1] // 2
    return F.pad(chances, (beyond, beyond)).unfold(-1, side, 1)
