"""Students of `still.torch` and of transformers on CUDA, with the kernels and without. Runs where a GPU, torch, transformers and a
wheel with CUDA are."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import still.torch
from still._transformers import hybrid_attention

# Chunks and head dimensions that have kernels on CUDA.
RECIPE = {
    "attention.budget": 5,
    "data.length": 512,
    "data.heldout": 0.1,
    "data.min_length": 60,
    "transfer.steps": 6,
    "transfer.batch": 2,
    "transfer.optimizer.lr": 0.01,
    "finetune.steps": 6,
    "finetune.batch": 2,
    "evaluation.every": 6,
    "evaluation.windows": 2,
    "evaluation.passkey_keys": 2,
    "evaluation.passkey_length": 600,
    "evaluation.keep_best": True,
}
VARIANTS = {
    "usual": {},
    "alone": {"transfer.linear_branch_weight": 0.5, "attention.linear_norm": "sum"},
    "gate": {"attention.gate": True, "attention.feature_map.np_map.householder": True, "transfer.loss": "output_mse"},
    "capped": {"attention.cap": 20},
}


@pytest.fixture
def calls(monkeypatch):
    """Calls of the kernels so far."""
    made, kernels = [], hybrid_attention.KERNELS

    def counted(*rows, **others):
        made.append(rows[0].device.type)
        return kernels(*rows, **others)

    monkeypatch.setattr(hybrid_attention, "KERNELS", counted)
    return made


def base(dtype, device):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64}
    config = transformers.LlamaConfig(
        vocab_size=257, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
    return model.to(device, dtype)


def trained(recipe, data, tokenizer, dtype=torch.float32, device="cuda"):
    events = []
    student = still.torch.linearize(base(dtype, device), "uniform", set={**RECIPE, **recipe}, tokenizer=tokenizer)
    student.train(data, progress=events.append)
    return student, [x["loss"] for x in events if x["event"] == "step"], [x for x in events if x["event"] == "evaluation"]


@pytest.fixture(scope="module")
def long_documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "long.jsonl"
    random = np.random.default_rng(3)
    words = ["chunk", "window", "state", "linear", "salient", "budget", "head", "layer"]
    path.write_text("".join('{"text": "%s"}\n' % " ".join(random.choice(words, 130)) for _ in range(60)))
    return path


@pytest.mark.parametrize("name", VARIANTS)
def test_it_trains_by_the_kernels_as_by_pytorch(name, base_path, long_documents, calls, monkeypatch):
    recipe = VARIANTS[name]
    _, own, measured = trained(recipe, long_documents, base_path)
    assert calls and set(calls) == {"cuda"}
    _, of_cpu, measured_by_cpu = trained(recipe, long_documents, base_path, device="cpu")
    monkeypatch.setattr(hybrid_attention, "KERNELS", None)
    _, plain, measured_plainly = trained(recipe, long_documents, base_path)
    assert len(own) == 12
    for others in (plain, of_cpu):
        np.testing.assert_allclose(own, others, rtol=1e-3)
    for others in (measured_plainly, measured_by_cpu):
        losses = [[x["heldout_nll"] for x in of] for of in (measured, others)]
        np.testing.assert_allclose(*losses, rtol=1e-3)


def test_bfloat16_is_near_float32(base_path, long_documents, calls):
    _, wide, _ = trained({}, long_documents, base_path)
    student, narrow, _ = trained({}, long_documents, base_path, dtype=torch.bfloat16)
    assert calls and all(x.dtype == torch.float32 for x in student.learned().values())
    np.testing.assert_allclose(narrow[6:], wide[6:], rtol=0.2)


def relative_rms(own, expected):
    own, expected = own.double(), expected.double()
    return ((own - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-12)).item()


@pytest.mark.parametrize("name", ["usual", "gate", "capped"])
def test_a_student_in_transformers_trains_and_writes_by_the_kernels(name, base_path, long_documents, monkeypatch, tmp_path):
    student, _, _ = trained(VARIANTS[name], long_documents, base_path)
    student.save(tmp_path / "student")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student", trust_remote_code=True, dtype=torch.float32)
    model = model.to("cuda")
    import sys

    operator = sys.modules[type(model.model.layers[0].self_attn).__mro__[1].__module__]
    calls, kernels = [], operator.KERNELS

    def counted(*rows, **others):
        calls.append(rows[0].device.type)
        return kernels(*rows, **others)

    ids = torch.randint(256, (2, 500), generator=torch.Generator().manual_seed(1)).cuda()

    def results():
        model.zero_grad()
        model.train()
        model(ids, labels=ids).loss.backward()
        gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
        model.eval()
        with torch.no_grad():
            logits = model(ids).logits
            written = model.generate(ids, max_new_tokens=20, do_sample=False, min_new_tokens=20)
        return gradients, logits, written

    monkeypatch.setattr(operator, "KERNELS", counted)
    own = results()
    assert len(calls) == 3 * 2 and set(calls) == {"cuda"}
    monkeypatch.setattr(operator, "KERNELS", None)
    plain = results()
    assert own[0].keys() == plain[0].keys()
    for parameter, gradient in plain[0].items():
        if gradient.abs().max() > 1e-9:
            assert relative_rms(own[0][parameter], gradient) <= 1e-4, parameter
    assert relative_rms(own[1], plain[1]) <= 1e-4
    assert torch.equal(own[2], plain[2])
