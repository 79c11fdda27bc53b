"""The student's folder: an any-step pipeline with its own code, and one folded stock pipeline a number of steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import save_file

from fmm_distill.core.torch_state import own_state
from fmm_distill.export.contents import record
from fmm_distill.export.folded import check_steps, folded_pipeline, jump_scheduler, why_not_folded
from fmm_distill.export.local_paths import strip
from fmm_distill.export.place import replacing
from fmm_distill.export.remote import stock_pipeline
from fmm_distill.export.remote.pipeline import FlowMapPipeline
from fmm_distill.export.schedulers import stock_scheduler
from fmm_distill.export.stock import (
    any_step_settings,
    copy_pipeline,
    folded_network,
    pipeline_settings,
)
from fmm_distill.io.files import writing
from fmm_distill.student.lora import lora_state
from fmm_distill.teachers.codec import LatentCodec

if TYPE_CHECKING:
    from collections.abc import Iterable

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
    student (``why_not_folded``) only the first is written.

    Raises:
        UserError: on a number of steps that does not divide the timesteps, a folder with files that no export wrote,
            another export into it at the same time, or a full disk.
    """
    folder, steps = Path(folder), tuple(steps)
    check_steps(steps, student.schedule)
    with replacing(folder) as new:
        write_pipelines(student, teacher, new, steps)
    return folder


def write_pipelines(
    student: Student, teacher: Teacher, folder: Path, steps: Iterable[int], *, linked: bool = False
) -> None:
    """Write the pipelines into an empty folder, without the paths of this machine.

    Args:
        linked: link to the components that the student shares with its teacher; the folder then depends on that one.
    """
    if teacher.folder is None:
        _write_any_step(student, teacher, folder)
    else:
        _write_any_step_stock(student, teacher, folder, linked=linked)
    for n in () if why_not_folded(teacher) else steps:
        if teacher.folder is None:
            folded = folded_pipeline(student, teacher, n)
            folded.save_pretrained(folder / f"steps-{n}", safe_serialization=True)
        else:
            _write_folded_stock(student, teacher, folder / f"steps-{n}", n, folder)
    strip(folder)


def write_lora(student: Student, teacher: Teacher, folder: Path) -> None:
    """Write ``lora/``: the adapters as diffusers' ``load_lora_weights`` reads them, and the jump embeddings."""
    adapters, jumps = lora_state(student, teacher.component)
    with writing(folder / "lora"):
        (folder / "lora").mkdir(exist_ok=True)
        save_file(adapters, folder / "lora" / "pytorch_lora_weights.safetensors")
        save_file(jumps, folder / "lora" / "jump_embedding.safetensors")
    record(folder, "lora/pytorch_lora_weights.safetensors", "lora/jump_embedding.safetensors")


def _write_any_step(student: Student, teacher: Teacher, folder: Path) -> None:
    scheduler, network = jump_scheduler(student, teacher), cast("Any", student.network)
    network.register_to_config(flow_map=pipeline_settings(teacher, scheduler))
    decoder = teacher.codec.autoencoder if isinstance(teacher.codec, LatentCodec) else None
    pipeline = FlowMapPipeline(unet=network, scheduler=scheduler, vqvae=decoder)
    pipeline.save_pretrained(folder, safe_serialization=True)


def _write_any_step_stock(student: Student, teacher: Teacher, folder: Path, *, linked: bool) -> None:
    """The teacher's pipeline with the two-time network in it, of a class made from the stock one."""
    index = copy_pipeline(teacher, folder, linked=linked)
    # Before the folded pipelines link to these files.
    strip(folder)
    scheduler, network = stock_scheduler(teacher, student.prediction), cast("Any", student.network)
    scheduler.save_pretrained(folder / "scheduler")
    network.register_to_config(flow_map=any_step_settings(teacher, scheduler))
    network.save_pretrained(folder / teacher.component, safe_serialization=True)
    stock_pipeline.write_code(folder)
    index |= {
        "_class_name": [stock_pipeline.MODULE, f"FlowMap{index['_class_name']}"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        teacher.component: [network.module_name, type(network).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_folded_stock(student: Student, teacher: Teacher, folder: Path, steps: int, beside: Path) -> None:
    """The teacher's pipeline with the folded network in it; what does not differ is linked to the copy ``beside``."""
    folder.mkdir()
    index = copy_pipeline(teacher, folder, beside)
    network, scheduler, _ = folded_network(student, teacher, steps)
    network.save_pretrained(folder / teacher.component, safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    # An older repository names the class that its day had.
    index[teacher.component] = ["diffusers", type(network).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
