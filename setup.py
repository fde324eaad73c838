"""Packaging metadata; build system and tools are configured in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "saflex_jax" / "__init__.py").read_text("utf-8"), re.M
)[1]  # the only place that says it; importing would need JAX

# Every lower bound runs the tests, all of them together under Python 3.11, and the newest releases
# run them under 3.12 and 3.13: .ci/versions. Upper bounds are the next release that is announced to
# break or is not there yet to be tested. What Google Colab has installed lies between them.
DATA = [
    "array_record>=0.8.1,<1",
    "grain>=0.2.10,<0.3",
    "importlib_resources>=6",  # TFDS needs it to prepare a set, and does not say so
    "pillow>=11.1,<14",
    "scikit-learn>=1.5,<2",
    "tensorflow-datasets>=4.9.10,<5",
]
CLIP = ["tokenizers>=0.22,<0.24"]  # captions; towers and weights need nothing more
EXPERIMENTS = [
    "jinja2>=3.1.4,<4",
    "matplotlib>=3.9,<4",
    "ml_collections>=1.0,<2",
    "tensorboardX>=2.6.2.2,<3",
]
# The site (docs/conf.py), whose tables and reference are made from the code.
DOCS = [
    "myst-nb>=1.4,<2",
    "sphinx>=9.0.4,<10",
    "sphinx-book-theme>=1.4,<2",
    "sphinx-copybutton>=0.5.2,<0.6",
]
# What the benchmarks compare with; a missing one is reported. On a CPU machine first install the
# CPU build of exactly this torch, or pip fetches gigabytes of CUDA:
# pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
# betty-ml is left out: pip 24.1 and later refuse its own requirements (benchmarks/peers.py).
BENCH = [
    "albumentations>=2.0.8,<3",
    "cleanlab>=2.9,<3",
    "kornia>=0.9,<0.10",
    "torch==2.13.0",
]
# Generators of candidates and their filter (docs/generation.md); torch as above.
GENERATE = DATA + EXPERIMENTS + ["diffusers>=0.42,<0.43", "torch>=2.6", "transformers>=5.24,<6"]

setup(
    name="saflex_jax",
    version=VERSION,
    description="SAFLEX and learned data augmentation in JAX, for any upstream pipeline",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    url="https://github.com/OWNER/saflex_jax",  # .ci/address writes it
    python_requires=">=3.11",
    # The commands of `saflex` are in `experiments`, configs included: CONTRIBUTING.md says why.
    packages=find_packages(include=["saflex_jax*", "experiments*"]),
    package_data={"saflex_jax": ["py.typed"], "experiments": ["*.j2", "*.json"]},
    entry_points={"console_scripts": ["saflex = experiments.commands:main"]},
    install_requires=[
        "absl-py>=1.4",
        "chex>=0.1.90,<0.2",
        "etils[epath]>=1.9.1",
        "flax>=0.11.2,<0.13",
        "jax>=0.7.2,<0.13",
        "numpy>=2.0,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",  # the v1 API still moves between minor releases
        "tqdm>=4.66",
    ],
    extras_require={
        "clip": CLIP,
        "data": DATA,
        "docs": DATA + EXPERIMENTS + DOCS,
        "experiments": DATA + EXPERIMENTS,
        "generate": GENERATE,
        "bench": DATA + EXPERIMENTS + BENCH,
        "pods": ["jax[tpu]>=0.7.2,<0.13"],  # the TPU compiler, for benchmarks.pods; no TPU needed
        "test": DATA
        + EXPERIMENTS
        + CLIP
        + ["equinox>=0.13,<0.14", "hypothesis>=6.100", "ipykernel>=6.29", "nbclient>=0.10"]
        + ["mypy>=2.4.1,<3", "nbformat>=5.10"]
        + ["pytest>=8", "pytest-xdist>=3.6.1", "ruff>=0.6"],
    },
)  # fmt: skip
