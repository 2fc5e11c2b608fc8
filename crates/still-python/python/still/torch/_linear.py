"""Products of many float32 rows with a matrix on a CPU with AMX, as an op of PyTorch: `linear`.

PyTorch multiplies float32 there with AVX-512 alone. AMX multiplies bfloat16 numbers, and a float32 number is the sum of three of
them: six of their nine products, summed in float32, are as exact as a product of float32, and faster.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _still
from .._errors import InputError

__all__ = ["has_linear", "linear"]

MANY_ROWS = 256
"""Rows from which `linear` is faster than PyTorch: the matrix is cut into bfloat16 numbers in every call."""


@functools.cache
def _multiplies() -> bool:
    return _still.multiplies_rows()


def has_linear(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` computes this call, and faster than PyTorch: float32 on a CPU with AMX, 256 rows or more, not under autocast."""
    plain = type(weight) in (Tensor, torch.nn.Parameter)
    fits = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    many = x.numel() >= MANY_ROWS * x.shape[-1]
    return plain and fits and many and _multiplies() and not torch.is_autocast_enabled("cpu")


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [..., K] times the transpose of `weight` [N, K]: [..., N], all float32 on a CPU with AMX. Gradients flow to both."""
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        raise InputError(f"x is {x.dtype} and weight {weight.dtype}", "give float32; has_linear says so beforehand")
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        shapes = f"x has the shape {list(x.shape)}, weight {list(weight.shape)}"
        raise InputError(shapes, "give [..., K] and [N, K]")
    return _linear(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("still::linear", mutates_args=(), device_types="cpu")
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    _still.linear(out.numpy(), x.detach().contiguous().numpy(), weight.detach().contiguous().numpy())
    return out


@_linear.register_fake
def _(x, weight):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0])


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _gradients(ctx, d_out):  # type: ignore[no-untyped-def]
    x, weight = ctx.saved_tensors
    return d_out @ weight, d_out.T @ x


_linear.register_autograd(_gradients, setup_context=_save)
