"""The manifest of an exported student, ``student.json``: its facts for people and programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill import __version__
from fmm_distill.data.condition_images import describe_images
from fmm_distill.errors import UserError
from fmm_distill.export.adapter_code import adapter_facts
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.contents import record
from fmm_distill.export.example_call import example_call, task_call
from fmm_distill.export.lora_code import lora_code, why_no_lora_code
from fmm_distill.export.second_stage import check_facts, facts_of
from fmm_distill.export.strengths import strengths_of
from fmm_distill.io.files import write_text
from fmm_distill.io.reading import check_keys, read_lines, read_mapping
from fmm_distill.student.lora import has_lora
from fmm_distill.student.scaled import is_scaled, scaled_ranks
from fmm_distill.teachers.conditions import Embeddings
from fmm_distill.teachers.ip_adapter import IMAGE

if TYPE_CHECKING:
    from types import UnionType

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.export.exporter import Exporter
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["MANIFEST", "StudentManifest", "make_manifest", "read_manifest", "write_manifest"]

MANIFEST = "student.json"
_TYPES: dict[str, type | UnionType] = {
    "fmm_distill": str,
    "teacher": str,
    "revision": str | None,
    "license": dict,
    "pipeline_tag": str | None,
    "steps": list,
    "not_any_step": str | None,
    "not_fixed": str | None,
    "any_step_call": str,
    "fixed_call": str,
    "limits": str,
    "pipeline": str | None,
    "task": str | None,
    "task_call": str | None,
    "scheduler": dict,
    "call": dict,
    "images": list,
    "ip_adapter": dict | None,
    "guidance": dict | None,
    "kind": str,
    "lora": bool,
    "strengths": dict,
    "lora_code": str | None,
    "no_lora_code": str | None,
    "started_from": str | None,
    "init": str | None,
    "init_revision": str | None,
    "dataset": str | None,
    "training": dict,
    "second_stage": dict | None,
    "environment": dict | None,
    "hours": float | None,
}
_ADAPTER: dict[str, type | UnionType] = {
    "source": str,
    "revision": str | None,
    "license": str | None,
    "weight_name": str,
    "scale": float,
}
_TRAINING: dict[str, type | UnionType] = {
    "loss": str,
    "papers": list,
    "steps": int,
    "batch_size": int,
    "seed": int,
    "data": str,
}


@dataclass(frozen=True)
class StudentManifest:
    """The facts of an exported student, for its model card and for the programs that open it.

    Attributes:
        fmm_distill: the version that wrote it.
        teacher: the id or folder of the teacher.
        revision: the commit of the teacher on the Hub; None: it is not from the Hub.
        license: ``license``, ``license_name`` and ``license_link`` of the teacher's model card; empty: not stated.
        pipeline_tag: the Hub's name of the task; None: the Hub has none for it.
        steps: the fixed numbers of steps that there is a stock pipeline for.
        not_any_step: the reason why there are weights alone; None: there is an any-step pipeline.
        not_fixed: the reason why no fixed number of steps has a pipeline; None: it can have one.
        any_step_call: an example of a call of the any-step pipeline, with ``{steps}`` for the number of steps.
        fixed_call: an example of a call of a pipeline of a fixed number of steps, with ``{steps}`` for the number.
        limits: what the student can't do, and which guidance is in its weights.
        pipeline: the class of the teacher's pipeline that students are copies of; None: they are no copies.
        task: the class that the teacher's repository names, whose task is a method of the any-step pipeline; None: it
            names the class ``pipeline``.
        task_call: an example of a call of that method; None: there is no such task.
        scheduler: the configuration of the teacher's scheduler, with the prediction of the student.
        call: keywords of the pipeline's call other than prompt, images and guidance.
        images: keywords of the pipeline's call by which it is given images.
        ip_adapter: ``source``, ``revision``, ``license``, ``weight_name`` and ``scale`` of the IP-Adapter that is
            loaded before a call; None: there is none.
        guidance: ``scale`` and ``range`` of the scale that the network takes as an input; None: it takes none.
        kind: ``scaled`` if the weights change with the length of the jump, ``embedded`` if it is embedded.
        lora: whether ``lora/`` has the adapters.
        strengths: of a scaled student the strength of its change in each pipeline of a fixed number of steps.
        lora_code: code that adds the adapters to the teacher's pipeline, with ``{teacher}``, ``{student}`` and
            ``{revision}``; None: there are no adapters of a scaled student, or no stock pipeline takes them.
        no_lora_code: the reason why no stock pipeline takes the adapters.
        started_from: the class of the network that ``load_student`` needs next to the teacher; None: the teacher's.
        init: the id or folder of the earlier student whose weights it started with; None: it started as its teacher.
        init_revision: the commit of that student on the Hub; None: it is not from the Hub.
        dataset: the Hub id of the images that it was trained with; None: there is none.
        training: loss, papers, steps, batch size, seed and data of its training.
        second_stage: the facts of ``second_stage.facts_of``; None: it is a map without a second stage.
        environment: versions and device; None: not recorded.
        hours: duration of the training; None: not recorded.
    """

    fmm_distill: str
    teacher: str
    revision: str | None
    license: dict[str, Any]
    pipeline_tag: str | None
    steps: tuple[int, ...]
    not_any_step: str | None
    not_fixed: str | None
    any_step_call: str
    fixed_call: str
    limits: str
    pipeline: str | None
    task: str | None
    task_call: str | None
    scheduler: dict[str, Any]
    call: dict[str, Any]
    images: tuple[str, ...]
    ip_adapter: dict[str, Any] | None
    guidance: dict[str, Any] | None
    kind: str
    lora: bool
    strengths: dict[str, float]
    lora_code: str | None
    no_lora_code: str | None
    started_from: str | None
    init: str | None
    init_revision: str | None
    dataset: str | None
    training: dict[str, Any]
    second_stage: dict[str, Any] | None
    environment: dict[str, Any] | None
    hours: float | None

    def to_json(self) -> str:
        """Return the text of ``student.json``."""
        return json.dumps(asdict(self), indent=2) + "\n"


def make_manifest(
    student: Student,
    teacher: Teacher,
    recipe: Recipe,
    steps: tuple[int, ...],
    run: Path | None = None,
    trained: int | None = None,
    exporter: Exporter | None = None,
) -> StudentManifest:
    """Return the facts of a student that is exported with pipelines for these fixed numbers of steps.

    Args:
        exporter: the one that wrote the pipelines, which knows their grids; None: a new one.
        run: the run's folder, for hardware and hours.
        trained: the number of training steps; None: all of the recipe.
    """
    trained = recipe.total_steps if trained is None else trained
    second = facts_of(recipe, run, trained)
    matched = second is not None and second["steps"] > 0
    exporter, pipeline = exporter or exporter_of(teacher), teacher.pipeline
    extracted = recipe.export.lora_rank > 0
    lora = extracted or has_lora(student.network) or any(scaled_ranks(student.network).values())
    return StudentManifest(
        fmm_distill=__version__,
        teacher=teacher.source,
        revision=teacher.revision,
        license=dict(teacher.license or {}),
        pipeline_tag=_task(teacher),
        steps=() if exporter.not_fixed else steps,
        not_any_step=exporter.not_any_step,
        not_fixed=exporter.not_fixed,
        any_step_call=example_call(teacher, any_step=True),
        fixed_call=example_call(teacher, any_step=False),
        limits=_limits(recipe, teacher, matched=matched),
        pipeline=None if pipeline is None else pipeline.class_name,
        task=None if pipeline is None else pipeline.task,
        task_call=task_call(teacher),
        scheduler=_scheduler(student, teacher),
        call={} if pipeline is None else dict(pipeline.call),
        images=_images(teacher),
        ip_adapter=adapter_facts(teacher),
        guidance=_guidance(teacher),
        kind="scaled" if is_scaled(student.network) else "embedded",
        lora=lora,
        **_of_strengths(student, exporter, recipe, steps, lora=lora),
        started_from=student.started_from,
        init=recipe.student.init,
        init_revision=recipe.student.init_revision,
        dataset=_dataset(recipe),
        training=_training(recipe, trained, matched=matched),
        second_stage=second,
        environment=_environment(run),
        hours=_hours(run, recipe),
    )


def write_manifest(folder: Path, manifest: StudentManifest) -> None:
    """Write ``student.json``."""
    write_text(folder / MANIFEST, manifest.to_json())
    record(folder, MANIFEST)


def read_manifest(folder: Path) -> StudentManifest:
    """Read what ``write_manifest`` wrote.

    Raises:
        UserError: if the folder holds no student, or one of another version of fmm_distill.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(f"{folder}: expected an exported student, got a folder without {MANIFEST}; export one into it")
    todo = f"export the student again with fmm_distill {__version__}"
    # Students of earlier development versions lack it, and are loaded all the same.
    found: dict[str, Any] = {
        "started_from": None,
        "second_stage": None,
        "init": None,
        "init_revision": None,
        "images": [],
        "ip_adapter": None,
        "task": None,
        "task_call": None,
        "kind": "embedded",
        "strengths": {},
        "lora_code": None,
        "no_lora_code": None,
    }
    found |= read_mapping(file, todo=todo)
    if missing := sorted(_TYPES.keys() - found.keys()):
        raise UserError(f"{file} was written by fmm_distill {found.get('fmm_distill')}, without {missing[0]}; {todo}")
    check_keys(str(file), found, _TYPES, todo=todo)
    check_keys(f"{file}: training", found["training"], _TRAINING, todo=todo)
    if found["second_stage"] is not None:
        check_facts(f"{file}: second_stage", found["second_stage"], todo)
    if found["not_any_step"] is None:
        check_keys(f"{file}: scheduler", found["scheduler"], {"_class_name": str}, todo=todo)
    if found["guidance"] is not None:
        check_keys(f"{file}: guidance", found["guidance"], {"scale": float, "range": list | None}, todo=todo)
    if found["ip_adapter"] is not None:
        check_keys(f"{file}: ip_adapter", found["ip_adapter"], _ADAPTER, todo=todo)
    for number, n in enumerate(found["steps"]):
        check_keys(f"{file}: steps", {str(number): n}, {str(number): int}, todo=todo)
    for number, name in enumerate(found["images"]):
        check_keys(f"{file}: images", {str(number): name}, {str(number): str}, todo=todo)
    lists = {name: tuple(found[name]) for name in ("steps", "images")}
    return StudentManifest(**({name: found[name] for name in _TYPES} | lists))


