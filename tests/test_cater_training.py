"""CATER-GEN from end to end: drawn worlds and folders of videos train, their weights generate, their cards tell."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import mage_core
from mage_core import cater, clips, metrics, presets, training, weights
from mage_core.captions import CaptionError
from mage_core.cater import folders
from mage_core.clips import load_dataset
from mage_core.training import fingerprint

SMOKE = presets.preset("smoke", "cater-gen-v1")
TINY = dataclasses.replace(
    SMOKE, name="tiny", pairs=3, test_clips=2, watch_clips=1,
    vqvae=dataclasses.replace(SMOKE.vqvae, images=48, batch=8, codebook_size=16, width=16, encoder_width=8,
                              code_channels=8, pool=8),
    mage=dataclasses.replace(SMOKE.mage, samples=6, batch=2, width=16, head_width=8, evaluate_every=6))


@pytest.fixture(autouse=True)
def few_looks(monkeypatch):
    """Eight frames in place of 64 to look at while the VQ-VAE trains."""
    whole = training.FrameSource.held_out.__func__
    monkeypatch.setattr(training.FrameSource, "held_out", classmethod(
        lambda cls, dataset, count, seed, kept: whole(cls, dataset, 8, seed, kept=kept)))


@pytest.fixture(scope="module")
def v1():
    return load_dataset("cater-gen-v1")


@pytest.fixture(scope="module")
def trained(v1, tmp_path_factory):
    """A tiny run on cater-gen-v1."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "vqvae_quality", lambda vqvae, images: {"psnr": 0.0})
        return training.train(v1, TINY, folder=folder, progress=False)


# ---------------------------------------------------------------- frames to train on

def test_pooled_frames_are_of_the_split_and_crops_lie_on_the_token_grid_with_what_is_behind(v1):
    source = training.FrameSource(v1, 3, seed=1, pool=6)
    images, behind = source.cut(4, 5, 88, 8)
    assert images.shape == behind.shape == (5, 3, 88, 88)
    assert torch.equal(images, training.FrameSource(v1, 3, seed=1, pool=6).batch(4, 5, 88, 8))
    whole, background = source.cut(4, 5)
    assert whole.shape == (5, 3, 128, 128) and torch.equal(background[0], source.background)
    videos = torch.cat([training.to_images(v1.video(v1.spec("train", index))) for index in range(3)])
    for image, back, frame in zip(images, behind, whole):
        assert (videos == frame).flatten(1).all(1).any(), "a frame of one of the pairs"
        assert any(torch.equal(image, frame[:, top:top + 88, left:left + 88])
                   and torch.equal(back, source.background[:, top:top + 88, left:left + 88])
                   for top in range(0, 41, 8) for left in range(0, 41, 8))
        assert ((image - back).abs() > 0.02).any(), "with something in it that the background has not"


def test_the_background_is_the_table_without_what_stands_on_it(v1):
    source = training.FrameSource(v1, 40, seed=0, pool=40)
    assert metrics.frame_psnr(source.background, empty_table()) > 38


def empty_table():
    from mage_core.cater.render import render

    return training.to_images(render([], np.zeros((1, 0, 3)), np.zeros((1, 0, 3)), 128))[0]


def test_a_split_without_samples_is_refused():
    with pytest.raises(ValueError, match="folder has no sample in its split 'train'"):
        training.FrameSource(FakeFolder(), None, 0)


class FakeFolder:
    name, endless, sizes = "folder", False, {"train": 0, "test": 0}


# ---------------------------------------------------------------- training and the table

def test_the_smoke_preset_is_that_of_the_dataset():
    assert SMOKE.vqvae.pool and SMOKE.vqvae.background and presets.preset("smoke") is presets.PRESETS["smoke"]
    for name in presets.PRESETS:
        chosen = presets.preset(name, "cater-gen-v2")
        assert chosen == presets.preset(name, "kth") and chosen.name == name and chosen.vqvae.pool
        config = presets.vqvae_config(chosen.vqvae, load_dataset("cater-gen-v2"))
        assert config.down == 8 and config.channels == 3 and config.background in (0, 128)


def test_a_run_ends_in_weights_a_card_and_a_table_of_four_rows(trained, v1):
    assert trained.card["dataset"] == "cater-gen-v1" and trained.card["mode"] == "explicit"
    assert "digit_set" not in trained.card and trained.dataset == v1
    again = weights.load(trained.path)
    assert again.dataset == v1 and torch.equal(again.vqvae.background, trained.vqvae.background)
    assert metrics.frame_psnr(trained.vqvae.background, empty_table()) > 30   # of as few pairs as TINY has
    rows = training.results(again, 2, progress=False)
    assert [row.name for row in rows] == ["MAGE", "first frame repeated", "VQ-VAE reconstruction", "perfect predictor"]
    assert all(row.n == 2 and np.isfinite(row.scores.psnr_frames) for row in rows)
    assert "MAGE" in metrics.table(rows)
    again.add_results(rows)
    assert len(json.loads(again.path.with_suffix(".json").read_text())["results"]) == 4


