"""plan -> run -> filter -> train, without torch, and all that may go wrong."""

import errno
import json
import resource
import signal
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import (
    build,
    candidates,
    generate,
    generating,
    generators,
    json_lines,
    pool_files,
    pool_filters,
    task,
)
from experiments.configs import digits
from experiments.generators import Options, Originals, Request, edits
from saflex_jax import augment, data, parallel
from saflex_jax.core import pooled
from saflex_jax.types import Streams

PROMPTS = ("color", "background", "wrong class")


def config(pool="", **data):
    found = digits.get_config()
    found.data.update({"per_class": 8, "noise": 0.0, "val": 50, "train_on_val": True})
    found.data.update({"pool": str(pool), **data})
    changes = {"augment": "shift(1)", "train.steps": 250, "train.log_every": 100,
               "train.batch_size": 64, "model": {"name": "mlp", "widths": (32,)}}  # fmt: skip
    found.update_from_flattened_dict({k: v for k, v in changes.items() if k != "model"})
    found.unlock()
    found.model = changes["model"]
    return found


def plan(**changes):
    found = generating.Plan("edits", Options(), PROMPTS, (0.3, 0.7), 3, 7.5, 50, 0)
    return found._replace(**changes)


def planned(folder, **changes):
    generating.make_plan(plan(**changes), config(), [0], folder)
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """A finished one, filtered."""
    folder = planned(tmp_path_factory.mktemp("pools") / "pool")
    generating.run(folder, progress=False)
    pool_filters.confidence(folder, threshold=0.15)
    return folder


def contents(folder):
    """What a run made: files and joined metadata; not which shard made it."""
    images = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.glob("*/*.png")}
    return images, (folder / "metadata.jsonl").read_text()


def records(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_a_plan_draws_every_sample_and_prompt(pool):
    found = task.make_split_source(config())
    rows = task.trained_rows(config().data, found[2])
    _, made = pool_files.read_plan(pool)
    assert sorted({r["source"] for r in made}) == sorted(rows.tolist())
    assert len({r["seed"] for r in made}) == len(made) == 3 * len(rows)
    pairs = {(r["prompt"], r["strength"]) for r in made}
    assert pairs == {(p, s) for p in PROMPTS for s in (0.3, 0.7)}
    assert all(r["label"] == found[0].labels[r["source"]] for r in made)


def test_a_plan_is_made_once(pool, tmp_path):
    assert generating.make_plan(plan(), config(), [0], pool)[0] == "ready"
    with pytest.raises(ValueError, match="--out must be a new folder"):
        generating.make_plan(plan(draws=2), config(), [0], pool)
    with pytest.raises(ValueError, match="--out must be a folder that"):
        generating.run(tmp_path)


def test_a_folder_of_grey_and_coloured_images_is_read_as_it_was_planned(tmp_path):
    for row in range(24):
        pixels = np.random.default_rng(row).integers(0, 256, (8, 8), np.uint8)
        file = tmp_path / "mixed" / "ab"[row % 2] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert("RGB" if row % 4 > 1 else "L").save(file)
    folder = {"name": str(tmp_path / "mixed"), "per_class": 2, "val": 4, "test": 4}
    generating.make_plan(plan(draws=1), config(**folder, channels=3), [0], tmp_path / "pool")
    assert generating.run(tmp_path / "pool", progress=False) == 8
    about, (row, *_) = pool_files.read_plan(tmp_path / "pool")
    assert about["shape"] == [8, 8, 3] and about["data"]["channels"] == 3
    with Image.open(tmp_path / "pool" / row["file_name"]) as image:
        assert image.mode == "RGB"


def test_a_plan_without_channels_is_as_before(pool):
    about, _ = pool_files.read_plan(pool)
    assert set(about["data"]) == {"name", "dir", "size", "task"}
    assert generating.open_source(about).inputs.shape[1:] == (8, 8, 1)


def test_labels_go_into_prompts_as_they_are():
    found = list(generating.planned_rows(
        plan(prompts=("a {label} {x} \"'\n<b>",), draws=1),
        np.array([5]), np.array([1]), ["no", "{y}"],
    ))  # fmt: skip
    assert found[0]["prompt"] == "a {y} {x} \"'\n<b>"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": ()}, "--prompt must be given"),
        ({"prompts": ("colour",)}, "--prompt must be one of .*; did you mean 'color'"),
        ({"prompts": ("augment: shfit",)}, "augment must be one of .*; given 'shfit'"),
        ({"strengths": (1.5,)}, r"--strength must be numbers in \[0.0, 1.0\]; given \[1.5\]"),
        ({"strengths": ()}, "--strength must be numbers"),
        ({"draws": 0}, "--draws must be a whole number >= 1"),
        ({"generator": "edit"}, "--generator must be one of .*; did you mean 'edits'"),
        ({"generator": "text_to_image"}, "--model must be given for text_to_image"),
    ],
)
def test_bad_plans_leave_nothing(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        planned(tmp_path / "pool", **change)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["2/2", "1", "-1/2", "a/b", "0/0"])
def test_bad_shards(text):
    with pytest.raises(ValueError, match="--shard must be I/N"):
        generating.parse_shard(text)


