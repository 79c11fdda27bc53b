"""The choice of an exporter for a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import diffusers

from fmm_distill.core.parametrization import call_stock
from fmm_distill.export.stock_pipeline import StockPipelineExporter
from fmm_distill.export.unet2d import UNet2DExporter
from fmm_distill.export.weights import WeightsExporter

if TYPE_CHECKING:
    from fmm_distill.export.exporter import Exporter
    from fmm_distill.teachers.base import Teacher

__all__ = ["exporter_of"]


def exporter_of(teacher: Teacher) -> Exporter:
    """Return the exporter of a teacher's students: pipelines where there is one, otherwise weights alone."""
    if teacher.pipeline is not None:
        return StockPipelineExporter(teacher, teacher.pipeline)
    if (reason := _why_no_pipeline(teacher)) is not None:
        return WeightsExporter(teacher, reason)
    return UNet2DExporter(teacher)


def _why_no_pipeline(teacher: Teacher) -> str | None:
    """The reason why a network without a stock pipeline is no ``UNet2DModel`` as ``FlowMapPipeline`` calls it."""
    # The network of a teacher that is its student's is inside of another module.
    network = getattr(teacher.network, "shared", teacher.network)
    if not isinstance(network, diffusers.UNet2DModel):
        return f"the teacher names no stock pipeline, and {type(network).__name__} is no UNet2DModel"
    if teacher.parametrization.call is not call_stock:
        return "the teacher calls its UNet2DModel in its own way"
    if "_class_name" not in teacher.scheduler_config:
        return "the teacher's scheduler_config names no scheduler of diffusers"
    return None
