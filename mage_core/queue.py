"""The training queue: each dataset's VQ-VAE, MAGE and whole test split; a command goes on where the last stopped.

    python -m mage_core.queue --minutes 9            # the next entries that are not finished, for nine minutes
    python -m mage_core.queue --list                 # how far each is, the time it took, its results
    python -m mage_core.queue --publish              # finished weights to data/weights, where no better ones are
    python -m mage_core.queue --minutes 0 --export FOLDER   # what another machine needs to go on, in a few files
    python -m mage_core.queue --minutes 0 --import FOLDER   # there: take it up (with minutes: and go on)

An entry lives in a folder of the queue's, with the files of a run (see `training`), and `visits.jsonl`: a line for each
time that it was worked on. One command at a time: a lock, which the system takes away from a process that ends
in whatever way, keeps a second one out.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from mage_core import metrics, weights
from mage_core.clips import load_dataset
from mage_core.files import cache_folder, data_folder, expanded, sha256, write_whole
from mage_core.loop import read_curve
from mage_core.machine import describe as describe_machine
from mage_core.machine import relaunch_with_fast_allocator
from mage_core.presets import Preset, changed, describe, preset, preset_of_environment
from mage_core.training import commit, results, train, without_paths

DATASETS = ("single-mnist", "double-mnist", "modified-mnist", "cater-gen-v1", "cater-gen-v2")   # explicit captions
# What differs for an entry, by preset. A video of v2 shows 23 frames at one speed or another and 7 at one, and a slow
# core draws 75 a second: 16,000 of the 24,000 pairs at one speed each take less time than 6,000 at all, and of 4,100 at
# all the GPU's weights knew much by heart (notebook 04).
CHANGES = {"gpu": {"cater-gen-v2": ("pairs=16_000", "speeds=1")}}
STATES = ("waiting", "vqvae", "mage", "evaluation", "finished")
LEAST_SECONDS = 45.0       # with less time left no entry is begun: its first frames take as long
PART = re.compile(r"queue\.(json|\d\d+(\.[0-9a-f]{8})?)")   # a file of an export; others may lie beside them
PART_BYTES = 15_000_000    # of an export: files of 16 MiB at most can be handed on
CHECKPOINTS, SMALL = ("vqvae.pt", "mage.pt"), ("vqvae.jsonl", "mage.jsonl", "visits.jsonl", "speed.json", "error.txt")
RESULT = ("weights.safetensors", "weights.json")
DAMAGED = "not published"   # how what is told of a damaged entry begins


class QueueError(RuntimeError):
    """The queue cannot do what was asked; the message says why and what to do."""


# ---------------------------------------------------------------- how far an entry is

@dataclass(frozen=True)
class Progress:
    """How far an entry is: its state (one of `STATES`), the steps of the stage that it is in, the seconds it took."""

    state: str
    step: int = 0
    seconds: float = 0.0

    @property
    def rank(self) -> tuple[int, int]:
        """Larger is further."""
        return STATES.index(self.state), self.step


def progress_of(entry: Path) -> Progress:
    """What the files of an entry say; QueueError, naming the file, where one cannot be read."""
    path = entry / "visits.jsonl"
    try:
        seconds = sum(visit["seconds"] for visit in read_curve(path))
        if _trained(entry):
            path = entry / "weights.json"
            done = "results" in json.loads(path.read_text())
            return Progress("finished" if done else "evaluation", 0, seconds)
        for stage in ("mage", "vqvae"):
            if (path := entry / f"{stage}.pt").exists():
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                return Progress(stage, state["step"], seconds)
    except Exception as error:   # foreign bytes fail in as many ways as there are bytes
        why = str(error).partition("\n")[0] or type(error).__name__
        raise QueueError(f"{entry.name}/{path.name} cannot be read ({why}): delete it, and the entry goes on from what "
                         "is left") from error
    return Progress("waiting", 0, seconds)


def _trained(entry: Path) -> bool:
    """Whether weights and their card are there: a kill between the two leaves the checkpoints to make both again."""
    return all((entry / file).exists() for file in RESULT)


def listing(folder: Path, names: Sequence[str] = DATASETS) -> str:
    """All entries as Markdown: state, time, and what was measured."""
    lines = ["| entry | state | minutes | PSNR, frames / clips | SSIM | motion accuracy | VQ-VAE | |",
             "|---|---|---|---|---|---|---|---|"]
    for name in names:
        cells, error = ["–"] * 4, folder / name / "error.txt"
        note = (error.read_text().strip().splitlines() or ["it says nothing"])[-1][:100] if error.exists() else ""
        try:
            found = progress_of(folder / name)
            if found.state == "finished":
                cells = _figures(folder / name / "weights.json")
        except QueueError as problem:
            lines.append(f"| {name} | damaged | – | {' | '.join(cells)} | {problem} |")
            continue
        step = f", step {found.step:,}" if found.step else ""
        lines.append(f"| {name} | {found.state}{step} | {found.seconds / 60:.1f} | {' | '.join(cells)} | {note} |")
    return "\n".join(lines)


def _figures(path: Path) -> list[str]:
    """What a finished entry's card says, as cells of the list."""
    try:
        rows = {row["name"]: row for row in json.loads(path.read_text())["results"]}
        ours = rows["MAGE"]
        return [f"{ours['psnr_frames']:.2f} / {ours['psnr_clips']:.2f}", f"{ours['ssim']:.3f}",
                f"{ours['motion_accuracy']:.3f}" if "motion_accuracy" in ours else "–",
                f"{rows['VQ-VAE reconstruction']['psnr_frames']:.2f}"]
    except (KeyError, TypeError, ValueError) as error:
        raise QueueError(f"{path.parent.name}/{path.name} has no figures ({error!r}): delete it, and the entry is made "
                         "anew from its checkpoints") from error


