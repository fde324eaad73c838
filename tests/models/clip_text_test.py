"""Tokens of captions against transformers, and the locked sentence encoder against its network."""

import json
import pathlib

import numpy as np
import pytest

from saflex_jax.models import TextTower, Tokenizer, load_sentence_encoder, word_vocabulary
from saflex_jax.models.tensor_files import read_weights, write_weights

tokenizers = pytest.importorskip("tokenizers")
DATA = pathlib.Path(__file__).parents[2] / "data"
VOCABULARY = DATA / "weights" / "bpe_simple_vocab_16e6.txt.gz"
CAPTIONS = DATA / "emoji" / "extra_caption.npy"
needs_vocabulary = pytest.mark.skipif(
    not (VOCABULARY.exists() and CAPTIONS.exists()),
    reason="python -m experiments.prepare clip_vocabulary emoji",
)
TEMPLATES = ("{}", "A photo of: {}!  It's 2016", "they've drawn «{}»\tand\nnaïve 日本語 ünïts 👍🏽")


@pytest.fixture(scope="module")
def clips():
    return Tokenizer(VOCABULARY, TextTower())


@needs_vocabulary
def test_known_tokens(clips):
    found = clips(["a photo of a cat", "A photo of a DOG."])
    assert found.shape == (2, 77) and found.dtype == np.int32
    assert found[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert found[1, :8].tolist() == [49406, 320, 1125, 539, 320, 1929, 269, 49407]
    assert (found[0, 7:] == 49407).all()


@needs_vocabulary
def test_tokens_of_real_captions_are_transformers(clips, tmp_path):
    transformers = pytest.importorskip("transformers")
    names = sorted(set(np.load(CAPTIONS).tolist()))
    captions = [template.format(name) for name in names for template in TEMPLATES]
    assert len(captions) > 5000
    model = json.loads(clips._tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    theirs = transformers.CLIPTokenizer(vocab=model["vocab"], merges=merges)
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    expected = np.array(theirs(captions, **options)["input_ids"])
    np.testing.assert_array_equal(clips(captions, truncate=True), expected)
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))  # as a hub has it
    read = Tokenizer(tmp_path / "tokenizer.json", TextTower())
    np.testing.assert_array_equal(read(captions[:50]), expected[:50])


WORDS = word_vocabulary(["red car", "blue car", "a very long and winding road"])
SIZE = WORDS.get_vocab_size()


