"""`examples/fsdp_linearize.py` under torchrun, with gloo. Runs where torch and transformers are installed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file

import still

EXAMPLE = Path(__file__).parents[3] / "examples/fsdp_linearize.py"
RECIPE = {
    "attention.chunk": 16,
    "attention.budget": 4,
    "data.length": 64,
    "transfer.steps": 5,
    "transfer.batch": 4,
    "transfer.optimizer.lr": 0.01,
    "finetune.steps": 5,
    "finetune.batch": 4,
    "checkpoint.every": 2,
    "data.heldout": 0.1,
    "evaluation.every": 2,
    "evaluation.windows": 3,
    "evaluation.passkey_keys": 3,
    "evaluation.passkey_length": 480,
    "evaluation.keep_best": "true",
}


def command(processes, base, text, out, *more):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run_dir = out.with_name(out.name + ".run")
    given = ["--model", base, "--data", text, "--out", out, "--run-dir", run_dir, "--recipe", "uniform", "--dtype", "float32"]
    changed = [word for key, value in RECIPE.items() for word in ("--set", f"{key}={value}")]
    return [*launch, str(EXAMPLE), *map(str, given), *changed, *more]


def run(*given):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    done = subprocess.run(command(*given), env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def metrics(out):
    return [json.loads(line) for line in out.with_name(out.name + ".run").joinpath("metrics.jsonl").read_text().splitlines()]


def evaluations(out):
    lines = out.with_name(out.name + ".run").joinpath("evaluations.jsonl").read_text().splitlines()
    return [{key: x for key, x in json.loads(line).items() if key != "seconds"} for line in lines]


def workers(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def student(base_path, documents, tmp_path_factory):
    """What two processes make, never interrupted."""
    out = tmp_path_factory.mktemp("two") / "student"
    run(2, base_path, documents, out)
    return out


def test_two_processes_are_one_with_twice_the_batch(student, base_path, documents, tmp_path):
    alone = tmp_path / "alone"
    run(1, base_path, documents, alone)
    own, expected = metrics(student), metrics(alone)
    assert len(own) == len(expected) == 10
    np.testing.assert_allclose([x["loss"] for x in own], [x["loss"] for x in expected], rtol=1e-5)
    measured, alone_measured = evaluations(student), evaluations(alone)
    assert len(measured) == 7 and [x["best"] for x in measured] == [x["best"] for x in alone_measured]
    for key in ("heldout_nll", "passkey_recall"):
        np.testing.assert_allclose([x[key] for x in measured], [x[key] for x in alone_measured], rtol=1e-5, err_msg=key)
    own, expected = (load_file(out / "model.safetensors") for out in (student, alone))
    assert own.keys() == expected.keys()
    for name, value in own.items():
        error = (value - expected[name]).square().mean().sqrt() / expected[name].square().mean().sqrt()
        assert error < 1e-5, name


def test_a_killed_process_ends_the_job_which_resumes_exactly(student, base_path, documents, tmp_path):
    out = tmp_path / "student"
    log = out.with_name("student.run") / "metrics.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    job = subprocess.Popen(
        command(2, base_path, documents, out), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.time() + 600
        # In the second stage, after its first checkpoint.
        while not log.exists() or len(log.read_text().splitlines()) < 8:
            assert time.time() < deadline and job.poll() is None, job.communicate()[0].decode()
            time.sleep(0.05)
        os.kill(workers(job.pid)[1], signal.SIGKILL)
        job.communicate(timeout=120)
    finally:
        job.kill()
    assert job.returncode != 0 and not out.exists()
    run(2, base_path, documents, out, "--resume")
    assert [x["loss"] for x in metrics(out)] == [x["loss"] for x in metrics(student)]
    assert evaluations(out) == evaluations(student)
    own, expected = (load_file(folder / "model.safetensors") for folder in (out, student))
    for name, value in own.items():
        assert torch.equal(value, expected[name]), name


def test_a_batch_that_cannot_be_dealt_is_an_error(base_path, documents, tmp_path):
    done = subprocess.run(command(3, base_path, documents, tmp_path / "student"), capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert (
        "transfer.batch is 4, for 3 processes" in done.stderr and "hint: set transfer.batch to a multiple of 3" in done.stderr
    )


BEFORE = """
import sys
import torch
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
loader = torch.utils.data.DataLoader([{"input_ids": row} for row in torch.randint(256, (8, 200))], batch_size=2)
"""
AFTER = """
learned = torch.cat([x.detach().flatten() for x in student.learned().values()])
everywhere = {gather}
assert len(everywhere) == 2 and torch.equal(everywhere[0], everywhere[1])
"""


def block_of_page(word):
    """The loop of docs/many_gpus.md that has this word."""
    page = (EXAMPLE.parents[1] / "docs/many_gpus.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if word in block]
    return block


def run_script(loop, base_path, tmp_path, **variables):
    script = tmp_path / "loop.py"
    script.write_text(loop)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(base_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", **variables}
    return subprocess.run(launch, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)


def run_loop(loop, base_path, tmp_path, **variables):
    done = run_script(loop, base_path, tmp_path, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert still.Model.load(tmp_path / "my-student").is_student


def test_accelerate_runs_the_loop_of_the_page(base_path, tmp_path):
    pytest.importorskip("accelerate")
    # A machine may have GPUs that this is not for.
    block = block_of_page("Accelerator()").replace("Accelerator()", "Accelerator(cpu=True)")
    run_loop(BEFORE + block + AFTER.format(gather="accelerator.gather(learned[None])"), base_path, tmp_path)


def loop_of_deepspeed(zero):
    """The page's loop with another stage of ZeRO, on CPUs, and the variables that it wants."""
    pytest.importorskip("deepspeed")
    pytest.importorskip("ninja")
    block = block_of_page("deepspeed.initialize")
    assert '"stage": 1' in block
    block = block.replace("init_distributed()", 'init_distributed("gloo")').replace('"stage": 1', f'"stage": {zero}')
    # It compiles what its processes on a CPU talk through, with the ninja next to this Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return block, {"DS_ACCELERATOR": "cpu", "PATH": path}


@pytest.mark.parametrize("zero", [1, 2])
def test_deepspeed_runs_the_loop_of_the_page(zero, base_path, tmp_path):
    block, variables = loop_of_deepspeed(zero)
    gather = "[torch.empty_like(learned) for _ in range(2)]\ntorch.distributed.all_gather(everywhere, learned)"
    run_loop(BEFORE + block + AFTER.format(gather=gather), base_path, tmp_path, **variables)


def test_deepspeed_that_shards_the_weights_is_refused_by_name(base_path, tmp_path):
    block, variables = loop_of_deepspeed(3)
    done = run_script(BEFORE + block, base_path, tmp_path, **variables)
    assert done.returncode != 0
    assert "DeepSpeed's ZeRO 3 has sharded the model" in done.stderr, done.stderr
    assert "hint: shard with student.shard() (FSDP2)" in done.stderr
