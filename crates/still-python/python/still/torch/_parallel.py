"""The processes of torch.distributed; one where it is not initialized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from .._errors import InputError


class Processes:
    """This process and the others."""

    def __init__(self) -> None:
        self.several = distributed.is_available() and distributed.is_initialized()
        self.count = distributed.get_world_size() if self.several else 1
        self.rank = distributed.get_rank() if self.several else 0

    def wait(self) -> None:
        """For all to come here."""
        if self.several:
            distributed.barrier()

    def first_says(self, value: Any) -> Any:
        """What the first process has as `value`."""
        if not self.several:
            return value
        said = [value]
        distributed.broadcast_object_list(said, src=0)
        return said[0]

    def first_does(self, work: Any) -> Any:
        """What `work()` gives on the first process; an error of it is raised by all."""
        outcome: Any = None
        if self.rank == 0:
            try:
                outcome = (work(), None)
            except Exception as error:
                outcome = (None, error)
        value, failure = self.first_says(outcome)
        if failure is not None:
            raise failure
        return value

    def summed(self, values: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.several:
            distributed.all_reduce(values)
        return values

    def all_are(self, done: bool, device: torch.device) -> bool:
        """Whether it is so in every process."""
        return bool(self.summed(torch.tensor([float(not done)], device=device)).item() == 0.0)

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Adds up what processes found. A parameter has no gradient afterwards if it had none anywhere."""
        if not self.several or not parameters:
            return
        there = torch.tensor([float(x.grad is not None) for x in parameters], device=parameters[0].device)
        flat = torch.cat([(torch.zeros_like(x) if x.grad is None else x.grad).flatten() for x in parameters])
        self.summed(there)
        self.summed(flat)
        parts = flat.split([x.numel() for x in parameters])
        for parameter, part, count in zip(parameters, parts, there.tolist()):
            parameter.grad = part.view_as(parameter) if count else None


def refuse_zero_3(model: nn.Module) -> None:
    """An error if DeepSpeed's ZeRO 3 has taken the parameters away, of which it brings back those of one module at a time."""
    if any(hasattr(x, "ds_id") for x in model.parameters()):
        raise InputError(
            "DeepSpeed's ZeRO 3 has sharded the model: the losses of both stages reach parameters that it has taken away",
            "shard with student.shard() (FSDP2), or set zero_optimization.stage to 1 or 2",
        )
