"""Whether a repetition penalty keeps greedy answers of `still ask` from repeating themselves, and what it costs in facts.

    python3 benches/repetition.py MODEL,... PENALTY,...      # such as demo 1,1.1

Each model reads three documents once: the demo's, and two of 1,500 words whose facts are those of still-testing. It is asked
about each fact, and a few open questions. Prints one JSON object an answer; a summary goes to stderr. Runs target/release/still.
"""

import collections
import json
import pathlib
import random
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
STILL = ROOT / "target/release/still"
WORDS = 1500
NEW_TOKENS = "160"


def town(seed):
    """A document of still-testing's sentences and facts, and the facts as questions and answers."""
    source = (ROOT / "crates/still-testing/src/facts.rs").read_text()
    lists = re.findall(r"const (?:WHO|DID|WHAT|WHEN): \[&str; 12\] = \[(.*?)\];", source, re.S)
    lists = [re.findall(r'"([^"]+)"', words) for words in lists]
    facts = re.findall(r'fact\(\s*"([^"]+)",\s*"([^"]+)",\s*"([^"]+)",?\s*\)', source, re.S)
    pick = random.Random(seed)
    sentences, count = [], 0
    while count < WORDS:
        sentence = " ".join(pick.choice(words) for words in lists) + "."
        count += len(sentence.split())
        sentences.append(sentence)
    order = list(range(len(facts)))
    pick.shuffle(order)
    step = len(sentences) / len(facts)
    for n, fact in reversed(list(enumerate(order))):
        sentences.insert(int((n + 0.5) * step), facts[fact][0])
    text = "\n\n".join(" ".join(sentences[n : n + 6]) for n in range(0, len(sentences), 6))
    asked = [(question, answer) for _, question, answer in facts]
    return text, asked + [("What does the town council do?", None), ("Sum up the document.", None)]


def demo():
    """The demo's document and its questions."""
    folder = ROOT / "crates/still-cli/demo"
    questions = json.loads((folder / "questions.json").read_text())
    asked = [(fact["question"], fact["answer"].lower()) for fact in questions["facts"]]
    asked += [
        (questions["open"], None),
        ("What is this text about?", None),
        ("Who is the narrator, and what happens to him?", None),
    ]
    return (folder / "document.txt").read_text(), asked


def repeated(text):
    """How many runs of four words were there before."""
    words = text.lower().split()
    runs = [tuple(words[n : n + 4]) for n in range(len(words) - 3)]
    return len(runs) - len(set(runs))


def main():
    models, penalties = (words.split(",") for words in sys.argv[1:3])
    documents = {"demo": demo(), "town1": town(1), "town2": town(2)}
    sums = collections.defaultdict(lambda: [0, 0, 0, 0, 0])
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for m, model in enumerate(models):
            for name, (text, asked) in documents.items():
                document, session = folder / f"{name}.txt", folder / f"{m}-{name}.still"
                document.write_text(text)
                for penalty in penalties:
                    for question, answer in asked:
                        command = [STILL, "ask", "-q", "--model", model, "--session", session, "--json"]
                        command += ["-n", NEW_TOKENS, "--repetition-penalty", penalty]
                        command += [] if session.exists() else ["--file", document]
                        run = subprocess.run(command + [question], check=True, capture_output=True, text=True)
                        said = json.loads(run.stdout)
                        right = None if answer is None else answer in said["text"].lower()
                        again = repeated(said["text"])
                        line = dict(model=model, doc=name, pen=penalty, q=question, right=right, rep=again)
                        line |= dict(new=said["new_tokens"], finish=said["finish"], text=said["text"])
                        print(json.dumps(line), flush=True)
                        more = [1, answer is not None, bool(right), again > 0, again]
                        sums[model, penalty] = [a + b for a, b in zip(sums[model, penalty], more)]
    for (model, penalty), (answers, facts, right, repeating, runs) in sums.items():
        print(
            f"{model}, penalty {penalty}: {right} of {facts} facts, {repeating} of {answers} answers repeat themselves"
            f" ({runs} runs of four words)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
