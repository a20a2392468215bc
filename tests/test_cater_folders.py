"""Folders of real videos: the authors' layout, other footage, KTH; with small clips that are made here."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from mage_core import captions, clips, display, evaluation, loop, metrics, presets, training
from mage_core.cater import CaterGen, folders, scene

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
    for shape in ((0, 8, 8, 3), (2, 0, 8, 3), (2, 8, 0, 3)):
        with pytest.raises(ValueError, match=r"expected uint8 \(n, H, W, 3\), each of n, H and W at least 1"):
            folders.write_video(tmp_path / "z.avi", np.zeros(shape, np.uint8))


def test_odd_sizes_come_back(tmp_path):
    frames = smooth(3, (33, 47))
    back = np.stack(list(folders.read_video(folders.write_video(tmp_path / "odd.avi", frames))))
    assert back.shape == frames.shape and np.abs(back.astype(int) - frames).mean() < 2


def test_a_video_that_changes_is_counted_again(tmp_path):
    for frames in (7, 4):
        assert folders._count(folders.write_video(tmp_path / "v.avi", smooth(frames, (24, 32)))) == frames


def test_what_lies_before_a_cut_without_new_compression_is_no_frame(tmp_path):
    import av

    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    with av.open(str(whole), "w") as file:
        stream = file.add_stream("libx264", rate=24, options={"bf": "0", "g": "100"})
        stream.height, stream.width = 48, 64
        frames = [av.VideoFrame.from_ndarray(frame) for frame in smooth(24, (48, 64))]
        for frame in (*frames, None):
            file.mux(stream.encode(frame))
    with av.open(str(whole)) as file, av.open(str(cut), "w", options={"avoid_negative_ts": "disabled"}) as other:
        stream = other.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            if packet.size:   # as `ffmpeg -ss ... -c copy` does: what is before the cut stays, at times below 0
                packet.pts, packet.dts = (time - 6 * packet.duration for time in (packet.pts, packet.dts))
                packet.stream = stream
                other.mux(packet)
    assert (folders._count(whole), folders._count(cut)) == (24, 18) == (
        len(list(folders.read_video(whole))), len(list(folders.read_video(cut))))


def test_a_stream_that_was_cut_at_its_start_has_the_frames_that_can_be_decoded(tmp_path):
    import av

    whole, cut = tmp_path / "whole.ts", tmp_path / "cut.ts"
    with av.open(str(whole), "w") as file:
        stream = file.add_stream("libx264", rate=24, options={"bf": "0", "g": "12"})
        stream.height, stream.width = 48, 64
        for frame in (*(av.VideoFrame.from_ndarray(frame) for frame in smooth(48, (48, 64))), None):
            file.mux(stream.encode(frame))
    content = whole.read_bytes()
    for tenths in range(8):
        cut.write_bytes(content[tenths * len(content) // 10 // 188 * 188:])   # whole packets of a transport stream
        assert folders._count(cut) == len(list(folders.read_video(cut))) > 0


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
    assert read.video_length == drawn.video_length == 31 == read.longest == drawn.longest
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
    with pytest.raises(ValueError, match="was begun with.*choose another folder or the same settings"):
        folders.write_folder("cater-gen-v2", written, **{**again, "seed": 6})


def contents(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("note", ["of an older renderer", "without any version"])
def test_a_folder_begun_by_another_renderer_is_not_gone_on_with(written, tmp_path, monkeypatch, note):
    root = shutil.copytree(written, tmp_path / "begun")
    (root / "videos" / "CLEVR_new_000001.avi").unlink()
    if note == "without any version":
        made = json.loads((root / "made_by.json").read_text())
        (root / "made_by.json").write_text(json.dumps({key: made[key] for key in made if key != "content"}))
    else:
        monkeypatch.setattr(scene, "VERSION", scene.VERSION + 1)
    before = contents(root)
    with pytest.raises(ValueError, match="choose another folder: this one was begun by another version"):
        folders.write_folder("cater-gen-v2", root, sizes={"train": 2, "test": 1}, seed=5, image_size=64, progress=False)
    assert contents(root) == before


def test_a_download_is_not_written_over(written, tmp_path, monkeypatch):
    root = shutil.copytree(written, tmp_path / "download")
    (root / "made_by.json").unlink()
    before = contents(root)
    with pytest.raises(ValueError, match=r"download holds test_ambiguous.json, .* and no made_by.json.*empty folder"):
        folders.write_folder("cater-gen-v2", root, sizes={"train": 2, "test": 1}, seed=5, image_size=64, progress=False)
    assert contents(root) == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".made_by.1-a.tmp.json").touch()  # what another process is about to name
    monkeypatch.setenv("HOME", str(tmp_path))
    folders.write_folder("cater-gen-v2", "~/empty", sizes={"train": 0, "test": 0}, progress=False)
    assert (tmp_path / "empty" / "made_by.json").is_file()


def test_scenes_are_drawn_once_and_under_a_bar(tmp_path, monkeypatch, capsys):
    drawn, draw = [], CaterGen.spec

    def spec(self, *key):
        drawn.append((key, "scenes of cater-gen-v1" in capsys.readouterr().err))
        return draw(self, *key)

    monkeypatch.setattr(CaterGen, "spec", spec)
    folders.write_folder("cater-gen-v1", tmp_path, sizes={"train": 1, "test": 1}, image_size=16)
    assert [key for key, _ in drawn] == [("train", 0, 0), ("test", 0, 0)] and drawn[0][1]
    assert "videos of cater-gen-v1" in capsys.readouterr().err


def relisted(root, change, name="train_explicit"):
    """A list of a folder with its entries changed."""
    listed = json.loads((root / f"{name}.json").read_text())
    change(listed)
    (root / f"{name}.json").write_text(json.dumps(listed))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_caption_with_an_unknown_word_is_told_at_opening(written, tmp_path, split):
    root = shutil.copytree(written, tmp_path / "words")
    relisted(root, lambda listed: listed["0"].update(caption=" the cone is flying."), f"{split}_explicit")
    with pytest.raises(ValueError, match=rf"entry 0 of .*{split}_explicit.json: unknown word 'flying'.*; correct the"):
        folders.VideoFolder(root, "cater-gen-v2")
    assert folders.VideoFolder(root, "cater-gen-v2", "ambiguous").sizes["train"] == 2
    assert "flying" in folders.VideoFolder(other_name(root), "birds").vocabulary, "words of their own"


def other_name(root):
    for split in ("train", "test"):
        shutil.copy(root / f"{split}_explicit.json", root / f"{split}.json")
    return root


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


def test_a_samples_speed_hangs_on_the_seed(footage):
    data = folders.VideoFolder(footage, image_size=32)
    speeds = [data.spec("train", 0, seed).speed for seed in range(200)]
    assert len(set(speeds)) == 200 and min(speeds) < 0.1 and max(speeds) > 0.9


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
    for nothing in ("", " \n", None):
        message = f"the caption is {nothing!r}: .*person, running, waving".replace("\\", ".")
        with pytest.raises(ValueError, match=message):
            data.language.tidy(nothing)
    with pytest.raises(ValueError, match="has no frame 5"):
        data.clips([part], np.array([[0, 5]]))
    with pytest.raises(IndexError, match="it has 1, numbered from 0"):
        data.spec("test", 1)


@pytest.mark.parametrize("part", [{"end": 13}, {"first": 4, "end": 50}, {"first": 12}])
def test_a_part_beyond_the_videos_end_is_told_at_opening(footage, part):
    relisted(footage, lambda listed: listed["1"].pop("end") and listed["1"].pop("first"), "train")
    relisted(footage, lambda listed: listed["1"].update(part), "train")
    with pytest.raises(ValueError, match="entry 1 of .*train.json has first = .* clips/a.avi has 12 frames: correct "
                                         "the entry to 0 <= first < end <= 12"):
        folders.VideoFolder(footage)
    relisted(footage, lambda listed: listed["1"].update(first=11, end=12), "train")
    data = folders.VideoFolder(footage, image_size=16)
    assert data.video(data.spec("train", 1)).shape == (1, 16, 16, 3)


def test_whole_videos_are_not_opened_with_their_folder(written, monkeypatch):
    monkeypatch.setattr(folders, "_av", lambda: pytest.fail("a video was opened"))
    folders.VideoFolder(written, "cater-gen-v2")


def swap(listed):
    """Two entries with each other's captions."""
    listed["0"]["caption"], listed["1"]["caption"] = listed["1"]["caption"], listed["0"]["caption"]


