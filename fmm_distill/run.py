"""The main job: teacher, student, training, evaluation, export, in one folder that explains itself."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, ProjectConfiguration

from fmm_distill import checkpoint
from fmm_distill.acceleration import checkpoint_blocks
from fmm_distill.data import captions_of, load_images, load_prompts
from fmm_distill.ema import load_trained
from fmm_distill.errors import UserError
from fmm_distill.evaluation.gallery import COLUMNS, SEED, Gallery
from fmm_distill.evaluation.measure import check_evaluation, evaluate, image_shape
from fmm_distill.evaluation.pictures import draw_samples, draw_steps
from fmm_distill.evaluation.result import Evaluation, choose, table
from fmm_distill.export.about import about_student
from fmm_distill.export.card import write_card
from fmm_distill.export.folded import check_steps, why_not_folded
from fmm_distill.export.folder import export_pipeline, write_lora
from fmm_distill.export.verify import verify
from fmm_distill.lora import add_lora, has_lora, merged
from fmm_distill.memory import forecast_memory
from fmm_distill.monitor import Monitor
from fmm_distill.parts import mebibytes
from fmm_distill.prepare import describe_data, disk_bytes, open_images, prepare_samples
from fmm_distill.recipe import parse
from fmm_distill.run_folder import (
    PROMPTS,
    check_folder,
    check_prompts,
    keep_commits,
    kept_prompts,
    kept_recipe,
    make_folder,
    pinned,
    read_evaluation,
    steps_done,
    take_changes,
)
from fmm_distill.settings import DataSettings
from fmm_distill.sharding import check_sharding
from fmm_distill.student import make_student, stock_part
from fmm_distill.tables import open_table
from fmm_distill.teachers.conditions import Classes, Embeddings
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.load import load_teacher
from fmm_distill.tracking import check_trackers, log_picture, log_rows, tracked, tracker_folder
from fmm_distill.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fmm_distill.data import Images
    from fmm_distill.flow_map import LearnedFlowMap
    from fmm_distill.recipe import Recipe
    from fmm_distill.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = [
    "PATIENCE",
    "Plan",
    "at_guidance",
    "check_joined",
    "distill",
    "draw_run",
    "export_run",
    "forecast",
    "open_reference",
    "open_run",
    "open_teacher",
    "plan",
    "silent",
    "with_evaluation",
]

# The first process evaluates and exports while the others wait for it; NCCL gives up after ten minutes by itself.
PATIENCE = timedelta(hours=12)


@dataclass
class Plan:
    """What a recipe needs, opened and checked before anything long starts."""

    recipe: Recipe
    teacher: Teacher
    student: Student
    images: Images | None
    reference: Images | None


def plan(recipe: Recipe, prompts: tuple[str, ...] | None = None, say: Callable[[str], None] = print) -> Plan:
    """Open the teacher and the data and check what can be checked.

    Args:
        prompts: those of a run that was begun before; None: the recipe's.
        say: takes the line on images that can't be read.

    Raises:
        UserError: on anything in the recipe that this teacher or this machine can't do.
    """
    _check_training(recipe)
    data = recipe.data
    table = open_table(data) if data.has_images and not data.source.startswith("builtin:") else None
    if prompts is None and table is not None and data.condition is not None:
        prompts = captions_of(table, data.condition)
    teacher = open_teacher(recipe, prompts, say)
    if recipe.student.prediction not in ("teacher", teacher.prediction) and recipe.student.regression_steps == 0:
        raise UserError(
            f"student.prediction: {recipe.student.prediction} differs from the teacher's {teacher.prediction}, and "
            "student.regression_steps is 0: give it steps to learn the change, e.g. --set student.regression_steps=500"
        )
    check_evaluation(recipe.evaluation, teacher)
    check_steps(recipe.export.steps, teacher.schedule)
    images = open_images(data, teacher, table, say)
    reference = open_reference(recipe, teacher, images, say)
    student = make_student(teacher, recipe.student.prediction, seed=recipe.training.seed)
    if recipe.student.lora.rank:
        add_lora(student, teacher, recipe.student.lora.rank, recipe.student.lora.targets)
    return Plan(recipe, teacher, student, images, reference)


def open_reference(
    recipe: Recipe, teacher: Teacher, images: Images | None, say: Callable[[str], None]
) -> Images | None:
    """What images are compared with: the recipe's own reference, its data, or the built-in digits.

    Args:
        images: of the recipe's data, where they are open.
    """
    settings = recipe.evaluation
    if settings.reference is not None:
        images = load_images(settings.reference, image_shape(teacher), say=say)
    elif images is None and settings.features == "digits":
        images = load_images(DataSettings(source="builtin:digits"), teacher.event_shape)
    if images is not None and settings.features != "none" and len(images) < 4:
        raise UserError(f"{images.source}: {len(images)} images to compare with; wanted at least 4")
    return images


def open_teacher(recipe: Recipe, prompts: tuple[str, ...] | None = None, say: Callable[[str], None] = print) -> Teacher:
    """The teacher of a recipe, with its prompts, its guidance and its pipeline's keywords."""
    settings = recipe.guidance
    alone = settings.scale == 1 and settings.range is None
    guidance = None if alone else Guidance(settings.scale, settings.interval, settings.range)
    prompts = load_prompts(recipe.prompts) if prompts is None else prompts
    told: dict[str, Any] = {"prompts": prompts, "call": dict(recipe.pipeline), "say": say}
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
    if settings.range is not None and (teacher.conditions is None or teacher.folder is None):
        raise UserError(
            f"guidance.range: {recipe.teacher} has no pipeline that is called with a guidance_scale; wanted none, and "
            "the one guidance.scale"
        )
    teacher.guidance, teacher.weaker = guidance, weaker
    return teacher


