"""Where a loaded model's tokenizer and generation configuration are."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from .._errors import InputError


class Source:
    """What a model was loaded from, and a tokenizer if one was given: an object, a directory or a hub id."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.name: str = getattr(model, "name_or_path", "") or ""
        self.saved: tempfile.TemporaryDirectory[str] | None = None

    def tokenizer_directory(self) -> Path:
        """A directory with a `tokenizer.json`."""
        given = self.tokenizer
        if given is not None and hasattr(given, "save_pretrained"):
            if self.saved is None:
                self.saved = tempfile.TemporaryDirectory(prefix="still-tokenizer-")
                given.save_pretrained(self.saved.name)
            return _with_tokenizer(Path(self.saved.name), "the tokenizer as it was saved")
        name = os.fspath(given) if given is not None else self.name
        if not name:
            raise InputError("the model does not say where it was loaded from", "pass tokenizer=…")
        if os.path.isdir(name):
            return _with_tokenizer(Path(name), name)
        from transformers.utils import cached_file

        try:
            found = cached_file(name, "tokenizer.json")
            for other in ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
                cached_file(name, other, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise InputError(f"no tokenizer of {name}: {error}", "pass tokenizer=…, with a tokenizer.json") from error
        return Path(found).parent

    def generation_config(self) -> str | None:
        """The model's own, as JSON."""
        config = getattr(self.model, "generation_config", None)
        return None if config is None else config.to_json_string()

    def files(self) -> str:
        """What `still.Model.load` takes."""
        if not self.name:
            raise InputError(
                "budgets are to be calibrated, and the model does not say where it was loaded from",
                "calibrate with `still calibrate --out FILE` and pass budgets=FILE",
            )
        return self.name


def _with_tokenizer(directory: Path, what: str) -> Path:
    if not (directory / "tokenizer.json").exists():
        raise InputError(f"{what} has no tokenizer.json", "pass tokenizer=…, with a tokenizer.json")
    return directory
