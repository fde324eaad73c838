import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax.core.steps import gradient_step, init_state
from saflex_jax.parallel import jit_runner
from saflex_jax.train import Checkpoints, Diverged, FitResult, MetricsWriter, fit
from tests.train.setup_ import (
    CLASSES,
    ROWS,
    Tampered,
    arrays,
    assert_same_bits,
    make_run,
    make_stream,
    read_records,
    summing_state,
    summing_step,
)


def quiet_fit(*args, **kwargs):
    return fit(*args, progress=False, **kwargs)


def change(part="candidates", **fields):
    """Streams -> Streams; fields of one of its batches become functions of what they were."""

    def apply(streams):
        batch = getattr(streams, part)
        new = {name: function(getattr(batch, name).copy()) for name, function in fields.items()}
        return streams._replace(**{part: batch._replace(**new)})

    return apply


def poison(x):
    x[2, 1] = np.nan
    return x


@pytest.fixture
def counted():
    """A runner that records how often its step is traced: once per compilation."""
    traced = []

    def step(state, streams, *, reduce):
        traced.append(1)
        return summing_step(state, streams, reduce=reduce)

    return jit_runner(step, devices=jax.devices()[:1]), traced


# --- records ---------------------------------------------------------------------------------


def test_records_are_exact_averages_also_with_padding():
    # Batches with 8, 7, 6, 1, ... real rows: a mean of means would weigh them alike.
    real = [8, 7, 6, 1, 5, 8, 2, 3]
    changes = {
        step: change(mask=lambda m, n=n: np.arange(ROWS) < n) for step, n in enumerate(real, 1)
    }
    stream = Tampered(make_stream(), changes)
    runner = jit_runner(summing_step, devices=jax.devices()[:1])
    result = quiet_fit(runner, summing_state(), stream, num_steps=8, log_every=3)

    reference = make_stream()
    rows = [next(reference).candidates.inputs[:n].astype(np.float64).sum(-1) for n in real]
    windows = [(0, 3), (3, 6), (6, 8)]
    assert [r["step"] for r in result.history] == [3, 6, 8]
    for record, (begin, end) in zip(result.history, windows):
        expected = np.concatenate(rows[begin:end]).mean()
        np.testing.assert_allclose(record["loss"], expected, rtol=1e-5)
    # Only steps 3 and 4 contribute to "rare": the third window leaves it out.
    assert [r.get("rare") for r in result.history] == [7.0, 7.0, None]
    np.testing.assert_allclose(result.state.params, np.concatenate(rows).sum(), rtol=1e-5)


def test_the_history_is_what_the_file_holds(tmp_path):
    evaluated = []

    def evaluate(state):
        evaluated.append(int(state.step))
        return {"accuracy": float(state.params)}

    runner = jit_runner(summing_step, devices=jax.devices()[:1])
    writer = MetricsWriter(tmp_path)
    result = quiet_fit(
        runner, summing_state(), make_stream(), num_steps=14, log_every=2, eval_every=6,
        evaluate=evaluate, writer=writer,
    )  # fmt: skip
    writer.close()
    assert read_records(tmp_path / "metrics.jsonl") == result.history
    assert [r["step"] for r in result.history] == [2, 4, 6, 8, 10, 12, 14]
    assert evaluated == [6, 12, 14]  # and at the last step
    assert [r["step"] for r in result.history if "eval/accuracy" in r] == evaluated
    assert result.history[-1]["eval/accuracy"] == float(result.state.params)
    assert result.stopped_by is None


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs", [{"log_every": 4, "eval_every": 6}, {"log_every": 4, "eval_every": 2}]
)
def test_eval_every_must_be_a_multiple(counted, kwargs):
    runner, traced = counted
    with pytest.raises(ValueError, match=r"multiple of log_every = 4; given [62]"):
        quiet_fit(runner, summing_state(), make_stream(), num_steps=8, **kwargs)
    assert not traced


@pytest.mark.parametrize("log_every", [0, 2.5])
def test_log_every_must_be_whole(counted, log_every):
    runner, traced = counted
    with pytest.raises(ValueError, match=f"log_every must be a whole number >= 1; .* {log_every}"):
        quiet_fit(runner, summing_state(), make_stream(), num_steps=8, log_every=log_every)
    assert not traced


