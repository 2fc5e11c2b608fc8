"""The op of `still.torch` on CUDA tensors: the kernels of `still`, in PyTorch's memory, on its current stream.

Every buffer is PyTorch's, scratch too, and every kernel is queued on the stream that is current: nothing is copied or waited for, and
a buffer that is freed here is used again only by what is queued there later. What the backward pass needs is one more output of the
op, `saved`, so that autograd, checkpointing and `torch.compile` treat it as any other tensor.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
    routing: tuple[int, int, int]
    """Sequences, selection heads, tokens."""
    narrow: bool
    forward_scratch: int
    scratch_zeros: int
    backward_scratch: int
    saved: int


class Layer:
    """A layer's attention, the calls that it was found to fit, and its budgets on each device."""

    def __init__(self, config: str, layer: int) -> None:
        self.kernels = _still.CudaAttention(config, layer)
        self.cap, self.budgets = self.kernels.cap, self.kernels.budgets
        self.scores_all = json.loads(config)["router"] != "none"
        self._plans: dict[Any, Plan] = {}
        self._budgets_on: dict[torch.device, Tensor] = {}

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
        return Plan(routing[1] // k.shape[1], sizes, routing, narrow, *scratch, saved)

    def budgets_on(self, device: torch.device) -> Tensor:
        """The budgets, made once on each device."""
        budgets = self._budgets_on.get(device)
        if budgets is None:
            budgets = self._budgets_on[device] = torch.tensor(self.budgets, dtype=torch.int32, device=device)
        return budgets

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
    maps = [of * head_dim * head_dim * width for of in (q.shape[1], heads)]
    sections = [batch * heads * chunks * 8, *maps, rows * 2 * head_dim * width, states * head_dim * width, states * 4]
    sections += [of_queries * 4] * 3 + [rows * 4]
    if gated:
        sections.append(of_queries * head_dim * width)
    if layer.cap is not None and layer.reaches_cap(tokens):
        sections += [batch * heads * chunks * layer.cap * 4, batch * heads * retired * CHUNK * 4]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sections)


