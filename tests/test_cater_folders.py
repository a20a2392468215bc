"""Folders of real videos: the authors' layout, other footage, KTH; with small clips that are made here."""

import json

import numpy as np
import pytest

from mage_core.cater import CaterGen, folders

pytest.importorskip("av", reason="videos need PyAV, the extra `video`")


def smooth(frames, size, seed=0):
    """Uint8 (n, H, W, 3) that JPEG keeps well: a coloured slope that drifts."""
    y, x = np.mgrid[:size[0], :size[1]]
    t = np.arange(frames)[:, None, None, None]
    slope = np.stack([x * 2 + 20, y * 2 + 30, (x + y) + 10 * seed], -1)
    return np.clip(slope + 3 * t, 0, 255).astype(np.uint8)


def test_a_video_comes_back(tmp_path):
    frames = smooth(7, (48, 64))
    path = folders.write_video(tmp_path / "a" / "v.avi", frames)
    back = np.stack(list(folders.read_video(path)))
    assert back.shape == frames.shape
    assert np.abs(back.astype(int) - frames).mean() < 2
    part = np.stack(list(folders.read_video(path, first=2, end=5)))
    assert (part == back[2:5]).all()
    import av

    with av.open(str(path)) as file:
        assert file.streams.video[0].codec_context.name == "mjpeg" and file.streams.video[0].average_rate == 24


def test_a_frame_is_cut_to_its_middle_and_averaged():
    frame = np.zeros((4, 8, 3), np.uint8)
    frame[:, 2:6] = 200
    assert (folders.fit(frame, 4) == 200).all()
    checks = np.indices((8, 8)).sum(0) % 2 * 100
    assert (folders.fit(np.repeat(checks[..., None], 3, 2).astype(np.uint8), 4) == 50).all()


def test_broken_videos(tmp_path):
    (tmp_path / "x.avi").write_bytes(b"no video" * 100)
    with pytest.raises(ValueError, match="cannot be read as a video"):
        list(folders.read_video(tmp_path / "x.avi"))
    with pytest.raises(FileNotFoundError, match="no video"):
        list(folders.read_video(tmp_path / "y.avi"))
    with pytest.raises(ValueError, match="expected uint8"):
        folders.write_video(tmp_path / "z.avi", np.zeros((2, 8, 8, 3)))


# --------------------------------------------------------------------------------- the authors' layout


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("CATER-GEN-v2")
    folders.write_folder("cater-gen-v2", root, sizes={"train": 2, "test": 1}, seed=5, image_size=64, progress=False)
    return root


def test_layout_is_the_authors_own(written):
    assert sorted(path.name for path in (written / "videos").iterdir()) == [
        f"CLEVR_new_{number:06d}.avi" for number in range(3)]
    listed = json.loads((written / "test_ambiguous.json").read_text())
    assert list(listed) == ["0"] and listed["0"]["video"] == "videos/CLEVR_new_000002.avi"
    assert listed["0"]["caption"].startswith(" the ")


@pytest.mark.parametrize("mode", ["explicit", "ambiguous"])
def test_a_written_folder_reads_back(written, mode):
    drawn, read = CaterGen("cater-gen-v2", mode, 64), folders.VideoFolder(written, "cater-gen-v2", mode, 64)
    assert read.sizes == {"train": 2, "test": 1}
    for split, index in (("train", 0), ("train", 1), ("test", 0)):
        own, spec = drawn.spec(split, index, 5), read.spec(split, index)
        assert read.caption(spec) == drawn.caption(own)
        assert read.length(spec) == 31 and 0 < spec.speed < 1 and spec == read.spec(split, index)
    specs = [read.spec("train", 1), read.spec("train", 0)]
    assert read.lengths(specs).tolist() == [31, 31]
    clips = read.clips(specs, np.array([[0, 4, 30], [3, 3, 0]]))
    assert clips.shape == (2, 3, 64, 64, 3) and (clips[1, 0] == clips[1, 1]).all()
    truth = drawn.clips([drawn.spec("train", 1, 5)], np.array([[0, 4, 30]]))[0]
    assert np.abs(clips[0].astype(int) - truth).mean() < 2
    assert (read.video(specs[1])[3] == clips[1, 0]).all()


def test_a_stopped_run_goes_on(written):
    victim = written / "videos" / "CLEVR_new_000001.avi"
    before, stamps = victim.read_bytes(), {p: p.stat().st_mtime_ns for p in (written / "videos").iterdir()}
    victim.unlink()
    again = dict(sizes={"train": 2, "test": 1}, seed=5, image_size=64, progress=False)
    folders.write_folder("cater-gen-v2", written, part=(0, 2), **again)  # numbers 0 and 2
    assert not victim.exists()
    folders.write_folder("cater-gen-v2", written, part=(1, 2), **again)
    assert victim.read_bytes() == before
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items() if p != victim)
    with pytest.raises(ValueError, match="was begun with"):
        folders.write_folder("cater-gen-v2", written, **{**again, "seed": 6})


