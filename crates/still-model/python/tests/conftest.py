import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--golden", help="folder of float64 cases of the operator")
    parser.addoption("--still", help="the command that exports students")
