"""How the notebooks are built and what they store; that they run and come out the same is `pytest --nbval`'s to say."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LONGEST_FUNCTION, LONGEST_CELL = 10, 20   # lines
PICTURES = {"image/gif", "image/png"}
IGNORED = "nbval-ignore-output"


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def outputs(notebook):
    return [(cell, output) for cell in code_cells(notebook) for output in cell.outputs]


def definitions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]


def test_the_five_are_there():
    assert [path.stem for path in NOTEBOOKS][:5] == [
        "01_datasets", "02_vqvae", "03_motion_anchor", "04_train_mage", "05_deterministic"]


def test_opens_with_its_own_result_and_then_the_parameters(notebook):
    opening, second = notebook.cells[:2]
    assert opening.cell_type == "markdown" and opening.source.startswith("# ")
    (made,) = (cell for cell in code_cells(notebook) if "result" in tags(cell))
    (name, picture), = opening.attachments.items()
    assert f"(attachment:{name})" in opening.source
    (kind, data), = picture.items()
    assert kind in PICTURES
    kept = [output.data[kind] for output in made.outputs if kind in output.get("data", {})]
    assert data.replace("\n", "") in [each.replace("\n", "") for each in kept], "not the picture that the cell made"
    assert second.cell_type == "code" and "parameters" in tags(second)


def test_parameters(notebook):
    (cell,) = (cell for cell in notebook.cells if "parameters" in tags(cell))
    found = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    expected = {"dataset": "single-mnist", "preset": "auto", "seed": 0}
    if "training.ready(" in "".join(other.source for other in code_cells(notebook)):
        expected["weights"] = "shipped"
    assert found == expected


def test_ran_from_top_to_bottom_without_errors(notebook):
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    for cell, output in outputs(notebook):
        assert output.output_type != "error", cell.source
        assert output.get("name") != "stderr", f"a warning or a bare progress bar is stored: {output.text}"
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), (
            "an empty box without its kernel")


def test_shows_pictures_and_compares_none(notebook):
    shown = [cell for cell, output in outputs(notebook) if PICTURES & set(output.get("data", {}))]
    assert shown
    assert all(IGNORED in tags(cell) for cell in shown), "pictures differ between versions of the libraries"


def test_cells_and_functions_are_short_and_documented_by_prose(notebook):
    for cell in notebook.cells[1:]:
        if cell.cell_type == "markdown":
            continue
        assert len(cell.source.splitlines()) <= LONGEST_CELL, cell.source
        for node in definitions(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef), f"{node.name}: a class belongs into mage_core"
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{node.name} belongs into mage_core"
    headings = [cell for cell in notebook.cells if cell.cell_type == "markdown" and cell.source.startswith("## ")]
    assert len(headings) >= 4


def test_imports_and_never_defines_anew(notebook):
    rooms = (FOLDER.parent / "mage_core").rglob("*.py")
    theirs = {node.name for path in rooms for node in ast.parse(path.read_text()).body
              if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for cell in code_cells(notebook):
        tree = ast.parse(cell.source)
        anew = theirs & {node.name for node in definitions(tree)}
        assert not anew, f"defined in mage_core already: {sorted(anew)}"
        starred = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
        assert not starred and "!pip" not in cell.source


def test_claims_are_asserted(notebook):
    asserts = [node for cell in code_cells(notebook) for node in ast.walk(ast.parse(cell.source))
               if isinstance(node, ast.Assert)]
    assert len(asserts) >= 5
    for node in asserts:
        names = [part for part in ast.walk(node.test) if isinstance(part, ast.Name)]
        assert names, f"this cannot fail: {ast.unparse(node)}"


def test_nothing_of_a_machine_is_stored(notebook):
    folders = re.compile(r"(?<![\w.:/<-])/(?:home|Users|root|work|tmp|opt|mnt|scratch|var|usr|private)/[\w.]")
    for _, output in outputs(notebook):
        data = {kind: value for kind, value in output.get("data", {}).items() if kind not in PICTURES}
        text = output.get("text", "") + str(data)
        assert not folders.search(text), text
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)


def test_links_lead_to_what_is_there(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#\s]+)", cell.source):
                if not target.startswith(("http", "attachment:")):
                    assert (FOLDER / target).exists(), target
