"""Arms of a comparison: changes of one config, trained on the same seeds and compared in pairs."""

from __future__ import annotations

import copy
import json
import math
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy import stats

from experiments import build, estimators, figures, json_lines, same_data, task
from saflex_jax import configure, parallel
from saflex_jax.batches import take
from saflex_jax.types import Method, Streams, Targets, TrainState

PLAIN = {"name": "supervised", "rule": "as_given"}
# Arm -> changes, where a config has no arms of its own. What learns from validation labels is
# compared with the upstream pipeline on training + validation, and on validation samples alone.
STANDING = {
    "upstream": {"method": PLAIN, "data": {"train_on_val": False}},
    "upstream_train_val": {"method": PLAIN, "data": {"train_on_val": True}},
    "trusted_only": {
        "method": PLAIN,
        "data": {"trusted_only": True, "train_on_val": False, "val_from": "", "pool": "",
                 "pool_rows": False, "pool_flagged": "keep", "cleaning": ""},
    },
    "saflex": {"data": {"train_on_val": False}},
    "saflex_train_val": {"data": {"train_on_val": True}},
}  # fmt: skip
# ELR, and the rule inside it, whose network is not underconfident: its beliefs count as they are.
# On 10 noisy tasks of "development" in the suite "pretrained" the latter is +.7 and +.3 points over
# ELR and SAFLEX on average, and on 9 of them above ELR (all but 10 trusted samples, -.4); seeds 100
# to 102, an MLP with strong decay, 2026-11-27.
WITH_ELR = {
    "elr": {"method": {"name": "elr", "rule": "as_given"}, "data": {"train_on_val": True}},
    "saflex_elr": {
        "method": {"name": "elr", "rule": "saflex", "saflex": {"rule": {"sharpness": 1.0}}},
        "data": {"train_on_val": True},
    },
}
# The rule that squares beliefs, in the place of the power that it learns.
SQUARED = {
    "saflex_squared": {
        "method": {"rule": "saflex", "saflex": {"rule": {"sharpness": 2.0}}},
        "data": {"train_on_val": True},
    },
}
Measure = Callable[[Method, TrainState, task.Data], dict[str, float]]
SWEEP_BYTES = 2**29  # of data that one program holds, each member its own
PROBED = 256  # training samples whose learned weights are looked at
LEVEL = 0.95  # of intervals


# --- Configs


def configs(config: ConfigDict) -> dict[str, ConfigDict]:
    """Arm -> its config, checked; the first arm is the base of the comparison.

    `config.arms` is a dict, arm -> nested changes of the config; without it, STANDING.

    Raises:
      ValueError: names the arm with an unknown field, a value that does not fit, or fewer than two
        records to a run, of which the first one is not timed.
    """
    build.check(config)
    # As JSON, since a ConfigDict puts its fields in order by name.
    arms = json.loads(config.to_json()).get("arms") or STANDING
    if not isinstance(arms, dict):
        raise ValueError(f"config.arms must be a dict, arm -> changes; given {arms!r}")
    return {arm: _changed(config, arm, changes) for arm, changes in arms.items()}


def _changed(config: ConfigDict, arm: str, changes: dict) -> ConfigDict:
    changed = copy.deepcopy(config)  # with the type of a field that is None, until it has a value
    changed.unlock()  # an unknown field is named by the check, with the nearest known one
    try:
        if "name" in changes.get("model", {}):
            changed.model = {}  # the fields of another network are not this one's
        changed.update(changes)
        changed = changed.copy_and_resolve_references()
        if "seed" in changes:
            raise ValueError("all arms run on the comparison's seeds")
        build.check(changed)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"config.arms.{arm} must be nested changes of the config; given {changes}; {error}"
        ) from error
    if changed.train.steps <= changed.train.log_every:
        raise ValueError(
            f"config.train.steps must exceed config.train.log_every = {changed.train.log_every}, "
            "so that a record without the compilation is timed; "
            f"given {changed.train.steps} ({arm})"
        )
    return changed


def of_seed(config: ConfigDict, seed: int) -> ConfigDict:
    """The config of one run."""
    seeded = config.copy_and_resolve_references()
    seeded.seed = seed
    return seeded


def settings(config: ConfigDict) -> dict:
    """What fixes an arm's runs but for the seed."""
    return {name: value for name, value in build.settings(config).items() if name != "seed"}


