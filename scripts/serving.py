"""What the scripts about `still serve` have in common: a server of their own, its clients, and what a record says of a run."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Server:
    """A `still serve` on a free port of this machine, until `stop` or the end of a `with`."""

    def __init__(self, still, model, *more, env=None):
        self.command = [still, "serve", "--model", model, "--port", "0", *more]
        self.log = tempfile.NamedTemporaryFile("w+", prefix="still-serve-", suffix=".log")
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env={**os.environ, **(env or {})}
        )
        self.url = self.wait_for(r"on (http://\S+)")

    def told(self):
        return Path(self.log.name).read_text(errors="replace")

    def wait_for(self, pattern, seconds=600):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := re.search(pattern, self.told()):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"{' '.join(self.command)} does not listen:\n{self.told()}")

    def ask(self, method, path, body=None, timeout=600):
        """Status and JSON of an answer; JSON is None where there is none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        return status, json.loads(text) if text else None

    def ok(self, method, path, body=None):
        status, answer = self.ask(method, path, body)
        assert status in (200, 204), f"{method} {path}: {status} {answer}"
        return answer

    def metrics(self):
        """Values by name; of histograms, sum and count."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def memory(self):
        """Bytes of memory: now, and at most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return tuple(1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "VmHWM"))

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def cpu():
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def vectors():
    """The widest vector instructions of the processor, which speeds depend on."""
    try:
        flags = set(re.search(r"^flags\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    except (OSError, TypeError):
        return "unknown"
    return next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "none")


def about(still):
    """What a record says of a run: command, commit, machine."""
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    version = subprocess.run([still, "--version"], capture_output=True, text=True)
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "commit": commit.stdout.strip() or None,
        "still": version.stdout.strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": cpu(),
        "vectors": vectors(),
        "cores": os.cpu_count(),
    }


def percentile(values, share):
    """The value below which this share of all lies."""
    values = sorted(values)
    return values[min(int(share * len(values)), len(values) - 1)] if values else None
