"""The training loop: an objective that accelerate distributes, moving averages and checkpoints."""

from __future__ import annotations

import copy
import logging
import math
import signal
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from accelerate.utils import gather_object

from fmm_distill.core.derivatives.precision import without_tensor_float
from fmm_distill.core.draws import draw
from fmm_distill.data.starting_points import probe_inputs
from fmm_distill.errors import FmmDistillError
from fmm_distill.losses.base import DerivativeLoss
from fmm_distill.training import checkpoint
from fmm_distill.training.callbacks import CallbackList, ProgressBar, StepLog
from fmm_distill.training.compile import accelerate_networks, network_of
from fmm_distill.training.ema import build_averages, frozen_copy
from fmm_distill.training.fsdp import (
    autocast,
    check_moments,
    clip_gradients,
    full_state,
    is_sharded,
    wrap,
    wrap_blocks,
    wrapped_blocks,
)
from fmm_distill.training.memory import memory_error, peak_memory
from fmm_distill.training.nonfinite import (
    OF_CRITIC,
    NonFiniteSteps,
    finite_or_none,
    forget_gradients,
    is_overflow,
    worst_samples,
)
from fmm_distill.training.objective import Objective, resolve_engine
from fmm_distill.training.optimizer import learning_rate, optimizer_factory
from fmm_distill.training.phases import phase_of
from fmm_distill.training.process import allow_unused_parameters
from fmm_distill.training.second_stage import SecondStage, build_critics
from fmm_distill.training.signals import TrainingStoppedError, stop_requests
from fmm_distill.training.stage_end import StageEnd
from fmm_distill.training.trackers import TrackerLog
from fmm_distill.training.train_state import OptimizerState, TrainState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from accelerate import Accelerator
    from torch import Tensor, nn

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.core.draws import Draws
    from fmm_distill.core.flow_map import FlowMap, LearnedFlowMap
    from fmm_distill.data.samples import Samples
    from fmm_distill.losses.base import Loss
    from fmm_distill.teachers.base import Distillable
    from fmm_distill.training.callbacks import Callback
    from fmm_distill.training.optimizer import OptimizerFactory
    from fmm_distill.training.signals import StopRequest

    # The worst samples of a skipped step, or why there are none.
    _Reason = TypeVar("_Reason", str, list[dict[str, float | None]])

    # Evaluates after a number of steps, or does nothing and returns None.
    Evaluate = Callable[[int], Sequence[Mapping[str, Any]] | None]

__all__ = ["Trainer", "TrainingDivergedError"]

logger = logging.getLogger(__name__)


class TrainingDivergedError(FmmDistillError):
    """Too many consecutive losses or gradients are not finite."""


