"""Filters of a generated pool: they score candidates and flag those below a threshold.

Nothing is deleted: `config.data.pool_flagged="drop"` leaves flagged candidates out of a run. A file
that does not decode is flagged by every filter.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from experiments import generating, pool_files
from experiments.features import Options as FeatureOptions
from experiments.features import load_network, make_extractor
from experiments.generators.diffusion import fastest_device
from saflex_jax import checks
from saflex_jax._compat import optional
from saflex_jax.data.images import image_rows

CHUNK = 64  # images that a network sees at once
REGULARISATION = 0.01  # C of the logistic regression on standardised features
# (images uint8[B, H, W, C]) -> f32[B, D]
Features = Callable[[np.ndarray], np.ndarray]


def confidence(
    folder: pathlib.Path,
    *,
    threshold: float,
    weights: str = "",
    size: int = 96,
    backbone: str = "resnet18",
) -> dict[str, int]:
    """Flags candidates that a classifier of the plan's sources gives too little confidence.

        score = p(label | candidate) ,   p a logistic regression on the sources' own images

    Args:
      folder: of the pool.
      threshold: in [0, 1]; below it a candidate is flagged.
      weights: of a backbone whose features it works on; "" = on pixels, for small images.
      size: pixels that the backbone sees.
      backbone: of `configure.BACKBONES`.

    Returns:
      {"candidates", "flagged", "unreadable"}.

    Raises:
      ValueError: a threshold out of range, sources of one class, weights of another network.
    """
    checks.fraction(**{"--threshold": threshold})
    about, rows = pool_files.read_plan(folder)
    sources = generating.originals(about, rows)
    if len(np.unique(sources.labels)) < 2:
        raise ValueError("confidence needs sources of two classes; given one")
    features = _features(weights, backbone, size)
    with threadpool_limits(1):
        known = _in_chunks(features, sources.rows, lambda i: np.stack([sources.read(r) for r in i]))
        model = make_pipeline(StandardScaler(), LogisticRegression(C=REGULARISATION, max_iter=1000))
        model.fit(known, sources.labels)
        place = {label: k for k, label in enumerate(model.classes_)}

        def score(images, records):
            said = model.predict_proba(features(images))
            return said[np.arange(len(images)), [place[r["label"]] for r in records]]

        return _filter(folder, "confidence", score, threshold)


def clip(
    folder: pathlib.Path,
    *,
    threshold: float,
    model: str,
    revision: str = "",
    negatives: Sequence[str],
    device: str = "",
) -> dict[str, int]:
    """Flags candidates that look more like a negative prompt than like their own.

        score = softmax over (own prompt, negatives) of CLIP's logits, at the own prompt

    Args:
      folder: of the pool.
      threshold: in [0, 1].
      model: a CLIP of transformers: "openai/clip-vit-base-patch32", or a folder.
      revision: of the model; "" = the newest.
      negatives: prompts of what is not wanted: "a blank image", "a cartoon".
      device: torch's; empty = the fastest there is.

    Returns:
      As of `confidence`.

    Raises:
      ImportError: torch or transformers is not installed.
      ValueError: no negatives; a threshold out of range.

    Source: Dunlap et al., "Diversify Your Vision Datasets with Automatic Diffusion-based
    Augmentation" (ALIA), NeurIPS 2023, whose semantic filter it is.
    """
    checks.fraction(**{"--threshold": threshold})
    if not negatives:
        raise ValueError("--negative must be given, once for each negative prompt; given none")
    with optional("transformers and torch", extra="generate"):
        import torch
        import transformers
    device = device or fastest_device(torch)
    kept = {"revision": revision} if revision else {}
    network = transformers.CLIPModel.from_pretrained(model, **kept).to(device).eval()
    processor = transformers.CLIPProcessor.from_pretrained(model, **kept)

    def score(images, records):
        texts = [text for r in records for text in (r["prompt"], *negatives)]
        colour = np.repeat(images, 3, -1) if images.shape[-1] == 1 else images
        given = processor(text=texts, images=list(colour), return_tensors="pt", padding=True,
                          truncation=True).to(device)  # fmt: skip
        with torch.no_grad():
            logits = network(**given).logits_per_image.cpu().numpy()
        each = 1 + len(negatives)
        own = np.stack([logits[i, i * each : (i + 1) * each] for i in range(len(images))])
        odds = np.exp(own - own.max(1, keepdims=True))
        return odds[:, 0] / odds.sum(1)

    return _filter(folder, "clip", score, threshold)


def _features(weights: str, backbone: str, size: int) -> Features:
    if not weights:
        return lambda images: images.reshape(len(images), -1).astype(np.float32) / 255
    options = FeatureOptions(backbone=backbone, size=size)
    options.check()
    extract = make_extractor(*load_network(options, weights), options, 1)

    def features(images):
        places = np.minimum(np.arange(CHUNK), len(images) - 1)  # one shape, compiled once
        made, *_ = extract(images[places], np.arange(CHUNK, dtype=np.int32))
        return np.asarray(made[: len(images), 0], np.float32)

    return features


def _in_chunks(features: Features, rows: np.ndarray, read: Callable) -> np.ndarray:
    parts = [rows[begin : begin + CHUNK] for begin in range(0, len(rows), CHUNK)]
    return np.concatenate([features(read(part)) for part in parts])


def _filter(
    folder: pathlib.Path,
    name: str,
    score: Callable[[np.ndarray, list[dict]], np.ndarray],
    threshold: float,
) -> dict[str, int]:
    """Scores all candidates that were made, and writes flags."""
    records = list(pool_files.made(folder).values())
    if not records:
        raise ValueError(f"{folder} must hold candidates; `generate run` makes them; given none")
    shape = tuple(pool_files.read_plan(folder)[0]["shape"])
    said = []
    with tqdm(desc=name, total=len(records), unit="image", disable=None) as bar:
        for begin in range(0, len(records), CHUNK):
            part = records[begin : begin + CHUNK]
            images = [_decoded(folder / r["file_name"], shape) for r in part]
            whole = [n for n, image in enumerate(images) if image is not None]
            scores = np.full(len(part), np.nan)
            if whole:
                scores[whole] = score(
                    np.stack([images[n] for n in whole]), [part[n] for n in whole]
                )
            said += [
                {"file_name": r["file_name"], "score": None if np.isnan(s) else float(s),
                 "flagged": not s >= threshold}
                for r, s in zip(part, scores)
            ]  # fmt: skip
            bar.update(len(part))
    pool_files.write_flags(folder, name, said)
    return {
        "candidates": len(said),
        "flagged": sum(one["flagged"] for one in said),
        "unreadable": sum(one["score"] is None for one in said),
    }


def _decoded(path: pathlib.Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The image, or None where it does not decode or has another shape."""
    try:
        image = np.asarray(image_rows([path], channels=shape[-1])[0])
    except (OSError, ValueError):
        return None
    return image if image.shape == shape else None
