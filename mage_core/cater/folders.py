"""Folders of real videos with captions: the authors' CATER-GEN layout, any footage, and KTH (paper 4.1, C.6).

    CATER-GEN-v1/
      videos/CLEVR_new_000000.avi ...
      train_explicit.json  test_explicit.json  train_ambiguous.json  test_ambiguous.json

A JSON file is {"0": {"video": "videos/CLEVR_new_000123.avi", "caption": " the cone is ..."}, "1": ...}. A folder of
other footage has `train.json` and `test.json` of the same form; there an entry may name its part of the video, the
frames from `first` up to and without `end`. Videos are read and written through PyAV, the extra `video`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import operator
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from mage_core import captions
from mage_core.cater.scene import DATASETS, MODES, CaterGen
from mage_core.draws import Draws
from mage_core.files import expanded, sha256, write_whole

RATE = 24  # frames a second of what is written, as Blender's
QUALITY = 2  # of the JPEGs, 2 (best) to 31
SHOWN = 60   # words of a folder that an error shows, at most
_SPLITS = ("train", "test")

KTH_ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")
_KTH_SPLITS = {  # persons of the original split
    "train": (11, 12, 13, 14, 15, 16, 17, 18),
    "validation": (1, 4, 19, 20, 21, 23, 24, 25),
    "test": (2, 3, 5, 6, 7, 8, 9, 10, 22),
}
_DAMAGED = "get it again, or take its entries out of the lists"
_KTH_LINE = re.compile(r"^person(\d\d)_([a-z]+)_d([1-4])\s+frames\s+([\d\s,-]+)$")


@cache
def _av():
    try:
        import av
    except ImportError as error:
        raise ImportError("videos are read and written with PyAV, which is not installed: "
                          "python -m pip install 'av>=14' (the extra `video` of this project)") from error
    return av


# ------------------------------------------------------------------------------------------ one video


def write_video(path: str | Path, frames: np.ndarray) -> Path:
    """Write uint8 (n, H, W, 3) as a Motion-JPEG AVI of 24 frames a second, whole or not at all; H and W may be odd.

    Raises ValueError for another shape or type, or no frame or pixel, ImportError without PyAV.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"frames are {frames.dtype} of shape {frames.shape}: expected uint8 (n, H, W, 3), each of "
                         "n, H and W at least 1")
    av = _av()

    def write(temporary: Path) -> None:
        with av.open(os.path.abspath(temporary), "w", format="avi") as file:
            stream = file.add_stream("mjpeg", rate=RATE, options={"qmin": str(QUALITY), "qmax": str(QUALITY)})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuvj444p"
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode())

    return write_whole(path, write)


def read_video(path: str | Path, *, first: int = 0, end: int | None = None) -> Iterator[np.ndarray]:
    """The frames of a video from `first` up to and without `end`, one after another: uint8 (H, W, 3).

    Raises FileNotFoundError where there is no such file, ValueError for one that is no video, ImportError without
    PyAV.
    """
    av = _av()
    if not Path(path).is_file():
        raise FileNotFoundError(f"no video {path}")
    try:
        with av.open(os.path.abspath(path)) as file:   # FFmpeg takes what stands before a colon for a protocol
            for number, frame in enumerate(file.decode(video=0)):
                if end is not None and number >= end:
                    return
                if number >= first:
                    # as players turn it: a phone notes how it was held
                    yield np.rot90(frame.to_ndarray(format="rgb24"), getattr(frame, "rotation", 0) // 90)
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a video ({error}): {_DAMAGED}") from error


def fit(frame: np.ndarray, size: int) -> np.ndarray:
    """The middle square of a frame (H, W, 3) at (size, size, 3), uint8, each pixel the mean of what it covers."""
    height, width = frame.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = frame[top:top + side, left:left + side]
    if side == size:
        return np.ascontiguousarray(square)
    kernel = Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(square).resize((size, size), kernel))


