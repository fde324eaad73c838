"""Adapters: any network as a `types.Model` of pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import flax.linen as nn
import jax

from saflex_jax.types import Model, Params, PyTree

if TYPE_CHECKING:
    from flax import nnx


def from_linen(module: nn.Module) -> Model:
    """A Linen module with __call__(inputs, *, train) as a Model.

    Every collection but "params" is model_state; it is updated in training mode only. Training
    mode gets its key as the "dropout" stream.

    Args:
      module: the network, returning logits f32[B, K].
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
        return logits, {**model_state, **updated}

    def logits(params, model_state, inputs):
        return module.apply({"params": params, **model_state}, inputs, train=False)

    return Model(init, train, logits)


def from_nnx(make_module: Callable[[nnx.Rngs], nnx.Module]) -> Model:
    """An NNX module as a Model, by split and merge.

    `nnx.Param` leaves are params; everything else (running statistics, dropout counters) is
    model_state. Training and evaluation mode are NNX's own `train()` and `eval()`.

    Args:
      make_module: nnx.Rngs -> module with __call__(inputs) -> logits f32[B, K].
    """
    from flax import nnx

    # The graph definition holds no arrays, so it is taken from an abstract module, once.
    graphdefs = {}

    def definition(train: bool):
        if train not in graphdefs:

            def build():
                module = make_module(nnx.Rngs(0))
                module.train() if train else module.eval()
                return module

            graphdefs[train] = nnx.split(nnx.eval_shape(build), nnx.Param, ...)[0]
        return graphdefs[train]

    def init(key, inputs):
        del inputs  # NNX modules know their shapes
        module = make_module(nnx.Rngs(key))
        _, params, model_state = nnx.split(module, nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)

    def run(train, params, model_state, inputs):
        module = nnx.merge(definition(train), params, model_state)
        logits = module(inputs)
        return logits, nnx.to_pure_dict(nnx.split(module, nnx.Param, ...)[2])

    return Model(
        init,
        lambda params, model_state, inputs, key: run(True, params, model_state, inputs),
        lambda params, model_state, inputs: run(False, params, model_state, inputs)[0],
    )


def from_function(
    init: Callable[[jax.Array, PyTree], Params], apply: Callable[[Params, PyTree], jax.Array]
) -> Model:
    """A bare function as a Model: the same in training and evaluation mode, without state.

    Args:
      init: (key, inputs) -> params.
      apply: (params, inputs) -> logits f32[B, K].
    """
    return Model(
        lambda key, inputs: (init(key, inputs), {}),
        lambda params, model_state, inputs, key: (apply(params, inputs), model_state),
        lambda params, model_state, inputs: apply(params, inputs),
    )
