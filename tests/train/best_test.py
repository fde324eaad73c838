"""Early stopping: which state is kept, of single runs and of the members of a sweep."""

import shutil
import signal

import jax
import numpy as np
import pytest

from saflex_jax.data import StackedStream
from saflex_jax.parallel import jit_runner, member, stack_states, sweep_runner
from saflex_jax.train import Best, CheckpointError, Checkpoints, fit
from tests.train.loop_test import ring
from tests.train.setup_ import (
    Tampered,
    assert_same_bits,
    make_stream,
    summing_state,
    summing_step,
)

ONE = jax.devices()[:1]
SINGLE, SWEEP = (make(summing_step, devices=ONE) for make in (jit_runner, sweep_runner))
SCORES = {2: 0.25, 4: 0.75, 6: 0.5, 8: 0.75, 10: 0.5, 11: 0.75}  # 4 is the first of the largest
OPTIONS = {"num_steps": 11, "log_every": 2, "eval_every": 2, "progress": False}


def scored(scores):
    return lambda state: {"accuracy": scores[int(state.step)], "loss": 1.0}


def at(step):
    """The state of a run that ends at a step."""
    return fit(SINGLE, summing_state(), make_stream(), num_steps=step, progress=False).state


@pytest.mark.parametrize(
    "scores, step",
    [
        (SCORES, 4),
        ({step: -float(step) for step in SCORES}, 2),
        ({step: float(step) for step in SCORES}, 11),
        (dict.fromkeys(SCORES, 0.0), 2),
    ],
)
def test_the_first_of_the_best_is_kept_and_the_run_is_what_it_is_without(scores, step):
    best = Best(scored(scores))
    result = fit(SINGLE, summing_state(), make_stream(), evaluate=best, **OPTIONS)
    assert_same_bits(best.state, at(step))
    assert_same_bits(result.state, at(11))
    assert [r["eval/accuracy"] for r in result.history] == list(scores.values())


def test_another_score_decides():
    best = Best(lambda state: {"accuracy": 1.0, "auc": SCORES[int(state.step)]}, score="auc")
    fit(SINGLE, summing_state(), make_stream(), evaluate=best, **OPTIONS)
    assert int(best.state.step) == 4


def test_members_choose_for_themselves():
    falling = {step: 1 / step for step in SCORES}

    def evaluate(state):
        return {"accuracy": [scores[int(state.step)] for scores in (SCORES, falling)]}

    best, stream = Best(evaluate), StackedStream([make_stream(), make_stream()])
    states = stack_states([summing_state(), summing_state()])
    result = fit(SWEEP, states, stream, evaluate=best, **OPTIONS)
    for number, step in enumerate((4, 2)):
        assert_same_bits(best.of_member(number), at(step))
    assert_same_bits(member(result.state, 0), at(11))


def killed(folder, changes=(), scores=SCORES, config=None):
    """A run with both kinds of checkpoints; what `Best` says of it after the last call."""
    runs = [
        Checkpoints(folder / "run", every=5, config=config),
        Checkpoints(folder / "best", every=1, keep=1, config=config),
    ]
    best = Best(scored(scores), checkpoints=runs[1])
    try:
        result = fit(
            SINGLE, summing_state(), Tampered(make_stream(), changes), evaluate=best,
            checkpoints=runs[0], **OPTIONS,
        )  # fmt: skip
        best.restore(result.state)
    finally:
        for checkpoints in runs:
            checkpoints.close()
    return best.state


def test_a_run_that_was_stopped_keeps_its_best(tmp_path):
    killed(tmp_path, {7: ring(signal.SIGTERM)})
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["4"]
    assert_same_bits(killed(tmp_path), at(4))
    assert_same_bits(killed(tmp_path), at(4))  # a finished run says it again


def test_a_best_that_is_later_than_the_last_checkpoint_stays_the_best(tmp_path):
    # As SIGKILL leaves it: the run's last checkpoint is of step 5, the best was of step 8.
    scores = SCORES | {8: 1.0}
    killed(tmp_path, {9: ring(signal.SIGTERM)}, scores)
    shutil.rmtree(tmp_path / "run" / "9")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["5"]
    assert_same_bits(killed(tmp_path, scores=scores), at(8))


def test_the_best_of_another_config_is_refused(tmp_path):
    killed(tmp_path, config={"seed": 0})
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"written by another config \(seed: 0 -> 1\)"):
        killed(tmp_path, config={"seed": 1})


def test_scores_are_compared_as_they_are():
    """Not as f32, in which these two are one number."""
    best = Best(scored({1: 0.5, 2: 0.5 + 1e-9}))
    for step in (1, 2):
        best(summing_state()._replace(step=np.int32(step)))
    assert int(best.state.step) == 2
