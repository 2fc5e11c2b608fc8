"""MMLU of a Qwen2 GGUF in transformers: `mmlu_in_transformers.py FILE.gguf FOLDER DATA_DIR ANSWERS.jsonl.gz`, three questions a subject.

FOLDER has the model's `config.json` (`base_config` of a student's will do) and tokenizer. ANSWERS are what `still eval --samples` wrote of the
same model: says where they and the letter that is likeliest here differ, and by how much that letter leads.
"""
import gzip
import json
import sys

import gguf
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

FILE, FOLDER, DATA, ANSWERS = sys.argv[1:]
LETTERS = "ABCD"
NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
} | {f"attn_{x}.{part}": f"self_attn.{x}_proj.{part}" for x in "qkv" for part in ("weight", "bias")}


def load():
    tensors = {
        x.name: torch.from_numpy(gguf.quants.dequantize(x.data, x.tensor_type)).to(torch.bfloat16) for x in gguf.GGUFReader(FILE).tensors
    }
    config = json.load(open(f"{FOLDER}/config.json"))
    config = dict(config.get("base_config", config))
    config.pop("architectures", None)
    model = Qwen2ForCausalLM(Qwen2Config(**config)).to(torch.bfloat16)
    embedding = tensors["token_embd.weight"]
    state = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": tensors["output_norm.weight"],
        "lm_head.weight": tensors.get("output.weight", embedding),
    }
    for name, tensor in tensors.items():
        if name.startswith("blk."):
            _, layer, part = name.split(".", 2)
            state[f"model.layers.{layer}.{NAMES[part]}"] = tensor
    model.load_state_dict(state)
    return model.eval()


def subjects(name):
    found = {}
    for line in open(f"{DATA}/{name}.jsonl"):
        record = json.loads(line)
        found.setdefault(record["subject"], []).append(record)
    return found


def asked(record):
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, record["choices"]))
    return record["query"].strip() + choices + "\nAnswer:"


model, tokenizer = load(), AutoTokenizer.from_pretrained(FOLDER)
ids = [tokenizer(" " + letter, add_special_tokens=False).input_ids[0] for letter in LETTERS]
known = {}
for line in gzip.open(ANSWERS, "rt"):
    sample = json.loads(line)
    if "id" in sample:
        known[sample["id"]] = sample["scores"]["acc"]
examples, count, alike, right, ties = subjects("mmlu_dev"), 0, 0, 0, 0
for subject, records in subjects("mmlu_test").items():
    beginning = f"The following are multiple choice questions (with answers) about {' '.join(subject.split('_'))}.\n\n"
    beginning += "".join(f"{asked(example)} {LETTERS[example['gold']]}\n\n" for example in examples[subject])
    for n, record in enumerate(records[:3]):
        prompt = tokenizer(beginning + asked(record), return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            values = model(prompt, logits_to_keep=1).logits[0, -1].float()[ids].tolist()
        correct = values.index(max(values)) == record["gold"]
        first, second = sorted(values)[:1:-1]
        count, right, ties = count + 1, right + correct, ties + (first == second)
        same = correct == bool(known[f"{subject}/{n}"])
        alike += same
        if not same:
            print(f"{subject}/{n}: the likeliest letter leads by {first - second:.3f}")
print(f"{count} questions, {right} right, {alike} alike; in {ties} two letters tie")
