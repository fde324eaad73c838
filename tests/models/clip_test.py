"""CLIP's and SigLIP's towers against transformers' in PyTorch, their files, and what is refused."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saflex_jax.core.tree import select, under
from saflex_jax.models import (
    CLIP,
    MLP,
    ImageTower,
    TextTower,
    clip_inputs,
    clip_of,
    from_clip,
    load_clip,
    make_clip,
    read_weights,
    to_clip,
    write_weights,
)
from saflex_jax.models.clip_weights import shapes

IMAGE = {"size": 16, "patch": 8, "width": 32, "depth": 2, "heads": 2, "mlp_width": 48}
TEXT = {"vocab_size": 50, "context": 8, "width": 32, "depth": 2, "heads": 4, "mlp_width": 40}
END = TEXT["vocab_size"] - 1


def small(activation="quick_gelu", **options):
    options["activation"] = activation
    return CLIP(ImageTower(**IMAGE, **options), TextTower(**TEXT, **options), 20)


def small_siglip():
    options = {"activation": "gelu_tanh", "family": "siglip"}
    towers = ImageTower(**IMAGE, **options), TextTower(**TEXT, **options)
    return CLIP(*towers, 32, ("text",), sigmoid=True)


NETWORKS = {"quick_gelu": small(), "gelu": small("gelu"), "siglip": small_siglip()}


def random_params(clip):
    """None at zero or one, and a scale of 100, as published weights have it."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        spread = 1 / np.sqrt(x.shape[0]) if x.ndim > 1 else 0.3
        return jnp.float32(rng.normal(size=x.shape) * spread + path[-1].key.endswith("scale"))

    params = jax.tree_util.tree_map_with_path(draw, shapes(clip))
    return {**params, "logit_scale": jnp.log(100.0)}


def some_images(clip, number=3):
    side = clip.image.size
    return np.random.default_rng(1).uniform(size=(number, side, side, 3)).astype(np.float32)


def some_tokens(clip, number=4):
    """Captions of different lengths, filled up with words, so that what follows the end counts."""
    rng, text = np.random.default_rng(2), clip.text
    tokens = rng.integers(1, text.vocab_size - 1, (number, text.context)).astype(np.int32)
    tokens[np.arange(number), rng.integers(1, text.context, number)] = text.vocab_size - 1
    return tokens


def logits(clip, params, images, tokens):
    image, text, scale = jax.jit(clip.apply)({"params": params}, images, tokens)
    return scale * image @ text.T + params.get("logit_bias", jnp.zeros(()))


def as_numpy(state):
    return {name: np.asarray(x) for name, x in state.items()}


# --- parity


def config_of(clip):
    """The network in Hugging Face's words."""
    words = {"width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads",
             "mlp_width": "intermediate_size", "size": "image_size", "patch": "patch_size",
             "vocab_size": "vocab_size", "context": "max_position_embeddings"}  # fmt: skip
    activation = clip.image.activation.replace("gelu_tanh", "gelu_pytorch_tanh")

    def section(tower):
        found = {theirs: getattr(tower, ours) for ours, theirs in words.items()
                 if hasattr(tower, ours)}  # fmt: skip
        return {**found, "hidden_act": activation}

    text = section(clip.text)
    text |= {"bos_token_id": 0, "eos_token_id": clip.text.vocab_size - 1, "pad_token_id": 1}
    sections = {"vision_config": section(clip.image), "text_config": text}
    return sections if clip.sigmoid else {**sections, "projection_dim": clip.embed_dim}


