"""The op of `still.torch` on CUDA tensors: the kernels of `still`, in PyTorch's memory, on its current stream.

Every buffer is PyTorch's, scratch too, and every kernel is queued on the stream that is current: nothing is copied or waited for, and
a buffer that is freed here is used again only by what is queued there later. What the backward pass needs is one more output of the
op, `saved`, so that autograd, checkpointing and `torch.compile` treat it as any other tensor.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from . import _still
from ._errors import InputError

CHUNK = 64
"""Tokens of a chunk, in every kernel."""
ALIGNMENT = 256
"""Bytes of which a section of `saved` begins at a multiple."""
MOST_PLANS = 1024
"""Shapes of calls that a layer remembers."""
LEARNED = ("feature_map_q", "feature_map_k", "householder_q", "householder_k", "log_lambda", "window_factor")
"""The learned tensors, in the order of the op's arguments."""
ROWS = (torch.float32, torch.float64, torch.bfloat16)
"""Dtypes of queries, keys and values. The CPU computes bfloat16 in float32; CUDA has no float64."""

Learned = tuple[Optional[Tensor], ...]


class Plan(NamedTuple):
    """What one call needs that its operands' shapes and dtypes decide."""

    copies: int
    """Selection heads of a KV head."""
    sizes: list[int]
    narrow: bool
    forward_scratch: int
    scratch_zeros: int
    backward_scratch: int
    saved: int
    capped: bool


