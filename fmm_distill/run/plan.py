"""The plan of a run: teacher, data and student, opened and checked before anything long starts."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmm_distill.config.recipe import parse
from fmm_distill.config.settings import DataSettings
from fmm_distill.core.flow_map import LearnedFlowMap
from fmm_distill.core.schedules import VariancePreserving
from fmm_distill.core.staged import stages_of
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
from fmm_distill.run.earlier import EarlierStudent, read_earlier
from fmm_distill.run.given import Given
from fmm_distill.run.trial import trial_bytes, try_export
from fmm_distill.student.lora import add_lora
from fmm_distill.student.scaled import ScaledWeights, is_scaled
from fmm_distill.student.scaled_adapters import share_network
from fmm_distill.student.student import Student, is_new
from fmm_distill.teachers.first_timesteps import on_first_timesteps
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.ip_adapter import IpAdapter
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.prompts import Prompts
from fmm_distill.training.compile import checkpoint_blocks
from fmm_distill.training.fsdp import splits_weights
from fmm_distill.training.memory import forecast_memory
from fmm_distill.training.optimizer import optimizer_factory
from fmm_distill.training.process import check_training
from fmm_distill.training.variables import launched

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.data.samples import Images
    from fmm_distill.teachers.base import Teacher

__all__ = [
    "Plan",
    "at_guidance",
    "forecast",
    "open_reference",
    "open_student",
    "open_teacher",
    "plan",
    "with_evaluation",
]

logger = logging.getLogger(__name__)

# The fewest images that a Fréchet distance is computed from.
_FEWEST = 4


@dataclass
class Plan:
    """A recipe with its teacher, data and student, checked against each other.

    Attributes:
        recipe: with the commit of an earlier student on the Hub.
        reference: images that samples are compared with; None: there are none.
        optimizer: the name of the optimizer's class.
        earlier: the student that this one starts from; None: it starts as its teacher.
    """

    recipe: Recipe
    teacher: Teacher
    student: Student
    images: Images | None
    reference: Images | None
    optimizer: str
    earlier: EarlierStudent | None = None

    def __str__(self) -> str:
        """Return the first lines of a run: teacher, student, data, steps and formats of the export."""
        teacher, counts = self.teacher, self._parameters()
        shape = " x ".join(map(str, teacher.event_shape))
        conditions = (
            "" if teacher.conditions is None else f"; {len(teacher.conditions.names):,} {_conditions_of(teacher)}"
        )
        lines = [
            f"teacher: {teacher.source} ({teacher.adapter}; {teacher.prediction}; {shape}; {counts['teacher']:,} "
            f"parameters{conditions})",
            f"student: {self.student.prediction}, {self._second_time()}",
            *([] if self.earlier is None else [f"start:   the student {self.earlier}"]),
            f"data:    {describe_data(self.recipe.data, self.images)}",
            f"steps:   {self._steps()}",
            f"export:  {describe_export(exporter_of(teacher), self.recipe.export.steps)}",
        ]
        return "\n".join(lines)

    def _steps(self) -> str:
        """Describe the steps of all stages."""
        recipe, matching = self.recipe, self.recipe.matching
        samples = f"of {recipe.training.batch_size} samples"
        second = ""
        if matching is not None:
            updates = f"{matching.critic.warmup_steps} updates of a critic and "
            second = f"{updates}{matching.steps} steps of {matching.loss.name}"
        if recipe.map_steps == 0:
            return f"{second}, each {samples}"
        then = f", then {second}" if second else ""
        return f"{recipe.map_steps} {samples}, loss {recipe.loss_names}{then}"

    def _second_time(self) -> str:
        """Describe how the student depends on the second time, with its numbers of parameters."""
        counts, rank = self._parameters(), self.recipe.student.lora.rank
        if not is_scaled(self.student.network):
            lora = f", {counts['adapters']:,} in adapters of rank {rank}" if rank else ""
            return f"{counts['jump']:,} new parameters for the second time{lora}"
        changes = f"changes of rank {rank}" if rank else "changes"
        return f"weights that change with the length of the jump, {counts['jump']:,} parameters of {changes}"

    def _parameters(self) -> dict[str, int]:
        """Return how many parameters are the teacher's, the second time's and the adapters'."""
        student = self.student
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
        if is_scaled(student.network):
            new = sum(p.numel() for name, p in student.network.named_parameters() if is_new(name))
            return {"teacher": sum(p.numel() for p in student.parameters()) - new, "jump": new, "adapters": 0}
        # A flow map of the user's own has the second time everywhere.
        jump = sum(
            p.numel() for part in stages_of(student.network) for p in getattr(part, "jump_embedding", part).parameters()
        )
        adapters = trained - jump if self.recipe.student.lora.rank else 0
        return {"teacher": sum(p.numel() for p in student.parameters()) - jump - adapters, "jump": jump} | {
            "adapters": adapters
        }


