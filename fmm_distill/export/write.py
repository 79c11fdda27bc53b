"""A student with or without adapters as pipelines, and what they take on the disk."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fmm_distill.export.choose import exporter_of
from fmm_distill.export.pipelines import write_lora, write_pipelines, write_scaled_lora
from fmm_distill.export.strengths import strengths_of
from fmm_distill.export.verify import Exported
from fmm_distill.student.extract import extract_adapters
from fmm_distill.student.fold import stock_part
from fmm_distill.student.lora import has_lora, merged
from fmm_distill.student.own_network import TwoTimeNetwork
from fmm_distill.student.scaled_adapters import adapter_states, merge_diagonal
from fmm_distill.student.shared_network import SharedNetwork

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["export_bytes", "network_bytes", "write_student"]


def write_student(
    student: Student,
    teacher: Teacher,
    target: Path,
    steps: tuple[int, ...],
    *,
    lora_rank: int = 0,
    linked: bool = False,
) -> Exported:
    """Write the pipelines into an empty folder; with adapters the merged weights, and the adapters in ``lora/``.

    Both are moved to the CPU.

    Args:
        lora_rank: the rank of adapters that are extracted from a scaled student of full rank; 0: none.
        linked: link to the unchanged components of the teacher's pipeline.
    """
    teacher.to("cpu")
    student.to("cpu")
    adapted = has_lora(student.network)
    plain = merged(student) if adapted else merge_diagonal(student)
    # The teacher is the student's own network, which the merge has replaced.
    shared = adapted or isinstance(teacher.network, SharedNetwork)
    extracted = None
    exporter = exporter_of(replace(teacher, network=_network_of(plain)) if shared else teacher)
    write_pipelines(plain, exporter, target, steps, linked=linked)
    if adapted:
        write_lora(student, exporter.component, target)
    adapters = {} if adapted else adapter_states(student, exporter.component)
    if lora_rank:
        extracted = extract_adapters(student, None if shared else teacher.network, lora_rank, exporter.component)
        adapters = extracted.adapters
    if adapters:
        strengths = {n: one.value for n, one in strengths_of(plain, exporter, steps).items()}
        write_scaled_lora(adapters, target, strengths)
    return Exported(plain, exporter, target, steps, extracted)


def _network_of(student: Student) -> nn.Module:
    """Return the student's network without the length of the jump."""
    network = student.network
    # A network that is no diffusers model is inside of the student's, and called without it there.
    return network.network if isinstance(network, TwoTimeNetwork) else stock_part(network)


def network_bytes(student: Student, teacher: Teacher, steps: Sequence[int]) -> int:
    """Return the bytes that the pipelines of an export with these numbers of steps don't share: mostly networks."""
    exporter = exporter_of(teacher)
    modules = exporter.own_modules(student)
    # Exports are float32.
    weights = sum(4 * parameter.numel() for module in modules for parameter in module.parameters())
    return weights * (1 + (0 if exporter.not_fixed else len(steps)))


def export_bytes(student: Student, teacher: Teacher, steps: Sequence[int]) -> int:
    """Return the bytes that an export takes on the disk."""
    return network_bytes(student, teacher, steps) + exporter_of(teacher).shared_bytes()