def distill(
    recipe: Recipe, output: Path | str, *, fresh: bool = False, say: Callable[[str], None] = print
) -> Evaluation:
    """Distil, evaluate and export into the folder ``output``; the same call goes on where it was stopped.

    Args:
        fresh: remove what an earlier run left in ``output``.
        say: takes each line that a user should read.

    Raises:
        UserError: on input that can't be used, a folder of another recipe, a damaged checkpoint or a full disk.
        TrainingDivergedError: when the loss is no number any more.
    """
    folder = Path(output)
    accelerator = _accelerator(recipe, folder)
    line = say if accelerator.is_main_process else silent
    changes = check_folder(folder, recipe, fresh=fresh)
    # No process makes the folder before all have looked at it.
    accelerator.wait_for_everyone()
    finished = None if fresh or changes else read_evaluation(folder)
    if finished is not None:
        line(f"{folder} is finished; --fresh starts again")
        line(table(finished))
        line(_how_to_load(folder, recipe))
        return finished
    job = plan(recipe if fresh else pinned(recipe, folder), say=line)
    check_prompts(folder, job.teacher, fresh=fresh)
    line(_describe(job))
    for change in changes:
        line(f"changed  {change}")
    if accelerator.is_main_process:
        make_folder(folder, recipe, fresh=fresh)
        if changes:
            take_changes(folder, recipe)
        keep_commits(folder, job.teacher)
        if isinstance(job.teacher.conditions, Embeddings):
            checkpoint.write_text(folder / PROMPTS, json.dumps(job.teacher.conditions.names, indent=0) + "\n")
    accelerator.wait_for_everyone()
    samples = prepare_samples(recipe, job.teacher, job.images, folder, accelerator, line)
    trainer = Trainer(job.student, job.teacher, recipe, samples, folder, accelerator, line)
    average = partial(trainer.whole_average, recipe.training.ema[0])
    watched = cast("Callable[[], Student]", average)
    monitor = Monitor(watched, job.teacher, recipe, job.reference, folder, accelerator)
    with tracked(accelerator, recipe, folder, steps_done(folder)):
        trainer.run(monitor.reached)
        averages = {rate: trainer.whole_average(rate) for rate in trainer.averages}
        if accelerator.is_main_process:
            job.student = cast("Student", trainer.plain.to(accelerator.device))
            _finish(job, averages, folder, accelerator, line)
        accelerator.wait_for_everyone()
    return cast("Evaluation", read_evaluation(folder))


def _check_training(recipe: Recipe) -> None:
    training = recipe.training
    check_trackers(recipe)
    if training.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("training.precision: fp16 needs a GPU, there is none: take fp32 or bf16")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parts = processes * training.accumulation
    if training.batch_size % parts:
        raise UserError(
            f"training.batch_size {training.batch_size} does not split over {processes} processes "
            f"x {training.accumulation} accumulation steps: take a multiple of {parts}"
        )


def _accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    precision = recipe.training.precision
    _check_training(recipe)
    wanted = {"fp32": "no"}.get(precision, precision)
    before = AcceleratorState._shared_state.get("_mixed_precision", wanted)
    if before != wanted:
        raise UserError(
            f"training.precision: {precision}, but this process has run in {before.replace('no', 'fp32')}, and "
            "accelerate keeps one precision a process: start another"
        )
    accelerator = Accelerator(
        mixed_precision=wanted,
        gradient_accumulation_steps=recipe.training.accumulation,
        log_with=list(recipe.logging.trackers) or None,
        project_config=ProjectConfiguration(str(folder), str(tracker_folder(folder))),
        # Before torch 2.11 a weight cast to half precision without gradients, for a jump to the start, stays in the
        # cache for the call that is to have them, and gets none (pytorch issue 112583).
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), AutocastKwargs(cache_enabled=False)],
    )
    check_sharding(accelerator, recipe.training, recipe.student.lora.rank)
    check_joined(accelerator)
    return accelerator


