"""The loss of a batch as one module: what accelerate wraps, so that gradients are synchronized whole."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn

from fmm_distill.core.derivatives.engines import choose_engine
from fmm_distill.core.device import to_device
from fmm_distill.core.flow_map import diagonal
from fmm_distill.data.starting_points import condition_of, interpolant_velocity, points, somewhere, teacher_jump
from fmm_distill.errors import UserError
from fmm_distill.losses import LOSSES
from fmm_distill.losses.base import DerivativeSettings, squared_norm
from fmm_distill.losses.time_sampling import diagonal_times, pair_times
from fmm_distill.losses.weighting import LearnedWeight, measure, weigh

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.config.settings import TrainingSettings
    from fmm_distill.core.draws import Draws
    from fmm_distill.core.flow_map import FlowMap, LearnedFlowMap
    from fmm_distill.data.samples import Picked
    from fmm_distill.losses import AnyLossSettings
    from fmm_distill.losses.time_sampling import Pairs
    from fmm_distill.teachers.base import Distillable

    # A loss, its pairs of times, its factor, and its samples' rows.
    _Term = tuple[AnyLossSettings, Pairs, float, Tensor]

__all__ = ["Objective", "settle_engine"]


class Objective(nn.Module):
    """The loss of a batch of draws, inside the module that accelerate wraps: gradients are synchronized whole.

    Args:
        losses: the recipe's losses, in its order, with their derivatives' engine settled.
        copies: the student's first moving average and a frozen copy, for the losses that take their jumps as targets.
        in_step: networks are called as often in every process, whatever its samples need: where they are split over the
            processes each call gathers them.
    """

    def __init__(
        self,
        student: LearnedFlowMap,
        teacher: Distillable,
        recipe: Recipe,
        losses: Sequence[AnyLossSettings],
        copies: Mapping[str, FlowMap] | None = None,
        *,
        in_step: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        # A tuple hides the teacher and the copies from the wrapped module's parameters and state.
        self._fixed = (teacher, copies or {})
        self.recipe, self.in_step = recipe, in_step
        self.on_policy = recipe.data.on_policy or 0.0
        self.losses = tuple(losses)
        self.weight = LearnedWeight() if recipe.weight.kind == "learned" else None

    def forward(self, draws: Draws, data: Picked | None, step: int) -> tuple[Tensor, Tensor]:
        """Mean squared residual of each sample, and what is minimized: its metric, weighted; shape ``[batch]`` both."""
        draws = draws if data is None else data.told(draws)
        if step < self.recipe.student.regression_steps:
            return self._regression(draws, data)
        terms, step = self._terms(draws, step)
        if not self.recipe.also:
            ((settings, pairs, _, _),) = terms
            return self._term(settings, pairs, draws, data, step)
        both = draws.noise.new_zeros(2, len(draws.noise))
        for settings, pairs, factor, rows in terms:
            some = None if data is None else data.rows(rows)
            losses, weighted = self._term(settings, pairs, draws.rows(rows), some, step)
            if factor:
                both = both.index_copy(
                    1, to_device(rows, both.device), torch.stack([losses, factor * weighted]).to(both.dtype)
                )
            else:
                # Its backward pass gathers the networks too.
                both = both + 0 * weighted.sum()
        losses, weighted = both.unbind()
        return losses.clone(), weighted.clone()

    def times(self, draws: Draws, step: int) -> tuple[Tensor, Tensor]:
        """The pairs (t, r) of the samples of a step, shape ``[batch]`` each, float64."""
        schedule = self._fixed[0].schedule
        if step < self.recipe.student.regression_steps:
            t = diagonal_times(self.recipe.pairs, schedule, draws)
            return t, t
        terms, step = self._terms(draws, step)
        both = draws.first.new_zeros(2, len(draws.first))
        for settings, pairs, factor, rows in terms:
            if not factor:
                continue
            t, r = pair_times(pairs, schedule, draws.rows(rows), step)
            both[:, rows] = torch.stack([t, t if settings.diagonal else r])
        t, r = both
        return t, r

    def _terms(self, draws: Draws, step: int) -> tuple[list[_Term], int]:
        """The losses of a step with their samples, those without a sample left out; and the step within its stage.

        In step with other processes none is left out: it gets the first sample and the factor 0.
        """
        recipe = self.recipe
        index, step = recipe.stage_at(step - recipe.student.regression_steps)
        everywhere = torch.arange(len(draws.place), device=draws.place.device)
        if index is not None:
            settings = self.losses[1 + len(recipe.also) + index]
            return [(settings, recipe.before[index].pairs or recipe.pairs, 1.0, everywhere)], step
        if not recipe.also:
            return [(self.losses[0], recipe.pairs, 1.0, everywhere)], step
        shares = [term.share for term in recipe.also]
        ends = [0.0, *itertools.accumulate([1 - sum(shares), *shares])]
        ends[-1] = 1.0
        factors = [1.0, *(term.weight for term in recipe.also)]
        pairs = [recipe.pairs, *(term.pairs or recipe.pairs for term in recipe.also)]
        terms: list[_Term] = []
        for i, (low, high) in enumerate(itertools.pairwise(ends)):
            rows = ((draws.place >= low) & (draws.place < high)).nonzero()[:, 0]
            if len(rows):
                terms.append((self.losses[i], pairs[i], factors[i], rows))
            elif self.in_step:
                terms.append((self.losses[i], pairs[i], 0.0, everywhere[:1]))
        return terms, step

    def _term(
        self, settings: AnyLossSettings, pairs: Pairs, draws: Draws, data: Picked | None, step: int
    ) -> tuple[Tensor, Tensor]:
        """One loss of some samples, and the same weighted."""
        teacher, copies = self._fixed
        settings = settings.at_step(step)
        times = pair_times(pairs, teacher.schedule, draws, step)
        # One copy of the three.
        t, r, random = to_device(torch.stack([*times, draws.share]), draws.noise.device)
        cond = condition_of(teacher, draws)
        on_path = settings.velocity == "data"
        share, in_step = self.on_policy, self.in_step
        x_t = points(
            teacher, self.student, draws, times[0], data, cond, on_path=on_path, on_policy=share, in_step=in_step
        )
        velocity = teacher.velocity
        if settings.velocity == "self":
            velocity = diagonal(self.student)
        elif on_path and data is not None and data.images is not None:
            velocity = interpolant_velocity(draws.noise, data.images)
        followed = None if settings.follows is None else copies[settings.follows]
        given: dict[str, FlowMap | Tensor | None] = {"share": random, "target_map": followed}
        given = {name: given[name] for name in settings.takes}
        losses = LOSSES[settings.name](self.student, velocity, x_t, t, r, cond=cond, settings=settings, **given)
        return losses, self._weighted(losses, t, t if settings.diagonal else r)

    def _weighted(self, losses: Tensor, t: Tensor, r: Tensor) -> Tensor:
        values = measure(losses, self.recipe.metric)
        if self.weight is None:
            return weigh(values, self.recipe.weight)
        clock = self.student.clock
        weighted: Tensor = self.weight(values, clock.warp(t), clock.warp(r))
        return weighted

    def _regression(self, draws: Draws, data: Picked | None) -> tuple[Tensor, Tensor]:
        """``|u(x, t, t) - v(x, t)|^2``, at points that the teacher itself reaches, and the same weighted."""
        teacher, _ = self._fixed
        here = diagonal_times(self.recipe.pairs, teacher.schedule, draws)
        t = to_device(here, draws.noise.device)
        cond = condition_of(teacher, draws)
        x_t = points(teacher, teacher_jump(teacher), draws, here, data, cond, on_policy=self.on_policy)
        with torch.no_grad():
            v = teacher.velocity(x_t, t, cond)
        losses = squared_norm(self.student.mean_velocity(x_t, t, t, cond) - v)
        return losses, self._weighted(losses, t, t)


def settle_engine(
    student: LearnedFlowMap, teacher: Distillable, settings: AnyLossSettings, training: TrainingSettings
) -> tuple[AnyLossSettings, str | None]:
    """A loss with the engine that ``derivative: auto`` comes to on these networks, and which it is and why.

    Nothing is said (None) where the settings name it, or where the loss takes no derivative.

    Raises:
        UserError: if the settings name forward mode and an option of the training keeps it from running.
    """
    if not isinstance(settings, DerivativeSettings) or not settings.differentiates:
        return settings, None
    # Without gradients blocks are not computed again.
    options = ["gradient_checkpointing"] if training.gradient_checkpointing and settings.keeps_graph else []
    options += ["compile"] if training.compile != "none" else []
    if settings.derivative == "exact" and options:
        raise UserError(
            f"derivative: exact of loss {settings.name} does not go with training.{options[0]}: forward mode "
            "does not run through it; wanted central, or auto"
        )
    if settings.derivative != "auto":
        return settings, None
    engine, reason = "central", f"forward mode does not run through training.{' and '.join(options)}"
    device = next(student.parameters()).device
    # On a GPU forward mode may have TensorFloat-32, also in the backward pass, and differences may not.
    if not options and settings.in_r and (not settings.keeps_graph or device.type == "cpu"):
        reason = "it costs less than forward mode here and is within 1e-3 of it"
    elif not options:
        at = somewhere(teacher, device)
        engine, reason = choose_engine(student, *at, with_gradient=settings.keeps_graph)
        student.zero_grad(set_to_none=True)
    return settings.model_copy(update={"derivative": engine}), f"derivatives: {engine} ({reason})"
