"""Computes the features of a data set by a pretrained network, once, under several views.

    saflex prepare cifar10n resnet18
    saflex features cifar10n --views=4 --augment="shift(4) | flip" --limit=12000

View 0 of a row is the image as it is; the others are draws of the pipeline, made on the device at
the images' own size and resized after. Rows of the official test split get view 0 alone. The set
is DIR/features/NAME/TAG in the format of `saflex_jax.data.features`; TAG is made of the options
unless it is given, and printed. `config.data.features=TAG` trains on it. Interrupted, the same
command goes on where it stopped. A finished set is ready if its options, labels, file names, splits
and images are today's; else it is refused, and says what differs.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments import command_line, task
from experiments.feature_sets import corrupted_tag, feature_folder
from experiments.locking import locked
from saflex_jax import augment, checks, configure, data, models
from saflex_jax.augment import corruptions
from saflex_jax.batches import floats
from saflex_jax.data import features as files
from saflex_jax.data.prepared import file_digest
from saflex_jax.data.sources import SPLITS
from saflex_jax.models import ResNet
from saflex_jax.types import Batch, PyTree

_backbone = flags.DEFINE_string("backbone", "resnet18", "Network, of `configure.BACKBONES`.")
_weights = flags.DEFINE_string(
    "weights", None, "Its weights; None = DIR/weights/BACKBONE.pkl.", allow_override=True
)
_size = flags.DEFINE_integer(
    "size", 96, "Pixels of the images that the network sees.", allow_override=True
)
_pixels = flags.DEFINE_integer("pixels", 0, "Pixels that images are read with; 0 = as they are.")
_views = flags.DEFINE_integer("views", 1, "Views of a row that may train, the first as it is.")
_augment = flags.DEFINE_string("augment", "", "Pipeline that makes the other views.")
_limit = flags.DEFINE_integer("limit", 0, "The first so many training rows only; 0 = all.")
_corrupt = flags.DEFINE_string("corrupt", "", "The test rows alone, corrupted: fog:3.")
_seed = flags.DEFINE_integer("seed", 0, "Of the draws of the pipeline.")
_out = flags.DEFINE_string(
    "out", "data", "Folder of the prepared data sets and of the features.", allow_override=True
)
_tag = flags.DEFINE_string("tag", "", "Name of the set; empty = made of the options.")

IMAGES = 64  # that the network sees at once


class Options(NamedTuple):
    """What fixes the features of a data set; the flags say what each is.

    `weights` is the digest of the file, not its name.
    """

    backbone: str = "resnet18"
    weights: str = ""
    size: int = 96
    pixels: int = 0
    views: int = 1
    augment: str = ""
    limit: int = 0
    corrupt: str = ""
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError where a flag is out of range."""
        residual = [n for n, b in configure.BACKBONES.items() if issubclass(b, ResNet)]
        checks.choice(residual, **{"--backbone": self.backbone})
        checks.whole(1, **{"--size": self.size, "--views": self.views})
        checks.whole(**{"--pixels": self.pixels, "--limit": self.limit, "--seed": self.seed})
        augment.parse(self.augment)
        if (self.views > 1) != bool(self.augment.strip()):
            raise ValueError(
                "--augment must be given where --views > 1, and nowhere else; given "
                f"{self.augment!r} and {self.views}"
            )
        task.check_corruption("--corrupt", self.corrupt)

    def tag(self) -> str:
        """A name for the set that tells what differs from the default."""
        parts = [self.backbone, str(self.size)]
        if self.pixels:
            parts.append(f"from{self.pixels}")
        if self.views > 1:
            parts += [re.sub(r"[^a-z0-9]+", "-", self.augment.lower()).strip("-"), f"x{self.views}"]
        if self.limit:
            parts.append(f"n{self.limit}")
        if self.seed:
            parts.append(f"s{self.seed}")
        return "_".join(parts)


class Work(NamedTuple):
    """One array to fill.

    Attributes:
      name: "views" or "tested".
      rows: i[n], in the data set.
      first: place of the first one among all rows of the set.
      views: of each row.
    """

    name: str
    rows: np.ndarray
    first: int
    views: int


