"""A base of 30,000 values for tests that train, and the student that ships for those that do not."""

import json
from pathlib import Path

import numpy as np
import pytest

import still

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INNER = 32, 2, 4, 2, 8, 48


def byte_characters():
    """The characters that a byte-level vocabulary writes bytes as (GPT-2's)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


def write_safetensors(path, tensors):
    header, start = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [start, start + values.nbytes]}
        start += values.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(x.tobytes() for x in tensors.values()))


def write_base(path: Path):
    """A random llama whose tokens are bytes."""
    path.mkdir()
    vocab = {text: byte for byte, text in byte_characters().items()} | {"<end>": 256}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(vocab),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": 256,
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": 256, "content": "<end>", "special": True, **special}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    random = np.random.default_rng(0)
    normal = lambda *shape: (0.2 * random.standard_normal(shape)).astype(np.float32)
    tensors = {"model.embed_tokens.weight": normal(len(vocab), HIDDEN), "model.norm.weight": np.ones(HIDDEN, np.float32)}
    for layer in range(LAYERS):
        of = lambda name: f"model.layers.{layer}.{name}.weight"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[of(name)] = np.ones(HIDDEN, np.float32)
        for name, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS)):
            tensors[of(f"self_attn.{name}")] = normal(heads * HEAD_DIM, HIDDEN)
        tensors[of("self_attn.o_proj")] = normal(HIDDEN, HEADS * HEAD_DIM)
        for name in ("gate_proj", "up_proj"):
            tensors[of(f"mlp.{name}")] = normal(INNER, HIDDEN)
        tensors[of("mlp.down_proj")] = normal(HIDDEN, INNER)
    write_safetensors(path / "model.safetensors", tensors)


@pytest.fixture(scope="session")
def base_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "base"
    write_base(path)
    return path


@pytest.fixture(scope="session")
def base(base_path):
    return still.Model.load(base_path)


@pytest.fixture(scope="session")
def text_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    random = np.random.default_rng(1)
    words = ["chunk", "window", "state", "linear", "salient", "budget", "head", "layer"]
    path.write_text("\n\n".join(" ".join(random.choice(words, 120)) for _ in range(60)))
    return path


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """Documents of different lengths, so that windows hold several."""
    path = tmp_path_factory.mktemp("data") / "documents.jsonl"
    random = np.random.default_rng(2)
    words = ["chunk", "window", "state", "linear", "salient", "budget", "head", "layer"]
    lengths = random.integers(8, 30, 200)
    path.write_text("".join(json.dumps({"text": " ".join(random.choice(words, n))}) + "\n" for n in lengths))
    return path


@pytest.fixture(scope="session")
def demo():
    """The student that ships, on the base that the other tests fetch."""
    return still.Model.load("demo")
