"""Products of many rows in PyTorch. Runs where torch is installed, on a CPU with AMX."""

import pytest

torch = pytest.importorskip("torch")
kernels = pytest.importorskip("still.torch")

import still
from still._still import multiplies_rows

amx = pytest.mark.skipif(not multiplies_rows(), reason="this CPU has no AMX for bfloat16")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative_rms(x, expected):
    return float((x.double() - expected).norm() / expected.norm())


@amx
@pytest.mark.parametrize("shape", [(300, 64), (2, 150, 40), (1, 577, 33)])
def test_it_is_as_exact_as_a_product_of_float32(shape):
    x, weight = normal(*shape), normal(50, shape[-1], seed=1)
    out = kernels.linear(x, weight)
    exact = torch.nn.functional.linear(x.double(), weight.double())
    assert out.dtype == torch.float32 and out.shape == exact.shape
    assert relative_rms(out, exact) <= 2 * relative_rms(torch.nn.functional.linear(x, weight), exact) + 1e-7


@amx
def test_strided_operands_are_taken_as_they_are():
    x, weight = normal(40, 300).T, normal(40, 50, seed=1).T
    assert relative_rms(kernels.linear(x, weight), x.double() @ weight.T.double()) <= 1e-6


@amx
def test_gradients_are_those_of_a_product():
    x, weight = normal(300, 24).requires_grad_(), normal(20, 24, seed=1).requires_grad_()
    d_out = normal(300, 20, seed=2)
    given = torch.autograd.grad(kernels.linear(x, weight), (x, weight), d_out)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, weight), (x, weight), d_out)
    for gradient, plain in zip(given, expected):
        assert relative_rms(gradient, plain.double()) <= 1e-6


@amx
def test_it_is_an_op_as_pytorch_wants_one():
    arguments = (normal(300, 24).requires_grad_(), normal(20, 24, seed=1).requires_grad_())
    torch.library.opcheck(torch.ops.still.linear.default, arguments)


@amx
def test_it_says_what_it_computes():
    x, weight = normal(256, 24), torch.nn.Parameter(normal(20, 24, seed=1))
    assert kernels.has_linear(x, weight) and kernels.has_linear(x.view(2, 128, 24), weight)
    assert not kernels.has_linear(x[:255], weight)
    assert not kernels.has_linear(x.bfloat16(), weight) and not kernels.has_linear(x, weight.double())
    with torch.autocast("cpu"):
        assert not kernels.has_linear(x, weight)


@pytest.mark.parametrize("shapes", [((300, 24), (20, 23)), ((300, 24), (24,)), ((), (1, 1))])
def test_shapes_that_do_not_fit_are_an_error_with_a_hint(shapes):
    with pytest.raises(still.InputError, match=r"(?s)the shape.*hint: give \[\.\.\., K\]"):
        kernels.linear(*(torch.zeros(shape) for shape in shapes))


def test_other_dtypes_are_an_error_with_a_hint():
    with pytest.raises(still.InputError, match=r"(?s)float64.*hint: give float32"):
        kernels.linear(torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.float64))


@pytest.mark.skipif(multiplies_rows(), reason="this CPU has AMX for bfloat16")
def test_a_cpu_without_amx_is_an_error_with_a_hint():
    assert not kernels.has_linear(normal(256, 24), normal(20, 24))
    with pytest.raises(still.InputError, match=r"(?s)no AMX.*hint: multiply with torch"):
        kernels.linear(normal(256, 24), normal(20, 24))