def test_the_training_captions_are_told_and_tokens_do_not_depend_on_them(footage):
    before = folders.VideoFolder(footage)
    relisted(footage, lambda listed: listed["0"].update(caption="  a PERSON is waving. "), "train")
    assert folders.VideoFolder(footage).about == before.about, "the same words"

    relisted(footage, swap, "train")
    after = folders.VideoFolder(footage)
    assert after.content == before.content and after.vocabulary == before.vocabulary
    assert {key for key in after.about["videos"] if after.about["videos"][key] != before.about["videos"][key]} == {
        "captions"}
    told = json.loads(json.dumps(after.about))
    assert clips.described(told) == after.language
    del told["videos"]["captions"]  # as cards once were
    assert clips.described(told) == after.language


def test_videos_may_lie_elsewhere_behind_a_link(footage, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "films"
    (footage / "clips").rename(elsewhere)
    (footage / "clips").symlink_to(elsewhere)
    assert folders.VideoFolder(footage, image_size=32).sizes == {"train": 2, "test": 1}
    relisted(footage, lambda listed: listed["0"].update(video="clips/../../films/a.avi"), "train")
    with pytest.raises(ValueError, match="entry 0 .*leads out of the folder.*put the video, or a link to it, into"):
        folders.VideoFolder(footage)


@pytest.mark.parametrize("name", ["quick", "paper"])
def test_a_video_without_frames_is_told_before_training(footage, name):
    (footage / "clips" / "empty.avi").touch()
    relisted(footage, lambda listed: listed["0"].update(video="clips/empty.avi"), "test")
    with pytest.raises(ValueError, match="empty.avi"):
        training.check(folders.VideoFolder(footage, "walks"), presets.preset(name, "walks"))


def test_seeds_are_whole_numbers_and_no_frames_are_no_error(footage):
    data = folders.VideoFolder(footage, image_size=32)
    assert data.spec("train", 0, np.int64(1)) == data.spec("train", 0, 1)
    with pytest.raises(TypeError):
        data.spec("train", 0, 1.0)
    assert data.clips([data.spec("train", 0)], np.zeros((1, 0), int)).shape == (1, 0, 32, 32, 3)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", None, "two words"])
def test_a_name_that_is_no_word_is_refused(footage, name):
    with pytest.raises(ValueError, match=f"name is {name!r}: it must be a word"):
        folders.VideoFolder(footage, name)


def test_an_evaluation_of_other_captions_is_not_gone_on_with(footage, tmp_path):
    def judged():
        made = {"still": metrics.first_frame_repeated()}
        evaluation.evaluate_all(made, data := folders.VideoFolder(footage, "walks", image_size=32), "test", 1,
                                keep=tmp_path / "kept.npz", progress=False)
        with np.load(tmp_path / "kept.npz") as file:
            return json.loads(str(file["key"]))[0], data

    before, _ = judged()
    assert judged()[0] == before
    relisted(footage, lambda listed: listed["0"].update(caption="A person is waving."), "test")
    assert judged()[0] != before


def test_a_run_on_corrected_captions_does_not_go_on(footage, tmp_path):
    def stage():
        about = training._recipe(presets.PRESETS["smoke"].mage, folders.VideoFolder(footage), 0, None)
        part = torch.nn.Linear(1, 1)
        optimiser = torch.optim.SGD([{"params": part.parameters(), "base": 0.0}])
        return loop.Stage("mage", "samples", 2, 1, {"mage": part}, [optimiser], lambda number: (part.weight.sum(), {}),
                          None, lambda: {}, 2, 0, about)

    assert loop.fit(stage(), tmp_path / "run", progress=False) and loop.fit(stage(), tmp_path / "run", progress=False)
    relisted(footage, lambda listed: listed["0"].update(caption="A person is waving."), "test")
    assert loop.fit(stage(), tmp_path / "run", progress=False)
    relisted(footage, swap, "train")
    with pytest.raises(ValueError, match=r"trained with another recipe \(videos differ\): choose another folder"):
        loop.fit(stage(), tmp_path / "run", progress=False)


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
    for part in ((2, 2), (0,), (0, 1, 2), (-1, 2), (0.0, 2), 1):
        with pytest.raises(ValueError, match="which, of how many"):
            folders.write_folder("cater-gen-v1", tmp_path, part=part)
    assert not list(tmp_path.iterdir())


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


def test_a_video_that_is_cut_short_is_told_when_it_is_counted(footage):
    path = folders.write_video(footage / "clips" / "b.avi", smooth(40, (60, 80)))
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    relisted(footage, lambda listed: listed["0"].update(video="clips/b.avi"), "train")
    data = folders.VideoFolder(footage)
    with pytest.raises(ValueError, match="b.avi is cut short: get it again, or take its entries out of the lists"):
        data.length(data.spec("train", 0))


def cut(path, frames=40):
    """A video of which about half is there; how many frames are whole."""
    folders.write_video(path, smooth(frames, (60, 80)))
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    return folders._readable(path)[0]


def test_of_a_video_that_is_cut_short_what_is_there_can_be_used(footage):
    there = cut(footage / "clips" / "b.avi")
    assert 10 < there < 30
    relisted(footage, lambda listed: listed["1"].update(video="clips/b.avi", first=3, end=there), "train")
    data = folders.VideoFolder(footage, image_size=16)
    assert data.video(data.spec("train", 1)).shape == (there - 3, 16, 16, 3)
    relisted(footage, lambda listed: listed["1"].update(end=there + 1), "train")
    with pytest.raises(ValueError, match=rf"entry 1 of .*train.json .*b.avi is cut short after {there} frames: get"):
        folders.VideoFolder(footage)


def test_ranges_of_kth_that_a_cut_has_taken_or_that_never_were_are_left_out(tmp_path):
    folders.write_video(tmp_path / "person11_boxing_d1_uncomp.avi", smooth(8, (24, 32)))
    there = cut(tmp_path / "person01_boxing_d4_uncomp.avi")
    (tmp_path / "00sequences.txt").write_text("person11_boxing_d1 frames 1-4, 5-8, 5-12\n"
                                              f"person01_boxing_d4 frames 1-5, 6-{there}, {there + 1}-40")
    with pytest.warns(UserWarning, match=f"person01_boxing_d4_uncomp.avi is cut short after {there} frames: its part "
                                         f"{there + 1}-40 is left out"), \
            pytest.warns(UserWarning, match="person11_boxing_d1_uncomp.avi has 8 frames: its part 5-12 is left out"):
        sizes = folders.write_kth_lists(tmp_path, tmp_path / "00sequences.txt")
    assert sizes == {"train": 2, "validation": 2, "test": 0}
    data = folders.VideoFolder(tmp_path, "kth", image_size=24)
    assert data.video(data.spec("validation", 1)).shape == (there - 5, 24, 24, 3)


def test_a_folder_is_left_by_no_way(footage, monkeypatch):
    inside = footage / "inside"
    shutil.copytree(footage / "clips", inside / "clips")
    for split in ("train", "test"):
        shutil.copy(footage / f"{split}.json", inside)
    relisted(inside, lambda listed: listed["0"].update(video="../clips/a.avi"), "train")
    monkeypatch.chdir(inside)
    for root in (".", inside):
        with pytest.raises(ValueError, match="leads out of the folder"):
            folders.VideoFolder(root)


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders.write_video("a:b.avi", smooth(3, (24, 32)))
    assert len(list(folders.read_video("a:b.avi"))) == folders._count(Path("a:b.avi")) == 3


def test_a_sample_of_another_dataset_is_not_read(footage):
    mine, other = folders.VideoFolder(footage, "mine"), folders.VideoFolder(footage, "other")
    with pytest.raises(ValueError, match="a sample of mine was given to other"):
        other.clips([mine.spec("train", 0)], np.zeros((1, 2), int))
    with pytest.raises(ValueError, match=r"no frame 50 in its sample: it has 12"):
        mine.clips([mine.spec("train", 0)], np.array([[0, 50]]))


@pytest.mark.parametrize("interval", [(0, 0), (3,), (6, 3), (-1, 2), 5, None, ("a", "b"), (3, float("inf"))])
def test_an_interval_must_be_one(footage, interval):
    with pytest.raises(ValueError, match="two positive numbers, the smaller first"):
        folders.VideoFolder(footage, interval=interval)
    assert folders.VideoFolder(footage, interval=[3, 6]).interval == (3, 6)


@pytest.mark.parametrize("size", [0, -8, 100, 2048, "128", None, 128.0])
def test_a_size_must_be_one(footage, size):
    with pytest.raises(ValueError, match="use a multiple of 8 from 16 to 1024"):
        folders.VideoFolder(footage, image_size=size)


@pytest.mark.parametrize("minus", ["\u2212", "\u2013"])
def test_a_minus_of_any_kind_is_one(footage, minus):
    relisted(footage, lambda listed: listed["0"].update(caption="to (1, -3)."), "train")
    data = folders.VideoFolder(footage)
    assert data.encode(f"to (1, {minus}3).") == data.encode("to (1, -3).")


@pytest.mark.parametrize("typed", ["\u22123", "\u20133", "- 3", "\u2013 3"])
def test_a_folder_of_cater_gen_reads_cells_as_the_grammar_does(written, typed):
    sentence = f"the small gold metal snitch is sliding to (1, {typed})."
    assert folders.VideoFolder(written, "cater-gen-v2").encode(sentence) == captions.encode(sentence, "cater-gen-v2")


def test_of_many_words_an_error_shows_those_most_alike(footage):
    words = " ".join(f"{a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in "klmn")
    relisted(footage, lambda listed: listed["0"].update(caption=words), "train")
    with pytest.raises(ValueError, match="unknown word 'bakk' .* have bak and ") as told:
        folders.VideoFolder(footage).encode("bakk")
    assert len(str(told.value)) < 200


def test_a_folder_without_videos_is_told_at_opening(footage):
    (footage / "train.json").write_text("{}")
    assert folders.VideoFolder(footage).sizes == {"train": 0, "test": 1}
    with pytest.raises(ValueError, match="folder has no training pairs"):
        training.pairs_of(presets.preset("smoke"), folders.VideoFolder(footage))
    (footage / "test.json").write_text("{}")
    with pytest.raises(ValueError, match="names a video: train.json and test.json need an entry or more"):
        folders.VideoFolder(footage)
    (footage / "test.json").write_text('""')
    with pytest.raises(ValueError, match="is no list of videos"):
        folders.VideoFolder(footage)


@pytest.mark.parametrize("frames", ["5", "1--5", "1-10 11-30", "0-5", "10-5"])
def test_frames_of_kth_that_are_none_are_told_with_their_line(tmp_path, frames):
    folders.write_video(tmp_path / "person01_boxing_d1_uncomp.avi", smooth(8, (24, 32)))
    (tmp_path / "00sequences.txt").write_text(f"person01_boxing_d1 frames {frames}")
    with pytest.raises(ValueError, match="line 1 of .* e.g. 1-95"):
        folders.write_kth_lists(tmp_path, tmp_path / "00sequences.txt")


def test_a_file_without_sequences_leaves_the_lists_as_they_are(footage):
    before = (footage / "train.json").read_text()
    (footage / "README").write_text("Nothing of KTH.")
    with pytest.raises(ValueError, match="give KTH's own file"):
        folders.write_kth_lists(footage, footage / "README")
    assert (footage / "train.json").read_text() == before


def test_a_call_that_cannot_be_met_leaves_nothing(tmp_path):
    for wrong in ({"seed": 1.5}, {"image_size": 16.0}):
        with pytest.raises((TypeError, ValueError)):
            folders.write_folder("cater-gen-v1", tmp_path / "new", sizes={"train": 1, "test": 0}, **wrong)
    assert not (tmp_path / "new").exists()
    made = {"sizes": {"train": 1, "test": 0}, "image_size": 16, "progress": False}
    folders.write_folder("cater-gen-v1", tmp_path / "new", seed=np.int64(1), **made)
    (tmp_path / "new" / "made_by.json").write_text('{"dataset": "cat')
    with pytest.raises(ValueError, match="made_by.json is damaged .* choose another folder"):
        folders.write_folder("cater-gen-v1", tmp_path / "new", seed=1, **made)


def test_a_video_is_turned_as_players_turn_it(tmp_path):
    """A phone notes how it was held in the track's header: a matrix, here of a quarter turn clockwise."""
    video = torch.zeros(30, 3, 128, 128)
    for t in range(30):
        video[t, :, 56:72, 4 * t:4 * t + 12] = 1   # moves to the right as it is stored
    content = bytearray(display.mp4_bytes(video, fps=24))
    header = content.find(b"tkhd")
    matrix = header + 8 + (20 if content[header + 4] == 0 else 32) + 16
    turned = struct.pack(">9i", 0, 0x10000, 0, -0x10000, 0, 0, 128 << 16, 0, 0x40000000)
    content[matrix:matrix + 36] = turned
    (tmp_path / "turned.mp4").write_bytes(content)
    frames = list(folders.read_video(tmp_path / "turned.mp4"))
    rows, columns = zip(*(np.argwhere(frame[..., 0] > 128).mean(0) for frame in (frames[0], frames[-1])))
    assert rows[1] > rows[0] + 90 and abs(columns[1] - columns[0]) < 2, "it moves down"
