"""The counting rules against programs of known cost, and the report's arithmetic by hand."""

import json
import pathlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import step_cost, timing
from saflex_jax import models
from saflex_jax.core.steps import init_state
from saflex_jax.core.tree import identity
from saflex_jax.methods import flyp
from saflex_jax.types import Batch, Method, Streams
from tests.benchmarks.ends_ import refused

ROWS, WIDTH = 32, 64
PRODUCT = 2 * ROWS * WIDTH * WIDTH  # x @ w
X, W = np.ones((ROWS, WIDTH), np.float32), np.ones((WIDTH, WIDTH), np.float32)
TINY = step_cost.Model(partial(models.MLP, (8,)), (5,), batch=8, classes=3)
IMAGES = TINY._replace(backbone=partial(models.SmallCNN, (4, 8)), shape=(8, 8, 3))
PAIRS = IMAGES._replace(text=flyp.Text(depth=1, vocab_size=9, context=4, width=8))
COMMITTED = pathlib.Path(__file__).parents[2] / "docs" / "step_cost.json"
MEASURED = [name for name in json.loads(COMMITTED.read_text())["mlp"] if name in step_cost.VARIANTS]


def counted(function, **options):
    traced = jax.jit(function).trace(X, W)
    return step_cost.operations(traced, traced.lower().compile(), **options)


def repeat(trips, body, x):
    return jax.lax.fori_loop(0, trips, lambda _, x: body(x), x)


def test_a_loop_counts_as_often_as_it_runs():
    def nested(x, w):
        return repeat(7, lambda x: repeat(5, lambda x: x @ w, x), x) @ w

    def until_small(x, w):
        return jax.lax.while_loop(lambda x: x[0, 0] > 1, lambda x: x @ w, x)

    def in_rows(x, w):
        return jax.lax.map(lambda row: row @ w, x.reshape(4, -1, WIDTH))

    def solved(x, w):  # a loop within a linear solve, whose other programs are for derivatives
        return jax.scipy.sparse.linalg.cg(lambda v: v @ w, x, maxiter=9, tol=0.0)[0]

    slack = 0.01 * PRODUCT  # counters
    assert counted(lambda x, w: x @ w) == PRODUCT
    assert counted(nested) == pytest.approx(36 * PRODUCT, abs=36 * slack)
    assert counted(until_small, iterations=9) == pytest.approx(9 * PRODUCT, abs=9 * slack)
    assert counted(in_rows) == pytest.approx(PRODUCT, abs=slack)
    vectors = 16 * 10 * ROWS * WIDTH  # sums and inner products
    assert 0 <= counted(solved, iterations=9) - 10 * PRODUCT < vectors
    with pytest.raises(ValueError, match="iterations must be given"):
        counted(until_small)


def test_a_loop_in_a_branch_is_refused():
    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: repeat(3, lambda x: x @ w, x), lambda: x)

    with pytest.raises(ValueError, match="in a branch"):
        list(step_cost.loops(jax.make_jaxpr(branch)(X, W).jaxpr))
    with pytest.raises(ValueError, match="no branch"):
        counted(branch)


@pytest.mark.parametrize("variant", ["plain", "saflex_full", "saflex_head_cg", "l2rw"])
def test_counts_are_those_of_the_committed_report(variant):
    assert_as_committed("mlp", variant)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "small_cnn"])
@pytest.mark.parametrize("variant", MEASURED)
def test_all_counts_are_those_of_the_committed_report(model, variant):
    assert_as_committed(model, variant)


def assert_as_committed(name, variant):
    model, given = step_cost.MODELS[name], step_cost.VARIANTS[variant]
    method, streams = step_cost.make_method(model, given), step_cost.data(model)
    found = step_cost.compile_step(method, streams, given, fast=False).flops
    committed = json.loads(COMMITTED.read_text())
    # XLA's rewrites, and with them its counts, change a little with the version of JAX.
    is_same_jax = committed["machine"]["versions"]["jax"] == jax.__version__
    expected = committed[name][variant]["flops"]
    assert found == pytest.approx(expected, rel=0.002 if is_same_jax else 0.003)


