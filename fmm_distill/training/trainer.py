"""The loop: an objective stepped by accelerate, its averages, its checkpoints."""

from __future__ import annotations

import copy
import json
import logging
import math
import signal
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import AutocastKwargs, gather_object
from tqdm import tqdm

from fmm_distill.core.derivatives.precision import without_tensor_float
from fmm_distill.core.draws import draw
from fmm_distill.data.starting_points import somewhere
from fmm_distill.errors import FmmDistillError
from fmm_distill.io.files import append_line, write_text
from fmm_distill.losses.base import DerivativeSettings
from fmm_distill.training import checkpoint
from fmm_distill.training.compile import accelerate_networks, network_of
from fmm_distill.training.ema import averaged, frozen_copy, load_trained, trained_state
from fmm_distill.training.fsdp import is_sharded, name_blocks, placed_like, shard, whole, whole_state
from fmm_distill.training.memory import peak_memory
from fmm_distill.training.nonfinite import Faults
from fmm_distill.training.objective import Objective, settle_engine
from fmm_distill.training.signals import TrainingStoppedError, stop_requests
from fmm_distill.training.trackers import log_step

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from accelerate import Accelerator
    from torch import Tensor

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.config.settings import TrainingSettings
    from fmm_distill.core.draws import Draws
    from fmm_distill.core.flow_map import FlowMap, LearnedFlowMap
    from fmm_distill.data.samples import Samples
    from fmm_distill.losses import AnyLossSettings
    from fmm_distill.teachers.base import Distillable
    from fmm_distill.training.signals import StopRequest

__all__ = ["OutOfMemoryError", "Trainer", "TrainingDivergedError", "learning_rate"]

logger = logging.getLogger(__name__)


class TrainingDivergedError(FmmDistillError):
    """Too many losses or gradients in a row are no numbers."""


class OutOfMemoryError(FmmDistillError):
    """A step does not fit into the device's memory."""


def learning_rate(training: TrainingSettings, step: int, total: int) -> float:
    """The rate of a step: linear warm-up, then constant or half a cosine down to 0."""
    warm = min(1.0, (step + 1) / (training.warmup_steps + 1))
    if training.decay == "constant":
        return training.learning_rate * warm
    return training.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / total))


