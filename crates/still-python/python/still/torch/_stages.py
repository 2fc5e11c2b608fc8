"""Both stages of training as modules: token ids in, a loss out."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint

from .._errors import InputError
from ._parallel import refuse_zero_3

if TYPE_CHECKING:
    from ._student import Student

ROWS = 1024
"""Logits whose loss is computed at a time; the backward pass computes it again."""


class StageOutput(NamedTuple):
    """What a stage gives."""

    loss: Tensor
    """What is minimized."""
    reported: Tensor
    """The loss as `still linearize` reports it: stage 1 without `loss_scale`, as the mean over layers; stage 2 in nats a token."""
    layer_losses: Tensor
    """[layers that learn] (stage 1); empty (stage 2)."""


class Stage(nn.Module):
    """What both stages have. `model` is the student's; what learns has `requires_grad` from the moment that a stage is made."""

    name: str

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.model = student.model
        self.shared, self.recipe = student.shared, student.recipe[self.name]
        self.shared.stage = id(self)
        wanted = student.trainable(self.name)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for parameter in wanted.values():
            parameter.requires_grad_(True)

    def check(self) -> None:
        """An error if another stage was made since, where others learn, or if parameters are not to be had."""
        refuse_zero_3(self.model)
        if self.shared.stage != id(self):
            raise InputError(
                f"{type(self).__name__} is called after another stage was made, whose parameters learn now",
                "make a stage when the one before has ended",
            )

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None, **options: Any) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options).logits


def _real(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, N]: which places hold a token."""
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise InputError(f"input_ids has the shape {list(input_ids.shape)}", "give [batch, tokens]")
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has the shape {list(attention_mask.shape)}, input_ids {list(input_ids.shape)}",
            "give one number a token: 1, or 0 for padding on the right",
        )
    return attention_mask.bool()


class AttentionTransfer(Stage):
    """Stage 1. Hidden states follow the teacher. In each layer the hybrid attention learns to give what softmax attention gives.

    No graph spans a layer, and none leaves the model: what wraps its layers (FSDP) sees a forward pass without gradients.
    """

    name = "transfer"

    def __init__(self, student: Student) -> None:
        super().__init__(student)
        self.layers = student.hybrid_layers
        if not student.section["branches"]["linear"]:
            raise InputError("attention transfer of a student without a linear branch", "set transfer.steps to 0")
        self.alone = {}
        if self.recipe["linear_branch_weight"] > 0:
            self.alone = {id(hybrid): _linear_alone(hybrid) for hybrid in student.hybrids}
        self.scale = self.recipe["loss_scale"] / (len(self.layers) if self.recipe["reduction"] == "mean" else 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> StageOutput:
        """`input_ids` [B, N]; `attention_mask` [B, N] pads on the right. Each token counts the same."""
        self.check()
        real = _real(input_ids, attention_mask)
        share = real.sum(1) / real.sum()
        losses: list[Tensor] = []

        def compare(module: nn.Module, hybrid: Callable[..., Tensor], target: Tensor) -> None:
            with torch.enable_grad():
                of = lambda out: self.rows(module, out, target, real)
                loss = (share * of(hybrid())).sum()
                if self.alone:
                    linear = (share * of(hybrid(self.alone[id(module.hybrid)]))).sum()
                    loss = loss + self.recipe["linear_branch_weight"] * linear
                losses.append(loss)

        with torch.no_grad(), self.shared.as_teacher(compare):
            self.logits(input_ids, attention_mask, logits_to_keep=1)
        of_layers = torch.stack(losses)
        reported = of_layers.detach()
        return StageOutput(self.scale * of_layers.sum(), reported.mean(), reported)

    def rows(self, module: nn.Module, out: Tensor, target: Tensor, real: Tensor) -> Tensor:
        """The loss of each row of the batch, [B], from outputs [B, H, N, D]."""
        if self.recipe["loss"] == "head_mse":
            return _row_errors(out, target, real[:, None, :, None], self.recipe["normalise"])
        project = lambda x: module.o_proj(x.transpose(1, 2).flatten(2).to(target.dtype))
        with torch.no_grad():
            projected = project(target)
        # The gradient is taken here, while the layer has its weights: whoever shards them has taken them away by the backward pass.
        leaf = out.detach().requires_grad_()
        losses = _row_errors(project(leaf), projected, real[..., None], self.recipe["normalise"])
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach() + ((out - out.detach()) * gradient).flatten(1).sum(1)


def _row_errors(out: Tensor, target: Tensor, real: Tensor, normalise: bool) -> Tensor:
    """The mean squared error of each row's tokens, over the variance of its target if asked."""
    out, target = out.float(), target.float()
    real = real.expand_as(out)
    count = real.flatten(1).sum(1)
    mean = lambda x: torch.where(real, x, 0.0).flatten(1).sum(1) / count
    errors = mean((out - target).square())
    if not normalise:
        return errors
    center = mean(target).view(-1, *[1] * (out.dim() - 1))
    return errors / mean((target - center).square())


