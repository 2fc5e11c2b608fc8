"""Evaluations within a run of `still.torch`, and what follows from them. Runs where torch and transformers are installed."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import still
import still.torch
from still.torch._evaluation import Evaluator
from still.torch._watch import Plateau, Watch
from test_linearize import SMALL, loaded

RECIPES = Path(__file__).parents[3] / "recipes"
MEASURED = {
    **SMALL,
    "data.heldout": 0.1,
    "data.min_length": 60,
    "transfer.steps": 10,
    "finetune.steps": 10,
    "evaluation.every": 4,
    "evaluation.windows": 3,
    "evaluation.passkey_keys": 2,
    "evaluation.passkey_length": 480,
    "evaluation.repeated_text": 50,
}
PLATEAU = {"plateau": {"factor": 0.5, "patience": 0, "threshold": 0.9, "cooldown": 1}}
# A rate at which finetuning does harm, and nothing that ends such a run.
HARMFUL = {
    **MEASURED,
    "finetune.optimizer.lr": 1.0,
    "finetune.optimizer.warmup": 0,
    "guard.spike_factor": 0,
    "guard.max_heldout_growth": 0,
    "evaluation.keep_best": True,
}


def trained(base_path, data, recipe, out=None, **options):
    """Events of a run, and its student."""
    events = []
    student = still.torch.linearize(loaded(base_path), "uniform", set=recipe)
    student.train(data, progress=events.append, **options)
    return events, student


def of(events, kind):
    return [{key: x for key, x in event.items() if key != "seconds"} for event in events if event["event"] == kind]


def values(student):
    return {name: x.detach().clone() for name, x in student.learned().items()}


def test_evaluations_are_those_of_still_linearize(base, base_path, documents, tmp_path):
    recipe = {**MEASURED, "transfer.optimizer.schedule": PLATEAU, "evaluation.keep_best": True}
    expected = []
    still.linearize(base, documents, tmp_path / "expected", recipe="uniform", set=recipe, progress=expected.append)
    run_dir = tmp_path / "run"
    own, student = trained(base_path, documents, recipe, run_dir=run_dir)
    student.save(tmp_path / "own")
    ours, theirs = of(own, "evaluation"), of(expected, "evaluation")
    assert [(x["stage"], x["step"]) for x in ours] == [(x["stage"], x["step"]) for x in theirs]
    assert [x["step"] for x in ours] == [0, 4, 8, 10, 4, 8, 10]
    for key in ("heldout_nll", "repeated_nll"):
        np.testing.assert_allclose([x[key] for x in ours], [x[key] for x in theirs], rtol=1e-3, err_msg=key)
    assert [x["passkey_recall"] for x in ours] == [x["passkey_recall"] for x in theirs]
    assert [x["best"] for x in ours] == [x["best"] for x in theirs]
    rates = [x["lr"] for x in of(own, "step")]
    np.testing.assert_allclose(rates, [x["lr"] for x in of(expected, "step")], rtol=1e-12)
    # It fell: nothing gets better by nine tenths.
    assert rates[9] < rates[2]
    # What the teacher reaches, the files of both say.
    teachers = [json.loads((path / "teacher.json").read_text()) for path in (run_dir, tmp_path / "expected.run")]
    for key in ("heldout_nll", "repeated_nll"):
        assert teachers[0][key] == pytest.approx(teachers[1][key], rel=1e-4)
    assert len((run_dir / "evaluations.jsonl").read_text().splitlines()) == 7
    ids = base.tokenize("a chunk of a window " * 20)
    exact = lambda path: (lambda model: model.logits(ids, state=model.new_state(rows="f32")))(still.Model.load(path))
    assert np.abs(exact(tmp_path / "own") - exact(tmp_path / "expected")).max() < 0.02


@pytest.mark.parametrize("kept", ["in memory", "in a run's directory"])
def test_the_best_student_is_the_result(kept, base_path, documents, tmp_path):
    where = {} if kept == "in memory" else {"run_dir": tmp_path / "run"}
    events, student = trained(base_path, documents, HARMFUL, **where)
    losses = [x["heldout_nll"] for x in of(events, "evaluation")]
    assert losses[-1] > min(losses) + 0.01
    from still.torch._trainer import Run

    again = Run(student, documents, None, False, None).evaluator.measure()
    assert again["heldout_nll"] == pytest.approx(min(losses), rel=1e-6)


def test_an_interrupted_run_knows_what_it_measured(base_path, documents, tmp_path):
    recipe = {**HARMFUL, "finetune.optimizer.schedule": PLATEAU, "checkpoint.every": 3}
    whole, student = trained(base_path, documents, recipe, run_dir=tmp_path / "whole")
    seen = []

    def stop(event):
        seen.append(event)
        if len(of(seen, "evaluation")) == 6:
            raise KeyboardInterrupt

    cut = still.torch.linearize(loaded(base_path), "uniform", set=recipe)
    with pytest.raises(KeyboardInterrupt):
        cut.train(documents, run_dir=tmp_path / "cut", progress=stop)
    rest, resumed = trained(base_path, documents, recipe, run_dir=tmp_path / "cut", resume=True)
    evaluations = of(whole, "evaluation")
    assert of(rest, "evaluation") == evaluations[-len(of(rest, "evaluation")) :]
    logged = [json.loads(x) for x in (tmp_path / "cut/evaluations.jsonl").read_text().splitlines()]
    assert [x["heldout_nll"] for x in logged] == [x["heldout_nll"] for x in evaluations]
    expected = values(student)
    for name, value in values(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_a_stage_ends_when_it_has_had_enough_and_a_run_that_is_lost(base_path, documents, tmp_path, monkeypatch):
    steps = {"transfer.steps": 0, "finetune.steps": 40, "evaluation.every": 2, "evaluation.passkey_keys": 0}
    events, _ = trained(base_path, documents, {**HARMFUL, **steps, "evaluation.early_stop": 2})
    losses = [x["heldout_nll"] for x in of(events, "evaluation")]
    assert len(of(events, "step")) < 40 and min(losses[-2:]) >= min(losses[:-2])
    measured = iter([{"heldout_nll": 2.0}, {"heldout_nll": 3.9}, {"heldout_nll": 4.1}])
    monkeypatch.setattr(Evaluator, "measure", lambda self: next(measured))
    lost = {**HARMFUL, **steps, "guard.max_heldout_growth": 2.0, "evaluation.keep_best": False}
    with pytest.raises(still.InputError, match="step 4: the held-out loss rose from 2.000 to 4.100") as error:
        trained(base_path, documents, lost)
    measured = iter([{"heldout_nll": 2.0}, {"heldout_nll": 2.0}, {"heldout_nll": 4.1}])
    with pytest.raises(still.InputError, match="step 2: the held-out loss rose"):
        trained(base_path, documents, lost, run_dir=tmp_path / "run")
    assert error.value.hint and list((tmp_path / "run/checkpoints").glob("finetune-*"))


def test_a_plateau_is_pytorchs():
    losses = [3.03, 3.0297, 3.0297, 3.0294, 3.09, 3.09, 3.1518, 3.1518, 3.1518, 3.1833, 3.0878, 2.9, 2.9, 2.9, 2.95, 2.8]
    for options in ({"threshold": 1e-4, "cooldown": 0}, {"threshold": 0.02, "cooldown": 0}, {"threshold": 0.0, "cooldown": 3}):
        for patience in (0, 1, 3):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
            expected = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=patience, eps=0.0, **options)
            own = Plateau()
            for loss in losses:
                expected.step(loss)
                own.observe(loss, {"plateau": {"factor": 0.5, "patience": patience, **options}})
                assert own.scale == optimizer.param_groups[0]["lr"]


def test_the_best_is_the_runs_and_patience_the_stages():
    watch = Watch()
    watch.begin_stage()
    assert [watch.observe(loss) for loss in (4.0, 3.0, 3.5)] == [True, True, False]
    assert watch.has_had_enough(1) and not watch.has_had_enough(2) and not watch.has_had_enough(0)
    watch.begin_stage()
    assert not watch.has_had_enough(1)
    assert not watch.observe(3.2) and not watch.has_had_enough(1)
    assert watch.observe(2.9)
    assert watch.diverged({"max_heldout_growth": 2.0}) is None
    watch.observe(7.1)
    assert "from 3.500 to 7.100" in watch.diverged({"max_heldout_growth": 2.0})
    assert watch.diverged({"max_heldout_growth": 0.0}) is None


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_recipes_of_the_project_run(name, base_path, documents, tmp_path):
    small = {key: x for key, x in MEASURED.items() if key != "attention.budget"}
    small |= {"data.length": 128, "transfer.steps": 1, "finetune.steps": 1, "evaluation.every": 1}
    resolved = json.loads(still._still.resolve_recipe(RECIPES / f"{name}.toml", {}, None))
    if resolved["data"].get("lengths"):
        small |= {"data.lengths": [128], "data.length_weights": [1.0]}
    if resolved["calibration"].get("cache_fraction") is not None:
        small["attention.budgets"] = [[3, 16], [2, 0]]
    else:
        small["attention.budget"] = min(resolved["attention"]["budget"], 16)
    for stage in ("transfer", "finetune"):
        if resolved[stage]["steps"] == 0:
            small[f"{stage}.steps"] = 0
    student = still.torch.linearize(loaded(base_path), RECIPES / f"{name}.toml", set=small)
    events = []
    student.train(documents, progress=events.append)
    assert len(of(events, "step")) == sum(small[f"{stage}.steps"] for stage in ("transfer", "finetune"))
    assert all(np.isfinite(x["heldout_nll"]) for x in of(events, "evaluation"))
    student.save(tmp_path / "student")
    assert still.Model.load(tmp_path / "student").is_student
