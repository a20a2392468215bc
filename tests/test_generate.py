"""`generate`: every kind of image, every wrong argument, and what is written where."""

import io
import itertools
import math
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

import mage_core
from mage_core import display, generate as module_or_function, weights
from mage_core.captions import CaptionError
from mage_core.clips import load_dataset, text_ids
from mage_core.generate import generate, generate_videos, read_image
from mage_core.machine import autocast
from mage_core.mage import MAGE, likely_mean
from mage_core.presets import PRESETS, mage_config, preset, vqvae_config
from mage_core.vqvae import VQVAE

SENTENCE = "the digit 7 is moving up then down ."


def untrained(dataset_name="single-mnist", **options):
    """Both stages with weights that make something of every input."""
    torch.manual_seed(0)
    dataset, chosen = load_dataset(dataset_name), PRESETS["smoke"]
    vqvae = VQVAE(vqvae_config(chosen.vqvae, dataset)).eval()
    specs = [dataset.spec("train", index) for index in range(40)]
    vqvae.initialise(torch.from_numpy(dataset.clips(specs, np.zeros((40, 1), int))).float() / 255)
    mage = MAGE(replace(mage_config(chosen.mage, dataset, vqvae.config.codebook_size), **options)).eval()
    mage.initialise_from_codes(vqvae.codebook)
    with torch.no_grad():
        for parameter in mage.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return vqvae, mage


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file of weights."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    weights.save(path, *untrained(), {"dataset": "single-mnist", "digit_set": "mnist-5k"})
    return path


@pytest.fixture(scope="module")
def trained(path):
    return weights.load(path)


@pytest.fixture(scope="module")
def pixels():
    """The first image of a test pair, uint8 (64, 64)."""
    dataset = load_dataset("single-mnist")
    return dataset.video(dataset.spec("test", 0))[0]


@pytest.fixture(scope="module")
def video(trained, pixels):
    return generate(pixels, SENTENCE, 0.5, weights=trained)


@pytest.fixture
def fp32(monkeypatch):
    """Without bf16, in which the arithmetic of a larger batch tips tokens that an untrained model finds nearly tied."""
    monkeypatch.setattr(sys.modules["mage_core.generate"], "autocast", lambda device: nullcontext())


# ---------------------------------------------------------------- what comes out

def test_the_call_of_the_readme_is_the_packages():
    assert mage_core.generate is generate is module_or_function and mage_core.load is weights.load


def test_a_video_starts_with_the_image_and_goes_on_in_its_range(video, pixels):
    assert video.shape == (10, 1, 64, 64) and video.dtype == torch.float32
    assert torch.equal(video[0, 0], torch.from_numpy(pixels).float() / 255)
    assert video.isfinite().all() and video.min() >= 0 and video.max() <= 1
    assert not torch.equal(video[1], video[9]), "an untrained model that makes a still video tests nothing"


def in_a_file(mode, suffix):
    def write(pixels, folder):
        path = folder / f"image{suffix}"
        Image.fromarray(pixels).convert(mode).save(path)
        return path
    return write