# --- running


def test_shards_at_once_make_what_one_run_makes(pool, tmp_path):
    folder, errors = planned(tmp_path / "pool"), []

    def run(shard):
        try:
            generating.run(folder, shard, progress=False)
        except RuntimeError as error:  # the same shard twice: one of them stops
            errors.append(str(error))

    # Halves, the first half again, and thirds that overlap with both.
    shards = [(0, 2), (1, 2), (0, 2), (1, 3)]
    threads = [threading.Thread(target=run, args=(shard,)) for shard in shards]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all("is preparing shard-0-of-2" in error for error in errors)
    generating.run(folder, (0, 2), progress=False)
    (pool / "flags").rename(pool / "flags.away")
    try:
        pool_files.join(pool)
        assert contents(folder) == contents(pool)
    finally:
        (pool / "flags.away").rename(pool / "flags")
        pool_files.join(pool)


def test_an_interrupted_run_goes_on(pool, tmp_path, monkeypatch):
    folder = planned(tmp_path / "pool")
    honest, count = edits.make, iter(range(10**6))

    def make(options, originals):
        ready = honest(options, originals)

        def stopping(request):
            if next(count) == 40:
                raise KeyboardInterrupt
            return ready.make(request)

        return ready._replace(make=stopping)

    monkeypatch.setattr(edits, "make", make)
    with pytest.raises(KeyboardInterrupt):
        generating.run(folder, progress=False)
    assert len(records(folder)) == 40  # joined on the way out
    log = folder / "shards" / "0-of-1.jsonl"
    log.write_text(log.read_text() + '{"file_name": "half')  # a killed process's last line
    (folder / records(folder)[3]["file_name"]).unlink()  # and somebody deletes a file
    total = len(pool_files.read_plan(folder)[1])
    assert generating.run(folder, progress=False) == total - 39
    assert generating.run(folder, progress=False) == 0
    assert contents(folder)[0] == contents(pool)[0]


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """A limit on the size of files stands in for it: writes beyond are cut off, then refused."""
    folder = planned(tmp_path / "pool")
    log = folder / "shards" / "0-of-1.jsonl"
    json_lines.append(log, {"file_name": "a"})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
    try:
        for write in (
            lambda: json_lines.append(log, {"file_name": "b" * 100}),
            lambda: pool_files.write_whole(folder / "labels.csv", "x" * 100),
        ):
            with pytest.raises(OSError) as raised:
                write()
            assert raised.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(pool_files.made(folder)) == ["a"]
    assert (folder / "shards" / "0-of-1.jsonl").read_text() == '{"file_name": "a"}\n'
    assert (folder / "labels.csv").read_text().startswith("file,label")
    assert not [p for p in folder.iterdir() if p.name.startswith(".labels")]


