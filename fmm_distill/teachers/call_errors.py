"""Errors of the calls of a network and of a pipeline as one line."""

from __future__ import annotations

from typing import Any

from fmm_distill.errors import UserError, named
from fmm_distill.teachers.requirements import find_missing_input

__all__ = ["format_shape", "refuse_call", "refuse_run"]

# Characters of the keywords that an error message shows: a prompt can be long.
_SHOWN = 300


def refuse_call(owner: str, network: Any, shape: tuple[int, ...], error: Exception) -> UserError:  # noqa: ANN401
    """Return the error for a network that fails in its first call.

    Args:
        owner: the teacher or its pipeline, for the message.
        shape: of one sample.
        error: raised by the network.
    """
    return UserError(
        f"{owner}: its {type(network).__name__} does not run on a sample of {format_shape(shape)} ({named(error)}); "
        "expected a size and inputs that its blocks accept; try another size under pipeline in the recipe, or another "
        "sample_size in its config.json"
    )


def refuse_run(pipeline: Any, call: dict[str, Any], error: Exception) -> UserError:  # noqa: ANN401 a diffusers class
    """Return the error for a pipeline that fails with the keywords ``call``.

    Args:
        error: raised by the pipeline.
    """
    kind = type(pipeline).__name__
    if (missing := find_missing_input(pipeline, call, error)) is not None:
        return UserError(
            f"{kind} does not run without {missing} ({named(error)}); expected a pipeline that starts from noise and "
            "prompts alone"
        )
    shown = ", ".join(f"{key}={_shown(value)}" for key, value in call.items() if key not in ("generator", "latents"))
    return UserError(
        f"{kind} does not run with {shown[:_SHOWN]} ({named(error)}); expected a complete pipeline, and keywords that "
        "it accepts; try others under pipeline in the recipe"
    )


def _shown(value: Any) -> str:  # noqa: ANN401 any keyword
    """Return a keyword as text: an image as its size, height x width."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    size = getattr(value, "size", None)
    return f"an image of {size[1]} x {size[0]}" if isinstance(size, tuple) else repr(value)


def format_shape(shape: tuple[int, ...]) -> str:
    """Return a shape as text, such as ``3 x 32 x 32``."""
    return " x ".join(map(str, shape))
