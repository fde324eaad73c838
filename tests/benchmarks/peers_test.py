"""The comparison with other ways to reweight: the same work everywhere, and its arithmetic."""

import functools
import json
import pathlib
import types

import jax
import numpy as np
import optax
import pytest

from benchmarks import peers, step_cost
from saflex_jax.core.tree import identity
from saflex_jax.methods import supervised
from saflex_jax.models import ResNet18, SmallCNN
from saflex_jax.rules.l2rw import learning_to_reweight

COMMITTED = pathlib.Path(__file__).parents[2] / "docs" / "peers.json"
TINY = {
    "small_cnn": step_cost.Model(functools.partial(SmallCNN, (8, 16)), (8, 8, 3)),
    "resnet": step_cost.Model(functools.partial(ResNet18, blocks=(1, 1), width=8), (8, 8, 3)),
}
L2RW = ("torch_autograd_l2rw", "torch_func_jvp")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(peers, "SECONDS", 0.0)
    monkeypatch.setattr(peers, "NETWORKS", TINY)


@functools.cache
def work_of(network):
    return peers.make_work(TINY[network])


def missing(work):
    raise ImportError("No module named 'nowhere'")


def entry(jobs, own=False, framework="jax"):
    return peers.Entry(framework, own, jobs, "nothing")


def method_of(rule, work):
    """(the method, its first state) of a rule."""
    method = supervised.make(work.model, optax.sgd(peers.RATE, peers.MOMENTUM), rule)
    return method, jax.jit(method.init)(jax.random.key(peers.SEED), work.streams.candidates.inputs)


def weights_of(rule, work):
    method, state = method_of(rule, work)
    return np.asarray(jax.jit(method.targets)(state, work.streams).weights)


@functools.cache
def steps_of_l2rw(network):
    """Of two steps: the weights of each; the logits before and after."""
    work = work_of(network)
    method, state = method_of(learning_to_reweight(), work)
    predict, targets = jax.jit(method.predict), jax.jit(method.targets)
    step = jax.jit(lambda state: method.step(state, work.streams, reduce=identity)[0])
    start = state._replace(params=work.params)
    weights, before = [], predict(start, work.streams.candidates.inputs)
    for _ in range(2):
        weights.append(targets(state, work.streams).weights)
        state = step(state)
    return weights, before, predict(state, work.streams.candidates.inputs)


# --- the work is the same


@pytest.mark.slow
def test_a_backward_pass_through_the_backward_pass_gives_the_weights_of_l2rw():
    work = work_of("small_cnn")
    found = weights_of(peers.Unrolled(), work)
    expected = weights_of(learning_to_reweight(), work)
    assert 0 < np.count_nonzero(expected) < len(expected)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("network", TINY)
def test_torch_has_the_same_network(network, layout):
    torch = pytest.importorskip("torch")
    work = work_of(network)
    t = peers.Torch(work, layout)
    count = sum(p.size for p in jax.tree.leaves(work.params))
    assert sum(p.numel() for p in t.net.parameters()) == count
    with torch.no_grad():
        found = t.net(t.candidates[0]).numpy()
    expected = jax.jit(work.model.logits)(work.params, {}, work.streams.candidates.inputs)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("peer", L2RW)
@pytest.mark.parametrize("network", TINY)
def test_torch_takes_the_step_of_l2rw(network, peer):
    torch = pytest.importorskip("torch")
    work = work_of(network)
    t = peers.Torch(work, "nchw")
    job = getattr(peers, peer)(t)
    weights, before, logits = steps_of_l2rw(network)
    for expected in weights:  # the second step also has momentum
        np.testing.assert_allclose(job().numpy(), expected, atol=1e-4)
    with torch.no_grad():
        found = t.net(t.candidates[0]).numpy()
    assert np.max(np.abs(logits - before)) > 1e-2
    np.testing.assert_allclose(found, logits, atol=1e-3)


# --- the command