# ------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Footage:
    """A sample of a folder: part of a video, its caption, and the speed eta at which it is seen."""

    dataset: str
    split: str
    index: int
    video: str
    caption: str
    speed: float
    first: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Language:
    """The words of a folder's captions, and the size at which its videos are seen: all that its models need of it.

    This is what a card keeps of a folder. It makes no samples: `spec` raises ValueError, naming the remedy.
    """

    name: str
    vocabulary: tuple[str, ...]
    context_length: int
    image_size: int = 128
    interval: tuple[float, float] = (3.0, 6.0)
    mode: str = "explicit"
    channels = 3
    clip_length = 10
    video_length = None

    def encode(self, sentence: str) -> list[int]:
        """Token ids of a sentence; ValueError for a word that no caption has, for too many words, or for none."""
        ids, words = self._ids, _words(sentence, self.name in DATASETS) if isinstance(sentence, str) else []
        if not words:
            raise ValueError(f"the caption is {sentence!r}: it must be a text with words, such as the captions of this "
                             f"folder have: {self._like('')}")
        for word in words:
            if word not in ids:
                raise ValueError(f"unknown word {word[:40]!r} in {sentence[:200]!r}: the captions of this folder have "
                                 f"{self._like(word[:40])}")
        if len(words) + 2 > self.context_length:
            raise ValueError(f"{sentence!r} has {len(words)} words and marks: the captions of this folder have at most "
                             f"{self.context_length - 2}")
        return [captions.CLS, *(ids[word] for word in words), captions.SEP]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.vocabulary)}

    def _like(self, word: str) -> str:
        """The words that there are, or where they are many, those most like `word` among them."""
        words = self.vocabulary[3:]
        if len(words) <= SHOWN:
            return ", ".join(words)
        near = difflib.get_close_matches(word, words, 3, 0.6) or words[:3]
        return f"{', '.join(near)} and {len(words) - len(near):,} others"

    def tidy(self, sentence: str) -> str:
        """The sentence as the folder's captions are written; errors as in `encode`."""
        self.encode(sentence)
        return sentence.strip()

    def spec(self, split: str, index: int, seed: int = 0) -> Footage:
        """No sample: the card of trained weights describes the videos and does not hold them."""
        raise ValueError(f"the videos of {self.name} that these weights were trained on are not here: give their "
                         f"folder, load_dataset({self.name!r}, videos=FOLDER)")

    @property
    def sizes(self) -> dict[str, int]:
        """No splits, as there are no samples; see `spec`."""
        return self.spec("train", 0)


