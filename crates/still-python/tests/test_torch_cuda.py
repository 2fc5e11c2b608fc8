"""The operator in PyTorch on CUDA. Runs where torch and a GPU are, with a wheel that was built with CUDA."""

import gc
import json
import time

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
attention = pytest.importorskip("still.torch")

import still
from plain_attention import plain_attention
from test_torch import arguments
from torch.utils.checkpoint import checkpoint

CHUNK = 64
NP_MAP = {"np_map": {"householder": False}}
CONFIGS = {
    "mean": {},
    "sum": {"linear_norm": "sum"},
    "gate": {"gate": True, "feature_map": {"np_map": {"householder": True}}},
    "capped": {"cap": 12, "budgets": [[8, 3]]},
    "query_head": {"selection_head": "query_head", "budgets": [[2, 0, 64, 3]]},
    "lolcats": {"feature_map": "softmax", "linear_norm": "sum", "router": "none", "budgets": [[0, 0]], "window_factor": True},
    "self_recall": {"router": "self_recall", "cap": 20, "budgets": [[64, 64]]},
    "recall_without_cap": {"router": "self_recall"},
    "received_attention": {"router": "received_attention"},
    "first_tokens": {"router": "first_tokens", "cap": 4, "budgets": [[4, 4]]},
}
# Relative RMS of outputs and of gradients, as the tests in Rust have them.
LIMITS = {torch.float32: (1e-5, 3e-5), torch.bfloat16: (5e-3, 1e-2)}


def case(name="mean", dtype=torch.float32, batch=2, tokens=300, dim=64, seed=0, device="cuda"):
    """Operands of 4 query heads and 2 of keys, values that bfloat16 holds, as keyword arguments."""
    config = {
        "chunk": CHUNK,
        "router": "self_saliency",
        "selection_head": "kv_head",
        "budgets": [[2, 5]],
        "cap": None,
        "feature_map": NP_MAP,
        "feature_dim": dim,
        "linear_norm": "mean",
        "gate": False,
        **CONFIGS[name],
    }
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator).bfloat16()
    heads = len(config["budgets"][0])
    rows = {"q": normal(batch, 4, tokens, dim), "k": normal(batch, 2, tokens, dim), "v": normal(batch, 2, tokens, dim)}
    if config["gate"]:
        rows["gate"] = normal(batch, 4, tokens, dim).sigmoid()
    learned = {"feature_map_q": normal(4, dim, dim) / 8, "feature_map_k": normal(heads, dim, dim) / 8}
    if config["feature_map"] == {"np_map": {"householder": True}}:
        learned |= {"householder_q": normal(4, dim), "householder_k": normal(heads, dim)}
    if config["linear_norm"] == "mean":
        learned["log_lambda"] = normal(4) + 3
    if config.get("window_factor"):
        learned["window_factor"] = normal(4)
    operands = {name: x.to(device, dtype) for name, x in rows.items()} | {name: x.to(device, torch.float32) for name, x in learned.items()}
    return operands, config


def relative_rms(own, expected):
    own, expected = own.double().cpu(), expected.double().cpu()
    assert own.shape == expected.shape and own.isfinite().all()
    return ((own - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-12)).item()


def gradients(out, operands, seed=1):
    generator = torch.Generator().manual_seed(seed)
    d_out = torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype)
    return dict(zip(operands, torch.autograd.grad(out, tuple(operands.values()), d_out)))


def learning(operands):
    return {name: x.detach().requires_grad_() for name, x in operands.items()}


def run(operands, config, seed=1):
    operands = learning(operands)
    result = attention.hybrid_attention(**operands, config=config)
    return result, gradients(result.out, operands, seed)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_what_plain_pytorch_computes(name, dim, dtype):
    operands, config = case(name, dtype, dim=dim)
    (out, absorbed_at, _), own = run(operands, config)
    wide = learning({key: x.double() for key, x in operands.items()})
    # Maps are rounded to the dtype of the rows where they are multiplied; a reflection is folded in before.
    expected = plain_attention(**wide, absorbed_at=absorbed_at, config=config)
    of_output, of_gradients = LIMITS[dtype]
    assert out.dtype == dtype and relative_rms(out, expected) <= of_output
    for key, d_x in gradients(expected, wide).items():
        assert own[key].dtype == operands[key].dtype
        assert relative_rms(own[key], d_x) <= of_gradients, key


