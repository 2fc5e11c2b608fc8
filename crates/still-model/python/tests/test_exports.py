"""Folders that `still export --transformers` writes. `--still BINARY` says with what; without it: skipped."""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_students import fixture, relative_rms
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import students

NAMES = ["uniform", "ragged", "gate", "lola", "linear_only", "family_llama", "family_phi3", "family_gemma3_text"]


@pytest.fixture
def still(request):
    binary = request.config.getoption("--still")
    if not binary:
        pytest.skip("no --still BINARY")

    def run(*arguments):
        done = subprocess.run([binary, *map(str, arguments)], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def written(name, folder):
    """A student on disk, written by hand: without a `still_format`, no digest is asked for."""
    config, weights, _ = students.configuration(name)
    model, _ = students.student(name)
    learned = students.learned(model, torch.Generator())
    own = {key: x for key, x in model.state_dict().items() if key in learned}
    folder.mkdir()
    save_file({**load_file(weights), **own}, folder / "model.safetensors")
    text = {**config.base_config, "still": config.still, "eos_token_id": 63}
    (folder / "config.json").write_text(json.dumps(text))
    tokenizer = Tokenizer(models.BPE(vocab={chr(33 + n): n for n in range(64)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_opens_with_the_logits_of_the_student(name, still, tmp_path):
    written(name, tmp_path / "student")
    folder = tmp_path / "folder"
    still("export", "--model", tmp_path / "student", "--transformers", folder, "--dtype", "f32")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    expected = fixture(name)
    logits = model(expected["ids"][None]).logits[0, expected["positions"]]
    assert relative_rms(logits, expected["logits"]) <= 1e-4
    assert model.generation_config.eos_token_id in (63, [63])

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer("ABCDEF", return_tensors="pt")
    assert ids["input_ids"].tolist() == [[32, 33, 34, 35, 36, 37]]
    text = tokenizer.decode(model.generate(**ids, do_sample=False, max_new_tokens=4)[0])
    assert text.startswith("ABCDEF")
    # `still` says the same.
    said = still("generate", "--model", folder, "--prompt", "ABCDEF", "-n", 4, "--cache-dtype", "f32")
    assert text.removeprefix("ABCDEF").split("`")[0] in said
