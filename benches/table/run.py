#!/usr/bin/env python3
"""Run rows of the table: train, ask every suite, and keep what a report needs.

    benches/table/run.py --list
    benches/table/run.py ours-10 lolcats --teacher base.gguf --train books.jsonl.zst --text heldout.txt \\
        --haystack essay.txt --data-dir eval --squad squad.json --out table --device cuda --gpus 0,1
    benches/table/run.py all … --tiny       # everything once, small: does it work here?

A row is a folder of OUT: `student` (a delta), `SUITE.json`, `SUITE.jsonl` (one line an answer), `*.log`. What is there is not
done again, and what was interrupted goes on: run the same command again. With several GPUs each takes the next row; one that
is named twice (`--gpus 0,0,1,1`) takes two rows at a time, which only speeds suffer from: measure those alone, with
`--parts efficiency`. A failed row does not end the others; the script says which failed, and exits with 1. `--bring DIR`
copies what a report reads: results, resolved recipes, and answers packed with gzip, but no weights. `report.py DIR` makes the
tables.
"""

import argparse
import concurrent.futures
import gzip
import json
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import threading
import time

import rows


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names of --list, or all")
    parser.add_argument("--list", action="store_true", help="list rows, and end")
    parser.add_argument("--dry-run", action="store_true", help="have `still` say what each student would take, train nothing")
    parser.add_argument("--still", default="still", help="the program")
    parser.add_argument("--teacher", help="the base model")
    parser.add_argument("--train", nargs="+", help="training data")
    parser.add_argument("--text", help="held-out text of perplexity")
    parser.add_argument("--haystack", help="text that hides needles; --text without it")
    parser.add_argument("--data-dir", help="data of the short tasks, and babi/ in it")
    parser.add_argument("--squad", help="questions of qa_1")
    parser.add_argument("--out", type=pathlib.Path, help="where rows are kept")
    parser.add_argument("--bring", type=pathlib.Path, help="copy what a report reads here, at the end")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gpus", default="0", help="with --device cuda: GPUs that take rows side by side")
    parser.add_argument("--parts", default="", help="only these of a row, with commas: train, ruler or ruler_4096, …, efficiency, generation, branches")
    parser.add_argument("--items", type=int, help="items of a long task in place of 100")
    parser.add_argument("--lengths", help="tokens of long prompts in place of 4096,8192")
    parser.add_argument("--only-bring", action="store_true", help="run nothing, copy what is there")
    parser.add_argument("--tiny", action="store_true", help="everything once, small")
    return parser.parse_args()


class Failed(Exception):
    """A command that did not succeed."""


