"""Adapters: any network as a `types.Model` of pure functions, with outputs in f32 or wider."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp

from saflex_jax.types import Model, Params, PyTree

if TYPE_CHECKING:
    from flax import nnx


def from_linen(module: nn.Module) -> Model:
    """A Linen module with __call__(inputs, *, train) as a Model.

    All collections but "params" are model_state, which only training mode updates. Training mode
    gets its key as the "dropout" stream.

    >>> from saflex_jax.models import MLP, Classifier
    >>> model = from_linen(Classifier(MLP((8,)), num_classes=3))
    >>> params, model_state = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> model.logits(params, model_state, jnp.zeros((5, 4))).shape
    (5, 3)

    Args:
      module: the network, returning logits f[B, K].
    """

    def init(key, inputs):
        variables = dict(module.init(key, inputs, train=False))
        return variables.pop("params"), variables

    def train(params, model_state, inputs, key):
        logits, updated = module.apply(
            {"params": params, **model_state},
            inputs,
            train=True,
            mutable=list(model_state),
            rngs={"dropout": key},
        )
        return _widened(logits), {**model_state, **updated}

    def logits(params, model_state, inputs):
        return _widened(module.apply({"params": params, **model_state}, inputs, train=False))

    return Model(init, train, logits)


def from_nnx(make_module: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """An NNX module as a Model, by split and merge; dropout and BatchNorm work.

    `nnx.Param` leaves are params; everything else (running statistics) is model_state. Random
    streams (dropout) restart from the key of each training call. Training and evaluation mode are
    NNX's own `train()` and `eval()`.

    >>> from flax import nnx
    >>> model = from_nnx(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
    >>> params, model_state = model.init(jax.random.key(0), None)
    >>> model.logits(params, model_state, jnp.zeros((5, 4))).shape
    (5, 3)

    Args:
      make_module: nnx.Rngs -> module with __call__(inputs) -> logits f[B, K].
    """
    from flax import nnx

    def split(module):
        graphdef, *parts = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return graphdef, *map(nnx.to_pure_dict, parts)

    # The graph definition holds no arrays: it comes from an abstract module, once for each mode.
    definitions = {}

    def definition(train: bool):
        if train not in definitions:

            def build():
                module = make_module(nnx.Rngs(0))
                module.train() if train else module.eval()
                return module

            graphdef, _, streams, _ = split(nnx.eval_shape(build))
            definitions[train] = graphdef, streams
        return definitions[train]

    def seeded(streams, key):
        def fresh(number, x):
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                return jax.random.split(jax.random.fold_in(key, number), x.shape)
            return jnp.zeros(x.shape, x.dtype)  # the counter of a stream

        leaves, structure = jax.tree.flatten(streams)
        return structure.unflatten([fresh(number, x) for number, x in enumerate(leaves)])

    def init(key, inputs):
        del inputs  # NNX modules know their shapes
        _, params, _, model_state = split(make_module(nnx.Rngs(key)))
        return params, model_state

    def run(train, params, model_state, inputs, key):
        graphdef, streams = definition(train)
        module = nnx.merge(graphdef, params, seeded(streams, key), model_state)
        logits = module(inputs)
        return _widened(logits), split(module)[3]

    def logits(params, model_state, inputs):
        return run(False, params, model_state, inputs, jax.random.key(0))[0]

    return Model(init, partial(run, True), logits)


def from_function(
    init: Callable[[jax.Array, PyTree], Params], apply: Callable[[Params, PyTree], jax.Array]
) -> Model:
    """A function as a Model without state; training and evaluation mode are the same.

    >>> model = from_function(lambda key, x: jnp.zeros((x.shape[1], 3)), lambda w, x: x @ w)
    >>> params, model_state = model.init(jax.random.key(0), jnp.zeros((1, 4)))
    >>> model.logits(params, model_state, jnp.zeros((5, 4))).shape
    (5, 3)

    Args:
      init: (key, inputs) -> params.
      apply: (params, inputs) -> logits f[B, K].
    """
    return Model(
        lambda key, inputs: (init(key, inputs), {}),
        lambda params, model_state, inputs, key: (_widened(apply(params, inputs)), model_state),
        lambda params, model_state, inputs: _widened(apply(params, inputs)),
    )


def _widened(outputs: PyTree) -> PyTree:
    """The network's outputs in f32, or in a wider dtype if they have it; integers stay.

    A method's or rule's softmax of logits in bfloat16 would round what is nearly sure.
    """

    def widened(x):
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if floating else x

    return jax.tree.map(widened, outputs)
