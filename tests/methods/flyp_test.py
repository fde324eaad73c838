"""Contrastive fine-tuning: what a step does, on one device and on eight, whole and in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saflex_jax import Batch, RunInfo, Streams, configure, train
from saflex_jax.core import contrastive
from saflex_jax.data import ArrayStream
from saflex_jax.methods import METHODS, flyp, supervised
from saflex_jax.methods.upstream import upstream
from saflex_jax.models import CLIP, MLP, SmallCNN, TwoTowers, from_function, from_linen, unit
from saflex_jax.parallel import RUNNERS, jit_runner
from saflex_jax.rules import RULES, Posterior, Refinement, Scoring, VisitMean
from tests.parallel.setup_ import ROUNDING, flatten
from tests.problems import assert_close

SAMPLES, CLASSES, TEMPLATES, ROWS, VAL, STEPS = 24, 3, 2, 16, 8, 5
PADDING = 3  # of 16 rows on 8 devices: one holds padding alone
TX = optax.sgd(0.01, momentum=0.9)
_rng = np.random.default_rng(0)
CAPTIONS = _rng.normal(size=(CLASSES, TEMPLATES, 4)).astype(np.float32)
RUN = RunInfo(
    SAMPLES, CLASSES, num_trusted=6, captions=CAPTIONS, counts=np.full(CLASSES, SAMPLES / CLASSES),
    labels=lambda: POOL.labels,
)  # fmt: skip
POOL = Batch(
    _rng.normal(size=(SAMPLES, 5)).astype(np.float32),
    np.eye(CLASSES, dtype=np.float32)[np.arange(SAMPLES) % CLASSES],
    np.ones(SAMPLES, bool),
    np.arange(SAMPLES, dtype=np.int32),
)
NETWORK = TwoTowers(MLP((6,)), MLP((6,)), embed_dim=3)
# As in tests/parallel: a share of wrong labels is given, of which five steps would find none, and
# damping keeps what is left between two runners the rounding of their sums.
SAFLEX = Refinement(
    Scoring("cg(3, damping=5.0)"), Posterior(RUN, noise_rate=0.4, memory=VisitMean(0.9))
)


def batches(number=STEPS):
    rng = np.random.default_rng(1)

    def drawn(size, padding):
        index = rng.permutation(SAMPLES)[:size]
        rows = jax.tree.map(lambda x: x[index], POOL)
        return rows._replace(mask=np.arange(size) < size - padding)

    return [Streams(drawn(ROWS, PADDING), drawn(VAL, 0)) for _ in range(number)]


@functools.cache  # and so one compilation for all tests of the same method
def make(loss="contrastive", rule=None, network=NETWORK, wrapped=lambda model: model, **options):
    given = flyp.Options(loss, **options)
    if loss == "sigmoid":
        network = network.clone(sigmoid=True)
    return flyp.make(wrapped(from_linen(network)), TX, given, rule=rule, run=RUN)


def start(method):
    """At step 0, with logits of order one: a large scale is a large error of rounding."""
    state = jax.jit(method.init)(jax.random.key(0), POOL.inputs[:1])
    small = {name: jnp.zeros(()) for name in state.params if name.startswith("logit_")}
    return state._replace(params=state.params | small)


started = functools.cache(start)


def trained(method, runner, given):
    state = runner.put_state(started(method))
    for batch in given:
        state, _ = runner.step(state, runner.put_batch(batch))
    return flatten(state)


@functools.cache
def single(loss, rule):
    """(method, its runner on one device)."""
    method = make(loss, rule)
    return method, jit_runner(method.step, devices=jax.devices()[:1])


@functools.cache
def reference(loss, rule):
    return trained(*single(loss, rule), batches())


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(
    ("loss", "rule"),
    [("contrastive", SAFLEX), pytest.param("sigmoid", None, marks=pytest.mark.slow)],
)
def test_eight_devices_agree_with_one_after_five_steps(loss, rule, runner):
    method = make(loss, rule)
    found = trained(method, RUNNERS[runner](method.step), batches())
    expected = reference(loss, rule)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        exact = not np.issubdtype(value.dtype, np.floating)
        np.testing.assert_allclose(
            found[name], value, rtol=0, atol=0 if exact else ROUNDING, err_msg=name
        )


def test_the_comparison_is_hard():
    state = reference("contrastive", SAFLEX)
    visited = state["extra/rule/memory/visits"] > 0
    beliefs = state["extra/rule/memory/mean"][visited]
    assert visited.sum() > ROWS and (beliefs.max(1) < 0.9).any()  # of several steps, and undecided


def test_a_run_that_stops_goes_on_from_disk_bit_for_bit(tmp_path):
    method, runner = single("contrastive", SAFLEX)
    options = {"batch_size": ROWS, "val_batch_size": VAL, "seed": 0}

    def fitted(folder, num_steps):  # of an earlier call it has the folder alone
        stream = ArrayStream(Streams(POOL, POOL), **options)
        checkpoints = train.Checkpoints(tmp_path / folder, every=100)
        result = train.fit(
            runner, started(method), stream, num_steps=num_steps, checkpoints=checkpoints,
            progress=False,
        )  # fmt: skip
        checkpoints.close()
        return flatten(result.state)

    assert fitted("parts", 2)["step"] == 2
    found, expected = fitted("parts", 4), fitted("whole", 4)
    assert found.keys() == expected.keys() and found["step"] == 4
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


# --- what a step does ------------------------------------------------------------------------


def by_hand(params):
    """(loss of the first batch without a rule, its gradient), by the core's algebra."""
    batch = jax.tree.map(lambda x: x[: ROWS - PADDING], batches(1)[0].candidates)
    classes = batch.labels.argmax(1)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), 0x7DA06A7C)
    which = [int(jax.random.randint(jax.random.fold_in(key, i), (), 0, 2)) for i in batch.index]
    assert len(set(which)) == 2  # both templates are drawn
    pairs = {"image": batch.inputs, "text": CAPTIONS[classes, which]}
    same = classes[:, None] == classes[None]

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        out = NETWORK.apply({"params": params}, pairs, train=True)
        z = out["scale"] * out["image"] @ out["text"].T
        log_p, log_r = (jax.nn.log_softmax(z, axis) for axis in (1, 0))
        return -jnp.mean(jnp.sum(same * (log_p + log_r), 1) / same.sum(1)) / 2

    return loss(params)


