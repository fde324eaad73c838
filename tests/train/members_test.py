"""The loop on a sweep: records, checkpoints and failures of its members, by known numbers."""

import signal

import jax
import numpy as np
import pytest

from saflex_jax.data import StackedStream
from saflex_jax.parallel import jit_runner, member, stack_states, sweep_runner
from saflex_jax.train import Checkpoints, Diverged, evaluate_each, fit, of_members
from tests.train.loop_test import change, poison, ring
from tests.train.setup_ import (
    Tampered,
    assert_same_bits,
    make_method,
    make_stream,
    summing_state,
    summing_step,
)

ONE = jax.devices()[:1]
SWEEP = sweep_runner(summing_step, devices=ONE)
SINGLE = jit_runner(summing_step, devices=ONE)


def start(number):
    """The state of a member, apart from the others'."""
    return summing_state()._replace(params=np.float32(100 * number))


def quiet_fit(runner, state, streams, *, stream=None, **options):
    stream = StackedStream(streams) if stream is None else stream
    return fit(runner, state, stream, progress=False, log_every=3, **options)


def without_time(records):
    return [{k: v for k, v in r.items() if k != "seconds_per_step"} for r in records]


def test_members_have_the_records_of_their_single_runs(capsys):
    evaluates = [lambda state: {"params": float(state.params)}]
    evaluates += [lambda state, a=a: {"params": float(state.params), "accuracy": a} for a in (0, 1)]
    states = [start(number) for number in range(3)]
    options = {"num_steps": 8, "eval_every": 3}
    streams = StackedStream([make_stream() for _ in states])
    evaluate = evaluate_each(evaluates)
    result = fit(SWEEP, stack_states(states), streams, log_every=3, evaluate=evaluate, **options)
    assert "eval/accuracy=0.5" in capsys.readouterr().err  # the mean of those that have one
    histories = of_members(result.history)
    for number, state in enumerate(states):
        alone = fit(
            SINGLE, state, make_stream(), progress=False, log_every=3,
            evaluate=evaluates[number], **options,
        )  # fmt: skip
        assert without_time(histories[number]) == without_time(alone.history)
        assert_same_bits(member(result.state, number), alone.state)
        assert [r["seconds_per_step"] for r in histories[number]] == [
            r["seconds_per_step"] / 3 for r in result.history
        ]
    assert "rare" in histories[0][0] and "rare" not in histories[0][2]
    assert ["eval/accuracy" in h[0] for h in histories] == [False, True, True]


def test_no_record_tells_no_number_of_members():
    done = stack_states([start(0)._replace(step=np.int32(3)), start(1)._replace(step=np.int32(3))])
    result = quiet_fit(SWEEP, done, [make_stream(), make_stream()], num_steps=3)
    assert result.history == []
    with pytest.raises(ValueError, match=r"history must hold records .*; given \[\]"):
        of_members(result.history)


def test_a_sweep_that_was_stopped_continues_bit_for_bit(tmp_path):
    def run(folder, changes=()):
        streams = StackedStream([make_stream(), make_stream()])
        checkpoints = Checkpoints(tmp_path / folder, every=2)
        result = quiet_fit(
            SWEEP,
            stack_states([start(0), start(1)]),
            None,
            stream=Tampered(streams, changes),
            num_steps=9,
            checkpoints=checkpoints,
        )
        checkpoints.close()
        return result

    whole = run("whole")
    assert run("parts", {5: ring(signal.SIGTERM)}).stopped_by == signal.SIGTERM
    assert_same_bits(run("parts").state, whole.state)


def test_divergence_names_the_members():
    def poisoned(number):
        bad = Tampered(make_stream(), {4: change(inputs=poison)})
        bad.batch = lambda step: next(bad)
        return bad if number in (1, 3) else make_stream()

    states = stack_states([start(number) for number in range(4)])
    with pytest.raises(Diverged, match=r"step 4 of members \[1, 3\] is not finite: loss nan, rare"):
        quiet_fit(SWEEP, states, [poisoned(number) for number in range(4)], num_steps=8)


def test_an_evaluation_of_a_member_that_is_not_finite_stops_the_sweep():
    evaluates = [lambda state: {"loss": 1.0}, lambda state: {"loss": float("inf"), "own": 1.0}]
    with pytest.raises(Diverged, match=r"step 3 of members \[1\] .*eval/loss inf, eval/own 1"):
        quiet_fit(
            SWEEP, stack_states([start(0), start(1)]), [make_stream(), make_stream()],
            num_steps=3, eval_every=3, evaluate=evaluate_each(evaluates),
        )  # fmt: skip


def test_a_malformed_batch_of_a_member_is_refused_before_compilation():
    bad = Tampered(make_stream(), {1: change(labels=lambda y: 1.2 * y)})
    bad.batch = lambda step: next(bad)
    runner = sweep_runner(make_method().step, devices=ONE)
    init = make_method().init(jax.random.key(0), make_stream().batch(0).candidates.inputs)
    with pytest.raises(ValueError, match=r"candidates.labels must have rows .* sum to one"):
        quiet_fit(runner, stack_states([init, init]), [make_stream(), bad], num_steps=2)
