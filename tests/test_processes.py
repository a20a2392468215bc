"""Two processes on a CPU, joined by Accelerate, train what one trains alone."""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch.distributed.run import parse_args

from mage_core import training
from mage_core.clips import load_dataset
from mage_core.presets import PRESETS, changed
from mage_core.processes import ALONE, Alone, processes

# Exact arithmetic as far as there is: fp32, no dropout, AdamW alone (Muon rounds to bf16).
PROGRAM = """
import sys
from pathlib import Path
import torch
from mage_core import batches, training
from mage_core.clips import load_dataset
from mage_core.presets import PRESETS, changed
from mage_core.processes import processes

for module in (training, batches):
    module.autocast = lambda device: torch.autocast("cpu", enabled=False)
chosen = changed(PRESETS["smoke"], [
    "pairs=6", "watch_clips=1", "vqvae.images=48", "vqvae.codebook_size=16", "mage.samples=24", "mage.width=32",
    "mage.muon=0.0", "mage.own_frames=0.9", *sys.argv[2:]])
team, made, train_mage = processes("cpu"), [], training.train_mage
training.train_mage = lambda chosen, dataset, vqvae, *a, **k: made.append(vqvae) or train_mage(chosen, dataset, vqvae,
                                                                                              *a, **k)
trained = training.train(load_dataset("single-mnist"), chosen, folder=Path(sys.argv[1]), device="cpu", progress=False,
                         team=team)
said = f"{team.index} {team.count} {training.fingerprint(trained.mage)} {training.token_key(made[0])}"
(Path(sys.argv[1]) / f"said-{team.index}").write_text(said)
"""


@pytest.fixture(scope="module", params=["patch", "released"])
def runs(request, repository, tmp_path_factory):
    """The same training by one process and by two, with and without batch normalisation: their folders, and what each
    process said."""
    options = ["vqvae.shape=released", "mage.advection=0", "mage.more_anchors=0", "mage.trust=1.0"]
    options = options if request.param == "released" else []
    top = tmp_path_factory.mktemp("processes")
    program = top / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1",
                   "MAGE_CACHE": str(top / "cache")}
    # what `accelerate launch` runs for several GPUs; on a CPU it would want MPI
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = {}
    for name, words in (("one", []), ("two", launch)):
        (top / name).mkdir()
        ended = subprocess.run([sys.executable, *words, str(program), str(top / name), *options], cwd=repository,
                               env=environment, capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0, ended.stderr[-3000:]
        found[name] = top / name, [path.read_text() for path in sorted((top / name).glob("said-*"))]
    return found


def state(runs, name, stage):
    return torch.load(runs[name][0] / f"{stage}.pt", weights_only=True)


def test_two_processes_ran_and_hold_the_same_weights(runs):
    (alone,), (first, second) = runs["one"][1], runs["two"][1]
    assert alone.startswith("0 1 ") and first.startswith("0 2 ") and second.startswith("1 2 ")
    assert first.split()[2:] == second.split()[2:], "and the same tokens"
    cards = [json.loads((folder / "weights.json").read_text()) for folder, _ in runs.values()]
    assert [card["processes"] for card in cards] == [1, 2]
    assert [len(card["curves"]["mage"]) for card in cards][0] == len(cards[1]["curves"]["mage"])


@pytest.mark.parametrize("stage, steps", [("vqvae", 3), ("mage", 6)])
def test_two_processes_have_the_losses_gradients_and_weights_of_one(runs, stage, steps):
    one, two = (state(runs, name, stage) for name in ("one", "two"))
    assert one["step"] == two["step"] == steps
    torch.testing.assert_close(torch.tensor(two["recent"]), torch.tensor(one["recent"]), rtol=1e-5, atol=1e-5)
    # The mean gradient is linear in the gradients of all steps. A weight is not: Adam divides by the gradient's size,
    # and where the true gradient is nought (a key's bias) by that of rounding errors.
    compared = 0
    for number, entry in one["optimisers"][0]["state"].items():
        mean, other = entry["exp_avg"], two["optimisers"][0]["state"][number]["exp_avg"]
        torch.testing.assert_close(other, mean, rtol=1e-3, atol=1e-5 * max(1.0, mean.abs().max().item()))
        solid = mean.abs() > 1e-3 * mean.abs().max()
        compared += int(solid.sum()) if mean.abs().max() > 1e-4 else 0
    assert compared > 1_000
    if stage == "vqvae":
        for part, name in (("codebook", "0.count"), ("codebook", "0.total"), ("vqvae", "codebook")):
            torch.testing.assert_close(two["parts"][part][name], one["parts"][part][name], rtol=1e-4, atol=1e-4)


def test_a_batch_is_shared_evenly_or_not_at_all(monkeypatch):
    class Third(Alone):
        index, count = 2, 3

    assert Third().part(12) == slice(8, 12) and ALONE.part(7) == slice(0, 7)
    with pytest.raises(ValueError, match="batch of 8 .* by 3 processes.*multiple of 3"):
        Third().part(8)
    assert not Third().main and ALONE.main
    world = load_dataset("single-mnist")
    for change, refused in (("vqvae.batch=9", False), ("vqvae.batch=8", True), ("mage.batch=4", True),
                            ("mage.more_anchors=4", True)):
        chosen = changed(PRESETS["smoke"], ["vqvae.batch=9", "mage.batch=6", "mage.more_anchors=6", change])
        with pytest.raises(ValueError, match="by 3 processes") if refused else nullcontext():   # before any work
            training.check(world, chosen, team=Third())
        training.check(world, chosen)
    whole = changed(PRESETS["smoke"], ["vqvae.shape=released", "vqvae.batch=8", "mage.batch=6", "mage.advection=0"])
    training.check(world, whole, team=Third())   # whose normalisation sees whole batches in every process
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes() is ALONE


def test_one_process_shares_with_nobody():
    row = torch.ones(2)
    ALONE.average([row])
    ALONE.copy([row])
    ALONE.wait()
    assert torch.equal(row, torch.ones(2)) and ALONE.gather(row) is row and ALONE.any(True) and not ALONE.any(False)


def test_torchrun_leaves_every_option_of_ours_to_training_as_the_readme_calls_it(repository):
    """Without the `--` it takes `--run` for its own `--run-path`, and `--start` for `--start-method`."""
    (told,) = re.findall(r"`torchrun (.*) \.\.\.`", (repository / "README.md").read_text())
    ours = [word for option in ("--run", "--start", "--seed", "--set", "--minutes") for word in (option, "1")]
    args = parse_args([*told.split(), *ours])
    assert args.nproc_per_node == "2" and args.module
    assert args.training_script == "mage_core.training" and args.training_script_args == ours
