"""The rows of the table: how each model is made, and at which bytes.

A student's row is a built-in recipe and what is set in it. All students train on the same texts, and on as many tokens: 12 M
over both stages, or in stage 2 alone where a student has no feature maps to train; windows of 1,024 to 8,192 tokens, a quarter
of the steps each.
"""

import re

BLOCK = 256
# Windows of 3,840 tokens on the mean, two a step: 781 steps are 6 M tokens.
LENGTHS = {
    "data.lengths": "[1024, 2048, 4096, 8192]",
    "data.length_weights": "[0.25, 0.25, 0.25, 0.25]",
    "data.min_length": "256",
    "data.heldout": "0.005",
    "transfer.batch": "2",
    "finetune.batch": "2",
    "evaluation.every": "0",
    "evaluation.keep_best": "false",
}
STAGES = {"transfer.steps": "781", "finetune.steps": "781"}
# A student without feature maps has nothing to learn in stage 1.
ONE_STAGE = {"transfer.steps": "0", "finetune.steps": "1562"}


class Row:
    """A model of the table."""

    def __init__(self, about, recipe=None, seed=0, stages=STAGES, compress=None, ablate=None, of=None, train=True, **sets):
        self.about = about
        self.recipe = recipe
        self.seed = seed
        # `_` in place of `.` is for Python alone: attention__cap is attention.cap.
        own = {key.replace("__", "."): value for key, value in sets.items()}
        self.sets = {**LENGTHS, **stages, **own} if recipe else {}
        # `--compress` of the teacher, or `--ablate` of another row's student.
        self.compress = compress
        self.ablate = ablate
        # The row whose model this changes.
        self.of = "teacher" if compress else of
        # Without training only budgets are found (`--training-free`).
        self.train = train

    @property
    def trains(self):
        return self.recipe is not None

    @property
    def cache_dtype(self):
        """Of exact rows: 16 bits, unless the student says otherwise."""
        says = self.recipe == "still-10" or "attention.rows" in self.sets
        return [] if says else ["--cache-dtype", "bf16"]


def ours(about, share, **more):
    """`still-10` at a share of the dense cache, at the table's tokens."""
    return Row(about, "still-10", calibration__cache_fraction=str(share), **more)


def uniform(about, **more):
    """The same budget for every head: 8 of every 64 tokens in int8 take 9.7 % of SmolLM2's dense bytes at 8k."""
    # An override cannot take a table away, so the base is a recipe without [calibration].
    sets = {"attention__budget": "8", "attention__rows": '"int8"', **more}
    return Row(about, "uniform", **OURS, **sets)


# The training of `still-10`, for rows whose recipe has another.
OURS = {
    "transfer__optimizer__lr": "1e-2",
    "transfer__optimizer__warmup": "40",
    "finetune__objective": '"logit_kl"',
    "finetune__train_attention": "true",
    "finetune__recompute": "true",
    "finetune__optimizer__lr": "1e-3",
    "finetune__optimizer__warmup": "40",
}

METHODS = ["snapkv", "kvzip", "duo_attention", "h2o", "streaming_llm", "random"]

