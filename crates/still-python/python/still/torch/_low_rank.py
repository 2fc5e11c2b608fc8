"""Low-rank updates (LoRA) of frozen projections."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Switch(Protocol):
    """Says whether updates count."""

    @property
    def updates(self) -> bool: ...


class LowRank(nn.Module):
    """A projection `base` and `scale · B A` of some of its output rows, by name: Phi-3 has q, k and v in one matrix."""

    def __init__(
        self, base: nn.Module, rows: dict[str, tuple[int, int]], rank: int, scale: float, dropout: float, switch: Switch
    ) -> None:
        super().__init__()
        self.base = base
        self.rows, self.scale, self.dropout, self.switch = rows, scale, dropout, switch
        device = base.weight.device
        make = lambda inner, out: nn.Linear(inner, out, bias=False, device=device, dtype=torch.float32)
        self.lora_A = nn.ModuleDict({name: make(base.in_features, rank) for name in rows})
        self.lora_B = nn.ModuleDict({name: make(rank, stop - start) for name, (start, stop) in rows.items()})

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if not self.switch.updates:
            return out
        wide = x.to(torch.float32)
        if self.dropout > 0.0:
            # Another one for each update, as the other trainer has it.
            inputs = {name: nn.functional.dropout(wide, self.dropout, self.training) for name in self.rows}
        else:
            inputs = dict.fromkeys(self.rows, wide)
        parts = {name: self.scale * self.lora_B[name](self.lora_A[name](inputs[name])) for name in self.rows}
        if len(parts) == 1 and next(iter(self.rows.values())) == (0, out.shape[-1]):
            return out + next(iter(parts.values())).to(out.dtype)
        zero = lambda start, stop: out.new_zeros(*out.shape[:-1], stop - start)
        joined, at = [], 0
        for name, (start, stop) in sorted(self.rows.items(), key=lambda row: row[1]):
            joined += [zero(at, start), parts[name].to(out.dtype)]
            at = stop
        return out + torch.cat([*joined, zero(at, out.shape[-1])], -1)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The base's matrix, given whole, with the updates added, in float32."""
        weight = weight.to(torch.float32).clone()
        for name, (start, stop) in self.rows.items():
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            weight[start:stop] += self.scale * (b @ a).to(weight.device)
        return weight
