"""Errors of a network's call as one line."""

from __future__ import annotations

from typing import Any

from fmm_distill.errors import UserError, named

__all__ = ["format_shape", "refuse_call"]


def refuse_call(owner: str, network: Any, shape: tuple[int, ...], error: Exception) -> UserError:  # noqa: ANN401
    """Return the error for a network that fails in its first call.

    Args:
        owner: the teacher or its pipeline, for the message.
        shape: of one sample.
        error: raised by the network.
    """
    return UserError(
        f"{owner}: its {type(network).__name__} does not run on a sample of {format_shape(shape)} ({named(error)}); "
        "expected a size and inputs that its blocks accept; try another sample_size in its config.json"
    )


def format_shape(shape: tuple[int, ...]) -> str:
    """Return a shape as text, such as ``3 x 32 x 32``."""
    return " x ".join(map(str, shape))
