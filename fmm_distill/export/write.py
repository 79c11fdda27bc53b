"""A student with or without adapters as pipelines, and what they take on the disk."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fmm_distill.export.folded import why_not_folded
from fmm_distill.export.pipelines import write_lora, write_pipelines
from fmm_distill.export.stock import shared_bytes
from fmm_distill.export.verify import Exported
from fmm_distill.student.fold import stock_part
from fmm_distill.student.lora import has_lora, merged
from fmm_distill.teachers.codec import LatentCodec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["export_bytes", "network_bytes", "write_student"]


def write_student(
    student: Student, teacher: Teacher, target: Path, steps: tuple[int, ...], *, linked: bool = False
) -> Exported:
    """Write the pipelines into an empty folder; with adapters the merged weights, and the adapters in ``lora/``.

    Both are moved to the CPU.

    Args:
        linked: link to the unchanged components of the teacher's pipeline.
    """
    teacher.to("cpu")
    student.to("cpu")
    adapted = has_lora(student.network)
    plain = merged(student) if adapted else student
    teacher = replace(teacher, network=stock_part(plain.network)) if adapted else teacher
    write_pipelines(plain, teacher, target, steps, linked=linked)
    if adapted:
        write_lora(student, teacher, target)
    return Exported(plain, teacher, target, steps)


def network_bytes(student: Student, teacher: Teacher, steps: Sequence[int]) -> int:
    """Of what each pipeline of an export with these numbers of steps has of its own: its network.

    Without a stock pipeline that they share, each has its own autoencoder, too.
    """
    modules = [student.network]
    if teacher.folder is None and isinstance(teacher.codec, LatentCodec):
        modules.append(teacher.codec.autoencoder)
    weights = sum(4 * parameter.numel() for module in modules for parameter in module.parameters())
    return weights * (1 + (0 if why_not_folded(teacher) else len(steps)))


def export_bytes(student: Student, teacher: Teacher, steps: Sequence[int]) -> int:
    """What an export takes on the disk."""
    total = network_bytes(student, teacher, steps)
    return total if teacher.folder is None else total + shared_bytes(teacher)
