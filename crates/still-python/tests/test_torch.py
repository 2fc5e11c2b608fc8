"""The operator in PyTorch. Runs where torch is installed."""

import json

import pytest

torch = pytest.importorskip("torch")
attention = pytest.importorskip("still.torch")

import still
from plain_attention import plain_attention

CONFIGS = {
    "mean": {},
    "sum": {"linear_norm": "sum"},
    "gate": {"gate": True, "feature_map": {"np_map": {"householder": True}}},
    "capped": {"cap": 5, "budgets": [[2, 3]]},
    "query_head": {"selection_head": "query_head", "budgets": [[2, 0, 1, 3]]},
    "lolcats": {"feature_map": "softmax", "linear_norm": "sum", "router": "none", "budgets": [[0, 0]], "window_factor": True},
    "linear_only": {"mode": "linear_only", "feature_map": "softmax", "linear_norm": "sum", "router": "none", "budgets": [[0, 0]]},
}


def case(name="mean", dtype=torch.float32, batch=2, tokens=70, dim=8, features=6, seed=0):
    """Operands of 4 query heads and 2 of keys, as keyword arguments."""
    config = {
        "chunk": 16,
        "router": "self_saliency",
        "selection_head": "kv_head",
        "budgets": [[2, 2]],
        "cap": None,
        "feature_map": {"np_map": {"householder": False}},
        "feature_dim": features,
        "linear_norm": "mean",
        "gate": False,
        **CONFIGS[name],
    }
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape, dtype=dtype: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    learned = torch.float64 if dtype == torch.float64 else torch.float32
    heads = len(config["budgets"][0])
    operands = {
        "q": normal(batch, 4, tokens, dim),
        "k": normal(batch, 2, tokens, dim),
        "v": normal(batch, 2, tokens, dim),
        "feature_map_q": normal(4, dim, features, dtype=learned),
        "feature_map_k": normal(heads, dim, features, dtype=learned),
    }
    if config["gate"]:
        operands["gate"] = normal(batch, 4, tokens, dim).sigmoid()
    if config["feature_map"] == {"np_map": {"householder": True}}:
        operands["householder_q"] = normal(4, dim, dtype=learned)
        operands["householder_k"] = normal(heads, dim, dtype=learned)
    if config["linear_norm"] == "mean":
        operands["log_lambda"] = normal(4, dtype=learned)
    if config.get("window_factor"):
        operands["window_factor"] = normal(4, dtype=learned)
    return operands, config


def arguments(operands, config):
    """In the order of the op."""
    rows = [operands[name] for name in "qkv"] + [operands.get("gate")]
    return (*rows, *(operands.get(name) for name in attention.LEARNED), json.dumps(config), 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_differences_of_the_output(name):
    operands, config = case(name, torch.float64, batch=1, tokens=40, dim=4, features=3)
    tensors = {key: x.requires_grad_() for key, x in operands.items()}

    def out(*values):
        return attention.hybrid_attention(**dict(zip(tensors, values)), config=config).out

    assert torch.autograd.gradcheck(out, tuple(tensors.values()), eps=1e-6, atol=1e-6, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "linear_only"])