IMAGES = {
    "path to PNG": in_a_file("L", ".png"),
    "text path": lambda pixels, folder: str(in_a_file("L", ".png")(pixels, folder)),
    "colour PNG": in_a_file("RGB", ".png"),
    "PNG with alpha": in_a_file("RGBA", ".png"),
    "palette GIF": in_a_file("L", ".gif"),
    "PIL": lambda pixels, folder: Image.fromarray(pixels),
    "colour PIL": lambda pixels, folder: Image.fromarray(pixels).convert("RGB"),
    "uint8 H W": lambda pixels, folder: pixels,
    "uint8 H W c": lambda pixels, folder: pixels[..., None],
    "uint8 tensor": lambda pixels, folder: torch.from_numpy(pixels),
    "uint8 read backwards": lambda pixels, folder: np.ascontiguousarray(pixels[::-1])[::-1],
    "float c H W": lambda pixels, folder: pixels[None].astype(np.float32) / 255,
    "float64 H W": lambda pixels, folder: pixels.astype(np.float64) / 255,
    "float tensor": lambda pixels, folder: torch.from_numpy(pixels)[None].float() / 255,
    "float tensor with gradient": lambda pixels, folder: (torch.from_numpy(pixels) / 255).requires_grad_(),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_every_kind_of_image_makes_the_same_video(trained, pixels, video, tmp_path, kind):
    made = generate(IMAGES[kind](pixels, tmp_path), SENTENCE, 0.5, weights=trained)
    torch.testing.assert_close(made, video, atol=1e-6, rtol=0)
    assert not made.requires_grad


def test_weights_are_a_file_a_name_or_what_load_returned(path, trained, pixels, video, tmp_path, monkeypatch):
    assert torch.equal(generate(pixels, SENTENCE, 0.5, weights=path), video)
    assert torch.equal(generate(pixels, SENTENCE, 0.5, weights=str(path)), video)
    monkeypatch.setattr(weights, "data_folder", lambda: tmp_path)
    weights.save(tmp_path / "weights" / "mine.safetensors", trained.vqvae, trained.mage, trained.card)
    torch.testing.assert_close(generate(pixels, SENTENCE, 0.5, weights="mine"), video)


def test_a_deterministic_model_ignores_the_seed_and_forgives_spacing(trained, pixels, video):
    for other in ("The digit  7 is moving up then down.", f"  {SENTENCE.upper()}"):
        assert torch.equal(generate(pixels, other, 0.5, weights=trained, seed=5, device="cpu"), video)


def test_sentence_and_speed_are_read(trained, pixels, video):
    assert not torch.equal(generate(pixels, "the digit 7 is moving left then right .", 0.5, weights=trained), video)
    assert not torch.equal(generate(pixels, SENTENCE, 0.9, weights=trained), video)


def test_samples_of_a_deterministic_model_are_equal(fp32, trained, pixels):
    videos = generate(pixels, SENTENCE, 0.5, weights=trained, samples=3)
    assert videos.shape == (3, 10, 1, 64, 64)
    alone = generate(pixels, SENTENCE, 0.5, weights=trained, samples=1)
    torch.testing.assert_close(videos, alone.expand_as(videos), atol=1e-4, rtol=0)


def test_a_batch_is_its_videos_made_one_by_one(fp32, trained):
    dataset = load_dataset("single-mnist")
    specs = [dataset.spec("test", index) for index in range(3)]
    images = torch.stack([torch.from_numpy(dataset.video(spec)[0]).float() / 255 for spec in specs])[:, None]
    sentences, speeds = [dataset.caption(spec) for spec in specs], [spec.speed for spec in specs]
    batch = generate_videos(trained.vqvae, trained.mage, dataset.name, images, sentences, speeds)
    assert batch.shape == (3, 10, 1, 64, 64) and torch.equal(batch[:, 0], images)
    for together, image, sentence, speed in zip(batch, images, sentences, speeds):
        assert_rounded_alike(together, generate(image, sentence, speed, weights=trained))


def assert_rounded_alike(one, other):
    """A code at the edge of what still counts as likely may fall on either side of it by rounding."""
    apart = (one - other).abs()
    assert (apart > 1e-4).float().mean() < 0.005 and apart.max() < 0.05


def test_each_video_of_a_stochastic_model_has_its_own_seed_however_many_are_made_at_once(fp32, pixels, monkeypatch):
    vqvae, mage = untrained(stochastic=True)
    dataset = load_dataset("single-mnist")
    trained = weights.Trained(vqvae, mage, dataset.about)
    samples = generate(pixels, SENTENCE, 0.5, weights=trained, seed=5, samples=3)
    assert all((one - other).abs().max() > 0.05 for one, other in itertools.combinations(samples, 2))
    for k, sample in enumerate(samples):
        assert_rounded_alike(sample, generate(pixels, SENTENCE, 0.5, weights=trained, seed=5 + k))

    specs = [dataset.spec("test", index) for index in range(5)]
    images = torch.stack([torch.from_numpy(dataset.video(spec)[0]).float() / 255 for spec in specs])[:, None]
    given = [images, [dataset.caption(spec) for spec in specs], [0.1, 0.3, 0.5, 0.7, 0.9], [4, 9, 2, 7, 6]]
    monkeypatch.setattr(sys.modules["mage_core.generate"], "CLIPS_AT_ONCE", 2)
    together = generate_videos(vqvae, mage, dataset, *given)
    assert len(together) == 5
    for k, video in enumerate(together):
        alone, = generate_videos(vqvae, mage, dataset, *(every[k:k + 1] for every in given))
        assert_rounded_alike(video, alone)


# ---------------------------------------------------------------- tokens to pictures

def test_decoding_the_arg_max_is_the_released_way(trained, pixels):
    image = torch.from_numpy(pixels)[None, None].float() / 255
    made = generate_videos(trained.vqvae, trained.mage, "single-mnist", image, [SENTENCE], [0.5], decode="argmax")
    with autocast("cpu"):
        ids = trained.mage.generate(trained.vqvae.encode(image), text_ids([SENTENCE], "single-mnist"),
                                    torch.tensor([0.5]))
    expected = trained.vqvae.decode(ids[0])
    torch.testing.assert_close(made[0, 1:], expected[1:])


@pytest.mark.parametrize("bf16", [False, True])
def test_the_mean_code_of_a_sure_model_is_the_code_itself(bf16):
    codes, ids = torch.randn(9, 5), torch.tensor([[3, 0], [8, 3]])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert torch.equal(likely_mean(1e4 * torch.nn.functional.one_hot(ids, 9).float(), codes), codes[ids])


def test_the_mean_code_is_that_of_the_likely_tokens(fp32, trained, pixels):
    image = torch.from_numpy(pixels)[None, None].float() / 255
    mage, vqvae = untrained()[1], trained.vqvae
    given = vqvae.encode(image), text_ids([SENTENCE], "single-mnist"), torch.tensor([0.5])
    ids, codes = mage.generate(*given, codes=vqvae.codebook)
    assert torch.equal(ids, mage.generate(*given)) and codes.shape == (*ids.shape, vqvae.config.code_channels)
    assert torch.equal(codes[:, 0], vqvae.codebook[ids[:, 0]])
    with torch.no_grad():
        logits = mage(ids, *given[1:]).logits.flatten(0, -2)
        for found, token in zip(codes[:, 1:].flatten(0, -2)[::37], logits[::37]):
            likely = [index for index in range(len(token)) if token[index] > token.max() + math.log(0.02)]
            shares = [math.exp(token[index] - token.max()) for index in likely]
            expected = sum(share * vqvae.codebook[index] for share, index in zip(shares, likely)) / sum(shares)
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        mage.generator.logits.weight.mul_(1e6)   # sure of everything: both ways decode the same picture
        mage.generator.logits.bias.mul_(1e6)
    videos = [generate_videos(vqvae, mage, "single-mnist", image, [SENTENCE], [0.5], decode=way)
              for way in ("mean", "argmax")]
    torch.testing.assert_close(*videos, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="'best'.*'mean', 'argmax' or 'still'"):
        generate_videos(vqvae, mage, "single-mnist", image, [SENTENCE], [0.5], decode="best")


def test_what_stays_still_shows_the_images_own_pixels(fp32, trained, pixels):
    image = torch.from_numpy(pixels)[None, None].float() / 255
    mage, vqvae = untrained()[1], trained.vqvae
    ids = mage.generate(vqvae.encode(image), text_ids([SENTENCE], "single-mnist"), torch.tensor([0.5]))[0]
    still, mean = (generate_videos(vqvae, mage, "single-mnist", image, [SENTENCE], [0.5], decode=way)[0]
                   for way in ("still", "mean"))
    for frame in range(1, 10):
        for row in range(16):
            for column in range(16):
                cell = (frame, 0, slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
                same = ids[frame, row, column] == ids[0, row, column]
                assert torch.equal(still[cell], image[(0, *cell[1:])] if same else mean[cell])
    assert 0 < (ids[1:] == ids[0]).float().mean() < 1, "both kinds of token"


@pytest.mark.parametrize("background, way", [(False, "mean"), (True, "still")])
def test_a_camera_that_stands_still_is_decoded_so_by_default(background, way):
    dataset = load_dataset("cater-gen-v1")
    recipe = preset("smoke", dataset.name)
    torch.manual_seed(0)
    vqvae = VQVAE(vqvae_config(replace(recipe.vqvae, background=background), dataset)).eval()
    mage = MAGE(mage_config(recipe.mage, dataset, vqvae.config.codebook_size)).eval()
    spec = dataset.spec("test", 0)
    given = (vqvae, mage, dataset, torch.rand(1, 3, 128, 128), [dataset.caption(spec)], [0.5])
    assert torch.equal(generate_videos(*given), generate_videos(*given, decode=way))
    other = {"mean": "still", "still": "mean"}[way]
    assert not torch.equal(generate_videos(*given), generate_videos(*given, decode=other))


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("name", ["video.gif", "folder/video.GIF"])
def test_the_video_is_saved_as_it_was_made(trained, pixels, video, tmp_path, name):
    made = generate(str(in_a_file("L", ".png")(pixels, tmp_path)), SENTENCE, 0.5, weights=trained, save=tmp_path / name)
    assert torch.equal(made, video)
    with Image.open(tmp_path / name) as gif:
        assert gif.format == "GIF" and gif.size == (256, 256)
        shown = []
        for index in range(gif.n_frames):
            gif.seek(index)
            shown.append(np.asarray(gif.convert("L"))[::4, ::4])
    # a GIF keeps one picture of neighbours that are equal
    frames = display.frames_uint8(video)
    different = [0] + [index for index in range(1, 10) if not np.array_equal(frames[index], frames[index - 1])]
    assert np.array_equal(shown, frames[different])
    assert {file.suffix for file in (tmp_path / name).parent.iterdir()} <= {".gif", ".GIF", ".png"}


def test_an_mp4_has_every_frame(trained, pixels, tmp_path):
    av = pytest.importorskip("av", reason="the video extra is not installed")
    generate(pixels, SENTENCE, 0.5, weights=trained, save=tmp_path / "video.mp4")
    with av.open(io.BytesIO((tmp_path / "video.mp4").read_bytes())) as file:
        assert sum(1 for _ in file.decode(video=0)) == 10


def test_of_several_samples_the_first_is_saved(trained, pixels, tmp_path):
    generate(pixels, SENTENCE, 0.5, weights=trained, save=tmp_path / "one.gif")
    videos = generate(pixels, SENTENCE, 0.5, weights=trained, samples=2, save=tmp_path / "two.gif")
    assert (tmp_path / "two.gif").read_bytes() == display.gif_bytes(videos[0], scale=4)


# ---------------------------------------------------------------- wrong arguments, before any model runs

@pytest.fixture
def no_model_runs(monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("a model ran before the arguments were checked")
    for kind, method in ((VQVAE, "encode"), (VQVAE, "features"), (MAGE, "generate"), (VQVAE, "decode_codes")):
        monkeypatch.setattr(kind, method, run)


@pytest.mark.parametrize("speed", [0, 1, 1.5, -0.5, math.nan, math.inf, "fast", None])
def test_speeds_outside_the_open_interval(no_model_runs, trained, pixels, speed):
    with pytest.raises(ValueError, match=r"open interval \(0, 1\); 0.1 is slow") as error:
        generate(pixels, SENTENCE, speed, weights=trained)
    assert f"speed is {speed!r}" in str(error.value)


@pytest.mark.parametrize("sentence, shown", [
    ("the digit 7 is mooving up then down .", "mooving.*moving"), ("", "the digit"),
    ("the digit 7 is moving up .", "then"),
    ("the digit 7 is moving up then down . again", "again"), (7, "7"), (None, "None")])
def test_sentences_that_do_not_parse(no_model_runs, trained, pixels, sentence, shown):
    with pytest.raises(CaptionError, match=f"(?s){shown}"):
        generate(pixels, sentence, 0.5, weights=trained)


def noise(*shape, dtype=np.uint8):
    draw = np.random.default_rng(0)
    return draw.integers(256, size=shape).astype(np.uint8) if dtype is np.uint8 else draw.random(shape).astype(dtype)


@pytest.mark.parametrize("image, rule", [
    (noise(32, 32), r"1 x 32 x 32 \(c H W\).*take 1 x 64 x 64; resize"),
    (noise(64, 64, 3), r"3 x 64 x 64.*take 1 x 64 x 64.*convert"),
    (noise(3, 64, 64, dtype=np.float32), r"3 x 64 x 64.*take 1 x 64 x 64"),
    (noise(64, 64, 1, dtype=np.float32), r"64 x 64 x 1.*take 1 x 64 x 64"),
    (noise(1, 64, 64), r"64 x 1 x 64.*take 1 x 64 x 64"),
    (noise(1, 1, 64, 64), r"1 x 1 x 64 x 64.*take 1 x 64 x 64"),
    (noise(0, 0, dtype=np.float32), r"1 x 0 x 0.*take 1 x 64 x 64"),
    (noise(64, 64, dtype=np.float32) * 255, r"from 0\.\d+ to 2\d\d.*in \[0, 1\]; divide by 255"),
    (noise(64, 64, dtype=np.float32) - 1, r"from -0?\.?\d+ to -?\S+: float images are in \[0, 1\]"),
    (np.full((64, 64), np.nan), r"nan.*in \[0, 1\]"),
    (noise(64, 64).astype(np.int64), r"int64: give uint8 \(H W c\) or float \(c H W\)"),
    (noise(64, 64) > 128, r"bool: give uint8"),
    (noise(64, 64).astype(np.uint16), r"uint16: give uint8"),
    (noise(64, 64).astype(object), r"object.*uint8 \(H W c\)"),
    (None, r"'None' is a NoneType.*give a path.*uint8"), ({"image": 1}, r"dict that.*give a path.*uint8"),
    ([[1, 2], [3]], r"list that cannot be read as numbers.*give a path.*uint8"),
    (Image.fromarray(noise(64, 64).astype(np.uint16) * 257), r"mode is 'I;16', more than 8 bits.*scale it to 8 bits"),
    (Image.fromarray(noise(64, 64).astype(np.int32)), r"mode is 'I', more than 8 bits"),
    (Image.fromarray(noise(64, 64, dtype=np.float32)), r"mode is 'F', more than 8 bits"),
    (Image.new("L", (64, 32)), r"1 x 32 x 64.*take 1 x 64 x 64; resize.*resize\(\(64, 64\)\)"),
    (Image.new("La", (64, 64)), "mode is 'La'.*convert it first"),
    ("no-such-file.png", "'no-such-file.png' is not a file: give the path of a PNG or JPEG"),
], ids=lambda value: None if isinstance(value, str) else "image")
def test_images_of_another_size_or_kind(no_model_runs, trained, image, rule):
    with pytest.raises(ValueError, match=rule):
        generate(image, SENTENCE, 0.5, weights=trained)


def test_files_that_are_no_pictures(no_model_runs, trained, tmp_path, pixels, monkeypatch):
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    half = in_a_file("L", ".png")(pixels, tmp_path)
    half.write_bytes(half.read_bytes()[:200])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)   # twice that is an error
    huge = in_a_file("L", ".png")(pixels, tmp_path)
    for path in (text, half, tmp_path, huge, "a\0b"):
        with pytest.raises(ValueError, match="cannot be read as a picture: give a PNG or JPEG") as error:
            generate(path, SENTENCE, 0.5, weights=trained)
        assert repr(str(path)) in str(error.value)


def test_weights_that_are_not_there(no_model_runs, pixels, tmp_path, path):
    with pytest.raises(ValueError, match="no weights are named 'nothing': there are .*give the path of a .safetensors"):
        generate(pixels, SENTENCE, 0.5, weights="nothing")
    with pytest.raises(ValueError, match=r"gone\.safetensors is not a file: give the path"):
        generate(pixels, SENTENCE, 0.5, weights=tmp_path / "gone.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"damaged\.safetensors cannot be read.*again if it is damaged"):
        generate(pixels, SENTENCE, 0.5, weights=damaged)


@pytest.mark.parametrize("name", ["video.avi", "video", "video.gif.txt"])
def test_names_that_are_no_video(no_model_runs, trained, pixels, tmp_path, name):
    with pytest.raises(ValueError, match=r"the name must end in \.gif or \.mp4") as error:
        generate(pixels, SENTENCE, 0.5, weights=trained, save=tmp_path / name)
    assert name in str(error.value) and not list(tmp_path.iterdir())


def test_mp4_without_its_extra_is_refused_before_the_work(no_model_runs, monkeypatch, trained, pixels, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match="pip install av.*GIF"):
        generate(pixels, SENTENCE, 0.5, weights=trained, save=tmp_path / "video.mp4")


@pytest.mark.parametrize("place, why", [("folder.gif", "it is a folder"), ("file.txt/video.gif", ""),
                                        ("v" * 252 + ".gif", "too long"), ("deep/" + "v" * 300 + "/video.gif", "")])
def test_places_that_cannot_be_written_are_told_before_the_work(no_model_runs, trained, pixels, tmp_path, place, why):
    (tmp_path / "folder.gif").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(ValueError, match=f"cannot be written .*{why}.*name a file in a folder where you can write"):
        generate(pixels, SENTENCE, 0.5, weights=trained, save=tmp_path / place)
    assert {path.name for path in tmp_path.iterdir()} <= {"folder.gif", "file.txt", "deep"}


def test_a_long_name_and_the_users_own_folder_are_places(trained, pixels, video, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    name = "v" * 250 + ".gif"
    generate(pixels, SENTENCE, 0.5, weights=trained, save=f"~/new/{name}")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


@pytest.mark.parametrize("samples", [0, -1, 2.0])
def test_numbers_of_samples(no_model_runs, trained, pixels, samples):
    with pytest.raises(ValueError, match=f"samples is {samples}: it must be at least 1"):
        generate(pixels, SENTENCE, 0.5, weights=trained, samples=samples)


# ---------------------------------------------------------------- reading images

@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_what_is_transparent_is_before_black(pixels, tmp_path, mode):
    shape = Image.new("L", (64, 64), 255)
    shape.putalpha(Image.fromarray(pixels))   # white throughout, the digit in its transparency
    if mode == "P":
        shape = Image.fromarray(np.where(pixels > 127, 1, 0).astype(np.uint8), mode="P")
        shape.putpalette([255, 255, 255, 255, 255, 255])
        shape.info["transparency"] = bytes([0, 255])
    path = tmp_path / "digit.png"
    (shape if mode == "P" else shape.convert(mode)).save(path)
    expected = np.where(pixels > 127, 255, 0) if mode == "P" else pixels
    assert np.abs(read_image(path, 64, 1)[0].numpy() * 255 - expected).max() <= 1

def test_colour_images_are_read_in_colour(tmp_path):
    pixels = noise(8, 8, 3)
    expected = rearrange(torch.from_numpy(pixels), "h w c -> c h w").float() / 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    for image in (pixels, expected, expected.numpy(), Image.fromarray(pixels), tmp_path / "image.png"):
        torch.testing.assert_close(read_image(image, 8, 3), expected, atol=1e-7, rtol=0)
    grey = read_image(Image.fromarray(pixels[..., 0]), 8, 3)
    assert torch.equal(grey, expected[:1].expand(3, -1, -1))


def test_a_photo_is_turned_as_viewers_turn_it(tmp_path):
    shown = Image.fromarray(np.random.default_rng(0).integers(256, size=(64, 64), dtype=np.uint8))
    about = Image.Exif()
    about[0x0112] = 6   # the camera was held upright
    shown.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=about)
    assert torch.equal(read_image(tmp_path / "photo.png", 64, 1), read_image(shown, 64, 1))


@pytest.mark.parametrize("change, message", [
    ({"speeds": [7.0, 0.5]}, "speed"), ({"speeds": [math.nan, 0.5]}, "speed"),
    ({"images": 255 * torch.rand(2, 1, 64, 64)}, "images has values from .* divide by 255"),
    ({"images": torch.zeros(2, 1, 64, 64, dtype=torch.uint8)}, "images are torch.uint8"),
    ({"images": torch.full((2, 1, 64, 64), math.nan)}, "images has values that are not finite"),
    ({"images": torch.rand(3, 1, 64, 64)}, "3 images, 2 sentences and 2 speeds"),
    ({"images": torch.rand(0, 1, 64, 64), "sentences": [], "speeds": []}, "at least one")])
def test_a_batch_is_checked_as_one_image_is(trained, change, message):
    given = {"images": torch.rand(2, 1, 64, 64), "sentences": ["the digit 7 is moving up then down ."] * 2,
             "speeds": [0.3, 0.5]} | change
    with pytest.raises(ValueError, match=message):
        generate_videos(trained.vqvae, trained.mage, trained.dataset, **given)


@pytest.mark.parametrize("seed", [-1, 2 ** 63, 1.5, math.nan, "a", None])
def test_a_seed_is_a_whole_number_that_fits(trained, seed):
    with pytest.raises(ValueError, match="seed is .*whole number from 0 to"):
        generate(Image.new("L", (64, 64)), "the digit 7 is moving up then down .", 0.5, weights=trained, seed=seed)


def test_what_is_wrong_is_told_before_a_folder_is_made(no_model_runs, trained, pixels, tmp_path):
    for wrong, rule in (({"caption": "the digt 7"}, "digt"), ({"image": pixels[:32]}, "1 x 32 x 64"),
                        ({"samples": True}, "samples is True"), ({"device": "foo"}, "'foo': this machine has 'cpu'"),
                        ({"device": "cuda:99"}, "'cuda:99': this machine has 'cpu'"),
                        ({"device": "meta"}, "'meta': this machine has 'cpu'")):
        given = {"image": pixels, "caption": SENTENCE, "speed": 0.5, "save": tmp_path / "new" / "x.gif"} | wrong
        with pytest.raises(ValueError, match=rule):
            generate(weights=trained, **given)
        assert not (tmp_path / "new").exists()


def test_a_picture_in_ones_own_folder(monkeypatch, tmp_path, pixels):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(read_image("~/a.png", 64, 1), read_image(pixels, 64, 1))
