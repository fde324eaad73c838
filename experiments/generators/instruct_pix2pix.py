"""InstructPix2Pix: the prompt is an instruction, "make it snow"; `timbrooks/instruct-pix2pix`.

A strength s of [0, 1] is an image guidance of 1 + 2 (1 - s): the paper's 1.5 at s = .75.

Source: Brooks et al., "InstructPix2Pix", CVPR 2023.
"""

from __future__ import annotations

from experiments.generators import Generator, Options, Originals, diffusion

check = diffusion.check


def make(options: Options, originals: Originals) -> Generator:
    """See `diffusion.generator`."""
    del originals

    def inputs(request, image):
        return {"image": image, "image_guidance_scale": 1 + 2 * (1 - request.strength)}

    return diffusion.generator("StableDiffusionInstructPix2PixPipeline", options, inputs)
