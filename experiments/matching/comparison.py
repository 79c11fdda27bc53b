"""The rows of the comparison, each trained with the seconds of the map alone, in a JSON file that grows."""

from __future__ import annotations

import json
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from experiments.cifar10.experiment import machine, read
from experiments.matching.cases import CASES, MAP, MAP_PART, map_changes, matching_changes
from experiments.matching.measure import open_judge, passes
from experiments.matching.peer import DMD2
from fmm_distill.config.recipe import load_recipe
from fmm_distill.io.files import write_text
from fmm_distill.run.marker import mark
from fmm_distill.run.plan import plan
from fmm_distill.student.sampling import sample
from fmm_distill.teachers.load import load_teacher
from fmm_distill.training.callbacks import Callback
from fmm_distill.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from experiments.matching.cases import Budget, Case
    from experiments.matching.measure import RecallJudge
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.core.flow_map import LearnedFlowMap

    Sampler = Callable[[Tensor, int], Tensor]

__all__ = ["Comparison"]

RECIPE = "cifar10-fast"
SOLVERS = ("ddim", "dpmsolver++")


class _TimeIsOverError(Exception):
    """The CPU seconds of a case are spent."""


class _Clock(Callback):
    """Ends a run after its CPU seconds, and records the losses of its steps."""

    def __init__(self, seconds: float) -> None:
        self.started, self.seconds, self.lines = time.process_time(), seconds, list[dict[str, Any]]()

    @property
    def spent(self) -> float:
        """CPU seconds so far."""
        return time.process_time() - self.started

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the step, and end the run if its seconds are over."""
        self.lines.append(dict(metrics))
        if self.spent >= self.seconds:
            raise _TimeIsOverError


class Comparison:
    """All rows of one teacher.

    Args:
        cifar10: work folder of ``experiments.cifar10``, with teacher, classifier and images.
        work: folder of the students.
        fastgen: a checkout of FastGen; None: its cases are left out.
    """

    def __init__(self, cifar10: Path, work: Path, output: Path, budget: Budget, fastgen: Path | None) -> None:
        self.cifar10, self.work, self.output, self.budget, self.fastgen = cifar10, work, output, budget, fastgen
        self.teacher_folder = str(cifar10 / "teacher")
        self.teacher = load_teacher(self.teacher_folder)
        self._judge: RecallJudge | None = None
        self._images: Tensor | None = None
        about = json.loads(json.dumps(asdict(budget)))
        self.results: dict[str, Any] = {"budget": about, "machine": machine(), "protocol": {}, "teacher": {}}
        self.results |= {"students": {}}
        if output.is_file():
            self.results = read(output)
            if self.results["budget"] != about:
                sys.exit(f"{output} has another budget: choose another --output or remove it")
        work.mkdir(parents=True, exist_ok=True)

    @property
    def judge(self) -> RecallJudge:
        """The judge of all rows, opened once."""
        if self._judge is None:
            cache = self.work / f"judge-{self.budget.samples}-{self.budget.endpoint_samples}"
            cache.mkdir(exist_ok=True)
            self._judge = open_judge(self.teacher, self.cifar10, self.budget, cache)
            self.results["protocol"] = self._judge.protocol
        return self._judge

    def run(self, names: Sequence[str], seeds: Sequence[int]) -> None:
        """Train and measure the missing rows, seed by seed: maps first, since their seconds are those of the others."""
        for seed in seeds:
            for name in dict.fromkeys([MAP, MAP_PART, *names]):
                if str(seed) not in self.results["students"].get(name, {}).get("seeds", {}):
                    self._case(name, CASES[name], seed)

    def measure_teacher(self) -> None:
        """Measure the missing rows of the teacher under stock schedulers."""
        for kind in SOLVERS:
            if kind not in self.results["teacher"]:
                self.results["teacher"][kind], _ = self.judge.solver(kind, self.budget.calls)
                self._save()

    def _case(self, name: str, case: Case, seed: int) -> None:
        if case.kind == "dmd2" and self.fastgen is None:
            print(f"{name}: left out, it needs --fastgen")
            return
        if case.kind == "map":
            sampler, found = self._map(name, seed)
        elif case.kind == "matching":
            sampler, found = self._matching(name, case, seed)
        else:
            sampler, found = self._dmd2(name, case, seed)
        found["rows"] = self._rows(sampler)
        students = self.results["students"]
        settings = json.loads(json.dumps(asdict(case)))
        students.setdefault(name, {"settings": settings, "seeds": {}})["seeds"][str(seed)] = found
        self._save()
        shown = ", ".join(f"{n}: {row['frechet']:.3g} {row['endpoint']:.3f}" for n, row in found["rows"].items())
        print(f"{name}, seed {seed}: {found['cpu_seconds']:.0f} s, {shown}", flush=True)

    def _rows(self, sampler: Sampler) -> dict[str, dict[str, float]]:
        return {str(n): self.judge.row(lambda noise, n=n: sampler(noise, n))[0] for n in self.budget.calls}

    def _save(self) -> None:
        write_text(self.output, json.dumps(self.results, indent=1) + "\n")

    def _folder(self, name: str, seed: int) -> Path:
        return self.work / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"

    def _seconds(self, name: str, seed: int) -> float:
        """Return the CPU seconds of a finished case."""
        return float(self.results["students"][name]["seeds"][str(seed)]["cpu_seconds"])

    def _map(self, name: str, seed: int) -> tuple[Sampler, dict[str, Any]]:
        budget = self.budget
        steps = budget.map_steps if name == MAP else round(budget.map_fraction * budget.map_steps)
        recipe = self._recipe(map_changes(budget, steps, seed))
        # Without a measured row its seconds are unknown: an interrupted run starts again.
        student, clock = self._trained(recipe, self._folder(name, seed), float("inf"))
        found = {"cpu_seconds": clock.spent, "steps": steps, "images_seen": steps * budget.batch}
        changes = map_changes(budget, budget.cost_steps, seed)
        found["passes"] = self._passes(changes, budget.cost_steps)
        return _sampler(student), found

    def _matching(self, name: str, case: Case, seed: int) -> tuple[Sampler, dict[str, Any]]:
        budget, of_map = self.budget, self._folder(MAP_PART, seed)
        before = self._seconds(MAP_PART, seed)
        changes = matching_changes(budget, case, str(of_map), seed)
        recipe = self._recipe(changes)
        student, clock = self._trained(recipe, self._folder(name, seed), self._seconds(MAP, seed) - before)
        matching: Any = recipe.matching
        warmup = matching.critic.warmup_steps
        found: dict[str, Any] = {"cpu_seconds": before + clock.spent, "steps": max(len(clock.lines) - warmup, 0)}
        found["critic_updates"] = min(len(clock.lines), warmup) + found["steps"] * matching.critic.updates
        found["health"] = _health(clock.lines, 10)
        cost = [f"matching.steps={budget.cost_steps}", "matching.critic.warmup_steps=0"]
        found["passes"] = self._passes([*changes, *cost], budget.cost_steps)
        return _sampler(student), found

    def _dmd2(self, name: str, case: Case, seed: int) -> tuple[Sampler, dict[str, Any]]:
        torch.manual_seed(seed)
        before = self._seconds(MAP_PART, seed) if case.from_map else 0.0
        seconds = self._seconds(MAP, seed) - before
        run = self._open_dmd2(case, seed)
        file = self._folder(name, seed).with_suffix(".pt")
        if file.is_file():
            run.load_state(torch.load(file, weights_only=True))
        for _ in run.train(seconds):
            if run.iteration % 200 == 0:
                torch.save(run.state(), file)
        torch.save(run.state(), file)
        found: dict[str, Any] = {"cpu_seconds": before + run.cpu_seconds, "steps": run.student_steps}
        found["critic_updates"] = run.iteration - run.student_steps
        # A cycle has one update of the student.
        cycle = case.peer.student_update_freq
        again = self._open_dmd2(case, seed)

        def train() -> None:
            for _ in range(cycle):
                again.step()

        found["passes"] = passes(self.teacher, self.budget.batch, train)
        return run.sample, found

    def _open_dmd2(self, case: Case, seed: int) -> DMD2:
        assert self.fastgen is not None
        student = None
        if case.from_map:
            changes = [*map_changes(self.budget, 1, seed), f"student.init={self._folder(MAP_PART, seed)}"]
            student = plan(self._recipe(changes)).student
        return DMD2(self.fastgen, self.teacher, case.peer, self._draw_images, student=student)

    def _draw_images(self) -> Tensor:
        """Return a batch of images in [-1, 1], drawn by torch's own generator."""
        if self._images is None:
            self._images = load_file(self.cifar10 / "images.safetensors")["train"]
        return self._images[torch.randint(len(self._images), (self.budget.batch,))].float() / 127.5 - 1

    def _recipe(self, changes: Sequence[str]) -> Recipe:
        return load_recipe(RECIPE, changes, teacher=self.teacher_folder)

    def _trained(self, recipe: Recipe, folder: Path, seconds: float) -> tuple[LearnedFlowMap, _Clock]:
        """Train in an empty folder until the end or until the seconds are over."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        # With both, a later recipe can start from the student of this folder.
        mark(folder)
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        job = plan(recipe)
        trainer = Trainer(job.student, job.teacher, recipe, job.images, folder, Accelerator(cpu=True))
        clock = _Clock(seconds)
        with suppress(_TimeIsOverError):
            trainer.run([clock])
        return trainer.averaged_student(recipe.training.ema[0]), clock

    def _passes(self, changes: Sequence[str], steps: int) -> float:
        def train() -> None:
            self._trained(self._recipe(changes), self.work / "cost", float("inf"))

        return passes(self.teacher, steps * self.budget.batch, train)


def _sampler(student: LearnedFlowMap) -> Sampler:
    def run(noise: Tensor, steps: int) -> Tensor:
        return sample(student, noise, steps)  # type: ignore[arg-type]

    return run


def _health(lines: Sequence[Mapping[str, Any]], points: int) -> list[dict[str, Any]]:
    """Return some lines of the log with the errors of critic and teacher."""
    names = ("step", "phase", "loss", "critic_loss", "teacher_loss", "gradient_norm")
    chosen = lines[:: max(len(lines) // points, 1)]
    return [{name: line[name] for name in names if name in line} for line in chosen]
