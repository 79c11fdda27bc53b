"""Errors for mistakes of the user, and for failed runs."""

from __future__ import annotations

__all__ = ["FmmDistillError", "UserError", "first_line", "named"]


class FmmDistillError(Exception):
    """Base class of the errors of this package; the command line exits with code 3."""


class UserError(FmmDistillError):
    """Input that can't be used. The message says what was expected, what came and what to try.

    The command line prints the message as one line and exits with code 2.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def named(error: BaseException) -> str:
    """Return an error's class and the first line of its message."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"
