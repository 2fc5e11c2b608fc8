"""Makes families/: a small random model of each family, and its logits by Hugging Face's implementation.

    pip install torch transformers safetensors
    python families.py [NAME...]

The weights are float32 (norms and biases too are random); the logits are computed in float64 by `transformers`, which
knows nothing of this project. Each model has what its family is odd in: `families.rs` reads them.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

TOKENS = 40

COMMON = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)

FAMILIES = {
    # One KV head; frequencies kept, ramped and divided all occur.
    "llama": dict(
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    # Heads that do not fill the hidden size, three KV groups, a window as long as the context, linear scaling.
    "mistral": dict(
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        rms_norm_eps=1e-5,
        sliding_window=128,
        rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0),
    ),
    # Biases on q, k and v; a window that is switched off.
    "qwen2": dict(
        use_sliding_window=False,
        sliding_window=8,
        max_window_layers=1,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
    ),
    # Norms on the heads of q and k, which together are twice as wide as the hidden size.
    "qwen3": dict(
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
    ),
    # Biases on every projection.
    "llama_biased": dict(
        hidden_size=16,
        intermediate_size=24,
        attention_bias=True,
        mlp_bias=True,
        rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    ),
    # Biases on q, k, v and o, before the heads' norms.
    "qwen3_biased": dict(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
    ),
    # As Llama 2 is: a SentencePiece vocabulary, whose reduced form is in tokenizers/.
    "llama_sentencepiece": dict(
        vocab_size=724,
        bos_token_id=1,
        eos_token_id=2,
        hidden_size=16,
        intermediate_size=24,
        rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    ),
    # Fused projections, a part of each head rotated, and the factors of long contexts: the text is longer than the original.
    "phi3": dict(
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        sliding_window=None,
        tie_word_embeddings=True,
        original_max_position_embeddings=16,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=10000.0,
            partial_rotary_factor=0.5,
            short_factor=[1.0, 1.5],
            long_factor=[1.25, 4.0],
            original_max_position_embeddings=16,
        ),
    ),
    "phi3_plain": dict(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=None,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.75),
    ),
    # Layers with a window among full ones, two rotations, four norms a layer, GELU, scaled embeddings; the text is five windows long.
    "gemma3_text": dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        tie_word_embeddings=True,
        sliding_window=8,
        layer_types=[
            "sliding_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "sliding_attention",
            "full_attention",
        ],
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=1000000.0, factor=8.0),
            sliding_attention=dict(rope_type="default", rope_theta=5000.0),
        ),
    ),
    # As the largest Gemma 3 is: queries scaled by the root of something else than the head's channels.
    "gemma3_text_scaled": dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=20,
        tie_word_embeddings=True,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(
            full_attention=dict(rope_type="default", rope_theta=1000000.0),
            sliding_attention=dict(rope_type="default", rope_theta=10000.0),
        ),
    ),
    # GELU, scaled embeddings, norms stored less one, heads twice as wide together as the hidden size.
    "gemma": dict(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    ),
}

# What is read, where it is not random ids: a vocabulary and a text of tokenizers/, whose ids the model's own tokenizer gave.
TEXTS = {"llama_sentencepiece": ("llama-2", "你好，世界。 こんにちは カタカナ")}


def fill(model, generator):
    """Norm weights near one, biases small, matrices of unit gain: nothing that could be left out unnoticed."""
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if name.endswith("norm.weight"):
            # Gemma's files have what is added to one.
            values = (0 if "Gemma" in type(model).__name__ else 1) + 0.3 * values
        elif parameter.dim() == 1:
            values = 0.3 * values
        else:
            values = values * parameter.shape[1] ** -0.5
        parameter.data.copy_(values)


def token_ids(name, generator):
    if name not in TEXTS:
        return torch.randint(COMMON["vocab_size"], (TOKENS,), generator=generator)
    vocabulary, text = TEXTS[name]
    fixture = json.loads((Path(__file__).parent / f"tokenizers/{vocabulary}.json").read_text())
    return torch.tensor(next(case["special"] for case in fixture["cases"] if case["text"] == text))


def make(out, model_type, options, seed):
    generator = torch.Generator().manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**{**COMMON, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    fill(model, generator)
    ids = token_ids(out.name, generator)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
    with torch.no_grad():
        logits = model.double()(ids[None]).logits[0]
    assert logits.dtype == torch.float64 and logits.shape == (len(ids), config.vocab_size)

    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors")
    save_file({"ids": ids, "logits": logits.float()}, out / "expected.safetensors")
    described = {**config.to_diff_dict(), **COMMON, **options, "architectures": [type(model).__name__]}
    (out / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    root = Path(__file__).parent / "families"
    for seed, (name, options) in enumerate(FAMILIES.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        shutil.rmtree(root / name, ignore_errors=True)
        # "gemma3_text_scaled" is a "gemma3_text".
        model_type = next(known for cut in range(3) if (known := name.rsplit("_", cut)[0]) in CONFIG_MAPPING)
        make(root / name, model_type, options, seed)
        print(name, *sorted(path.name for path in (root / name).iterdir()))
