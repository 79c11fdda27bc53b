"""The properties of a teacher that is opened rightly, each as a difference that is zero up to rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers.guiders.guider_utils import BaseGuidance

from experiments.coverage.images import replace_images
from experiments.coverage.stepping import first_order, record_run
from fmm_distill.student.scaled import ScaledWeights
from fmm_distill.student.student import Student
from fmm_distill.teachers.conditions import Embeddings
from fmm_distill.teachers.prompted.encoding import encoding_by_mode
from fmm_distill.teachers.prompts import Prompts
from fmm_distill.teachers.stepped_samples import from_stepped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from experiments.coverage.images import Form
    from experiments.coverage.stepping import Step
    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.teachers.base import Teacher

__all__ = [
    "LARGEST",
    "PROMPTS",
    "RUN_STEPS",
    "compare_batches",
    "compare_images",
    "compare_start",
    "compare_steps",
    "runs_with",
]

# The largest relative difference that rounding explains: float32 in networks of a few layers.
LARGEST = 1e-4
# The third is the shortest, so that it changes the padding of no other.
PROMPTS = ("a red cat", "two dogs in the snow", "a hat")
RUN_STEPS = 4


def compare_steps(teacher: Teacher, folder: Path) -> float | str:
    """Compare one Euler step of the teacher's velocity with each step of its stock pipeline.

    The pipeline has its own scheduler, or the stock one of first order with the same noise levels.

    Args:
        folder: of the pipeline.

    Returns:
        the largest relative difference; a text: why there is no comparison.
    """
    pipeline = open_stock(folder)
    scheduler = first_order(pipeline.scheduler)
    if scheduler is None:
        return f"no stock scheduler of first order has the noise levels of {type(pipeline.scheduler).__name__}"
    pipeline.scheduler = scheduler
    count = _prompts_of_call(teacher)
    cond = teacher.first_conditions(count)
    own = teacher.parametrization.call
    component = "transformer" if hasattr(pipeline, "transformer") else "unet"
    with encoding_by_mode(pipeline, _given(teacher)):
        run = record_run(pipeline, component, getattr(own, "sample", "sample"), _call(teacher, RUN_STEPS))
    shape, joined = (count, *teacher.event_shape), getattr(own, "joined", None)
    positions = None if teacher.pipeline is None else teacher.pipeline.positions
    if positions is not None:
        run.steps = [_selected(step, teacher.event_shape, positions) for step in run.steps]
    # A pipeline may step a second stream, such as sound, which is no part of the teacher's event.
    size = torch.Size(shape).numel()
    steps = [step for step in run.steps if step.x.numel() == size]
    if not steps:
        return "its scheduler steps other numbers than one sample per prompt"
    worst = 0.0
    for position, step in enumerate(steps):
        sample = run.samples[position] if position < len(run.samples) else None
        x = _as_event(step, sample if joined is None or sample is None else joined.sample_in(sample), shape)
        if x is None:
            return "its scheduler steps samples of another layout"
        with torch.no_grad():
            v = teacher.velocity(x, torch.full((count,), step.t, dtype=torch.float64), cond)
        made = x + (step.r - step.t) * v
        same = made.shape == step.end.shape
        # The same numbers in another layout are compared in order of their size.
        one, other = (made, step.end) if same else (each.flatten().sort().values for each in (made, step.end))
        worst = max(worst, relative(one, other))
    return worst


def _selected(step: Step, event_shape: tuple[int, ...], positions: Tensor) -> Step:
    """Return a step of the teacher's numbers alone, where the scheduler steps a given first frame too."""
    x, end = (from_stepped(each, event_shape, positions) for each in (step.x, step.end))
    return replace(step, x=x, end=end)


