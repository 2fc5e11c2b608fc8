"""STILL's hybrid attention as an op of PyTorch: `hybrid_attention`, forward and backward, by the kernels of `still` on the CPU, and on
CUDA in a wheel that was built with them (`_cuda.py`).

The op is `torch.ops.still.hybrid_attention`. It has a fake implementation, so that `torch.compile` and `FakeTensorMode` trace
through it. Under autocast it computes in float32 on the CPU, on CUDA in bfloat16 if that is autocast's dtype.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from .. import _cuda, _still
from .._cuda import LEARNED
from .._errors import InputError

__all__ = ["HybridAttention", "LinearState", "has_kernels", "hybrid_attention", "hybrid_attention_with_state"]


class HybridAttention(NamedTuple):
    """What `hybrid_attention` gives."""

    out: Tensor
    """[B, H, N, D], in the dtype of `q`."""
    absorbed_at: Tensor
    """[B, S, N] int32: the chunk from which on a token is part of the linear state; -1 if it stays exact."""
    scores: Tensor
    """[B, S, N] float32: the router's scores."""


class LinearState(NamedTuple):
    """What the sequences of a call leave in the linear state of each selection head: float32, or float64 of float64 rows."""

    s: Tensor
    """[B, S, 2F, D]: the sum of phi(k) v."""
    z: Tensor
    """[B, S, 2F]: the sum of phi(k)."""


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map_q: Tensor,
    feature_map_k: Tensor,
    config: str | Mapping[str, Any],
    layer: int = 0,
    gate: Tensor | None = None,
    householder_q: Tensor | None = None,
    householder_k: Tensor | None = None,
    log_lambda: Tensor | None = None,
    window_factor: Tensor | None = None,
) -> HybridAttention:
    """Hybrid attention of whole sequences that begin at position 0.

    `q` and `gate` [B, H, N, D], `k` and `v` [B, K, N, D] after RoPE, float32, float64 or bfloat16, all on one device: the CPU, or
    CUDA, without float64 and within the limits of docs/cuda.md. Learned tensors,
    for H query heads, S selection heads and F features: `feature_map_q` [H, D, F], `feature_map_k` [S, D, F], `householder_q`
    [H, D], `householder_k` [S, D], `log_lambda` [H], `window_factor` [H]; which of them are needed, `config` says. `config` is
    the section `still` of a student's config.json, as a dict or as JSON, which `torch.compile` traces through; `layer` which
    of its layers this is.

    Gradients flow to all of these tensors; routing is discrete and has none.
    """
    return hybrid_attention_with_state(
        q,
        k,
        v,
        feature_map_q=feature_map_q,
        feature_map_k=feature_map_k,
        config=config,
        layer=layer,
        gate=gate,
        householder_q=householder_q,
        householder_k=householder_k,
        log_lambda=log_lambda,
        window_factor=window_factor,
    )[0]


def hybrid_attention_with_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map_q: Tensor,
    feature_map_k: Tensor,
    config: str | Mapping[str, Any],
    layer: int = 0,
    gate: Tensor | None = None,
    householder_q: Tensor | None = None,
    householder_k: Tensor | None = None,
    log_lambda: Tensor | None = None,
    window_factor: Tensor | None = None,
) -> tuple[HybridAttention, LinearState | None]:
    """`hybrid_attention`, and the linear state that the sequences leave, through which no gradient flows; `None` on CUDA, where the
    kernels do not give it."""
    learned = (feature_map_q, feature_map_k, householder_q, householder_k, log_lambda, window_factor)
    config = config if isinstance(config, str) else json.dumps(dict(config))
    if q.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        dtype = torch.bfloat16 if torch.get_autocast_dtype("cuda") == torch.bfloat16 else torch.float32
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        gate = None if gate is None else gate.to(dtype)
    if q.device.type == "cuda" and _cuda.is_eager(q, k, v, gate, *learned):
        return HybridAttention(*_cuda.attend(q, k, v, gate, learned, config, layer)), None
    out, absorbed_at, scores, saved = _forward(q, k, v, gate, *learned, config, layer)
    state = None if q.device.type == "cuda" else _state(saved, q, feature_map_k)
    return HybridAttention(out, absorbed_at, scores), state


def has_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map_q: Tensor,
    feature_map_k: Tensor,
    config: str,
    layer: int = 0,
    gate: Tensor | None = None,
    householder_q: Tensor | None = None,
    householder_k: Tensor | None = None,
    log_lambda: Tensor | None = None,
    window_factor: Tensor | None = None,
) -> bool:
    """Whether `hybrid_attention` computes this call: for callers that have another way where it does not."""
    if q.device.type != "cuda":
        return q.device.type == "cpu" and q.dtype in _cuda.ROWS
    learned = (feature_map_q, feature_map_k, householder_q, householder_k, log_lambda, window_factor)
    try:
        _cuda.plan_of(q, k, v, gate, learned, config, layer)
    except InputError:
        return False
    return True


def _state(saved: Tensor, q: Tensor, feature_map_k: Tensor) -> LinearState:
    batch, (heads, head_dim, features) = q.shape[0], feature_map_k.shape
    s, z = saved.detach().view(_wide(q.dtype)).view(batch, heads, -1).split([2 * features * head_dim, 2 * features], -1)
    return LinearState(s.unflatten(-1, (2 * features, head_dim)), z)