# ---------------------------------------------------------------- working on it

@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone; QueueError while another one has it."""
    import fcntl   # not on Windows, where there is no other way that outlives a kill

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            raise QueueError(f"{folder.name} is in use by {stream.read().strip() or 'another process'}: wait for it, "
                             "or choose another --folder") from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()}, since {time.strftime('%H:%M:%S')}\n")
        stream.flush()
        yield   # closing the file gives the lock back, as the end of the process does


def work(folder: Path, chosen: str = "auto", *, minutes: float = 9.0, names: Sequence[str] = DATASETS,
         changes: Sequence[str] = (), command: str | None = None, target: Path | None = None,
         progress: bool = True) -> tuple[list[str], list[str]]:
    """Work on the next entries until time is up: (names worked on, names that failed).

    An entry that fails leaves its error in `error.txt`, and the next one gets its turn. After each entry all that were
    worked on are exported to `target`, where one is given. QueueError where another process works on the folder,
    ValueError for a preset or change that there is not.
    """
    until, worked, failed = time.monotonic() + 60 * minutes, [], []
    presets = {name: changed(preset_for(chosen, name), changes) for name in names}   # a wrong word fails here
    with locked(folder):
        for name in names:
            entry, start = folder / name, time.monotonic()
            error = entry / "error.txt"
            try:
                if progress_of(entry).state == "finished":
                    continue
                if until - start < LEAST_SECONDS:
                    break
                visit(entry, name, presets[name], until=until, command=command, progress=progress)
                error.unlink(missing_ok=True)
            except Exception as problem:   # the other entries are to have their time
                failed.append(name)
                text = traceback.format_exc()
                write_whole(error, lambda temporary: temporary.write_text(text))
                print(f"{name} failed and is left for later: {problem}", file=sys.stderr, flush=True)
            worked.append(name)
            _note_visit(entry, time.monotonic() - start)
            if target is not None:   # now, for nobody knows whether there will be a later
                export(folder, target, worked)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return worked, failed


def preset_for(chosen: str, name: str) -> Preset:
    """The queue's preset for a dataset: `auto` is `gpu` on a GPU and `quick` on a CPU, unless MAGE_PRESET names one."""
    if chosen == "auto" and preset_of_environment() == "auto":
        chosen = "gpu" if torch.cuda.is_available() else "quick"
    found = preset(chosen, name)
    return changed(found, CHANGES.get(found.name, {}).get(name, ()))