def training(config: ConfigDict) -> str:
    """What two arms have in common that differ only in what is read from the trained network."""
    shared = settings(config)
    for options in shared["method"].values():
        if isinstance(options, dict):
            options.pop("predict", None)
    return json.dumps(shared, sort_keys=True)


def trainings(configs: dict[str, ConfigDict]) -> list[dict[str, ConfigDict]]:
    """The arms in groups of which one training serves all."""
    groups: dict[str, dict] = {}
    for arm, config in configs.items():
        groups.setdefault(training(config), {})[arm] = config
    return list(groups.values())


def programs(configs: dict[str, ConfigDict]) -> list[dict[str, ConfigDict]]:
    """The arms in groups that share a compiled program: `trainings`, joined where they sweep."""
    groups: dict[str, dict] = {}
    for group in trainings(configs):
        config, *_ = group.values()
        key = program(group) if sweeps_anywhere(config) else training(config)
        groups.setdefault(key, {}).update(group)
    return list(groups.values())


# --- Runs


def make_probe(targets: Callable[[TrainState, Streams], Targets], data: task.Data):
    """state -> learned targets of the first training samples, un-augmented; never trains."""
    pools = data.pools._replace(clean=None)
    rows = Streams(*(np.arange(len(p.labels)) for p in (pools.candidates, pools.val)))
    shown = take(pools, rows._replace(candidates=rows.candidates[:PROBED]))
    wrong = data.wrong[:PROBED]

    def probe(state):
        learned = targets(state, shown)
        weights = np.asarray(learned.weights)
        means = {"right": weights[~wrong], "wrong": weights[wrong]}
        return learned, {f"weight_{k}": float(v.mean()) for k, v in means.items() if len(v)}

    return probe


def tested(method: Method, state: TrainState, data: task.Data) -> dict[str, float]:
    """ "test_" and its name -> a score of the test split, which this reads."""
    scores = task.test_scores(method, state, data)
    return {f"test_{name}": value for name, value in scores.items()}


def run(
    arms: dict[str, ConfigDict],
    compiled: dict,
    *,
    progress: bool = True,
    description: str = "",
    look: bool = True,
    measure: Measure = tested,
) -> dict[str, dict] | None:
    """Trains what the arms share, on their seed, and evaluates each; None when interrupted.

    The test split is read once an arm, with the last parameters, or those of the best record where
    the config says so (`train.keep_best`).

    Args:
      arms: of `trainings`, with one seed.
      compiled: keeps the methods and the runner of a training, so that further seeds do not compile
        again.
      progress: show a progress bar on stderr.
      description: its title.
      look: whether what a method learned of the training samples is recorded, too.
      measure: (method, state, data) -> what is recorded of the trained network.

    Returns:
      Arm -> record.
    """
    config, *_ = arms.values()
    data = task.make_data(config)
    if estimators.fits(config):
        return estimators.run(arms, data, measure)
    # Copies that are left out may differ by seed, and with them all sizes that a method holds.
    key = (training(config), tuple(arms), _shapes(data))
    if key not in compiled or build.of_labels(config):
        methods = _methods(arms, data)
        method, *_ = methods.values()
        runner = parallel.RUNNERS[config.runner](build.with_upstream(config, method).step)
        targets = jax.jit(method.targets) if look and build.learns(config) else None
        compiled[key] = methods, method, runner, targets
    methods, method, runner, targets = compiled[key]
    probe = None if targets is None else make_probe(targets, data)
    result = build.fit(
        config,
        data,
        method,
        runner,
        evaluate=_looked_at(probe),
        progress=progress,
        description=description,
    )
    if result.stopped_by is not None:
        return None
    return _records(arms, methods, result, data, probe, measure)


def _methods(arms: dict[str, ConfigDict], data: task.Data) -> dict[str, Method]:
    pools, columns = data.pools, data.source.columns
    return {arm: build.make_method(config, pools, columns) for arm, config in arms.items()}


def _looked_at(probe: Callable | None) -> Callable[[TrainState], dict[str, float]] | None:
    """What a probe says of a state, without the targets themselves."""
    return None if probe is None else lambda state: probe(state)[1]


