"""Students read at once, in parts, token by token, in batches, generate, train, and come back from disk."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

import students
from still_transformers import modeling_still

EVERY = list(students.STUDENTS)


def relative_rms(found, expected):
    found, expected = found.double(), expected.double()
    assert found.shape == expected.shape and found.isfinite().all()
    return ((found - expected).square().mean() / expected.square().mean()).sqrt().item()


def cache_of(output):
    return output[modeling_still.CACHE_FIELD]


def in_parts(model, ids, sizes, mask=None):
    cache, logits, read = None, [], 0
    for n in sizes:
        part = {} if mask is None else {"attention_mask": mask[:, : read + n]}
        output = model(ids[:, read : read + n], use_cache=True, **{modeling_still.CACHE_FIELD: cache}, **part)
        cache, read = cache_of(output), read + n
        logits.append(output.logits)
    return torch.cat(logits, 1), cache


def fixture(name):
    return load_file(students.DATA / f"students/{name}.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_logits_are_those_recorded_in_parts_too(name):
    model, ids = students.student(name)
    expected = fixture(name)
    assert expected["ids"].tolist() == ids.tolist()
    at = expected["positions"]
    whole = model(ids[None]).logits
    assert relative_rms(whole[0, at], expected["logits"]) <= 1e-4
    n = len(ids)
    uneven = [7, 1, 50, 1, 1]
    for sizes in ([1] * n, uneven + [n - sum(uneven)]):
        parts, cache = in_parts(model, ids[None], sizes)
        assert relative_rms(parts, whole) <= 1e-4
        assert cache.get_seq_length() == n and cache.tokens == [n]


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_a_row_of_a_batch_is_that_row_alone(name):
    model, ids = students.student(name)
    ids = ids[:100]
    rows = [ids, ids[13:71]]
    for side in ("left", "right"):
        batch, mask = torch.zeros(2, 100, dtype=torch.long), torch.zeros(2, 100, dtype=torch.long)
        for row, own in enumerate(rows):
            place = slice(100 - len(own), None) if side == "left" else slice(len(own))
            batch[row, place], mask[row, place] = own, 1
        for sizes in ([100], [60, 1, 39]):
            if side == "right" and len(sizes) > 1:
                continue
            logits, cache = in_parts(model, batch, sizes, mask)
            for row, own in enumerate(rows):
                alone = model(own[None]).logits[0]
                assert relative_rms(logits[row][mask[row].bool()], alone) <= 1e-4, (side, sizes, row)
            assert cache.tokens == [100, 58]


@pytest.mark.parametrize("name", ["uniform", "family_gemma3_text", "family_phi3"])
def test_blocks_of_an_mlp_give_what_it_gives_whole(name, monkeypatch):
    model, ids = students.student(name)
    sizes = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, rows: sizes.append(rows[0].shape[1]))
    with torch.no_grad():
        whole = model(ids[None]).logits
        monkeypatch.setattr(modeling_still, "MLP_TOKENS", 100)
        # A copy has its own weights in its blocks.
        other = copy.deepcopy(model)
        assert relative_rms(model(ids[None]).logits, whole) <= 1e-5
        other.model.layers[0].mlp.down_proj.weight.zero_()
        assert relative_rms(other(ids[None]).logits, whole) > 1e-3
    whole_and_blocks = [len(ids), *(len(block) for block in ids.split(100))]
    assert sizes[: len(whole_and_blocks)] == whole_and_blocks
    # Gradients go through the whole.
    sizes.clear()
    model(ids[None])
    assert sizes == [len(ids)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["uniform", "capped", "gate", "lola", "linear_only", "family_gemma3_text", "family_phi3"])
def test_generation(name):
    model, ids = students.student(name)
    expected = fixture(name)["generated"]
    start = ids[: len(ids) // 2]
    new = model.generate(start[None], do_sample=False, max_new_tokens=len(expected))
    assert new[0, len(start) :].tolist() == expected.tolist()
    # A batch with padding on the left gives what its rows give alone; without a cache, and by beams too.
    short = start[20:]
    batch = torch.stack([start, torch.cat([torch.zeros(20, dtype=torch.long), short])])
    mask = torch.ones_like(batch)
    mask[1, :20] = 0
    together = model.generate(batch, attention_mask=mask, do_sample=False, max_new_tokens=12)
    alone = model.generate(short[None], do_sample=False, max_new_tokens=12)
    assert together[0, len(start) :].tolist() == expected[:12].tolist()
    assert together[1, len(start) :].tolist() == alone[0, len(short) :].tolist()
    anew = model.generate(batch, attention_mask=mask, do_sample=False, max_new_tokens=4, use_cache=False)
    assert anew.tolist() == together[:, : len(start) + 4].tolist()
    beams = [
        model.generate(batch, attention_mask=mask, do_sample=False, num_beams=3, max_new_tokens=6, use_cache=use)
        for use in (True, False)
    ]
    assert beams[0].tolist() == beams[1].tolist()


@torch.no_grad()
def test_a_conversation_goes_on_from_its_cache():
    model, ids = students.student("capped")
    first = model.generate(ids[None, :50], do_sample=False, max_new_tokens=10, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, ids[None, 50:70]], 1)
    cache = first[modeling_still.CACHE_FIELD]
    name = modeling_still.CACHE_FIELD
    on = model.generate(ids, **{name: copy.deepcopy(cache)}, do_sample=False, max_new_tokens=10)
    anew = model.generate(ids, do_sample=False, max_new_tokens=10)
    assert on.tolist() == anew.tolist()


@torch.no_grad()
def test_memory_is_constant_under_a_cap():
    model, ids = students.student("capped")
    sizes = []
    for n in (200, 600):
        _, cache = in_parts(model, ids[None, :n], [n])
        sizes.append(cache.nbytes())
    assert sizes[0] == sizes[1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["uniform", "capped", "family_gemma3_text"])
def test_bfloat16_keeps_states_in_float32(name):
    model, ids = students.student(name)
    exact = model(ids[None]).logits
    model = model.to(torch.bfloat16)
    output = model(ids[None], use_cache=True)
    assert output.logits.dtype == torch.bfloat16
    assert relative_rms(output.logits, exact) < 0.2
    layer = next(state for state in cache_of(output).layers.values() if "s" in state.tensors)
    assert layer.s.dtype == torch.float32 and layer.window_k.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert students.student(name)[0](ids[None]).logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["uniform", "capped", "gate", "linear_only"])
def test_bfloat16_generates_a_batch_with_padding(name):
    model, ids = students.student(name)
    model = model.to(torch.bfloat16)
    start = ids[:90]
    short = start[20:]
    batch = torch.stack([start, torch.cat([torch.zeros(20, dtype=torch.long), short])])
    mask = torch.ones_like(batch)
    mask[1, :20] = 0
    options = dict(do_sample=False, max_new_tokens=12, return_dict_in_generate=True, output_logits=True)
    together = model.generate(batch, attention_mask=mask, **options)
    for row, own in enumerate((start, short)):
        alone = model.generate(own[None], **options)
        for in_batch, by_itself in zip(together.logits, alone.logits):
            assert relative_rms(in_batch[row].float(), by_itself[0].float()) <= 0.05
            if in_batch[row].argmax() != by_itself[0].argmax():
                # Rounding chose between two that are nearly as likely; what follows is of other tokens.
                best = by_itself[0].float().topk(2).values
                assert best[0] - best[1] <= 0.05 * best.abs().max()
                break


@pytest.mark.parametrize("name", ["ragged", "capped", "random", "lola", "linear_only", "query_head", "family_gemma3_text"])
def test_no_tensor_is_left_on_another_device(name):
    with FakeTensorMode():
        try:
            torch.zeros(1, device="cuda") + 1
        except (RuntimeError, AssertionError):
            pytest.skip("this PyTorch knows no GPU, not even a feigned one")
        with torch.no_grad(), torch.device("cuda"):
            model = modeling_still.StillForCausalLM(students.configuration(name)[0])
            ids = torch.zeros(2, 60, dtype=torch.long)
        with torch.no_grad():
            output = model(ids, use_cache=True)
            for _ in range(5):
                output = model(ids[:, :1], use_cache=True, **{modeling_still.CACHE_FIELD: cache_of(output)})
        places = {output.logits.device.type}
        for state in cache_of(output).layers.values():
            state.map(lambda x: places.add(x.device.type) or x)
        assert places == {"cuda"}


@pytest.mark.parametrize("name", EVERY)
def test_every_learned_tensor_gets_a_gradient(name):
    model, ids = students.student(name)
    model.train()
    ids = ids[None, :90]
    output = model(ids, labels=ids)
    output.loss.backward()
    branches = model.config.attention["branches"]
    for key, parameter in model.named_parameters():
        layer = key.split(".")[2] if key.startswith("model.layers.") else None
        silent = not branches["linear"] or (
            layer and model.config.attention["budgets"][int(layer)] and "_map_k" in key and full(model, int(layer), key)
        )
        if ("feature_map" in key or "log_lambda" in key) and silent:
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0 or parameter.grad.dim() > 1, key
    plain = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    for key, gradient in plain.items():
        assert torch.allclose(dict(model.named_parameters())[key].grad, gradient, atol=1e-6), key


def full(model, layer, key):
    """Whether a head keeps every token, so that its map of keys is never asked."""
    attention = model.config.attention
    return attention["budgets"][layer][int(key.split(".")[-2])] == attention["chunk"] if "linears" in key else False


def save(model, folder):
    model.save_pretrained(folder)
    for file in ("configuration_still.py", "hybrid_attention.py", "modeling_still.py"):
        shutil.copy(students.HERE / "still_transformers" / file, folder)
    import json

    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_still.StillConfig",
        "AutoModelForCausalLM": "modeling_still.StillForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
@pytest.mark.parametrize("name", ["uniform", "gate", "lolcats", "family_phi3", "family_gemma3_text", "family_llama"])
def test_it_comes_back_from_disk(name, tmp_path):
    model, ids = students.student(name)
    save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    expected = model(ids[None]).logits
    assert relative_rms(again(ids[None]).logits, expected) == 0
    names = {n for n, _ in model.named_parameters()}
    assert {n for n, _ in again.named_parameters()} == names
    # What it learned stays float32.
    half = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype=torch.bfloat16)
    assert half.model.embed_tokens.weight.dtype == torch.bfloat16
    for key, parameter in half.named_parameters():
        if "feature_map" in key or "log_lambda" in key or "window_factor" in key:
            assert parameter.dtype == torch.float32, key
    for key, parameter in model.named_parameters():
        if not any(word in key for word in modeling_still.LEARNED):
            parameter.data = parameter.data.bfloat16()
    assert relative_rms(half(ids[None]).logits, model(ids[None]).logits) == 0
    again.save_pretrained(tmp_path / "again")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert relative_rms(third(ids[None]).logits, expected) == 0


def test_without_trust_it_does_not_open(tmp_path):
    model, _ = students.student("uniform")
    save(model, tmp_path)
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises((ValueError, OSError), match="trust_remote_code"):
            auto.from_pretrained(tmp_path, trust_remote_code=False)


def test_what_it_cannot_do_is_refused():
    model, ids = students.student("uniform")
    ids = ids[None, :40]
    with pytest.raises(ValueError, match="two dimensions"):
        model(ids, attention_mask=torch.ones(1, 1, 40, 40))
    with pytest.raises(ValueError, match="Packed documents"):
        model(ids, position_ids=torch.arange(40)[None] % 20)
    with pytest.raises(ValueError, match="no matrix"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="StillForCausalLM"):
        model.model(ids)
    cache = cache_of(model(ids, use_cache=True))
    with pytest.raises(NotImplementedError, match="hint"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="newer version"):
        modeling_still.StillConfig(base_config=model.config.base_config, still=model.config.still, still_format=2)
    with pytest.raises(ValueError, match="speed"):
        modeling_still.StillConfig(base_config=model.config.base_config, still={**model.config.still, "speed": 1})
    with pytest.raises(ValueError, match="supported base models"):
        modeling_still.StillConfig(base_config={"model_type": "gpt2"}, still=model.config.still)


def test_peft_trains_it():
    peft = pytest.importorskip("peft")
    model, ids = students.student("uniform")
    before = model(ids[None, :90]).logits.detach()
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = wrapped(ids[None, :90], labels=ids[None, :90]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merged = wrapped.merge_and_unload()
    assert relative_rms(merged(ids[None, :90]).logits.detach(), before) > 1e-3
