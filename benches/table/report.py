#!/usr/bin/env python3
"""Tables and plots of the rows that `run.py --bring DIR` copied.

    pip install matplotlib
    benches/table/report.py benches/results/DATE-DEVICE/table --markdown table.md --images docs/images

Every number is computed from the answers (`SUITE.jsonl.gz`) and results (`*.json`) in DIR; the script holds none. A suite's
score is the mean over its tasks: of multiple choice less chance, of likelihoods the mean loss in nats a token. Intervals are
paired bootstraps over items, task by task (10,000 resamples, seed 0), as `still eval --compare` makes them.
"""

import argparse
import collections
import functools
import gzip
import json
import math
import pathlib
import sys
import zlib

import matplotlib
import numpy as np

import rows

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "still"
import matplotlib.pyplot as plt  # noqa: E402

RESAMPLES = 10_000
REFERENCE = "ours-10"
# Score of an item that a suite is known by; `nll` where less is better.
SUITES = {
    "short": ("short tasks", "acc"),
    "mmlu": ("MMLU", "acc"),
    "ruler": ("RULER", "score"),
    "babilong": ("BABILong", "score"),
    "passkey": ("pass key", "score"),
    "facts": ("planted facts", "score"),
    "repeated_text": ("repeated text, nats", "nll"),
    "perplexity": ("held-out text, nats", "nll"),
}
LONG = ["ruler", "babilong", "passkey", "facts", "repeated_text"]


class Model:
    """What one model answered: of every task, parts of an item's score and their weights."""

    def __init__(self):
        # (suite, length) -> task -> item -> [(sum, weight), …]
        self.answers = collections.defaultdict(lambda: collections.defaultdict(dict))
        self.bytes = collections.defaultdict(list)
        self.chance = {}
        self.compression = None
        self.recipe = None
        self.generations = []
        self.efficiency = []
        # Of its variants without some branches: name, difference to it by task and metric.
        self.branches = []


def parts(sample, kind):
    """As the program resamples: whole items, and of windows blocks of tokens."""
    if sample["kind"] == "window":
        return sample["blocks"]
    return [(sample["scores"]["acc" if kind == "acc" else kind], 1)]


def suite_of(file, task):
    suite = rows.suite_of(file)
    if suite != "recall":
        return suite
    return "passkey" if task.startswith("passkey") else "repeated_text"



def same_question(asked, sample, row):
    """Ends the script if another row's item of this name asked something else, such as of another text: rows are compared by item."""
    # Answers of old have no digest of the question.
    if "asked" not in sample:
        return
    item = f"{sample['id']} of {sample['task']}"
    question, first = asked.setdefault(item, (sample["asked"], row))
    if question != sample["asked"]:
        sys.exit(f"{item} is not the same question in {first} and in {row}: give every row the same texts")


def read(folder):
    """Every model of the rows, by name: a row's own is called by the row, its variants by row and variant."""
    models = collections.defaultdict(Model)
    # What each item asked, and of which row.
    asked = {}
    for row in rows.ROWS:
        for path in sorted((folder / row).glob("*.json")):
            if path.stem in ("train", "dry_run"):
                continue
            if path.stem == "generation":
                models[row].generations = json.loads(path.read_text())
                continue
            results = json.loads(path.read_text())
            own = results["model"]

            def name(model, row=row, own=own):
                variant = model[len(own) :].strip() if model.startswith(own) else model
                # A row of variants has its base's answers too: those are another row's.
                if rows.ROWS[row].compress:
                    return variant.strip("[]") if variant else None
                if rows.ROWS[row].ablate:
                    return f"{row} {variant}" if variant else None
                return f"{row} {variant}".strip()

            if path.stem == "efficiency":
                models[row].efficiency = results.get("efficiency", {}).get("points", [])
                continue
            if path.stem == "branches":
                variants = [(result["ablation"], result["difference"]) for result in results.get("compare", [])]
                models[row].branches = variants
                continue
            lengths = {}
            for result in [results, *results.get("compare", [])]:
                called = name(result["model"])
                for task, scores in result["tasks"].items():
                    lengths[task] = scores.get("length")
                    if called is None:
                        continue
                    key = (suite_of(path.stem, task), lengths[task])
                    if scores.get("cache_bytes"):
                        models[called].bytes[key].append(scores["cache_bytes"])
                    models[called].chance[task] = scores.get("chance") or 0.0
                if called is not None:
                    models[called].compression = result.get("compression")
                    models[called].recipe = result.get("recipe")
            samples = path.with_suffix(".jsonl.gz")
            if not samples.exists():
                continue
            with gzip.open(samples, "rt") as lines:
                for line in lines:
                    sample = json.loads(line)
                    called = name(sample["model"])
                    if "task" not in sample or called is None or sample["task"] not in lengths:
                        continue
                    task = sample["task"]
                    same_question(asked, sample, row)
                    suite = suite_of(path.stem, task)
                    kind = SUITES[suite][1]
                    models[called].answers[suite, lengths[task]][task][sample["id"]] = parts(sample, kind)
    return dict(models)


