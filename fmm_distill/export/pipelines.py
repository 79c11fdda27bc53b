"""The folder of an exported student: an any-step pipeline, and one stock pipeline per fixed number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
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
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from fmm_distill.export.exporter import Exporter
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["export_pipeline", "write_lora", "write_pipelines", "write_scaled_lora"]


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


def write_scaled_lora(adapters: dict[str, dict[str, Tensor]], folder: Path, strengths: Mapping[int, float]) -> None:
    """Write ``lora/`` of a scaled student: files that ``load_lora_weights`` reads.

    ``pytorch_lora_weights.safetensors`` is loaded at the strength of one over the number of steps. Where there is a
    change at h = 0 too, ``guidance.safetensors`` is loaded with it, at the strength 1, and ``steps-<n>.safetensors``
    has both for one number of steps, at the strength 1.

    Args:
        adapters: by name, as ``student.scaled.adapter_states`` returns them.
        strengths: the strength of the student's adapter in the files with both, by the number of steps.
    """
    files = {"pytorch_lora_weights": adapters["student"]}
    if "guidance" in adapters:
        files["guidance"] = adapters["guidance"]
        files |= {f"steps-{n}": _together(adapters["guidance"], adapters["student"], s) for n, s in strengths.items()}
    with writing(folder / "lora"):
        (folder / "lora").mkdir(exist_ok=True)
        for name, tensors in files.items():
            save_file(tensors, folder / "lora" / f"{name}.safetensors")
    record(folder, *(f"lora/{name}.safetensors" for name in files))


def _together(one: dict[str, Tensor], other: dict[str, Tensor], strength: float) -> dict[str, Tensor]:
    """Return the sum of two adapters, the second one multiplied by a strength, as one of the sum of their ranks."""
    made = {}
    for name, value in one.items():
        first = name.endswith("lora_A.weight")
        made[name] = torch.cat((value, other[name] if first else strength * other[name]), 0 if first else 1)
    return made