def _of_strengths(
    student: Student, exporter: Exporter, recipe: Recipe, steps: tuple[int, ...], *, lora: bool
) -> dict[str, Any]:
    """Return the facts on strengths and adapters of a scaled student."""
    scaled = is_scaled(student.network)
    strengths = strengths_of(student, exporter, steps)
    plain = {str(n): one.value for n, one in strengths.items()}
    if not (lora and scaled):
        return {"strengths": plain, "lora_code": None, "no_lora_code": None}
    guided = any(name.endswith("diagonal_A") for name, _ in student.network.named_parameters())
    # The weights themselves are the change at h = 0 of a student of full rank.
    changed = exporter.teacher.guidance is not None or student.prediction != exporter.teacher.prediction
    guided |= recipe.export.lora_rank > 0 and changed
    code = lora_code(student, exporter, strengths, example_call(exporter.teacher, any_step=False), guided=guided)
    return {"strengths": plain, "lora_code": code, "no_lora_code": why_no_lora_code(exporter, strengths)}


def _limits(recipe: Recipe, teacher: Teacher, *, matched: bool) -> str:
    """Return the sentences of the card on conditions, guidance and the reach of the student.

    Args:
        matched: its distribution was matched to the teacher's in a second stage.
    """
    copies = "It follows its teacher's ODE: it can't generate what the teacher can't."
    if matched:
        copies = (
            "It was trained towards its teacher's distribution: it can't generate what the teacher can't. From one "
            "noise it may end at another sample than its teacher's ODE."
        )
    if teacher.conditions is None:
        return f"Unconditional. {copies}"
    scale = recipe.guidance.scale if teacher.guidance is None else teacher.guidance.scale
    image_scale = 1.0 if teacher.guidance is None else teacher.guidance.image_scale
    baked = f"guidance {scale:g} is in its weights" if scale != 1 else "its teacher was not guided"
    if image_scale != 1:
        baked = f"guidance {scale:g} and image guidance {image_scale:g} are in its weights"
    call = "Turn the pipeline's own guidance off, as above: it would be applied on top."
    if teacher.pipeline is not None and teacher.pipeline.guidance is None:
        call = "Its network takes the guidance as an input: call it with the keywords above."
    if teacher.guidance is not None and (scales := teacher.guidance.range) is not None:
        baked = f"guidance from {scales[0]:g} to {scales[1]:g} is an input of the any-step pipeline"
        baked += "" if image_scale == 1 else f", and image guidance {image_scale:g} is in its weights"
        call = (
            f"In the pipelines of a fixed number of steps {scale:g} is in the weights: turn their own guidance off, as "
            "above, or it is applied on top."
        )
    images = teacher.conditions.images if isinstance(teacher.conditions, Embeddings) else {}
    sizes = f" ({describe_images(images)}; height x width)" if images else ""
    return f"Trained on {len(teacher.conditions.names)} {teacher.conditions.noun}{sizes}; {baked}. {call} {copies}"