@pytest.mark.parametrize("tokens", [1, 64, 128, 129, 192, 449])
@pytest.mark.parametrize("name", ["mean", "gate", "capped"])
def test_any_length_is_what_the_cpu_computes(name, tokens):
    operands, config = case(name, tokens=tokens)
    (out, absorbed_at, scores), own = run(operands, config)
    (expected, expected_at, expected_scores), of_cpu = run({key: x.cpu() for key, x in operands.items()}, config)
    assert (absorbed_at.cpu() == expected_at).all()
    torch.testing.assert_close(scores.cpu(), expected_scores, rtol=1e-4, atol=1e-4)
    assert relative_rms(out, expected) <= 1e-5
    for key, d_x in of_cpu.items():
        # What nothing depends on, in a sequence that never leaves the window.
        if d_x.abs().max() < 1e-9:
            assert own[key].abs().max() < 1e-6, key
        else:
            assert relative_rms(own[key], d_x) <= 3e-5, key


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("mean", "gate", "capped")])
def test_routing_is_that_of_the_cpu(name):
    operands, config = case(name, tokens=449)
    own = attention.hybrid_attention(**operands, config=config)
    expected = attention.hybrid_attention(**{key: x.cpu() for key, x in operands.items()}, config=config)
    assert (own.absorbed_at.cpu() == expected.absorbed_at).float().mean() >= 0.999
    assert own.absorbed_at.shape == expected.scores.shape and own.scores.isfinite().all()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", ["mean", "gate", "capped"])
def test_it_is_an_op_as_pytorch_wants_one(name, dtype):
    operands, config = case(name, dtype, tokens=200)
    # `test_aot_dispatch_dynamic` compares all outputs of two calls, and of `saved` there are bytes that nobody writes or reads:
    # test_it_compiles_for_any_length does what it does for what is not saved.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.still.hybrid_attention.default, arguments(learning(operands), config), test_utils=checks)


@pytest.mark.parametrize("fill", [float("nan"), 1e30])
@pytest.mark.parametrize("name", ["mean", "gate", "query_head", "capped", "self_recall"])
def test_the_op_and_what_goes_without_the_dispatcher_are_equal_whatever_was_in_memory(name, fill):
    operands, config = case(name)

    def op(tensors):
        return torch.ops.still.hybrid_attention(*arguments(tensors, config))[0]

    def eager(tensors):
        return attention.hybrid_attention(**tensors, config=config).out

    results = []
    for attend in (eager, op, eager, op):
        # What is allocated next is likely to lie here: what a kernel leaves out then shows.
        poison = torch.full((1 << 24,), fill, device="cuda")
        del poison
        tensors = learning(operands)
        out = attend(tensors)
        results.append({"out": out.detach(), **gradients(out, tensors)})
    for key, first in results[0].items():
        differ = [n for n, result in enumerate(results) if not torch.equal(result[key], first)]
        assert not differ and first.isfinite().all(), (key, differ)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_to_train_is_the_same(name):
    operands, config = case(name)
    expected, _ = run(operands, config)
    with torch.no_grad():
        own = [attention.hybrid_attention(**learning(operands), config=config)]
    with torch.inference_mode():
        own.append(attention.hybrid_attention(**operands, config=config))
    # No tensor has a gradient.
    own.append(attention.hybrid_attention(**operands, config=config))
    for result in own:
        assert not result.out.requires_grad
        for x, y in zip(result, expected):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["mean", "capped"])
