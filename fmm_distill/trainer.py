"""The loop: an objective stepped by accelerate, its averages, its checkpoints."""

from __future__ import annotations

import copy
import json
import math
import time
from typing import TYPE_CHECKING, Any, cast

import torch
from tqdm import tqdm

from fmm_distill import checkpoint
from fmm_distill.derivatives import choose_engine
from fmm_distill.ema import averaged, share_frozen
from fmm_distill.errors import FmmDistillError
from fmm_distill.losses.base import DerivativeSettings
from fmm_distill.objective import Objective, condition_of
from fmm_distill.starts import draw

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from accelerate import Accelerator
    from torch import Tensor

    from fmm_distill.data import Samples
    from fmm_distill.flow_map import FlowMap, LearnedFlowMap
    from fmm_distill.losses import AnyLossSettings
    from fmm_distill.recipe import Recipe, TrainingSettings
    from fmm_distill.teachers.base import Distillable

__all__ = ["Trainer", "TrainingDivergedError", "learning_rate"]


class TrainingDivergedError(FmmDistillError):
    """The loss or its gradient is no number any more."""


def learning_rate(training: TrainingSettings, step: int, total: int) -> float:
    """The rate of a step: linear warm-up, then constant or half a cosine down to 0."""
    warm = min(1.0, (step + 1) / (training.warmup_steps + 1))
    if training.decay == "constant":
        return training.learning_rate * warm
    return training.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * step / total))


