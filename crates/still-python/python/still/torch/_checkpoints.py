"""Checkpoints of a run, through torch.distributed.checkpoint: complete, or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from .._errors import InputError
from ._optimizer import Updates
from ._parallel import Processes

ORDER = ("transfer", "finetune")


class Checkpoints:
    """A run's directory: `run.json`, what decides the run; `metrics.jsonl`; `checkpoints/STAGE-STEP`."""

    def __init__(self, directory: Path, fingerprint: dict[str, Any], keep: int, processes: Processes) -> None:
        self.directory, self.fingerprint, self.keep, self.processes = directory, fingerprint, keep, processes
        self.metrics = directory / "metrics.jsonl"

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
            known.write_text(json.dumps(self.fingerprint))
            self.metrics.write_text("")
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
        progress: dict[str, Any] = json.loads((newest[0] / "progress.json").read_text())
        reached = (ORDER.index(progress["stage"]), progress["step"])
        lines = [json.loads(line) for line in self.metrics.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if (ORDER.index(line["stage"]), line["step"]) <= reached]
        self.metrics.write_text("".join(json.dumps(line) + "\n" for line in kept))
        return {**progress, "path": str(newest[0])}

    def _complete(self) -> list[Path]:
        found = [path.parent for path in self.directory.glob("checkpoints/*/progress.json") if path.parent.suffix != ".tmp"]
        return sorted(found, key=lambda path: (ORDER.index(path.name.split("-")[0]), int(path.name.split("-")[1])))

    def note(self, report: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`."""
        if self.processes.rank == 0:
            with self.metrics.open("a") as out:
                out.write(json.dumps(report) + "\n")

    def save(self, stage: str, position: str, learned: Mapping[str, Tensor], updates: Updates) -> Path:
        """A checkpoint after the steps that were taken."""
        path = self.directory / "checkpoints" / f"{stage}-{updates.step_count:06}"
        staging = path.with_suffix(".tmp")
        if self.processes.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        self.processes.wait()
        dcp.save(_state(learned, updates), checkpoint_id=staging, no_dist=not self.processes.several)
        if self.processes.rank == 0:
            progress = {"stage": stage, "position": position, **updates.progress()}
            (staging / "progress.json").write_text(json.dumps(progress))
            os.replace(staging, path)
            for old in self._complete()[: -self.keep]:
                shutil.rmtree(old)
        self.processes.wait()
        return path

    def load(self, progress: dict[str, Any], learned: Mapping[str, Tensor], updates: Updates) -> None:
        """Puts a checkpoint into parameters and optimizer."""
        state = _state(learned, updates)
        dcp.load(state, checkpoint_id=progress["path"], no_dist=not self.processes.several)
        updates.restore(state, progress)


def _state(learned: Mapping[str, Tensor], updates: Updates) -> dict[str, Tensor]:
    # Loading writes into the parameters themselves.
    return {**{name: x.detach() for name, x in learned.items()}, **updates.state()}
