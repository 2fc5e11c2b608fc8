#!/usr/bin/env python3
"""lm-evaluation-harness with a student in transformers against `still eval`, item by item.

    pip install lm-eval torch transformers
    still export --model my-student --transformers DIR --dtype f32
    still eval --model DIR --tasks piqa,arc_easy --data-dir DATA --limit 200 --cache-dtype f32 --samples S.jsonl
    python3 benches/harness_in_transformers.py --folder DIR --data DATA --samples S.jsonl

The harness runs its own tasks on the local files, as `agree_with_harness.py` has it do. Its model is its own, too: `--model hf
--model_args pretrained=DIR,trust_remote_code=True,dtype=float32`. With the package still-llm, its kernels compute attention;
--without-kernels leaves it to PyTorch.

transformers keeps exact rows in the model's dtype, whatever the student's configuration says: hence --cache-dtype f32.

An item agrees if every metric is the same. One that does not is listed with the difference between its two best scores: where
that is below 1e-4, either is right. Exit code 1 if another item differs, or a log-likelihood by 3e-4 and more.

The harness makes log-probabilities of logits in their own dtype. PyTorch's float32 log-softmax over 49,152 tokens is off by some
1e-5 nats a token, all in one direction, whatever the model: 1.2e-3 nats of 149 tokens. So it is asked for float64 here.
--softmax-dtype float32 leaves it as `lm-eval` has it; log-likelihoods may then differ by 1e-5 nats a token more.
"""

import argparse
import collections
import json
import pathlib
import sys
import time

import datasets
import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from agree_with_harness import LocalData, read_jsonl

TIE = 1e-4
"""Two scores that differ by less are as good as equal."""
MOST = 3e-4
"""Nats that a log-likelihood may differ by: both sides compute in float32, and a continuation has up to 170 tokens."""
FLOAT32 = 1e-5
"""Nats that PyTorch's float32 log-softmax may be off by, for each token."""


def loglikelihoods(sample):
    """Of a sample of the harness, in the order of its requests."""
    return [response[0] if isinstance(response[0], float) else response[0][0] for response in sample["resps"]]


def own_loglikelihoods(sample):
    return sample["loglikelihoods"] if sample["kind"] == "choice" else [sample["loglikelihood"]]


def gap(metric, sample, choices):
    """Between the two best of an item's scores; of a continuation there is one score."""
    scores = own_loglikelihoods(sample)
    if len(scores) < 2:
        return float("inf")
    if metric == "acc_norm":
        scores = [score / len(choice) for score, choice in zip(scores, choices)]
    best, second = sorted(scores, reverse=True)[:2]
    return best - second


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="what `still export --transformers` wrote")
    parser.add_argument("--data", type=pathlib.Path, required=True, help="the directory of --data-dir")
    parser.add_argument("--samples", type=pathlib.Path, required=True, help="log of `still eval --samples`")
    parser.add_argument("--without-kernels", action="store_true", help="attention in PyTorch, though still-llm is there")
    parser.add_argument("--softmax-dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=pathlib.Path, help="write the counts here (JSON)")
    args = parser.parse_args()

    samples = collections.defaultdict(list)
    for line in read_jsonl(args.samples):
        if "task" in line:
            samples[line["task"]].append(line)
    data = LocalData(args.data, samples)
    datasets.load_dataset = data.load

    model = HFLM(
        pretrained=args.folder,
        trust_remote_code=True,
        dtype="float32",
        softmax_dtype=args.softmax_dtype,
        device="cpu",
        batch_size=args.batch_size,
    )
    operators = sys.modules[type(model.model).__module__.rsplit(".", 1)[0] + ".hybrid_attention"]
    if args.without_kernels:
        operators.KERNELS = None
    kernels = operators.KERNELS is not None
    started = time.monotonic()
    found = lm_eval.simple_evaluate(model=model, tasks=list(samples), bootstrap_iters=0, log_samples=True)
    seconds = time.monotonic() - started

    counts, listed, failed = {}, [], False
    for task, own in samples.items():
        theirs = {sample["doc_id"]: sample for sample in found["samples"][task]}
        agreeing, largest = 0, 0.0
        for document, mine in enumerate(own):
            sample = theirs[document]
            pairs = list(zip(loglikelihoods(sample), own_loglikelihoods(mine)))
            difference = max(abs(a - b) for a, b in pairs)
            largest = max(largest, difference)
            metrics = [name for name in ("acc", "acc_norm") if name in sample and sample[name] != mine["scores"][name]]
            agreeing += not metrics
            choices = read_jsonl(args.data / f"{task}.jsonl")[int(mine["id"])].get("choices", [])
            for metric in metrics:
                margin = gap(metric, mine, choices)
                failed |= margin >= TIE
                listed.append(
                    f"{task}, item {mine['id']}: {metric} {sample[metric]} there, {mine['scores'][metric]} here; "
                    f"the two best scores differ by {margin:.2e}"
                )
            most = MOST + (FLOAT32 * mine["tokens"] if args.softmax_dtype == "float32" else 0.0)
            if difference >= most:
                failed = True
                listed.append(f"{task}, item {mine['id']}: a log-likelihood differs by {difference:.2e}")
        counts[task] = {"items": len(own), "agreeing": agreeing, "largest_difference_nats": largest}

    print(*listed, sep="\n")
    for task, count in counts.items():
        largest = count["largest_difference_nats"]
        print(f"{task}: {count['agreeing']} of {count['items']} items agree; log-likelihoods within {largest:.1e} nats")
    by = "still's kernels" if kernels else "PyTorch"
    versions = {"lm_eval": lm_eval.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    print(*(f"{name} {version}" for name, version in versions.items()), f"attention by {by}, {seconds:.0f} s", sep=", ")
    if args.out:
        ran = {**versions, "kernels": kernels, "softmax_dtype": args.softmax_dtype, "seconds": seconds}
        report = {**ran, "tasks": counts, "listed": listed}
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    main()