def _task(teacher: Teacher) -> str | None:
    # The Hub has no task of sounds without a condition, nor of points.
    if teacher.codec.outputs == "audios" or teacher.has_coordinates:
        return None
    if not isinstance(teacher.conditions, Embeddings):
        return "unconditional-image-generation"
    outputs = {5: "video", 3: "audio"}.get(teacher.codec.decode(torch.zeros(1, *teacher.event_shape)).ndim, "image")
    # The image of an IP-Adapter is a part of the prompt.
    names = [name for name in _images(teacher) if name != IMAGE]
    # The Hub has no task from an image to a sound.
    if not names or outputs == "audio":
        return f"text-to-{outputs}"
    return "video-to-video" if outputs == "video" and any("video" in name for name in names) else f"image-to-{outputs}"


def _images(teacher: Teacher) -> tuple[str, ...]:
    return tuple(teacher.conditions.images) if isinstance(teacher.conditions, Embeddings) else ()


def _scheduler(student: Student, teacher: Teacher) -> dict[str, Any]:
    changed = {} if student.prediction == teacher.prediction else {"prediction_type": student.prediction}
    # Arrays of betas or sigmas become lists, as schedulers read them.
    plain = {
        key: value.tolist() if hasattr(value, "tolist") else value for key, value in teacher.scheduler_config.items()
    }
    return plain | changed


