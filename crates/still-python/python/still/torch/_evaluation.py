"""Measurements of the student while a run goes on: what `still linearize` measures, by PyTorch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import _still
from .._errors import InputError
from ._parallel import Processes
from ._stages import ROWS

if TYPE_CHECKING:
    from ._student import Student

Measured = dict[str, float]
"""`heldout_nll`, `passkey_recall`, `repeated_nll`, as far as the recipe asks for them, and `seconds`."""


class Evaluator:
    """What is measured, the same at every evaluation of a run.

    Processes take the windows in turn. All of them call the model equally often, as one that is sharded wants it.
    """

    def __init__(self, student: Student, heldout: Sequence[Any], device: torch.device, processes: Processes) -> None:
        recipe = student.recipe["evaluation"]
        if len(heldout) < recipe["windows"]:
            raise InputError(
                f"evaluation.windows is {recipe['windows']}, {len(heldout)} held-out windows are there",
                "hold out more text, or lower evaluation.windows (0: measure no loss)",
            )
        self.model, self.device, self.processes = student.model, device, processes
        self.heldout = [(ids, 1) for ids, _, _ in heldout[: recipe["windows"]]]
        directory = student.source.tokenizer_directory()
        self.questions = _still.Questions(student.config, student.recipe_text, directory)
        self.repeated, self.prompts = self.questions.repeated(), self.questions.prompts()
        self.ends = _ends(student.model)

    @torch.no_grad()
    def measure(self) -> Measured:
        """Measures the model as it is: the student, or in its context the teacher."""
        started = time.monotonic()
        measured: Measured = {}
        with _evaluating(self.model):
            for name, windows in (("heldout_nll", self.heldout), ("repeated_nll", self.repeated)):
                if windows:
                    measured[name] = self._loss(name, windows)
            if self.prompts:
                measured["passkey_recall"] = self._recall()
        # What decides on the run is the same number in all processes.
        of_first: Measured = self.processes.first_says({**measured, "seconds": time.monotonic() - started})
        return of_first

    def _mine(self, count: int) -> Iterator[tuple[int, bool]]:
        """Which of `count` items this process takes, and whether they are its own: the last ones of some are another's."""
        for first in range(0, count, self.processes.count):
            index = first + self.processes.rank
            yield min(index, count - 1), index < count

    def _logits(self, ids: Any, last: int = 0) -> Tensor:
        """[N, vocabulary], or of the last tokens alone."""
        input_ids = torch.as_tensor(ids, device=self.device)[None]
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False, logits_to_keep=last).logits[0]
        return logits

    def _loss(self, name: str, windows: Sequence[tuple[Any, int]]) -> float:
        """The mean over all scored tokens, nats."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for index, own in self._mine(len(windows)):
            ids, scored_from = windows[index]
            logits, targets = self._logits(ids)[scored_from - 1 : -1], torch.as_tensor(ids, device=self.device)[scored_from:]
            if own:
                parts = zip(logits.split(ROWS), targets.split(ROWS))
                loss = sum(cross_entropy(x.float(), y, reduction="sum").double() for x, y in parts)
                total += torch.stack([torch.as_tensor(loss, device=self.device), total.new_tensor(len(targets))])
        loss, count = self.processes.summed(total).tolist()
        if not loss < float("inf"):
            raise InputError(f"{name} is {loss / count}", "lower the learning rate, or set optimizer.clip to 1")
        return loss / count

    def _recall(self) -> float:
        """The mean of what answers are worth."""
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        for index, own in self._mine(len(self.prompts)):
            answer = self._written(*self.prompts[index])
            if own:
                total += self.questions.score(index, answer)
        return float(self.processes.summed(total).item()) / len(self.prompts)

    def _written(self, prompt: Any, guess: Any, most: int) -> list[int]:
        """What greedy decoding writes, without a cache: a guess is read whole, and read again with its first wrong token mended,
        until greedy decoding would have written every token of it."""
        prompt, answer = torch.as_tensor(prompt), [*guess.tolist()][:most]
        answer += [0] * (most - len(answer))
        known = 0
        done = False
        while not self.processes.all_are(done, self.device):
            ids = torch.cat([prompt, torch.tensor(answer[:-1], dtype=prompt.dtype)])
            greedy = self._logits(ids, last=most).argmax(-1).tolist()
            while known < most and answer[known] == greedy[known]:
                known += 1
            if known < most:
                answer[known] = greedy[known]
                known += 1
            done = known >= most or any(token in self.ends for token in answer[:known])
        end = next((n for n, token in enumerate(answer[:known]) if token in self.ends), known)
        return answer[:end]


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout, and without layers that are computed again in a backward pass."""
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def _ends(model: Any) -> set[int]:
    """Tokens that end an answer."""
    ends: set[int] = set()
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        ends.update([] if found is None else [found] if isinstance(found, int) else found)
    return ends
