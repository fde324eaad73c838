"""What AutoMix mixes through a training run, or what SLA says of each view after one: a figure.

    python -m experiments.gallery --config=experiments/configs/automix.py --workdir=runs/gallery

Trains the config's method, or that of one of its arms (--arm=samix), on one seed and shows
it at work on samples of the training split (AutoMix, AdAutoMix) or of the validation split (SLA).
The test split is not read.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags

from experiments import arms, build, style, task
from saflex_jax import checks, configure, parallel
from saflex_jax.augment.transformations import transformed
from saflex_jax.batches import take
from saflex_jax.methods import METHODS, mixtures, sla
from saflex_jax.methods.mixtures import MixtureOptions
from saflex_jax.types import Batch, Model, Streams, TrainState

_CONFIG = config_flags.DEFINE_config_file("config", "experiments/configs/automix.py")
_ARM = flags.DEFINE_string("arm", "", "Arm of the config; default: the config as it is.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/gallery", "The figure goes here.")
_PROGRESS = flags.DEFINE_bool("progress", True, "Show a progress bar on stderr.")

ROWS, MOMENTS = 4, 3  # pairs or samples shown; looks after each third of the run
LIKELIEST = 3  # classes of the aggregate that are shown
SHARE = 0.6  # lambda of the pairs that are shown


def samples(data: task.Data, *, of_val: bool) -> Batch:
    """The first sample of each of several classes, twice as many as are shown."""
    pool = data.pools.val if of_val else data.pools.candidates
    classes = np.argmax(pool.labels, -1)
    first = [np.flatnonzero(classes == k)[n] for n in range(2) for k in np.unique(classes)]
    chosen = take(Streams(pool), Streams(np.array(first[: 2 * ROWS]))).candidates
    return jax.tree.map(jnp.asarray, chosen)


@style.look()
def masks_through(
    config: ConfigDict,
    data: task.Data,
    model: Model,
    options: MixtureOptions,
    states: dict[int, TrainState],
) -> Figure:
    """Rows: a pair of images; columns: the pair, then mask and mixture after so many steps."""
    block, shown = options.make_block(), samples(data, of_val=False)
    rows = jnp.arange(2 * ROWS)
    partners = [(rows + ROWS * n) % len(rows) for n in range(options.images)]
    rest = (1 - SHARE) / (options.images - 1)
    shares = jnp.array([SHARE] + [rest] * (options.images - 1))
    mixture = mixtures.Mixture(jnp.stack(partners), shares)
    look = jax.jit(lambda state: mixtures.look(model, block, state, shown, mixture))

    figure = style.figure(
        1.25 * ROWS,
        f"What does {_ARM.value or config.method.name} mix, at lambda = {SHARE}? "
        f"{task.title(config.data)}, seed {config.seed}",
    )
    axes = figure.subplots(ROWS, 2 + 2 * len(states), squeeze=False)
    plain = {"weight": "normal", "loc": "center"}
    for column in range(2):
        for row in range(ROWS):
            _image(axes[row, column], shown.inputs[partners[column][row]])
        axes[0, column].set_title(("first", "second")[column], **plain)
    for place, (step, state) in enumerate(states.items()):
        masks, mixed = jax.device_get(look(state))
        mask_column, mixture_column = 2 + 2 * place, 3 + 2 * place
        for row in range(ROWS):
            drawn = axes[row, mask_column].imshow(masks[0, row], cmap="viridis", vmin=0, vmax=1)
            axes[row, mask_column].set_xlabel(f"mean {masks[0, row].mean():.2f}")
            _image(axes[row, mixture_column], mixed.inputs[row])
        axes[0, mask_column].set_title(f"mask,\nstep {step}", **plain)
        axes[0, mixture_column].set_title("mixture", **plain)
    _bare(axes)
    figure.colorbar(
        drawn, ax=axes, location="bottom", shrink=0.4, aspect=40,
        label="mask: share of the first image in a pixel",
    )  # fmt: skip
    return figure


@style.look()
def views_of(
    config: ConfigDict, data: task.Data, model: Model, options: sla.Options, state: TrainState
) -> Figure:
    """Rows: a sample; columns: its views, each with its likeliest class, then the aggregate."""
    shown = samples(data, of_val=True)
    shown = jax.tree.map(lambda x: x[:ROWS], shown)
    seen = transformed(jnp.asarray(shown.inputs), options.transformations)
    views = options.views
    joint = model.logits(state.params, state.model_state, seen)["joint"]
    # Of each view, given its transformation.
    of_view = joint.reshape(ROWS, views, -1, views)[:, np.arange(views), :, np.arange(views)]
    each = jax.nn.softmax(jnp.swapaxes(of_view, 0, 1))
    together = np.asarray(jax.nn.softmax(sla.aggregate(joint, views)))
    names = data.source.class_names or tuple(map(str, range(data.source.num_classes)))
    truth = np.argmax(shown.labels, -1)

    figure = style.figure(
        1.65 * ROWS,
        f"What does SLA say of each view, and of all together? {task.title(config.data)}, "
        f"validation samples, seed {config.seed}",
    )
    ratios = [*[1] * views, 1.6]
    axes = figure.subplots(ROWS, views + 1, squeeze=False, width_ratios=ratios)
    for row in range(ROWS):
        for view in range(views):
            best = int(each[row, view].argmax())
            _image(axes[row, view], seen[row * views + view])
            axes[row, view].set_title(
                f"{names[best]} {each[row, view, best]:.0%} {'✓' if best == truth[row] else '✗'}",
                fontsize=style.SMALL, weight="normal", loc="center",
                color=style.RIGHT if best == truth[row] else style.WRONG,
            )  # fmt: skip
        bars, best = axes[row, views], np.argsort(together[row])[::-1][:LIKELIEST]
        colours = [style.RIGHT if k == truth[row] else style.OTHER for k in best]
        bars.barh(range(len(best)), 100 * together[row, best], color=colours)
        bars.set(xlim=(0, 100), ylim=(len(best) - 0.4, -1.2))
        bars.set_yticks(range(len(best)), [names[k] for k in best])
        bars.tick_params(axis="y", length=0)
        bars.set_xlabel("probability, %" if row == ROWS - 1 else "")
    axes[0, views].set_title("all views together (green: right)", weight="normal")
    _bare(axes[:, :views])
    return figure


def _image(axis, image) -> None:
    image = np.clip(np.squeeze(np.asarray(image)), 0, 1)
    axis.imshow(image, cmap=style.PRINTED, vmin=0, vmax=1)


def _bare(axes) -> None:
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)


def is_drawn(options: Any) -> bool:
    """Whether there is a figure of the method with these options."""
    return isinstance(options, MixtureOptions) or getattr(options, "joint", False)


def main(argv: list[str]) -> None:
    """Trains, looks, draws."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    config, workdir = _CONFIG.value, pathlib.Path(_WORKDIR.value)
    build.check(config)
    if _ARM.value:
        configs = arms.configs(config)
        checks.choice(configs, **{"--arm": _ARM.value})
        config = configs[_ARM.value]
    options = configure.method_options(config.method.to_dict())
    if not is_drawn(options):
        accepted = [name for name, spec in METHODS.items() if is_drawn(spec.options)]
        raise app.UsageError(
            f"config.method must be one of {accepted} (of sla: mode sla or sd); "
            f"given {config.method.name} {options}"
        )
    data = task.make_data(config)
    model = build.make_model(config, data.pools, data.source.columns)
    method = build.make_method(config, data.pools, data.source.columns)
    runner = parallel.RUNNERS[config.runner](build.with_upstream(config, method).step)
    states = {0: build.init_state(config, method, data.pools)}

    records = config.train.steps // config.train.log_every

    def keep(state):
        states[int(state.step)] = jax.device_get(state)
        return {}

    result = build.fit(
        config,
        data,
        method,
        runner,
        evaluate=keep,
        eval_every=config.train.log_every * max(records // MOMENTS, 1),
        progress=_PROGRESS.value,
        description=f"{config.method.name} seed {config.seed}",
    )
    if result.stopped_by is not None:
        sys.exit(128 + result.stopped_by)
    if isinstance(options, MixtureOptions):
        figure = masks_through(config, data, model, options, states)
    else:
        figure = views_of(config, data, model, options, result.state)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / f"{_ARM.value or config.method.name}.png"
    style.save(figure, path)
    print(path)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # else JAX reports every backend it does not find
    app.run(main)