def _linear_alone(hybrid: nn.Module) -> nn.Module:
    """The linear branch by itself: of the exact keys only the token's own remains. It shares what is learned."""
    alone = copy.copy(hybrid)
    alone.branches = {"window": False, "salient": False, "linear": True}
    if hasattr(hybrid, "section"):
        alone.section = json.dumps({**json.loads(hybrid.section), "branches": alone.branches})
    return alone


class LowRankFinetuning(Stage):
    """Stage 2. The student as a whole learns to predict what the teacher predicts, or the next token."""

    name = "finetune"

    def __init__(self, student: Student) -> None:
        super().__init__(student)
        objective = self.recipe["objective"]
        named = {"logit_kl": 1.0, "cross_entropy": 0.0}
        self.kl = objective["mixed"]["kl"] if isinstance(objective, dict) else named[objective]
        self.of_positions = objective != "cross_entropy"

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, counted: Tensor | None = None) -> StageOutput:
        """`input_ids` [B, N]; `attention_mask` [B, N] pads on the right; `counted` [B, N]: tokens whose prediction counts."""
        self.check()
        real = _real(input_ids, attention_mask)
        next_is_real = torch.zeros_like(real)
        next_is_real[:, :-1] = real[:, 1:] if counted is None else real[:, 1:] & counted[:, 1:].bool()
        rows = real if counted is None else next_is_real
        teacher = None
        if self.of_positions:
            with torch.no_grad(), self.shared.as_teacher():
                teacher = self.logits(input_ids, attention_mask)
        student = self.logits(input_ids, attention_mask)
        targets = input_ids.roll(-1, 1)
        per_row = [
            self.row(student[b], None if teacher is None else teacher[b], targets[b], rows[b], next_is_real[b])
            for b in range(len(input_ids))
        ]
        predictions = (rows if self.of_positions else next_is_real).sum(1)
        loss = (torch.stack(per_row) * predictions / predictions.sum().clamp(min=1)).sum()
        return StageOutput(loss, loss.detach(), loss.new_zeros(0))

    def row(self, student: Tensor, teacher: Tensor | None, targets: Tensor, rows: Tensor, predicts: Tensor) -> Tensor:
        """The loss of a sequence, nats a token."""
        total = student.sum() * 0.0
        if self.kl > 0.0 and teacher is not None:
            index = rows.nonzero()[:, 0]
            for part in index.split(ROWS):
                value = checkpoint(_divergence, student[part], teacher[part], use_reentrant=False)
                total = total + self.kl * value / max(len(index), 1)
        if self.kl < 1.0:
            index = predicts.nonzero()[:, 0]
            for part in index.split(ROWS):
                value = checkpoint(_surprise, student[part], targets[part], use_reentrant=False)
                total = total + (1.0 - self.kl) * value / max(len(index), 1)
        return total


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """The sum over rows of KL(teacher || student)."""
    student, teacher = log_softmax(student.float(), -1), log_softmax(teacher.float(), -1)
    return (teacher.exp() * (teacher - student)).sum()


def _surprise(logits: Tensor, ids: Tensor) -> Tensor:
    """The sum over rows of the next token's negative log-probability."""
    return cross_entropy(logits.float(), ids, reduction="sum")