@dataclass(frozen=True)
class VideoFolder:
    """A folder of videos with captions, as a dataset.

    `name` is cater-gen-v1 or v2 for the authors' layout (then `mode` says which captions, and the words are the
    released vocabulary), or any other word for other footage, whose vocabulary is that of its own captions. Raises
    ValueError for an unknown mode, FileNotFoundError for a folder, a list or a video of a list that is not there, and
    ValueError for an entry that breaks the layout, has an unknown word or goes beyond its video's end.
    """

    root: str | Path
    name: str = "folder"
    mode: str = "explicit"
    image_size: int = 128
    interval: tuple[float, float] = (3.0, 6.0)
    channels = 3
    clip_length = 10
    endless = False

    def __post_init__(self):
        object.__setattr__(self, "root", expanded(self.root))
        if not (isinstance(self.name, str) and re.fullmatch(r"\w[\w.-]*", self.name)):   # it is part of files' names
            raise ValueError(f"the dataset's name is {self.name!r}: it must be a word of letters, digits, '_', '-' and "
                             "'.', e.g. walks")
        try:
            low, high = (float(frames + 0) for frames in self.interval)
            object.__setattr__(self, "interval", tuple(self.interval))
            fits = 0 < low <= high < math.inf
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"interval {self.interval}: expected the frames from one to the next at speed 0 and at "
                             "speed 1, two positive numbers, the smaller first, e.g. (3, 6)")
        if self.mode not in MODES:
            raise ValueError(f"unknown captions {self.mode!r}: use one of {', '.join(MODES)}")
        if not self.root.is_dir():
            raise FileNotFoundError(f"no folder {self.root}")
        if not (isinstance(self.image_size, int) and 16 <= self.image_size <= 1024 and self.image_size % 8 == 0):
            raise ValueError(f"image size {self.image_size!r}: use a multiple of 8 from 16 to 1024, e.g. 128")
        _ = self._said   # a broken list is told now, not after an hour of training
        if not any(self._entries.values()):
            raise ValueError(f"no list of {self.root} names a video: {self._lists['train'].name} and "
                             f"{self._lists['test'].name} need an entry or more")
        self._check_ends()

    @cached_property
    def _lists(self) -> dict[str, Path]:
        suffix = f"_{self.mode}" if self.name in DATASETS else ""
        paths = {split: self.root / f"{split}{suffix}.json" for split in (*_SPLITS, "validation")}
        absent = [paths[split].name for split in _SPLITS if not paths[split].is_file()]
        if absent:
            raise FileNotFoundError(f"{self.root} has no {' and no '.join(absent)}; a folder of videos has "
                                    f"{paths['train'].name} and {paths['test'].name} beside its videos")
        return {split: path for split, path in paths.items() if path.is_file()}

    @cached_property
    def _entries(self) -> dict[str, tuple[dict, ...]]:
        return {split: _entries(self.root, path) for split, path in self._lists.items()}

    @cached_property
    def _said(self) -> dict[str, list[list[int]]]:
        """The captions of each split as token ids."""
        said = {}
        for split, entries in self._entries.items():
            said[split] = []
            for number, entry in enumerate(entries):
                try:
                    said[split].append(self.encode(entry["caption"]))
                except ValueError as error:
                    other = f", or give footage of your own another name than {self.name}" * (self.name in DATASETS)
                    raise ValueError(f"entry {number} of {self._lists[split]}: {error}; correct the caption"
                                     f"{other}") from error
        return said

    def _check_ends(self) -> None:
        """ValueError for an entry whose part of its video the video has not; whole videos are not opened."""
        parts = [(split, number, entry) for split, entries in self._entries.items()
                 for number, entry in enumerate(entries) if entry.get("first") or entry.get("end") is not None]
        videos = sorted({entry["video"] for _, _, entry in parts})
        frames = dict(zip(videos, _together(lambda video: _readable(self.root / video), videos)))
        for split, number, entry in parts:
            first, end, (has, cut) = entry.get("first", 0), entry.get("end"), frames[entry["video"]]
            if cut and (end is None or end > has):
                raise ValueError(f"entry {number} of {self._lists[split]} has first = {first}, end = {end}, but "
                                 f"{entry['video']} is cut short after {has} frames: get it again, or end the entry at "
                                 f"{has} or before, or take it out of the list (entries are numbered without gaps)")
            if max(first + 1, end or 0) > has:
                raise ValueError(f"entry {number} of {self._lists[split]} has first = {first}, end = {end}, but "
                                 f"{entry['video']} has {has} frames: correct the entry to 0 <= first < end <= {has}, "
                                 "or put the whole video there")

    @property
    def video_length(self) -> int | None:
        """The frames of every sample; None where they differ."""
        return self.longest if len(self._found_lengths) == 1 else None

    @property
    def longest(self) -> int:
        """The most frames that a sample has."""
        return max(self._found_lengths)

    @cached_property
    def _found_lengths(self) -> set[int]:
        return {int(n) for split in self.sizes
                for n in self.lengths([self.spec(split, index) for index in range(self.sizes[split])])}

    @property
    def sizes(self) -> dict[str, int]:
        """The number of samples in each split."""
        return {split: len(entries) for split, entries in self._entries.items()}

    def spec(self, split: str, index: int, seed: int = 0) -> Footage:
        """The sample at `index` of `split`; the seed draws its speed.

        Raises ValueError for an unknown split, IndexError for an index that the folder has not.
        """
        if split not in self._entries:
            raise ValueError(f"unknown split {split!r}: use one of {', '.join(self._entries)}")
        entries = self._entries[split]
        if not 0 <= index < len(entries):
            raise IndexError(f"no sample {index} in {split!r} of {self.root}: it has {len(entries)}, numbered from 0")
        entry = entries[index]
        seed = operator.index(seed)   # numpy's numbers read otherwise, and would draw otherwise
        speed = Draws("footage", self.name, split, index, seed).inside()
        return Footage(self.name, split, index, entry["video"], entry["caption"], speed, entry.get("first", 0),
                       entry.get("end"))

    def caption(self, spec: Footage) -> str:
        """The caption of a sample, without blanks around it."""
        return spec.caption

    def length(self, spec: Footage) -> int:
        """The frames of a sample."""
        return spec.end - spec.first if spec.end is not None else _count(self.root / spec.video) - spec.first

    def lengths(self, specs: Sequence[Footage]) -> np.ndarray:
        """The frames of several samples: int64 (b,)."""
        return np.array(_together(self.length, specs), np.int64)

    def video(self, spec: Footage) -> np.ndarray:
        """All frames of a sample: uint8 (n, H, W, 3). Errors as in `clips`."""
        return self._frames(spec, range(self.length(spec)))

    def clips(self, specs: Sequence[Footage], indices: np.ndarray) -> np.ndarray:
        """The frames `indices` (b, T) of b samples: uint8 (b, T, H, W, 3). Videos are read on all cores.

        Raises ValueError for a sample of another dataset, indices of another shape, and for a frame that a video has
        not.
        """
        indices = np.asarray(indices)
        if indices.ndim != 2 or len(indices) != len(specs) or indices.dtype.kind not in "iu":
            raise ValueError(f"indices are {indices.dtype} of shape {indices.shape}: expected whole numbers, "
                             f"({len(specs)}, T), a row for each of the {len(specs)} samples")
        clips = _together(lambda pair: self._frames(*pair), list(zip(specs, indices.tolist())))
        return np.stack(clips) if clips else np.zeros((0, indices.shape[1], *(self.image_size,) * 2, 3), np.uint8)

    @cached_property
    def language(self) -> Language:
        """The words of the captions: the released vocabulary for CATER-GEN, else those of the folder's own lists."""
        if self.name in DATASETS:
            words, longest = captions.vocabulary(self.name), captions.context_length(self.name)
        else:
            said = [_words(entry["caption"]) for entries in self._entries.values() for entry in entries]
            words = ("[PAD]", "[CLS]", "[SEP]", *sorted({word for sentence in said for word in sentence}))
            longest = 2 + max(map(len, said), default=0)
        return Language(self.name, words, longest, self.image_size, self.interval, self.mode)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """[PAD] [CLS] [SEP] and the words, a word's place being its token id."""
        return self.language.vocabulary

    @property
    def context_length(self) -> int:
        """The most tokens of a caption, [CLS] and [SEP] included."""
        return self.language.context_length

    def encode(self, sentence: str) -> list[int]:
        """Token ids of a sentence; ValueError for a word that no caption of the folder has."""
        return self.language.encode(sentence)

    def tidy(self, sentence: str) -> str:
        """The sentence without blanks around it; errors as in `encode`."""
        return self.language.tidy(sentence)

    @cached_property
    def content(self) -> str:
        """A hash of the lists' videos and frame ranges and of every video's bytes: what frames are made of."""
        named = {split: [[entry.get(key) for key in ("video", "first", "end")] for entry in entries]
                 for split, entries in self._entries.items()}
        videos = sorted({entry["video"] for entries in self._entries.values() for entry in entries})
        sums = _together(sha256, [self.root / video for video in videos])
        told = [named, videos, sums, self.image_size]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    @property
    def source(self) -> str:
        """A short word for the name of a run: captions and the content's first digits."""
        return f"{self.mode}-videos-{self.content[:8]}"

    @property
    def about(self) -> dict:
        """What a card tells of the folder; `clips.described` makes its `language` of it again."""
        words = self.language
        return {"dataset": self.name, "mode": self.mode, "videos": {
            "sha256": self.content, "sizes": self.sizes, "image_size": self.image_size, "interval": list(self.interval),
            "vocabulary": list(words.vocabulary), "context_length": words.context_length,
            "captions": hashlib.sha256(json.dumps(self._said["train"]).encode()).hexdigest()}}

    def _frames(self, spec: Footage, wanted: Sequence[int]) -> np.ndarray:
        if spec.dataset != self.name:
            raise ValueError(f"a sample of {spec.dataset} was given to {self.name}: each dataset draws its own")
        wanted = list(wanted)
        if min(wanted, default=0) < 0:
            raise ValueError(f"frame {min(wanted)} of {spec.video}: frames are numbered from 0 on")
        if not wanted:
            return np.zeros((0, self.image_size, self.image_size, 3), np.uint8)
        last, needed, found, number = max(wanted), set(wanted), {}, -1
        end = spec.first + last + 1 if spec.end is None else min(spec.end, spec.first + last + 1)
        for number, frame in enumerate(read_video(self.root / spec.video, first=spec.first, end=end)):
            if number in needed:
                found[number] = fit(frame, self.image_size)
        if last not in found:
            damaged = f", of {self.length(spec)}: {_DAMAGED}" if number + 1 < self.length(spec) else ""
            raise ValueError(f"{spec.video} has no frame {last} in its sample: it has {number + 1}{damaged}")
        return np.stack([found[number] for number in wanted])


