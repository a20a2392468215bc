"""The README's results table, made from the cards of the weights that ship.

    python -m mage_core.report            # print it
    python -m mage_core.report --write    # put it into README.md, between its marks
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

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
    """Ours beside the paper's as Markdown, from the cards in `folder` (default `data/weights`); "–" where there is no card."""
    folder = folder or data_folder() / "weights"
    lines = ["| dataset | SSIM, paper | SSIM | PSNR of the VQ-VAE, paper | PSNR of the VQ-VAE | PSNR of MAGE, paper | "
             "PSNR of MAGE, frames / clips | first frame repeated | ceiling | motion accuracy |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    notes = []
    for name, (title, ssim, vqvae, mage) in PAPER.items():
        path = folder / f"{name}.json"
        card = json.loads(path.read_text()) if path.exists() else {}
        rows = {row["name"]: row for row in card.get("results", [])}
        cells = ["–"] * 6
        if rows:
            ours, ceiling = rows["MAGE"], rows["perfect predictor"]
            cells = [f"{ours['ssim']:.3f}", f"{rows['VQ-VAE reconstruction']['psnr_frames']:.2f}",
                     f"{ours['psnr_frames']:.2f} / {ours['psnr_clips']:.2f}",
                     f"{rows['first frame repeated']['psnr_frames']:.2f}", f"{ceiling['psnr_frames']:.2f}",
                     f"{ours['motion_accuracy']:.3f}"]
            minutes = sum(card["seconds"].values()) / 60
            notes.append(f"{title}: {ours['n']:,} test pairs, preset `{card['preset']}`, {minutes:.0f} minutes of training on "
                         f"{card['machine']}; chance level of motion accuracy {ours['chance']:.3f}.")
        lines.append(f"| {title} | {ssim:.2f} | {cells[0]} | {vqvae:.2f} | {cells[1]} | {mage:.2f} | " + " | ".join(cells[2:]) + " |")
    return "\n".join([*lines, "", *notes, ""])


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
        text = with_table(path.read_text(), results_table())
        write_whole(path, lambda temporary: temporary.write_text(text))
    else:
        print(results_table())


if __name__ == "__main__":
    main()
