"""What coded rows cost a dense Qwen2 model, where all else is exact: `coded_keys.py FOLDER FILE.gguf TEXT STUDENT PART`.

STUDENT is a student's folder, for its tokenizer and its whole heads. PART is `whole`: the rows of those heads before the window
(chunks c-1 and c) are coded, and keys hidden in 4,096 tokens are asked for; or `others`: tokens 0 to 3 and every 64th of all other heads
are coded, and the perplexity of 2 x 512 tokens is told. Exponents come from the last 2,048 tokens of the text.
"""
import json
import math
import random
import sys

import torch
import transformers.models.qwen2.modeling_qwen2 as qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

FOLDER, FILE, TEXT, STUDENT, PART = sys.argv[1:]
CHUNK, GROUP = 64, 32
HADAMARD = torch.tensor([[(-1) ** bin(i & j).count("1") for j in range(GROUP)] for i in range(GROUP)]).float() / GROUP**0.5


def rotated(x):
    return (x.unflatten(-1, (-1, GROUP)) @ HADAMARD).flatten(-2)


def offset(x, bits, group):
    """Codes with a scale and an offset, in f16, for each group."""
    x, top = x.unflatten(-1, (-1, group)), 2**bits - 1
    low, high = x.amin(-1, keepdim=True).half().float(), x.amax(-1, keepdim=True)
    scale = ((high - low) / top).half().float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (torch.round((x - low) / scale).clamp(0, top) * scale + low).flatten(-2)


def scaled(x):
    """Codes of 8 bits with a scale a row."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return torch.round(x / scale) * scale


CODE = {
    "exact": lambda x: x,
    "4": lambda x: offset(x, 4, GROUP),
    "4 rotated": lambda x: rotated(offset(rotated(x), 4, GROUP)),
    "4 in groups of 16": lambda x: offset(x, 4, 16),
    "4 with one group a row": lambda x: offset(x, 4, x.shape[-1]),
    "5": lambda x: offset(x, 5, GROUP),
    "6": lambda x: offset(x, 6, GROUP),
    "8": scaled,
}
CASES = [("exact", "exact", False), ("4 rotated", "4", False), ("4 rotated", "4", True), ("4", "4", True), ("4 in groups of 16", "4", True),
         ("4 with one group a row", "4", True), ("5", "4", True), ("6", "4", True), ("8", "4", False), ("8", "4", True), ("8", "8", False),
         ("8", "8", True), ("4 rotated", "exact", False), ("exact", "4", False)]

model = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE, dtype=torch.float32, attn_implementation="eager").to(torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(STUDENT)
text = open(TEXT).read()
ids = tokenizer(text).input_ids
budgets = json.load(open(f"{STUDENT}/config.json"))["still"]["budgets"]
is_whole = lambda layer, head: budgets[layer][head] == CHUNK
case, exponents, cached = CASES[0], {}, {}


def coded(layer, head, k, v):
    power = 2.0 ** exponents[layer, head] if case[2] else 1.0
    new_k, new_v = CODE[case[0]](k / power) * power, CODE[case[1]](v)
    if PART == "others":
        at = torch.arange(len(k))
        seldom = ((at % CHUNK == 0) | (at < 4))[:, None]
        new_k, new_v = torch.where(seldom, new_k, k), torch.where(seldom, new_v, v)
    return new_k.to(torch.bfloat16), new_v.to(torch.bfloat16)


def attention(module, query, key, value, mask, scaling=None, **_):
    layer, kv_heads, tokens, before = module.layer_idx, key.shape[1], query.shape[2], key.shape[2] - query.shape[2]
    group = query.shape[1] // kv_heads
    out = torch.empty(1, tokens, query.shape[1], query.shape[3], dtype=query.dtype)
    for head in range(kv_heads):
        k, v = key[0, head], value[0, head]
        if (layer, head) not in exponents:
            pairs = k.float().unflatten(-1, (2, -1)).norm(dim=-2).amax(0).log2()
            exponents[layer, head] = torch.round(pairs - pairs.median()).repeat(2)
        is_coded = is_whole(layer, head) == (PART == "whole") and case[0:2] != ("exact", "exact")
        if is_coded:
            old_k, old_v = coded(layer, head, k.float(), v.float())
            if tokens <= CHUNK:  # a question: what was read before it is coded once
                kept_k, kept_v = cached.setdefault((layer, head), (old_k[:before], old_v[:before]))
                old_k, old_v = torch.cat([kept_k, k[before:]]), torch.cat([kept_v, v[before:]])
        for first in range(0, tokens, 512):
            rows = slice(first, min(first + 512, tokens))
            last = before + rows.stop
            now, at = torch.arange(before + rows.start, last)[:, None], torch.arange(last)[None]
            q = query[0, head * group : (head + 1) * group, rows]
            logits, old = (q @ k[:last].T).float(), at < (now // CHUNK - 1) * CHUNK
            if is_coded:
                logits = torch.where(old, (q @ old_k[:last].T).float(), logits)
            weights = (logits * scaling).masked_fill(at > now, -torch.inf).softmax(-1).to(v.dtype)
            answer = (weights * old) @ old_v[:last] + (weights * ~old) @ v[:last] if is_coded else weights @ v[:last]
            out[0, rows, head * group : (head + 1) * group] = answer.transpose(0, 1)
    return out, None


qwen2.eager_attention_forward = attention
torch.set_grad_enabled(False)
model(torch.tensor([ids[-2048:]]))


def perplexity():
    loss = 0.0
    for first in (0, 512):
        window = torch.tensor([ids[first : first + 512]])
        loss += torch.nn.functional.cross_entropy(model(window).logits[0, :-1].float(), window[0, 1:]).item() / 2
    return math.exp(loss)


def needles(words, numbers, noise):
    """The document's tokens and state, its keys among its lines."""
    lines = [noise] * 170 if noise else [line + "." for line in text[9000:29000].replace("\n", " ").split(".")]
    while len(tokenizer("".join(lines)).input_ids) > 3850:
        lines = lines[: int(len(lines) * 0.98)]
    places = sorted(random.sample(range(1, int(len(lines) * 0.95)), len(words)), reverse=True)
    for place, word, number in zip(places, words, numbers):
        lines.insert(place, f" One of the special magic numbers for {word} is: {number}. ")
    document = tokenizer("Some special magic numbers are hidden within the following text.\n" + "".join(lines)).input_ids
    cache = DynamicCache()
    model(torch.tensor([document]), past_key_values=cache, logits_to_keep=1)
    return cache


