"""Makes cifar10n_excerpt.npz, beside this file; README.md there says what it holds.

    python -m experiments.prepare cifar10n resnet18
    python -m experiments.features cifar10n --views=4 --augment="shift(4) | flip" --limit=12000 \
        --tag=crop
    python colabs/data/cifar10n_excerpt.py
"""

import io
import pathlib

import numpy as np
from PIL import Image

from saflex_jax import data
from saflex_jax.audit import audit

FOLDER = pathlib.Path("data")
TRAIN, TEST, NUMBERS = 4000, 2000, 64
TRUSTED, SEEDS, WORST, FIRST = 300, 4, 60, 16  # pictures: the worst of so many audits, the first


def eight_bits(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The first principal components of all training rows' features, in steps of one size."""
    standard = data.fit_scale(features)(features)[:]
    directions = np.linalg.svd(standard, full_matrices=False)[2][:NUMBERS]
    components = standard[rows] @ directions.T
    return np.round(components * 127 / np.abs(components).max()).astype(np.int8)


def suspicious(features: np.ndarray, given: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rows whose pictures are kept: the least likely labels of a few audits, and the first rows."""
    kept = [np.arange(FIRST)]
    for seed in range(SEEDS):
        chosen = np.random.default_rng(seed).choice(len(given), TRUSTED, replace=False)
        trusted = np.zeros(len(given), bool)
        trusted[chosen] = True
        found = audit(features, np.where(trusted, labels, given), trusted=trusted, seed=seed)
        kept.append(np.argsort(np.where(trusted, 1, found.quality))[:WORST])
    return np.unique(np.concatenate(kept))


def main() -> None:
    """Writes the file."""
    found = data.from_features(FOLDER / "features" / "cifar10n" / "crop").source
    trained = len(found.views)
    rows = np.r_[:TRAIN, trained : trained + TEST]
    features = eight_bits(np.asarray(found.inputs, np.float32), rows)
    labels = found.labels[rows].astype(np.int8)
    people = {name: found.extra[name][:TRAIN].astype(np.int8) for name in ("worst", "aggregate")}
    pictured = suspicious(features[:TRAIN].astype(np.float32), people["worst"], labels[:TRAIN])
    images = np.load(FOLDER / "cifar10n" / "inputs.npy", mmap_mode="r")[pictured]
    sheet = io.BytesIO()  # one column of pictures; 32 rows are whole blocks, so that none bleeds
    Image.fromarray(images.reshape(-1, 32, 3)).save(sheet, "jpeg", quality=92, subsampling=0)
    np.savez_compressed(
        pathlib.Path(__file__).with_suffix(".npz"),
        features=features,
        labels=labels,
        **people,
        pictured=pictured.astype(np.int16),
        jpeg=np.frombuffer(sheet.getvalue(), np.uint8),
    )


if __name__ == "__main__":
    main()