# ------------------------------------------------------------------------------------- other footage


@pytest.fixture
def footage(tmp_path):
    folders.write_video(tmp_path / "clips" / "a.avi", smooth(12, (60, 80)))
    lists = {"train": {"0": {"video": "clips/a.avi", "caption": "A person is waving."},
                       "1": {"video": "clips/a.avi", "caption": "a person is running.", "first": 4, "end": 9}},
             "test": {"0": {"video": "clips/a.avi", "caption": "A person is running."}}}
    for split, listed in lists.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(listed))
    return tmp_path


def test_any_footage_with_captions(footage):
    data = folders.VideoFolder(footage, image_size=32)
    assert data.sizes == {"train": 2, "test": 1}
    part = data.spec("train", 1)
    assert data.length(part) == 5 and data.length(data.spec("train", 0)) == 12
    whole = data.video(data.spec("train", 0))
    assert whole.shape == (12, 32, 32, 3) and (data.video(part) == whole[4:9]).all()
    assert data.vocabulary == ("[PAD]", "[CLS]", "[SEP]", ".", "a", "is", "person", "running", "waving")
    assert data.encode("A person is running.") == [1, 4, 6, 5, 7, 3, 2]
    with pytest.raises(ValueError, match="unknown word 'flying'"):
        data.encode("a person is flying.")
    with pytest.raises(ValueError, match="has no frame 5"):
        data.clips([part], np.array([[0, 5]]))
    with pytest.raises(IndexError, match="it has 1, numbered from 0"):
        data.spec("test", 1)


@pytest.mark.parametrize(("listed", "error", "message"), [
    ({"1": {"video": "clips/a.avi", "caption": "x"}}, ValueError, "numbered without gaps"),
    ({"0": {"video": "clips/a.avi"}}, ValueError, "entry 0"),
    ({"0": {"video": "clips/b.avi", "caption": "x"}}, FileNotFoundError, "clips/b.avi"),
    ({"0": {"video": "../a.avi", "caption": "x"}}, ValueError, "leads out of the folder"),
    ({"0": {"video": "clips/a.avi", "caption": "x", "first": 5, "end": 5}}, ValueError, "0 <= first < end"),
    ([], ValueError, None),
])
def test_broken_lists(footage, listed, error, message):
    (footage / "test.json").write_text(json.dumps(listed))
    if message is None:  # an empty list is an empty split
        assert folders.VideoFolder(footage).sizes["test"] == 0
        return
    with pytest.raises(error, match=message):
        folders.VideoFolder(footage)


def test_folders_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        folders.VideoFolder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has no train_explicit.json and no test_explicit.json"):
        folders.VideoFolder(tmp_path, "cater-gen-v1")
    with pytest.raises(ValueError, match="which, of how many"):
        folders.write_folder("cater-gen-v1", tmp_path, part=(2, 2))


def test_kth_by_its_own_split(tmp_path):
    lines = ["Sequences of the action database", ""]
    for person in range(1, 26):
        name = f"person{person:02d}_{folders.KTH_ACTIONS[person % 6]}_d{person % 4 + 1}"
        folders.write_video(tmp_path / "raw" / f"{name}_uncomp.avi", smooth(8, (24, 32), person))
        lines.append(f"{name}\t\tframes\t1-3, 4-8" if person != 7 else f"{name}  frames  2-8,")
    lines.append("person13_handclapping_d3\t*missing*")
    (tmp_path / "00sequences.txt").write_text("\n".join(lines))
    assert folders.write_kth_lists(tmp_path, tmp_path / "00sequences.txt") == {
        "train": 16, "validation": 16, "test": 17}
    data = folders.VideoFolder(tmp_path, "kth", image_size=24)
    spec = data.spec("train", 1)
    assert spec.caption == "A person is walking."
    assert spec.video == f"raw/person11_{folders.KTH_ACTIONS[5]}_d4_uncomp.avi" and (spec.first, spec.end) == (3, 8)
    assert data.video(spec).shape == (5, 24, 24, 3)
    (tmp_path / "raw" / "person01_handclapping_d2_uncomp.avi").unlink()
    with pytest.raises(FileNotFoundError, match="person01_handclapping_d2_uncomp.avi"):
        folders.write_kth_lists(tmp_path, tmp_path / "00sequences.txt")
    (tmp_path / "00sequences.txt").write_text("person01_dancing_d1 frames 1-5")
    with pytest.raises(ValueError, match="line 1"):
        folders.write_kth_lists(tmp_path, tmp_path / "00sequences.txt")
