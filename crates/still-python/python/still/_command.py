"""The `still` command."""

import os
import signal
import sys

from ._still import run_command


def main() -> None:
    """Runs the command line and exits with its code."""
    # The command has its own answer to Ctrl-C. Python's handler would raise KeyboardInterrupt once more afterwards.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    code = run_command(["still", *sys.argv[1:]])
    # All is flushed, and threads that still compute have nothing to say to an interpreter that ends.
    os._exit(code)
