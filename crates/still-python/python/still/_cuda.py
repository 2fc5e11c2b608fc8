"""The op of `still.torch` on CUDA tensors: the kernels of `still`, in PyTorch's memory, on its current stream.

Every buffer is PyTorch's, scratch too, and every kernel is queued on the stream that is current: nothing is copied or waited for, and
a buffer that is freed here is used again only by what is queued there later. What the backward pass needs is one more output of the
op, `saved`, so that autograd, checkpointing and `torch.compile` treat it as any other tensor.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from . import _still
from ._errors import InputError

CHUNK = 64
"""Tokens of a chunk, in every kernel."""
ALIGNMENT = 256
"""Bytes of which a section of `saved` begins at a multiple."""


class Layer:
    """A layer's attention, and its budgets on each device that it was used on."""

    def __init__(self, config: str, layer: int) -> None:
        self.kernels = _still.CudaAttention(config, layer)
        self.cap, self.budgets = self.kernels.cap, self.kernels.budgets
        self._on_device: dict[torch.device, Tensor] = {}

    def budgets_on(self, device: torch.device) -> Tensor:
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self.budgets, dtype=torch.int32, device=device)
        return self._on_device[device]

    def reaches_cap(self, tokens: int) -> bool:
        retired = torch.sym_max(-(-tokens // CHUNK) - 2, 0)
        return bool(self.cap is not None and max(self.budgets) * retired > self.cap)


@functools.lru_cache(maxsize=1024)
def _layer(config: str, layer: int) -> Layer:
    return Layer(config, layer)


def outputs(q: Tensor, k: Tensor, gate: Optional[Tensor], feature_map_k: Tensor, config: str, layer: int) -> tuple[Tensor, ...]:
    """`out`, `absorbed_at`, `scores` and `saved` of a call, not filled; `scores` are zeros."""
    batch, heads, tokens, head_dim = q.shape
    routing = (batch, feature_map_k.shape[0], tokens)
    # Token by token, as an output projection reads it.
    out = q.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)
    absorbed_at, scores = q.new_empty(routing, dtype=torch.int32), q.new_zeros(routing, dtype=torch.float32)
    size = _saved_bytes(_layer(config, layer), q, routing, gate is not None)
    return out, absorbed_at, scores, q.new_empty(size, dtype=torch.uint8)


def _saved_bytes(layer: Layer, q: Tensor, routing: tuple[int, int, int], gated: bool) -> int:
    """As `DeviceAttention::saved` in Rust, which compares: in words that symbolic sizes go through."""
    batch, heads, tokens = routing
    head_dim, width, rows = q.shape[3], q.element_size(), batch * heads * tokens
    of_queries, chunks = batch * q.shape[1] * tokens, -(-tokens // CHUNK)
    retired = torch.sym_max(chunks - 2, 0)
    states = batch * heads * retired * 2 * head_dim
    sections = [batch * heads * chunks * 8, rows * 2 * head_dim * width, states * head_dim * width, states * 4]
    sections += [of_queries * 4] * 3 + [rows * 4]
    if gated:
        sections.append(of_queries * head_dim * width)
    if layer.reaches_cap(tokens):
        sections += [batch * heads * chunks * layer.cap * 4, batch * heads * retired * CHUNK * 4]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sections)


class Operands(NamedTuple):
    """What the kernels read: rows that lie as they want them, keys and values of every selection head, folded maps."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Optional[Tensor]
    map_q: Tensor
    map_k: Tensor
    log_scale: Optional[Tensor]
    budgets: Tensor
    copies: int
    """Selection heads of a KV head."""

    @classmethod
    def of(cls, layer: Layer, q: Tensor, k: Tensor, v: Tensor, gate: Optional[Tensor], learned: tuple[Optional[Tensor], ...]) -> Operands:
        shapes = [None if x is None else list(x.shape) for x in (gate, *learned)]
        layer.kernels.check([list(x.shape) for x in (q, k, v)], shapes[0], shapes[1:])
        map_q, map_k, householder_q, householder_k, log_lambda, window_factor = (None if x is None else x.float() for x in learned)
        assert map_q is not None and map_k is not None
        maps = _folded(map_q, householder_q), _folded(map_k, householder_k)
        copies = map_k.shape[0] // k.shape[1]
        if copies > 1:
            k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        log_scale = log_lambda
        if window_factor is not None:
            # A factor sigmoid(w) on the exact terms is its inverse on the linear ones.
            of_window = torch.nn.functional.softplus(-window_factor)
            log_scale = of_window if log_scale is None else log_scale + of_window
        return cls(
            *(_rows(x) for x in (q, k, v)),
            None if gate is None else _rows(gate),
            *(map.to(q.dtype).contiguous() for map in maps),
            None if log_scale is None else log_scale.contiguous(),
            layer.budgets_on(q.device),
            copies,
        )

    def sizes(self) -> tuple[list[int], bool]:
        batch, heads, tokens, head_dim = self.q.shape
        return [batch, heads, self.k.shape[1], tokens, head_dim], self.q.dtype == torch.bfloat16

    def addresses(self, absorbed_at: Tensor, saved: Tensor) -> tuple[Any, ...]:
        rows = (None if x is None else _at(x) for x in (self.q, self.k, self.v, self.gate))
        values = (0 if x is None else x.data_ptr() for x in (self.map_q, self.map_k, self.log_scale, self.budgets, absorbed_at))
        return (*rows, *values, (saved.data_ptr(), saved.numel()))


def _rows(x: Tensor) -> Tensor:
    """The tensor with adjacent channels and every row 16-byte aligned: itself, if it is so."""
    unit = 16 // x.element_size()
    if x.stride(-1) == 1 and all(stride % unit == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _at(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), x.stride()


def _folded(w: Tensor, u: Optional[Tensor]) -> Tensor:
    """A reflection keeps the norm, so that it folds into the map's matrix: w - 2 u (u w) / |u|^2."""
    if u is None:
        return w
    unit = torch.nn.functional.normalize(u, dim=-1)
    return w - 2 * unit[:, :, None] * (unit[:, None, :] @ w)


def _unfolded(w: Tensor, u: Optional[Tensor], d: Tensor) -> tuple[Tensor, Optional[Tensor]]:
    """The gradients of `_folded`'s arguments from that of its result."""
    if u is None:
        return d, None
    length = u.norm(dim=-1, keepdim=True)
    column = (u / length)[:, :, None]
    along_w, along_d = w.mT @ column, d.mT @ column
    d_unit = -2 * (d @ along_w + w @ along_d)
    # What lies along u is lost to the division by its length.
    d_u = (d_unit - column * (column * d_unit).sum(1, keepdim=True)).squeeze(-1) / length
    return d - 2 * column @ along_d.mT, d_u


def _absorbed_at(saved: Tensor, absorbed_at: Tensor) -> None:
    """Fills `absorbed_at` from the words that `saved` begins with: a bit for each token of a chunk that is kept."""
    batch, heads, tokens = absorbed_at.shape
    chunks = -(-tokens // CHUNK)
    words = saved[: batch * heads * chunks * 8].view(torch.int64).view(batch, heads, chunks)
    token = torch.arange(tokens, device=saved.device)
    chunk = token // CHUNK
    kept = (words[:, :, chunk] >> token % CHUNK) & 1
    absorbed_at.copy_(torch.where((kept == 1) | (chunk + 2 >= chunks), -1, chunk + 2))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Optional[Tensor],
    learned: tuple[Optional[Tensor], ...],
    config: str,
    layer: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's outputs."""
    if q.dtype == torch.float64:
        raise InputError("q is torch.float64, which has no kernels on CUDA", "use float32 or bfloat16, or the CPU")
    of_layer = _layer(config, layer)
    with torch.cuda.device(q.device), torch.autocast("cuda", enabled=False):
        operands = Operands.of(of_layer, q, k, v, gate, learned)
        assert learned[1] is not None
        out, absorbed_at, scores, saved = outputs(q, k, gate, learned[1], config, layer)
        sizes = operands.sizes()
        size, zeros, _ = of_layer.kernels.scratch(*sizes)
        scratch = q.new_empty(size, dtype=torch.uint8)
        if zeros:
            scratch[:zeros].zero_()
        addresses = operands.addresses(absorbed_at, saved)
        stream = torch.cuda.current_stream(q.device).cuda_stream
        of_layer.kernels.forward(*sizes, addresses, _at(out), scores.data_ptr(), scratch.data_ptr(), stream)
        if not of_layer.reaches_cap(q.shape[2]):
            _absorbed_at(saved, absorbed_at)
    return out, absorbed_at, scores, saved


def backward(
    d_out: Tensor,
    out: Tensor,
    absorbed_at: Tensor,
    saved: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Optional[Tensor],
    learned: tuple[Optional[Tensor], ...],
    config: str,
    layer: int,
) -> list[Tensor]:
    """The gradients of the tensors that are there, in their order."""
    of_layer = _layer(config, layer)
    with torch.cuda.device(q.device), torch.autocast("cuda", enabled=False):
        operands = Operands.of(of_layer, q, k, v, gate, learned)
        sizes = operands.sizes()
        out, d_out = _rows(out), _rows(d_out.to(q.dtype))
        d_linear = d_out if gate is None else _rows(d_out * gate)
        d_q, d_k, d_v = (x.new_empty(x.shape) for x in (operands.q, operands.k, operands.v))
        d_gate = None if gate is None else gate.new_empty(gate.shape)
        d_map_q, d_map_k = (x.new_empty(x.shape, dtype=torch.float32) for x in (operands.map_q, operands.map_k))
        d_log_scale = None if operands.log_scale is None else operands.log_scale.new_empty(operands.log_scale.shape)
        scratch = q.new_empty(of_layer.kernels.scratch(*sizes)[2], dtype=torch.uint8)
        # Kept by their names until the kernels are queued.
        absorbed_at, saved = absorbed_at.contiguous(), saved.contiguous()
        addresses = operands.addresses(absorbed_at, saved)
        gradients = (
            *(_at(x) for x in (out, d_out, d_linear, d_q, d_k, d_v)),
            None if d_gate is None else _at(d_gate),
            *(0 if x is None else x.data_ptr() for x in (d_map_q, d_map_k, d_log_scale)),
        )
        stream = torch.cuda.current_stream(q.device).cuda_stream
        of_layer.kernels.backward(*sizes, addresses, gradients, scratch.data_ptr(), stream)
        if operands.copies > 1:
            d_k, d_v = (x.unflatten(1, (-1, operands.copies)).sum(2) for x in (d_k, d_v))
        of_learned = _learned_gradients(learned, d_map_q, d_map_k, d_log_scale)
    gradients_of = zip((q, k, v, gate, *learned), (d_q, d_k, d_v, d_gate, *of_learned))
    return [dx.to(x.dtype) for x, dx in gradients_of if x is not None]


def _learned_gradients(
    learned: tuple[Optional[Tensor], ...], d_map_q: Tensor, d_map_k: Tensor, d_log_scale: Optional[Tensor]
) -> tuple[Optional[Tensor], ...]:
    map_q, map_k, householder_q, householder_k, log_lambda, window_factor = (None if x is None else x.float() for x in learned)
    assert map_q is not None and map_k is not None
    d_map_q, d_householder_q = _unfolded(map_q, householder_q, d_map_q)
    d_map_k, d_householder_k = _unfolded(map_k, householder_k, d_map_k)
    d_log_lambda = None if log_lambda is None else d_log_scale
    d_window = None
    if window_factor is not None and d_log_scale is not None:
        d_window = d_log_scale * (window_factor.sigmoid() - 1)
    return d_map_q, d_map_k, d_householder_q, d_householder_k, d_log_lambda, d_window
