"""The pipeline classes of the installed diffusers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import diffusers

from experiments.coverage.kinds import kind_of

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["parameters_of", "uncovered"]

# Not maintained, for another runtime, or a choice among other classes.
_LEFT_OUT = ("deprecated", "onnx", "auto_pipeline", "pipeline_utils", "dummy")


def parameters_of(name: str) -> tuple[str, ...]:
    """Return the names of the parameters of a pipeline class's call; none for an unknown class."""
    kind = getattr(diffusers, name, None)
    return () if kind is None else tuple(inspect.signature(kind.__call__).parameters)


def uncovered(covered: Collection[str]) -> list[tuple[str, str]]:
    """Return the installed pipeline classes without those of ``covered``, with their kinds."""
    found = []
    for name in sorted(name for name in dir(diffusers) if name.endswith("Pipeline") and name not in covered):
        kind = getattr(diffusers, name)
        if not issubclass(kind, diffusers.DiffusionPipeline) or kind is diffusers.DiffusionPipeline:
            continue
        if not any(part in kind.__module__ or part in name.lower() for part in _LEFT_OUT):
            found.append((name, kind_of(name, parameters_of(name))))
    return found
