"""The package's docstrings as reStructuredText, which autodoc reads.

They are Google's style with three habits: an indented block is an equation, text in single
backticks is code, and one entry may explain several names. What is a public name of the package
becomes a link.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import public_names

from experiments import fields

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$")
ENTRY = re.compile(r"^  (\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*)$")
SEEN = re.compile(r"^  (\w+): (see `[\w.]+`)\.?$")
PATHS = {id(value): path for path, value in public_names.names().items()}


def as_rest(lines: list[str], module: str) -> list[str]:
    """A docstring for napoleon.

    Args:
      lines: of the docstring, without its indentation.
      module: where it stands; names in backticks are looked up there first.
    """
    followed = (_followed(line, module) for line in _one_name_each(lines))
    return _inline("\n".join(_blocks(followed)), module).split("\n")


def _one_name_each(lines: list[str]) -> Iterator[str]:
    """Entries of several names as one entry a name."""
    place = 0
    while place < len(lines):
        end = place + 1
        if shared := ENTRY.match(lines[place]):
            while end < len(lines) and lines[end].startswith("    "):
                end += 1
            for name in shared[1].split(", "):
                yield f"  {name}: {shared[2]}"
                yield from lines[place + 1 : end]
        else:
            yield lines[place].replace("Attributes:", "Args:")
        place = end


def _followed(line: str, module: str) -> str:
    """An entry "name: see `OTHER`." with what the other says of it; as it is where it is a type."""
    if not (entry := SEEN.match(line)):
        return line
    try:
        return f"  {entry[1]}: {fields.followed(entry[1], entry[2], module)}."
    except ValueError:
        return line


def _blocks(lines: Iterator[str]) -> Iterator[str]:
    """Indented blocks outside of sections as literal ones."""
    in_section, in_block, before = False, False, ""
    for line in lines:
        if line and not line.startswith(" "):
            in_section, in_block = bool(SECTION.match(line)), False
        elif line.startswith("    ") and not in_section and not in_block and not before:
            in_block = True
            yield from ("::", "")
        yield line
        before = line


def _inline(text: str, module: str) -> str:
    """Code in single backticks as links or literals; the rest with its marks escaped."""
    parts = re.split(
        r"(`[^`]+`|^ *>>> (?:.|\n(?!\n))*|^::\n\n(?:(?:    .*)?\n)+)", text, flags=re.M
    )
    return "".join(_part(part, module) for part in parts)


def _part(part: str, module: str) -> str:
    if part.startswith("`"):
        code = " ".join(part.strip("`").split())
        is_name = re.fullmatch(r"\w+(\.\w+)*", code)
        path = PATHS.get(id(fields.named(code, module))) if is_name else None
        return f":py:obj:`{code} <{path}>`" if path else f"``{code}``"
    if part.lstrip().startswith(">>> ") or part.startswith("::\n"):
        return part
    part = re.sub(r"(?<=: )(\w+)\.$", r"\1\\.", part, flags=re.M)  # "K." would begin a list
    return re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", part)