def _words(sentence: str, cells: bool = False) -> list[str]:
    """Words, numbers and marks. A minus of any kind before a number is part of it, in `cells` past a blank, too."""
    blank = r"\s*" if cells else ""
    sentence = re.sub(rf"[-\u2212\u2013]{blank}(?=\d)", "-", sentence.lower())
    return re.findall(r"-?\d+|[^\W\d_]+|[^\w\s]", sentence.replace("\u2212", "-"))


def _entries(root: Path, path: Path) -> tuple[dict, ...]:
    """The checked entries of a list, in the order of their numbers."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(listed, (dict, list)):
            raise TypeError(f"it holds a {type(listed).__name__}")
        entries = [listed[str(number)] for number in range(len(listed))]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no list of videos: expected {{\"0\": {{\"video\": ..., \"caption\": ...}}, "
                         f"\"1\": ...}}, numbered without gaps ({error!r})") from error
    inside = Path(os.path.abspath(root))
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("video", "caption")):
            raise ValueError(f"entry {number} of {path} is {entry!r}: expected \"video\" and \"caption\", two texts")
        first, end = entry.get("first", 0), entry.get("end")
        if not isinstance(first, int) or not (end is None or isinstance(end, int)) or first < 0 or (
                end is not None and end <= first):
            raise ValueError(f"entry {number} of {path} has first = {first!r}, end = {end!r}: expected two frame "
                             "numbers, 0 <= first < end")
        video = Path(os.path.abspath(root / entry["video"]))   # a link inside of the folder is its owner's choice
        if not video.is_relative_to(inside):
            raise ValueError(f"entry {number} of {path} leads out of the folder: {entry['video']!r}; put the video, or "
                             "a link to it, into the folder")
        if not video.is_file():
            raise FileNotFoundError(f"entry {number} of {path} names {entry['video']!r}, which is not in {root}")
        entry["caption"] = entry["caption"].strip()
    return tuple(entries)


def _count(path: Path) -> int:
    """The frames of a video, counted as the packets that hold them, without those before an edit and those before the
    first that can be decoded by itself: nothing is decoded.

    ValueError for a video that is cut short.
    """
    frames, cut = _readable(path)
    if cut:
        raise ValueError(f"{path} is cut short: {_DAMAGED}")
    return frames


def _readable(path: Path) -> tuple[int, bool]:
    """The frames of a video as `_count` counts them, up to where it is cut short, and whether it is."""
    return _packets(path, path.stat().st_mtime_ns)


@cache
def _packets(path: Path, changed: int) -> tuple[int, bool]:
    av = _av()
    try:
        with av.open(os.path.abspath(path)) as file:
            packets = [packet for packet in file.demux(video=0) if packet.size]
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a video ({error}): {_DAMAGED}") from error
    first = next((number for number, packet in enumerate(packets) if packet.is_keyframe), 0)
    packets = [packet for packet in packets[first:] if not packet.is_discard]   # or a stream was cut at its start
    frames = next((number for number, packet in enumerate(packets) if packet.is_corrupt), len(packets))
    if not frames:
        raise ValueError(f"{path} has no frames: {_DAMAGED}")
    return frames, frames < len(packets)


def _together(do, items: Sequence) -> list:
    """`do` of each item, in threads: decoding lets go of Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(do, items))


