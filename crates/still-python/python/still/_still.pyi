"""What is Rust of the package `still`. Long calls release the interpreter's lock, and Ctrl-C ends them within a second."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict, final

import numpy as np
import numpy.typing as npt
from typing_extensions import TypeAlias, Unpack

_Path: TypeAlias = "str | PathLike[str]"
_Tokens: TypeAlias = "str | Iterable[int]"
_Rows: TypeAlias = Literal["f32", "f16", "bf16", "int8", "int4"]
_Progress: TypeAlias = "Callable[[dict[str, Any]], object]"

__version__: str

class _Sampling(TypedDict, total=False):
    max_new_tokens: int
    """Most tokens to generate; 256."""
    temperature: float
    """0 is greedy, and the default."""
    top_p: float
    """Nucleus of this share; 1 is off."""
    top_k: int
    """The best so many; 0 is off."""
    min_p: float
    """Least share of the likeliest token's probability; 0 is off."""
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    """Penalties count tokens that were generated, not those of the prompt."""
    seed: int
    stop: str | Sequence[str]
    """Texts that end the generation, and are no part of it."""

@final
class Generation:
    """What was generated; `str()` of it is its text."""

    @property
    def text(self) -> str:
        """The text, up to a stop string."""
    @property
    def ids(self) -> list[int]:
        """The new token ids, without the one that ends a sequence."""
    @property
    def finish(self) -> Literal["end_of_sequence", "stop", "length"]:
        """Why it ended."""
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def prefill_seconds(self) -> float:
        """Until the first token's logits."""
    @property
    def decode_seconds(self) -> float:
        """After that."""
    @property
    def warning(self) -> str | None:
        """Said where the sequence left the positions that the base was trained for."""

@final
class Stream:
    """A generation that goes on in the background: an iterator over its text."""

    def __iter__(self) -> Iterator[str]: ...
    def __next__(self) -> str: ...
    @property
    def result(self) -> Generation | None:
        """The whole, once all was iterated over."""
    def close(self) -> None:
        """Stops it. A state that it continues stays as it was."""

@final
class State:
    """What a model remembers of a sequence.

    A call computes on a copy, and the state changes when all is done: after an error or Ctrl-C it is as it was.
    """

    @property
    def position(self) -> int:
        """Tokens read so far."""
    @property
    def size_bytes(self) -> int:
        """Bytes held, with the room to grow into."""
    @property
    def rows(self) -> str:
        """How exact rows are stored."""
    def read(self, tokens: _Tokens) -> int:
        """Reads a text or token ids; gives the number of tokens."""
    def fork(self) -> State:
        """A copy that goes its own way."""
    def save(self, path: _Path) -> None:
        """Writes it to a file, in place of what was there. `Model.restore` reads it."""

