"""From a config to the objects of a run; every field is checked before anything is compiled."""

from __future__ import annotations

import json

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import estimators, task
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
    category_sizes,
    sizes,
    subset,
)
from saflex_jax.methods import METHODS
from saflex_jax.methods.upstream import upstream
from saflex_jax.types import Batch, Method, Model, RunInfo, Streams

SECTIONS = {
    "data": task.FIELDS,
    "optimizer": ("learning_rate", "weight_decay"),
    "train": ("steps", "batch_size", "val_batch_size", "log_every", "checkpoint_every"),
}


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
            _check_views(config)
    method = config.method.to_dict()
    configure.check(method)
    for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
        checks.positive(**{f"config.train.{name}": config.train[name]})
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


def _check_views(config: ConfigDict) -> None:
    """Refuses a pipeline that does not draw one of the views of a row's features."""
    rows = np.arange(4, dtype=np.int32)
    views = np.zeros((4, 3, 5), np.float32)
    batch = Batch(views, np.eye(4, 2, dtype=np.float32), rows < 4, rows)
    pipeline = augment.parse(config.augment)
    try:
        inputs = jax.eval_shape(pipeline, jax.random.key(0), batch).inputs
    except ValueError as error:
        raise ValueError(f"config.augment must start with view with features; {error}") from error
    if inputs.ndim != 2:
        raise ValueError(
            "config.augment must start with view with features, as 'view | mixup(0.2)' does; given "
            f"{config.augment!r}"
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
    """What fixes a run, as JSON keeps it: the config without the arms of a comparison."""
    return {name: value for name, value in json.loads(config.to_json()).items() if name != "arms"}


def of_labels(config: ConfigDict) -> bool:
    """Whether the method is made from the training labels, and so holds those of one seed."""
    return configure.of_labels(config.method.to_dict())


def learns(config: ConfigDict) -> bool:
    """Whether the method has a rule for weights and labels."""
    return config.method.rule != "as_given"


def make_input(
    config: ConfigDict, data: Data, runner: parallel.Runner
) -> tuple[parallel.Runner, train.loop.Stream]:
    """The runner, holding the data or not, and this process's share of its batches."""
    options = {
        "seed": config.seed,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if episode := configure.episode(config.method.to_dict()):
        return _episodes(config, data, runner, episode, options)
    options |= {
        "batch_size": config.train.batch_size,
        "val_batch_size": config.train.val_batch_size or None,
    }
    if config.data.folds:
        number, trusted = (len(pool.labels) for pool in data.pools[:2])
        options |= {"folds": config.data.folds, "trusted": np.arange(number - trusted, number)}
        return _held(config, data.pools, runner, FoldStream(sizes(data.pools), **options))
    if config.data.on_device:
        return runner.hold(data.pools), IndexStream(sizes(data.pools), **options)
    stream = ArrayStream(data.pools, generated=data.generated, **options)
    return runner, Prefetched(stream, place=runner.put_batch)


def _episodes(config, data, runner, episode, options):
    """`make_input` of episodes; there is nothing to validate on."""
    pools = Streams(data.pools.candidates)
    episodes = config.train.batch_size // data.together
    labels = pools.candidates.labels.argmax(1)
    stream = EpisodeStream(labels, **episode._asdict(), episodes=episodes, **options)
    return _held(config, pools, runner, stream)


def _held(config, pools, runner, rows):
    """`make_input` of a stream of rows."""
    if config.data.on_device:
        return runner.hold(pools), rows
    return runner, Prefetched(rows, place=lambda rows: runner.put_batch(take(pools, rows)))


def make_model(
    config: ConfigDict, pools: Streams, columns: tuple[Column, ...] | None = None
) -> Model:
    """The network that the method trains."""
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
    config: ConfigDict, pools: Streams, columns: tuple[Column, ...] | None = None
) -> Method:
    """The method alone; `with_upstream` puts the augmentation in front."""
    check(config)
    schedule = optax.cosine_decay_schedule(config.optimizer.learning_rate, config.train.steps)
    tx = optax.adamw(schedule, weight_decay=config.optimizer.weight_decay)
    if (what := config.model.get("tune", "all")) != "all":
        backbone = configure.make_backbone(config.model.to_dict())
        tx = models.only(tx, models.tuned(backbone, what))
    model = make_model(config, pools, columns)
    return configure.make_method(config.method.to_dict(), model, tx, run_info(config, pools))


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


def init_state(config: ConfigDict, method: Method, pools: Streams):
    """The state at step 0, by `config.seed`."""
    pool = pools.candidates if pools.val is None else pools.val  # candidates may have views
    first = subset(pool.inputs, np.arange(1))
    return method.init(jax.random.key(config.seed), floats(jax.tree.map(np.asarray, first)))


def fit(
    config: ConfigDict, data: Data, method: Method, runner: parallel.Runner, **options
) -> train.FitResult:
    """The config's run; `options` are those of `train.fit`."""
    runner, stream = make_input(config, data, runner)
    return train.fit(
        runner,
        init_state(config, method, data.pools),
        stream,
        num_steps=config.train.steps,
        log_every=config.train.log_every,
        **options,
    )
