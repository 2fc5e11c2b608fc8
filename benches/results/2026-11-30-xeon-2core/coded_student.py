"""What coded rows cost a student: `coded_student.py FOLDER CONFIG TEXT`.

FOLDER is the student exported with --transformers, CONFIG the config.json that has its key exponents. Its code keeps salient rows as they
come; here they are coded when their chunk retires, in ways that differ by layer and head. Tells the perplexity of 1,536 tokens.
"""
import json
import math
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER, CONFIG, TEXT = sys.argv[1:]
GROUP = 32
HADAMARD = torch.tensor([[(-1) ** bin(i & j).count("1") for j in range(GROUP)] for i in range(GROUP)]).float() / GROUP**0.5
still = json.load(open(CONFIG))["still"]
exponents = [[torch.tensor([float(e) for e in head.split()]) for head in layer] for layer in still["key_exponents"]]
is_whole = lambda layer, head: still["budgets"][layer][head] == still["chunk"]


def rotated(x):
    return (x.unflatten(-1, (-1, GROUP)) @ HADAMARD).flatten(-2)


def int4(x):
    x = x.unflatten(-1, (-1, GROUP))
    low, high = x.amin(-1, keepdim=True).half().float(), x.amax(-1, keepdim=True)
    scale = ((high - low) / 15).half().float().clamp_min(1e-7)
    return (torch.round((x - low) / scale).clamp(0, 15) * scale + low).flatten(-2)


def int8(x):
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return torch.round(x / scale) * scale


KEYS = {"int4": lambda k: rotated(int4(rotated(k))), "int4 not rotated": int4, "int8": int8, "exact": lambda k: k}
VALUES = {"int4": int4, "int4 not rotated": int4, "int8": int8, "exact": lambda v: v}
CASES = {
    "exact rows": lambda layer, head: ("exact", False),
    "int8": lambda layer, head: ("int8", False),
    "int8, exponents": lambda layer, head: ("int8", True),
    "int4": lambda layer, head: ("int4", False),
    "int4, exponents": lambda layer, head: ("int4", True),
    "int4 not rotated": lambda layer, head: ("int4 not rotated", False),
    "int4 not rotated, exponents": lambda layer, head: ("int4 not rotated", True),
    "int8 in layers 0 to 2, int4 not rotated in others; exponents": lambda layer, head: ("int8" if layer < 3 else "int4 not rotated", True),
    "int4 in whole heads, exponents; others exact": lambda layer, head: ("int4" if is_whole(layer, head) else "exact", True),
    "int4 in layers with a whole head, int8 in others; exponents": lambda layer, head: (
        "int4" if any(is_whole(layer, h) for h in range(len(still["budgets"][layer]))) else "int8",
        True,
    ),
    "int8 in layers 0 to 2, int4 in others": lambda layer, head: ("int8" if layer < 3 else "int4", False),
    "int8 in layers 0 to 2, int4 in others; exponents": lambda layer, head: ("int8" if layer < 3 else "int4", True),
    "int8 in layers 0, 1, 2 and 8, int4 in others; exponents": lambda layer, head: ("int8" if layer in (0, 1, 2, 8) else "int4", True),
}

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True, dtype=torch.bfloat16).eval()
operator = next(module for module in model.modules() if hasattr(module, "begin_chunk"))
hybrid = next(kind for kind in type(operator).__mro__ if kind.__name__ == "HybridOperator")
sys.modules[hybrid.__module__].KERNELS = None
begin_chunk = hybrid.begin_chunk


def begin_coded_chunk(self, state, segment):
    before = [rows.k.shape[2] for rows in state.salient]
    begin_chunk(self, state, segment)
    for (_, heads), rows, first in zip(self.groups, state.salient, before):
        rows.k, rows.v = rows.k.float(), rows.v.float()
        for i, head in enumerate(heads):
            coding, scaled = case(self.layer, head)
            power = 2.0 ** exponents[self.layer][head] if scaled else 1.0
            rows.k[:, i, first:] = KEYS[coding](rows.k[:, i, first:] / power) * power
            rows.v[:, i, first:] = VALUES[coding](rows.v[:, i, first:])


hybrid.begin_chunk = begin_coded_chunk
ids = torch.tensor([AutoTokenizer.from_pretrained(FOLDER)(open(TEXT).read()).input_ids[:1536]])
exact = None
for name, case in CASES.items():
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, :-1].float()
    perplexity = math.exp(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item())
    exact = exact or perplexity
    print(f"{name:62} {perplexity:7.2f} {perplexity / exact:.4f}", flush=True)