def _records(arms, methods, result, data, probe, measure) -> dict[str, dict]:
    """Arm -> record, of a finished training."""
    config, *_ = arms.values()
    common = {
        # The first record holds the compilation.
        "seconds_per_step": float(np.median([r["seconds_per_step"] for r in result.history[1:]])),
        "history": result.history,
    }
    if build.keeps_best(config):
        common["best_step"] = int(result.state.step)
    if probe is not None:
        common["samples"] = figures.pick(data, probe(result.state)[0])
    return {arm: measure(m, result.state, data) | common for arm, m in zip(arms, methods.values())}


# --- Sweeps


def sweeps(config: ConfigDict) -> bool:
    """Whether runs that differ in seed or `build.SWEPT` options alone train in one program.

    They do where it pays: wherever `sweeps_anywhere`, and on an accelerator, which one small run
    cannot fill. On a CPU, convolutions with kernels of its own for each member take longer than the
    runs one after another.
    """
    if jax.default_backend() == "cpu":
        return sweeps_anywhere(config)
    return fits_one_program(config)


def sweeps_anywhere(config: ConfigDict) -> bool:
    """Whether a sweep pays on a CPU, too: for small networks of vectors (tables, features).

    Most of the time of their single step goes into starting operations, and of a short run into
    compilation. A program of several members does either once.
    """
    return config.model.name == "mlp" and fits_one_program(config)


def fits_one_program(config: ConfigDict) -> bool:
    """Whether one program can hold several seeds: without labels, episodes and data of the host."""
    return (
        config.runner == "jit"
        and config.data.on_device
        and not estimators.fits(config)
        and not build.of_labels(config)
        and configure.episode(config.method.to_dict()) is None
    )


def program(arms: dict[str, ConfigDict]) -> str:
    """What members of one sweep have in common: all settings but the seed and `build.SWEPT`."""
    return json.dumps([build.unswept(settings(config)) for config in arms.values()], sort_keys=True)


def run_sweep(
    members: Sequence[dict[str, ConfigDict]],
    data: Sequence[task.Data],
    compiled: dict,
    *,
    progress: bool = True,
    description: str = "",
    look: bool = True,
    measure: Measure = tested,
) -> list[dict[str, dict]] | None:
    """`run` of several members in one program; one result a member, None when interrupted.

    Their "seconds_per_step" are those of the sweep's step divided by the number of members.

    Args:
      members: of one `program`, each as `run` takes it.
      data: of the members, of one size.
      compiled: as of `run`.
      progress: likewise.
      description: likewise.
      look: likewise.
      measure: likewise.
    """
    arms, *_ = members
    configs = [next(iter(member.values())) for member in members]
    options = build.swept(configs)
    fixed = [settings(config) for config in arms.values()]  # what `options` does not hold
    values = {path: own.tolist() for path, own in options.items()}
    key = json.dumps([fixed, values], sort_keys=True), len(members), _shapes(data[0])
    if key not in compiled:
        compiled[key] = _compile_sweep(arms, data[0], options, len(members), look)
    methods, runner, targets = compiled[key]
    probes = [None] * len(members)
    if targets is not None:
        own = [{path: values[m] for path, values in options.items()} for m in range(len(members))]
        probes = [make_probe(partial(targets, o), d) for o, d in zip(own, data)]
    method, *_ = methods.values()
    results = build.fit_sweep(
        configs,
        data,
        method,
        runner,
        evaluates=None if targets is None else [_looked_at(probe) for probe in probes],
        progress=progress,
        description=description,
    )
    if results[0].stopped_by is not None:
        return None
    return [
        _records(member, methods, result, d, probe, measure)
        for member, result, d, probe in zip(members, results, data, probes)
    ]


def _compile_sweep(arms, data, options, number, look):
    """(arm -> method, runner, (options, state, streams) -> targets or None) of so many members."""
    config, *_ = arms.values()
    methods = _methods(arms, data)

    def make(options):
        if not options:
            return next(iter(methods.values()))
        return build.make_method(config, data.pools, data.source.columns, options=options)

    def step(state, streams, *, reduce, options=None):
        return build.with_upstream(config, make(options)).step(state, streams, reduce=reduce)

    devices = jax.devices()[: math.gcd(number, jax.device_count())]
    runner = parallel.sweep_runner(step, options=options or None, devices=devices)
    targets = jax.jit(lambda options, *given: make(options).targets(*given))
    return methods, runner, targets if look and build.learns(config) else None