def test_eval_every_needs_something_to_evaluate_by(counted):
    runner, traced = counted
    options = {"num_steps": 8, "log_every": 4, "eval_every": 4}
    with pytest.raises(ValueError, match="evaluate must be given with eval_every; given 4 alone"):
        quiet_fit(runner, summing_state(), make_stream(), **options)
    assert not traced


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            change(labels=lambda y: 1.2 * y),
            r"candidates.labels must have rows .* sum to one; ",
        ),
        (change(inputs=poison), r"candidates.inputs must be finite; given nan at \[2, 1\]"),
        (change("val", inputs=poison), r"val.inputs must be finite"),
        (
            change("val", labels=lambda y: np.pad(y, ((0, 0), (0, 1)))),
            rf"same number of classes; given {{'candidates': {CLASSES}, 'val': {CLASSES + 1}}}",
        ),
        (
            lambda s: s._replace(val=jax.tree.map(lambda x: x[:0], s.val)),
            r"val must hold at least one sample; given 0",
        ),
        (
            change(mask=lambda m: m[:3]),
            rf"candidates.mask must .* \[{ROWS}\]; given \(3,\)",
        ),
        (change(inputs=lambda x: x[:5]), rf"candidates.inputs must have {ROWS} rows"),
    ],
)
def test_a_malformed_first_batch_is_refused_before_compilation(counted, bad, message):
    runner, traced = counted
    with pytest.raises(ValueError, match=message):
        quiet_fit(runner, summing_state(), Tampered(make_stream(), {1: bad}), num_steps=4)
    assert not traced


@pytest.mark.parametrize(
    "bad, message",
    [
        (
            lambda s: s._replace(candidates=jax.tree.map(lambda x: x[:6], s.candidates)),
            rf"\.candidates\.inputs', \({ROWS}, 4\).*\.candidates\.inputs', \(6, 4\)",
        ),
        (
            change("val", labels=lambda y: y.astype(np.float64)),
            r"\.val\.labels', \(8, 3\), 'float32'.*\.val\.labels', \(8, 3\), 'float64'",
        ),
        (lambda s: s._replace(val=None), "another structure"),
    ],
)
def test_a_batch_of_another_shape_is_refused_before_it_compiles(counted, bad, message):
    runner, traced = counted
    with pytest.raises(ValueError, match="batch of step 5 .*" + message):
        quiet_fit(runner, summing_state(), Tampered(make_stream(), {5: bad}), num_steps=9)
    assert len(traced) == 1


# --- divergence ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad_step, num_steps, every, last_good",
    [
        (7, 20, 3, 6),
        (7, 7, 3, 6),  # it is the last step, where a checkpoint is due anyway
        (9, 20, 3, 6),  # it is a step where a checkpoint is due
        (4, 20, 1, 3),
        (2, 20, 5, None),
    ],
)
def test_divergence_names_step_terms_and_checkpoint(
    tmp_path, bad_step, num_steps, every, last_good
):
    runner, state = make_run()
    checkpoints = Checkpoints(tmp_path, every=every, keep=100)
    stream = Tampered(make_stream(), {bad_step: change(inputs=poison)})
    with pytest.raises(Diverged) as error:
        quiet_fit(runner, state, stream, num_steps=num_steps, checkpoints=checkpoints)
    message = str(error.value)
    assert f"step {bad_step} is not finite: " in message
    for term in ("loss nan", "candidate_loss nan", "grad_norm nan"):
        assert term in message
    place = "none" if last_good is None else f"step {last_good} in {tmp_path}"
    assert message.endswith(f"last good checkpoint: {place}")
    # fit has waited for its saves: what it names is there, and nothing after it.
    checkpoints.close()
    reader = Checkpoints(tmp_path, every=every, keep=100)
    steps = sorted(int(p.name) for p in tmp_path.iterdir())
    assert steps == list(range(every, bad_step, every)) and reader.latest == last_good
    for step in steps:
        saved, _ = reader.load(state, step)
        assert all(np.isfinite(x).all() for x in arrays(saved).values())
    reader.close()


def test_divergence_without_checkpoints():
    runner, state = make_run()
    stream = Tampered(make_stream(), {3: change("candidates", inputs=poison)})
    with pytest.raises(Diverged, match=r"step 3 is not finite: .*; last good checkpoint: none"):
        quiet_fit(runner, state, stream, num_steps=8)


def test_parameters_that_overflow_are_not_saved(tmp_path):
    # The gradient and the loss of that step are finite; only what the update makes is not.
    def overflowing(state, streams, *, reduce):
        def loss_fn(params):
            return 1.0 * params["w"], (state.model_state, {})

        return gradient_step(state, loss_fn, tx=optax.sgd(1e39), reduce=reduce)

    state = init_state(jax.random.key(0), {"w": jnp.ones(())}, {}, optax.sgd(1e39))
    checkpoints = Checkpoints(tmp_path, every=1)
    with pytest.raises(Diverged, match=r"step 1 .*grad_norm 1, loss 1, param_norm inf; .*: none"):
        quiet_fit(
            jit_runner(overflowing, devices=jax.devices()[:1]),
            state,
            make_stream(),
            num_steps=2,
            checkpoints=checkpoints,
        )
    checkpoints.close()
    assert not list(tmp_path.iterdir())


