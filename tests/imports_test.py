import ast
import importlib
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import saflex_jax

ROOT = pathlib.Path(saflex_jax.__file__).parent
MODULES = [
    "saflex_jax",
    *(m.name for m in pkgutil.walk_packages(saflex_jax.__path__, "saflex_jax.")),
]

# What the modules of each room may import: rooms of the package, and libraries.
BASE = {"jax", "numpy", "optax"}
ROOMS = {
    "__init__": ({"core", "types"}, set()),
    # The one door to the commands: it looks for them when it is called, not when it is imported.
    "__main__": (set(), {"experiments"}),
    "types": (set(), {"jax", "numpy"}),
    "checks": ({"types"}, {"jax", "numpy"}),
    "calls": ({"checks"}, set()),
    "batches": ({"types"}, {"jax", "numpy"}),
    "_compat": (set(), {"jax", "numpy"}),
    "files": (set(), set()),
    "core": ({"core", "types", "checks"}, BASE),
    "rules": ({"rules", "core", "types", "checks", "calls"}, BASE),
    "audit": (
        {"methods", "rules", "models", "data", "parallel", "train", "core", "types", "checks"},
        BASE,
    ),
    "augment": ({"augment", "types", "checks"}, {"jax", "numpy"}),
    "augment/show.py": ({"augment", "types"}, {"jax", "matplotlib", "numpy", "PIL", "sklearn"}),
    "models": ({"models", "types", "checks", "files"}, BASE | {"flax"}),
    "models/clip_text.py": ({"models", "_compat"}, {"numpy", "tokenizers"}),
    "methods": (
        {"methods", "rules", "models", "augment", "core", "types", "checks", "calls"},
        BASE | {"flax"},
    ),
    "configure": (
        {"methods", "rules", "models", "core", "types", "checks", "calls"},
        BASE | {"flax"},
    ),
    "parallel": (
        {"parallel", "core", "batches", "types", "checks", "files", "_compat"},
        {"jax", "numpy"},
    ),
    "data": (
        {"data", "batches", "types", "checks", "files", "_compat"},
        {"array_record", "grain", "jax", "numpy", "PIL", "sklearn", "tensorflow_datasets"},
    ),
    "train": (
        {
            "train",
            "parallel",
            "core",
            "batches",
            "types",
            "checks",
            "files",
            "_compat",
            "__version__",
        },
        {"etils", "jax", "numpy", "orbax", "tensorboardX", "tqdm"},
    ),
}
# Libraries of the extras; no import of the package may need one.
OPTIONAL = (
    *("array_record", "grain", "matplotlib", "ml_collections", "PIL", "sklearn"),
    *("tensorboardX", "tensorflow_datasets", "tokenizers"),
)

SCRIPT = """
import sys
tried = set()
def note(event, args):
    tried.add(args[0].split(".")[0] if event == "import" else event)
sys.addaudithook(note)
optional, modules = (words.split(",") for words in sys.argv[1:])
sys.modules |= dict.fromkeys(optional)  # an import of one is an ImportError
import importlib
import saflex_jax
heavy = {"flax", "orbax", "tqdm"} & set(sys.modules)
assert not heavy, f"the core alone imports {heavy}"
for name in modules:
    importlib.import_module(name)
heavy = {"tensorflow", "torch", "keras", "experiments"} & tried
assert not heavy, f"imported or tried: {heavy}"
network = {e for e in tried if e.startswith("socket.")}
assert not network, f"network calls: {network}"
import jax
jax.config.update("jax_num_cpu_devices", 3)  # an error once a backend has started
assert jax.device_count() == 3


import functools, pathlib, tempfile
import numpy as np
from saflex_jax import Streams, data, models, train
labels, images = np.arange(8) % 2, np.zeros((8, 4, 4, 3), np.uint8)
folder = pathlib.Path(tempfile.mkdtemp())
for source in "01":
    (folder / source).mkdir()
    (folder / source / "0.png").touch()
split = functools.partial(data.stratified_split, labels, val=2, test=2, seed=0)
record = functools.partial(data.write_array_record, folder / "x", images / 255, labels, labels)
needed = {
    "scikit-learn": [data.digits, data.wdbc, split,
                     lambda: data.instance_noise(images, labels, 2, share=0.5, seed=0)],
    "Pillow": [lambda: data.from_folder(folder), lambda: data.resized(images, (2, 2)),
               lambda: data.Pool.from_folder(folder, num_classes=2)],
    "array_record": [record, lambda: data.Pool.from_array_record(folder / "x")],
    "tensorflow_datasets": [lambda: data.from_tfds("mnist")],
    "grain": [lambda: data.Prefetched(data.IndexStream(Streams(8), batch_size=4, seed=0))],
    "tensorboardX": [lambda: train.MetricsWriter(folder, tensorboard=True)],
    "tokenizers": [lambda: models.read_tokenizer("x.json"), lambda: models.word_vocabulary(["x"])],
}
for package, calls in needed.items():
    extra = {"tensorboardX": "experiments", "tokenizers": "clip"}.get(package, "data")
    for call in calls:
        try:
            call()
        except ImportError as error:
            assert str(error) == f'this needs {package}: pip install "saflex_jax[{extra}]"', error
        else:
            raise AssertionError(f"{call} must need {package}")
"""


def test_imports_need_no_extra_and_start_nothing_and_what_needs_one_says_which():
    arguments = [",".join(OPTIONAL), ",".join(MODULES)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def imported(path):
    """Absolute names of everything that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_in_one_direction(path):
    inside = path.relative_to(ROOT)
    rooms, libraries = ROOMS.get(str(inside)) or ROOMS[inside.parts[0].removesuffix(".py")]
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "saflex_jax":
            assert rest[0] in rooms, f"imports {name}"
        else:
            assert top in libraries | sys.stdlib_module_names, f"imports {name}"


def test_all_is_complete_and_sorted():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    names = [a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
    assert saflex_jax.__all__ == sorted(names)


@pytest.mark.parametrize(
    "name", [m for m in MODULES if hasattr(importlib.import_module(m), "__all__")]
)
def test_all_names_what_there_is(name):
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public)