def check_joined(accelerator: Accelerator) -> None:
    """Refuse processes that were launched together and don't know of one another.

    Raises:
        UserError: with both numbers.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but accelerate joins {accelerator.num_processes}: on CPU set "
            "ACCELERATE_USE_CPU=true, so that they don't run side by side in one folder"
        )


def silent(_: str) -> None:
    """Processes other than the first say nothing."""


def _describe(job: Plan) -> str:
    teacher, training = job.teacher, job.recipe.training
    trained = sum(p.numel() for p in job.student.parameters() if p.requires_grad)
    jump = sum(p.numel() for p in cast("Any", job.student.network).jump_embedding.parameters())
    adapters = trained - jump if job.recipe.student.lora.rank else 0
    parameters = sum(p.numel() for p in job.student.parameters()) - jump - adapters
    lora = f", {adapters:,} in adapters of rank {job.recipe.student.lora.rank}" if adapters else ""
    shape = " x ".join(map(str, teacher.event_shape))
    steps = job.recipe.student.regression_steps + training.steps
    told = "" if teacher.conditions is None else f"; {len(teacher.conditions.names):,} {_conditions_of(teacher)}"
    return (
        f"teacher: {teacher.source} ({teacher.adapter}; {teacher.prediction}; {shape}; {parameters:,} "
        f"parameters{told})\n"
        f"student: {job.student.prediction}, {jump:,} new parameters for the second time{lora}\n"
        f"data:    {describe_data(job.recipe.data, job.images)}\n"
        f"steps:   {steps} of {training.batch_size} samples, loss {job.recipe.loss_names}"
    )


def _conditions_of(teacher: Teacher) -> str:
    kind = "classes" if isinstance(teacher.conditions, Classes) else "prompts"
    if teacher.guidance is None:
        return kind
    low, high = teacher.guidance.range or (None, None)
    span = "" if low is None else f" (an input: {low:g} to {high:g})"
    return f"{kind}, guided by {teacher.guidance.scale:g}{span}"


def _finish(
    job: Plan,
    averages: Mapping[float, LearnedFlowMap],
    folder: Path,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> None:
    """Evaluate the averages, export the best; the student has its weights then."""
    say("evaluating")
    device = accelerator.device
    names = {f"student, ema {rate:g}": rate for rate in averages}
    students = {name: cast("Student", averages[rate].eval()) for name, rate in names.items()}
    measured = evaluate(students, job.teacher, job.recipe.evaluation, job.reference, device, say=say)
    rate, evaluation = choose(measured, names)
    job.student.load_state_dict(averages[rate].state_dict())
    job.student.eval()
    _draw(job, evaluation, folder, device)
    say("exporting")
    if (reason := why_not_folded(job.teacher)) and job.recipe.export.steps:
        say(f"export.steps: only the any-step pipeline is written ({reason})")
    student = folder / "student"
    steps = job.recipe.export.steps
    made = job.recipe.student.regression_steps + job.recipe.training.steps
    differences = _export(job, student, steps, folder, evaluation, made)
    evaluation.protocol["reloaded_largest_pixel_difference"] = max(differences.values())
    checkpoint.write_text(folder / "evaluation.json", json.dumps(evaluation.to_json(), indent=2) + "\n")
    log_rows(accelerator, evaluation.to_json()["rows"], made)
    log_picture(accelerator, folder / "samples.png", made)
    say(table(evaluation))
    say(f"reloaded with stock diffusers: largest difference of a pixel {max(differences.values()):.1e}")
    say(_how_to_load(folder, job.recipe))


def _export(
    job: Plan, target: Path, steps: tuple[int, ...], run: Path, evaluation: Evaluation | None, made: int
) -> dict[str, float]:
    """Write, describe and verify; of a student with adapters the merged weights, and the adapters beside them."""
    about = about_student(job.student, job.teacher, job.recipe, steps, run, made)
    # Pipelines are opened on the CPU, and this is the last that is done with the two.
    job.teacher.to("cpu")
    job.student.to("cpu")
    adapted = has_lora(job.student.network)
    student = merged(job.student) if adapted else job.student
    teacher = replace(job.teacher, network=stock_part(student.network)) if adapted else job.teacher
    export_pipeline(student, teacher, target, steps)
    if adapted:
        write_lora(job.student, teacher, target)
    write_card(target, about, evaluation, run)
    return verify(student, teacher, target, steps)


def _draw(job: Plan, evaluation: Evaluation, folder: Path, device: torch.device) -> None:
    settings = job.recipe.evaluation
    rows = Gallery(job.teacher, settings.endpoint_solver_steps, COLUMNS, SEED, device).rows(job.student, settings.steps)
    with checkpoint.writing(folder / "samples.png"):
        draw_samples(rows, folder / "samples.png")
        draw_steps(evaluation, folder / "steps.png")


def _how_to_load(folder: Path, recipe: Recipe) -> str:
    n = recipe.export.steps[-1] if recipe.export.steps else 0
    folded = folder / "student" / f"steps-{n}"
    lines = ["load it with diffusers alone (README.md there has the whole call):"]
    lines += ["  from diffusers import DiffusionPipeline"]
    if folded.is_dir():
        lines += [f'  pipeline = DiffusionPipeline.from_pretrained("{folded}")  # num_inference_steps={n}']
    lines += [
        "or, for any number of steps:",
        f'  pipeline = DiffusionPipeline.from_pretrained("{folder / "student"}", trust_remote_code=True)',
    ]
    return "\n".join(lines)


def open_run(
    folder: Path | str,
    guidance: float | None = None,
    say: Callable[[str], None] = print,
    evaluation: Mapping[str, Any] | None = None,
) -> Plan:
    """The teacher of a run and its averaged student at the newest checkpoint.

    Of several averages the one that the run's evaluation chose; before that the first.

    Args:
        guidance: another scale of a run with ``guidance.range`` than its recipe's.
        evaluation: settings of the evaluation that are other than the recipe's.

    Raises:
        UserError: if the folder is no run, has no checkpoint yet, or holds other weights; on a scale outside the range.
    """
    folder = Path(folder)
    recipe = at_guidance(with_evaluation(kept_recipe(folder), evaluation, str(folder)), guidance)
    # Before the teacher is opened, which takes long.
    found = checkpoint.newest_whole(folder / "checkpoints", say)
    if found is None:
        raise UserError(f"{folder} has no checkpoint yet; run the same distillation command to go on")
    path, kept = found
    job = plan(pinned(recipe, folder), kept_prompts(folder), say)
    measured = read_evaluation(folder)
    rate = recipe.training.ema[0] if measured is None else measured.protocol["ema"]
    average = kept.tensors.get(checkpoint.average_name(rate), {})
    try:
        weights = {name: value for name, value in average.items() if name != "n_averaged"}
        load_trained(job.student, job.student, weights)
    except KeyError as error:
        raise UserError(
            f"{path} holds the weights of another network than this recipe's student, or those of an earlier version "
            "of fmm_distill: distil again into another --output"
        ) from error
    return job


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


def draw_run(
    folder: Path | str, steps: tuple[int, ...], count: int, seed: int, picture: Path, guidance: float | None = None
) -> None:
    """Draw images of a run's averaged student and of its teacher's ODE, same noise in each column."""
    job = open_run(folder, guidance)
    solver_steps = job.recipe.evaluation.endpoint_solver_steps
    rows = Gallery(job.teacher, solver_steps, count, seed, torch.device("cpu")).rows(job.student, steps)
    with checkpoint.writing(picture):
        draw_samples(rows, picture)


def export_run(
    folder: Path | str, target: Path, steps: tuple[int, ...] | None = None, guidance: float | None = None
) -> dict[str, float]:
    """Export a run's averaged student at its newest checkpoint; gives the differences after reloading."""
    job = open_run(folder, guidance)
    folded = job.recipe.export.steps if steps is None else steps
    # The run's numbers are of one scale of guidance.
    evaluation = None if guidance is not None else read_evaluation(Path(folder))
    return _export(job, target, folded, Path(folder), evaluation, steps_done(Path(folder)))


def forecast(recipe: Recipe, folder: Path) -> str:
    """The resolved recipe and what a run of it would do, without doing it."""
    job = plan(recipe)
    processes, training = int(os.environ.get("WORLD_SIZE", "1")), recipe.training
    if training.gradient_checkpointing:
        checkpoint_blocks(job.student)
    memory = forecast_memory(job.student, job.teacher, recipe, processes)
    part = training.batch_size // (processes * training.accumulation)
    needed = disk_bytes(recipe, job.teacher, job.images)
    disk = f"disk:    {mebibytes(needed)} of trajectories or latents, kept for later starts\n" if needed else ""
    return (
        f"{recipe.to_yaml()}\n{_describe(job)}\n"
        f"memory:  {memory} ({part} samples at a time in each of {processes} processes)\n"
        f"{disk}output:  {folder}\nnothing was run (--dry-run)"
    )
