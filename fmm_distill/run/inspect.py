"""The properties of a teacher and of its students, for ``fmm-distill inspect``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from fmm_distill.core.schedules import Angular, FlowMatching, VariancePreserving
from fmm_distill.core.staged import StagedNetwork, stages_of
from fmm_distill.data.condition_images import describe_images
from fmm_distill.errors import UserError
from fmm_distill.export.choose import exporter_of
from fmm_distill.student.lora import default_targets
from fmm_distill.student.scaled import ScaledWeights
from fmm_distill.student.scaled_adapters import share_network
from fmm_distill.student.scaled_layers import scaled_layers
from fmm_distill.student.stages import jump_embeddings, of_stage
from fmm_distill.student.student import Student
from fmm_distill.student.time_embedding import find_jump_hosts
from fmm_distill.teachers.codec import Waves
from fmm_distill.teachers.conditions import Classes, Embeddings
from fmm_distill.teachers.prompted.call import RecordedCall
from fmm_distill.teachers.requirements import describe_optional_inputs
from fmm_distill.teachers.tasks import task_of
from fmm_distill.training.memory import Memory, forecast_memory, memory_unit

if TYPE_CHECKING:
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.teachers.base import Teacher

__all__ = ["describe_teacher"]

# The rank of the adapters whose memory is estimated: the one of recipes/text.yaml.
RANK = 16


def describe_teacher(teacher: Teacher, recipe: Recipe) -> str:
    """Return one line per property of a teacher. A student of each kind is built to find its layers and its memory.

    Args:
        recipe: the loss and the training settings for the memory estimate.

    Raises:
        UserError: if no student of either kind can be built from the teacher.
    """
    # One after the other: a student has a copy of the weights.
    kinds = _scaled(teacher, recipe) | _embedded(teacher, recipe)
    parameters = sum(p.numel() for p in teacher.network.parameters())
    lines = {
        "source": teacher.source + (f" at {teacher.revision}" if teacher.revision else ""),
        "adapter": teacher.adapter,
        **_task(teacher),
        "network": f"{_networks(teacher)}, {parameters:,} parameters",
        "prediction": _prediction(teacher),
        "schedule": _schedule(teacher),
        "shape": " x ".join(map(str, teacher.event_shape)) + _shape_means(teacher),
        "conditioning": _conditions(teacher),
        "network call": _network_call(teacher),
        **_inputs(teacher),
        **kinds,
        "exports": _exports(teacher),
        "export test": "not run; use --dry-run with a recipe",
        "license": teacher.license.get("license", "not stated; ask the authors before you publish a student"),
    }
    return "\n".join(f"{name:<16}{text}" for name, text in lines.items())


def _task(teacher: Teacher) -> dict[str, str]:
    """Describe the task of the class that the teacher's repository names, where it is opened by the base of that."""
    task = None if teacher.pipeline is None or teacher.pipeline.task is None else task_of(teacher.pipeline.task)
    return {} if task is None else {"task": f"{task.pipeline}, which {task.does}: the student's {task.method}()"}


def _networks(teacher: Teacher) -> str:
    parts, call = stages_of(teacher.network), teacher.parametrization.call
    name = type(parts[0]).__name__
    if not isinstance(call, RecordedCall) or call.boundary is None:
        return name
    return f"two {name}, the first from timestep {call.boundary:g} on, the second below it"


def _prediction(teacher: Teacher) -> str:
    edm = teacher.parametrization.sigma_data
    return teacher.prediction + (f", preconditioned with sigma_data {edm:g}" if edm is not None else "")


def _schedule(teacher: Teacher) -> str:
    schedule, kind = teacher.schedule, teacher.scheduler_config.get("_class_name", "")
    span = f"t from {schedule.t_min:.5f} to {schedule.t_max:.5f}"
    if isinstance(schedule, VariancePreserving):
        return f"{kind}: variance preserving, {schedule.num_timesteps} timesteps, {span}"
    if isinstance(schedule, FlowMatching):
        return f"{kind}: flow matching, shift {schedule.shift:.4g}, {span}"
    if isinstance(schedule, Angular):
        return f"{kind}: variance preserving, conditioned on an angle, {span}"
    return f"{kind}: variance exploding, {span}"


def _shape_means(teacher: Teacher) -> str:
    if isinstance(teacher.parametrization.call, RecordedCall):
        return " (as the pipeline passes it to the network)"
    return " (channels x length)" if isinstance(teacher.codec, Waves) else " (channels x height x width)"


def _conditions(teacher: Teacher) -> str:
    conditions = teacher.conditions
    if conditions is None:
        return "none (unconditional)"
    if isinstance(conditions, Classes):
        guided = (
            "guidance" if conditions.null_label is not None else "no guidance (no label for the unconditional case)"
        )
        return f"{len(conditions.names)} classes; {guided}"
    embeddings = cast("Embeddings", conditions)
    names = ", ".join(name for name in embeddings.prompts.inputs if not name.startswith("lengths"))
    guided = "guidance" if embeddings.empty is not None else f"no guidance ({embeddings.reason})"
    guided += "" if embeddings.image_guidance is None else ", and by the image (guidance.image_scale)"
    return f"{embeddings.noun}, as {names}; {guided}"