def parts(source: data.Source, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """(rows with all views, rows with one): training and validation, and the official test split.

    Of a corrupted set, the rows that are tested and no other.

    Raises:
      ValueError: a limit beyond the training rows.
    """
    everything = np.arange(len(source.labels))
    tested = source.splits.get("test", everything[:0])
    rest = source.splits.get("train", everything[~np.isin(everything, tested)])
    if options.corrupt:
        return everything[:0], tested if len(tested) else everything
    if options.limit > len(rest):
        raise ValueError(f"--limit must be at most {len(rest)}, the training rows; given more")
    rest = rest[: options.limit or None]
    return np.sort(np.concatenate([rest, source.splits.get("val", everything[:0])])), tested


def load_network(options: Options, weights: str | os.PathLike) -> tuple[nn.Module, PyTree]:
    """The backbone with running statistics, and its variables.

    Raises:
      ValueError: weights of another network, or of no network.
    """
    backbone = configure.BACKBONES[options.backbone](stem="imagenet", norm="frozen")
    return backbone, models.from_torchvision(models.read_weights(weights), backbone)


def make_extractor(backbone: nn.Module, variables: PyTree, options: Options, views: int):
    """(images [B, H, W, C], rows i[B]) -> what a feature set keeps of them, compiled.

    Returns:
      A function that gives (features f16[B, V, D], operation i16[B, V, L], magnitude f32[B, V, L],
      labels_kept bool[]).
    """
    drawn = [augment.parse(options.augment)] * (views - 1)
    pipeline = augment.views(augment.identity, *drawn)
    corrupt = None
    if options.corrupt:
        kind, _, severity = options.corrupt.partition(":")
        corrupt = functools.partial(corruptions.corrupt, name=kind, severity=int(severity))

    @jax.jit
    def extract(variables, images, rows):
        key, images = jax.random.key(options.seed), floats(images)
        if corrupt is not None:
            images = corrupt(key, images, index=rows)
        share = (jnp.arange(len(rows)) + 1.0) / (len(rows) + 1)  # labels that differ in every row
        labels = jnp.stack([share, 1 - share], 1)
        batch = Batch(images, labels, jnp.ones(len(rows), bool), rows)
        if views == 1:  # a trace has at least one column
            batch = augment.record(batch, "identity", 0.0)
        made = pipeline(key, batch)
        kept = jnp.array_equal(made.labels, jnp.repeat(labels, views, 0))
        inputs = models.imagenet_inputs(made.inputs, options.size)
        features = backbone.apply(variables, inputs, train=False).astype(jnp.float16)

        def of_rows(x):
            return x.reshape(len(rows), views, -1)

        trace = made.trace
        operation = trace.operation.astype(jnp.int16)
        return of_rows(features), of_rows(operation), of_rows(trace.magnitude), kept

    return functools.partial(extract, variables)


def shape_of(extract: Callable, source: data.Source, views: int) -> tuple[int, int, int]:
    """(V, D, L) of an extractor, without computing anything.

    Raises:
      ValueError: inputs that are no images, or a pipeline that refuses them.
    """
    if source.columns is not None or source.inputs.ndim != 4:
        raise ValueError(f"features need images [N, H, W, C]; given {list(source.inputs.shape)}")
    images = jax.ShapeDtypeStruct((2, *source.inputs.shape[1:]), source.inputs.dtype)
    features, operation, *_ = jax.eval_shape(extract, images, jnp.zeros(2, jnp.int32))
    return views, features.shape[-1], operation.shape[-1]


def differences(
    folder: pathlib.Path, source: data.Source, rows: np.ndarray, fixed: dict[str, Any]
) -> list[str]:
    """What a set, or one that was begun, has otherwise than one of today's data set and options.

    Args:
      folder: of the set.
      source: the data set, whose images are read again.
      rows: i[N], of which the set is to be.
      fixed: the options.

    Returns:
      Names of options; where they agree, of what is known of the rows, and "images".
    """
    given = files.read_options(folder)
    if names := [name for name in {**given, **fixed} if given.get(name) != fixed.get(name)]:
        return names
    found = data.from_features(folder)
    old, new = _known(found.source, np.arange(len(rows))), _known(source, rows)
    old["rows"], new["rows"] = found.rows, rows
    filled = found.prints.view("u8").reshape(-1, 2).any(1)
    old["images"] = found.prints[filled]
    new["images"] = data.fingerprints(data.subset(source.inputs, rows[filled]), chunk=IMAGES)
    both = [name for name in old if name in new]  # older sets do not have all
    return [name for name in both if not np.array_equal(old[name], new[name])]


def _known(source: data.Source, rows: np.ndarray) -> dict[str, np.ndarray]:
    """What a data set says of rows beside their inputs: labels, file names, splits."""
    return {
        "labels": source.labels[rows],
        "class names": np.array(source.class_names),
        **{name: values[rows] for name, values in source.extra.items()},
        **{f"{name} split": np.isin(rows, source.splits.get(name, [])) for name in SPLITS},
    }


def compute(name: str, options: Options, weights: str, out: pathlib.Path, tag: str = "") -> str:
    """Makes one feature set, or goes on with it, at out/features/name/tag.

    Args:
      name: as `config.data.name`.
      options: what is computed; `options.weights` is taken from the file.
      weights: a file that `models.read_weights` reads.
      out: folder of data sets.
      tag: name of the set; "" = made of the options.

    Returns:
      A message that says what was done.

    Raises:
      ValueError: options out of range; inputs that are no images; a pipeline that changes labels;
        a set of other options or data under this tag.
      RuntimeError: another process computes it.
    """
    options.check()
    options = options._replace(weights=file_digest(weights))
    tag = corrupted_tag(tag or options.tag(), options.corrupt)
    source = task.opened(name, str(out), options.pixels, "", False)
    seen, tested = parts(source, options)
    network = load_network(options, weights)
    extractors = {v: make_extractor(*network, options, v) for v in (options.views, 1)}
    shape = shape_of(extractors[options.views], source, options.views)
    fixed = {**options._asdict(), "rows": [len(seen), len(tested)]}
    today = source, np.concatenate([seen, tested]), fixed
    folder = feature_folder(str(out), name, tag)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent, tag):
        if folder.exists():
            if names := differences(folder, *today):
                raise ValueError(
                    f"--tag must be a new name; {folder} holds a set of other {', '.join(names)}"
                )
            return f"ready: {folder}"
        part = folder.with_name(f".{tag}.part")
        if not (part / "done.json").exists() or differences(part, *today):
            shutil.rmtree(part, ignore_errors=True)
            names = tuple(augment.OPERATIONS)
            files.create(
                part, source, seen=seen, tested=tested, shape=shape, operations=names, options=fixed
            )
            _note(part, {})
        started = time.perf_counter()
        _fill(part, source, [Work("views", seen, 0, options.views),
                             Work("tested", tested, len(seen), 1)], extractors)  # fmt: skip
        (part / "done.json").unlink()
        os.rename(part, folder)
    return f"{time.perf_counter() - started:.0f} s: {folder}"


