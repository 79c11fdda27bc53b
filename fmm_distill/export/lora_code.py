"""The Python code that adds the adapters of a scaled student to its teacher's stock pipeline, for the model card."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import diffusers

from fmm_distill.export.adapter_code import adapter_facts, adapter_lines
from fmm_distill.export.example_call import imports_of
from fmm_distill.export.schedulers import make_scheduler
from fmm_distill.export.stock_pipeline import StockPipelineExporter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fmm_distill.export.exporter import Exporter
    from fmm_distill.student.strength import Strength
    from fmm_distill.student.student import Student

__all__ = ["lora_code", "why_no_lora_code"]

# The number of steps of the example, where it was exported.
_SHOWN = 4
_WEIGHTS = "lora/pytorch_lora_weights.safetensors"
_GUIDANCE = "lora/guidance.safetensors"
# The teacher's pipeline has no image encoder: the student's, by the slash, is next to the folder of the IP-Adapter.
_ENCODER = ', image_encoder_folder="./image_encoder"'


def why_no_lora_code(exporter: Exporter, strengths: Mapping[int, Strength]) -> str | None:
    """Return the reason why no stock pipeline takes the adapters; None: one does."""
    if exporter.not_fixed:
        return exporter.not_fixed
    if not isinstance(exporter, StockPipelineExporter):
        return "stock pipelines of UNet2DModel take no adapters"
    kind = _pipeline_class(exporter)
    if not hasattr(kind, "load_lora_weights") and not _network_takes_adapters(exporter):
        return f"{kind.__name__} of diffusers {diffusers.__version__} has no load_lora_weights"
    if not strengths:
        return "there is no pipeline of a fixed number of steps whose scheduler it could have"
    return None


def lora_code(
    student: Student, exporter: Exporter, strengths: Mapping[int, Strength], call: str, *, guided: bool
) -> str | None:
    """Return code with ``{teacher}``, ``{student}`` and ``{revision}`` for what the card knows; None: there is none.

    Args:
        strengths: of the exported numbers of steps.
        call: the line that calls a pipeline of a fixed number of steps, with ``{steps}``.
        guided: whether there is an adapter of the change at h = 0 too.
    """
    if why_no_lora_code(exporter, strengths) is not None or not isinstance(exporter, StockPipelineExporter):
        return None
    kind, scheduler = _pipeline_class(exporter), type(make_scheduler(exporter.teacher, student.prediction)).__name__
    steps = max((n for n in strengths if n <= _SHOWN), default=min(strengths))
    strength, folder, given = "1 / steps", '"scheduler"', "num_inference_steps=steps"
    exact = all(one.is_exact for one in strengths.values())
    if not (exact and exporter.has_equal_jumps(student)):
        if (
            exact
            and exporter.teacher.schedule.kind == "flow"
            and "sigmas" in inspect.signature(kind.__call__).parameters
        ):
            given += ", sigmas=[1 - i / steps for i in range(steps)]"
        else:
            folder = f'"steps-{steps}/scheduler"'
    if not exact:
        strength = f"{{{', '.join(f'{n}: {one.value:.6g}' for n, one in strengths.items())}}}[steps]"
    chosen = f'["guidance", "student"], [1.0, {strength}]' if guided else f'"student", {strength}'
    files = {"guidance": _GUIDANCE, "student": _WEIGHTS} if guided else {"student": _WEIGHTS}
    lines = [
        f"from diffusers import {', '.join(sorted((kind.__name__, scheduler)))}",
        *imports_of(call),
        f"steps = {steps}",
        f"pipeline = {kind.__name__}.from_pretrained({{teacher}})",
        *(line for name, file in files.items() for line in _load(exporter, name, file)),
        *(f"{owner}.set_adapters({chosen})" for owner in _owners(exporter)),
        f"pipeline.scheduler = {scheduler}.from_pretrained({{student}}{{revision}}, subfolder={folder})",
        *adapter_lines(adapter_facts(exporter.teacher), "{student}{revision}", _ENCODER),
        call.replace("num_inference_steps={steps}", given),
    ]
    return "\n".join(lines)


def _load(exporter: StockPipelineExporter, name: str, file: str) -> list[str]:
    given = f'{{student}}{{revision}}, weight_name="{file}", adapter_name="{name}"'
    owners = _owners(exporter)
    if owners == ["pipeline"]:
        return [f"pipeline.load_lora_weights({given})"]
    return [f'{one}.load_lora_adapter({given}, prefix="{one.removeprefix("pipeline.")}")' for one in owners]


def _owners(exporter: StockPipelineExporter) -> list[str]:
    """Return the objects that have the adapters: the pipeline, or its network where the pipeline loads none.

    Where there are two networks, ``load_lora_weights`` loads the adapters of one alone.
    """
    if exporter.pipeline.second is not None:
        return [f"pipeline.{name}" for name in (exporter.component, exporter.pipeline.second)]
    loads = hasattr(_pipeline_class(exporter), "load_lora_weights")
    return ["pipeline" if loads else f"pipeline.{exporter.component}"]


def _network_takes_adapters(exporter: StockPipelineExporter) -> bool:
    kind = getattr(diffusers, str(exporter.pipeline.index[exporter.component][1]), None)
    return hasattr(kind, "load_lora_adapter")


def _pipeline_class(exporter: StockPipelineExporter) -> Any:  # noqa: ANN401 a diffusers class
    return getattr(diffusers, exporter.pipeline.class_name)
