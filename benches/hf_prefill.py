"""Prefill in Hugging Face transformers on CPU cores: a student with the kernels of `still`, in PyTorch alone, and its teacher.

    python3 benches/hf_prefill.py [--student DIR] [--tokens 8192] [--threads 2] [--repeats 3] [--seconds 480] [--out FILE.json]

Needs torch, transformers, safetensors and the package still-llm, whose command exports the student that ships if no other is
named. The three are timed in alternation, after one short run of each, until there are as many rounds as asked for or the next one
would end after so many seconds; PyTorch alone, which is the slowest by far, in the first round only. If it is not done by then, it is
stopped: its time and the ratio to it are then what they are at least (`pytorch_stopped`). Random tokens; float32; the logits of the
last token alone. The teacher has the student's weights and transformers' "sdpa" attention.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--student", type=Path, help="a folder that `still export --transformers` wrote")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--out", type=Path, help="where the JSON goes; stdout if absent")
    return parser.parse_args()


def cpu():
    names = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0] if names else platform.processor()


def dense(folder):
    """The student's base, with softmax attention."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True).base
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    absent = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert set(absent.missing_keys) <= {"lm_head.weight"}, absent.missing_keys
    model.tie_weights()
    return model.eval()


class Late(Exception):
    """There is no time left."""


def seconds(model, ids, use_cache, until=None):
    """Wall time of a forward pass, and whether it was stopped at a layer after `until` (of `time.monotonic`)."""

    def check(*_):
        if until is not None and time.monotonic() > until:
            raise Late

    hooks = [layer.register_forward_pre_hook(check) for layer in model.model.layers]
    start, stopped = time.perf_counter(), False
    try:
        with torch.no_grad():
            model(ids, use_cache=use_cache, logits_to_keep=1)
    except Late:
        stopped = True
    for hook in hooks:
        hook.remove()
    return time.perf_counter() - start, stopped


def exported(folder):
    """The student that ships, as transformers opens it."""
    command = [sys.executable, "-m", "still", "export", "--model", "demo", "--transformers", folder, "--dtype", "f32"]
    subprocess.run(command, check=True)
    return Path(folder)


def main():
    started = time.monotonic()
    args = arguments()
    torch.set_num_threads(args.threads)
    # Read by the kernels of `still` at their first call.
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as directory:
        result = measured(args, args.student or exported(f"{directory}/student"), started)
    text = json.dumps(result, indent=1) + "\n"
    if args.out:
        args.out.write_text(text)
    else:
        print(text, end="")


def measured(args, folder, started):
    student = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    operator = sys.modules[type(student.model.layers[0].self_attn).__mro__[1].__module__]
    kernels = operator.KERNELS
    if kernels is None:
        raise SystemExit("error: the package still-llm is not installed here\nhint: pip install still_llm-*.whl")
    teacher = dense(folder)
    ids = torch.randint(student.config.vocab_size, (1, args.tokens), generator=torch.Generator().manual_seed(0))

    def with_operator(which):
        operator.KERNELS = which
        return student

    variants = {
        "kernels": lambda: with_operator(kernels),
        "dense": lambda: teacher,
        "pytorch": lambda: with_operator(None),
    }
    times = {name: [] for name in variants}
    stopped = False
    for model in variants.values():
        seconds(model(), ids[:, :256], True)
    for repeat in range(args.repeats):
        round_of = [name for name in variants if repeat == 0 or name != "pytorch"]
        takes = sum(times[name][-1] for name in round_of if times[name])
        if repeat > 0 and time.monotonic() - started + takes > args.seconds:
            break
        for name in round_of:
            until = started + args.seconds if name == "pytorch" else None
            took, late = seconds(variants[name](), ids, True, until)
            times[name].append(took)
            stopped |= late
            print(f"{name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    median = {name: statistics.median(of) for name, of in times.items()}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "still-llm")}
    return {
        "what": f"prefill of {args.tokens} tokens, float32, with a cache",
        "command": sys.argv,
        "student": str(args.student or "demo"),
        "cpu": cpu(),
        "threads": args.threads,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "seconds": times,
        "median_seconds": median,
        "pytorch_stopped": stopped,
        "kernels_over_pytorch": median["pytorch"] / median["kernels"],
        "kernels_over_dense": median["dense"] / median["kernels"],
    }


if __name__ == "__main__":
    main()