class Trainer:
    """A student, its moving averages and its optimizer; ``run`` goes on from the newest checkpoint in ``folder``."""

    def __init__(
        self,
        student: LearnedFlowMap,
        teacher: Distillable,
        recipe: Recipe,
        images: Samples | None,
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        training = recipe.training
        self.parts = accelerator.num_processes * training.accumulation
        self.recipe, self.teacher, self.images, self.folder = recipe, teacher, images, folder
        self.accelerator = accelerator
        self.total = recipe.student.regression_steps + training.steps
        self.faults = Faults(training.bad_steps)
        teacher.to(accelerator.device)
        student.to(accelerator.device)
        self.student = student
        self.sharded = student.needs_functional_jvp = is_sharded(accelerator)
        # Before the networks are compiled: an average is a plain copy.
        self.averages = {rate: averaged(student, rate) for rate in recipe.training.ema}
        # What is evaluated and exported, where the student and its averages are split; the first process does that.
        alone = self.sharded and accelerator.is_main_process
        self.plain = frozen_copy(student).to("cpu") if alone else student
        # Evaluation mode: dropout would differ between value and target (it is off in arXiv 2505.18825 too).
        copies: dict[str, FlowMap] = {"average": self.averaged_student(recipe.training.ema[0])}
        self.frozen: LearnedFlowMap | None = None
        if any(loss.follows == "frozen" for loss in recipe.losses):
            self.frozen = copies["frozen"] = frozen_copy(student)
        accelerate_networks(training, student, teacher, somewhere(teacher, accelerator.device))
        losses = [self._settle_engine(settings) for settings in recipe.losses]
        slopes = [loss for loss in losses if isinstance(loss, DerivativeSettings) and loss.keeps_graph]
        self.differences = any(loss.derivative == "central" for loss in slopes)
        objective = Objective(student, teacher, recipe, losses, copies, in_step=self.sharded).eval()
        self.weight = objective.weight
        optimizer = torch.optim.AdamW(
            objective.parameters(),
            lr=training.learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
            # One kernel for all of a step; other devices have none.
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self.times = objective.times
        if self.sharded:
            logger.info(name_blocks(accelerator, network_of(student)))
            frozen = [] if self.frozen is None else [self.frozen]
            for other in [*(self.averaged_student(rate) for rate in self.averages), *frozen]:
                shard(network_of(other), accelerator)
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)

    def averaged_student(self, rate: float) -> LearnedFlowMap:
        """The student with the moving average of this rate as its weights."""
        return cast("LearnedFlowMap", self.averages[rate].module)

    def whole_average(self, rate: float) -> LearnedFlowMap:
        """``averaged_student`` as one process can use it alone. Every process has to ask, the first gets the weights.

        Under FSDP a copy, on the device; later steps leave it as it is.
        """
        if not self.sharded:
            return self.averaged_student(rate)
        main = self.accelerator.is_main_process
        state = whole_state(self.averages[rate].module.state_dict(), keep=main)
        if not main:
            return self.averaged_student(rate)
        average = copy.deepcopy(self.plain)
        average.load_state_dict(state)
        return average.to(self.accelerator.device)

    def _settle_engine(self, settings: AnyLossSettings) -> AnyLossSettings:
        settled, reason = settle_engine(self.student, self.teacher, settings, self.recipe.training)
        if reason is not None:
            logger.warning(reason)
        return settled

    def run(self, reached: Callable[[int], None] | None = None) -> None:
        """Train to the last step; checkpoints and one JSON line a step on the way.

        Args:
            reached: told on every process how many steps are done: at the start, after each step and, then smaller,
                after a return to a checkpoint. What it does may not change the student.

        Raises:
            TrainingDivergedError: if losses or gradients are no numbers, after one return to a checkpoint.
            TrainingStoppedError: after SIGTERM or Ctrl-C, when what was reached is saved.
            OutOfMemoryError: if a step does not fit.
        """
        step = self._resume()
        if reached is not None:
            reached(step)
        if step >= self.total:
            return
        training = self.recipe.training
        main = self.accelerator.is_main_process
        bar = tqdm(total=self.total, initial=step, unit="step", disable=not main, mininterval=1.0, desc="distill")
        log = self.folder / "steps.jsonl"
        with stop_requests() as request, bar:
            while step < self.total:
                started = time.perf_counter()
                record, stop = self._step(step, request)
                record["images_per_second"] = training.batch_size / (time.perf_counter() - started)
                record["peak_memory_gib"] = peak_memory(self.accelerator.device) / 2**30
                if main:
                    append_line(log, json.dumps(record))
                log_step(self.accelerator, record)
                self._show(bar, record)
                step += 1
                if self.faults.too_many:
                    step = self._go_back(step)
                    bar.n = step
                elif step % training.checkpoint_every == 0 or step == self.total or stop:
                    self._save(step)
                if stop and step < self.total:
                    raise TrainingStoppedError(step, request.signal or signal.SIGTERM)
                if reached is not None:
                    reached(step)
        if self.faults.skipped:
            logger.warning(f"{self.faults.skipped} of {self.total} steps were left out: loss or gradient was no number")

    def _show(self, bar: Any, record: dict[str, Any]) -> None:  # noqa: ANN401 tqdm
        loss = "nan" if record["loss"] is None else f"{record['loss']:.4f}"
        rate, memory = f"{record['images_per_second']:.0f}", f"{record['peak_memory_gib']:.1f}"
        bar.set_postfix(phase=record["phase"], loss=loss, images_s=rate, GiB=memory)
        bar.update()

    def _step(self, step: int, request: StopRequest) -> tuple[dict[str, Any], bool]:
        """One optimizer step, left out if it is no number; its record, and whether any process was asked to stop."""
        training = self.recipe.training
        self._refresh(step - self.recipe.student.regression_steps)
        rate = learning_rate(training, step, self.total) * self.faults.rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        draws = draw(training.seed, step, training.batch_size, self.teacher.event_shape)
        try:
            losses, weighted, gradient_norm = self._gradient(draws, step)
        except RuntimeError as error:
            raise _memory_error(error, step) from error
        means = torch.stack([losses.mean(), weighted, losses.new_full((), float(request.signal > 0))])
        # The one time in a step that the host waits for the device.
        numbers = torch.cat([self.accelerator.reduce(means, "mean"), gradient_norm[None]])
        loss, weighted_loss, stop, norm = numbers.tolist()
        overflow = self._is_overflow(norm)
        good = math.isfinite(loss) and (math.isfinite(norm) or overflow)
        if good:
            # With a gradient scaler an infinite gradient is its way to find the scale: it leaves that step out itself.
            self.optimizer.step()
        if good and not overflow:
            for average in self.averages.values():
                average.update_parameters(self.student)
        self.optimizer.zero_grad()
        record = {"step": step} | self._phase(step)
        record |= {"loss": _number(loss), "weighted": _number(weighted_loss), "gradient_norm": _number(norm)}
        record["learning_rate"] = rate
        if overflow and good:
            return record | {"skipped": "the gradient scaler looks for its scale"}, stop > 0
        if not good:
            record["skipped"] = self._worst(draws, losses, step)
        first = self.faults.count(good)
        if first:
            logger.warning(
                f"step {step}: loss {loss:g}, gradient norm {norm:g}: the step is left out (steps.jsonl has the pairs "
                "of times; further ones are counted)"
            )
        return record, stop > 0

    def _gradient(self, draws: Draws, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """This process's losses, shape ``[part]``, their weighted mean, and the norm of the gradient of all."""
        training, accelerator = self.recipe.training, self.accelerator
        size = training.batch_size // self.parts
        first = accelerator.process_index * training.accumulation
        found, (sums, norm) = [], torch.zeros(2, device=accelerator.device)
        for part in range(first, first + training.accumulation):
            mine = draws.part(part * size, (part + 1) * size, accelerator.device)
            images = None if self.images is None else self.images.pick(mine).to(mine.noise.device)
            with accelerator.accumulate(self.objective):
                with self._autocast():
                    losses, each = self.objective(mine, images, step)
                weighted = each.float().mean()
                with without_tensor_float() if self.differences else nullcontext():
                    accelerator.backward(weighted)
                if accelerator.sync_gradients:
                    clipped = accelerator.clip_grad_norm_(self.objective.parameters(), training.clip)
                    norm = whole(torch.as_tensor(clipped)).to(sums.device)
            found.append(losses.detach())
            sums += weighted.detach() / training.accumulation
        return torch.cat(found), sums, norm

    def _autocast(self) -> AbstractContextManager[None]:
        """Of a student that is split; accelerate puts its other wrapped modules under autocast itself."""
        if not self.sharded:
            return nullcontext()
        # A cast that is kept outlives the gathered weights that it is of, and gradients go missing.
        return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))

    def _is_overflow(self, norm: float) -> bool:
        """Whether a gradient scaler is still on its way down to a scale that fits."""
        scaler = self.accelerator.scaler
        return scaler is not None and not math.isfinite(norm) and scaler.get_scale() > 1

    def _phase(self, step: int) -> dict[str, Any]:
        """What is trained in a step, and how far its warm-ups are."""
        recipe = self.recipe
        regression = recipe.student.regression_steps
        if step < regression:
            return {"phase": "regression"}
        index, step = recipe.stage_at(step - regression)
        stage = None if index is None else recipe.before[index]
        loss, pairs = (recipe.loss, recipe.pairs) if stage is None else (stage.loss, stage.pairs or recipe.pairs)
        now: dict[str, Any] = {"phase": loss.name}
        if step < pairs.band_steps:
            now["longest_jump"] = 0.1 + 0.9 * step / pairs.band_steps
        settled = loss.at_step(step)
        if settled != loss:
            now["tangent_scale"] = cast("Any", settled).tangent_scale
        return now

    def _worst(self, draws: Draws, losses: Tensor, step: int) -> list[dict[str, float | None]]:
        """Up to four samples of all processes, those without a finite loss first, then by its size: t, r and loss."""
        size = len(losses)
        first = self.accelerator.process_index * size
        t, r = self.times(draws.part(first, first + size, "cpu"), step)
        rows = zip(t.tolist(), r.tolist(), losses.tolist(), strict=True)
        found = [{"t": start, "r": end, "loss": _number(loss)} for start, end, loss in rows]
        found = gather_object(found)
        return sorted(found, key=lambda row: -math.inf if row["loss"] is None else -row["loss"])[:4]

    def _go_back(self, step: int) -> int:
        """The newest checkpoint with half the learning rate; the step to go on with."""
        if self.faults.rate < 1:
            raise TrainingDivergedError(
                f"step {step - 1}: {self.faults.limit} steps in a row without a finite loss and gradient, at half the "
                "learning rate too; the newest checkpoint is whole. Lower training.learning_rate, take "
                "training.precision: fp32, or see at which (t, r) it happens (steps.jsonl), and start with --fresh"
            )
        found = checkpoint.newest_whole(self.folder / "checkpoints")
        skipped = self.faults.skipped
        if found is not None:
            self.restore(found[1])
            step = found[1].step
        self._cut_log(step)
        self.faults = replace(self.faults, rate=0.5, skipped=skipped, in_a_row=0)
        where = "from here" if found is None else f"from {found[0].name}"
        logger.warning(
            f"{self.faults.limit} steps in a row without a finite loss and gradient: going on {where}, at half the rate"
        )
        return step

    def _refresh(self, step: int) -> None:
        """The frozen copy becomes the average: after the regression, and every so many steps of the loss."""
        every = self.recipe.training.refresh_steps
        regressed = step == 0 and self.recipe.student.regression_steps > 0
        if self.frozen is not None and (regressed or (every and step > 0 and step % every == 0)):
            self.frozen.load_state_dict(self.averaged_student(self.recipe.training.ema[0]).state_dict())

    def _save(self, step: int) -> None:
        tensors = self._tensors()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {"scaler": scaler.state_dict() if scaler is not None else None, "faults": asdict(self.faults)}
            kept = checkpoint.Checkpoint(step, tensors, state)
            checkpoint.save(self.folder / "checkpoints", kept, self.recipe.training.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, whole on the main process; file stem to named tensors."""
        moments = self.optimizer.state_dict()["state"]
        tensors = {
            "student": trained_state(self.student),
            "optimizer": {f"{i}.{name}": value for i, state in moments.items() for name, value in state.items()},
        }
        for rate, average in self.averages.items():
            updates = {"n_averaged": average.n_averaged}
            tensors[checkpoint.average_name(rate)] = trained_state(self.student, average.module) | updates
        if self.frozen is not None:
            tensors["frozen"] = trained_state(self.student, self.frozen)
        if self.weight is not None:
            tensors["weight"] = dict(self.weight.state_dict())
        main = self.accelerator.is_main_process
        return {stem: whole_state(named, keep=main) for stem, named in tensors.items()}

    def _resume(self) -> int:
        """Load the newest whole checkpoint, drop the log lines after it, and give the step to go on with."""
        found = checkpoint.newest_whole(self.folder / "checkpoints")
        step = 0
        if found is not None:
            path, kept = found
            self.restore(kept)
            step = kept.step
            if step < self.total:
                logger.info(f"going on from {path.name}")
        self._cut_log(step)
        return step

    def _cut_log(self, step: int) -> None:
        log = self.folder / "steps.jsonl"
        if self.accelerator.is_main_process:
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
            write_text(log, "".join(lines[:step]))
        self.accelerator.wait_for_everyone()

    def restore(self, kept: checkpoint.Checkpoint) -> None:
        """Put a checkpoint's weights, averages, optimizer state and counts in place."""
        load_trained(self.student, self.student, kept.tensors["student"])
        for rate, average in self.averages.items():
            state = dict(kept.tensors[checkpoint.average_name(rate)])
            average.n_averaged.copy_(state.pop("n_averaged"))
            load_trained(average.module, self.student, state)
        if self.frozen is not None:
            load_trained(self.frozen, self.student, kept.tensors["frozen"])
        if self.weight is not None:
            self.weight.load_state_dict(placed_like(kept.tensors["weight"], self.weight.state_dict()))
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for key, value in kept.tensors["optimizer"].items():
            index, name = key.split(".")
            # All but the count of steps has its parameter's shape.
            state = {name: value} if name == "step" else placed_like({name: value}, {name: parameters[int(index)]})
            moments.setdefault(int(index), {}).update(state)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if kept.state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(kept.state["scaler"])
        self.faults = Faults(**kept.state["faults"])


def _number(value: float) -> float | None:
    """JSON has no other numbers than finite ones."""
    return value if math.isfinite(value) else None


def _memory_error(error: RuntimeError, step: int) -> RuntimeError | OutOfMemoryError:
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator: can't allocate memory" not in text:
        return error
    return OutOfMemoryError(
        f"step {step} does not fit into memory ({text.splitlines()[0]}). Change first: training.accumulation (twice as "
        "much halves the batch in memory), student.lora.rank (16 in place of every weight), the loss's derivative: "
        "central (no tangents kept); the run goes on from its newest checkpoint"
    )
