"""Frame indices against exact arithmetic, captions as ids, and the cache of tokens: never wrong, never half."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mage_core import captions, clips
from mage_core.clips import TokenClips, check_speed, encode_frames, frame_indices, load_dataset, text_ids, token_clips
from mage_core.moving_mnist import DATASETS, MovingMNIST
from mage_core.presets import PRESETS, vqvae_config
from mage_core.vqvae import VQVAE

speeds = st.floats(0, 1, exclude_min=True, exclude_max=True)
videos = st.integers(1, 400)
intervals = st.sampled_from([(1.0, 2.0), (3.0, 6.0)])   # Moving MNIST's and CATER-GEN's


# ---------------------------------------------------------------- speed and frame indices (4.2)

@pytest.mark.parametrize("speed", [0, 1, 0.0, 1.0, -0.1, 1.5, math.nan, math.inf, -math.inf, "fast", None, [0.5]])
def test_a_speed_outside_the_open_interval_is_shown_with_the_rule(speed):
    for ask in (check_speed, lambda value: frame_indices(20, value, (1.0, 2.0))):
        with pytest.raises(ValueError, match=r"open interval \(0, 1\); 0.1 is slow") as error:
            ask(speed)
        assert repr(speed) in str(error.value)


@given(speeds)
def test_a_speed_inside_comes_back_as_a_float(speed):
    for same in (speed, np.float64(speed), torch.tensor(speed, dtype=torch.float64)):
        assert check_speed(same) == speed and type(check_speed(same)) is float


@settings(max_examples=400)
@given(videos, speeds, intervals, st.integers(1, 16))
def test_frame_indices_are_the_formula_in_exact_arithmetic(length, speed, interval, clip_length):
    found = frame_indices(length, speed, interval, clip_length)
    assert found.dtype == np.int64 and found.shape == (clip_length,)
    low, high = interval
    count = max(1, round(length / (low + speed * (high - low))))
    for place, index in enumerate(found):
        if place >= count:   # the video ended: its last sampled frame stays
            assert index == found[min(count, clip_length) - 1]
            continue
        exact = Fraction(place * (length - 1), max(1, count - 1))
        # the released code divides in floating point, so that a whole number can come out a hair too small
        assert index == math.floor(exact) or (exact.denominator == 1 and index == exact - 1)


@settings(max_examples=200)
@given(videos, speeds, intervals)
def test_frame_indices_start_at_the_first_frame_and_never_go_back_or_beyond(length, speed, interval):
    found = frame_indices(length, speed, interval, 10)
    assert found[0] == 0 and found.max() <= length - 1 and (np.diff(found) >= 0).all()
    if 1 < (count := round(length / (interval[0] + speed * (interval[1] - interval[0])))) <= 10:
        assert found[count - 1] == length - 1, "a clip that reaches the video's end shows its last frame"


@settings(max_examples=200)
@given(videos, speeds, speeds, intervals)
def test_a_faster_clip_is_never_behind_a_slower_one(length, one, other, interval):
    slowest, fastest = sorted((one, other))
    # a video of less than one and a half intervals is one frame long, and that one is the first (the released rule)
    assume(round(length / (interval[0] + fastest * (interval[1] - interval[0]))) >= 2)
    slow, fast = (frame_indices(length, speed, interval, 10) for speed in (slowest, fastest))
    assert (fast >= slow).all()


def test_frame_indices_of_the_papers_clips():
    # by hand: 20 frames at intervals of 1.0..., 1.5 and 2.0...: 20, 13 and 10 frames, of which the first 10
    assert frame_indices(20, 1e-6, (1.0, 2.0)).tolist() == list(range(10))
    assert frame_indices(20, 0.5, (1.0, 2.0)).tolist() == [0, 1, 3, 4, 6, 7, 9, 11, 12, 14]
    assert frame_indices(20, 1 - 1e-6, (1.0, 2.0)).tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 19]
    assert frame_indices(6, 0.5, (1.0, 2.0)).tolist() == [0, 1, 3, 5, 5, 5, 5, 5, 5, 5]


# ---------------------------------------------------------------- datasets and captions

@pytest.mark.parametrize("name", DATASETS)
def test_datasets_load_by_name(name):
    assert load_dataset(name) == MovingMNIST(name, "mnist-5k")


def test_unknown_datasets_are_shown_with_the_known_ones():
    with pytest.raises(ValueError, match="'triple-mnist'.*single-mnist, double-mnist, modified-mnist"):
        load_dataset("triple-mnist")


def test_captions_become_rows_padded_at_the_end():
    dataset = load_dataset("modified-mnist")
    sentences = [dataset.caption(dataset.spec("train", index)) for index in range(12)]
    ids = text_ids(sentences, dataset.name)
    assert ids.dtype == torch.int64 and ids.shape[0] == 12 and len({len(s.split()) for s in sentences}) > 1
    for row, sentence in zip(ids.tolist(), sentences):
        encoded = captions.encode(sentence, dataset.name)
        assert row == encoded + [0] * (len(row) - len(encoded))
        assert captions.decode(encoded, dataset.name) == sentence
    with pytest.raises(captions.CaptionError, match="upp"):
        text_ids(["the digit 7 is moving upp then down ."], "single-mnist")


# ---------------------------------------------------------------- frames to tokens

class Averages(torch.nn.Module):
    """A stand-in for a VQ-VAE, exact and slow to be fooled: a token is its patch's mean brightness in 256 steps."""

    def __init__(self):
        super().__init__()
        self.config = vqvae_config(PRESETS["smoke"].vqvae, load_dataset("single-mnist"))
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = 0

    def encode(self, images):
        self.seen += len(images)
        assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
        return (torch.nn.functional.avg_pool2d(images, 4).mean(1).double() * 255).round().long()


