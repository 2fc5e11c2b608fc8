"""Dense attention and dense models by PyTorch and transformers on one GPU: random weights, bf16.

    python3 benches/torch_dense.py [--shape SHAPE …] [--contexts N …] [--batches N …]

The peer of `still bench model --device cuda --variants dense --shape SHAPE` and of `still bench attention --device cuda --variants
dense`; run both on one machine, one after the other. Prints, for each shape and context:

- attention: one layer's causal attention over the whole context by each backend of scaled_dot_product_attention;
- prefill: the model over the context, batch 1, by the fastest of them;
- decode: a step compiled with CUDA graphs (`torch.compile(mode="reduce-overhead")`) onto a static cache, its arg-max included.
"""

import argparse
import inspect
import statistics
import time

import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

SHAPES = {
    "smollm2-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, rope_theta=1e5, tie_word_embeddings=True,
    ),
    "llama-3.1-8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, rope_theta=5e5, tie_word_embeddings=False,
    ),
    "tiny": dict(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128,
        tie_word_embeddings=True,
    ),
}
BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
BLOCK = 8192
WARM_UP, STEPS = 8, 24


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def median_ms(work, device, repeat=7, calls=1):
    work()
    times = []
    for _ in range(repeat):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start) / calls)
    return statistics.median(times)


def attention(config, context, device):
    """The fastest backend, and what each takes."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    d = config.hidden_size // heads
    make = lambda n: torch.randn(1, n, context, d, device=device, dtype=torch.bfloat16)
    q, k, v = make(heads), make(kv_heads), make(kv_heads)
    repeated = [x.repeat_interleave(heads // kv_heads, 1) for x in (k, v)]
    found, line = {}, f"attention at {context}:"
    for backend in BACKENDS:
        name = backend.name.split("_")[0].lower()
        for how, keys, grouped in (("grouped", (k, v), True), ("repeated", repeated, False)):
            try:
                with sdpa_kernel(backend):
                    work = lambda: F.scaled_dot_product_attention(q, *keys, is_causal=True, enable_gqa=grouped)
                    ms = median_ms(work, device, calls=4)
            except Exception as error:  # a peer that is not there is said, not hidden
                line += f" {name} ({how}): {str(error).splitlines()[0][:60]};"
                continue
            line += f" {name} ({how}) {ms:.3f} ms;"
            found[backend] = min(ms, found.get(backend, ms))
    print(line, flush=True)
    return min(found, key=found.get) if found else None


def cache_argument():
    """What this version of transformers calls the cache."""
    return "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def read(model, ids, cache):
    for start in range(0, ids.shape[1], BLOCK):
        block = ids[:, start : start + BLOCK]
        positions = torch.arange(start, start + block.shape[1], device=ids.device)[None].expand_as(block)
        out = model(input_ids=block, position_ids=positions, use_cache=True, logits_to_keep=1, **{cache_argument(): cache})
    return out.logits[:, -1:].argmax(-1)


def prefill(model, config, context, backend, device):
    ids = torch.randint(0, config.vocab_size, (1, context), device=device)
    positions = torch.arange(context, device=device)[None]
    work = lambda: model(input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=1)
    with sdpa_kernel(backend):
        ms = median_ms(work, device, repeat=5)
    print(f"prefill at {context}: {ms:.1f} ms, {1e3 * context / ms:.0f} tokens/s by {backend.name}", flush=True)


def decode(model, config, context, batch, device):
    torch.compiler.reset()
    cache = StaticCache(config=config, max_cache_len=context + WARM_UP + STEPS)
    ids = torch.randint(0, config.vocab_size, (batch, context), device=device)
    last = read(model, ids, cache).clone()
    positions = torch.full((batch, 1), context, device=device)
    name = cache_argument()

    def step(last, positions):
        return model(input_ids=last, position_ids=positions, use_cache=True, **{name: cache}).logits[:, -1:].argmax(-1)

    compiled = torch.compile(step, mode="reduce-overhead") if device == "cuda" else step
    times = []
    for n in range(WARM_UP + STEPS):
        synchronize(device)
        start = time.perf_counter()
        last = compiled(last, positions).clone()
        last.tolist()  # as a program that streams tokens
        if n >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - start))
        positions += 1
    line = f"decode at {context}, batch {batch}: median {statistics.median(times):.2f} ms, fastest {min(times):.2f} ms"
    print(line, flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", nargs="+", default=["smollm2-135m", "llama-3.1-8b"], choices=SHAPES)
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 8192])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print("PyTorch", torch.__version__, "transformers", transformers.__version__, name)
    torch.set_default_dtype(torch.bfloat16)
    for shape in args.shape:
        config = LlamaConfig(**SHAPES[shape], max_position_embeddings=131072)
        with torch.device(args.device), torch.no_grad():
            model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
        print(shape, flush=True)
        with torch.no_grad():
            for context in args.contexts:
                backend = attention(config, context, args.device)
                if backend is not None:
                    prefill(model, config, context, backend, args.device)
                for batch in args.batches:
                    decode(model, config, context, batch, args.device)


main()