def visit(entry: Path, name: str, chosen: Preset, *, until: float, command: str | None = None,
          progress: bool = True) -> bool:
    """Go on with an entry until time.monotonic() is `until`; True when it is finished."""
    dataset = load_dataset(name)
    print(f"\n{name}: {progress_of(entry).state}\n{describe(chosen)}", flush=True)
    if _trained(entry):
        trained = weights.load(entry / "weights.safetensors")
        if trained.card["recipe"] != json.loads(json.dumps(dataclasses.asdict(chosen))):
            raise ValueError(f"the weights of {name} were trained by another recipe: choose another --folder, "
                             f"or delete the entry's folder to train them again")
    else:
        trained = train(dataset, chosen, folder=entry, minutes=(until - time.monotonic()) / 60, command=command,
                        progress=progress)
    if trained is None:
        return False
    rows = results(trained, chosen.test_clips if chosen.name == "smoke" else None, keep=entry / "evaluation.npz",
                   until=until, progress=progress)
    if rows is None:
        return False
    trained.add_results(rows)
    print(f"\n{name}, {rows[0].n:,} held-out test pairs\n\n{metrics.table(rows)}", flush=True)
    return True


def _note_visit(entry: Path, seconds: float) -> None:
    try:
        found = progress_of(entry)
    except QueueError:   # what cannot be read was not worked on
        return
    visits = [*read_curve(entry / "visits.jsonl"),
              {"seconds": round(seconds, 1), "state": found.state, "step": found.step, "machine": describe_machine(),
               "commit": commit()}]
    write_whole(entry / "visits.jsonl", lambda temporary: temporary.write_text(
        "".join(json.dumps(line) + "\n" for line in visits)))


# ---------------------------------------------------------------- from one machine to another

def export(folder: Path, target: Path, names: Sequence[str] = DATASETS) -> list[Path]:
    """What another machine needs to go on with some entries: `queue.json` and parts of at most 15 MB; their paths.

    Of a finished entry the weights and card; of one that is not, its checkpoints with all that the optimisers remember,
    but for a stage that is done. Entries that nobody has begun, and damaged ones, are left out.
    """
    stream, entries = io.BytesIO(), {}
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in names:
            try:
                found = progress_of(folder / name)
            except QueueError as error:
                print(f"not exported: {error}", file=sys.stderr, flush=True)
                continue
            if found.state == "waiting":
                continue
            entries[name] = dataclasses.asdict(found)
            for file in _needed(found.state):
                if (path := folder / name / file).exists():
                    content = path.read_bytes()
                    if file == "vqvae.pt" and found.state != "vqvae":
                        content = _without_optimisers(path)
                    about = tarfile.TarInfo(f"{name}/{file}")
                    about.size = len(content)
                    archive.addfile(about, io.BytesIO(content))
    content, parts, before = stream.getvalue(), {}, exported(target)
    for number, start in enumerate(range(0, len(content), PART_BYTES)):
        part = content[start:start + PART_BYTES]
        checksum = hashlib.sha256(part).hexdigest()   # in the name too, so that an earlier export stays whole until
        path = target / f"queue.{number:02d}.{checksum[:8]}"   # `queue.json` tells of this one
        write_whole(path, lambda temporary: temporary.write_bytes(part))
        parts[path.name] = checksum
    told = {"entries": entries, "parts": parts}
    write_whole(target / "queue.json", lambda temporary: temporary.write_text(json.dumps(told, indent=1)))
    for old in before:
        if old.name not in parts and old.name != "queue.json":
            old.unlink()
    return exported(target)


