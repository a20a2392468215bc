"""The README's results table, made from the cards of the weights that ship.

    python -m mage_core.report            # print it
    python -m mage_core.report --write    # put it into README.md, between its marks
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

from mage_core.clips import load_dataset
from mage_core.files import data_folder, write_whole

# Table 2 of the paper's supplement: SSIM, PSNR of the VQ-VAE, PSNR of MAGE.
PAPER = {
    "single-mnist": ("Single Moving MNIST", 0.97, 43.12, 33.89),
    "double-mnist": ("Double Moving MNIST", 0.87, 38.80, 24.66),
    "modified-mnist": ("Modified Double Moving MNIST", 0.85, 37.63, 23.24),
    "cater-gen-v1": ("CATER-GEN-v1", 0.97, 47.01, 35.03),
    "cater-gen-v2": ("CATER-GEN-v2", 0.95, 40.21, 32.74),
}
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def results_table(folder: Path | None = None) -> str:
    """Ours beside the paper's as Markdown, from the cards in `folder` (default `data/weights`).

    A "–" stands where nothing was measured; the notes below say which datasets have no weights, and for the others on
    what machine and in how long they were trained, and on how many test pairs the figures stand. ValueError, naming the
    file, for what is no card.
    """
    folder = Path(folder or data_folder() / "weights")
    lines = ["| dataset | SSIM, paper | SSIM | PSNR of the VQ-VAE, paper | PSNR of the VQ-VAE | PSNR of MAGE, paper | "
             "PSNR of MAGE, frames / clips | first frame repeated | ceiling, frames / clips | "
             "motion accuracy / ceiling |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    notes = []
    for name, (title, ssim, vqvae, mage) in PAPER.items():
        path = folder / f"{name}.json"
        try:
            card = {"dataset": name} | json.loads(path.read_text()) if path.exists() else {}
            cells, note = _cells_and_note(title, card, load_dataset(name).sizes["train"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a card of measured weights ({error!r}): take it from the repository "
                             "again, or train again") from error
        notes.append(note)
        lines.append(f"| {title} | {ssim:.2f} | {cells[0]} | {vqvae:.2f} | {cells[1]} | {mage:.2f} | "
                     + " | ".join(cells[2:]) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def _cells_and_note(title: str, card: dict, papers: int) -> tuple[list[str], str]:
    """What a card adds to its dataset's line of the table, and the note below."""
    rows = {row["name"]: row for row in card.get("results", [])}
    if not rows:
        return ["–"] * 6, f"{title}: no weights yet."
    ours, still, ceiling = rows["MAGE"], rows["first frame repeated"], rows.get("perfect predictor")
    return [f"{ours['ssim']:.3f}", f"{rows['VQ-VAE reconstruction']['psnr_frames']:.2f}", _psnr(ours),
            f"{still['psnr_frames']:.2f}", _psnr(ceiling),
            f"{_motion(ours)} / {_motion(ceiling)}"], _note(title, card, ours, papers)


def _psnr(row: dict | None) -> str:
    return "–" if row is None else f"{row['psnr_frames']:.2f} / {row['psnr_clips']:.2f}"


def _motion(row: dict | None) -> str:
    return f"{(row or {}).get('motion_accuracy', math.nan):.3f}".replace("nan", "–")


def _note(title: str, card: dict, ours: dict, papers: int) -> str:
    """How weights were made, on how many pairs where they are more than the paper's, and what their figures stand on.
    """
    runs = [card]
    while runs[-1].get("start"):
        runs.append(runs[-1]["start"])
    firsts = [run["first_stage"] for run in runs if "first_stage" in run]   # VQ-VAEs that were taken as they were
    spent = [sum(run["seconds"].values()) / 60 for run in runs]
    gpus = [_gpu(run.get("machine", "")) for run in runs]
    made = f"commit {card['commit']}, " if card.get("commit") else ""
    note = f"{title}: {ours['n']:,} test pairs; preset `{card['preset']}`, {made}{sum(spent):.0f} minutes of training"
    if len(runs) > 1:
        note += f" in {len(runs)} runs, each on the weights of the one before, the last {spent[0]:.0f}"
    note += f" on {gpus[0] or _cores(card['machine'])}"
    if not gpus[0] and any(gpus):
        on_gpu = sum(minutes for minutes, gpu in zip(spent, gpus) if gpu)
        note += f", {on_gpu:.0f} of the others on {next(filter(None, gpus))}"
    seen: set[int] = set()
    for run in runs + [run["beside"] for run in runs if "beside" in run]:   # whose weights are in the mean, too
        if run.get("dataset") in (None, card["dataset"]):
            seen.update(_pairs(run, papers))
    if len(seen) > papers:
        note += f", on {len(seen):,} training pairs (the paper has {papers:,})"
    for first in firsts:
        note += f", with the VQ-VAE of earlier weights ({first['dataset']}"
        took = first.get("seconds", {}).get("vqvae")
        note += f", {took / 60:.1f} minutes more)" if took else ")"
    if "remark" in card:
        note += f", {card['remark']}"
    if "speed" in card:
        note += f", {card['speed']['samples_per_second']:,.0f} samples/s, {card['speed']['share']:.1%} of its bf16 rate"
    if "motion_accuracy" in ours:
        low, high = ours["motion_accuracy_interval"]
        note += f". Motion accuracy {low:.3f} to {high:.3f} (95 %), chance level {ours['chance']:.3f}"
    return note + "."


def _pairs(run: dict, papers: int) -> range:
    """Which training pairs a run was on; of older cards the command tells it, or else they are the paper's."""
    said = re.findall(r"--set (first_pair|pairs)=([\d_]+)", run.get("command", ""))
    told = {name: int(value) for name, value in said}
    first = run.get("first_pair", told.get("first_pair", 0))
    return range(first, run.get("pairs", first + told["pairs"] if "pairs" in told else papers))


def _gpu(machine: str) -> str:
    """The GPU that a card's line about its machine names: "GPU NVIDIA H200"; empty where it names none."""
    found = re.search(r"GPU [A-Z][^;]*", machine)
    return found[0] if found else ""


def _cores(machine: str) -> str:
    """What such a line says of the processor, up to the number of cores."""
    line = machine.removeprefix("machine: ")
    found = re.match(r".*?\bcores?\b", line)
    return f"{found[0]}, no GPU" if found and "no GPU" in line else line


def with_table(readme: str, table: str) -> str:
    """A README with the table between its marks; ValueError where a mark is missing."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN} ... {END}: put both marks where the table belongs")
    return f"{before}{BEGIN}\n{table}{END}{after}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mage_core.report", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    given = parser.parse_args(arguments)
    if given.write:
        path = data_folder().parent / "README.md"
        text = with_table(path.read_text(encoding="utf-8"), results_table())
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))
    else:
        print(results_table())


if __name__ == "__main__":
    main()
