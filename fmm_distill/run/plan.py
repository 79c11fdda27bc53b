"""A recipe's teacher, data and student, opened and checked before anything long starts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fmm_distill.config.recipe import parse
from fmm_distill.config.settings import DataSettings
from fmm_distill.data.prepare import describe_data, disk_bytes, open_images
from fmm_distill.data.prompts import load_prompts
from fmm_distill.data.row_store import mebibytes
from fmm_distill.data.samples import captions_of, load_images
from fmm_distill.data.tables import open_table
from fmm_distill.errors import UserError
from fmm_distill.evaluation.checks import check_evaluation, image_shape
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.exporter import check_steps, describe_export
from fmm_distill.export.write import export_bytes
from fmm_distill.run.trial import trial_bytes, try_export
from fmm_distill.student.lora import add_lora
from fmm_distill.student.student import Student
from fmm_distill.teachers.conditions import Classes
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.load import load_teacher
from fmm_distill.training.compile import checkpoint_blocks
from fmm_distill.training.memory import forecast_memory
from fmm_distill.training.process import check_training
from fmm_distill.training.variables import launched

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.data.samples import Images
    from fmm_distill.teachers.base import Teacher

__all__ = ["Plan", "at_guidance", "describe", "forecast", "open_reference", "open_teacher", "plan", "with_evaluation"]


@dataclass
class Plan:
    """What a recipe needs, opened and checked before anything long starts."""

    recipe: Recipe
    teacher: Teacher
    student: Student
    images: Images | None
    reference: Images | None


def plan(recipe: Recipe, prompts: tuple[str, ...] | None = None) -> Plan:
    """Open the teacher and the data and check what can be checked.

    Args:
        prompts: those of a run that was begun before; None: the recipe's.

    Raises:
        UserError: on anything in the recipe that this teacher or this machine can't do.
    """
    check_training(recipe)
    data = recipe.data
    table = open_table(data) if data.has_images and not data.source.startswith("builtin:") else None
    if prompts is None and table is not None and data.condition is not None:
        prompts = captions_of(table, data.condition)
    teacher = open_teacher(recipe, prompts)
    if recipe.student.prediction not in ("teacher", teacher.prediction) and recipe.student.regression_steps == 0:
        raise UserError(
            f"student.prediction: {recipe.student.prediction} differs from the teacher's {teacher.prediction}, and "
            "student.regression_steps is 0: give it steps to learn the change, e.g. --set student.regression_steps=500"
        )
    check_evaluation(recipe.evaluation, teacher)
    check_steps(recipe.export.steps, teacher.schedule)
    images = open_images(data, teacher, table)
    reference = open_reference(recipe, teacher, images)
    student = Student.from_teacher(teacher, recipe.student.prediction, seed=recipe.training.seed)
    if recipe.student.lora.rank:
        add_lora(student, teacher, recipe.student.lora.rank, recipe.student.lora.targets)
    return Plan(recipe, teacher, student, images, reference)


def open_reference(recipe: Recipe, teacher: Teacher, images: Images | None) -> Images | None:
    """What images are compared with: the recipe's own reference, its data, or the built-in digits.

    Args:
        images: of the recipe's data, where they are open.
    """
    settings = recipe.evaluation
    if settings.reference is not None:
        images = load_images(settings.reference, image_shape(teacher))
    elif images is None and settings.features == "digits":
        images = load_images(DataSettings(source="builtin:digits"), teacher.event_shape)
    if images is not None and settings.features != "none" and len(images) < 4:
        raise UserError(f"{images.source}: {len(images)} images to compare with; wanted at least 4")
    return images


def open_teacher(recipe: Recipe, prompts: tuple[str, ...] | None = None) -> Teacher:
    """The teacher of a recipe, with its prompts, its guidance and its pipeline's keywords."""
    settings = recipe.guidance
    alone = settings.scale == 1 and settings.range is None
    guidance = None if alone else Guidance(settings.scale, settings.interval, settings.range)
    prompts = load_prompts(recipe.prompts) if prompts is None else prompts
    told: dict[str, Any] = {"prompts": prompts, "call": dict(recipe.pipeline)}
    of_teacher: dict[str, Any] = {"revision": recipe.revision, "variant": recipe.variant}
    if settings.weaker is None:
        return load_teacher(recipe.teacher, **of_teacher, guidance=guidance, **told)
    teacher = load_teacher(recipe.teacher, **of_teacher, **told)
    weaker = load_teacher(settings.weaker, revision=settings.weaker_revision, **told)
    here, there = ((t.event_shape, t.schedule.t_min, t.schedule.t_max) for t in (teacher, weaker))
    if here != there:
        raise UserError(
            f"guidance.weaker {settings.weaker}: shape and range of time are {there}, the teacher's {here}; wanted the "
            "same, such as an earlier or a smaller model on the same data"
        )
    if settings.range is not None and (teacher.conditions is None or teacher.pipeline is None):
        raise UserError(
            f"guidance.range: {recipe.teacher} has no pipeline that is called with a guidance_scale; wanted none, and "
            "the one guidance.scale"
        )
    teacher.guidance, teacher.weaker = guidance, weaker
    return teacher