def plan(
    recipe: Recipe,
    prompts: Prompts | None = None,
    given: Given | None = None,
) -> Plan:
    """Open the teacher and the data of a recipe, make the student, and check all of it.

    Args:
        prompts: those of a run that was begun before; None: the recipe's.
        given: a teacher and a network for the student from Python.

    Raises:
        UserError: on anything in the recipe that this teacher or this machine can't do.
    """
    given = given or Given()
    # In the order of cost: settings, then tables, then networks.
    check_training(recipe)
    earlier = read_earlier(recipe)
    if earlier is not None and earlier.commit is not None:
        changed = recipe.student.model_copy(update={"init_revision": earlier.commit})
        recipe = recipe.model_copy(update={"student": changed})
    data = recipe.data
    table = open_table(data) if data.has_images and not data.source.startswith("builtin:") else None
    if prompts is None and table is not None and data.condition is not None:
        prompts = Prompts(captions_of(table, data.condition))
    own = given.open_teacher(recipe)
    teacher = open_teacher(recipe, prompts) if own is None else on_first_timesteps(own, recipe.timesteps)
    _check_teacher(recipe, teacher, earlier)
    images = open_images(data, teacher, table)
    reference = open_reference(recipe, teacher, images)
    student, teacher = open_student(recipe, teacher, given, earlier)
    factory = given.optimizer or optimizer_factory(recipe.optimizer)
    # An optimizer that does not take these parameters refuses them here, before the long preparations.
    optimizer = factory([parameter for parameter in student.parameters() if parameter.requires_grad])
    return Plan(recipe, teacher, student, images, reference, type(optimizer).__name__, earlier)


def _check_teacher(recipe: Recipe, teacher: Teacher, earlier: EarlierStudent | None) -> None:
    """Refuse what the recipe expects of this teacher and it can't do, before data are opened."""
    prediction = recipe.student.prediction
    if earlier is not None:
        earlier.check(recipe, teacher)
    # An earlier student of this prediction has learned the change.
    elif prediction not in ("teacher", teacher.prediction) and recipe.student.regression_steps == 0:
        raise UserError(
            f"student.prediction: {prediction} differs from the teacher's {teacher.prediction}, and "
            "student.regression_steps is 0: give it steps to learn the change, e.g. --set student.regression_steps=500"
        )
    check_evaluation(recipe.evaluation, teacher)
    settings = recipe.evaluation
    solvers = settings.ddim_steps, settings.dpmsolver_steps, settings.unipc_steps, settings.heun_steps
    if any(solvers) and not teacher.scheduler_config and isinstance(teacher.schedule, VariancePreserving):
        # Stock schedulers would be built with their default noise levels, which are another model's.
        raise UserError(
            f"{teacher.source}: expected the configuration of its diffusers scheduler (Teacher.scheduler_config) for "
            "the teacher's own rows of the evaluation; pass it, or set evaluation.ddim_steps and dpmsolver_steps to []"
        )
    if exporter_of(teacher).not_any_step is None:
        check_steps(recipe.export.steps, teacher.schedule)
    if recipe.matching is not None:
        # The grid refuses a number of steps that this schedule does not have.
        for steps in recipe.matching.rollout.steps:
            teacher.schedule.grid(steps)


