"""The pipeline classes of the installed diffusers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import diffusers

from experiments.coverage.kinds import kind_of

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["uncovered"]

# Not maintained, for another runtime, or a choice among other classes.
_LEFT_OUT = ("deprecated", "onnx", "auto_pipeline", "pipeline_utils", "dummy")


def uncovered(covered: Collection[str]) -> list[tuple[str, str]]:
    """Return the installed pipeline classes without those of ``covered``, with their kinds."""
    found = []
    for name in sorted(name for name in dir(diffusers) if name.endswith("Pipeline") and name not in covered):
        kind = getattr(diffusers, name)
        if not issubclass(kind, diffusers.DiffusionPipeline) or kind is diffusers.DiffusionPipeline:
            continue
        if not any(part in kind.__module__ or part in name.lower() for part in _LEFT_OUT):
            found.append((name, kind_of(name, inspect.signature(kind.__call__).parameters)))
    return found