@functools.cache
def picks(task, items):
    """How often each of a task's items counts in each resample, `[R, items]`: the same for every model."""
    rng = np.random.default_rng([0, zlib.crc32(task.encode())])
    counts = np.empty((RESAMPLES, items), np.uint8)
    for start in range(0, RESAMPLES, 500):
        drawn = rng.integers(0, items, (500, items)) + items * np.arange(500)[:, None]
        counts[start : start + 500] = np.bincount(drawn.ravel(), minlength=500 * items).reshape(500, items)
    return counts


def resampled(pick, values):
    """Sums over items as `pick` counts them."""
    return np.concatenate([pick[start : start + 500].astype(np.float32) @ values.astype(np.float32) for start in range(0, RESAMPLES, 500)])


def task_mean(items, chance, pick=None):
    """Mean over the parts of items, less chance; `pick` says how often each item counts (`[R, items]`)."""
    sums = np.array([sum(part[0] for part in item) for item in items])
    weights = np.array([sum(part[1] for part in item) for item in items], float)
    if pick is None:
        return sums.sum() / weights.sum() - chance
    return resampled(pick, sums) / resampled(pick, weights) - chance


def compared(model, other, key):
    """What `model` has more than `other` in a suite, with its 95 % interval; relative to `other` too."""
    differences, others = [], []
    for task, answers in sorted(model.answers[key].items()):
        theirs = other.answers[key].get(task, {})
        both = sorted(set(answers) & set(theirs))
        if not both:
            continue
        chance = model.chance.get(task, 0.0) if SUITES[key[0]][1] == "acc" else 0.0
        # Of windows the blocks are drawn: each is an item.
        a = [[part] for item in both for part in answers[item]]
        b = [[part] for item in both for part in theirs[item]]
        pick = picks(task, len(a))
        one, two = task_mean(a, chance, pick), task_mean(b, chance, pick)
        differences.append((task_mean(a, chance) - task_mean(b, chance), one - two))
        others.append((task_mean(b, chance), two))
    if not differences:
        return None
    value = float(np.mean([value for value, _ in differences]))
    drawn = np.mean([drawn for _, drawn in differences], 0)
    base = float(np.mean([value for value, _ in others]))
    drawn_base = np.mean([drawn for _, drawn in others], 0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = drawn / drawn_base
    return {
        "difference": (value, float(low), float(high)),
        "relative": (value / base, *map(float, np.quantile(ratio, [0.025, 0.975]))) if base > 0 and np.isfinite(ratio).all() else None,
    }


def score(model, key):
    """Mean over a suite's tasks; `None` where nothing was asked."""
    tasks = model.answers.get(key, {})
    acc = SUITES[key[0]][1] == "acc"
    means = [task_mean(list(items.values()), model.chance.get(task, 0.0) if acc else 0.0) for task, items in tasks.items() if items]
    return float(np.mean(means)) if means else None


def shown(suite, value):
    if value is None:
        return ""
    return f"{value:.3f}" if SUITES[suite][1] == "nll" else f"{100 * value:.1f}"


def interval(suite, found):
    if found is None:
        return ""
    scale, digits = (1, 3) if SUITES[suite][1] == "nll" else (100, 1)
    value, low, high = (scale * x for x in found)
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def table(headers, lines):
    yield "| " + " | ".join(headers) + " |"
    yield "|" + "---|" * len(headers)
    yield from ("| " + " | ".join(line) + " |" for line in lines)
    yield ""


def cache_share(model, teacher, key):
    """Bytes of the cache in a suite over the teacher's."""
    if not model.bytes.get(key) or not teacher.bytes.get(key):
        return None
    return float(np.mean(model.bytes[key]) / np.mean(teacher.bytes[key]))


def ordered(models):
    names = {name: n for n, name in enumerate(rows.ROWS)}
    return sorted(models, key=lambda name: (names.get(name.split(" ")[0], len(names)), name))


def columns(models):
    """Suites and lengths that anything was asked in, in the order of `SUITES`."""
    keys = {key for model in models.values() for key in model.answers}
    order = list(SUITES)
    return sorted(keys, key=lambda key: (order.index(key[0]), key[1] or 0))


def titled(key):
    suite, length = key
    return SUITES[suite][0] + (f" {length}" if length else "")


def markdown(models):
    teacher = models.get("teacher")
    keys = columns(models)
    longest = max((key for key in keys if key[1]), key=lambda key: (key[0] == "ruler", key[1]), default=None)
    yield "## Scores\n"
    yield "Per cent, of multiple choice less chance; likelihoods in nats a token, where less is better. *Cache*: bytes compared"
    yield f"with the dense model's, in {titled(longest)}.\n"
    lines = []
    for name in ordered(models):
        model = models[name]
        if not model.answers:
            continue
        share = cache_share(model, teacher, longest) if teacher and longest else None
        aware = model.compression and model.compression["sees_question"]
        lines.append([
            name + (" (sees the question)" if aware and "sees" not in name else ""),
            "" if share is None else f"{100 * share:.1f} %",
            *(shown(key[0], score(model, key)) for key in keys),
        ])
    yield from table(["model", "cache", *map(titled, keys)], lines)
    if teacher:
        yield "## Recovery\n"
        yield "Score over the dense model's, per cent, with the paired 95 % interval.\n"
        wanted = [key for key in keys if SUITES[key[0]][1] != "nll"]
        lines = []
        for name in ordered(models):
            if name == "teacher":
                continue
            cells = []
            for key in wanted:
                found = compared(models[name], teacher, key)
                relative = found and found["relative"]
                cells.append("" if not relative else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 + 100 * x for x in relative)))
            lines.append([name, *cells])
        yield from table(["model", *map(titled, wanted)], lines)
    reference = models.get(REFERENCE)
    if reference:
        yield f"## What {REFERENCE} has more\n"
        yield "Points, of likelihoods nats (less than 0 is better), with the paired 95 % interval.\n"
        lines = []
        for name in ordered(models):
            if name == REFERENCE:
                continue
            found = [compared(reference, models[name], key) for key in keys]
            lines.append([name, *(interval(key[0], f and f["difference"]) for key, f in zip(keys, found))])
        yield from table([f"{REFERENCE} less", *map(titled, keys)], lines)
        lines = []
        for key in (key for key in keys if key[0] == "ruler"):
            for name in ("lolcats", "paper"):
                if name in models and (found := compared(reference, models[name], key)):
                    relative = found["relative"]
                    told = "no score to compare with" if not relative else "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*(100 * x for x in relative))
                    lines.append([titled(key), name, told])
        if lines:
            yield "### Relative improvement\n"
            yield from table(["suite", "compared with", "improvement"], lines)
    yield from branches(models)
    yield from generations(models)
    yield from speeds(models)