class Worker:
    """Runs rows one after another, on one GPU or the CPU."""

    def __init__(self, args, gpu):
        self.args = args
        self.env = dict(os.environ)
        self.device = ["--device", args.device]
        if args.device == "cuda":
            self.env["CUDA_VISIBLE_DEVICES"] = gpu

    def still(self, log, *command):
        """Runs `still`; what it says goes to `log`."""
        line = [self.args.still, *map(str, command)]
        with open(log, "a") as said:
            said.write("$ " + " ".join(line) + "\n")
            said.flush()
            done = subprocess.run(line, env=self.env, stdout=subprocess.PIPE, stderr=said, text=True)
            said.write(done.stdout)
        if done.returncode:
            raise Failed(f"still {command[0]} ended with {done.returncode}: see {log}")
        return done.stdout

    def row(self, name):
        row, folder = rows.ROWS[name], self.args.out / name
        folder.mkdir(parents=True, exist_ok=True)
        model = self.args.teacher
        if row.trains:
            model = self.student(name, row, folder)
            if model is None:
                return
        elif row.ablate:
            model = self.args.out / row.of / "student"
            if not model.exists():
                raise Failed(f"{name} is of the student of {row.of}: run that row first")
        more = []
        if row.compress:
            more = ["--compress", row.compress]
        if row.ablate:
            more = ["--ablate", row.ablate]
        for suite, command in rows.suites(scale(self.args)).items():
            if self.wanted(suite):
                self.suite(suite, command, model, [*row.cache_dtype, *more], folder, row.of)
        if not more and self.wanted("efficiency"):
            self.once(folder / "efficiency.json", lambda path: [
                "eval", "--model", model, *self.device, *row.cache_dtype, "--efficiency", scale(self.args)["lengths"], "--out", path,
            ])
        if not more and self.wanted("generation"):
            self.generations(model, folder)
        if name == rows.BRANCHES["row"] and self.wanted("branches"):
            self.once(folder / "branches.json", lambda path: [
                "eval", "--model", model, *self.device, "--tasks", "perplexity,repeated_text", "--text", self.args.text,
                "--lengths", scale(self.args)["lengths"], "--limit", str(scale(self.args)["windows"]),
                "--ablate", rows.BRANCHES["ablate"], "--out", path,
            ])

    def wanted(self, part):
        parts = self.args.parts.split(",")
        return not self.args.parts or part in parts or rows.suite_of(part) in parts

    def student(self, name, row, folder):
        """Trains a student, or goes on; its folder. `None` after a dry run."""
        student, run = folder / "student", folder / "run"
        sets = dict(row.sets, seed=str(row.seed))
        if len(self.args.train) > 1 and all(map(os.path.isfile, self.args.train)):
            # As many tokens of each file.
            sets["data.weights"] = json.dumps([1 / len(self.args.train)] * len(self.args.train))
        if self.args.tiny:
            tiny = dict(rows.TINY_SETS)
            if sets.get("transfer.steps") == "0":
                tiny["transfer.steps"] = "0"
            if row.recipe != "still-10":
                tiny = {key: value for key, value in tiny.items() if not key.startswith("calibration.")}
            sets.update(tiny)
        command = ["linearize", "--model", self.args.teacher, "--data", *self.args.train, "--recipe", row.recipe]
        for key, value in sets.items():
            command += ["--set", f"{key}={value}"]
        command += ["--out", student, "--run-dir", run, "--delta", "--dtype", "f16", "--no-verdict", "--no-tensorboard", *self.device]
        if not row.train:
            command += ["--training-free"]
        if self.args.dry_run:
            said = self.still(folder / "dry_run.log", *command, "--dry-run", "--json")
            (folder / "dry_run.json").write_text(said)
            return None
        if not student.exists():
            if any(run.glob("checkpoints/*")):
                command.append("--resume")
            else:
                shutil.rmtree(run, ignore_errors=True)
            said = self.still(folder / "train.log", *command, "--json")
            (folder / "train.json").write_text(said)
            # Checkpoints are large, and the student is there.
            shutil.rmtree(run, ignore_errors=True)
        return student

    def suite(self, suite, command, model, more, folder, base):
        """Asks a suite; what the row `base` has answered already is not asked again."""
        texts = {"{text}": self.args.text, "{haystack}": self.args.haystack or self.args.text, "{squad}": self.args.squad}
        command = [texts.get(word, word) for word in command]
        samples = folder / f"{suite}.jsonl"
        known = self.args.out / (base or "") / f"{suite}.jsonl"
        if base and known.exists() and not samples.exists():
            shutil.copy(known, samples)
        self.once(folder / f"{suite}.json", lambda path: [
            "eval", "--model", model, *self.device, "--data-dir", self.args.data_dir, *command, *more,
            "--samples", samples, "--resume", "--out", path,
        ])

    def once(self, path, command):
        """Runs a command that writes `path`, if it is not there."""
        if not path.exists():
            self.still(path.with_suffix(".log"), *command(path))

    def generations(self, model, folder):
        """Greedy continuations of the held-out text's pages, whose repetition a report counts."""
        path = folder / "generation.json"
        if path.exists():
            return
        tiny = self.args.tiny
        pages, tokens, words = (2, 8, 30) if tiny else (20, 256, 600)
        text = pathlib.Path(self.args.text).read_text().split(" ")
        step = max(1, (len(text) - words) // pages)
        written = []
        for page in range(pages):
            prompt = folder / "prompt.txt"
            prompt.write_text(" ".join(text[page * step : page * step + words]))
            said = self.still(folder / "generation.log", "generate", "--model", model, *self.device, "--prompt-file", prompt,
                              "-n", tokens, "--json")
            written.append(json.loads(said))
        path.write_text(json.dumps(written, indent=1))


def scale(args):
    chosen = dict(rows.TINY if args.tiny else rows.FULL)
    if args.items:
        chosen["items"] = args.items
    if args.lengths:
        chosen["lengths"] = args.lengths
    return chosen


def check_parts(args):
    """Ends the script if a part has no such name."""
    asked = rows.suites(scale(args))
    known = ["train", *dict.fromkeys(map(rows.suite_of, asked)), *asked, "efficiency", "generation", "branches"]
    unknown = [part for part in args.parts.split(",") if part and part not in known]
    if unknown:
        sys.exit(f"no part is called {unknown[0]}: use {', '.join(known)}")


def bring(args, names):
    """Copies what a report reads."""
    for name in names:
        source, target = args.out / name, args.bring / name
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(source.glob("*.json")):
            shutil.copy(path, target / path.name)
        for path in sorted(source.glob("*.jsonl")):
            with open(path) as lines, gzip.open(target / f"{path.name}.gz", "wt", 9) as packed:
                for line in lines:
                    packed.write(json.dumps(compact(json.loads(line)), separators=(",", ":")) + "\n")


def compact(sample):
    """An answer as it is, so that `--resume` goes on from it; of a window, which cannot, sums of blocks in place of every token's loss."""
    kept = {key: value for key, value in sample.items() if key != "nll"}
    if "nll" in sample:
        kept["blocks"] = rows.blocks(sample["nll"])
    return kept


def main():
    args = arguments()
    if args.list:
        for name, row in rows.ROWS.items():
            print(f"{name:20}{row.about}")
        return
    names = list(rows.ROWS) if args.rows == ["all"] else args.rows
    unknown = [name for name in names if name not in rows.ROWS]
    if unknown or not names:
        sys.exit(f"no row is called {unknown[0]}: see --list" if unknown else "name rows, or all")
    if args.only_bring:
        if not (args.out and args.bring):
            sys.exit("--only-bring copies from --out to --bring: name both")
        bring(args, [name for name in names if (args.out / name).exists()])
        return
    needed = ["teacher", "train", "out"] if args.dry_run else ["teacher", "train", "text", "data_dir", "squad", "out"]
    missing = [name for name in needed if getattr(args, name) is None]
    if missing:
        sys.exit(f"--{missing[0].replace('_', '-')} is missing")
    check_parts(args)
    if args.dry_run:
        names = [name for name in names if rows.ROWS[name].trains and rows.ROWS[name].train]
    # Rows of another row's student come last, and wait for it.
    waiting, failed = queue.Queue(), []
    ended = {name: threading.Event() for name in names}
    for name in sorted(names, key=lambda name: rows.ROWS[name].of is not None):
        waiting.put(name)

    def work(gpu):
        worker = Worker(args, gpu)
        while True:
            try:
                name = waiting.get_nowait()
            except queue.Empty:
                return
            base = rows.ROWS[name].of
            if base in ended:
                ended[base].wait()
            started = time.time()
            try:
                worker.row(name)
                print(f"{name}: {time.time() - started:.0f} s", flush=True)
            except Failed as error:
                failed.append(name)
                print(f"{name}: {error}", file=sys.stderr, flush=True)
            finally:
                ended[name].set()

    gpus = args.gpus.split(",") if args.device == "cuda" else [""]
    with concurrent.futures.ThreadPoolExecutor(len(gpus)) as pool:
        list(pool.map(work, gpus))
    if args.bring:
        bring(args, names)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
