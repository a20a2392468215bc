"""Where files lie, and how they are written: whole or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def data_folder() -> Path:
    """The folder of what ships with the project: `data` beside the package."""
    return Path(__file__).resolve().parent.parent / "data"


def cache_folder() -> Path:
    """The folder of what can be made again: `$MAGE_CACHE` where set, else `data/cache`."""
    named = os.environ.get("MAGE_CACHE")
    return Path(named).expanduser() if named else data_folder() / "cache"


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits. Raises OSError if it cannot be read."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def expanded(path: str | Path) -> Path:
    """A path, `~` being a user's own folder; ValueError for a user that there is not."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{str(path)!r} begins at the folder of a user that there is not: name the folder itself"
                         ) from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A folder for this process: another that wants it waits, and says so. Where the system cannot lock folders
    (Windows, some of a network), nobody waits."""
    handle = None
    try:
        with suppress(ImportError, OSError):
            import fcntl
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{folder.name} is in use by another process: waiting until that is done", flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)   # which gives the lock back, as the end of the process does


def check_place(path: str | Path) -> Path:
    """A path as `write_whole` can take it, `~` being the user's own folder; ValueError where no file can be written
    there, before there is anything to lose."""
    path = expanded(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        trial = _temporary(path)
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be written ({error.strerror}): name a file in a folder where you can "
                         "write") from error
    return path


def _temporary(path: Path) -> Path:
    """A name beside a file that nobody else has. Its suffix is the file's: writers (numpy, imageio) choose their
    format by it."""
    return path.with_name(f".{path.stem[:20]}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Write a file so that a reader, or a kill at any moment, only ever leaves the old or the whole new one.

    `write(temporary)` is called with a name in the same folder and with the same suffix; what it wrote is
    flushed to the disk and then takes the place of `path`. Folders are made. If `write` raises, its error
    passes through, and `path` stays as it was. Raises FileNotFoundError if `write` wrote nothing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        write(temporary)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name itself must reach the disk as well
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path