def averages(frame: np.ndarray) -> np.ndarray:
    """The same of one 8-bit frame, in numpy."""
    pixels = frame.astype(np.float64).reshape(frame.shape[0] // 4, 4, frame.shape[1] // 4, 4, -1)
    return pixels.mean((1, 3, 4)).round()


@settings(max_examples=30)
@given(st.integers(0, 2 ** 32 - 1), st.integers(1, 3), st.integers(1, 7), st.booleans())
def test_frames_that_repeat_are_encoded_once_and_come_back_everywhere(seed, b, t, colour):
    draw = np.random.default_rng(seed)
    pictures = draw.integers(256, size=(3, 16, 16) + (3,) * colour, dtype=np.uint8)
    which = draw.integers(3, size=(b, t))
    if draw.random() < 0.5:
        which.sort(1)
    model = Averages()
    ids = encode_frames(model, pictures[which])
    assert ids.dtype == np.uint16 and ids.shape == (b, t, 4, 4)
    expected = np.stack([averages(picture) for picture in pictures])[which]
    assert np.abs(ids - expected).max() <= 1, "rounding apart, each frame has its own tokens"
    alone = np.stack([encode_frames(model, picture[None, None])[0, 0] for picture in pictures])
    assert np.array_equal(ids, alone[which])
    model.seen = 0
    encode_frames(model, pictures[which])
    assert model.seen == 1 + np.count_nonzero(np.diff(which.ravel())), "neighbours that are equal cost one encoding"


def test_frames_have_the_tokens_that_the_model_gives_each_alone(single, vqvae):
    specs = [single.spec("train", index) for index in range(2)]
    frames = single.clips(specs, np.array([[0, 1, 1, 1, 2], [3, 3, 4, 5, 5]]))
    ids = encode_frames(vqvae, frames)
    for row, clip in zip(ids, frames):
        for found, frame in zip(row, clip):
            assert np.array_equal(found, encode_frames(vqvae, frame[None, None])[0, 0])
    assert np.array_equal(ids[0, 1], ids[0, 2]) and not np.array_equal(ids[0, 2], ids[0, 4])


# ---------------------------------------------------------------- the cache of tokens

@pytest.fixture(scope="module")
def single():
    return load_dataset("single-mnist")


@pytest.fixture(scope="module")
def vqvae(single):
    torch.manual_seed(0)
    vqvae = VQVAE(vqvae_config(PRESETS["smoke"].vqvae, single)).eval()
    specs = [single.spec("train", index) for index in range(40)]
    vqvae.initialise(torch.from_numpy(single.clips(specs, np.zeros((40, 1), int))).float() / 255)
    return vqvae


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(dataset, model=None, split="train", count=5, *, vqvae_key="a", seed=0, **options):
    return token_clips(dataset, model or Averages(), split, count, vqvae_key=vqvae_key, seed=seed, progress=False,
                       **options)


def assert_same(one: TokenClips, other: TokenClips):
    assert np.array_equal(one.token_ids, other.token_ids) and np.array_equal(one.lengths, other.lengths)
    assert torch.equal(one.text_ids, other.text_ids)
    assert (one.interval, one.clip_length) == (other.interval, other.clip_length)


@pytest.mark.parametrize("name", ["single-mnist", "modified-mnist"])
def test_tokens_are_those_of_every_frame_and_the_captions_belong_to_them(cache, name):
    dataset = load_dataset(name)
    tokens = make(dataset, count=7, chunk=3)
    assert len(tokens) == 7 and tokens.token_ids.dtype == np.uint16
    specs = [dataset.spec("train", index) for index in range(7)]
    assert tokens.lengths.tolist() == [dataset.length(spec) for spec in specs]
    for index, spec in enumerate(specs):
        video = dataset.video(spec)
        expected = encode_frames(Averages(), video[None])[0]
        assert np.array_equal(tokens.token_ids[index, :len(video)], expected)
        assert (tokens.token_ids[index, len(video):] == expected[-1]).all(), "a short video goes on as its last frame"
        words = [word for word in tokens.text_ids[index].tolist() if word]
        assert captions.decode(words, name) == dataset.caption(spec)
    assert (tokens.interval, tokens.clip_length) == (dataset.interval, dataset.clip_length)


def test_a_batch_is_the_clips_at_their_speeds(cache, single):
    tokens = make(single)
    samples, etas = [3, 0, 3], [0.1, 0.5, 0.9]
    ids, text, speed = tokens.batch(samples, etas)
    assert ids.dtype == torch.int64 and ids.shape == (3, 10, 16, 16)
    assert torch.equal(text, tokens.text_ids[samples]) and torch.equal(speed, torch.tensor(etas))
    for clip, sample, eta in zip(ids, samples, etas):
        spec = single.spec("train", sample)
        frames = single.clips([spec], frame_indices(single.length(spec), eta, single.interval)[None])
        assert np.array_equal(clip.numpy(), encode_frames(Averages(), frames)[0])


def test_the_same_tokens_are_made_once(cache, single):
    model = Averages()
    first = make(single, model)
    path, = cache.iterdir()
    before, seen = (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()), model.seen
    again = make(single, model)
    assert_same(first, again)
    assert model.seen == seen and (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) == before
    assert list(cache.iterdir()) == [path]


class OtherDigits(MovingMNIST):
    """The same digits under another checksum."""

    @property
    def digits(self):
        return dataclasses.replace(load_dataset("single-mnist").digits, checksum="of other digits")


@pytest.mark.parametrize("change", [
    {"vqvae_key": "b"}, {"seed": 1}, {"split": "test"}, {"count": 4}, {"dataset": load_dataset("double-mnist")},
    {"dataset": OtherDigits("single-mnist", "mnist-5k")},
], ids=["VQ-VAE", "seed", "split", "count", "dataset", "digits' checksum"])
def test_anything_else_gets_a_file_of_its_own(cache, single, change):
    make(single)
    before, = cache.iterdir()
    content = before.read_bytes()
    model = Averages()
    make(**{"dataset": single, "model": model} | change)
    assert len(list(cache.iterdir())) == 2 and before.read_bytes() == content and model.seen


def test_the_digit_sets_name_is_in_the_key(cache):
    make(OtherDigits("single-mnist", "mnist-5k"))
    make(OtherDigits("single-mnist", "mnist-70k"))
    assert len(list(cache.iterdir())) == 2


def test_the_seed_makes_other_clips(cache, single):
    assert not np.array_equal(make(single).token_ids, make(single, seed=1).token_ids)


@pytest.fixture(scope="module")
def sound(single, tmp_path_factory):
    """A sound cache file's bytes, its name, and what it holds."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("sound")
        patch.setenv("MAGE_CACHE", str(folder))
        tokens = make(single)
        path, = folder.iterdir()
        return path.read_bytes(), path.name, tokens


@settings(max_examples=40)
@given(st.data())
def test_a_damaged_or_truncated_cache_is_made_again(sound, single, tmp_path_factory, data):
    content, name, expected = sound
    damaged = bytearray(content)
    if data.draw(st.booleans(), "truncated"):
        del damaged[data.draw(st.integers(0, len(content) - 1), "bytes left"):]
    else:
        place = data.draw(st.integers(0, len(content) - 1), "place")
        damaged[place] ^= data.draw(st.integers(1, 255), "flipped bits")
    folder = tmp_path_factory.mktemp("damaged")
    (folder / name).write_bytes(damaged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAGE_CACHE", str(folder))
        assert_same(make(single), expected)


def npz(folder, **arrays):
    np.savez(folder / "foreign.npz", **arrays)
    return (folder / "foreign.npz").read_bytes()


@pytest.mark.parametrize("foreign", [
    lambda tokens, folder: b"", lambda tokens, folder: b"not an array", lambda tokens, folder: b"PK\x03\x04",
    lambda tokens, folder: npz(folder, tokens=tokens[:-1]), lambda tokens, folder: npz(folder, tokens=tokens[:, :-1]),
    lambda tokens, folder: npz(folder, tokens=tokens.astype(np.int64)),
    lambda tokens, folder: npz(folder, other=tokens),
    lambda tokens, folder: npz(folder, tokens=np.array([print], dtype=object)),
], ids=["empty", "text", "half a zip", "fewer samples", "fewer frames", "another type", "another name", "a pickle"])
def test_a_foreign_file_in_the_caches_place_is_replaced(cache, sound, single, tmp_path, foreign):
    _, name, expected = sound
    cache.mkdir()
    (cache / name).write_bytes(foreign(expected.token_ids, tmp_path))
    model = Averages()
    assert_same(make(single, model), expected)
    assert model.seen and [path.name for path in cache.iterdir()] == [name]
    model.seen = 0
    assert_same(make(single, model), expected)
    assert not model.seen, "what was made again is kept"


def test_a_cache_is_written_whole_or_not_at_all(cache, single, monkeypatch):
    class Killed(BaseException):
        pass

    def torn(path, **arrays):
        path.write_bytes(b"PK\x03\x04 the first half")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(clips.np, "savez", torn)
        make(single)
    assert list(cache.iterdir()) == []
    assert_same(make(single), make(single))
