"""The comparison with other ways to reweight: the same work everywhere, and its arithmetic."""

import functools
import json

import jax
import numpy as np
import optax
import pytest

from benchmarks import peers, timing
from saflex_jax.core.tree import identity
from saflex_jax.methods import METHODS
from saflex_jax.models import ResNet18, SmallCNN

TINY = {
    "small_cnn": peers.Network(SmallCNN((8, 16)), residual=False),
    "resnet": peers.Network(ResNet18(blocks=(1, 1), width=8), residual=True),
}
UNKNOWN = {"full_below_every_peer": None, "head_overhead_over_best_peer": None}
L2RW = ("torch_autograd_l2rw", "torch_func_l2rw", "torch_func_jvp", "torchopt_l2rw")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(peers, "SIDE", 8)
    monkeypatch.setattr(peers, "SECONDS", 0.0)
    monkeypatch.setattr(peers, "NETWORKS", TINY)


@functools.cache
def work_of(network):
    return peers.make_work(TINY[network])


def missing(work):
    raise ImportError("No module named 'nowhere'")


def entry(jobs, own=False, framework="jax"):
    return peers.Entry(framework, own, jobs, "nothing")


def method_of(make, work, **options):
    """(the method, its first state) of an entry of JAX's."""
    method = make(work.model, optax.sgd(peers.RATE, peers.MOMENTUM), **options)
    return method, jax.jit(method.init)(jax.random.key(peers.SEED), work.streams.candidates.inputs)


def weights_of(make, work):
    method, state = method_of(make, work)
    return np.asarray(jax.jit(method.targets)(state, work.streams).weights)


# --- the work is the same


@pytest.mark.slow
def test_a_backward_pass_through_the_backward_pass_gives_the_weights_of_l2rw():
    work = peers.make_work(peers.Network(SmallCNN((8,)), residual=False))
    found = weights_of(peers.by_hypergradient(peers.unrolled), work)
    expected = weights_of(METHODS["l2rw"], work)
    assert 0 < np.count_nonzero(expected) < peers.CANDIDATES
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_optimistix_solves_the_system_of_the_implicit_hypergradient():
    pytest.importorskip("optimistix")
    work = work_of("small_cnn")
    damping = peers.lineax_damping(work.params)
    same = functools.partial(peers.implicit, damping=damping)
    found = weights_of(peers.by_hypergradient(peers.implicit_optimistix), work)
    expected = weights_of(peers.by_hypergradient(same), work)
    greedy = weights_of(METHODS["l2rw"], work)
    assert np.max(np.abs(expected - greedy)) > 0.05  # the curvature matters here
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-3)


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
    expected = work.model.logits(work.params, {}, work.streams.candidates.inputs)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("peer", L2RW)
@pytest.mark.parametrize("network", TINY)
def test_torch_takes_the_step_of_l2rw(network, peer):
    torch = pytest.importorskip("torch")
    if peer == "torchopt_l2rw":
        pytest.importorskip("torchopt")
    work = work_of(network)
    t = peers.Torch(work, "nchw")
    job = getattr(peers, peer)(t)
    method, state = method_of(METHODS["l2rw"], work)
    step = jax.jit(lambda state: method.step(state, work.streams, reduce=identity)[0])
    targets = jax.jit(method.targets)
    for _ in range(2):  # the second also has momentum
        expected = targets(state, work.streams).weights
        np.testing.assert_allclose(job().numpy(), expected, atol=1e-4)
        state = step(state)
    with torch.no_grad():
        found = t.net(t.candidates[0]).numpy()
    logits = method.predict(state, work.streams.candidates.inputs)
    before = work.model.logits(work.params, {}, work.streams.candidates.inputs)
    assert np.max(np.abs(logits - before)) > 1e-2
    np.testing.assert_allclose(found, logits, atol=1e-3)


# --- the command


