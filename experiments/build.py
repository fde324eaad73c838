"""From a config to the objects of a run; every field is checked before anything is compiled."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import estimators, task
from experiments.cleaning import Start
from experiments.configs import sources
from experiments.task import Data
from saflex_jax import augment, checks, configure, methods, models, parallel, train
from saflex_jax.batches import floats, take
from saflex_jax.data import (
    ArrayStream,
    Column,
    EpisodeStream,
    FoldStream,
    IndexStream,
    Prefetched,
    StackedStream,
    category_sizes,
    sizes,
    subset,
)
from saflex_jax.methods import METHODS
from saflex_jax.methods.upstream import upstream
from saflex_jax.rules import started
from saflex_jax.types import Batch, Method, Model, RunInfo, Streams, TrainState

SECTIONS = {
    "data": sources.FIELDS,
    "optimizer": ("learning_rate", "weight_decay", "warmup"),
    "train": (
        *("steps", "batch_size", "val_batch_size", "log_every", "checkpoint_every"),
        "keep_best",
    ),
}
LATER = ("channels", "trusted")  # of `config.data`; runs from before them do not have them
# Options in which the members of a sweep may differ: one compiled program takes any value.
SWEPT = (
    *("optimizer.learning_rate", "optimizer.weight_decay"),
    *(f"method.saflex.rule.{name}" for name in ("lookahead", "sharpness", "agreement_decay")),
    "method.saflex.rule.memory.decay",
)


def check(config: ConfigDict) -> None:
    """Raises ValueError on an unknown field (naming the nearest) or choice.

    `config.arms` is of a comparison, which looks at it (`experiments.arms`); a run does not.
    """
    known = ("seed", "runner", "augment", "model", "method", "arms", *SECTIONS)
    checks.known("config", config, known)
    for section, accepted in SECTIONS.items():
        checks.known(f"config.{section}", config[section], accepted)
    checks.choice(parallel.RUNNERS, **{"config.runner": config.runner})
    task.check(config.data)
    augment.parse(config.augment)
    if estimators.fits(config):
        estimators.check(config)
    else:
        configure.check_model(config.model.to_dict())
        if config.data.features:
            _check_views(config.augment)
    method = config.method.to_dict()
    configure.check(method)
    checks.within(0, 2**32 - 1, **{"config.seed": config.seed})
    for name in ("learning_rate", "weight_decay"):
        checks.within(0, 100, **{f"config.optimizer.{name}": config.optimizer[name]})
    checks.whole(**{"config.train.val_batch_size": config.train.val_batch_size})
    for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
        checks.positive(**{f"config.train.{name}": config.train[name]})
    checks.whole(**{"config.optimizer.warmup": _warmup(config)})
    if _warmup(config) >= config.train.steps:
        raise ValueError(
            f"config.optimizer.warmup must be less than config.train.steps = {config.train.steps}; "
            f"given {_warmup(config)}"
        )
    if keeps_best(config):
        _check_keep_best(config)
    if config.model.name == configure.CLIP:
        _check_clip(config)
    if config.data.cleaning == "audit_first":
        _check_started(config)
    name = config.method.name
    if "clean" in METHODS[name].needs and not config.data.unlabelled:
        raise ValueError(f"config.data.unlabelled must be True with {name}; given False")
    if episode := configure.episode(method):
        _check_episodes(config, episode)
    elif config.data.novel:
        raise ValueError(
            f"config.data.novel must be 0 with {name}, which knows the training classes alone; "
            f"given {config.data.novel}"
        )


def _warmup(config: ConfigDict) -> int:
    """Steps in which the learning rate rises; most configs do not have the field."""
    return config.optimizer.get("warmup", 0)


def _check_clip(config: ConfigDict) -> None:
    """Refuses what trains no two towers, and options of towers, which their folder decides."""
    if config.method.name != "flyp":
        raise ValueError(
            f"config.method.name must be flyp with model.name={config.model.name!r}; given "
            f"{config.method.name!r}"
        )
    chosen, default = configure.method_options(config.method.to_dict()), METHODS["flyp"].options
    for name in ("embed_dim", "text"):
        if getattr(chosen, name) != getattr(default, name):
            raise ValueError(
                f"config.method.flyp.{name} must be left as it is with model.name="
                f"{config.model.name!r}, of which the folder of weights decides; given "
                f"{getattr(chosen, name)}"
            )


def _check_started(config: ConfigDict) -> None:
    """Refuses an audit's beliefs for a rule that keeps none."""
    rule = config.method.rule
    if rule != "saflex" or estimators.fits(config):
        raise ValueError(
            "config.method.rule must be 'saflex' with data.cleaning='audit_first', whose beliefs "
            f"that rule starts from; given {rule!r} with model.name={config.model.name!r}"
        )


