"""What `experiments.generate` does: plans candidates of a config's training samples, makes them."""

from __future__ import annotations

import hashlib
import io
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import generators, json_lines, pool_files, task
from experiments.generators import LABEL, Options, Originals, Request
from experiments.locking import locked
from saflex_jax import checks, data
from saflex_jax.data.seeds import generator

FORMAT = 1


class Plan(NamedTuple):
    """What a plan is made of, but for the data.

    Attributes:
      generator: of `generators.GENERATORS`.
      options: of the generator.
      prompts: "{label}" in one stands for the class's name.
      strengths: in [0, 1].
      draws: candidates of each source; they take prompts and strengths in turn.
      guidance: >= 0.
      steps: >= 1.
      seed: of everything that is drawn.
    """

    generator: str
    options: Options
    prompts: tuple[str, ...]
    strengths: tuple[float, ...]
    draws: int
    guidance: float
    steps: int
    seed: int

    def check(self) -> None:
        """Raises ValueError where a part is out of range."""
        checks.whole(1, **{"--draws": self.draws, "--steps": self.steps})
        checks.whole(**{"--seed": self.seed, "--pixels": self.options.pixels})
        checks.amount(**{"--guidance": self.guidance})
        found = generators.find(self.generator)
        if not self.prompts:
            raise ValueError("--prompt must be given, once for each prompt; given none")
        if self.generator != "edits" and not self.options.model:
            raise ValueError(f"--model must be given for {self.generator}; given none")
        found.check(self.prompts, self.strengths, self.steps)


# --- The plan


def planned_rows(
    plan: Plan, rows: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One record a candidate: its name, source, prompt, strength and a seed of its own.

    Each source goes through all pairs of a prompt and a strength in an order of its own.
    """
    pairs = [(p, s) for p in plan.prompts for s in plan.strengths]
    for row, label in zip(rows.tolist(), labels.tolist()):
        order = generator("prompts", plan.seed, row).permutation(len(pairs))
        for draw in range(plan.draws):
            prompt, strength = pairs[order[draw % len(pairs)]]
            seed = int(generator("generated image", plan.seed, row, draw).integers(2**31))
            yield {
                "file_name": f"{row}/{draw}.png",
                "source": row,
                "draw": draw,
                "label": label,
                # No format(): braces of a prompt are its own.
                "prompt": prompt.replace(LABEL, names[label] if names else str(label)),
                "strength": strength,
                "guidance": plan.guidance,
                "steps": plan.steps,
                "seed": seed,
            }


def make_plan(
    plan: Plan, config: ConfigDict, seeds: Sequence[int], folder: pathlib.Path
) -> tuple[str, int]:
    """Plans candidates of all samples that train on any of the seeds.

    Args:
      plan: what to make of each.
      config: of the runs that the pool is for; its `data` says which rows train. A pool in it is
        overlooked.
      seeds: of these runs.
      folder: of the pool.

    Returns:
      ("planned" or "ready", number of candidates).

    Raises:
      ValueError: parts out of range; a table; labels that are no classes; another plan there.
    """
    plan.check()
    config = config.copy_and_resolve_references()
    config.data.update({"pool": "", "pool_rows": False, "pool_flagged": "keep"})
    task.check(config.data)
    rows, warned = [], False
    for seed in seeds:
        config.seed = seed
        source, _, split, _ = task.make_split_source(config)
        _check_source(config.data.name, source)
        rows.append(task.trained_rows(config.data, split))
        if "test" not in source.splits and len(seeds) > 1 and not warned:
            warned = True
            print(f"{config.data.name} has no official test split: what one seed tests on, edits "
                  "of another may use", file=sys.stderr)  # fmt: skip
    rows = np.unique(np.concatenate(rows))
    fields = ("name", "dir", "size", "task")
    if config.data.channels:  # so that plans from before this field are still the same
        fields += ("channels",)
    labels, names = source.labels[rows], source.class_names
    about = {
        "format": FORMAT,
        "data": {name: config.data[name] for name in fields},
        "shape": list(source.inputs.shape[1:]),
        "class_names": list(names) or [str(k) for k in range(source.num_classes)],
        "generator": plan.generator,
        "options": plan.options._asdict(),
        "seed": plan.seed,
    }
    records = list(planned_rows(plan, rows, labels, names))
    return pool_files.write_plan(folder, about, records), len(records)


def _check_source(name: str, source: data.Source) -> None:
    if source.columns is not None or np.ndim(source.inputs) != 4:
        raise ValueError(f"config.data.name must be a set of images; {name} is none")
    if source.labels.ndim > 1:
        raise ValueError(f"config.data.name must have classes as labels; {name} has others")


def open_source(about: dict) -> data.Source:
    """The data set of a plan."""
    where = about["data"]
    channels = where.get("channels", 0)
    return task.opened(where["name"], where["dir"], where["size"], where["task"], False, channels)


def originals(about: dict, rows: Sequence[dict]) -> Originals:
    """The sources of a plan; nothing else of the data set is read."""
    source = open_source(about)
    if list(source.inputs.shape[1:]) != about["shape"]:
        raise ValueError(
            f"{about['data']['name']} must have images of shape {about['shape']}, as when it was "
            f"planned; given {list(source.inputs.shape[1:])}"
        )
    places = np.unique([row["source"] for row in rows])
    if places[-1] >= len(source.labels):
        raise ValueError(
            f"{pool_files.ROWS} must name sources in [0, {len(source.labels)}); given {places[-1]}"
        )

    def read(row):
        return pixels(source.inputs[row])

    return Originals(places, source.labels[places], read)


def pixels(image: np.ndarray) -> np.ndarray:
    """8-bit levels of an image, uint8[H, W, C]."""
    if image.dtype == np.uint8:
        return np.asarray(image)
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)


# --- The run


def parse_shard(text: str) -> tuple[int, int]:
    """ "2/8" as (2, 8): the third of eight.

    Raises:
      ValueError: not of that form, or out of range.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"--shard must be I/N with 0 <= I < N, as 0/2; given {text!r}")
    return int(found[1]), int(found[2])