def test_it_compiles_for_any_length(name):
    _, config = case(name)
    config = json.dumps(config)

    def loss(operands):
        return attention.hybrid_attention(**{**operands, "q": 2 * operands["q"]}, config=config).out.square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (200, 333):
        operands = learning(case(name, tokens=tokens)[0])
        own, expected = compiled(operands), loss(operands)
        torch.testing.assert_close(own, expected)
        of_own, of_expected = (torch.autograd.grad(x, tuple(operands.values())) for x in (own, expected))
        torch.testing.assert_close(of_own, of_expected)


def test_autocast_computes_in_its_dtype():
    operands, config = case()
    with torch.autocast("cuda", torch.bfloat16):
        own = attention.hybrid_attention(**operands, config=config).out
    narrow = {key: x.bfloat16() if key in "qkv" else x for key, x in operands.items()}
    assert own.dtype == torch.bfloat16
    assert (own == attention.hybrid_attention(**narrow, config=config).out).all()
    with torch.autocast("cuda", torch.float16):
        own = attention.hybrid_attention(**operands, config=config).out
    assert own.dtype == torch.float32
    # Of rows in float32 without autocast nothing is rounded, whatever products inside might be.
    assert (own == attention.hybrid_attention(**operands, config=config).out).all()


@pytest.mark.parametrize("dtype", LIMITS)
def test_rows_may_lie_anyhow(dtype):
    operands, config = case("gate", dtype)
    expected, of_expected = run(operands, config)
    by_token = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    by_channel = lambda x: x.mT.contiguous().mT
    # One value behind an address that is 16-byte aligned.
    shifted = lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    # A slice of heads that were projected together.
    fused = lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]]
    for lay in (by_token, by_channel, shifted, fused):
        laid = {key: lay(x) if x.dim() == 4 else x for key, x in operands.items()}
        own, of_own = run(laid, config)
        torch.testing.assert_close(own.out, expected.out, rtol=0, atol=0)
        torch.testing.assert_close(of_own, of_expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mean", "capped"])
def test_calls_without_pause_wait_for_each_other(name):
    """Of PyTorch's own there is next to nothing between a backward pass, which comes from autograd's thread, and the next call, which
    takes the memory that it has just let go of."""
    operands, config = case(name, tokens=1000)
    expected, of_expected = run(operands, config)
    d_out = torch.randn(expected.out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to("cuda", torch.float32)
    results = []
    for _ in range(50):
        tensors = learning(operands)
        out = attention.hybrid_attention(**tensors, config=config).out
        results.append((out.detach(), torch.autograd.grad(out, tuple(tensors.values()), d_out)))
    for out, of_out in results:
        assert torch.equal(out, expected.out)
        assert all(torch.equal(own, of_expected[key]) for key, own in zip(operands, of_out))


def test_a_gradient_may_be_one_number_for_all():
    operands, config = case()
    tensors = learning(operands)
    out = attention.hybrid_attention(**tensors, config=config).out
    own = torch.autograd.grad(out.sum(), tensors["q"], retain_graph=True)[0]
    expected = torch.autograd.grad(out, tensors["q"], torch.ones_like(out))[0]
    torch.testing.assert_close(own, expected, rtol=0, atol=0)


def test_it_runs_on_the_current_stream():
    operands, config = case(tokens=2048)
    expected, of_expected = run(operands, config)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for repetition in range(4):
        for stream in streams:
            with torch.cuda.stream(stream):
                # Operands are made on this stream, late: who runs on another one reads what was there before.
                late = {key: torch.full_like(x, torch.nan) for key, x in operands.items()}
                torch.cuda._sleep(5_000_000)
                for key, x in operands.items():
                    late[key].copy_(x)
                result, of_result = run(late, config)
                # Used on this stream at once, with nothing to wait for.
                results.append((result.out.clone(), {key: x.clone() for key, x in of_result.items()}))
                del late, result, of_result
    torch.cuda.synchronize()
    for out, of_out in results:
        torch.testing.assert_close(out, expected.out, rtol=0, atol=0)
        torch.testing.assert_close(of_out, of_expected, rtol=0, atol=0)


def test_another_device_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    operands, config = case(device="cuda:0")
    expected, of_expected = run(operands, config)
    own, of_own = run({key: x.to("cuda:1") for key, x in operands.items()}, config)
    assert torch.cuda.current_device() == 0 and own.out.device.index == 1
    torch.testing.assert_close(own.out.cpu(), expected.out.cpu(), rtol=0, atol=0)
    for key, d_x in of_expected.items():
        torch.testing.assert_close(of_own[key].cpu(), d_x.cpu(), rtol=0, atol=0)
    with pytest.raises(still.InputError, match="cuda:1"):
        attention.hybrid_attention(**{**operands, "k": operands["k"].to("cuda:1")}, config=config)


def test_a_graph_is_gone_back_again_and_checkpointed():
    operands, config = case("gate")
    _, expected = run(operands, config)
    tensors = learning(operands)
    out = attention.hybrid_attention(**tensors, config=config).out
    d_out = torch.ones_like(out)
    once, again = (torch.autograd.grad(out, tuple(tensors.values()), d_out, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    attend = lambda *values: attention.hybrid_attention(**dict(zip(tensors, values)), config=config).out
    own = gradients(checkpoint(attend, *tensors.values(), use_reentrant=False), tensors)
    torch.testing.assert_close(own, expected, rtol=0, atol=0)


def test_a_cuda_graph_replays_it():
    operands, config = case(tokens=500)
    expected = attention.hybrid_attention(**operands, config=config).out
    copies = {key: torch.zeros_like(x) for key, x in operands.items()}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        attention.hybrid_attention(**operands, config=config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.hybrid_attention(**copies, config=config).out
    for key, x in operands.items():
        copies[key].copy_(x)
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_nothing_is_left_in_memory():
    operands, config = case("capped", tokens=1000)
    run(operands, config)

    def allocated():
        # Autograd's thread lets go of the last gradients a moment after it has handed them over.
        time.sleep(0.5)
        gc.collect()
        return torch.cuda.memory_allocated()

    before = allocated()
    for _ in range(20):
        run(operands, config)
    assert allocated() == before


@pytest.mark.parametrize(
    "change",
    [
        {"k": torch.zeros(2, 3, 300, 64)},
        {"v": torch.zeros(2, 2, 299, 64)},
        {"q": torch.zeros(4, 300, 64)},
        {"q": torch.zeros(2, 4, 300, 64, dtype=torch.float16)},
        {name: torch.zeros(2, heads, 300, 64, dtype=torch.float64) for name, heads in (("q", 4), ("k", 2), ("v", 2))},
        {name: torch.zeros(2, heads, 0, 64) for name, heads in (("q", 4), ("k", 2), ("v", 2))},
        {"feature_map_q": torch.zeros(4, 64, 32)},
        {"log_lambda": None},
        {"window_factor": torch.zeros(4)},
        {"gate": torch.zeros(2, 4, 300, 64)},
        {"config": {"chunk": 64}},
        {"config": {**case(device="cpu")[1], "chunk": 32}},
        {"config": {**case(device="cpu")[1], "logit_scale": 0.3}},
        {"layer": 3},
    ],
)
def test_what_does_not_fit_is_an_error_with_a_hint(change):
    operands, config = case()
    change = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in change.items()}
    with pytest.raises(still.InputError) as error:
        attention.hybrid_attention(**{**operands, "config": config, **change})
    assert error.value.hint


def test_two_devices_are_an_error():
    operands, config = case()
    with pytest.raises(still.InputError, match="one device"):
        attention.hybrid_attention(**{**operands, "k": operands["k"].cpu()}, config=config)


def test_linear_attention_alone_says_that_it_has_no_kernels():
    operands, config = case("sum")
    config |= {"mode": "linear_only", "feature_map": "softmax", "router": "none", "budgets": [[0, 0]]}
    with pytest.raises(still.InputError, match="linear attention alone"):
        attention.hybrid_attention(**operands, config=config)
