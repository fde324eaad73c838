"""Networks from the configurations published with CLIP's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from saflex_jax import checks
from saflex_jax.models.clip import CLIP, DEVIATION, EPSILON, MEAN, ImageTower, TextTower

# What a configuration leaves out, in its own words: transformers 5.24, open_clip 3.3.
_VIT = {"image_size": 224, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072}  # fmt: skip
_HUGGING_FACE = {
    "clip": {
        "vision_config": {**_VIT, "patch_size": 32, "hidden_act": "quick_gelu"},
        "text_config": {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 512,
                        "num_hidden_layers": 12, "num_attention_heads": 8,
                        "intermediate_size": 2048, "hidden_act": "quick_gelu"},
    },
    "siglip": {
        "vision_config": {**_VIT, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh"},
        "text_config": {"vocab_size": 32000, "max_position_embeddings": 64, "hidden_size": 768,
                        "num_hidden_layers": 12, "num_attention_heads": 12,
                        "intermediate_size": 3072, "hidden_act": "gelu_pytorch_tanh"},
    },
}  # fmt: skip
_OPEN_CLIP = {
    "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12,
                   "head_width": 64, "mlp_ratio": 4.0},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "layers": 12, "heads": 8,
                 "mlp_ratio": 4.0},
}  # fmt: skip
_FIELDS = {"image_size": "size", "patch_size": "patch", "hidden_size": "width", "layers": "depth",
           "num_hidden_layers": "depth", "num_attention_heads": "heads",
           "intermediate_size": "mlp_width", "max_position_embeddings": "context",
           "context_length": "context", "hidden_act": "activation"}  # fmt: skip
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def clip_of(
    config: Mapping[str, Any], *, dtype: DTypeLike | None = None, remat: bool = False
) -> CLIP:
    """The network of a configuration.

    >>> clip = clip_of({"model_cfg": {"embed_dim": 512, "vision_cfg": {}, "text_cfg": {}}})
    >>> clip.image.patch, clip.image.activation
    (16, 'gelu')

    Args:
      config: the content of config.json (Hugging Face: `CLIPConfig`, `SiglipConfig`) or
        open_clip_config.json; missing fields have those libraries' defaults.
      dtype, remat: of both towers; see `ImageTower`.

    Raises:
      ValueError: another kind of network, or a field that these towers do not support.
    """
    options = {"dtype": dtype, "remat": remat}
    if "model_cfg" in config:
        return _of_open_clip(config, options)
    checks.choice(_HUGGING_FACE, **{"config['model_type']": config.get("model_type")})
    return _of_hugging_face(config, options)


def _of_hugging_face(config: Mapping[str, Any], options: Mapping[str, Any]) -> CLIP:
    family = config["model_type"]
    fixed = {"layer_norm_eps": EPSILON[family], "num_channels": 3, "vision_use_head": True}

    def fields(section):
        given, defaults = config.get(section, {}), _HUGGING_FACE[family][section]
        for name, only in fixed.items():
            if given.get(name, only) != only:
                raise ValueError(f"{section}[{name!r}] must be {only}; given {given[name]}")
        told = {name: given.get(name, default) for name, default in defaults.items()}
        checks.choice(_ACTIVATIONS, **{f"{section}['hidden_act']": told["hidden_act"]})
        told["hidden_act"] = _ACTIVATIONS[told["hidden_act"]]
        return {**_renamed(told), "family": family, **options}

    image, text = ImageTower(**fields("vision_config")), TextTower(**fields("text_config"))
    if family == "clip":
        return CLIP(image, text, config.get("projection_dim", 512))
    width = config.get("text_config", {}).get("projection_size", text.width)
    return CLIP(image, text, width, ("text",), sigmoid=True)


def _of_open_clip(config: Mapping[str, Any], options: Mapping[str, Any]) -> CLIP:
    model = config["model_cfg"]
    checks.known("model_cfg", model, ("embed_dim", "quick_gelu", *_OPEN_CLIP))
    for name, only in {"mean": MEAN["clip"], "std": DEVIATION["clip"]}.items():
        given = config.get("preprocess_cfg", {}).get(name, only)
        if not np.allclose(given, only, rtol=0, atol=1e-4):
            raise ValueError(f"preprocess_cfg[{name!r}] must be {list(only)}; given {given}")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"

    def fields(section):
        checks.known(f"model_cfg.{section}", model[section], _OPEN_CLIP[section])
        told = {**_OPEN_CLIP[section], **model[section]}
        told["mlp_width"] = int(told["width"] * told.pop("mlp_ratio"))
        if "head_width" in told:
            told["heads"] = told["width"] // told.pop("head_width")
        return {**_renamed(told), "activation": activation, **options}

    towers = ImageTower(**fields("vision_cfg")), TextTower(**fields("text_cfg"))
    return CLIP(*towers, model["embed_dim"])


def _renamed(told: Mapping[str, Any]) -> dict[str, Any]:
    return {_FIELDS.get(name, name): value for name, value in told.items()}


def check_config(clip: CLIP, config: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first field in which a network differs from its configuration.

    Args:
      clip: with an `ImageTower` and a `TextTower`.
      config: as `clip_of` takes it.
    """
    told = clip_of(config)
    fields = {
        f"clip.{tower}.{field.name}": (getattr(ours, field.name), getattr(theirs, field.name))
        for tower in ("image", "text")
        for ours, theirs in [(getattr(clip, tower), getattr(told, tower))]
        for field in dataclasses.fields(ours)
        if field.name not in ("dtype", "remat", "parent", "name")
    }
    fields["clip.embed_dim"] = clip.embed_dim, told.embed_dim
    for name, (given, said) in fields.items():
        if given != said:
            raise ValueError(f"{name} must be {said!r}, as config says; given {given!r}")
