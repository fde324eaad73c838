import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.core import tree

PARAMS = {
    "backbone": {"Dense_0": {"bias": jnp.zeros(2), "kernel": jnp.ones((2, 2))}},
    "head": {"kernel": jnp.full((2, 3), 2.0)},
    "head2": {"kernel": jnp.full(1, 3.0)},
}


@pytest.mark.parametrize(
    ("prefixes", "kept"),
    [
        (("head",), ["head/kernel"]),  # and not "head2", which only begins alike
        (("backbone/Dense_0/bias", "head2"), ["backbone/Dense_0/bias", "head2/kernel"]),
        (("params/head", "params/head2/kernel"), ["head/kernel", "head2/kernel"]),
        (("backbone",), ["backbone/Dense_0/bias", "backbone/Dense_0/kernel"]),
    ],
)
def test_under_selects_whole_path_components(prefixes, kept):
    assert tree.paths(tree.select(PARAMS, tree.under(*prefixes))) == kept
    nested = tree.paths(tree.select({"params": PARAMS}, tree.under(*prefixes)))
    assert nested == [f"params/{path}" for path in kept]


def test_select_without_predicate_keeps_everything():
    assert tree.select(PARAMS, None) is PARAMS


def test_merge_and_restrict_invert_select():
    selected = tree.select(PARAMS, tree.under("head"))
    changed = {**selected, "head": {"kernel": jnp.full((2, 3), 7.0)}}
    merged = tree.merge(changed, PARAMS)
    assert tree.paths(merged) == tree.paths(PARAMS)
    np.testing.assert_array_equal(merged["head"]["kernel"], 7.0)
    assert merged["backbone"]["Dense_0"]["kernel"] is PARAMS["backbone"]["Dense_0"]["kernel"]
    restricted = tree.restrict(merged, selected)
    assert tree.paths(restricted) == ["head/kernel"]
    assert restricted["head"]["kernel"] is merged["head"]["kernel"]


def test_select_nothing_lists_the_paths():
    with pytest.raises(ValueError, match="selects no parameter") as error:
        tree.select(PARAMS, tree.under("classifier"))
    assert all(path in str(error.value) for path in tree.paths(PARAMS))


def test_axpy_keeps_the_dtype_of_y():
    y = {"a": jnp.ones(2, jnp.bfloat16)}
    out = tree.axpy(2.0, {"a": jnp.ones(2, jnp.float32)}, y)["a"]
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(jnp.float32), 3.0)


def test_mean_floats_leaves_counters_alone():
    state = {"count": jnp.array(3), "mean": jnp.array(4.0)}
    out = tree.mean_floats(state, lambda x: x / 2)
    assert (int(out["count"]), float(out["mean"])) == (3, 2.0)
