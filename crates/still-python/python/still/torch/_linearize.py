"""`linearize`: a loaded model becomes a student."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, Union

from .. import Model, _still
from .. import calibrate as calibrate_heads
from .._errors import InputError
from ._files import Source
from ._parallel import Processes, refuse_zero_3
from ._student import Student

_Path = Union[str, "os.PathLike[str]"]


def linearize(
    model: Any,
    recipe: _Path | None = None,
    *,
    set: Mapping[str, Any] | None = None,
    budgets: Union[_Path, list[list[int]], None] = None,
    data: Union[_Path, list[_Path], None] = None,
    train: bool = True,
    out: _Path | None = None,
    tokenizer: Any = None,
    run_dir: _Path | None = None,
    resume: bool = False,
    progress: Callable[[dict[str, Any]], object] | None = None,
) -> Student:
    """Puts hybrid attention into a model of transformers, in place; with `data` also trains it, with `out` saves it.

    `model`: what `AutoModelForCausalLM.from_pretrained` gives, of a family that `still` reads. `recipe`: a name that `still
    recipes list` prints, or a TOML file; the usual one for the model's device if absent. `set`: values to change, by dotted
    keys. `budgets`: a file that `still calibrate --out` wrote, or budgets by layer and head; without them a recipe that
    calibrates does so on `data`, from the files that the model was loaded from. `tokenizer`: an object of transformers, a
    directory or a hub id, if the model's own place has none.

    With `train=False` the budgets alone are found on `data`. Then, or without `data`, train with `Student.train`, or with a
    loop of your own over `Student.transfer()` and `Student.finetune()`.
    """
    processes, source = Processes(), Source(model, tokenizer)
    if out is not None and os.path.lexists(out):
        raise InputError(f"{out} exists already", "choose another `out`")
    if out is not None and (data is None or not train):
        raise InputError("out without training: the student has learned nothing yet", "call Student.save later")
    parameter = next(iter(model.parameters()), None) if hasattr(model, "parameters") else None
    if parameter is None:
        raise InputError(f"{type(model).__name__} is no model", "load one by AutoModelForCausalLM.from_pretrained")
    refuse_zero_3(model)
    named = recipe if recipe is not None else ("still-long" if parameter.device.type == "cuda" else "quick")
    changed = dict(set or {})
    if budgets is not None and not isinstance(budgets, (str, os.PathLike)):
        changed["attention.budgets"] = [list(layer) for layer in budgets]
        budgets = None
    text = _still.resolve_recipe(named, changed, budgets)
    if budgets is None and "attention.budgets" not in changed and _calibrates(text):
        with tempfile.TemporaryDirectory() as directory:
            found = processes.first_does(lambda: _calibrated(source, named, changed, data, directory, progress))
            file = Path(directory) / "budgets.json"
            file.write_text(found)
            text = _still.resolve_recipe(named, changed, file)
    student = Student(model, text, source)
    if data is not None and train:
        student.train(data, run_dir=run_dir, resume=resume, progress=progress)
    if out is not None:
        student.save(out)
    return student


def _calibrates(recipe: str) -> bool:
    resolved = json.loads(recipe)
    return resolved["calibration"].get("cache_fraction") is not None and resolved["attention"].get("budgets") is None


def _calibrated(
    source: Source,
    recipe: _Path,
    changed: dict[str, Any],
    data: Any,
    directory: str,
    progress: Callable[[dict[str, Any]], object] | None,
) -> str:
    """The file of budgets that the recipe's calibration gives."""
    if data is None:
        raise InputError(
            "the recipe calibrates budgets, which needs text",
            'pass data=…, budgets=FILE from `still calibrate --out`, or recipe="uniform", which does not calibrate',
        )
    file = Path(directory) / "found.json"
    calibrate_heads(Model.load(source.files()), data, recipe=recipe, set=changed, out=file, progress=progress)
    return file.read_text()
