"""The loss of a batch as one module, which accelerate wraps: all gradients are synchronized together."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import nn

from fmm_distill.core.derivatives.engines import choose_engine
from fmm_distill.core.device import to_device
from fmm_distill.core.flow_map import diagonal
from fmm_distill.core.staged import stages_of
from fmm_distill.data.starting_points import (
    StartingPoints,
    draw_conditioning,
    interpolant_velocity,
    probe_inputs,
    teacher_jump,
)
from fmm_distill.errors import UserError
from fmm_distill.losses.base import DerivativeLoss, Jump, squared_norm
from fmm_distill.losses.time_sampling import sample_diagonal_times, sample_times
from fmm_distill.losses.weighting import LearnedWeight, measure, weigh
from fmm_distill.training.compile import network_of
from fmm_distill.training.matching import Matching, noised_samples

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from fmm_distill.config.matching import MatchingSettings
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.config.settings import TrainingSettings
    from fmm_distill.core.draws import Draws
    from fmm_distill.core.flow_map import FlowMap, LearnedFlowMap
    from fmm_distill.core.velocity import VelocityField
    from fmm_distill.data.samples import Batch
    from fmm_distill.losses.base import Loss
    from fmm_distill.losses.distribution_matching import NoisedSamples
    from fmm_distill.losses.time_sampling import TimeSampling
    from fmm_distill.teachers.base import Distillable
    from fmm_distill.training.critic import Critic, DiagonalCritic

__all__ = ["Objective", "StepLosses", "resolve_engine"]


class StepLosses(NamedTuple):
    """The losses of the samples of a step, shape ``[batch]`` each.

    Attributes:
        losses: mean squared residuals, or the matching loss.
        weighted: what is minimized: the distance of the residual, weighted.
        health: sums over the matched samples of ``|v_F - v_c|^2`` and of ``|v_T - v_c|^2``, and their number, shape
            ``[3]``; None: no sample is matched in this stage.
    """

    losses: Tensor
    weighted: Tensor
    health: Tensor | None = None


@dataclass(frozen=True)
class _FixedNetworks:
    """The networks that an objective evaluates and does not train.

    A plain object, because a module registers every module among its attributes: the parameters and the state of an
    objective are those of the student and of the learned weight.
    """

    teacher: Distillable
    target_maps: Mapping[str, FlowMap]


@dataclass(frozen=True)
class _Term:
    """A loss and the samples of a batch that it is trained on.

    Attributes:
        factor: of the weighted loss; 0 for a term that is computed to stay in lockstep with other processes.
        rows: indices of the samples, on the CPU.
    """

    loss: Loss
    sampling: TimeSampling
    factor: float
    rows: Tensor


class Objective(nn.Module):
    """The loss of a batch of draws.

    Args:
        student: the flow map that is trained.
        teacher: the velocity field that is distilled.
        recipe: how its losses share a batch, their distance and their weight.
        losses: the recipe's losses in its order, with the engine of their derivatives resolved.
        target_maps: the student's first moving average and a frozen copy of it, by the names of
            ``Loss.target_network``.
        lockstep: call the networks equally often in every process, whatever its samples need. Networks that are split
            over the processes are gathered at each call.
        critic: the moving average of the critic, for the second stage; None: there is none.
    """

    def __init__(
        self,
        student: LearnedFlowMap,
        teacher: Distillable,
        recipe: Recipe,
        losses: Sequence[Loss],
        target_maps: Mapping[str, FlowMap] | None = None,
        *,
        lockstep: bool = False,
        critic: Critic | DiagonalCritic | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.fixed = _FixedNetworks(teacher, target_maps or {})
        self.matching = None if critic is None else Matching(student, teacher, critic, recipe)
        self.recipe, self.lockstep = recipe, lockstep
        self.on_policy = recipe.data.on_policy or 0.0
        self.losses = tuple(losses)
        self.weight = LearnedWeight() if recipe.weight.kind == "learned" else None

    def forward(self, draws: Draws, data: Batch | None, step: int) -> StepLosses:
        """Return the losses of the samples."""
        draws = draws if data is None else data.with_conditions(draws)
        with self._calls(regression=step < self.recipe.student.regression_steps):
            if step >= self.recipe.map_steps:
                return self._second_stage(draws, data, step)
            return StepLosses(*self._losses(draws, data, step))

    def sample(self, draws: Draws, generator: torch.Generator) -> NoisedSamples:
        """Return samples of the student with fresh noise; under FSDP the call gathers its weights, as ``forward``."""
        return noised_samples(self.student, self.fixed.teacher, self.recipe, draws, generator)

    def _second_stage(self, draws: Draws, data: Batch | None, step: int) -> StepLosses:
        """Match some of the samples, and train the map on the others."""
        settings = cast("MatchingSettings", self.recipe.matching)
        both = draws.noise.new_zeros(2, len(draws.noise))
        health = draws.noise.new_zeros(3)
        matched, others = _split(draws.position, settings.fraction)
        if len(matched) or self.lockstep:
            found = cast("Matching", self.matching)(draws.rows(_one_at_least(matched)), step)
            both = _placed(both, matched, found.losses, settings.weight * found.losses)
            count = len(matched)
            sums = [found.critic[:count].sum(), found.teacher[:count].sum()]
            health = torch.stack([*sums, torch.full_like(sums[0], count)])
        if settings.fraction < 1 and (len(others) or self.lockstep):
            rows = _one_at_least(others)
            rest = _of_map(draws, rows, settings.fraction)
            losses, weighted = self._losses(rest, None if data is None else data.rows(rows), step)
            both = _placed(both, others, losses, weighted)
        losses, weighted = both.unbind()
        return StepLosses(losses.clone(), weighted.clone(), health)

    @contextmanager
    def _calls(self, *, regression: bool) -> Iterator[None]:
        """Tell scaled networks which samples share a length, and which of their weights are trained."""
        recipe = self.recipe
        groups = recipe.time_sampling.groups
        states = [
            state
            for one in (self.student, *self.fixed.target_maps.values())
            for part in stages_of(network_of(cast("LearnedFlowMap", one)))
            if (state := getattr(part, "call_state", None)) is not None
        ]
        for state in states:
            state.group, state.regression = recipe.training.batch_size // groups if groups else 1, regression
        try:
            yield
        finally:
            # Other callers, the evaluation for example, have batches of their own.
            for state in states:
                state.group, state.regression = 1, False

    def _losses(self, draws: Draws, data: Batch | None, step: int) -> tuple[Tensor, Tensor]:
        """Return each sample's mean squared residual and its minimized loss."""
        if step < self.recipe.student.regression_steps:
            return self._regression(draws, data)
        terms, step = self._terms(draws, step)
        if not self.recipe.extra_losses:
            (term,) = terms
            return self._term(term, draws, data, step)
        # Losses of several terms are put back in the order of the batch.
        both = draws.noise.new_zeros(2, len(draws.noise))
        for term in terms:
            some = None if data is None else data.rows(term.rows)
            losses, weighted = self._term(term, draws.rows(term.rows), some, step)
            both = _placed(both, term.rows if term.factor else term.rows[:0], losses, term.factor * weighted)
        losses, weighted = both.unbind()
        return losses.clone(), weighted.clone()

    def times(self, draws: Draws, step: int) -> tuple[Tensor, Tensor]:
        """Return the times (t, r) of the samples of a step, shape ``[batch]`` each, float64."""
        schedule = self.fixed.teacher.schedule
        if step < self.recipe.student.regression_steps:
            t = sample_diagonal_times(self.recipe.time_sampling, schedule, draws)
            return t, t
        matching = self.recipe.matching
        if matching is not None and step >= self.recipe.map_steps:
            # The times of the noise, for samples that are matched.
            t = matching.loss.times_at(schedule, draws.uniform)
            _, others = _split(draws.position, matching.fraction)
            both = torch.stack([t, t])
            if len(others):
                both[:, others] = self._times_of_map(_of_map(draws, others, matching.fraction), step)
            t, r = both
            return t, r
        t, r = self._times_of_map(draws, step)
        return t, r

    def _times_of_map(self, draws: Draws, step: int) -> Tensor:
        """Return the times of the map's losses, shape ``[2, batch]``."""
        schedule = self.fixed.teacher.schedule
        terms, step = self._terms(draws, step)
        both = draws.first.new_zeros(2, len(draws.first))
        for term in terms:
            if not term.factor:
                continue
            t, r = sample_times(term.sampling, schedule, draws.rows(term.rows), step)
            both[:, term.rows] = torch.stack([t, t if term.loss.diagonal else r])
        return both

    def _terms(self, draws: Draws, step: int) -> tuple[list[_Term], int]:
        """Return the losses of a step with their samples, and the step within its stage.

        A loss without a sample is left out; in lockstep with other processes it gets the first sample and the factor 0.
        """
        recipe = self.recipe
        index, step = recipe.stage_at(step - recipe.student.regression_steps)
        # On the CPU, where the decision which sample has which loss does not wait for a GPU.
        everywhere = torch.arange(len(draws.position), device=draws.position.device)
        if index is not None:
            loss = self.losses[1 + len(recipe.extra_losses) + index]
            return [_Term(loss, recipe.stages[index].time_sampling or recipe.time_sampling, 1.0, everywhere)], step
        if not recipe.extra_losses:
            return [_Term(self.losses[0], recipe.time_sampling, 1.0, everywhere)], step
        fractions = [extra.fraction for extra in recipe.extra_losses]
        ends = [0.0, *itertools.accumulate([1 - sum(fractions), *fractions])]
        # A rounded sum would leave out the last sample.
        ends[-1] = 1.0
        factors = [1.0, *(extra.weight for extra in recipe.extra_losses)]
        samplings = [recipe.time_sampling, *(e.time_sampling or recipe.time_sampling for e in recipe.extra_losses)]
        terms: list[_Term] = []
        for i, (low, high) in enumerate(itertools.pairwise(ends)):
            rows = ((draws.position >= low) & (draws.position < high)).nonzero()[:, 0]
            if len(rows):
                terms.append(_Term(self.losses[i], samplings[i], factors[i], rows))
            elif self.lockstep:
                terms.append(_Term(self.losses[i], samplings[i], 0.0, everywhere[:1]))
        return terms, step

    def _term(self, term: _Term, draws: Draws, data: Batch | None, step: int) -> tuple[Tensor, Tensor]:
        """Return one loss of its samples, and the same weighted."""
        teacher, loss = self.fixed.teacher, term.loss.at_step(step)
        times = sample_times(term.sampling, teacher.schedule, draws, step)
        # One copy to the device instead of three.
        t, r, uniform = to_device(torch.stack([*times, draws.uniform]), draws.noise.device)
        cond = draw_conditioning(teacher, draws)
        starting_points = StartingPoints(
            teacher,
            self.student,
            data,
            on_path=loss.needs_data,
            on_policy=self.on_policy,
            lockstep=self.lockstep,
        )
        target_map = None if loss.target_network is None else self.fixed.target_maps[loss.target_network]
        jump = Jump(starting_points(draws, times[0], cond), t, r, cond, uniform, target_map)
        losses = loss(self.student, self._velocity(loss, draws, data), jump)
        return losses, self._weighted(losses, t, t if loss.diagonal else r)

    def _velocity(self, loss: Loss, draws: Draws, data: Batch | None) -> VelocityField:
        """Return the velocity field of a loss; points on solved trajectories have the teacher's."""
        if loss.velocity == "self":
            # With the student's gradients; each loss decides where they stop.
            return diagonal(self.student)
        if loss.needs_data and data is not None and data.images is not None:
            return interpolant_velocity(draws.noise, data.images)
        return self.fixed.teacher.velocity

    def _weighted(self, losses: Tensor, t: Tensor, r: Tensor) -> Tensor:
        # The distance first: adaptive and learned weights are functions of the distance, not of the square.
        values = measure(losses, self.recipe.distance)
        if self.weight is None:
            return weigh(values, self.recipe.weight)
        clock = self.student.clock
        # Warped, because equal steps of t are not equal steps of the teacher's noise levels.
        weighted: Tensor = self.weight(values, clock.warp(t), clock.warp(r))
        return weighted

    def _regression(self, draws: Draws, data: Batch | None) -> tuple[Tensor, Tensor]:
        """Return ``|u(x, t, t) - v(x, t)|^2`` at points that the teacher itself reaches, and the same weighted."""
        teacher = self.fixed.teacher
        times = sample_diagonal_times(self.recipe.time_sampling, teacher.schedule, draws)
        t = to_device(times, draws.noise.device)
        cond = draw_conditioning(teacher, draws)
        # Points of the teacher: the student with another prediction is no velocity yet.
        starting_points = StartingPoints(teacher, teacher_jump(teacher), data, on_policy=self.on_policy)
        x_t = starting_points(draws, times, cond)
        with torch.no_grad():
            v = teacher.velocity(x_t, t, cond)
        losses = squared_norm(self.student.mean_velocity(x_t, t, t, cond) - v)
        return losses, self._weighted(losses, t, t)


