"""The queue: goes on where it stopped, here or on another machine; one at a time; nothing better is ever replaced."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from mage_core import queue, weights
from mage_core import training as queue_training
from mage_core.presets import PRESETS, changed, preset

NAMES = ("single-mnist", "double-mnist")
CHANGES = ("pairs=6", "test_clips=3", "watch_clips=1", "vqvae.images=32", "mage.samples=8", "mage.own_frames=0.0",
           "vqvae.codebook_size=16")
OPTIONS = {"names": NAMES, "changes": CHANGES, "progress": False}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A queue that was worked through in one go."""
    folder = tmp_path_factory.mktemp("queue")
    assert queue.work(folder, "smoke", minutes=60, **OPTIONS) == (list(NAMES), [])
    return folder


@pytest.fixture
def in_a_hurry(monkeypatch):
    """Even an entry that has no time left is begun."""
    monkeypatch.setattr(queue, "LEAST_SECONDS", -1e9)


def tensors(folder, name):
    trained = weights.load(folder / name / "weights.safetensors")
    return {**trained.vqvae.state_dict(), **{f"mage.{key}": value for key, value in trained.mage.state_dict().items()}}


def test_every_entry_ends_with_weights_curves_a_card_and_the_papers_figures(finished):
    for name in NAMES:
        entry = finished / name
        assert queue.progress_of(entry).state == "finished"
        card = weights.load(entry / "weights.safetensors").card
        assert card["dataset"] == name and card["preset"] == "smoke" and card["processes"] == 1
        assert set(card["paper"]) == {"ssim", "psnr_vqvae", "psnr_mage"} and card["precision"] == "half"
        assert [row["name"] for row in card["results"]][0] == "MAGE" and card["results"][0]["n"] == 3
        assert card["commit"] is None or set(card["commit"]) <= set("0123456789abcdef+")
        assert card["recipe"] == json.loads(json.dumps(dataclasses.asdict(changed(preset("smoke", name), CHANGES))))
        assert queue.read_curve(entry / "mage.jsonl") and not (entry / "error.txt").exists()
        visit, = queue.read_curve(entry / "visits.jsonl")
        assert visit["state"] == "finished" and visit["seconds"] > 0
    listing = queue.listing(finished, NAMES)
    assert listing.count("finished") == 2
    assert queue.work(finished, "smoke", minutes=60, **OPTIONS) == ([], []), "there is nothing left to do"


def test_stopped_and_carried_to_other_machines_it_ends_in_the_same_weights(finished, tmp_path, in_a_hurry, monkeypatch):
    here, one = tmp_path / "here", {**OPTIONS, "names": NAMES[:1]}
    states = []

    def carried_on(number):
        there = tmp_path / str(number)
        files = queue.export(here if number == 0 else tmp_path / str(number - 1), tmp_path / f"export {number}", NAMES)
        assert all(path.stat().st_size < 16 * 2 ** 20 for path in files)
        assert queue.take_up(there, tmp_path / f"export {number}") == ["single-mnist"]
        assert queue.take_up(there, tmp_path / f"export {number}") == [], "it is no further than what is there"
        return there

    queue.work(here, "smoke", minutes=-1, **one)
    states.append(queue.progress_of(here / "single-mnist").state)
    there = carried_on(0)
    real = queue.train
    with monkeypatch.context() as patch:   # the first stage to its end, none of the second
        patch.setattr(queue, "train", lambda *args, **options: (
            queue_training.train_vqvae(args[1], args[0], options["folder"], progress=False),
            real(*args, **{**options, "minutes": -1}))[1])
        queue.work(there, "smoke", minutes=60, **one)
    states.append(queue.progress_of(there / "single-mnist").state)
    there = carried_on(1)
    assert torch.load(there / "single-mnist" / "vqvae.pt", weights_only=True)["optimisers"] == []
    with monkeypatch.context() as patch:   # trained, and no time left to judge
        patch.setattr(queue, "results", lambda *args, **options: None)
        queue.work(there, "smoke", minutes=60, **one)
    states.append(queue.progress_of(there / "single-mnist").state)
    there = carried_on(2)
    assert queue.work(there, "smoke", minutes=60, **one) == (["single-mnist"], [])
    assert states == ["vqvae", "mage", "evaluation"]
    assert len(queue.read_curve(there / "single-mnist" / "visits.jsonl")) == 4
    found, expected = tensors(there, "single-mnist"), tensors(finished, "single-mnist")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    cards = [weights.load(folder / "single-mnist" / "weights.safetensors").card for folder in (there, finished)]
    assert [[row["psnr_frames"] for row in card["results"]] for card in cards][0] == [
        row["psnr_frames"] for row in cards[1]["results"]]