def found(cache, words, numbers):
    right, loss = 0, 0.0
    for word, number in zip(words, numbers):
        asked = tokenizer(f"\nThe special magic number for {word} mentioned in the provided text is").input_ids
        answer = tokenizer(": " + number).input_ids
        logits = model(torch.tensor([asked + answer]), past_key_values=cache).logits.float()[0, len(asked) - 1 : -1]
        cache.crop(-len(asked) - len(answer))
        digits = torch.tensor(answer)[-7:]
        right += int((logits[-7:].argmax(-1) == digits).all())
        loss += torch.nn.functional.cross_entropy(logits[-7:], digits).item() / len(words)
    return right, loss


name = lambda: f"keys {case[0]}{', exponents' if case[2] else ''}; values {case[1]}"
if PART == "others":
    exact = perplexity()
    for case in CASES:
        print(f"{name():50} {perplexity() / exact:.4f} x {exact:.2f}", flush=True)
else:
    random.seed(1)
    words = "amber basil cedar delta ember fjord grape haven ivory jolly kiosk lemon".split()
    for noise in ("The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n", None):
        numbers = [str(random.randrange(10**6, 10**7)) for _ in words]
        case = CASES[0]
        cache = needles(words, numbers, noise)
        for case in CASES:
            cached.clear()
            right, loss = found(cache, words, numbers)
            print(f"{'noise' if noise else 'text':5} {name():50} {right} of {len(words)}, {loss:.3f} nats a digit", flush=True)