ROWS = {
    "teacher": Row("the dense model"),
    # Ours.
    "ours-6": ours("calibrated, 6 % of the dense bytes at 8k, rows in int4", 0.06, attention__rows='"int4"'),
    "ours-10": ours("calibrated, 10 %, rows in int8", 0.1),
    "ours-10-seed1": ours("the same, seed 1", 0.1, seed=1),
    "ours-10-seed2": ours("the same, seed 2", 0.1, seed=2),
    "ours-10-int4": ours("calibrated, 10 %, rows in int4: more whole heads for the same bytes", 0.1, attention__rows='"int4"'),
    "ours-20": ours("calibrated, 20 %, rows in int8", 0.2),
    "ours-untrained": Row("calibrated, 10 %, not trained", "still-10", train=False),
    "uniform": uniform("the same budget for every head, at the bytes of 10 %"),
    "random": uniform("random routing, at the bytes of 10 %", attention__router="{ random = { seed = 0 } }"),
    # As published.
    "paper": Row("STILL as published", "paper"),
    "still-released": Row(
        "STILL as its authors' code trains it, every token counted: the texts have no prompts",
        "still-released",
        data__loss_on='"all"',
        data__pack="false",
        # Its learning rates fall when the held-out loss does not.
        evaluation__every="100",
        evaluation__keep_best="true",
    ),
    "lolcats": Row("LoLCATs", "lolcats"),
    "lolcats-seed1": Row("LoLCATs, seed 1", "lolcats", seed=1),
    "lolcats-seed2": Row("LoLCATs, seed 2", "lolcats", seed=2),
    "hedgehog": Row("Hedgehog: linear attention alone", "linear-only"),
    "lola": Row("LoLA: recall caches added to the LoLCATs student", of="lolcats", ablate="recall_cache"),
    "window-only": Row("a sliding window alone", "window-only", stages=ONE_STAGE),
    "streaming-llm": Row("StreamingLLM's attention, trained", "streaming-llm", stages=ONE_STAGE),
    # The dense model with a compressed cache, untrained.
    **{
        f"{method}-{percent}": Row(f"the teacher's cache compressed by {method} to {percent} %", compress=f"{method}:{percent / 100}")
        for percent in (10, 6, 20)
        for method in METHODS
    },
    # Choices of ours, one changed at a time, at 10 %.
    "no-lora-qk": ours("low-rank updates of v and o alone", 0.1, finetune__lora__targets='["v", "o"]'),
    "own-linear-loss": ours("the linear branch has a loss of its own", 0.1, transfer__linear_branch_weight="1.0"),
    "cross-entropy": ours("cross-entropy in place of KL to the teacher", 0.1, finetune__objective='"cross_entropy"'),
    "mixed": ours("half KL to the teacher, half cross-entropy", 0.1, finetune__objective="{ mixed = { kl = 0.5 } }"),
    "mixed-int4": ours("the same, rows in int4", 0.1, finetune__objective="{ mixed = { kl = 0.5 } }", attention__rows='"int4"'),
    "sum": ours("a summed linear branch in place of the mean", 0.1, attention__linear_norm='"sum"'),
    # Both maps give two values a column of their matrix: the states have the same bytes.
    "hedgehog-map": ours("Hedgehog's feature map in place of NP-Map", 0.1, attention__feature_map='"softmax"'),
    "received-attention": ours("scores by received attention", 0.1, attention__router='"received_attention"'),
}

# Ablations of the that the rows do not train: of one student.
BRANCHES = {"row": "ours-10", "ablate": "branches"}

RULER = (
    "niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multikey_3,niah_multivalue,"
    "niah_multiquery,vt,cwe,fwe,qa_1"
)


def suites(scale):
    """Name to arguments of `still eval`; `scale` has the numbers of items and the lengths. Long tasks are a suite a length."""
    items = ["--limit", str(scale["items"])]
    short = ["--limit", str(scale["short"])] if scale["short"] else []
    asked = {
        "short": ["--tasks", "piqa,arc_easy,arc_challenge,hellaswag,winogrande,lambada_openai", *short],
        "mmlu": ["--tasks", "mmlu", *short],
        "perplexity": ["--tasks", "perplexity", "--lengths", scale["longest"], "--limit", str(scale["windows"]), "--text", "{text}"],
    }
    for length in scale["lengths"].split(","):
        long = ["--lengths", length, *items]
        asked |= {
            f"ruler_{length}": ["--tasks", RULER, *long, "--text", "{haystack}", "--squad", "{squad}"],
            f"recall_{length}": ["--tasks", "passkey,repeated_text", *long],
            f"facts_{length}": ["--tasks", "planted_facts", *long, "--text", "{haystack}", "--chat"],
            f"babilong_{length}": ["--tasks", "babilong", *long, "--text", "{haystack}"],
        }
    return asked


def suite_of(asked):
    """The suite of a name with a length: `ruler` of `ruler_4096`."""
    return re.sub(r"_\d+$", "", asked)


def blocks(nll):
    """As the program resamples windows: sum and number of tokens of every block."""
    return [(round(sum(block), 4), len(block)) for block in (nll[start : start + BLOCK] for start in range(0, len(nll), BLOCK))]


FULL = {"items": 100, "short": 0, "windows": 60, "lengths": "4096,8192", "longest": "8192"}
# Everything once, in a minute: what a script may fail at for a silly reason.
TINY = {"items": 2, "short": 4, "windows": 1, "lengths": "2300", "longest": "512"}
TINY_SETS = {
    "data.lengths": "[64, 128]",
    "data.length_weights": "[0.5, 0.5]",
    "data.min_length": "32",
    "data.heldout": "0.3",
    "data.heldout_windows": "2",
    "transfer.steps": "2",
    "finetune.steps": "2",
    "evaluation.windows": "1",
    "evaluation.passkey_keys": "0",
    "evaluation.repeated_text": "0",
    "calibration.tokens": "512",
    "calibration.window": "256",
    "calibration.at_length": "8192",
}
