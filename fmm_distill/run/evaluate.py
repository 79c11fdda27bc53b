"""What ``fmm-distill evaluate`` is asked about (a run, an exported student here or on the Hub), opened and measured."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import constants, hf_hub_download

from fmm_distill.config.recipe import Recipe
from fmm_distill.config.settings import DataSettings, PromptSettings
from fmm_distill.core.torch_state import own_state
from fmm_distill.data.prompts import load_prompts
from fmm_distill.data.samples import load_images
from fmm_distill.errors import UserError
from fmm_distill.evaluation.gallery import COLUMNS, SEED, Gallery
from fmm_distill.evaluation.html_report import write_report
from fmm_distill.evaluation.measure import Measure, check_evaluation, check_evaluation_steps, image_shape
from fmm_distill.evaluation.pictures import DRAWN, draw_samples, draw_steps
from fmm_distill.evaluation.result import Evaluation
from fmm_distill.evaluation.samplers import of_students, of_teacher, steps_within
from fmm_distill.evaluation.stock import about_sampler, other_pipeline, reference_pipeline
from fmm_distill.export.load import fetch_student, load_student
from fmm_distill.export.manifest import ABOUT, read_about
from fmm_distill.io.files import writing
from fmm_distill.run.folder import read_recipe
from fmm_distill.run.plan import at_guidance, open_reference, open_teacher, with_evaluation
from fmm_distill.run.reopen import open_run
from fmm_distill.teachers.hub.errors import HUB_ERRORS
from fmm_distill.training.process import first_process_logs, join_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fmm_distill.config.settings import EvaluationSettings
    from fmm_distill.data.samples import Images
    from fmm_distill.evaluation.samplers import Sampler
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["Asked", "Subject", "measure_subject", "open_subject"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What is wanted to be known.

    Attributes:
        against_teacher: with rows of the teacher: its solvers, and its own pipeline as the reference.
        also: other pipelines or students, by id or folder, at ``also_steps``; none: at the student's.
        teacher_steps: of the reference; None: its pipeline's own number.
        guidance: a scale of a run with a range of them.
        prompts: a file of prompts, for an exported student; None: those of its recipe.
        evaluation: changes of the recipe's settings.
    """

    against_teacher: bool = True
    also: tuple[str, ...] = ()
    also_steps: tuple[int, ...] = ()
    teacher_steps: int | None = None
    guidance: float | None = None
    prompts: str | None = None
    evaluation: dict[str, Any] | None = None


@dataclass(frozen=True)
class Subject:
    """A student, and what it is measured with.

    Attributes:
        knows_ode: the teacher is the one that it was distilled from, not the student's own diagonal.
    """

    source: str
    student: Student
    teacher: Teacher
    settings: EvaluationSettings
    reference: Images | None
    knows_ode: bool


@own_state()
def open_subject(source: str, asked: Asked) -> Subject:
    """The student of a run folder, of an exported folder or of the Hub, its teacher and its reference.

    Raises:
        UserError: if it is none of these, or what is asked can't be measured.
    """
    folder = Path(source).expanduser()
    if (folder / ABOUT).is_file():
        return _open_exported(source, folder, asked)
    if folder.is_dir() or source.count("/") != 1 or source.startswith((".", "~", "/")):
        job = open_run(folder, asked.guidance, asked.evaluation)
        return Subject(source, job.student, job.teacher, job.recipe.evaluation, job.reference, knows_ode=True)
    return _open_exported(source, fetch_student(source), asked)


