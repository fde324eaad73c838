"""CLIP's published weights as parameters, and parameters as such files, in two dialects."""

from __future__ import annotations

import collections
import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from saflex_jax import checks
from saflex_jax.models.clip import CLIP, ImageTower, TextTower
from saflex_jax.models.clip_config import check_config, clip_of
from saflex_jax.models.tensor_files import check_tensors, read_weights
from saflex_jax.types import Params, PyTree

DIALECTS = ("hugging_face", "open_clip")
# Beginning or part of a path here: Hugging Face's name, OpenCLIP's.
_NAMES = (
    ("/(kernel|scale|embedding)$", "/weight", "/weight"),
    ("image/patches/", "vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("image/class", "vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("image/positions", "vision_model.embeddings.position_embedding.weight",
     "visual.positional_embedding"),
    ("image/first_norm/", "vision_model.pre_layrnorm.", "visual.ln_pre."),  # so spelt
    ("image/last_norm/", "vision_model.post_layernorm.", "visual.ln_post."),
    (r"image/block_(\d+)/", r"vision_model.encoder.layers.\1.",
     r"visual.transformer.resblocks.\1."),
    ("image/pool/attention/(query|key|value)/", "vision_model.head.attention.in_proj_", ""),
    ("image/pool/attention/out/", "vision_model.head.attention.out_proj.", ""),
    ("image/pool/norm/", "vision_model.head.layernorm.", ""),
    ("image/pool/", "vision_model.head.", ""),
    ("text/tokens/", "text_model.embeddings.token_embedding.", "token_embedding."),
    ("text/positions", "text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text/last_norm/", "text_model.final_layer_norm.", "ln_final."),
    (r"text/block_(\d+)/", r"text_model.encoder.layers.\1.", r"transformer.resblocks.\1."),
    ("clip head/image/weight", "visual_projection.weight", "visual.proj"),
    ("siglip head/text/", "text_model.head.", ""),
    ("clip head/text/weight", "text_projection.weight", "text_projection"),
    ("attention_norm/", "layer_norm1.", "ln_1."),
    ("attention/([qkv])[a-z]+/", r"self_attn.\1_proj.", "attn.in_proj_"),
    ("attention/out/", "self_attn.out_proj.", "attn.out_proj."),
    ("mlp_norm/", "layer_norm2.", "ln_2."),
    ("mlp_in/", "mlp.fc1.", "mlp.c_fc."),
    ("mlp_out/", "mlp.fc2.", "mlp.c_proj."),
)  # fmt: skip


def to_clip(params: Params, clip: CLIP, dialect: str) -> dict[str, jax.Array]:
    """The parameters as tensors with the names of a dialect, for `write_weights`.

    >>> from saflex_jax.models import make_clip
    >>> clip = make_clip("tiny")
    >>> state = jax.eval_shape(lambda params: to_clip(params, clip, "open_clip"), shapes(clip))
    >>> state["visual.proj"].shape
    (128, 64)

    Args:
      params: of `clip`.
      clip: with an `ImageTower`, a `TextTower` and the projections of their family.
      dialect: "hugging_face" (transformers' CLIPModel and SiglipModel) or "open_clip" (CLIP only).

    Returns:
      name -> f32 array.

    Raises:
      ValueError: an unknown dialect, one that the family does not have, or other towers.
    """
    checks.choice(DIALECTS, dialect=dialect)
    family = _family(clip)
    if family == "siglip" and dialect == "open_clip":
        raise ValueError("dialect must be 'hugging_face' for siglip; given 'open_clip'")
    joined = collections.defaultdict(dict)  # OpenCLIP has queries, keys and values in one tensor
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        key = _key(f"{family} {path}" if path.startswith("head/") else path, dialect)
        joined[key][path] = _tensor(path, key, leaf, family)
    return {key: _joined(parts) for key, parts in joined.items()}


def _joined(parts: Mapping[str, jax.Array]) -> jax.Array:
    """Queries, keys and values, in this order, by their paths; a single part as it is."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    by_word = {path.split("/")[-2]: value for path, value in parts.items()}
    return jnp.concatenate([by_word[word] for word in ("query", "key", "value")])


def _key(path: str, dialect: str) -> str:
    column = 1 + DIALECTS.index(dialect)
    for row in _NAMES:
        path = re.sub(row[0], row[column], path, count=1)
    return path


def _tensor(path: str, key: str, leaf: jax.Array, family: str) -> jax.Array:
    """A parameter in PyTorch's layout."""
    if path.startswith("logit_"):
        return leaf.reshape((1,) if family == "siglip" else ())
    if re.search("(query|key|value)/bias$", path):
        return leaf.reshape(-1)
    if not path.endswith("kernel") or key in ("visual.proj", "text_projection"):
        return leaf
    if leaf.ndim == 4:
        return leaf.transpose(3, 2, 0, 1)
    if path.endswith("attention/out/kernel"):
        return leaf.reshape(-1, leaf.shape[-1]).T
    return leaf.reshape(leaf.shape[0], -1).T


def _family(clip: CLIP) -> str:
    """The family of both towers, whose projections must be the family's, too."""
    towers = {"image": (clip.image, ImageTower), "text": (clip.text, TextTower)}
    for name, (tower, kind) in towers.items():
        if not isinstance(tower, kind):
            raise ValueError(
                f"clip.{name} must be of {kind.__name__}; given {type(tower).__name__}"
            )
    family = clip.image.family
    projected = ("image", "text") if family == "clip" else ("text",)
    given = clip.text.family, tuple(sorted(clip.projected)), clip.sigmoid
    if given != (family, projected, family == "siglip"):
        raise ValueError(
            f"clip must be all {family}: family of the text tower, projected, sigmoid = "
            f"{(family, projected, family == 'siglip')}; given {given}"
        )
    return family


def shapes(clip: CLIP) -> PyTree:
    """The parameters' shapes, without computing any.

    >>> from saflex_jax.models import make_clip
    >>> shapes(make_clip("tiny"))["head"]["text"]["kernel"].shape
    (128, 64)
    """
    images = jax.ShapeDtypeStruct((1, clip.image.size, clip.image.size, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, clip.text.context), jnp.int32)
    return jax.eval_shape(clip.init, jax.random.key(0), images, tokens)["params"]


def from_clip(
    state: Mapping[str, np.ndarray], clip: CLIP, config: Mapping[str, Any] | None = None
) -> Params:
    """The parameters of CLIP or SigLIP from tensors with the names of either dialect, f32.

    Every tensor must be present, and no others. Tensors do not tell the activation or the number of
    heads; the configuration published with them does.

    >>> from saflex_jax.models import make_clip
    >>> from_clip({"visual.proj": np.zeros((128, 64))}, make_clip("tiny"))
    Traceback (most recent call last):
        ...
    ValueError: state must have 'ln_final.bias' f[128]; it is missing

    Args:
      state: name -> array, from `read_weights`.
      clip: with an `ImageTower` and a `TextTower`.
      config: as `clip_of` takes it, to check `clip` against; None = unchecked.

    Raises:
      ValueError: neither dialect; a tensor that is missing, left over, or of another shape; another
        activation or size in `config`.
    """
    _family(clip)
    if config is not None:
        check_config(clip, config)
    dialect = dialect_of(state)
    make = functools.partial(to_clip, clip=clip, dialect=dialect)
    wanted = {k: x.shape for k, x in jax.eval_shape(make, shapes(clip)).items()}
    # What files of older versions hold besides: the numbers of the positions, 0, 1, 2, ...
    given = {k: np.asarray(x) for k, x in state.items() if not k.endswith(".position_ids")}
    check_tensors(given, wanted, f"this CLIP in the dialect {dialect}")
    # Tensors are the parameters in another order, and a permutation's transpose is its inverse.
    (params,) = jax.linear_transpose(make, shapes(clip))(
        {k: jnp.asarray(x, jnp.float32) for k, x in given.items()}
    )
    return params


def dialect_of(state: Mapping[str, Any]) -> str:
    """The dialect of the names of a CLIP.

    >>> dialect_of({"visual.proj": 0, "logit_scale": 0})
    'open_clip'

    Raises:
      ValueError: neither.
    """
    for dialect, start in zip(DIALECTS, ("vision_model.", "visual.")):
        if any(name.startswith(start) for name in state):
            return dialect
    raise ValueError(
        "state must have names in Hugging Face's dialect ('vision_model. ...') or OpenCLIP's "
        f"('visual. ...'); given {sorted(state)[:3]}"
    )


# --- folders

_FILES = {"open_clip_config.json": "open_clip_model.safetensors",
          "config.json": "model.safetensors"}  # fmt: skip


def load_clip(
    folder: str | os.PathLike, *, dtype: DTypeLike | None = None, remat: bool = False
) -> tuple[CLIP, Params]:
    """The network and its parameters from a downloaded folder of a hub.

    >>> clip, params = load_clip("data/weights/clip-vit-base-patch32")  # doctest: +SKIP

    Args:
      folder: with config.json and model.safetensors (Hugging Face), or open_clip_config.json and
        open_clip_model.safetensors.
      dtype, remat: of both towers; see `ImageTower`.

    Raises:
      ValueError: neither pair of files; as `clip_of` and `from_clip`.
    """
    root = pathlib.Path(folder)
    for config, weights in _FILES.items():
        if (root / config).exists() and (root / weights).exists():
            told = json.loads((root / config).read_text())
            clip = clip_of(told, dtype=dtype, remat=remat)
            return clip, from_clip(read_weights(root / weights), clip)
    raise ValueError(
        f"folder must hold {' or '.join(f'{c} and {w}' for c, w in _FILES.items())}; given {root}"
    )