def test_a_plan_of_other_sources_is_refused(tmp_path):
    folder = planned(tmp_path / "pool")
    text = (folder / "plan.jsonl").read_text().splitlines()
    row = json.loads(text[0]) | {"source": 5000}
    (folder / "plan.jsonl").write_text("\n".join([json.dumps(row), *text[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"must name sources in \[0, 1797\); given 5000"):
        generating.run(folder, progress=False)
    (folder / "plan.jsonl").write_text("\n".join([text[0], "{"]) + "\n")
    with pytest.raises(ValueError, match=r"plan.jsonl line 2 must be JSON"):
        generating.run(folder, progress=False)


# --- edits

RNG = np.random.default_rng(0)
LABELS = np.repeat(np.arange(3), 4)
IMAGES = RNG.integers(256, size=(12, 8, 8, 3)).astype(np.uint8)
ORIGINALS = Originals(np.arange(12), LABELS, lambda row: IMAGES[row])


def request(prompt, strength=0.5, seed=0):
    return Request(IMAGES[5], 5, 1, prompt, strength, 0.0, 1, seed)


def test_an_edit_takes_its_other_image_from_the_right_class():
    make = edits.make(Options(), ORIGINALS).make
    for seed in range(12):
        inside = make(request("texture", seed=seed)).known
        outside = make(request("wrong class", seed=seed))
        assert inside["partner"] in (4, 6, 7) and inside["known_label"] == 1
        wrong = outside.known
        assert LABELS[wrong["partner"]] == wrong["known_label"] != 1
        np.testing.assert_array_equal(outside.image, IMAGES[wrong["partner"]])
    alone = Originals(np.arange(4), LABELS[:4], ORIGINALS.read)
    with pytest.raises(ValueError, match="needs sources of two classes"):
        edits.make(Options(), alone).make(request("wrong class")._replace(label=0, source=1))


def test_strength_leads_from_the_image_to_the_others_style():
    image, other = (x.astype(np.float64) / 255 for x in IMAGES[:2])
    for swap in (edits.color, edits.texture, edits.background):
        np.testing.assert_allclose(swap(image, other, 0.0), image, atol=1e-12)
    coloured = edits.color(image, other, 1.0)
    np.testing.assert_allclose(coloured.mean((0, 1)), other.mean((0, 1)))
    np.testing.assert_allclose(coloured.std((0, 1)), other.std((0, 1)))
    spectra = [np.fft.fft2(x, axes=(0, 1)) for x in (image, other, edits.texture(image, other, 1))]
    frequency = np.abs(np.fft.fftfreq(8))
    high = np.hypot(frequency[:, None], frequency[None]) > 1 / 8
    amplitude = [np.abs(s) for s in spectra]
    np.testing.assert_allclose(amplitude[2][high], amplitude[1][high])
    np.testing.assert_allclose(amplitude[2][~high], amplitude[0][~high])
    framed = np.zeros((8, 8, 3))
    framed[2:6, 2:6] = 1.0  # a figure before a black background
    moved = edits.background(framed, np.full((8, 8, 3), 0.5), 1.0)
    np.testing.assert_allclose(moved[0], 0.5)
    np.testing.assert_allclose(moved[3, 3], 1.0, atol=0.02)


def test_a_pipeline_is_an_edit():
    make = edits.make(Options(), ORIGINALS).make
    made = make(request("augment: flip(1.0)"))
    np.testing.assert_array_equal(made.image, IMAGES[5][:, ::-1])


def test_generators_are_found_by_name():
    for name in generators.GENERATORS:
        assert callable(generators.find(name).make)


# --- filters


def test_the_filter_flags_the_planted_prompt_and_deletes_nothing(pool):
    found = records(pool)
    assert len(list(pool.glob("*/*.png"))) == len(found)
    wrong = np.array([r["prompt"] == "wrong class" for r in found])
    flagged = np.array([r["flags"] == ["confidence"] for r in found])
    np.testing.assert_array_equal(flagged, [r["confidence"] < 0.15 for r in found])
    assert flagged[wrong].mean() > 0.7 and flagged[~wrong].mean() < 0.25


def test_a_file_that_does_not_decode_is_flagged_and_named(tmp_path):
    folder = planned(tmp_path / "pool", draws=1)
    with pytest.raises(ValueError, match="must hold candidates"):
        pool_filters.confidence(folder, threshold=0.1)
    generating.run(folder, progress=False)
    bad = records(folder)[4]["file_name"]
    (folder / bad).write_bytes((folder / bad).read_bytes()[:60])
    assert pool_filters.confidence(folder, threshold=0.0)["unreadable"] == 1
    assert [r["file_name"] for r in records(folder) if r["flags"]] == [bad]
    with pytest.raises(ValueError, match=f"{bad} does not decode"):
        task.make_data(config(folder, pool_rows=True))
    dropped = task.make_data(config(folder, pool_rows=True, pool_flagged="drop"))
    assert len(dropped.pools.candidates.labels) == 130 + 129


# --- training on it


def test_candidates_train_as_samples_with_their_provenance(pool):
    whole = task.make_data(config(pool, pool_rows=True))
    few = task.make_data(config(pool, pool_rows=True, pool_flagged="drop"))
    batch, real = whole.pools.candidates, 80
    place = np.asarray(augment.groups(batch, "candidate"))
    made = place >= 0
    assert len(place) == real + 3 * 130 + 50 and not made[:real].any() and not made[-50:].any()
    names = np.array(whole.pool.provenance.prompts)
    prompt = np.asarray(augment.groups(batch, "prompt"))
    np.testing.assert_array_equal(whole.wrong, made & (names[prompt] == "wrong class"))
    by_file = {r["file_name"]: r for r in records(pool)}
    files = [by_file[whole.pool.provenance.files[p]] for p in place[made]]
    np.testing.assert_array_equal(batch.labels[made].argmax(1), [r["label"] for r in files])
    np.testing.assert_array_equal(whole.clean_labels[made], [r["known_label"] for r in files])
    flagged = np.asarray(augment.groups(batch, "flagged")) == 1
    np.testing.assert_array_equal(flagged[made], [bool(r["flags"]) for r in files])
    assert len(few.pools.candidates.labels) == len(place) - flagged.sum()
    assert not (np.asarray(augment.groups(few.pools.candidates, "flagged")) == 1).any()


def test_the_planted_prompt_is_the_lowest_of_its_pool(pool):
    """By the default rule, which is not told: held-out trusted samples direct it."""
    chosen = config(pool, pool_rows=True, train_on_val=False)
    made = task.make_data(chosen)
    method = build.make_method(chosen, made.pools)
    step = build.with_upstream(chosen, method).step
    runner = parallel.RUNNERS["jit"](step, devices=jax.devices()[:1])
    state = build.fit(chosen, made, method, runner, progress=False).state
    prompts = made.pool.provenance.prompts

    @jax.jit
    def pools_of(state, streams):
        weights = method.targets(state, streams).weights
        groups = augment.groups(streams.candidates, "prompt")
        found = pooled.pooled(pooled.add_utilities(pooled.no_pools(len(prompts)), weights, groups))
        return found.mean, *found.interval()

    mean, low, high = pools_of(state, Streams(made.pools.candidates, made.pools.val))
    worst = prompts.index("wrong class")
    assert int(np.argmin(mean[:, 0])) == worst
    assert all(high[worst, 0] < low[k, 0] for k in range(len(prompts)) if k != worst)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pool_flagged": "no"}, "config.data.pool_flagged must be one of"),
        ({"pool": "", "pool_rows": True}, "pool_rows must be False without a pool"),
        ({"pool_rows": False}, "on_device must be False with a pool; given True"),
        ({"pool_rows": True, "train_on_val": False, "val_from": "train"}, "val_from must be ''"),
    ],
)
def test_fields_that_do_not_go_together(pool, change, message):
    with pytest.raises(ValueError, match=message):
        task.check(config(**{"pool": pool, **change}).data)


def test_pools_that_do_not_fit_are_refused(pool, tmp_path):
    with pytest.raises(ValueError, match=r"must hold images of shape \[8, 8, 3\]"):
        made = data.Pool.from_folder(pool, num_classes=10)
        candidates.samples(made, np.zeros((1, 8, 8, 3)))
    folder = planned(tmp_path / "pool", draws=1)
    generating.run(folder, progress=False)
    with pytest.raises(ValueError, match="nothing is flagged"):
        task.make_data(config(folder, pool_rows=True, pool_flagged="drop"))


# --- the command


def test_the_command_plans_runs_and_filters(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # not a clone: configs are found by name
    out = f"--out={tmp_path / 'pool'}"
    plan = ["plan", out, "--config=digits", "--config.data.per_class=2",
            "--prompt=color", "--draws=1", "--strength=.2,.4"]  # fmt: skip
    for arguments in (plan, ["run", out], ["filter", out, "--threshold=.5"]):
        assert generate.main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("planned: 20 candidates") and said[1].startswith("made 20")
    assert json.loads(said[2])["candidates"] == 20
    for arguments in (
        [*plan, "--config.data.per_clas=2"],
        [*plan, "--strength=high"],
        [*plan, "--seeds=0"],
        ["run", out, "--shrad=0/1"],
        ["run", f"--out={tmp_path / 'none'}"],
    ):
        assert generate.main(arguments) == 1
        assert capsys.readouterr().err.startswith(arguments[0])


def test_a_pool_of_ones_own_images_is_planned_by_their_path(tmp_path):
    config = generate.read_config("own:digits", ["--config.data.per_class=2"])
    assert config.data.name == "digits" and config.data.per_class == 2 and config.data.val > 0
