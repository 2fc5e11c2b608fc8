"""A plain trainer of both stages, for one process and many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Optional

import torch
from torch import Tensor

from .. import _still
from .._errors import InputError
from ._checkpoints import Checkpoints
from ._optimizer import Updates
from ._parallel import Processes
from ._stages import Stage

if TYPE_CHECKING:
    from ._student import Student

STAGES = ("transfer", "finetune")
NO_ARITHMETIC = ("_name_or_path", "transformers_version", "_attn_implementation")
"""Keys of a base's configuration that may differ when its run goes on."""
Window = tuple[Any, list[int], Optional[list[bool]]]


class Run:
    """A run between its first and its last step.

    The windows of a step are dealt to the processes; their gradients are added up, so that all processes take the same step.
    """

    def __init__(
        self,
        student: Student,
        data: Any,
        run_dir: Any,
        resume: bool,
        progress: Callable[[dict[str, Any]], object] | None,
    ) -> None:
        self.student, self.recipe, self.processes = student, student.recipe, Processes()
        self.progress = progress
        self._check()
        self.device = next(iter(student.learned().values())).device
        directory = student.source.tokenizer_directory()
        read = lambda: _still.Windows(data, directory, student.recipe_text)
        # The first one tokenizes the text; the others find it done.
        self.processes.first_does(lambda: read() and None)
        self.windows = read()
        self.checkpoints: Checkpoints | None = None
        if run_dir is not None:
            # Weights of the base are not among it: they are the caller's to keep.
            base = {key: x for key, x in json.loads(student.config).items() if key not in NO_ARITHMETIC}
            fingerprint = {"recipe": student.recipe, "data": self.windows.sha256, "base": base}
            self.checkpoints = Checkpoints(Path(run_dir), fingerprint, self.recipe["checkpoint"]["keep"], self.processes)
        elif resume:
            raise InputError("resume without run_dir", "name the directory of the run that is to go on")
        self.saved = None if self.checkpoints is None else self.checkpoints.open(resume)

    def _check(self) -> None:
        if self.recipe["evaluation"]["every"]:
            raise InputError(
                "evaluation.every is not 0: still.torch makes no evaluations during a run",
                'pass set={"evaluation.every": 0, "evaluation.keep_best": False}, and measure the saved student with `still eval`',
            )
        for stage in STAGES:
            batch, count = self.recipe[stage]["batch"], self.processes.count
            if self.recipe[stage]["steps"] and batch % count:
                raise InputError(
                    f"{stage}.batch is {batch}, for {count} processes",
                    f"set {stage}.batch to a multiple of {count}: the windows of a step are dealt to the processes",
                )

    def train(self) -> None:
        """Both stages."""
        if self.saved is not None:
            self.windows.seek(self.saved["position"])
        for name in STAGES:
            if self.saved is not None and STAGES.index(name) < STAGES.index(self.saved["stage"]):
                continue
            if self.recipe[name]["steps"] > 0:
                self._stage(name, getattr(self.student, name)())
        for parameter in self.student.model.parameters():
            parameter.requires_grad_(False)
        self.student.model.eval()

    def _stage(self, name: str, stage: Stage) -> None:
        recipe = self.recipe[name]
        updates = Updates(recipe, self.recipe["guard"], self.student.trainable(name))
        if self.saved is not None and self.checkpoints is not None:
            self.checkpoints.load(self.saved, self.student.learned(), updates)
            self.saved = None
        self._tell("stage", stage=name, steps=recipe["steps"], done=updates.step_count)
        while updates.step_count < recipe["steps"]:
            report = self._step(name, stage, updates)
            step, stop = updates.step_count, updates.too_many_skipped()
            if self.checkpoints is not None:
                self.checkpoints.note(report)
                if stop or step == recipe["steps"] or step % self.recipe["checkpoint"]["every"] == 0:
                    path = self.checkpoints.save(name, self.windows.position, self.student.learned(), updates)
                    self._tell("checkpoint", path=str(path))
            if stop:
                raise InputError(f"{name} stopped after step {step}: {stop}", "lower the learning rate")

    def _step(self, name: str, stage: Stage, updates: Updates) -> dict[str, Any]:
        batch = self.recipe[name]["batch"]
        windows = self.windows.next(batch)
        totals: Tensor | None = None
        for index in range(self.processes.rank, batch, self.processes.count):
            output = stage(**self._inputs(name, windows[index], updates.step_count, index))
            # Windows weigh the same; the processes' gradients are added up.
            (output.loss / batch).backward()
            values = torch.cat([output.reported[None], output.layer_losses]).double() / batch
            totals = values if totals is None else totals + values
        assert totals is not None
        updates_of = list(updates.parameters.values())
        self.processes.sum_gradients(updates_of)
        loss, *of_layers = self.processes.summed(totals).tolist()
        report = {"stage": name, **updates.step(loss), "tokens": sum(len(ids) for ids, _, _ in windows)}
        if of_layers:
            report["layer_losses"] = of_layers
            if len(of_layers) < len(self.student.section["budgets"]):
                report["layers"] = self.student.hybrid_layers
        self._tell("step", **report)
        return report

    def _inputs(self, name: str, window: Window, step: int, index: int) -> dict[str, Tensor]:
        """A window as a batch: a row for each of its sequences."""
        if name == "finetune" and self.recipe[name]["dropout"] > 0:
            # A function of the step and the window, so that a resumed run and another number of processes draw the same.
            torch.manual_seed((self.recipe["seed"] << 32) + (step << 12) + index & (2**63 - 1))
        ids, ends, counted = window
        starts = [0, *ends[:-1]]
        longest = max(end - start for start, end in zip(starts, ends))
        rows = torch.zeros(len(ends), longest, dtype=torch.long)
        real, counts = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
        for row, (start, end) in enumerate(zip(starts, ends)):
            rows[row, : end - start] = torch.from_numpy(ids[start:end])
            real[row, : end - start] = 1
            if counted is not None:
                counts[row, : end - start] = torch.tensor(counted[start:end])
        inputs = {"input_ids": rows.to(self.device)}
        if len(ends) > 1:
            inputs["attention_mask"] = real.to(self.device)
        if counted is not None and name == "finetune":
            inputs["counted"] = counts.to(self.device)
        return inputs

    def _tell(self, event: str, **fields: Any) -> None:
        if self.progress is not None and self.processes.rank == 0:
            self.progress({"event": event, **fields})
