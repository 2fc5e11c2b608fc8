"""The operator against float64 results of the project's oracle. `--golden DIR` says where its cases lie; without it: skipped."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from still_transformers.hybrid_attention import HybridOperator, Reading


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        folder = metafunc.config.getoption("--golden")
        cases = sorted(p for p in Path(folder).glob("*.safetensors") if not p.stem.startswith("model_")) if folder else []
        metafunc.parametrize("case", cases, ids=[p.stem for p in cases])


def load(case):
    with safe_open(case, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def operator(tensors, meta):
    budgets = json.loads(meta["budgets"])
    (heads, dim, features), kv_heads = tensors["w_q"].shape, tensors["k"].shape[0]
    attention = {
        "chunk": int(meta["chunk"]),
        "router": ("self_saliency", {}),
        "selection_head": meta["granularity"],
        "budgets": [budgets],
        "cap": json.loads(meta["cap"]),
        "feature_map": ("np_map", {"householder": "u_q" in tensors}),
        "feature_dim": features,
        "linear_norm": "mean" if "mean_scale" in tensors else "sum",
        "gate": "gate" in tensors,
        "window_factor": False,
        "logit_scale": None,
        "branches": {},
    }
    made = HybridOperator(attention, 0, heads, kv_heads, dim)
    with torch.no_grad():
        for side in "qk":
            feature_map = getattr(made, f"feature_map_{side}")
            for linear, w in zip(feature_map.mlp.linears, tensors[f"w_{side}"], strict=True):
                linear.weight.copy_(w.T)
            if f"u_{side}" in tensors:
                feature_map.hh.u.copy_(tensors[f"u_{side}"])
    made = made.double()
    if "mean_scale" in tensors:
        made.log_lambda.data = tensors["mean_scale"].double().log()
    return made


class Held:
    """A place for states, as a cache has one."""

    def __init__(self):
        self.layers = {}


def run(made, tensors, dtype, cuts):
    rows = {name: tensors[name][None].to(dtype) for name in ("q", "k", "v", "gate") if name in tensors}
    held, outs, read = Held(), [], 0
    for n in cuts:
        part = {name: x[:, :, read : read + n] for name, x in rows.items()}
        outs.append(made.attend(Reading([read], [n], "cpu", held), 0, **part))
        read += n
    return torch.cat(outs, 2)[0], held.layers[0]


def relative_rms(found, expected):
    found, expected = found.double(), expected.double()
    assert found.shape == expected.shape
    assert found.isfinite().all()
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


def splits(tokens):
    yield [tokens]
    yield [1] * tokens
    if tokens > 3:
        yield [tokens // 3, 1, tokens - tokens // 3 - 1]


@torch.no_grad()
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_output_and_state_are_the_oracles(case, dtype, bound):
    tensors, meta = load(case)
    made = operator(tensors, meta).to(dtype)
    for cuts in splits(tensors["q"].shape[1]):
        out, state = run(made, tensors, dtype, cuts)
        assert relative_rms(out, tensors["out"]) <= bound, cuts
        assert relative_rms(state.count[0], tensors["state_count"]) <= 0 if tensors["state_count"].any() else True
        if tensors["state_count"].any():
            assert relative_rms(state.s[0], tensors["state_s"]) <= bound
            assert relative_rms(state.z[0], tensors["state_z"]) <= bound
        salient = tensors["visible"][:, -1].bool()
        for (_, heads), rows in zip(made.groups, state.salient):
            for head, position in zip(heads, rows.position[0]):
                assert position.tolist() == salient[head].nonzero().flatten().tolist(), cuts


def test_gradients_are_those_of_finite_differences(case):
    tensors, meta = load(case)
    if tensors["q"].shape[1] > 60 or tensors["q"].shape[2] > 16:
        pytest.skip("slow")
    made = operator(tensors, meta)
    weights = list(made.parameters())
    rows = [tensors[name].double()[None] for name in ("q", "k", "v")]
    gate = tensors["gate"].double()[None] if "gate" in tensors else None
    probe = torch.randn(rows[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [x.requires_grad_() for x in rows] + weights
    read = Reading([0], [rows[0].shape[2]], "cpu")

    def loss():
        reading = Reading(read.read, read.lengths, "cpu")
        return (made.attend(reading, 0, *rows, gate) * probe).sum()

    gradients = torch.autograd.grad(loss(), leaves, allow_unused=True)
    generator = torch.Generator().manual_seed(2)
    for leaf, gradient in zip(leaves, gradients):
        gradient = torch.zeros_like(leaf) if gradient is None else gradient
        direction, step = torch.randn(leaf.shape, dtype=torch.float64, generator=generator), 1e-6
        with torch.no_grad():
            leaf += step * direction
            above = loss()
            leaf -= 2 * step * direction
            below = loss()
            leaf += step * direction
        slope = (above - below) / (2 * step)
        assert abs(slope - (gradient * direction).sum()) <= 1e-5 * max(1, abs(slope)), leaf.shape