def open_student(
    recipe: Recipe, teacher: Teacher, given: Given, earlier: EarlierStudent | None = None
) -> tuple[Student, Teacher]:
    """Make the student of a recipe, with its adapters, and return it with the teacher that shares them.

    Args:
        earlier: the student whose weights it starts with; None: it is read, where the recipe has one.
    """
    earlier = earlier or read_earlier(recipe)
    original, scaled = teacher, _scaled_weights(recipe, teacher, given, earlier)
    prediction, seed = recipe.student.prediction, recipe.training.seed
    student = Student.from_teacher(teacher, prediction, network=given.student, scaled=scaled, seed=seed)
    network, training = student.network, recipe.training
    parts = stages_of(network)
    if len(parts) > 1 and splits_weights():
        raise UserError(
            f"{teacher.source}: expected a teacher with one network under FSDP, got two: processes whose samples are "
            "of one of them alone would wait for the others; try plain multi-GPU, with student.lora.rank"
        )
    if training.gradient_checkpointing and not all(hasattr(part, "enable_gradient_checkpointing") for part in parts):
        raise UserError(
            f"training.gradient_checkpointing: expected a diffusers network, got {type(network).__name__}; leave it out"
        )
    lora = recipe.student.lora
    if scaled is None and lora.rank:
        teacher = add_lora(student, teacher, lora.rank, lora.targets, seed=seed)
    # A regression trains the weights themselves. Under FSDP the first process evaluates the teacher alone, which it
    # can't do with weights that are split over all.
    elif scaled is not None and (scaled.rank or not scaled.diagonal) and not splits_weights():
        teacher = share_network(student, teacher)
    if earlier is not None:
        earlier.load_into(student, recipe, original)
    return student, teacher


def _scaled_weights(
    recipe: Recipe, teacher: Teacher, given: Given, earlier: EarlierStudent | None
) -> ScaledWeights | None:
    """Return the changes of the weights of a scaled student; None: the student is an embedded one."""
    settings = recipe.student
    if recipe.student_kind == "embedded":
        return None
    reasons = {
        "guidance": teacher.guidance is not None,
        "another prediction": settings.prediction not in ("teacher", teacher.prediction),
        "the velocity of a new network": given.student is not None,
    }
    needed = [name for name, holds in reasons.items() if holds]
    problem, advice = None, "student.kind=embedded"
    if isinstance(given.student, LearnedFlowMap):
        problem = "a LearnedFlowMap takes h itself"
    elif needed and not settings.regression_steps and (unknown := _why_unknown(recipe, teacher, earlier)) is not None:
        problem = f"{' and '.join(needed)} has to be learned at h = 0, and student.regression_steps is 0{unknown}"
        advice = "student.regression_steps=500, or student.kind=embedded"
    if problem is None:
        if settings.regression_steps and not needed:
            raise UserError(
                f"student.regression_steps: expected 0 for a scaled student, which equals this teacher at h = 0, got "
                f"{settings.regression_steps}; try --set student.regression_steps=0"
            )
        if settings.lora.rank and recipe.time_sampling.groups:
            logger.warning("time_sampling.groups: no step is faster with adapters, whose layers form no weights")
        return ScaledWeights(settings.lora.rank, settings.lora.targets, diagonal=bool(needed))
    if settings.kind == "scaled" or (earlier is not None and earlier.form.kind == "scaled"):
        raise UserError(f"student.kind: expected embedded, got scaled: {problem}; try --set {advice}")
    _check_embedded(recipe)
    logger.info(f"student.kind: embedded ({problem})")
    return None


def _why_unknown(recipe: Recipe, teacher: Teacher, earlier: EarlierStudent | None) -> str | None:
    """Return why a student is not right at h = 0 without a regression, as a part of a sentence; None: it is."""
    if earlier is None:
        return ""
    reason = earlier.why_not_at_zero(recipe, teacher)
    return None if reason is None else f" (of student.init {earlier.source}: {reason})"


def _check_embedded(recipe: Recipe) -> None:
    """Check what the recipe could leave out for a scaled student."""
    try:
        recipe.check_velocity()
    except ValueError as error:
        raise UserError(str(error)) from error
    if recipe.time_sampling.groups:
        raise UserError("time_sampling.groups: expected a scaled student, got an embedded one; leave groups out")


def open_reference(recipe: Recipe, teacher: Teacher, images: Images | None) -> Images | None:
    """Open the images that samples are compared with: the recipe's reference, its data, or the built-in digits.

    Args:
        images: those of the recipe's data, where they are open.
    """
    settings = recipe.evaluation
    if settings.reference is not None:
        images = load_images(settings.reference, image_shape(teacher))
    elif images is None and settings.features == "digits":
        images = load_images(DataSettings(source="builtin:digits"), teacher.event_shape)
    if images is not None and settings.features != "none" and len(images) < _FEWEST:
        raise UserError(f"{images.source}: expected at least {_FEWEST} images to compare with, got {len(images)}")
    return images


