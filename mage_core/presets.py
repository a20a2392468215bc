"""Presets: how large, how long and how each stage is trained. Frozen, printed at the top of every run.

`smoke` takes seconds and shows that everything runs; `quick` makes a useful model of Single on two CPU cores; `gpu`
makes what takes 7 to 13 MB and a few minutes of one GPU; `paper` is the released architecture, MAGE with the paper's
batch of 32. Notebook 04 tells where the numbers of `quick` come from.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mage_core.mage import MAGEConfig
from mage_core.moving_mnist import DATASETS as MNIST
from mage_core.vqvae import VQVAEConfig
from mage_core.weights import PRECISIONS

COMPILE = ("auto", "on", "layers", "off")   # see `training.compiled`


@dataclass(frozen=True)
class VQVAERecipe:
    """The first stage (3.2). Budgets count images."""

    shape: str                   # "released" or "patch", see VQVAEConfig
    width: int                   # of the decoder, and of the released encoder
    codebook_size: int
    images: int
    batch: int
    learning_rate: float
    commitment: float            # weight of eq. 1's last term, beside a mean squared error x `reconstruction`, in the
                                 # network's range of pixels
    reconstruction: float
    crop: int | None = None      # token rows: train on squares of this side, cut on the token grid around what moves
    pool: int | None = None      # frames drawn once, of which each step takes some; None: fresh frames every step
    warm_images: int = 0         # images before the codebook is laid (by k-means) and quantising begins
    encoder_width: int = 64
    encoder_blocks: int = 3
    decoder_blocks: int = 3
    code_channels: int = 16
    decoder_alone: float = 0.0   # last share of the images: codes laid anew, then they and the encoder stay as they are
    groups: int = 1              # codes of a token, one for each block of its patch ("patch" alone)
    background: bool = False     # see differences from what is behind all that moves ("patch" alone)

    def __post_init__(self) -> None:
        _at_least_1(self, "vqvae.", "images", "batch")
        _at_least_1(self, "vqvae.", *(name for name in ("crop", "pool") if getattr(self, name) is not None))
        _between(self, "vqvae.", "learning_rate", "reconstruction", low=0.0, above=True)
        _between(self, "vqvae.", "commitment", "warm_images", "encoder_blocks", "decoder_blocks", low=0)
        _between(self, "vqvae.", "decoder_alone", low=0.0, high=1.0)
        if self.warm_images and self.warm_steps >= self.alone_from:
            raise ValueError(f"vqvae.warm_images is {self.warm_images}, and of {self.images} images the decoder learns "
                             f"alone from the last {self.decoder_alone:g}: codes must be laid before that, so take "
                             "fewer warm images or a smaller share")

    @property
    def warm_steps(self) -> int:
        """Steps before the codebook is laid and quantising begins."""
        return math.ceil(self.warm_images / self.batch)

    @property
    def alone_from(self) -> float:
        """The step from which the decoder learns alone; infinity for never."""
        return round((1 - self.decoder_alone) * self.images / self.batch) if self.decoder_alone else math.inf


@dataclass(frozen=True)
class MAGERecipe:
    """The second stage (3.3). Budgets count samples, a sample being one clip with its caption and speed."""

    width: int
    samples: int
    batch: int
    learning_rate: float
    dropout: float
    head_width: int = 32
    axial_layers: int = 6
    muon: float = 0.0            # > 0: Muon for the matrices, at this multiple of the learning rate
    weight_decay: float = 0.01
    later_frames: int | None = None   # of the input frames after the first, this many a step, drawn anew; None: all
    hide_all: float = 0.0        # share of the clips whose input frames after the first are hidden entirely
    hide_some: float = 0.0       # share of the clips in which a random part of those tokens is hidden
    own_frames: float = 0.0      # share of clips whose later input frames are the model's own guesses, rising from 0
    balanced: bool = False       # half of the loss on tokens that differ from the first frame's
    shifts: bool = False         # the options of MAGEConfig that help to find the motion
    code_initialisation: bool = False  # embeddings and logits start from the codes' vectors
    advection: int = 0           # the longest displacement in pixels by which the first image is moved (MAGEConfig)
    more_anchors: int = 0        # clips more a step of which displacements alone are learned
    trust: float = 1.0           # in generation, of what is displaced (MAGEConfig)
    masks: bool = False          # each thing that is displaced is a part of the first image (MAGEConfig)
    unet: int = 0                # the width of a U-Net that cuts out what phrases name; 0: features of tokens do
    window: int = 0              # > 0: a closer look at each, in a window with sides of so many pixels (MAGEConfig)
    unet_muon: float = 0.0       # > 0: Muon for its convolutions, at this multiple of the learning rate
    looks: int = 1               # in generation, of the U-Net at the first image, shifted each time (MAGEConfig)
    still: float = 0.0           # in generation, nats for a token to be the first frame's again (MAGEConfig)
    autoregressive: bool = True  # generation is shown the frames that it has made (MAGEConfig)
    phrases: str = "and"         # the word at which a phrase begins, with `unet`
    only: str = ""               # train nothing but this part of MAGE, such as "advection"; all of it where empty
    evaluate_every: int = 5_000  # samples from one look at generated clips to the next

    def __post_init__(self) -> None:
        _at_least_1(self, "mage.", "samples", "batch", "evaluate_every")
        _between(self, "mage.", "learning_rate", low=0.0, above=True)
        _between(self, "mage.", "muon", "unet_muon", "weight_decay", "more_anchors", low=0)
        _between(self, "mage.", "hide_all", "hide_some", "own_frames", low=0.0, high=1.0)
        if self.hide_all + self.hide_some > 1:
            raise ValueError(f"mage.hide_all is {self.hide_all} and hide_some {self.hide_some}: they are shares of the "
                             "same clips, and must not be more than 1 together")
        if self.later_frames is not None and self.later_frames < 0:
            raise ValueError(f"mage.later_frames is {self.later_frames}: it must be 0 or more, or None for all")
        parts = ("visual_tokens", "text_encoder", "motion_anchor", "generator") + ("advection",) * (self.advection > 0)
        if self.only not in ("", *parts):
            raise ValueError(f"mage.only is {self.only!r}: with mage.advection at {self.advection} the parts that can "
                             f"be trained alone are {', '.join(parts)}; leave it empty for all")


@dataclass(frozen=True)
class Preset:
    """A name, the two stages, and how many training pairs and evaluation clips are used (None: all of the paper's).

    MAGE trains on the pairs from `first_pair` on: whoever goes on from weights can take pairs that these have not seen.
    With `speeds` each has no more than so many speeds, of its own, and only their frames are drawn.
    """

    name: str
    vqvae: VQVAERecipe
    mage: MAGERecipe
    pairs: int | None = None
    first_pair: int = 0
    speeds: int | None = None
    test_clips: int | None = None
    watch_clips: int = 48
    compile: str = "auto"   # torch.compile for MAGE's training: see `training.compiled`
    precision: str = "half"  # of the weights as they are saved, see `weights.save`

    def __post_init__(self) -> None:
        _at_least_1(self, "", "watch_clips", *(() if self.test_clips is None else ("test_clips",)))
        for name, words in (("compile", COMPILE), ("precision", PRECISIONS)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(words)}")


def _at_least_1(recipe, stage: str, *names: str) -> None:
    for name in names:
        if getattr(recipe, name) < 1:
            raise ValueError(f"{stage}{name} is {getattr(recipe, name)}: it must be at least 1")


def _between(recipe, stage: str, *names: str, low: float, high: float = math.inf, above: bool = False) -> None:
    for name in names:
        value = getattr(recipe, name)
        if not (low < value if above else low <= value) or not value <= high:
            rule = f"above {low}" if above else f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{stage}{name} is {value}: it must be {rule}")


PRESETS = {
    "smoke": Preset(
        "smoke",
        VQVAERecipe("patch", 32, 64, images=320, batch=16, learning_rate=2e-3, commitment=1.0, reconstruction=100.0,
                    crop=11, encoder_width=16, encoder_blocks=0, decoder_blocks=1),
        MAGERecipe(32, samples=64, batch=4, learning_rate=2e-3, dropout=0.0, head_width=16, axial_layers=3, muon=3.0,
                   later_frames=2, hide_all=0.3, hide_some=0.3, own_frames=0.3, balanced=True, shifts=True,
                   code_initialisation=True, advection=36, more_anchors=4, trust=10.0,
                   evaluate_every=32),
        pairs=64, test_clips=16, watch_clips=4),
    "quick": Preset(
        "quick",
        VQVAERecipe("patch", 128, 64, images=8_000, batch=16, learning_rate=3e-3, commitment=10.0,
                    reconstruction=100.0, crop=11, encoder_blocks=0, decoder_blocks=1, decoder_alone=1.0, groups=8),
        MAGERecipe(128, samples=3_600, batch=4, learning_rate=1e-3, dropout=0.0, muon=3.0, later_frames=3,
                   hide_all=0.4, hide_some=0.3, own_frames=0.5, balanced=True, shifts=True, code_initialisation=True,
                   advection=36, more_anchors=8, trust=10.0, evaluate_every=900),
        test_clips=500),
    # Minutes on one GPU. On an H200 a step of 24 clips of digits took 90 ms alone, in roughly 2,000 operations that the
    # host starts: 268 samples/s. Four datasets at once, a process each, left the GPU no pause and made 1,002 samples/s
    # together. A VQ-VAE: 4,000 steps in 50 s beside all that. torch.compile took 70 s or more, and a step of 32 whole
    # clips then 130 ms in place of 134, so that it is off here. 10.3 M + 0.5 M weights: 11 MB.
    "gpu": Preset(
        "gpu",
        VQVAERecipe("patch", 128, 128, images=256_000, batch=128, learning_rate=3e-3, commitment=10.0,
                    reconstruction=100.0, crop=11, encoder_blocks=0, decoder_alone=1.0, groups=8),
        MAGERecipe(256, samples=80_000, batch=24, learning_rate=1e-3, dropout=0.0, muon=3.0, later_frames=4,
                   hide_all=0.3, hide_some=0.3, own_frames=0.5, balanced=True, shifts=True, code_initialisation=True,
                   advection=36, more_anchors=72, trust=10.0, evaluate_every=20_000),
        compile="off", precision="int8"),
    "paper": Preset(
        "paper",
        VQVAERecipe("released", 256, 512, images=4_000_000, batch=64, learning_rate=4e-4, commitment=2.0,
                    reconstruction=1.0, warm_images=100_000),
        MAGERecipe(512, samples=2_000_000, batch=32, learning_rate=5e-5, dropout=0.1, weight_decay=0.0,
                   evaluate_every=100_000)),
}


# What differs for colour videos of 128 x 128 (CATER-GEN, folders), where drawing a frame costs more than training on
# it. On CATER-GEN-v2, 1,000 frames, one core: k-means alone 32.2 dB (16 channels), 32.4 before a background, 32.8 with
# 32 channels; after 5,000 images 33.5 dB and 10 % of the tokens change from frame to frame (20 % have a pixel that
# does), none where no pixel changes. An encoder of 3 blocks: 33.7 dB after 12,000, but 18 % change, 6 % where nothing
# does. Crops of 6 rows in place of 11, as many tokens: the same.
COLOUR = {
    "smoke": {"pairs": 12, "test_clips": 4, "watch_clips": 2, "vqvae": {"pool": 48, "background": True},
              "mage": {"samples": 32, "advection": 0, "more_anchors": 0, "trust": 1.0}},
    "quick": {"pairs": 2_000, "mage": {"samples": 9_000, "advection": 0, "more_anchors": 0, "trust": 1.0,
                                       "evaluate_every": 2_500},
              "vqvae": {"pool": 6_000, "background": True, "code_channels": 32, "codebook_size": 4096, "groups": 1,
                        "images": 80_000, "encoder_blocks": 0, "decoder_blocks": 3, "decoder_alone": 0.0}},
    # 12,000 frames of v2 took 80 seconds on 5 busy cores, and each clip that is judged asks for 279 more
    # What `still` and `autoregressive` do to PSNR and motion accuracy, on clips that no table shows: notebook 04.
    "gpu": {"watch_clips": 8,
            "vqvae": {"pool": 12_000, "background": True, "images": 256_000, "batch": 64, "code_channels": 128,
                      "codebook_size": 200},
            "mage": {"width": 192, "advection": 0, "more_anchors": 0, "trust": 1.0, "still": 4.0,
                     "autoregressive": False}},
    "paper": {"vqvae": {"pool": 40_000}},
}


# Where two digits move, which cover one another, each is what a phrase names, cut out by a U-Net (notebook 04). How
# much what is displaced is trusted was measured on 48 clips of each that no table shows, PSNR of frames / of clips:
# Double 3 times 25.07 / 24.59, 10 times 25.44 / 24.88; later weights of Modified as learned 22.39 / 21.63, 3 times
# 23.16 / 21.71, 10 times 23.57 / 21.91, and a motion accuracy of 0.896 in all three. Single, without masks, as learned
# 35.23 / 33.70, 10 times 39.17 / 34.57.
TWO_MOVE = ("double-mnist", "modified-mnist")


def preset_of_environment() -> str:
    """The preset that MAGE_PRESET names, `auto` where it names none."""
    return os.environ.get("MAGE_PRESET", "").strip() or "auto"


def preset(name: str = "auto", dataset_name: str = "single-mnist") -> Preset:
    """The preset of a name, as it is for a dataset (see `COLOUR` and `TWO_MOVE`).

    `auto` follows MAGE_PRESET where set, else takes `paper` on a GPU and `quick` on a CPU; an explicit name always
    wins. ValueError for an unknown one, in the argument or in MAGE_PRESET.
    """
    source = "preset"
    if name == "auto":
        name, source = preset_of_environment(), "MAGE_PRESET"
    if name == "auto":
        name = "paper" if torch.cuda.is_available() else "quick"
    if name not in PRESETS:
        raise ValueError(f"{source} is {name!r}: choose one of {', '.join(PRESETS)}, or auto")
    chosen = PRESETS[name]
    if dataset_name in TWO_MOVE and chosen.mage.advection:
        cut_out = {"masks": True, "unet": 8 if name == "smoke" else 32, "unet_muon": 2.0, "looks": 8}
        chosen = dataclasses.replace(chosen, mage=dataclasses.replace(chosen.mage, **cut_out))
    if dataset_name not in MNIST:
        stages = {stage: dataclasses.replace(getattr(chosen, stage), **fields) if isinstance(fields, dict) else fields
                  for stage, fields in COLOUR[name].items()}
        chosen = dataclasses.replace(chosen, **stages)
    return chosen


def sized_like(chosen: Preset, start: MAGEConfig) -> Preset:
    """A preset with the sizes and options of the MAGE that it is to go on from (`mage.check_start`).

    Advection, masks or a U-Net that those weights lack are the preset's to add.
    """
    sizes = {"width": start.width, "head_width": start.head_width, "axial_layers": start.axial_layers,
             "shifts": start.shift_attention}
    if start.advection:
        sizes["advection"] = start.advection
    if start.masks:
        sizes["masks"] = True
    if start.unet:
        sizes |= {"unet": start.unet, "looks": start.looks}
    if start.window:
        sizes["window"] = start.window
    return dataclasses.replace(chosen, mage=dataclasses.replace(chosen.mage, **sizes))


def changed(chosen: Preset, changes: Sequence[str]) -> Preset:
    """A preset with some fields changed, each as `stage.field=value` or `field=value`, e.g. `mage.samples=100_000`.

    ValueError for a field that there is not, a value that is not a Python literal of the field's kind, or values that
    do not go together, whatever their order.
    """
    new: dict[str, dict[str, object]] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        stage, dot, field = name.rpartition(".")
        part = getattr(chosen, stage, None) if dot else chosen
        known = [entry.name for entry in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else []
        if not equals or field not in known or field in ("name", "vqvae", "mage"):
            raise ValueError(f"{change!r} changes nothing that a preset has: write stage.field=value, with vqvae or "
                             f"mage as the stage{' and one of ' + ', '.join(known) if known else ''}")
        before = getattr(part, field)
        try:
            value = text if isinstance(before, str) else ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"{change!r}: {text!r} is not a value such as {before!r}") from error
        kind = typing.get_type_hints(type(part))[field]
        kinds = typing.get_args(kind) or (kind,)
        if float in kinds and type(value) is int:
            value = float(value)
        if type(value) not in kinds:
            raise ValueError(f"{change!r}: {text!r} must be "
                             f"{' or '.join(known_kind.__name__ for known_kind in kinds)}, such as {before!r}")
        new.setdefault(stage, {})[field] = value
    own = new.pop("", {})
    parts = {stage: dataclasses.replace(getattr(chosen, stage), **fields) for stage, fields in new.items()}
    return dataclasses.replace(chosen, **own, **parts)


def vqvae_config(recipe: VQVAERecipe, dataset) -> VQVAEConfig:
    """The VQ-VAE of a recipe for a dataset: 16 x 16 tokens whatever the image's size."""
    released = recipe.shape == "released"
    if released:
        pixel_range = (-0.5, 0.5) if dataset.channels == 1 else (-1.0, 1.0)
    else:
        pixel_range = (0.0, 1.0)
    return VQVAEConfig(
        channels=dataset.channels, width=recipe.width, codebook_size=recipe.codebook_size,
        down=dataset.image_size // 16, pixel_range=pixel_range, commitment=recipe.commitment, shape=recipe.shape,
        code_channels=recipe.code_channels, encoder_blocks=recipe.encoder_blocks,
        decoder_blocks=recipe.decoder_blocks, encoder_width=recipe.encoder_width,
        background=dataset.image_size if recipe.background else 0, groups=recipe.groups)


def mage_config(recipe: MAGERecipe, dataset, codebook_size: int, groups: int = 1) -> MAGEConfig:
    """The deterministic MAGE of a recipe for a dataset and tokens of so many codes and groups.

    ValueError where phrases are to begin at a word that no caption of the dataset has.
    """
    unet = recipe.unet if recipe.advection else 0
    if unet and recipe.phrases not in dataset.vocabulary:
        raise ValueError(f"mage.phrases is {recipe.phrases!r}: with mage.unet it must be a word of the captions of "
                         f"{dataset.name}, such as {', '.join(map(repr, dataset.vocabulary[-3:]))}")
    return MAGEConfig(
        codebook_size=codebook_size, groups=groups, rows=16, columns=16, clip_length=dataset.clip_length,
        width=recipe.width, vocabulary_size=len(dataset.vocabulary), context_length=dataset.context_length,
        head_width=recipe.head_width, axial_layers=recipe.axial_layers, dropout=recipe.dropout,
        shift_attention=recipe.shifts, time_bias=recipe.shifts, speed_frequencies=12 if recipe.shifts else 0,
        intervals=tuple(dataset.interval) if recipe.shifts else None,
        video_length=dataset.video_length if recipe.shifts else None,
        advection=recipe.advection, trust=recipe.trust if recipe.advection else 1.0,
        patch=(dataset.channels, dataset.image_size // 16) if recipe.advection else None,
        masks=recipe.masks and recipe.advection > 0, unet=unet, window=recipe.window if unet else 0,
        phrases=dataset.vocabulary.index(recipe.phrases) if unet else 0,
        looks=recipe.looks if unet else 1, still=recipe.still, autoregressive=recipe.autoregressive,
        longest=dataset.longest if unet and recipe.shifts and dataset.video_length is None else 0,
        hidden_token=max(recipe.hide_all, recipe.hide_some, recipe.own_frames) > 0)


def describe(chosen: Preset) -> str:
    """The whole preset as text, a line a field, for the top of a run."""
    lines = [f"preset {chosen.name}"]
    for stage in ("vqvae", "mage"):
        fields = dataclasses.asdict(getattr(chosen, stage)).items()
        lines.append(f"  {stage}: " + ", ".join(f"{key} {value}" for key, value in fields))
    lines.append(f"  pairs {chosen.pairs or 'all'}, first pair {chosen.first_pair}, "
                 f"speeds of a pair {chosen.speeds or 'all'}, test clips {chosen.test_clips or 'all'}, "
                 f"clips watched in training {chosen.watch_clips}, compile {chosen.compile}, "
                 f"weights kept in {chosen.precision}")
    return "\n".join(lines)
