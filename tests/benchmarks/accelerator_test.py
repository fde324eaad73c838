"""The accelerator's benchmark at a size for a CPU."""

import itertools
import json
import time
from functools import partial, partialmethod

import jax
import numpy as np
import pytest
import tqdm

from benchmarks import accelerator
from benchmarks import accelerator_training as training
from saflex_jax.batches import take
from saflex_jax.methods import supervised
from saflex_jax.models import MLP, Classifier, from_linen
from saflex_jax.types import Model
from tests.benchmarks.ends_ import refused

DIGITS = training.open_images(None, tiny=True)
ROWS, TRUSTED = DIGITS.rows[:200], DIGITS.rows[200:220]


def plain(steps):
    model = from_linen(Classifier(MLP((8,)), 10))
    return supervised.make(model, training.tx(steps))


def saved(folder):
    return {file.stem: json.loads(file.read_text()) for file in folder.iterdir()}


def test_costs_and_rates_are_written_as_soon_as_they_are_measured(tmp_path, monkeypatch, capsys):
    parts = (("mlp", 8, "float32", ("plain", "saflex")), ("mlp", 8, "bfloat16", ("plain",)))
    monkeypatch.setattr(accelerator, "TINY", parts)
    written, measure = [], accelerator.timing.Series.measure

    def watched(series, bar):
        written.append(saved(tmp_path))
        measure(series, bar)

    monkeypatch.setattr(accelerator.timing.Series, "measure", watched)
    options = ["--tiny", "--json", "--rounds=1", "--parts", "augment", "costs", f"--out={tmp_path}"]
    assert accelerator.main(options) == 0
    report = json.loads(capsys.readouterr().out)
    first, second = report["steps"].values()
    assert first["plain"]["ratio"] == second["plain"]["ratio"] == 1
    assert first["saflex"]["ms"] > 0 and not report["why_null"]
    assert all(speed > 0 for speed in report["images_per_second"].values())
    assert written[0] == {} and next(iter(written[1]["costs"]["steps"].values())) == first
    files = saved(tmp_path)
    assert files["costs"]["steps"] == report["steps"]
    assert files["augment"]["images_per_second"] == report["images_per_second"]
    assert files["augment"]["machine"]["tiny"] and "steps" not in files["augment"]


def test_trainings_learn_and_are_written_one_by_one(tmp_path, monkeypatch, capsys):
    runs = (("worst", "saflex"), ("worst", "trusted_only"), ("clean", "upstream"))
    monkeypatch.setattr(training.NoisyLabels, "runs", runs)
    monkeypatch.setattr(training.AutoMix, "arms", ("automix",))
    # These programs run for hundreds of steps: their machine code is made well, unlike elsewhere.
    well = partialmethod(
        jax.stages.Lowered.compile, compiler_options={"xla_backend_optimization_level": 2}
    )
    monkeypatch.setattr(jax.stages.Lowered, "compile", well)
    options = ["--tiny", "--parts", "noisy_labels", "automix", f"--out={tmp_path}"]
    assert accelerator.main(options) == 0
    files = saved(tmp_path)
    assert not files["noisy_labels"]["why_null"] and not files["automix"]["why_null"]
    rows = files["noisy_labels"]["noisy_labels"]
    assert list(rows) == ["worst: saflex", "worst: trusted_only", "clean: upstream"]
    clean, worst = rows["clean: upstream"]["mean"], rows["worst: saflex"]["seed 0"]
    assert clean > 0.8 and clean > worst > rows["worst: trusted_only"]["seed 0"] > 0.5
    found = files["automix"]["automix"]
    assert found["epochs"] == 2 and found["arms"]["automix"]["seconds"] > 0
    begin = found["masks"]["epoch 0"]  # small weights: masks are 1/2
    assert begin["from_half"] < 0.01 and abs(begin["from_share"] - 0.2) < 0.01
    assert list(found["masks"]) == ["epoch 0", "epoch 1", "epoch 2"]
    assert "worst: saflex" in capsys.readouterr().out


def test_where_no_time_or_no_data_is_the_reason_is_said(tmp_path, capsys):
    options = ["--tiny", "--json", "--minutes=0", "--rounds=1", f"--out={tmp_path}"]
    assert accelerator.main(options) == 0
    why = json.loads(capsys.readouterr().out)["why_null"]
    leaves = [reason for part in ("costs", "augment") for rows in why[part].values()
              for reason in rows.values()]  # fmt: skip
    leaves += [*why["noisy_labels"].values(), *why["automix"].values()]
    assert set(leaves) == {"TimeoutError: no time was left"}
    assert set(saved(tmp_path)) == set(accelerator.PARTS)

    part = training.NoisyLabels(training.Clock(), tmp_path, tiny=False)
    part.measure(tqdm.tqdm(disable=True), lambda: None)
    (reason,) = part.failed.values()
    assert "python -m experiments.prepare cifar10n" in reason and not part.found