def keeps_best(config: ConfigDict) -> bool:
    """Whether what is tested is the best state on the validation split (early stopping)."""
    return config.train.get("keep_best", False)  # older configs do not have it


def _check_keep_best(config: ConfigDict) -> None:
    """Refuses early stopping by validation samples that train, and where no steps are taken."""
    for name in ("train_on_val", "trusted_only", "unlabelled"):
        if config.data[name]:
            raise ValueError(
                f"config.data.{name} must be False with train.keep_best=True, which chooses by "
                "validation samples that do not train; given True"
            )
    if estimators.fits(config) or configure.episode(config.method.to_dict()):
        what = config.model.name if estimators.fits(config) else config.method.name
        raise ValueError(f"config.train.keep_best must be False with {what}; given True")


@functools.lru_cache  # a suite checks thousands of configs, and to trace takes its time
def _check_views(text: str) -> None:
    """Refuses a pipeline that does not draw one of the views of a row's features."""
    rows = np.arange(4, dtype=np.int32)
    views = np.zeros((4, 3, 5), np.float32)
    batch = Batch(views, np.eye(4, 2, dtype=np.float32), rows < 4, rows)
    pipeline = augment.parse(text)
    try:
        inputs = jax.eval_shape(pipeline, jax.random.key(0), batch).inputs
    except ValueError as error:
        raise ValueError(f"config.augment must start with view with features; {error}") from error
    if inputs.ndim != 2:
        raise ValueError(
            "config.augment must start with view with features, as 'view | mixup(0.2)' does; given "
            f"{text!r}"
        )


def _check_episodes(config: ConfigDict, episode: methods.Episode) -> None:
    """Refuses a batch that is no whole episodes, and what has no meaning for episodes."""
    ways, shots, queries = episode
    if config.train.batch_size % (ways * (shots + queries)):
        raise ValueError(
            "config.train.batch_size must be a multiple of the rows of an episode, "
            f"{ways} x ({shots} + {queries}); given {config.train.batch_size}"
        )
    name = config.method.name
    for field, given, only in (
        ("data.pool", config.data.pool, ""),
        ("data.unlabelled", config.data.unlabelled, False),
        ("model.cosine", config.model.get("cosine", False), False),
    ):
        if given != only:
            raise ValueError(f"config.{field} must be {only!r} with {name}; given {given!r}")


def settings(config: ConfigDict) -> dict:
    """What fixes a run, as JSON keeps it: the config without the arms of a comparison.

    Fields of LATER are there only where they are set, so that runs from before them go on.
    """
    fixed = {name: value for name, value in json.loads(config.to_json()).items() if name != "arms"}
    if not keeps_best(config):
        fixed["train"].pop("keep_best", None)
    for name in LATER:
        if not fixed["data"].get(name):
            fixed["data"].pop(name, None)
    return fixed


def unswept(settings: dict) -> dict:
    """The settings without the numbers of `SWEPT` options; changed in place."""
    for path in SWEPT:
        section, name = _place(settings, path)
        if isinstance(section.get(name), float):  # None is no number: another program
            section[name] = "swept"
    return settings


