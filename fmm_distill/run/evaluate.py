"""``fmm-distill evaluate``: open a run or an exported student, here or on the Hub, and measure it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download

from fmm_distill.config.recipe import Recipe
from fmm_distill.config.settings import DataSettings, IpAdapterSettings, PromptSettings
from fmm_distill.core.torch_state import own_state
from fmm_distill.data.prompts import load_prompts
from fmm_distill.data.samples import load_images
from fmm_distill.errors import UserError
from fmm_distill.evaluation.checks import check_evaluation, check_evaluation_steps, image_shape
from fmm_distill.evaluation.evaluator import EvaluationSpec, Evaluator
from fmm_distill.evaluation.gallery import COLUMNS, SEED, Gallery
from fmm_distill.evaluation.html_report import write_report
from fmm_distill.evaluation.pictures import PLOTTED, plot_samples, plot_steps
from fmm_distill.evaluation.result import Evaluation
from fmm_distill.evaluation.samplers import of_students, of_teacher
from fmm_distill.evaluation.solvers import steps_within
from fmm_distill.evaluation.stock import other_pipeline, reference_pipeline
from fmm_distill.export.adapter_code import own_adapter
from fmm_distill.export.load import fetch_student, load_student
from fmm_distill.export.manifest import MANIFEST, read_manifest
from fmm_distill.io.cache import cache_path
from fmm_distill.io.files import writing
from fmm_distill.run.folder import read_recipe
from fmm_distill.run.plan import at_guidance, open_reference, open_teacher, with_evaluation
from fmm_distill.run.reopen import open_run
from fmm_distill.teachers.conditions import Embeddings
from fmm_distill.teachers.hub.errors import HUB_ERRORS
from fmm_distill.teachers.prompts import Prompts
from fmm_distill.training.process import first_process_logs, join_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fmm_distill.config.settings import EvaluationSettings
    from fmm_distill.data.samples import Images
    from fmm_distill.evaluation.samplers import Sampler
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["EvaluationRequest", "EvaluationTarget", "measure_target", "open_target"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationRequest:
    """The options of one evaluation.

    Attributes:
        against_teacher: measure the teacher too: its solvers, and its own pipeline as the reference.
        also: Hub ids or folders of other pipelines or students to measure.
        also_steps: the numbers of steps of ``also``; empty: the student's.
        teacher_steps: the number of steps of the reference; None: the default of its pipeline.
        guidance: the guidance scale, for a run with ``guidance.range``; None: the recipe's.
        prompts: a file of prompts, for an exported student; of one with images, a table with the columns of its recipe;
            None: the recipe's.
        evaluation: settings of the recipe's group ``evaluation`` to replace.
    """

    against_teacher: bool = True
    also: tuple[str, ...] = ()
    also_steps: tuple[int, ...] = ()
    teacher_steps: int | None = None
    guidance: float | None = None
    prompts: str | None = None
    evaluation: dict[str, Any] | None = None


@dataclass(frozen=True)
class EvaluationTarget:
    """A student to evaluate, with its teacher, its settings and its reference images.

    Attributes:
        source: the folder or Hub id that it was opened from.
        knows_ode: the teacher is the pretrained one. Otherwise it is the student's own diagonal u(x, t, t), whose ODE
            has no endpoints to compare with.
    """

    source: str
    student: Student
    teacher: Teacher
    settings: EvaluationSettings
    reference: Images | None
    knows_ode: bool


@own_state()
def open_target(source: str, request: EvaluationRequest) -> EvaluationTarget:
    """Open the student of a run folder, of an exported folder or of the Hub, its teacher and its reference images.

    Raises:
        UserError: if ``source`` is none of these, or the request doesn't fit it.
    """
    folder = Path(source).expanduser()
    if (folder / MANIFEST).is_file():
        return _open_exported(source, folder, request)
    if folder.is_dir() or source.count("/") != 1 or source.startswith((".", "~", "/")):
        job = open_run(folder, request.guidance, request.evaluation)
        return EvaluationTarget(source, job.student, job.teacher, job.recipe.evaluation, job.reference, knows_ode=True)
    return _open_exported(source, fetch_student(source), request)


def _open_exported(source: str, folder: Path, request: EvaluationRequest) -> EvaluationTarget:
    manifest = read_manifest(folder)
    recipe = (
        read_recipe(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else Recipe(teacher=manifest.teacher)
    )
    recipe = with_evaluation(recipe, request.evaluation, source)
    if recipe.evaluation.reference is not None or recipe.evaluation.features == "none":
        recipe = recipe.model_copy(update={"data": DataSettings()})
    # The manifest has the commit that was distilled; a branch in the recipe may have moved.
    recipe = recipe.model_copy(update={"teacher": manifest.teacher, "revision": manifest.revision})
    if manifest.ip_adapter is not None:
        # The copy in the folder: the adapter's own source may be on another machine.
        own = own_adapter(str(folder), manifest.ip_adapter).to_json()
        del own["license"]
        recipe = recipe.model_copy(update={"ip_adapter": IpAdapterSettings(**own)})
    recipe = at_guidance(recipe, request.guidance)
    prompts = _prompts(recipe, request)
    loaded = load_student(folder, prompts=prompts)
    if request.against_teacher:
        teacher = open_teacher(recipe, prompts)
    else:
        teacher = loaded.teacher
        logger.info("--against none: the teacher is not loaded, so its rows and the endpoint error are left out")
    check_evaluation(recipe.evaluation, teacher)
    images = None
    if recipe.data.has_images and recipe.evaluation.features != "none":
        images = load_images(recipe.data.model_copy(update={"condition": None}), image_shape(teacher))
    reference = open_reference(recipe, teacher, images)
    return EvaluationTarget(
        source, loaded.flow_map, teacher, recipe.evaluation, reference, knows_ode=request.against_teacher
    )


def _prompts(recipe: Recipe, request: EvaluationRequest) -> Prompts:
    settings = recipe.prompts
    if settings.images:
        try:
            return load_prompts(settings.model_copy(update={"dataset": request.prompts or settings.dataset}))
        except UserError as error:
            columns = ", ".join(name for name in (settings.column, *settings.images.values()) if name is not None)
            advice = f"--prompts FILE sets another table with the columns {columns}"
            raise UserError(f"{error}; {advice}" if request.prompts is None else str(error)) from error
    if request.prompts is not None:
        return load_prompts(PromptSettings(file=request.prompts))
    file = settings.file
    if file is not None and not Path(file).expanduser().is_file():
        logger.warning(
            f"{file}: the recipe's prompts are not on this machine; using the empty prompt (--prompts FILE sets others)"
        )
        return Prompts(())
    return load_prompts(settings)


@own_state()
def measure_target(
    target: EvaluationTarget, request: EvaluationRequest, report: Path | None = None
) -> Evaluation | None:
    """Measure a student, its teacher's solvers and other pipelines on the same noises.

    Args:
        report: a folder for pictures and ``report.html``; None: none are made.

    Returns:
        The evaluation; None in processes other than the first.

    Raises:
        UserError: if another pipeline can't be opened, or its samples have another shape.
    """
    accelerator = join_processes()
    with first_process_logs(accelerator):
        return _measure(target, request, report, accelerator)


def _measure(
    target: EvaluationTarget, request: EvaluationRequest, report: Path | None, accelerator: Accelerator
) -> Evaluation | None:
    # All processes generate samples; the first one alone computes metrics, ODE endpoints and pictures.
    device, teacher = accelerator.device, target.teacher.to(accelerator.device)
    student = target.student.to(device).eval()
    settings = target.settings.model_copy(update=steps_within(teacher, target.settings.steps))
    if not request.against_teacher:
        settings = settings.model_copy(update=dict.fromkeys(steps_within(teacher, (1,)), ()))
    follows, stochasticity = target.knows_ode, settings.stochasticity
    samplers = of_students({"student": student}, settings.steps, follows_ode=follows, stochasticity=stochasticity)
    samplers += of_teacher(teacher, settings)
    reference = _reference(teacher, request, device)
    samplers += [] if reference is None else [reference]
    for source in dict.fromkeys(request.also):
        samplers += _samplers_of(source, teacher, request.also_steps or settings.steps, device)
    spec = EvaluationSpec(
        teacher,
        settings,
        target.reference,
        device,
        solves_ode=target.knows_ode,
        decodes=any(sampler.makes_images for sampler in samplers),
        cache=cache_path("evaluation"),
        accelerator=accelerator,
    )
    evaluator = Evaluator(spec)
    rows = evaluator.rows(samplers, reference)
    evaluator.protocol["student"] = target.source
    evaluator.protocol["reference_sampler"] = None if reference is None else reference.description
    others = [sampler.description for sampler in samplers if sampler.name in request.also]
    evaluator.protocol["also"] = others or None
    if not accelerator.is_main_process:
        return None
    evaluation = Evaluation(evaluator.protocol, rows, evaluator.consistency)
    if report is not None:
        _write_report(evaluation, target, student, report, device)
    # Last: a call that is interrupted before this line resumes from the cached samples.
    evaluator.clear_cache()
    return evaluation


def _reference(teacher: Teacher, request: EvaluationRequest, device: torch.device) -> Sampler | None:
    if not request.against_teacher:
        return None
    if request.teacher_steps is not None:
        check_evaluation_steps("--teacher-steps", (request.teacher_steps,), teacher)
    try:
        return reference_pipeline(teacher, device, request.teacher_steps)
    except UserError as error:
        logger.warning(f"the teacher's own pipeline is left out, and so are the ratios to it: {error}")
        return None


def _samplers_of(source: str, teacher: Teacher, steps: tuple[int, ...], device: torch.device) -> list[Sampler]:
    if not _holds_student(source):
        return other_pipeline(source, teacher, device, steps)
    conditions = teacher.conditions
    loaded = load_student(source, prompts=conditions.given if isinstance(conditions, Embeddings) else ())
    if loaded.event_shape != teacher.event_shape:
        raise UserError(
            f"--also {source}: expected samples of the teacher's shape {teacher.event_shape}, got "
            f"{loaded.event_shape}; choose a student of such a teacher"
        )
    check_evaluation_steps(f"--also {source}: steps", steps, teacher)
    same = loaded.manifest.teacher == teacher.source
    return of_students({source: loaded.flow_map.to(device).eval()}, steps, follows_ode=same)


def _holds_student(source: str) -> bool:
    """Tell an exported student from any other pipeline by its manifest."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return (folder / MANIFEST).is_file()
    try:
        hf_hub_download(source, MANIFEST)
    except (*HUB_ERRORS, ValueError):
        # Opening it as a pipeline reports what is wrong with it.
        return False
    return True


def _write_report(
    evaluation: Evaluation, target: EvaluationTarget, student: Student, folder: Path, device: torch.device
) -> None:
    settings = target.settings
    gallery = Gallery(target.teacher, settings.endpoint_solver_steps, COLUMNS, SEED, device)
    if not target.knows_ode:
        gallery.name = "student's ODE"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        plot_steps(evaluation, folder / "steps.png", PLOTTED)
        plot_samples(gallery.rows(student, settings.steps, settings.stochasticity), folder / "samples.png")
        plot_samples(gallery.interpolation(student, settings.steps), folder / "interpolation.png")
    write_report(evaluation, folder)