def _fill(
    part: pathlib.Path, source: data.Source, works: list[Work], extractors: dict[int, Callable]
) -> None:
    """Computes what done.json in the folder does not name, a chunk of rows at a time."""
    arrays, done = files.writable(part), json.loads((part / "done.json").read_text())
    before = {w.name: done.get(w.name, 0) for w in works}
    total = sum(len(w.rows) * w.views for w in works)
    start = sum(before[w.name] * w.views for w in works)
    with tqdm(desc=part.name.strip("."), total=total, initial=start, unit="image",
              disable=None) as bar:  # fmt: skip
        for work in works:
            extract, size = extractors[work.views], max(1, IMAGES // work.views)
            for begin in range(before[work.name], len(work.rows), size):
                places = np.arange(begin, min(begin + size, len(work.rows)))
                rows = work.rows[places]
                images = np.asarray(source.inputs[rows])
                # The last chunk repeats its last row, so that all have one shape.
                padded = np.minimum(np.arange(size), len(rows) - 1)
                made = extract(images[padded], rows[padded].astype(np.int32))
                prints = data.fingerprints(images, chunk=size)  # while the device works
                features, operation, magnitude, kept = map(np.asarray, made)
                if not kept:
                    raise ValueError("--augment must keep labels and rows, as no mixing does")
                arrays["prints"][work.first + places] = prints
                if work.name == "tested":
                    arrays["tested"][places] = features[: len(rows), 0]
                else:
                    arrays["views"][places] = features[: len(rows)]
                    arrays["operation"][places] = operation[: len(rows)]
                    arrays["magnitude"][places] = magnitude[: len(rows)]
                done[work.name] = int(places[-1]) + 1
                _note(part, done)
                bar.update(len(rows) * work.views)
    for array in arrays.values():
        if array.size:
            array.flush()


def _note(part: pathlib.Path, done: dict[str, Any]) -> None:
    (part / "done.new").write_text(json.dumps(done))
    os.replace(part / "done.new", part / "done.json")


def main(argv: list[str]) -> None:
    """Computes the features of the data set that is named."""
    if len(argv) != 2:
        raise app.UsageError("name one data set")
    out, backbone = pathlib.Path(_out.value), _backbone.value
    weights = _weights.value or str(out / "weights" / f"{backbone}.pkl")
    if not pathlib.Path(weights).is_file():
        raise app.UsageError(
            f"--weights must be a file; {weights} is none. python -m experiments.prepare resnet18 "
            "fetches some"
        )
    options = Options(
        backbone, "", _size.value, _pixels.value, _views.value, _augment.value, _limit.value,
        _corrupt.value, _seed.value,
    )  # fmt: skip
    try:
        print(compute(argv[1], options, weights, out, _tag.value))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


def command() -> None:
    """The program, with the arguments of the process."""
    with contextlib.suppress(BrokenPipeError):
        command_line.run_absl(main)


if __name__ == "__main__":
    command()
