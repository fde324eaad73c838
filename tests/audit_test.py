"""The audit of plain arrays: it finds what was planted, leaves what is right, refuses bad input."""

import dataclasses
import signal

import jax
import numpy as np
import pytest

from saflex_jax import train
from saflex_jax.audit import (
    SURE,
    UNTOLD,
    Head,
    _chosen,
    _folds,
    _Likely,
    _most_likely,
    _of_size,
    _with_noise,
    audit,
    from_logits,
)

# With 60 trusted samples a fifth of the others would be too few to flag: docs/audit.md.
SIZE, CLASSES, TRUSTED, FEATURES = 600, 3, 120, 8
HEAD = Head(widths=(), steps=60, batch_size=64, weight_decay=0.1, folds=2, learning_rate=0.05)
_rng = np.random.default_rng(0)
RIGHT = np.arange(SIZE) % CLASSES
CENTRES = 2.5 * _rng.normal(size=(CLASSES, FEATURES))
KNOWN = np.arange(SIZE) % (SIZE // TRUSTED) == 0
KINDS = _rng.choice(["wrong", "outside", "good"], SIZE, p=[0.3, 0.2, 0.5])
KINDS[KNOWN] = "good"
OUTSIDE = KINDS == "outside"
# The third class is never confused.
WRONG = (KINDS == "wrong") & (RIGHT < 2)
GIVEN = np.where(WRONG, 1 - RIGHT, RIGHT)
X = (CENTRES[RIGHT] + _rng.normal(size=(SIZE, FEATURES))).astype(np.float32)
X[OUTSIDE] = _rng.normal(size=(OUTSIDE.sum(), FEATURES)) - 9


@pytest.fixture(scope="module")
def found():
    return audit(X, GIVEN, trusted=KNOWN, groups=KINDS, head=HEAD)


@pytest.fixture(scope="module")
def alone():
    return audit(X[~OUTSIDE], GIVEN[~OUTSIDE], head=HEAD)


def rates(flagged, bad):
    return bad[flagged].mean(), flagged[bad].mean()


def test_it_finds_wrong_labels_and_the_right_ones(found, alone):
    inside = ~OUTSIDE
    for audited, wrong, right in (
        (dataclasses.replace(found, wrong=found.wrong[inside], learned=found.learned[inside]),
         WRONG[inside], RIGHT[inside]),
        (alone, WRONG[inside], RIGHT[inside]),
    ):  # fmt: skip
        assert min(rates(audited.wrong, wrong)) > 0.85
        assert np.mean(audited.learned == right) > 0.95


def test_evidence_is_of_wrong_labels_alone(found, alone):
    """Hard samples, and few of which beliefs are too sure, look confused, too, but not surely."""
    assert min(found.evidence, alone.evidence) > SURE
    rng = np.random.default_rng(5)
    logits = 2 * rng.normal(size=(4000, CLASSES))
    right = (logits + rng.gumbel(size=logits.shape)).argmax(1)  # as likely as the beliefs say
    wrong = np.where(rng.random(4000) < 0.1, (right + 1) % CLASSES, right)
    assert from_logits(logits, right).evidence < SURE < from_logits(logits, wrong).evidence
    few = from_logits(3 * logits[:100], right[:100])
    assert few.wrong.mean() > 0.1 and few.evidence < SURE


def test_trusted_labels_are_evidence():
    """Of two classes, wrong labels look like those of hard samples."""
    right = np.arange(SIZE) % 2
    wrong = ~KNOWN & (np.random.default_rng(6).random(SIZE) < 0.2)
    logits, given = 2.0 * np.eye(2)[right], np.where(wrong, 1 - right, right)
    assert abs(from_logits(logits, given).evidence) < 1
    assert from_logits(logits, given, trusted=KNOWN).evidence > SURE


def test_it_finds_what_is_of_no_class(found):
    assert min(rates(found.outside, OUTSIDE)) > 0.85
    assert (found.weight[found.outside] == 0).all() and (found.utility[found.outside] == -1).all()


def test_without_trusted_samples_nothing_is_outside(alone):
    assert not alone.outside.any() and (alone.typicality == 1).all()


def test_the_matrix_says_which_classes_are_confused(alone):
    share = WRONG[RIGHT < 2].sum() / ((RIGHT < 2) & ~OUTSIDE).sum()
    assert alone.transition[0, 1] == pytest.approx(share, abs=0.1)
    assert alone.transition[2, 2] > 0.95
    assert alone.noise_rate == pytest.approx(WRONG[~OUTSIDE].mean(), abs=0.05)


def test_wrong_labels_do_not_vouch_for_themselves():
    """Of few samples, second heads know much of the labels that they did not see."""
    rng, right, known = np.random.default_rng(0), np.arange(300) % 2, np.arange(300) < 60
    x = 0.6 * np.where(right, 1, -1)[:, None] + rng.normal(size=(300, 40))
    wrong = ~known & (rng.random(300) < 0.4)
    hard = audit(x.astype(np.float32), np.where(wrong, 1 - right, right), trusted=known, head=HEAD)
    assert hard.noise_rate == pytest.approx(wrong[~known].mean(), abs=0.05)


def test_the_share_of_wrong_labels_is_that_of_the_table(found):
    judged = ~(found.trusted | found.outside)
    assert found.noise_rate == pytest.approx(1 - found.quality[judged].mean(), abs=1e-4)


@pytest.mark.parametrize("noise_rate", [0.02, 0.6])
def test_one_factor_on_the_odds_of_given_labels_makes_a_share_wrong(noise_rate):
    labels = np.random.default_rng(7).dirichlet(np.ones(CLASSES), SIZE).astype(np.float32)
    rows, counted = np.arange(SIZE), ~KNOWN
    changed = np.asarray(_with_noise(labels, GIVEN, counted, noise_rate))
    given, before = changed[rows, GIVEN], labels[rows, GIVEN]
    assert 1 - given[counted].mean() == pytest.approx(noise_rate, abs=1e-4)
    factors = given / (1 - given) / (before / (1 - before))
    np.testing.assert_allclose(factors, factors[0], rtol=1e-3)
    same = _with_noise(labels, GIVEN, counted, 1 - before[counted].mean())
    np.testing.assert_allclose(same, labels, atol=1e-4)


def test_trusted_samples_stay_as_they_are(found):
    assert not (found.wrong | found.outside)[KNOWN].any()
    np.testing.assert_array_equal(found.learned[KNOWN], GIVEN[KNOWN])
    np.testing.assert_array_equal(found.quality[KNOWN], 1)


def test_the_table_has_a_row_for_each_sample_and_the_groups_are_its_means(found):
    table = found.columns()
    assert {len(column) for column in table.values()} == {SIZE}
    np.testing.assert_allclose(found.labels.sum(1), 1, atol=1e-5)
    for name, group in found.groups.items():
        rows = KINDS == name
        assert group.count == rows.sum()
        assert group.mean == pytest.approx(table["utility"][rows].mean(), abs=1e-4)
    low, high = found.groups["outside"].interval()
    assert high < 0 < found.groups["good"].interval()[0] and low > -1.5


def test_samples_of_one_source_share_a_fold_and_folds_are_even():
    source = np.repeat(np.arange(50), 4)[_rng.permutation(200)]
    for trusted in (np.zeros(200, bool), source < 10):
        fold = _folds(trusted, source, 5, seed=0)
        assert all(len(set(fold[source == s])) == 1 for s in range(50))
        assert set(np.bincount(fold)) == {40}
    few = _folds(np.arange(200) < 9, None, 5, seed=0)  # too few trusted ones to leave any out
    assert (few[:9] == -1).all() and (few[9:] >= 0).all()


@pytest.mark.parametrize("sources", [50, 20])
def test_crops_of_a_trusted_image_share_its_fold(sources):
    source = np.arange(200) % sources
    trusted = np.arange(200) < 20
    fold = _folds(trusted, source, 5, seed=0)
    assert all(len(set(fold[source == s])) == 1 for s in range(sources))
    assert set(np.bincount(fold)) == {40} and set(np.bincount(fold[trusted])) == {4}
    few = _folds(np.arange(200) < 9, source, 5, seed=0)
    assert (few[:9] == -1).all()
    assert all(len(set(few[9:][source[9:] == s]) - {-1}) == 1 for s in range(sources))


def test_the_smallest_fold_sets_the_batches(monkeypatch):
    """Of 39 samples and a trusted one, each head has 32 or 33, the trusted one too."""

    def stopped(runner, states, stream, **_):
        batch = next(stream)
        assert batch.candidates.shape == (5, 32) and batch.val.shape == (5, 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        audit(X[:40], GIVEN[:40], trusted=np.arange(40) == 3, head=Head(widths=()))


def test_a_head_passes_over_few_samples_a_few_times():
    head = Head()
    assert _of_size(head, 10_000) == head
    assert _of_size(head, 1600) == dataclasses.replace(head, steps=100)  # 16 passes of 6.25
    assert _of_size(head, 100) == dataclasses.replace(head, steps=30, batch_size=100)
    assert _of_size(dataclasses.replace(head, steps=20), 100).steps == 20


def test_logits_of_another_network_give_the_same_kind_of_table():
    belief = np.where(np.eye(CLASSES)[RIGHT] > 0, 5.0, 0.0).astype(np.float32)
    found = from_logits(belief, GIVEN)
    assert min(rates(found.wrong, WRONG)) > 0.99
    assert set(found.columns()) >= {"row", "given", "learned", "quality", "weight", "utility"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(features=X.astype(int)), "features must be floats"),
        (dict(features=np.where(X == X[3, 2], np.nan, X)), "features must be finite; given nan at"),
        (dict(labels=GIVEN[1:]), "labels must have shape"),
        (dict(labels=GIVEN - 1), "labels must lie in"),
        (dict(labels=GIVEN.astype(str)), r"labels must be integers of shape \[N\]; given <U"),
        (dict(labels=GIVEN.astype(float)), "labels must be integers .* given float64"),
        (dict(num_classes=2), "labels must lie in"),
        (dict(trusted=KNOWN.astype(int)), "trusted must be bool"),
        (dict(trusted=KNOWN[1:]), "trusted must have shape"),
        (dict(trusted=np.ones(SIZE, bool)), "samples that are not trusted"),
        (dict(source=np.zeros(SIZE, int)), "of different sources"),
        (dict(groups=KINDS[1:]), "groups must have shape"),
    ],
)
def test_bad_input_is_named_before_anything_is_compiled(change, message, monkeypatch):
    def compiled(*_, **__):
        raise AssertionError("compiled")

    monkeypatch.setattr(jax, "jit", compiled)
    with pytest.raises(ValueError, match=message):
        audit(**{"features": X, "labels": GIVEN, "head": HEAD} | change)