class Trainer:
    """A student, its moving average and its optimiser; ``run`` goes on from the newest checkpoint in ``folder``.

    Args:
        say: takes each line that a user should read.
    """

    def __init__(
        self,
        student: LearnedFlowMap,
        teacher: Distillable,
        recipe: Recipe,
        images: Samples | None,
        folder: Path,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ) -> None:
        training = recipe.training
        self.parts = accelerator.num_processes * training.accumulation
        self.recipe, self.teacher, self.images, self.folder = recipe, teacher, images, folder
        self.accelerator, self.say = accelerator, say
        self.total = recipe.student.regression_steps + training.steps
        teacher.to(accelerator.device)
        student.to(accelerator.device)
        losses = [self._settle_engine(student, settings) for settings in recipe.losses]
        self.student = student
        self.average = averaged(student, training.ema).requires_grad_(False)
        share_frozen(student, cast("LearnedFlowMap", self.average.module))
        # Evaluation mode: dropout would differ between value and target (it is off in arXiv 2505.18825 too).
        copies: dict[str, FlowMap] = {"average": cast("LearnedFlowMap", self.average.module.eval())}
        self.frozen: LearnedFlowMap | None = None
        if any(loss.follows == "frozen" for loss in losses):
            self.frozen = copies["frozen"] = copy.deepcopy(student).requires_grad_(False).eval()
        objective = Objective(student, teacher, recipe, losses, copies).eval()
        self.weight = objective.weight
        optimizer = torch.optim.AdamW(
            objective.parameters(),
            lr=training.learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
        )
        self.objective, self.optimizer = accelerator.prepare(objective, optimizer)

    def _settle_engine(self, student: LearnedFlowMap, settings: AnyLossSettings) -> AnyLossSettings:
        if not isinstance(settings, DerivativeSettings) or settings.derivative != "auto":
            return settings
        shape = self.teacher.event_shape
        x = torch.zeros(1, *shape, device=self.accelerator.device)
        t = torch.full((1,), self.teacher.schedule.t_max, dtype=torch.float64, device=x.device)
        cond = condition_of(self.teacher, draw(0, 0, 1, shape).part(0, 1, x.device))
        engine, reason = choose_engine(student, x, t, t / 2, cond)
        if settings.central_costs_less:
            engine, reason = "central", "a detached target needs only two more calls, within 1e-3 of forward mode"
        student.zero_grad(set_to_none=True)
        self.say(f"derivatives: {engine} ({reason})")
        return settings.model_copy(update={"derivative": engine})

    def run(self) -> None:
        """Train to the last step; checkpoints and one JSON line a step on the way."""
        first = self._resume()
        if first >= self.total:
            return
        training = self.recipe.training
        main = self.accelerator.is_main_process
        bar = tqdm(total=self.total, initial=first, unit="step", disable=not main, mininterval=1.0, desc="distil")
        # Unbuffered: a full disk fails at the write, and nothing is left over to fail again at the close.
        with (self.folder / "steps.jsonl").open("ab", buffering=0) as log, bar:
            for step in range(first, self.total):
                started = time.perf_counter()
                record = self._step(step)
                record["images_per_second"] = training.batch_size / (time.perf_counter() - started)
                bar.set_postfix(loss=f"{record['loss']:.4f}", images_s=f"{record['images_per_second']:.0f}")
                bar.update()
                done = step + 1
                if main:
                    with checkpoint.writing(self.folder / "steps.jsonl"):
                        log.write((json.dumps(record) + "\n").encode())
                if done % training.checkpoint_every == 0 or done == self.total:
                    self._save(done)

    def _step(self, step: int) -> dict[str, Any]:
        training = self.recipe.training
        regression = step < self.recipe.student.regression_steps
        self._refresh(step - self.recipe.student.regression_steps)
        rate = learning_rate(training, step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        draws = draw(training.seed, step, training.batch_size, self.teacher.event_shape)
        size = training.batch_size // self.parts
        first = self.accelerator.process_index * training.accumulation
        sums = torch.zeros(2, device=self.accelerator.device)
        norm = torch.zeros(())
        for part in range(first, first + training.accumulation):
            mine = draws.part(part * size, (part + 1) * size, self.accelerator.device)
            images = None if self.images is None else self.images.pick(mine).to(mine.noise.device)
            with self.accelerator.accumulate(self.objective):
                losses, each = self.objective(mine, images, step)
                weighted = each.mean()
                self.accelerator.backward(weighted)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.objective.parameters(), training.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            sums += torch.stack([losses.detach().mean(), weighted.detach()]) / training.accumulation
        self.average.update_parameters(self.student)
        loss, weighted_loss = self.accelerator.reduce(sums, "mean").tolist()
        # With a gradient scaler an infinite gradient is its way to find the scale: it skips that step.
        scaled = self.accelerator.scaler is not None
        if not math.isfinite(loss) or not (scaled or bool(torch.as_tensor(norm).isfinite())):
            raise TrainingDivergedError(
                f"step {step}: loss {loss}, gradient norm {float(norm)}; the newest checkpoint is whole: "
                "lower training.learning_rate or take precision: fp32 and start with --fresh"
            )
        phase = "regression" if regression else self.recipe.loss.name
        record = {"step": step, "phase": phase, "loss": loss, "weighted": weighted_loss}
        return record | {"gradient_norm": float(norm), "learning_rate": rate}

    def _refresh(self, step: int) -> None:
        """The frozen copy becomes the average: after the regression, and every so many steps of the loss."""
        every = self.recipe.training.refresh_steps
        regressed = step == 0 and self.recipe.student.regression_steps > 0
        if self.frozen is not None and (regressed or (every and step > 0 and step % every == 0)):
            self.frozen.load_state_dict(self.average.module.state_dict())

    def _save(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            self.accelerator.wait_for_everyone()
            return
        moments = self.optimizer.state_dict()["state"]
        tensors = {
            "student": dict(self.student.state_dict()),
            "ema": dict(self.average.state_dict()),
            "optimizer": {f"{i}.{name}": value for i, state in moments.items() for name, value in state.items()},
        }
        if self.frozen is not None:
            tensors["frozen"] = dict(self.frozen.state_dict())
        if self.weight is not None:
            tensors["weight"] = dict(self.weight.state_dict())
        scaler = self.accelerator.scaler
        state = {"scaler": scaler.state_dict() if scaler is not None else None}
        kept = checkpoint.Checkpoint(step, tensors, state)
        checkpoint.save(self.folder / "checkpoints", kept, self.recipe.training.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Load the newest checkpoint, drop the log lines after it, and give the step to go on with."""
        newest = checkpoint.latest(self.folder / "checkpoints")
        step = 0
        if newest is not None:
            kept = checkpoint.load(newest)
            self.restore(kept)
            step = kept.step
            if step < self.total:
                self.say(f"going on from {newest.name}")
        log = self.folder / "steps.jsonl"
        if self.accelerator.is_main_process and log.is_file():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            checkpoint.write_text(log, "".join(lines[:step]))
        self.accelerator.wait_for_everyone()
        return step

    def restore(self, kept: checkpoint.Checkpoint) -> None:
        """Put a checkpoint's weights, average and optimiser state in place."""
        self.student.load_state_dict(kept.tensors["student"])
        self.average.load_state_dict(kept.tensors["ema"])
        if self.frozen is not None:
            self.frozen.load_state_dict(kept.tensors["frozen"])
        if self.weight is not None:
            self.weight.load_state_dict(kept.tensors["weight"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in kept.tensors["optimizer"].items():
            index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if kept.state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(kept.state["scaler"])
