"""Images per second of RandAugment(2, 9) here and in other libraries, and what it adds to a step.

    python -m benchmarks.augment_throughput [--json] [--out FILE] [--sizes 32,224] [--rounds N]

All in one run, on the same crops of photographs, the libraries in turn. Each is given one array of
images in the dtype that it works on and hands one back, as training needs it; decoding is not
timed. Each uses its default threads. Images per second are those of all rounds together: some
libraries draw their operations once for a batch, so that one batch can take many times another.
A library that is missing or fails is null, with the reason. The libraries do not all do the same
work: `PEERS` says what each does.

Needs `pip install -e ".[bench]"`. About 4 minutes on 2 CPU cores, most of them for Keras.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import sys
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import tqdm
from sklearn.datasets import load_sample_images

from benchmarks import timing
from experiments import build
from experiments.configs import digits
from saflex_jax import augment, parallel
from saflex_jax.augment import policies
from saflex_jax.methods.upstream import upstream
from saflex_jax.types import Batch, Streams

OPERATIONS, MAGNITUDE, LARGEST = 2, 9, 30
STRENGTH = MAGNITUDE / LARGEST
BATCH_SIZES = {32: 256, 224: 32}
STEP_BATCH_SIZES = (128, 256)
SECONDS = 0.2  # of one job in one round
STEP_PAIRS = 12  # steps without and with it, in turn, for each round: the difference is small
PACKAGES = ("saflex_jax", "jax", "jaxlib", "numpy", "pillow", "albumentations",
            "opencv-python-headless", "kornia", "torch", "keras", "augmax")  # fmt: skip


def crops(side: int, size: int) -> np.ndarray:
    """u8[size, side, side, 3], crops of scikit-learn's two photographs, always the same."""
    photographs = load_sample_images().images
    rng = np.random.default_rng(0)

    def crop():
        photograph = photographs[rng.integers(len(photographs))]
        top, left = (rng.integers(extent - side + 1) for extent in photograph.shape[:2])
        return photograph[top : top + side, left : left + side]

    return np.stack([crop() for _ in range(size)])


def floats(images: np.ndarray) -> np.ndarray:
    """u8 -> f32 in [0, 1]."""
    return images.astype(np.float32) / 255


def as_batch(images: np.ndarray, *, num_classes: int = 10) -> Batch:
    """Samples with labels drawn at random."""
    size = len(images)
    labels = np.random.default_rng(0).integers(num_classes, size=size)
    onehot = np.eye(num_classes, dtype=np.float32)[labels]
    return Batch(floats(images), onehot, np.ones(size, bool), np.arange(size, dtype=np.int32))


# --- the libraries: u8[B, H, W, 3] -> a job that augments the batch once, anew in every call


def saflex_jax(images: np.ndarray) -> timing.Job:
    """This library, jitted, on the default device."""
    pipeline = augment.randaugment(OPERATIONS, MAGNITUDE)
    compiled = jax.jit(lambda key, call, batch: pipeline(jax.random.fold_in(key, call), batch))
    key, batch = jax.device_put((jax.random.key(0), as_batch(images)))
    calls = itertools.count()
    return lambda: jax.block_until_ready(compiled(key, np.int32(next(calls)), batch))


def pillow_operations(side: int) -> dict[str, Callable]:
    """name -> (image, sign) -> image, the 14 operations with torchvision's ranges."""
    from PIL import Image, ImageEnhance, ImageOps

    slope, pixels = 0.3 * STRENGTH, int(150 / 331 * side * STRENGTH)
    threshold, bits = 255 * (1 - STRENGTH), 8 - round(MAGNITUDE / (LARGEST / 4))

    def affine(*matrix):
        made = {
            sign: [e + sign * m for e, m in zip((1, 0, 0, 0, 1, 0), matrix)] for sign in (-1, 1)
        }
        return lambda image, sign: image.transform(
            image.size, Image.Transform.AFFINE, made[sign], Image.Resampling.NEAREST
        )

    def enhance(kind):
        return lambda image, sign: kind(image).enhance(1 + sign * 0.9 * STRENGTH)

    return {
        "identity": lambda image, sign: image,
        "autocontrast": lambda image, sign: ImageOps.autocontrast(image),
        "equalize": lambda image, sign: ImageOps.equalize(image),
        "rotate": lambda image, sign: image.rotate(sign * 30 * STRENGTH),
        "solarize": lambda image, sign: ImageOps.solarize(image, threshold),
        "color": enhance(ImageEnhance.Color),
        "posterize": lambda image, sign: ImageOps.posterize(image, bits),
        "contrast": enhance(ImageEnhance.Contrast),
        "brightness": enhance(ImageEnhance.Brightness),
        "sharpness": enhance(ImageEnhance.Sharpness),
        "shear_x": affine(0, slope, 0, 0, 0, 0),
        "shear_y": affine(0, 0, 0, slope, 0, 0),
        "translate_x": affine(0, 0, pixels, 0, 0, 0),
        "translate_y": affine(0, 0, 0, 0, 0, pixels),
    }


