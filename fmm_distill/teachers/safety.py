"""Safety checkers and watermarks of stock pipelines, which change decoded images."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import diffusers

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CHECKERS", "describe_checkers", "without_checkers"]

# Components that replace images or draw on them after they are decoded.
CHECKERS = ("safety_checker", "watermarker")


def without_checkers(pipeline: str, components: Mapping[str, object]) -> dict[str, Any]:
    """Return keywords of ``from_pretrained`` with which a pipeline returns its images as they are decoded.

    Args:
        pipeline: the name of its class.
        components: those that are not empty, by name.
    """
    kind = getattr(diffusers, pipeline, None)
    taken = {} if kind is None else inspect.signature(kind.__init__).parameters
    left: dict[str, Any] = {name: None for name in CHECKERS if name in components and name in taken}
    if "safety_checker" in left:
        # Only the checker uses the extractor, unless there is an image encoder, which may use it too.
        if "feature_extractor" in components and "image_encoder" not in components:
            left["feature_extractor"] = None
        if "requires_safety_checker" in taken:
            left["requires_safety_checker"] = False
    if "add_watermarker" in taken:
        left["add_watermarker"] = False
    return left


def describe_checkers(pipeline: str, components: Mapping[str, object]) -> str | None:
    """Return the names of the parts that ``without_checkers`` leaves out, as text; None: there are none."""
    left = without_checkers(pipeline, components)
    names = [name.replace("_", " ") for name in CHECKERS if name in left]
    # Stock pipelines add a watermark only if the package for it is installed.
    if "add_watermarker" in left and find_spec("imwatermark") is not None:
        names.append("watermark")
    return " and ".join(names) or None
