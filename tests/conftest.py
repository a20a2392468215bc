"""Fixtures of the unit tests; what they share with the notebooks is in the conftest.py above."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A shared machine can stall for seconds: no example fails for being slow. In CI the examples are always the same.
settings.register_profile("house", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Every test starts from the same state of torch's generator, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's top folder."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def reference(repository) -> Path:
    """The folder of reference outputs, `$MAGE_REFERENCE_DIR` or `../shared`; skips where there is none."""
    folder = Path(os.environ.get("MAGE_REFERENCE_DIR", repository.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"the outputs of the released code are not in {folder} ($MAGE_REFERENCE_DIR)")
    return folder
