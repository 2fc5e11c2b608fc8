"""Checkpoints of a run, through torch.distributed.checkpoint: complete, or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable

import torch.distributed.checkpoint as dcp
from torch import Tensor

from .._errors import InputError
from ._optimizer import Updates
from ._parallel import Processes

ORDER = ("transfer", "finetune")


class Checkpoints:
    """A run's directory: `run.json`, what decides the run; `metrics.jsonl`, `evaluations.jsonl`, `teacher.json`;
    `checkpoints/STAGE-STEP`, and `checkpoints/best`, the student of the lowest held-out loss."""

    def __init__(self, directory: Path, fingerprint: dict[str, Any], keep: int, processes: Processes) -> None:
        self.directory, self.fingerprint, self.keep, self.processes = directory, fingerprint, keep, processes
        self.logs = {"step": directory / "metrics.jsonl", "evaluation": directory / "evaluations.jsonl"}
        self.teacher, self.best = directory / "teacher.json", directory / "checkpoints" / "best"

    def open(self, resume: bool) -> dict[str, Any] | None:
        """The progress of the newest checkpoint, with `resume`; otherwise makes sure that there is none."""
        return self.processes.first_does(lambda: self._open(resume))

    def _open(self, resume: bool) -> dict[str, Any] | None:
        known = self.directory / "run.json"
        newest = self._complete()[-1:]
        if not resume:
            if newest:
                raise InputError(
                    f"{self.directory} holds checkpoints of an earlier run",
                    "pass resume=True to go on with it, or choose another run_dir",
                )
            (self.directory / "checkpoints").mkdir(parents=True, exist_ok=True)
            # Of a run that ended before its first checkpoint.
            shutil.rmtree(self.best, ignore_errors=True)
            self.teacher.unlink(missing_ok=True)
            known.write_text(json.dumps(self.fingerprint))
            for log in self.logs.values():
                log.write_text("")
            return None
        if not newest:
            raise InputError(f"{self.directory} has no checkpoint to resume from", "run once without resume")
        then = json.loads(known.read_text())
        differing = [key for key in self.fingerprint if then.get(key) != json.loads(json.dumps(self.fingerprint[key]))]
        if differing:
            raise InputError(
                f"the run in {self.directory} has another {' and '.join(differing)}",
                "resume with the same ones, or start a new run elsewhere",
            )
        # A kill came between two names.
        if _before(self.best).exists() and not self.best.exists():
            os.replace(_before(self.best), self.best)
        progress: dict[str, Any] = json.loads((newest[0] / "progress.json").read_text())
        reached = (ORDER.index(progress["stage"]), progress["step"])
        for log in self.logs.values():
            lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if (ORDER.index(line["stage"]), line["step"]) <= reached]
            log.write_text("".join(json.dumps(line) + "\n" for line in kept))
        return {**progress, "path": str(newest[0])}

    def _complete(self) -> list[Path]:
        found = [path.parent for path in self.directory.glob("checkpoints/*-*/progress.json") if path.parent.suffix != ".tmp"]
        return sorted(found, key=lambda path: (ORDER.index(path.name.split("-")[0]), int(path.name.split("-")[1])))

    def note(self, event: str, report: Mapping[str, Any]) -> None:
        """A line of the log that an event belongs to."""
        if self.processes.rank == 0:
            with self.logs[event].open("a") as out:
                out.write(json.dumps(report) + "\n")

    def note_teacher(self, measure: Callable[[], Mapping[str, float]]) -> None:
        """What the teacher reaches where the student is measured; a run that goes on has it already."""
        if self.processes.first_says(self.teacher.exists()):
            return
        measured = measure()
        if self.processes.rank == 0:
            self.teacher.write_text(json.dumps(measured) + "\n")

    def save(self, progress: dict[str, Any], learned: Mapping[str, Tensor], updates: Updates) -> Path:
        """A checkpoint after the steps that were taken."""
        progress = {**progress, **updates.progress()}
        path = self.directory / "checkpoints" / f"{progress['stage']}-{updates.step_count:06}"
        self._write(path, _state(learned, updates), progress)
        if self.processes.rank == 0:
            for old in self._complete()[: -self.keep]:
                shutil.rmtree(old)
        self.processes.wait()
        return path

    def save_best(self, stage: str, step: int, learned: Mapping[str, Tensor]) -> None:
        """Keeps a student next to the newest ones, in place of the best one before. No run goes on from it."""
        self._write(self.best, _values(learned), {"stage": stage, "step": step})

    def load_best(self, learned: Mapping[str, Tensor]) -> None:
        """Puts the values of the student that was kept into parameters."""
        dcp.load(_values(learned), checkpoint_id=self.best, no_dist=not self.processes.several)

    def _write(self, path: Path, state: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Writes under a temporary name, then renames."""
        staging, before = path.with_suffix(".tmp"), _before(path)
        if self.processes.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        self.processes.wait()
        dcp.save(state, checkpoint_id=staging, no_dist=not self.processes.several)
        if self.processes.rank == 0:
            (staging / "progress.json").write_text(json.dumps(progress))
            shutil.rmtree(before, ignore_errors=True)
            if path.exists():
                os.replace(path, before)
            os.replace(staging, path)
            shutil.rmtree(before, ignore_errors=True)
        self.processes.wait()

    def load(self, progress: dict[str, Any], learned: Mapping[str, Tensor], updates: Updates) -> None:
        """Puts a checkpoint into parameters and optimizer."""
        state = _state(learned, updates)
        dcp.load(state, checkpoint_id=progress["path"], no_dist=not self.processes.several)
        updates.restore(state, progress)


def _before(path: Path) -> Path:
    """Where a checkpoint waits while its successor takes its place."""
    return path.with_suffix(".before.tmp")


def _state(learned: Mapping[str, Tensor], updates: Updates) -> dict[str, Tensor]:
    return {**_values(learned), **updates.state()}


def _values(learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Loading writes into the parameters themselves.
    return {name: x.detach() for name, x in learned.items()}
