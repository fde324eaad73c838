import jax
import numpy as np
import pytest

from saflex_jax._compat import enable_x64
from saflex_jax.augment.base import chain, choice, identity, on, views
from saflex_jax.augment.mixing import mixup
from saflex_jax.augment.parse import FACTORIES, parse
from saflex_jax.augment.spatial import cutout, flip, random_erasing, shift
from saflex_jax.augment.tabular import feature_noise
from saflex_jax.types import Batch

KEY = jax.random.key(5)
# What cannot do with its defaults.
EXAMPLES = {
    "shift": "shift(2)",
    "cutout": "cutout(3)",
    "soft_crop": "soft_crop(2.0)",
    "random_field": "random_field(length=3.0, translate=1.0, hue=0.1)",
    "mixup": "mixup(1.0)",
    "cutmix": "cutmix(1.0)",
    "fmix": "fmix(1.0)",
    "gridmix": "gridmix(1.0)",
    "feature_noise": "feature_noise(0.1)",
    "feature_mask": "feature_mask(0.3)",
    "tabular_cutmix": "tabular_cutmix(1.0)",
    "smote": "smote()",
    "manifold_mixup": "manifold_mixup(1.0)",
    "choice": "choice(flip, identity)",
    "on": "on('image', flip)",
}


def images(size=8):
    rng = np.random.default_rng(0)
    inputs = rng.uniform(size=(size, 8, 10, 3)).astype(np.float32)
    labels = np.eye(4, dtype=np.float32)[np.arange(size) % 4]
    return Batch(inputs, labels, np.ones(size, bool), np.arange(size, dtype=np.int32))


def table():
    return images()._replace(inputs=images().inputs.reshape(8, -1))


def both():
    return images()._replace(inputs={"image": images().inputs, "row": table().inputs})


@pytest.mark.parametrize(
    ("text", "direct", "batch"),
    [
        ("flip", flip(), images()),
        ("flip(0.3)", flip(0.3), images()),
        (
            "shift(2, padding='reflect')|flip | \n  cutout(side=3, fill=.5)  ".replace("\n", ""),
            chain(shift(2, padding="reflect"), flip(), cutout(3, fill=0.5)),
            images(),
        ),
        (
            "flip | (shift(2) | cutout(3))",
            chain(flip(), chain(shift(2), cutout(3))),
            images(),
        ),
        (
            " random_erasing(1, scale=(.1, .2), ratio=[1, 2])\n",
            random_erasing(1, scale=(0.1, 0.2), ratio=(1, 2)),
            images(),
        ),
        (
            "choice(flip(1.0), shift(2) | cutout(3), identity, p=(.2, .5, .3))",
            choice(flip(1.0), chain(shift(2), cutout(3)), identity, p=(0.2, 0.5, 0.3)),
            images(),
        ),
        (
            "views(identity, shift(1), choice(shift(2), flip(1.0))) | cutout(2)",
            chain(views(identity, shift(1), choice(shift(2), flip(1.0))), cutout(2)),
            images(),
        ),
        ("views(3, shift(2))", views(shift(2), shift(2), shift(2)), images()),
        (
            "on('image', shift(1) | flip) | on('row', feature_noise(0.1))",
            chain(on("image", chain(shift(1), flip())), on("row", feature_noise(0.1))),
            both(),
        ),
        ("mixup(1.0, probability=0.5)", mixup(1.0, probability=0.5), table()),
    ],
)
def test_a_text_is_the_call_that_it_reads_as(text, direct, batch):
    # The same program, constants included, gives the same samples.
    def program(augment):
        return jax.jit(augment).lower(KEY, batch).as_text()

    assert program(parse(text)) == program(direct)


@pytest.mark.parametrize("text", ["", " \n", "identity", "identity()", " ( identity ) "])
def test_nothing_is_the_identity(text):
    assert parse(text) is identity


@pytest.mark.parametrize(
    "name", sorted(FACTORIES.keys() - {"view"})
)  # its inputs are in view_test.py
def test_every_factory_can_be_named(name):
    given = table() if FACTORIES[name].__module__.endswith("tabular") else images()
    given = both() if name == "on" else given
    # Abstractly: what the operations make is in the tests of their own.
    augmented = jax.eval_shape(parse(EXAMPLES.get(name, name)), KEY, given)
    if name == "manifold_mixup":  # hands the network its inputs and how to mix them
        augmented = augmented._replace(inputs=augmented.inputs["inputs"])

    def shapes(batch):
        return jax.tree.map(lambda x: (x.shape, x.dtype), batch._replace(trace=None))

    assert shapes(augmented) == shapes(given)
    assert augmented.trace.operation.shape[0] == len(given.index)


