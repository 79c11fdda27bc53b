"""What a user can cause, told apart from what is a fault of ours."""

from __future__ import annotations

__all__ = ["FmmDistillError", "UserError"]


class FmmDistillError(Exception):
    """Base of every error that this package raises on purpose."""


class UserError(FmmDistillError):
    """Input that can't be used. The message says what came, what was wanted and what to do.

    The command line prints it as it stands and exits with 2.
    """