def periodic(dear_on):
    """A method that multiplies once, and three times more on some steps."""

    def step(state, streams, *, reduce):
        w = streams.candidates.inputs
        x = state.params @ w
        x = jax.lax.cond(dear_on(state.step), lambda x: x @ w @ w @ w, lambda x: x, x)
        return state._replace(params=x, step=state.step + 1), {}

    def init(key, inputs):
        return init_state(key, jnp.asarray(X), {}, optax.identity())

    return Method(init, step, None)


@pytest.mark.parametrize(
    ("dear_on", "products"),
    [(lambda t: t % 4 == 0, 1 + 3 / 4), (lambda t: t % 4 != 1, 1 + 9 / 4), (lambda t: t < 4, 1)],
)
def test_a_branch_counts_as_often_as_it_is_taken(dear_on, products):
    method, streams = periodic(dear_on), Streams(Batch(W, None, None, None))
    found = step_cost.compile_step(method, streams, step_cost.Variant(period=4))
    assert found.flops == pytest.approx(products * PRODUCT, rel=0.01)
    with pytest.raises(ValueError, match="no branch"):
        step_cost.compile_step(method, streams, step_cost.Variant())


def test_floors_are_the_sums_of_their_parts():
    # No head: forward 1/3, validation gradient 1/4, JVP 2/3, product with the curvature 4/3.
    expected = {
        "plain": 1,
        "saflex": 13 / 12,
        "saflex_full": 23 / 12,
        "saflex_finite_difference": 19 / 12,
        "saflex_head": 13 / 12,
        "saflex_head_every4": 49 / 48,
        "saflex_head_cg": 13 / 12,
        "saflex_head_cg_memory": 13 / 12,
        "saflex_full_scores_every4": 1 + 11 / 48,
        "saflex_full_bf16": 27 / 12,
        "saflex_full_chunked": 27 / 12,
        "saflex_full_cg": 23 / 12 + 11 * 4 / 3,
        "l2rw": 23 / 12,
        "meta_weight_net": 31 / 12,
        "implicit": 13 / 12,
        "sla_rotation": 4,
        "adautomix": 4,
    }
    floors = {name: v.floor for name, v in step_cost.VARIANTS.items() if v.floor is not None}
    assert {name: floor for name, (floor, _) in floors.items()} == pytest.approx(expected)
    # A product with the head is a third of its training, the validation samples' a quarter of that.
    of_head = {name: slope for name, (_, slope) in floors.items() if slope}
    cg = dict.fromkeys(("saflex", "saflex_head_cg", "saflex_head_cg_memory", "implicit"), 23.25 / 3)
    first = {"saflex_head": 1.25 / 3, "saflex_head_every4": (1 / 4 / 4 + 1) / 3}
    assert of_head == pytest.approx(cg | first)


@pytest.mark.parametrize("name", step_cost.VARIANTS)
def test_every_variant_is_a_step(monkeypatch, name):
    monkeypatch.setattr(step_cost, "POOL", 16)
    variant = step_cost.VARIANTS[name]
    model = PAIRS if variant.method == "flyp" else IMAGES if variant.images else TINY
    method, streams = step_cost.make_method(model, variant), step_cost.data(model)
    state = jax.eval_shape(method.init, jax.random.key(0), streams.candidates.inputs)
    new, _ = jax.eval_shape(partial(method.step, reduce=identity), state, streams)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)


# --- the report


def known_point(model, timed=True):
    """A point whose counts and times are given."""
    names = ("plain", "saflex_full", "automix", "l2rw")
    at = step_cost.Point("known", model, 5, names, timed)
    state = init_state(
        jax.random.key(0), {"head": {"kernel": jnp.zeros((8, 3))}}, {}, optax.identity()
    )
    for name, flops in {"plain": 5000.0, "saflex_full": 9000.0, "l2rw": 9776.0}.items():
        at.steps[name] = step_cost.Step(None, lambda: state, flops, 7)
    at.series.measured.update({"plain": [4.0, 8.0, 4.0], "saflex_full": [8.0, 12.0, 12.0]})
    at.series.failed["l2rw"] = "RuntimeError: no"
    return at