def _network_call(teacher: Teacher) -> str:
    call = teacher.parametrization.call
    if not isinstance(call, RecordedCall):
        return "network(sample, timestep)"
    time = (
        ("" if call.slope == 1 else f"{call.slope:g} * ") + "timestep" + (f" + {call.offset:g}" if call.offset else "")
    )
    sign = "" if call.sign > 0 else "; the output is negated"
    sample = "sample" if call.joined is None else "sample and a part that stays the same"
    second = "" if call.second_time is None else f", {call.second_time}={call.time}"
    return f"network({call.sample}={sample}, {call.time}={time}{second}){sign}"


def _inputs(teacher: Teacher) -> dict[str, str]:
    """Describe what the pipeline can take in addition to prompts, and the images that it is given."""
    data = None if teacher.pipeline is None else describe_optional_inputs(teacher.pipeline.class_name)
    conditions = teacher.conditions
    if isinstance(conditions, Embeddings) and conditions.images:
        count = len(conditions.names)
        given = f"{count} prompts with images (height x width), {describe_images(conditions.images)}"
        return {"pipeline takes": str(data), "opened with": given}
    return {} if data is None else {"opened without": f"{data}, which the pipeline can take"}


def _scaled(teacher: Teacher, recipe: Recipe) -> dict[str, str]:
    """Describe the student whose weights change with the length of the jump."""
    student = Student.from_teacher(teacher, scaled=ScaledWeights())
    layers = list(scaled_layers(student.network).values())
    linear = sum(isinstance(layer, nn.Linear) for layer in layers)
    counts = {"linear layers": linear, "convolutions": len(layers) - linear}
    found = " and ".join(f"{count} {name}" for name, count in counts.items() if count)
    changes = sum(p.numel() for p in student.parameters() if p.requires_grad)
    sizes = [RANK * (layer.weight[0].numel() + len(layer.weight)) for layer in cast("list[Any]", layers)]
    shared = share_network(student, teacher)
    full = _forecast(student, shared, recipe)
    return {
        "scaled": f"weights of {found} change with the jump's length, {changes:,} parameters at full rank",
        "scaled memory": _of_full_rank(full, recipe),
        "scaled LoRA": _of_low_rank(teacher, full, sum(sizes), recipe),
    }


def _embedded(teacher: Teacher, recipe: Recipe) -> dict[str, str]:
    """Describe the student that embeds the length of the jump, or the reason why there is none."""
    try:
        hosts = list(_jump_hosts(teacher))
    except UserError as error:
        reason = str(error).removeprefix(f"{teacher.source}: ")
        return {"jump embedding": f"none, students are of kind scaled alone ({reason})"}
    student = Student.from_teacher(teacher)
    others = f", and after {len(hosts) - 1} layers of the same name" if len(hosts) > 1 else ""
    full = _forecast(student, teacher, recipe)
    layers = [cast("nn.Linear", teacher.network.get_submodule(name)) for name in default_targets(teacher.network)]
    adapters = sum(RANK * (layer.in_features + layer.out_features) for layer in layers)
    jump = sum(p.numel() for embedding in jump_embeddings(student.network) for p in embedding.parameters())
    lora = _of_low_rank(teacher, full, adapters + jump, recipe)
    return {
        "jump embedding": f"added after {hosts[0]}{others}",
        "memory": _of_full_rank(full, recipe),
        "LoRA memory": lora if layers else "no default layers; name them in student.lora.targets",
    }


def _jump_hosts(teacher: Teacher) -> list[str]:
    """Return the layers that the length of the jump is added to, of two networks those of both."""
    network, parametrization = teacher.network, of_stage(teacher.parametrization)
    if not isinstance(network, StagedNetwork):
        return list(find_jump_hosts(teacher))
    stages = {name: replace(teacher, network=p, parametrization=parametrization) for name, p in network.parts.items()}
    return [f"{name}.{host}" for name, stage in stages.items() for host in find_jump_hosts(stage)]


def _forecast(student: Student, teacher: Teacher, recipe: Recipe) -> Memory:
    """Estimate the memory of a training step of one sample."""
    alone = recipe.training.model_copy(update={"batch_size": 1, "gradient_accumulation_steps": 1})
    return forecast_memory(student, teacher, recipe.model_copy(update={"training": alone}))


def _of_full_rank(memory: Memory, recipe: Recipe) -> str:
    return f"{memory}; for one sample, loss {recipe.loss_names}; {_text(memory.per_sample)} per further sample"


def _of_low_rank(teacher: Teacher, full: Memory, trained: int, recipe: Recipe) -> str:
    """Estimate the memory with adapters from that of full rank.

    The weights are there once; gradients, two moments and the averages are those of the adapters. The activations are
    counted as if every weight were trained.
    """
    weights = sum(p.numel() for p in teacher.network.parameters())
    return f"{_text(4 * (weights + (4 + len(recipe.training.ema)) * trained) + full.activations)} at rank {RANK}"


def _text(count: int) -> str:
    unit, name, form = memory_unit(count)
    return f"{count / unit:{form}} {name}"


def _exports(teacher: Teacher) -> str:
    exporter = exporter_of(teacher)
    if reason := exporter.not_any_step:
        return f"weights alone, without a pipeline ({reason})"
    if reason := exporter.not_fixed:
        return f"an any-step pipeline alone; no stock pipelines of fixed numbers of steps ({reason})"
    total = teacher.schedule.num_timesteps
    which = f"divisors of {total}" if isinstance(teacher.schedule, VariancePreserving) else "any"
    return f"an any-step pipeline; stock pipelines of fixed numbers of steps ({which})"
