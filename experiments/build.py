"""From a config to the objects of a run; every field is checked before anything is compiled."""

from __future__ import annotations

import inspect
import json
from functools import partial

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import task
from experiments.configs.methods import option_names, parameters, taken
from experiments.task import Data
from saflex_jax import augment, checks, models, parallel, train
from saflex_jax.batches import floats, take
from saflex_jax.core import losses
from saflex_jax.core.tree import identity, under
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
from saflex_jax.methods import METHODS, NETWORKS, PRIORS, REFINERS
from saflex_jax.types import Method, Model, Streams

LOSSES = {
    "cross_entropy": lambda: losses.weighted_soft_cross_entropy,
    "augmix": losses.augmix_loss,
    "decoupled_mixup": losses.decoupled_mixup_loss,
    "ldam": losses.ldam_loss,
}
BACKBONES = {
    "mlp": models.MLP,
    "ft_transformer": models.FTTransformer,
    "small_cnn": models.SmallCNN,
    "resnet18": models.ResNet18,
    "vit": models.ViT,
}
SCHEMA = {
    "data": task.FIELDS,
    "optimizer": ("learning_rate", "weight_decay"),
    "method": ("name", "refiner", "loss", *METHODS),
    "train": ("steps", "batch_size", "val_batch_size", "log_every", "checkpoint_every"),
}  # fmt: skip


def check(config: ConfigDict) -> None:
    """Raises ValueError on an unknown field (naming the nearest) or choice.

    `config.arms` is of a comparison, which looks at it (`experiments.arms`); a run does not.
    """
    checks.known("config", config, ("seed", "runner", "augment", "model", "arms", *SCHEMA))
    for section, accepted in SCHEMA.items():
        checks.known(f"config.{section}", config[section], accepted)
    checks.choice(parallel.RUNNERS, **{"config.runner": config.runner})
    task.check(config.data)
    checks.choice(BACKBONES, **{"config.model.name": config.model.name})
    checks.choice(METHODS, **{"config.method.name": config.method.name})
    checks.choice(LOSSES, **{"config.method.loss": config.method.loss})
    if refiner := config.method.get("refiner", ""):
        checks.choice(REFINERS, **{"config.method.refiner": refiner})
        if "refiner" not in parameters(METHODS[config.method.name]):
            raise ValueError(
                f"config.method.refiner must be '' with {config.method.name}; given {refiner!r}"
            )
    augment.parse(config.augment)
    backbone = inspect.signature(BACKBONES[config.model.name]).parameters
    accepted = {"name", "cosine", *backbone} - {"parent", "axis_name", "categories"}
    checks.known("config.model", config.model, accepted)
    for name in METHODS:
        checks.known(f"config.method.{name}", config.method.get(name, {}), option_names(name))
    for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
        checks.positive(**{f"config.train.{name}": config.train[name]})
    if config.method.name == "fixmatch" and not config.data.unlabelled:
        raise ValueError("config.data.unlabelled must be True with fixmatch; given False")
    if config.method.name == "protonet":
        _check_episodes(config)
    elif config.data.novel:
        raise ValueError(
            f"config.data.novel must be 0 with {config.method.name}, which knows the training "
            f"classes alone; given {config.data.novel}"
        )


def _check_episodes(config: ConfigDict) -> None:
    """What protonet cannot do, and a batch that is no whole episodes, are refused."""
    ways, shots, queries = task.episode(config).values()
    if config.train.batch_size % (ways * (shots + queries)):
        raise ValueError(
            "config.train.batch_size must be a multiple of the rows of an episode, "
            f"{ways} x ({shots} + {queries}); given {config.train.batch_size}"
        )
    for name, given, only in (
        ("method.loss", config.method.loss, "cross_entropy"),
        ("data.pool", config.data.pool, ""),
        ("data.unlabelled", config.data.unlabelled, False),
        ("model.cosine", config.model.get("cosine", False), False),
    ):
        if given != only:
            raise ValueError(f"config.{name} must be {only!r} with protonet; given {given!r}")


def settings(config: ConfigDict) -> dict:
    """What fixes a run, as JSON keeps it: the config without the arms of a comparison."""
    return {name: value for name, value in json.loads(config.to_json()).items() if name != "arms"}


def of_labels(config: ConfigDict) -> bool:
    """Whether the method is made from the training labels, and so holds those of one seed."""
    names = {config.method.name, config.method.get("refiner", "")} - {""}
    takers = [REFINERS.get(name, METHODS[name]) for name in names] + [LOSSES[config.method.loss]]
    return any({"prior", "counts"} & parameters(taker).keys() for taker in takers)


