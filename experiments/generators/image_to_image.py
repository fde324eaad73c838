"""diffusers' image-to-image pipelines: noise is added to the source and removed by the prompt.

For instance `stable-diffusion-v1-5/stable-diffusion-v1-5`, `stabilityai/sdxl-turbo` (guidance 0),
`black-forest-labs/FLUX.2-klein-4B` (which takes no strength).
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.generators import Generator, Options, Originals, diffusion


def check(prompts: Sequence[str], strengths: Sequence[float], steps: int) -> None:
    """Raises ValueError as `diffusion.check`, and where a strength leaves no step."""
    diffusion.check(prompts, strengths, steps)
    if int(min(strengths) * steps) < 1:
        raise ValueError(
            "--steps must be at least 1 / strength, since strength x steps steps are taken; given "
            f"{steps} and {min(strengths)}"
        )


def make(options: Options, originals: Originals) -> Generator:
    """See `diffusion.generator`."""
    del originals

    def inputs(request, image):
        return {"image": image, "strength": request.strength}

    return diffusion.generator("AutoPipelineForImage2Image", options, inputs)
