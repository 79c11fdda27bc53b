"""Evaluations during training, which leave the training unchanged."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.evaluation.evaluator import EvaluationSpec, Evaluator
from fmm_distill.evaluation.gallery import COLUMNS, SEED, Gallery
from fmm_distill.evaluation.pictures import plot_samples
from fmm_distill.io.files import append_line, write_text, writing
from fmm_distill.io.reading import read_lines
from fmm_distill.training.early_stopping import evaluation_settings, is_evaluated
from fmm_distill.training.trackers import log_picture, log_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from accelerate import Accelerator

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.data.samples import Images
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["Monitor"]

# Protocol entries that a comparison of two runs needs; evaluation.json has them all.
_ESSENTIALS = (
    *("ode_solver_error", "frechet_samples", "frechet_reference", "precision_recall", "noise_seed", "guidance"),
    "image_guidance",
    "stochasticity",
)
_KEYS = {"step": int, "rows": list, "settings": dict}


class Monitor:
    """Evaluates a moving average every so many steps, into the folder of the run.

    The steps are those of ``evaluation.every`` and, in a second stage, of ``matching.evaluate_every``.

    Every process has a monitor; the first writes ``evaluations.jsonl`` and ``pictures/``.

    Args:
        student: returns the first moving average. Every process calls it, since gathering shards needs them all.
        reference: images for the Fréchet distance.
        folder: of the run; it exists.
    """

    def __init__(
        self,
        student: Callable[[], Student],
        teacher: Teacher,
        recipe: Recipe,
        reference: Images | None,
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        self.student, self.teacher, self.reference = student, teacher, reference
        self.recipe, self.accelerator = recipe, accelerator
        self.log, self.pictures = folder / "evaluations.jsonl", folder / "pictures"
        self.lines: list[dict[str, Any]] | None = None
        self.evaluation: tuple[Evaluator, Gallery] | None = None

    def reached(self, step: int) -> list[dict[str, Any]] | None:
        """Remove results of later steps, and evaluate if this step is due and has no result.

        Args:
            step: the number of finished steps; the evaluation at the end of the run has the last.

        Returns:
            The rows, in the first process and only if it evaluated.

        Raises:
            UserError: if a file can't be written.
        """
        rows = None
        main = self.accelerator.is_main_process
        if main:
            self.lines = self._cut(step)
        if is_evaluated(self.recipe, step):
            student = self.student()
            if main and all(line["step"] != step for line in self.lines or ()):
                rows = self._evaluate(step, student)
            self.accelerator.wait_for_everyone()
        return rows

    def _cut(self, step: int) -> list[dict[str, Any]]:
        """Return the lines up to a step, and remove the others from the file."""
        if self.lines is not None and all(line["step"] <= step for line in self.lines):
            return self.lines
        lines = read_lines(self.log, _KEYS, todo=f"remove the lines from there on of {self.log.name}, and run it again")
        earlier = [line for line in lines if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in earlier)
        if self.log.is_file() and self.log.read_text(encoding="utf-8") != text:
            # An interruption leaves a part of a line after the last newline; it is removed too.
            write_text(self.log, text)
        for picture in self.pictures.glob("samples-*.png"):
            number = picture.stem.removeprefix("samples-")
            if number.isdecimal() and int(number) > step:
                picture.unlink()
        return earlier

    def _evaluate(self, step: int, student: Student) -> list[dict[str, Any]]:
        device = self.accelerator.device
        # A feature network is initialized from the global generator before its weights are loaded.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            evaluator, gallery = self.evaluation = self.evaluation or self._open(device)
            rows = evaluator.rows_of_students({"student": student})
            settings = evaluation_settings(self.recipe)
            measured = [line for line in self.lines or () if line["settings"] == settings]
            # The teacher's rows depend on the settings alone and are measured once for them.
            if not any(row["sampler"] != "student" for line in measured for row in line["rows"]):
                rows += evaluator.rows_of_teacher()
            picture = self.pictures / f"samples-{step}.png"
            with writing(picture):
                self.pictures.mkdir(exist_ok=True)
                chosen = self.recipe.evaluation
                plot_samples(gallery.rows(student, chosen.steps, chosen.stochasticity), picture)
        line: dict[str, Any] = {"step": step, "ema": self.recipe.training.ema[0], "rows": [asdict(row) for row in rows]}
        line |= {"settings": settings, "protocol": {key: evaluator.protocol.get(key) for key in _ESSENTIALS}}
        append_line(self.log, json.dumps(line))
        self.lines = [*(self.lines or ()), line]
        log_rows(self.accelerator, line["rows"], step)
        log_picture(self.accelerator, picture, step)
        return list(line["rows"])

    def _open(self, device: torch.device) -> tuple[Evaluator, Gallery]:
        settings = self.recipe.evaluation
        spec = EvaluationSpec(self.teacher, settings, self.reference, device, quick=True)
        return Evaluator(spec), Gallery(self.teacher, settings.endpoint_solver_steps, COLUMNS, SEED, device)
