"""What a teacher is and what its students can become, for ``fmm-distill inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn

from fmm_distill.core.schedules import Angular, FlowMatching, VariancePreserving
from fmm_distill.export.folded import why_not_folded
from fmm_distill.student.lora import default_targets
from fmm_distill.student.student import Student
from fmm_distill.teachers.codec import Waves
from fmm_distill.teachers.conditions import Classes, Embeddings
from fmm_distill.teachers.prompted.call import RecordedCall
from fmm_distill.training.memory import GIB, forecast_memory

if TYPE_CHECKING:
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.teachers.base import Teacher

__all__ = ["describe_teacher"]

RANK = 16


def describe_teacher(teacher: Teacher, recipe: Recipe) -> str:
    """One line a property; the student is made to say where the second time goes in and how much memory it takes.

    Args:
        recipe: whose loss and training the memory is of.

    Raises:
        UserError: if no student can be made of it.
    """
    student = Student.from_teacher(teacher)
    parameters = sum(p.numel() for p in teacher.network.parameters())
    lines = {
        "source": teacher.source + (f" at {teacher.revision}" if teacher.revision else ""),
        "adapter": teacher.adapter,
        "network": f"{type(teacher.network).__name__}, {parameters:,} parameters",
        "prediction": _prediction(teacher),
        "schedule": _schedule(teacher),
        "shape": " x ".join(map(str, teacher.event_shape)) + _shape_means(teacher),
        "told": _conditions(teacher),
        "asked": _asked(teacher),
        "second time": _hosts(student),
        "memory": _memory(teacher, student, recipe),
        "exports": _exports(teacher),
        "license": teacher.license.get("license", "not stated: ask the teacher's authors before you publish a student"),
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


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
        return f"{kind}: variance preserving, told an angle, {span}"
    return f"{kind}: variance exploding, {span}"


def _shape_means(teacher: Teacher) -> str:
    if isinstance(teacher.parametrization.call, RecordedCall):
        return " (as the pipeline gives it to the network)"
    return " (channels x length)" if isinstance(teacher.codec, Waves) else " (channels x height x width)"


def _conditions(teacher: Teacher) -> str:
    conditions = teacher.conditions
    if conditions is None:
        return "nothing (unconditional)"
    if isinstance(conditions, Classes):
        guided = "guidance" if conditions.null_label is not None else "no guidance (no label for none)"
        return f"{len(conditions.names)} classes; {guided}"
    embeddings = cast("Embeddings", conditions)
    names = ", ".join(name for name in embeddings.prompts.inputs if not name.startswith("lengths"))
    guided = "guidance" if embeddings.empty is not None else f"no guidance ({embeddings.reason})"
    return f"prompts by {names}; {guided}"


def _asked(teacher: Teacher) -> str:
    call = teacher.parametrization.call
    if not isinstance(call, RecordedCall):
        return "network(sample, time)"
    time = f"{call.slope:g} x the scheduler's" + (f" + {call.offset:g}" if call.offset else "")
    return (
        f"by {call.sample} and {call.time} ({time}); output {'as it is' if call.sign > 0 else 'with its sign turned'}"
    )


def _hosts(student: Student) -> str:
    hosts = cast("Any", student.network).config["jump_hosts"]
    return hosts[0] + (f" and {len(hosts) - 1} of the same name" if len(hosts) > 1 else "")


def _memory(teacher: Teacher, student: Student, recipe: Recipe) -> str:
    """A training step of one sample with every weight trained, what each further sample adds, and the same with LoRA.

    With adapters the weights stand once, and gradients, two moments and the averages are theirs; the rest is counted
    as if every weight were trained.
    """
    alone = recipe.training.model_copy(update={"batch_size": 1, "accumulation": 1})
    full = forecast_memory(student, teacher, recipe.model_copy(update={"training": alone}))
    jump = sum(p.numel() for p in cast("Any", student.network).jump_embedding.parameters())
    layers = [cast("nn.Linear", teacher.network.get_submodule(name)) for name in default_targets(teacher.network)]
    adapters = sum(RANK * (layer.in_features + layer.out_features) for layer in layers)
    weights = sum(p.numel() for p in teacher.network.parameters())
    low = 4 * (weights + (4 + len(recipe.training.ema)) * (adapters + jump)) + full.activations
    lora = f"{low / GIB:.2f} GiB with LoRA of rank {RANK}" if layers else "LoRA has no layer of its own choice here"
    return (
        f"{full}; {lora}; one sample at a time ({recipe.loss_names}), each further one {full.per_sample / GIB:.3f} GiB"
    )


def _exports(teacher: Teacher) -> str:
    reason, tried = why_not_folded(teacher), "not tried: --dry-run exports and verifies an untrained student"
    if reason:
        return f"any number of steps; no fixed number ({reason}); {tried}"
    total = teacher.schedule.num_timesteps
    which = f"divisors of {total}" if isinstance(teacher.schedule, VariancePreserving) else "every number"
    return f"any number of steps; for fixed numbers stock diffusers alone ({which}); {tried}"
