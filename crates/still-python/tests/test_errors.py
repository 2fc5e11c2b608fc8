"""Bad input is an exception with a hint, and Ctrl-C is heard."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import still


def test_errors_are_one_family():
    assert issubclass(still.InputError, still.StillError) and issubclass(still.InputError, ValueError)
    assert issubclass(still.InternalError, still.StillError)
    with pytest.raises(still.StillError) as error:
        still.Model.load("no/such/directory/anywhere")
    assert error.value.message and error.value.hint
    assert f"\nhint: {error.value.hint}" in str(error.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda demo: still.Model.load("demo", device="gpu"),
        lambda demo: still.Model.load("demo", device="cuda"),
        lambda demo: still.Model.load("demo", dtype="f8"),
        lambda demo: still.Model.load("demo", dtype="bf16"),
        lambda demo: still.Model.load("demo", weights="q3"),
        lambda demo: demo.generate(""),
        lambda demo: demo.generate([]),
        lambda demo: demo.generate([2**31]),
        lambda demo: demo.generate("x", temperature=-1.0),
        lambda demo: demo.generate("x", top_p=0.0),
        lambda demo: demo.logits([]),
        lambda demo: demo.logits([10**6]),
        lambda demo: demo.new_state(rows="int2"),
        lambda demo: demo.restore("no/such/file"),
        lambda demo: demo.chat_prompt([{"content": "x"}]),
        lambda demo: still.evaluate(demo, "no_such_task"),
        lambda demo: still.evaluate(demo, "piqa", data_dir="no/such/dir"),
        lambda demo: still.evaluate(demo, "perplexity"),
        lambda demo: still.calibrate(demo, "demo"),
        lambda demo: still.calibrate(demo.teacher(), "no/such/file.txt"),
        lambda demo: still.linearize(demo.teacher(), "demo", "/tmp/x", recipe="no-such-recipe"),
        lambda demo: still.linearize(demo.teacher(), "demo", "/tmp/x", set={"transfer.stepz": 1}),
        lambda demo: still.linearize(demo.teacher(), "demo", "/tmp"),
    ],
)
def test_what_cannot_be_used_is_an_input_error_with_a_hint(demo, call):
    with pytest.raises(still.InputError) as error:
        call(demo)
    assert error.value.message and error.value.hint, repr(error.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda demo: demo.generate(3),
        lambda demo: demo.generate(["x"]),
        lambda demo: demo.generate([-1]),
        lambda demo: demo.generate("x", max_tokens=3),
        lambda demo: demo.generate("x", max_new_tokens=-3),
        lambda demo: demo.logits(np.array([0.5])),
        lambda demo: still.Model(),
        lambda demo: still.evaluate(demo, "piqa", limit=0),
    ],
)
def test_wrong_types_are_pythons_own_errors(demo, call):
    with pytest.raises((TypeError, ValueError, OverflowError)):
        call(demo)


def test_other_threads_run_meanwhile(demo):
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.01)

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.monotonic()
    demo.logits(list(range(1500)), last=True)
    elapsed = time.monotonic() - started
    stop.set()
    thread.join()
    within = [at for at in ticks if started <= at <= started + elapsed]
    assert len(within) > 5 * elapsed


WORK = """
import os, signal, sys, threading, time
import still
# A shell that starts the tests in the background has SIGINT ignored, and Python keeps to that.
signal.signal(signal.SIGINT, signal.default_int_handler)
model = still.Model.load("demo")
state = model.new_state()
state.read("Once upon a time")
before = state.position
def interrupt():
    global sent
    time.sleep(0.7)
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    {call}
except KeyboardInterrupt:
    took = time.monotonic() - sent
    assert took < 1.0, took
    time.sleep(0.5)
    assert state.position == before
    print("interrupted", model.generate("x", max_new_tokens=1).finish)
"""


@pytest.mark.parametrize(
    "call",
    [
        "model.generate('x', state=state, max_new_tokens=100000, stop='never ever')",
        "list(model.stream('x', state=state, max_new_tokens=100000))",
        "model.logits(list(range(40000)), state=state, last=True)",
        "still.calibrate(model.teacher(), 'demo')",
    ],
)
def test_ctrl_c_is_heard_within_a_second(call):
    run = subprocess.run([sys.executable, "-c", WORK.format(call=call)], capture_output=True, text=True, timeout=120)
    assert run.stdout.startswith("interrupted"), run


def test_two_calls_do_not_share_a_state(demo):
    state = demo.new_state()
    stream = demo.stream("x", state=state, max_new_tokens=100000)
    next(stream)
    with pytest.raises(still.InputError, match="in use"):
        state.read("y")
    stream.close()


def test_the_command_is_there():
    still_command = os.path.join(os.path.dirname(sys.executable), "still")
    told = subprocess.run([still_command, "--version"], capture_output=True, text=True)
    assert (told.returncode, told.stdout.strip()) == (0, f"still {still.__version__}")
    module = subprocess.run([sys.executable, "-m", "still", "recipes", "list"], capture_output=True, text=True)
    assert module.returncode == 0 and "still-long" in module.stdout
    wrong = subprocess.run([still_command, "generat"], capture_output=True, text=True)
    assert wrong.returncode == 1 and "hint:" in wrong.stderr


def test_the_command_hears_ctrl_c():
    still_command = os.path.join(os.path.dirname(sys.executable), "still")
    arguments = ["generate", "--model", "demo", "--prompt", "x", "-n", "100000"]
    process = subprocess.Popen([still_command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in told and "Traceback" not in told
