"""A locked sentence encoder: captions to vectors, computed once; nothing in it trains."""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saflex_jax.models.clip import unit
from saflex_jax.models.clip_text import encode, read_tokenizer, whole
from saflex_jax.models.tensor_files import check_tensors, read_weights

BATCH = 64  # captions at once
LONGEST = 256  # tokens of a caption, as the published encoder was trained


def bert(
    state: Mapping[str, jax.Array],
    tokens: jax.Array,
    mask: jax.Array,
    *,
    heads: int,
    epsilon: float,
) -> jax.Array:
    """The last layer's tokens of BERT, f32[B, T, D].

        x <- norm(x + attention(x)),   x <- norm(x + mlp(x))

    Args:
      state: name -> tensor, as in transformers' BertModel.
      tokens: i32[B, T].
      mask: bool[B, T], False on padding.
      heads: of each attention.
      epsilon: of the normalisations.

    Source: Devlin et al., "BERT", NAACL 2019.
    """

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"][None, None]

    def norm(x, name):
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon)
        return x * state[f"{name}.weight"][None, None] + state[f"{name}.bias"][None, None]

    words, positions, kinds = (
        state[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    x = words[tokens] + positions[None, : tokens.shape[1]] + kinds[None, :1]
    x = norm(x, "embeddings.LayerNorm")
    for number in range(_depth(state)):
        layer = f"encoder.layer.{number}."
        query, key, value = (
            linear(x, f"{layer}attention.self.{name}").reshape(*tokens.shape, heads, -1)
            for name in ("query", "key", "value")
        )
        seen = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None])
        seen = linear(seen.reshape(x.shape), f"{layer}attention.output.dense")
        x = norm(x + seen, f"{layer}attention.output.LayerNorm")
        hidden = jax.nn.gelu(linear(x, f"{layer}intermediate.dense"), approximate=False)
        x = norm(x + linear(hidden, f"{layer}output.dense"), f"{layer}output.LayerNorm")
    return x


def embed(
    state: Mapping[str, jax.Array], tokens: jax.Array, mask: jax.Array, **options: float
) -> jax.Array:
    """Normalised means of the tokens of `bert`, f32[B, D]; takes its arguments.

    Source: Reimers and Gurevych, "Sentence-BERT", EMNLP 2019.
    """
    x = bert(state, tokens, mask, **options)
    return unit(jnp.einsum("btd,bt->bd", x, mask.astype(x.dtype)) / jnp.sum(mask, 1, keepdims=True))


def load_sentence_encoder(folder: str | os.PathLike) -> Callable[[Sequence[str]], np.ndarray]:
    """The encoder in a folder, for instance from `python -m experiments.prepare minilm`.

    >>> encode = load_sentence_encoder("data/weights/minilm")  # doctest: +SKIP
    >>> encode(["a photo of a dog", "a photo of a cat"]).shape  # doctest: +SKIP
    (2, 384)

    Args:
      folder: with model.safetensors, config.json and tokenizer.json of a BERT whose sentence
        vectors are normalised means of tokens (sentence-transformers' all-MiniLM-L6-v2).

    Returns:
      captions -> f32[N, D] of length one. It raises ValueError on empty captions and on captions of
      more than 256 tokens.

    Raises:
      ImportError: `tokenizers` is not installed.
      ValueError: a file that is missing or of another network.
    """
    root = pathlib.Path(folder)
    try:
        config = json.loads((root / "config.json").read_text())
        state = read_weights(root / "model.safetensors")
    except OSError as error:
        raise ValueError(
            f"folder must hold config.json and model.safetensors: python -m experiments.prepare "
            f"minilm; {error}"
        ) from error
    state = {name: x for name, x in state.items() if not name.startswith("pooler.")}
    state.pop("embeddings.position_ids", None)  # 0, 1, 2, ..., in files of older versions
    check_tensors(state, _shapes(config), "this BERT")
    tokenizer = whole(read_tokenizer(root / "tokenizer.json"))
    if tokenizer.get_vocab_size() != config["vocab_size"]:
        raise ValueError(
            f"tokenizer.json must have the encoder's {config['vocab_size']} tokens; given "
            f"{tokenizer.get_vocab_size()}"
        )
    options = {"heads": config["num_attention_heads"], "epsilon": config["layer_norm_eps"]}
    run = jax.jit(functools.partial(embed, **options))
    state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), state)

    def encoder(captions: Sequence[str]) -> np.ndarray:
        rows = encode(tokenizer, captions, most=LONGEST)
        width = -(-max(map(len, rows)) // 16) * 16  # few widths, so few compilations
        padded = -(-len(rows) // BATCH) * BATCH
        tokens, mask = np.zeros((padded, width), np.int32), np.zeros((padded, width), bool)
        mask[:, 0] = True  # rows that fill up the last batch have a mean, too
        for n, row in enumerate(rows):
            tokens[n, : len(row)], mask[n, : len(row)] = row, True
        parts = [slice(n, n + BATCH) for n in range(0, padded, BATCH)]
        return np.concatenate([run(state, tokens[p], mask[p]) for p in parts])[: len(rows)]

    return encoder


def _depth(state: Mapping[str, Any]) -> int:
    return 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder."))


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a configuration of BertModel describes.

    Raises:
      ValueError: another network or activation.
    """
    told = config.get("model_type"), config.get("hidden_act")
    if told != ("bert", "gelu"):
        raise ValueError(f"config must be of a 'bert' with 'gelu'; given {told}")
    width, wide = config["hidden_size"], config["intermediate_size"]
    table = "embeddings.{}_embeddings.weight".format
    shapes = {
        table("word"): (config["vocab_size"], width),
        table("position"): (config["max_position_embeddings"], width),
        table("token_type"): (config["type_vocab_size"], width),
    }
    maps = {"embeddings.LayerNorm": (width,)}
    for number in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{number}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            maps[f"{layer}attention.{name}"] = (width, width)
        maps[f"{layer}attention.output.LayerNorm"] = maps[f"{layer}output.LayerNorm"] = (width,)
        maps[f"{layer}intermediate.dense"] = (wide, width)
        maps[f"{layer}output.dense"] = (width, wide)
    for name, shape in maps.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