def test_a_folder_that_is_a_file_is_refused_before_anything_runs(tmp_path, capsys):
    file = tmp_path / "out"
    file.touch()
    found = refused(accelerator.main, ["--tiny", f"--out={file}"], capsys)
    assert "File exists" in found and str(file) in found


def test_many_steps_in_a_dispatch_are_the_steps_one_by_one():
    pools = training.held(DIGITS, "worst", TRUSTED)
    rows = partial(training.epochs, ROWS, TRUSTED, 32, 3, seed=0)
    program = training.Program(plain, next(rows()), pools, training.Clock())
    seen = []

    def look(dispatches, state):
        seen.append((dispatches, int(state.step)))

    state, _ = program.train(0, rows(), pools, number=2, look=look)
    assert seen == [(0, 0), (1, 3), (2, 6)]
    method, step = plain(6), jax.jit(plain(6).step)
    single = method.init(jax.random.key(0), DIGITS.inputs[:1])
    for dispatch in itertools.islice(rows(), 2):
        for at in range(3):
            single, _ = step(single, take(pools, jax.tree.map(lambda x, at=at: x[at], dispatch)))
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, state.params, single.params)


def test_a_training_that_would_not_end_in_time_is_stopped_at_its_first_dispatch():
    pools, clock, seen = training.held(DIGITS, "clean", TRUSTED), training.Clock(), []
    rows = partial(training.epochs, ROWS, TRUSTED, 32, 3, seed=0)
    program = training.Program(plain, next(rows()), pools, clock)

    def look(dispatches, state):
        clock.deadline = time.monotonic() + 0.01
        seen.append(dispatches)
        time.sleep(0.001)

    with pytest.raises(TimeoutError):
        program.train(0, rows(), pools, number=200, look=look)
    assert seen == [0, 1]


def test_trusted_samples_have_right_labels_and_the_last_numbers():
    pool = training.held(DIGITS, "worst", TRUSTED).candidates
    index, given = np.asarray(pool.index), np.asarray(pool.labels).argmax(1)
    size = len(DIGITS.inputs)
    assert sorted(index) == list(range(size))
    assert (np.flatnonzero(index >= size - len(TRUSTED)) == TRUSTED).all()
    assert (given[TRUSTED] == DIGITS.labels["clean"][TRUSTED]).all()
    others = np.setdiff1d(np.arange(size), TRUSTED)
    assert (given[others] == DIGITS.labels["worst"][others]).all()


def test_an_epoch_takes_every_row_once_and_no_other():
    first, second = itertools.islice(training.epochs(ROWS, TRUSTED, 40, 5, seed=1), 2)
    assert first.candidates.shape == (5, 40) and first.val.shape == (5, 10)
    for rows in (first, second):
        assert sorted(rows.candidates.ravel()) == list(ROWS)
        assert np.isin(rows.val, TRUSTED).all()
    assert (first.candidates != second.candidates).any()


def test_the_rate_rises_for_a_fifth_and_ends_at_zero():
    def rate(step):
        tx = training.tx(100)
        state = tx.init(np.zeros(1))
        state = jax.tree.map(lambda x: np.int32(step) if np.ndim(x) == 0 else x, state)
        update, _ = tx.update(np.ones(1), state, np.zeros(1))
        return -update[0] / 1.9  # Nesterov's first step: (1 + momentum) times the gradient

    rates = [rate(step) for step in (0, 10, 20, 60, 100)]
    np.testing.assert_allclose(rates, [0.04, 0.12, 0.2, 0.1, 0.0], atol=1e-6)


def test_bf16_compute_leaves_parameters_and_logits_in_f32():
    model = from_linen(Classifier(MLP((16,)), 3))
    half = training.in_compute_dtype(model, "bfloat16")
    x = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    params, model_state = half.init(jax.random.key(0), x)
    exact, rounded = (m.logits(params, model_state, x) for m in (model, half))
    assert {p.dtype.name for p in jax.tree.leaves(params)} == {"float32"} == {rounded.dtype.name}
    assert 1e-5 < np.abs(exact - rounded).max() < 0.05
    logits, _ = half.train(params, model_state, x, jax.random.key(1))
    np.testing.assert_array_equal(logits, rounded)


def test_running_statistics_are_never_rounded():
    def train(params, statistics, inputs, key):
        assert params.dtype == inputs.dtype == "bfloat16"
        return params * inputs, statistics

    half = training.in_compute_dtype(Model(None, train, None), "bfloat16")
    third = np.float32(1 / 3)
    product, statistics = half.train(third, third, third, None)
    assert statistics == third and product.dtype == "float32"
