#!/usr/bin/env python3
"""Draw docs/images/quality.svg: quality against cache bytes of the students in docs/comparison.md.

    pip install matplotlib
    python3 benches/plot_quality.py

Every number is read from a recorded run under benches/results; the script holds none but the teacher's geometry. The left
panel is perplexity over the teacher's in windows of 4,096 tokens, the right panel the pass keys found in 4,096 tokens with
Wilson's 95 % interval.
"""

import json
import math
import pathlib

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"
GPU = RESULTS / "2026-11-25-h100"
CPU = RESULTS / "2026-11-25-epyc-2core"

CONTEXT = 4096
# SmolLM2-135M: layers, key/value heads, head size; keys and values, two bytes each.
TEACHER_BYTES = CONTEXT * 30 * 3 * 64 * 2 * 2

# Name in the plot; in cache_4k.jsonl; in the evaluations; where the label lies in each panel (points from the dot, side).
STUDENTS = [
    ("calibrated", "quickG", "quickG", (-8, -4, "right"), (-8, -13, "right")),
    ("10 of 64", "uniform10G", "uniform10G", (8, 4, "left"), (8, 4, "left")),
    ("paper", "paperG", "paperG", (8, 4, "left"), (8, 4, "left")),
    ("LoLCATs", "lolcats", "lolcats", (8, -4, "left"), (5, 15, "left")),
    ("window only", "window", "window", (8, 4, "left"), (-4, 24, "left")),
]


def models(path):
    """Every model of a result of `still eval --out`, by name."""
    results = json.loads(path.read_text())
    return {model["model"]: model["tasks"] for model in [results, *results["compare"]]}


def wilson(right, n, z=1.959964):
    """Wilson's interval of a share."""
    share = right / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return tuple((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))


def annotate(axes, label, point, place, color):
    x, y, side = place
    axes.annotate(label, point, (x, y), textcoords="offset points", ha=side, color=color)


def main():
    evaluated = {}
    for path in [
        GPU / "eval_long.json",
        CPU / "eval_baselines_perplexity.json",
        CPU / "eval_baselines_passkey.json",
    ]:
        for name, tasks in models(path).items():
            evaluated.setdefault(name, {}).update(tasks)
    lines = (CPU / "cache_4k.jsonl").read_text().splitlines()
    cache = {line["student"]: line for line in map(json.loads, lines)}
    teacher = evaluated["SmolLM2-135M-Instruct.Q4_1.gguf"]

    points = [("teacher", 100.0, teacher, (-8, 8, "right"), (-8, 8, "right"))]
    for label, in_cache, in_evaluation, *places in STUDENTS:
        line = cache[in_cache]
        assert line["context"] == CONTEXT, line
        share = 100 * line["cache_bytes"] / TEACHER_BYTES
        points.append((label, share, evaluated[in_evaluation], *places))

    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "still"})
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for label, share, tasks, at_left, at_right in points:
        color = {"calibrated": "#1b6ca8", "teacher": "#222222"}.get(label, "#9a5b13")
        mark = {"color": color, "markersize": 7, "marker": "o", "linestyle": "none"}
        ratio = tasks["perplexity_4096"]["perplexity"] / teacher["perplexity_4096"]["perplexity"]
        left.plot(share, ratio, **mark)
        annotate(left, label, (share, ratio), at_left, color)
        n = tasks["passkey_4096"]["n"]
        found = round(tasks["passkey_4096"]["score"] * n)
        low, high = wilson(found, n)
        bars = [[100 * max(0.0, found / n - low)], [100 * max(0.0, high - found / n)]]
        right.errorbar(share, 100 * found / n, yerr=bars, capsize=3, elinewidth=1, **mark)
        annotate(right, label, (share, 100 * found / n), at_right, color)
        print(f"{label:12} cache {share:5.1f} %  perplexity x {ratio:.2f}  pass key {found} of {n}")
    left.set_yscale("log")
    left.set_ylim(0.95, 3)
    left.set_yticks([1, 1.25, 1.5, 2, 2.5], ["1", "1.25", "1.5", "2", "2.5"])
    left.minorticks_off()
    left.set_title("perplexity, × the teacher's (lower is better)", fontsize=10, loc="left")
    right.set_title("pass keys found, % of 40 (higher is better)", fontsize=10, loc="left")
    for axes in (left, right):
        teacher_at = 1 if axes is left else 100
        axes.axhline(teacher_at, color="#bbbbbb", linewidth=0.8, linestyle="--", zorder=0)
        axes.set_xlim(-2, 108)
        axes.set_xlabel("attention cache at 4,096 tokens, % of the teacher's bytes")
    right.set_ylim(-4, 112)
    out = ROOT / "docs" / "images" / "quality.svg"
    figure.savefig(out, metadata={"Date": None})
    # matplotlib ends lines of path data in spaces.
    out.write_text("\n".join(line.rstrip() for line in out.read_text().splitlines()) + "\n")


if __name__ == "__main__":
    main()
