"""The optimizer's step as `still linearize` takes it: schedule, clipping, spikes. The same numbers, in PyTorch."""

from __future__ import annotations

import math
from dataclasses import asdict
from statistics import median_high
from typing import Any

import torch
from torch import nn

from .._errors import InputError
from ._watch import Plateau

FEWEST = 5
"""Steps that must have been taken before one can be out of line."""


def share(schedule: Any, step: int, warmup: int, total: int, floor: float) -> float:
    """The share of the peak rate at a step, counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup - 1, 1), 1.0)
    if schedule == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "linear":
        return floor + (1.0 - floor) * (1.0 - progress)
    return 1.0


class Spikes:
    """Losses and gradient norms of the last steps that were taken."""

    def __init__(self, guard: dict[str, Any]) -> None:
        self.guard = guard
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.in_a_row = 0

    def refuses(self, loss: float, norm: float) -> bool:
        """Whether a step is to be skipped; takes note of it."""
        factor, window = self.guard["spike_factor"], self.guard["spike_window"]
        if factor == 0:
            return False
        for history, value in ((self.losses, loss), (self.norms, norm)):
            if len(history) >= FEWEST and 0 < factor * median_high(history) < value:
                self.in_a_row += 1
                return True
        self.in_a_row = 0
        self.losses, self.norms = (self.losses + [loss])[-window:], (self.norms + [norm])[-window:]
        return False


class Updates:
    """AdamW over the parameters of a stage, by name."""

    def __init__(self, recipe: dict[str, Any], guard: dict[str, Any], parameters: dict[str, nn.Parameter]) -> None:
        self.recipe, self.total = recipe["optimizer"], recipe["steps"]
        self.parameters, self.spikes, self.step_count = parameters, Spikes(guard), 0
        self.plateau = Plateau()
        self.optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=self.recipe["lr"],
            betas=(self.recipe["beta1"], self.recipe["beta2"]),
            eps=self.recipe["eps"],
            weight_decay=self.recipe["weight_decay"],
        )

    def lr(self) -> float:
        """Of the next step."""
        of = self.recipe
        of_step = share(of["schedule"], self.step_count, of["warmup"], self.total, of["floor"])
        return of["lr"] * of_step * max(self.plateau.scale, of["floor"])

    def observe(self, heldout: float) -> None:
        """Takes note of a held-out loss, which a plateau schedule goes by."""
        self.plateau.observe(heldout, self.recipe["schedule"])

    def step(self, loss: float) -> dict[str, Any]:
        """Takes the step along the gradients that parameters have, or skips it if it is a spike."""
        gradients = [x.grad for x in self.parameters.values() if x.grad is not None]
        norm = math.sqrt(math.fsum(g.double().square().sum().item() for g in gradients))
        for what, value in (("the loss", loss), ("the gradient's norm", norm)):
            if not math.isfinite(value):
                raise InputError(
                    f"step {self.step_count + 1}: {what} is {value}", "lower the learning rate, or set optimizer.clip to 1"
                )
        lr = self.lr()
        skipped = self.spikes.refuses(loss, norm)
        if not skipped:
            clip = self.recipe["clip"]
            if 0 < clip < norm:
                torch._foreach_mul_(gradients, clip / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.step_count += 1
        self.optimizer.zero_grad(set_to_none=True)
        report = {"step": self.step_count, "loss": loss, "grad_norm": norm, "lr": lr}
        return {**report, "skipped": True} if skipped else report

    def state(self) -> dict[str, torch.Tensor]:
        """Moments by name; zeros of a parameter that took no step yet."""
        state = {}
        for name, parameter in self.parameters.items():
            own = self.optimizer.state.get(parameter, {})
            for short, key in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                state[f"{short}.{name}"] = own.get(key, torch.zeros_like(parameter)).detach()
            state[f"n.{name}"] = torch.as_tensor(own.get("step", 0.0), dtype=torch.float32).clone()
        return state

    def restore(self, state: dict[str, torch.Tensor], progress: dict[str, Any]) -> None:
        """Goes on from moments that `state` gave."""
        for name, parameter in self.parameters.items():
            if state[f"n.{name}"].item() == 0:
                continue
            self.optimizer.state[parameter] = {
                "step": state[f"n.{name}"].clone(),
                "exp_avg": state[f"m.{name}"].clone(),
                "exp_avg_sq": state[f"v.{name}"].clone(),
            }
        self.step_count = progress["step"]
        self.spikes.losses, self.spikes.norms = progress["losses"], progress["norms"]
        self.spikes.in_a_row = progress["in_a_row"]
        self.plateau = Plateau(**progress["plateau"])

    def progress(self) -> dict[str, Any]:
        """What `restore` wants besides moments."""
        spikes, plateau = self.spikes, asdict(self.plateau)
        step = self.step_count
        return dict(step=step, losses=spikes.losses, norms=spikes.norms, in_a_row=spikes.in_a_row, plateau=plateau)

    def too_many_skipped(self) -> str | None:
        """Why the run is to be given up, if it is."""
        most = self.spikes.guard["max_skips"]
        if most and self.spikes.in_a_row >= most:
            return f"{most} steps in a row had a loss or gradient beyond {self.spikes.guard['spike_factor']} times the usual"
        return None