def _guidance(teacher: Teacher) -> dict[str, Any] | None:
    if teacher.pipeline is not None and teacher.pipeline.network_guidance is not None:
        return {"scale": teacher.pipeline.network_guidance, "range": None}
    if teacher.guidance is None or teacher.guidance.range is None:
        return None
    return {"scale": teacher.guidance.scale, "range": list(teacher.guidance.range)}


def _dataset(recipe: Recipe) -> str | None:
    source = recipe.data.source
    named = recipe.data.has_images and source.count("/") == 1 and not source.startswith((".", "/", "~", "builtin:"))
    # A folder owner/name here wins over a Hub id of that name, as when data are opened.
    return source if named and not Path(source).exists() else None


def _training(recipe: Recipe, trained: int, *, matched: bool) -> dict[str, Any]:
    losses = [*(stage.loss for stage in recipe.stages), recipe.loss, *(term.loss for term in recipe.extra_losses)]
    names, papers = recipe.loss_names, [loss.paper for loss in losses]
    if matched and recipe.matching is not None:
        names, papers = f"{names}, then {recipe.matching.loss.name}", [*papers, recipe.matching.loss.paper]
    return {
        "loss": names,
        "papers": list(dict.fromkeys(papers)),
        "steps": trained,
        "batch_size": recipe.training.batch_size,
        "seed": recipe.training.seed,
        "data": recipe.data.source,
    }


def _environment(run: Path | None) -> dict[str, Any] | None:
    file = None if run is None else run / "environment.json"
    if file is None or not file.is_file():
        return None
    return read_mapping(file, todo="remove it, then run the same command again")


def _hours(run: Path | None, recipe: Recipe) -> float | None:
    """Return the hours of the steps in the log. An incomplete last line is ignored."""
    log = None if run is None else run / "steps.jsonl"
    if log is None or not log.is_file():
        return None
    lines = read_lines(log, {"images_per_second": float}, todo="repair or remove the line")
    rates = [line["images_per_second"] for line in lines]
    # From the rates of the steps: a run may have been interrupted, and waiting is no training.
    return sum(recipe.training.batch_size / rate for rate in rates) / 3600