def run(folder: pathlib.Path, shard: tuple[int, int] = (0, 1), *, progress: bool = True) -> int:
    """Makes what the shard lacks; the same call goes on after an interruption.

    Args:
      folder: with a plan.
      shard: (I, N): every N-th candidate from the I-th on.
      progress: whether to show a bar on stderr.

    Returns:
      How many were made now.

    Raises:
      ValueError: no plan, a damaged source.
      RuntimeError: another process runs this shard.
      OSError: the disk is full, or there is no such model.
    """
    about, rows = pool_files.read_plan(folder)
    index, number = shard
    name, made = f"{index}-of-{number}", 0
    with locked(folder, f"shard-{name}"):
        done = {n for n in pool_files.made(folder) if (folder / n).exists()}
        mine = rows[index::number]
        left = [row for row in mine if row["file_name"] not in done]
        if not left:
            pool_files.join(folder)
            return 0
        sources = originals(about, rows)
        ready = generators.find(about["generator"]).make(Options(**about["options"]), sources)
        log = folder / pool_files.SHARDS / f"{name}.jsonl"
        bar = tqdm(desc=f"shard {index}/{number}", total=len(mine), initial=len(mine) - len(left),
                   unit="image", disable=None if progress else True)  # fmt: skip
        try:
            with bar:
                for row in left:
                    record = _make_one(folder, row, sources, ready)
                    json_lines.append(log, record | {"generator": about["generator"]})
                    made += 1
                    bar.update()
        finally:
            pool_files.join(folder)
    return made


def _make_one(folder, row, sources, ready) -> dict[str, Any]:
    """Makes one candidate's file; returns its record."""
    try:
        image = sources.read(row["source"])
    except ValueError as error:
        raise ValueError(f"source {row['source']} of {row['file_name']}: {error}") from error
    fields = Request._fields[1:]  # all but the image
    made = ready.make(Request(image, *(row[name] for name in fields)))
    path = folder / row["file_name"]
    path.parent.mkdir(exist_ok=True)
    pool_files.write_bytes(path, as_png(made.image))
    digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
    return {**row, **ready.about, **made.known, "source_sha256": digest}


def as_png(image: np.ndarray) -> bytes:
    """The file of an image uint8[H, W, C]; C is 1 or 3."""
    from PIL import Image

    packed = io.BytesIO()
    grey = image.shape[-1] == 1
    Image.fromarray(image.squeeze(-1) if grey else image).save(packed, "PNG")
    return packed.getvalue()