def test_an_evaluation_that_is_not_finite_stops_the_run():
    runner, state = make_run()
    with pytest.raises(Diverged, match="step 2 is not finite: eval/loss nan"):
        quiet_fit(
            runner,
            state,
            make_stream(),
            num_steps=4,
            log_every=2,
            eval_every=2,
            evaluate=lambda state: {"loss": float("nan")},
        )


# --- stopping and resuming -------------------------------------------------------------------


def ring(*signals):
    """Streams -> Streams; the signals arrive while the batch is being made."""

    def apply(streams):
        for number in signals:
            signal.raise_signal(number)
        return streams

    return apply


def run(folder, changes=(), *, num_steps=20, devices=1):
    """`fit` with checkpoints and metrics in a folder; the stream that it drew from, too."""
    runner, state = make_run(devices)
    stream = Tampered(make_stream(), changes)
    checkpoints = Checkpoints(folder / "checkpoints", every=6, keep=100)
    writer = MetricsWriter(folder, resume_from=checkpoints.latest)
    try:
        result = quiet_fit(
            runner, state, stream, num_steps=num_steps, log_every=5,
            writer=writer, checkpoints=checkpoints,
        )  # fmt: skip
    finally:
        writer.close()
        checkpoints.close()
    return result, stream.seen


def without_time(records):
    return [{k: v for k, v in r.items() if k != "seconds_per_step"} for r in records]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_request_saves_and_the_same_call_continues(tmp_path, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    whole, order = run(tmp_path / "whole")
    first, seen = run(tmp_path / "parts", {8: ring(number)})
    assert first.stopped_by == number and int(first.state.step) == 8
    second, seen_then = run(tmp_path / "parts", {13: ring(number)})
    assert second.stopped_by == number and int(second.state.step) == 13
    third, seen_last = run(tmp_path / "parts")
    assert third.stopped_by is None
    assert_same_bits(third.state, whole.state)
    assert seen + seen_then + seen_last == order
    # Stops leave no trace in the records.
    records = without_time(read_records(tmp_path / "parts" / "metrics.jsonl"))
    assert records == without_time(whole.history)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.parametrize("at", [9, 13])  # after checkpoints of 6 and 12, within a record
def test_records_after_a_sudden_end_are_those_of_a_run_without_one(tmp_path, at):
    def end(streams):
        raise OSError("power")

    whole, _ = run(tmp_path / "whole")
    with pytest.raises(OSError, match="power"):
        run(tmp_path / "parts", {at: end})
    resumed, _ = run(tmp_path / "parts")
    assert_same_bits(resumed.state, whole.state)
    files = [tmp_path / folder / "metrics.jsonl" for folder in ("parts", "whole")]
    assert without_time(read_records(files[0])) == without_time(read_records(files[1]))


def test_a_run_is_extended(tmp_path):
    whole, _ = run(tmp_path / "whole", num_steps=20)
    run(tmp_path / "parts", num_steps=15)
    extended, _ = run(tmp_path / "parts", num_steps=20)
    assert_same_bits(extended.state, whole.state)


def test_a_finished_run_stays_as_it_is(tmp_path):
    whole, _ = run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    again, seen = run(tmp_path)
    assert_same_bits(again.state, whole.state)
    assert again.history == [] and seen == [] and again.stopped_by is None
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_request_at_the_last_step_comes_too_late(tmp_path):
    result, _ = run(tmp_path, {20: ring(signal.SIGTERM)})
    assert result.stopped_by is None and int(result.state.step) == 20


def test_a_second_ctrl_c_interrupts(tmp_path):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, {8: ring(signal.SIGINT, signal.SIGINT)})
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert_same_bits(run(tmp_path)[0].state, run(tmp_path / "whole")[0].state)


def test_an_error_restores_the_handlers():
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def fail(streams):
        raise OSError("disk")

    runner, state = make_run()
    with pytest.raises(OSError, match="disk"):
        quiet_fit(runner, state, Tampered(make_stream(), {3: fail}), num_steps=8)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_fit_in_a_thread(tmp_path):
    # Python allows signal handlers in the main thread only.
    whole, _ = run(tmp_path / "whole")
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path / "thread")))
    thread.start()
    thread.join()
    assert_same_bits(results[0][0].state, whole.state)


def test_a_resume_on_other_devices(tmp_path):
    # The checkpoint does not tie a run to the machine that it began on.
    run(tmp_path, {8: ring(signal.SIGTERM)}, devices=8)
    result, _ = run(tmp_path, devices=1)
    whole, _ = run(tmp_path / "whole", devices=1)
    for name, expected in arrays(whole.state).items():
        np.testing.assert_allclose(arrays(result.state)[name], expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_run_that_was_stopped_is_not_taken_for_a_whole_one(handler):
    """Also where Ctrl-C is ignored, as in a job that a shell started in the background."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            FitResult("half", [], signal.SIGINT).completed()
    finally:
        signal.signal(signal.SIGINT, before)
    assert FitResult("whole", [], None).completed() == "whole"
