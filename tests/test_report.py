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
                "motion_accuracy_interval": [0.861, 0.89], "chance": 0.3, "n": 2000}
    rows = [row("MAGE", 21.5), row("first frame repeated", 16.2), row("VQ-VAE reconstruction", 38.4),
            row("perfect predictor", 48.6)]
    card = {"results": rows, "seconds": {"vqvae": 300, "mage": 900}, "preset": "quick", "machine": "machine: two cores",
            "commit": "0123abc", "pairs": 10_000}
    (tmp_path / "single-mnist.json").write_text(json.dumps(card))
    table = report.results_table(tmp_path)
    single, double = (line for line in table.splitlines() if line.startswith(("| Single", "| Double")))
    assert single.split(" | ")[1:] == ["0.97", "0.912", "43.12", "38.40", "33.89", "21.50 / 20.50", "16.20",
                                       "48.60 / 47.60",
                                       "0.876 / 0.876 |"]
    assert double.count("–") == 6
    note = next(line for line in table.splitlines() if line.startswith("- Single"))
    assert "20 minutes of training on two cores" in note and "2,000 test pairs" in note and "commit 0123abc" in note
    assert "0.861 to 0.890" in note and "samples/s" not in note and "training pairs" not in note
    (tmp_path / "single-mnist.json").write_text(json.dumps(card | {"pairs": 10_001}))
    assert "on 10,001 training pairs (the paper has 10,000)" in report.results_table(tmp_path)
    before = {"dataset": "single-mnist", "seconds": {"mage": 600}, "pairs": 12_000}   # the run that it went on from
    (tmp_path / "single-mnist.json").write_text(json.dumps(card | {"start": {**before, "pairs": 9, "start": before}}))
    table_of_three = report.results_table(tmp_path)
    assert ("40 minutes of training in 3 runs, each on the weights of the one before, the last 20 on two cores, on "
            "12,000 training pairs") in table_of_three
    told = {"command": "train --set pairs=3_000 --set first_pair=20000", "dataset": "single-mnist"}
    for start, pairs in ((before | {"dataset": "double-mnist"}, None), (before | {"first_pair": 10_500}, "11,500"),
                         (before | {"first_pair": 8_000}, "12,000"), ({**before, **told, "pairs": 23_000}, "13,000"),
                         ({"seconds": {}, **told}, "13,000"), ({"seconds": {}, "dataset": "single-mnist"}, None)):
        (tmp_path / "single-mnist.json").write_text(json.dumps(card | {"dataset": "single-mnist", "start": start}))
        table_of_two = report.results_table(tmp_path)
        assert f"on {pairs} training pairs" in table_of_two if pairs else "training pairs" not in table_of_two, start
    beside = {"dataset": "single-mnist", "seconds": {"mage": 60}, "pairs": 14_000, "first_pair": 13_000}
    for soup in ({"start": before, "beside": beside}, {"start": {**before, "beside": beside}}):   # now, or before
        (tmp_path / "single-mnist.json").write_text(json.dumps(card | {"dataset": "single-mnist"} | soup))
        assert "on 13,000 training pairs" in report.results_table(tmp_path)
    earlier = {**before, "first_stage": {"dataset": "double-mnist", "seconds": {"vqvae": 90, "mage": 700}}}
    (tmp_path / "single-mnist.json").write_text(json.dumps(card | {"start": earlier}))
    assert "with the VQ-VAE of earlier weights (double-mnist, 1.5 minutes more)" in report.results_table(tmp_path)
    on_gpu = {**before, "machine": "machine: Xeon, 16 cores, 12 torch threads; bf16 by AMX; GPU NVIDIA H200; Python 3"}
    cpu = "machine: AMD EPYC, 1 core, 1 torch thread; no fast bf16; no GPU; Python 3.11"
    card_of_three = card | {"machine": cpu, "start": {**before, "start": on_gpu}}
    (tmp_path / "single-mnist.json").write_text(json.dumps(card_of_three))
    assert ("the last 20 on AMD EPYC, 1 core, no GPU, 10 of the others on GPU NVIDIA H200"
            in report.results_table(tmp_path))
    (tmp_path / "single-mnist.json").write_text(json.dumps(card | {"machine": on_gpu["machine"]}))
    assert "20 minutes of training on GPU NVIDIA H200. Motion" in report.results_table(tmp_path)
    assert (table.count("no weights yet") == 4
            and len([line for line in table.splitlines() if line.startswith("| ")]) == 6)


def test_a_card_without_a_ceiling_or_motion_accuracy_and_from_a_gpu(tmp_path):
    rows = [{"name": name, "ssim": 0.9, "psnr_frames": 30.0, "psnr_clips": 29.0, "n": 1500}
            for name in ("MAGE", "first frame repeated", "VQ-VAE reconstruction")]
    card = {"results": rows, "seconds": {"vqvae": 60, "mage": 60}, "preset": "gpu", "machine": "one GPU",
            "first_stage": {"dataset": "cater-gen-v2"}, "remark": "beside another",
            "speed": {"samples_per_second": 4012.3, "share": 0.251}}
    (tmp_path / "cater-gen-v1.json").write_text(json.dumps(card))
    line = next(line for line in report.results_table(tmp_path).splitlines() if line.startswith("| CATER-GEN-v1"))
    assert line.endswith("| 35.03 | 30.00 / 29.00 | 30.00 | – | – / – |")
    assert ("on one GPU, with the VQ-VAE of earlier weights (cater-gen-v2), beside another, 4,012 samples/s, 25.1% of "
            "its bf16 rate") in report.results_table(tmp_path)


@pytest.mark.parametrize("card", ["{", "[]", "null", '{"results": [{"name": "MAGE"}]}', '{"results": null}'])
def test_what_is_no_card_is_named(tmp_path, card):
    (tmp_path / "double-mnist.json").write_text(card)
    with pytest.raises(ValueError, match=r"double-mnist\.json is not a card of measured weights"):
        report.results_table(str(tmp_path))


def test_a_readme_without_marks_says_so():
    with pytest.raises(ValueError, match="results: begin"):
        report.with_table("# nothing\n", "table\n")
