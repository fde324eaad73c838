"""The counting rules against programs of known cost, and the report's arithmetic by hand."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import step_cost
from saflex_jax import models
from saflex_jax.core.steps import init_state
from saflex_jax.core.tree import identity, paths
from saflex_jax.types import Batch, Method, Streams

ROWS, WIDTH = 32, 64
PRODUCT = 2 * ROWS * WIDTH * WIDTH  # x @ w
X, W = np.ones((ROWS, WIDTH), np.float32), np.ones((WIDTH, WIDTH), np.float32)
TINY = step_cost.Model(partial(models.MLP, (8,)), (5,), ("Dense_0",), batch=8, classes=3)
IMAGES = TINY._replace(backbone=partial(models.SmallCNN, (4, 8)), shape=(8, 8, 3))


def counted(function, **options):
    return step_cost.operations(jax.jit(function).lower(X, W).compile(), **options)


def test_a_loop_counts_as_often_as_it_runs():
    repeat = lambda trips, body, x: jax.lax.fori_loop(0, trips, lambda _, x: body(x), x)

    def nested(x, w):
        inner = lambda x: repeat(5, lambda x: x @ w, x)
        return repeat(7, inner, x) @ w

    def until_small(x, w):
        return jax.lax.while_loop(lambda x: x[0, 0] > 1, lambda x: x @ w, x)

    def in_rows(x, w):
        return jax.lax.map(lambda row: row @ w, x.reshape(4, -1, WIDTH))

    slack = 0.01 * PRODUCT  # counters
    assert counted(lambda x, w: x @ w) == PRODUCT
    assert counted(nested) == pytest.approx(36 * PRODUCT, abs=36 * slack)
    assert counted(until_small, iterations=9) == pytest.approx(9 * PRODUCT, abs=9 * slack)
    assert counted(in_rows) == pytest.approx(PRODUCT, abs=slack)
    with pytest.raises(ValueError, match="iterations must be given"):
        counted(until_small)


def periodic(dear_on):
    """A method that multiplies once, and three times more on some steps."""

    def step(state, streams, *, reduce):
        w = streams.candidates.inputs
        x = state.params @ w
        dear = lambda x: x @ w @ w @ w
        x = jax.lax.cond(dear_on(state.step), dear, lambda x: x, x)
        return state._replace(params=x, step=state.step + 1), {}

    tx = optax.identity()
    init = lambda key, inputs: init_state(key, jnp.asarray(X), {}, tx)
    return Method(init, step, None)


@pytest.mark.parametrize(
    ("dear_on", "products"),
    [(lambda t: t % 4 == 0, 1 + 3 / 4), (lambda t: t % 4 != 1, 1 + 9 / 4), (lambda t: t < 4, 1)],
)
def test_a_branch_counts_as_often_as_it_is_taken(dear_on, products):
    method, streams = periodic(dear_on), Streams(Batch(W, None, None, None))
    found = step_cost.compile_step(method, streams, step_cost.Variant("", period=4))
    assert found.flops == pytest.approx(products * PRODUCT, rel=0.01)
    with pytest.raises(ValueError, match="no branch"):
        step_cost.compile_step(method, streams, step_cost.Variant("", period=1))


def test_floors_are_the_sums_of_their_parts():
    # No head: forward 1/3, validation gradient 1/4, JVP 2/3, product with the curvature 4/3.
    expected = {
        "plain": 1,
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
    assert {name: floor(0.0) for name, floor in floors.items()} == pytest.approx(expected)
    # A head that is a tenth of the step: products of a thirtieth, the validation's of a quarter.
    assert floors["saflex_head"](0.1) == pytest.approx(13 / 12 + 1.25 / 30)
    assert floors["saflex_head_cg"](0.1) == pytest.approx(13 / 12 + (1.25 + 22) / 30)
    assert floors["saflex_head_every4"](0.1) == pytest.approx(1 + (1 / 12 + 1 / 120) / 4 + 1 / 30)


def stage_size(name, model):
    """Parameters that `saflex_last_stage` moves, without the head."""
    network = models.from_linen(models.Classifier(model.backbone(), 10))
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, *model.shape)))[0]
    predicate = step_cost.VARIANTS["saflex_last_stage"].options(model)["predicate"]
    chosen = [p for p in paths(shapes) if predicate(p)]
    assert [p for p in chosen if p.startswith("head/")] == ["head/bias", "head/kernel"]
    sizes = dict(zip(paths(shapes), (x.size for x in jax.tree.leaves(shapes))))
    return sum(sizes[p] for p in chosen if not p.startswith("head/"))


def test_the_last_stage_is_the_last_stage():
    block = 4 * (384 * 384 + 384) + 2 * 384 * 1536 + 1536 + 384 + 2 * 2 * 384
    expected = {
        "mlp": 64 * 64 + 64,
        "small_cnn": 9 * 64 * 64 + 2 * 64,
        "small_cnn_batch_norm": 9 * 64 * 64 + 2 * 64,
        "resnet18": 9 * 256 * 512 + 3 * 9 * 512 * 512 + 256 * 512 + 5 * 2 * 512,
        "vit_s": 3 * block + 2 * 384,
    }
    assert {n: stage_size(n, model) for n, model in step_cost.MODELS.items()} == expected


@pytest.mark.parametrize("name", step_cost.VARIANTS)
def test_every_variant_is_a_step(monkeypatch, name):
    monkeypatch.setattr(step_cost, "POOL", 16)
    variant = step_cost.VARIANTS[name]
    model = IMAGES if variant.images else TINY
    method, streams = step_cost.make_method(model, variant), step_cost.data(model)
    state = jax.eval_shape(method.init, jax.random.key(0), streams.candidates.inputs)
    new, _ = jax.eval_shape(partial(method.step, reduce=identity), state, streams)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)


# --- the report


def known_point(model, timed=True):
    """A point whose counts and times are given."""
    at = step_cost.point(model, ("plain", "saflex_full", "saflex_last_stage", "l2rw"), timed)
    state = init_state(
        jax.random.key(0), {"head": {"kernel": jnp.zeros((8, 3))}}, {}, optax.identity()
    )
    for name, flops in {"plain": 5000.0, "saflex_full": 9000.0, "l2rw": 9776.0}.items():
        at.steps[name] = step_cost.Step(None, lambda: state, flops, 7)
    at.run.seconds.update({"plain": [4.0, 8.0, 4.0], "saflex_full": [8.0, 12.0, 12.0]})
    at.run.failed["l2rw"] = "RuntimeError: no"
    return at


def test_rows_are_the_arithmetic_of_counts_and_times():
    at = known_point(TINY)
    rows, head = step_cost.rows(at), 3 * 2 * 8 * 8 * 3  # batch, features, classes
    assert rows["plain"] | {"temp_bytes": 7, "flops": 5000, "floor": 1} == rows["plain"]
    assert rows["plain"]["flops_ratio"] == rows["plain"]["seconds_ratio"] == 1
    full = rows["saflex_full"]
    assert full["flops_ratio"] == 1.8 and full["extra_flops"] == 4000
    assert full["extra_in_head_costs"] == 4000 / head
    assert full["seconds"] == 12 / step_cost.STEPS and full["spread"] == 2 / step_cost.STEPS
    assert (full["seconds_ratio"], full["seconds_ratio_spread"]) == (2, 0.75)  # of 2, 1.5 and 3
    assert full["floor"] == pytest.approx(23 / 12)
    assert set(rows["saflex_last_stage"].values()) == {None}
    assert rows["l2rw"]["flops_ratio"] == pytest.approx(1.9552)
    why = step_cost.missing(at)
    assert why["l2rw"] == "RuntimeError: no"
    assert why["saflex_last_stage"] == "interrupted before it was measured"
    assert "last stage" in why["saflex_last_stage floor"] and set(why) & {"plain"} == set()


def test_slow_models_count_the_dear_variants_only_and_have_fewer_rounds():
    at = known_point(TINY._replace(slow=True))
    assert step_cost.timed(at) == ["plain", "saflex_full", "saflex_last_stage"]
    del at.run.failed["l2rw"]
    assert "counted only" in step_cost.missing(at)["l2rw"]
    assert step_cost.length(at, 5) == 4 + 3 * (2 + 1)
    assert step_cost.length(known_point(TINY), 5) == 4 + 4 * (5 + 1)
    assert step_cost.timed(known_point(TINY, timed=False)) == []


def test_what_needs_images_is_left_out_where_there_are_none():
    left_out = set(step_cost.point(IMAGES).variants) - set(step_cost.point(TINY).variants)
    assert left_out == {"sla_rotation", "automix", "adautomix"}


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
    """One model in place of four, and four variants, of which one cannot be built."""
    names = ("plain", "saflex_full", "saflex_head_every4")
    variants = {name: step_cost.VARIANTS[name] for name in names}
    variants["broken"] = step_cost.Variant("erm", lambda model: {"widht": 3})
    monkeypatch.setattr(step_cost, "VARIANTS", variants)
    monkeypatch.setattr(step_cost, "MODELS", {"tiny": TINY})
    monkeypatch.setattr(step_cost, "SECONDS", 0.0)
    point = step_cost.point
    monkeypatch.setattr(
        step_cost,
        "scaling_points",
        lambda: {
            "classes": {"tiny": {"3": point(TINY, ("plain", "saflex_full"), timed=False)}},
        },
    )
    monkeypatch.setattr(step_cost, "SCALED", ("plain", "saflex_full"))
    monkeypatch.setattr(
        step_cost,
        "point",
        lambda model, names=tuple(variants), timed=True, parts=False: point(
            model, names, timed, parts
        ),
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
    in_branch = {f"{name}_in_branch" for name in step_cost.BRANCHED}
    assert set(made["parts"]["tiny"]) == set(step_cost.PARTS) | in_branch
    assert min(made["parts"]["tiny"].values()) > 0
    scaled = made["scaling"]["classes"]["tiny"]["3"]
    assert scaled["saflex_full"]["extra_flops"] == rows["saflex_full"]["extra_flops"]
    assert scaled["saflex_full"]["seconds"] is None
    assert made["machine"]["versions"]["jax"] and made["machine"]["rounds"] == 1
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_neither_scaling_nor_parts_where_a_model_is_named(tiny, monkeypatch, capsys):
    monkeypatch.setattr(step_cost, "measure", lambda at, *, rounds, bar: None)
    for arguments, kinds in [([], {"classes"}), (["--model", "tiny"], set())]:
        assert step_cost.main(["--json", *arguments]) == 0
        made = json.loads(capsys.readouterr().out)
        assert set(made["scaling"]) == kinds
        assert bool(made["parts"]["tiny"]) == bool(kinds)
    assert step_cost.main(["--json", "--model", "tiny", "--scaling"]) == 0
    assert set(json.loads(capsys.readouterr().out)["scaling"]) == {"classes"}


def test_ctrl_c_prints_what_was_measured(tiny, monkeypatch, capsys):
    order = []

    def job(step, streams, steps):
        order.append(steps)
        number, calls = len(order), []

        def run():
            calls.append(1)
            if number == 2 and len(calls) == 3:  # two warm up; its predecessor has been timed
                raise KeyboardInterrupt

        return run

    known = step_cost.Step(None, None, 1.0, 0)
    monkeypatch.setattr(step_cost, "compile_step", lambda *_, fast: known)
    monkeypatch.setattr(step_cost, "job", job)
    monkeypatch.setattr(step_cost, "head_flops", lambda at: 1.0)
    assert step_cost.main(["--no-scaling", "--rounds", "1"]) == 130
    printed = capsys.readouterr()
    lines = {row[0]: row[1:] for line in printed.out.splitlines() if (row := line.split())}
    assert order == [4, 4, 16]  # a whole number of periods
    assert lines["plain"][4] == "1.000"
    assert lines["saflex_full"][4] == lines["saflex_head_every4"][4] == "null"
    assert "null: tiny saflex_head_every4: seconds: interrupted before it was timed" in printed.out
    assert "interrupted" in printed.err


def test_a_job_refuses_a_loss_that_is_not_finite():
    step = lambda state, streams: (state + 1, {"loss": (np.float32(np.nan), 1)})
    run = step_cost.job(step_cost.Step(step, lambda: 0, 0.0, 0), None, 2)
    with pytest.raises(FloatingPointError, match="not finite"):
        run()


def test_bad_arguments_are_refused_before_anything_runs(tiny):
    with pytest.raises(ValueError, match=r"rounds must .*given 0"):
        step_cost.main(["--rounds", "0"])
    with pytest.raises(SystemExit):
        step_cost.main(["--model", "alexnet"])
