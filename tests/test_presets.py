"""Presets: which one is taken, what a change may change, and `paper` against the released configuration."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mage_core import captions, weights
from mage_core.clips import load_dataset
from mage_core.mage import MAGE, MAGEConfig, check_start
from mage_core.moving_mnist import DATASETS
from mage_core.presets import PRESETS, changed, describe, mage_config, preset, sized_like, vqvae_config
from mage_core.vqvae import VQVAE
from mage_core.weights import released_names

STAGES = ("vqvae", "mage")
FIELDS = [(stage, field.name) for stage in STAGES for field in dataclasses.fields(getattr(PRESETS["smoke"], stage))]
every_preset = pytest.mark.parametrize("chosen", PRESETS.values(), ids=PRESETS)


# ---------------------------------------------------------------- which preset

@pytest.mark.parametrize("name", PRESETS)
def test_an_explicit_preset_wins_whatever_the_environment_says(monkeypatch, name):
    for said in (*PRESETS, "", "no-such-preset"):
        monkeypatch.setenv("MAGE_PRESET", said)
        assert preset(name) is PRESETS[name] and preset(name).name == name


@pytest.mark.parametrize("said", [*PRESETS, " smoke "])
def test_auto_follows_the_environment(monkeypatch, said):
    monkeypatch.setenv("MAGE_PRESET", said)
    assert preset() is preset("auto") is PRESETS[said.strip()]


@pytest.mark.parametrize("name", ["smoke", "quick", "gpu"])
def test_where_two_digits_move_each_is_cut_out(name):
    alone = preset(name, "single-mnist")
    assert not alone.mage.masks and not alone.mage.unet
    assert alone.mage.trust == 10 and mage_config(alone.mage, load_dataset("single-mnist"), 8, 8).trust == 10
    for two in ("double-mnist", "modified-mnist"):
        width = 8 if name == "smoke" else 32
        differs = ["mage.masks=True", f"mage.unet={width}", "mage.unet_muon=2", "mage.looks=8"]
        assert preset(name, two) == changed(alone, differs)
        config = mage_config(preset(name, two).mage, load_dataset(two), 8, 8)
        assert config.masks and config.unet == width and config.looks == 8
        assert load_dataset(two).vocabulary[config.phrases] == "and"
    solids = mage_config(preset(name, "cater-gen-v1").mage, load_dataset("cater-gen-v1"), 8, 8)
    assert not solids.masks and solids.still == (4 if name == "gpu" else 0) and not config.still
    assert solids.autoregressive == (name != "gpu") and config.autoregressive


@pytest.mark.parametrize("name", ["smoke", "quick", "gpu"])
@pytest.mark.parametrize("weights_name", weights.names())
def test_any_weights_that_ship_are_a_start_for_their_dataset_at_any_preset(name, weights_name):
    dataset, start = load_dataset(weights_name), weights.load(weights_name).mage.config
    chosen = sized_like(preset(name, weights_name), start)
    check_start(mage_config(chosen.mage, dataset, start.codebook_size, start.groups), start)
    assert chosen.mage.samples == preset(name, weights_name).mage.samples
    few = dataclasses.replace(start, looks=3) if start.unet else start
    assert sized_like(preset(name, weights_name), few).mage.looks == few.looks
    wider = changed(chosen, [f"mage.width={2 * start.width}"])
    with pytest.raises(ValueError, match=f"width {start.width} for {2 * start.width}"):
        check_start(mage_config(wider.mage, dataset, start.codebook_size, start.groups), start)


def test_what_a_start_lacks_the_preset_adds():
    chosen = preset("smoke", "double-mnist")
    bare = mage_config(PRESETS["paper"].mage, load_dataset("single-mnist"), 512)
    sized = sized_like(chosen, bare).mage
    assert (sized.width, sized.axial_layers, sized.shifts) == (bare.width, bare.axial_layers, False)
    assert (sized.advection, sized.masks, sized.unet, sized.looks) == (36, True, 8, 8)


def test_a_part_to_train_alone_that_there_is_not_is_named():
    assert changed(PRESETS["smoke"], ["mage.only=advection"]).mage.only == "advection"
    with pytest.raises(ValueError, match="mage.only is 'advektion'.*visual_tokens.*advection; leave it empty"):
        changed(PRESETS["smoke"], ["mage.only=advektion"])
    with pytest.raises(ValueError, match="with mage.advection at 0"):
        changed(PRESETS["paper"], ["mage.only=advection"])


@pytest.mark.parametrize("gpu, expected", [(False, "quick"), (True, "paper")])
@pytest.mark.parametrize("said", [None, "", "auto"])
def test_auto_follows_the_machine_where_the_environment_says_nothing(monkeypatch, said, gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    if said is None:
        monkeypatch.delenv("MAGE_PRESET")
    else:
        monkeypatch.setenv("MAGE_PRESET", said)
    assert preset().name == expected


def test_unknown_presets_are_named_with_their_source_and_the_known_ones(monkeypatch):
    with pytest.raises(ValueError, match="preset is 'large': choose one of smoke, quick, gpu, paper, or auto"):
        preset("large")
    monkeypatch.setenv("MAGE_PRESET", "large")
    with pytest.raises(ValueError, match="MAGE_PRESET is 'large': choose one of smoke, quick, gpu, paper, or auto"):
        preset()


# ---------------------------------------------------------------- what a preset is

@every_preset
def test_presets_are_frozen_and_can_be_told_by_their_names(chosen):
    assert PRESETS[chosen.name] is chosen
    for part, field in ((chosen, "pairs"), (chosen.vqvae, "images"), (chosen.mage, "samples")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, field, 1)


@every_preset
def test_the_description_shows_every_field(chosen):
    text = describe(chosen)
    assert f"preset {chosen.name}" in text
    for stage in STAGES:
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{stage}:"))
        for name, value in dataclasses.asdict(getattr(chosen, stage)).items():
            assert f"{name} {value}" in line
    shown = text.splitlines()[-1]
    for words, value in (("pairs", chosen.pairs), ("first pair", chosen.first_pair),
                         ("speeds of a pair", chosen.speeds), ("test clips", chosen.test_clips),
                         ("watched", chosen.watch_clips),
                         ("compile", chosen.compile), ("weights kept in", chosen.precision)):
        assert words in shown and str(value or "all") in shown
    assert len(dataclasses.fields(chosen)) == 10, "a field was added: is it described?"


SHARES = ("decoder_alone", "hide_all", "hide_some", "own_frames")


@pytest.mark.parametrize("stage, field", FIELDS)
def test_two_presets_that_differ_are_described_differently(stage, field):
    chosen = PRESETS["smoke"]
    other = "generator" if field == "only" else 0.65 if field in SHARES else 987_654
    part = dataclasses.replace(getattr(chosen, stage), **{field: other})
    assert describe(dataclasses.replace(chosen, **{stage: part})) != describe(chosen)


@pytest.mark.parametrize("name", DATASETS)
@every_preset
def test_every_preset_can_be_built_for_every_dataset(chosen, name):
    dataset = load_dataset(name)
    with torch.device("meta"):
        vqvae = VQVAE(vqvae_config(chosen.vqvae, dataset))
        mage = MAGE(mage_config(chosen.mage, dataset, vqvae.config.codebook_size))
    assert dataset.image_size // vqvae.config.down == mage.config.rows == mage.config.columns == 16
    assert mage.config.clip_length == 10
    assert mage.config.vocabulary_size == len(captions.vocabulary(name))
    assert mage.config.hidden_token == (chosen.mage.hide_all > 0 or chosen.mage.hide_some > 0)


def test_own_frames_alone_bring_the_hidden_token_that_they_need():
    recipe = dataclasses.replace(PRESETS["paper"].mage, own_frames=0.5)
    assert mage_config(recipe, load_dataset("single-mnist"), 8).hidden_id == 8


# ---------------------------------------------------------------- the paper's

def test_paper_is_the_released_architecture():
    chosen, dataset = PRESETS["paper"], load_dataset("single-mnist")
    assert mage_config(chosen.mage, dataset, chosen.vqvae.codebook_size) == MAGEConfig(
        codebook_size=512, rows=16, columns=16, clip_length=10, width=512, head_width=32, vocabulary_size=30,
        context_length=captions.context_length("single-mnist"), text_layers=2, anchor_layers=1, axial_layers=6,
        dropout=0.1, stochastic=False, speed_loss=False, shift_attention=False, time_bias=False, speed_frequencies=0,
        intervals=None, hidden_token=False, alpha=0.001, beta=0.00025)   # eq. 7's weights, as released for v1
    vqvae = vqvae_config(chosen.vqvae, dataset)
    assert (vqvae.shape, vqvae.down, vqvae.width, vqvae.codebook_size) == ("released", 4, 256, 512)
    assert vqvae.pixel_range == (-0.5, 0.5) and vqvae.commitment == 2.0
    assert chosen.mage.batch == 32 and chosen.mage.learning_rate == 5e-5
    assert chosen.pairs is None and chosen.test_clips is None, "all of the paper's pairs, for training and in the table"
    # nothing of ours in the loss either
    assert not any((chosen.mage.hide_all, chosen.mage.hide_some, chosen.mage.own_frames, chosen.mage.balanced,
                    chosen.mage.muon, chosen.mage.code_initialisation)) and chosen.mage.later_frames is None


def test_the_papers_model_has_the_released_size_and_only_parts_that_the_released_code_knows():
    chosen, dataset = PRESETS["paper"], load_dataset("single-mnist")
    config = mage_config(chosen.mage, dataset, 512)
    with torch.device("meta"):
        models = MAGE(config), VQVAE(vqvae_config(chosen.vqvae, dataset))
        # CATER-GEN-v1's words and context, for which the number of parameters is known
        cater = MAGE(dataclasses.replace(config, vocabulary_size=30, context_length=32))
    assert round(sum(parameter.numel() for parameter in cater.parameters()) / 1e6, 1) == 32.1
    for model in models:
        assert len(released_names(model)) == len(model.state_dict())


# ---------------------------------------------------------------- changes

def test_fields_of_both_stages_and_of_the_preset_change():
    chosen = PRESETS["quick"]
    new = changed(chosen, ["mage.samples=100_000", "vqvae.learning_rate=1", "pairs=64", "vqvae.shape=released",
                           "mage.later_frames=None", "mage.balanced=False", "vqvae.crop=32", "mage.samples=7"])
    assert (new.mage.samples, new.vqvae.learning_rate, new.pairs, new.vqvae.shape) == (7, 1.0, 64, "released")
    assert new.mage.later_frames is None and new.mage.balanced is False and new.vqvae.crop == 32
    assert type(new.vqvae.learning_rate) is float
    assert chosen == PRESETS["quick"] and changed(chosen, []) == chosen
    for stage, fields in (("vqvae", ("learning_rate", "shape", "crop")),
                          ("mage", ("samples", "later_frames", "balanced"))):
        before, after = dataclasses.asdict(getattr(chosen, stage)), dataclasses.asdict(getattr(new, stage))
        assert {name for name in before if before[name] != after[name]} == set(fields)


@given(st.sampled_from(sorted(PRESETS)), st.sampled_from(FIELDS))
def test_writing_what_a_field_says_already_changes_nothing(name, where):
    chosen, (stage, field) = PRESETS[name], where
    value = getattr(getattr(chosen, stage), field)
    assert changed(chosen, [f"{stage}.{field}={value}"]) == chosen


@pytest.mark.parametrize("change", ["mage.sample=3", "mage.samples", "samples=3", "vqvae=3", "mage=None", "name=x",
                                    "anchor.width=3", "name.upper=3", "mage.samples.real=3", "=3", "", "mage.=3"])
def test_changes_of_what_there_is_not_show_the_change_and_the_rule(change):
    with pytest.raises(ValueError, match=r"changes nothing.*stage\.field=value") as error:
        changed(PRESETS["smoke"], [change])
    assert repr(change) in str(error.value)
    if change.startswith(("mage.sample=", "mage.=")):
        assert "samples" in str(error.value) and "learning_rate" in str(error.value)


@pytest.mark.parametrize("change", ["mage.samples=many", "mage.samples=1.5", "mage.samples='3'", "mage.samples=",
                                    "mage.samples=None", "mage.samples=True", "mage.balanced=1", "vqvae.crop=4.0",
                                    "mage.later_frames='all'", "mage.learning_rate=(1,)", "mage.learning_rate=None",
                                    "pairs='all'", "watch_clips=None", "vqvae.width=__import__('os')"])
def test_changes_of_another_kind_show_the_change_and_the_kind(change):
    with pytest.raises(ValueError) as error:
        changed(PRESETS["smoke"], [change])
    assert repr(change) in str(error.value) and repr(change.partition("=")[2]) in str(error.value)


@pytest.mark.parametrize("change, rule", [
    ("vqvae.decoder_alone=2.0", "from 0.0 to 1.0"), ("mage.hide_all=3.0", "from 0.0 to 1.0"),
    ("mage.hide_some=-0.1", "from 0.0 to 1.0"), ("mage.own_frames=-1.0", "from 0.0 to 1.0"),
    ("mage.muon=-1.0", "at least 0"), ("mage.unet_muon=-1.0", "at least 0"), ("mage.weight_decay=-1.0", "at least 0"),
    ("mage.more_anchors=-1", "at least 0"),
    ("mage.learning_rate=-1.0", "above 0"), ("mage.learning_rate=0.0", "above 0"),
    ("vqvae.learning_rate=0.0", "above 0"), ("vqvae.reconstruction=0.0", "above 0"),
    ("vqvae.commitment=-1.0", "at least 0"), ("vqvae.warm_images=-5", "at least 0"),
    ("vqvae.encoder_blocks=-1", "at least 0"), ("vqvae.decoder_blocks=-1", "at least 0"),
    ("vqvae.crop=0", "at least 1"), ("vqvae.pool=0", "at least 1")])
def test_values_that_no_training_can_use_are_told_with_the_rule(change, rule):
    name, value = change.split("=")
    with pytest.raises(ValueError, match=rf"{name} is {value}: it must be {rule}"):
        changed(PRESETS["smoke"], [change])


def test_codes_are_laid_before_the_decoder_learns_alone():
    with pytest.raises(ValueError, match="vqvae.warm_images is 200, and of 320 images the decoder learns alone"):
        changed(PRESETS["smoke"], ["vqvae.warm_images=200", "vqvae.decoder_alone=0.5"])
    recipe = changed(PRESETS["smoke"], ["vqvae.warm_images=144", "vqvae.decoder_alone=0.5"]).vqvae
    assert (recipe.warm_steps, recipe.alone_from) == (9, 10)
    for warm, images in ((160, 320), (50, 100)):   # the same step, and one that rounding puts first
        with pytest.raises(ValueError, match="codes must be laid before that"):
            changed(PRESETS["smoke"], [f"vqvae.images={images}", f"vqvae.warm_images={warm}",
                                       "vqvae.decoder_alone=0.5"])


@pytest.mark.parametrize("changes", [("vqvae.warm_images=1000", "vqvae.decoder_alone=0.5"),
                                     ("mage.hide_all=1.0", "mage.hide_some=0.0"), ("mage.samples=1", "mage.samples=2")])
def test_changes_that_go_together_are_judged_together(changes):
    chosen = changed(PRESETS["quick"], changes)
    told = dict(change.split("=") for change in changes)
    assert all(getattr(getattr(chosen, stage), field) == float(value)
               for (stage, field), value in zip((name.split(".") for name in told), told.values()))
    if len(told) > 1:
        assert changed(PRESETS["quick"], changes[::-1]) == chosen


def test_shares_of_the_same_clips_are_at_most_all():
    with pytest.raises(ValueError, match="hide_all is 0.7 and hide_some 0.6.*not be more than 1 together"):
        changed(PRESETS["quick"], ["mage.hide_all=0.7", "mage.hide_some=0.6"])
