"""The stages of the CIFAR-10 experiment: teacher, classifier, a student of every loss, measurements, results."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors.torch import load_file

from experiments.cifar10.measure import PICTURED, open_judge, save_atomically
from experiments.cifar10.methods import recipe_of
from experiments.cifar10.processes import ROOT, Processes
from experiments.cifar10.report import markdown, plot_minutes, plot_steps, write_samples
from fmm_distill.config.settings import DataSettings
from fmm_distill.data.samples import load_images
from fmm_distill.data.tables import open_table
from fmm_distill.export.load import load_student
from fmm_distill.io.files import write_text
from fmm_distill.teachers.load import load_teacher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from experiments.cifar10.budget import Budget
    from experiments.cifar10.measure import Judge

SOLVERS = ("ddim", "dpmsolver++")
SOLVER_STEPS = (1, 2, 4, 8, 16, 32, 50)
# The number of steps that is measured first, for an estimate of the others.
FIRST = 4


class Experiment:
    """The stages in their order, each with its files in ``work``."""

    def __init__(self, data: Path, work: Path, output: Path, budget: Budget, minutes: float, names: list[str]) -> None:
        self.data, self.work, self.output, self.budget, self.names = data, work, output, budget, names
        self.started = time.monotonic()
        self.minutes, self.deadline = minutes, self.started + 60 * minutes
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.stages: dict[str, float] = {}
        work.mkdir(parents=True, exist_ok=True)
        written = work / "budget.json"
        own = asdict(budget) | {"parallel": None, "peers": None}
        if written.is_file() and read(written) != json.loads(json.dumps(own)):
            sys.exit(f"{work} has a run of another budget: choose another --work or remove it")
        write_text(written, json.dumps(own))
        self.processes = Processes(work / "logs", budget.parallel)

    def left(self) -> float:
        """Return the seconds until only the reserve is left."""
        return self.deadline - self.budget.reserve - time.monotonic()

    def run(self) -> None:
        """Run all stages that there is time for."""
        with self._stage("teacher, classifier"):
            self._teacher_and_classifier()
        made = ("teacher/model_index.json", "classifier/classifier.json")
        if not all((self.work / name).is_file() for name in made) or self.left() < 0:
            print("the time is over before teacher and classifier are complete; the same command resumes")
            return
        with self._stage("reference, the teacher's first rows"):
            self.judge = self._judge()
            if not self.budget.steps:
                rows = self.teacher_rows()
                # Alone on the device: the time of later measurements is estimated from this one.
                next(rows, None)
                self._start_all_losses()
                for _ in range(3):
                    next(rows, None)
        with self._stage("speed of each loss"):
            steps = self._steps()
        with self._stage("students"):
            self._students(self.names, steps, 0)
        with self._stage("second seeds"):
            best = self._best()
            print(f"the best: {', '.join(best)}")
            self._students(best, steps, 1)
        for _ in self.teacher_rows():
            if self.left() < 0:
                print("the time is over before all rows of the teacher are measured; the same command resumes")
                break

    def _stage(self, name: str) -> Stage:
        return Stage(self, name)

    def _images(self) -> dict[str, torch.Tensor]:
        """Return all images and labels, uint8 and int64; they are decoded once."""
        file = self.work / "images.safetensors"
        if not file.is_file():
            found = {}
            for split in ("train", "test"):
                settings = DataSettings(source=str(self.data), split=split, fit="crop")
                table = open_table(settings)
                images = load_images(settings, (3, self.budget.size, self.budget.size), table=table)
                found[split], found[f"{split}_labels"] = images.pixels, torch.tensor(table.values("label"))
            save_atomically(found, file)
        return load_file(file)

    def _teacher_and_classifier(self) -> None:
        """Train both at the same time: neither uses the complete device."""
        budget, work = self.budget, self.work
        if not (work / "teacher" / "model_index.json").is_file():
            # Not compiled: compilation takes longer than it saves in two minutes.
            self.processes.start("teacher", self._teacher_command())
        self._images()
        if not (work / "classifier" / "classifier.json").is_file():
            command = [sys.executable, "-m", "experiments.cifar10.classifier", "--output", str(work / "classifier")]
            command += ["--images", str(work / "images.safetensors"), "--width", str(budget.classifier_width)]
            command += ["--precision", budget.precision]
            self.processes.start("classifier", [*command, "--epochs", str(budget.classifier_epochs)])
        for name in list(self.processes.running):
            self.processes.code(name, self.left())

    def _teacher_command(self) -> list[str]:
        budget = self.budget
        options = {
            "--data": self.data,
            "--output": self.work / "teacher",
            "--size": budget.size,
            "--precision": budget.precision if budget.precision == "bf16" else "no",
            "--batch": budget.teacher_batch,
            "--lr": budget.teacher_rate,
            "--steps": budget.teacher_steps,
            "--minutes": budget.teacher_fraction * self.minutes,
        }
        words = [str(word) for pair in options.items() for word in pair]
        channels = ["--channels", *map(str, budget.channels)]
        return [sys.executable, str(ROOT / "examples" / "train_teacher.py"), *words, *channels]

    def _judge(self) -> Judge:
        teacher = load_teacher(str(self.work / "teacher"))
        judge = open_judge(teacher, self.work, self.budget, self.device, self.work)
        self._save_pictures("ode", {"0": judge.endpoints[:PICTURED].cpu()})
        return judge

    def teacher_rows(self) -> Iterator[None]:
        """Measure the missing rows of the teacher under stock schedulers; yield after each."""
        for n in sorted(SOLVER_STEPS, key=lambda n: abs(n - FIRST)):
            for kind in SOLVERS:
                file = self.work / "rows" / f"{kind}-{n}.json"
                if not file.is_file():
                    rows, pictures = self.judge.solver(kind, (n,))
                    self._save(f"{kind}-{n}", rows, pictures)
                    yield

    def _save(self, name: str, found: dict[str, Any], pictures: dict[str, torch.Tensor]) -> None:
        self._save_pictures(name, pictures)
        write_text(self.work / "rows" / f"{name}.json", json.dumps(found))

    def _save_pictures(self, name: str, pictures: dict[str, torch.Tensor]) -> None:
        folder = self.work / "rows"
        folder.mkdir(exist_ok=True)
        pixels = {n: ((x + 1) * 127.5).round().clamp(0, 255).byte().contiguous() for n, x in pictures.items()}
        save_atomically(pixels, folder / f"{name}.safetensors")

    def _start_all_losses(self) -> None:
        """Start an endless process per loss, to measure the cost of their steps at the same time."""
        folder = self.work / "speed"
        shutil.rmtree(folder, ignore_errors=True)
        if (self.work / "steps.json").is_file():
            return
        # With data a loss is no slower: it needs no jump of the student to a starting point.
        self.timed = {f"speed-{name}": name for name in self.names if name.removesuffix("-data") == name} or {
            f"speed-{name}": name for name in self.names
        }
        for title, name in self.timed.items():
            self._distill(title, name, 10**6, 0, folder / title)

    def _steps(self) -> int:
        """Return the number of steps of every student, chosen once from the speed of all losses."""
        file, budget = self.work / "steps.json", self.budget
        if not file.is_file():
            speeds = {} if budget.steps else self._speeds()
            steps = budget.steps or self._fitting(speeds)
            write_text(file, json.dumps({"steps": steps, "seconds_a_step": speeds}))
        steps = read(file)["steps"]
        print(f"{steps} steps of {budget.batch} images for every student", flush=True)
        return steps

    def _speeds(self) -> dict[str, float]:
        """Return the device seconds of a step of each loss, and end the processes that measured them."""
        budget = self.budget
        logs = {title: self.work / "speed" / title / "steps.jsonl" for title in self.timed}
        costs = self.processes.step_seconds(logs, budget.watched, self.left)
        self.processes.kill(list(logs))
        if not costs:
            sys.exit(f"no student trains; see {self.work / 'logs'}")
        known = {self.timed[title]: seconds * budget.batch for title, seconds in costs.items()}
        worst = max(known.values())
        speeds = {name: known.get(name, known.get(name.removesuffix("-data"), worst)) for name in self.names}
        for name, seconds in speeds.items():
            print(f"{name}: a step takes {1000 * seconds:.1f} ms of the device", flush=True)
        return speeds

    def _fitting(self, speeds: dict[str, float]) -> int:
        budget = self.budget
        row = read(self.work / "rows" / f"{SOLVERS[0]}-{FIRST}.json")[str(FIRST)]
        # Network calls per image of a student's measurement: the sum of its numbers of steps.
        students = len(speeds) + budget.seeded
        measuring = students * sum(budget.calls) * budget.samples / (FIRST * row["images_per_second"])
        seconds = self.left() - budget.startup - measuring
        # Students with a second seed train last and few at a time: they use half of the device.
        seeded = 2 * budget.seeded * max(speeds.values())
        peers = budget.peers * sum(speeds.values()) / len(speeds)
        steps = int(seconds / (sum(speeds.values()) + seeded + peers))
        if steps < 50:
            sys.exit(f"expected time for 50 steps per student, got {steps} in {self.left():.0f} s: increase --minutes")
        return steps

    def _students(self, names: list[str], steps: int, seed: int) -> None:
        """Train and measure the missing students, several at a time, and the teacher's rows meanwhile."""
        titles = {f"{name}-{seed}": name for name in names}
        waiting = [title for title in titles if not (self.work / "rows" / f"{title}.json").is_file()]
        rest = self.teacher_rows()
        running = self.processes.running
        while (waiting or running) and self.left() > 0:
            while waiting and len(running) < self.budget.parallel:
                title = waiting.pop(0)
                self._distill(title, titles[title], steps, seed, self.work / "students" / title)
            finished = self.processes.finished()
            for title in finished:
                if self.processes.code(title) == 0:
                    self._measure(title, titles[title])
            # On a CPU this would take cores from the students: the teacher's rows follow at the end.
            if not finished and (self.device == "cpu" or next(rest, self) is self):
                time.sleep(0.2)
        if running:
            print(f"the time is over before these are finished; the same command resumes: {', '.join(running)}")
            self.processes.stop()

    def _distill(self, title: str, name: str, steps: int, seed: int, output: Path) -> None:
        recipe = recipe_of(name, self.work / "teacher", self.data, self.budget, steps, seed)
        folder = self.work / "recipes"
        folder.mkdir(exist_ok=True)
        file = folder / f"{title}.yaml"
        write_text(file, recipe.to_yaml())
        self.processes.start_distilling(title, file, output)

    def _measure(self, title: str, name: str) -> None:
        folder = self.work / "students" / title
        rows, pictures = self.judge.student(load_student(folder / "student").flow_map, self.budget.calls)
        log = [json.loads(line) for line in (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
        found = {"method": name, "steps": len(log), "images_seen": len(log) * self.budget.batch, "rows": rows}
        found["cpu_seconds"] = self.processes.cpu_seconds(title)
        found["loss"] = [line["loss"] for line in log[:: max(len(log) // 100, 1)]]
        self._save(title, found, pictures)
        # After each student, so that an interruption loses little.
        self.write_json()
        shown = ", ".join(f"{rows[str(n)]['frechet']:.3g}" for n in self.budget.calls)
        print(f"{title}: Fréchet distance {shown} at {self.budget.calls} steps, {self.left():.0f} s left", flush=True)

    def _best(self) -> list[str]:
        """Return the methods with the lowest mean logarithm of the Fréchet distance."""
        scores = {}
        for name in self.names:
            file = self.work / "rows" / f"{name}-0.json"
            if file.is_file():
                scores[name] = sum(math.log(row["frechet"]) for row in read(file)["rows"].values())
        return sorted(scores, key=lambda name: scores[name])[: self.budget.seeded]

    def results(self) -> dict[str, Any]:
        """Return all results as one plain dictionary."""
        work = self.work
        rows = {file.stem: read(file) for file in sorted((work / "rows").glob("*.json"))}
        solvers = {
            kind: {str(n): rows[f"{kind}-{n}"][str(n)] for n in SOLVER_STEPS if f"{kind}-{n}" in rows}
            for kind in SOLVERS
        }
        speed = read_if_there(work / "steps.json")
        students = {title: found for title, found in rows.items() if "method" in found}
        for found in students.values():
            # Rows of other packages have no cost: it was not measured with the others.
            seconds = speed["seconds_a_step"].get(found["method"])
            on_gpu = None if seconds is None else found["steps"] * seconds
            found["device_seconds"] = on_gpu if torch.cuda.is_available() else found.get("cpu_seconds")
        return {
            "budget": asdict(self.budget),
            "machine": machine(),
            "protocol": read_if_there(work / "protocol.json"),
            "teacher": read_if_there(work / "teacher" / "training.json") | {"rows": solvers},
            "classifier": read_if_there(work / "classifier" / "classifier.json"),
            "students": students,
            "missing": [name for name in self.names if f"{name}-0" not in students],
            "speed": speed,
            "settings": {title: _settings(work / "recipes" / f"{title}.yaml") for title in students},
            "stages": self.stages,
        }

    def write_json(self) -> dict[str, Any]:
        """Write the results into the output, and return them."""
        results = self.results()
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.output, json.dumps(results, indent=1) + "\n")
        return results

    def write(self) -> None:
        """Write the JSON and the pictures next to it, and print the tables."""
        results, output = self.write_json(), self.output
        print(markdown(results), flush=True)
        if not results["students"]:
            return
        plot_steps(results, output.with_name(f"{output.stem}-steps.png"))
        plot_minutes(results, output.with_name(f"{output.stem}-minutes.png"))
        best = [f"{name}-0" for name in self._best()] or list(results["students"])
        write_samples(self.work / "rows", best, output.with_name(f"{output.stem}-samples.png"))


class Stage:
    """Measures and prints the time of a stage."""

    def __init__(self, experiment: Experiment, name: str) -> None:
        self.experiment, self.name = experiment, name

    def __enter__(self) -> None:
        self.began = time.monotonic()
        print(f"-- {self.name} ({self.experiment.left():.0f} s left)", flush=True)

    def __exit__(self, *_: object) -> None:
        self.experiment.stages[self.name] = time.monotonic() - self.began


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def read_if_there(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = read(file) if file.is_file() else {}
    return found


def machine() -> dict[str, Any]:
    """Return the device and the versions."""
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} processor",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _settings(file: Path) -> dict[str, Any]:
    """Return the settings in which the recipes of students differ."""
    recipe = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    names = ("data", "loss", "extra_losses", "stages", "student", "time_sampling", "weight", "training")
    if "data" in recipe:
        # The path on this machine does not matter.
        recipe["data"]["source"] = Path(recipe["data"]["source"]).name
    return {name: recipe[name] for name in names if name in recipe}
