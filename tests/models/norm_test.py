"""The normalisations against flax's, and the precision of what follows them."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.core.scores import in_dtype
from saflex_jax.models import FTTransformer, ViT
from saflex_jax.models.norm import GroupNorm, LayerNorm

KEY = jax.random.key(0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(GroupNorm(4), nn.GroupNorm(4)), (LayerNorm(), nn.LayerNorm())],
    ids=["group", "layer"],
)
def test_half_precision_is_flaxs(ours, theirs, dtype):
    x = np.random.default_rng(0).normal(30, 300, (3, 5, 5, 8)).astype(dtype)
    params = {"scale": np.linspace(0.5, 1.5, 8), "bias": np.linspace(-1, 1, 8)}
    for kept in (dtype, "float32"):  # of the parameters
        variables = {"params": {name: v.astype(kept) for name, v in params.items()}}
        found, expected = (norm.apply(variables, x) for norm in (ours, theirs))
        assert found.dtype == expected.dtype == kept
        step = float(jnp.finfo(kept).eps)
        found, expected = np.float32(found), np.float32(expected)
        np.testing.assert_allclose(found, expected, rtol=2 * step, atol=max(step, 1e-5))


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (ViT(width=16, depth=1, heads=2, mlp_width=16), np.ones((2, 8, 8, 3), np.float32)),
        (FTTransformer(width=16, depth=2, heads=2, mlp_width=16), np.ones((2, 3), np.float32)),
    ],
    ids=["vit", "ft_transformer"],
)
def test_scores_in_half_precision_multiply_in_half_precision(network, inputs):
    variables = jax.eval_shape(partial(network.init, train=False), KEY, inputs)
    features = in_dtype(partial(network.apply, train=False), "bfloat16")
    traced = str(jax.make_jaxpr(features)(variables, inputs))
    products = [line for line in traced.split("\n") if " = dot_general" in line]
    assert len(products) > 5 and all(":bf16[" in line for line in products)