def their_logits(clip, state, images, tokens):
    """(logits f32[B, B'], config) of transformers' model with these tensors."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    kind = "Siglip" if clip.sigmoid else "CLIP"
    config = getattr(transformers, f"{kind}Config")(**config_of(clip))
    with torch.device("meta"):  # no random weights
        network = getattr(transformers, f"{kind}Model")(config).eval()
    tensors = {name: torch.from_numpy(x.copy()) for name, x in state.items()}
    network.load_state_dict(tensors, strict=True, assign=True)
    for tower in (network.vision_model, network.text_model):
        embeddings = tower.embeddings
        embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
    pixels = np.asarray(clip_inputs(jnp.asarray(images), clip.image.family)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        given = torch.from_numpy(tokens).long(), torch.from_numpy(pixels.copy())
        found = network(input_ids=given[0], pixel_values=given[1]).logits_per_image
    return found.numpy(), json.loads(config.to_json_string())


def check_parity(clip):
    params, images, tokens = random_params(clip), some_images(clip), some_tokens(clip)
    ours = logits(clip, params, images, tokens)
    assert np.std(ours) > 1
    state = as_numpy(to_clip(params, clip, "hugging_face"))
    theirs, config = their_logits(clip, state, images, tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert clip_of(config) == clip


def check_files(clip, path):
    params = random_params(clip)
    config = {"model_type": clip.image.family, **config_of(clip)}
    for dialect in ("hugging_face",) if clip.sigmoid else ("hugging_face", "open_clip"):
        write_weights(path, to_clip(params, clip, dialect))
        again = from_clip(read_weights(path), clip, config)
        jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_transformers(name):
    check_parity(NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_files_of_both_dialects_give_the_parameters_back(name, tmp_path):
    check_files(NETWORKS[name], tmp_path / "x.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_b_32_too(activation, tmp_path):
    clip = make_clip("B/32", activation=activation)
    check_files(clip, tmp_path / "x.safetensors")
    check_parity(clip)


@pytest.mark.parametrize("dialect", ["hugging_face", "open_clip"])
def test_names_are_those_of_published_files(dialect):
    written = jax.eval_shape(partial(to_clip, clip=small(), dialect=dialect), shapes(small()))
    known = {"hugging_face": {"vision_model.pre_layrnorm.weight": (32,),
                              "vision_model.encoder.layers.1.self_attn.k_proj.weight": (32, 32),
                              "text_model.embeddings.position_embedding.weight": (8, 32),
                              "text_projection.weight": (20, 32)},
             "open_clip": {"visual.ln_pre.weight": (32,),
                           "visual.transformer.resblocks.1.attn.in_proj_weight": (96, 32),
                           "positional_embedding": (8, 32), "text_projection": (32, 20),
                           "visual.proj": (32, 20), "visual.conv1.weight": (32, 3, 8, 8)},
             }[dialect]  # fmt: skip
    assert {name: written[name].shape for name in known} == known
    assert len(written) == {"hugging_face": 78, "open_clip": 62}[dialect]


def test_queries_keys_and_values_are_joined_in_this_order():
    params = random_params(small())
    block = params["text"]["block_0"]["attention"]
    joined = to_clip(params, small(), "open_clip")["transformer.resblocks.0.attn.in_proj_bias"]
    expected = np.concatenate([block[k]["bias"].ravel() for k in ("query", "key", "value")])
    np.testing.assert_array_equal(joined, expected)


def test_sizes_are_the_published_ones():
    sizes = {"B/32": 151_277_313, "B/16": 149_620_737, "L/14": 427_616_513}
    for name, size in sizes.items():
        clip = make_clip(name)
        assert sum(x.size for x in jax.tree.leaves(shapes(clip))) == size
        assert clip.image.heads * 64 == clip.image.width, clip.text.heads * 64 == clip.text.width


# --- laws


def test_what_follows_the_end_of_a_caption_does_not_matter():
    clip, params = small(), random_params(small())
    encode = jax.jit(partial(clip.apply, method="encode_text"))
    tokens = np.array([[3, 5, END, 7, 7, 7, 7, 7], [3, 5, END, 0, 0, 1, 2, 3]], np.int32)
    short = encode({"params": params}, tokens[:1, :3])
    both = encode({"params": params}, tokens)
    np.testing.assert_allclose(both, np.repeat(short, 2, 0), atol=1e-6)
    other = encode({"params": params}, np.array([[5, 3, END]], np.int32))
    assert np.abs(other - short).max() > 0.01


def products(jaxpr):
    """The dtypes of all matrix products and convolutions in a program."""
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            found.add(eqn.outvars[0].aval.dtype.name)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found |= products(inner) if hasattr(inner, "eqns") else set()
    return found


def test_half_precision_is_that_of_products_and_parameters_stay_f32():
    clip, images, tokens = small(), some_images(small()), some_tokens(small())
    params, half = random_params(clip), small(dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(shapes(half))} == {"float32"}
    for tower, inputs in (("image", images), ("text", tokens)):
        variables = {"params": params[tower]}
        for network, dtype in ((clip, "float32"), (half, "bfloat16")):
            apply = getattr(network, tower).apply
            assert products(jax.make_jaxpr(apply)(variables, inputs).jaxpr) == {dtype}
    exact, rounded = (
        jax.jit(partial(network.apply, method="encode_image"))({"params": params}, images)
        for network in (clip, half)
    )
    assert rounded.dtype == jnp.float32
    assert 1e-4 < np.abs(rounded - exact).max() / np.abs(exact).max() < 0.03


def test_remat_computes_blocks_again_and_changes_no_gradient():
    images, params = some_images(small()), random_params(small())["image"]

    def gradient(tower):
        return jax.grad(lambda params: jnp.sum(jnp.tanh(tower.apply({"params": params}, images))))

    once, again = (gradient(ImageTower(**IMAGE, remat=remat)) for remat in (False, True))
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-5),
        jax.jit(once)(params),
        jax.jit(again)(params),
    )
    assert "remat" in str(jax.make_jaxpr(again)(params))
    assert "remat" not in str(jax.make_jaxpr(once)(params))


def test_towers_may_be_anything_and_the_head_is_the_projections():
    clip = CLIP(MLP((8,)), MLP(()), 6, projected=("image",))
    vectors = np.float32(np.random.default_rng(0).normal(size=(5, 6)))
    (image, text, scale), variables = clip.init_with_output(
        jax.random.key(0), np.ones((2, 3), np.float32), vectors
    )
    np.testing.assert_allclose(
        text, vectors / np.linalg.norm(vectors, axis=1, keepdims=True), rtol=1e-5
    )
    assert image.shape == (2, 6) and float(scale) == pytest.approx(1 / 0.07)
    params = variables["params"]
    assert jax.tree.leaves(select(params, under("head")))[0].shape == (8, 6)
    assert jax.tree.leaves(select(params, under("head")))[0] is params["head"]["image"]["kernel"]
    with pytest.raises(ValueError, match="embed_dim must be 6, the width of 'text', which is not"):
        clip.clone(embed_dim=7).init(jax.random.key(0), np.ones((2, 3)), vectors)
    with pytest.raises(ValueError, match="projected has no field 'words'"):
        clip.clone(projected=("words",)).init(jax.random.key(0), np.ones((2, 3)), vectors)


def test_images_are_normalised_by_the_familys_colours():
    x = some_images(small())
    expected = (x - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    np.testing.assert_allclose(clip_inputs(x), expected, atol=1e-5)
    np.testing.assert_allclose(clip_inputs(x, "siglip"), 2 * x - 1, atol=1e-6)


# --- what is refused


BAD_IMAGES = {
    "must have shape .B, 16, 16, 3.; resize them first; given .2, 8, 8, 3.": np.ones((2, 8, 8, 3)),
    "must have shape .B, 16, 16, 3.": np.ones((2, 16, 16, 1)),
    "must be images of floats": np.ones((2, 16, 16, 3), np.uint8),
    r"must lie in \[0, 1\].*given values from 0 to 255": np.full((1, 16, 16, 3), [0, 9.0, 255]),
    r"must lie in \[0, 1\].*given values from -2 to 1": np.full((1, 16, 16, 3), [-2, 1.0, 1]),
    r"must lie in \[0, 1\].*given values from nan": np.full((1, 16, 16, 3), np.nan),
}
BAD_TOKENS = {
    "must be integers": np.ones((2, 3)),
    r"must be integers .B, T.; given int64\[3\]": np.ones(3, np.int64),
    "must have 1 to 8 columns, the context; given 9": np.full((1, 9), END),
    r"must lie in \[0, 50\), the vocabulary; row 1 has 50": np.array([[1, END], [50, END]]),
    "must lie in .*; row 0 has -1": np.array([[-1, END]]),
    "each row of tokens must hold 49, which ends a caption; row 1": np.array([[2, END], [2, 3]]),
}


@pytest.mark.parametrize("message", BAD_IMAGES)
def test_images_that_the_tower_does_not_take_are_refused(message):
    params = {"params": shapes(small())}
    with pytest.raises(ValueError, match=f"images {message}"):
        small().apply(params, BAD_IMAGES[message], method="encode_image")


@pytest.mark.parametrize("message", BAD_TOKENS)
def test_tokens_that_the_tower_does_not_take_are_refused(message):
    params = {"params": shapes(small())}
    with pytest.raises(ValueError, match=message):
        small().apply(params, BAD_TOKENS[message], method="encode_text")


def written(dialect, clip=None, **change):
    state = as_numpy(to_clip(random_params(clip or small()), clip or small(), dialect))
    return {name: x for name, x in {**state, **change}.items() if x is not None}


LN = "transformer.resblocks.0.ln_1.bias"
FUSED = "visual.transformer.resblocks.1.attn.in_proj_weight"
PROJECTION = "vision_model.encoder.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: written("open_clip", **{LN: None}), rf"'{LN}' f\[32\]; it is missing"),
        (lambda: written("open_clip", **{FUSED: None}), rf"'{FUSED}' f\[96, 32\]; it is missing"),
        (lambda: written("hugging_face", **{PROJECTION: np.ones((32, 31))}),
         rf"'{PROJECTION}'\] must have shape \[32, 32\]; given \[32, 31\]"),
        (lambda: written("hugging_face", extra=np.ones(1)), "given 'extra' as well"),
        (lambda: written("open_clip", small().clone(text=TextTower(**{**TEXT, "depth": 3}))),
         "this CLIP in the dialect open_clip; given 'transformer.resblocks.2.attn.in_proj_bias'"),
        (lambda: written("hugging_face", small_siglip()), "given 'logit_bias' as well"),
        (lambda: {"blocks.0.attn.qkv.weight": np.ones(1)},
         "must have names in Hugging Face's dialect .*given .'blocks.0.attn.qkv.weight'"),
    ],
)  # fmt: skip
def test_files_of_another_network_are_refused_and_the_tensor_is_named(state, message):
    with pytest.raises(ValueError, match=message):
        from_clip(state(), small())


def test_siglip_has_one_dialect_and_weights_fill_these_towers_alone():
    siglip = small_siglip()
    with pytest.raises(ValueError, match="dialect must be 'hugging_face' for siglip"):
        to_clip(random_params(siglip), siglip, "open_clip")
    with pytest.raises(ValueError, match=r"dialect must be one of .*given 'timm'"):
        to_clip({}, small(), "timm")
    with pytest.raises(ValueError, match=r"clip\.text must be of TextTower; given MLP"):
        from_clip(written("open_clip"), small().clone(text=MLP(())))


def test_old_files_hold_the_numbers_of_positions_and_half_precision():
    state = written("hugging_face")
    state = {name: x.astype(np.float16) for name, x in state.items()}
    state["text_model.embeddings.position_ids"] = np.arange(8)[None]
    params = from_clip(state, small())
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    expected = random_params(small())
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), params, expected)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (small("gelu"), "clip.image.activation must be 'quick_gelu', as config says; given 'gelu'"),
        (small().clone(text=TextTower(**{**TEXT, "heads": 2})), "clip.text.heads must be 4"),
        (small().clone(embed_dim=21), "clip.embed_dim must be 20, as config says; given 21"),
        (small().clone(image=MLP((8,))), "clip.image must be of ImageTower; given MLP"),
        (small().clone(sigmoid=True), "clip must be all clip"),
    ],
)
def test_a_network_that_the_configuration_contradicts_is_refused(clip, message):
    config = {"model_type": "clip", **config_of(small())}
    assert clip_of(config) == small()
    with pytest.raises(ValueError, match=message):
        from_clip({}, clip, config)


OPEN = {"embed_dim": 20, "vision_cfg": {}, "text_cfg": {}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, r"config\['model_type'\] must be one of .*given 'bert'"),
        ({"model_type": "clip", "vision_config": {"hidden_act": "relu"}},
         r"vision_config\['hidden_act'\] must be one of .*given 'relu'"),
        ({"model_type": "clip", "text_config": {"layer_norm_eps": 1e-6}},
         r"text_config\['layer_norm_eps'\] must be 1e-05; given 1e-06"),
        ({"model_cfg": {**OPEN, "vision_cfg": {"timm_model_name": "x"}}},
         "model_cfg.vision_cfg has no field 'timm_model_name'"),
        ({"model_cfg": {**OPEN, "custom_text": True}}, "model_cfg has no field 'custom_text'"),
        ({"model_cfg": OPEN, "preprocess_cfg": {"mean": [0.5] * 3}}, r"preprocess_cfg\['mean'\]"),
    ],
)  # fmt: skip
def test_configurations_of_other_networks_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        clip_of(config)


def test_a_folder_of_a_hub_is_the_network(tmp_path):
    clip = small("gelu")
    params = random_params(clip)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "patch_size": 8,
                       "head_width": 16, "mlp_ratio": 1.5},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2,
                     "mlp_ratio": 1.25}}}))  # fmt: skip
    with pytest.raises(ValueError, match=r"folder must hold open_clip_config.json and"):
        load_clip(tmp_path)
    write_weights(tmp_path / "open_clip_model.safetensors", to_clip(params, clip, "open_clip"))
    found, again = load_clip(tmp_path, remat=True)
    options = {"remat": True}
    assert found == clip.clone(image=clip.image.clone(**options), text=clip.text.clone(**options))
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.safetensors"
    state = {"a": np.arange(6.0).reshape(2, 3).T, "b": jnp.ones((), jnp.bfloat16), "c": np.ones(0)}
    write_weights(path, state)
    for name, x in read_weights(path).items():
        np.testing.assert_array_equal(x, state[name])
        assert x.dtype == state[name].dtype
    with pytest.raises(ValueError, match=r"'a' must be of one of .*given complex64"):
        write_weights(path, {"a": np.ones(1, np.complex64)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    safetensors = pytest.importorskip("safetensors.numpy")  # the format's own reader
    del state["b"]  # which it does not read
    write_weights(path, state)
    for name, x in safetensors.load_file(path).items():
        np.testing.assert_array_equal(x, state[name])