def run_each(
    members: Sequence[dict[str, ConfigDict]], compiled: dict, *, progress: bool = True, **options
) -> Iterator[tuple[int, dict[str, dict] | Exception | None]]:
    """Trains all members, in one program those of which `sweeps` says that it pays.

    A sweep that fails is repeated one member after another, so that the others go on.

    Args:
      members: each as `run` takes it.
      compiled: as of `run`.
      progress: likewise.
      **options: likewise.

    Yields:
      (place of a member, what `run` returns), as they finish; an exception in the place of records.
    """
    programs = [
        program(arms) if sweeps(next(iter(arms.values()))) else place
        for place, arms in enumerate(members)
    ]
    for name in dict.fromkeys(programs):
        left = {place: members[place] for place, own in enumerate(programs) if own == name}
        try:
            for places, data in _parts(left) if len(left) > 1 else ():
                title = f"{_names(left[p] for p in places)}, {len(places)} runs at once"
                own = {"progress": progress, "description": title, **options}
                found = run_sweep([left[p] for p in places], data, compiled, **own)
                for number, place in enumerate(places):
                    yield place, found and found[number]
                    del left[place]
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            warnings.warn(f"its runs follow one by one, since a sweep failed: {what}", stacklevel=2)
        for place, arms in left.items():
            seed = next(iter(arms.values())).seed
            title = f"[{place + 1}/{len(members)}] {_names([arms])}, seed {seed}"
            try:
                found = run(arms, compiled, progress=progress, description=title, **options)
            except Exception as error:
                found = error
            yield place, found


def _names(members: Iterable[dict[str, ConfigDict]]) -> str:
    return ", ".join(dict.fromkeys(arm for arms in members for arm in arms))


