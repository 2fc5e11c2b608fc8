#!/usr/bin/env python3
"""`still eval` against EleutherAI's lm-evaluation-harness, item by item.

    pip install lm-eval                 # 0.4.13 was used; needs no PyTorch
    still eval --model MODEL --tasks piqa,mmlu --data-dir DATA --limit 200 --samples S.jsonl --out R.json
    python3 benches/agree_with_harness.py --data DATA --samples S.jsonl --results R.json

The harness builds its own prompts with its own task definitions; only where it fetches its data from is replaced by the local
files. Its model is a small adapter that looks up the log-likelihood `still` has logged for exactly the harness's context and
continuation: a prompt that differs in one letter is not found and fails. Then the harness's own metrics are compared with
ours, every item and every mean and standard error. With --tokenizer (a tokenizer.json) its rule for cutting text into context and
continuation is compared too, by the number of tokens that were read.

Exit code 0 if everything agrees, 1 otherwise. --out writes the counts.
"""

import argparse
import collections
import hashlib
import json
import math
import pathlib
import re
import sys

import datasets
import lm_eval
from lm_eval.api.model import TemplateLM

SHOTS = 5


def read_jsonl(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def key(context, continuation):
    """As `still` recognizes a request."""
    return hashlib.sha256(f"{context}\0{continuation}".encode()).hexdigest()[:16]


# The local files' items in the form of the data sets that the harness's tasks are written for.


def piqa(item):
    goal = item["query"].removeprefix("Question: ").removesuffix("\n")
    return {"goal": goal, "sol1": item["choices"][0], "sol2": item["choices"][1], "label": item["gold"]}


def arc(item):
    labels = [str(n + 1) for n in range(len(item["choices"]))]
    return {
        "question": item["query"],
        "choices": {"text": item["choices"], "label": labels},
        "answerKey": labels[item["gold"]],
    }


def hellaswag(item):
    label, context = item["query"].split(": ", 1)
    *before, last = re.split(r"(?<=[.!?])\s+", context)
    # What ends in mid-sentence is an item from ActivityNet; the harness gives its last sentence a capital.
    if before and last[:1].islower() and last[-1] not in ".!?":
        context, beginning = context[: -len(last)].rstrip(), last
    else:
        beginning = ""
    return {
        "activity_label": label,
        "ctx_a": context,
        "ctx_b": beginning,
        "endings": item["choices"],
        "label": str(item["gold"]),
    }


def winogrande(item):
    first, second = item["context_options"]
    same = 0
    while same < min(len(first), len(second)) and first[same] == second[same]:
        same += 1
    return {
        "sentence": f"{first[:same]}_ {item['continuation']}",
        "option1": first[same:],
        "option2": second[same:],
        "answer": str(item["gold"] + 1),
    }


def lambada(item):
    return {"text": f"{item['context']} {item['continuation']}"}


def mmlu(item):
    return {
        "question": item["query"],
        "choices": item["choices"],
        "answer": item["gold"],
        "subject": item["subject"],
    }


# Our task: the harness's data set, its configuration's name, its split, and the form of an item.
TASKS = {
    "piqa": ("baber/piqa", None, "validation", piqa),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", arc),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", arc),
    "hellaswag": ("Rowan/hellaswag", None, "validation", hellaswag),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", winogrande),
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "test", lambada),
}


class LocalData:
    """Stands where the harness fetches data sets: gives the items that were answered."""

    def __init__(self, data, samples):
        self.splits = {}
        # Ids in the order of the harness's documents, by the harness's task.
        self.ids = {}
        for task, (path, name, split, form) in TASKS.items():
            if task in samples:
                items = read_jsonl(data / f"{task}.jsonl")
                ids = [sample["id"] for sample in samples[task]]
                documents = [form(items[int(id)]) for id in ids]
                self.ids[task] = ids
                # The harness looks at a training split even where it takes nothing from it.
                self.splits[path, name] = {split: documents, "train": documents[:1]}
        if "mmlu" in samples:
            subjects, examples = collections.defaultdict(list), collections.defaultdict(list)
            for item in read_jsonl(data / "mmlu_test.jsonl"):
                subjects[item["subject"]].append(mmlu(item))
            for item in read_jsonl(data / "mmlu_dev.jsonl"):
                examples[item["subject"]].append(mmlu(item))
            for sample in samples["mmlu"]:
                subject, n = sample["id"].split("/")
                self.ids.setdefault(f"mmlu_{subject}", []).append(sample["id"])
                splits = self.splits.setdefault(("cais/mmlu", subject), {"test": [], "dev": examples[subject]})
                splits["test"].append(subjects[subject][int(n)])

    def load(self, path, name=None, **_):
        if (path, name) not in self.splits:
            raise KeyError(f"the harness asks for {path} {name}, of which no item was answered")
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(items) for split, items in self.splits[path, name].items()}
        )


class Logged(TemplateLM):
    """A model that knows what `still` logged, and nothing else."""

    def __init__(self, samples, tokenizer):
        super().__init__()
        self.answers, self.longest, self.unknown = {}, {}, []
        self.encoder = tokenizer
        self.read = collections.defaultdict(int)
        for task in samples.values():
            for sample in task:
                if sample["kind"] == "choice":
                    answers = zip(sample["loglikelihoods"], sample["greedy"])
                else:
                    answers = [(sample["loglikelihood"], sample["greedy"])]
                for asked, answer in zip(sample["asked"], answers):
                    self.answers[asked] = answer

    @property
    def eot_token_id(self):
        return 0

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.encoder.encode(string, add_special_tokens=add_special_tokens is not False).ids

    def loglikelihood(self, requests, disable_tqdm=False):
        if self.encoder is not None:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return [self.answer(*request.args) for request in requests]

    def _loglikelihood_tokens(self, requests, **_):
        for (context, continuation), before, after in requests:
            self.read[key(context, continuation)] = len(before) + len(after) - 1
        return [self.answer(*texts) for texts, _, _ in requests]

    def answer(self, context, continuation):
        found = self.answers.get(key(context, continuation))
        if found is None:
            self.unknown.append((context, continuation))
            return (-math.inf, False)
        return tuple(found)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError


