"""STILL in PyTorch: the operator (`hybrid_attention`), and models of transformers that become students (`linearize`).

`linearize` and what comes with it need transformers, which is imported when one of them is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._cuda import LEARNED, ROWS
from ._linear import has_linear, linear
from ._operator import HybridAttention, LinearState, has_kernels, hybrid_attention, hybrid_attention_with_state

if TYPE_CHECKING:
    from ._linearize import linearize as linearize
    from ._stages import AttentionTransfer as AttentionTransfer
    from ._stages import LowRankFinetuning as LowRankFinetuning
    from ._stages import StageOutput as StageOutput
    from ._student import Student as Student

__all__ = [
    "LEARNED",
    "ROWS",
    "AttentionTransfer",
    "HybridAttention",
    "LinearState",
    "LowRankFinetuning",
    "StageOutput",
    "Student",
    "has_kernels",
    "has_linear",
    "hybrid_attention",
    "hybrid_attention_with_state",
    "linear",
    "linearize",
]

_LAZY = {
    "linearize": "_linearize",
    "Student": "_student",
    "AttentionTransfer": "_stages",
    "LowRankFinetuning": "_stages",
    "StageOutput": "_stages",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