def test_tokens_are_sixteen_by_sixteen_and_still_where_nothing_moves(trained, v1):
    found = training.token_stillness(trained.vqvae, v1, count=3)
    assert found["changed_where_still"] < 0.05 and 0 < found["moved"] < 0.5
    assert clips.encode_frames(trained.vqvae, v1.clips([v1.spec("test", 0)], np.array([[0]]))).shape == (1, 1, 16, 16)


def test_captions_in_the_ambiguous_mode_train_on_the_same_tokens(trained, v1, monkeypatch):
    explicit = clips.token_clips(v1, trained.vqvae, "train", 3, vqvae_key="a", progress=False)
    monkeypatch.setattr(clips, "encode_frames", None)   # every token is there already
    ambiguous = load_dataset("cater-gen-v1", mode="ambiguous")
    tokens = clips.token_clips(ambiguous, trained.vqvae, "train", 3, vqvae_key="a", progress=False)
    assert (np.array_equal(tokens.token_ids, explicit.token_ids)
            and tokens.text_ids.tolist() != explicit.text_ids.tolist())


def test_the_command_line_trains_on_cater_and_prints_the_table(tmp_path, capsys):
    command = ["--dataset", "cater-gen-v1", "--captions", "ambiguous", "--preset", "smoke", "--run", str(tmp_path)]
    changes = ("pairs=2", "watch_clips=1", "vqvae.images=16", "vqvae.codebook_size=16", "vqvae.pool=8",
               "mage.samples=4", "mage.evaluate_every=4")
    training.main([*command, "--test-clips", "1", *(word for change in changes for word in ("--set", change))])
    out = capsys.readouterr().out
    assert "dataset cater-gen-v1 (ambiguous), seed 0" in out and "cater-gen-v1, 1 held-out test pairs" in out
    assert "| VQ-VAE reconstruction |" in out
    assert json.loads((tmp_path / "weights.json").read_text())["mode"] == "ambiguous"


# ---------------------------------------------------------------- the one call of the README

def test_generate_takes_an_image_of_128_pixels_and_a_sentence(trained, v1, tmp_path):
    spec = v1.spec("test", 3)
    image = v1.clips([spec], np.array([[0]]))[0, 0]
    video = mage_core.generate(image, v1.caption(spec), 0.5, weights=trained.path, save=tmp_path / "video.gif")
    assert video.shape == (10, 3, 128, 128) and (tmp_path / "video.gif").stat().st_size > 1000
    assert torch.equal(video[0], training.to_images(image[None])[0])
    Image.fromarray(image).save(tmp_path / "image.png")
    assert torch.equal(mage_core.generate(tmp_path / "image.png", v1.caption(spec).upper(), 0.5, weights=trained),
                       video)


def test_generate_says_what_is_wrong_with_an_image_or_a_sentence(trained, v1):
    large = cater.CaterGen("cater-gen-v1", image_size=256)
    image = large.clips([large.spec("test", 3)], np.array([[0]]))[0, 0]
    with pytest.raises(ValueError,
                       match=r"3 x 256 x 256 \(c H W\): these weights take 3 x 128 x 128; resize.*\(128, 128\)"):
        mage_core.generate(image, "the snitch is rotating.", 0.5, weights=trained)
    with pytest.raises(CaptionError, match="flying"):
        mage_core.generate(image[::2, ::2], "the snitch is flying.", 0.5, weights=trained)


# ---------------------------------------------------------------- folders of videos

@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder in the authors' layout."""
    pytest.importorskip("av", reason="videos need PyAV, the extra `video`")
    root = tmp_path_factory.mktemp("CATER-GEN-v1")
    return folders.write_folder("cater-gen-v1", root, sizes={"train": 3, "test": 2}, image_size=64, progress=False)


def test_a_folder_in_the_authors_layout_trains_unchanged(written, tmp_path, monkeypatch):
    dataset = load_dataset("cater-gen-v1", videos=written)
    drawn = load_dataset("cater-gen-v1")
    assert dataset.vocabulary == drawn.vocabulary and dataset.context_length == drawn.context_length
    for index in range(3):
        sentence = dataset.caption(dataset.spec("train", index))
        assert (sentence == drawn.caption(drawn.spec("train", index))
                and dataset.encode(sentence) == drawn.encode(sentence))
    trained = training.train(dataset, dataclasses.replace(TINY, pairs=100), folder=tmp_path, progress=False)
    rows = training.results(trained, 500, progress=False)
    assert [row.n for row in rows] == [2, 2, 2], "all that the folder has"
    again = weights.load(trained.path)
    assert str(written) not in json.dumps(again.card), "a card tells of videos, not of a place on a disk"
    image = dataset.video(dataset.spec("test", 0))[0]
    video = mage_core.generate(image, "the cone is sliding to (1, -3).", 0.5, weights=again)
    assert video.shape == (10, 3, 128, 128)
    with pytest.raises(ValueError, match="the videos of cater-gen-v1 .* are not here: give their folder"):
        again.dataset.spec("test", 0)


