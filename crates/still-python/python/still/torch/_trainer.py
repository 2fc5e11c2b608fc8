"""A plain trainer of both stages, for one process and many."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Optional

import torch
from torch import Tensor

from .. import _still
from .._errors import InputError
from ._checkpoints import Checkpoints
from ._evaluation import Evaluator
from ._optimizer import Updates
from ._parallel import Processes
from ._stages import Stage
from ._watch import Watch

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
        self.watch = Watch()
        self.best: dict[str, Tensor] | None = None
        self.evaluator: Evaluator | None = None
        if self.recipe["evaluation"]["every"]:
            self.evaluator = Evaluator(student, self.windows.heldout(), self.device, self.processes)
        self.checkpoints: Checkpoints | None = None
        if run_dir is not None:
            # Weights of the base are not among it: they are the caller's to keep.
            base = {key: x for key, x in json.loads(student.config).items() if key not in NO_ARITHMETIC}
            fingerprint = {"recipe": student.recipe, "data": self.windows.sha256, "base": base}
            if self.evaluator is not None:
                measured = hashlib.sha256(b"".join(ids.tobytes() for ids, _ in self.evaluator.heldout))
                fingerprint["held-out text"] = measured.hexdigest()
            self.checkpoints = Checkpoints(Path(run_dir), fingerprint, self.recipe["checkpoint"]["keep"], self.processes)
        elif resume:
            raise InputError("resume without run_dir", "name the directory of the run that is to go on")
        self.saved = None if self.checkpoints is None else self.checkpoints.open(resume)
        self.begun = self.saved is not None

    def _check(self) -> None:
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
            self.watch = Watch(**self.saved["watch"])
        if self.evaluator is not None and self.checkpoints is not None:
            with self.student.teacher():
                self.checkpoints.note_teacher(self.evaluator.measure)
        for name in STAGES:
            if self.saved is not None and STAGES.index(name) < STAGES.index(self.saved["stage"]):
                continue
            if self.recipe[name]["steps"] > 0:
                self._stage(name, getattr(self.student, name)())
        self._take_best()
        for parameter in self.student.model.parameters():
            parameter.requires_grad_(False)
        self.student.model.eval()

    def _stage(self, name: str, stage: Stage) -> None:
        recipe = self.recipe[name]
        updates = Updates(recipe, self.recipe["guard"], self.student.trainable(name))
        patience = self.recipe["evaluation"]["early_stop"]
        if self.saved is not None and self.checkpoints is not None:
            self.checkpoints.load(self.saved, self.student.learned(), updates)
            self.saved = None
        else:
            self.watch.begin_stage()
        self._tell("stage", stage=name, steps=recipe["steps"], done=updates.step_count)
        if not self.begun:
            # The student that the run starts from; a second stage starts from one that is known.
            self._evaluate(name, updates)
            self.begun = True
        while updates.step_count < recipe["steps"] and not self.watch.has_had_enough(patience):
            self._note("step", self._step(name, stage, updates))
            step, every = updates.step_count, self.recipe["evaluation"]["every"]
            if every and (step % every == 0 or step == recipe["steps"]):
                self._evaluate(name, updates)
            stop = updates.too_many_skipped() or self.watch.diverged(self.recipe["guard"])
            ends = step == recipe["steps"] or self.watch.has_had_enough(patience)
            if self.checkpoints is not None and (stop or ends or step % self.recipe["checkpoint"]["every"] == 0):
                progress = {"stage": name, "position": self.windows.position, "watch": asdict(self.watch)}
                path = self.checkpoints.save(progress, self.student.learned(), updates)
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
        return report

    def _evaluate(self, name: str, updates: Updates) -> None:
        """Measures the student, if the recipe says so, and keeps it if it is the best."""
        if self.evaluator is None:
            return
        measured = self.evaluator.measure()
        heldout, best = measured.get("heldout_nll"), False
        if heldout is not None:
            best = self.watch.observe(heldout)
            updates.observe(heldout)
            if best and self.recipe["evaluation"]["keep_best"]:
                self._keep(name, updates.step_count)
        self._note("evaluation", {"stage": name, "step": updates.step_count, **measured, "best": best})

    def _keep(self, stage: str, step: int) -> None:
        """Keeps the student as it is: in the run's directory, or without one in memory."""
        learned = self.student.learned()
        if self.checkpoints is not None:
            self.checkpoints.save_best(stage, step, learned)
        else:
            self.best = {key: x.detach().to("cpu", copy=True) for key, x in learned.items()}

    @torch.no_grad()
    def _take_best(self) -> None:
        """The run's result is the student with the lowest held-out loss, if the recipe says so."""
        if not self.recipe["evaluation"]["keep_best"]:
            return
        learned = self.student.learned()
        if self.checkpoints is not None:
            self.checkpoints.load_best(learned)
        elif self.best is not None:
            for key, value in self.best.items():
                learned[key].copy_(value)

    def _note(self, event: str, report: dict[str, Any]) -> None:
        """Into the run's log, and to whoever wants to know."""
        if self.checkpoints is not None:
            self.checkpoints.note(event, report)
        self._tell(event, **report)

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
