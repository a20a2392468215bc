"""Frame indices against exact arithmetic, captions as ids, and the cache of tokens: never wrong, never half."""

import dataclasses
import json
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mage_core import captions, cater, clips
from mage_core.batches import Clips
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
    with pytest.raises(ValueError, match="'triple-mnist'.*single-mnist, double-mnist, modified-mnist, cater-gen-v1"):
        load_dataset("triple-mnist")
    with pytest.raises(ValueError, match="single-mnist is drawn here and has no folder"):
        load_dataset("single-mnist", videos=".")
    with pytest.raises(ValueError, match="unknown captions 'clear': use one of explicit, ambiguous"):
        load_dataset("cater-gen-v2", mode="clear")
    with pytest.raises(FileNotFoundError, match="no folder no-such-folder"):
        load_dataset("cater-gen-v1", videos="no-such-folder")


@pytest.mark.parametrize("name", [*DATASETS, *cater.DATASETS])
def test_every_dataset_is_told_by_a_card_and_has_the_parts_that_the_house_asks_for(name):
    dataset = load_dataset(name)
    told = json.loads(json.dumps(dataset.about))
    assert clips.described(told) == dataset and dataset.endless and set(dataset.sizes) == {"train", "test"}
    assert len(dataset.vocabulary) == len(set(dataset.vocabulary)) and dataset.interval[0] < dataset.interval[1]
    sentences = [dataset.caption(dataset.spec("test", index)) for index in range(20)]
    for sentence in sentences:
        assert len(dataset.encode(sentence)) <= dataset.context_length
        assert dataset.tidy("  " + sentence.upper()) == sentence
    assert torch.equal(text_ids(sentences, dataset), text_ids(sentences, name))
    with pytest.raises(captions.CaptionError):
        dataset.tidy("the digit cone is sliding")


def test_captions_are_explicit_or_ambiguous_and_the_card_says_which():
    explicit, ambiguous = (load_dataset("cater-gen-v1", mode=mode) for mode in cater.MODES)
    assert explicit != ambiguous == clips.described(ambiguous.about)
    assert explicit.content == ambiguous.content, "the same frames, so the same tokens"
    assert explicit.source != ambiguous.source, "runs of their own"


def test_how_many_samples_are_used_and_which_are_watched():
    single = load_dataset("single-mnist")
    assert [clips.available(single, "train", wanted) for wanted in (None, 7, 20_000)] == [10_000, 7, 20_000]
    split, indices = clips.watched(single, 5)
    assert split == "test" and len(indices) == 5 and indices[0] >= single.sizes["test"], "never those of the table"
    folder = SimpleNamespace(endless=False, sizes={"train": 3, "test": 2})
    assert [clips.available(folder, "train", wanted) for wanted in (None, 2, 9)] == [3, 2, 3]
    assert clips.watched(folder, 9) == ("train", range(3))
    folder.sizes["validation"] = 1
    assert clips.watched(folder, 9) == ("validation", range(1))


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


