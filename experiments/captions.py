"""Makes the captions of a data set's classes as a text tower reads them, once.

    python -m experiments.prepare emoji minilm
    python -m experiments.captions cifar10n emoji [--out=data]
    python -m experiments.captions NAME=names.txt --weights=FOLDER [--templates=imagenet]

Writes DIR/captions/NAME.npy, [K, T, ...], by one rename; `config.data.captions=NAME` trains with
it. "cifar10n": the class's name in the templates of `data.captions.PHOTO`, as embeddings f32[384]
of a sentence encoder. "emoji": the names of the class's emoji, MOST at most, as tokens of the words
in them; the classes are the groups of LEAST emoji or more, a data set of their own,
DIR/emoji_groups. NAME=FILE: the class names of a file, one a line, as tokens of the CLIP in a
folder (`models.load_clip`), which has a tokenizer.json; --templates are those of a set that FLYP
was measured on, or a file with one a line, {} in the place of the name.
Needs the extra "clip"; training does not.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np
from absl import app, flags

from experiments import command_line
from experiments.locking import locked
from saflex_jax import checks, data, models
from saflex_jax.data.captions import FLYP_TEMPLATES, PHOTO, caption_table, filled
from saflex_jax.data.prepared import read_description, write_prepared
from saflex_jax.files import renamed

_out = flags.DEFINE_string("out", "data", "Folder of the prepared data sets.", allow_override=True)
_weights = flags.DEFINE_string(
    "weights", "", "Of NAME=FILE: a folder with a CLIP.", allow_override=True
)
_templates = flags.DEFINE_string("templates", "imagenet", "Of NAME=FILE: a set, or a file.")
LEAST = 24  # emoji of a group: fewer are too few to learn from
MOST = 32  # captions of a group, of which one has 259
EMOJI_CONTEXT = 16  # tokens of the longest name, and the two at its ends


def cifar10n(root: pathlib.Path) -> np.ndarray:
    """f32[10, 5, 384]."""
    names = data.from_prepared(root / "cifar10n").class_names
    return caption_table(
        filled(names, PHOTO), models.load_sentence_encoder(root / "weights/minilm")
    )


def emoji(root: pathlib.Path) -> np.ndarray:
    """i32[K, T, EMOJI_CONTEXT] of the larger groups, whose images go to emoji_groups."""
    source = data.from_prepared(root / "emoji")
    train = source.splits["train"]
    large = np.flatnonzero(np.bincount(source.labels[train], minlength=source.num_classes) >= LEAST)
    rows = np.flatnonzero(np.isin(source.labels, large))
    labels, names = np.searchsorted(large, source.labels[rows]), source.extra["caption"][rows]
    _write_groups(root, source, rows, labels, [source.class_names[c] for c in large])
    words = models.word_vocabulary(names.tolist())
    tower = models.TextTower(words.get_vocab_size(), EMOJI_CONTEXT)
    each = [_spread(sorted(set(names[labels == c].tolist()))) for c in range(len(large))]
    return caption_table(each, models.Tokenizer(words, tower))


def of_names(file: pathlib.Path, folder: pathlib.Path, templates: str) -> np.ndarray:
    """i32[K, T, context] of the class names in a file, as the CLIP in a folder reads them.

    Raises:
      ValueError: no such file, fewer than two names, no such templates; as `load_clip` and
        `data.captions.filled`.
    """
    names = _lines("NAME=FILE", file)
    if len(names) < 2:
        raise ValueError(f"{file} must hold two names or more, one a line; given {len(names)}")
    if templates in FLYP_TEMPLATES:
        texts = filled(names, FLYP_TEMPLATES[templates])
    elif pathlib.Path(templates).is_file():
        texts = filled(names, _lines("templates", pathlib.Path(templates)))
    else:
        checks.choice(FLYP_TEMPLATES, **{"--templates, where it is no file,": templates})
    clip, _ = models.load_clip(folder)
    return caption_table(texts, models.Tokenizer(folder / "tokenizer.json", clip.text))


def _lines(name: str, file: pathlib.Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"{name} must be a text file that exists; given {file}")
    return file.read_text(encoding="utf-8").splitlines()


def _spread(names: list[str]) -> list[str]:
    """MOST of them, evenly."""
    return names[:: -(-len(names) // MOST)]


def _write_groups(root, source, rows, labels, class_names):
    about = read_description(root / "emoji")
    ends = {name: np.isin(rows, own).sum() for name, own in source.splits.items()}
    splits, begin = {}, 0
    for name, number in ends.items():
        splits[name] = (begin, begin + int(number))
        begin += int(number)
    about = about._replace(
        name="emoji_groups", num_classes=len(class_names), class_names=tuple(class_names),
        splits=splits,
    )  # fmt: skip
    arrays = {"inputs": np.asarray(source.inputs)[rows], "labels": labels}
    folder = root / "emoji_groups"
    with locked(root, folder.name) as scratch:
        new = scratch / "new"
        new.mkdir()
        write_prepared(new, about, arrays)
        if folder.exists():
            os.rename(folder, scratch / "old")
        os.rename(new, folder)


CAPTIONS = {"cifar10n": cifar10n, "emoji": emoji}


def main(argv: list[str]) -> None:
    """Makes the sets that are named."""
    if len(argv) < 2:
        raise app.UsageError(f"name one or more of {sorted(CAPTIONS)}, or NAME=FILE")
    for given in argv[1:]:
        if "=" not in given:
            checks.choice(CAPTIONS, name=given)
    for given in argv[1:]:
        root = pathlib.Path(_out.value)
        name, _, file = given.partition("=")
        if file:
            table = of_names(pathlib.Path(file), pathlib.Path(_weights.value), _templates.value)
        else:
            table = CAPTIONS[name](root)
        folder = root / "captions"
        folder.mkdir(parents=True, exist_ok=True)
        with renamed(folder / f"{name}.npy") as part, open(part, "wb") as file:
            np.save(file, table)
        what = f"{table.dtype}{list(table.shape)}"
        most = f", tokens below {table.max() + 1}" if table.dtype == np.int32 else ""
        print(f"{folder / name}.npy: {what}{most}")


if __name__ == "__main__":
    command_line.run_absl(main)