@final
class Model:
    """A model: a base, or a student."""

    @staticmethod
    def load(
        path: _Path,
        *,
        device: str = "cpu",
        dtype: Literal["f32", "bf16"] | None = None,
        weights: Literal["file", "dense", "q8_0", "fp8"] = "file",
    ) -> Model:
        """Loads a Hugging Face directory, a .gguf file, a hub id, a student, or a built-in model ("demo").

        `device`: "cpu", "cuda" or "cuda:N", the latter two in a build with the feature `cuda`. `dtype` of base weights and
        activations: f32 on the CPU. `weights`: how matrices are kept.
        """
    @property
    def is_student(self) -> bool: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def config(self) -> dict[str, Any]:
        """The base's configuration, by Hugging Face's names."""
    def teacher(self) -> Model:
        """The same weights with dense attention."""
    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]: ...
    def detokenize(self, ids: _Tokens, *, skip_special: bool = True) -> str: ...
    def chat_prompt(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """A conversation as the model's chat template renders it."""
    def generate(self, prompt: _Tokens, *, state: State | None = None, **options: Unpack[_Sampling]) -> Generation:
        """Continues a prompt. With `state` from what it has read; it has read the prompt and the answer afterwards."""
    def stream(self, prompt: _Tokens, *, state: State | None = None, **options: Unpack[_Sampling]) -> Stream:
        """As `generate`, piece by piece."""
    def logits(
        self, tokens: _Tokens, *, state: State | None = None, last: bool = False
    ) -> npt.NDArray[np.float32]:
        """Logits after every token, [tokens, vocab]; with `last` after the last one, [vocab]."""
    def new_state(self, *, rows: _Rows | None = None) -> State:
        """A state that has read nothing. `rows`: how it stores exact keys and values; as the student says, else bf16."""
    def restore(self, path: _Path) -> State:
        """A state that `State.save` wrote, of this very model."""
    def save(self, path: _Path, *, delta: bool = False) -> None:
        """Saves a student: whole in float32, or only what differs from its base."""

def calibrate(
    model: Model,
    data: _Path | Iterable[_Path],
    *,
    recipe: _Path | None = None,
    set: dict[str, Any] | None = None,
    cache_fraction: float | None = None,
    at_length: int | None = None,
    tokens: int | None = None,
    window: int | None = None,
    rows: _Rows | None = None,
    out: _Path | None = None,
    progress: _Progress | None = None,
) -> dict[str, Any]:
    """Finds a budget for every head, as `still calibrate` does; gives what its `--json` prints.

    `out`: a file for the budgets, which `set={"attention.budgets": …}` and `--budgets` take. `progress` is called with a dict.
    """

def linearize(
    model: Model,
    data: _Path | Iterable[_Path],
    out: _Path,
    *,
    recipe: _Path | None = None,
    set: dict[str, Any] | None = None,
    run_dir: _Path | None = None,
    resume: bool = False,
    delta: bool = False,
    overwrite: bool = False,
    progress: _Progress | None = None,
) -> Model:
    """Trains a student and saves it to the directory `out`, as `still linearize` does, without its verdict.

    `recipe`: a name that `still recipes list` prints, or a TOML file; the usual one for the device if absent. `set`: values
    to change, by dotted keys: {"transfer.steps": 200}. `progress` is called with a dict, whose "event" is "calibration",
    "stage", "step", "evaluation" or "checkpoint". After Ctrl-C the step at work is finished and saved in the background;
    `resume=True` goes on from there.
    """

def evaluate(
    model: Model,
    tasks: str | Sequence[str],
    *,
    data_dir: _Path = ...,
    text: _Path | None = None,
    lengths: Sequence[int] = ...,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
    batch_size: int = 16,
    samples: bool = False,
    progress: _Progress | None = None,
) -> dict[str, Any]:
    """Asks a model tasks, as `still eval` does; scores by task. With `samples` every item's answer too."""

def run_command(arguments: Sequence[str]) -> int:
    """Runs the command line, the program's name first. It takes the process over."""

def attention(
    out: npt.NDArray[Any],
    sums: npt.NDArray[Any],
    rows: Sequence[npt.NDArray[Any]],
    gate: npt.NDArray[Any] | None,
    learned: Sequence[npt.NDArray[Any] | None],
    config: str,
    layer: int,
) -> list[npt.NDArray[Any]]:
    """`still.torch.hybrid_attention_with_state` on arrays: output and linear states into the first two, gives the others."""

def multiplies_rows() -> bool:
    """Whether this CPU has what `linear` takes: AMX."""

def linear(out: npt.NDArray[Any], x: npt.NDArray[Any], weight: npt.NDArray[Any]) -> None:
    """`still.torch.linear` on arrays of float32, into the first."""

def attention_backward(
    d_out: npt.NDArray[Any],
    out: npt.NDArray[Any],
    absorbed_at: npt.NDArray[np.int32],
    rows: Sequence[npt.NDArray[Any]],
    gate: npt.NDArray[Any] | None,
    learned: Sequence[npt.NDArray[Any] | None],
    config: str,
    layer: int,
) -> tuple[list[npt.NDArray[Any]], npt.NDArray[Any] | None, list[npt.NDArray[Any] | None]]:
    """The gradients of the call that gave `out` and `absorbed_at`."""

@final
class CudaAttention:
    """The operator of one layer in memory on a CUDA device, by addresses: for `still.torch`. A wheel without CUDA has none to make."""

    def __new__(cls, config: str, layer: int) -> CudaAttention: ...
    @property
    def cap(self) -> int | None:
        """The most salient tokens of a head."""
    @property
    def budgets(self) -> list[int]:
        """Tokens that each selection head keeps of a retired chunk."""
    def check(self, rows: Sequence[Sequence[int]], gate: Sequence[int] | None, learned: Sequence[Sequence[int] | None]) -> None:
        """Refuses shapes that do not fit, or have no kernels."""
    def scratch(self, sizes: Sequence[int], narrow: bool) -> tuple[int, int, int]:
        """Bytes of scratch of the forward pass, how many of its first must be zeros, and bytes of scratch of the backward pass."""
    def forward(
        self,
        sizes: Sequence[int],
        narrow: bool,
        operands: tuple[Any, ...],
        maps: Sequence[int],
        out: tuple[Any, ...],
        trains: bool,
        scores: int,
        scratch: int,
        stream: int,
    ) -> None:
        """Queues the forward pass on a stream of the current device. If nothing `trains`, no backward pass may follow."""
    def backward(
        self, sizes: Sequence[int], narrow: bool, operands: tuple[Any, ...], gradients: tuple[Any, ...], scratch: int, stream: int
    ) -> None:
        """Queues the backward pass of the call that left what `operands` says."""

def resolve_recipe(recipe: _Path, changed: dict[str, Any] | None, budgets: _Path | None) -> str:
    """A recipe as JSON, for `still.torch`."""

def begin_student(config: str, recipe: str) -> tuple[str, dict[str, npt.NDArray[np.float32]]]:
    """The section `still` of the student that a recipe begins with, as JSON, and its learned tensors by their names in a checkpoint."""

def finish_student(
    dir: _Path, config: str, recipe: str, tokenizer: _Path, generation: str | None, dtype: str
) -> None:
    """Writes all of a student's folder but its weights, and the digest into those."""

@final
class Questions:
    """What a run asks its student between steps besides held-out text."""

    def __new__(cls, config: str, recipe: str, tokenizer: _Path) -> Questions: ...
    def repeated(self) -> list[tuple[npt.NDArray[np.int64], int]]:
        """Texts whose ends are scored: token ids, and the index of the first that is."""
    def prompts(self) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]]:
        """Questions that are answered in writing: the prompt, a right answer, and how many tokens an answer has at most."""
    def score(self, prompt: int, answer: Sequence[int]) -> float:
        """What an answer to a prompt is worth, 0 to 1."""

@final
class Windows:
    """Text as the windows of a run, in their order."""

    def __new__(cls, data: _Path | Iterable[_Path], tokenizer: _Path, recipe: str) -> Windows: ...
    def next(self, count: int) -> list[tuple[npt.NDArray[np.int64], list[int], list[bool] | None]]:
        """The next windows: token ids, where each sequence ends, and which of them stage 2 counts."""
    def heldout(self) -> list[tuple[npt.NDArray[np.int64], list[int], list[bool] | None]]:
        """Windows to evaluate on."""
    @property
    def position(self) -> str:
        """How far they are read, as JSON."""
    def seek(self, position: str) -> None:
        """Goes on from a position."""
    @property
    def sha256(self) -> str:
        """Of the token ids."""
