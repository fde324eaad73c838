import json
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from saflex_jax.files import renamed
from saflex_jax.parallel import Watch


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """index -> the watch of that process of three, in this one; ends of processes are noted."""
    ended = {}

    def make(index, **options):
        monkeypatch.setattr(jax, "process_index", lambda: index)
        monkeypatch.setattr(jax, "process_count", lambda: 3)
        return Watch(
            tmp_path, **{"lost_after": 0.4, "hung_after": 1e6} | options,
            end=lambda status: ended.setdefault(index, status),
        )  # fmt: skip

    make.ended, make.folder = ended, tmp_path
    return make


def until(holds, seconds=10):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    assert holds()


def test_a_process_that_is_lost_is_named_and_ends_the_others(watch, tmp_path, capfd):
    with watch(0) as first, watch(1) as second, watch(2):
        for step, each in enumerate((first, second), 5):
            each.step(step)
        time.sleep(1)
        assert not watch.ended  # all are alive
        third = tmp_path / "2"
        about = json.loads(third.read_text())
        third.unlink()
        third.mkdir()  # it cannot write any more, as one that is gone does not
        until(lambda: {0, 1} <= set(watch.ended))
    assert watch.ended[0] == watch.ended[1] == 1
    said = capfd.readouterr().err
    assert f"process 0 at step 5: process 2 (pid {about['pid']} on {about['host']}) is lost" in said
    third.rmdir()


def test_a_process_that_is_behind_for_too_long_is_named(watch, capfd):
    with watch(0, hung_after=0.4) as first, watch(1, hung_after=0.4) as second, watch(2) as third:
        for step in range(1, 8):
            for each in (first, second, third):
                each.step(step)
            time.sleep(0.1)
        assert not watch.ended
        first.step(8), third.step(8)  # and wait for the second in a collective
        until(lambda: 0 in watch.ended)
    assert 1 not in watch.ended  # it does not see itself
    assert "process 1 (pid" in (said := capfd.readouterr().err)
    assert "hangs: it has been at step 7 for" in said


def test_after_an_error_of_jax_who_is_lost_is_named(watch, capfd):
    with pytest.raises(SystemExit), watch(1), watch(2), watch(0):
        try:
            raise jax.errors.JaxRuntimeError("a collective broke")
        except RuntimeError as error:
            (watch.folder / "2").unlink()
            (watch.folder / "2").mkdir()  # it cannot write any more
            try:
                raise ValueError("not written") from error
            except ValueError:
                sys.exit("not written")
    assert "process 0 at step 0: process 2 (pid" in capfd.readouterr().err


def test_who_ends_well_is_not_lost(watch):
    with watch(0), watch(1):
        with watch(2):
            pass
        time.sleep(1)
    assert not watch.ended


@pytest.mark.parametrize(
    "error, said", [(ValueError("why"), "ValueError: why"), (SystemExit("so"), "so")]
)
def test_an_error_ends_the_process_at_once(watch, capfd, error, said):
    before = threading.active_count()
    with pytest.raises(type(error)), watch(0):
        raise error
    assert watch.ended == {0: 1} and threading.active_count() == before
    assert capfd.readouterr().err.strip().endswith(said)


def a_process_that_dies(folder, index):
    code = (f"import jax, os, time; jax.process_index = lambda: {index}; "
            "jax.process_count = lambda: 2\n"
            "from saflex_jax.parallel import Watch\n"
            f"with Watch({str(folder)!r}, lost_after=1.0) as watch:\n"
            "    watch.step(7); watch._write(); os.abort()")  # fmt: skip
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "alive, who", [(True, "process 1 (pid "), (False, "process 0 (pid 12 on h)")]
)
def test_who_ends_without_a_word_has_a_witness(tmp_path, alive, who):
    def write(turn):
        with renamed(tmp_path / "0") as part:
            part.write_text(json.dumps({"turn": turn, "pid": 12, "host": "h", "step": 6}))

    write(0)
    over = threading.Event()

    def beat():
        turn = 0
        while not over.wait(0.05):
            write(turn := turn + 1)

    if alive:
        threading.Thread(target=beat).start()
    done = a_process_that_dies(tmp_path, 1)
    over.set()
    assert done.returncode == -signal.SIGABRT
    assert f"process 1: {who}" in done.stderr and "Start all processes again" in done.stderr
    assert ("without a word at step 7" if alive else "is lost") in done.stderr


def test_one_process_watches_nobody(tmp_path):
    with Watch(tmp_path / "none") as watch:
        watch.step(3)
    assert not (tmp_path / "none").exists()


def test_options():
    with pytest.raises(ValueError, match="lost_after must be positive and finite; given 0"):
        Watch("x", lost_after=0)
