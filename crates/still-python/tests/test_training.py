"""Calibration, training and evaluation of a small model."""

import json
import subprocess
import sys

import numpy as np
import pytest

import still

# A run of seconds: chunks of 16 in windows of 128 tokens.
SMALL = {
    "attention.chunk": 16,
    "attention.budget": 4,
    "data.length": 128,
    "transfer.steps": 6,
    "transfer.batch": 2,
    "finetune.steps": 4,
    "finetune.batch": 2,
    "evaluation.every": 0,
}


def test_budgets_are_found(base, text_path, tmp_path):
    events = []
    change = {"attention.chunk": 16}
    found = still.calibrate(
        base, text_path, recipe="uniform", set=change, cache_fraction=0.6, at_length=512, tokens=2048, window=256,
        out=tmp_path / "budgets.json", progress=events.append,
    )
    assert len(found["budgets"]) == base.config["num_hidden_layers"]
    assert json.loads((tmp_path / "budgets.json").read_text())["budgets"] == found["budgets"]
    assert {event["phase"] for event in events} == {"retrieval", "text"}
    assert events[-1]["done"] == events[-1]["of"]


def test_a_student_is_trained_and_saved(base, text_path, tmp_path):
    events = []
    student = still.linearize(
        base, [text_path], tmp_path / "student", recipe="uniform", set=SMALL, progress=events.append
    )
    steps = [(event["stage"], event["step"]) for event in events if event["event"] == "step"]
    assert steps == [("transfer", n) for n in range(1, 7)] + [("finetune", n) for n in range(1, 5)]
    assert all(np.isfinite(event["loss"]) for event in events if event["event"] == "step")
    assert student.is_student and not base.is_student
    ids = base.tokenize("a chunk of a window " * 20)
    again = still.Model.load(tmp_path / "student")
    own, loaded = student.logits(ids), again.logits(ids)
    # Low-rank updates are merged in the file.
    np.testing.assert_allclose(loaded, own, rtol=1e-3, atol=1e-3)
    student.save(tmp_path / "delta", delta=True)
    with pytest.raises(still.InputError, match="exists already"):
        student.save(tmp_path / "delta")
    with pytest.raises(still.InputError, match="exists already"):
        still.linearize(base, text_path, tmp_path / "student", recipe="uniform", set=SMALL)


def test_a_callback_that_raises_ends_the_run_which_resumes(base, text_path, tmp_path):
    def stop(event):
        if event["event"] == "step" and event["step"] == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        still.linearize(base, text_path, tmp_path / "student", recipe="uniform", set=SMALL, progress=stop)
    assert not (tmp_path / "student").exists()
    steps = []
    resumed = still.linearize(
        base, text_path, tmp_path / "student", recipe="uniform", set=SMALL, resume=True,
        progress=lambda event: steps.append(event.get("step")) if event["event"] == "step" else None,
    )
    assert steps[0] == 4
    whole = still.linearize(base, text_path, tmp_path / "other", recipe="uniform", set=SMALL)
    ids = base.tokenize("a chunk of a window " * 20)
    np.testing.assert_array_equal(resumed.logits(ids), whole.logits(ids))


def test_tasks_give_the_commands_scores(base, base_path, text_path, tmp_path):
    tasks = ["perplexity", "passkey"]
    answers = []
    scores = still.evaluate(
        base, tasks, text=text_path, lengths=[512], limit=3, samples=True, progress=answers.append
    )
    assert len(answers) == 6
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "still", "eval", "--model", str(base_path), "--tasks", ",".join(tasks)]
    command += ["--text", str(text_path), "--lengths", "512", "--limit", "3", "--out", str(results)]
    subprocess.run(command, check=True, capture_output=True)
    of_command = json.loads(results.read_text())["tasks"]
    for name, score in scores.items():
        assert len(score["samples"]) == 3
        same = of_command[name]
        assert {key: score[key] for key in same if key in score} == {key: same[key] for key in same if key in score}
        assert score["n"] == same["n"]
