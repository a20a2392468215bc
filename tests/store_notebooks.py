"""Runs notebooks from top to bottom and stores their outputs, with nothing in them that is this machine's own.

    python tests/store_notebooks.py                                # all of notebooks/
    python tests/store_notebooks.py notebooks/02_vqvae.ipynb       # some

What is stored is the default run (`MAGE_PRESET` decides as everywhere): the shipped weights where there are any. The
opening picture of each notebook becomes the one that its cell tagged `result` made. A notebook that fails, or whose
outputs hold a path of this machine, stays as it was.
"""

import base64
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from mage_core.files import write_whole

REPOSITORY = Path(__file__).resolve().parent.parent
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}
WIDGET = "application/vnd.jupyter.widget-view+json"   # progress bars and panels: empty boxes without their kernel
PICTURES = ("image/gif", "image/png")
MACHINE = re.compile("|".join(map(re.escape, {str(REPOSITORY), str(Path.home()), sys.prefix, tempfile.gettempdir()})))


def store(path: Path) -> None:
    """Run the notebook at `path` and write it back; ValueError for outputs that hold a path of this machine."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False, store_widget_state=False,
                   resources={"metadata": {"path": path.parent}}).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
            found = MACHINE.search(text_of(cell.outputs))
            if found:
                raise ValueError(f"{path.name}, cell {cell.id}: its output holds {found[0]!r}; print names, not places")
    attach(notebook)
    nbformat.validate(notebook)
    write_whole(path, lambda temporary: nbformat.write(notebook, temporary))


def text_of(outputs) -> str:
    """All text of a cell's outputs; pictures left out."""
    data = [value for output in outputs for kind, value in output.get("data", {}).items() if kind not in PICTURES]
    return "\n".join([*map(str, data), *(output.get("text", "") for output in outputs)])


def attach(notebook) -> None:
    """Put the picture of the cell tagged `result` into the opening cell, which shows it as attachment:result.*"""
    (cell,) = (cell for cell in notebook.cells if "result" in cell.metadata.get("tags", []))
    kind, picture = next((kind, output.data[kind]) for output in cell.outputs for kind in PICTURES
                         if kind in output.get("data", {}))
    base64.b64decode(picture)
    name = f"result.{kind.removeprefix('image/')}"
    if f"(attachment:{name})" not in notebook.cells[0].source:
        raise ValueError(f"the opening cell does not show attachment:{name}, the picture of the cell tagged result")
    notebook.cells[0].attachments = {name: {kind: picture.replace("\n", "")}}


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
        store(Path(name).resolve())
        print("stored", Path(name).name, flush=True)
