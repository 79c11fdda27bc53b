"""Teachers whose students no pipeline can hold: their students are saved as weights alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers import UNet2DModel

from fmm_distill.core.parametrization import call_stock

if TYPE_CHECKING:
    from fmm_distill.teachers.base import Teacher

__all__ = ["why_weights_alone"]


def why_weights_alone(teacher: Teacher) -> str | None:
    """Return why no pipeline takes a student of this teacher; None where one does."""
    if teacher.folder is not None:
        return None
    if not isinstance(teacher.network, UNet2DModel):
        return f"it has no pipeline, and none is known for {type(teacher.network).__name__} alone"
    if teacher.parametrization.call is not call_stock or not teacher.scheduler_config:
        return "its network is called in a way of its own, or its scheduler is not known"
    return None
