"""The files of a pool that `experiments.generate` makes, and how processes share them.

    plan.json, plan.jsonl   what is to be made, one candidate a line
    labels.csv              file,label of every planned candidate
    SOURCE/DRAW.png         candidates, each by one rename
    shards/I-of-N.jsonl     what one shard has made, appended to by that shard alone
    flags/FILTER.jsonl      what one filter says of the candidates, by one rename
    metadata.jsonl          shards and flags joined, in the order of the plan, by one rename

A folder is what `data.Pool.from_folder` reads. Killed at any point, nothing in it is half-written
but a shard's last line, which the next run cuts off.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import json_lines
from experiments.locking import locked
from saflex_jax.data.provenance import METADATA, read_lines
from saflex_jax.files import renamed, write_whole

PLAN, ROWS, LABELS = "plan.json", "plan.jsonl", "labels.csv"
SHARDS, FLAGS = "shards", "flags"


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file by one rename; a failure leaves what was there."""
    with renamed(path) as part:
        part.write_bytes(content)


def write_plan(folder: pathlib.Path, about: Mapping[str, Any], rows: Sequence[dict]) -> str:
    """Makes the folder of a pool, by one rename.

    Args:
      folder: is made; one that holds this very plan is left as it is.
      about: what fixes the pool beside its rows.
      rows: of the candidates; each has "file_name" and "label".

    Returns:
      "planned" or "ready".

    Raises:
      ValueError: the folder holds another plan, or something else.
    """
    labels = "file,label\n" + "".join(f"{row['file_name']},{row['label']}\n" for row in rows)
    files = {PLAN: json.dumps(about, indent=1), ROWS: json_lines.text(rows), LABELS: labels}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent, folder.name) as scratch:
        if folder.exists():
            for name in (PLAN, ROWS):
                path = folder / name
                if not path.is_file() or path.read_text() != files[name]:
                    raise ValueError(
                        f"--out must be a new folder, or one of the same plan; {folder} holds "
                        "something else"
                    )
            return "ready"
        new = scratch / "new"
        new.mkdir()
        for name, text in files.items():
            (new / name).write_text(text)
        os.rename(new, folder)
    return "planned"


def read_plan(folder: pathlib.Path) -> tuple[dict, list[dict]]:
    """(what fixes the pool, its rows).

    Raises:
      ValueError: no plan there, or a damaged one.
    """
    try:
        about = json.loads((folder / PLAN).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--out must be a folder that `python -m experiments.generate plan` made; {error}"
        ) from error
    return about, read_lines(folder / ROWS)


def made(folder: pathlib.Path) -> dict[str, dict]:
    """file_name -> record, of all shards; of what two made alike, either.

    A shard that is being written may end in half a line, which does not count.
    """
    records = {}
    for path in sorted((folder / SHARDS).glob("*.jsonl")):
        records |= {r["file_name"]: r for r in json_lines.read(path)}
    return records


def join(folder: pathlib.Path) -> int:
    """Writes metadata.jsonl anew from shards and flags; returns its number of lines.

    A candidate's flags are the filters that it failed. One process at a time: the last one to come
    sees what the others wrote.
    """
    _, rows = read_plan(folder)
    with locked(folder, METADATA, wait=True):
        records = made(folder)
        said = {p.stem: {r["file_name"]: r for r in read_lines(p)}
                for p in sorted((folder / FLAGS).glob("*.jsonl"))}  # fmt: skip
        lines = []
        for name in (row["file_name"] for row in rows if row["file_name"] in records):
            record = dict(records[name])
            flags = ["nsfw"] if record.get("nsfw") else []
            for filtered, by_name in said.items():
                if name in by_name:
                    record[filtered] = by_name[name]["score"]
                    flags += [filtered] if by_name[name]["flagged"] else []
            lines.append(record | {"flags": flags})
        write_whole(folder / METADATA, json_lines.text(lines))
    return len(lines)


def write_flags(folder: pathlib.Path, name: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes what a filter says, {"file_name", "score", "flagged"} each, and joins."""
    (folder / FLAGS).mkdir(exist_ok=True)
    write_whole(folder / FLAGS / f"{name}.jsonl", json_lines.text(records))
    join(folder)
