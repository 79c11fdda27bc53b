"""The second stage of a run: updates of the critic, and the student's second optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from fmm_distill.training.critic import build_critic, reset_critic
from fmm_distill.training.ema import averaged
from fmm_distill.training.fsdp import autocast, clip_gradients, is_sharded, wrap
from fmm_distill.training.matching import CriticHealth, CriticObjective, critic_draws
from fmm_distill.training.nonfinite import finite_or_none, forget_gradients, is_overflow
from fmm_distill.training.optimizer import build_optimizer
from fmm_distill.training.train_state import CriticState, OptimizerState

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn
    from torch.optim.swa_utils import AveragedModel

    from fmm_distill.config.matching import MatchingSettings
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.core.draws import Draws
    from fmm_distill.core.flow_map import LearnedFlowMap
    from fmm_distill.data.samples import Samples
    from fmm_distill.losses.distribution_matching import NoisedSamples
    from fmm_distill.teachers.base import Distillable
    from fmm_distill.training.critic import Critic, DiagonalCritic
    from fmm_distill.training.objective import Objective
    from fmm_distill.training.train_state import TrainState

__all__ = ["CriticUpdate", "SecondStage", "build_critics"]


@dataclass(frozen=True)
class CriticUpdate:
    """An update of the critic, or several in a row.

    Attributes:
        loss: of the critic; the mean of several.
        teacher: the loss of the teacher in its stead; 0: not evaluated.
        norm: of the gradient; the last one of several.
        rate: the learning rate.
        finite: whether it has changed the critic, or a gradient scaler has lowered its scale.
    """

    loss: float
    teacher: float
    norm: float
    rate: float
    finite: bool

    def metrics(self) -> dict[str, Any]:
        """Return the entries of a line of ``steps.jsonl`` for a step without the student."""
        loss = finite_or_none(self.loss)
        metrics = {"loss": loss, "weighted": loss, "gradient_norm": finite_or_none(self.norm)}
        return metrics | {"learning_rate": self.rate, "teacher_loss": finite_or_none(self.teacher)}


def build_critics(student: LearnedFlowMap, teacher: Distillable, recipe: Recipe) -> tuple[Any, AveragedModel]:
    """Return the critic and its moving average, on the student's device."""
    device = next(student.parameters()).device
    critic = build_critic(student, teacher, recipe.student.lora.rank, seed=recipe.training.seed).to(device)
    return critic, averaged(critic, cast("MatchingSettings", recipe.matching).critic.ema)