def test_an_export_with_a_damaged_or_missing_part_is_refused(finished, tmp_path):
    queue.export(finished, tmp_path / "export")
    part, = (tmp_path / "export").glob("queue.00.*")
    content = bytearray(part.read_bytes())
    content[1000] ^= 1
    part.write_bytes(content)
    with pytest.raises(queue.QueueError, match="checksum of queue.00"):
        queue.take_up(tmp_path / "there", tmp_path / "export")
    part.unlink()
    with pytest.raises(queue.QueueError, match="every part"):
        queue.take_up(tmp_path / "there", tmp_path / "export")
    queue.export(finished, tmp_path / "export")
    told = json.loads((tmp_path / "export" / "queue.json").read_text())
    told["entries"]["single-mnist"]["state"] = "somewhere"
    for wrong in ([], told):
        (tmp_path / "export" / "queue.json").write_text(json.dumps(wrong))
        with pytest.raises(queue.QueueError, match="not a whole export"):
            queue.take_up(tmp_path / "there", tmp_path / "export")
    assert not (tmp_path / "there").exists()


def test_an_export_leaves_what_is_not_its_own_and_the_one_before_until_it_is_whole(finished, tmp_path, monkeypatch):
    target = tmp_path / "export"
    before = queue.export(finished, target, NAMES[:1])
    own = [target / name for name in ("queue.log", "queue.py", "queue.md")]
    for path in own:
        path.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(queue, "write_whole", lambda path, write: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            queue.export(finished, target, NAMES)
    assert queue.take_up(tmp_path / "there", target) == [NAMES[0]]
    after = queue.export(finished, target, NAMES)
    assert queue.take_up(tmp_path / "there", target) == [NAMES[1]]
    assert set(target.iterdir()) == {*own, *after} and not set(before[1:]) & set(after)


def test_a_damaged_entry_does_not_hold_up_the_others(finished, tmp_path, monkeypatch, capsys):
    damaged = begun(tmp_path / "here")
    (damaged / "vqvae.pt").write_bytes((damaged / "vqvae.pt").read_bytes()[:100])
    monkeypatch.setattr(queue, "visit", lambda entry, *args, **options: begun(tmp_path / "here", name=entry.name))
    worked = queue.work(tmp_path / "here", "smoke", minutes=60, target=tmp_path / "export", **OPTIONS)
    assert worked == (list(NAMES), ["single-mnist"])
    assert "single-mnist/vqvae.pt cannot be read" in (damaged / "error.txt").read_text()
    listing = queue.listing(tmp_path / "here", NAMES)
    assert "| single-mnist | damaged |" in listing and "delete it" in listing and "| double-mnist | vqvae" in listing
    assert queue.take_up(tmp_path / "there", tmp_path / "export") == ["double-mnist"]
    queue.export(finished, tmp_path / "whole", NAMES[:1])
    assert queue.take_up(tmp_path / "here", tmp_path / "whole") == ["single-mnist"], "an import puts it right"
    for file in (*queue.RESULT, *queue.CHECKPOINTS):
        (damaged / file).unlink(missing_ok=True)
    for content in (b"", b"PK", b"[]"):
        (damaged / "vqvae.pt").write_bytes(content)
        assert "| damaged |" in queue.listing(tmp_path / "here", NAMES[:1])
    for file in queue.RESULT:
        (damaged / file).touch()
    (damaged / "weights.json").write_text("{")
    assert "weights.json cannot be read" in queue.listing(tmp_path / "here", NAMES)


def test_weights_without_a_card_are_made_again_from_the_checkpoints(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "queue")
    card = tmp_path / "queue" / "single-mnist" / "weights.json"
    before = json.loads(card.read_text())
    card.unlink()
    assert queue.work(tmp_path / "queue", "smoke", minutes=60, **OPTIONS) == (["single-mnist"], [])
    assert json.loads(card.read_text())["sha256"] == before["sha256"]


def test_parts_are_small_and_together_the_whole(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "PART_BYTES", 50_000)
    files = queue.export(finished, tmp_path / "export")
    assert [path.name[:8] for path in files[:3]] == ["queue.js", "queue.00", "queue.01"]
    assert len(files) > 3 and all(path.stat().st_size <= 50_000 for path in files[1:])
    assert queue.take_up(tmp_path / "there", tmp_path / "export") == list(NAMES)
    assert tensors(tmp_path / "there", NAMES[1]).keys() == tensors(finished, NAMES[1]).keys()
    assert set(queue.export(finished, tmp_path / "export", NAMES[:1])) == set((tmp_path / "export").iterdir())


def begun(folder, step=1, name="single-mnist"):
    """An entry in its first stage."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    torch.save({"step": step, "optimisers": [1.0]}, folder / name / "vqvae.pt")
    return folder / name


@pytest.mark.parametrize("state, arrives", [
    ("vqvae", {*queue.SMALL, "vqvae.pt"}), ("mage", {*queue.SMALL, *queue.CHECKPOINTS}),
    ("evaluation", {*queue.SMALL, *queue.RESULT, "evaluation.npz"}), ("finished", {*queue.SMALL, *queue.RESULT})])
def test_all_that_a_state_needs_arrives_and_no_more(tmp_path, state, arrives):
    entry, rank = begun(tmp_path / "here"), queue.STATES.index(state)
    for file in queue.SMALL:
        (entry / file).write_text("{\"seconds\": 1}\n")
    if rank > 1:
        torch.save({"step": 1, "optimisers": [1.0]}, entry / "mage.pt")
    if rank > 2:
        for file in ("weights.safetensors", "evaluation.npz"):
            (entry / file).write_bytes(b"of the model")
        (entry / "weights.json").write_text("{}" if state == "evaluation" else "{\"results\": []}")
    queue.export(tmp_path / "here", tmp_path / "export")
    queue.take_up(tmp_path / "there", tmp_path / "export")
    there = tmp_path / "there" / "single-mnist"
    assert queue.progress_of(there) == queue.progress_of(entry) and queue.progress_of(there).state == state
    assert {path.name for path in there.iterdir()} == arrives
    changed = {path.name for path in there.iterdir() if path.read_bytes() != (entry / path.name).read_bytes()}
    assert changed == ({"vqvae.pt"} if state == "mage" else set()), "only a finished stage goes without its optimisers"


def test_more_steps_of_a_stage_are_taken_up_and_nothing_of_the_old_stays_beside_them(tmp_path):
    begun(tmp_path / "here", 1_200)
    old = begun(tmp_path / "there", 1_100)
    for file in ("error.txt", "speed.json", "weights.safetensors", "evaluation.npz"):
        (old / file).write_text("of the old")
    queue.export(tmp_path / "there", tmp_path / "old")
    queue.export(tmp_path / "here", tmp_path / "new")
    assert queue.take_up(tmp_path / "here", tmp_path / "old") == []
    with queue.locked(tmp_path / "there"), pytest.raises(queue.QueueError, match="in use"):
        queue.take_up(tmp_path / "there", tmp_path / "new")
    assert queue.take_up(tmp_path / "there", tmp_path / "new") == ["single-mnist"]
    assert [path.name for path in old.iterdir()] == ["vqvae.pt"]
    (old / "visits.jsonl").write_text("{\"seconds\": 60}\n{\"seconds\": 30}\n")
    assert "| single-mnist | vqvae, step 1,200 | 1.5 |" in queue.listing(tmp_path / "there")


def test_taking_up_that_was_killed_begins_again(tmp_path, monkeypatch):
    entry = begun(tmp_path / "here", 1_200)
    for file in ("vqvae.jsonl", "visits.jsonl"):
        (entry / file).write_text("{\"seconds\": 60}\n")
    queue.export(tmp_path / "here", tmp_path / "export")
    begun(tmp_path / "there", 1_100)
    files = sorted(path.name for path in entry.iterdir())
    for survived in range(len(files)):
        left = iter(range(survived))
        with monkeypatch.context() as patch, pytest.raises(StopIteration):
            patch.setattr(queue, "write_whole", lambda path, write: (next(left), path.parent.mkdir(exist_ok=True),
                                                                     write(path)))
            queue.take_up(tmp_path / "there", tmp_path / "export")
    assert queue.take_up(tmp_path / "there", tmp_path / "export") == ["single-mnist"]
    there = tmp_path / "there" / "single-mnist"
    assert sorted(path.name for path in there.iterdir()) == files
    assert all((there / name).read_bytes() == (entry / name).read_bytes() for name in files)


def test_what_is_no_entry_of_the_queue_is_not_taken_up(tmp_path):
    begun(tmp_path, name="elsewhere")
    (tmp_path / "here").mkdir()
    queue.export(tmp_path / "here", tmp_path / "export", ["../elsewhere"])
    assert queue.take_up(tmp_path / "in" / "there", tmp_path / "export") == []
    assert not (tmp_path / "in" / "elsewhere").exists()


def test_a_finished_entry_is_passed_over_and_each_is_exported_before_the_next_begins(finished, tmp_path, monkeypatch):
    names, target = ("single-mnist", "double-mnist", "modified-mnist"), tmp_path / "export"
    shutil.copytree(finished / "single-mnist", tmp_path / "queue" / "single-mnist")
    there = []

    def visit(entry, name, *args, **options):
        there.append(sorted(json.loads((target / "queue.json").read_text())["entries"]) if target.exists() else None)
        begun(entry.parent, name=name)

    monkeypatch.setattr(queue, "visit", visit)
    assert queue.work(tmp_path / "queue", "smoke", minutes=0.1, names=names) == ([], []), "too late to begin"
    assert queue.work(tmp_path / "queue", "smoke", minutes=60, names=names, target=target) == (list(names[1:]), [])
    assert there == [None, ["double-mnist"]]


def test_a_visit_has_the_time_that_is_left_and_judges_the_whole_test_split(finished, tmp_path, monkeypatch):
    trained, asked = weights.load(finished / "single-mnist" / "weights.safetensors"), {}
    monkeypatch.setattr(queue, "train", lambda *args, **options: (asked.update(options), trained)[1])
    monkeypatch.setattr(queue, "results", lambda trained, n, **options: asked.update(options, n=n))
    until = time.monotonic() + 60_000
    assert not queue.visit(tmp_path, "single-mnist", PRESETS["quick"], until=until, command="as told")
    assert asked["minutes"] == pytest.approx(1_000, rel=0.1) and asked["command"] == "as told"
    assert asked["until"] == until and asked["n"] is None


def test_an_entry_that_fails_leaves_its_error_and_the_next_gets_its_turn(tmp_path, monkeypatch, capsys):
    def visit(entry, name, *args, **options):
        if name == "single-mnist":
            raise MemoryError("no room left")
        entry.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(queue, "visit", visit)
    assert queue.work(tmp_path, "smoke", minutes=1, **OPTIONS) == (list(NAMES), ["single-mnist"])
    assert "no room left" in (tmp_path / "single-mnist" / "error.txt").read_text()
    assert "single-mnist failed" in capsys.readouterr().err and "no room left" in queue.listing(tmp_path, NAMES)
    with pytest.raises(ValueError, match="changes nothing"):
        queue.work(tmp_path, "smoke", names=NAMES, changes=["mage.nothing=1"])


def test_the_command_tells_of_an_error_which_is_gone_once_its_entry_works(tmp_path, monkeypatch):
    given = ["--folder", str(tmp_path), "--preset", "smoke", "--datasets", "single-mnist", "--minutes", "60"]
    monkeypatch.setattr(queue, "visit", lambda *args, **options: 1 / 0)
    assert queue.main(given) == 1 and (tmp_path / "single-mnist" / "error.txt").exists()
    monkeypatch.setattr(queue, "visit", lambda *args, **options: False)
    assert queue.main(given) == 0 and not (tmp_path / "single-mnist" / "error.txt").exists()


HOLDER = """
import sys, time
from pathlib import Path
from mage_core.queue import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL on this system")
def test_a_second_command_is_refused_until_the_first_ends_even_by_a_kill(repository, tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=repository, stdout=subprocess.PIPE,
                              text=True, env={**os.environ, "PYTHONPATH": str(repository)})
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(queue.QueueError, match=f"in use by process {holder.pid}"):
            queue.work(tmp_path, "smoke", **OPTIONS)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with queue.locked(tmp_path):
        pass


def test_published_weights_never_replace_better_ones_silently(finished, tmp_path):
    told = queue.publish(finished, tmp_path, [*NAMES, "cater-gen-v1"])
    assert told["cater-gen-v1"] == "not finished" and told["single-mnist"].startswith("published")
    assert weights.load(tmp_path / "single-mnist.safetensors").card["results"]
    card = json.loads((tmp_path / "single-mnist.json").read_text())
    card["results"][0]["psnr_frames"] += 0.01
    (tmp_path / "single-mnist.json").write_text(json.dumps(card))
    (tmp_path / "single-mnist.safetensors").write_bytes(b"better")
    assert queue.publish(finished, tmp_path, NAMES[:1])["single-mnist"].startswith("left alone")
    assert (tmp_path / "single-mnist.safetensors").read_bytes() == b"better"
    card["results"][0]["psnr_frames"] -= 0.02
    (tmp_path / "single-mnist.json").write_text(json.dumps(card))
    assert "in place of" in queue.publish(finished, tmp_path, NAMES[:1])["single-mnist"]
    assert weights.load(tmp_path / "single-mnist.safetensors").card["results"]


@pytest.mark.parametrize("card", ["[]", "null", '{"results": null}', '{"results": [{}]}'])
def test_a_foreign_card_does_not_hold_up_the_others(finished, tmp_path, card):
    (tmp_path / "single-mnist.json").write_text(card)
    told = queue.publish(finished, tmp_path, NAMES)
    assert "its card is none of ours" in told["single-mnist"] and told[NAMES[1]].startswith("published")
    assert (tmp_path / "single-mnist.json").read_text() == card


def test_a_card_without_figures_is_listed_as_damaged_and_not_published(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "queue")
    card = tmp_path / "queue" / "single-mnist" / "weights.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"results": []}))
    (tmp_path / "queue" / NAMES[1] / "error.txt").write_text("")
    lines = queue.listing(tmp_path / "queue").splitlines()
    assert "| single-mnist | damaged |" in lines[2] and "has no figures" in lines[2] and "| finished |" in lines[3]
    assert "no figures of MAGE" in queue.publish(tmp_path / "queue", tmp_path / "out", NAMES[:1])["single-mnist"]


def test_damaged_weights_are_not_published_and_force_replaces_better_ones(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(queue, "data_folder", lambda: tmp_path)
    shutil.copytree(finished, tmp_path / "queue")
    damaged = tmp_path / "queue" / "single-mnist" / "weights.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    told = queue.publish(tmp_path / "queue", tmp_path / "some", names=NAMES)   # the other one is published
    assert re.match("not published: .*damaged", told["single-mnist"], re.S)
    assert told["double-mnist"].startswith("published")
    assert {path.stem for path in (tmp_path / "some").iterdir()} == {"double-mnist"}
    assert queue.main(["--folder", str(tmp_path / "queue"), "--publish", "--datasets", "single-mnist"]) == 1
    assert "not published" in capsys.readouterr().out and not (tmp_path / "weights").exists()
    for words, told in (([], "published"), ([], "left alone"), (["--force"], "in place of")):
        assert queue.main(["--folder", str(finished), "--publish", "--datasets", "double-mnist", *words]) == 0
        assert told in capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "weights").iterdir()} == {"double-mnist"}