class Trainer:
    """Train a student; ``run`` resumes from the newest checkpoint in ``folder``.

    Args:
        images: data that jumps may start from; None: noise alone.
        folder: the folder of the run, which exists.
        optimizer: builds the optimizer of the trained parameters. Its own learning rates are the peaks of the schedule.
            None: the recipe's optimizer.
    """

    def __init__(
        self,
        student: LearnedFlowMap,
        teacher: Distillable,
        recipe: Recipe,
        images: Samples | None,
        folder: Path,
        accelerator: Accelerator,
        *,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        training = recipe.training
        self.recipe, self.teacher, self.images, self.folder = recipe, teacher, images, folder
        self.accelerator = accelerator
        self.total, self.end = recipe.total_steps, StageEnd(recipe, folder, accelerator)
        self.non_finite = NonFiniteSteps(training.max_non_finite_steps)
        self.sharded = student.needs_functional_jvp = is_sharded(accelerator)
        # Under FSDP the first process evaluates and exports a copy that is not split. It shares no weight with the
        # student, also no frozen one, since a shared weight would be on one device for both.
        copied = self.sharded and accelerator.is_main_process
        self.plain = copy.deepcopy(student).requires_grad_(False).eval().to("cpu") if copied else student
        teacher.to(accelerator.device)
        student.to(accelerator.device)
        self.student = student
        # Before the networks are compiled: an average is a plain copy.
        self.averages = build_averages(student, training.ema)
        self.frozen = frozen_copy(student) if any(loss.target_network == "frozen" for loss in recipe.losses) else None
        self.critics = None if recipe.matching is None else build_critics(student, teacher, recipe)
        self._accelerate_networks()
        objective = self._objective()
        self.times, self.weight = objective.times, objective.weight
        if self.sharded and optimizer is not None:
            check_moments(optimizer)
        factory = optimizer or optimizer_factory(recipe.optimizer)
        trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        built = factory(trained)
        defaults = [dict(group) for group in built.param_groups]
        self.peaks = [float(group["lr"]) for group in built.param_groups]
        if self.sharded:
            logger.info(wrap_blocks(accelerator, wrapped_blocks(accelerator, network_of(student))))
        copies = [self.averaged_student(rate) for rate in self.averages]
        copies += [] if self.frozen is None else [self.frozen]
        copies += [] if self.critics is None else [cast("Any", self.critics[1].module).called]
        self.second: SecondStage | None = None
        optimizers = [built]
        if self.critics is not None:
            self.second = SecondStage(objective, trained, self.critics, recipe, images, accelerator)
            optimizers.append(self.second.of_student)
        self.objective, *self.optimizers = wrap(
            accelerator, objective, optimizers, copies, method=None if self.second is None else "sample"
        )
        parameters = list(self.objective.parameters())
        first = OptimizerState(built, parameters, defaults)
        self.states = [TrainState(student, self.averages, self.frozen, self.weight, first, accelerator.scaler)]
        if self.second is not None:
            self.states.append(self.second.joined(self.states[0], parameters))
        self._set_stage(0)

    def _accelerate_networks(self) -> None:
        """Switch on the options of the networks, and find parameters without gradients."""
        student, critic = self.student, None if self.critics is None else self.critics[0]
        x, t, r, cond = at = probe_inputs(self.teacher, self.accelerator.device)
        if self.accelerator.num_processes > 1 and not self.sharded:
            # One sample: a process may have samples of one of two networks alone.
            one = (x[:1], t[:1], r[:1], None if cond is None else cond.part(0, 1))
            outputs: dict[nn.Module, Tensor] = {student: student.mean_velocity(*one)}
            # All weights of the critic are trained, also those that no layer of a scaled student uses.
            outputs |= {} if critic is None else {critic: critic.velocity(one[0], one[1], one[3])}
            allow_unused_parameters(self.accelerator, outputs)
        accelerate_networks(self.recipe.training, student, self.teacher, at, critic)

    def averaged_student(self, rate: float) -> LearnedFlowMap:
        """Return the student with the moving average of this rate as its weights."""
        return cast("LearnedFlowMap", self.averages[rate].module)

    def full_average(self, rate: float) -> LearnedFlowMap:
        """Return ``averaged_student`` in a form that the first process can call alone.

        Every process has to call this method. Under FSDP the first process gets a copy on its device, which later steps
        do not change, and the others get the split one.
        """
        if not self.sharded:
            return self.averaged_student(rate)
        main = self.accelerator.is_main_process
        state = full_state(self.averages[rate].module.state_dict(), main=main)
        if not main:
            return self.averaged_student(rate)
        average = copy.deepcopy(self.plain)
        average.load_state_dict(state)
        return average.to(self.accelerator.device)

    def run(self, callbacks: Sequence[Callback] = (), evaluate: Evaluate | None = None) -> None:
        """Train to the last step, with checkpoints and one JSON line per step in the run folder.

        Args:
            callbacks: called in the first process.
            evaluate: called in every process with the number of steps done: at the start, after each step and, with a
                smaller number, after a return to a checkpoint. The rows that it returns in the first process are passed
                to ``on_evaluate``. It must not change the student.

        Raises:
            TrainingDivergedError: if losses or gradients are not finite again after a return to a checkpoint.
            TrainingStoppedError: on SIGTERM or Ctrl-C, after a checkpoint was saved.
            OutOfMemoryError: if a step does not fit into memory.
        """
        own = (StepLog(self.folder), ProgressBar(self.total), TrackerLog(self.accelerator))
        hooks = CallbackList((*own, *callbacks) if self.accelerator.is_main_process else ())
        with hooks.ending():
            step = self._started(self.resume(), hooks)
            if step == 0 and self.end.may_export(0):
                self._set_stage(-1)
                self.save_checkpoint(0, hooks)
            if not self._evaluated(step, hooks, evaluate):
                self._loop(step, hooks, evaluate)

    def _loop(self, step: int, hooks: CallbackList, evaluate: Evaluate | None) -> None:
        ended = False
        with stop_requests() as request:
            while not ended:
                metrics, stop = self.train_step(step, request)
                step += 1
                hooks.on_step(step, metrics)
                if self.non_finite.limit_reached:
                    step = self._started(self._return_to_checkpoint(step), hooks)
                elif stop or self.end.stores(step):
                    self.save_checkpoint(step, hooks)
                if stop and step < self.total:
                    raise TrainingStoppedError(step, request.signal or signal.SIGTERM)
                ended = self._evaluated(step, hooks, evaluate)
        if skipped := self.non_finite.skipped:
            logger.warning(f"{skipped} of {self.total} steps had a non-finite loss or gradient and were skipped")

    def _started(self, step: int, hooks: CallbackList) -> int:
        hooks.on_start(step)
        self.accelerator.wait_for_everyone()
        return step

    def _evaluated(self, step: int, hooks: CallbackList, evaluate: Evaluate | None) -> bool:
        """Evaluate if a step is due, and return whether training ends with it."""
        rows = None if evaluate is None else evaluate(step)
        if rows is not None:
            hooks.on_evaluate(step, rows)
        return self.end.reached(step)

    def load_exported(self) -> int:
        """Load the state that is exported, the last without early stopping, and return its number of steps."""
        if (stored := self.end.exported()) is not None:
            self.restore(stored)
        return self.total if stored is None else stored.step

    @property
    def optimizer(self) -> Any:  # noqa: ANN401 accelerate's wrapper
        """The student's optimizer in the current stage."""
        return self.optimizers[self.stage]

    @property
    def state(self) -> TrainState:
        """The part of the training that a checkpoint of the current stage stores."""
        return self.states[self.stage]

    def train_step(self, step: int, request: StopRequest) -> tuple[dict[str, Any], bool]:
        """Take an optimizer step, or skip it if the loss or the gradient is not finite.

        Returns:
            The line of ``steps.jsonl``, and True if any process received a request to stop.
        """
        training, started = self.recipe.training, time.perf_counter()
        self._set_stage(step)
        if self.second is not None and step == self.recipe.map_steps:
            self._start_second_stage()
        self._update_target(step - self.recipe.student.regression_steps)
        metrics: dict[str, Any] = {"step": step} | phase_of(self.recipe, step)
        if self.second is not None and self.second.is_warmup(step) and self.stage:
            measured, stop = self._critic_step(self.second, step, request)
        else:
            measured, stop = self._student_step(step, request)
        metrics |= measured
        metrics["images_per_second"] = training.batch_size / (time.perf_counter() - started)
        metrics["peak_memory_gib"] = peak_memory(self.accelerator.device) / 2**30
        return metrics, stop

    def _critic_step(self, second: SecondStage, step: int, request: StopRequest) -> tuple[dict[str, Any], bool]:
        """Take an update of the critic alone."""
        try:
            update = second.update(step, self.non_finite.lr_scale)
        except RuntimeError as error:
            raise memory_error(error, step) from error
        stop = torch.tensor(float(request.signal > 0), device=self.accelerator.device)
        stopped = float(cast("Tensor", self.accelerator.reduce(stop, "mean"))) > 0
        metrics = update.metrics()
        if not update.finite:
            metrics["skipped"] = OF_CRITIC
        if self.non_finite.count(update.finite):
            logger.warning(f"step {step}: {OF_CRITIC}: the step is skipped (further steps are counted)")
        return metrics, stopped

    def _student_step(self, step: int, request: StopRequest) -> tuple[dict[str, Any], bool]:
        """Take a step of the student, in the second stage after updates of the critic."""
        training, second = self.recipe.training, self.second if self.stage else None
        rate = self._set_rates(step)
        # Each process draws the complete batch and takes its part, so that their number changes no draw.
        groups = self.recipe.time_sampling.groups
        draws = draw(
            training.seed,
            step,
            training.batch_size,
            self.teacher.event_shape,
            groups=groups,
            renoised=second is not None,
        )
        try:
            critic_is_finite = second is None or second.update(step, self.non_finite.lr_scale).finite
            losses, weighted, gradient_norm, health = self._gradient(draws, step)
        except RuntimeError as error:
            raise memory_error(error, step) from error
        # The request to stop is among the means, so that all processes stop after the same step.
        means = torch.stack([losses.mean(), weighted, losses.new_full((), float(request.signal > 0)), *health])
        # The only synchronization of host and device in a step: everything is read at once.
        numbers = torch.cat([cast("Tensor", self.accelerator.reduce(means, "mean")), gradient_norm[None]])
        loss, weighted_loss, stop, *errors, norm = numbers.tolist()
        metrics: dict[str, Any] = {"loss": finite_or_none(loss), "weighted": finite_or_none(weighted_loss)}
        metrics |= {"gradient_norm": finite_or_none(norm), "learning_rate": rate}
        if second is not None:
            # Of sums over the samples that are matched, whose number differs between processes.
            critic, teacher = (error / max(errors[2], 1e-9) for error in errors[:2])
            metrics |= {"critic_loss": finite_or_none(critic), "teacher_loss": finite_or_none(teacher)}
            second.health.count(critic, teacher, step)
        if not critic_is_finite:
            # The student does not follow a critic that has not seen its samples.
            metrics["skipped"] = self._leave_out(step, loss, norm, OF_CRITIC)
        elif (skipped := self._update(step, loss, norm, draws, losses)) is not None:
            metrics["skipped"] = skipped
        return metrics, stop > 0

    def _set_rates(self, step: int) -> float:
        """Set the learning rates of the student's optimizer at a step, and return the first."""
        if self.stage and self.second is not None:
            rates = [self.second.learning_rate(step)] * len(self.optimizer.param_groups)
        else:
            rates = [learning_rate(peak, self.recipe.training, step, self.recipe.map_steps) for peak in self.peaks]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            # Set at each step instead of by a scheduler object, whose state a checkpoint would have to hold.
            group["lr"] = rate * self.non_finite.lr_scale
        return rates[0] * self.non_finite.lr_scale

    def _set_stage(self, step: int) -> None:
        """Select the optimizer, the stored state and the decay of the averages of a step."""
        matching = self.recipe.matching
        self.stage = int(matching is not None and step >= self.recipe.map_steps)
        for rate, average in self.averages.items():
            cast("Any", average).rate = min(rate, matching.ema) if matching is not None and self.stage else rate

    def _start_second_stage(self) -> None:
        """Start from the first average, with a critic that equals the teacher."""
        self.student.load_state_dict(self.averaged_student(self.recipe.training.ema[0]).state_dict())
        for average in self.averages.values():
            average.n_averaged.zero_()
        # Free for the second optimizer.
        self.states[0].optimizer.optimizer.state.clear()
        cast("SecondStage", self.second).start()

    def _update(
        self, step: int, loss: float, norm: float, draws: Draws, losses: Tensor
    ) -> str | list[dict[str, float | None]] | None:
        """Update weights and averages. Return None, or for a skipped step the reason or the worst samples."""
        overflow = is_overflow(self.accelerator.scaler, norm)
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
            return self._leave_out(step, loss, norm, self._worst(draws, losses, step))
        # A gradient scaler finds its scale by infinite gradients, and skips those steps itself.
        self.optimizer.step()
        self.optimizer.zero_grad()
        if overflow:
            return "the gradient scaler lowers its scale"
        for average in self.averages.values():
            average.update_parameters(self.student)
        self.non_finite.count(finite=True)
        return None

    def _leave_out(self, step: int, loss: float, norm: float, reason: _Reason) -> _Reason:
        """Drop the gradients of a step, count it as non-finite, and return the reason."""
        # They would be added to the next ones.
        self.optimizer.zero_grad()
        forget_gradients(self.accelerator.scaler)
        if self.non_finite.count(finite=False):
            numbers = reason if isinstance(reason, str) else f"loss {loss:g}, gradient norm {norm:g}"
            where = "" if isinstance(reason, str) else "steps.jsonl has the times t, r of its samples; "
            logger.warning(f"step {step}: {numbers}: the step is skipped ({where}further steps are counted)")
        return reason

    def _gradient(self, draws: Draws, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return this process's losses, shape ``[part]``, their weighted mean, and the norm of the full gradient.

        The last are the sums of ``StepLosses.health``, shape ``[3]``; empty in the first stage.
        """
        training, accelerator = self.recipe.training, self.accelerator
        parts = training.gradient_accumulation_steps
        size = training.batch_size // (accelerator.num_processes * parts)
        first = accelerator.process_index * parts
        found, (sums, norm) = [], torch.zeros(2, device=accelerator.device)
        health = sums.new_zeros(3 * self.stage)
        for part in range(first, first + parts):
            mine = draws.part(part * size, (part + 1) * size, accelerator.device)
            images = None if self.images is None else self.images.pick(mine).to(mine.noise.device)
            with accelerator.accumulate(self.objective):
                with autocast(accelerator):
                    losses, each, errors = self.objective(mine, images, step)
                weighted = each.float().mean()
                # The backward pass of a difference is a difference as well, and needs all digits of float32.
                with without_tensor_float() if self.differences else nullcontext():
                    accelerator.backward(weighted)
                if accelerator.sync_gradients:
                    parameters = self.objective.parameters()
                    norm = clip_gradients(accelerator, self.optimizer, parameters, training.max_grad_norm).to(sums)
            # Detached, so that the graph of a part is free before the next one.
            found.append(losses.detach())
            # accelerate divides the loss of the backward pass by the number of parts itself.
            sums += weighted.detach() / parts
            health = health if errors is None else health + errors
        return torch.cat(found), sums, norm, health

    def _objective(self) -> Objective:
        """Return the objective, with the derivative engine of each loss resolved."""
        recipe, student = self.recipe, self.student
        copies: dict[str, FlowMap] = {"average": self.averaged_student(recipe.training.ema[0])}
        if self.frozen is not None:
            copies["frozen"] = self.frozen
        losses = [self._resolve_engine(loss) for loss in recipe.losses]
        slopes = [loss for loss in losses if isinstance(loss, DerivativeLoss) and loss.keeps_graph]
        self.differences = any(loss.derivative == "central" for loss in slopes)
        # Evaluation mode: dropout would differ between value and target (arXiv 2505.18825 switches it off too).
        lockstep, critic = self.sharded, None if self.critics is None else cast("Any", self.critics[1].module)
        return Objective(student, self.teacher, recipe, losses, copies, lockstep=lockstep, critic=critic).eval()

    def _resolve_engine(self, loss: Loss) -> Loss:
        resolved, reason = resolve_engine(self.student, self.teacher, loss, self.recipe.training)
        if reason is not None:
            logger.warning(reason)
        return resolved

    def _worst(self, draws: Draws, losses: Tensor, step: int) -> list[dict[str, float | None]]:
        """Return the worst samples of all processes."""
        size = len(losses)
        first = self.accelerator.process_index * size
        t, r = self.times(draws.part(first, first + size, "cpu"), step)
        return worst_samples(gather_object(list(zip(t.tolist(), r.tolist(), losses.tolist(), strict=True))))

    def _update_target(self, step: int) -> None:
        """Set the frozen target to the average: after the regression, and every ``target_update_every`` steps."""
        # A function of the step alone, so that a resumed run updates at the same steps.
        every = self.recipe.training.target_update_every
        regressed = step == 0 and self.recipe.student.regression_steps > 0
        if self.frozen is not None and (regressed or (every and step > 0 and step % every == 0)):
            self.frozen.load_state_dict(self.averaged_student(self.recipe.training.ema[0]).state_dict())

    def save_checkpoint(self, step: int, hooks: Callback | None = None) -> None:
        """Write a checkpoint and remove older ones. Every process has to call it."""
        main = self.accelerator.is_main_process
        tensors = self.state.tensors(main=main)
        if main:
            plain = self.state.plain() | {"non_finite_steps": self.non_finite.state_dict()}
            path = self.end.save(checkpoint.Checkpoint(step, tensors, plain))
            if hooks is not None:
                hooks.on_checkpoint(step, path)
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Load the newest complete checkpoint and return its number of steps; 0 if there is none."""
        found = checkpoint.newest_complete(self.folder / "checkpoints")
        if found is None:
            return 0
        path, stored = found
        self.restore(stored)
        if stored.step < self.total:
            logger.info(f"resuming from {path.name}")
        return stored.step

    def restore(self, stored: checkpoint.Checkpoint) -> None:
        """Restore weights, averages, optimizer state and counts from a checkpoint."""
        # Of the stage of its last step.
        self._set_stage(stored.step - 1)
        self.state.load(stored)
        self.non_finite = NonFiniteSteps(self.recipe.training.max_non_finite_steps, **stored.state["non_finite_steps"])

    def _return_to_checkpoint(self, step: int) -> int:
        """Return to the newest checkpoint with half the learning rate, and return its number of steps."""
        limit = self.non_finite.limit
        if self.non_finite.lr_scale < 1:
            raise TrainingDivergedError(
                f"step {step - 1}: expected finite losses and gradients, got {limit} non-finite steps in a row, at "
                "half the learning rate too; the newest checkpoint is complete. Try a lower optimizer.lr, or "
                "training.precision: fp32, look at the times t, r of the samples (steps.jsonl), and start with --fresh"
            )
        halved = self.non_finite.halved()
        found = checkpoint.newest_complete(self.folder / "checkpoints")
        if found is not None:
            self.restore(found[1])
            step = found[1].step
        # After ``restore``, which has loaded the count of the checkpoint.
        self.non_finite = halved
        where = f"step {step}" if found is None else found[0].name
        logger.warning(f"{limit} non-finite steps in a row: continuing from {where} with half the learning rate")
        return step