def open_teacher(recipe: Recipe, prompts: Prompts | None = None) -> Teacher:
    """Open the teacher of a recipe, with its prompts, its guidance and its pipeline's keywords."""
    settings = recipe.guidance
    scales = Guidance(settings.scale, settings.interval, settings.range, settings.image_scale)
    guidance = None if scales.is_off else scales
    prompts = load_prompts(recipe.prompts) if prompts is None else prompts
    shared: dict[str, Any] = {"prompts": prompts, "call": dict(recipe.pipeline), "ip_adapter": _ip_adapter(recipe)}
    of_teacher: dict[str, Any] = {"revision": recipe.revision, "variant": recipe.variant}
    if settings.weaker is None:
        teacher = load_teacher(recipe.teacher, **of_teacher, guidance=guidance, **shared)
        _log_unused_texts(teacher, prompts)
        return on_first_timesteps(teacher, recipe.timesteps)
    teacher = on_first_timesteps(load_teacher(recipe.teacher, **of_teacher, **shared), recipe.timesteps)
    weaker = load_teacher(settings.weaker, revision=settings.weaker_revision, **shared)
    weaker = on_first_timesteps(weaker, recipe.timesteps)
    here, there = ((t.event_shape, t.schedule.t_min, t.schedule.t_max) for t in (teacher, weaker))
    if here != there:
        raise UserError(
            f"guidance.weaker {settings.weaker}: expected the teacher's shape and range of time {here}, got {there}; "
            "try an earlier or a smaller model on the same data"
        )
    if settings.range is not None and (teacher.conditions is None or teacher.pipeline is None):
        raise UserError(
            f"guidance.range: expected a teacher whose pipeline is called with a guidance_scale, got {recipe.teacher}; "
            "leave it out, and give one guidance.scale"
        )
    # Set afterwards: autoguidance needs no unconditional input, which the loader would require.
    teacher.guidance, teacher.weaker = guidance, weaker
    return teacher


def _ip_adapter(recipe: Recipe) -> IpAdapter | None:
    settings = recipe.ip_adapter
    if settings.source is None:
        return None
    return IpAdapter(**settings.model_dump() | {"subfolder": settings.subfolder or ""})


def _log_unused_texts(teacher: Teacher, prompts: Prompts) -> None:
    takes_prompt = teacher.pipeline is None or teacher.pipeline.condition is not None
    if prompts.images and any(prompts.texts) and not takes_prompt:
        logger.warning(f"{teacher.source} takes images without a prompt: the texts of prompts.column are not used")


def with_evaluation(recipe: Recipe, changes: Mapping[str, Any] | None, where: str) -> Recipe:
    """Return a recipe with other settings of the evaluation.

    Args:
        where: the owner of the recipe, for messages.

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
    """Return a recipe at another scale of its range of guidance.

    Raises:
        UserError: if the scale is outside the range, or there is none.
    """
    if scale is None:
        return recipe
    scales = recipe.guidance.range
    if scales is None or not scales[0] <= scale <= scales[1]:
        learned = f"from {scales[0]:g} to {scales[1]:g}" if scales else "that it learned: it has no guidance.range"
        raise UserError(f"--guidance: expected a scale {learned}, got {scale:g}; try another, or leave it out")
    return recipe.model_copy(update={"guidance": recipe.guidance.model_copy(update={"scale": scale})})


def _conditions_of(teacher: Teacher) -> str:
    kind = "" if teacher.conditions is None else teacher.conditions.noun
    if teacher.guidance is None:
        return kind
    low, high = teacher.guidance.range or (None, None)
    span = "" if low is None else f" (an input: {low:g} to {high:g})"
    second = "" if teacher.guidance.image_scale == 1 else f" and by {teacher.guidance.image_scale:g} by the image"
    return f"{kind}, guided by {teacher.guidance.scale:g}{span}{second}"


def forecast(recipe: Recipe, folder: Path) -> str:
    """Return the resolved recipe and the description of its run, without running it."""
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
    disk = f"disk:    {mebibytes(needed)} of trajectories or latents, stored for later starts\n" if needed else ""
    exported = "\n".join(lines)
    return (
        f"{recipe.to_yaml()}\n{job}\n"
        f"memory:  {memory} ({part} samples at a time in each of {processes} processes)\n"
        f"{disk}{exported}\noutput:  {folder}\nnothing was trained (--dry-run)"
    )


def _export_disk(job: Plan) -> list[str]:
    """Return the line on the disk space of the export, at the end and before training."""
    final = export_bytes(job.student, job.teacher, job.recipe.export.steps)
    trial = trial_bytes(job.recipe, job.student, job.teacher)
    return [f"disk:    {mebibytes(final)} of the exported student; {mebibytes(trial)} for its trial before step 1"]
