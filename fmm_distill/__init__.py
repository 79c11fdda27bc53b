"""Turn a pretrained diffusers model into a few-step generator by flow map distillation (arXiv 2406.07507).

Names are imported on first use: ``import fmm_distill`` does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmm_distill import losses
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.core.flow_map import FlowMap, LearnedFlowMap
    from fmm_distill.export.load import load_student
    from fmm_distill.export.pipelines import export_pipeline
    from fmm_distill.run.distill import distill
    from fmm_distill.run.reopen import export_run
    from fmm_distill.run.verbs import evaluate, publish
    from fmm_distill.student.sampling import sample
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.ip_adapter import IpAdapter
    from fmm_distill.teachers.load import load_teacher
    from fmm_distill.teachers.prompts import Prompts

__version__ = "0.1.0"

__all__ = [
    "FlowMap",
    "IpAdapter",
    "LearnedFlowMap",
    "Prompts",
    "Recipe",
    "Student",
    "Teacher",
    "__version__",
    "distill",
    "evaluate",
    "export_pipeline",
    "export_run",
    "load_student",
    "load_teacher",
    "losses",
    "publish",
    "sample",
]

# ``export`` is a package: importing any of its modules would replace a function of that name.
_HOMES = {
    "FlowMap": "fmm_distill.core.flow_map",
    "IpAdapter": "fmm_distill.teachers.ip_adapter",
    "LearnedFlowMap": "fmm_distill.core.flow_map",
    "Prompts": "fmm_distill.teachers.prompts",
    "Recipe": "fmm_distill.config.recipe",
    "Student": "fmm_distill.student.student",
    "Teacher": "fmm_distill.teachers.base",
    "distill": "fmm_distill.run.distill",
    "evaluate": "fmm_distill.run.verbs",
    "export_pipeline": "fmm_distill.export.pipelines",
    "export_run": "fmm_distill.run.reopen",
    "load_student": "fmm_distill.export.load",
    "load_teacher": "fmm_distill.teachers.load",
    "publish": "fmm_distill.run.verbs",
    "sample": "fmm_distill.student.sampling",
}


def __getattr__(name: str) -> object:
    if name == "losses":
        return import_module("fmm_distill.losses")
    if name not in _HOMES:
        raise AttributeError(f"module 'fmm_distill' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