def test_an_interrupted_audit_gives_no_table(monkeypatch):
    real = train.fit

    def interrupted(*arguments, **options):
        result = real(*arguments, **{**options, "num_steps": 1, "log_every": 1})
        return result._replace(stopped_by=signal.SIGINT)

    monkeypatch.setattr(train, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audit(X, GIVEN, head=HEAD)


def test_there_must_be_samples_to_judge():
    with pytest.raises(ValueError, match="must be samples to judge; all are trusted"):
        from_logits(np.eye(CLASSES)[RIGHT], RIGHT, trusted=np.ones(SIZE, bool))


def test_beliefs_that_know_nothing_are_refused():
    with pytest.raises(ValueError, match="no better than chance"):
        from_logits(np.where(np.eye(CLASSES)[RIGHT] > 0, -3.0, 0.0), RIGHT)


# --- kinds of head -------------------------------------------------------------------------------

HOPELESS = dataclasses.replace(HEAD, weight_decay=19.0)  # times the rate: it forgets every step


def same(several, one):
    assert several.head == one.head == HEAD
    np.testing.assert_allclose(several.labels, one.labels, atol=1e-4)
    np.testing.assert_allclose(several.transition, one.transition, atol=1e-4)


def test_of_several_kinds_of_head_the_likeliest_is_used_as_if_it_were_alone(found):
    same(audit(X, GIVEN, trusted=KNOWN, head=[HOPELESS, HEAD]), found)


def test_kinds_that_do_not_fit_into_memory_together_train_in_turn(alone, monkeypatch):
    monkeypatch.setattr("saflex_jax.audit.MEMORY", 1)
    same(audit(X[~OUTSIDE], GIVEN[~OUTSIDE], head=[HEAD, HOPELESS]), alone)


def test_the_rule_goes_on_where_plain_steps_ended_and_heads_have_their_strength(found, monkeypatch):
    calls, real = [], train.fit

    def recorded(runner, state, stream, **options):
        given = jax.device_get((state.step, state.params, state.opt_state, state.extra.past))
        result = real(runner, state, stream, **options)
        left = result.state
        calls.append((options["num_steps"], given, jax.device_get(
            (left.step, left.params, left.opt_state, left.extra.past)
        )))  # fmt: skip
        return result

    monkeypatch.setattr(train, "fit", recorded)
    other = audit(X, GIVEN, trusted=KNOWN, head=dataclasses.replace(HEAD, strength=3.0))
    (first, _, left), (then, taken, _), (last, fresh, _) = calls
    assert (first, then, last) == (HEAD.steps // 4, HEAD.steps, HEAD.steps) and fresh[0] == 0
    jax.tree.map(np.testing.assert_array_equal, taken, left)
    assert left[3].mean.any()
    assert (other.labels != found.labels).any()  # without strength, the same bits


def test_trusted_samples_that_all_heads_know_do_not_choose():
    rng = np.random.default_rng(2)
    probs = rng.dirichlet(np.ones(CLASSES), SIZE).astype(np.float32)
    changed = np.where(KNOWN[:, None], np.eye(CLASSES, dtype=np.float32)[RIGHT], probs)
    told, all_inside = np.zeros(SIZE, bool), np.ones(SIZE, bool)
    one, same = (_most_likely(p, GIVEN, KNOWN, told, all_inside) for p in (probs, changed))
    assert one.value == same.value and one.power == same.power == UNTOLD[0]
    one, other = (_most_likely(p, GIVEN, KNOWN, KNOWN, all_inside) for p in (probs, changed))
    assert other.value > one.value


def test_the_first_kind_is_used_unless_trusted_labels_surely_say_otherwise():
    def likely(logs):
        return _Likely(logs.mean(), logs, None, None, None)

    rng, told = np.random.default_rng(3), np.arange(500) < 100
    first = rng.normal(size=500)
    sure, unsure = first + 0.1, first + 0.1 + 2 * rng.normal(size=500)
    wrong = np.where(told, first - 0.1, first + 9)  # it knows which labels go wrong
    assert unsure[told].mean() > first[told].mean()
    kinds = [likely(logs) for logs in (first, unsure, wrong)]
    assert _chosen(kinds, told) == 0 and _chosen(kinds, np.zeros(500, bool)) == 2
    assert _chosen([likely(first), likely(sure), likely(wrong)], told) == 1


def test_a_head_that_diverges_is_named():
    wild = dataclasses.replace(HEAD, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"head must not diverge; given .*learning_rate=1e"):
        audit(X[:60], RIGHT[:60], head=wild)


def test_which_head_is_likeliest_is_told_by_labels_that_it_did_not_see():
    """A linear head of many features memorises: its own labels are likelier without decay."""
    rng = np.random.default_rng(1)
    rows = np.flatnonzero(~OUTSIDE)[:200]
    x = np.concatenate([X[rows], rng.normal(size=(200, 100))], 1).astype(np.float32)
    weak = dataclasses.replace(HEAD, weight_decay=0.0, steps=400, epochs=400)
    strong = dataclasses.replace(weak, weight_decay=3.0)
    assert audit(x, GIVEN[rows], head=[weak, strong]).head == strong


def test_kinds_of_head_differ_in_how_little_they_memorise_alone():
    for kinds in ([], None, ["linear"], [HEAD, dataclasses.replace(HEAD, steps=90)]):
        with pytest.raises(ValueError, match="several that differ in weight_decay and strength"):
            audit(X, GIVEN, head=kinds)


@pytest.mark.parametrize("field", ["steps", "epochs", "batch_size", "folds", "learning_rate"])
def test_a_bad_head_is_named(field):
    with pytest.raises(ValueError, match=field):
        Head(**{field: 0})
