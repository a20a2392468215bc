"""The README's table is what the cards say."""

import json
from pathlib import Path

import pytest

from mage_core import report

README = Path(__file__).parent.parent / "README.md"


def test_readme_holds_the_table_of_the_cards_that_ship():
    text = README.read_text()
    assert report.with_table(text, report.results_table()) == text, "run: python -m mage_core.report --write"


def test_table_takes_its_numbers_from_the_cards(tmp_path):
    def row(name, psnr):
        return {"name": name, "ssim": 0.912, "psnr_frames": psnr, "psnr_clips": psnr - 1, "motion_accuracy": 0.876,
                "chance": 0.3, "n": 2000}
    rows = [row("MAGE", 21.5), row("first frame repeated", 16.2), row("VQ-VAE reconstruction", 38.4),
            row("perfect predictor", 48.6)]
    card = {"results": rows, "seconds": {"vqvae": 300, "mage": 900}, "preset": "quick", "machine": "two cores"}
    (tmp_path / "single-mnist.json").write_text(json.dumps(card))
    table = report.results_table(tmp_path)
    single, double = (line for line in table.splitlines() if line.startswith(("| Single", "| Double")))
    assert single.split(" | ")[1:] == ["0.97", "0.912", "43.12", "38.40", "33.89", "21.50 / 20.50", "16.20", "48.60",
                                       "0.876 |"]
    assert double.count("–") == 6
    assert "20 minutes" in table and "2,000 test pairs" in table


def test_a_readme_without_marks_says_so():
    with pytest.raises(ValueError, match="results: begin"):
        report.with_table("# nothing\n", "table\n")
