import json

import jax
import numpy as np
import pytest
from PIL import Image

from saflex_jax import Batch, Streams, augment
from saflex_jax.data import ArrayStream, Pool, provenance, read_provenance

NASTY = ['say "hi"\nand\u2028go', "<script>alert(1)</script>", "a {label}, ünïcode, 'q'"]


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def record(n, **more):
    return json.dumps({"file_name": f"{n}/0.png", "prompt": NASTY[n % 3], **more})


def test_texts_of_any_kind_come_back_as_they_were(tmp_path):
    lines = [record(n, strength=0.1 * n, seed=n, model="m", flags=["clip"] * (n == 1))
             for n in range(4)]  # fmt: skip
    found = read_provenance(write(tmp_path / "x", lines), [f"{n}/0.png" for n in (2, 1, 3)])
    assert [found.prompts[place] for place in found.prompt] == [NASTY[n % 3] for n in (2, 1, 3)]
    assert found.files == ("2/0.png", "1/0.png", "3/0.png") and found.generators == ("m",)
    np.testing.assert_allclose(found.strength, [0.2, 0.1, 0.3], rtol=1e-6)
    assert found.seed.tolist() == [2, 1, 3] and found.known_label.tolist() == [-1] * 3
    assert found.flags == ("clip",) and found.flagged[:, 0].tolist() == [False, True, False]


def test_null_and_absent_are_unknown():
    found = provenance([{"prompt": None, "strength": None, "flags": None}, {}])
    assert found.prompts == ("",) and found.strength.tolist() == [0, 0] and not found.flags


@pytest.mark.parametrize(
    "line, message",
    [
        ("{'prompt': 1}", "line 2 must be JSON"),
        ("[1]", "line 2 must be a JSON object"),
        ("", "line 2 must be JSON"),
        ("{}", "line 2 must have a file_name of its own; given None"),
        (record(0), "line 2 must have a file_name of its own; given '0/0.png'"),
        (record(1, strength="high"), "line 2: strength must be a number; given 'high'"),
        (record(1, strength=float("nan")), "line 2: strength must be finite"),
        (record(1, seed=1.5), "line 2: seed must be a whole number; given 1.5"),
        (record(1, flags=[3]), r"line 2: flags must be names; given \[3\]"),
        (record(2), "must have a line for 1/0.png; given none"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "metadata.jsonl", [record(0), line])
    with pytest.raises(ValueError, match=message):
        read_provenance(path, ["0/0.png", "1/0.png"])


# --- in a pool

ROWS = [(0, 0, 0), (0, 1, 2), (3, 0, 1)]  # source, draw, level


def folder(path, **changes):
    for source, draw, level in ROWS:
        (path / str(source)).mkdir(exist_ok=True)
        pixels = np.full((2, 3), 50 * level, np.uint8)
        Image.fromarray(pixels).save(path / f"{source}/{draw}.png")
    names = [f"{s}/{d}.png" for s, d, _ in ROWS]
    write(path / "labels.csv", ["file,label", *(f"{name},1" for name in names)])
    known = [{"file_name": n, "prompt": "ab"[k % 2], "strength": k / 4, "model": "m",
              "flags": ["x"] * (k == 1)} for k, n in enumerate(names)]  # fmt: skip
    write(path / "metadata.jsonl", [json.dumps(r | changes) for r in known])
    (path / "shards").mkdir()  # and other files that are no candidates
    (path / ".hidden").mkdir()
    Image.new("L", (2, 3)).save(path / ".hidden" / "x.png")
    return path


def traced(pool):
    about = pool.provenance
    columns = {"candidate": np.arange(3.0), "prompt": about.prompt, "strength": about.strength,
               "flagged": np.where(about.flagged.any(1), 1.0, np.nan)}  # fmt: skip
    return pool.with_trace(augment.candidate_trace(columns, np.arange(3)))


def test_the_trace_of_a_candidate_travels_into_its_batch(tmp_path):
    pool = traced(Pool.from_folder(folder(tmp_path), num_classes=2, num_sources=4))
    images = np.zeros((4, 2, 3, 1), np.uint8)
    samples = Batch(images, np.float32([[1, 0]] * 4), np.ones(4, bool), np.arange(4))
    stream = ArrayStream(Streams(samples), generated=pool, batch_size=4, seed=0)
    drawn = set()
    for _ in range(8):
        batch = next(stream).candidates
        place = np.asarray(augment.groups(batch, "candidate"))
        made = place >= 0
        np.testing.assert_array_equal(made, np.isin(batch.index, [0, 3]))
        level = np.array([level for *_, level in ROWS])[place]
        np.testing.assert_allclose(batch.inputs[made, 0, 0, 0], 50 / 255 * level[made], rtol=1e-5)
        prompt = np.asarray(augment.groups(batch, "prompt"))
        np.testing.assert_array_equal(prompt[made], place[made] % 2)
        np.testing.assert_array_equal(np.asarray(augment.groups(batch, "flagged")) == 1, place == 1)
        assert (batch.trace.partner == batch.index[:, None]).all()
        drawn |= set(place[made].tolist())
    assert drawn == {0, 1, 2}
    augmented = augment.parse("flip")(jax.random.key(0), batch)
    assert (augment.groups(augmented, "candidate") == place).all()  # operations come behind


def test_candidates_are_samples_and_some_are_left_out(tmp_path):
    pool = traced(Pool.from_folder(folder(tmp_path), num_classes=2, num_sources=4))
    inputs, labels, source, places = pool.samples()
    assert source.tolist() == [0, 0, 3] and places.tolist() == [0, 1, 2]
    assert inputs.dtype == np.uint8 and labels.argmax(1).tolist() == [1, 1, 1]
    assert np.asarray(inputs)[:, 0, 0, 0].tolist() == [0, 100, 50]
    few = pool.keep(~pool.provenance.flagged.any(1)).of(np.array([3, 1, 0]))
    _, _, source, places = few.samples()
    assert source.tolist() == [0, 2] and places.tolist() == [2, 0]
    assert few.draws(np.arange(3)).tolist() == [1, 0, 1]


def test_a_memory_map_is_read_by_the_batch(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.save(tmp_path / "x.npy", values)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    pool = Pool.from_arrays(mapped, np.zeros(6, int), np.arange(6), num_classes=2)
    assert isinstance(pool._inputs, np.memmap)
    np.testing.assert_array_equal(pool(np.array([4]), np.array([0]))[0], values[[4]])
    levels = Pool.from_arrays(np.uint8([[51]]), np.zeros(1, int), np.zeros(1, int), num_classes=2)
    np.testing.assert_allclose(levels(np.array([0]), np.array([0]))[0], 0.2, rtol=1e-6)


def test_errors_of_a_pool_name_the_file(tmp_path):
    path = folder(tmp_path)
    with pytest.raises(ValueError, match=r"sources must lie in \[0, 2\); given .*3/0.png"):
        Pool.from_folder(path, num_classes=2, num_sources=2)
    whole = (path / "0/1.png").read_bytes()
    (path / "0/1.png").write_bytes(whole[: len(whole) // 2])  # truncated
    pool = Pool.from_folder(path, num_classes=2)
    with pytest.raises(ValueError, match=r"0/1.png does not decode"):
        pool(np.array([0]), np.array([1]))
    write(path / "metadata.jsonl", ["{}", "no"])
    with pytest.raises(ValueError, match=r"metadata.jsonl line 2 must be JSON"):
        Pool.from_folder(path, num_classes=2)
