"""Makes the captions of a data set's classes as a text tower reads them, once.

    python -m experiments.prepare emoji minilm
    python -m experiments.captions cifar10n emoji [--out=data]

Writes DIR/captions/NAME.npy, [K, T, ...], by one rename; `config.data.captions=NAME` trains with
it. "cifar10n": the class's name in the templates of `data.captions.PHOTO`, as embeddings f32[384]
of a sentence encoder. "emoji": the names of the class's emoji, as tokens of the words in them. Needs
the extra "clip"; training does not.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np
from absl import app, flags

from saflex_jax import checks, data, models
from saflex_jax.data.captions import PHOTO, caption_table, filled

_out = flags.DEFINE_string("out", "data", "Folder of the prepared data sets.", allow_override=True)
EMOJI_CONTEXT = 16  # tokens of the longest name, and the two at its ends


def cifar10n(root: pathlib.Path) -> np.ndarray:
    """f32[10, 5, 384]."""
    names = data.from_prepared(root / "cifar10n").class_names
    return caption_table(filled(names, PHOTO), models.load_sentence_encoder(root / "weights/minilm"))


def emoji(root: pathlib.Path) -> np.ndarray:
    """i32[99, T, EMOJI_CONTEXT]; the first vendor's rows name all emoji."""
    source = data.from_prepared(root / "emoji")
    rows = source.splits["train"]
    names, classes = source.extra["caption"][rows].astype(str), source.labels[rows]
    words = models.word_vocabulary(names.tolist())
    tower = models.TextTower(words.get_vocab_size(), EMOJI_CONTEXT)
    each = [sorted(set(names[classes == c].tolist())) for c in range(source.num_classes)]
    return caption_table(each, models.Tokenizer(words, tower))


CAPTIONS = {"cifar10n": cifar10n, "emoji": emoji}


def main(argv: list[str]) -> None:
    """Makes the sets that are named."""
    if len(argv) < 2:
        raise app.UsageError(f"name one or more of {sorted(CAPTIONS)}")
    for name in argv[1:]:
        checks.choice(CAPTIONS, name=name)
        root = pathlib.Path(_out.value)
        table = CAPTIONS[name](root)
        folder = root / "captions"
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{name}.part.npy"
        np.save(part, table)
        os.replace(part, folder / f"{name}.npy")
        what = f"{table.dtype}{list(table.shape)}"
        most = f", tokens below {table.max() + 1}" if table.dtype == np.int32 else ""
        print(f"{folder / name}.npy: {what}{most}")


if __name__ == "__main__":
    app.run(main)