def _as_event(step: Step, sample: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return the start of a step as the network takes it; None: it is not known how."""
    if step.x.shape == shape:
        return step.x
    if sample is not None and sample.shape == shape and torch.equal(_sorted(sample), _sorted(step.x)):
        return sample
    return None


def _sorted(x: Tensor) -> Tensor:
    return x.flatten().sort().values


def compare_batches(teacher: Teacher, samples: Prompts, reopen: Callable[[Prompts], Teacher]) -> float:
    """Compare velocities of the same samples in batches of two and of three, in two orders.

    Args:
        samples: three prompts and their images, of which the teacher has the first two.
        reopen: opens the same teacher with other prompts and images.
    """
    x, t = _points(teacher)
    order = torch.tensor([1, 0, 2])
    with torch.no_grad():
        two = teacher.velocity(x[:2], t[:2], teacher.first_conditions(2))
        if teacher.conditions is not None and teacher.conditions.noun == "prompts":
            other = reopen(samples.some(order.tolist()))
            cond = other.first_conditions(3)
        else:
            other, cond = teacher, _rows(teacher.first_conditions(3), order)
        three = other.velocity(x[order], t[order], cond)
    return relative(three[order][:2], two)


def compare_images(
    teacher: Teacher, samples: Prompts, forms: Mapping[str, Form], reopen: Callable[[Prompts], Teacher]
) -> float | str:
    """Compare velocities of the same samples and prompts with other images under one keyword after the other.

    Returns:
        the smallest relative difference; a text: the images that make none.
    """
    x, t = _points(teacher)
    found = {}
    with torch.no_grad():
        own = teacher.velocity(x[:2], t[:2], teacher.first_conditions(2))
        for name, form in forms.items():
            other = reopen(replace_images(samples.some((0, 1)), name, form))
            found[name] = relative(other.velocity(x[:2], t[:2], other.first_conditions(2)), own)
    unseen = [name for name, difference in found.items() if difference <= LARGEST]
    return f"does not see {', '.join(unseen)}" if unseen else min(found.values())


def _points(teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Return three samples of noise and their times."""
    x = torch.randn(3, *teacher.event_shape, generator=torch.Generator().manual_seed(1))
    return x, teacher.schedule.time_at(torch.tensor([0.4, 0.9, 0.6], dtype=torch.float64))


def _rows(cond: Conditioning | None, order: Tensor) -> Conditioning | None:
    return None if cond is None else cond.rows(order)


def compare_start(teacher: Teacher, *, scaled: bool) -> float:
    """Compare jumps of a new student of one kind with the teacher's velocity."""
    student = Student.from_teacher(teacher, scaled=ScaledWeights() if scaled else None)
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = teacher.schedule.time_at(torch.tensor([0.4, 0.9], dtype=torch.float64))
    cond = teacher.first_conditions(2)
    with torch.no_grad():
        return relative(student.mean_velocity(x, t, 0 * t, cond), teacher.velocity(x, t, cond))


def relative(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def open_stock(folder: Path) -> Any:
    """Open a pipeline with diffusers alone, with its guiders turned off."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    for part in vars(pipeline).values():
        if isinstance(part, BaseGuidance):
            part.disable()
    return pipeline


def runs_with(teacher: Teacher, folder: Path, steps: int) -> bool:
    """Return whether the teacher's stock pipeline runs with this number of steps."""
    pipeline = open_stock(folder)
    pipeline.scheduler = first_order(pipeline.scheduler) or pipeline.scheduler
    try:
        with torch.no_grad(), encoding_by_mode(pipeline, _given(teacher)):
            pipeline(**_call(teacher, steps))
    except Exception:  # noqa: BLE001 any failure is the answer
        return False
    return True


def _prompts_of_call(teacher: Teacher) -> int:
    """Return the number of samples of a call: two, or one for a pipeline that takes no list of prompts."""
    return 1 if teacher.pipeline is not None and teacher.pipeline.one_prompt else 2


def _call(teacher: Teacher, steps: int) -> dict[str, Any]:
    """Return the keywords of the stock pipeline's call for the first conditions, without guidance."""
    call: dict[str, Any] = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
    stock, conditions = teacher.pipeline, teacher.conditions
    if stock is None or conditions is None:
        return call | {"batch_size": 2}
    call |= stock.call | stock.unguided()
    if conditions.noun == "classes":
        names = [conditions.names[index % len(conditions.names)] for index in range(2)]
        return call | {"class_labels": [int(name) for name in names]}
    given = _given(teacher).keywords(one=stock.one_prompt, prompt=stock.condition == "prompt")
    return call | given | {"output_type": "latent"}


def _given(teacher: Teacher) -> Prompts:
    """Return the first two prompts of a teacher with their images."""
    conditions = teacher.conditions
    if not isinstance(conditions, Embeddings):
        return Prompts(("", ""))
    return conditions.given.some([index % len(conditions.names) for index in range(2)])