def branches(models):
    """What a student has more than its variants, as the program found it."""
    for name in ordered(models):
        variants = models[name].branches
        if not variants:
            continue
        tasks = sorted({(task, metric) for _, difference in variants for task in difference for metric in difference[task]})
        yield f"## Branches of {name}\n"
        yield "What the whole student has more than what is left of it, with the paired 95 % interval.\n"
        lines = []
        for variant, difference in variants:
            cells = []
            for task, metric in tasks:
                found = difference.get(task, {}).get(metric)
                ends = found and (found["mean"], found["low"], found["high"])
                cells.append(interval("perplexity" if metric == "nll" else "ruler", ends))
            lines.append([variant, *cells])
        yield from table(["left", *(f"{task}, {metric}" for task, metric in tasks)], lines)


def distinct(words, n):
    grams = list(zip(*(words[i:] for i in range(n))))
    return len(set(grams)) / len(grams) if grams else math.nan


def generations(models):
    lines = []
    for name in ordered(models):
        written = [page.get("text", "").split() for page in models[name].generations]
        written = [words for words in written if len(words) >= 4]
        if not written:
            continue
        means = [np.mean([distinct(words, n) for words in written]) for n in (1, 2, 3)]
        repeated = np.mean([1 - distinct(words, 4) for words in written])
        lines.append([name, str(len(written)), *(f"{mean:.3f}" for mean in means), f"{100 * repeated:.1f} %"])
    if lines:
        yield "## Generation\n"
        yield "Greedy continuations of held-out pages. *Distinct-n*: different runs of n words over all. *Repeated*: runs of four"
        yield "words that the same continuation had before.\n"
        yield from table(["model", "pages", "distinct-1", "distinct-2", "distinct-3", "repeated"], lines)


def speeds(models):
    lines = []
    for name in ordered(models):
        for point in models[name].efficiency:
            lines.append([
                name, f"{point['context']:,}", f"{point['cache_bytes']:,}",
                f"{point['prefill_tokens_per_s']:,.0f}", f"{point['decode_tokens_per_s']:,.1f}",
            ])
    if lines:
        yield "## Bytes and speed\n"
        yield from table(["model", "context", "cache, bytes", "prefill tokens/s", "decode tokens/s"], lines)