@pytest.fixture
def footage(tmp_path):
    """Two short films of one's own, with words of their own."""
    pytest.importorskip("av", reason="videos need PyAV, the extra `video`")
    draw = np.random.default_rng(0)
    for name in ("a", "b"):
        frames = np.repeat(draw.integers(256, size=(1, 40, 60, 3), dtype=np.uint8), 14, 0)
        for k, frame in enumerate(frames):
            frame[10:20, 2 * k:2 * k + 10] = 255
        folders.write_video(tmp_path / f"{name}.avi", frames)
    lists = {"train": [("a.avi", "A person is walking."), ("b.avi", "A person is running.")],
             "test": [("a.avi", "A person is running.")]}
    for split, pairs in lists.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(
            {str(k): {"video": video, "caption": said} for k, (video, said) in enumerate(pairs)}))
    return tmp_path


def test_footage_of_ones_own_trains_and_its_card_alone_knows_its_words(footage, tmp_path):
    dataset = load_dataset("walks", videos=footage)
    trained = training.train(dataset, TINY, folder=tmp_path / "run", progress=False)
    again = weights.load(trained.path)
    for path in footage.glob("*.avi"):
        path.unlink()
    assert again.dataset == dataset.language and again.dataset.vocabulary[3:] == (
        ".", "a", "is", "person", "running", "walking")
    image = np.zeros((128, 128, 3), np.uint8)
    video = mage_core.generate(image, "a Person is walking .", 0.5, weights=again)
    assert video.shape == (10, 3, 128, 128)
    with pytest.raises(ValueError, match="unknown word 'flying'.*person, running, walking"):
        mage_core.generate(image, "a person is flying.", 0.5, weights=again)
    with pytest.raises(ValueError, match="has 6 words and marks: the captions of this folder have at most 5"):
        mage_core.generate(image, "a person is walking running.", 0.5, weights=again)


def recaption(footage, change):
    for split in ("train", "test"):
        path = footage / f"{split}.json"
        path.write_text(path.read_text().replace(*change))


def test_new_tokens_need_the_videos_of_the_weights_that_are_gone_on_from(footage, tmp_path, monkeypatch):
    dataset = load_dataset("walks", videos=footage)
    base = training.train(dataset, TINY, folder=tmp_path / "run", progress=False)
    chosen = dataclasses.replace(TINY, vqvae=dataclasses.replace(TINY.vqvae, codebook_size=12))
    given = {"folder": tmp_path / "more", "progress": False, "new_tokens": True}
    more = training.train(dataset, chosen, start=weights.load(base.path), **given)
    assert more.vqvae.config.codebook_size == 12 and more.card["start"]["sha256"] == base.card["sha256"]
    recaption(footage, ("running", "dancing"))
    with pytest.raises(ValueError, match="fitted on the videos of walks .*have other words"):
        training.train(load_dataset("walks", videos=footage), chosen, start=weights.load(base.path),
                       **given | {"folder": tmp_path / "none"})
    assert not list((tmp_path / "none").iterdir())
    with pytest.raises(ValueError, match="videos of walks that these weights were trained on are not here"):
        training.results(weights.load(base.path), 1)


def test_a_notebook_does_not_reuse_a_model_of_other_captions(footage, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(training, "preset", lambda name, dataset_name: TINY)
    asked = {"videos": footage, "progress": False}
    first = training.ready("walks", "tiny", **asked)
    assert fingerprint(training.ready("walks", "tiny", **asked).mage) == fingerprint(first.mage)
    assert "reused the tiny run of walks" in capsys.readouterr().out
    recaption(footage, ("running", "dancing"))
    other = training.ready("walks", "tiny", **asked)
    assert "reused" not in capsys.readouterr().out and "dancing" in other.card["videos"]["vocabulary"]


def test_another_video_under_the_same_name_is_another_content(footage):
    before, same = load_dataset("walks", videos=footage), load_dataset("walks", videos=footage)
    assert before.content == same.content and before.source == same.source
    folders.write_video(footage / "a.avi", np.full((14, 40, 60, 3), 9, np.uint8))
    after = load_dataset("walks", videos=footage)
    assert after.content != before.content and after.source != before.source