@pytest.mark.parametrize("name", ["randaugment", "trivialaugment", "autoaugment", "augmix"])
@pytest.mark.filterwarnings("error::FutureWarning")  # of f64 written into f32
def test_policies_stay_in_single_precision_under_x64(name):
    with enable_x64(True):
        augmented = jax.eval_shape(parse(EXAMPLES.get(name, name)), KEY, images())
    assert augmented.inputs.dtype == augmented.trace.magnitude.dtype == np.float32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Names.
        ("randagument(2, 9)", r"^augment must be one of .*; did you mean 'randaugment'"),
        ("flip | shfit(2)", r"^augment must be one of .*given 'shfit'; did you mean 'shift'"),
        ("choice(flip, cutot(3))", r"given 'cutot'; did you mean 'cutout'"),
        ("on(image, flip)", r"given 'image'"),
        # Arguments: what was written, what is accepted.
        ("flip(prob=0.5)", r"^'flip\(prob=0.5\)': .*'prob'.*; accepted: flip\(probability=0.5\)$"),
        ("shift", r"^'shift': .*'pixels'; accepted: shift\(pixels, \*, padding='zero'\)$"),
        ("shift(1, 'zero')", r"^.*positional.*; accepted: shift\(pixels, \*, padding='zero'\)$"),
        ("flip(**{'probability': 1.0})", r"; accepted: flip\(probability=0.5\)$"),
        ("flip(probability=0.1, probability=0.2)", r"names an argument twice$"),
        ("blur(1.0)", r"^sigma must be .*given 1.0"),
        ("identity(1)", r"^identity takes no arguments; given 'identity\(1\)'"),
        ("views(3)", r"^views must read .*; given 'views\(3\)'"),
        ("views(2, 3)", r"^views must read .*; given 'views\(2, 3\)'"),
        ("views(flip, n=2)", r"^views must read .*; given 'views\(flip, n=2\)'"),
        ("choice(flip, 0.3)", r"^choice must read .*; given 'choice\(flip, 0.3\)'"),
        # Values: the factory's own words.
        ("flip(1.5)", r"^probability must lie in \[0, 1\]; given 1.5$"),
        ("flip | shift(-1)", r"^pixels must .*; given -1$"),
        ("shift(2, padding='wrap')", r"^padding must be one of .*given 'wrap'"),
        ("choice(flip, identity, p=(.5, .6))", r"^p must be .*; given \[0.5, 0.6\]$"),
        ("views()", r"^views must have at least one augmentation; given 0$"),
        # Syntax.
        ("flip |", r"^augment must read like '.*'; given 'flip \|' \(.* at column \d+\)$"),
        ("shift(2", r"^augment must read like '.*'; given 'shift\(2' \(.* at column \d+\)$"),
        ("x = flip", r"^augment must read like '.*'; given 'x = flip' "),
        # What is neither a step nor a pipeline.
        ("3", r"^augment must be made of steps name\(\.\.\.\); given '3'$"),
        ("flip, shift(2)", r"made of steps .*; given '\(flip, shift\(2\)\)'$"),
        ("flip + shift(2)", r"made of steps .*; given 'flip \+ shift\(2\)'$"),
        ("flip | 'shift'", r"""made of steps .*; given "'shift'"$"""),
        ("spatial.flip()", r"made of steps .*; given 'spatial.flip\(\)'$"),
        ("flip()(0.5)", r"made of steps .*; given 'flip\(\)\(0.5\)'$"),
        ("shift({[]: 1})", r"made of steps .*; given '\{\[\]: 1\}'$"),
        ("flip(*[0.5])", r"made of steps .*; given '\*\[0.5\]'$"),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "BOMB",
        "[BOMB]",
        "(lambda: BOMB)()",
        "f'{BOMB}'",
        "flip | BOMB",
        "flip(BOMB)",
        "flip(probability=BOMB)",
        "flip(0.5 if BOMB else 0.1)",
        "shift(2 ** BOMB)",
        "shift([BOMB for _ in '1'])",
        "choice(flip, BOMB)",
        "views(2, BOMB)",
    ],
)
def test_nothing_is_evaluated(text, tmp_path):
    trace = tmp_path / "trace"
    bomb = f"__import__('pathlib').Path({str(trace)!r}).touch()"
    with pytest.raises(ValueError, match="augment must be made of steps"):
        parse(text.replace("BOMB", bomb.replace("'", '"') if "f'" in text else bomb))
    assert not trace.exists()
    eval(bomb)
    assert trace.exists()  # it would have shown