def exported(target: Path) -> list[Path]:
    """The files of an export: `queue.json`, then the parts that lie beside it, in order."""
    files = [path for path in target.glob("queue.*") if PART.fullmatch(path.name)]
    return sorted(files, key=lambda path: (path.name != "queue.json", path.name))


def take_up(folder: Path, source: Path) -> list[str]:
    """Put the entries of an export into a queue's folder, but those that are further there; the names of those put.

    QueueError where a part is missing or damaged, or where another process works on the folder.
    """
    try:
        told = json.loads((source / "queue.json").read_text())
        content = b""
        for name, checksum in told["parts"].items():
            if sha256(source / PurePosixPath(name).name) != checksum:
                raise ValueError(f"the checksum of {name} is wrong")
            content += (source / PurePosixPath(name).name).read_bytes()
        entries = {name: Progress(**found) for name, found in told["entries"].items()}
        ranks = {name: entry.rank for name, entry in entries.items()}
        archive = tarfile.open(fileobj=io.BytesIO(content))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, tarfile.TarError) as error:
        raise QueueError(f"{source.name} is not a whole export ({error}): copy queue.json and every part that it names "
                         "once more") from error
    taken = []
    with locked(folder), archive:
        for name in entries:
            if name not in DATASETS or _rank(folder / name) >= ranks[name]:
                continue
            # nothing of the old beside the new; and last what says how far it is, lest a kill leave the rest behind
            files = (*SMALL, "evaluation.npz", *CHECKPOINTS, *RESULT)
            for file in reversed(files):
                (folder / name / file).unlink(missing_ok=True)
            for file in files:
                if f"{name}/{file}" in archive.getnames():
                    part = archive.extractfile(f"{name}/{file}").read()
                    write_whole(folder / name / file, lambda temporary: temporary.write_bytes(part))
            taken.append(name)
    return taken


def _rank(entry: Path) -> tuple[int, int]:
    try:
        return progress_of(entry).rank
    except QueueError:   # anything is further than what is damaged
        return -1, 0


def _needed(state: str) -> tuple[str, ...]:
    if state == "finished":
        return *SMALL, *RESULT
    return (*SMALL, *RESULT, "evaluation.npz") if state == "evaluation" else (*SMALL, *CHECKPOINTS)


def _without_optimisers(path: Path) -> bytes:
    state, stream = torch.load(path, map_location="cpu", weights_only=True), io.BytesIO()
    torch.save(state | {"optimisers": []}, stream)
    return stream.getvalue()


# ---------------------------------------------------------------- what ships

def publish(folder: Path, target: Path | None = None, names: Sequence[str] = DATASETS, *,
            force: bool = False) -> dict[str, str]:
    """Copy finished entries' weights and cards to `target` (default `data/weights`): what was done or why not, by name.

    Weights whose card tells of a higher PSNR of MAGE stay, unless by `force`. An entry that is damaged is told of, and
    the others are published all the same.
    """
    target, told = target or data_folder() / "weights", {}
    for name in names:
        source = folder / name / "weights.safetensors"
        there = target / f"{name}.json"
        try:
            if progress_of(folder / name).state != "finished":
                told[name] = "not finished"
                continue
            ours = _psnr(weights.load(source).card)   # whole, or an error
            if ours is None:
                raise ValueError("its card has no figures of MAGE: delete it, and the entry is made anew")
            theirs = _psnr(json.loads(there.read_text())) if there.exists() else None
        except (QueueError, ValueError) as error:
            told[name] = f"{DAMAGED}: {error}"
            continue
        if theirs is not None and theirs >= ours and not force:
            told[name] = f"left alone: {target.name} has {theirs:.2f} dB, the queue {ours:.2f} dB (--force replaces it)"
            continue
        for suffix in (".safetensors", ".json"):
            write_whole(target / f"{name}{suffix}",
                        lambda temporary: shutil.copyfile(source.with_suffix(suffix), temporary))
        told[name] = f"published: {ours:.2f} dB" + (f" in place of {theirs:.2f} dB" if theirs is not None else "")
    return told