def _parts(members: dict[int, dict[str, ConfigDict]]) -> Iterator[tuple[list[int], list]]:
    """(places, their data) of members that share a program: of one size, and not too many."""
    data, by_shape = {}, {}  # members of one seed have the same data
    for place, arms in members.items():
        config, *_ = arms.values()
        if config.seed not in data:
            data[config.seed] = task.make_data(config)
        by_shape.setdefault(_shapes(data[config.seed]), []).append((place, data[config.seed]))
    for same in by_shape.values():
        size = sum(x.nbytes for x in jax.tree.leaves(same[0][1].pools))
        most = max(1, SWEEP_BYTES // size)
        for part in np.array_split(np.arange(len(same)), -(-len(same) // most)):
            if len(part) > 1:
                yield [same[n][0] for n in part], [same[n][1] for n in part]


def _shapes(data: task.Data) -> tuple[tuple[int, ...], ...]:
    """Of all arrays that train or start a rule: what is left out may differ by seed."""
    return tuple(np.shape(x) for x in jax.tree.leaves((data.pools, data.start)))


# --- All runs of a comparison


def run_all(
    configs: dict[str, ConfigDict],
    seeds: Sequence[int],
    log: pathlib.Path,
    *,
    resume: bool,
    progress: bool = True,
    **options,
) -> dict[tuple[str, int], dict]:
    """Runs every arm on every seed (`run_each`); stops early when interrupted.

    Args:
      configs: arm -> its config, of `configs`.
      seeds: of the runs.
      log: a file of records, which grows by each finished run.
      resume: repeat no run of it whose settings are the arm's; else the file starts anew.
      progress: show progress bars on stderr.
      **options: of `run`.

    Returns:
      (arm, seed) -> record, of all runs unless interrupted.

    Raises:
      ValueError: runs are to be kept that read other data than there are now.
    """
    fixed = {arm: settings(config) for arm, config in configs.items()}
    if not resume:
        log.unlink(missing_ok=True)
    records = {
        (r["arm"], r["seed"]): r
        for r in json_lines.read(log)
        if r["settings"] == fixed.get(r["arm"]) and r["seed"] in seeds
    }
    _check_data(configs, records, log)
    groups = [(seed, group) for seed in seeds for group in trainings(configs)]
    left = [
        (seed, {arm: of_seed(config, seed) for arm, config in group.items()
                if (arm, seed) not in records})
        for seed, group in groups
    ]  # fmt: skip
    left = [(seed, arms) for seed, arms in left if arms]
    members = [arms for _, arms in left]
    for place, finished in run_each(members, {}, progress=progress, **options):
        if isinstance(finished, Exception):
            raise finished
        if finished is None:
            break
        seed, _ = left[place]
        for arm, record in finished.items():
            read = same_data.digests(of_seed(configs[arm], seed))
            about = {"arm": arm, "seed": seed, "settings": fixed[arm], "data": read}
            records[arm, seed] = about | record
        json_lines.append(log, *(records[arm, seed] for arm in finished))
    return records


def _check_data(
    configs: dict[str, ConfigDict], records: dict[tuple[str, int], dict], log: pathlib.Path
) -> None:
    """Raises ValueError where a record's data have changed; of older records they are not known."""
    for (arm, seed), record in records.items():
        if "data" not in record:
            continue
        now = same_data.digests(of_seed(configs[arm], seed))
        if changed := [name for name in now if record["data"].get(name) != now[name]]:
            raise ValueError(
                f"--resume must find the data of {log} as they were; {' and '.join(changed)} of "
                f"{configs[arm].data.name} differ now from those of {arm}, seed {seed}. Undo that, "
                "or start anew without --resume"
            )


# --- What they say


def paired_difference(values: list[float], base: list[float]) -> dict[str, float | None]:
    """Mean over seeds of what an arm has more than the base, and its interval of 95 %.

        d +- t_(0.975, n - 1) sd(d) / sqrt(n)

    Args:
      values, base: one number a seed, in the same order.

    Returns:
      {"mean": ..., "low": ..., "high": ...}; of one seed there is no interval, None.

    Source: Student's t, two-sided, on the differences of n pairs.
    """
    differences = np.subtract(values, base)
    mean, number = float(differences.mean()), len(differences)
    if number < 2:
        return {"mean": mean, "low": None, "high": None}
    error = differences.std(ddof=1) / np.sqrt(number)
    half = float(stats.t.ppf((1 + LEVEL) / 2, number - 1) * error)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summary(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """Arm -> its numbers.

    Args:
      runs: arm -> one record a seed, the same seeds for all; the first arm is the base.

    Returns:
      Arm -> {measure: one value a seed, "mean", "sd" (None of one seed), "n", "difference" (of
      `paired_difference`; None of the base), "seconds_per_step", "step_cost" (of the base's)}; the
      last two are None of what takes no steps.
    """
    measure = figures.measure(runs)
    values = {arm: [r[measure] for r in records] for arm, records in runs.items()}
    seconds = {arm: _seconds_per_step(records) for arm, records in runs.items()}
    base, *_ = runs
    return {
        arm: {
            measure: scores,
            "mean": float(np.mean(scores)),
            "sd": float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
            "n": len(scores),
            "difference": None if arm == base else paired_difference(scores, values[base]),
            "seconds_per_step": seconds[arm],
            "step_cost": seconds[arm] and seconds[base] and seconds[arm] / seconds[base],
        }
        for arm, scores in values.items()
    }


def _seconds_per_step(records: list[dict]) -> float | None:
    """Median over seeds; None of what takes no steps."""
    seconds = [r["seconds_per_step"] for r in records]
    return None if None in seconds else float(np.median(seconds))


def table(summary: dict[str, dict], measure: str) -> str:
    """The summary as aligned text."""
    base, *_ = summary
    spread = f"{measure.replace('_', ' ')} (mean +- sd over seeds)"
    apart = f"difference to {base} ({LEVEL:.0%} interval)"
    width = max(20, *map(len, summary))
    lines = [f"{'':{width}} {spread:38} {apart:38} ms/step   step cost"]
    for arm, row in summary.items():
        sd = "-" if row["sd"] is None else f"{row['sd']:.4f}"
        scores = f"{row['mean']:.4f} +- {sd}  (n = {row['n']})"
        time = "" if row["seconds_per_step"] is None else f"{1e3 * row['seconds_per_step']:7.2f}"
        cost = "" if row["step_cost"] is None else f"{row['step_cost']:10.2f}x"
        difference = difference_text(row["difference"])
        lines.append(f"{arm:{width}} {scores:38} {difference:38} {time} {cost}".rstrip())
    return "\n".join(lines)


def difference_text(interval: Mapping[str, float | None] | None, digits: int = 4) -> str:
    """Of `paired_difference`: "+0.0139 (-0.0164 to +0.0442)"; empty for None."""
    if interval is None:
        return ""
    mean, low, high = (interval[name] for name in ("mean", "low", "high"))
    if low is None:
        return f"{mean:+.{digits}f}"
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
