"""The op `still.torch.hybrid_attention` on one GPU, compared with `still bench attention` at the same shapes: what PyTorch costs.

    python3 benches/torch_op.py --still target/release/still [-- OPTIONS OF still bench attention …]
    python3 benches/torch_op.py --lines bench.jsonl

Needs torch and a wheel that was built with CUDA. `--still` runs `still bench attention --device cuda --variants still --json` with
the options that follow `--`; `--lines` takes lines that such a run printed. Each forward pass and each forward + backward pass among
them is timed by CUDA events, in as many repetitions of as many calls, and printed as a line of JSON with `torch_ms` and `ratio` next to
what `still` measured. `host_ms` is the wall time of the host until a call's kernels are queued: where it is nearly `torch_ms`, the GPU
waits for the host. Backward passes run on the thread that asks for them: a model's goes over to autograd's thread once, not once for
each layer. `--threads` times them with that change of threads.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from still.torch import hybrid_attention

CHUNK = 64
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "forward-backward")


def lines_of(arguments):
    if arguments.lines:
        text = open(arguments.lines).read()
    else:
        command = [arguments.still, "bench", "attention", "--device", "cuda", "--variants", "still", "--passes", ",".join(PASSES), "--json"]
        text = subprocess.run([*command, *arguments.options], check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [line for line in lines if line["variant"] == "still" and line["pass"] in PASSES]


def operands(line):
    heads, kv_heads, dim = (line[name] for name in ("num_heads", "num_key_value_heads", "head_dim"))
    batch, tokens, dtype = line["batch"], line["context"], DTYPES[line["compute_dtype"]]
    normal = lambda *shape, dtype=dtype: torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)
    f32 = torch.float32
    made = {
        "q": normal(batch, heads, tokens, dim),
        "k": normal(batch, kv_heads, tokens, dim),
        "v": normal(batch, kv_heads, tokens, dim),
        "feature_map_q": normal(heads, dim, dim, dtype=f32) / dim**0.5,
        "feature_map_k": normal(kv_heads, dim, dim, dtype=f32) / dim**0.5,
        "log_lambda": normal(heads, dtype=f32),
    }
    config = {
        "chunk": CHUNK,
        "router": "self_saliency",
        "selection_head": "kv_head",
        "budgets": [[line["budget"]] * kv_heads],
        "cap": line["cap"],
        "feature_map": {"np_map": {"householder": False}},
        "feature_dim": dim,
        "linear_norm": "mean",
        "gate": False,
    }
    return made, json.dumps(config)


def call_of(line):
    tensors, config = operands(line)
    if line["pass"] == "forward":

        def call():
            with torch.no_grad():
                hybrid_attention(**tensors, config=config)

        return call
    for x in tensors.values():
        x.requires_grad_()
    d_out = torch.ones_like(tensors["q"])

    def call():
        out = hybrid_attention(**tensors, config=config).out
        torch.autograd.grad(out, tuple(tensors.values()), d_out)

    return call


def timed(line):
    """Medians of a call in ms: of the GPU, and of the host alone."""
    call, calls = call_of(line), line["calls"]
    for _ in range(3):
        call()
    on_device, on_host = [], []
    for _ in range(line["repetitions"]):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started = time.perf_counter()
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        on_host.append(1e3 * (time.perf_counter() - started) / calls)
        torch.cuda.synchronize()
        on_device.append(begin.elapsed_time(end) / calls)
    return statistics.median(on_device), statistics.median(on_host)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--still")
    source.add_argument("--lines")
    parser.add_argument("--threads", action="store_true", help="backward passes on autograd's own thread")
    parser.add_argument("options", nargs="*", metavar="OPTION")
    arguments = parser.parse_args()
    torch.autograd.set_multithreading_enabled(arguments.threads)
    lines = lines_of(arguments)
    if not lines:
        sys.exit("no pass of the variant `still` was timed: give --contexts, or another file")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}", file=sys.stderr)
    names = ("num_heads", "num_key_value_heads", "head_dim", "compute_dtype", "batch", "budget", "cap", "context", "pass", "calls")
    for line in lines:
        torch_ms, host_ms = timed(line)
        ratio = torch_ms / line["median_ms"]
        measured = {"still_ms": line["median_ms"], "torch_ms": torch_ms, "host_ms": host_ms, "ratio": ratio}
        measured["threads"] = arguments.threads
        print(json.dumps({name: line[name] for name in names} | measured), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
