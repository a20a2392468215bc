"""MAGE: an image's tokens and a caption to the tokens of a video (Section 3, Fig. 2).

    token ids ──embedding──► first frame ──motion anchor──► anchor ┐
                        └──► all frames ───────────────────────────┴─► axial transformer ──► next frames' token ids
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mage_core import machine
from mage_core.advection import Advection, CaptionSizes, Displaced
from mage_core.axial import AxialTransformer, FrameCache, QuickMLP, sampled_frames, sinusoids
from mage_core.motion_anchor import MotionAnchor, Posterior, TextEncoder, kl_from_normal, padding_bias
from mage_core.phrases import SHRINKS
from mage_core.tokens import block_grid, check_tokens, code_vectors, join_ids, split_ids


@dataclass(frozen=True)
class MAGEConfig:
    """Sizes and options of a MAGE; the defaults are the released ones.

    The last eighteen options are ours and by default leave the released model as it is: `shift_attention` and
    `time_bias` (see `axial`), `speed_frequencies` > 0 lets the speed vector have waves of eta, `intervals` (frames from
    one sampled frame to the next at speeds 0 and 1) puts the time that has passed into the time positions, to the frame
    with `video_length` (the frames of the dataset's videos, where all have as many), `hidden_token` adds a token for
    what is not known, so that training can hide frames, and with `groups` a token is several codes (see `tokens`):
    their embeddings are added up, and each has logits of its own. With `advection`, the longest displacement in pixels,
    the model moves what the first frame shows (see `advection`); `patch` is then a token's channels and side in pixels,
    with `trust` > 1 what moves is at one place in generation (`Advection.least_error`), and is trusted so many times as
    much as was learned, and with `masks` each thing that moves is a part of the first frame, not all of it; `unet` > 0
    is the width of a U-Net that cuts out what each phrase of the caption names, and `phrases` the id of the word at
    which one begins (see `phrases`), and with `window` > 0, its side in pixels, each thing is looked at more closely in
    a window around it (see `closer`); `longest` > 0 are the most frames of a video, where those of videos differ and it
    is asked when the things that a caption names come to rest. `looks` says how often generation has the U-Net look at
    the first frame, shifted each time, for a mean of what it finds; `still` > 0 by how many nats generation takes it to
    be likelier than the logits say that a token, as a whole, is the first frame's (`with_still`). An `autoregressive`
    model, as the released one is, sees in generation the frames that it has made; another one sees hidden tokens in
    their place, so that every frame is what the motion anchor and the first frame say.

    `stochastic` adds eq. 4's posterior and eq. 5's AdaIN; `speed_loss` adds eq. 7's alpha term to the deterministic
    loss too. Raises ValueError, showing the number.
    """

    codebook_size: int
    rows: int
    columns: int
    clip_length: int
    width: int
    vocabulary_size: int
    context_length: int
    head_width: int = 32
    text_layers: int = 2
    anchor_layers: int = 1
    axial_layers: int = 6
    dropout: float = 0.1
    stochastic: bool = False
    latent_channels: int = 64
    alpha: float = 0.001
    beta: float = 0.00025
    pad_id: int = 0
    speed_loss: bool = False
    shift_attention: bool = False
    time_bias: bool = False
    speed_frequencies: int = 0
    intervals: tuple[float, float] | None = None
    video_length: int | None = None
    hidden_token: bool = False
    groups: int = 1
    advection: int = 0
    patch: tuple[int, int] | None = None
    trust: float = 1.0
    masks: bool = False
    unet: int = 0
    window: int = 0
    phrases: int = 0
    longest: int = 0
    looks: int = 1
    still: float = 0.0
    autoregressive: bool = True

    def __post_init__(self) -> None:
        for name in ("codebook_size", "rows", "columns", "width", "vocabulary_size", "context_length", "head_width",
                     "anchor_layers", "axial_layers", "latent_channels", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"MAGEConfig.{name} is {getattr(self, name)}: it must be at least 1")
        check_tokens("MAGEConfig", self.codebook_size, self.groups)
        if self.width % self.head_width:
            raise ValueError(f"MAGEConfig.width is {self.width}: it must be a multiple of head_width {self.head_width}")
        if self.axial_layers % 3:
            raise ValueError(f"MAGEConfig.axial_layers is {self.axial_layers}: a block is three layers, "
                             "for time, height and width, so that it must be a multiple of 3")
        if not 2 <= self.clip_length <= 16:
            raise ValueError(f"MAGEConfig.clip_length is {self.clip_length}: it must be 2 to 16 frames, "
                             "what four halvings of time make one step")
        if self.stochastic and self.width % 16:
            raise ValueError(f"MAGEConfig.width is {self.width}: a stochastic model normalises in 16 groups "
                             "and needs a multiple of 16")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"MAGEConfig.dropout is {self.dropout}: it must be in [0, 1)")
        if not 0 <= self.pad_id < self.vocabulary_size:
            raise ValueError(f"MAGEConfig.pad_id is {self.pad_id}: the vocabulary has {self.vocabulary_size} words")
        if self.text_layers < 0 or self.speed_frequencies < 0:
            raise ValueError(f"MAGEConfig.text_layers is {self.text_layers} and speed_frequencies "
                             f"{self.speed_frequencies}: neither may be negative")
        if self.intervals is not None and not 0 < self.intervals[0] <= self.intervals[1]:
            raise ValueError(f"MAGEConfig.intervals is {self.intervals}: it must rise from above 0")
        if self.video_length is not None and (self.intervals is None or self.video_length < 1):
            raise ValueError(f"MAGEConfig.video_length is {self.video_length}: it must be at least 1 and needs "
                             f"intervals, which are {self.intervals}")
        if self.advection and (self.patch is None or min(self.patch) < 1):
            raise ValueError(f"MAGEConfig.advection is {self.advection} and patch {self.patch}: what is to be moved by "
                             "pixels needs a token's channels and side in pixels, such as (1, 4)")
        if self.trust < 1:
            raise ValueError(f"MAGEConfig.trust is {self.trust}: it must be at least 1, which is as was learned")
        if self.looks < 1 or self.looks > 1 and not self.unet:
            raise ValueError(f"MAGEConfig.looks is {self.looks} and unet {self.unet}: a U-Net looks at the first frame "
                             "once or more; without one leave it at 1")
        if not 0 <= self.still < 100:
            raise ValueError(f"MAGEConfig.still is {self.still}: it must be 0 or more nats, and less than 100")
        if not (self.autoregressive or self.hidden_token):
            raise ValueError(f"MAGEConfig.autoregressive is {self.autoregressive} and hidden_token "
                             f"{self.hidden_token}: a model that does not see its own frames needs a token in their "
                             "place; set hidden_token, or leave autoregressive True")
        if self.advection:
            block_grid(self.groups, self.patch[1])
            side = min(self.rows, self.columns) * self.patch[1]
            if not 0 < self.advection < side:
                raise ValueError(f"MAGEConfig.advection is {self.advection}: it must be 0, for none, or less than the "
                                 f"{side} pixels of an image's side")
        if bool(self.unet) != bool(self.phrases) or self.unet < 0 or not 0 <= self.phrases < self.vocabulary_size:
            raise ValueError(f"MAGEConfig.unet is {self.unet} and phrases {self.phrases}: a U-Net of a width above 0 "
                             "looks for what phrases name, each of which begins at a word, so that there must be both "
                             f"or neither, and the word one of {self.vocabulary_size}")
        if self.unet:
            if not (self.advection and self.masks) or self.phrases == self.pad_id:
                raise ValueError(f"MAGEConfig.unet is {self.unet}, advection {self.advection}, masks {self.masks} and "
                                 f"phrases {self.phrases}: a U-Net makes the masks of what is moved by pixels and "
                                 f"needs both, and padding ({self.pad_id}) begins no phrase")
            sides = (self.rows * self.patch[1], self.columns * self.patch[1])
            if any(side % SHRINKS for side in sides):
                raise ValueError(f"MAGEConfig.unet is {self.unet} for images of {sides[0]} x {sides[1]}: their sides "
                                 f"must be multiples of {SHRINKS}")
            if self.window % SHRINKS or not 0 <= self.window <= min(sides):
                raise ValueError(f"MAGEConfig.window is {self.window} for images of {sides[0]} x {sides[1]}: the side "
                                 f"of a window must be a multiple of {SHRINKS} that fits in, or 0 for none")
        elif self.window:
            raise ValueError(f"MAGEConfig.window is {self.window} and unet 0: a closer look is taken at what a U-Net "
                             "has cut out; set unet too, or leave window at 0")
        if self.longest and (self.longest < 2 or not self.unet or self.intervals is None or self.video_length):
            raise ValueError(f"MAGEConfig.longest is {self.longest}, unet {self.unet}, intervals {self.intervals} and "
                             f"video_length {self.video_length}: how many frames a video has is asked of what phrases "
                             "name, so that it needs a U-Net, intervals, 2 frames or more, and no one length of all")

    @property
    def hidden_id(self) -> int:
        """The id that stands for a token that is not known; ValueError for a model without one."""
        if not self.hidden_token:
            raise ValueError("this model has no hidden token: make it with MAGEConfig(hidden_token=True)")
        return self.codebook_size ** self.groups


@dataclass
class MAGEOutput:
    """logits (b t-1 h w k), or (b t-1 h w groups k), of frames 2 to t, the motion anchor (b h w d), and eq. 7 term by
    term (scalars).

    `loss` is what the released code minimises: prediction + beta KL + alpha speed term where the model is stochastic,
    the prediction alone where it is not (unless `speed_loss`). With `advection`, `displacement_loss` is added.
    """

    logits: Tensor
    motion_anchor: Tensor
    loss: Tensor
    prediction_loss: Tensor
    kl_loss: Tensor
    speed_loss: Tensor
    displacement_loss: Tensor


class VisualTokens(nn.Module):
    """Token ids (b t h w) -> vectors (b t h w d): embedding, 3 x 3 convolution in each frame,
    rows' and columns' places. A token of several codes is the sum of their vectors."""

    def __init__(self, codebook_size: int, rows: int, columns: int, width: int, *, groups: int = 1,
                 hidden_token: bool = False):
        super().__init__()
        self.codebook_size, self.groups = codebook_size, groups
        self.embedding = nn.Parameter(torch.randn(codebook_size * groups + hidden_token, width) * 0.02)
        self.convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.row_positions = nn.Parameter(torch.randn(1, rows, 1, width) * width ** -0.5)
        self.column_positions = nn.Parameter(torch.randn(1, 1, columns, width) * width ** -0.5)
        self.table: Tensor | None = None

    @torch.no_grad()
    def tabulate(self) -> None:
        """Replace embedding and convolution by a table of what each token adds to each of its nine neighbours.

        For a model that is only used: nine rows are read where nine matrices were multiplied.
        """
        table = torch.einsum("oiyx,ki->yxko", self.convolution.weight, self.embedding)
        self.table = F.pad(table, (0, 0, 0, 1)).flatten(0, 2)   # after each place's ids, a row of zeros for the outside

    def rows(self, token_ids: Tensor) -> Tensor:
        """Token ids (...) -> the rows of the embedding (... groups) that they are the sum of."""
        codes = split_ids(token_ids, self.codebook_size, self.groups)
        if self.groups == 1:
            return codes
        rows = codes + self.codebook_size * torch.arange(self.groups, device=codes.device)
        hidden = token_ids == self.codebook_size ** self.groups
        return rows.masked_fill(hidden[..., None], self.codebook_size * self.groups)

    def embed(self, token_ids: Tensor) -> Tensor:
        """The bare embedding, which the posterior reads."""
        if self.groups == 1:
            return F.embedding(token_ids, self.embedding)
        rows = self.rows(token_ids).flatten(0, -2)
        if machine.waits(rows.device):   # a GPU's gradient of an embedding takes what has the same id one after another
            width = -(-len(self.embedding) // 8) * 8
            counts = self.embedding.new_zeros(len(rows), width)
            counts.scatter_add_(1, rows, torch.ones_like(rows, dtype=counts.dtype))
            x = counts @ F.pad(self.embedding, (0, 0, 0, width - len(self.embedding)))
        else:
            x = F.embedding_bag(rows, self.embedding, mode="sum")
        return x.unflatten(0, token_ids.shape)

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.table is not None:
            near = rearrange(self.rows(token_ids), "b t h w groups -> b t groups h w")
            near = F.pad(near, (1, 1, 1, 1), value=len(self.embedding)).unfold(3, 3, 1).unfold(4, 3, 1).flatten(5)
            rows = near + torch.arange(9, device=near.device) * (len(self.embedding) + 1)
            rows = rearrange(rows, "b t groups h w nine -> (b t h w) (groups nine)")
            x = F.embedding_bag(rows, self.table, mode="sum").unflatten(0, token_ids.shape)
            return x + self.row_positions + self.column_positions
        x = rearrange(self.embed(token_ids), "b t h w d -> (b t) d h w")
        x = rearrange(self.convolution(x), "(b t) d h w -> b t h w d", t=token_ids.shape[1])
        return x + self.row_positions + self.column_positions


class MAGE(nn.Module):
    """Image and caption to video, in tokens (Section 3)."""

    def __init__(self, config: MAGEConfig):
        super().__init__()
        self.config = config
        self._copy: tuple | None = None
        shared = {"width": config.width, "head_width": config.head_width, "dropout": config.dropout}
        self.visual_tokens = VisualTokens(config.codebook_size, config.rows, config.columns, config.width,
                                          groups=config.groups, hidden_token=config.hidden_token)
        self.text_encoder = TextEncoder(vocabulary_size=config.vocabulary_size, context_length=config.context_length,
                                        layers=config.text_layers, pad_id=config.pad_id, **shared)
        self.motion_anchor = MotionAnchor(layers=config.anchor_layers,
                                          latent_channels=config.latent_channels if config.stochastic else None,
                                         speed_frequencies=config.speed_frequencies, **shared)
        self.posterior = Posterior(config.width, config.latent_channels) if config.stochastic else None
        self.generator = AxialTransformer(layers=config.axial_layers, clip_length=config.clip_length,
                                          rows=config.rows, columns=config.columns,
                                          codebook_size=config.codebook_size * config.groups,
                                          intervals=config.intervals, video_length=config.video_length,
                                          shift_attention=config.shift_attention, time_bias=config.time_bias, **shared)
        self.advection = Advection(width=config.width, codebook_size=config.codebook_size, groups=config.groups,
                                   patch=config.patch, reach=config.advection, masks=config.masks,
                                   grid=(config.rows, config.columns), unet=config.unet, window=config.window,
                                   longest=config.longest, head_width=config.head_width,
                                   language=CaptionSizes(config.vocabulary_size, config.context_length, config.pad_id,
                                                     config.phrases)) if config.advection else None

    # ---- training

    def forward(self, token_ids: Tensor, text_ids: Tensor, speed: Tensor, *, target_ids: Tensor | None = None,
                frames: Tensor | None = None, predict: Tensor | None = None, weight: Tensor | None = None,
                posterior_noise: Tensor | None = None, dice: Tensor | None = None,
                more: tuple[Tensor, Tensor, Tensor] | None = None, lengths: Tensor | None = None) -> MAGEOutput:
        """Teacher forcing: token ids (b t h w), caption ids (b l) padded with `pad_id`, speed (b,) -> losses, logits.

        `target_ids` (b t h w) are the true ones where `token_ids` were corrupted on purpose. `frames` (s,), rising from
        0, are the input frames to use where not all t-1 are; `predict` (b s h w) bool the tokens of the frames after
        them that the loss is taken over: then the logits are theirs alone, (n k). `weight` (b s h w) weighs each
        token's loss instead, all of them being summed: shapes then depend on nothing that was drawn. `posterior_noise`
        (b c h w), drawn where not given, is the standard normal noise of a stochastic model. With `advection`, `more`
        are clips (token ids, text ids, speed) of which displacements alone are learned, and `dice` is that of
        `Advection.misses`, for all clips; with `longest`, `lengths` are the numbers of frames of their videos.
        ValueError for shapes that do not fit.
        """
        config = self.config
        self._check(token_ids, text_ids, speed, posterior_noise)
        if token_ids.shape[1] < 2:
            raise ValueError("token ids hold 1 frame: training predicts frame 2 from frame 1 and needs both")
        target_ids = token_ids if target_ids is None else target_ids
        if target_ids.shape != token_ids.shape:
            raise ValueError(f"target ids have the shape {tuple(target_ids.shape)}: they are the true frames of token "
                             f"ids {tuple(token_ids.shape)}, first frame included")
        asked = target_ids[:, 1:].shape if frames is None else (len(token_ids), len(frames), *token_ids.shape[2:])
        for name, given in (("predict", predict), ("weight", weight)):
            if given is not None and tuple(given.shape) != tuple(asked):
                raise ValueError(f"{name} has the shape {tuple(given.shape)}: it must be that of the tokens of the "
                                 f"frames that are asked for, {tuple(asked)}")
        r, kl_loss = None, token_ids.new_zeros((), dtype=torch.float32)
        if self.posterior is not None:
            mean, log_variance = self.posterior(self.visual_tokens.embed(target_ids))
            noise = torch.randn_like(mean) if posterior_noise is None else posterior_noise
            r, kl_loss = mean + noise * (0.5 * log_variance).exp(), kl_from_normal(mean, log_variance)

        frames = torch.arange(token_ids.shape[1] - 1, device=token_ids.device) if frames is None else frames
        targets, places, n = target_ids[:, frames + 1].flatten(), None, None
        if predict is not None:
            places = predict.flatten().nonzero()[:, 0]
            if not (n := len(places)):
                raise ValueError("predict marks no token: there is nothing to learn")
            places = F.pad(places, (0, -n % 128))   # few sizes: a CPU compiles a matrix product for every new one
            targets = targets[places]
        features, anchor = self._features(token_ids[:, frames], text_ids, speed, r, frames, places=places)
        things, displacement_loss = None, torch.zeros_like(kl_loss)
        if self.advection is not None:
            things, displacement_loss = self._learn_displacements(anchor, target_ids, text_ids, speed, frames, dice,
                                                                  more, lengths)
            things = things if places is None else things.flatten(0, 3).index_select(0, places)
        logits = self._logits(features, things)
        prediction_loss = token_loss(logits.reshape(-1, config.codebook_size), self._codes(targets).flatten(),
                                     n if n is None else n * config.groups,
                                     weight if weight is None else weight.flatten().repeat_interleave(config.groups))
        if weight is None:   # the mean over codes; a token's loss is the sum of its codes'
            prediction_loss = prediction_loss * config.groups
        logits = logits[:n]
        speed_loss = self.motion_anchor.speed_vector(speed).float().square().sum(1).mean()
        loss = prediction_loss + displacement_loss
        if config.stochastic:
            loss = loss + config.beta * kl_loss
        if config.stochastic or config.speed_loss:
            loss = loss + config.alpha * speed_loss
        return MAGEOutput(logits, anchor, loss, prediction_loss, kl_loss, speed_loss, displacement_loss)

    def _features(self, token_ids: Tensor, text_ids: Tensor, speed: Tensor, r: Tensor | None,
                  frames: Tensor, **asked: int | Tensor | None) -> tuple[Tensor, Tensor]:
        """Features (b s h w d) of the input frames' ids (b s h w), which lie at `frames` in the clip, and the anchor.

        What is `asked` for (see `AxialTransformer.forward`) can be less than all of them.
        """
        embedded = self.visual_tokens(token_ids)
        anchor = self.anchor(embedded[:, 0], text_ids, speed, r)
        return self.generator(anchor, embedded, speed=speed, steps=F.pad(frames + 1, (1, 0)), **asked), anchor

    def anchor(self, first_frame: Tensor, text_ids: Tensor, speed: Tensor, r: Tensor | None = None, *,
               return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The motion anchor (b h w d) of an embedded first frame (b h w d); see `MotionAnchor.forward`."""
        return self.motion_anchor(first_frame, self.text_encoder(text_ids), padding_bias(text_ids, self.config.pad_id),
                                  speed, r, return_attention=return_attention)

    @torch.no_grad()
    def guess(self, token_ids: Tensor, text_ids: Tensor, speed: Tensor, frames: Tensor, last: int) -> Tensor:
        """The likeliest ids (b last h w) of the frames after the last few of the input frames;
        arguments as `forward`."""
        r = torch.randn(len(token_ids), *self.noise_shape, device=speed.device) if self.config.stochastic else None
        features, anchor = self._features(token_ids[:, frames], text_ids, speed, r, frames, last=last)
        things = self._things(anchor, token_ids[:, 0], text_ids, speed)
        return self._likeliest(self._logits(features, things if things is None else things[:, frames[-last:]]))

    def displacements(self, anchor: Tensor | None, first_token_ids: Tensor, text_ids: Tensor, speed: Tensor,
                      lengths: Tensor | None = None, looks: int = 1) -> Displaced:
        """The motion anchor (b h w d), the first frame's ids (b h w), caption ids (b l), speed (b,) -> where the things
        that move are in frames 2 to T. With `unet` the anchor is not asked, and the image can be looked at more than
        once (`Advection.together`). With `longest`, and no `lengths` (b,) of videos given, displacements are the mean
        over all that they may have. ValueError for a model without advection."""
        if self.advection is None:
            raise ValueError("this model moves nothing by pixels: make it with MAGEConfig(advection=..., patch=...)")
        if looks > 1 and self.config.unet:
            found = [self._displacements(anchor, first_token_ids, text_ids, speed, lengths, shift)
                     for shift in self.advection.shifts(looks)]
            return self.advection.together(found)
        return self._displacements(anchor, first_token_ids, text_ids, speed, lengths)

    def _displacements(self, anchor: Tensor | None, first_token_ids: Tensor, text_ids: Tensor, speed: Tensor,
                       lengths: Tensor | None, shift: tuple[int, int] = (0, 0)) -> Displaced:
        """`displacements` as one look, at the image shifted, finds them."""
        if self.config.longest and lengths is None:   # in every frame that videos have; then which are shown
            b, every = len(speed), torch.arange(self.config.longest, device=speed.device)
            times = self.generator.passed(every.expand(b, -1))
            displaced = self.advection.displacements(None, first_token_ids, times, text_ids, shift)
            frames = self._frames_shown((every + 1).repeat(b), speed.repeat_interleave(len(every)))
            return self.advection.mixed(displaced, frames.unflatten(0, (b, -1)))
        if self.config.longest:   # in the frames that a clip of such a video shows
            times = self.generator.passed(self._frames_shown(lengths, speed))
            return self.advection.displacements(None, first_token_ids, times, text_ids, shift)
        # of videos that all have one length, or where nobody asks
        steps = torch.arange(1, self.config.clip_length, device=first_token_ids.device)
        times = self.generator.positions(steps, speed)[..., 0, 0, :].expand(len(first_token_ids), -1, -1)
        anchor = None if self.config.unet else self.generator.look(anchor, speed)
        return self.advection.displacements(anchor, first_token_ids, times, text_ids, shift)

    def _frames_shown(self, lengths: Tensor, speed: Tensor) -> Tensor:
        """Which frames of videos of so many (n,) clips at speeds (n,) show, the first left out: (n t-1)."""
        return sampled_frames(lengths, speed, self.config.intervals, self.config.clip_length)[:, 1:]

    def _things(self, anchor: Tensor, first_token_ids: Tensor, text_ids: Tensor, speed: Tensor, *,
                looks: int = 1, at_one_place: bool = False) -> Tensor | None:
        """What moves, as it looks in frames 2 to T (b T-1 h w things p), after so many looks at the first, on average
        or `at_one_place`; None without advection."""
        if self.advection is None:
            return None
        chances, things, *_ = self.displacements(anchor, first_token_ids, text_ids, speed, looks=looks)
        chances = self.advection.least_error(chances.exp(), things) if at_one_place else chances.exp()
        return self.advection.things(chances, things)

    def _learn_displacements(self, anchor: Tensor, token_ids: Tensor, text_ids: Tensor, speed: Tensor, frames: Tensor,
                             dice: Tensor | None, more: tuple[Tensor, Tensor, Tensor] | None,
                             lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """`_things` of clips (b t h w) in the frames after `frames`, and the displacement loss of these clips and
        `more`."""
        count, advection = len(token_ids), self.advection
        if more is not None:
            more_ids, more_text, more_speed = more
            if not self.config.unet:
                first = self.visual_tokens(more_ids[:, :1])[:, 0]
                anchor = torch.cat([anchor, self.anchor(first, more_text, more_speed)])
            token_ids, speed = torch.cat([token_ids, more_ids]), torch.cat([speed, more_speed])
            text_ids = torch.cat([text_ids, more_text])
        if self.config.longest and (lengths is None or len(lengths) != len(speed)):
            given = "no" if lengths is None else len(lengths)
            raise ValueError(f"{given} lengths of videos are given for {len(speed)} clips: this model learns how many "
                             "frames each has, so give them all")
        displaced = self.displacements(anchor, token_ids[:, 0], text_ids, speed,
                                       lengths if self.config.longest else None)
        chances, things = displaced.chances[:, :token_ids.shape[1] - 1], displaced.things
        then = token_ids[:, 1:]
        loss = advection.misses(chances, advection.image(token_ids[:, 0]), then, dice)
        if not self.config.masks:
            return advection.things(chances[:count, frames].exp(), things[:count]), loss
        pictures, error, seen = advection.picture_error(chances[:, frames].exp(), things, then[:, frames])
        off = advection.off_centre(displaced, frames, seen) if seen is not None else None
        # displacements and masks learn from their own losses alone, in which `more` clips have a part
        return advection.cut_up(pictures[:count].detach()), advection.error(loss, error, displaced, text_ids,
                                                                                 lengths, off)

    def _logits(self, features: Tensor, things: Tensor | None = None, trust: float = 1.0) -> Tensor:
        """Features (... d), what things look like there (... things p), trusted more or less -> logits (... k), or of
        several groups (... groups k)."""
        logits, groups = self.generator.logits(features), self.config.groups
        logits = logits.unflatten(-1, (groups, -1))
        if things is not None:
            logits = logits + self.advection(features, things, trust)
        return logits.flatten(-2) if groups == 1 else logits

    def _codes(self, token_ids: Tensor) -> Tensor:
        return split_ids(token_ids, self.config.codebook_size, self.config.groups)

    def _likeliest(self, logits: Tensor) -> Tensor:
        """The likeliest token ids of `_logits`."""
        found = likeliest(logits)
        return found if self.config.groups == 1 else join_ids(found, self.config.codebook_size)

    # ---- generation

    @torch.no_grad()
    def generate(self, first_token_ids: Tensor, text_ids: Tensor, speed: Tensor, *,
                 prior_noise: Tensor | None = None, recompute: bool = False,
                 codes: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """First frame's token ids (b h w), caption ids (b l), speed (b,) -> the clip's token ids (b T h w), T frames.

        Every frame is the arg-max given the ones before it (of a model that is not `autoregressive`, given the first
        alone) and is computed once; `recompute` is the slow reference that computes all of them again at every step.
        `prior_noise` (b c h w) is the standard normal r of a stochastic model, drawn where not given. Dropout is off.
        With `codes` (k e), the VQ-VAE's codebook, also the mean code (b T h w e) of each token's likely ids
        (`likely_mean`): a picture of small squared error where the model is not sure. What is fed back is the arg-max
        all the same. ValueError for shapes that do not fit together.
        """
        training = self.training
        try:
            model = self.eval() if recompute else self.eval().in_bf16()
            with nullcontext() if model is self else torch.autocast("cpu", enabled=False):
                return model._generate(first_token_ids[:, None], text_ids, speed, prior_noise, recompute, codes)
        finally:
            self.train(training)

    def train(self, mode: bool = True) -> MAGE:
        """As ever; and a copy `in_bf16` is forgotten, for torch's fused optimisers change weights and no version."""
        if mode:
            self._copy = None
        return super().train(mode)

    def in_bf16(self) -> MAGE:
        """This model's copy in bf16 where autocast asks for bf16 on a CPU, kept until a weight changes or training goes
        on; else itself.

        Autocast would convert every weight for every video.
        """
        if not (torch.is_autocast_enabled("cpu") and self.visual_tokens.embedding.device.type == "cpu"
                and torch.get_autocast_dtype("cpu") == torch.bfloat16):
            return self
        now = [(tensor.data_ptr(), tensor._version) for tensor in (*self.parameters(), *self.buffers())]
        if self._copy is None or self._copy[0] != now:
            self._copy = None
            made = copy.deepcopy(self).requires_grad_(False)
            made.visual_tokens.tabulate()
            for module in made.modules():
                if isinstance(module, QuickMLP):
                    module.fold()
            made = made.bfloat16()
            made.visual_tokens.table = made.visual_tokens.table.bfloat16()
            made.advection = copy.deepcopy(self.advection)   # pixels are a matter of small differences
            for linear in (module for module in made.modules() if isinstance(module, nn.Linear)):
                linear.weight.data = linear.weight.data.t().contiguous().t()   # the order in which products read it
            self._copy = now, made   # in a tuple, so that it is no part of this module
        self._copy[1].config = self.config   # what concerns generation alone can have changed
        return self._copy[1]

    def _generate(self, token_ids: Tensor, text_ids: Tensor, speed: Tensor, r: Tensor | None,
                  recompute: bool, codes: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
        config = self.config
        self._check(token_ids, text_ids, speed, r)
        if r is None and config.stochastic:
            r = torch.randn(len(token_ids), *self.noise_shape, device=token_ids.device)
        first = self.visual_tokens(token_ids)
        anchor = self.anchor(first[:, 0], text_ids, speed, r)

        cache = None if recompute else FrameCache(config.clip_length)
        things = self._things(anchor, token_ids[:, 0], text_ids, speed, looks=config.looks,
                              at_one_place=config.trust > 1)
        start = self._codes(token_ids[:, :1])
        new, given, seen, made = first, anchor, token_ids, [token_ids]
        means = [] if codes is None else [code_vectors(token_ids, codes.float(), config.groups)]
        for number in range(config.clip_length - 1):
            features = self.generator(given, new, cache, speed=speed, last=None if recompute else 1)
            logits = self._logits(features[:, -1:], None if things is None else things[:, number:number + 1],
                                  config.trust)
            if config.still:
                logits = with_still(logits, start, config.still)
            made.append(self._likeliest(logits))
            if codes is not None:
                means.append(likely_mean(logits, codes.float(), config.groups))
            shown = made[-1] if config.autoregressive else torch.full_like(token_ids, config.hidden_id)
            if recompute:
                seen = torch.cat([seen, shown], 1)
                new = self.visual_tokens(seen)
            else:
                new, given = self.visual_tokens(shown), None
        ids = torch.cat(made, 1)
        return ids if codes is None else (ids, torch.cat(means, 1))

    # ---- a start that knows something

    @torch.no_grad()
    def start_from(self, other: MAGE, words: Sequence[str], other_words: Sequence[str]) -> None:
        """Take over another model's weights, one of the same tokens and sizes whose captions (and length of videos)
        may be others.

        `words` and `other_words` are the two vocabularies, in order: a word known to both keeps its vector, and so does
        each place in a caption that both have. What only this model knows stays as it is, `advection`, its masks or its
        U-Net where the other has none among it. ValueError for models that differ in anything else.
        """
        check_start(self.config, other.config)
        known = {word: number for number, word in enumerate(other_words)}
        both = [(number, known[word]) for number, word in enumerate(words) if word in known]
        own, theirs = self.state_dict(), {}
        for name, tensor in other.state_dict().items():
            part, stays = name.startswith("advection."), own.get(name)
            if part and stays is None:
                continue
            tensor = tensor.to(self.visual_tokens.embedding.device)
            if name in self.BY_WORD:
                mixed = stays.clone()
                for ours, its in both:
                    mixed[ours] = tensor[its]
                tensor = mixed
            elif name in self.BY_PLACE:
                length = min(len(stays), len(tensor))
                tensor = torch.cat([tensor[:length], stays[length:]])
            elif part and tensor.shape != stays.shape:
                continue
            theirs[name] = tensor
        self.load_state_dict(own | theirs)

    # what has a row for each word of the vocabulary, or for each place in a caption
    BY_WORD = ("text_encoder.words", "advection.word_vectors.weight", "advection.unet.word.weight",
               "advection.unet.word.bias", "advection.unet.share", "advection.unet.cost")
    BY_PLACE = ("text_encoder.positions", "advection.word_places.weight")
    GAIN, SHARPNESS, COPY = 4.0, 3.0, 0.05

    @torch.no_grad()
    def initialise_from_codes(self, codes: Tensor, seed: int = 0) -> None:
        """Start with what is known of the tokens: codes (k e), the VQ-VAE's codebook, the commonest code first.

        A subspace of the residual stream holds a token's code vector: the embedding writes it there, the logits read
        it (their arg-max is the nearest code), and every attention head can carry it from one place to another.
        Positions start as sinusoids. Training is free to change all of it. ValueError for another number of codes.
        """
        config, width = self.config, self.config.width
        if codes.shape[0] != config.codebook_size:
            raise ValueError(f"{codes.shape[0]} codes given: this model's codebook has {config.codebook_size}")
        draw = torch.Generator().manual_seed(seed)
        codes = codes.float().cpu() - codes[:1].float().cpu()
        each = codes.shape[1] // config.groups   # a group's codes have numbers in its own channels alone
        codes = torch.cat([F.pad(part, (each * group, codes.shape[1] - each * (group + 1)))
                           for group, part in enumerate(codes.split(each, 1))])
        room = min(config.head_width // 2, *codes.shape)
        if codes.shape[1] > room:   # the directions in which codes differ most
            codes = codes @ torch.linalg.svd(codes, full_matrices=False).Vh[:room].T
        codes = codes * (2.0 / (config.groups * codes.square().sum(1).mean()).sqrt())   # of a whole token 2
        rotation = torch.linalg.qr(torch.randn(width, width, generator=draw)).Q
        basis = rotation[:room]   # (room d), orthonormal

        tokens = self.visual_tokens
        tokens.embedding.normal_(std=0.2, generator=draw)
        tokens.embedding[:len(codes)] = self.GAIN * codes @ basis
        tokens.convolution.weight.normal_(std=0.02, generator=draw)
        tokens.convolution.weight[:, :, 1, 1] += torch.eye(width)
        for table, turn in ((tokens.row_positions, 1), (tokens.column_positions, 2),
                            (self.generator.time_positions, 3)):
            places = torch.arange(table.numel() // width)
            table.copy_((0.5 * sinusoids(places, width) @ rotation.roll(turn * width // 4, 0)).view(table.shape))
        for linear in (self.generator.anchor_in, self.generator.frames_in):
            linear.weight.normal_(std=0.02, generator=draw).add_(torch.eye(width))
            linear.bias.zero_()
        logits = self.generator.logits
        sharpness = self.SHARPNESS * config.groups ** 0.5   # parts of a token are as much less apart
        logits.weight.copy_(sharpness * codes @ basis / self.GAIN)
        logits.bias.copy_(-0.5 * sharpness * codes.square().sum(1))
        for layer in self.generator.layers:
            for head in torch.arange(width).split(config.head_width):
                mixed = torch.cat([basis, torch.randn(len(head) - room, width, generator=draw)])
                carried = torch.linalg.qr(mixed.T).Q.T   # (head_width d), the codes' subspace among its rows
                layer.qkv.weight[2 * width + head] = carried
                layer.out.weight[:, head] = self.COPY * carried.T
        for linear in (module for module in self.text_encoder.modules() if isinstance(module, nn.Linear)):
            linear.weight.normal_(std=width ** -0.5, generator=draw)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(c h w) of one sample's randomness r."""
        return self.config.latent_channels, self.config.rows, self.config.columns

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal r (b c h w), a seed for each sample: the same on every device and in every batch."""
        return torch.stack([torch.randn(self.noise_shape, generator=torch.Generator().manual_seed(int(seed)))
                            for seed in seeds]).to(self.visual_tokens.embedding.device)

    # ---- checks

    def _check(self, token_ids: Tensor, text_ids: Tensor, speed: Tensor, noise: Tensor | None) -> None:
        config = self.config
        b = token_ids.shape[0]
        if token_ids.ndim != 4 or token_ids.shape[2:] != (config.rows, config.columns):
            raise ValueError(f"token ids have the shape {tuple(token_ids.shape)}: this model takes (b t h w) with "
                             f"h, w = {config.rows}, {config.columns}")
        if token_ids.shape[1] > config.clip_length:
            raise ValueError(f"token ids hold {token_ids.shape[1]} frames: this model's clips have "
                             f"{config.clip_length}")
        if text_ids.shape[:1] != (b,) or text_ids.ndim != 2 or text_ids.shape[1] > config.context_length:
            raise ValueError(f"text ids have the shape {tuple(text_ids.shape)}: this model takes (b l) with b = {b} "
                             f"and l at most {config.context_length}")
        # a GPU would have to be waited for
        if (text_ids.device.type == "cpu" and not torch.compiler.is_compiling()
                and (text_ids == config.pad_id).all(1).any()):
            raise ValueError(f"text ids {text_ids.tolist()} hold a caption of padding ({config.pad_id}) alone: "
                             "every caption needs at least one word")
        if speed.shape != (b,):
            raise ValueError(f"speed has the shape {tuple(speed.shape)}: there must be one for each of {b} clips")
        if noise is not None and not config.stochastic:
            raise ValueError("this model is deterministic and takes no noise: leave it out, or load a stochastic model")
        if noise is not None and noise.shape != (b, *self.noise_shape):
            raise ValueError(f"noise has the shape {tuple(noise.shape)}: this model takes {(b, *self.noise_shape)}")


def check_start(config: MAGEConfig, start: MAGEConfig, *may_differ: str) -> None:
    """ValueError where weights of one configuration cannot be a start for another, but for what may differ."""
    ours, theirs = dataclasses.asdict(config), dataclasses.asdict(start)
    may_differ += ("vocabulary_size", "context_length", "dropout", "video_length")
    may_differ += ("trust", "looks", "still", "autoregressive")   # of generation alone
    may_differ += () if start.advection else ("advection", "patch", "masks")
    may_differ += () if start.masks else ("masks",)
    may_differ += () if start.unet else ("unet",)
    may_differ += () if start.window else ("window",)
    may_differ += () if start.longest else ("longest",)
    may_differ += ("phrases",) if config.unet or not start.unet else ()   # a word has another id among other words
    differing = [f"{name} {theirs[name]} for {ours[name]}" for name in ours
                 if name not in may_differ and ours[name] != theirs[name]]
    if differing:
        raise ValueError(f"weights of another model cannot be a start: {', '.join(differing)}. Choose the preset "
                         "and sizes of those weights, or train from nothing")


class TokenLoss(torch.autograd.Function):
    """`token_loss` on a CPU, its gradient made along the way: each row is read once, and no copy of all is in fp32."""

    NUMBERS = 2 ** 20   # so many at a time stay in the cache

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, count: int) -> Tensor:
        gradient, total = torch.zeros_like(logits), 0.0
        some = max(1, TokenLoss.NUMBERS // logits.shape[1])
        for start in range(0, count, some):
            rows = slice(start, min(start + some, count))
            x, right = logits[rows].to(torch.promote_types(logits.dtype, torch.float32), copy=True), targets[rows, None]
            x -= x.amax(1, keepdim=True)
            likely = x.gather(1, right)
            x.clamp_(min=-80).exp_()   # what is less likely would be a denormal number, which costs ten times the time
            whole = x.sum(1, keepdim=True)
            total = total + (whole.log() - likely).sum()
            gradient[rows] = x.div_(whole * count).scatter_add_(1, right, whole.new_full(right.shape, -1 / count))
        ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        gradient, = ctx.saved_tensors
        return gradient * d_loss.to(gradient.dtype), None, None


def token_loss(logits: Tensor, targets: Tensor, count: int | None = None, weight: Tensor | None = None) -> Tensor:
    """Mean cross-entropy, in fp32, of the first `count` (all) of logits (n k) and targets (n,); with `weight`, of n
    numbers in any shape, their sum, each times its weight."""
    if weight is not None:
        return (F.cross_entropy(logits.float(), targets, reduction="none") * weight.flatten()).sum()
    count = len(logits) if count is None else count
    if logits.is_cuda:
        return F.cross_entropy(logits[:count].float(), targets[:count])
    return TokenLoss.apply(logits, targets, count)


def likeliest(logits: Tensor) -> Tensor:
    """The arg-max over the last dimension; on a CPU this way is four times as fast in bf16."""
    return logits.max(-1).indices


def with_still(logits: Tensor, start: Tensor, nats: float) -> Tensor:
    """Logits (... k) or (... groups k) of the codes that tokens are made of, the codes (... groups) of the same places
    in the first frame -> logits that have decided which tokens stay what they are in the first frame: those whose odds
    of it, times exp(nats), are above 1. What the others are is as likely as if it were known that they do not stay.

    Each code by itself would show a thing that may be in several places in none of them, for at each the likeliest is
    that it is not there. That all codes of a token stay has the product of their chances, which is too small: whole
    tokens stay more often than codes that are drawn each by itself. And a loss half of which is over tokens that change
    teaches that half of them do, where clips show 8 % (CATER-GEN-v1) or 13 % (v2) (Saerens, Latinne and Decaestecker
    2002). Both ask for nats; how many, notebook 04 measures.
    """
    found = logits.to(torch.float32, copy=True)
    codes, at = found if start.shape[-1] > 1 else found[..., None, :], start[..., None]
    total = codes.logsumexp(-1, keepdim=True)
    own = codes.gather(-1, at) - total
    together = own.sum(-2, keepdim=True).clamp(max=0)
    stays = together - torch.log(-torch.expm1(together)) + nats > 0
    own = own + torch.log1p(-torch.exp((together - own).clamp(max=0)))   # of the chances, what is left without that
    # where the likeliest of every code is the first frame's all the same, the one that costs least is another
    ahead = own + total - codes.scatter_(-1, at, -torch.inf).amax(-1, keepdim=True)
    least = (ahead > 0).all(-2, keepdim=True) & (ahead == ahead.amin(-2, keepdim=True))
    own = (own + total).masked_fill(least, -torch.inf)
    codes.masked_fill_(stays, -torch.inf).scatter_(-1, at, torch.where(stays, 0.0, own))
    return found


def likely_mean(logits: Tensor, codes: Tensor, groups: int = 1, least: float = 0.02) -> Tensor:
    """Logits (... k) or (... groups k), codes (k e) -> the mean code (... e) over the ids, of each group, that are at
    least `least` times as likely as the likeliest.

    The whole distribution's mean would have the least squared error, but its long tail leaves a haze on what is empty.
    """
    shape, means = logits.shape[:-1] if groups == 1 else logits.shape[:-2], []
    rows, codes = logits.reshape(-1, groups, len(codes)), rearrange(codes, "k (groups e) -> groups k e", groups=groups)
    for x in rows.split(len(rows) if rows.is_cuda else 512):   # on a CPU so few that they stay in its cache
        x = (x.float() - x.amax(-1, keepdim=True)).clamp_(min=-60).exp_()   # far below, denormal numbers are slow
        p = F.threshold(x, least, 0.0).transpose(0, 1)
        with torch.autocast(p.device.type, enabled=False):   # where the model is sure, the code itself
            means.append(rearrange(p @ codes / p.sum(-1, keepdim=True), "groups n e -> n (groups e)"))
    return torch.cat(means).unflatten(0, shape)
