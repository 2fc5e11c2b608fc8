#!/usr/bin/env python3
"""`still bench model` and llama.cpp in turn, on one GGUF, with equal threads: medians and ratios.

    pip install llama-cpp-python        # builds from source; not needed for anything else here
    cargo build --release
    python3 benches/beside_llama_cpp.py MODEL.gguf --out benches/results/NAME [--contexts 512,7680]

Every round runs both, llama.cpp with and without flash attention; of llama.cpp the better of the two counts. Without
--student, the student of the table is an untrained one of 4 of 64 tokens. Each process warms up before its first context. Writes NAME/beside_llama_cpp.json (every round) and NAME/beside_llama_cpp.md (the table).
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

SPEEDS = ("prefill_tokens_per_s", "decode_tokens_per_s")


def time_llama_cpp(args):
    """Times llama.cpp in this process; one JSON object a line."""
    import random
    import time

    from llama_cpp import Llama

    contexts = [int(context) for context in args.contexts.split(",")]
    llm = Llama(
        args.model,
        n_ctx=max(contexts) + args.new_tokens + 16,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        n_batch=512,
        verbose=False,
        flash_attn=args.worker == "flash",
    )
    rng = random.Random(0)
    tokens = lambda count: [rng.randrange(100, 40_000) for _ in range(count)]
    llm.eval(tokens(64))
    for context in contexts:
        llm.reset()
        prompt = tokens(context)
        started = time.perf_counter()
        llm.eval(prompt)
        prefill = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(args.new_tokens):
            llm.eval(tokens(1))
        decode = time.perf_counter() - started
        speeds = (context / prefill, args.new_tokens / decode)
        print(json.dumps({"context": context, **dict(zip(SPEEDS, speeds))}), flush=True)


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def cpu():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=pathlib.Path, help="directory for the results")
    parser.add_argument("--still", default="target/release/still")
    parser.add_argument("--student", help="a student of the model, timed with its own rows, and its teacher")
    parser.add_argument("--contexts", default="512,2048,4096,7680")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=["plain", "flash"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return time_llama_cpp(args)
    if args.out is None:
        parser.error("--out is needed")

    common = ["--contexts", args.contexts, "--new-tokens", str(args.new_tokens), "--threads", str(args.threads)]
    bench = [args.still, "bench", "model", "--json", "--quiet"]
    what = ["--model", args.student, "--variants", "student,dense"] if args.student else ["--model", args.model, "--variants", "still"]
    commands = {
        "still": [*bench, *what, *common],
        "plain": [sys.executable, __file__, args.model, "--worker", "plain", *common],
        "flash": [sys.executable, __file__, args.model, "--worker", "flash", *common],
    }
    rounds = []
    for number in range(args.rounds):
        for name, command in commands.items():
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
            # The teacher's lines are an engine of their own.
            engine = lambda line: "dense" if line.get("variant") == "dense" else name
            rounds += [{"round": number, "engine": engine(line), **line} for line in run(command)]

    def median(engine, context, speed):
        return statistics.median(
            line[speed] for line in rounds if line["engine"] == engine and line["context"] == context
        )

    peers = [("llama.cpp", ("plain", "flash"))] + ([("teacher", ("dense",))] if args.student else [])
    heads = [f"{what}, still | " + " | ".join(f"{peer} | ratio" for peer, _ in peers) for what in ("prefill", "decode")]
    table = ["| context | " + " | ".join(heads) + " |", "|---" * (3 + 4 * len(peers)) + "|"]
    for context in (int(context) for context in args.contexts.split(",")):
        cells = [f"{context:,}"]
        for speed in SPEEDS:
            ours = median("still", context, speed)
            cells.append(f"{ours:.1f}")
            for _, engines in peers:
                peer = max(median(engine, context, speed) for engine in engines)
                cells += [f"{peer:.1f}", f"{ours / peer:.2f}"]
        table.append("| " + " | ".join(cells) + " |")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], stdout=subprocess.PIPE, text=True).stdout.strip()
    import llama_cpp

    setting = {
        "command": "python3 " + " ".join(["benches/beside_llama_cpp.py", *(pathlib.Path(a).name if a == args.model else a for a in sys.argv[1:])]),
        "commit": commit,
        "device": f"{cpu()}, {args.threads} threads",
        "llama_cpp_python": llama_cpp.__version__,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"setting": setting, "rounds": rounds}
    (args.out / "beside_llama_cpp.json").write_text(json.dumps(result, indent=1) + "\n")
    said = [f"- {name}: {value}" for name, value in setting.items()]
    text = "\n".join(["Tokens a second, medians of the rounds; llama.cpp: the better of flash attention on and off.", "", *table, "", *said])
    (args.out / "beside_llama_cpp.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
