#!/usr/bin/env python3
"""Runs clients that this project did not write with a running `still serve`.

    pip install openai litellm 'lm-eval[api]'
    still serve --model demo &
    python scripts/serve_clients.py --url http://127.0.0.1:8080

Each check prints a line; the exit code is 1 if one fails. With `--samples FILE`, which `still eval --samples FILE --tasks
piqa,arc_easy,arc_challenge` wrote, and `--data-dir`, lm-eval's log-likelihoods are compared with those of `still eval`, item by item.
"""

import argparse
import json
import os
import sys
import traceback
from pathlib import Path

CHECKS = []


def check(function):
    """Adds a check."""
    CHECKS.append(function)
    return function


def client(options):
    from openai import OpenAI

    return OpenAI(base_url=options.url + "/v1", api_key=options.key, max_retries=0)


def say(text, role="user"):
    return {"role": role, "content": text}


@check
def openai_models(options):
    names = [model.id for model in client(options).models.list()]
    assert names == [options.model], names
    return names[0]


@check
def openai_chat(options):
    answer = client(options).chat.completions.create(
        model=options.model, messages=[say("What is the capital of France?")], max_completion_tokens=24, temperature=0
    )
    assert answer.choices[0].message.content, answer
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    return repr(answer.choices[0].message.content)


@check
def openai_chat_stream(options):
    request = dict(model=options.model, messages=[say("Count to five.")], max_completion_tokens=24, temperature=0)
    whole = client(options).chat.completions.create(**request)
    pieces = list(
        client(options).chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content, (text, whole)
    usage = pieces[-1].usage
    assert usage.completion_tokens == whole.usage.completion_tokens, usage
    return f"{len(pieces)} pieces, {usage.prompt_tokens_details.cached_tokens} tokens of the prompt were kept"


@check
def openai_conversation(options):
    messages, cached = [say("Tell me about the sea. " * 20)], []
    for _ in range(3):
        answer = client(options).chat.completions.create(
            model=options.model, messages=messages, max_completion_tokens=16, temperature=0
        )
        cached.append((answer.usage.prompt_tokens_details.cached_tokens, answer.usage.prompt_tokens))
        messages += [say(answer.choices[0].message.content, "assistant"), say("Go on.")]
    for (kept, _), (_, before) in zip(cached[1:], cached):
        assert kept + 64 > before, f"{kept} tokens were kept of {before}"
    return f"kept of read, turn by turn: {cached}"


@check
def openai_logprobs(options):
    answer = client(options).chat.completions.create(
        model=options.model, messages=[say("Hi")], max_completion_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    for token in answer.choices[0].logprobs.content:
        assert token.token == token.top_logprobs[0].token and token.logprob <= 0, token
        assert bytes(token.bytes).decode(errors="replace") == token.token
    return f"{len(answer.choices[0].logprobs.content)} tokens"


@check
def openai_completions(options):
    answer = client(options).completions.create(
        model=options.model, prompt=["Once upon a time", "The sea"], max_tokens=8, n=2, logprobs=2, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(len(choice.logprobs.tokens) <= 8 for choice in answer.choices)
    return [choice.text for choice in answer.choices]


@check
def openai_structured_output(options):
    from typing import Annotated, Literal

    from pydantic import BaseModel, Field

    # Whatever the model, an answer ends: each value has a longest form.
    class City(BaseModel):
        name: Annotated[str, Field(max_length=20)]
        river: Literal["Seine", "Thames"]
        inhabitants: Annotated[int, Field(ge=0, le=99_999_999)]
        is_capital: bool

    answer = client(options).chat.completions.parse(
        model=options.model,
        messages=[say("Describe Paris.")],
        response_format=City,
        max_completion_tokens=500,
        temperature=0,
    )
    city = answer.choices[0].message.parsed
    assert isinstance(city, City), answer
    return city


@check
def openai_tool_calls(options):
    import openai

    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "description": "Tells the weather", "parameters": parameters}}
    # Whatever the model: a call as Hermes, Qwen and others write it.
    call = r'''start: "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"" /[A-Za-z]{1,12}/ "\"}}\n</tool_call>"'''
    request = dict(
        model=options.model,
        messages=[say("How is the weather in Paris?")],
        tools=[tool],
        max_completion_tokens=200,
        temperature=0,
        extra_body={"grammar": call},
    )
    try:
        answer = client(options).chat.completions.create(**request)
    except openai.BadRequestError as error:
        if error.param == "tools":
            return f"skipped: {error.body['message']}"
        raise
    choice = answer.choices[0]
    if choice.message.tool_calls is None:
        return "skipped: the model's template writes calls otherwise"
    assert choice.finish_reason == "tool_calls" and not choice.message.content, choice
    whole = choice.message.tool_calls[0].function
    assert whole.name == "weather" and list(json.loads(whole.arguments)) == ["city"], whole
    with client(options).chat.completions.stream(**request) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls" and not streamed.message.content, streamed
    assert streamed.message.tool_calls[0].function.arguments == whole.arguments, streamed
    messages = [*request["messages"], choice.message, {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "Warm"}]
    text = client(options).chat.completions.create(**{**request, "messages": messages, "extra_body": {"grammar": 'start: "Warm."'}})
    assert text.choices[0].message.content == "Warm." and not text.choices[0].message.tool_calls, text
    return f"{whole.name}({whole.arguments})"


@check
def openai_errors(options):
    import openai

    api = client(options)
    try:
        api.chat.completions.create(model="no-such-model", messages=[say("Hi")])
        raise AssertionError("another model was found")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error
    try:
        api.completions.create(model=options.model, prompt="a", max_tokens=10**9)
        raise AssertionError("a context of 10^9 tokens was there")
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded", error
    return "404 and 400 as the client expects them"


@check
def litellm_chat(options):
    import litellm

    litellm.suppress_debug_info = True
    request = dict(
        model="openai/" + options.model,
        api_base=options.url + "/v1",
        api_key=options.key,
        messages=[say("Say hello.")],
        max_tokens=12,
        temperature=0,
    )
    whole = litellm.completion(**request).choices[0].message.content
    pieces = litellm.completion(**request, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == whole, (text, whole)
    return repr(text)


def harness_model(options):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    os.environ.setdefault("OPENAI_API_KEY", options.key)
    return LocalCompletionsAPI(
        base_url=options.url + "/v1/completions",
        model=options.model,
        tokenizer_backend="remote",
        auth_token=options.key,
        max_length=options.max_length,
        batch_size=4,
        num_concurrent=1,
    )


def loglikelihoods(model, pairs):
    from lm_eval.api.instance import Instance

    ask = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)]
    return model.loglikelihood(ask, disable_tqdm=True)


