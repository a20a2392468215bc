"""Files are written whole or not at all."""

import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from mage_core.files import alone_in, cache_folder, data_folder, expanded, sha256, write_whole


def test_a_file_appears_whole_with_its_folders(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    assert write_whole(path, lambda temporary: temporary.write_text("whole")) == path
    assert path.read_text() == "whole"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


def test_the_old_file_stays_while_and_after_a_write_fails(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted(temporary):
        temporary.write_text("ne")
        assert temporary.parent == path.parent and path.read_text() == "old"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_writer_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "a.txt", lambda temporary: None)
    assert not list(tmp_path.iterdir())


def test_the_suffix_is_kept_for_writers_that_look_at_it(tmp_path):
    write_whole(tmp_path / "a.npy", lambda temporary: np.save(temporary, np.arange(3)))
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"digits")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"digits").hexdigest()


def test_the_cache_can_be_put_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MAGE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("MAGE_CACHE", "~/of mine")   # a notebook's environment has seen no shell
    assert cache_folder() == Path.home() / "of mine"
    monkeypatch.delenv("MAGE_CACHE")
    assert cache_folder() == data_folder() / "cache"


def test_what_was_written_reaches_the_disk_before_its_name_and_the_name_after(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, name=name, real=real: done.append(name) or real(*given))
    write_whole(tmp_path / "a.txt", lambda temporary: temporary.write_text("whole"))
    assert done == ["fsync", "replace"] + ["fsync"] * (os.name == "posix")


def test_the_folder_of_a_user_that_there_is_not_is_told():
    assert expanded("~/a") == Path.home() / "a" and expanded("a") == Path("a")
    with pytest.raises(ValueError, match="'~no-such-user-at-all/a' begins at the folder of a user that there is not"):
        expanded("~no-such-user-at-all/a")


def test_a_folder_is_for_one_at_a_time_and_the_next_waits(tmp_path, capsys):
    pytest.importorskip("fcntl")
    order, inside = [], threading.Event()

    def second():
        inside.wait()
        with alone_in(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    with alone_in(tmp_path):
        thread.start()
        inside.set()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert f"{tmp_path.name} is in use by another process: waiting" in capsys.readouterr().out
    with alone_in(tmp_path / "not there"):
        pass
