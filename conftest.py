"""What every test run has in common, the notebooks' (`pytest --nbval`) included: small, apart, and repeatable.

It stands at the top so that it also holds where only a notebook is named. The notebooks' kernels inherit it.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

# The preset is set, not proposed: MAGE_PRESET=paper in somebody's shell would make a test run last for days.
os.environ["MAGE_PRESET"] = "smoke"
# Tests never read or fill the user's own cache.
os.environ["MAGE_CACHE"] = tempfile.mkdtemp(prefix="mage-tests-")
# One thread adds up in one order: results repeat between machines with other numbers of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

atexit.register(shutil.rmtree, os.environ["MAGE_CACHE"], ignore_errors=True)


def pytest_configure(config):
    """Compare notebooks by `tests/notebook_outputs.cfg`, from whatever folder pytest was started."""
    if not getattr(config.option, "nbval_sanitize_with", None):
        config.option.nbval_sanitize_with = str(Path(__file__).parent / "tests" / "notebook_outputs.cfg")
