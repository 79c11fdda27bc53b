"""The stages of the inpainting experiment: teacher, tables of conditions, students, measurements, results.

Every stage is a command that a user could type; the teacher and the tables are what a user would have.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from experiments.cifar10.experiment import machine, read
from experiments.cifar10.processes import Processes
from experiments.inpainting.conditions import write_conditions
from experiments.inpainting.measure import use_of_images
from experiments.inpainting.teacher import load_pixels
from fmm_distill.config.settings import PromptSettings
from fmm_distill.data.prompts import load_prompts
from fmm_distill.io.files import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from experiments.inpainting.budget import Budget

__all__ = ["STUDENTS", "Experiment"]

STUDENTS = {"scaled": ["student.kind=scaled"], "embedded": ["student.kind=embedded"]}
# Columns of the tables, by keyword of the pipeline's call.
IMAGES = {"image": "image", "mask_image": "mask"}
# Seeds of the tables.
SEEDS = {"train": 0, "test": 1}


class Experiment:
    """The stages in their order, each with its files in ``work``.

    Args:
        data: folder of parquet files with the splits train and test.
        name: of the budget.
    """

    def __init__(self, data: Path, work: Path, output: Path, budget: Budget, name: str) -> None:
        self.data, self.work, self.output, self.budget, self.name = data, work, output, budget, name
        work.mkdir(parents=True, exist_ok=True)
        written, own = work / "budget.json", json.loads(json.dumps(asdict(budget)))
        if written.is_file() and read(written) != own:
            sys.exit(f"{work} has a run of another budget: choose another --work or remove it")
        write_text(written, json.dumps(own))
        # One thread each: the stages are compared in the seconds of one core.
        self.processes = Processes(work / "logs", os.cpu_count() or 1)

    def run(self, names: Sequence[str]) -> None:
        """Run the missing stages of these students."""
        try:
            self._teacher()
            self._tables()
            self._use_of_images()
            for name in names:
                self._student(name)
                self._evaluation(name)
        finally:
            self.processes.stop()
            self.write()

    def _command(self, name: str, words: Sequence[str]) -> None:
        """Run a Python module to its end; without success the experiment ends."""
        self.processes.start(name, [sys.executable, "-m", *words])
        if self.processes.code(name, math.inf):
            sys.exit(f"{name} failed; the same command resumes")

    def _teacher(self) -> None:
        if not (self.work / "teacher" / "model_index.json").is_file():
            words = ["--data", str(self.data), "--output", str(self.work), "--budget", self.name]
            self._command("teacher", ["experiments.inpainting.teacher", *words])

    def _table(self, split: str) -> Path:
        return self.work / split / "conditions.jsonl"

    def _tables(self) -> None:
        counts = {"train": self.budget.conditions, "test": self.budget.test_conditions}
        for split, count in counts.items():
            if not self._table(split).is_file():
                pixels = load_pixels(self.data, split, self.budget.size)
                write_conditions(pixels, count, self.work / split, SEEDS[split])

    def _conditions(self, split: str) -> PromptSettings:
        return PromptSettings(dataset=str(self._table(split)), column=None, images=IMAGES)

    def _use_of_images(self) -> None:
        file = self.work / "use-of-images.json"
        if not file.is_file():
            conditions = load_prompts(self._conditions("test"))
            found = use_of_images(self.work / "teacher", conditions, self.budget.solver_steps)
            write_text(file, json.dumps(found, indent=2) + "\n")

    def changes(self, name: str) -> list[str]:
        """Return the settings of a student, in addition to the recipe ``cifar10-fast``."""
        budget = self.budget
        calls = str(list(budget.calls))
        return [
            f"prompts.dataset={self._table('train')}",
            # The empty prompt with each image.
            "prompts.column=null",
            f"prompts.images={json.dumps(IMAGES)}",
            # The schedule of Stable Diffusion has a signal at its last timestep.
            "timesteps=null",
            "matching=null",
            # Forward mode on a CPU.
            "loss.derivative=auto",
            f"optimizer.lr={budget.learning_rate}",
            f"training.steps={budget.steps}",
            f"training.batch_size={budget.batch}",
            f"training.warmup_steps={min(50, budget.steps // 4)}",
            f"training.ema={budget.student_ema}",
            "training.precision=fp32",
            f"training.checkpoint_every={max(1, budget.steps // 4)}",
            f"evaluation.samples={budget.samples}",
            f"evaluation.endpoint_samples={budget.samples}",
            f"evaluation.endpoint_solver_steps={budget.solver_steps}",
            f"evaluation.batch_size={budget.measure_batch}",
            *(f"evaluation.{key}={calls}" for key in ("steps", "ddim_steps", "dpmsolver_steps")),
            f"export.steps={calls}",
            *STUDENTS[name],
        ]

    def _student(self, name: str) -> None:
        folder = self.work / name
        if not (folder / "student" / "student.json").is_file():
            words = ["fmm_distill", "--teacher", str(self.work / "teacher"), "--recipe", "cifar10-fast"]
            words += [word for change in self.changes(name) for word in ("--set", change)]
            self._command(name, [*words, "--output", str(folder)])

    def _measured(self, name: str) -> Path:
        return self.work / f"{name}-evaluation.json"

    def _evaluation(self, name: str) -> None:
        """Measure an exported student at the conditions of the test split, which it was not trained at."""
        file = self._measured(name)
        if not file.is_file():
            words = [
                "fmm_distill",
                "evaluate",
                str(self.work / name / "student"),
                "--prompts",
                str(self._table("test")),
            ]
            words += ["--output", str(file), "--report", str(self.work / f"{name}-report")]
            self._command(f"{name}-evaluation", words)

    def results(self) -> dict[str, Any]:
        """Return everything that was measured so far."""
        found: dict[str, Any] = {"machine": machine(), "budget": asdict(self.budget), "students": {}}
        if (self.work / "teacher.json").is_file():
            found["teacher"] = read(self.work / "teacher.json")
        if (self.work / "use-of-images.json").is_file():
            found["teacher"]["use of images"] = read(self.work / "use-of-images.json")
        for name in STUDENTS:
            if self._measured(name).is_file():
                evaluation = read(self._measured(name))
                # Start and export included, of one core.
                evaluation["cpu_seconds"] = self.processes.cpu_seconds(name)
                # The run has measured its student at the first conditions that it was trained at.
                evaluation["rows_of_training"] = read(self.work / name / "evaluation.json")["rows"]
                found["students"][name] = evaluation
        return found

    def write(self) -> None:
        """Write the results, and the pictures of samples next to them."""
        # Without the folders of the machine, which a protocol names.
        text = json.dumps(self.results(), indent=1).replace(f"{self.work}/", "")
        write_text(self.output, text + "\n")
        for name in STUDENTS:
            picture = self.work / f"{name}-report" / "samples.png"
            if picture.is_file():
                shutil.copyfile(picture, self.output.with_name(f"{self.output.stem}-{name}.png"))