def swept(configs: Sequence[ConfigDict]) -> dict[str, np.ndarray]:
    """Path of `SWEPT` -> values f32[S], of those in which the members of one program differ."""
    found = {}
    for path in SWEPT:
        places = [_place(config, path) for config in configs]
        values = [section.get(name) for section, name in places]
        if len(set(values)) > 1:
            found[path] = np.array(values, np.float32)
    return found


def _place(settings: Mapping, path: str) -> tuple[Mapping, str]:
    """The section of a dotted path, empty where there is none, and the name in it."""
    *sections, name = path.split(".")
    for section in sections:
        settings = settings.get(section, {})
    return settings, name


def of_labels(config: ConfigDict) -> bool:
    """Whether the method is made from the training labels, and so holds those of one seed."""
    return configure.of_labels(config.method.to_dict())


def learns(config: ConfigDict) -> bool:
    """Whether the method has a rule for weights and labels."""
    return config.method.rule != "as_given"


def make_rows(config: ConfigDict, data: Data) -> tuple[Streams, IndexStream | FoldStream]:
    """The data sets of a run, and this process's share of its batches as rows of them."""
    options = _of_process(config)
    if episode := configure.episode(config.method.to_dict()):
        pools = Streams(data.pools.candidates)  # there is nothing to validate on
        episodes = config.train.batch_size // data.together
        labels = pools.candidates.labels.argmax(1)
        return pools, EpisodeStream(labels, **episode._asdict(), episodes=episodes, **options)
    options |= _batch_sizes(config)
    if not config.data.folds:
        return data.pools, IndexStream(sizes(data.pools), **options)
    number, trusted = (len(pool.labels) for pool in data.pools[:2])
    options |= {"folds": config.data.folds, "trusted": np.arange(number - trusted, number)}
    return data.pools, FoldStream(sizes(data.pools), **options)


def _of_process(config: ConfigDict) -> dict[str, int]:
    return {
        "seed": config.seed,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }


def _batch_sizes(config: ConfigDict) -> dict[str, int | None]:
    return {
        "batch_size": config.train.batch_size,
        "val_batch_size": config.train.val_batch_size or None,
    }


def make_input(
    config: ConfigDict, data: Data, runner: parallel.Runner
) -> tuple[parallel.Runner, train.loop.Stream]:
    """The runner, holding the data or not, and this process's share of its batches."""
    pools, rows = make_rows(config, data)
    if config.data.on_device:
        return runner.hold(pools), rows
    if type(rows) is not IndexStream:
        return runner, Prefetched(rows, place=lambda rows: runner.put_batch(take(pools, rows)))
    options = _of_process(config) | _batch_sizes(config)
    stream = ArrayStream(pools, generated=data.generated, **options)
    return runner, Prefetched(stream, place=runner.put_batch)


def make_model(
    config: ConfigDict, pools: Streams, columns: tuple[Column, ...] | None = None
) -> Model:
    """The network that the method trains.

    Raises:
      ValueError: a network for images where the inputs are none.
    """
    shown = (pools.candidates if pools.val is None else pools.val).inputs
    if config.model.name in configure.OF_IMAGES and np.ndim(shown) != 4:
        given = "a table with categories" if isinstance(shown, dict) else list(np.shape(shown))
        raise ValueError(
            f"config.model.name must be a network that takes more than images [N, H, W, C], "
            f"such as mlp, for {config.data.name}, whose inputs are {given}; given "
            f"{config.model.name!r}"
        )
    if config.model.name == configure.CLIP:
        return configure.make_clip(config.model.to_dict())
    has_categories = isinstance(pools.candidates.inputs, dict)
    backbone = configure.make_backbone(
        config.model.to_dict(),
        axis_name=_axis_name(config),
        categories=category_sizes(columns) if has_categories else None,
    )
    num_classes = pools.candidates.labels.shape[1]
    network = configure.make_network(config.method.to_dict(), backbone, num_classes)
    if config.model.get("cosine", False):
        network = network.clone(cosine=True)
    model = models.from_linen(network)
    if weights := config.model.get("weights", ""):
        state = models.read_weights(weights)
        model = models.with_weights(model, models.from_torchvision(state, backbone))
    return model


