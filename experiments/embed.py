"""Embeds captions by a locked sentence encoder, once, for towers that train without it.

    python -m experiments.prepare minilm
    python -m experiments.embed captions.txt --out=data/embeddings/captions

captions.txt has one caption a line. Written are OUT.npy, f32[N, 384] of length one, and OUT.json,
the captions in that order; each appears by a rename. `read_embeddings(OUT, captions)` gives the
rows of the captions that it is asked for. Needs the extra "clip"; reading does not.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import app, flags

from saflex_jax import models

_encoder = flags.DEFINE_string("encoder", "data/weights/minilm", "Folder of the encoder.")


def write_embeddings(out: str | os.PathLike, captions: Sequence[str], vectors: np.ndarray) -> None:
    """Writes OUT.npy and OUT.json."""
    root = pathlib.Path(out)
    root.parent.mkdir(parents=True, exist_ok=True)
    array, texts = (root.with_name(f".{root.name}.part.{kind}") for kind in ("npy", "json"))
    np.save(array, vectors)
    texts.write_text(json.dumps(list(captions), ensure_ascii=False, indent=0))
    os.replace(array, f"{root}.npy")
    os.replace(texts, f"{root}.json")


def read_embeddings(out: str | os.PathLike, captions: Sequence[str]) -> np.ndarray:
    """The vectors f32[N, D] of N captions, which may repeat.

    Args:
      out: as given to the command.
      captions: N texts, each of them one of the file's.

    Raises:
      ValueError: no such files, or a caption that is not in them.
    """
    try:
        places = {
            text: n for n, text in enumerate(json.loads(pathlib.Path(f"{out}.json").read_text()))
        }
        vectors = np.load(f"{out}.npy")
    except (OSError, ValueError) as error:
        raise ValueError(f"{out} must be made by python -m experiments.embed; {error}") from error
    for text in captions:
        if text not in places:
            raise ValueError(f"captions must be in {out}.json; given {text!r} as well")
    return vectors[[places[text] for text in captions]]


def main(argv: list[str]) -> None:
    """Embeds the lines of a file."""
    if len(argv) != 2:
        raise app.UsageError("name one file of captions")
    captions = pathlib.Path(argv[1]).read_text().splitlines()
    encode = models.load_sentence_encoder(_encoder.value)
    write_embeddings(flags.FLAGS.out, captions, encode(captions))
    print(f"{flags.FLAGS.out}.npy: {len(captions)} captions")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Where the vectors go, without a suffix.", required=True)
    app.run(main)