def learns(config: ConfigDict) -> bool:
    """Whether the method has a rule for weights and labels."""
    return (config.method.get("refiner", "") or config.method.name) in REFINERS


def make_input(
    config: ConfigDict, data: Data, runner: parallel.Runner
) -> tuple[parallel.Runner, train.loop.Stream]:
    """The runner, holding the data or not, and this process's share of its batches."""
    options = {
        "seed": config.seed,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    if config.method.name == "protonet":
        return _episodes(config, data, runner, options)
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


def _episodes(config, data, runner, options):
    """`make_input` of episodes; there is nothing to validate on."""
    pools, shape = Streams(data.pools.candidates), task.episode(config)
    episodes = config.train.batch_size // data.together
    labels = pools.candidates.labels.argmax(1)
    stream = EpisodeStream(labels, **shape, episodes=episodes, **options)
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
    name = config.method.name
    kwargs = {k: v for k, v in config.model.items() if k not in ("name", "cosine")}
    if isinstance(pools.candidates.inputs, dict):  # a table with categorical columns
        kwargs["categories"] = category_sizes(columns)
    backbone = BACKBONES[config.model.name]
    backbone = backbone(**kwargs, **taken(backbone, _mapped(config)))
    network = NETWORKS.get(name, models.Classifier)
    options = taken(network, method_options(config, name))
    found = network(backbone, pools.candidates.labels.shape[1], **options)
    if config.model.get("cosine", False):
        found = found.clone(cosine=True)
    return models.from_linen(found)


def make_method(
    config: ConfigDict, pools: Streams, columns: tuple[Column, ...] | None = None
) -> Method:
    """The method alone; `with_upstream` puts the augmentation in front."""
    check(config)
    name, rule = config.method.name, config.method.get("refiner", "")
    labels, options = pools.candidates.labels, method_options(config, name)
    schedule = optax.cosine_decay_schedule(config.optimizer.learning_rate, config.train.steps)
    tx = optax.adamw(schedule, weight_decay=config.optimizer.weight_decay)

    seen = partial(PRIORS[name], **taken(PRIORS[name], options)) if name in PRIORS else identity
    num_samples, num_classes = jax.eval_shape(seen, labels).shape
    by_run = _mapped(config) | {
        "num_samples": num_samples,
        "num_classes": num_classes,
        "num_trusted": _trusted(config, pools) * (num_samples // len(labels)),
        "num_val": 0 if pools.val is None else len(pools.val.labels),
        # Of all samples at once, since `seen` is linear: of SLA they are M^2 times the labels.
        "counts": np.asarray(seen(labels.sum(0, keepdims=True))).sum(0),
        "num_steps": config.train.steps,
        "steps_per_epoch": len(labels) / config.train.batch_size,
        "weak": config.augment,
    }

    def given(taker, options):
        found = taken(taker, options | by_run)
        return found | {"prior": seen(labels)} if "prior" in parameters(taker) else found

    found = given(REFINERS.get(name, METHODS[name]), options)
    if rule:
        found["refiner"] = REFINERS[rule](**given(REFINERS[rule], method_options(config, rule)))
    loss = LOSSES[config.method.loss]
    found |= taken(METHODS[name], {"loss": loss(**given(loss, {}))})
    return METHODS[name](make_model(config, pools, columns), tx, **found)


def _trusted(config: ConfigDict, pools: Streams) -> int:
    """How many candidates, the last ones, are validation samples."""
    return len(pools.val.labels) if config.data.train_on_val and not config.data.val_from else 0


def _mapped(config: ConfigDict) -> dict[str, str]:
    """The mapped axis, for batch statistics."""
    return {"axis_name": parallel.runners.AXIS} if config.runner == "pmap" else {}


def method_options(config: ConfigDict, name: str) -> dict:
    """The config's options of a method or rule; parameters by predicate."""
    options = dict(config.method.get(name, {}))
    if "predicate" in options:
        options["predicate"] = under(options["predicate"]) if options["predicate"] else None
    return options


def with_upstream(config: ConfigDict, method: Method) -> Method:
    """The method, fed by the config's upstream pipeline inside the compiled step."""
    return augment.upstream(method, augment.parse(config.augment))


def init_state(config: ConfigDict, method: Method, pools: Streams):
    """The state at step 0, by `config.seed`."""
    first = subset(pools.candidates.inputs, np.arange(1))
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
