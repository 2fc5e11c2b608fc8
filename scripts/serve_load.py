#!/usr/bin/env python3
"""Loads a `still serve` of its own with many clients, and compares every answer with the same one alone.

    python scripts/serve_load.py --still target/release/still --model demo --out benches/results/NAME/serve_load.json

Needs nothing but Python. 64 clients for two minutes ask for answers of mixed lengths: single questions, second turns,
questions that share a long system message, and some that go away in the middle of an answer. An answer may be refused with status
429; anything else that is no complete answer is an error. Then a second server answers every conversation again, alone and greedy.
The exit code is 1 after an error, an answer that differs, or memory beyond its bound.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from serving import Server, about, percentile

WORDS = (
    "sea ship wind harbour sail storm rope gull tide captain lantern map island anchor bell fog letter coin "
    "the a of and in to was old grey small far away under before slowly never again"
).split()
# Clients that wait for an answer this long call it lost.
LOST = 600


class Refused(Exception):
    """Status 429, and the seconds after which to come again."""


def text(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."


def between(rng, least, most):
    """Short lengths as often as long ones."""
    return round(math.exp(rng.uniform(math.log(least), math.log(most))))


def say(content, role="user"):
    return {"role": role, "content": content}


def conversation(seed, client, number):
    """Turns, each a list of messages that are added and the most tokens of its answer; and whether its client goes away."""
    rng = random.Random(f"{seed} {client} {number}")
    turn = lambda *messages: ([*messages], between(rng, 8, 160))
    kind = rng.random()
    if kind < 0.6:
        turns = [turn(say("Go on: " + text(rng, between(rng, 8, 1200))))]
    elif kind < 0.8:
        turns = [turn(say(text(rng, between(rng, 8, 600)))), turn(say("And then? " + text(rng, between(rng, 2, 30))))]
    else:
        shared = random.Random(f"{seed} shared {rng.randrange(6)}")
        turns = [turn(say(text(shared, 600), "system"), say(text(rng, between(rng, 4, 30))))]
    return turns, rng.random() < 0.05


async def stream(url, body, leave_after=None):
    """Text, time to the first token, times between tokens and usage of a streamed answer. None if its client went away."""
    place = urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 20)
    try:
        data = json.dumps(body).encode()
        # Version 1.0: the answer comes as it is, to its end.
        head = f"POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        started = time.perf_counter()
        writer.write(head.encode() + data)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        headers = {}
        while line := (await reader.readline()).decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if status == 429:
            raise Refused(float(headers["retry-after"]))
        if status != 200:
            raise RuntimeError(f"status {status}: {(await reader.read())[:500]!r}")
        pieces, times, finish, last = [], [], None, None
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                break
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"in a stream: {event}")
            last = event
            for choice in event["choices"]:
                finish = choice["finish_reason"] or finish
                if content := choice["delta"].get("content"):
                    pieces.append(content)
                    times.append(time.perf_counter())
            if leave_after is not None and len(pieces) >= leave_after:
                return None
        else:
            raise RuntimeError(f"a stream without an end after {len(pieces)} pieces")
        if finish not in ("stop", "length") or not last.get("usage"):
            raise RuntimeError(f"a stream ended by {finish!r}: {last}")
        ended = time.perf_counter()
        return {
            "text": "".join(pieces),
            "finish": finish,
            "first": (times[0] if times else ended) - started,
            "between": [after - before for before, after in zip(times, times[1:])],
            "usage": last["usage"],
            "state_bytes": last["timings"]["state_bytes"],
        }
    finally:
        writer.close()


class Load:
    """What clients saw."""

    def __init__(self, options, url):
        self.options, self.url = options, url
        self.answers, self.errors, self.refused, self.gone, self.unfinished = {}, [], 0, 0, 0

    async def ask(self, messages, most, leave_after=None):
        body = {"messages": messages, "max_tokens": most, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        while True:
            try:
                return await asyncio.wait_for(stream(self.url, body, leave_after), LOST)
            except Refused as refused:
                self.refused += 1
                if time.monotonic() > self.until:
                    raise
                # Not all at once.
                await asyncio.sleep(min(refused.args[0], 10) * random.uniform(0.5, 1.5))

    async def converse(self, client, number):
        turns, leaves = conversation(self.options.seed, client, number)
        messages = []
        for turn, (more, most) in enumerate(turns):
            messages += more
            answer = await self.ask(messages, most, 3 if leaves else None)
            if answer is None:
                self.gone += 1
                return
            self.answers[client, number, turn] = answer
            messages.append(say(answer["text"], "assistant"))

    async def client(self, client):
        number = 0
        while time.monotonic() < self.until:
            try:
                await self.converse(client, number)
            except Refused:
                self.unfinished += 1
            except Exception as error:
                self.errors.append(f"client {client}, conversation {number}: {type(error).__name__}: {error}")
            number += 1

    async def run(self):
        self.until = time.monotonic() + self.options.seconds
        started = time.perf_counter()
        await asyncio.gather(*(self.client(client) for client in range(self.options.clients)))
        self.seconds = time.perf_counter() - started


def alone(options, answers, conversations, *more):
    """The conversations of which an answer, given alone and after the same earlier turns, is another one."""
    differ = []
    with Server(options.still, options.model, "--max-concurrent", "1", *more) as server:
        for client, number in conversations:
            turns, _ = conversation(options.seed, client, number)
            messages = []
            for turn, (added, most) in enumerate(turns):
                given = answers.get((client, number, turn))
                if given is None:
                    break
                messages += added
                body = {"messages": messages, "max_tokens": most, "temperature": 0}
                choice = server.ok("POST", "/v1/chat/completions", body)["choices"][0]
                if (choice["message"]["content"], choice["finish_reason"]) != (given["text"], given["finish"]):
                    differ.append((client, number))
                    break
                messages.append(say(given["text"], "assistant"))
    return differ


def verify(options, load, record):
    """Compares answers with the same ones alone; the conversations that differ in every order of computation."""
    conversations = sorted({(client, number) for client, number, _ in load.answers})
    if options.verify is not None:
        conversations = sorted(random.Random(options.seed).sample(conversations, min(options.verify, len(conversations))))
    differ = alone(options, load.answers, conversations)
    record["verified_conversations"] = len(conversations)
    # Where room was short, a second turn's past was read again, which rounds otherwise than the state after the first answer.
    record["differ_after_a_kept_answer"] = len(differ)
    return alone(options, load.answers, differ, "--deterministic") if differ else []


def times(values):
    """In milliseconds."""
    return {f"p{round(100 * share)}_ms": round(1000 * (percentile(values, share) or 0), 1) for share in (0.5, 0.9, 0.99, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--still", default="target/release/still")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--max-concurrent", type=int, default=32)
    parser.add_argument("--queue", type=int, default=24, help="fewer places than clients, so that some are refused")
    parser.add_argument("--state-memory", type=int, default=512, help="MiB; little enough that states make room for others")
    parser.add_argument("--verify", type=int, help="conversations that are asked again; all without this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the record")
    options = parser.parse_args()
    record = about(options.still)
    limits = ["--max-concurrent", str(options.max_concurrent), "--queue", str(options.queue)]
    limits += ["--state-memory", f"{options.state_memory}MiB"]
    with Server(options.still, options.model, *limits) as server:
        # Threads and weights are there.
        server.ok("POST", "/v1/completions", {"prompt": "The sea", "max_tokens": 2})
        before, _ = server.memory()
        load = Load(options, server.url)
        asyncio.run(load.run())
        until = time.monotonic() + 30
        while (metrics := server.metrics())["still_requests_running"] + metrics["still_requests_waiting"] > 0:
            if time.monotonic() > until:
                load.errors.append("requests that have no client any more still hold places")
                break
            time.sleep(0.1)
        _, most = server.memory()
    answers = load.answers.values()
    largest = max((answer["state_bytes"] for answer in answers), default=0)
    # Kept states; a cache for each running answer, with the room that it grows into; activations and the allocator's slack.
    bound = (options.state_memory << 20) + 2 * options.max_concurrent * largest + (512 << 20)
    prompt = sum(answer["usage"]["prompt_tokens"] for answer in answers)
    generated = sum(answer["usage"]["completion_tokens"] for answer in answers)
    record |= {
        "model": options.model,
        "server": " ".join(limits),
        "clients": options.clients,
        "seconds": round(load.seconds, 1),
        "answers": len(load.answers),
        "refused_429": load.refused,
        "went_away": load.gone,
        "errors": load.errors,
        "requests_per_s": round(len(load.answers) / load.seconds, 2),
        "generated_tokens_per_s": round(generated / load.seconds, 1),
        "prompt_tokens_per_s": round(prompt / load.seconds, 1),
        "prompt_tokens_spared": sum(a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers) / max(prompt, 1),
        "prompt_tokens_median": statistics.median([a["usage"]["prompt_tokens"] for a in answers] or [0]),
        "new_tokens_median": statistics.median([a["usage"]["completion_tokens"] for a in answers] or [0]),
        "first_token": times([answer["first"] for answer in answers]),
        "between_tokens": times([gap for answer in answers for gap in answer["between"]]),
        "memory_bytes": {"before": before, "most": most, "growth_bound": bound},
    }
    print(json.dumps(record, indent=1), flush=True)
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    differ = verify(options, load, record)
    record["differ"] = differ
    failures = list(load.errors)
    failures += [f"the answers of client {client}, conversation {number} are others alone" for client, number in differ]
    if most - before > bound:
        failures.append(f"memory grew by {most - before} bytes; {bound} are its bound")
    if not load.answers:
        failures.append("nothing was answered")
    print(f"{record['verified_conversations']} conversations compared with the same alone: {len(differ)} differ")
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    for failure in failures:
        print(f"FAILED  {failure}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