def test_a_step_follows_the_gradient_of_the_contrastive_loss():
    method, (batch,) = make("contrastive"), batches(1)
    state = started(method)
    value, gradient = by_hand(state.params)
    new, metrics = jax.jit(method.step)(state, batch)
    np.testing.assert_allclose(metrics["loss"][0], value, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.01 * g, state.params, gradient)
    assert_close(new.params, expected)


@pytest.mark.parametrize(
    "loss",
    ["contrastive", *(pytest.param(x, marks=pytest.mark.slow) for x in flyp.LOSSES[1:])],
)
def test_parts_have_the_gradient_of_the_whole_batch_and_keys_of_their_own(loss):
    (batch,) = batches(1)
    keys = set()

    def noting(model):
        def train(params, model_state, inputs, key):
            if "image" in inputs:
                jax.debug.callback(lambda k: keys.add(tuple(k.tolist())), jax.random.key_data(key))
            return model.train(params, model_state, inputs, key)

        return model._replace(train=train)

    whole, parts = make(loss), make(loss, parts=4, wrapped=noting)
    found = [jax.jit(m.step)(started(m), batch)[0].params for m in (parts, whole)]
    np.testing.assert_allclose(
        *map(lambda x: jax.flatten_util.ravel_pytree(x)[0], found), atol=1e-6
    )
    jax.effects_barrier()
    assert len(keys) == 4  # each part's, in both of its passes


@pytest.mark.slow
def test_parts_keep_the_activations_of_one_part():
    batch = Streams(batches(1)[0].candidates)
    batch = jax.tree.map(lambda x: np.tile(x, (64, *[1] * (x.ndim - 1))), batch)
    wide = TwoTowers(MLP((512,) * 6), MLP((6,)), embed_dim=3)

    def temporary(parts):
        method = make(network=wide, parts=parts)
        state = jax.eval_shape(method.init, jax.random.key(0), POOL.inputs[:1])
        compiled = jax.jit(method.step).lower(state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8) < 0.5 * temporary(1)