def run_entries(monkeypatch, tmp_path, capsys, names):
    """The report on the entries named, on a network that compiles fast, and on a missing peer."""
    made = {name: peers.ENTRIES[name] for name in names}
    left_out = {"saflex_full": entry(missing, own=True), "peer": entry(missing)}
    monkeypatch.setattr(peers, "ENTRIES", left_out | made)
    only_a_head = TINY["small_cnn"]._replace(backbone=lambda: SmallCNN(()))
    monkeypatch.setattr(peers, "NETWORKS", {"small_cnn": only_a_head})
    monkeypatch.setattr(peers, "PLAIN", peers.PLAIN | {"torch": entry(missing, framework="torch")})
    monkeypatch.setattr(step_cost, "POOL", 64)
    out, figure = tmp_path / "peers.json", tmp_path / "peers.png"
    options = ["--rounds", "1", "--out", str(out), "--figure", str(figure)]
    assert peers.main([*options, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made == json.loads(out.read_text())
    found = made["ratios"]["small_cnn"]
    assert all(found[name]["ratio"] > 0 and found[name]["seconds"] > 0 for name in names)
    assert figure.stat().st_size > 5000
    return made


def test_the_command_measures_and_a_missing_peer_is_null(monkeypatch, tmp_path, capsys):
    made = run_entries(monkeypatch, tmp_path, capsys, ["saflex_head"])
    assert set(made["ratios"]["small_cnn"]) == {"saflex_full", "saflex_head", "peer"}
    reason = "ImportError: No module named 'nowhere'"
    assert made["ratios"]["small_cnn"]["peer"]["ratio"] is None
    nulls = dict.fromkeys(["plain torch", "saflex_full", "peer"], reason)
    assert made["why_null"] == {"small_cnn": nulls}
    assert made["machine"]["threads"] >= 1
    lines = list(peers.Peers.table(made))
    assert f"why_null: small_cnn: peer: {reason}" in lines and "\nratios: small_cnn" in lines


@pytest.mark.slow
def test_every_entry_that_needs_only_this_project_runs(monkeypatch, tmp_path, capsys):
    names = [name for name, made in peers.ENTRIES.items() if made.own]
    run_entries(monkeypatch, tmp_path, capsys, [*names, "jax_unrolled"])


def test_numbers_that_are_not_finite_are_a_failure_and_a_layout_may_fail():
    work, layouts = None, {}
    broken = entry(lambda work: {"nchw": lambda: np.array([1.0, np.nan])})
    with pytest.raises(ValueError, match="not finite"):
        peers.fastest_job(broken, work, layouts, "broken")

    def good():
        return np.ones(2)

    half = entry(lambda work: {"nchw": lambda: 1 / 0, "nhwc": good})
    assert peers.fastest_job(half, work, layouts, "half") is good
    assert layouts == {"half": "nhwc"}


def test_of_two_layouts_the_faster_is_timed(monkeypatch):
    times = {"slow": iter([1.0, 9.0, 9.0]), "fast": iter([9.0, 0.5, 9.0])}
    jobs = {"nchw": lambda: "slow", "nhwc": lambda: "fast"}
    monkeypatch.setattr(peers.timing, "seconds_a_call", lambda job: next(times[job()]))
    monkeypatch.setattr(peers.np, "isfinite", lambda x: True)
    layouts = {}
    assert peers.fastest_job(entry(lambda work: jobs), None, layouts, "a") is jobs["nhwc"]
    assert layouts == {"a": "nhwc"}


# --- its arithmetic


def test_a_ratio_is_the_median_over_rounds_to_the_plain_step_of_its_own_framework():
    benchmark = peers.Peers(types.SimpleNamespace(rounds=3))
    series = benchmark.series[1]
    series.measured = {
        "plain jax": [1.0, 2.0, 4.0],
        "plain torch": [10.0, 10.0, 20.0],
        "saflex_full": [2.0, 6.0, 8.0],
        "torch_func_jvp": [30.0, 40.0, 60.0],
        "betty": [1.0],
    }
    series.failed["torch_autograd_l2rw"] = "ImportError: none"
    series.failed["betty"] = "RuntimeError: no more"
    benchmark.count["resnet"] = 7
    made = benchmark.report()
    found, why = made["ratios"]["resnet"], made["why_null"]["resnet"]
    assert found["saflex_full"]["ratio"] == 2.0 and found["saflex_full"]["seconds"] == 6.0
    assert found["saflex_full"]["spread"] == pytest.approx(0.5)
    assert found["torch_func_jvp"]["ratio"] == 3.0
    assert found["torch_autograd_l2rw"]["ratio"] is found["betty"]["ratio"] is None
    assert why["torch_autograd_l2rw"] == "ImportError: none"
    assert why["betty"] == "RuntimeError: no more"
    assert why["l2rw"] == "interrupted before it was measured"
    assert made["plain"]["resnet"]["count"] == 7
    assert made["plain"]["resnet"]["torch"]["seconds"] == 10.0


def test_what_comes_with_jax_is_a_peer():
    of_jax = {name for name, made in peers.ENTRIES.items() if made.framework == "jax"}
    assert {name for name in of_jax if not peers.ENTRIES[name].own} == {"jax_unrolled"}


def test_the_committed_report_can_be_drawn(tmp_path):
    peers.Peers.draw(json.loads(COMMITTED.read_text()), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