def test_words_are_tokens_and_unknown_ones_are_zero(tmp_path):
    tower = TextTower(vocab_size=SIZE, context=5)
    found = Tokenizer(WORDS, tower)(np.array(["Red car", "green  car"]))
    car, red = (WORDS.token_to_id(word) for word in ("car", "red"))
    expected = [[SIZE - 2, red, car, SIZE - 1, SIZE - 1], [SIZE - 2, 0, car, SIZE - 1, SIZE - 1]]
    assert found.tolist() == expected
    WORDS.save(str(tmp_path / "words.json"))
    assert Tokenizer(tmp_path / "words.json", tower)(["red car"]).tolist() == expected[:1]


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (["red", " "], "caption 1 must hold a word; given ' '"),
        (["red", ""], "caption 1 must hold a word; given ''"),
        (
            ["a very long and winding road"],
            "caption 0 must have at most 5 tokens; given 8: 'a very",
        ),
        ("red car", "captions must be a list of texts; given 'red car'"),
        ([b"red"], "captions must be a list of texts"),
        ([], "captions must be a list of texts; given .."),
    ],
)
def test_captions_that_are_no_captions_are_refused(captions, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(WORDS, TextTower(vocab_size=SIZE, context=5))(captions)


def test_truncation_is_asked_for_and_keeps_the_end():
    own = tokenizers.Tokenizer.from_str(WORDS.to_str())
    own.enable_truncation(4)  # as the file of a checkpoint may have it: in silence
    own.enable_padding(length=9)
    tokenizer = Tokenizer(own, TextTower(vocab_size=SIZE, context=5))
    with pytest.raises(ValueError, match="given 8"):
        tokenizer(["a very long and winding road"])
    (row,) = tokenizer(["a very long and winding road"], truncate=True)
    assert row.tolist() == [SIZE - 2, *map(WORDS.token_to_id, ("a", "very", "long")), SIZE - 1]
    assert own.truncation is not None  # the user's stays as it was


def test_siglip_is_padded_as_its_tokenizer_says():
    tower = TextTower(vocab_size=SIZE, context=4, family="siglip")
    own = tokenizers.Tokenizer.from_str(WORDS.to_str())
    start, red, end = own.encode("red").ids
    assert Tokenizer(own, tower)(["red"]).tolist() == [[start, red, end, end]]
    own.enable_padding(length=64, pad_id=0, pad_token="[unknown]")  # as SigLIP 2's file does
    assert Tokenizer(own, tower)(["red"]).tolist() == [[start, red, end, 0]]
    clip = Tokenizer(own, tower.clone(family="clip"))
    assert clip(["red"]).tolist() == [[start, red, end, end]]


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"the text tower's 49408 tokens; given {SIZE}"):
        Tokenizer(WORDS, TextTower())
    own = tokenizers.Tokenizer.from_str(WORDS.to_str())
    own.add_tokens(["later"])
    with pytest.raises(ValueError, match=f"with its last token, {SIZE}; given {SIZE - 1}"):
        Tokenizer(own, TextTower(vocab_size=SIZE + 1))
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "x.txt.gz").write_bytes(b"")
    for name in ("x.json", "x.txt.gz", "missing.json"):
        with pytest.raises(ValueError, match=f"{name} must be a tokenizer.json or bpe_simple"):
            Tokenizer(tmp_path / name, TextTower())


# --- the locked sentence encoder

CONFIG = {"model_type": "bert", "hidden_act": "gelu", "hidden_size": 24, "intermediate_size": 32,
          "num_attention_heads": 3, "num_hidden_layers": 2, "max_position_embeddings": 64,
          "type_vocab_size": 2, "layer_norm_eps": 1e-12, "vocab_size": SIZE}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    WORDS.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_vectors_are_normalised_means_of_transformers_tokens(folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    network = transformers.BertModel(transformers.BertConfig(**CONFIG)).eval()
    with torch.no_grad():
        for x in network.parameters():
            x.add_(0.2 * torch.randn_like(x))
    state = {name: x.numpy() for name, x in network.state_dict().items()}
    write_weights(folder / "model.safetensors", state)
    captions = ["red car", "a very long and winding road", "car"] * 30  # more than one batch
    found = load_sentence_encoder(folder)(captions)
    for n in range(3):
        with torch.no_grad():
            x = network(torch.tensor([WORDS.encode(captions[n]).ids])).last_hidden_state[0].mean(0)
        expected = (x / x.norm()).numpy()
        np.testing.assert_allclose(found[n::3], np.tile(expected, (30, 1)), atol=1e-5)


def test_another_network_or_vocabulary_is_refused(folder):
    with pytest.raises(ValueError, match=r"folder must hold config.json and model.safetensors"):
        load_sentence_encoder(folder)
    write_weights(folder / "model.safetensors", {"conv.weight": np.ones(3)})
    with pytest.raises(ValueError, match=r"'embeddings.LayerNorm.bias'|'conv.weight'"):
        load_sentence_encoder(folder)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "hidden_act": "relu"}))
    with pytest.raises(ValueError, match=r"'bert' with 'gelu'; given .*'relu'"):
        load_sentence_encoder(folder)


MINILM = DATA / "weights" / "minilm"


@pytest.mark.slow
@pytest.mark.skipif(not MINILM.exists(), reason="python -m experiments.prepare minilm")
def test_the_real_encoder_finds_what_means_the_same():
    assert len(read_weights(MINILM / "model.safetensors")) > 100
    vectors = load_sentence_encoder(MINILM)(["a dog", "a puppy", "the stock market", "shares fell"])
    assert (vectors @ vectors.T > 0.3).tolist() == np.kron(np.eye(2), np.ones((2, 2))).tolist()
