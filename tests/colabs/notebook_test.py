"""The notebooks run from top to bottom, as stored, and what is stored is fit to be read."""

import os
import pathlib
import re

import nbformat
import pytest
from nbclient import NotebookClient

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


@each_notebook
def test_only_the_last_code_cell_uses_the_package(path):
    uses = ["saflex_jax" in c.source for c in code_cells(nbformat.read(path, as_version=4))]
    assert uses == [False] * (len(uses) - 1) + [True]


@each_notebook
def test_installs_what_the_package_asks_for(path):
    text = "\n".join(c.source for c in code_cells(nbformat.read(path, as_version=4)))
    requirements = re.findall(r'"([\w-]+>=[^"]+)"', re.search(r"%pip install .*", text)[0])
    assert requirements
    pins = (ROOT / "setup.py").read_text()
    assert [r for r in requirements if f'"{r}"' not in pins] == []


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
    assert path.stat().st_size < 600_000
