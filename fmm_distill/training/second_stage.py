"""The second stage of a run: updates of the critic, and the student's second optimizer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from fmm_distill.training.critic import DiagonalCritic, build_critic
from fmm_distill.training.ema import load_trained, trained_state
from fmm_distill.training.fsdp import autocast, full_tensor
from fmm_distill.training.matching import CriticHealth, CriticObjective, critic_draws
from fmm_distill.training.optimizer import build_optimizer
from fmm_distill.training.train_state import CriticState, OptimizerState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator
    from torch import Tensor, nn
    from torch.optim.swa_utils import AveragedModel

    from fmm_distill.config.matching import MatchingSettings
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.core.flow_map import LearnedFlowMap
    from fmm_distill.teachers.base import Distillable
    from fmm_distill.training.critic import Critic
    from fmm_distill.training.train_state import TrainState

__all__ = ["SecondStage"]


class SecondStage:
    """The critic with its optimizer, and the optimizer of the student's matching.

    Args:
        trained: the parameters of the student's objective.
        critics: the critic and its moving average, on the device.
    """

    def __init__(
        self,
        trained: list[nn.Parameter],
        critics: tuple[Critic | DiagonalCritic, AveragedModel],
        student: LearnedFlowMap,
        teacher: Distillable,
        recipe: Recipe,
        accelerator: Accelerator,
    ) -> None:
        self.recipe, self.accelerator, self.event_shape = recipe, accelerator, teacher.event_shape
        critic, self.average = critics
        self.settings = cast("MatchingSettings", recipe.matching)
        self.critic = critic
        objective = CriticObjective(critic, student, teacher, recipe).eval()
        built = build_optimizer([p for p in objective.parameters() if p.requires_grad], self.settings.critic.optimizer)
        defaults = [dict(group) for group in built.param_groups]
        self.objective: Any
        self.optimizer: Any
        self.objective, self.optimizer = accelerator.prepare(objective, built)
        optimizer = OptimizerState(built, list(self.objective.parameters()), defaults)
        self.state = CriticState(critic, self.average, optimizer)
        # The student's own, built before accelerate replaces the parameters of a split student.
        self.of_student = build_optimizer(trained, self.settings.optimizer)
        self._defaults = [dict(group) for group in self.of_student.param_groups]
        self.health = CriticHealth()

    def joined(self, state: TrainState, parameters: list[nn.Parameter]) -> TrainState:
        """Return the state of training in this stage.

        Args:
            state: of the first stage.
            parameters: those of the student's objective, as accelerate distributes them.
        """
        optimizer = OptimizerState(self.of_student, parameters, self._defaults)
        return replace(state, optimizer=optimizer, critic=self.state)

    def start(self, student: LearnedFlowMap, teacher: Distillable) -> None:
        """Give the critic its first weights: the teacher's, or those of the student's diagonal."""
        rank, seed = self.recipe.student.lora.rank, self.recipe.training.seed
        if isinstance(self.critic, DiagonalCritic):
            first = {f"flow_map.{name}": value for name, value in student.state_dict().items()}
        else:
            first = trained_state(build_critic(student, teacher, rank, seed=seed))
        for network in (self.critic, self.average.module):
            load_trained(network, self.critic, first)
        self.average.n_averaged.zero_()
        self.state.optimizer.optimizer.state.clear()

    def is_warmup(self, step: int) -> bool:
        """Return whether the critic is trained alone in a step."""
        return step < self.recipe.map_steps + self.settings.critic.warmup_steps

    def update(self, step: int, lr_scale: float) -> Mapping[str, float]:
        """Take the critic's updates of a step.

        Returns:
            ``critic_loss``, the mean of its updates, ``gradient_norm`` of the last one, and in a step without the
            student ``teacher_loss``.
        """
        warmup = self.is_warmup(step)
        count = 1 if warmup else self.settings.critic.updates
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.critic.optimizer.lr * lr_scale
        found = [self._update(step, update, compare=warmup) for update in range(count)]
        loss, teacher, _ = (sum(values) / count for values in zip(*found, strict=True))
        return {"critic_loss": loss, "gradient_norm": found[-1][2]} | ({"teacher_loss": teacher} if warmup else {})

    def _update(self, step: int, update: int, *, compare: bool) -> tuple[float, float, float]:
        """Take one update, and return the errors of critic and teacher and the norm of the gradient."""
        training, accelerator = self.recipe.training, self.accelerator
        parts = training.gradient_accumulation_steps
        size = training.batch_size // (accelerator.num_processes * parts)
        draws = critic_draws(self.recipe, step, update, self.event_shape)
        errors, norm = torch.zeros(2, device=accelerator.device), torch.zeros((), device=accelerator.device)
        for part in range(accelerator.process_index * parts, (accelerator.process_index + 1) * parts):
            mine = draws.part(part * size, (part + 1) * size, accelerator.device)
            with accelerator.accumulate(self.objective):
                with autocast(accelerator):
                    losses, teachers = self.objective(mine, step, update, compare=compare)
                accelerator.backward(losses.float().mean())
                if accelerator.sync_gradients:
                    clipped = accelerator.clip_grad_norm_(self.objective.parameters(), training.max_grad_norm)
                    norm = full_tensor(torch.as_tensor(clipped)).to(errors)
            errors += torch.stack([losses.detach().mean(), teachers.mean()]).to(errors) / parts
        numbers = torch.cat([cast("Tensor", accelerator.reduce(errors, "mean")), norm[None]]).tolist()
        # A gradient scaler skips steps with infinite gradients itself.
        if math.isfinite(numbers[0]) and (math.isfinite(numbers[2]) or accelerator.scaler is not None):
            self.optimizer.step()
            self.average.update_parameters(self.critic)
        self.optimizer.zero_grad()
        return cast("tuple[float, float, float]", tuple(numbers))