def run_entries(monkeypatch, tmp_path, capsys, names):
    """The report on the entries named, on a network that compiles fast, and on a missing peer."""
    made = {name: peers.ENTRIES[name] for name in names}
    left_out = {"saflex_full": entry(missing, own=True), "peer": entry(missing)}
    monkeypatch.setattr(peers, "ENTRIES", left_out | made)
    only_a_head = peers.Network(SmallCNN(()), residual=False)
    monkeypatch.setattr(peers, "NETWORKS", {"small_cnn": only_a_head})
    monkeypatch.setattr(peers, "PLAIN", peers.PLAIN | {"torch": entry(missing, framework="torch")})
    out, figure = tmp_path / "peers.json", tmp_path / "peers.png"
    options = ["--model", "small_cnn", "--rounds", "1", "--out", str(out), "--figure", str(figure)]
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
    assert made["claims"] == {"small_cnn": UNKNOWN, "all": UNKNOWN}
    assert made["machine"]["threads"]["jax"] >= 1
    assert f"null: small_cnn peer: {reason}" in peers.table(made)


@pytest.mark.slow
def test_every_entry_that_needs_only_this_project_runs(monkeypatch, tmp_path, capsys):
    names = [name for name, made in peers.ENTRIES.items() if made.own]
    run_entries(monkeypatch, tmp_path, capsys, [*names, "jax_unrolled", "jax_implicit"])