class Operands(NamedTuple):
    """What both passes read: rows that lie as the kernels want them, keys and values of every selection head."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Optional[Tensor]
    log_scale: Optional[Tensor]
    budgets: Tensor

    @classmethod
    def of(cls, layer: Layer, plan: Plan, q: Tensor, k: Tensor, v: Tensor, gate: Optional[Tensor], learned: Learned) -> Operands:
        if plan.copies > 1:
            k, v = k.repeat_interleave(plan.copies, 1), v.repeat_interleave(plan.copies, 1)
        log_scale, window_factor = _values(learned[4]), learned[5]
        if window_factor is not None:
            # A factor sigmoid(w) on the exact terms is its inverse on the linear ones.
            of_window = torch.nn.functional.softplus(-window_factor.float())
            log_scale = of_window if log_scale is None else log_scale + of_window
        gate = None if gate is None else _rows(gate)
        return cls(_rows(q), _rows(k), _rows(v), gate, log_scale, layer.budgets_on(q.device))

    def addresses(self, absorbed_at: Tensor, saved: Tensor) -> tuple[Any, ...]:
        q, k, v, gate, log_scale, budgets = self
        return (
            (q.data_ptr(), q.stride()),
            (k.data_ptr(), k.stride()),
            (v.data_ptr(), v.stride()),
            None if gate is None else _at(gate),
            0 if log_scale is None else log_scale.data_ptr(),
            budgets.data_ptr(),
            absorbed_at.data_ptr(),
            (saved.data_ptr(), saved.numel()),
        )


def _values(x: Optional[Tensor]) -> Optional[Tensor]:
    """A learned tensor as the kernels read it: itself, if it is so already. Asking is quicker than having it made so."""
    if x is None or (x.dtype is torch.float32 and x.is_contiguous()):
        return x
    return x.float().contiguous()


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


def _unfolded(w: Tensor, u: Optional[Tensor], d: Tensor) -> tuple[Tensor, Optional[Tensor]]:
    """The gradients of a map and of what it reflects by, from that of w - 2 u (u w) / |u|^2, which the kernels multiply by."""
    if u is None:
        return d, None
    w, u = w.float(), u.float()
    length = u.norm(dim=-1, keepdim=True)
    column = (u / length)[:, :, None]
    along_w, along_d = w.mT @ column, d.mT @ column
    d_unit = -2 * (d @ along_w + w @ along_d)
    # What lies along u is lost to the division by its length.
    d_u = (d_unit - column * (column * d_unit).sum(1, keepdim=True)).squeeze(-1) / length
    return d - 2 * column @ along_d.mT, d_u


def forward(
    q: Tensor, k: Tensor, v: Tensor, gate: Optional[Tensor], learned: Learned, config: str, layer: int, trains: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's outputs. Only what `trains` can go back."""
    of_layer = _layer(config, layer)
    plan = of_layer.plan(q, k, v, gate, learned)
    if not _is_as_kernels_want(q):
        with _as_kernels_want(q):
            return forward(q, k, v, gate, learned, config, layer, trains)
    operands = Operands.of(of_layer, plan, q, k, v, gate, learned)
    # Kept by its name until the kernels are queued.
    maps = [_values(x) for x in learned[:4]]
    out, saved = _new_out(q), q.new_empty(plan.saved, dtype=torch.uint8)
    new = torch.empty if of_layer.scores_all else torch.zeros
    scores = new(plan.routing, dtype=torch.float32, device=q.device)
    absorbed_at = torch.empty(plan.routing, dtype=torch.int32, device=q.device)
    scratch = q.new_empty(plan.forward_scratch, dtype=torch.uint8)
    if plan.scratch_zeros:
        scratch[: plan.scratch_zeros].zero_()
    of_layer.kernels.forward(
        plan.sizes,
        plan.narrow,
        operands.addresses(absorbed_at, saved),
        [0 if x is None else x.data_ptr() for x in maps],
        _at(out),
        trains,
        scores.data_ptr(),
        scratch.data_ptr(),
        torch._C._cuda_getCurrentRawStream(q.device.index),
    )
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
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in operands[:3])
    d_gate = None if gate is None else gate.new_empty(gate.shape)
    map_q, map_k, log_scale = learned[0], learned[1], operands.log_scale
    assert map_q is not None and map_k is not None
    d_map_q, d_map_k = (x.new_empty(x.shape, dtype=torch.float32) for x in (map_q, map_k))
    d_log_scale = None if log_scale is None else log_scale.new_empty(log_scale.shape)
    scratch = q.new_empty(plan.backward_scratch, dtype=torch.uint8)
    # Kept by their names until the kernels are queued.
    absorbed_at, saved = absorbed_at.contiguous(), saved.contiguous()
    gradients = (
        _at(out),
        _at(d_out),
        _at(d_linear),
        _at(d_q),
        _at(d_k),
        _at(d_v),
        None if d_gate is None else _at(d_gate),
        d_map_q.data_ptr(),
        d_map_k.data_ptr(),
        0 if d_log_scale is None else d_log_scale.data_ptr(),
    )
    stream = torch._C._cuda_getCurrentRawStream(q.device.index)
    addresses = operands.addresses(absorbed_at, saved)
    of_layer.kernels.backward(plan.sizes, plan.narrow, addresses, gradients, scratch.data_ptr(), stream)
    if plan.copies > 1:
        d_k, d_v = (x.unflatten(1, (-1, plan.copies)).sum(2) for x in (d_k, d_v))
    of_learned = _learned_gradients(learned, d_map_q, d_map_k, d_log_scale)
    pairs = zip((q, k, v, gate, *learned), (d_q, d_k, d_v, d_gate, *of_learned))
    return [dx if dx.dtype is x.dtype else dx.to(x.dtype) for x, dx in pairs if x is not None]


def attend(q: Tensor, k: Tensor, v: Tensor, gate: Optional[Tensor], learned: Learned, config: str, layer: int) -> tuple[Tensor, ...]:
    """A call that `is_eager`: `out`, `absorbed_at` and `scores`."""
    if torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in (q, k, v, gate, *learned)]):
        outputs: tuple[Tensor, ...] = Eager.apply(q, k, v, gate, *learned, config, layer)
        return outputs
    return forward(q, k, v, gate, learned, config, layer, trains=False)[:3]


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
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
    )


def _learned_gradients(learned: Learned, d_map_q: Tensor, d_map_k: Tensor, d_log_scale: Optional[Tensor]) -> Learned:
    map_q, map_k, householder_q, householder_k, log_lambda, window_factor = learned
    assert map_q is not None and map_k is not None
    d_map_q, d_householder_q = _unfolded(map_q, householder_q, d_map_q)
    d_map_k, d_householder_k = _unfolded(map_k, householder_k, d_map_k)
    d_log_lambda = None if log_lambda is None else d_log_scale
    d_window = None
    if window_factor is not None and d_log_scale is not None:
        d_window = d_log_scale * (window_factor.float().sigmoid() - 1)
    return d_map_q, d_map_k, d_householder_q, d_householder_k, d_log_lambda, d_window
