"""The repository's address stands in one place, and the command fills it in everywhere."""

import importlib.machinery
import importlib.util
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = {
    "CITATION.cff": 'title: x\nrepository-code: "https://github.com/OWNER/saflex_jax"\n',
    "a.ipynb": "https://colab.research.google.com/github/OWNER/saflex_jax/blob/main/a.ipynb",
    "setup.py": "git+https://github.com/OWNER/saflex_jax, https://github.com/else/where\n",
    "docs/page.md": "https://github.com/OWNER/saflex_jax/raw/main/x https://github.com/OWNER/saflex\n",
    "image.png": "\0https://github.com/OWNER/saflex_jax",
}


@pytest.fixture(scope="module")
def address():
    loader = importlib.machinery.SourceFileLoader("address", str(ROOT / ".ci" / "address"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("address", loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    return tmp_path


def texts(tree):
    return {name: (tree / name).read_text() for name in FILES}


def test_all_places_of_the_repository_agree(address):
    own = address.repository(ROOT)
    found = {
        path.relative_to(ROOT).as_posix(): set(address.mentioned(text, own.split("/")[1]))
        for path, text in address.texts(ROOT).items()
    }
    found = {name: places for name, places in found.items() if places}
    assert {name: places for name, places in found.items() if places != {own}} == {}
    notebooks = {f"colabs/{path.name}" for path in (ROOT / "colabs").glob("*.ipynb")}
    assert notebooks | {"CITATION.cff", "setup.py"} <= set(found)


def test_it_is_written_everywhere_and_only_there_and_once(address, tree, capsys):
    assert address.main(tree, ["https://github.com/me/other-name.git"]) == 0
    moved = texts(tree)
    assert address.repository(tree) == "me/other-name"
    assert moved["a.ipynb"] == FILES["a.ipynb"].replace("OWNER/saflex_jax", "me/other-name")
    assert (
        "git+https://github.com/me/other-name, https://github.com/else/where" in moved["setup.py"]
    )
    assert moved["docs/page.md"].endswith("https://github.com/OWNER/saflex\n")
    assert moved["image.png"] == FILES["image.png"]
    assert address.main(tree, ["https://github.com/me/other-name"]) == 0
    assert texts(tree) == moved
    assert address.main(tree, ["https://github.com/OWNER/saflex_jax"]) == 0
    assert texts(tree) == FILES
    capsys.readouterr()


def test_a_place_that_disagrees_is_an_error(address, tree, capsys):
    (tree / "docs/page.md").write_text("https://github.com/old/saflex_jax\n")
    assert address.main(tree, []) == 1
    assert "WRONG: old/saflex_jax" in capsys.readouterr().out


@pytest.mark.parametrize("given", ["me/saflex_jax", "https://example.org/me/x", ""])
def test_what_is_no_address_changes_nothing(address, tree, given):
    with pytest.raises(ValueError, match=r"must be https://github.com/OWNER/NAME; given"):
        address.main(tree, [given])
    assert texts(tree) == FILES
