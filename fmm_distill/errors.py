"""What a user can cause, told apart from what is a fault of ours."""

from __future__ import annotations

__all__ = ["FmmDistillError", "UserError", "first_line", "named"]


class FmmDistillError(Exception):
    """Base of every error that this package raises on purpose."""


class UserError(FmmDistillError):
    """Input that can't be used. The message says what came, what was wanted and what to do.

    The command line prints it as it stands and exits with 2.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def named(error: BaseException) -> str:
    """Return an error's class and the first line of its message."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"
