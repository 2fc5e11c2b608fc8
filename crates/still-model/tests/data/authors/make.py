#!/usr/bin/env python3
"""Makes the files beside it: a small model as STILL's released code saves one, and its logits in float64.

    pip install numpy ml_dtypes safetensors
    python make.py

`stage1/` is what stage 1 leaves, `stage2/` the PEFT adapter of stage 2; both are random, with their names, shapes and dtypes
(bfloat16, and float32 as PEFT keeps updates). `expected.safetensors` has the logits of both. The model is a plain Llama in numpy; its attention is
docs/method.md as a slow loop, token by token. Nothing is shared with the Rust code.

Selection is discrete: the script insists on a gap between the last token that is kept and the first that is not, so that float32
selects the same tokens.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
LAYERS, HEADS, KV_HEADS, D, F, E, HIDDEN, VOCAB = 2, 4, 2, 16, 16, 64, 48, 97
CHUNK, BUDGET = 64, 4  # constants of the released code
THETA, NORM_EPS = 10_000.0, 1e-5
RANK, ALPHA = 4, 8.0  # PEFT's default α, at another rank: the scale is 2
TOKENS = 4 * CHUNK + 21
EPS = 1e-8  # of the Self-Saliency Score
GAP = 1e-3  # scores that float32 does not confuse
KEPT = [0, 1, 2, 62, 63, 64, 65, 100, 127, 128, 129, 150, 191, 192, 193, 220, 255, 256, 257] + list(range(264, TOKENS))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_map(x, linear, u):
    """x [N, D] of one head; linear [F, D]; u [D] -> [N, 2F]."""
    n = u / np.linalg.norm(u)
    f = (x - 2.0 * (x @ n)[:, None] * n) @ linear.T
    f = f / np.maximum(np.linalg.norm(f, axis=-1, keepdims=True), 1e-12) * np.linalg.norm(x, axis=-1, keepdims=True)
    return np.concatenate([softmax(f), softmax(-f)], -1)


def self_saliency(q, k):
    """q, k [N, D] of one head -> [N], by the definition."""
    score = np.zeros(len(q))
    for t in range(len(q)):
        s = k[max(0, t - CHUNK + 1) : t + 1] @ q[t] / np.sqrt(D)
        a, b = softmax(s), np.zeros(len(s))
        if len(s) > 1:
            b[:-1] = softmax(s[:-1])
        score[t] = np.sum(a * np.log((a + EPS) / (b + EPS)))
    return score


def hybrid_attention(q, k, v, phi_q, phi_k, gate):
    """One head, [N, …] each -> [N, D]."""
    score = self_saliency(q, k)
    salient, S, z = [], np.zeros((2 * F, D)), np.zeros(2 * F)
    out = np.zeros_like(q)
    for t in range(len(q)):
        chunk = t // CHUNK
        if t % CHUNK == 0 and chunk >= 2:
            retired = range((chunk - 2) * CHUNK, (chunk - 1) * CHUNK)
            order = sorted(retired, key=lambda j: (-score[j], j))
            assert score[order[BUDGET - 1]] - score[order[BUDGET]] > GAP, "a tie: choose another seed"
            salient += order[:BUDGET]
            for j in order[BUDGET:]:
                S += np.outer(phi_k[j], v[j])
                z += phi_k[j]
        keys = salient + list(range(max(0, (chunk - 1) * CHUNK), t + 1))
        logits = k[keys] @ q[t] / np.sqrt(D)
        e = np.exp(logits - logits.max())
        out[t] = (e @ v[keys] + gate[t] * (phi_q[t] @ S)) / (e.sum() + phi_q[t] @ z)
    return out


def rms_norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + NORM_EPS) * weight


def rotate(x):
    """RoPE of [heads, N, D], halves against each other as in Hugging Face's Llama."""
    angles = np.arange(x.shape[1])[:, None] * THETA ** (-np.arange(0, D, 2) / D)
    cos, sin = np.cos(np.tile(angles, 2)), np.sin(np.tile(angles, 2))
    return x * cos + np.concatenate([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin


def logits(ids, w, lora=None):
    """Of a sequence, [N, vocab]; `w` by Hugging Face's names, `lora` by the names of an adapter."""
    x = w["model.embed_tokens.weight"][ids]
    for n in range(LAYERS):
        name = f"model.layers.{n}."

        def project(x, projection):
            weight = w[f"{name}self_attn.{projection}.weight"]
            if lora is not None:
                stem = f"base_model.model.{name}self_attn.{projection}"
                weight = weight + ALPHA / RANK * lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"]
            return x @ weight.T

        def heads(x):
            return x.reshape(len(ids), -1, D).transpose(1, 0, 2)

        normed = rms_norm(x, w[name + "input_layernorm.weight"])
        q, k = rotate(heads(project(normed, "q_proj"))), rotate(heads(project(normed, "k_proj")))
        v = heads(project(normed, "v_proj"))
        gate = heads(1.0 / (1.0 + np.exp(-project(normed, "g_proj"))))
        k, v = (np.repeat(rows, HEADS // KV_HEADS, 0) for rows in (k, v))
        out = []
        for h in range(HEADS):

            def phi(rows, of):
                map_ = f"{name}self_attn.feature_map_{of}."
                return np_map(rows[h], w[f"{map_}mlp.linears.{h}.weight"], w[map_ + "hh.u"][h])

            out.append(hybrid_attention(q[h], k[h], v[h], phi(q, "q"), phi(k, "k"), gate[h]))
        attention = np.stack(out, 1).reshape(len(ids), HEADS * D)
        x = x + project(attention, "o_proj")
        normed = rms_norm(x, w[name + "post_attention_layernorm.weight"])
        g = normed @ w[name + "mlp.gate_proj.weight"].T
        x = x + (g / (1.0 + np.exp(-g)) * (normed @ w[name + "mlp.up_proj.weight"].T)) @ w[name + "mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def weights(rng):
    def normal(*shape, size=None, mean=0.0):
        size = shape[-1] ** -0.5 if size is None else size
        return (mean + size * rng.normal(size=shape)).astype(ml_dtypes.bfloat16)

    w = {"model.embed_tokens.weight": normal(VOCAB, E, size=1.0), "lm_head.weight": normal(VOCAB, E)}
    w["model.norm.weight"] = normal(E, size=0.2, mean=1.0)
    for n in range(LAYERS):
        name = f"model.layers.{n}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            w[f"{name}{norm}.weight"] = normal(E, size=0.2, mean=1.0)
        for projection, rows in (("q_proj", HEADS), ("k_proj", KV_HEADS), ("v_proj", KV_HEADS), ("g_proj", HEADS)):
            w[f"{name}self_attn.{projection}.weight"] = normal(rows * D, E, size=1.5 * E**-0.5)
        w[f"{name}self_attn.o_proj.weight"] = normal(E, HEADS * D)
        for mlp, shape in (("gate_proj", (HIDDEN, E)), ("up_proj", (HIDDEN, E)), ("down_proj", (E, HIDDEN))):
            w[f"{name}mlp.{mlp}.weight"] = normal(*shape)
        for of in "qk":
            for h in range(HEADS):
                w[f"{name}self_attn.feature_map_{of}.mlp.linears.{h}.weight"] = normal(F, D)
            w[f"{name}self_attn.feature_map_{of}.hh.u"] = normal(HEADS, D, size=1.0)
        # A buffer that their code saves and does not use where it has a cache.
        w[f"{name}self_attn.window_factors"] = np.full((1, HEADS, 1, 1), -2.197, dtype=ml_dtypes.bfloat16)
    return w


def adapter(rng):
    w = {}
    for n in range(LAYERS):
        for projection, out, inner in (
            ("q_proj", HEADS * D, E), ("k_proj", KV_HEADS * D, E), ("v_proj", KV_HEADS * D, E),
            ("o_proj", E, HEADS * D), ("g_proj", HEADS * D, E),
        ):  # fmt: skip
            stem = f"base_model.model.model.layers.{n}.self_attn.{projection}"
            w[f"{stem}.lora_A.weight"] = (inner**-0.5 * rng.normal(size=(RANK, inner))).astype(np.float32)
            w[f"{stem}.lora_B.weight"] = (0.1 * rng.normal(size=(out, RANK))).astype(np.float32)
    return w


CONFIG = {
    "_name_or_path": "./checkpoints/still_llama31_8B_base",
    "architectures": ["StillModelForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn": None,
    "attn_mode": "fused_chunk",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "expand_k": 1,
    "expand_v": 1,
    "feature_map": "still_hedgehog",
    "fuse_cross_entropy": True,
    "head_dim": D,
    "hidden_act": "silu",
    "hidden_ratio": 4,
    "hidden_size": E,
    "initializer_range": 0.02,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 1024,
    "mlp_bias": False,
    "model_type": "still",
    "norm_eps": 1e-6,
    "norm_feature_map": False,
    "norm_k": True,
    "norm_q": True,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "pretraining_tp": 1,
    "rms_norm_eps": NORM_EPS,
    "rope_scaling": None,
    "rope_theta": THETA,
    "tie_feature_map_qk": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
    "use_cache": True,
    "vocab_size": VOCAB,
}

# As PEFT 0.21 writes it.
ADAPTER_CONFIG = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "../stage1",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": RANK,
    "rank_pattern": {},
    "revision": None,
    "target_modules": [f"self_attn.{name}_proj" for name in "vqgok"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


def main():
    rng = np.random.default_rng(7)
    ids = rng.integers(0, VOCAB, TOKENS)
    w, lora = weights(rng), adapter(rng)
    for directory, config, tensors, files in (
        ("stage1", CONFIG, w, ("config.json", "model.safetensors")),
        ("stage2", ADAPTER_CONFIG, lora, ("adapter_config.json", "adapter_model.safetensors")),
    ):
        path = HERE / directory
        path.mkdir(exist_ok=True)
        (path / files[0]).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, path / files[1], metadata={"format": "pt"})
    wide = {name: tensor.astype(np.float64) for name, tensor in w.items()}
    wide_lora = {name: tensor.astype(np.float64) for name, tensor in lora.items()}
    expected = {"ids": ids.astype(np.int64), "positions": np.array(KEPT, dtype=np.int64)}
    for name, adapter_ in (("stage1", None), ("stage2", wide_lora)):
        of_all = logits(ids, wide, adapter_)
        print(name, "logits", of_all.shape, "rms", np.sqrt((of_all**2).mean()))
        expected[name] = np.ascontiguousarray(of_all[KEPT].astype(np.float32))
    save_file(expected, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