def test_rows_are_the_arithmetic_of_counts_and_times():
    at = known_point(IMAGES)
    rows, head = at.rows(), 3 * 2 * 8 * 8 * 3  # batch, features, classes
    assert rows["plain"] | {"temp_bytes": 7, "flops": 5000, "floor": 1} == rows["plain"]
    assert rows["plain"]["flops_ratio"] == rows["plain"]["seconds_ratio"] == 1
    full = rows["saflex_full"]
    assert full["flops_ratio"] == 1.8 and full["extra_flops"] == 4000
    assert full["extra_in_head_costs"] == 4000 / head
    assert full["seconds"] == 12 / step_cost.STEPS and full["spread"] == 2 / step_cost.STEPS
    assert (full["seconds_ratio"], full["seconds_ratio_spread"]) == (2, 0.75)  # of 2, 1.5 and 3
    assert full["floor"] == pytest.approx(23 / 12)
    assert set(rows["automix"].values()) == {None}
    assert rows["l2rw"]["flops_ratio"] == pytest.approx(1.9552)
    why = at.why_null()
    assert why["l2rw"] == "RuntimeError: no"
    assert why["automix"] == "interrupted before it was measured"
    assert "model" in why["automix floor"] and "plain" not in why


def test_slow_models_count_the_dear_variants_only_and_have_fewer_rounds():
    at = known_point(IMAGES._replace(slow=True))
    assert at.timed == ["plain", "saflex_full"]
    del at.series.failed["l2rw"]
    assert "counted only" in at.why_null()["l2rw"]
    assert at.series.length == 2 * (2 + 1)
    assert known_point(IMAGES).series.length == 4 * (5 + 1)
    counted = known_point(IMAGES, timed=False)
    assert counted.timed == [] and "saflex_full" not in counted.why_null()


def test_a_model_has_the_variants_that_its_data_can_have():
    images, rows, pairs = (
        step_cost.Point("", model, 1).variants.keys() for model in (IMAGES, TINY, PAIRS)
    )
    assert images - rows == {"sla_rotation", "automix", "adautomix"}
    assert pairs == {"flyp", "saflex_flyp_head", "saflex_flyp_full"} and not pairs & images


@pytest.mark.slow
def test_the_other_learned_augmentations_cost_what_their_passes_do():
    model = step_cost.MODELS["resnet18"]
    streams = step_cost.data(model)
    most = {"plain": 1, "sla_rotation": 4.04, "automix": 3.05, "adautomix": 5.1}

    def count(name):
        variant = step_cost.VARIANTS[name]
        method = step_cost.make_method(model, variant)
        return step_cost.compile_step(method, streams, variant, fast=False).flops

    found = {name: count(name) for name in most}
    ratios = {name: flops / found["plain"] for name, flops in found.items()}
    assert all(ratios[name] <= most[name] for name in most), ratios
    # k's pass on the candidates ends at the feature map, the last stage but one.
    assert (
        ratios["sla_rotation"] >= 3.96 and ratios["automix"] > 2.85 and ratios["adautomix"] > 3.95
    )


@pytest.mark.parametrize(("ratio", "shared"), [(1.95, True), (1.96, False), (None, None)])
def test_a_shared_forward_pass_is_within_two_percent_of_the_floor(ratio, shared):
    found = {"saflex_full": {"flops_ratio": ratio, "floor": 23 / 12}}
    assert step_cost.shared_forward(found) is shared


