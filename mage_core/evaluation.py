"""Several generators on a whole split, batch by batch; an evaluation that was stopped goes on from what it kept."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from mage_core import metrics
from mage_core.files import write_whole
from mage_core.semantics import MotionAccuracy

KEEP_SECONDS = 20.0


def evaluate_all(generators: dict[str, metrics.FromBatch], dataset, split: str, n: int, *, seed: int = 0,
                 batch_size: int = 50, keep: Path | None = None, key: str = "", until: float | None = None,
                 progress: bool = True) -> list[metrics.Row] | None:
    """A row for each generator on the first n samples of a split, drawn with `seed`; None where `until`
    (time.monotonic()) came first.

    A batch's frames are drawn once for all generators. With `keep`, a file, what was judged is kept there every now and
    then, and taken up again by a call with the same `key` (what is judged), generators, dataset, split and seed. Raises
    ValueError as `metrics.evaluate`.
    """
    if n < 1 or batch_size < 1:
        raise ValueError(f"n is {n} and batch_size {batch_size}: both must be at least 1")
    captions = [] if dataset.endless else [dataset.caption(dataset.spec(split, index, seed)) for index in range(n)]
    key = json.dumps([key, list(generators), dataset.about, dataset.content, split, n, seed, *captions])
    rows = _kept(keep, key) if keep is not None else []
    done, saved = rows[0].n if rows else 0, time.monotonic()
    with tqdm(total=n, initial=done, desc=f"evaluation on {dataset.name}", unit="clip", disable=not progress) as bar:
        while done < n:
            if until is not None and time.monotonic() > until:
                _keep(keep, key, rows)
                return None
            batch = metrics.evaluation_batch(dataset, split, range(done, min(done + batch_size, n)), seed)
            found = [metrics.evaluate_batch(made, batch, name) for name, made in generators.items()]
            rows = [row + more for row, more in zip(rows, found)] if rows else found
            done += found[0].n
            bar.update(found[0].n)
            if time.monotonic() - saved > KEEP_SECONDS:
                _keep(keep, key, rows)
                saved = time.monotonic()
    _keep(keep, key, rows)
    return rows


def _keep(path: Path | None, key: str, rows: list[metrics.Row]) -> None:
    if path is None or not rows:
        return
    arrays, told = {}, []
    for number, row in enumerate(rows):
        told.append({"name": row.name, "dataset": row.dataset, "split": row.split, "seconds": row.seconds,
                     "motion": row.motion is not None})
        for part in ("scores", "motion"):
            if (values := getattr(row, part)) is not None:
                arrays |= {f"{number}.{part}.{field.name}": getattr(values, field.name)
                           for field in dataclasses.fields(values)}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as stream:   # numpy gives a name of its own to another ending than .npz
            np.savez_compressed(stream, key=json.dumps([key, told]), **arrays)

    write_whole(path, write)


def _kept(path: Path, key: str) -> list[metrics.Row]:
    """The rows of an evaluation that was stopped; none where there is no file, or a damaged one, or another's."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found, told = json.loads(str(file["key"]))
            if found != key:
                return []
            rows = []
            for number, row in enumerate(told):
                parts = {part: kind(**{field.name: file[f"{number}.{part}.{field.name}"]
                                       for field in dataclasses.fields(kind)})
                         for part, kind in (("scores", metrics.VideoScores), ("motion", MotionAccuracy))
                         if part == "scores" or row["motion"]}
                rows.append(metrics.Row(row["name"], row["dataset"], row["split"], parts["scores"], parts.get("motion"),
                                        row["seconds"]))
            return rows
    except Exception:   # no file; foreign bytes fail in as many ways as there are bytes
        return []
