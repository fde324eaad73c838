"""How strong, and how often: chosen by a population of pipelines, on pretrained features.

    python -m experiments.population --task=cifar10n [--seeds=3] [--first_seed=0]

Utilities that look one step ahead do not see augmentation that keeps its label and is merely too
strong. Here RandAugment's strength m and its probability p are continuous options of one vmapped
sweep. Each setting trains on four fifths of the few samples and is judged by the loss on the other
fifth, for each of the fifths. Settings about as good as the best are mixed, and the mixture trains
on all samples. Beside it every fixed setting, also on all, and the pipeline that adjusts itself by
utilities. The test split decides nothing.

    views of strengths 0, 4, ..., 20 of each sample, once  ->  share of each from (m, p)  ->  sweep
    ->  held-out losses  ->  share of each strength in the mixture  ->  one run
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats
from tqdm import tqdm

from experiments import features, json_lines, sweeps, task
from experiments.feature_sets import feature_set
from saflex_jax import data, models, parallel
from saflex_jax.augment import of_views
from saflex_jax.batches import floats
from saflex_jax.data.prepared import file_digest
from saflex_jax.data.seeds import generator
from saflex_jax.files import renamed
from saflex_jax.methods import adjusted, supervised
from saflex_jax.methods.upstream import upstream
from saflex_jax.models import MLP, Classifier
from saflex_jax.types import Batch, Streams

STRENGTHS = (0.0, 4.0, 8.0, 12.0, 16.0, 20.0)  # of randaugment(2, m); 0 = as it is
DRAWS = 3  # views of each strength but 0
SETTINGS = [(0.0, 1.0), *((m, p) for m in STRENGTHS[1:] for p in (0.5, 1.0))]
PER_CLASS, FOLDS = 30, 5
STEPS, BATCH, WIDTH = 400, 64, 64
TAG = "crop"  # feature set whose test rows are read


def settings() -> list:
    """What fixes a record beside its task and seed; records of other settings are made again."""
    constants = [STRENGTHS, DRAWS, SETTINGS, PER_CLASS, FOLDS, STEPS, BATCH, WIDTH, TAG]
    return [*constants, repr(adjusted.Options()), mixed.__name__]


class Few(NamedTuple):
    """One seed's samples: views f32[n, V, D] and labels, and the test split's."""

    views: np.ndarray
    labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def group_of_views() -> np.ndarray:
    """i[V], the strength of each view, as a place in STRENGTHS."""
    return np.array([0, *np.repeat(np.arange(1, len(STRENGTHS)), DRAWS)])


def shares(strength: jax.Array, probability: jax.Array) -> jax.Array:
    """How often each strength's views are drawn, f32[G].

        p_g = (1 - p) 1[g = 0] + p tri_g(m)

    with m divided between its two neighbours among STRENGTHS.

    >>> shares(6.0, 0.5).round(2).tolist()
    [0.5, 0.25, 0.25, 0.0, 0.0, 0.0]
    """
    known = jnp.array(STRENGTHS)
    tri = jnp.maximum(1 - jnp.abs(known - strength) / (STRENGTHS[1] - STRENGTHS[0]), 0)
    return (1 - probability) * (known == 0) + probability * tri / jnp.sum(tri)


def make_few(name: str, folder: str, seed: int, cache: pathlib.Path) -> Few:
    """Chooses the samples, and computes their views once, in a file named by what they are of."""
    whole = feature_set(name, folder, TAG)
    seen = len(whole.source.views)
    labels = whole.source.labels[:seen]
    places = data.few_shot(labels, per_class=PER_CLASS, seed=seed)
    options = whole.options
    made_of = json.dumps([STRENGTHS, DRAWS, dict(options), whole.rows[places].tolist()]).encode()
    digest = hashlib.sha256(made_of + whole.prints[places].tobytes()).hexdigest()[:12]
    file = cache / f"{name}_{seed}_{digest}.npy"
    if not file.exists():
        weights = f"{folder}/weights/{options['backbone']}.pkl"
        if file_digest(weights) != options["weights"]:
            raise ValueError(f"{weights} must be the weights of the set {TAG}; it has others")
        views = _views(name, folder, whole, places, weights)
        with renamed(file) as part, open(part, "wb") as opened:
            np.save(opened, views)
    views = np.load(file)
    scale = data.fit_scale(views[:, 0])
    flat = scale(views.reshape(-1, views.shape[-1]))[:].reshape(views.shape)
    test = scale(whole.source.inputs)[np.arange(seen, len(whole.rows))]
    return Few(flat, labels[places], test, whole.source.labels[seen:])


def _views(name, folder, whole, places, weights) -> np.ndarray:
    source = task.opened(name, folder, whole.options["pixels"], "", False)
    rows = whole.rows[places]
    base = {k: whole.options[k] for k in ("backbone", "size", "pixels")}
    network = features.load_network(features.Options(**base), weights)
    parts = []
    for strength in tqdm(STRENGTHS[1:], desc=f"views of {name}", leave=False):
        views = 1 + DRAWS
        options = features.Options(**base, views=views, augment=f"randaugment(2, {strength:g})")
        extract = features.make_extractor(*network, options, views)
        size, made = features.IMAGES // views, []
        for begin in range(0, len(rows), size):
            chunk = rows[np.minimum(np.arange(begin, begin + size), len(rows) - 1)]
            images = np.asarray(floats(np.asarray(source.inputs[chunk])))
            made.append(np.asarray(extract(images, chunk.astype(np.int32))[0]))
        made = np.concatenate(made)[: len(rows)]
        parts.append(made if not parts else made[:, 1:])
    return np.concatenate(parts, 1)


def mixed(losses: np.ndarray) -> np.ndarray:
    """The share of each strength in the mixture of settings, f64[G].

        p = sum_s w_s p(m_s, p_s) / sum_s w_s ,   w_s = (2 P(d_s < 0))^2

    with d_s the mean over samples of l_si - l_bi, b the best setting, and P from the mean's
    Gaussian. The best alone would be chosen by chance among settings that are alike.

    Args:
      losses: l, f[S, n], of SETTINGS on each sample, which did not train.
    """
    apart = losses - losses[losses.mean(1).argmin()]
    error = apart.std(1, ddof=1) / np.sqrt(losses.shape[1])
    weight = (2 * stats.norm.cdf(-apart.mean(1) / np.maximum(error, 1e-12))) ** 2
    each = np.stack([shares(*setting) for setting in SETTINGS])
    return weight / weight.sum() @ each


def run_seed(few: Few, seed: int) -> dict:
    """Trains all settings on all parts, then their mixture; the accuracy of each."""
    number, classes = len(few.labels), int(few.labels.max()) + 1
    fold = np.empty(number, int)
    fold[generator("folds", seed).permutation(number)] = np.arange(number) % FOLDS
    parts = [np.flatnonzero(fold != k) for k in range(FOLDS)] + [np.arange(number)]
    network = models.from_linen(Classifier(MLP((WIDTH,)), classes))
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, STEPS), weight_decay=1.0)
    plain = supervised.make(network, tx)
    alternatives = of_views(group_of_views(), [f"{m:g}" for m in STRENGTHS])

    def step(state, streams, *, reduce, options):
        def augment(key, batch):
            return alternatives.draw(key, batch, jnp.log(options["share"]))[0]

        return upstream(plain, augment).step(state, streams, reduce=reduce)

    rows = np.arange(number, dtype=np.int32)
    labels = np.eye(classes, dtype=np.float32)[few.labels]
    pools = Streams(Batch(few.views, labels, rows >= 0, rows))

    def stream(part):
        rows = Streams(parts[part])
        return data.PartStream(rows, batch_size=BATCH, seed=seed * 100 + part)

    @jax.jit
    def outcome(params):
        held = network.logits(params, {}, few.views[:, 0])
        losses = optax.softmax_cross_entropy_with_integer_labels(held, few.labels)
        right = network.logits(params, {}, few.test).argmax(1) == few.test_labels
        return losses, jnp.mean(right)

    def trained(on, share):
        streams, options = [stream(part) for part in on], {"share": share.astype(np.float32)}
        state = _train(step, plain, pools, streams, options, seed)
        return [jax.tree.map(np.asarray, outcome(parallel.member(state, m).params))
                for m in range(len(on))]  # fmt: skip

    each = np.repeat([shares(*setting) for setting in SETTINGS], FOLDS + 1, axis=0)
    found = trained([*range(FOLDS + 1)] * len(SETTINGS), each)
    places = [s * (FOLDS + 1) + fold for s in range(len(SETTINGS))]  # who did not train on each
    losses = np.array([[found[run][0][row] for row, run in enumerate(of)] for of in places])
    accuracy = [float(found[s * (FOLDS + 1) + FOLDS][1]) for s in range(len(SETTINGS))]
    share = mixed(losses)
    last = trained([FOLDS], share[None])
    utility = _adjusted(plain, alternatives, pools, few, network, seed)
    return {"loss": losses.mean(1).tolist(), "accuracy": accuracy, "share": share.tolist(),
            "mixed": float(last[0][1]), **utility}  # fmt: skip


def _adjusted(plain, alternatives, pools, few, network, seed) -> dict:
    """The first-order rule alone: from equal shares on, directed by the samples as they are."""
    method = adjusted.adjusted(plain, alternatives)
    val = pools.candidates._replace(inputs=few.views[:, 0])
    pools = pools._replace(val=val)
    streams = [data.IndexStream(data.sizes(pools), batch_size=BATCH, seed=seed * 100 + FOLDS)]

    def step(state, streams, *, reduce):
        return method.step(state, streams, reduce=reduce)

    state = parallel.member(_train(step, method, pools, streams, None, seed), 0)
    right = np.asarray(network.logits(state.params, {}, few.test)).argmax(1) == few.test_labels
    return {"by_utility": float(right.mean())}


def _train(step, method, pools, streams, options, seed):
    example = np.zeros((1, pools.candidates.inputs.shape[-1]), np.float32)
    first = method.init(jax.random.key(seed), example)
    runner = parallel.sweep_runner(step, options=options, devices=jax.devices()[:1]).hold(pools)
    title = f"{len(streams)} runs at once"
    return sweeps.trained(runner, [first] * len(streams), streams, steps=STEPS, title=title)


def report(records: Sequence[dict]) -> str:
    """The table of one task."""
    accuracy = 100 * np.array([r["accuracy"] for r in records])
    lines = [f"{'m':>4} {'p':>4} {'test accuracy':>16} {'held-out loss':>14}"]
    for s, (m, p) in enumerate(SETTINGS):
        mean, loss = accuracy[:, s].mean(), np.mean([r["loss"][s] for r in records])
        lines.append(f"{m:4g} {p:4g} {mean:16.2f} {loss:14.4f}")
    best = accuracy.mean(0).max()
    by_loss = np.array([accuracy[n, np.argmin(r["loss"])] for n, r in enumerate(records)])
    mixture, by_utility = (
        100 * np.array([r[key] for r in records]) for key in ("mixed", "by_utility")
    )
    lines += [
        f"best fixed setting, by the test split: {best:.2f}",
        _beside("population, mixed by held-out losses", mixture, best),
        _beside("the one of least held-out loss", by_loss, best),
        _beside("adjusted by utilities alone", by_utility, best),
    ]
    return "\n".join(lines)


def _beside(name: str, accuracy: np.ndarray, best: float) -> str:
    spread = np.std(accuracy, ddof=min(1, len(accuracy) - 1))
    return f"{name}: {accuracy.mean():.2f} +- {spread:.2f} ({accuracy.mean() - best:+.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is left of a task, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--task", default="cifar10n", help="a data set with features under the tag " + TAG)
    add("--seeds", type=int, default=3)
    add("--first_seed", type=int, default=0)
    add("--data", default="data", help="where experiments.prepare put data sets")
    add("--workdir", type=pathlib.Path, default=pathlib.Path("runs/population"))
    given = parser.parse_args(arguments)
    given.workdir.mkdir(parents=True, exist_ok=True)
    log = given.workdir / f"{given.task}.jsonl"
    now = json.loads(json.dumps(settings()))
    records = {r["seed"]: r for r in json_lines.read(log) if r["settings"] == now}
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    for seed in seeds:
        if seed not in records:
            few = make_few(given.task, given.data, seed, given.workdir)
            records[seed] = {"seed": seed, "settings": now, **run_seed(few, seed)}
            json_lines.append(log, records[seed])
    print(report([records[seed] for seed in seeds]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
