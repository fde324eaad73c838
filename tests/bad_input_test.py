"""Input that was once accepted in silence, or refused in words that did not say what was wrong."""

import io
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import saflex_jax
from experiments import build, task
from experiments.configs import digits, wdbc
from saflex_jax import augment, checks, data
from saflex_jax.core.linear_solve import cg_solve, neumann_solve
from saflex_jax.core.losses import weighted_cross_entropy
from saflex_jax.core.posterior import posterior_targets
from saflex_jax.core.targets import solve_targets
from saflex_jax.data.images import MOST_PIXELS, image_rows
from saflex_jax.data.tables import Column
from saflex_jax.types import Batch

X, Y, W = jnp.eye(4, 3), jnp.eye(4, 2)[jnp.array([0, 1, 1, 0])], jnp.zeros((3, 2))
Q, CLASSES = jnp.eye(2), jnp.array([0, 1, 1, 0])
FLOATS = np.zeros((2, 3), np.float32)


def linear(params, x):
    return x @ params


def score(params=W, labels=Y, **options):
    return saflex_jax.score(linear, params, X, X, labels, **options)


def with_state(params, x):
    return linear(params, x), {}


def mixed(augmentation, labels=Y):
    batch = Batch(X, labels, jnp.ones(4, bool), jnp.arange(4))
    made = augment.parse(augmentation) if isinstance(augmentation, str) else augmentation
    return made(jax.random.key(0), batch)


half = augment.per_example("flip", lambda key, x: x / 2)


def encode(*column):
    return data.fit_encoder(np.array(column)[:, None], [Column("age", None)])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: score(labels=7 * Y), r"val_labels must have rows .* row 0 is \[7.0, 0.0\]"),
        (lambda: score(val_mask=jnp.zeros(4, bool)), "val_mask must be True for at least one row"),
        (lambda: score(val_mask=jnp.ones(3, bool)), r"val_mask must have shape \[4\]; given \(3,"),
        (lambda: score(mask=jnp.ones(3, bool)), r"mask must have shape \[4\]; given \(3,\)"),
        (
            lambda: checks.finite(x=jnp.array([0, jnp.inf], jnp.bfloat16)),
            r"x must be finite; given inf at \[1\]",
        ),
        (lambda: score(predicate="head"), r"predicate .*under\('head'\); given 'head'"),
        (lambda: score(solve=cg_solve), r"solve must .* such as cg_solve\(\); given cg_solve"),
        (lambda: score(labels=Y.tolist()), "val_labels must be an array; given list"),
        (lambda: saflex_jax.score(W, linear, X, X, Y), r"logits_fn must .* logits \[B, K\]; given"),
        (lambda: saflex_jax.score(with_state, W, X, X, Y), "logits must be an array; given tuple"),
        (
            lambda: solve_targets(score(), Y),
            r"scores must be an array; given Scores\(scores, l",
        ),
        (lambda: solve_targets(Y, Y.tolist()), "prior must be an array; given list"),
        (lambda: mixed("mixup(1.0)", CLASSES), r"labels must be floats \[B, K\].*int32\[4\]: jax"),
        (lambda: mixed("mixup(1.0)", Y.astype(int)), r"labels must be floats .* int32\[4, 2\]"),
        (lambda: mixed("smote()", CLASSES), "labels must be floats"),
        (lambda: mixed("swapped_classes(0.5)", CLASSES), "labels must be floats"),
        (lambda: mixed(half), r"augment.per_example\('flip'\) must return \(input, magnitude\); g"),
        (lambda: score(W.astype(int)), "params must be floating-point .* given int32"),
        (lambda: posterior_targets(Q, Q, jnp.float32(1.5)), r"noise must lie in \[0, 1\]; given"),
        (lambda: posterior_targets(Q, 3 * Q, 0.4), "not logits; given .* sums up to 3"),
        (lambda: posterior_targets(Q[:, :1], Q[:, :1], 0.4), "num_classes must .* >= 2; given 1"),
        (lambda: cg_solve(maxiter=2.5), "maxiter must be a whole number >= 1; given 2.5"),
        (lambda: cg_solve(damping=np.inf), "damping must be >= 0 and finite; given inf"),
        (lambda: neumann_solve(steps=2.5, scale=1), "steps must be a whole number >= 0; given 2.5"),
        (lambda: neumann_solve(steps=2, scale=1, damping=np.inf), "damping must .* given inf"),
        (lambda: weighted_cross_entropy(Q, Q, jnp.array([-1, 1.0])), "weights .* >= 0; given -1"),
        (lambda: augment.parse("views(100000, flip)"), r"views must lie in \[1, 64\]; given 1000"),
        (lambda: augment.parse("mixup(nan)"), "alpha must be positive and finite; given nan"),
        (lambda: augment.parse("mixup('.2')"), "alpha must be positive and finite; given '.2'"),
        (lambda: augment.parse("flip|" * 3000 + "flip"), "must have fewer operations; given 3001"),
        (lambda: data.priors(np.array([[0.2, 0.3, 0.5]]), 2), r"or \[N, 2\] for 2 classes"),
        (lambda: data.priors(np.array([[0, 1, 1]]), 3, "multilabel"), r"\[N, 2\] for 3 classes"),
        (
            lambda: data.priors(np.array([0, 1]), 10**9),
            r"num_classes must lie in .* given 10000000",
        ),
        (
            lambda: data.Pool.from_arrays(np.full((2, 4, 4, 3), 255.0), Q, np.arange(2)),
            r"inputs must be images in \[0, 1\].* given 255: divide",
        ),
        (
            lambda: data.Pool.from_arrays(FLOATS, np.eye(2), np.array([0, 10**10])),
            r"source must lie in \[0, 134217728\); row 1 is 10000000000",
        ),
        (lambda: encode(1e308, -1e308, 1e308), "column 'age'; given up to 1e.308: remove or clip"),
        (lambda: encode(1.0, 2.0, 1e30, 3.0), r"column 'age'; given up to 1e\+30: remove or clip"),
        (
            lambda: data.IndexStream(saflex_jax.Streams(8), batch_size=9, seed=0),
            "batch_size must be at most the 8 rows of candidates.* given 9",
        ),
        (
            lambda: data.IndexStream(saflex_jax.Streams(8), batch_size=4, seed=-1).rows(0),
            "seed must be a whole number >= 0; given -1",
        ),
    ],
)
def test_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "section, field, value, message",
    [
        ("optimizer", "learning_rate", -1.0, r"learning_rate must lie in \[0, 100\]; given -1.0"),
        ("optimizer", "learning_rate", 1e9, r"learning_rate must lie in .* given 1000000000.0"),
        ("optimizer", "weight_decay", -5.0, r"weight_decay must lie in \[0, 100\]; given -5.0"),
        ("train", "val_batch_size", -1, "val_batch_size must be a whole number >= 0; given -1"),
        ("model", "widths", (0,), "config.model.widths must be a whole number >= 1; given 0"),
        ("model", "widths", (-3,), "config.model.widths must be a whole number >= 1; given -3"),
        ("", "seed", -1, r"config.seed must lie in \[0, 4.29497e\+09\]; given -1"),
        ("", "seed", 2**40, r"config.seed must lie in .* given 1099511627776"),
    ],
)
def test_configs(section, field, value, message):
    config = digits.get_config()
    (config[section] if section else config)[field] = value
    with pytest.raises(ValueError, match=message):
        build.check(config)