@check
def harness_loglikelihood(options):
    contexts = ["The capital of France is", "Two and two make", "The sun rises in the"]
    wanted, other = [" Paris", " four", " east"], [" purple", " seventeen", " bathtub"]
    model = harness_model(options)
    found = loglikelihoods(model, list(zip(contexts + contexts, wanted + other)))
    for (likely, _), (unlikely, _) in zip(found[:3], found[3:]):
        assert likely > unlikely, found
    return [round(value, 3) for value, _ in found]


@check
def harness_agrees_with_still_eval(options):
    if not options.samples:
        return "skipped: no --samples"
    pairs, expected, names = [], [], []
    files = {}
    for line in Path(options.samples).read_text().splitlines():
        sample = json.loads(line)
        if "task" not in sample:
            continue
        task, at = sample["task"], sample["id"]
        if task not in files:
            rows = (Path(options.data_dir) / f"{task}.jsonl").read_text().splitlines()
            files[task] = [json.loads(row) for row in rows]
        row = files[task][int(at)]
        context = {
            "piqa": lambda row: row["query"] + "Answer:",
            "arc_easy": lambda row: f"Question: {row['query']}\nAnswer:",
            "arc_challenge": lambda row: f"Question: {row['query']}\nAnswer:",
        }[task](row)
        pairs += [(context, " " + choice) for choice in row["choices"]]
        expected += sample["loglikelihoods"]
        names += [(task, at)] * len(row["choices"])
    found = loglikelihoods(harness_model(options), pairs)
    worst = max(abs(value - other) for (value, _), other in zip(found, expected))
    bad = [
        (name, value, other)
        for name, (value, _), other in zip(names, found, expected)
        if abs(value - other) > options.tolerance
    ]
    assert not bad, f"{len(bad)} of {len(pairs)} differ: {bad[:5]}"
    return f"{len(pairs)} log-likelihoods of {len(set(names))} items, the largest difference {worst:.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--key", default="none")
    parser.add_argument("--only", help="checks whose names contain this")
    parser.add_argument("--samples", help="log-likelihoods of `still eval`")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--tolerance", type=float, default=0.05)
    options = parser.parse_args()
    failed = 0
    for function in CHECKS:
        if options.only and options.only not in function.__name__:
            continue
        try:
            print(f"ok      {function.__name__}: {function(options)}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {function.__name__}\n{traceback.format_exc()}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