def test_class_prompts_are_a_classifier_of_images():
    # Scores need no other code: rows are independent, and today's chunks do.
    rule = Refinement(Scoring("identity", chunk=4), Posterior(RUN, noise_rate=0.4))
    (batch,) = batches(1)
    method = make("class_prompts", rule)
    state = started(method)
    key = jax.random.fold_in(jax.random.fold_in(state.key, 0), 0x7DA06A7C)
    text = CAPTIONS[np.arange(CLASSES), jax.random.randint(key, (CLASSES,), 0, TEMPLATES)]

    def logits(params, inputs):
        out = NETWORK.apply({"params": params}, {"image": inputs, "text": text}, train=False)
        return out["scale"] * out["image"] @ out["text"].T

    plain = supervised.make(from_function(lambda key, x: state.params, logits), TX, rule)
    expected = jax.jit(plain.step)(state, batch)[0].params
    assert_close(jax.jit(method.step)(state, batch)[0].params, expected)


def test_prediction_is_the_cosine_with_the_mean_of_the_templates():
    method = make("contrastive")
    state = started(method)
    found = jax.jit(method.predict)(state, POOL.inputs)
    clip = CLIP(NETWORK.image, NETWORK.text, NETWORK.embed_dim)

    @jax.jit
    def expected(params):
        variables = {"params": params}
        image = clip.apply(variables, POOL.inputs, method="encode_image")
        captions = CAPTIONS.reshape(CLASSES * TEMPLATES, -1)
        text = clip.apply(variables, captions, method="encode_text")
        classes = unit(unit(text).reshape(CLASSES, TEMPLATES, -1).mean(1))
        return jnp.exp(params["logit_scale"]) * unit(image) @ classes.T

    np.testing.assert_allclose(found, expected(state.params), atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_a_config_takes_pairs_unchanged(rule):
    # Traced alone: what rules compute of class log-probabilities is tested where they are.
    section = {"name": "flyp", "rule": rule, "loss": "cross_entropy"}
    method = configure.make_method(section, from_linen(NETWORK), TX, RUN._replace(num_steps=10))
    state = jax.eval_shape(functools.partial(start, method))
    new, metrics = jax.eval_shape(method.step, state, batches(1)[0])
    assert jax.tree.structure(new) == jax.tree.structure(state) and "candidate_loss" in metrics
    targets = jax.eval_shape(method.targets, state, batches(1)[0])
    assert targets.labels.shape == (ROWS, CLASSES)


def test_weights_and_labels_of_a_rule_are_trained_on():
    given = batches(1)[0]

    class Fixed:
        def init(self, params):
            return ()

        def apply(self, arrays, state, logits_fn, streams, *, reduce):
            targets = flyp.AsGiven().apply(arrays, state, logits_fn, streams)[0]
            half = jnp.full_like(targets.labels, 1 / CLASSES)
            return targets._replace(weights=targets.weights * 2, labels=half), (), {}

    method = make(rule=Fixed())
    state = started(make("contrastive"))  # the rule keeps nothing
    _, metrics = jax.jit(method.step)(state, given)
    soft = given.candidates._replace(labels=np.full((ROWS, CLASSES), 1 / CLASSES, np.float32))
    classes = given.candidates.labels.argmax(1)

    @jax.jit
    def loss(state):
        # The same captions, each row of all classes.
        pairs = flyp._paired(given.candidates, CAPTIONS, flyp.steps.draws_key(state)).inputs
        out = NETWORK.apply(
            {"params": state.params}, {k: pairs[k] for k in ("image", "text")}, train=True
        )
        z = contrastive.similarities(out["image"], out["text"], out["scale"])
        captions = contrastive.captions_of(classes, soft.mask, CLASSES)
        losses = contrastive.softmax_losses(z, captions, soft.mask)[: ROWS - PADDING]
        return 2 * jnp.mean(losses)

    np.testing.assert_allclose(metrics["loss"][0], loss(state), rtol=1e-5)


# --- bad input -------------------------------------------------------------------------------


def refused(match, call, *args, **kwargs):
    with pytest.raises(ValueError, match=match):
        call(*args, **kwargs)


def test_refuses_what_it_cannot_do():
    model, (batch,) = from_linen(NETWORK), batches(1)
    for captions, given in ((None, "None"), (CAPTIONS[:2], r"\[2, 2, 4\]"), (CAPTIONS[:, :0], "0")):
        run = RUN._replace(captions=captions)
        refused(f"run.captions.*{given}", flyp.make, model, TX, run=run)
    refused(r"captions.* must be finite", flyp.make, model, TX,
            run=RUN._replace(captions=CAPTIONS * np.nan))  # fmt: skip
    refused("loss must be one of .*did you mean 'sigmoid'", flyp.Options, "sigmoide")
    refused("parts must be a whole number", flyp.Options, parts=0)

    def step(method, streams):
        return jax.eval_shape(
            method.step, jax.eval_shape(functools.partial(start, method)), streams
        )

    rule = Refinement(Scoring("identity", chunk=4), Posterior(RUN))
    refused(r"scored together .*given 4 of 16", step, make(rule=rule), batch)
    refused("parts must divide the batch of 16 rows", step, make(parts=3), batch)
    refused("flyp trains on candidates alone", step, make(), batch._replace(clean=batch.val))
    normed = TwoTowers(SmallCNN((2,), norm="batch"), MLP(()), 4, projected=("image",))
    method = flyp.make(from_linen(normed), TX, flyp.Options(parts=2), run=RUN)
    refused("parts must be 1 where towers have statistics", jax.eval_shape, method.init,
            jax.random.key(0), np.zeros((1, 4, 4, 3), np.float32))  # fmt: skip


def test_the_network_of_a_config_has_the_towers_that_it_names():
    spec = METHODS["flyp"]
    text = flyp.Text(depth=1, vocab_size=9, context=4, width=8)
    network = spec.network(MLP((6,)), 3, flyp.Options(embed_dim=5, text=text))
    given = {"image": POOL.inputs[:2], "text": np.array([[1, 8, 0, 0]])}

    def init(network, given):
        return jax.eval_shape(lambda: network.init(jax.random.key(0), given, train=False))

    variables = init(network, given)
    assert {"image", "text", "head", "logit_scale"} == set(variables["params"])
    locked = spec.network(MLP(()), 3, flyp.Options(embed_dim=4, text=flyp.Text(projected=False)))
    variables = init(locked, given | {"text": CAPTIONS[:, 0]})
    assert list(variables["params"]["head"]) == ["image"]


def test_an_upstream_pipeline_stands_in_front():
    def twice(key, batch):
        return batch._replace(inputs=2 * batch.inputs)

    (batch,) = batches(1)
    method = make("contrastive")
    doubled = batch._replace(candidates=twice(None, batch.candidates))
    found = jax.jit(upstream(method, twice).step)(started(method), batch)[0].params
    assert_close(found, jax.jit(method.step)(started(method), doubled)[0].params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "tolerance"), [({"remat": True}, 1e-6), ({"dtype": "bfloat16"}, 0.03)]
)
def test_options_of_the_towers_change_what_a_step_costs_and_not_what_it_does(option, tolerance):
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(8, 8, 8, 3)).astype(np.float32)
    rows = jax.tree.map(lambda x: x[:8], POOL)._replace(inputs=images)
    tokens = rng.integers(8, size=(CLASSES, TEMPLATES, 4))
    tokens[..., -1] = 8
    section = {"name": "flyp", "rule": "as_given", "loss": "cross_entropy"}

    def after(given):
        text = {"depth": 1, "vocab_size": 9, "context": 4, "width": 8, **given}
        chosen = section | {"flyp": {"embed_dim": 4, "text": text}}
        size = {"name": "clip_image", "size": 8, "patch": 4, "width": 8, "depth": 1, "heads": 2,
                "mlp_width": 16}  # fmt: skip
        backbone = configure.make_backbone(size | given)
        model = from_linen(configure.make_network(chosen, backbone, CLASSES))
        method = configure.make_method(chosen, model, TX, RUN._replace(captions=tokens))
        state = jax.jit(method.init)(jax.random.key(0), images[:1])
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("float32")}
        return jax.jit(method.step)(state, Streams(rows))[0].params

    found, expected = after(option), after({})
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)