def _open_exported(source: str, folder: Path, asked: Asked) -> Subject:
    about = read_about(folder)
    recipe = (
        read_recipe(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else Recipe(teacher=about.teacher)
    )
    recipe = with_evaluation(recipe, asked.evaluation, source)
    if recipe.evaluation.reference is not None or recipe.evaluation.features == "none":
        recipe = recipe.model_copy(update={"data": DataSettings()})
    recipe = recipe.model_copy(update={"teacher": about.teacher, "revision": about.revision})
    recipe = at_guidance(recipe, asked.guidance)
    prompts = _prompts(recipe, asked)
    loaded = load_student(folder, prompts=prompts)
    if asked.against_teacher:
        teacher = open_teacher(recipe, prompts)
    else:
        teacher = loaded.teacher
        logger.info("the teacher is not opened (--against none): no rows of it, and no endpoint error")
    check_evaluation(recipe.evaluation, teacher)
    images = None
    if recipe.data.has_images and recipe.evaluation.features != "none":
        images = load_images(recipe.data.model_copy(update={"condition": None}), image_shape(teacher))
    reference = open_reference(recipe, teacher, images)
    return Subject(source, loaded.flow_map, teacher, recipe.evaluation, reference, knows_ode=asked.against_teacher)


def _prompts(recipe: Recipe, asked: Asked) -> tuple[str, ...]:
    if asked.prompts is not None:
        return load_prompts(PromptSettings(file=asked.prompts))
    file = recipe.prompts.file
    if file is not None and not Path(file).expanduser().is_file():
        logger.warning(
            f"the prompts of its recipe ({file}) are not here: it is asked for the empty prompt (--prompts FILE)"
        )
        return ()
    return load_prompts(recipe.prompts)


@own_state()
def measure_subject(subject: Subject, asked: Asked, report: Path | None = None) -> Evaluation | None:
    """Measure a student beside what one would otherwise use.

    Args:
        report: a folder that gets pictures and ``report.html``.

    Returns:
        The evaluation; None in processes other than the first.

    Raises:
        UserError: on a pipeline beside it that can't be opened or makes other images.
    """
    accelerator = join_processes()
    with first_process_logs(accelerator):
        return _measure(subject, asked, report, accelerator)


def _measure(subject: Subject, asked: Asked, report: Path | None, accelerator: Accelerator) -> Evaluation | None:
    # The first process computes metrics, the ODE's end and pictures while the others wait for it.
    device, teacher = accelerator.device, subject.teacher.to(accelerator.device)
    student = subject.student.to(device).eval()
    settings = subject.settings.model_copy(update=steps_within(teacher, subject.settings.steps))
    if not asked.against_teacher:
        settings = settings.model_copy(update=dict.fromkeys(steps_within(teacher, (1,)), ()))
    samplers = of_students({"student": student}, settings.steps, follows_ode=subject.knows_ode)
    samplers += of_teacher(teacher, settings)
    reference = _reference(teacher, asked, device)
    samplers += [] if reference is None else [reference]
    for source in dict.fromkeys(asked.also):
        samplers += _beside(source, teacher, asked.also_steps or settings.steps, device)
    measure = Measure(
        teacher,
        settings,
        subject.reference,
        device,
        knows_ode=subject.knows_ode,
        decodes=any(sampler.makes_images for sampler in samplers),
        keep=Path(constants.HF_HOME) / "fmm_distill" / "evaluation",
        accelerator=accelerator,
    )
    rows = measure.of(samplers, reference)
    measure.protocol["of"] = subject.source
    measure.protocol["reference_sampler"] = None if reference is None else about_sampler(reference)
    others = [about_sampler(sampler) for sampler in samplers if sampler.name in asked.also]
    measure.protocol["also"] = others or None
    if not accelerator.is_main_process:
        return None
    evaluation = Evaluation(measure.protocol, rows, measure.consistency)
    if report is not None:
        _draw(evaluation, subject, student, report, device)
    measure.remove_kept()
    return evaluation


def _reference(teacher: Teacher, asked: Asked, device: torch.device) -> Sampler | None:
    if not asked.against_teacher:
        return None
    if asked.teacher_steps is not None:
        check_evaluation_steps("--teacher-steps", (asked.teacher_steps,), teacher)
    try:
        return reference_pipeline(teacher, device, asked.teacher_steps)
    except UserError as error:
        logger.warning(f"no row of the teacher's own sampler, and no ratios to it: {error}")
        return None


def _beside(source: str, teacher: Teacher, steps: tuple[int, ...], device: torch.device) -> list[Sampler]:
    if not _holds_student(source):
        return other_pipeline(source, teacher, device, steps)
    loaded = load_student(source, prompts=() if teacher.conditions is None else teacher.conditions.names)
    if loaded.event_shape != teacher.event_shape:
        raise UserError(
            f"--also {source}: its samples have shape {loaded.event_shape}, the teacher's {teacher.event_shape}; "
            "wanted a student of the same noises"
        )
    check_evaluation_steps(f"--also {source}: steps", steps, teacher)
    same = loaded.about.teacher == teacher.source
    return of_students({source: loaded.flow_map.to(device).eval()}, steps, follows_ode=same)


def _holds_student(source: str) -> bool:
    """Whether fmm_distill exported what is there."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return (folder / ABOUT).is_file()
    try:
        hf_hub_download(source, ABOUT)
    except (*HUB_ERRORS, ValueError):
        # It is opened as a pipeline then, which says what is wrong with it.
        return False
    return True


def _draw(evaluation: Evaluation, subject: Subject, student: Student, folder: Path, device: torch.device) -> None:
    settings = subject.settings
    gallery = Gallery(subject.teacher, settings.endpoint_solver_steps, COLUMNS, SEED, device)
    if not subject.knows_ode:
        gallery.name = "student's ODE"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        draw_steps(evaluation, folder / "steps.png", DRAWN)
        draw_samples(gallery.rows(student, settings.steps), folder / "samples.png")
        draw_samples(gallery.interpolation(student, settings.steps), folder / "interpolation.png")
    write_report(evaluation, folder)