def with_evaluation(recipe: Recipe, changes: Mapping[str, Any] | None, where: str) -> Recipe:
    """A recipe with other settings of the evaluation.

    Args:
        where: what the recipe is of, for messages.

    Raises:
        UserError: on settings that don't fit.
    """
    if not changes:
        return recipe
    plain = recipe.model_dump(mode="json")
    plain["evaluation"] |= changes
    if plain["evaluation"]["features"] == "none" and "reference" not in changes:
        plain["evaluation"]["reference"] = None
    return parse(plain, where)


def at_guidance(recipe: Recipe, scale: float | None) -> Recipe:
    """A recipe at another scale of its range of guidance.

    Raises:
        UserError: if it has no such scale.
    """
    if scale is None:
        return recipe
    scales = recipe.guidance.range
    if scales is None or not scales[0] <= scale <= scales[1]:
        learned = f"learned {scales[0]:g} to {scales[1]:g}" if scales else "has no guidance.range: it learned one scale"
        raise UserError(f"--guidance {scale:g}: this run {learned}; wanted a scale that it has learned")
    return recipe.model_copy(update={"guidance": recipe.guidance.model_copy(update={"scale": scale})})


def describe(job: Plan) -> str:
    """The lines of a run's start: teacher, student, data, steps and formats of the export."""
    teacher, training = job.teacher, job.recipe.training
    trained = sum(p.numel() for p in job.student.parameters() if p.requires_grad)
    jump = sum(p.numel() for p in cast("Any", job.student.network).jump_embedding.parameters())
    adapters = trained - jump if job.recipe.student.lora.rank else 0
    parameters = sum(p.numel() for p in job.student.parameters()) - jump - adapters
    lora = f", {adapters:,} in adapters of rank {job.recipe.student.lora.rank}" if adapters else ""
    shape = " x ".join(map(str, teacher.event_shape))
    steps = job.recipe.student.regression_steps + training.steps
    export = describe_export(exporter_of(job.teacher), job.recipe.export.steps)
    told = "" if teacher.conditions is None else f"; {len(teacher.conditions.names):,} {_conditions_of(teacher)}"
    return (
        f"teacher: {teacher.source} ({teacher.adapter}; {teacher.prediction}; {shape}; {parameters:,} "
        f"parameters{told})\n"
        f"student: {job.student.prediction}, {jump:,} new parameters for the second time{lora}\n"
        f"data:    {describe_data(job.recipe.data, job.images)}\n"
        f"steps:   {steps} of {training.batch_size} samples, loss {job.recipe.loss_names}\n"
        f"export:  {export}"
    )


def _conditions_of(teacher: Teacher) -> str:
    kind = "classes" if isinstance(teacher.conditions, Classes) else "prompts"
    if teacher.guidance is None:
        return kind
    low, high = teacher.guidance.range or (None, None)
    span = "" if low is None else f" (an input: {low:g} to {high:g})"
    return f"{kind}, guided by {teacher.guidance.scale:g}{span}"


def forecast(recipe: Recipe, folder: Path) -> str:
    """The resolved recipe and what a run of it would do, without doing it."""
    job = plan(recipe)
    lines = _export_disk(job)
    # Of processes that were launched together the first one tries; the others print nothing.
    if os.environ.get("RANK", "0") == "0":
        try_export(recipe, job.student, job.teacher, folder)
    processes, training = launched(), recipe.training
    if training.gradient_checkpointing:
        checkpoint_blocks(job.student)
    memory = forecast_memory(job.student, job.teacher, recipe, processes)
    part = training.batch_size // (processes * training.gradient_accumulation_steps)
    needed = disk_bytes(recipe, job.teacher, job.images)
    disk = f"disk:    {mebibytes(needed)} of trajectories or latents, kept for later starts\n" if needed else ""
    exported = "\n".join(lines)
    return (
        f"{recipe.to_yaml()}\n{describe(job)}\n"
        f"memory:  {memory} ({part} samples at a time in each of {processes} processes)\n"
        f"{disk}{exported}\noutput:  {folder}\nnothing was trained (--dry-run)"
    )


def _export_disk(job: Plan) -> list[str]:
    """The line on what the export takes on the disk, at the end and before training."""
    final = export_bytes(job.student, job.teacher, job.recipe.export.steps)
    trial = trial_bytes(job.recipe, job.student, job.teacher)
    return [f"disk:    {mebibytes(final)} of the exported student; {mebibytes(trial)} for its trial before step 1"]