def _split(position: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Return the indices of the samples below a position, and those of the others, on the CPU."""
    below = position < fraction
    return below.nonzero()[:, 0], (~below).nonzero()[:, 0]


def _of_map(draws: Draws, rows: Tensor, fraction: float) -> Draws:
    """Return the draws of samples that are not matched."""
    rest = draws.rows(rows)
    # Their positions fill the unit interval again, so that the losses have their fractions.
    rest.position = ((rest.position - fraction) / (1 - fraction)).clamp_min(0)
    return rest


def _one_at_least(rows: Tensor) -> Tensor:
    """Return the rows, or the first one of the batch: in lockstep a process without a sample calls with another."""
    return rows if len(rows) else rows.new_zeros(1)


def _placed(both: Tensor, rows: Tensor, losses: Tensor, weighted: Tensor) -> Tensor:
    """Return the losses of a batch with those at some rows set; without rows, with a gradient of zero."""
    if not len(rows):
        # Its backward pass gathers the networks too.
        return both + 0 * weighted.sum()
    return both.index_copy(1, to_device(rows, both.device), torch.stack([losses, weighted]).to(both.dtype))


def resolve_engine(
    student: LearnedFlowMap, teacher: Distillable, loss: Loss, training: TrainingSettings
) -> tuple[Loss, str | None]:
    """Return a loss with the engine that ``derivative: auto`` selects on these networks, and the reason.

    The reason is None if the settings name the engine, or if the loss takes no derivative.

    Raises:
        UserError: if the settings name forward mode and an option of the training prevents it.
    """
    if not isinstance(loss, DerivativeLoss) or not loss.differentiates:
        return loss, None
    # Without gradients blocks are not computed again.
    options = ["gradient_checkpointing"] if training.gradient_checkpointing and loss.keeps_graph else []
    options += ["compile"] if training.compile != "none" else []
    if loss.derivative == "exact" and options:
        raise UserError(
            f"loss {loss.name}: expected derivative central or auto with training.{options[0]}, got exact; forward "
            "mode does not run through it"
        )
    if loss.derivative != "auto":
        return loss, None
    engine, reason = "central", f"forward mode does not run through training.{' and '.join(options)}"
    device = next(student.parameters()).device
    # On a GPU forward mode may use TensorFloat-32, also in the backward pass, and differences may not.
    if not options and loss.in_r and (not loss.keeps_graph or device.type == "cpu"):
        reason = "it costs less than forward mode here and is within 1e-3 of it"
    elif not options:
        at = probe_inputs(teacher, device)
        engine, reason = choose_engine(student, *at, with_gradient=loss.keeps_graph)
        # The trial of the engine leaves gradients behind.
        student.zero_grad(set_to_none=True)
    return loss.model_copy(update={"derivative": engine}), f"derivatives: {engine} ({reason})"
