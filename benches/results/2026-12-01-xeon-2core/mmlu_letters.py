"""How a student's four letters differ from its teacher's, on MMLU's examples, and what that does to a score.

    mmlu_letters.py differences TEACHER.jsonl.gz STUDENT.jsonl.gz …
    mmlu_letters.py shift MMLU.jsonl.gz

`differences` takes answers with log-likelihoods (`still eval --tasks mmlu --samples`). A difference of log-probabilities has a
part that is the same for all questions, a bias of each letter, and the rest. `shift` takes a whole run's answers and says what
is left of its points above chance when every letter gets random noise, or a bias.
"""
import gzip
import json
import math
import random
import sys

# The student's bias in `differences`, rounded.
BIAS = [-0.05, -0.03, 0.055, 0.02]


def letters(path):
    """Log-probabilities of the four letters and the right one, by question."""
    found = {}
    for line in gzip.open(path, "rt"):
        sample = json.loads(line)
        values = sample.get("loglikelihoods", [])
        if len(values) == 4:
            total = math.log(sum(map(math.exp, values)))
            found[sample["id"]] = ([value - total for value in values], sample["gold"])
    return found


def likeliest(values):
    return max(range(4), key=values.__getitem__)


def differences(teacher, paths):
    teacher = letters(teacher)
    print("student | questions | divergence, nats | the teacher's letter | bias of A, B, C, D | rest, root mean square | the teacher's letter without the bias")
    for path in paths:
        student = letters(path)
        pairs = [(teacher[key][0], student[key][0]) for key in teacher if key in student]
        apart = [[q - p for p, q in zip(*pair)] for pair in pairs]
        bias = [sum(row[n] for row in apart) / len(apart) for n in range(4)]
        rest = math.sqrt(sum((row[n] - bias[n]) ** 2 for row in apart for n in range(4)) / 4 / len(apart))
        divergence = sum(math.exp(a) * (a - b) for p, q in pairs for a, b in zip(p, q)) / len(pairs)
        same = sum(likeliest(p) == likeliest(q) for p, q in pairs) / len(pairs)
        without = sum(likeliest(p) == likeliest([a - b for a, b in zip(q, bias)]) for p, q in pairs) / len(pairs)
        shown = " ".join(f"{value:+.3f}" for value in bias)
        print(f"{path} | {len(pairs)} | {divergence:.4f} | {100 * same:.1f} % | {shown} | {rest:.3f} | {100 * without:.1f} %")


def shift(path):
    answers = list(letters(path).values())

    def points(change):
        right = sum(likeliest([a + b for a, b in zip(values, change())]) == gold for values, gold in answers)
        return 100 * right / len(answers) - 25

    whole = points(lambda: [0] * 4)
    print(f"{len(answers)} questions, {whole:.2f} points above chance")
    rng = random.Random(0)
    for size in (0.05, 0.08, 0.1, 0.15, 0.3):
        shares = [100 * points(lambda: [rng.gauss(0, size) for _ in range(4)]) / whole for _ in range(8)]
        mean = sum(shares) / 8
        deviation = math.sqrt(sum((share - mean) ** 2 for share in shares) / 7)
        print(f"noise of {size}: {mean:.1f} % of them left, standard deviation of eight draws {deviation:.1f}")
    for sign in (1, -1):
        bias = [sign * value for value in BIAS]
        print(f"bias {bias}: {100 * points(lambda: bias) / whole:.1f} %")


if __name__ == "__main__":
    command, first, *more = sys.argv[1:]
    differences(first, more) if command == "differences" else shift(first)
