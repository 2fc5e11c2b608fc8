"""Models of transformers that become students. Runs where torch and transformers are installed."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

import still
import still.torch

# Chunks of 16 in windows of 128 tokens.
SMALL = {
    "attention.chunk": 16,
    "attention.budget": 4,
    "data.length": 128,
    "transfer.steps": 20,
    "transfer.batch": 2,
    "transfer.optimizer.lr": 0.01,
    "finetune.steps": 20,
    "finetune.batch": 2,
    "evaluation.every": 0,
}

VARIANTS = {
    "usual": {},
    "sum, gate": {
        "attention.linear_norm": "sum",
        "attention.gate": True,
        "attention.feature_map.np_map.householder": True,
        "attention.init": "normal",
        "finetune.lora.targets": ["q", "k", "v", "o", "g"],
        "finetune.objective": "cross_entropy",
        "transfer.loss": "output_mse",
        "transfer.reduction": "mean",
        "transfer.loss_scale": 1000.0,
    },
    "packed": {
        "data.pack": True,
        "data.min_length": 20,
        "transfer.normalise": True,
        "transfer.linear_branch_weight": 0.5,
        "finetune.objective.mixed.kl": 0.5,
    },
}


def loaded(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


def steps_of(events):
    return [event for event in events if event["event"] == "step"]


@pytest.fixture(params=["kernels", "pytorch"])
def operator(request):
    """With the kernels of `still`, and with PyTorch alone."""
    from still._transformers import hybrid_attention

    kernels = hybrid_attention.KERNELS
    assert kernels is not None
    if request.param == "pytorch":
        hybrid_attention.KERNELS = None
    yield request.param
    hybrid_attention.KERNELS = kernels


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small matrices gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=VARIANTS)
def trained(request, base, text_path, documents, tmp_path_factory):
    """What `still linearize` makes: recipe, data, steps and student."""
    recipe = {**SMALL, **VARIANTS[request.param]}
    data, events = (documents if request.param == "packed" else text_path), []
    out = tmp_path_factory.mktemp("expected") / "student"
    student = still.linearize(base, data, out, recipe="uniform", set=recipe, progress=events.append)
    return recipe, data, steps_of(events), student


def test_losses_are_those_of_still_linearize(trained, operator, base, base_path, tmp_path):
    (recipe, data, expected, student), own = trained, []
    model = loaded(base_path)
    still.torch.linearize(model, "uniform", set=recipe, data=data, out=tmp_path / "own", progress=own.append)
    own = steps_of(own)
    assert [(x["stage"], x["step"], x["tokens"]) for x in own] == [(x["stage"], x["step"], x["tokens"]) for x in expected]
    assert len(own) == 40
    for key in ("loss", "grad_norm", "lr"):
        tolerance = 1e-2 if key == "grad_norm" else 1e-3
        np.testing.assert_allclose([x[key] for x in own], [x[key] for x in expected], rtol=tolerance, err_msg=key)
    np.testing.assert_allclose([x["layer_losses"] for x in own[:20]], [x["layer_losses"] for x in expected[:20]], rtol=1e-3)
    # The saved student opens in `still` and is the one that was trained.
    ids = base.tokenize("a chunk of a window " * 20)
    again = still.Model.load(tmp_path / "own")
    assert again.is_student
    exact = lambda model: model.logits(ids, state=model.new_state(rows="f32"))
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    np.testing.assert_allclose(exact(again), logits, rtol=1e-3, atol=1e-3)
    assert np.abs(exact(again) - exact(student)).max() < 0.02
    assert np.abs(exact(again) - exact(base)).max() > 0.05


MODELS = Path(__file__).parents[2] / "still-model"


@pytest.mark.parametrize("family", ["llama_biased", "mistral", "qwen2", "qwen3", "phi3", "phi3_plain", "gemma3_text_scaled", "gemma"])
def test_families_are_those_of_still(family, base_path, tmp_path, monkeypatch):
    if family == "phi3" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("transformers 4 reads its long rotation in other words")
    monkeypatch.syspath_prepend(MODELS / "python")
    from students import plain

    # In words that transformers 4 reads too.
    config = plain(json.loads((MODELS / f"tests/data/families/{family}/config.json").read_text()))
    config.update(vocab_size=257, max_position_embeddings=max(config["max_position_embeddings"], 128))
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    own = transformers.AutoConfig.from_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_config(own, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    change = {"attention.chunk": 8, "attention.budget": 2, "attention.init": "normal"}
    student = still.torch.linearize(model, "uniform", set=change, tokenizer=base_path)
    # Updates that are not zero, so that merging shows.
    with torch.no_grad():
        for name, parameter in student.learned().items():
            if ".lora_B." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    student.save(tmp_path / "student")
    ids = torch.randint(256, (1, 100))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0].numpy()
        with student.teacher():
            dense = model(ids, use_cache=False).logits[0].numpy()
    opened = still.Model.load(tmp_path / "student")
    exact = lambda model: model.logits(ids[0].tolist(), state=model.new_state(rows="f32"))
    error = lambda x, expected: np.sqrt(np.square(x - expected).mean() / np.square(expected).mean())
    assert error(logits, exact(opened)) < 1e-4
    assert error(dense, exact(opened)) > 1e-2


def test_the_step_of_peft_is_that_of_still_linearize(base, base_path, text_path, tmp_path):
    peft = pytest.importorskip("peft")
    safetensors = pytest.importorskip("safetensors.torch")
    lora = {"finetune.lora.rank": 4, "finetune.lora.alpha": 8}
    recipe = {**SMALL, **lora, "transfer.steps": 0, "finetune.batch": 1, "finetune.objective": "cross_entropy"}
    recipe["finetune.train_attention"] = False
    still.linearize(base, text_path, tmp_path / "fresh", recipe="uniform", set={**recipe, "finetune.steps": 0})
    # With a rate as large as epsilon, and both large, AdamW's first step is the gradient g: g / (|g| / 1000 + 1).
    step = {"lr": 1000, "eps": 1000, "warmup": 0, "schedule": "constant", "clip": 0}
    step = {**recipe, "finetune.steps": 1, **{f"finetune.optimizer.{key}": value for key, value in step.items()}}
    stepped = still.linearize(base, text_path, tmp_path / "stepped", recipe="uniform", set=step)
    stepped.save(tmp_path / "delta", delta=True)
    (file,) = (tmp_path / "delta").glob("*.safetensors")
    values = safetensors.load_file(file)

    text = still._still.resolve_recipe("uniform", step, None)
    window = still._still.Windows(text_path, base_path, text).next(1)[0][0]
    ids = torch.from_numpy(window)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fresh", trust_remote_code=True, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    named = {name.replace("base_model.model.", "").replace(".default", ""): x for name, x in model.named_parameters()}
    with torch.no_grad():
        for name, value in values.items():
            if ".lora_A." in name:
                named[name].copy_(value)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    compared = 0
    for name, value in values.items():
        if ".lora_B." in name:
            expected = -value / (1 - value.abs() / 1000)
            error = (named[name].grad - expected).square().mean().sqrt() / expected.square().mean().sqrt()
            assert error < 1e-4, (name, error)
            compared += 1
    assert compared == 2 * len(targets)


def test_a_loop_of_ones_own(base_path, text_path):
    model = loaded(base_path)
    change = {"attention.chunk": 8, "finetune.objective": "cross_entropy"}
    student = still.torch.linearize(model, "uniform", set=change)
    ids = torch.randint(256, (3, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 40:] = 0
    for make, learns in ((student.transfer, "feature_map"), (student.finetune, "lora")):
        stage = make()
        parameters = [x for x in stage.parameters() if x.requires_grad]
        assert any(learns in name for name, x in stage.named_parameters() if x.requires_grad)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        losses = []
        for _ in range(4):
            output = stage(ids, mask)
            output.loss.backward()
            losses.append(output.reported.item())
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0]
        # A row in a batch, padded, is what it is alone.
        rows = [stage(ids[n : n + 1, : mask[n].sum()]).reported.item() for n in range(3)]
        weights = mask.sum(1) - int(learns == "lora")
        own = stage(ids, mask).reported.item()
        assert own == pytest.approx(np.average(rows, weights=weights), rel=1e-5)


def test_stages_come_one_after_the_other(base_path):
    student = still.torch.linearize(loaded(base_path), "uniform", set={"attention.chunk": 8})
    first, _ = student.transfer(), student.finetune()
    with pytest.raises(still.InputError, match="another stage was made"):
        first(torch.zeros(1, 30, dtype=torch.long))


def test_calibrated_budgets_are_taken(base, base_path, text_path, tmp_path):
    change = {"attention.chunk": 16, "calibration.tokens": 1024, "calibration.window": 256, "calibration.at_length": 512}
    change["calibration.cache_fraction"] = 0.6
    found = still.calibrate(base, text_path, recipe="uniform", set=change, out=tmp_path / "budgets.json")["budgets"]
    of_file = still.torch.linearize(loaded(base_path), "uniform", set=change, budgets=tmp_path / "budgets.json")
    of_data = still.torch.linearize(loaded(base_path), "uniform", set=change, data=text_path, train=False)
    assert of_file.section["budgets"] == of_data.section["budgets"] == found


def test_a_run_goes_on_from_its_checkpoint(base_path, text_path, tmp_path):
    recipe = {**SMALL, "transfer.steps": 3, "finetune.steps": 3, "finetune.dropout": 0.1, "checkpoint.every": 2}

    def losses(run_dir, resume=False, stop=None):
        seen = []

        def note(event):
            if event["event"] == "step":
                seen.append(event["loss"])
            if len(seen) == stop:
                raise KeyboardInterrupt

        student = still.torch.linearize(loaded(base_path), "uniform", set=recipe)
        student.train(text_path, run_dir=tmp_path / run_dir, resume=resume, progress=note)
        return seen

    whole = losses("whole")
    with pytest.raises(KeyboardInterrupt):
        losses("cut", stop=6)
    assert losses("cut", resume=True) == whole[5:]
    with pytest.raises(still.InputError, match="holds checkpoints"):
        losses("cut")
    recipe["seed"] = 1
    with pytest.raises(still.InputError, match="another recipe"):
        losses("cut", resume=True)


def test_what_cannot_be_is_an_error_with_a_hint(base_path, text_path, tmp_path):
    change = {"attention.chunk": 8}
    model = loaded(base_path)
    student = still.torch.linearize(model, "uniform", set=change)
    ids = torch.zeros(1, 20, dtype=torch.long)
    left = torch.ones_like(ids)
    left[0, 0] = 0
    linearize = still.torch.linearize
    calls = {
        "is a student already": lambda: linearize(model, "uniform"),
        "pads on the left": lambda: model(ids, attention_mask=left, use_cache=False),
        "go on from a cache": lambda: model.generate(ids, max_new_tokens=2),
        "several sequences of a row": lambda: model(ids, position_ids=torch.arange(20)[None] % 10, use_cache=False),
        "attention_mask has the shape": lambda: student.transfer()(ids, left[:, :3]),
        "no model": lambda: linearize("org/name"),
        "no causal language model": lambda: linearize(torch.nn.Linear(2, 2), "uniform"),
        "needs text": lambda: linearize(loaded(base_path), "quick"),
        "no recipe of this name": lambda: linearize(loaded(base_path), "no-such"),
        "nothing": lambda: linearize(loaded(base_path), "uniform", out=tmp_path / "out"),
        "held-out windows are there": lambda: linearize(
            loaded(base_path), "uniform", set={**SMALL, "evaluation.every": 1}, data=text_path
        ),
        "exists already": lambda: student.save(tmp_path),
        "not initialized": lambda: student.shard(),
        "architecture": lambda: linearize(
            transformers.AutoModelForCausalLM.from_config(
                transformers.OlmoConfig(
                    vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
                )
            ),
            "uniform",
        ),
    }
    for message, call in calls.items():
        with pytest.raises(still.InputError, match=message) as error:
            call()
        assert error.value.hint, message
