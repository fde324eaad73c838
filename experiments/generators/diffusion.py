"""What the generators of diffusers share: loading, options that a pipeline takes, sizes."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.generators import Generator, Made, Options, Request, check_each
from saflex_jax._compat import optional

PACKAGES = ("diffusers", "torch", "transformers")


def check(prompts: Sequence[str], strengths: Sequence[float], steps: int) -> None:
    """Raises ValueError where a strength is outside [0, 1], or there is an empty prompt."""
    check_each("--strength", strengths, 0.0, 1.0)
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("--prompt must not be empty for a model")


def generator(
    pipeline_class: str,
    options: Options,
    inputs: Callable[[Request, Any], Mapping[str, Any]],
) -> Generator:
    """A pipeline of diffusers as a generator.

    Args:
      pipeline_class: its name in diffusers.
      options: of the model.
      inputs: (request, the source as a PIL image of `options.pixels`) -> what the pipeline is
        given beside the seed; of these, what its signature does not name is left out.

    Raises:
      ImportError: torch or diffusers is not installed.
      OSError: no such model.
    """
    with optional("diffusers", extra="generate"):
        import diffusers
        import torch
    from PIL import Image

    kept = {"revision": options.revision} if options.revision else {}
    pipeline = getattr(diffusers, pipeline_class).from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), **kept
    )
    pipeline.to(options.device or fastest_device(torch))
    pipeline.set_progress_bar_config(disable=True)
    takes = inspect.signature(pipeline.__call__).parameters

    def make(request: Request) -> Made:
        height, width, channels = request.image.shape
        image = Image.fromarray(request.image.squeeze(-1) if channels == 1 else request.image)
        side = options.pixels or max(height, width)
        shown = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        given = {"prompt": request.prompt, "num_inference_steps": request.steps,
                 "guidance_scale": request.guidance, "height": side, "width": side,
                 **inputs(request, shown)}  # fmt: skip
        # On the CPU whatever the device, so that every device draws the same numbers.
        seeded = torch.Generator("cpu").manual_seed(request.seed)
        made = pipeline(generator=seeded, **{k: v for k, v in given.items() if k in takes})
        small = made.images[0].resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(small.convert("L" if channels == 1 else "RGB"))
        unsafe = getattr(made, "nsfw_content_detected", None)
        return Made(pixels.reshape(request.image.shape), {"nsfw": bool(unsafe and unsafe[0])})

    versions = {name: _version(name) for name in PACKAGES}
    about = {"model": options.model, "revision": options.revision, "versions": versions}
    return Generator(make, about)


def fastest_device(torch: Any) -> str:
    """Of those that torch has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
