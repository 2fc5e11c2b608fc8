"""Hybrid attention in a loaded model, through transformers' attention interface.

Every layer with full attention gets a module `hybrid`: the operator of `modeling_still.py` with what it learns. The model's own
code projects, norms and rotates as before, and then calls `attention` below. What that computes, `Shared.mode` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .._errors import InputError
from .._transformers.hybrid_attention import HybridOperator, LinearOperator, Reading
from ._low_rank import Switch

NAME = "still_hybrid"
"""What transformers calls this attention."""

Compare = Callable[[nn.Module, Callable[..., Tensor], Tensor], None]


class Shared(Switch):
    """What all layers of a model share."""

    def __init__(self) -> None:
        self.mode = "student"
        """"student": hybrid attention and low-rank updates. "teacher": neither. "transfer": as "teacher", and `compare` is told
        of each layer's inputs and output. Recomputed layers run outside of any context, as the student."""
        self.compare: Compare | None = None
        self.stage = 0
        """Of the stage that was made last: `id`."""
        self.readings: dict[tuple[int, int, torch.device], Reading] = {}

    @property
    def updates(self) -> bool:
        return self.mode == "student"

    @contextmanager
    def as_teacher(self, compare: Compare | None = None) -> Iterator[None]:
        before = self.mode, self.compare
        self.mode, self.compare = ("transfer" if compare else "teacher"), compare
        try:
            yield
        finally:
            self.mode, self.compare = before

    def reading(self, batch: int, tokens: int, device: torch.device) -> Reading:
        """Whole sequences. Padding on the right is read like tokens: no token before it sees it."""
        key = (batch, tokens, device)
        if key not in self.readings:
            self.readings.clear()
            self.readings[key] = Reading([0] * batch, [tokens] * batch, device)
        return self.readings[key]


def place(module: nn.Module, section: dict[str, Any], sizes: tuple[int, int, int, int], shared: Shared) -> nn.Module:
    """Gives a layer's attention its `hybrid`. `sizes`: hidden size, query heads, heads of keys, head dimension."""
    hidden, heads, kv_heads, head_dim = sizes
    kind = LinearOperator if section["mode"] == "linear_only" else HybridOperator
    hybrid = kind(section, module.layer_idx, heads, kv_heads, head_dim)
    if section["gate"]:
        hybrid.g_proj = nn.Linear(hidden, heads * head_dim, bias=False)
        module.register_forward_pre_hook(_remember_input, with_kwargs=True)
    hybrid.shared = shared
    module.hybrid = hybrid
    return hybrid


def _remember_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # The interface is given queries, keys and values; a gate is made from what they are made from.
    module.hybrid.input = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def hybrid_output(hybrid: nn.Module, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> Tensor:
    """[B, H, N, D] of queries, keys and values after RoPE, and the layer's normed input if there is a gate."""
    gate = None
    if x is not None:
        gate = hybrid.g_proj(x.to(torch.float32)).sigmoid()
        gate = gate.unflatten(-1, (-1, q.shape[-1])).transpose(1, 2)
    reading = hybrid.shared.reading(q.shape[0], q.shape[2], q.device)
    out = hybrid.attend(reading, 0, q, k, v, gate)
    if torch.is_grad_enabled() and q.shape[2] <= 2 * hybrid.segment_length:
        # Nothing retires, and no map is used: the gradient is zero, not absent, as DDP wants it.
        out = out + sum(0.0 * x.sum() for x in hybrid.parameters() if x.requires_grad)
    return out


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: queries [B, H, N, D], keys and values [B, K, N, D]; gives [B, N, H, D]."""
    hybrid = getattr(module, "hybrid", None)
    if hybrid is None:
        # A layer that keeps its attention to a sliding window.
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    shared = hybrid.shared
    x = hybrid.__dict__.pop("input", None)
    if shared.mode != "student":
        # Causal alone: padding is on the right.
        out, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
        if shared.compare is not None:
            q, k, v = query.detach(), key.detach(), value.detach()
            x = None if x is None else x.detach()
            shared.compare(module, lambda operator=hybrid: hybrid_output(operator, q, k, v, x), out.transpose(1, 2))
        return out, None
    return hybrid_output(hybrid, query, key, value, x).transpose(1, 2).contiguous(), None


def refuse_all_but_whole_rows(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a decoder's forward pass: an error for what would make other sequences of a row than the whole."""
    # transformers 5 calls it `cache`.
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if cache is not None and cache.get_seq_length() > 0:
        raise InputError(
            "tokens were to go on from a cache: a model in training reads whole sequences",
            "pass use_cache=False; to generate, save the student and open it with transformers or still",
        )
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    whole = positions is None or bool((positions == torch.arange(positions.shape[-1], device=positions.device)).all())
    if not whole or (isinstance(mask, Tensor) and mask.dim() != 2):
        raise InputError(
            "position_ids or a mask of four dimensions make several sequences of a row",
            "give every sequence a row of its own, padded on the right, and leave position_ids out",
        )
    if mask is not None and not bool(mask[:, 0].all()):
        raise InputError(
            "attention_mask pads on the left, where sequences begin",
            'pad on the right: tokenizer.padding_side = "right"',
        )


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of a layer with a sliding window; other layers need none."""
    return None if kwargs.get("local_size") is None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, _mask)
