"""Decode steps of the Llama-3.1-8B shape by Hugging Face transformers on one GPU: random weights, bf16, batch 1.

    python3 benches/hf_decode.py [CONTEXT …]

The peer of `still bench model --device cuda --shape llama-3.1-8b`; run both on one machine, one after the other. Also prints how long
the weights take to be read once, from a copy inside the GPU's memory (which reads and writes as much).
"""

import sys
import time

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

BLOCK = 8192
STEPS = 12


def seconds(work, times):
    torch.cuda.synchronize()
    start = time.time()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return (time.time() - start) / times


def model():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, rope_theta=5e5, max_position_embeddings=131072, tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def main():
    contexts = [int(x) for x in sys.argv[1:]] or [8192, 131072]
    print(torch.__version__, transformers.__version__, torch.cuda.get_device_name())
    llama = model()
    size = sum(p.numel() * p.element_size() for p in llama.parameters())
    source = torch.empty(2**32, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    rate = 2 * source.numel() / seconds(lambda: target.copy_(source), 10)
    print(f"copies at {rate / 1e9:.0f} GB/s; weights {size / 1e9:.2f} GB, read once in {1e3 * size / rate:.2f} ms")
    del source, target
    with torch.no_grad():
        for context in contexts:
            cache = DynamicCache()
            for start in range(0, context, BLOCK):
                ids = torch.randint(0, 128256, (1, min(BLOCK, context - start)), device="cuda")
                positions = torch.arange(start, start + ids.shape[1], device="cuda")
                llama.model(input_ids=ids, past_key_values=cache, position_ids=positions[None], use_cache=True)
            last = ids[:, -1:]
            steps = []
            for _ in range(STEPS):
                torch.cuda.synchronize()
                start = time.time()
                last = llama(input_ids=last, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
                torch.cuda.synchronize()
                steps.append(time.time() - start)
            print(f"decode at {context}: {1e3 * sorted(steps)[STEPS // 2]:.1f} ms", flush=True)
            del cache
            torch.cuda.empty_cache()


main()