def pillow(images: np.ndarray) -> timing.Job:
    """A loop over Pillow images, from an array and to an array."""
    from PIL import Image

    operations = list(pillow_operations(images.shape[1]).values())
    rng = random.Random(0)

    def augmented(pixels):
        image = Image.fromarray(pixels)
        for operation in rng.choices(operations, k=OPERATIONS):
            image = operation(image, rng.choice((-1, 1)))
        return np.asarray(image)

    return lambda: np.stack([augmented(pixels) for pixels in images])


def albumentations(images: np.ndarray) -> timing.Job:
    """A loop over `SomeOf`."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import asks the network otherwise
    import albumentations as A
    import cv2

    degrees = math.degrees(math.atan(0.3 * STRENGTH))
    pixels = int(150 / 331 * images.shape[1] * STRENGTH)
    factor = (1 + 0.9 * STRENGTH,) * 2
    kept = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
    enhance = lambda name: A.ColorJitter(**kept | {name: factor}, p=1)
    affine = partial(A.Affine, interpolation=cv2.INTER_NEAREST, p=1)
    some = A.SomeOf(
        [
            A.NoOp(p=1),
            A.AutoContrast(method="pil", p=1),
            A.Equalize(mode="pil", p=1),
            affine(rotate=30 * STRENGTH),
            A.Solarize(threshold_range=(1 - STRENGTH, 1 - STRENGTH), p=1),
            enhance("saturation"),
            A.Posterize(num_bits=8 - round(MAGNITUDE / (LARGEST / 4)), p=1),
            enhance("contrast"),
            enhance("brightness"),
            A.Sharpen(alpha=(0.9 * STRENGTH,) * 2, lightness=(1, 1), p=1),
            affine(shear={"x": degrees, "y": 0}),
            affine(shear={"x": 0, "y": degrees}),
            affine(translate_px={"x": pixels, "y": 0}),
            affine(translate_px={"x": 0, "y": pixels}),
        ],
        n=OPERATIONS,
        replace=True,
        p=1,
    )
    return lambda: np.stack([some(image=image)["image"] for image in images])


def kornia(images: np.ndarray) -> timing.Job:
    """Its RandAugment, on the kind of device that JAX uses."""
    import torch
    from kornia.augmentation.auto import RandAugment

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    batch = torch.from_numpy(floats(images)).permute(0, 3, 1, 2).contiguous().to(device)
    pipeline = RandAugment(n=OPERATIONS, m=MAGNITUDE)

    def job():
        with torch.no_grad():
            pipeline(batch)
        if device == "cuda":
            torch.cuda.synchronize()

    return job


def keras(images: np.ndarray) -> timing.Job:
    """Its RandAugment on JAX: called as it is or jitted through `stateless_call`, the faster."""
    os.environ["KERAS_BACKEND"] = "jax"
    from keras.layers import RandAugment

    layer = RandAugment(value_range=(0, 1), num_ops=OPERATIONS, factor=STRENGTH)
    batch = jax.device_put(floats(images))

    def eager():
        return jax.block_until_ready(layer(batch, training=True))

    eager()  # makes the variables
    stateless = jax.jit(lambda values, x: layer.stateless_call([], values, x, training=True))
    values = [variable.value for variable in layer.non_trainable_variables]

    def jitted():
        nonlocal values
        made, values = stateless(values, batch)
        return jax.block_until_ready(made)

    jitted()
    return timing.fastest(eager, jitted)


def augmax(images: np.ndarray) -> timing.Job:
    """A chain of its four operations, each as often as RandAugment would draw it."""
    import augmax as A

    p = 1 - (1 - 1 / 14) ** OPERATIONS
    enhance = (-0.9 * STRENGTH, 0.9 * STRENGTH)
    chain = A.Chain(
        A.Rotate(30 * STRENGTH, p=p),
        A.RandomBrightness(enhance, p=p),
        A.RandomContrast(enhance, p=p),
        A.Solarization(1 - STRENGTH, p=p),
    )

    @jax.jit
    def compiled(key, call, batch):
        return jax.vmap(chain)(jax.random.split(jax.random.fold_in(key, call), len(batch)), batch)

    key, batch = jax.device_put((jax.random.key(0), floats(images)))
    calls = itertools.count()
    return lambda: jax.block_until_ready(compiled(key, np.int32(next(calls)), batch))


def copy(images: np.ndarray) -> timing.Job:
    """The floor: the batch read and written once."""
    return floats(images).copy


# name -> (its setup, what it does)
PEERS = {
    "saflex_jax": (saflex_jax, "f32, 2 of 14 operations and signs drawn for every image; jit"),
    "pillow": (pillow, "uint8, 2 of the same 14 and signs drawn for every image; Python loop"),
    "albumentations": (albumentations, "uint8, 2 of the same 14 drawn for every image, one sign; "
                                       "Python loop"),
    "kornia": (kornia, "f32, 2 of its 15 operations drawn once for the batch, its own ranges"),
    "keras": (keras, "f32, 2 of its 14 operations drawn once for the batch, its own ranges; "
                     "as it is or under jit, the faster"),
    "augmax": (augmax, "f32, not RandAugment: the 4 of the 14 operations that it has, each on 14 % "
                       "of the images; jit"),
    "copy": (copy, "f32, NumPy copy"),
}  # fmt: skip


# --- where its time goes


def single_operations(images: np.ndarray) -> dict[str, Callable[[], timing.Job]]:
    """name -> setup of a job that does one operation to every image of the batch, one layer."""
    space = policies.STANDARD
    compiled = jax.jit(partial(policies.apply, names=tuple(space)))
    batch = jax.device_put(floats(images))
    size, height, width, _ = batch.shape

    def setup(place, name):
        number = jax.numpy.full(size, augment.OPERATIONS.index(name))
        drawn = jax.numpy.full(size, place)
        value = policies.values(space, drawn, STRENGTH, 1.0, (height, width))
        return lambda: jax.block_until_ready(compiled(batch, number, value))

    return {name: partial(setup, place, name) for place, name in enumerate(space)}


# --- what it adds to a training step


def saflex_steps(batch_size: int) -> dict[str, Callable[[], timing.Job]]:
    """The SAFLEX step of the digits config on 32x32x3 images, without and with RandAugment."""
    config = digits.get_config()
    config.train.batch_size = batch_size
    val = as_batch(crops(32, config.data.val))
    pools = Streams(candidates=as_batch(crops(32, batch_size)), val=val)

    def setup(put_in_front):
        method = put_in_front(build.make_method(config, pools))
        runner = parallel.jit_runner(method.step, devices=jax.devices()[:1])
        state = runner.put_state(build.init_state(config, method, pools))
        streams = runner.put_batch(pools)

        def job():
            nonlocal state
            state, _ = runner.step(state, streams)
            jax.block_until_ready(state)

        return job

    def randaugmented(method):
        return upstream(method, augment.randaugment(OPERATIONS, MAGNITUDE))

    return {"without": lambda: setup(lambda method: method), "with": lambda: setup(randaugmented)}


# --- the run and its report

Runs = dict[str, timing.Run]


def measure(
    throughput: Runs, operations: Runs, steps: Runs, *, rounds: int, bar: tqdm.tqdm
) -> None:
    """Fills all: image side -> peers, image side -> single operations, batch size -> steps."""
    for size, run in steps.items():  # before other libraries start threads of their own
        bar.set_description(f"step of {size}")
        pairs = STEP_PAIRS * rounds
        timing.interleaved(saflex_steps(int(size)), run, rounds=pairs, seconds=0, bar=bar)
    for side, run in operations.items():
        bar.set_description(f"operations {side}x{side}")
        setups = single_operations(crops(int(side), BATCH_SIZES.get(int(side), 32)))
        timing.interleaved(setups, run, rounds=rounds, seconds=SECONDS / 4, bar=bar)
    for side, run in throughput.items():
        bar.set_description(f"{side}x{side}")
        images = crops(int(side), BATCH_SIZES.get(int(side), 32))
        setups = {name: partial(setup, images) for name, (setup, _) in PEERS.items()}
        timing.interleaved(setups, run, rounds=rounds, seconds=SECONDS, bar=bar)


def ratio(above: float | None, below: float | None) -> float | None:
    """above / below; None unless both were measured."""
    return None if above is None or below is None else above / below


def report(throughput: Runs, operations: Runs, steps: Runs, *, rounds: int) -> dict:
    """The JSON: images per second of all rounds, medians of steps and operations, spreads (IQR)."""
    made = {"images_per_second": {}, "ratios": {}, "spread": {}, "operation_microseconds": {},
            "saflex_step": {},
            "why_null": {"images_per_second": {}, "saflex_step": {}}}  # fmt: skip

    def summary(run, names, centre, of_seconds, why):
        found, spread = {}, {}
        for name in names:
            times = run.seconds.get(name, [])
            if name in run.failed or not times:
                why[name] = run.failed.get(name, "interrupted before it was measured")
                found[name] = spread[name] = None
            else:
                found[name] = of_seconds(float(centre(times)))
                spread[name] = timing.spread(map(of_seconds, times))
        return found, spread

    for side, run in throughput.items():
        why = made["why_null"]["images_per_second"][side] = {}
        images = BATCH_SIZES.get(int(side), 32)
        speed = lambda seconds: images / seconds  # noqa: B023
        found, spread = summary(run, PEERS, np.mean, speed, why)
        made["images_per_second"][side], made["spread"][side] = found, spread
        peers = [name for name in PEERS if name not in ("saflex_jax", "copy")]
        made["ratios"][side] = {
            f"{above}/{below}": ratio(found[above], found[below])
            for above, below in [*(("saflex_jax", p) for p in peers), ("copy", "saflex_jax")]
        }
    for side, run in operations.items():
        why, images = {}, BATCH_SIZES.get(int(side), 32)
        each = lambda seconds: 1e6 * seconds / images  # noqa: B023
        made["operation_microseconds"][side], _ = summary(
            run, policies.STANDARD, np.median, each, why
        )
    for size, run in steps.items():
        why = made["why_null"]["saflex_step"][size] = {}
        found, spread = summary(run, ("without", "with"), np.median, float, why)
        # Step by step: a slow moment of the machine is in both members of a pair.
        paired = []
        if None not in found.values():
            paired = [a / b for a, b in zip(run.seconds["with"], run.seconds["without"])]
        made["saflex_step"][size] = {
            "seconds": found, "ratio": float(np.median(paired)) if paired else None,
            "ratio_spread": timing.spread(paired) if paired else None, "spread": spread,
        }  # fmt: skip
    made["peers"] = {name: what for name, (_, what) in PEERS.items()}
    made["machine"] = timing.machine(PACKAGES) | {"rounds": rounds}
    return made


def table(made: dict) -> str:
    """The report for people."""
    show = lambda value, digits=0: "null" if value is None else f"{value:,.{digits}f}"
    lines = timing.header(made["machine"])
    for side, speeds in made["images_per_second"].items():
        ours = speeds["saflex_jax"]
        lines += ["", f"{side}x{side}x3, RandAugment({OPERATIONS}, {MAGNITUDE})",
                  f"  {'':16}{'images/s':>12}{'IQR':>12}{'ours/it':>10}"]  # fmt: skip
        for name, value in speeds.items():
            spread = made["spread"][side][name]
            lines.append(
                f"  {name:16}{show(value):>12}{show(spread):>12}{show(ratio(ours, value), 2):>10}"
            )
    for side, each in made["operation_microseconds"].items():
        times = sorted(each.items(), key=lambda pair: -(pair[1] or 0))
        lines += ["", f"{side}x{side}x3, microseconds an image, one operation on all images"]
        lines += ["  " + ", ".join(f"{name} {show(value)}" for name, value in times)]
    lines += ["", "SAFLEX step, 32x32x3, without and with it",
              f"  {'batch':16}{'ms without':>12}{'ms with':>12}{'ratio':>10}"]  # fmt: skip
    for size, step in made["saflex_step"].items():
        ms = [s and 1e3 * s for s in (step["seconds"]["without"], step["seconds"]["with"])]
        lines.append(f"  {size:16}{show(ms[0], 1):>12}{show(ms[1], 1):>12}"
                     f"{show(step['ratio'], 2):>10}")  # fmt: skip
    lines += ["", *(f"{name}: {what}" for name, what in made["peers"].items())]
    for section, cases in made["why_null"].items():
        for case, reasons in cases.items():
            lines += [f"null: {section} {case} {name}: {why}" for name, why in reasons.items()]
    return "\n".join(lines)


def sizes(text: str) -> list[int]:
    """'32,224' -> [32, 224]; ValueError unless a crop of every size fits."""
    sides = [int(side) for side in text.split(",")]
    largest = min(min(p.shape[:2]) for p in load_sample_images().images)
    for side in sides:
        if not 3 <= side <= largest:
            raise ValueError(f"sizes must lie in [3, {largest}]; given {side}")
    return sides


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and returns the exit status: 0, or 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="32,224", help="sides of the images")
    throughput, operations, steps = {}, {}, {}

    def start(options):
        for side in sizes(options.sizes):
            throughput[str(side)] = timing.Run({}, {})
            operations[str(side)] = timing.Run({}, {})
        steps.update({str(size): timing.Run({}, {}) for size in STEP_BATCH_SIZES})
        total = (len(PEERS) + len(policies.STANDARD)) * len(throughput) * (options.rounds + 1)
        total += 2 * len(steps) * (STEP_PAIRS * options.rounds + 1)
        return total, lambda bar: measure(
            throughput, operations, steps, rounds=options.rounds, bar=bar
        )

    return timing.command(
        parser,
        argv,
        start=start,
        report=lambda options: report(throughput, operations, steps, rounds=options.rounds),
        table=table,
    )


if __name__ == "__main__":
    sys.exit(main())
