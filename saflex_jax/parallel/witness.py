"""Reports which process was lost, from a small helper process, run as a script.

JAX keeps its service in process 0. When that process dies, JAX ends all others at once, before they
can report it.
"""

from __future__ import annotations

import json
import pathlib
import signal
import sys
import time


def verdict(folder: pathlib.Path, mine: int, lost_after: float) -> str:
    """Says which process was lost after process `mine` ended silently: process 0 or itself.

    Process 0 is not lost if it goes on. The answer takes up to `lost_after` seconds.

    >>> verdict(pathlib.Path("no such folder"), mine=0, lost_after=1.0)
    'process 0 (pid None on None) ended without a word at step None'

    Args:
      folder: of `Watch`; its files are named by process.
      lost_after: seconds without a sign of life.
    """
    file = folder / "0"
    before = now = _read(file)
    end = time.monotonic() + lost_after
    while mine != 0 and now == before and time.monotonic() < end:
        time.sleep(lost_after / 100)
        now = _read(file) or before
    if now != before and now.get("pid") != before.get("pid"):
        now = before  # what is written now is of the same command, given again
    lost = mine if mine == 0 or now != before else 0
    about = _read(folder / str(mine)) if lost == mine else before
    who = f"process {lost} (pid {about.get('pid')} on {about.get('host')})"
    what = "ended without a word" if lost == mine else "is lost, and JAX's service with it,"
    return f"{who} {what} at step {about.get('step')}"


def _read(file: pathlib.Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # it ends when its process does
    if not sys.stdin.buffer.read(1):
        said = verdict(pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
        print(f"process {sys.argv[2]}: {said}. Start all processes again", file=sys.stderr)
