"""What held-out losses say of a run, as `still linearize` has it: which student is the best, when a rate falls or a stage ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Watch:
    """Held-out losses so far."""

    best: float | None = None
    """Of the whole run, as `last`."""
    last: float | None = None
    start: float | None = None
    """Of this stage, at its beginning and at best."""
    best_of_stage: float | None = None
    waited: int = 0
    """Evaluations since the best one of this stage."""

    def begin_stage(self) -> None:
        """A stage begins; its student is the one that was measured last, if one was."""
        self.start = self.best_of_stage = self.last
        self.waited = 0

    def observe(self, heldout: float) -> bool:
        """Takes note of a held-out loss; whether it is the run's lowest."""
        is_best = self.best is None or heldout < self.best
        if self.best_of_stage is None or heldout < self.best_of_stage:
            self.best_of_stage, self.waited = heldout, 0
        else:
            self.waited += 1
        if is_best:
            self.best = heldout
        self.start = heldout if self.start is None else self.start
        self.last = heldout
        return is_best

    def has_had_enough(self, patience: int) -> bool:
        """Whether the stage has gone `patience` evaluations without getting better."""
        return 0 < patience <= self.waited

    def diverged(self, guard: dict[str, Any]) -> str | None:
        """Why the run is to be given up, if it is."""
        growth = guard["max_heldout_growth"]
        if self.start is None or self.last is None or not 0.0 < growth * self.start < self.last:
            return None
        return f"the held-out loss rose from {self.start:.3f} to {self.last:.3f} nats per token"


@dataclass
class Plateau:
    """A rate that is multiplied by a factor when the held-out loss has stopped falling: PyTorch's `ReduceLROnPlateau`."""

    best: float | None = None
    waited: int = 0
    """Evaluations since the best one, the last reduction or its cooldown."""
    cooling: int = 0
    """Evaluations that are not counted yet."""
    scale: float = 1.0
    """What was taken off so far: a factor of the rate."""

    def observe(self, loss: float, schedule: Any) -> None:
        """Takes note of a held-out loss; other schedules do not go by it."""
        if not isinstance(schedule, dict):
            return
        of = schedule["plateau"]
        if self.best is None or loss < self.best * (1.0 - of["threshold"]):
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        if self.cooling > 0:
            self.cooling -= 1
            self.waited = 0
        if self.waited > of["patience"]:
            self.scale *= of["factor"]
            self.cooling, self.waited = of["cooldown"], 0
