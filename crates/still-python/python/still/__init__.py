"""STILL: pretrained transformers with hybrid attention.

    import still

    model = still.Model.load("my-student")
    print(model.generate("Once upon a time", max_new_tokens=50))

`still.torch` has the operator for PyTorch. The command `still` comes with the package. docs/python.md says more.
"""

from ._errors import InputError, InternalError, StillError
from ._still import Generation, Model, State, Stream, __version__, calibrate, evaluate, linearize

__all__ = [
    "Generation",
    "InputError",
    "InternalError",
    "Model",
    "State",
    "StillError",
    "Stream",
    "__version__",
    "calibrate",
    "evaluate",
    "linearize",
]
