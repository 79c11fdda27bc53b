"""Turn a pretrained diffusers model into a few-step generator by flow map distillation (arXiv 2406.07507).

Names are imported when they are first used: ``import fmm_distill`` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.export.load import load_student
    from fmm_distill.export.pipelines import export_pipeline
    from fmm_distill.run.distill import distill
    from fmm_distill.student.sampling import sample
    from fmm_distill.student.student import make_student
    from fmm_distill.teachers.load import load_teacher

__version__ = "0.1.0"

__all__ = [
    "Recipe",
    "__version__",
    "distill",
    "export_pipeline",
    "load_student",
    "load_teacher",
    "make_student",
    "sample",
]

_HOMES = {
    "Recipe": "fmm_distill.config.recipe",
    "distill": "fmm_distill.run.distill",
    "export_pipeline": "fmm_distill.export.pipelines",
    "load_student": "fmm_distill.export.load",
    "load_teacher": "fmm_distill.teachers.load",
    "make_student": "fmm_distill.student.student",
    "sample": "fmm_distill.student.sampling",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fmm_distill' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