# ------------------------------------------------------------------------------------------- writing


def write_folder(name: str, root: str | Path, *, sizes: dict[str, int] | None = None, seed: int = 0,
                 image_size: int = 256, part: tuple[int, int] = (0, 1), progress: bool = True) -> Path:
    """CATER-GEN in the authors' layout, drawn here: videos and all four lists.

    `sizes` is the number of videos of each split, the paper's if left out. A run that was stopped goes on where it
    was; several processes share the work as `part` = (which, of how many). Raises ValueError for an unknown name,
    sizes or part, a folder that was begun with other settings or by another version of the renderer, or one that holds
    something else, such as the authors' download.
    """
    data, seed = CaterGen(name, image_size=image_size), operator.index(seed)
    sizes = dict(data.sizes if sizes is None else sizes)
    if set(sizes) != set(_SPLITS) or any(not isinstance(n, int) or n < 0 for n in sizes.values()):
        raise ValueError(f"sizes {sizes}: expected a number of videos for 'train' and for 'test'")
    if not (isinstance(part, Sequence) and len(part) == 2 and all(isinstance(n, int) for n in part)
            and 0 <= part[0] < part[1]):
        raise ValueError(f"part {part}: expected (which, of how many), two whole numbers, the first counted from 0")
    root = expanded(root)
    made = {"dataset": name, "sizes": sizes, "seed": seed, "image_size": image_size, "content": data.content}
    note = root / "made_by.json"
    # what stands there is looked up before the note, which another process may write meanwhile, ahead of all else
    held = sorted(path.name for path in root.iterdir() if not path.name.startswith(".")) if root.is_dir() else []
    if not note.is_file() and held:
        raise ValueError(f"{root} holds {', '.join(held[:3])}{', ...' * (len(held) > 3)} and no {note.name}: what was "
                         "not begun here is not written over; choose a new or an empty folder")
    try:
        before = dict(json.loads(note.read_text())) if note.is_file() else made
    except (ValueError, TypeError) as error:
        raise ValueError(f"{note} is damaged ({error}): choose another folder, or empty this one") from error
    if before != made:
        remedy = ("another folder: this one was begun by another version of the renderer"
                  if before | {"content": data.content} == made else "another folder or the same settings")
        raise ValueError(f"{root} was begun with {before}, not with {made}: choose {remedy}")
    write_whole(note, lambda path: path.write_text(json.dumps(made)))
    videos = [(split, index) for split in _SPLITS for index in range(sizes[split])]
    paths = {key: f"videos/CLEVR_new_{number:06d}.avi" for number, key in enumerate(videos)}
    specs = {key: data.spec(*key, seed)
             for key in tqdm(videos, desc=f"scenes of {name}", unit="scene", disable=not progress)}
    for mode in MODES:
        said = CaterGen(name, mode)
        for split in _SPLITS:
            # the authors' captions begin with a blank
            listed = {str(index): {"video": paths[split, index], "caption": f" {said.caption(specs[split, index])}"}
                      for index in range(sizes[split])}
            text = json.dumps(listed, indent=0)
            write_whole(root / f"{split}_{mode}.json", lambda path, text=text: path.write_text(text))
    share = [key for key in videos[part[0]::part[1]] if not (root / paths[key]).is_file()]
    for key in tqdm(share, desc=f"videos of {name}", unit="video", disable=not progress):
        write_video(root / paths[key], data.video(specs[key]))
    return root


