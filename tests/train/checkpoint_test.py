import gc
import json
import math
import os
import resource
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import saflex_jax
from saflex_jax import TrainState
from saflex_jax.parallel import jit_runner
from saflex_jax.train import CheckpointError, Checkpoints, DamagedCheckpoint, NotWritten
from saflex_jax.train.checkpoint import LAYOUT, _seal
from tests.train.setup_ import arrays, assert_same_bits

CONFIG = {"seed": 0, "model": {"name": "mlp", "widths": (4, 8)}, "prior_strength": math.inf}


def make_state(step=0, *, width=5, dtype=jnp.float32, tx=optax.adam(0.1), extra=()):
    key = jax.random.key(step)
    params = {"head": {"kernel": jax.random.normal(key, (90, width)).astype(dtype)}}
    return TrainState(jnp.int32(step), params, {}, tx.init(params), key, extra)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("written")
    checkpoints = Checkpoints(folder, config=CONFIG, every=1, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.close()
    return folder


@pytest.fixture
def folder(written, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(written, tmp_path / "checkpoints")


@pytest.fixture
def opened():
    """Opens folders, and closes them also when the test fails."""
    found = []

    def open_(folder, config=CONFIG, **kwargs):
        found.append(Checkpoints(folder, config=config, **kwargs))
        return found[-1]

    yield open_
    for checkpoints in found:
        checkpoints.close()


@pytest.mark.parametrize("devices", [1, 8])
def test_a_save_is_a_copy_although_the_next_step_donates(tmp_path, opened, devices):
    # Donation lets the next step write into the buffers that a background thread still reads.
    def step(state, batch, *, reduce):
        params = jax.tree.map(lambda x: 1.01 * x + jnp.mean(batch), state.params)
        return state._replace(step=state.step + 1, params=params), {}

    runner = jit_runner(step, devices=jax.devices()[:devices])
    params = {name: jnp.full((300, 300), float(i)) for i, name in enumerate("abcd")}
    state = runner.put_state(TrainState(jnp.int32(0), params, {}, (), jax.random.key(0)))
    batch = runner.put_batch(np.ones(8, np.float32))
    checkpoints, copies, donated = opened(tmp_path, every=4, keep=100), {}, []
    for number in range(1, 25):
        before, (state, _) = state, runner.step(state, batch)
        donated.append(before.params["a"].is_deleted())
        if checkpoints.due(number):
            copies[number] = arrays(state)
            checkpoints.save(number, state, {"step": number})
    checkpoints.close()
    # JAX keeps a buffer that is being read; that others are given away is what makes this a test.
    assert any(donated)

    reader = opened(tmp_path)
    assert sorted(copies) == list(range(4, 25, 4))
    for number, copy in copies.items():
        loaded, position = reader.load(state, number)
        assert position == {"step": number}
        assert_same_bits(loaded, copy)


@pytest.mark.parametrize("saved_on, loaded_on", [(8, 1), (1, 8), (8, 8)])
def test_loads_onto_the_devices_of_like(tmp_path, opened, saved_on, loaded_on):
    def placed(state, count):
        return jit_runner(lambda *_, **__: None, devices=jax.devices()[:count]).put_state(state)

    original = make_state(3, extra=(jnp.arange(6, dtype=jnp.int32),))
    checkpoints = opened(tmp_path)
    checkpoints.save(3, placed(original, saved_on), {"step": 3}, force=True)
    checkpoints.close()
    like = placed(make_state(0, extra=(jnp.zeros(6, jnp.int32),)), loaded_on)
    loaded, _ = opened(tmp_path).load(like)
    assert_same_bits(loaded, original)
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(like)):
        assert a.sharding.is_equivalent_to(b.sharding, b.ndim)
        assert len(a.sharding.device_set) == loaded_on


def test_keeps_the_latest_and_no_temporary_folder(tmp_path, opened):
    checkpoints = opened(tmp_path, every=3, keep=2)
    due = [step for step in range(1, 13) if checkpoints.due(step)]
    assert due == [3, 6, 9, 12]
    for step in due:
        checkpoints.save(step, make_state(step), {"step": step})
        checkpoints.save(step, make_state(step), {"step": step}, force=True)  # already there
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["12", "9"]
    assert opened(tmp_path).latest == 12


def test_missing(tmp_path, folder, opened):
    assert opened(tmp_path / "new").latest is None
    with pytest.raises(CheckpointError, match=r"no checkpoint .*complete ones: none"):
        opened(tmp_path / "new").load(make_state())
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 .*\[1, 2, 3\]"):
        opened(folder).load(make_state(), 7)


def files_of(step_folder):
    return sorted(str(p.relative_to(step_folder)) for p in step_folder.rglob("*") if p.is_file())


# Orbax abandons its other reads after one has failed, and Python warns when it collects them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["deleted", "empty", "half"])
def test_a_damaged_checkpoint_is_refused_or_loads_exactly(written, tmp_path, opened, damage):
    # Every file in turn: names and shapes, the index of the arrays, the arrays themselves.
    refused = set()
    for number, name in enumerate(files_of(written / "3")):
        folder = shutil.copytree(written, tmp_path / str(number))
        file = folder / "3" / name
        if damage == "deleted":
            file.unlink()
        else:
            file.write_bytes(
                file.read_bytes()[: file.stat().st_size // 2 if damage == "half" else 0]
            )
        checkpoints = opened(folder)
        assert checkpoints.latest == 3
        try:
            loaded, position = checkpoints.load(make_state())
        except CheckpointError as error:
            if not refused:  # what the message advises works
                shutil.rmtree(folder / "3")
                assert_same_bits(opened(folder).load(make_state())[0], make_state(2))
            refused.add(name)
            for part in ("step 3", str(folder), "cannot be read", "others: [1, 2]"):
                assert part in str(error), name
        else:  # a file that Orbax writes but does not need
            assert position == {"step": 3}
            assert_same_bits(loaded, make_state(3))
    needed = {"_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt"}
    data = {name for name in files_of(written / "3") if "/d/" in name}
    assert len(data) >= 2 and needed | data <= refused
    gc.collect()


def test_a_folder_that_a_killed_save_left_is_ignored_and_removed(folder, opened):
    leftover = folder / "9.orbax-checkpoint-tmp"
    shutil.copytree(folder / "3", leftover)
    (leftover / "_CHECKPOINT_METADATA").unlink()
    checkpoints = opened(folder)
    assert checkpoints.latest == 3
    assert_same_bits(checkpoints.load(make_state())[0], make_state(3))
    assert not leftover.exists()


@pytest.mark.parametrize(
    "other, message",
    [
        # The first differing array in the order of the paths: those of Adam come before params.
        ({"width": 6}, r"opt_state/0/mu/head/kernel is \(\(90, 5\), .* \(\(90, 6\), "),
        ({"dtype": jnp.bfloat16}, r"mu/head/kernel is .*'float32'.*'bfloat16'"),
        ({"tx": optax.sgd(0.1)}, r"opt_state/0/count is \(\(\), 'int32'\) there and absent here"),
        ({"extra": (jnp.zeros(3),)}, r"extra/0 is absent there and \(\(3,\), 'float32'\) here"),
    ],
)
def test_of_another_model(folder, opened, other, message):
    before = files_of(folder)
    with pytest.raises(CheckpointError, match=f"step 3 .*of another model: .*{message}"):
        opened(folder).load(make_state(**other))
    assert files_of(folder) == before


def test_a_field_without_an_array_may_come_or_go(tmp_path, opened):
    class Before(NamedTuple):
        memory: Any
        pairs: Any

    class After(NamedTuple):
        memory: Any
        pairs: Any
        fits: Any

    before, after = Before(jnp.ones(3), None), After(jnp.ones(3), None, None)
    for folder, saved, wanted in (("a", before, after), ("b", after, before)):
        checkpoints = opened(tmp_path / folder)
        with checkpoints.settled():
            checkpoints.save(1, make_state(1, extra=saved), {}, force=True)
        assert_same_bits(checkpoints.load(make_state(extra=wanted))[0], make_state(1, extra=wanted))
        with pytest.raises(CheckpointError, match=r"extra/fits is absent there and \(\(\), "):
            checkpoints.load(make_state(extra=after._replace(fits=jnp.zeros(()))))


def relabel(folder, step, change):
    """Changes what a checkpoint says of itself."""
    file = folder / str(step) / "_CHECKPOINT_METADATA"
    about = json.loads(file.read_text())
    change(about["custom_metadata"])
    if "seal" in about["custom_metadata"]:
        about["custom_metadata"]["seal"] = _seal(step, about["custom_metadata"])
    file.write_text(json.dumps(about))


@pytest.mark.parametrize("extra", [(), (jnp.zeros(3),)])
def test_of_another_layout(folder, opened, extra):
    def to_layout_1(about):
        assert (about.pop("layout"), about.pop("version")) == (LAYOUT, saflex_jax.__version__)
        del about["arrays"], about["seal"]
        about["config"] = {}  # its fields moved as well, but the layout is what matters

    relabel(folder, 3, to_layout_1)
    relabel(folder, 2, lambda about: about.update(layout=LAYOUT + 1, version="9.1"))
    checkpoints = opened(folder)
    with pytest.raises(CheckpointError) as error:
        checkpoints.load(make_state(extra=extra))
    for part in (
        f"step 3 in {folder} was written by an older saflex_jax in layout 1 of the state",
        f"cannot be resumed by saflex_jax {saflex_jax.__version__}, which reads layout {LAYOUT}",
        "use another folder, or the version that wrote it",
    ):
        assert part in str(error.value)
    difference = "extra/0 is absent there and ((3,), 'float32') here"
    assert (difference in str(error.value)) == bool(extra)
    with pytest.raises(CheckpointError, match=rf"by saflex_jax 9\.1 in layout {LAYOUT + 1} "):
        checkpoints.load(make_state(), 2)
    assert_same_bits(checkpoints.load(make_state(), 1)[0], make_state(1))


def test_of_another_config(folder, opened):
    other = {**CONFIG, "model": {"name": "mlp", "widths": (4, 9)}, "new": 1}
    with pytest.raises(CheckpointError) as error:
        opened(folder, other).load(make_state())
    assert "model.widths: [4, 8] -> [4, 9], new: None -> 1" in str(error.value)
    assert "seed" not in str(error.value)
    assert_same_bits(opened(folder).load(make_state())[0], make_state(3))


def test_a_config_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        Checkpoints(tmp_path / "new", config={"learning_rate": np.float32(0.1)})
    assert not (tmp_path / "new").exists()


def test_a_run_may_grow_in_the_fields_that_are_named(folder, opened):
    longer, shorter = ({**CONFIG, "seed": seed} for seed in (5, -1))
    assert opened(folder, longer, grows=("seed",)).load(make_state())[1] == {"step": 3}
    for config, grows in ((longer, ()), (shorter, ("seed",))):
        with pytest.raises(CheckpointError, match="another config"):
            opened(folder, config, grows=grows).load(make_state())


# --- a long life -----------------------------------------------------------------------------


def descriptors_and_threads():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts in /proc")
def test_saves_leave_descriptors_and_threads_as_they_were(tmp_path, opened):
    # `python -m benchmarks.faults --parts=life` makes 200.
    checkpoints, state, counted = opened(tmp_path, every=1), make_state(), []
    for step in range(1, 61):
        checkpoints.save(step, state, {"step": step})
        if step > 20:  # thread pools are full, or nearly, on a busy machine
            counted.append(descriptors_and_threads())
    before, after = np.array(counted).reshape(2, 20, 2).max(axis=1)
    assert (after <= before + 4).all(), counted[::5]


# --- faults of the disk ----------------------------------------------------------------------


def flip(file, place):
    """Turns a bit of a file over; the place counts from 0 to 1."""
    content = bytearray(file.read_bytes())
    bit = int(place * 8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_60_flipped_bits_are_caught(tmp_path, opened):
    state, like = make_state(1, width=400), make_state(width=400)  # numbers fill the file
    checkpoints = opened(tmp_path)
    checkpoints.save(1, state, {"step": 1}, force=True)
    checkpoints.close()
    arrays_file = max((tmp_path / "1").rglob("d/*"), key=lambda p: p.stat().st_size)
    about = tmp_path / "1" / "_CHECKPOINT_METADATA"
    position = about.read_bytes().index(b'"stream"') / about.stat().st_size
    places = [(arrays_file, place) for place in np.random.default_rng(0).uniform(size=60)]
    # Of the position in the data, where another digit would go unnoticed.
    places += [(about, position + shift / about.stat().st_size / 8) for shift in range(80, 160, 8)]
    reader, caught = opened(tmp_path), 0
    for file, place in places:
        before = file.read_bytes()
        flip(file, place)
        try:
            loaded, position = reader.load(like)
        except DamagedCheckpoint as error:
            caught += 1
            assert "step 1 " in str(error) and "cannot be read" in str(error)
        else:  # of a part of the file that nobody reads
            assert position == {"step": 1}
            assert_same_bits(loaded, state)
        file.write_bytes(before)
    assert caught >= 60
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", ["bits", "metadata"])
def test_a_damaged_newest_checkpoint_is_named_and_skipped_if_asked_for(
    folder, opened, capfd, damage
):
    shutil.copytree(folder / "3", folder / "3.damaged")  # of an earlier damage at this step
    if damage == "bits":
        flip(max((folder / "3").rglob("d/*"), key=lambda p: p.stat().st_size), 0.5)
    else:  # Orbax does not open the folder any more
        about = folder / "3" / "_CHECKPOINT_METADATA"
        about.write_bytes(about.read_bytes().replace(b"item_handlers", b"item_hantlers"))
    with pytest.raises(DamagedCheckpoint, match=r"3.* in .*checkpoints cannot be read.*: \[1, 2\]"):
        opened(folder).load(make_state())
    checkpoints = opened(folder, every=1, keep=3, skip_damaged=True)
    loaded, position = checkpoints.load(make_state())
    assert position == {"step": 2} and checkpoints.latest == 2
    assert_same_bits(loaded, make_state(2))
    assert "3" in capfd.readouterr().err
    checkpoints.save(3, make_state(3), {"step": 3})  # the run comes to this step again
    checkpoints.close()
    assert_same_bits(opened(folder).load(make_state())[0], make_state(3))
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "3", "3.damaged", "3.damaged1"]


def test_all_damaged(folder, opened):
    for step in "123":
        flip(max((folder / step).rglob("d/*"), key=lambda p: p.stat().st_size), 0.5)
    with pytest.raises(DamagedCheckpoint, match="step 1 "):
        opened(folder, skip_damaged=True).load(make_state())


def test_checkpoints_from_before_there_were_digests_load(folder, opened):
    def older(about):
        del about["arrays"], about["seal"]

    relabel(folder, 3, older)
    assert_same_bits(opened(folder).load(make_state())[0], make_state(3))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(folder, opened):
    checkpoints = opened(folder, every=1, keep=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # no file may be longer
    try:
        with pytest.raises(NotWritten) as error, checkpoints.settled():
            checkpoints.save(4, make_state(4), {"step": 4})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    for part in ("step 4", "File too large", "last complete one is of step 3", "make room"):
        assert part in str(error.value)
    assert len(str(error.value)) < 400
    checkpoints.close()
    checkpoints = opened(folder, every=1, keep=2)
    assert_same_bits(checkpoints.load(make_state())[0], make_state(3))
    checkpoints.save(4, make_state(4), {"step": 4})
    checkpoints.close()
    assert_same_bits(opened(folder).load(make_state())[0], make_state(4))
    gc.collect()
