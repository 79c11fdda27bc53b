"""The student's folder: an any-step pipeline with its own code, and one folded stock pipeline a number of steps."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import save_file

from fmm_distill import __version__
from fmm_distill.checkpoint import writing
from fmm_distill.errors import UserError
from fmm_distill.export.folded import check_steps, folded_pipeline, jump_scheduler, why_not_folded
from fmm_distill.export.stock import any_step_settings, copy_pipeline, folded_network, stock_scheduler
from fmm_distill.lora import lora_state
from fmm_distill.state import own_state
from fmm_distill.teachers.codec import LatentCodec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fmm_distill.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["export_pipeline", "write_lora"]

# Equally named files of two students share one namespace in a process, so the names carry the version.
_SUFFIX = __version__.replace(".", "_")


@own_state()
def export_pipeline(
    student: Student, teacher: Teacher, folder: Path | str, steps: Iterable[int] = (1, 2, 4, 8)
) -> Path:
    """Write the any-step pipeline and the folded ones ``steps-<n>/``; ``folder`` is replaced once all is written.

    ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` opens the first,
    ``DiffusionPipeline.from_pretrained(folder / "steps-4")`` a folded one. Where no stock pipeline takes a folded
    student (``why_not_folded``) only the first is written.

    Raises:
        UserError: on a number of steps that does not divide the timesteps, a folder that holds something else, or a
            disk that is full.
    """
    folder, steps = Path(folder), tuple(steps)
    check_steps(steps, student.schedule)
    if folder.exists() and not _is_export(folder):
        raise UserError(f"{folder} holds something else than an exported student; choose a folder that is not there")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(folder):
        try:
            partial.mkdir(parents=True)
            write = _write_any_step if teacher.folder is None else _write_any_step_stock
            write(student, teacher, partial)
            for n in () if why_not_folded(teacher) else steps:
                if teacher.folder is None:
                    folded = folded_pipeline(student, teacher, n)
                    folded.save_pretrained(partial / f"steps-{n}", safe_serialization=True)
                else:
                    _write_folded_stock(student, teacher, partial / f"steps-{n}", n, partial)
            _swap(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def write_lora(student: Student, teacher: Teacher, folder: Path) -> None:
    """Write ``lora/``: the adapters as diffusers' ``load_lora_weights`` reads them, and the jump embeddings."""
    adapters, jumps = lora_state(student, teacher.component)
    with writing(folder / "lora"):
        (folder / "lora").mkdir(exist_ok=True)
        save_file(adapters, folder / "lora" / "pytorch_lora_weights.safetensors")
        save_file(jumps, folder / "lora" / "jump_embedding.safetensors")


def _is_export(folder: Path) -> bool:
    index = folder / "model_index.json"
    return index.is_file() and "FlowMapPipeline" in index.read_text(encoding="utf-8")


def _swap(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_any_step(student: Student, teacher: Teacher, folder: Path) -> None:
    scheduler = jump_scheduler(student, teacher)
    scheduler.save_pretrained(folder / "scheduler")
    network = _write_network(student, folder / teacher.component)
    pipeline = f"flow_map_pipeline_{_SUFFIX}"
    (folder / f"{pipeline}.py").write_text(_source("export", "pipeline.py"), encoding="utf-8")
    index = {
        "_class_name": [pipeline, "FlowMapPipeline"],
        "_diffusers_version": network["_diffusers_version"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        teacher.component: network["auto_map"]["AutoModel"].split("."),
    }
    if isinstance(teacher.codec, LatentCodec):
        teacher.codec.autoencoder.save_pretrained(folder / "vqvae", safe_serialization=True)
        index["vqvae"] = ["diffusers", type(teacher.codec.autoencoder).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_any_step_stock(student: Student, teacher: Teacher, folder: Path) -> None:
    """The teacher's pipeline with the two-time network in it, of a class made from the stock one."""
    index = copy_pipeline(teacher, folder)
    scheduler = stock_scheduler(teacher, student.prediction)
    scheduler.save_pretrained(folder / "scheduler")
    network = cast("Any", student.network)
    network.register_to_config(flow_map=any_step_settings(teacher))
    config = _write_network(student, folder / teacher.component)
    stock = index["_class_name"]
    module = f"flow_map_{stock.lower()}_{_SUFFIX}"
    lines = f"\n\nfrom diffusers import {stock}  # noqa: E402\n\nFlowMapPipeline = flow_map_pipeline({stock})\n"
    (folder / f"{module}.py").write_text(_source("export", "stock_pipeline.py") + lines, encoding="utf-8")
    index |= {
        "_class_name": [module, "FlowMapPipeline"],
        "scheduler": ["diffusers", type(scheduler).__name__],
        teacher.component: config["auto_map"]["AutoModel"].split("."),
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
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_network(student: Student, folder: Path) -> dict[str, Any]:
    """The two-time network with the file that makes its class; gives its configuration."""
    network = cast("Any", student.network)
    network.save_pretrained(folder, safe_serialization=True)
    name, stock = type(network).__name__, type(network).__bases__[-1].__name__
    module = f"two_time_{stock.lower()}_{_SUFFIX}"
    lines = f"\n\nfrom diffusers import {stock}  # noqa: E402\n\n{name} = two_time({stock})\n"
    (folder / f"{module}.py").write_text(_source("two_time.py") + lines, encoding="utf-8")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModel": f"{module}.{name}"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def _source(*parts: str) -> str:
    return files("fmm_distill").joinpath(*parts).read_text(encoding="utf-8")
