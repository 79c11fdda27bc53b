"""The folder of an exported student: an any-step pipeline, and one stock pipeline per fixed number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from fmm_distill.core.torch_state import own_state
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.contents import record
from fmm_distill.export.exporter import check_steps
from fmm_distill.export.local_paths import strip
from fmm_distill.export.place import replacing
from fmm_distill.io.files import writing
from fmm_distill.student.lora import lora_state

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fmm_distill.export.exporter import Exporter
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["export_pipeline", "write_lora", "write_pipelines"]


@own_state()
def export_pipeline(
    student: Student, teacher: Teacher, folder: Path | str, steps: Iterable[int] = (1, 2, 4, 8)
) -> Path:
    """Write the any-step pipeline and the folded ones ``steps-<n>/``; ``folder`` is replaced once all is written.

    ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` opens the first,
    ``DiffusionPipeline.from_pretrained(folder / "steps-4")`` a folded one. Where no stock pipeline takes a folded
    student (``Exporter.not_fixed``) only the first is written.

    Raises:
        UserError: on a number of steps that does not divide the timesteps, a folder with files that no export wrote,
            another export into it at the same time, or a full disk.
    """
    folder, steps = Path(folder), tuple(steps)
    check_steps(steps, student.schedule)
    with replacing(folder) as new:
        write_pipelines(student, exporter_of(teacher), new, steps)
    return folder


def write_pipelines(
    student: Student, exporter: Exporter, folder: Path, steps: Iterable[int], *, linked: bool = False
) -> None:
    """Write the pipelines into an empty folder, without the paths of this machine.

    Args:
        linked: link to the components that the student shares with its teacher; the folder then depends on that one.
    """
    exporter.any_step(student, folder, linked=linked)
    for n in () if exporter.not_fixed else steps:
        exporter.fixed(student, n, folder)
    # Last: libraries write the paths while they save.
    strip(folder)


def write_lora(student: Student, component: str, folder: Path) -> None:
    """Write ``lora/``: the adapters as diffusers' ``load_lora_weights`` reads them, and the jump embeddings.

    Args:
        component: the name of the network in its pipeline.
    """
    adapters, jumps = lora_state(student, component)
    with writing(folder / "lora"):
        (folder / "lora").mkdir(exist_ok=True)
        save_file(adapters, folder / "lora" / "pytorch_lora_weights.safetensors")
        save_file(jumps, folder / "lora" / "jump_embedding.safetensors")
    record(folder, "lora/pytorch_lora_weights.safetensors", "lora/jump_embedding.safetensors")
