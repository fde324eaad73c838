"""The shared command and timing, RandAugment's peers, the input paths."""

import json
import re
import sys
import types

import jax
import numpy as np
import pytest
import tqdm
from PIL import Image
from scipy import ndimage

from benchmarks import (
    audit,
    augment_throughput,
    bounded_memory,
    input_pipeline,
    reporting,
    timing,
)
from saflex_jax import parallel
from saflex_jax.augment import policies
from tests.benchmarks.ends_ import refused

MISSING = ("albumentations", "kornia")


@pytest.fixture
def tiny(monkeypatch):
    """One image size, and none of the libraries that only the benchmarks need."""
    monkeypatch.setattr(augment_throughput, "BATCH_SIZES", {8: 16})
    monkeypatch.setattr(augment_throughput, "SECONDS", 0.0)
    for name in (*MISSING, "torch"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.slow
def test_the_report_holds_every_number_or_the_reason_why_not(tiny, capsys, tmp_path):
    file = tmp_path / "out.json"
    assert augment_throughput.main(["--json", "--rounds", "1", "--out", str(file)]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made == json.loads(file.read_text())
    rates, why = made["images_per_second"]["8"], made["why_null"]["8"]
    assert set(rates) == {"saflex_jax", "pillow", "copy", *MISSING}
    assert {name for name, rate in rates.items() if rate is None} == set(why) == set(MISSING)
    for name in MISSING:
        missing = "torch" if name == "kornia" else name  # which it imports first
        assert why[name].startswith("ModuleNotFoundError") and missing in why[name]
        assert made["ratios"]["8"][f"saflex_jax/{name}"] is None
    for above, below in [("saflex_jax", "pillow"), ("copy", "saflex_jax")]:
        assert made["ratios"]["8"][f"{above}/{below}"] == rates[above] / rates[below] > 0
    assert len(made["ratios"]["8"]) == len(MISSING) + 2
    assert set(made["spread"]["8"]) == set(made["peers"]) == set(rates)
    assert made["machine"]["cores"] >= 1
    assert made["machine"]["versions"]["jax"]


def test_ctrl_c_prints_what_was_measured(tiny, monkeypatch, capsys):
    calls = []

    def interrupting():
        calls.append(1)
        if len(calls) == 3:  # two warm up; by then its predecessor has been timed
            raise KeyboardInterrupt

    def nothing():
        """Does nothing."""

    def setup(job):
        def of_images(images):
            return job

        of_images.__doc__ = "quick"
        return of_images

    peers = {"saflex_jax": nothing, "pillow": interrupting, "copy": nothing}
    peers = {name: setup(job) for name, job in peers.items()}
    monkeypatch.setattr(augment_throughput, "PEERS", peers)
    assert augment_throughput.main(["--rounds", "1"]) == 130
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    heads, cells = (next(x for x in lines[lines.index("images_per_second") :] if start in x)
                    for start in ("copy", "8 "))  # fmt: skip
    rates = dict(zip(heads.split(), cells.split()[1:]))
    assert float(rates["saflex_jax"].replace(",", "")) > 0
    assert rates["pillow"] == rates["copy"] == "null"
    assert "why_null: 8: copy: interrupted before it was measured" in lines
    assert "interrupted" in printed.err


def test_jobs_take_turns_and_one_that_fails_stops_no_other():
    calls = []

    def failing():
        calls.append("b")
        if calls.count("b") > 2:
            raise RuntimeError("no more\nand more of it")

    setups = {
        "a": lambda: lambda: calls.append("a"),
        "b": lambda: failing,
        "c": lambda: lambda: calls.append("c"),
        "d": lambda: 1 / 0,
    }
    series = timing.Series("letters", tuple(setups), lambda: setups, rounds=3, seconds=0.0)
    with tqdm.tqdm(total=series.length, disable=True) as bar:
        series.measure(bar)
    assert "".join(calls) == "aabbcc" + "aabcc" + "ccaa" + "aacc"
    reasons = {"b": "RuntimeError: no more", "d": "ZeroDivisionError: division by zero"}
    assert series.failed == series.why_null() == reasons
    measured = {name: len(series.times(name)) for name in setups}
    assert measured == {"a": 3, "b": 0, "c": 3, "d": 0}


def test_ratios_are_of_the_same_round_and_there_are_none_of_what_failed():
    series = timing.Series("", ("a", "b", "c"), dict, 3, 0.0)
    series.measured.update(a=[2.0, 4.0, 4.0], b=[4.0, 4.0], c=[1.0])
    series.failed["c"] = "no"
    assert series.ratios("b", "a") == [2.0, 1.0] and series.ratios("c", "a") == []
    assert timing.median(series.ratios("b", "a")) == 1.5
    assert timing.spread(series.ratios("b", "a")) == 0.5  # the interquartile range
    assert timing.median([]) is timing.spread([]) is None


def test_a_job_refuses_a_loss_that_is_not_finite():
    def step(state, batch):
        return state + batch, {"loss": (np.float32(np.nan), 1)}

    with pytest.raises(FloatingPointError, match="not finite"):
        timing.steps_of(step, 0, iter([1, 2]), steps=2)()


def test_nested_numbers_are_tables_and_other_leaves_are_lines():
    report = {
        "speed": {"small": {"a": 12345.6, "b": None}, "large": {"a": 0.12345, "does": "a lot"}},
        "deeper": {"x": {"small": {"a": 1}}},
        "same": {"small": True},
        "why": {"small": {"b": "missing"}},
    }
    assert list(reporting.tables(report)) == [
        "\nspeed",
        "               a      b",
        "  small   12,346   null",
        "  large   0.1235   null",
        "\ndeeper: x",
        "          a",
        "  small   1",
        "same: small: True",
        "why: small: b: missing",
    ]


def test_nested_keys_make_a_tree():
    flat = {("a", "b", "c"): 1, ("a", "b", "d"): 2, ("e",): 3}
    assert reporting.nested(flat) == {"a": {"b": {"c": 1, "d": 2}}, "e": 3}


def test_bad_rounds_are_refused_before_anything_runs(capsys):
    found = refused(augment_throughput.main, ["--rounds", "0"], capsys)
    assert re.search(r"error: rounds must .*given 0", found)


def test_where_nothing_can_be_written_nothing_is_measured(monkeypatch, tmp_path, capsys):
    def measure(self, bar):
        raise AssertionError

    monkeypatch.setattr(bounded_memory.BoundedMemory, "measure", measure)
    (tmp_path / "file").write_text("")
    for out, message in ((tmp_path, "must be a file; given"),
                         (tmp_path / "file" / "x.json", "must be a file in a folder")):  # fmt: skip
        found = refused(bounded_memory.main, [f"--out={out}"], capsys)
        assert f"error: --out {message}" in found and str(out) in found
    monkeypatch.setattr(bounded_memory.BoundedMemory, "measure", lambda self, bar: None)
    assert bounded_memory.main([f"--out={tmp_path / 'new' / 'x.json'}"]) == 0
    assert json.loads((tmp_path / "new" / "x.json").read_text())["tasks"] == {}


# --- the input paths


def test_the_paths_report_holds_every_number(monkeypatch, capsys):
    for name, value in {
        "SIZE": 64,
        "FILES": 16,
        "BATCH_SIZES": (8,),
        "STEPS": 2,
        "SECONDS": 0.0,
    }.items():
        monkeypatch.setattr(input_pipeline, name, value)
    assert input_pipeline.main(["--json", "--rounds", "1"]) == 0
    made = json.loads(capsys.readouterr().out)
    speeds, steps = made["samples_per_second"]["8"], made["step"]["8"]
    assert set(speeds) == {"demand", *input_pipeline.PATHS} and min(speeds.values()) > 0
    assert made["why_null"] == {"8": {"alone": {}, "steps": {}}}
    for name in input_pipeline.PATHS:
        assert steps[name]["share_alone"] == speeds["demand"] / speeds[name]
        assert steps[name]["ratio"] > 0
    assert len(list(input_pipeline.InputPipeline.table(made))) > 8


@pytest.fixture
def source(tmp_path):
    """Pixels, and a runner that takes no step."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    return pixels, parallel.jit_runner(lambda *a, **k: None, devices=jax.devices()[:1])


def test_every_path_gives_the_samples_of_its_source(source, tmp_path):
    pixels, runner = source
    files = input_pipeline.write_files(tmp_path, pixels)
    for name, make in input_pipeline.paths(pixels, files, 8, runner).items():
        _, batches = make()
        seen = []
        for _ in range(3):  # an epoch
            batch = next(batches)
            if name == "on_device":
                seen += np.asarray(batch.candidates).tolist()
                continue
            rows = np.asarray(batch.candidates.index)
            expected = pixels[rows] * np.float32(1 / 255)
            np.testing.assert_array_equal(np.asarray(batch.candidates.inputs), expected, name)
            seen += rows.tolist()
        assert sorted(seen) == list(range(24)), name


def test_the_report_is_the_arithmetic_of_the_times(monkeypatch):
    steps = {"demand": [2.0, 4.0, 3.0]} | {name: [4.0, 4.0, 9.0] for name in input_pipeline.PATHS}
    alone = {name: [0.5, 0.25, 1.0] for name in input_pipeline.PATHS}
    monkeypatch.setattr(input_pipeline, "BATCH_SIZES", (8,))
    benchmark = input_pipeline.InputPipeline(types.SimpleNamespace(rounds=1))
    benchmark.alone["8"].measured, benchmark.steps["8"].measured = alone, steps
    made = benchmark.report()
    assert made["samples_per_second"]["8"]["demand"] == 8 * input_pipeline.STEPS / 3
    for name in input_pipeline.PATHS:
        assert made["samples_per_second"]["8"][name] == 16
        assert made["step"]["8"][name]["ratio"] == 2


def test_a_path_alone_gives_shuffled_samples_from_where_its_name_says(source, tmp_path):
    pixels, runner = source
    files = input_pipeline.write_files(tmp_path, 255 - pixels)
    for name, make in input_pipeline.paths(pixels, files, 8, runner).items():
        batch = input_pipeline.alone(pixels, make)().candidates
        rows = np.asarray(batch.index)
        expected = (255 - pixels if name == "files" else pixels)[rows] * np.float32(1 / 255)
        np.testing.assert_array_equal(np.asarray(batch.inputs), expected, name)
        assert rows.tolist() != list(range(8)), name


# --- Pillow's operations do what their names say, at torchvision's magnitude 9 of 30


def equalized(channel):
    """A level goes to its rank: the share of the pixels below it, in 255 steps."""
    counts = np.bincount(channel.ravel(), minlength=256)
    step = (channel.size - counts[channel.max()]) // 255
    below = np.array([counts[:level].sum() for level in range(256)])
    return np.minimum((below + step // 2) // step, 255)[channel]


def stretched(channel):
    low, high = int(channel.min()), int(channel.max())
    return (channel - low) * 255 / (high - low)


def looked_up(image, x_of, y_of):
    """The pixel that holds the point (x_of, y_of), black outside."""
    side = len(image)
    y, x = np.mgrid[:side, :side] + 0.5
    column, row = (np.floor(f(x, y)).astype(int) for f in (x_of, y_of))
    inside = (column >= 0) & (column < side) & (row >= 0) & (row < side)
    return np.where(inside[..., None], image[row % side, column % side], 0)


def expected(image, sign):
    """name -> f64[H, W, 3], before rounding and clipping."""
    grey = np.repeat((image @ (0.299, 0.587, 0.114))[..., None], 3, -1)
    smooth = image.astype(float)
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]])[..., None] / 13
    smooth[1:-1, 1:-1] = ndimage.convolve(smooth, kernel)[1:-1, 1:-1]

    def blend(other):
        return other + (1 + 0.27 * sign) * (image - other)

    def per_channel(f):
        return np.stack([f(image[..., c].astype(int)) for c in range(3)], -1)

    def same_x(x, y):
        return x

    def same_y(x, y):
        return y

    return {
        "identity": image,
        "autocontrast": per_channel(stretched),
        "equalize": per_channel(equalized),
        "rotate": ndimage.rotate(image, 9 * sign, order=0, reshape=False),
        "solarize": np.where(image >= 178.5, 255 - image, image),
        "color": blend(grey),
        "posterize": image // 2 * 2,
        "contrast": blend(np.round(grey.mean())),
        "brightness": blend(0),
        "sharpness": blend(smooth),
        "shear_x": looked_up(image, lambda x, y: x + sign * 0.09 * y, same_y),
        "shear_y": looked_up(image, same_x, lambda x, y: y + sign * 0.09 * x),
        "translate_x": looked_up(image, lambda x, y: x + sign * 8, same_y),
        "translate_y": looked_up(image, same_x, lambda x, y: y + sign * 8),
    }


@pytest.mark.parametrize("sign", [-1, 1])
def test_pillow_runs_the_operations_of_randaugment(sign):
    side = 60  # 150 / 331 of which, times .3, is 8.2 pixels
    (image,) = augment_throughput.crops(side, 1)
    operations = augment_throughput.pillow_operations(side)
    assert list(operations) == list(policies.STANDARD)
    for name, reference in expected(image, sign).items():
        found = np.asarray(operations[name](Image.fromarray(image), sign), int)
        off = np.abs(found - np.clip(reference, 0, 255)).max(-1)
        # Pillow rounds the other image of a blend, too. Of a rotation, points on the border of two
        # pixels may fall to either.
        assert (off > 1.5).mean() < (0.02 if name == "rotate" else 1e-9), name
        assert name == "identity" or (found != image).any(), name


def test_the_seed_of_a_pool_is_its_audits(monkeypatch):
    labels, seeds = np.arange(1000) % 2, []
    monkeypatch.setattr(audit, "opened", lambda *_: (np.zeros((1000, 2)), labels, {}))

    def audited(x, given, *, trusted, seed=0):
        seeds.append(seed)
        return types.SimpleNamespace(utility=-np.ones(1000), outside=labels == 1)

    monkeypatch.setattr(audit, "audit", audited)
    for seed in (3, 4):
        audit.of_pool("mnist@plain", "both", seed, "data")
    assert seeds == [3, 4]


def test_evidence_is_asked_of_so_many_samples_with_right_labels_of_the_trusted(monkeypatch):
    right = np.arange(100) % 2
    wrong = {name: 1 - right for name in ("aggregate", *audit.LABELS)}
    monkeypatch.setattr(audit, "opened", lambda *_: (np.arange(100.0)[:, None], right, wrong))

    def audited(x, given, *, trusted, num_classes, seed):
        of_rows = right[x[:, 0].astype(int)]
        assert (len(x), trusted.sum(), num_classes, seed) == (40, 10, 2, 5)
        np.testing.assert_array_equal(given[trusted], of_rows[trusted])
        bad = given != of_rows
        return types.SimpleNamespace(
            evidence=9.0 * bad.any(), wrong=bad, noise_rate=bad[~trusted].mean()
        )

    monkeypatch.setattr(audit, "audit", audited)
    row = audit.of_evidence(40, 10, 5, "data")
    assert row["right evidence"] == row["right flagged"] == row["right noise rate"] == 0
    assert row["worst evidence"] == 9 and row["worst flagged"] == row["worst noise rate"] == 1


def test_ctrl_c_in_a_training_leaves_the_memories_before(monkeypatch, capsys):
    record = {bounded_memory.ARM: {"test_accuracy": 0.5, "auc": 0.75, "bytes": 40}}
    each = iter([[(0, record), (1, record)], [(0, record), (1, None)]])
    monkeypatch.setattr(bounded_memory, "config_of", lambda *_: bounded_memory.ALL)
    monkeypatch.setattr(bounded_memory.arms, "of_seed", lambda config, seed: config)
    monkeypatch.setattr(bounded_memory.arms, "run_each", lambda *_, **__: next(each))
    options = ["--json", "--task=made_100_symmetric", "--top=2", "--seeds=2"]
    assert bounded_memory.main(options) == 130
    printed = capsys.readouterr()
    assert "interrupted; what was measured" in printed.err
    assert list(json.loads(printed.out)["tasks"]["made_100_symmetric"]) == [bounded_memory.ALL]


def test_the_spread_over_seeds_is_the_samples():
    options = types.SimpleNamespace(task=("made",), top=(), seeds=2)
    benchmark = bounded_memory.BoundedMemory(options)
    runs = [{"test_accuracy": accuracy, "auc": 0.5, "bytes": 4} for accuracy in (0.5, 0.7)]
    benchmark.runs = {("made", bounded_memory.ALL): runs}
    row = benchmark.report()["tasks"]["made"][bounded_memory.ALL]
    assert row["spread"] == pytest.approx(np.std([0.5, 0.7], ddof=1))
