"""Captions of classes: names in templates, and their table as a text tower reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# Of low-resolution photographs; a class name stands in the braces.
PHOTO = (
    "a photo of a {}.",
    "a blurry photo of a {}.",
    "a low resolution photo of a {}.",
    "a close-up photo of the {}.",
    "a photo of a small {}.",
)
_WHERE = (
    "",
    *(f" in {where}" for where in ("asia", "africa", "the americas", "europe", "oceania")),
)
# Of the sets that FLYP was measured on (locuslab/FLYP). It has 80 of ImageNet, and two more of FMoW
# with the right article.
FLYP_TEMPLATES = {
    "imagenet": ("a photo of a {}.",),
    "iwildcam": ("a photo of {}.", "{} in the wild."),
    "fmow": (
        *(
            f"{kind} photo of a {{}}{where}."
            for where in _WHERE
            for kind in ("satellite", "aerial")
        ),
        "a photo of a {}.",
        "{}.",
    ),
}


def filled(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """The captions of each class, one per template.

    >>> filled(["cat", "dog"], ["a photo of a {}.", "one {}"])[1]
    ['a photo of a dog.', 'one dog']

    Args:
      names: of the classes.
      templates: texts with {} for the name.

    Raises:
      ValueError: no templates, one without {}, a class without a name.
    """
    if not templates:
        raise ValueError("templates must hold one text at least; given none")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"templates must hold '{{}}' for a class's name; given {template!r}")
    for c, name in enumerate(names):
        if not name.strip():
            raise ValueError(f"names must not be empty; class {c} is {name!r}")
    return [[template.format(name) for template in templates] for name in names]


def caption_table(
    captions: Sequence[Sequence[str]], encode: Callable[[list[str]], np.ndarray]
) -> np.ndarray:
    """Captions as a text tower reads them, [K, T, ...], with T the largest number of a class.

    A class with fewer captions repeats its own in turn.

    >>> def lengths(texts):
    ...     return np.array([[len(text)] for text in texts])
    >>> caption_table([["cat"], ["a dog", "dogs"]], lengths)[..., 0].tolist()
    [[3, 3], [5, 4]]

    Args:
      captions: one or more of each class.
      encode: N texts -> [N, ...], tokens or embeddings.

    Raises:
      ValueError: no class, a class without captions, an empty caption; an encoder that gives
        another number of rows, or numbers that are not finite.
    """
    if not captions:
        raise ValueError("captions must be of one class at least; given none")
    for c, own in enumerate(captions):
        if isinstance(own, str) or not len(own):
            raise ValueError(f"each class must have a list of captions; class {c} has {own!r}")
        for text in own:
            if not text.strip():
                raise ValueError(f"captions must hold a word; class {c} has {text!r}")
    texts = [text for own in captions for text in own]
    rows = np.asarray(encode(texts))
    if len(rows) != len(texts):
        raise ValueError(f"encode must give {len(texts)} rows, one a caption; given {len(rows)}")
    if not np.isfinite(rows).all():
        raise ValueError("encode must give finite numbers; given NaN or infinity")
    counts = np.array([len(own) for own in captions])
    first = np.cumsum(counts) - counts
    return rows[first[:, None] + np.arange(counts.max())[None] % counts[:, None]]
