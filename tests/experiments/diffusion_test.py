"""The generators of diffusers and the CLIP filter, on tiny random models saved and loaded again.

Skipped without torch, diffusers and transformers: pip install "saflex_jax[generate]".
"""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="generators of diffusers need torch")
diffusers = pytest.importorskip("diffusers", reason="generators of diffusers")
transformers = pytest.importorskip("transformers", reason="generators of diffusers")

from experiments import generators, json_lines, pool_files, pool_filters  # noqa: E402
from experiments.generators import Options, Originals, Request  # noqa: E402

WORDS = ("a", "photo", "of", "cat", "dog", "rain")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>",
              "<|endoftext|>"]  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps({t: n for n, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def text_config(tokenizer):
    return dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def save_pipeline(folder, tokenizer, kind, channels):
    torch.manual_seed(0)
    parts = dict(
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, sample_size=8, in_channels=channels,
            out_channels=4, norm_num_groups=4, cross_attention_dim=16, attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(**text_config(tokenizer))
        ),
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
    )  # fmt: skip
    kind(**parts, requires_safety_checker=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory, tokenizer):
    stable = diffusers.StableDiffusionPipeline
    instruct = diffusers.StableDiffusionInstructPix2PixPipeline
    root = tmp_path_factory.mktemp("models")
    plain = save_pipeline(root / "plain", tokenizer, stable, 4)
    edit = save_pipeline(root / "edit", tokenizer, instruct, 8)
    return {"image_to_image": plain, "text_to_image": plain, "instruct_pix2pix": edit}


IMAGE = np.random.default_rng(0).integers(256, size=(12, 10, 1)).astype(np.uint8)
REQUEST = Request(IMAGE, 3, 0, "a photo of a cat", 0.5, 2.0, 4, seed=5)
NOTHING = Originals(np.array([3]), np.array([0]), lambda row: IMAGE)


@pytest.mark.parametrize("name", ["image_to_image", "text_to_image", "instruct_pix2pix"])
def test_a_request_alone_decides_what_is_made(name, pipelines):
    options = Options(model=pipelines[name], pixels=16, device="cpu")
    ready = generators.find(name).make(options, NOTHING)
    first = ready.make(REQUEST)
    other = ready.make(REQUEST._replace(seed=6))
    again = ready.make(REQUEST)
    assert first.image.shape == IMAGE.shape and first.image.dtype == np.uint8
    np.testing.assert_array_equal(first.image, again.image)
    assert (first.image != other.image).any()
    prompted = ready.make(REQUEST._replace(prompt="dog rain")).image
    assert (first.image != prompted).any()
    assert ready.about["versions"]["diffusers"] == diffusers.__version__
    source = np.full_like(IMAGE, 200)
    assert (ready.make(REQUEST._replace(image=source)).image != first.image).any() == (
        name != "text_to_image"
    )
    stronger = ready.make(REQUEST._replace(strength=0.9)).image  # text-to-image has no such option
    assert (stronger != first.image).any() == (name != "text_to_image")


def test_a_strength_that_leaves_no_step_is_refused():
    with pytest.raises(ValueError, match=r"--steps must be at least 1 / strength.* 1 and 0\.5"):
        generators.find("image_to_image").check(["x"], [0.5], 1)


def test_clip_flags_what_looks_more_like_a_negative(tmp_path, tokenizer):
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, image_size=16,
                  num_attention_heads=2, patch_size=8)  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text_config(tokenizer), vision_config=vision, projection_dim=8
    )
    model = tmp_path / "clip"
    transformers.CLIPModel(config).save_pretrained(model)
    side = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side)
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(model)

    folder = tmp_path / "pool"
    rows = [{"file_name": f"{n}/0.png", "source": n, "label": 0, "prompt": WORDS[n]}
            for n in range(4)]  # fmt: skip
    pool_files.write_plan(folder, {"shape": [12, 10, 1]}, rows)
    log = folder / "shards" / "0-of-1.jsonl"
    from experiments.generating import as_png

    for n, row in enumerate(rows):
        (folder / str(n)).mkdir()
        pool_files.write_bytes(folder / row["file_name"], as_png(np.roll(IMAGE, n, 0)))
        json_lines.append(log, row)
    options = {"model": str(model), "negatives": ["dog rain"]}
    pool_filters.clip(folder, threshold=0.0, **options)
    records = [json.loads(x) for x in (folder / "metadata.jsonl").read_text().splitlines()]
    scores = np.array([r["clip"] for r in records])
    assert ((0 < scores) & (scores < 1)).all() and not any(r["flags"] for r in records)
    cut = float(np.sort(scores)[2])
    assert pool_filters.clip(folder, threshold=cut, **options)["flagged"] == 2
    with pytest.raises(ValueError, match="--negative must be given"):
        pool_filters.clip(folder, threshold=0.5, model=str(model), negatives=[])
