#!/usr/bin/env python3
"""Runs `still serve` with states in a bucket of moto, a test server for S3.

    pip install 'moto[server]'
    python scripts/serve_s3.py --still target/release/still --model demo

Everything stays on this machine. Each check prints a line; the exit code is 1 if one fails.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
import traceback
import urllib.request

from serving import Server

BUCKET, PREFIX, CHUNK = "states", "deep/prefix", 64
# Small models for tests were made for less.
CONTEXT = ["--context", "4096"]
CHECKS = []
# What moto takes for credentials, and no settings of the person who runs this.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_REGION": "us-east-1"}


def check(function):
    """Adds a check."""
    CHECKS.append(function)
    return function


class Bucket:
    """A server of S3 with an empty bucket."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None
        self.start()

    def start(self):
        """An empty bucket on the same port."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(self.url + "/moto-api/", timeout=5):
                    break
            except OSError:
                if time.monotonic() > until or self.process.poll() is not None:
                    raise
                time.sleep(0.1)
        self.client().create_bucket(Bucket=BUCKET)

    def client(self):
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="any", aws_secret_access_key="any"
        )

    def names(self):
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def stop(self):
        self.process.kill()
        self.process.wait()


class Replicas:
    """Servers that share a bucket, and one that has none."""

    def __init__(self, options):
        self.options, self.bucket = options, Bucket()
        self.all = [self.start(), self.start()]
        self.alone = Server(options.still, options.model, *CONTEXT)

    def start(self):
        place = [*CONTEXT, "--state-store", f"s3://{BUCKET}/{PREFIX}"]
        env = {**CREDENTIALS, "AWS_ENDPOINT": self.bucket.url, "AWS_ALLOW_HTTP": "true"}
        return Server(self.options.still, self.options.model, *place, env=env)

    def stop(self):
        for server in [*self.all, self.alone]:
            server.stop()
        self.bucket.stop()


def turn(server, messages):
    request = {"messages": messages, "temperature": 0, "max_tokens": 30, "ignore_eos": True}
    answer = server.ok("POST", "/v1/chat/completions", request)
    usage = answer["usage"]
    return answer["choices"][0]["message"]["content"], usage


def part(number):
    return {"role": "user", "content": f"Part {number}, please. It may be a long one."}


def converse(replicas, messages, first, turns):
    """A conversation that alternates; what was kept of each prompt."""
    before, kept = first, []
    for number in range(turns):
        messages.append(part(number))
        text, usage = turn(replicas.all[number % 2], messages)
        alone, _ = turn(replicas.alone, messages)
        assert text == alone, f"turn {number}: {text!r}, and alone {alone!r}"
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        kept.append((cached, usage["prompt_tokens"]))
        assert cached + CHUNK > before, f"turn {number}: {cached} of {before} tokens were kept"
        before = usage["prompt_tokens"]
        messages.append({"role": "assistant", "content": text})
    return kept


STORY = [{"role": "user", "content": "Tell stories of the sea. " * 40}, {"role": "assistant", "content": "Yes."}]


@check
def a_conversation_alternates_and_reads_nothing_again(replicas):
    kept = converse(replicas, list(STORY), 0, 6)
    assert kept[0][0] == 0, kept
    names = replicas.bucket.names()
    assert names and all(name.startswith(PREFIX + "/") for name in names), names
    return f"kept of read, turn by turn: {kept}; {len(names)} objects"


@check
def states_with_names_are_shared(replicas):
    one, other = replicas.all
    document = "The treaty was signed by the harbour master. " * 20
    saved = one.ok("POST", "/v1/states/report", {"action": "save", "prompt": document})
    assert other.ok("GET", "/v1/states/report")["tokens"] == saved["tokens"]
    other.ok("POST", "/v1/states/copy", {"action": "fork", "from": "report"})
    assert [state["name"] for state in one.ok("GET", "/v1/states")["data"]] == ["copy", "report"]
    ask = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
    onto = one.ok("POST", "/v1/completions", {**ask, "state": "copy", "prompt": "Question: who?"})
    assert onto["usage"]["prompt_tokens_details"]["cached_tokens"] == saved["tokens"], onto["usage"]
    one.ok("DELETE", "/v1/states/copy")
    status, error = other.ask("GET", "/v1/states/copy")
    assert (status, error["error"]["code"]) == (404, "state_not_found"), error
    return f"{saved['tokens']} tokens in {saved['bytes']} bytes"


@check
def a_replica_that_starts_again_finds_what_was_kept(replicas):
    replicas.all[0].stop()
    replicas.all[0] = replicas.start()
    text, usage = turn(replicas.all[0], [*STORY, part(0)])
    again, _ = turn(replicas.alone, [*STORY, part(0)])
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert text == again and cached + CHUNK >= usage["prompt_tokens"], usage
    return f"{cached} of {usage['prompt_tokens']} tokens were kept"


@check
def without_the_bucket_answers_go_on_and_states_are_an_error(replicas):
    replicas.bucket.stop()
    messages, took = list(STORY), []
    for number in range(3):
        messages.append({"role": "user", "content": f"Go on, {number}."})
        started = time.monotonic()
        text, _ = turn(replicas.all[number % 2], messages)
        took.append(round(time.monotonic() - started, 1))
        assert text == turn(replicas.alone, messages)[0]
        messages.append({"role": "assistant", "content": text})
    assert max(took) < 30, f"answers took {took} s"
    started = time.monotonic()
    status, error = replicas.all[0].ask("GET", "/v1/states/report")
    assert (status, error["error"]["code"]) == (502, "state_store"), error
    status, error = replicas.all[0].ask("POST", "/v1/states/late", {"action": "save", "prompt": "a text"})
    assert (status, error["error"]["code"]) == (502, "state_store"), error
    assert time.monotonic() - started < 60
    assert "state store" in replicas.all[0].told(), replicas.all[0].told()
    return f"answers took {took} s; {error['error']['message']!r}"


@check
def with_the_bucket_again_states_are_kept_again(replicas):
    # As empty as a new one.
    replicas.bucket.start()
    until = time.monotonic() + 60
    while not replicas.bucket.names():
        assert time.monotonic() < until, "nothing is written any more"
        turn(replicas.all[0], [{"role": "user", "content": f"At {time.monotonic()}: " + "the sea and the harbour " * 30}])
    return f"{len(replicas.bucket.names())} objects"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--still", default="target/release/still")
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    replicas, failed = Replicas(options), 0
    try:
        for function in CHECKS:
            try:
                print(f"ok      {function.__name__}: {function(replicas)}", flush=True)
            except Exception:
                failed += 1
                print(f"FAILED  {function.__name__}\n{traceback.format_exc()}", flush=True)
    finally:
        replicas.stop()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