class SecondStage:
    """The critic with its optimizer, and the optimizer of the student's matching.

    Args:
        objective: the student's, not yet distributed, with the critic's average on the device.
        trained: its parameters that are trained.
        critics: the critic and its moving average, on the device.
        images: data that the critic may learn from.
    """

    def __init__(
        self,
        objective: Objective,
        trained: list[nn.Parameter],
        critics: tuple[Critic | DiagonalCritic, AveragedModel],
        recipe: Recipe,
        images: Samples | None,
        accelerator: Accelerator,
    ) -> None:
        self.critic, self.average = critics
        self.teacher, self.student = objective.fixed.teacher, objective.student
        self.recipe, self.accelerator = recipe, accelerator
        self.settings = cast("MatchingSettings", recipe.matching)
        self.images = images if self.settings.loss.needs_data else None

        def sample(draws: Draws, generator: torch.Generator) -> NoisedSamples:
            # Looked up at each call: FSDP replaces the method.
            return objective.sample(draws, generator)

        own = CriticObjective(self.critic, sample, self.teacher, recipe).eval()
        built = build_optimizer(
            [p for p in self.critic.parameters() if p.requires_grad], self.settings.critic.optimizer
        )
        defaults = [dict(group) for group in built.param_groups]
        self.objective: Any = own
        self.distributed: Any
        self.optimizer: Any
        if is_sharded(accelerator):
            self.distributed, self.optimizer = wrap(accelerator, self.critic, [built], method="velocity")
        else:
            self.objective, self.optimizer = wrap(accelerator, own, [built])
            self.distributed = self.objective
        optimizer = OptimizerState(built, list(self.critic.parameters()), defaults)
        self.state = CriticState(self.critic, self.average, optimizer)
        # The student's own, built before accelerate replaces the parameters of a split student.
        self.of_student = build_optimizer(trained, self.settings.optimizer)
        self._defaults = [dict(group) for group in self.of_student.param_groups]
        self.health = CriticHealth(comparable=self.settings.loss.real is None)

    def joined(self, state: TrainState, parameters: list[nn.Parameter]) -> TrainState:
        """Return the state of training in this stage.

        Args:
            state: of the first stage.
            parameters: those of the student's objective, as accelerate distributes them.
        """
        optimizer = OptimizerState(self.of_student, parameters, self._defaults)
        return replace(state, optimizer=optimizer, critic=self.state)

    def start(self) -> None:
        """Start anew, also after a return to a checkpoint of the first stage.

        The critic has the teacher's weights, or those of the student's diagonal, and the optimizers have no state.
        """
        reset_critic(self.critic, self.student, self.teacher, seed=self.recipe.training.seed)
        # The next update of the average is a copy.
        self.average.n_averaged.zero_()
        own = self.state.optimizer
        for optimizer, defaults in ((own.optimizer, own.defaults), (self.of_student, self._defaults)):
            optimizer.state.clear()
            for group, values in zip(optimizer.param_groups, defaults, strict=True):
                group |= {key: value for key, value in values.items() if key != "params"}
        self.health = CriticHealth(comparable=self.settings.loss.real is None)

    def is_warmup(self, step: int) -> bool:
        """Return whether the critic is trained alone in a step."""
        return step < self.recipe.map_steps + self.settings.critic.warmup_steps

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the student at a step: constant, or half a cosine."""
        settings = self.settings
        if settings.lr_schedule == "constant":
            return settings.optimizer.lr
        done = step - self.recipe.map_steps - settings.critic.warmup_steps
        return settings.optimizer.lr * (0.5 + 0.5 * math.cos(math.pi * done / settings.steps))

    def update(self, step: int, lr_scale: float) -> CriticUpdate:
        """Take the critic's updates of a step; the teacher is evaluated in a step without the student."""
        warmup = self.is_warmup(step)
        count, rate = 1 if warmup else self.settings.critic.updates, self.settings.critic.optimizer.lr * lr_scale
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        found = [self._update(step, update, compare=warmup) for update in range(count)]
        loss, teacher = (sum(getattr(one, key) for one in found) / count for key in ("loss", "teacher"))
        if warmup:
            self.health.count(loss, teacher, step)
        return CriticUpdate(loss, teacher, found[-1].norm, rate, all(one.finite for one in found))

    def _update(self, step: int, update: int, *, compare: bool) -> CriticUpdate:
        """Take one update, or leave it out if the loss or the gradient is not finite."""
        training, accelerator = self.recipe.training, self.accelerator
        parts = training.gradient_accumulation_steps
        size = training.batch_size // (accelerator.num_processes * parts)
        draws = critic_draws(self.recipe, step, update, self.teacher.event_shape)
        errors, norm = torch.zeros(2, device=accelerator.device), torch.zeros((), device=accelerator.device)
        for part in range(accelerator.process_index * parts, (accelerator.process_index + 1) * parts):
            mine = draws.part(part * size, (part + 1) * size, accelerator.device)
            data = None if self.images is None else self.images.pick(mine).to(mine.noise.device)
            with accelerator.accumulate(self.distributed):
                with autocast(accelerator):
                    losses, teachers = self.objective(mine, data, step, update, compare=compare)
                accelerator.backward(losses.float().mean())
                if accelerator.sync_gradients:
                    parameters = self.critic.parameters()
                    norm = clip_gradients(accelerator, self.optimizer, parameters, training.max_grad_norm).to(errors)
            errors += torch.stack([losses.detach().mean(), teachers.mean()]).to(errors) / parts
        numbers = torch.cat([cast("Tensor", accelerator.reduce(errors, "mean")), norm[None]])
        # The only wait for the device: whether to step is the optimizer's input, and all processes agree about it.
        loss, teacher, last = numbers.tolist()
        finite = math.isfinite(loss) and (math.isfinite(last) or is_overflow(accelerator.scaler, last))
        if finite:
            # A gradient scaler finds its scale by infinite gradients, and skips those steps itself.
            self.optimizer.step()
            self.average.update_parameters(self.critic)
        else:
            forget_gradients(accelerator.scaler)
        self.optimizer.zero_grad()
        return CriticUpdate(loss, teacher, last, 0.0, finite)
