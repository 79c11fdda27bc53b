"""Guider components of stock pipelines, which call the network a second time and combine its outputs.

A teacher's guidance is the plain combination of two outputs. A guider is therefore turned off where the pipeline is run
for one output, and replaced by plain classifier-free guidance where it is run for the guided one.
"""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffusers import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GUIDER_CONFIG_NAME, BaseGuidance

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["guider_names", "log_guiders", "plain_guiders", "set_plain_guiders", "turn_guiders_off", "write_guiders_off"]

logger = logging.getLogger(__name__)


def guider_names(pipeline: Any) -> tuple[str, ...]:  # noqa: ANN401 a diffusers class
    """Return the names of a pipeline's guiders."""
    return tuple(name for name, part in vars(pipeline).items() if isinstance(part, BaseGuidance))


def turn_guiders_off(pipeline: Any) -> Any:  # noqa: ANN401 a diffusers class
    """Turn the guiders of a pipeline off, and return the pipeline."""
    for name in guider_names(pipeline):
        getattr(pipeline, name).disable()
    return pipeline


def set_plain_guiders(pipeline: Any, scale: float) -> None:  # noqa: ANN401 a diffusers class
    """Replace the guiders of a pipeline by plain classifier-free guidance of this scale; 1 turns it off."""
    for name in guider_names(pipeline):
        setattr(pipeline, name, ClassifierFreeGuidance(guidance_scale=scale, enabled=scale != 1))


@contextmanager
def plain_guiders(pipeline: Any, scale: float) -> Iterator[None]:  # noqa: ANN401 a diffusers class
    """Replace the guiders of a pipeline by plain classifier-free guidance inside of the context."""
    own = {name: getattr(pipeline, name) for name in guider_names(pipeline)}
    set_plain_guiders(pipeline, scale)
    try:
        yield
    finally:
        for name, guider in own.items():
            setattr(pipeline, name, guider)


def log_guiders(pipeline: Any) -> None:  # noqa: ANN401 a diffusers class
    """Log the guiders that are not used."""
    for name in guider_names(pipeline):
        kind = type(getattr(pipeline, name)).__name__
        logger.warning(
            f"the {name} of {type(pipeline).__name__} ({kind}) is turned off: a teacher's guidance is the plain "
            "combination of two outputs"
        )


def write_guiders_off(folder: Path) -> None:
    """Turn the guiders of a saved pipeline off: a student's guidance is in its weights."""
    for file in folder.glob(f"*/{GUIDER_CONFIG_NAME}"):
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.get("enabled", True):
            # The file may be a link to that of the teacher.
            file.unlink()
            file.write_text(json.dumps(values | {"enabled": False}, indent=2) + "\n", encoding="utf-8")