def files(folder):
    """All files of a folder, at any depth, by name."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


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
        shown = np.unique([frame_indices(len(video), eta, dataset.interval) for eta in np.arange(0.01, 1, 0.01)])
        assert np.array_equal(tokens.token_ids[index, shown], expected[shown]), "every frame that some speed shows"
        for frame in set(range(len(video))) - set(shown.tolist()):
            assert np.array_equal(tokens.token_ids[index, frame], expected[shown[shown < frame].max()])
        assert (tokens.token_ids[index, len(video):] == expected[shown[-1]]).all(), (
            "a short video goes on as its last frame")
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
    path, = files(cache)
    before, seen = (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()), model.seen
    again = make(single, model)
    assert_same(first, again)
    assert model.seen == seen and (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) == before
    assert files(cache) == [path]


class OtherDigits(MovingMNIST):
    """The same digits under another checksum."""

    @property
    def digits(self):
        return dataclasses.replace(load_dataset("single-mnist").digits, checksum="of other digits")


@pytest.mark.parametrize("change", [
    {"vqvae_key": "b"}, {"seed": 1}, {"split": "test"}, {"count": 4}, {"dataset": load_dataset("double-mnist")},
    {"dataset": OtherDigits("single-mnist", "mnist-5k")}, {"first_pair": 1}, {"speeds": 2},
], ids=["VQ-VAE", "seed", "split", "count", "dataset", "digits' checksum", "first pair", "speeds"])
def test_anything_else_gets_a_file_of_its_own(cache, single, change):
    make(single)
    before, = files(cache)
    content = before.read_bytes()
    model = Averages()
    make(**{"dataset": single, "model": model} | change)
    assert len(files(cache)) == 2 and before.read_bytes() == content and model.seen


def test_the_digit_sets_name_is_in_the_key(cache):
    make(OtherDigits("single-mnist", "mnist-5k"))
    make(OtherDigits("single-mnist", "mnist-70k"))
    assert len(files(cache)) == 2


class Chosen(MovingMNIST):
    """A dataset whose user chooses which frames are shown, as that of a folder does; `said` stands in its captions."""

    endless, said = False, "0"

    def caption(self, spec):
        return f"the digit {self.said} is moving up then down ."


@pytest.mark.parametrize("change", [{"interval": (3.0, 6.0)}, {"clip_length": 5}], ids=["interval", "clip length"])
def test_a_folder_shown_at_other_frames_has_tokens_of_its_own(cache, change):
    make(Chosen("single-mnist", "mnist-5k"))
    other = type("Other", (Chosen,), change)("single-mnist", "mnist-5k")
    assert_same(make(other), make(other, vqvae_key="nothing of it is there"))
    assert len(files(cache)) == 3


def test_tokens_do_not_depend_on_captions_which_are_read_anew(cache):
    before, model = make(Chosen("single-mnist", "mnist-5k")), Averages()
    after = make(type("Other", (Chosen,), {"said": "1"})("single-mnist", "mnist-5k"), model)
    assert not model.seen and np.array_equal(after.token_ids, before.token_ids)
    assert not torch.equal(after.text_ids, before.text_ids)


@pytest.mark.parametrize("name", ["single-mnist", "modified-mnist"])
def test_pairs_with_few_speeds_have_the_tokens_of_their_own_clips_alone(cache, name):
    dataset, model = load_dataset(name), Averages()
    tokens = make(dataset, model, count=6, speeds=3, chunk=4)
    assert tokens.token_ids.shape == (6, 30, 16, 16) and tokens.speeds.shape == (6, 3)
    assert len(np.unique(tokens.speeds)) == 18 and tokens.speeds.min() > 0 and tokens.speeds.max() < 1
    everything = make(dataset, vqvae_key="of all frames", count=6)
    assert model.seen <= 6 * 30
    samples, asked = np.array([4, 0, 5, 4]), np.array([0.01, 0.34, 0.99, 0.66])
    own = tokens.speeds[samples, [0, 1, 2, 1]]
    for found in (tokens.batch(samples, asked), Clips(tokens).batch(samples, asked)):
        for part, expected in zip(found, everything.batch(samples, own), strict=True):
            assert torch.equal(part, expected)
    again = make(dataset, Averages(), count=6, speeds=3, chunk=5, vqvae_key="in other parts")
    assert_same(tokens, again)
    assert np.array_equal(tokens.speeds, again.speeds)
    assert not np.array_equal(tokens.speeds, make(dataset, count=6, speeds=3, seed=1).speeds)


@pytest.mark.parametrize("speeds", [None, 2])
def test_pairs_can_begin_anywhere(cache, single, speeds):
    whole, later = make(single, count=7, speeds=speeds), make(single, count=4, first_pair=3, speeds=speeds)
    assert np.array_equal(later.token_ids, whole.token_ids[3:]) and torch.equal(later.text_ids, whole.text_ids[3:])
    assert speeds is None or np.array_equal(later.speeds, whole.speeds[3:])
    model = Averages()
    assert_same(make(single, model, count=4, first_pair=3, speeds=speeds), later)
    assert not model.seen


def test_the_seed_makes_other_clips(cache, single):
    assert not np.array_equal(make(single).token_ids, make(single, seed=1).token_ids)


@pytest.fixture(scope="module")
def sound(single, tmp_path_factory):
    """A sound cache file's bytes, its name, and what it holds."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("sound")
        patch.setenv("MAGE_CACHE", str(folder))
        tokens = make(single)
        path, = files(folder)
        return path.read_bytes(), path.relative_to(folder), tokens


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
    (folder / name).parent.mkdir()
    (folder / name).write_bytes(damaged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAGE_CACHE", str(folder))
        assert_same(make(single), expected)


def npz(folder, **arrays):
    np.savez(folder / "foreign.npz", **arrays)
    return (folder / "foreign.npz").read_bytes()


@pytest.mark.parametrize("foreign", [
    lambda tokens, folder: b"", lambda tokens, folder: b"not an array", lambda tokens, folder: b"PK\x03\x04",
    lambda tokens, folder: npz(folder, rows=tokens[:-1]), lambda tokens, folder: npz(folder, rows=tokens[:, :-1]),
    lambda tokens, folder: npz(folder, rows=tokens.astype(np.int64)),
    lambda tokens, folder: npz(folder, other=tokens),
    lambda tokens, folder: npz(folder, rows=np.array([print], dtype=object)),
], ids=["empty", "text", "half a zip", "fewer samples", "fewer frames", "another type", "another name", "a pickle"])
def test_a_foreign_file_in_the_caches_place_is_replaced(cache, sound, single, tmp_path, foreign):
    _, name, expected = sound
    (cache / name).parent.mkdir(parents=True)
    (cache / name).write_bytes(foreign(expected.token_ids, tmp_path))
    model = Averages()
    assert_same(make(single, model), expected)
    assert model.seen and files(cache) == [cache / name]
    model.seen = 0
    assert_same(make(single, model), expected)
    assert not model.seen, "what was made again is kept"


class Killed(BaseException):
    pass


def test_a_run_that_is_killed_goes_on_with_the_parts_that_it_lacks(cache, single):
    class Dying(Averages):
        def encode(self, images):
            if self.seen > 100:
                raise Killed
            return super().encode(images)

    expected = make(single, count=12, chunk=12, vqvae_key="whole")
    with pytest.raises(Killed):
        make(single, Dying(), count=12, chunk=3)
    before = {path: path.read_bytes() for path in files(cache)}
    model = Averages()
    assert_same(make(single, model, count=12, chunk=3), expected)
    assert len(before) > 1 and all(path.read_bytes() == content for path, content in before.items())
    left = 12 - 3 * (len(before) - 1)   # one file is the expected tokens'
    assert 0 < left < 12 and model.seen <= 20 * left, "what was there was not made again"


def test_runs_of_other_sizes_share_their_parts(cache, single):
    few, model = make(single, count=6, chunk=3), Averages()
    more = make(single, model, count=8, chunk=3)
    assert np.array_equal(more.token_ids[:6], few.token_ids) and 0 < model.seen <= 2 * 20


def test_only_frames_that_some_speed_shows_are_drawn(cache, monkeypatch):
    v1 = load_dataset("cater-gen-v1")
    shown = {int(frame) for eta in np.arange(0.001, 1, 0.001) for frame in frame_indices(31, eta, v1.interval)}
    asked = []

    def clips_(self, specs, indices):
        asked.append((len(specs), set(np.unique(indices).tolist())))
        return np.broadcast_to(np.uint8([[0]])[..., None, None, None], (*indices.shape, 128, 128, 3))

    monkeypatch.setattr(cater.CaterGen, "clips", clips_)
    model = Averages()
    model.config = dataclasses.replace(model.config, down=8)
    monkeypatch.setattr(Averages, "encode", lambda self, images: torch.zeros(len(images), 16, 16, dtype=torch.long))
    tokens = make(v1, model, count=50)
    assert all(frames == shown for _, frames in asked) and len(shown) < 31
    assert max(number for number, _ in asked) <= clips.CLIPS_AT_ONCE, (
        "memory for the pixels of a few videos, not of all")
    assert tokens.token_ids.shape == (50, 31, 16, 16) and sum(number for number, _ in asked) == 50


def test_a_pool_of_frames_is_a_function_of_its_seed_kept_part_by_part(cache, single):
    pool = clips.frame_pool(single, "train", range(4), 10, seed=2, chunk=4, progress=False)
    assert pool.shape == (10, 64, 64) and pool.dtype == np.uint8 and len(files(cache)) == 3
    for k, frame in enumerate(pool):
        video = single.video(single.spec("train", k % 4))
        assert (video == frame).all((1, 2)).any(), "the samples come in turn"
    victim = files(cache)[1]
    victim.write_bytes(b"damaged")
    again = clips.frame_pool(single, "train", range(4), 10, seed=2, chunk=4, progress=False)
    assert np.array_equal(again, pool)
    spaced = clips.frame_pool(single, "train", range(0, 8, 2), 10, seed=2, chunk=4, progress=False)
    assert not np.array_equal(spaced, pool)   # other samples, as many
    longer = clips.frame_pool(single, "train", range(4), 12, seed=2, chunk=4, progress=False)
    assert np.array_equal(longer[:8], pool[:8])
    assert not np.array_equal(clips.frame_pool(single, "train", range(4), 10, seed=3, progress=False), pool)


def test_a_pool_has_every_frame_of_a_video_from_the_first_to_the_last(cache, single, monkeypatch):
    asked, real = [], type(single).clips
    monkeypatch.setattr(type(single), "clips", lambda self, specs, indices: asked.append(indices) or
                        real(self, specs, indices))
    clips.frame_pool(single, "train", range(2), 400, seed=2, progress=False)
    assert set(np.concatenate(asked).ravel().tolist()) == set(range(20))


def test_a_cache_is_written_whole_or_not_at_all(cache, single, monkeypatch):
    def torn(path, **arrays):
        path.write_bytes(b"PK\x03\x04 the first half")
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(clips.np, "savez_compressed", torn)
        make(single)
    assert files(cache) == []
    assert_same(make(single), make(single))


def test_what_a_dataset_has_none_of_is_refused():
    with pytest.raises(ValueError, match="captions of one kind: leave 'ambiguous' out"):
        load_dataset("single-mnist", mode="ambiguous")
    with pytest.raises(ValueError, match="shows no digits: leave the digit set 'mnist-70k' out"):
        load_dataset("cater-gen-v1", "mnist-70k")


def test_tokens_made_in_bf16_are_kept_apart(single, cache, monkeypatch):
    names = []
    for fast in (False, False, True):
        monkeypatch.setattr(clips, "has_fast_bf16", lambda device, fast=fast: fast)
        make(single)
        names.append({path.name for path in cache.iterdir()})
    assert names[0] == names[1] and len(names[2] - names[1]) == 1