@pytest.fixture
def tiny(monkeypatch):
    """One model in place of five, and four variants, of which one cannot be built."""
    names = ("plain", "saflex_full", "saflex_head_every4")
    variants = {name: step_cost.VARIANTS[name] for name in names}
    variants["broken"] = step_cost.Variant(lambda model: model.widht)
    monkeypatch.setattr(step_cost, "VARIANTS", variants)
    monkeypatch.setattr(step_cost, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(step_cost, "SECONDS", 0.0)
    monkeypatch.setattr(step_cost.Point.__init__, "__defaults__", (tuple(variants), True))
    scaled = {
        ("classes", "tiny", "3"): ("plain", "saflex_full"),
    }
    monkeypatch.setattr(
        step_cost,
        "scaling_points",
        lambda rounds: {
            at: step_cost.Point("scaled", TINY, rounds, names, timed=False)
            for at, names in scaled.items()
        },
    )


@pytest.mark.slow
def test_the_report_holds_every_number_or_the_reason_why_not(tiny, capsys, tmp_path):
    file, figure = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--json", "--rounds", "1", "--out", str(file), "--figure", str(figure)]
    assert step_cost.main(arguments) == 0
    made = json.loads(capsys.readouterr().out)
    assert made == json.loads(file.read_text())
    rows = made["tiny"]
    assert set(rows) == {"plain", "saflex_full", "saflex_head_every4", "broken"}
    for name in ("plain", "saflex_full", "saflex_head_every4"):
        assert rows[name]["seconds"] > 0 and rows[name]["temp_bytes"] >= 0
        assert rows[name]["flops_ratio"] == rows[name]["flops"] / rows["plain"]["flops"] >= 1
    assert rows["saflex_full"]["flops"] > rows["saflex_head_every4"]["flops"]
    assert "widht" in made["why_null"]["tiny"]["broken"]
    assert rows["broken"]["flops"] is rows["broken"]["seconds"] is None
    assert made["shared_forward"]["tiny"] in (True, False)
    scaled = made["scaling"]["classes"]["tiny"]["3"]
    assert scaled["saflex_full"]["extra_flops"] == rows["saflex_full"]["extra_flops"]
    assert scaled["saflex_full"]["seconds"] is None
    assert made["machine"]["versions"]["jax"] and made["machine"]["rounds"] == 1
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_no_scaling_where_a_model_is_named(tiny, monkeypatch, capsys):
    monkeypatch.setattr(timing.Series, "measure", lambda self, bar: None)
    for arguments, kinds in [([], {"classes"}), (["--model", "tiny"], set())]:
        assert step_cost.main(["--json", *arguments]) == 0
        assert set(json.loads(capsys.readouterr().out)["scaling"]) == kinds


def test_ctrl_c_prints_what_was_measured(tiny, monkeypatch, capsys):
    order = []

    def steps_of(step, state, batches, *, steps):
        order.append(steps)
        number, calls = len(order), []

        def run():
            calls.append(1)
            if number == 2 and len(calls) == 3:  # two warm up; its predecessor has been timed
                raise KeyboardInterrupt

        return run

    known = step_cost.Step(None, lambda: (), 1.0, 0)
    monkeypatch.setattr(step_cost, "compile_step", lambda *_, fast: known)
    monkeypatch.setattr(timing, "steps_of", steps_of)
    monkeypatch.setattr(step_cost.Point, "head_flops", lambda self: 1.0)
    assert step_cost.main(["--model", "tiny", "--rounds", "1"]) == 130
    printed = capsys.readouterr()
    lines = {row[0]: row[1:] for line in printed.out.splitlines() if (row := line.split())}
    column = lines["flops"].index("seconds_ratio") + 1
    assert order == [16, 16, 16]  # a whole number of periods
    assert lines["plain"][column] == "1"
    assert lines["saflex_full"][column] == lines["saflex_head_every4"][column] == "null"
    why = "interrupted before it was measured"
    assert f"why_null: tiny: saflex_head_every4: {why}" in printed.out
    assert "interrupted" in printed.err


def test_bad_arguments_are_refused_before_anything_runs(tiny, capsys):
    found = refused(step_cost.main, ["--rounds", "0"], capsys)
    assert re.search(r"error: rounds must .*given 0", found)
    with pytest.raises(SystemExit):
        step_cost.main(["--model", "alexnet"])


def test_the_committed_report_can_be_drawn(tmp_path):
    report, file = json.loads(COMMITTED.read_text()), tmp_path / "figure.png"
    step_cost.StepCost.draw(report, file)
    assert file.read_bytes().startswith(b"\x89PNG")
