"""Exceptions: all are `StillError`."""


class StillError(Exception):
    """Something went wrong. `message` says what and where, `hint` what to do."""

    message: str
    hint: str

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message, self.hint = message, hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class InputError(StillError, ValueError):
    """What was given cannot be used: a file, a value, a device, data."""


class InternalError(StillError, RuntimeError):
    """A bug of this package."""