def make_method(
    config: ConfigDict,
    pools: Streams,
    columns: tuple[Column, ...] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
) -> Method:
    """The method alone; `with_upstream` puts the augmentation in front.

    Args:
      config: is checked.
      pools: of the run.
      columns: of a table.
      options: path of `SWEPT` -> value, possibly traced, in the place of the config's.
    """
    check(config)
    checks.known("options", options or {}, SWEPT)
    chosen = _with_options(config.to_dict(), options or {})
    rate, decay = (chosen["optimizer"][name] for name in ("learning_rate", "weight_decay"))
    schedule = optax.cosine_decay_schedule(rate, config.train.steps)
    if warmup := _warmup(config):
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, config.train.steps)
    tx = optax.adamw(schedule, weight_decay=decay)
    if (what := config.model.get("tune", "all")) != "all":
        backbone = configure.make_backbone(config.model.to_dict())
        tx = models.only(tx, models.tuned(backbone, what))
    model = make_model(config, pools, columns)
    return configure.make_method(chosen["method"], model, tx, run_info(config, pools))


def _with_options(settings: dict, options: Mapping[str, Any]) -> dict:
    """The settings with other values at these dotted paths; changed in place."""
    for path, value in options.items():
        section, name = _place(settings, path)
        section[name] = value
    return settings


def run_info(config: ConfigDict, pools: Streams) -> RunInfo:
    """What the run knows before its first step."""
    labels = pools.candidates.labels
    num_samples, num_classes = labels.shape
    return RunInfo(
        num_samples,
        num_classes,
        num_trusted=_trusted(config, pools),
        num_val=0 if pools.val is None else len(pools.val.labels),
        num_steps=config.train.steps,
        steps_per_epoch=num_samples / config.train.batch_size,
        counts=np.asarray(labels.sum(0)),
        labels=lambda: labels,
        upstream=config.augment,
        axis_name=_axis_name(config),
        captions=task.captions(config.data),
    )


def _trusted(config: ConfigDict, pools: Streams) -> int:
    """How many candidates, the last ones, are validation samples."""
    if config.data.trusted_only:
        return len(pools.candidates.labels)
    return len(pools.val.labels) if config.data.train_on_val and not config.data.val_from else 0


def _axis_name(config: ConfigDict) -> str | None:
    """The mapped axis, for batch statistics."""
    return parallel.runners.AXIS if config.runner == "pmap" else None


def with_upstream(config: ConfigDict, method: Method) -> Method:
    """The method, fed by the config's upstream pipeline inside the compiled step."""
    return upstream(method, augment.parse(config.augment))


def init_state(
    config: ConfigDict, method: Method, pools: Streams, start: Start | None = None
) -> TrainState:
    """The state at step 0, by `config.seed`; its rule starts from what `start` believes."""
    pool = pools.candidates if pools.val is None else pools.val  # candidates may have views
    first = subset(pool.inputs, np.arange(1))
    state = method.init(jax.random.key(config.seed), floats(jax.tree.map(np.asarray, first)))
    if start is None:
        return state
    extra = started(state.extra, start.beliefs, noise_rate=start.noise_rate)
    return state._replace(extra=extra)


# --- Runs


