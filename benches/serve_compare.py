#!/usr/bin/env python3
"""`still serve` and llama.cpp's server in turn: requests finished a minute of clients with long, distinct prompts.

    pip install 'llama-cpp-python[server]'        # builds from source; not needed for anything else here
    cargo build --release
    python3 benches/serve_compare.py --student demo --gguf BASE.gguf --out benches/results/NAME/serve_compare.json

Both answer the same prompts, one server at a time, with equal threads. 4 clients ask at once, each --each times (1): prompts of
6,000 tokens that have no beginning in common, 128 new tokens, greedy, past every end of sequence. The record has every round,
medians and the ratio, and is written after each round. The base should be the student's own, so that both compute with the same
weights. Three rounds of a model of 135 million weights take about eight minutes on two cores.
"""

import argparse
import concurrent.futures
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from serving import Server, about

WORDS = (
    "sea ship wind harbour sail storm rope gull tide captain lantern map island anchor bell fog letter coin the a of "
    "and in to was old grey small far away under before slowly never again river stone garden winter morning paper"
).split()


class LlamaCpp:
    """llama-cpp-python's server on a free port."""

    def __init__(self, options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        # Room for the prompt in another tokenizer's count, too.
        context = options.prompt_tokens + options.new_tokens + 256
        command = [options.llama_python, "-m", "llama_cpp.server", "--model", options.gguf, "--host", "127.0.0.1"]
        command += ["--port", str(port), "--n_ctx", str(context), "--n_batch", "512", "--verbose", "false"]
        command += ["--n_threads", str(options.threads), "--n_threads_batch", str(options.threads), "--flash_attn", "true"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(self.url + "/v1/models", timeout=5):
                    return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    self.process.kill()
                    raise RuntimeError(f"llama_cpp.server does not listen: {self.process.stderr.read()[-2000:]}")
                time.sleep(0.2)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=3600) as answer:
        return json.load(answer)


def prompts(options, server, count, seed):
    """Distinct texts of so many tokens."""
    texts = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        text = " ".join(rng.choice(WORDS) for _ in range(2 * options.prompt_tokens))
        # The shortest beginning with enough tokens.
        tokens = post(server.url + "/tokenize", {"prompt": text})["tokens"]
        assert len(tokens) >= options.prompt_tokens
        texts.append(post(server.url + "/detokenize", {"tokens": tokens[: options.prompt_tokens]})["prompt"])
    return texts


def finish(options, url, texts, more):
    """Seconds in which the clients have all answers, and the tokens of each prompt."""

    def ask(text):
        body = {"prompt": text, "max_tokens": options.new_tokens, "temperature": 0, **more}
        usage = post(url + "/v1/completions", body)["usage"]
        assert usage["completion_tokens"] >= options.new_tokens - 1, usage
        return usage["prompt_tokens"]

    # Weights and threads are there.
    post(url + "/v1/completions", {"prompt": "The sea", "max_tokens": 4, "temperature": 0})
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(options.clients) as clients:
        tokens = list(clients.map(ask, texts))
    return time.perf_counter() - started, tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--still", default="target/release/still")
    parser.add_argument("--student", default="demo")
    parser.add_argument("--gguf", required=True, help="the student's base, for llama.cpp")
    parser.add_argument("--llama-python", default=sys.executable, help="Python that has llama_cpp.server")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--each", type=int, default=1, help="requests of each client in a round")
    parser.add_argument("--prompt-tokens", type=int, default=6000)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the record")
    options = parser.parse_args()
    record = about(options.still)
    version = "import llama_cpp; print(llama_cpp.__version__)"
    version = subprocess.run([options.llama_python, "-c", version], capture_output=True, text=True, check=True)
    record |= {"llama_cpp_python": version.stdout.strip(), "student": options.student, "gguf": Path(options.gguf).name}
    record |= {name: getattr(options, name) for name in ("clients", "each", "prompt_tokens", "new_tokens", "threads")}
    count, rounds = options.clients * options.each, []
    for number in range(options.rounds):
        with Server(options.still, options.student, "--threads", str(options.threads)) as server:
            texts = prompts(options, server, count, number)
            seconds, tokens = finish(options, server.url, texts, {"ignore_eos": True})
        still = 60 * count / seconds
        with LlamaCpp(options) as server:
            seconds, others = finish(options, server.url, texts, {"min_tokens": options.new_tokens})
        llama = 60 * count / seconds
        # The same work: tokens of the same prompts.
        assert all(abs(one - other) <= 8 for one, other in zip(tokens, others)), (tokens, others)
        rounds.append({"still_per_minute": round(still, 2), "llama_cpp_per_minute": round(llama, 2), "ratio": round(still / llama, 2)})
        print(f"round {number + 1}: still {still:.2f}, llama.cpp {llama:.2f} requests/min: {still / llama:.2f} ×", flush=True)
        record["rounds"] = rounds
        record["medians"] = {name: statistics.median(line[name] for line in rounds) for name in rounds[0]}
        text = json.dumps(record, indent=1)
        if options.out:
            options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
