"""A finished run of `experiments.main`, opened again: its config, data, method and last state."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import build, cleaning, estimators, same_data, tables, task
from experiments.configs import sources
from saflex_jax import augment, checks, configure, data, train
from saflex_jax.augment.made import MADE
from saflex_jax.batches import floats, take
from saflex_jax.core import linear_solve, scores
from saflex_jax.core.targets import prior_targets, score_scale
from saflex_jax.core.tree import paths, under
from saflex_jax.methods.upstream import drawn
from saflex_jax.types import Batch, Method, Streams, Targets, TrainState

BATCH = 256  # candidates at once
DIRECTING = 5000  # training samples that direct them, at most, where these are not held out
CONFIG_HELP = "the run's config, where that registers methods, rules or augmentations of your own"


class Run(NamedTuple):
    """What a finished run was and became; `state` is the best one where the run kept it."""

    config: ConfigDict
    data: task.Data
    method: Method
    state: TrainState


def opened(workdir: pathlib.Path, step: int | None = None) -> Run:
    """The run of a folder.

    Args:
      workdir: as of `experiments.main`.
      step: of the checkpoint; None = the last.

    Raises:
      ValueError: no finished run there, one without steps or of episodes; a method, a rule or an
        augmentation that nobody registered; data that have changed since.
      CheckpointError: no such checkpoint, or a damaged one.
    """
    config = read_config(workdir)
    same_data.check(workdir, config)
    has_audit = (workdir / cleaning.FILE).exists()  # else nothing is written into an older run
    data = task.make_data(config, workdir if has_audit else None)
    method = build.make_method(config, data.pools, data.source.columns)
    folder = workdir / ("best" if build.keeps_best(config) and step is None else "checkpoints")
    kept = train.Checkpoints(folder, config=build.settings(config))
    with contextlib.closing(kept):
        state, _ = kept.load(build.init_state(config, method, data.pools, data.start), step)
    return Run(config, data, method, state)


def read_config(workdir: pathlib.Path) -> ConfigDict:
    """The config of a finished run's folder.

    Raises:
      ValueError: as `opened`.
    """
    try:
        settings = json.loads((workdir / "result.json").read_text())["config"]
        # Of a run from before a field was there; its checkpoint then names what differs.
        settings["data"] = {**sources.DEFAULTS, **settings["data"]}
        config = ConfigDict(settings)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--workdir must be of a finished run of `saflex train`; {workdir}: {error}"
        ) from error
    if "keep_best" not in config.train:
        config.train.keep_best = False
    if estimators.fits(config):
        raise ValueError(f"--workdir must be of a network; given one of {config.model.name}")
    try:
        configure.check(config.method.to_dict())
        augment.parse(config.augment)
    except ValueError as error:
        raise ValueError(f"{error}; if a file of yours registers it, say --config=FILE") from error
    if configure.episode(config.method.to_dict()):
        raise ValueError(
            "--workdir must be of a method with classes of its own; given one of "
            f"{config.method.name}, which knows those of an episode alone"
        )
    return config


def registered(file: str | None) -> None:
    """Runs a config's file for what it registers; None = nothing of one's own.

    Raises:
      OSError: no such file.
      ValueError: no Python file.
    """
    if file is None:
        return
    spec = importlib.util.spec_from_file_location("config_of_the_run", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config must be a Python file; given {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their types
    spec.loader.exec_module(module)


def add_options(parser: argparse.ArgumentParser, file: str) -> None:
    """--workdir and the like of a command that writes a table of a run, by default `file`."""
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="a finished run")
    parser.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    parser.add_argument("--step", type=int, help="of the checkpoint; default: what was tested")
    parser.set_defaults(file=file)
    parser.add_argument("--out", type=pathlib.Path, help=f"default: WORKDIR/{file}")


def write(given: argparse.Namespace, make: Callable[[Run], Mapping[str, np.ndarray]]) -> None:
    """Writes the table that is made of the run, and says where."""
    file = given.out or given.workdir / given.file
    tables.check_name(file)  # before anything takes its time
    registered(given.config)
    tables.write(make(opened(given.workdir, given.step)), file)
    print(file)


class Looked(NamedTuple):
    """What is known of every candidate under one draw of the pipeline, arrays [N, ...].

    Attributes:
      targets: by the run's rule and the samples that directed it; the prior's without a rule.
      utility: u, how far training on the candidate lowers the loss on held-out samples, f32[N].
      believed: f32[N, K], what the network says of it.
      candidate: place in the pool, i32[N]; -1 where it is no candidate of one.
      operation, magnitude: of the trace, [N, L].
    """

    targets: Targets
    utility: np.ndarray
    believed: np.ndarray
    candidate: np.ndarray
    operation: np.ndarray
    magnitude: np.ndarray


def look(run: Run, draws: int = 1) -> Iterator[Looked]:
    """Looks at all candidates as steps of the run would see them, without taking one.

        u_i = <q_i, S_i> / RMS(S)

    S are the label scores along the implicit direction of the head, where the network has one.

    Args:
      run: the run.
      draws: of its pipeline; each gives one `Looked`.

    Raises:
      ValueError: a pipeline that changes the number of rows.
    """
    config, data, method, state = run
    pipeline = augment.parse(config.augment)
    val = floats(jax.tree.map(jnp.asarray, data.held_out._replace(trace=None)))  # as `take` gives
    directing = _directing(data, val)
    head = any(path.startswith("head/") for path in paths(state.params))
    solve = linear_solve.cg_solve() if head else linear_solve.identity_solve()

    @jax.jit
    def of_batch(state, candidates):
        def network(params, inputs):
            return method.predict(state._replace(params=params), inputs)

        made = drawn(pipeline, state, augment.record(candidates, "identity", 0.0))
        if method.targets is None:
            targets = prior_targets(made.labels, made.mask)
        else:
            targets = method.targets(state, Streams(made, directing))
        found = scores.score(
            network, state.params, made.inputs, val.inputs, val.labels, mask=made.mask,
            predicate=under("head") if head else None, solve=solve,
        )  # fmt: skip
        scale = score_scale(found.scores, made.mask)
        utility = jnp.sum(made.labels * found.scores, -1) / scale
        believed, candidate = jnp.exp(found.log_probs), augment.groups(made, "candidate")
        return Looked(
            targets, utility, believed, candidate, made.trace.operation, made.trace.magnitude
        )

    number = len(data.pools.candidates.labels)
    for draw in range(draws):
        at, parts = state._replace(step=state.step + draw), []
        for begin in range(0, number, BATCH):
            rows = np.arange(begin, begin + BATCH)
            batch = take(Streams(data.pools.candidates), Streams(rows % number)).candidates
            looked = jax.tree.map(np.asarray, of_batch(at, batch._replace(mask=rows < number)))
            if len(looked.utility) != BATCH:
                raise ValueError("config.augment must keep the number of rows")
            parts.append(jax.tree.map(lambda x, n=min(BATCH, number - begin): x[:n], looked))
        yield jax.tree.map(lambda *x: np.concatenate(x), *parts)


def _directing(data: task.Data, held_out: Batch) -> Batch:
    """What directs the run's weights and labels: the held-out samples, or those that train.

    Of very many of the latter some, evenly, since all are looked at beside each batch.
    """
    if data.pools.val is data.held_out:
        return held_out
    number = len(data.pools.val.labels)
    rows = np.linspace(0, number - 1, min(number, DIRECTING)).astype(int)
    val = data.pools.val._replace(trace=None)
    return jax.tree.map(jnp.asarray, take(Streams(val), Streams(rows)).candidates)


def columns(run: Run, draws: int = 1) -> dict[str, np.ndarray]:
    """The table of a run's candidates, a row for each candidate and draw of its pipeline.

    Columns of operations are texts: "shift 2.0 | flip 1.0". "clean" and "bad" are there where it is
    known of some labels that they are wrong, "right", the probability that the given label is,
    where the run learned one, "given_class" and "learned_class" where classes have names. "row" is
    a place among the candidates; of the data "file" says which it is, or where rows are no files
    "data_row", counted from 0, and -1 where it is none.

    Raises:
      ValueError: as `look`; no draw; a run whose labels were hidden, or learned before it.
    """
    checks.whole(1, draws=draws)
    if run.config.data.cleaning == "audit":
        raise ValueError(
            "the run must have labels as given to judge; given one of cleaning='audit', which "
            "trained on learned ones. `saflex audit --features=...` judges those of features"
        )
    if run.config.data.unlabelled:
        raise ValueError("the run must have labels to judge; given one of unlabelled=True")
    data, tables = run.data, []
    given = data.pools.candidates.labels.argmax(1)
    number = len(given)
    trusted = np.arange(number) >= number - build.run_info(run.config, data.pools).num_trusted
    known = {"clean": data.clean_labels, "bad": data.wrong} if data.wrong.any() else {}
    judges = configure.learns_posterior(run.config.method.to_dict())
    for draw, found in enumerate(look(run, draws)):
        labels, weights = found.targets.labels, found.targets.weights
        learned = labels.argmax(1)
        tables.append({
            "row": np.arange(number),
            "draw": np.full(number, draw),
            "given": given,
            "learned": learned,
            "probability": labels.max(1),
            "weight": weights,
            "utility": found.utility,
            **({"right": (1 + found.targets.utility) / 2} if judges else {}),
            "believed": found.believed.argmax(1),
            "trusted": trusted,
            **known,
            "operations": _operations(found),
            **_classes(run.data.source, given=given, learned=learned),
            **_origin(run.data, found.candidate),
        })  # fmt: skip
    return {name: np.concatenate([t[name] for t in tables]) for name in tables[0]}


def _operations(found: Looked) -> np.ndarray:
    names = np.array(augment.OPERATIONS)[found.operation]
    skipped = ("identity", *MADE)  # no operations
    return np.array([
        " | ".join(f"{n} {m:.3g}" for n, m in zip(row, magnitudes) if n not in skipped)
        for row, magnitudes in zip(names.tolist(), found.magnitude.tolist())
    ])  # fmt: skip


def _classes(source: data.Source, **labels: np.ndarray) -> dict[str, np.ndarray]:
    """The names of labels, where classes have names: columns "given_class" and the like."""
    names = np.array(source.class_names)
    return {f"{column}_class": names[of] for column, of in labels.items() if len(names) > of.max()}


def _origin(made: task.Data, candidate: np.ndarray) -> dict[str, np.ndarray]:
    """Where candidates come from: the data set's files or rows, the pool's files and the like."""
    own, pool = _files(made), _made(made, candidate)
    if "file" in own and "file" in pool:
        pool["file"] = np.where(candidate < 0, own["file"], pool["file"])
    return own | pool


def _files(made: task.Data) -> dict[str, np.ndarray]:
    """Which files of the data set candidates are, or which rows where it has no files."""
    if "file" not in made.source.extra:
        return {"data_row": made.rows}
    return {"file": np.where(made.rows < 0, "", made.source.extra["file"][made.rows])}


def _made(made: task.Data, candidate: np.ndarray) -> dict[str, np.ndarray]:
    """What is known of a pool's candidates that are rows; no columns where there are none."""
    if made.pool is None or not (candidate >= 0).any():
        return {}
    _, _, owner, places = made.pool.samples()
    # Candidates come behind what they are made of, and trusted samples behind those.
    made_of = np.arange(len(candidate))
    real = np.flatnonzero(candidate < 0)
    source = np.zeros(places.max() + 1, int)
    source[places] = owner
    made_of[candidate >= 0] = real[source[candidate[candidate >= 0]]]
    about = made.pool.provenance
    return {"source": made_of} | ({} if about is None else of_provenance(about, candidate))


def of_provenance(about: data.Provenance, places: np.ndarray) -> dict[str, np.ndarray]:
    """Columns file, prompt, strength, generator and flags, those of which anything is known.

    Args:
      about: of a pool.
      places: i[N] in it; -1 = no candidate, whose texts are empty and whose strength is NaN.
    """
    columns = {
        "file": np.array(about.files),
        "prompt": np.array(about.prompts)[about.prompt],
        "strength": about.strength,
        "generator": np.array(about.generators)[about.generator],
        "flags": np.array([" ".join(np.array(about.flags)[row]) for row in about.flagged]),
    }
    return {
        name: np.where(places >= 0, values[places], np.nan if name == "strength" else "")
        for name, values in columns.items()
        if any(values.tolist())
    }
