"""What was learned about every candidate: a table, and a page that says what helps and what harms.

    saflex audit --workdir=runs/digits
    saflex audit --features=cifar10n@crop --labels=worst --trusted=500
    saflex audit --features=mine.npz --pool=pools/mine

Of a finished run (`saflex train`) a row is a candidate under one draw of its pipeline, utility
says how far training on it lowers the loss on the validation samples, in units of the scores' RMS.
Of features it is 2 P(the given label is right) - 1, by `saflex_jax.audit`. --features is a set of
`experiments.features`, NAME@TAG, or an .npz file of arrays: features f[N, D], labels [N], integers
or texts; where they are known trusted bool[N], source, group, file_name [N], clean [N], class_names
[K] and images [N, H, W, C]. --pool adds prompt, strength, model and flags of its metadata.jsonl by
file_name.

Writes audit.csv (or .parquet) and audit.html to --out. The test split is not read.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

from experiments import audit_page, command_line, finished, named_rows, tables, task
from experiments.feature_sets import feature_set
from experiments.inspect import class_names
from saflex_jax import checks, data
from saflex_jax.audit import SURE, audit
from saflex_jax.data.provenance import METADATA
from saflex_jax.data.seeds import generator

# array of a file -> column
TOLD = {"file_name": "file", "source": "source", "group": "group", "clean": "clean"}


class Found(NamedTuple):
    """A table and what the page shows with it.

    Attributes:
      table: of candidates.
      title: of the page.
      class_names: K.
      transition: f[K, K] or None.
      inputs: of the rows, images if they are [N, H, W, C]; None = unknown.
      notes: for the page.
    """

    table: dict[str, np.ndarray]
    title: str
    class_names: tuple[str, ...]
    transition: np.ndarray | None
    inputs: Any
    notes: list[str]


def of_run(workdir: pathlib.Path, draws: int, truth: str = "") -> Found:
    """What a finished run learned.

    Args:
      workdir: of the run.
      draws: of its pipeline.
      truth: a file that names samples and their right labels (`named_rows`), for precision and
        recall; those that it does not name are taken for right.

    Raises:
      ValueError: as `finished.opened`, `finished.columns` and `named_rows.read`.
    """
    run = finished.opened(workdir)
    table = finished.columns(run, draws)
    if truth:
        table |= told(run, truth, table["row"], table["given"])
    names = class_names(run.data.source)
    kept = table["draw"] == 0
    confused = np.zeros((len(names), len(names)))
    rows = kept & ~table["trusted"]
    np.add.at(confused, (table["learned"][rows], table["given"][rows]), 1.0)
    confused /= np.maximum(confused.sum(1, keepdims=True), 1.0)
    notes = [
        f"{run.config.method.name}, rule {run.config.method.rule}, seed {run.config.seed}, step "
        f"{int(run.state.step)}; {draws} draws of {run.config.augment!r}.",
        "Utility: how far training on the row lowers the loss on the validation samples, in units "
        "of the scores' root mean square. One look is noisy; the groups are what to trust.",
    ]
    if audit_page.has_posterior(table):
        notes.append(
            "Samples are sorted and dropped by 2 P(the given label is right) - 1, which the rule "
            "learned over all visits."
        )
    if run.data.generated is not None:
        notes.append(
            "The pool's candidates stood in for these samples and have no rows of their own; with "
            "config.data.pool_rows=True they do."
        )
    inputs = run.data.pools.candidates.inputs
    return Found(table, f"Audit: {task.title(run.config.data)}", names, confused, inputs, notes)


def told(run: finished.Run, truth: str, rows: np.ndarray, given: np.ndarray) -> dict:
    """The columns "clean" and "bad" by a file of right labels."""
    source = run.data.source
    named, labels = named_rows.read(source, truth, "--truth")
    right = np.full(len(source.labels), -1)
    right[named] = labels
    of_row = np.where(run.data.rows < 0, -1, right[run.data.rows])[rows]
    clean = np.where(of_row < 0, given, of_row)
    return {"clean": clean, "bad": clean != given}


def of_features(name: str, labels: str, trusted: int, pool: str, folder: str, seed: int) -> Found:
    """What features say of labels.

    Raises:
      ValueError: no such set or file, arrays that do not fit; names them. As `of_metadata`.
    """
    load = _of_file if pathlib.Path(name).suffix == ".npz" else _of_set
    given = load(name, labels, trusted, folder, seed)
    columns = {to: given[key] for key, to in TOLD.items() if key in given}
    checks.rows(len(given["labels"]), **columns)
    if pool:
        columns |= of_metadata(pathlib.Path(pool) / METADATA, columns.get("file"))
    found = audit(
        given["features"], given["labels"], trusted=given.get("trusted"),
        source=given.get("source"), seed=seed,
    )  # fmt: skip
    size = len(found.transition)
    names = tuple(map(str, given.get("class_names", np.arange(size))))
    checks.rows(size, class_names=np.array(names))
    table = found.columns() | columns
    table["judged"] = np.where(found.wrong, "wrong", np.where(found.outside, "outside", ""))
    if "clean" in given:
        table["bad"] = given["clean"] != given["labels"]
    evidence = f"evidence that labels are wrong: {found.evidence:.1f} standard errors"
    if found.evidence <= SURE:
        evidence = f"no sure {evidence}, of {SURE:g}; inspect some, but train on labels as given"
        print(evidence, file=sys.stderr)
    notes = [
        f"{found.noise_rate:.1%} of the labels are judged wrong; {evidence}. "
        f"{int(found.outside.sum())} samples are unlike all trusted ones.",
        "Utility: 2 P(the given label is right) - 1; -1 for samples unlike the trusted ones.",
        f"The kind of head that held-out labels chose: weight decay "
        f"{found.head.weight_decay:g}, early-learning regularisation {found.head.strength:g}.",
    ]
    title = f"Audit: {name} {labels}".strip()
    return Found(table, title, names, found.transition, given.get("images"), notes)


def _of_file(name: str, labels: str, trusted: int, folder: str, seed: int) -> dict[str, Any]:
    del folder, seed
    if labels or trusted:
        raise ValueError("--labels and --trusted are of feature sets; an .npz file has arrays")
    try:
        with np.load(name, allow_pickle=False) as file:
            given = {key: file[key] for key in file.files}
    except (OSError, ValueError) as error:
        raise ValueError(f"--features must be an .npz file of arrays; {name}: {error}") from error
    for key in ("features", "labels"):
        if key not in given:
            raise ValueError(f"{name} must have an array {key}; given {sorted(given)}")
    checks.known(name, given, ("features", "labels", "trusted", "images", "class_names", *TOLD))
    texts = [key for key in ("labels", "clean") if key in given and given[key].dtype.kind == "U"]
    if texts:
        classes = np.unique(np.concatenate([given[key] for key in texts]))
        classes = given.setdefault("class_names", classes).tolist()
        for key in texts:
            values, places = np.unique(given[key], return_inverse=True)
            for value in values.tolist():
                checks.choice(classes, **{f"{name}: {key}": value})
            given[key] = np.array([classes.index(value) for value in values.tolist()])[places]
    return given


def _of_set(name: str, labels: str, trusted: int, folder: str, seed: int) -> dict[str, Any]:
    features = feature_set(name, folder, "")
    source, size = features.source, len(features.source.views)
    if source.labels.ndim > 1:
        raise ValueError(f"--features must be of classes; {name} has other labels")
    right = source.labels[:size]
    given, known = right, generator("audit trusted", seed).permutation(size) < trusted
    if labels:
        checks.choice(source.extra, **{"--labels": labels})
        given = source.extra[labels][:size]
    arrays = {
        "features": np.asarray(source.views[:, 0], np.float32),
        "labels": np.where(known, right, given),
        "trusted": known,
        "class_names": np.array(class_names(source)),
    }
    if labels:
        arrays["clean"] = right
    try:
        base = task.opened(name.partition("@")[0], folder, features.options["pixels"], "", False)
        arrays["images"] = base.inputs, features.rows
    except (OSError, ValueError, KeyError):
        print("no thumbnails: the images are not there", file=sys.stderr)
    return arrays


def of_metadata(path: pathlib.Path, files: np.ndarray | None) -> dict[str, np.ndarray]:
    """The columns prompt, strength, generator and flags of files, as far as there are any.

    Raises:
      ValueError: no such file, a line that is not as it must be, a file without a line; names it.
    """
    if files is None:
        raise ValueError("--pool needs the array file_name in the features' file")
    try:
        about = data.read_provenance(path, files.tolist())
    except OSError as error:
        raise ValueError(f"--pool must be a folder with {path.name}; {error}") from error
    return finished.of_provenance(about, np.arange(len(files)))


def images_of(found: Found) -> dict[int, np.ndarray]:
    """Place in the table -> image, of the rows of the gallery."""
    inputs, rows = found.inputs, None
    if isinstance(inputs, tuple):
        inputs, rows = inputs
    if getattr(inputs, "ndim", 0) != 4 or inputs.shape[-1] not in (1, 3):
        return {}
    places = [place for place, _ in audit_page.gallery(found.table)]
    own = found.table["row"][places] if rows is None else rows[found.table["row"][places]]
    return {place: np.asarray(inputs[int(row)]) for place, row in zip(places, own)}


def verdict(table: tables.Table) -> str:
    """How many labels are judged wrong, and where it is known which are, precision and recall.

    A row is judged by the posterior of its label where the audit has one: of features by "wrong",
    of a run by "right" where it learned any, else by what the network believes. Trusted
    samples are left out, and of several draws of a candidate the first counts.
    """
    first = audit_page.first_draws(table)
    table = {name: values[first] for name, values in table.items()}
    if "wrong" in table:
        judged, by = table["wrong"], "more likely wrong than right"
    elif audit_page.has_posterior(table):
        judged, by = table["right"] < 0.5, "more likely wrong than right, by the rule: right < .5"
    else:
        judged = table["believed"] != table["given"]
        by = "not what the network believes; the rule does not judge them"
    asked = ~table["trusted"]
    number = int((judged & asked).sum())
    text = f"{number:,} of {int(asked.sum()):,} labels are {by}"
    if "bad" not in table:
        return text
    bad = table["bad"] & asked
    right = int((judged & bad).sum())
    return (
        f"{text}; {int(bad.sum()):,} are wrong: precision {right / max(1, number):.3f}, recall "
        f"{right / max(1, int(bad.sum())):.3f}"
    )


def _check_options(given: argparse.Namespace) -> None:
    """Raises ValueError on numbers out of range, options that do not go together, and no folder."""
    if given.out and given.out.suffix in (".csv", ".parquet", ".html"):
        raise ValueError(f"--out must be a folder, for the table and the page; given {given.out}")
    checks.whole(**{"--trusted": given.trusted, "--seed": given.seed})
    if given.draws is not None:
        checks.whole(1, **{"--draws": given.draws})
    of_features = ("labels", "trusted", "pool", "data_dir", "seed")
    of_runs = ("draws", "truth", "config")
    what, others = ("--workdir", of_features) if given.workdir else ("--features", of_runs)
    for name in others:
        if getattr(given, name):
            raise ValueError(f"--{name} does not go with {what}; given {getattr(given, name)}")


def main(argv: list[str] | None = None) -> None:
    """Audits, writes and says where."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", type=pathlib.Path, help="a finished run of `saflex train`")
    what.add_argument("--features", help="NAME@TAG, or an .npz file")
    parser.add_argument("--labels", default="", help="label set of a feature set: worst")
    parser.add_argument("--trusted", type=int, default=0, help="samples whose right label is told")
    parser.add_argument("--pool", default="", help="folder with metadata.jsonl of the file's files")
    parser.add_argument("--truth", default="", help="right labels of a run: FILE,CLASS a line")
    parser.add_argument("--draws", type=int, help="of the run's pipeline, a row each; default: 2")
    parser.add_argument("--data_dir", default="", help="of sets of features; default: data")
    parser.add_argument("--config", metavar="FILE", help=finished.CONFIG_HELP)
    parser.add_argument(
        "--out", type=pathlib.Path, help="a folder; default: --workdir, or runs/audit"
    )
    parser.add_argument("--parquet", action="store_true", help="audit.parquet, not audit.csv")
    parser.add_argument("--seed", type=int, default=0, help="of an audit by features")
    given = parser.parse_args(argv)
    out = given.out or given.workdir or pathlib.Path("runs/audit")
    _check_options(given)
    if given.workdir:
        finished.registered(given.config)
        found = of_run(given.workdir, 2 if given.draws is None else given.draws, given.truth)
    else:
        found = of_features(
            given.features, given.labels, given.trusted, given.pool, given.data_dir or "data",
            given.seed,
        )  # fmt: skip
    page = audit_page.page(
        found.table, title=found.title, class_names=found.class_names,
        transition=found.transition, images=images_of(found), notes=found.notes,
    )  # fmt: skip
    file = out / ("audit.parquet" if given.parquet else "audit.csv")
    tables.write(found.table, file)
    with tables.renamed(out / "audit.html") as part:
        part.write_text(page, encoding="utf-8")
    print(f"{verdict(found.table)}\n{file}\n{out / 'audit.html'}")


def command() -> None:
    """The program, with the arguments of the process."""
    command_line.run_plain(main)


if __name__ == "__main__":
    command()
