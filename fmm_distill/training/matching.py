"""The second stage of a run: the critic's training, and the matching of the student's samples."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from fmm_distill.core.device import to_device
from fmm_distill.core.draws import draw, step_generator
from fmm_distill.data.starting_points import draw_conditioning
from fmm_distill.losses.base import squared_norm
from fmm_distill.losses.critic_loss import critic_loss
from fmm_distill.losses.distribution_matching import NoisedSamples

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fmm_distill.config.matching import MatchingSettings
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.draws import Draws
    from fmm_distill.core.flow_map import LearnedFlowMap
    from fmm_distill.core.time_axis import TimeAxis
    from fmm_distill.core.velocity import VelocityField
    from fmm_distill.data.samples import Batch
    from fmm_distill.teachers.base import Distillable
    from fmm_distill.training.critic import Critic, DiagonalCritic

__all__ = ["CriticHealth", "CriticObjective", "Matched", "Matching", "critic_draws", "noised_samples"]

logger = logging.getLogger(__name__)

# The number of consecutive steps with a critic behind the teacher that is reported: single batches are noise.
_PATIENCE = 50
# Weight of a step in the running means that are compared.
_NEW = 0.05


class Matched(NamedTuple):
    """Losses of generated samples, shape ``[batch]`` each.

    Attributes:
        losses: of the matching.
        critic: ``|v_F - v_c|^2``, the critic's own loss.
        teacher: ``|v_T - v_c|^2``, which a critic that is ready is below on average.
    """

    losses: Tensor
    critic: Tensor
    teacher: Tensor


def critic_draws(recipe: Recipe, step: int, update: int, event_shape: tuple[int, ...]) -> Draws:
    """Return the draws of an update of the critic, a function of the seed, the step and the update's number."""
    training = recipe.training
    return draw(training.seed, step, training.batch_size, event_shape, purpose=f"critic {update} ", renoised=True)


def noised_samples(
    student: LearnedFlowMap, teacher: Distillable, recipe: Recipe, draws: Draws, generator: torch.Generator
) -> NoisedSamples:
    """Return samples of the student, at the end of a rollout that the generator chooses, with fresh noise.

    All samples of a step have the same rollout, so that a scaled student forms its weights once per jump.
    """
    settings = cast("MatchingSettings", recipe.matching)
    cond, axis = draw_conditioning(teacher, draws), teacher.schedule
    steps, k = settings.rollout.draw(generator)
    device = draws.noise.device
    grid = to_device(_grid(axis, steps), device)
    equal_jumps: Any = getattr(student, "equal_jumps", nullcontext)
    with equal_jumps():
        x_0 = settings.rollout(student, teacher.prior(draws.noise), grid, k, cond)
    t = to_device(settings.loss.times_at(axis, draws.uniform), device)
    return NoisedSamples(x_0, cast("Tensor", draws.renoise), t, cond)


def _grid(axis: TimeAxis, steps: int) -> Tensor:
    """Return the times of a sampler's steps, float64; those of an axis without a scheduler end at its t_min."""
    if hasattr(axis, "grid"):
        return cast("Tensor", cast("Any", axis).grid(steps))
    return axis.time_at(torch.linspace(1, 0, steps + 1, dtype=torch.float64))


@dataclass(frozen=True)
class Matching:
    """The matching loss of some samples of a batch.

    Attributes:
        critic: the critic's moving average, whose weights have no gradients.
    """

    student: LearnedFlowMap
    teacher: Distillable
    critic: Critic | DiagonalCritic
    recipe: Recipe

    def __call__(self, draws: Draws, step: int) -> Matched:
        """Return the loss of each sample, and the errors of both velocities at the noised samples."""
        generator = step_generator(self.recipe.training.seed, step, "rollout")
        samples = noised_samples(self.student, self.teacher, self.recipe, draws, generator)
        seen: dict[str, Tensor] = {}

        def recorded(name: str, field: VelocityField) -> VelocityField:
            def velocity(x: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
                v = field(x, t, cond)
                seen[name] = v.detach()
                return v

            return velocity

        loss = cast("MatchingSettings", self.recipe.matching).loss
        losses = loss(samples, recorded("teacher", self.teacher.velocity), recorded("critic", self.critic.velocity))
        with torch.no_grad():
            conditional = samples.velocity
            errors = [squared_norm(seen[name] - conditional) for name in ("critic", "teacher")]
        return Matched(losses, *errors)


class CriticObjective(nn.Module):
    """The critic's loss of a batch of draws, as one module, which accelerate wraps.

    Args:
        sample: makes samples of the student from draws and a generator, as ``noised_samples`` does.
    """

    def __init__(
        self,
        critic: Critic | DiagonalCritic,
        sample: Callable[[Draws, torch.Generator], NoisedSamples],
        teacher: Distillable,
        recipe: Recipe,
    ) -> None:
        super().__init__()
        self.critic = critic
        # A tuple hides what may be a module, whose parameters are another optimizer's or nobody's.
        self._fixed = (sample, teacher)
        self.recipe = recipe

    def forward(
        self, draws: Draws, data: Batch | None, step: int, update: int, *, compare: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of the critic, and of the teacher in its stead, of each sample, shape ``[batch]`` both.

        Args:
            data: images that the critic learns from too; None: generated samples alone.
            compare: evaluate the teacher; else its losses are 0.
        """
        sample, teacher = self._fixed
        generator = step_generator(self.recipe.training.seed, step, f"critic {update} rollout")
        draws = draws if data is None else data.with_conditions(draws)
        real = cast("MatchingSettings", self.recipe.matching).loss.real
        with torch.no_grad():
            generated = sample(draws, generator)
            # The same times, noise and conditions: the mean over the batch does not depend on that.
            images = None if data is None or real is None else replace(generated, x_0=cast("Tensor", data.images))
            others = draws.noise.new_zeros(len(draws.noise))
            if compare:
                others = critic_loss(teacher.velocity, generated, images, real)
        return critic_loss(self.critic.velocity, generated, images, real), others


class CriticHealth:
    """Running means of both errors on generated samples; logs once if the critic stays behind the teacher.

    Args:
        comparable: both errors are those of the generated samples' velocity, which a critic that learns from images too
            does not have.
    """

    def __init__(self, *, comparable: bool = True) -> None:
        self.comparable = comparable
        self.critic: float | None = None
        self.teacher = 0.0
        self.behind = 0
        self.reported = False

    def count(self, critic: float, teacher: float, step: int) -> None:
        """Count a step.

        Args:
            critic: ``E|v_F - v_c|^2``.
            teacher: ``E|v_T - v_c|^2``.
        """
        # A step that is not finite is left out.
        if not self.comparable or not math.isfinite(critic + teacher):
            return
        if self.critic is None:
            self.critic, self.teacher = critic, teacher
        self.critic += _NEW * (critic - self.critic)
        self.teacher += _NEW * (teacher - self.teacher)
        self.behind = self.behind + 1 if self.critic > self.teacher else 0
        if self.behind >= _PATIENCE and not self.reported:
            self.reported = True
            logger.warning(
                f"step {step}: the critic has been behind the teacher on generated samples for {self.behind} steps "
                f"(mean squared errors {self.critic:.4g} and {self.teacher:.4g}), so the student's steps are not to be "
                "trusted; try a lower matching.critic.optimizer.lr, more matching.critic.updates, or more "
                "matching.critic.warmup_steps"
            )
