"""The origin of a pool's candidates: prompt, strength, model, seed and flags of each."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

METADATA = "metadata.jsonl"


class Provenance(NamedTuple):
    """The origin of T candidates.

    >>> provenance([{"prompt": "in the rain", "seed": 7}]).seed.tolist()
    [7]

    Attributes:
      files: names, as in metadata.jsonl; () if candidates are not files.
      prompts: the different texts.
      prompt: i32[T], indices into `prompts`.
      strength: f32[T], of the generator; 0 if unknown.
      generators: names of the models.
      generator: i32[T], indices into `generators`.
      seed: i64[T], of the generator.
      flags: names of the filters.
      flagged: bool[T, F], which filters a candidate failed.
      known_label: i32[T], the candidate's true class, for diagnosis only; -1 if unknown.
    """

    files: tuple[str, ...]
    prompts: tuple[str, ...]
    prompt: np.ndarray
    strength: np.ndarray
    generators: tuple[str, ...]
    generator: np.ndarray
    seed: np.ndarray
    flags: tuple[str, ...]
    flagged: np.ndarray
    known_label: np.ndarray


def read_lines(path: str | os.PathLike, *, open_end: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line.

    Args:
      path: the file.
      open_end: whether another process may be writing: text after the last newline is ignored.

    Raises:
      ValueError: a line that is not a JSON object; names the file and the line.
    """
    text = pathlib.Path(path).read_text(encoding="utf-8")
    *lines, rest = text.split("\n")  # not splitlines, which splits inside of JSON's strings, too
    lines += [rest] if rest and not open_end else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} must be JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number} must be a JSON object; given {line[:80]}")
        records.append(record)
    return records


def read_provenance(path: str | os.PathLike, files: Sequence[str]) -> Provenance:
    """The provenance of files, from a file of JSON objects with "file_name".

    Optional fields: "prompt", "strength", "model", "seed", "flags" (a list of names) and
    "known_label". Lines of other files are ignored.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / METADATA
    ...     _ = path.write_text('{"file_name": "0/0.png", "prompt": "in the rain"}')
    ...     origin = read_provenance(path, ["0/0.png"])
    >>> origin.prompts, origin.prompt.tolist()
    (('in the rain',), [0])

    Args:
      path: metadata.jsonl.
      files: T names.

    Raises:
      ValueError: a line that is not a JSON object, lacks a file name, repeats another's, or has a
        value of the wrong type; a file without a line. Names the line or the file.
    """
    by_file: dict[str, dict] = {}
    for number, record in enumerate(read_lines(path), 1):
        name = record.get("file_name")
        if not isinstance(name, str) or name in by_file:
            raise ValueError(
                f"{path} line {number} must have a file_name of its own; given {name!r}"
            )
        _check_types(f"{path} line {number}", record)
        by_file[name] = record
    for name in files:
        if name not in by_file:
            raise ValueError(
                f"{path} must have a line for {name}; given none; "
                "`python -m experiments.generate run` completes it"
            )
    return provenance([by_file[name] for name in files])


def provenance(records: Sequence[Mapping[str, Any]]) -> Provenance:
    """The provenance of T records, which may lack any field.

    >>> provenance([{"prompt": "in the rain"}, {}]).prompt.tolist()
    [1, 0]

    Args:
      records: T mappings, with fields as in `read_provenance`.
    """

    def each(name, otherwise):
        given = (record.get(name) for record in records)
        return [otherwise if value is None else value for value in given]

    prompts, prompt = _places(each("prompt", ""))
    generators, generator = _places(each("model", ""))
    failed = each("flags", ())
    flags = tuple(sorted({flag for names in failed for flag in names}))
    return Provenance(
        tuple(str(r["file_name"]) for r in records if "file_name" in r),
        prompts,
        prompt,
        np.array(each("strength", 0.0), np.float32),
        generators,
        generator,
        np.array(each("seed", 0), np.int64),
        flags,
        np.array([[f in names for f in flags] for names in failed], bool),
        np.array(each("known_label", -1), np.int32),
    )


def _places(texts: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    names = tuple(sorted(set(texts)))
    where = {name: place for place, name in enumerate(names)}
    return names, np.array([where[text] for text in texts], np.int32)


_TYPES = {"prompt": str, "model": str, "strength": (int, float), "seed": int,
          "known_label": int, "flags": list}  # fmt: skip


def _check_types(where: str, record: Mapping[str, Any]) -> None:
    for name, kind in _TYPES.items():
        value = record.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{where}: {name} must be {_named(kind)}; given {value!r}")
        if isinstance(value, float) and not np.isfinite(value):
            raise ValueError(f"{where}: {name} must be finite; given {value!r}")
    if not all(isinstance(flag, str) for flag in record.get("flags") or ()):
        raise ValueError(f"{where}: flags must be names; given {record['flags']!r}")


def _named(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    names = {str: "a text", list: "a list", int: "a whole number", float: "a number"}
    return names[kinds[-1]]
