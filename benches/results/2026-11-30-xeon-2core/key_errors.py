"""What codes of keys change in the logits of a Qwen2 model's whole heads: `key_errors.py FOLDER FILE.gguf TEXT STUDENT`.

STUDENT is a student's folder with key exponents, for its tokenizer and its whole heads. The prompt is 140 lines that hide numbers under
alike names, then the text: 3,072 tokens. All keys are coded; the last 256 queries meet them.
"""
import json
import math
import random
import sys

import torch
import transformers.models.qwen2.modeling_qwen2 as qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER, FILE, TEXT, STUDENT = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE, dtype=torch.float32, attn_implementation="eager")
tokenizer = AutoTokenizer.from_pretrained(STUDENT)
still = json.load(open(f"{STUDENT}/config.json"))["still"]
whole = [(layer, head) for layer, heads in enumerate(still["budgets"]) for head, budget in enumerate(heads) if budget == 64]

random.seed(1)
words = "apple river stone cloud tiger maple ocean ember candle forest".split()
name = lambda i: f"{random.choice(words)}-{random.choice(words)}{i}"
lines = [f"One of the special magic numbers for {name(i)} is: {random.randint(10**6, 10**7 - 1)}." for i in range(140)]
ids = tokenizer("\n".join(lines) + open(TEXT).read(), return_tensors="pt").input_ids[:, :3072]

attend, seen = qwen2.eager_attention_forward, {}


def record(module, query, key, value, mask, **more):
    seen[module.layer_idx] = (query[0].clone(), key[0].clone())
    return attend(module, query, key, value, mask, **more)


qwen2.eager_attention_forward = record
with torch.no_grad():
    model.model(ids)

HADAMARD = torch.tensor([[(-1) ** bin(i & j).count("1") for j in range(32)] for i in range(32)]).float() / math.sqrt(32)


def rotated(x):
    return (x.unflatten(-1, (-1, 32)) @ HADAMARD).flatten(-2)


def coded(x, bits, axis):
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-9)
    return torch.round((x - low) / step) * step + low


def by_row(bits, group=32):
    return lambda x: rotated(coded(rotated(x).unflatten(-1, (-1, group)), bits, -1).flatten(-2))


def by_channel(bits, tokens):
    return lambda x: coded(x.unflatten(0, (-1, tokens)), bits, 1).flatten(0, 1)


def eight(x):
    step = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / step) * step


def less_mean(code):
    """Codes of what a chunk's keys differ by from their mean."""

    def of(x):
        mean = x.unflatten(0, (-1, 64)).mean(1, keepdim=True)
        return (code((x.unflatten(0, (-1, 64)) - mean).flatten(0, 1)).unflatten(0, (-1, 64)) + mean).flatten(0, 1)

    return of


CODES = {
    "8 bits, a scale a row": eight,
    "6 bits by row, rotated": by_row(6),
    "5 bits by row, rotated": by_row(5),
    "4 bits by row, rotated": by_row(4),
    "the same in groups of 16": by_row(4, 16),
    "4 bits by row, rotated, less the chunk's mean": less_mean(by_row(4)),
    "4 bits by channel, 64 tokens": by_channel(4, 64),
    "4 bits by channel, 32 tokens": by_channel(4, 32),
    "5 bits by channel, 64 tokens": by_channel(5, 64),
}

for title, code in CODES.items():
    errors, divergences = [], []
    for layer, head in whole:
        query, key = seen[layer]
        group, tokens = query.shape[0] // key.shape[0], key.shape[1] // 64 * 64
        powers = torch.tensor([2.0 ** int(e) for e in still["key_exponents"][layer][head].split()])
        keys = key[head, :tokens] / powers
        queries = query[head * group : (head + 1) * group, tokens - 256 : tokens] * powers / math.sqrt(key.shape[-1])
        sees = torch.arange(tokens)[None] <= torch.arange(tokens - 256, tokens)[:, None]
        exact, got = queries @ keys.T, queries @ code(keys).T
        weights = exact.masked_fill(~sees, -1e9).softmax(-1)
        # A logit that is off for all keys alike changes nothing.
        off = got - exact - (weights * (got - exact)).sum(-1, keepdim=True)
        errors.append(off[:, sees].square().mean().sqrt().item())
        logs = got.masked_fill(~sees, -1e9).log_softmax(-1)
        divergence = (weights * (weights.clamp_min(1e-30).log() - logs)).masked_fill(~sees, 0).sum(-1)
        divergences.append(divergence.mean().item())
    mean = lambda values: sum(values) / len(values)
    print(f"{title:48} logits {mean(errors):.3f}  KL {mean(divergences):.4f}  ", " ".join(f"{x:.3f}" for x in errors))