def _state_bytes(q: Tensor, feature_map_k: Tensor) -> int:
    heads, head_dim, features = feature_map_k.shape
    return q.shape[0] * heads * 2 * features * (head_dim + 1) * _wide(q.dtype).itemsize


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _array(x: Tensor | None, dtype: torch.dtype) -> Any:
    return None if x is None else x.detach().to(dtype).contiguous().numpy()


def _arrays(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> list[Any]:
    return [_array(x, dtype) for x in tensors]


@torch.library.custom_op("still::hybrid_attention", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Optional[Tensor],
    feature_map_q: Tensor,
    feature_map_k: Tensor,
    householder_q: Optional[Tensor],
    householder_k: Optional[Tensor],
    log_lambda: Optional[Tensor],
    window_factor: Optional[Tensor],
    config: str,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The three of `HybridAttention`, and bytes: on CUDA what the backward pass reads, on the CPU the linear state."""
    learned = (feature_map_q, feature_map_k, householder_q, householder_k, log_lambda, window_factor)
    _cuda.check(q, k, v, gate, *learned)
    wide = _wide(q.dtype)
    rows, out = _arrays((q, k, v), wide), torch.empty(q.shape, dtype=wide)
    if feature_map_k.dim() != 3:
        raise InputError(f"feature_map_k has the shape {list(feature_map_k.shape)}", "give [selection heads, head_dim, features]")
    saved = torch.empty(_state_bytes(q, feature_map_k), dtype=torch.uint8)
    to = (out.numpy(), saved.view(wide).numpy())
    absorbed_at, scores = _still.attention(*to, rows, _array(gate, wide), _arrays(learned, wide), config, layer)
    return out.to(q.dtype), torch.from_numpy(absorbed_at), torch.from_numpy(scores), saved


@_forward.register_kernel("cuda")
def _(q, k, v, gate, *others):  # type: ignore[no-untyped-def]
    *learned, config, layer = others
    return _cuda.forward(q, k, v, gate, tuple(learned), config, layer)


@_forward.register_fake
def _(q, k, v, gate, feature_map_q, feature_map_k, *others):  # type: ignore[no-untyped-def]
    *_, config, layer = others
    if q.device.type == "cuda":
        return _cuda.outputs(q, gate, feature_map_k, config, layer)
    batch, _, tokens, _ = q.shape
    routing = (batch, feature_map_k.shape[0], tokens)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    empty = lambda shape, dtype: q.new_empty(shape, dtype=dtype)
    saved = empty(_state_bytes(q, feature_map_k), torch.uint8)
    return out, empty(routing, torch.int32), empty(routing, torch.float32), saved


@torch.library.custom_op("still::hybrid_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    d_out: Tensor,
    out: Tensor,
    absorbed_at: Tensor,
    saved: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Optional[Tensor],
    feature_map_q: Tensor,
    feature_map_k: Tensor,
    householder_q: Optional[Tensor],
    householder_k: Optional[Tensor],
    log_lambda: Optional[Tensor],
    window_factor: Optional[Tensor],
    config: str,
    layer: int,
) -> list[Tensor]:
    """The gradients of the tensors that are there, in their order."""
    learned = (feature_map_q, feature_map_k, householder_q, householder_k, log_lambda, window_factor)
    wide = _wide(q.dtype)
    of_rows, of_gate, of_learned = _still.attention_backward(
        _array(d_out, wide),
        _array(out, wide),
        absorbed_at.contiguous().numpy(),
        _arrays((q, k, v), wide),
        _array(gate, wide),
        _arrays(learned, wide),
        config,
        layer,
    )
    gradients = (*of_rows, of_gate, *of_learned)
    given = (q, k, v, gate, *learned)
    return [torch.from_numpy(dx).to(x.dtype) for dx, x in zip(gradients, given) if x is not None]


@_backward.register_kernel("cuda")
def _(d_out, out, absorbed_at, saved, q, k, v, gate, *others):  # type: ignore[no-untyped-def]
    *learned, config, layer = others
    return _cuda.backward(d_out, out, absorbed_at, saved, q, k, v, gate, tuple(learned), config, layer)


@_backward.register_fake
def _(d_out, out, absorbed_at, saved, q, k, v, gate, *others):  # type: ignore[no-untyped-def]
    *learned, _, _ = others
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, gate, *learned) if x is not None
    ]


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.config, ctx.layer = inputs
    out, absorbed_at, scores, saved = output
    ctx.mark_non_differentiable(absorbed_at, scores, saved)
    ctx.save_for_backward(out, absorbed_at, saved, *tensors)


def _gradients(ctx, d_out, *_):  # type: ignore[no-untyped-def]
    out, absorbed_at, saved, *tensors = ctx.saved_tensors
    given = iter(_backward(d_out, out, absorbed_at, saved, *tensors, ctx.config, ctx.layer))
    return (*(None if x is None else next(given) for x in tensors), None, None)


_forward.register_autograd(_gradients, setup_context=_save)
torch.library.register_autocast("still::hybrid_attention", "cpu", torch.float32)