def fit(
    config: ConfigDict,
    data: Data,
    method: Method,
    runner: parallel.Runner,
    *,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    eval_every: int | None = None,
    checkpoints: train.Checkpoints | None = None,
    **options,
) -> train.FitResult:
    """The config's run; `options` and what is not said here as of `train.fit`.

    With early stopping (`keeps_best`) every record is evaluated, the result's state is the best
    one, and checkpoints of it go into a folder "best" beside the run's.

    Args:
      config, data, method, runner: of the run.
      evaluate: as of `train.fit`.
      eval_every: as of `train.fit`; None = for every record.
      checkpoints: as of `train.fit`.
      **options: the others.
    """
    runner, stream = make_input(config, data, runner)
    with _early_stopping(config, _validation(config, method, data), checkpoints) as best:
        result = train.fit(
            runner,
            init_state(config, method, data.pools, data.start),
            stream,
            checkpoints=checkpoints,
            **_course(config, best, evaluate, every=eval_every if best is None else None),
            **options,
        )
        if best is None or result.stopped_by is not None:
            return result
        best.restore(result.state)
        return result._replace(state=best.state)


def fit_sweep(
    configs: Sequence[ConfigDict],
    data: Sequence[Data],
    method: Method,
    runner: parallel.Runner,
    *,
    evaluates: Sequence[Callable[[TrainState], dict[str, float]]] | None = None,
    **options,
) -> list[train.FitResult]:
    """`fit` of the members of a sweep in one program; one result a member.

    Args:
      configs: one a member; they differ in seed and `SWEPT` options.
      data: one a member, all of one size; the same object where members have the same data.
      method: of the first member.
      runner: of `parallel.sweep_runner`.
      evaluates: one a member, as `fit` takes it.
      **options: of `train.fit`.
    """
    config, *_ = configs
    pools, rows = zip(*(make_rows(c, d) for c, d in zip(configs, data)))
    shared = all(d is data[0] for d in data)
    start = [init_state(c, method, pool, d.start) for c, pool, d in zip(configs, pools, data)]
    validations = [_validation(config, method, d) for d in data]
    validation = train.evaluate_each(validations) if keeps_best(config) else None
    evaluate = None if evaluates is None else train.evaluate_each(evaluates)
    with _early_stopping(config, validation) as best:
        result = train.fit(
            runner.hold(pools[0] if shared else pools),
            parallel.stack_states(start),
            StackedStream(rows),
            **_course(config, best, evaluate),
            **options,
        )
    if best is None or result.stopped_by is not None:
        states = [parallel.member(result.state, m) for m in range(len(configs))]
    else:
        states = [best.of_member(m) for m in range(len(configs))]
    # Of a sweep that stopped before its first record, or resumed at its end, nobody has a record.
    histories = train.of_members(result.history) if result.history else [[] for _ in configs]
    return [result._replace(state=s, history=h) for s, h in zip(states, histories)]


def _course(
    config: ConfigDict, *evaluates: Callable | None, every: int | None = None
) -> dict[str, Any]:
    """Options of `train.fit`: how long, and what is evaluated; None = for every record."""
    asked = [evaluate for evaluate in evaluates if evaluate is not None]
    course = {"num_steps": config.train.steps, "log_every": config.train.log_every}
    if not asked:
        return course

    def evaluate(state):
        return {name: value for each in asked for name, value in each(state).items()}

    return course | {"evaluate": evaluate, "eval_every": every or config.train.log_every}


def _validation(config: ConfigDict, method: Method, data: Data) -> Callable | None:
    """What early stopping chooses by: accuracy on the validation split; None without it."""
    if not keeps_best(config):
        return None
    if data.source.task == "multilabel":
        raise ValueError(
            f"config.train.keep_best must be False for {config.data.name}, whose labels are no "
            "classes; given True"
        )
    return train.make_evaluator(method, data.held_out.inputs, data.held_out.labels)


@contextlib.contextmanager
def _early_stopping(
    config: ConfigDict, validation: Callable | None, checkpoints: train.Checkpoints | None = None
) -> Iterator[train.Best | None]:
    """The `Best` of a run, None without early stopping; closes the checkpoints that it has."""
    if not keeps_best(config):
        yield None
    elif checkpoints is None:
        yield train.Best(validation)
    else:
        kept = checkpoints.sibling("best", every=1, keep=1)
        with contextlib.closing(kept):
            yield train.Best(validation, checkpoints=kept)
