"""Python in README.md and docs/python.md runs as it stands there. Blocks marked `torch` need it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = ["README.md", "docs/python.md", "crates/still-python/README.md"]
WITHOUT_TORCH = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
EXAMPLES = [
    pytest.param(code, id=f"{page}:{n}", marks=[WITHOUT_TORCH] if mark else [])
    for page in PAGES
    for n, (mark, code) in enumerate(re.findall(r"^```python( torch|)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S))
]


def test_every_page_has_examples():
    assert {example.id.split(":")[0] for example in EXAMPLES} == set(PAGES)


@pytest.mark.parametrize("code", EXAMPLES)
def test_it_runs(code, tmp_path):
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and run.stdout, run.stderr