def test_a_network_for_images_is_refused_on_a_table():
    config = wdbc.get_config()
    config.unlock()
    config.model = {"name": "small_cnn"}
    pools = task.make_data(config).pools
    with pytest.raises(ValueError, match=r"config.model.name .* wdbc, whose inputs are .*'small_c"):
        build.make_model(config, pools)


def header(*shape):
    file = io.BytesIO()
    about = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue() + bytes(64)


def npz(path, label):
    arrays = {f"{s}_images": np.zeros((2, 4, 4), np.uint8) for s in ("train", "val", "test")}
    arrays |= {f"{s}_labels": np.array([[0], [label]]) for s in ("train", "val", "test")}
    np.savez(path, **arrays)


def test_own_files_of_another_kind(tmp_path):
    floats, labels = np.zeros((4, 2, 2)), np.array(["a", "b", "b", "a"])
    for name, content, message in (
        ("x.npz", {"X": floats, "y": labels}, r": it has \['X', 'y'\]$"),
        ("x.npz", {"images": floats, "labels": labels.astype(object)}, r"texts, .astype\(str\)"),
        (
            "x.npz",
            {"images": floats + np.nan, "labels": labels},
            r"images must .* at \[0, 0, 0, 0\]",
        ),
        ("x.tsv", "a\tb\n", r"a comma-separated table \(.csv, .*; given a file .tsv"),
        ("x.parquet", "PAR1", "an .npz file or .* given a file .parquet"),
    ):
        file = tmp_path / name
        if isinstance(content, str):
            file.write_text(content)
        else:
            np.savez(file, **content)
        with pytest.raises(ValueError, match=message):
            task.opened(str(file), "", 0, "", False)


def test_npz_files(tmp_path):
    path = tmp_path / "x.npz"

    def refused(message):
        with pytest.raises(ValueError, match=f"x.npz must .*{message}"):
            data.from_npz(path)

    path.write_text("hello")
    refused("it is no zip archive")
    with path.open("wb") as file:
        np.save(file, FLOATS)
    refused("it is no zip archive")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.npy", header(10**12, 8, 8))
    refused("Unable to allocate")
    npz(path, 10**9)
    refused("fewer classes than its 6 samples, from 0 on; given a label of 1000000000")
    npz(path, 1)
    assert data.from_npz(path).num_classes == 2


def test_priors_of_many_classes_need_no_square_of_them():
    assert data.priors(np.array([39_999, 0]), 40_000).nonzero()[1].tolist() == [39_999, 0]


def test_a_column_of_few_values_far_apart_is_encoded():
    assert np.isfinite(encode(0.0, 1e9, 0.0)(np.array([[0.0]]))).all()


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path):
    side = int(MOST_PIXELS**0.5)
    Image.new("1", (side + 1, side)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x.png .* at most 67,108,864 pixels; given 8193 x 8192"):
        image_rows([tmp_path / "x.png"])


def test_a_config_that_is_none(tmp_path):
    (tmp_path / "notes.txt").write_text("It's prose.")
    command = [sys.executable, "-m", "experiments.main", f"--config={tmp_path / 'notes.txt'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: --config must be a Python file with a function get_config;"
    )
    assert len(done.stderr.splitlines()) == 1
