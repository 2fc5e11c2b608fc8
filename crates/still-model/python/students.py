"""Small students for tests: bases of `../tests/data/families`, attention of every kind, random learned tensors.

    python students.py [NAME...]

makes `../tests/data/students/NAME.safetensors` anew: ids, the logits that `modeling_still.py` has for them in float64, and
what it generates. Rust tests compare. Needs torch, transformers 5 and safetensors.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from still_transformers import hybrid_attention
from still_transformers.configuration_still import StillConfig
from still_transformers.modeling_still import CACHE_FIELD, StillForCausalLM

DATA = HERE.parent / "tests/data"

USUAL = {
    "chunk": 8,
    "router": "self_saliency",
    "selection_head": "kv_head",
    "cap": None,
    "feature_map": {"np_map": {"householder": False}},
    "linear_norm": "mean",
    "gate": False,
}

PLAIN = {"feature_map": "softmax", "linear_norm": "sum", "router": "none"}

# Name: (base, tokens, budgets of each selection head of the layers that have them, what is not usual).
STUDENTS = {
    **{
        f"family_{name}": (name, 120, [2], {})
        for name in (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "llama_biased",
            "qwen3_biased",
            "phi3",
            "phi3_plain",
            "gemma3_text",
            "gemma3_text_scaled",
            "gemma",
        )
    },
    "uniform": ("qwen3", 600, [2], {"chunk": 16}),
    "ragged": ("qwen3", 600, [0, 16, 2], {"chunk": 16}),
    "capped": ("qwen3", 600, [3, 16], {"chunk": 16, "cap": 21}),
    "query_head": ("qwen3", 600, [2, 4, 0], {"chunk": 16, "selection_head": "query_head"}),
    "sum": ("qwen3", 600, [2], {"chunk": 16, "linear_norm": "sum"}),
    "gate": ("qwen3", 600, [2], {"chunk": 16, "gate": True, "feature_map": {"np_map": {"householder": True}}}),
    "received_attention": ("qwen3", 200, [3], {"chunk": 16, "router": "received_attention"}),
    "random": ("qwen3", 600, [3], {"chunk": 16, "router": {"random": {"seed": 11400714819323198485}}}),
    "first_tokens": ("qwen3", 600, [4], {"chunk": 16, "router": "first_tokens", "cap": 4, "linear": False}),
    "window_only": ("qwen3", 600, [0], {"chunk": 16, "router": "none", "linear": False}),
    "salient_off": ("qwen3", 600, [2], {"chunk": 16, "salient": False}),
    "window_off": ("qwen3", 600, [2], {"chunk": 16, "window": False}),
    "lolcats": ("qwen3", 600, [0], {"chunk": 16, "window_factor": True, **PLAIN}),
    "lola": ("qwen3", 600, [16], {"chunk": 16, "window_factor": True, **PLAIN, "router": "self_recall", "cap": 24}),
    "linear_only": ("qwen3", 600, [0], {"chunk": 16, "mode": "linear_only", **PLAIN}),
    "wide_features": ("qwen3", 600, [2], {"chunk": 16, "feature_dim": 24}),
}

# Where the usual seed has tokens whose scores are as good as equal, so that float32 may choose otherwise.
SEEDS = {"received_attention": 1}


def plain(config):
    """A configuration in the words of transformers 4, as exports have it."""
    config = dict(config)
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    return config


def configuration(name):
    family, tokens, budgets, options = STUDENTS[name]
    base = plain(json.loads((DATA / f"families/{family}/config.json").read_text()))
    head_dim = base.get("head_dim") or base["hidden_size"] // base["num_attention_heads"]
    still = {**USUAL, "feature_dim": head_dim, **options}
    still["branches"] = {branch: still.pop(branch, True) for branch in ("window", "salient", "linear")}
    if (scalar := base.get("query_pre_attn_scalar", head_dim)) != head_dim:
        still["logit_scale"] = scalar**-0.5
    heads = base["num_attention_heads" if still["selection_head"] == "query_head" else "num_key_value_heads"]
    layers = base.get("layer_types") or ["full_attention"] * base["num_hidden_layers"]
    all_budgets = iter(budgets * 100)
    still["budgets"] = [[next(all_budgets) for _ in range(heads)] if kind == "full_attention" else [] for kind in layers]
    return StillConfig(base_config=base, still=still), DATA / f"families/{family}/model.safetensors", tokens


def learned(model, generator):
    """Random values of what a student learns, by name."""
    tensors = {}
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if ".feature_map_" in name:
            tensors[name] = values if name.endswith("hh.u") else values * parameter.shape[1] ** -0.5
        elif ".g_proj." in name:
            tensors[name] = values * parameter.shape[1] ** -0.5
        elif name.endswith("log_lambda"):
            tensors[name] = 2 + 0.5 * values
        elif name.endswith("window_factor"):
            tensors[name] = -1 + values
    return tensors


def student(name, seed=None, dtype=torch.float32):
    """A student, and the ids that it is to read."""
    config, weights, tokens = configuration(name)
    generator = torch.Generator().manual_seed(SEEDS.get(name, 0) if seed is None else seed)
    model = StillForCausalLM(config).eval()
    tensors = {**load_file(weights), **learned(model, generator)}
    absent = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert set(absent.missing_keys) <= tied and not absent.unexpected_keys, absent
    model.tie_weights()
    ids = torch.randint(config.vocab_size, (tokens,), generator=generator)
    return model.to(dtype), ids


@contextmanager
def gaps():
    """The list of differences between the last token that is kept and the first that is not, as they come."""
    seen, among_best = [], hybrid_attention.among_best

    def watched(score, count):
        if 0 < count < score.shape[-1]:
            best = score.sort(dim=-1, descending=True).values
            seen.append((best[..., count - 1] - best[..., count]).nan_to_num(nan=torch.inf).min().item())
        return among_best(score, count)

    hybrid_attention.among_best = watched
    try:
        yield seen
    finally:
        hybrid_attention.among_best = among_best


@torch.no_grad()
def generated(model, ids, tokens):
    """Greedy tokens, until two are as good as equal, or two tokens that compete for a budget."""
    output, new = model(ids[None], use_cache=True), []
    while len(new) < tokens:
        (best, second), (token, _) = (x.tolist() for x in output.logits[0, -1].topk(2))
        if best - second < 1e-3:
            break
        new.append(token)
        with gaps() as seen:
            cache = {CACHE_FIELD: output[CACHE_FIELD]}
            output = model(torch.tensor([[token]]), use_cache=True, **cache)
        if seen and min(seen) < 1e-4:
            break
    return torch.tensor(new)


@torch.no_grad()
def make(name):
    model, ids = student(name, dtype=torch.float64)
    own = {n: x.float() for n, x in model.state_dict().items() if n in learned(model, torch.Generator())}
    with gaps() as seen:
        logits = model(ids[None]).logits[0]
    positions = torch.arange(0, len(ids), 11)
    start = ids[: len(ids) // 2]
    tensors = {
        **own,
        "ids": ids,
        "positions": positions,
        "logits": logits[positions].float(),
        "generated": generated(model, start, 200 if len(ids) > 200 else 40),
    }
    family = STUDENTS[name][0]
    out = DATA / f"students/{name}.safetensors"
    out.parent.mkdir(exist_ok=True)
    save_file(tensors, out, metadata={"family": family, "still": json.dumps(model.config.still)})
    assert min(seen, default=1) > 1e-4, f"{name}: two tokens compete for a budget: give it another seed"
    print(f"{name}: {len(ids)} tokens read, {len(tensors['generated'])} generated")


if __name__ == "__main__":
    # What is recorded is what PyTorch computes.
    hybrid_attention.KERNELS = None
    for name in sys.argv[1:] or STUDENTS:
        make(name)
