"""Captions as tokens: from your tokenizer.json, CLIP's own vocabulary, or the captions' words."""

from __future__ import annotations

import gzip
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from saflex_jax._compat import optional
from saflex_jax.models.clip import TextTower, check_tokens

if TYPE_CHECKING:
    import tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
# CLIP's words: contractions, runs of letters, single digits, runs of anything else but spaces.
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
_MERGES = 48894  # of CLIP's file, which holds more: 49,408 tokens less 512 bytes and the two above


class Tokenizer:
    """Captions as the tokens i32[N, context] of one text tower.

    >>> words = word_vocabulary(["red car", "blue car"])
    >>> tokens = Tokenizer(words, TextTower(vocab_size=words.get_vocab_size(), context=5))
    >>> tokens(["Red car", "car"]).tolist()
    [[4, 3, 2, 5, 5], [4, 2, 5, 5, 5]]

    Rows are padded with the token that ends a caption; SigLIP's with what the tokenizer pads with,
    if it says so (SigLIP 2's does).

    Args:
      tokenizer: path of a checkpoint's tokenizer.json, or of CLIP's own vocabulary
        bpe_simple_vocab_16e6.txt.gz; or a tokenizer of the package `tokenizers`.
      tower: gives the vocabulary's size and the context.

    Raises:
      ImportError: `tokenizers` is not installed.
      ValueError: no such file, or a vocabulary that is not the tower's.
    """

    def __init__(self, tokenizer: str | os.PathLike | tokenizers.Tokenizer, tower: TextTower):
        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = read_tokenizer(tokenizer)
        self._tokenizer = whole(tokenizer)
        self._tower = tower
        size = tokenizer.get_vocab_size()
        if size != tower.vocab_size:
            raise ValueError(
                f"tokenizer must have the text tower's {tower.vocab_size} tokens; given {size}"
            )
        self._end = self._fill = self._tokenizer.encode("a").ids[-1]
        if tower.family == "siglip" and tokenizer.padding:
            self._fill = tokenizer.padding["pad_id"]
        if tower.family == "clip" and self._end != size - 1:
            raise ValueError(
                f"tokenizer must end a caption with its last token, {size - 1}; given {self._end}"
            )

    def __call__(self, captions: Sequence[str], *, truncate: bool = False) -> np.ndarray:
        """The tokens i32[N, context] of N captions.

        Args:
          captions: N texts.
          truncate: whether to cut captions that are too long.

        Raises:
          ValueError: no texts, an empty text, or one with more tokens than the context.
        """
        context = self._tower.context
        rows = encode(self._tokenizer, captions, most=None if truncate else context)
        tokens = np.full((len(rows), context), self._fill, np.int32)
        for n, row in enumerate(rows):
            kept = [*row[:-1][: context - 1], self._end]
            tokens[n, : len(kept)] = kept
        check_tokens(tokens, self._tower)
        return tokens


def whole(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy of the tokenizer that neither truncates nor pads."""
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def encode(
    tokenizer: tokenizers.Tokenizer, captions: Sequence[str], *, most: int | None
) -> list[list[int]]:
    """The tokens of each caption.

    Raises:
      ValueError: no texts, an empty one, one of more tokens than `most`.
    """
    texts = () if isinstance(captions, str) else captions
    if not len(texts) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"captions must be a list of texts; given {captions!r}")
    rows = [row.ids for row in tokenizer.encode_batch([str(text) for text in texts])]
    for n, row in enumerate(rows):
        if len(row) <= tokenizer.num_special_tokens_to_add(False):
            raise ValueError(f"caption {n} must hold a word; given {texts[n]!r}")
        if most is not None and len(row) > most:
            raise ValueError(
                f"caption {n} must have at most {most} tokens; given {len(row)}: {texts[n]!r}"
            )
    return rows


def read_tokenizer(path: str | os.PathLike) -> tokenizers.Tokenizer:
    """A tokenizer from tokenizer.json, or CLIP's from its vocabulary (.txt.gz).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     word_vocabulary(["a red car"]).save(f"{folder}/tokenizer.json")
    ...     read_tokenizer(f"{folder}/tokenizer.json").get_vocab_size()
    6

    Args:
      path: the file.

    Raises:
      ImportError: `tokenizers` is not installed.
      ValueError: no such file, or one of another kind.

    Source: Radford et al. 2021; the file bpe_simple_vocab_16e6.txt.gz of OpenAI's repository.
    """
    with optional("tokenizers", "clip"):
        import tokenizers

    path = pathlib.Path(path)
    try:
        if path.suffix == ".gz":
            return _clip_tokenizer(gzip.decompress(path.read_bytes()).decode())
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no narrower kind
        raise ValueError(
            f"{path} must be a tokenizer.json or bpe_simple_vocab_16e6.txt.gz: {error}"
        ) from error


def _clip_tokenizer(text: str) -> tokenizers.Tokenizer:
    """From the lines of CLIP's vocabulary: a title, then pairs of pieces in the order of merges."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    pairs = [tuple(line.split()) for line in text.split("\n")[1 : _MERGES + 1]]
    if len(pairs) != _MERGES or {len(pair) for pair in pairs} != {2}:
        raise ValueError(f"it must hold {_MERGES} pairs after its first line; given another file")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - 188)]
    pieces = [*letters, *(c + "</w>" for c in letters), *map("".join, pairs), START, END]
    model = models.BPE(
        {piece: n for n, piece in enumerate(pieces)},
        pairs,
        unk_token=END,
        end_of_word_suffix="</w>",
        continuing_subword_prefix="",
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return _between_ends(made)


def word_vocabulary(captions: Iterable[str]) -> tokenizers.Tokenizer:
    """A tokenizer of the words in these captions, for a tower trained from scratch.

    Token 0 stands for any other word; words follow in alphabetical order; the last two tokens begin
    and end a caption. `.save(path)` writes it.

    >>> word_vocabulary(["a red car"]).get_vocab_size()
    6

    Args:
      captions: texts; case does not matter.

    Raises:
      ImportError: `tokenizers` is not installed.
      ValueError: no words.
    """
    with optional("tokenizers", "clip"):
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Whitespace()
    words = {w for c in captions for w, _ in split.pre_tokenize_str(normalizer.normalize_str(c))}
    if not words:
        raise ValueError("captions must hold words; given none")
    vocabulary = ["[unknown]", *sorted(words), START, END]
    made = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="[unknown]")
    )
    made.normalizer, made.pre_tokenizer = normalizer, split
    return _between_ends(made)


def _between_ends(made: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer, with START before and END after every caption."""
    from tokenizers import AddedToken, processors

    ends = {end: made.token_to_id(end) for end in (START, END)}
    made.add_special_tokens([AddedToken(end, special=True, normalized=False) for end in ends])
    made.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=list(ends.items())
    )
    return made
