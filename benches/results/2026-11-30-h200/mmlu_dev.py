"""How near a student's letters are to its teacher's, on MMLU's examples: `mmlu_dev.py make DATA_DIR OUT` and `mmlu_dev.py compare FOLDER`.

`make` asks each of a subject's five examples after the other four (285 questions), so that nothing is chosen by the test's questions; then
`still eval --tasks mmlu --shots 4 --data-dir OUT --samples FILE`. `compare` reads `mmlu_dev_NAME.jsonl.gz` of a folder.
"""
import gzip
import json
import math
import pathlib
import sys


def make(data, out):
    subjects = {}
    for line in open(f"{data}/mmlu_dev.jsonl"):
        record = json.loads(line)
        subjects.setdefault(record["subject"], []).append(record)
    pathlib.Path(out).mkdir(parents=True, exist_ok=True)
    with open(f"{out}/mmlu_test.jsonl", "w") as test, open(f"{out}/mmlu_dev.jsonl", "w") as dev:
        for asked in range(5):
            for subject, records in subjects.items():
                for n, record in enumerate(records):
                    # Underscores are spaces in the prompt: each question has a group of its own.
                    own = dict(record, subject=subject + "_" * (asked + 1))
                    (test if n == asked else dev).write(json.dumps(own) + "\n")


def letters(path):
    """Log-probabilities of the four letters, by question."""
    found = {}
    for line in gzip.open(path, "rt"):
        sample = json.loads(line)
        if "id" in sample:
            values = sample["loglikelihoods"]
            total = math.log(sum(map(math.exp, values)))
            found[sample["id"]] = [value - total for value in values]
    return found


def compare(folder):
    paths = {path.name[len("mmlu_dev_") : -len(".jsonl.gz")]: path for path in pathlib.Path(folder).glob("mmlu_dev_*.jsonl.gz")}
    teacher = letters(paths.pop("teacher"))
    for name, path in sorted(paths.items()):
        student = letters(path)
        pairs = [(teacher[key], student[key]) for key in teacher]
        likeliest = lambda values: max(range(4), key=values.__getitem__)
        same = sum(likeliest(p) == likeliest(q) for p, q in pairs) / len(pairs)
        divergence = sum(math.exp(a) * (a - b) for p, q in pairs for a, b in zip(p, q)) / len(pairs)
        print(f"{name:16} {len(pairs)} questions, {100 * same:.1f} % the teacher's letter, divergence {divergence:.4f} nats")


if __name__ == "__main__":
    {"make": make, "compare": compare}[sys.argv[1]](*sys.argv[2:])