def _psnr(card: dict) -> float | None:
    """What a card says that MAGE has, None where it was not measured; ValueError for what is no card."""
    try:
        return next((row["psnr_frames"] for row in card.get("results", []) if row["name"] == "MAGE"), None)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its card is none of ours ({error!r}): move it away") from error


# ---------------------------------------------------------------- the command line

def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mage_core.queue", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="stop at a checkpoint after this time")
    parser.add_argument("--folder", type=Path, help="the queue's folder (default: in data/cache)")
    parser.add_argument("--preset", default="auto", help="auto: gpu on a GPU, quick on a CPU")
    parser.add_argument("--datasets", default=",".join(DATASETS), help="these entries alone, in this order")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.FIELD=VALUE", dest="changes",
                        help="change a field of the preset, for every entry, e.g. mage.samples=100_000")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="afterwards, or alone with --minutes 0")
    parser.add_argument("--import", type=Path, metavar="FOLDER", dest="source", help="before anything else")
    parser.add_argument("--list", action="store_true", help="show how far each entry is, and stop")
    parser.add_argument("--publish", action="store_true", help="copy finished weights to data/weights, and stop")
    parser.add_argument("--force", action="store_true", help="publish over better weights, too")
    given = parser.parse_args(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("the queue is one process: several GPUs train with accelerate launch -m mage_core.training")
    for name in ("folder", "export", "source"):   # a shell leaves the ~ of --export=~/there
        if (place := getattr(given, name)) is None:
            continue
        try:
            place = expanded(place)
        except ValueError as error:
            parser.error(str(error))
        if place.exists() and not place.is_dir():
            parser.error(f"{place} is a file, and is to be a folder: name another")
        setattr(given, name, place)
    if math.isnan(given.minutes):
        parser.error("--minutes is nan: give a number of minutes")
    folder, names = given.folder or cache_folder() / "queue", given.datasets.split(",")
    if unknown := [name for name in names if name not in DATASETS]:
        parser.error(f"unknown entry {unknown[0]!r}: choose from {', '.join(DATASETS)}")
    if any(change.partition("=")[0] == "test_clips" for change in given.changes):
        parser.error("test_clips is not for the queue, which judges whole test splits: leave it out")
    works = given.minutes > 0 and not (given.list or given.publish)
    try:
        for name in names if works else ():
            changed(preset_for(given.preset, name), given.changes)
    except ValueError as error:   # what was asked for wrongly is told in a line
        parser.error(str(error))
    command = "python -m mage_core.queue " + " ".join(without_paths(sys.argv[1:] if arguments is None else arguments))
    try:
        if given.source:
            print(f"taken up: {', '.join(take_up(folder, given.source)) or 'nothing that is further than here'}")
        if given.publish:
            found = publish(folder, names=names, force=given.force)
            for name, told in found.items():
                print(f"{name}: {told}")
            return 1 if any(told.startswith(DAMAGED) for told in found.values()) else 0
        worked, failed = [], []
        if works:
            print(describe_machine(), flush=True)
            worked, failed = work(folder, given.preset, minutes=given.minutes, names=names, changes=given.changes,
                                  command=command, target=given.export)
        if given.export:
            if not worked:
                export(folder, given.export, names)
            for path in exported(given.export):
                print(f"exported {path.name}, {path.stat().st_size:,} bytes")
    except QueueError as error:
        print(error, file=sys.stderr)
        return 2
    print(listing(folder, names))
    return 1 if failed else 0


if __name__ == "__main__":
    relaunch_with_fast_allocator()
    sys.exit(main())
