"""The notebooks run from top to bottom, as stored, and what is stored is fit to be read."""

import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
assert NOTEBOOKS, "a parametrised test over no notebook would pass by testing nothing"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@each_notebook
def test_runs_without_error_and_leaves_its_sources_alone(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):  # what remains afterwards comes from this run
        cell.outputs, cell.execution_count = [], None
    # A reader's kernel, not this test process: one device, and matplotlib draws inline.
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    env |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute(env=env)  # raises CellExecutionError at the first cell that fails

    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    stored = nbformat.read(path, as_version=4)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in stored.cells]


def test_by_hand_only_the_last_code_cell_uses_the_package():
    notebook = nbformat.read(ROOT / "colabs" / "01_score_by_hand.ipynb", as_version=4)
    _, *cells = code_cells(notebook)  # without the installation
    uses = ["saflex_jax" in cell.source for cell in cells]
    assert uses == [False] * (len(uses) - 1) + [True]


@each_notebook
def test_begins_with_a_badge_and_an_installation_and_ends_with_where_next(path):
    notebook = nbformat.read(path, as_version=4)
    repository = re.search(
        r'^repository-code: "(.*)"$', (ROOT / "CITATION.cff").read_text(), re.MULTILINE
    )[1]
    colab = repository.replace("https://", "https://colab.research.google.com/", 1)
    colab = colab.replace("github.com/", "github/")
    assert notebook.cells[0].source.startswith("[![Open in Colab](")
    assert f"]({colab}/blob/main/colabs/{path.name})" in notebook.cells[0].source
    installed = re.search(r"%pip install --quiet (.*)", code_cells(notebook)[0].source)[1]
    own, *others = re.findall('"([^"]+)"', installed)
    assert own == f"saflex_jax @ git+{repository}"
    pins = (ROOT / "setup.py").read_text()
    assert [r for r in others if f'"{r}"' not in pins] == []
    assert "## Where next" in [c for c in notebook.cells if c.cell_type == "markdown"][-1].source


@each_notebook
def test_links_between_notebooks_lead_somewhere(path):
    texts = "".join(c.source for c in nbformat.read(path, as_version=4).cells)
    names = re.findall(r"\]\((\w+\.ipynb)\)", texts)
    names += re.findall(r"/(?:blob|raw)/main/([\w./-]+)", texts)
    assert names
    folders = ROOT / "colabs", ROOT
    assert [n for n in names if not any((folder / n).is_file() for folder in folders)] == []


def test_an_installation_leaves_the_notebook_host_s_packages_as_they_are():
    lines = (ROOT / ".ci" / "notebook.txt").read_text().splitlines()
    host = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    text = (ROOT / "setup.py").read_text()
    asked = [Requirement(r) for r in re.findall(r'^ +"([\w\[\]-]+>=[^"]+)"', text, re.MULTILINE)]
    of_host = [r for r in asked if r.name in host]
    assert {"jax", "flax", "numpy", "optax", "orbax-checkpoint"} <= {r.name for r in of_host}
    assert [str(r) for r in of_host if not r.specifier.contains(host[r.name])] == []


@each_notebook
def test_stored_outputs_are_complete_and_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)  # cell ids included
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text  # warnings end up here
        text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
        # A path of the machine that ran it, or the address of an object in its memory.
        assert not re.search(r"(^|[\s'\"(])(/\w+){2,}|[A-Z]:\\|site-packages|0x[0-9a-f]{6,}", text)
    assert path.stat().st_size < 1_000_000