def evaluate(tasks, shots, model):
    results = lm_eval.simple_evaluate(
        model=model, tasks=tasks, num_fewshot=shots, bootstrap_iters=1000, log_samples=True
    )
    return results["results"], results["samples"]


def close(a, b, tolerance=1e-9):
    if a is None or isinstance(a, str) or b is None:
        # The harness says "N/A", we say nothing.
        return (a is None or isinstance(a, str)) and b is None
    return abs(a - b) <= tolerance * max(1.0, abs(a))


def compare_items(name, ids, theirs, ours, differences):
    """Counts the items whose metrics are all the same."""
    agreeing = 0
    by_document = {sample["doc_id"]: sample for sample in theirs}
    for document, id in enumerate(ids):
        sample, mine = by_document[document], ours[id]["scores"]
        pairs = [(metric, sample[metric], mine[metric]) for metric in ("acc", "acc_norm") if metric in sample]
        if "perplexity" in sample:
            pairs.append(("perplexity", -sample["perplexity"], mine["perplexity"]))
        wrong = [pair for pair in pairs if not close(pair[1], pair[2])]
        agreeing += not wrong
        differences += [f"{name}, item {id}: {metric} {a} there, {b} here" for metric, a, b in wrong]
    return agreeing


def compare_means(name, theirs, ours, differences):
    for metric in ("acc", "acc_norm", "perplexity"):
        if f"{metric},none" not in theirs:
            continue
        stderr = "stderr" if metric == "acc" else f"{metric}_stderr"
        pairs = [(metric, theirs[f"{metric},none"], ours[metric])]
        # The harness draws perplexity's standard error by bootstrap; ours is computed.
        if metric != "perplexity":
            pairs.append((stderr, theirs[f"{metric}_stderr,none"], ours[stderr]))
        differences += [
            f"{name}: {what} {a} there, {b} here" for what, a, b in pairs if not close(a, b, 1e-9)
        ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="the directory of --data-dir")
    parser.add_argument("--samples", type=pathlib.Path, required=True, help="log of `still eval --samples`")
    parser.add_argument("--results", type=pathlib.Path, help="results of `still eval --out`: means are compared too")
    parser.add_argument("--tokenizer", help="the model's tokenizer.json: numbers of tokens are compared too")
    parser.add_argument("--model", help="which model of the log, if it has several")
    parser.add_argument("--out", type=pathlib.Path, help="write the counts here (JSON)")
    args = parser.parse_args()

    lines = [line for line in read_jsonl(args.samples) if "task" in line]
    models = sorted({line["model"] for line in lines})
    model = args.model or models[0]
    if args.model is None and len(models) > 1:
        parser.error(f"the log has several models, name one with --model: {', '.join(models)}")
    samples = collections.defaultdict(list)
    for line in lines:
        if line["model"] == model and line["task"] in (*TASKS, "mmlu"):
            samples[line["task"]].append(line)
    if not samples:
        parser.error(f"no samples of {model} that the harness has tasks for")

    tokenizer = None
    if args.tokenizer:
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(args.tokenizer)
    data, logged = LocalData(args.data, samples), Logged(samples, tokenizer)
    datasets.load_dataset = data.load

    means, items = {}, {}
    short = [task for task in samples if task != "mmlu"]
    runs = [(short, None)] if short else []
    if "mmlu" in samples:
        runs.append((["mmlu"], SHOTS))
    for tasks, shots in runs:
        found, logs = evaluate(tasks, shots, logged)
        means.update(found)
        items.update(logs)

    differences = [
        f"the harness asks what we did not: {context[-60:]!r} … {continuation!r}"
        for context, continuation in logged.unknown
    ]
    counts = {}
    for task, own in samples.items():
        ours = {sample["id"]: sample for sample in own}
        parts = [task] if task != "mmlu" else [name for name in data.ids if name.startswith("mmlu_")]
        agreeing = sum(compare_items(part, data.ids[part], items[part], ours, differences) for part in parts)
        counts[task] = {"items": len(own), "agreeing": agreeing}
        if tokenizer is not None:
            for sample in own:
                longest = max(logged.read.get(asked, -1) for asked in sample["asked"])
                if longest != sample["tokens"] and not sample.get("truncated"):
                    differences.append(f"{task}, item {sample['id']}: {longest} tokens there, {sample['tokens']} here")
    if args.results:
        results = json.loads(args.results.read_text(encoding="utf-8"))
        of_models = [results, *results.get("compare", [])]
        own = next(found["tasks"] for found in of_models if found["model"] == model)
        for task in samples:
            compare_means(task, means[task], own[task], differences)

    for difference in differences[:40]:
        print(difference)
    for task, count in counts.items():
        print(f"{task}: {count['agreeing']} of {count['items']} items agree")
    print(f"lm-eval {lm_eval.__version__}, {model}: {len(differences)} differences")
    if args.out:
        report = {
            "lm_eval": lm_eval.__version__,
            "model": model,
            "tasks": counts,
            "differences": differences,
            "means_compared": bool(args.results),
            "tokens_compared": tokenizer is not None,
        }
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
