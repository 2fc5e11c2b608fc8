"""A LoRA training step of the Llama-3.1-8B shape in PyTorch and Hugging Face transformers on one GPU: random weights, bf16,
one sequence, scaled-dot-product attention (flash), cross-entropy, rank 8 on q, k, v and o, AdamW.

    python3 benches/torch_lora.py [CONTEXT …]

The peer of `still bench train --device cuda --shape llama-3.1-8b --stages finetune --set finetune.objective=cross_entropy`; run both
on one machine, one after the other. Each context is timed with every activation kept and with gradient checkpoints (each layer
computed again), each with the attention backend that PyTorch picks and with flash attention alone.
"""

import contextlib
import gc
import sys
import time

import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

RANK, ALPHA, STEPS = 8, 16, 5
BACKENDS = {"chosen": contextlib.nullcontext, "flash": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION)}


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        made = {"dtype": torch.float32, "device": base.weight.device}
        self.a = nn.Parameter(torch.randn(RANK, base.in_features, **made) * base.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK, **made))

    def forward(self, x):
        return self.base(x) + (x @ self.a.to(x.dtype).T) @ self.b.to(x.dtype).T * (ALPHA / RANK)


def model():
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, rope_theta=5e5, max_position_embeddings=131072, tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        llama = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    llama.requires_grad_(False)
    for layer in llama.model.layers:
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"]:
            setattr(layer.self_attn, name, Lora(getattr(layer.self_attn, name)))
    return llama.train()


def timed(llama, ids, backend):
    optimizer = torch.optim.AdamW([p for p in llama.parameters() if p.requires_grad], lr=1e-4, fused=True)
    times = []
    torch.cuda.reset_peak_memory_stats()
    for step in range(STEPS + 2):
        torch.cuda.synchronize()
        start = time.time()
        with backend():
            loss = llama(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        torch.cuda.synchronize()
        if step > 1:
            times.append(time.time() - start)
    return 1e3 * sorted(times)[len(times) // 2], torch.cuda.max_memory_allocated() / 2**30


def main():
    contexts = [int(x) for x in sys.argv[1:]] or [8192]
    print(torch.__version__, transformers.__version__, torch.cuda.get_device_name())
    llama = model()
    for context in contexts:
        ids = torch.randint(0, 128256, (1, context), device="cuda")
        for kept in [True, False]:
            if not kept:
                llama.gradient_checkpointing_enable({"use_reentrant": False})
            for name, backend in BACKENDS.items():
                what = f"{context} tokens, {'activations kept' if kept else 'checkpoints'}, attention {name}"
                try:
                    ms, peak = timed(llama, ids, backend)
                    print(f"{what}: step {ms:.1f} ms, peak {peak:.1f} GiB", flush=True)
                except torch.OutOfMemoryError as error:
                    print(f"{what}: out of memory ({str(error).splitlines()[0][:90]})", flush=True)
                llama.zero_grad(set_to_none=True)
                gc.collect()
                torch.cuda.empty_cache()
        llama.gradient_checkpointing_disable()


main()
