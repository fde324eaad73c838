"""Links inside of the repository lead somewhere: files, and headings of Markdown files."""

import json
import pathlib
import re
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LINK = re.compile(r"(?<!`)\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)|<img[^>]* src=\"([^\"]+)\"")
ELSEWHERE = ("http:", "https:", "mailto:", "data:", "attachment:")


def pages() -> list[str]:
    """Markdown files and notebooks of the repository, without what git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run([*command, "*.md", "*.ipynb"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:  # no clone
        return [str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")]
    return sorted(name for name in set(found.stdout.split()) if (ROOT / name).exists())


def prose(path: pathlib.Path) -> str:
    """The text of a page without its code blocks."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.sub(r"^(`{3,}).*?^\1`*$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: pathlib.Path) -> set[str]:
    """Of the headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#{1,6} (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", pages())
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in (a or b for a, b in LINK.findall(prose(page))):
        if target.startswith(ELSEWHERE):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{name}: {target}"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{name}: {target}"


def test_a_dead_link_is_found(tmp_path, monkeypatch):
    (tmp_path / "a.md").write_text("# One\n[x](b.md#two) ![y](c.png)\n```\n[no](link)\n```\n")
    (tmp_path / "b.md").write_text("# Two of them\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"a\.md: b\.md#two"):
        test_links_lead_somewhere("a.md")
    (tmp_path / "b.md").write_text("# Two\n")
    with pytest.raises(AssertionError, match=r"a\.md: c\.png"):
        test_links_lead_somewhere("a.md")