class Layer:
    """A layer's attention, the calls that it was found to fit, and tensors that it has on each device."""

    def __init__(self, config: str, layer: int) -> None:
        self.kernels = _still.CudaAttention(config, layer)
        self.cap, self.budgets = self.kernels.cap, self.kernels.budgets
        self.scores_all = json.loads(config)["router"] != "none"
        self._plans: dict[Any, Plan] = {}
        self._on_device: dict[Any, Tensor] = {}

    def plan(self, q: Tensor, k: Tensor, v: Tensor, gate: Optional[Tensor], learned: Learned) -> Plan:
        tensors = (q, k, v, gate, *learned)
        key = tuple([None if x is None else (x.shape, x.dtype, x.device) for x in tensors])
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._new_plan(q, k, v, gate, learned)
        return plan

    def _new_plan(self, q: Tensor, k: Tensor, v: Tensor, gate: Optional[Tensor], learned: Learned) -> Plan:
        check(q, k, v, gate, *learned)
        if q.dtype == torch.float64:
            raise InputError("q is torch.float64, which has no kernels on CUDA", "use float32 or bfloat16, or the CPU")
        shapes = [None if x is None else list(x.shape) for x in (gate, *learned)]
        self.kernels.check([list(x.shape) for x in (q, k, v)], shapes[0], shapes[1:])
        assert learned[1] is not None
        batch, heads, tokens, head_dim = q.shape
        routing = (batch, learned[1].shape[0], tokens)
        sizes, narrow = [batch, heads, routing[1], tokens, head_dim], q.dtype == torch.bfloat16
        scratch = self.kernels.scratch(sizes, narrow)
        saved = _saved_bytes(self, q, routing, gate is not None)
        return Plan(routing[1] // k.shape[1], sizes, narrow, *scratch, saved, self.reaches_cap(tokens))

    def on_device(self, device: torch.device, what: Any, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that is made once on each device."""
        key = (device, what)
        if key not in self._on_device:
            if len(self._on_device) >= MOST_PLANS:
                self._on_device.clear()
            self._on_device[key] = make().to(device)
        return self._on_device[key]

    def reaches_cap(self, tokens: int) -> bool:
        retired = torch.sym_max(-(-tokens // CHUNK) - 2, 0)
        return bool(self.cap is not None and max(self.budgets) * retired > self.cap)


@functools.lru_cache(maxsize=1024)
def _layer(config: str, layer: int) -> Layer:
    return Layer(config, layer)


def plan_of(q: Tensor, k: Tensor, v: Tensor, gate: Optional[Tensor], learned: Learned, config: str, layer: int) -> Plan:
    """The plan of a call; an error if there are no kernels for it."""
    return _layer(config, layer).plan(q, k, v, gate, learned)


def check(q: Tensor, *others: Optional[Tensor]) -> None:
    """Refuses devices and dtypes of `q`, `k`, `v`, gate and learned tensors that do not fit."""
    for name, x in zip(("q", "k", "v", "gate", *LEARNED), (q, *others)):
        if x is None:
            continue
        if x.device != q.device:
            raise InputError(f"{name} is on {x.device}, q on {q.device}", "put all tensors on one device")
        if x.dtype not in ROWS:
            raise InputError(f"{name} is {x.dtype}", "use float32, float64 or bfloat16")
    for name, x in zip(("k", "v", "gate"), others):
        if x is not None and x.dtype != q.dtype:
            raise InputError(f"{name} is {x.dtype}, q {q.dtype}", "give queries, keys, values and gate in one dtype")
    if q.dim() != 4:
        raise InputError(f"q has the shape {list(q.shape)}", "give [batch, heads, tokens, head_dim]")


@contextlib.contextmanager
def _as_kernels_want(q: Tensor) -> Iterator[None]:
    """The tensor's device is the current one, and no product is cast. Entered only where it is not so: it takes time."""
    with torch.cuda.device(q.device), torch.autocast("cuda", enabled=False):
        yield


def _is_as_kernels_want(q: Tensor) -> bool:
    return q.device.index == torch.cuda.current_device() and not torch.is_autocast_enabled("cuda")


def outputs(q: Tensor, gate: Optional[Tensor], feature_map_k: Tensor, config: str, layer: int) -> tuple[Tensor, ...]:
    """`out`, `absorbed_at`, `scores` and `saved` of a call, not filled: sizes may be symbolic."""
    routing = (q.shape[0], feature_map_k.shape[0], q.shape[2])
    absorbed_at, scores = q.new_empty(routing, dtype=torch.int32), q.new_empty(routing, dtype=torch.float32)
    size = _saved_bytes(_layer(config, layer), q, routing, gate is not None)
    return _new_out(q), absorbed_at, scores, q.new_empty(size, dtype=torch.uint8)


def _new_out(q: Tensor) -> Tensor:
    """[B, H, N, D] that lies token by token, as an output projection reads it."""
    batch, heads, tokens, head_dim = q.shape
    return q.new_empty((batch, tokens, heads, head_dim)).transpose(1, 2)


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
    if layer.cap is not None and layer.reaches_cap(tokens):
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

    @classmethod
    def of(cls, layer: Layer, plan: Plan, q: Tensor, k: Tensor, v: Tensor, gate: Optional[Tensor], learned: Learned) -> Operands:
        map_q, map_k, householder_q, householder_k, log_lambda, window_factor = (None if x is None else x.float() for x in learned)
        assert map_q is not None and map_k is not None
        maps = _folded(map_q, householder_q), _folded(map_k, householder_k)
        if plan.copies > 1:
            k, v = k.repeat_interleave(plan.copies, 1), v.repeat_interleave(plan.copies, 1)
        log_scale = log_lambda
        if window_factor is not None:
            # A factor sigmoid(w) on the exact terms is its inverse on the linear ones.
            of_window = torch.nn.functional.softplus(-window_factor)
            log_scale = of_window if log_scale is None else log_scale + of_window
        return cls(
            _rows(q),
            _rows(k),
            _rows(v),
            None if gate is None else _rows(gate),
            maps[0].to(q.dtype).contiguous(),
            maps[1].to(q.dtype).contiguous(),
            None if log_scale is None else log_scale.contiguous(),
            layer.on_device(q.device, "budgets", lambda: torch.tensor(layer.budgets, dtype=torch.int32)),
        )

    def addresses(self, absorbed_at: Optional[Tensor], saved: Tensor) -> tuple[Any, ...]:
        rows = [None if x is None else _at(x) for x in (self.q, self.k, self.v, self.gate)]
        values = [0 if x is None else x.data_ptr() for x in (self.map_q, self.map_k, self.log_scale, self.budgets, absorbed_at)]
        return (*rows, *values, (saved.data_ptr(), saved.numel()))


def _rows(x: Tensor) -> Tensor:
    """The tensor with adjacent channels and every row 16-byte aligned: itself, if it is so."""
    if x.data_ptr() % 16 == 0:
        # Head dimensions that have kernels are multiples of 16.
        if x.is_contiguous():
            return x
        unit = 16 // x.element_size()
        if x.stride(-1) == 1 and all(stride % unit == 0 for stride in x.stride()[:-1]):
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


def _absorbed_at(layer: Layer, plan: Plan, saved: Tensor) -> Tensor:
    """`absorbed_at` from the words that `saved` begins with: a bit for each token of a chunk that is kept."""
    batch, _, heads, tokens, _ = plan.sizes
    chunks = -(-tokens // CHUNK)
    bits = layer.on_device(saved.device, "bits", lambda: torch.tensor(1) << torch.arange(CHUNK))
    never = layer.on_device(saved.device, "never", lambda: torch.tensor(-1, dtype=torch.int32))

    def retirement() -> Tensor:
        chunk = torch.arange(chunks, dtype=torch.int32)
        return torch.where(chunk + 2 < chunks, chunk + 2, -1)[:, None]

    words = saved[: batch * heads * chunks * 8].view(torch.int64).view(batch, heads, chunks, 1)
    retired_in = layer.on_device(saved.device, chunks, retirement)
    absorbed_at = torch.where(words & bits == 0, retired_in, never).view(batch, heads, chunks * CHUNK)
    return absorbed_at[:, :, :tokens].contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Optional[Tensor], learned: Learned, config: str, layer: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's outputs."""
    of_layer = _layer(config, layer)
    plan = of_layer.plan(q, k, v, gate, learned)
    if not _is_as_kernels_want(q):
        with _as_kernels_want(q):
            return forward(q, k, v, gate, learned, config, layer)
    operands = Operands.of(of_layer, plan, q, k, v, gate, learned)
    batch, _, heads, tokens, _ = plan.sizes
    out, saved = _new_out(q), q.new_empty(plan.saved, dtype=torch.uint8)
    new = torch.empty if of_layer.scores_all else torch.zeros
    scores = new((batch, heads, tokens), dtype=torch.float32, device=q.device)
    scratch = q.new_empty(plan.forward_scratch, dtype=torch.uint8)
    if plan.scratch_zeros:
        scratch[: plan.scratch_zeros].zero_()
    absorbed_at = torch.empty_like(scores, dtype=torch.int32) if plan.capped else None
    addresses = operands.addresses(absorbed_at, saved)
    stream = torch._C._cuda_getCurrentRawStream(q.device.index)
    of_layer.kernels.forward(plan.sizes, plan.narrow, addresses, _at(out), scores.data_ptr(), scratch.data_ptr(), stream)
    if absorbed_at is None:
        absorbed_at = _absorbed_at(of_layer, plan, saved)
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
    learned: Learned,
    config: str,
    layer: int,
) -> list[Tensor]:
    """The gradients of the tensors that are there, in their order."""
    of_layer = _layer(config, layer)
    plan = of_layer.plan(q, k, v, gate, learned)
    if not _is_as_kernels_want(q):
        with _as_kernels_want(q):
            return backward(d_out, out, absorbed_at, saved, q, k, v, gate, learned, config, layer)
    operands = Operands.of(of_layer, plan, q, k, v, gate, learned)
    out, d_out = _rows(out), _rows(d_out.to(q.dtype))
    d_linear = d_out if gate is None else _rows(d_out * gate)
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (operands.q, operands.k, operands.v))
    d_gate = None if gate is None else gate.new_empty(gate.shape)
    d_map_q, d_map_k = (x.new_empty(x.shape, dtype=torch.float32) for x in (operands.map_q, operands.map_k))
    d_log_scale = None if operands.log_scale is None else operands.log_scale.new_empty(operands.log_scale.shape)
    scratch = q.new_empty(plan.backward_scratch, dtype=torch.uint8)
    # Kept by their names until the kernels are queued.
    absorbed_at, saved = absorbed_at.contiguous(), saved.contiguous()
    addresses = operands.addresses(absorbed_at, saved)
    gradients = (
        *[_at(x) for x in (out, d_out, d_linear, d_q, d_k, d_v)],
        None if d_gate is None else _at(d_gate),
        *[0 if x is None else x.data_ptr() for x in (d_map_q, d_map_k, d_log_scale)],
    )
    stream = torch._C._cuda_getCurrentRawStream(q.device.index)
    of_layer.kernels.backward(plan.sizes, plan.narrow, addresses, gradients, scratch.data_ptr(), stream)
    if plan.copies > 1:
        d_k, d_v = (x.unflatten(1, (-1, plan.copies)).sum(2) for x in (d_k, d_v))
    of_learned = _learned_gradients(learned, d_map_q, d_map_k, d_log_scale)
    gradients_of = zip((q, k, v, gate, *learned), (d_q, d_k, d_v, d_gate, *of_learned))
    return [dx.to(x.dtype) for x, dx in gradients_of if x is not None]


class Eager(torch.autograd.Function):
    """The op without PyTorch's dispatcher, which takes longer than the kernels of a small call."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, gate: Optional[Tensor], *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        *learned, ctx.config, ctx.layer = others
        out, absorbed_at, scores, saved = forward(q, k, v, gate, tuple(learned), ctx.config, ctx.layer)
        ctx.mark_non_differentiable(absorbed_at, scores)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, absorbed_at, saved, q, k, v, gate, *learned)
        return out, absorbed_at, scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Optional[Tensor], *_: Any) -> tuple[Optional[Tensor], ...]:
        out, absorbed_at, saved, q, k, v, gate, *learned = ctx.saved_tensors
        tensors = (q, k, v, gate, *learned)
        if d_out is None:
            return (None,) * (len(tensors) + 2)
        given = iter(backward(d_out, out, absorbed_at, saved, q, k, v, gate, tuple(learned), ctx.config, ctx.layer))
        return (*(None if x is None else next(given) for x in tensors), None, None)


def is_eager(*tensors: Optional[Tensor]) -> bool:
    """Whether nothing looks at the call that would have to see an op: no compiler, mode or transform, no tensor of another kind."""
    plain = all([x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors])
    return (
        plain
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def _learned_gradients(learned: Learned, d_map_q: Tensor, d_map_k: Tensor, d_log_scale: Optional[Tensor]) -> Learned:
    map_q, map_k, householder_q, householder_k, log_lambda, window_factor = (None if x is None else x.float() for x in learned)
    assert map_q is not None and map_k is not None
    d_map_q, d_householder_q = _unfolded(map_q, householder_q, d_map_q)
    d_map_k, d_householder_k = _unfolded(map_k, householder_k, d_map_k)
    d_log_lambda = None if log_lambda is None else d_log_scale
    d_window = None
    if window_factor is not None and d_log_scale is not None:
        d_window = d_log_scale * (window_factor.sigmoid() - 1)
    return d_map_q, d_map_k, d_householder_q, d_householder_k, d_log_lambda, d_window