# How the plot draws rows: name in its legend, marker. Others are left out: seeds, ablations.
DRAWN = {
    "ours-untrained": ("STILL, calibrated, not trained", "o"),
    "uniform": ("STILL, the same budget in every head", "o"),
    "random": ("random routing", "o"),
    "paper": ("STILL as published", "s"),
    "still-released": ("STILL, its authors' code", "s"),
    "lolcats": ("LoLCATs", "D"),
    "lola": ("LoLA", "D"),
    "hedgehog": ("Hedgehog", "D"),
    "window-only": ("window only", "v"),
    "streaming-llm": ("StreamingLLM, trained", "v"),
    # Compressions of the teacher's cache, by method.
    **{f"{method}:": (f"teacher with {method}" + (" (sees the question)" if method == "snapkv" else ""), "x") for method in rows.METHODS},
}
OURS = ["ours-6", "ours-10", "ours-20"]


def plot_quality(models, images):
    """RULER's mean against the share of the dense bytes, a panel a length."""
    keys = [key for key in columns(models) if key[0] == "ruler"]
    teacher = models.get("teacher")
    if not keys or not teacher:
        return None
    figure, axes = plt.subplots(1, len(keys), figsize=(5 * len(keys), 4), squeeze=False)
    named = {}
    for axis, key in zip(axes[0], keys):
        groups = collections.defaultdict(list)
        for name in ordered(models):
            share, value = cache_share(models[name], teacher, key), score(models[name], key)
            if share is None or value is None or name == "teacher":
                continue
            compression = models[name].compression
            group = "ours" if name in OURS else compression["method"] + ":" if compression else name.split(" ")[0]
            groups[group].append((100 * share, 100 * value))
        axis.axhline(100 * score(teacher, key), color="black", linewidth=1, linestyle=":")
        axis.annotate("the teacher, whole cache", (100, 100 * score(teacher, key)), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=8)
        if groups["ours"]:
            named["STILL, calibrated: 6, 10 and 20 %"], = axis.plot(*zip(*sorted(groups["ours"])), "-o", color="tab:blue", linewidth=2)
        for n, (group, (label, marker)) in enumerate(DRAWN.items()):
            if groups[group]:
                color = plt.get_cmap("tab20")((n + 2) % 20)
                named[label], = axis.plot(*zip(*sorted(groups[group])), marker=marker, color=color, linestyle="--", linewidth=0.8)
        ticks = [3, 5, 10, 20, 50, 100]
        axis.set(xscale="log", xlim=(2.5, 110), xlabel="cache, % of the dense model's bytes", ylabel="RULER, mean of 12 tasks, %")
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.set_title(f"{key[1]:,} tokens")
    order = ["STILL, calibrated: 6, 10 and 20 %", *(label for label, _ in DRAWN.values())]
    labels = [label for label in order if label in named]
    figure.legend([named[label] for label in labels], labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncol=3, fontsize=8, frameon=False)
    figure.tight_layout()
    path = images / "quality.svg"
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    return path


def plot_heads(models, images):
    """Recall against the number of KV heads that keep every token: of ours, by share."""
    points = []
    for name in ordered(models):
        attention = (models[name].recipe or {}).get("attention", {})
        budgets, chunk = attention.get("budgets"), attention.get("chunk")
        keys = [key for key in columns(models) if key[0] == "ruler"]
        if not budgets or not keys or models[name].compression:
            continue
        whole = sum(budget >= chunk for layer in budgets for budget in layer)
        value = score(models[name], keys[-1])
        if value is not None:
            points.append((whole, 100 * value, name))
    if not points:
        return None
    figure, axis = plt.subplots(figsize=(5.5, 4.5))
    for whole, value, name in points:
        axis.plot(whole, value, "o")
        axis.annotate(name, (whole, value), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axis.set(xlabel="KV heads that keep every token", ylabel="RULER, mean score, %")
    figure.tight_layout()
    path = images / "whole_heads.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="what run.py --bring copied")
    parser.add_argument("--markdown", type=pathlib.Path, help="write the tables here; standard output without it")
    parser.add_argument("--images", type=pathlib.Path, help="write plots here")
    args = parser.parse_args()
    models = read(args.folder)
    if not models:
        parser.error(f"{args.folder} has no results of a row")
    text = "\n".join(markdown(models))
    if args.markdown:
        args.markdown.write_text(text)
    else:
        print(text)
    if args.images:
        args.images.mkdir(parents=True, exist_ok=True)
        for draw in (plot_quality, plot_heads):
            if (path := draw(models, args.images)) is not None:
                print(path)


if __name__ == "__main__":
    main()