def write_kth_lists(root: str | Path, sequences: str | Path) -> dict[str, int]:
    """The lists of a KTH folder: `train.json`, `validation.json` and `test.json` by the original split of persons.

    `root` holds the downloaded videos (person01_boxing_d1_uncomp.avi, in any subfolder); `sequences` is KTH's own
    file of frame ranges, one sample each. Captions are "A person is boxing." Returns the number of samples of each
    split. A range that a video has not, since it is cut short (as KTH's own person01_boxing_d4 is), is left out with a
    warning. Raises ValueError for a line of another form or an unknown action, FileNotFoundError for a video that
    `sequences` gives frames of and that is not there.
    """
    root = expanded(root)
    videos = {path.name.removesuffix("_uncomp.avi"): path for path in sorted(root.rglob("person*_uncomp.avi"))}
    frames = dict(zip(videos, _together(_readable, list(videos.values()))))
    lists: dict[str, dict[str, dict]] = {split: {} for split in _KTH_SPLITS}
    for number, line in enumerate(expanded(sequences).read_text().splitlines(), 1):
        line = line.strip()
        if not line.startswith("person") or "missing" in line:  # prose; one video was never released
            continue
        match = _KTH_LINE.match(line)
        if not match or match[2] not in KTH_ACTIONS:
            raise ValueError(f"line {number} of {sequences} is {line!r}: expected e.g. "
                             "'person01_boxing_d1 frames 1-95, 96-185'")
        name = f"person{match[1]}_{match[2]}_d{match[3]}"
        if name not in videos:
            raise FileNotFoundError(f"line {number} of {sequences} is about {name}_uncomp.avi, which is not in {root}")
        split = next((s for s, persons in _KTH_SPLITS.items() if int(match[1]) in persons), None)
        if split is None:
            raise ValueError(f"line {number} of {sequences} is about person {match[1]}: KTH has 01 to 25")
        for span in filter(None, (part.strip() for part in match[4].split(","))):
            match_span = re.fullmatch(r"(\d+)\s*-\s*(\d+)", span)
            first, last = map(int, match_span.groups()) if match_span else (0, 0)
            if not 1 <= first <= last:
                raise ValueError(f"line {number} of {sequences} has the frames {span!r}: expected first-last, counted "
                                 "from 1, e.g. 1-95")
            has, cut = frames[name]
            if last > has:
                why = f"is cut short after {has} frames" if cut else f"has {has} frames"
                warnings.warn(f"{videos[name].name} {why}: its part {span} is left out", stacklevel=2)
                continue
            lists[split][str(len(lists[split]))] = {
                "video": videos[name].relative_to(root).as_posix(), "caption": f"A person is {match[2]}.",
                "first": first - 1, "end": last}
    if not any(lists.values()):
        raise ValueError(f"{sequences} has no line such as 'person01_boxing_d1 frames 1-95, 96-185': give KTH's own "
                         "file of sequences")
    for split, listed in lists.items():
        text = json.dumps(listed, indent=0)
        write_whole(root / f"{split}.json", lambda path, text=text: path.write_text(text))
    return {split: len(listed) for split, listed in lists.items()}
