"""diffusers' text-to-image pipelines: of the source only its label is used, in the prompt.

For instance `stable-diffusion-v1-5/stable-diffusion-v1-5`, `stabilityai/sdxl-turbo`.
"""

from __future__ import annotations

from experiments.generators import Generator, Options, Originals, diffusion

check = diffusion.check


def make(options: Options, originals: Originals) -> Generator:
    """See `diffusion.generator`."""
    del originals

    def inputs(request, image):
        del request, image
        return {}

    return diffusion.generator("AutoPipelineForText2Image", options, inputs)
