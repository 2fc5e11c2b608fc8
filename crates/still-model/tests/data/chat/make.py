#!/usr/bin/env python3
"""Writes expected.json: what transformers' apply_chat_template makes of conversations.json with each template.

pip install transformers jinja2; python3 make.py
"""
import json
import os

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

HERE = os.path.dirname(os.path.abspath(__file__))
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def main():
    conversations = json.load(open(os.path.join(HERE, "conversations.json"), encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)
    expected = {}
    for file in sorted(os.listdir(os.path.join(HERE, "templates"))):
        template = open(os.path.join(HERE, "templates", file), encoding="utf-8", newline="").read()
        for name, conversation in conversations.items():
            for prompt in (False, True):
                context = {k: conversation[k] for k in ("tools", "documents") if k in conversation}
                try:
                    text = tokenizer.apply_chat_template(
                        conversation["messages"], chat_template=template, tokenize=False, add_generation_prompt=prompt,
                        date_string="26 Jul 2024", **context, **conversation.get("chat_template_kwargs", {}),
                    )
                except Exception as error:
                    text = {"error": f"{type(error).__name__}: {error}"[:160]}
                expected[f"{file} {name} {'prompt' if prompt else 'whole'}"] = text
    with open(os.path.join(HERE, "expected.json"), "w", encoding="utf-8") as out:
        json.dump(expected, out, ensure_ascii=False, indent=1)
        out.write("\n")
    print(len(expected), "texts;", sum(isinstance(text, dict) for text in expected.values()), "refused")


main()