def test_loops_around_a_residual_network_are_left_out_with_the_reason(monkeypatch, capsys):
    job = lambda work: {"nhwc": lambda: np.ones(3)}
    own = entry(job, own=True)
    made = {"saflex_full": own, "saflex_head": own, "slow": own._replace(loops=True)}
    monkeypatch.setattr(peers, "ENTRIES", made)
    monkeypatch.setattr(peers, "PLAIN", {"jax": entry(job)})
    monkeypatch.setattr(peers, "make_work", lambda network: peers.Work(network, None, {}, None))
    assert peers.main(["--json", "--rounds", "1"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["why_null"] == {"small_cnn": {}, "resnet": {"slow": peers.LOOPS}}


def test_a_reason_is_one_line():
    inside = (
        "JaxRuntimeError: INTERNAL: error calling callback: Traceback (most recent call last):\n"
        '  File "solve.py", line 8, in solve\n    raise Error("not this")\n'
        "lineax._errors.SolveError: not finite. This is\nbecause:\n\n(a) the operator is singular"
    )
    assert peers.one_line(inside) == "SolveError: not finite. This is"
    assert peers.one_line("ValueError: first\nsecond") == "ValueError: first"
    assert peers.one_line("ImportError: only") == "ImportError: only"


def test_an_interrupted_run_reports_what_it_measured(monkeypatch, capsys):
    def interrupted(work):
        raise KeyboardInterrupt

    job = lambda work: {"nhwc": lambda: np.ones(3)}
    monkeypatch.setattr(peers, "make_work", lambda network: peers.Work(network, None, {}, None))
    monkeypatch.setattr(peers, "PLAIN", {"jax": entry(job)})
    monkeypatch.setattr(
        peers,
        "ENTRIES",
        {"saflex_full": entry(job, own=True), "saflex_head": entry(interrupted, own=True)},
    )
    assert peers.main(["--json", "--rounds", "2"]) == 130
    made = json.loads(capsys.readouterr().out)
    reasons = dict.fromkeys(
        ["plain jax", "saflex_full", "saflex_head"], "interrupted before it was measured"
    )
    assert made["why_null"] == {"small_cnn": reasons, "resnet": reasons}


def test_numbers_that_are_not_finite_are_a_failure_and_a_layout_may_fail():
    work, layouts = None, {}
    broken = entry(lambda work: {"nchw": lambda: np.array([1.0, np.nan])})
    with pytest.raises(ValueError, match="not finite"):
        peers.fastest_job(broken, "broken", work, layouts)
    good = lambda: np.ones(2)
    half = entry(lambda work: {"nchw": lambda: 1 / 0, "nhwc": good})
    assert peers.fastest_job(half, "half", work, layouts) is good
    assert layouts == {"half": "nhwc"}


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match=r"model must be .*given 'vgg'"):
        peers.main(["--model", "vgg"])


# --- its arithmetic


def test_a_ratio_is_the_median_over_rounds_to_the_plain_step_of_its_own_framework():
    times = timing.Run(
        {
            "plain jax": [1.0, 2.0, 4.0],
            "plain torch": [10.0, 10.0, 20.0],
            "saflex_full": [2.0, 6.0, 8.0],
            "saflex_head": [1.5, 3.0, 6.0],
            "torch_func_jvp": [30.0, 40.0, 60.0],
            "betty": [1.0],
        },
        {"torchopt": "ImportError: none", "betty": "RuntimeError: no more"},
    )
    made = peers.report({"resnet": peers.Run(times, {"betty": "nhwc"}, {"count": 7})}, rounds=3)
    found = made["ratios"]["resnet"]
    assert found["saflex_full"]["ratio"] == 2.0 and found["saflex_full"]["seconds"] == 6.0
    assert found["saflex_full"]["spread"] == pytest.approx(0.5)
    assert found["torch_func_jvp"]["ratio"] == 3.0
    assert found["torchopt"]["ratio"] is found["betty"]["ratio"] is None
    assert made["why_null"]["resnet"]["torchopt"] == "ImportError: none"
    assert made["why_null"]["resnet"]["betty"] == "RuntimeError: no more"
    assert made["why_null"]["resnet"]["l2rw"] == "interrupted before it was measured"
    assert made["plain"]["resnet"]["count"] == 7
    assert made["plain"]["resnet"]["torch"]["seconds"] == 10.0
    claim = {"full_below_every_peer": True, "head_overhead_over_best_peer": 0.25}
    assert made["claims"] == {"resnet": claim, "all": claim}


def ratios(full, head, *others):
    numbers = {"saflex_full": (full, True), "saflex_head": (head, True), "l2rw": (1.1, True)}
    numbers |= {f"peer{n}": (ratio, False) for n, ratio in enumerate(others)}
    return {name: {"ratio": ratio, "own": own} for name, (ratio, own) in numbers.items()}


@pytest.mark.parametrize(
    "found, below, overhead",
    [
        ([ratios(1.9, 1.1, 3.0, 2.0)], True, 0.1),
        ([ratios(2.0, 1.1, 3.0, 2.0)], False, 0.1),
        ([ratios(1.9, 1.1, 3.0, None)], True, 0.05),
        ([ratios(1.9, 1.1, 2.0), ratios(1.9, 1.5, 3.0)], True, 0.25),
        ([ratios(1.9, 1.1, 2.0), ratios(3.1, 1.1, 3.0)], False, 0.1),
        ([ratios(1.9, 1.1, 2.0), ratios(None, 1.1, 3.0)], None, 0.1),
        ([ratios(1.9, None, 2.0)], True, None),
        ([ratios(1.9, 1.1, None)], None, None),
        ([ratios(1.9, 1.1, 1.0)], False, None),  # no overhead to compare with
        ([ratios(0.8, 1.1, 0.9), ratios(1.9, 1.1, 2.0)], True, None),
    ],
)
def test_the_claims_hold_for_every_network_and_every_measured_peer(found, below, overhead):
    made = peers.claims(dict(enumerate(found)))["all"]
    assert made["full_below_every_peer"] is below
    assert made["head_overhead_over_best_peer"] == (overhead and pytest.approx(overhead))


def test_claims_are_also_made_of_each_network():
    made = peers.claims({"a": ratios(1.9, 1.1, 2.0), "b": ratios(3.1, 1.5, 3.0)})
    below = [made[name]["full_below_every_peer"] for name in ("a", "b", "all")]
    assert below == [True, False, False]
    overheads = [made[name]["head_overhead_over_best_peer"] for name in ("a", "b", "all")]
    assert overheads == pytest.approx([0.1, 0.25, 0.25])


def test_what_comes_with_jax_is_a_peer():
    of_jax = {name for name, made in peers.ENTRIES.items() if made.framework == "jax"}
    assert {name for name in of_jax if not peers.ENTRIES[name].own} == {
        "jax_unrolled", "jax_implicit", "optimistix"
    }  # fmt: skip
