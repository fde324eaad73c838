import os
import signal
import subprocess
import sys

import pytest

from saflex_jax.files import renamed
from saflex_jax.train import FolderInUse, one_run_in, write_whole
from saflex_jax.train.files import LOCK

HOLDER = """
import fcntl, json, os, sys, time
lock = open(sys.argv[1], "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
json.dump({"pid": os.getpid(), "host": "elsewhere", "since": "today"}, lock)
lock.flush()
print(flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_and_a_dead_one_is_followed(tmp_path):
    command = [sys.executable, "-S", "-c", HOLDER, str(tmp_path / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        match = f"{tmp_path} is in use by process {holder.pid} on elsewhere, since today"
        with pytest.raises(FolderInUse, match=match), one_run_in(tmp_path):
            raise AssertionError
        holder.send_signal(signal.SIGKILL)
    with one_run_in(tmp_path):  # what the dead process left is taken over
        assert f'"pid": {os.getpid()}' in (tmp_path / LOCK).read_text()
    assert (tmp_path / LOCK).read_text() == ""


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match="file/run must be a folder"),
        one_run_in(tmp_path / "file" / "run"),
    ):
        raise AssertionError


def test_a_text_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    write_whole(tmp_path / "x", "before")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "x", "after")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "before")]


def test_writers_of_one_file_do_not_share_a_half_written_one(tmp_path):
    with renamed(tmp_path / "x") as first:
        first.write_text("first")
        with renamed(tmp_path / "x") as second:
            second.write_text("second")
        assert (tmp_path / "x").read_text() == "second" and first.read_text() == "first"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "first")]
