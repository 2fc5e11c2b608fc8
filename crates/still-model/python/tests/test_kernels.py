"""With the package still-llm whole sequences are computed by its kernels: as without it."""

import importlib.util
import logging
import sys
import types

import pytest
import torch

import students
from still_transformers import hybrid_attention
from test_students import EVERY, cache_of, in_parts, relative_rms

pytest.importorskip("still.torch")


@pytest.fixture
def calls(monkeypatch):
    """Calls of the kernels so far."""
    made, kernels = [], hybrid_attention.KERNELS

    def counted(*rows, **others):
        made.append(others["layer"])
        return kernels(*rows, **others)

    monkeypatch.setattr(hybrid_attention, "KERNELS", counted)
    return made


def without(monkeypatch, body):
    with monkeypatch.context() as patch:
        patch.setattr(hybrid_attention, "KERNELS", None)
        return body()


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_logits_and_what_follows_are_those_of_pytorch(name, calls, monkeypatch):
    model, ids = students.student(name)
    # Ends of the first part in the first chunk, at a chunk's end, and within a later one.
    for first in (5, 64, len(ids) - 9):
        sizes = [first, 1, len(ids) - first - 1]
        own, cache = in_parts(model, ids[None], sizes)
        plain, plain_cache = without(monkeypatch, lambda: in_parts(model, ids[None], sizes))
        assert relative_rms(own, plain) <= 1e-4, first
        assert cache.nbytes() == plain_cache.nbytes()
    hybrid = any(isinstance(module, hybrid_attention.HybridOperator) for module in model.modules())
    assert bool(calls) == (hybrid and model.config.attention["router"][0] != "received_attention")


@pytest.mark.parametrize("name", ["uniform", "capped", "gate", "lolcats", "query_head", "received_attention"])
def test_gradients_are_those_of_pytorch(name, calls, monkeypatch):
    model, ids = students.student(name)
    model.train()

    def gradients():
        model.zero_grad()
        model(ids[None, :150], labels=ids[None, :150]).loss.backward()
        return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}

    own, plain = gradients(), without(monkeypatch, gradients)
    assert calls and own.keys() == plain.keys()
    for parameter, gradient in plain.items():
        if gradient.abs().max() > 1e-9:
            assert relative_rms(own[parameter], gradient) <= 1e-4, parameter


@torch.no_grad()
def test_bfloat16_is_near_float32(calls):
    model, ids = students.student("uniform")
    wide = model(ids[None, :200]).logits
    narrow = model.to(torch.bfloat16)(ids[None, :200])
    assert calls and narrow.logits.dtype == torch.bfloat16 and len(cache_of(narrow)) > 0
    assert relative_rms(narrow.logits, wide) <= 0.1


@torch.no_grad()
def test_products_of_many_rows_are_left_to_the_kernels(monkeypatch):
    model, ids = students.student("uniform")
    made, linear = [], hybrid_attention.linear
    if not hybrid_attention.has_linear(torch.zeros(256, 8), torch.zeros(8, 8)):
        pytest.skip("this CPU has no AMX for bfloat16")
    monkeypatch.setattr(hybrid_attention, "linear", lambda x, weight: made.append(x.shape) or linear(x, weight))
    own = model(ids[None, :300]).logits
    projections = sum(type(module) is hybrid_attention.Projection for module in model.modules())
    assert len(made) == projections > 0
    plain = without(monkeypatch, lambda: model(ids[None, :300]).logits)
    assert len(made) == projections and relative_rms(own, plain) <= 1e-4
    # Of few rows, and where a gradient is wanted, they are PyTorch's.
    model(ids[None, :255])
    with torch.enable_grad():
        model(ids[None, :300])
    assert len(made) == projections


def loaded(monkeypatch, caplog):
    """What the operator's file says when it is loaded anew, and the kernels that it takes."""
    spec = importlib.util.spec_from_file_location("operator_of_a_folder", hybrid_attention.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    with caplog.at_level(logging.WARNING):
        spec.loader.exec_module(module)
    return caplog.text, module.KERNELS


def test_a_folder_with_an_older_package_says_so(monkeypatch, caplog):
    older = types.ModuleType("still.torch")
    older.has_kernels = older.hybrid_attention_with_state = hybrid_attention.has_kernels
    monkeypatch.setitem(sys.modules, "still.torch", older)
    said, kernels = loaded(monkeypatch, caplog)
    assert kernels is None and "has_linear" in said and "hint: pip install --upgrade still-llm" in said


class Absent:
    """Finds no package `still`."""

    def find_spec(self, name, path=None, target=None):
        if name == "still":
            raise ModuleNotFoundError("No module named 'still'", name=name)


def test_a_folder_without_the_package_says_nothing(monkeypatch, caplog):
    for name in [name for name in sys.modules if name.partition(".")[0] == "still"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    assert loaded(monkeypatch, caplog) == ("", None)