def test_the_command_line_lists_exports_takes_up_and_refuses(finished, tmp_path, capsys):
    assert queue.main(["--folder", str(finished), "--list"]) == 0
    out = capsys.readouterr().out
    assert out.count("finished") == 2 and out.count("waiting") == 3
    assert queue.main(["--folder", str(finished), "--minutes", "0", "--export", str(tmp_path / "out")]) == 0
    assert "exported queue.json" in capsys.readouterr().out
    assert queue.main(["--folder", str(tmp_path / "new"), "--list", "--import", str(tmp_path / "out")]) == 0
    assert "taken up: single-mnist, double-mnist" in capsys.readouterr().out
    (tmp_path / "out" / "queue.json").write_text("{}")
    assert queue.main(["--folder", str(tmp_path / "new"), "--import", str(tmp_path / "out")]) == 2
    assert "not a whole export" in capsys.readouterr().err
    capsys.readouterr()
    for words, told in ((["--datasets", "no-such-dataset"], "unknown entry 'no-such-dataset'"),
                        (["--set", "mage.sample=1"], "'mage.sample=1' changes nothing"),
                        (["--preset", "nonsense"], "nonsense"), (["--set", "test_clips=100"], "whole test splits"),
                        (["--export", str(tmp_path / "out" / "queue.json")], "queue.json is a file")):
        with pytest.raises(SystemExit) as end:
            queue.main(["--folder", str(tmp_path / "none"), *words])
        assert end.value.code == 2 and told in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_weights_of_another_recipe_are_not_taken_for_this_one(finished, tmp_path):
    chosen = changed(PRESETS["smoke"], [*CHANGES, "mage.samples=12"])
    with pytest.raises(ValueError, match="another recipe"):
        queue.visit(finished / "single-mnist", "single-mnist", chosen, until=0.0)