def test_it_is_what_plain_pytorch_computes(name):
    operands, config = case(name, torch.float64)
    tensors = {key: x.requires_grad_() for key, x in operands.items()}
    own, absorbed_at, _ = attention.hybrid_attention(**tensors, config=config)
    expected = plain_attention(**tensors, absorbed_at=absorbed_at, config=config)
    torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)
    of_own, of_expected = (torch.autograd.grad(x.square().sum(), tuple(tensors.values())) for x in (own, expected))
    torch.testing.assert_close(of_own, of_expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mean", "gate", "lolcats"])
def test_it_is_an_op_as_pytorch_wants_one(name):
    operands, config = case(name)
    tensors = {key: x.requires_grad_() for key, x in operands.items()}
    torch.library.opcheck(torch.ops.still.hybrid_attention.default, arguments(tensors, config))


def test_two_chunks_are_softmax_attention():
    operands, config = case(tokens=32)
    out = attention.hybrid_attention(**operands, config=config).out
    k, v = (operands[name].repeat_interleave(2, 1) for name in "kv")
    expected = torch.nn.functional.scaled_dot_product_attention(operands["q"], k, v, is_causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_routing_is_what_it_says():
    operands, config = case("capped", tokens=100)
    _, absorbed_at, scores = attention.hybrid_attention(**operands, config=config)
    assert absorbed_at.shape == scores.shape == (2, 2, 100) and scores.isfinite().all()
    # Chunk 6 goes on: chunks 0 to 4 have retired, and 5 of their tokens stay for each head.
    retired = absorbed_at[:, :, :80]
    assert ((retired < 0) | (retired > 6)).sum(-1).tolist() == [[5, 5], [5, 5]]
    assert (absorbed_at[:, :, 80:] == -1).all()


def test_bfloat16_is_computed_in_float32():
    operands, config = case()
    narrow = {key: x.bfloat16() if key in "qkv" else x for key, x in operands.items()}
    wide = {key: x.float() for key, x in narrow.items()}
    own, expected = (attention.hybrid_attention(**x, config=config) for x in (narrow, wide))
    assert own.out.dtype == torch.bfloat16
    torch.testing.assert_close(own.out, expected.out.bfloat16())
    assert (own.absorbed_at == expected.absorbed_at).all()


def test_autocast_computes_in_float32():
    operands, config = case()
    narrow = {key: x.bfloat16() for key, x in operands.items()}
    with torch.autocast("cpu", torch.bfloat16):
        own = attention.hybrid_attention(**narrow, config=config).out
    expected = attention.hybrid_attention(**{key: x.float() for key, x in narrow.items()}, config=config).out
    assert own.dtype == torch.float32
    torch.testing.assert_close(own, expected)


def test_it_compiles():
    operands, config = case()
    operands["q"].requires_grad_()
    config = json.dumps(config)

    def loss(q, operands):
        return attention.hybrid_attention(**{**operands, "q": 2 * q}, config=config).out.square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    own = compiled(operands["q"], operands)
    expected = loss(operands["q"], operands)
    torch.testing.assert_close(own, expected)
    of_compiled, of_eager = (torch.autograd.grad(x, operands["q"])[0] for x in (own, expected))
    torch.testing.assert_close(of_compiled, of_eager)


def test_strided_operands_are_taken_as_they_are():
    operands, config = case()
    strided = {key: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 2 else x for key, x in operands.items()}
    assert not strided["q"].is_contiguous()
    own, expected = (attention.hybrid_attention(**x, config=config).out for x in (strided, operands))
    torch.testing.assert_close(own, expected)


@pytest.mark.parametrize(
    "change",
    [
        {"k": torch.zeros(2, 3, 70, 8)},
        {"v": torch.zeros(2, 2, 69, 8)},
        {"q": torch.zeros(4, 70, 8)},
        {"k": torch.zeros(2, 2, 70, 8, dtype=torch.bfloat16)},
        {"q": torch.zeros(2, 4, 70, 8, dtype=torch.int64)},
        {"feature_map_q": torch.zeros(4, 8, 5)},
        {"log_lambda": None},
        {"window_factor": torch.zeros(4)},
        {"gate": torch.zeros(2, 4, 70, 8)},
        {"config": {"chunk": 16}},
        {"config": {**case()[1], "budgets": [[17, 2]]}},
        {"config": {**case()[1], "router": "no_such_router"}},
        {"layer": 3},
    ],
)
def test_what_does_not_fit_is_an_error_with_a_hint(change):
    operands, config = case()
    with pytest.raises(still.InputError) as error:
        attention.hybrid_attention(**{**operands, "config": config, **change})
    assert error.value.hint
