"""CLIP's published weights as parameters, and parameters as such files: two dialects of keys."""

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
from saflex_jax.models.clip import (
    CLIP,
    CLIPS,
    DEVIATION,
    EPSILON,
    MEAN,
    ImageTower,
    TextTower,
)
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
    """The parameters as tensors with the names of a dialect; `write_weights` makes a file of them.

    Args:
      params: of `clip`.
      clip: with an `ImageTower`, a `TextTower` and the projections of their family.
      dialect: "hugging_face" (transformers' CLIPModel and SiglipModel) or "open_clip" (CLIP only).

    Returns:
      name -> f32 array.

    Raises:
      ValueError: an unknown dialect, one that the family does not have, other towers.
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
    if path.endswith("out/kernel"):
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

    Every tensor must be there, and no other may be. Tensors do not tell which activation they were
    trained with, or how many heads: the configuration that lies beside them does.

    Args:
      state: name -> array, as `read_weights` gives it.
      clip: with an `ImageTower` and a `TextTower`.
      config: as `clip_of` takes it; whatever it says must be so of `clip`. None = unchecked.

    Raises:
      ValueError: neither dialect; a tensor that is missing, left over, or of another shape; another
        activation or size in `config`.
    """
    if config is not None:
        _check_config(clip, config)
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


# --- configurations

_COMMON = {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
           "mlp_width": "intermediate_size", "activation": "hidden_act"}  # fmt: skip
_HF_IMAGE = {"size": "image_size", "patch": "patch_size", **_COMMON}
_HF_TEXT = {"vocab_size": "vocab_size", "context": "max_position_embeddings", **_COMMON}
_HF_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_OPEN_CLIP = {
    "image": dict(image_size=224, patch_size=16, width=768, layers=12, head_width=64,
                  mlp_ratio=4.0),
    "text": dict(context_length=77, vocab_size=49408, width=512, layers=12, heads=8,
                 mlp_ratio=4.0),
}  # fmt: skip


def clip_of(
    config: Mapping[str, Any], *, dtype: DTypeLike | None = None, remat: bool = False
) -> CLIP:
    """The network that a configuration describes.

    >>> clip = clip_of({"model_cfg": {"embed_dim": 512, "vision_cfg": {}, "text_cfg": {}}})
    >>> clip.image.patch, clip.image.activation
    (16, 'gelu')

    Args:
      config: what config.json (Hugging Face: `CLIPConfig`, `SiglipConfig`) or open_clip_config.json
        holds; what is left out is as in those libraries.
      dtype, remat: of both towers; see `ImageTower`.

    Raises:
      ValueError: another kind of network, or a field that these towers have nothing for.
    """
    options = {"dtype": dtype, "remat": remat}
    if "model_cfg" in config:
        return _of_open_clip(config, options)
    checks.choice(("clip", "siglip"), **{"config['model_type']": config.get("model_type")})
    return _of_hugging_face(config, options)


def _of_hugging_face(config: Mapping[str, Any], options: Mapping[str, Any]) -> CLIP:
    family = config["model_type"]
    image, text = dict(CLIPS["B/32"][1]), {**CLIPS["B/32"][2], "vocab_size": 49408, "context": 77}
    if family == "siglip":
        image["patch"] = 16
        text = {"vocab_size": 32000, "context": 64, "width": 768, "depth": 12, "heads": 12,
                "mlp_width": 3072}  # fmt: skip

    def fields(section, names, defaults):
        given = config.get(section, {})
        act = "quick_gelu" if family == "clip" else "gelu_pytorch_tanh"
        fixed = {"layer_norm_eps": EPSILON[family], "num_channels": 3, "vision_use_head": True}
        for name, only in fixed.items():
            if given.get(name, only) != only:
                raise ValueError(f"{section}[{name!r}] must be {only}; given {given[name]}")
        checks.choice(_HF_ACTIVATIONS, **{f"{section}['hidden_act']": given.get("hidden_act", act)})
        found = {field: given.get(name, defaults.get(field)) for field, name in names.items()}
        found["activation"] = _HF_ACTIVATIONS[given.get("hidden_act", act)]
        return {**found, "family": family, **options}

    image = fields("vision_config", _HF_IMAGE, image)
    text = fields("text_config", _HF_TEXT, text)
    if family == "clip":
        return CLIP(ImageTower(**image), TextTower(**text), config.get("projection_dim", 512))
    width = config.get("text_config", {}).get("projection_size", text["width"])
    return CLIP(ImageTower(**image), TextTower(**text), width, ("text",), sigmoid=True)


def _of_open_clip(config: Mapping[str, Any], options: Mapping[str, Any]) -> CLIP:
    model = config["model_cfg"]
    checks.known("model_cfg", model, ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg"))
    for name, only in {"mean": MEAN["clip"], "std": DEVIATION["clip"]}.items():
        given = config.get("preprocess_cfg", {}).get(name, only)
        if not np.allclose(given, only, rtol=0, atol=1e-4):
            raise ValueError(f"preprocess_cfg[{name!r}] must be {list(only)}; given {given}")
    for section in ("vision_cfg", "text_cfg"):
        known = _OPEN_CLIP["image" if section == "vision_cfg" else "text"]
        checks.known(f"model_cfg.{section}", model[section], known)
    image, text = ({**_OPEN_CLIP[k], **model[s]} for k, s in (("image", "vision_cfg"),
                                                              ("text", "text_cfg")))  # fmt: skip
    options = {**options, "activation": "quick_gelu" if model.get("quick_gelu") else "gelu"}
    image = ImageTower(
        image["image_size"], image["patch_size"], image["width"], image["layers"],
        image["width"] // image["head_width"], int(image["width"] * image["mlp_ratio"]), **options,
    )  # fmt: skip
    text = TextTower(
        text["vocab_size"], text["context_length"], text["width"], text["layers"], text["heads"],
        int(text["width"] * text["mlp_ratio"]), **options,
    )  # fmt: skip
    return CLIP(image, text, model["embed_dim"])


def _check_config(clip: CLIP, config: Mapping[str, Any]) -> None:
    """Raises on the first field in which the network differs from what the configuration says."""
    _family(clip)
    told = clip_of(config)
    for tower in ("image", "text"):
        ours, theirs = getattr(clip, tower), getattr(told, tower)
        for field in ours.__dataclass_fields__:
            if field in ("dtype", "remat", "parent", "name"):
                continue
            if getattr(ours, field) != getattr(theirs, field):
                raise ValueError(
                    f"clip.{tower}.{field} must be {getattr(theirs, field)!r}, as config says; "
                    f"given {getattr(ours, field)!r}"
                )
    if clip.embed_dim != told.embed_dim:
        raise ValueError(f"clip.embed_dim must be {told.embed_dim}; given {clip.embed_dim}")


# --- folders

_FILES = {"open_clip_config.json": "open_clip_model.safetensors",
          "config.json": "model.safetensors"}  # fmt: skip


def load_clip(
    folder: str | os.PathLike, *, dtype: DTypeLike | None = None, remat: bool = False
) -> tuple[CLIP, Params]:
    """The network and its parameters from a downloaded folder of a hub.

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
