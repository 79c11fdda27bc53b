"""Stage ``large``: steps and memory of models of published sizes with random weights, and a complete run of FSDP 2."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.gpu.large_models import MODELS
from benchmarks.gpu.processes import Background, call, kill, last_line, started
from benchmarks.gpu.record import read
from benchmarks.gpu.rows import NO_TIME, Row, take

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from benchmarks.gpu.budget import Deadline
    from benchmarks.gpu.large_models import Model
    from benchmarks.gpu.stage import Job

WORKER = ("-m", "benchmarks.gpu.large_worker")
STEPS = 5
LORA_RANK = 64
# Two checkpoints of SD 1.5, weights, moments and an average, while the second one is written, and its export.
FSDP_DISK = 34 * 2**30
# Side of the images at which a pipeline is opened (large_worker.py).
OPENED_AT = 128
# Side of the images whose memory is estimated on the CPU in time, and the row whose opening is timed.
ESTIMATED, OPENED = 512, "sd15, LoRA, 512"


class Large:
    """The folders of the models, the rows, and the estimates that run at the same time."""

    def __init__(self, job: Job, background: Background) -> None:
        self.job, self.background = job, background
        self.work = job.options.work / "large"
        self.work.mkdir(parents=True, exist_ok=True)
        self.building: dict[str, Future[None]] = {}
        self.waiting: dict[tuple[str, str], tuple[Future[None], Path, float]] = {}

    def worker(self, *words: object) -> list[str]:
        """Return the arguments of a worker."""
        options = self.job.options
        return [*WORKER, *map(str, words), "--device", options.device, *(["--tiny"] if options.tiny else [])]

    def build(self, reserved: int) -> None:
        """Start to build missing models that fit on the disk, in addition to so many bytes."""
        free = shutil.disk_usage(self.work).free - reserved
        for name, model in MODELS.items():
            out = self.work / f"{name}.json"
            if out.is_file() or name in self.building or not (self.job.options.tiny or model.disk < free):
                continue
            free -= model.disk
            folder = self.work / name
            shutil.rmtree(folder, ignore_errors=True)
            command = self.worker("build", name, folder, out)
            self.building[name] = self.background.submit(command, self.work / f"build-{name}.log")

    def built(self, name: str, _: Deadline | None = None) -> dict[str, Any]:
        """Wait for a model.

        Raises:
            RuntimeError: if it was not built.
        """
        if name in self.building:
            self.building[name].result()
        found = read(self.work / f"{name}.json")
        if not found:
            raise RuntimeError(f"not built: {MODELS[name].disk / 2**30:.0f} GiB of disk were not free")
        counts = ", ".join(f"{part} {count / 1e6:,.0f}M" for part, count in found["parts"].items())
        return {"says": f"{counts}; {found['seconds']:.0f} s"}

    def recipe(self, name: str, student: str, side: int, **training: Any) -> Path:
        """Return the recipe of LoRA adapters or of a full student, with guidance."""
        model, tiny = MODELS[name], self.job.options.tiny
        prompts = self.work / "prompts.txt"
        prompts.write_text("a boat\na red house\ntwo birds on a wire\n", encoding="utf-8")
        settings = {
            "teacher": str(self.work / name),
            "prompts": {"file": str(prompts)},
            "guidance": {"scale": 5.0},
            "loss": {"name": "lagrangian", "stop_gradient": "target"},
            "student": {"lora": {"rank": (2 if tiny else LORA_RANK) if student == "LoRA" else 0}},
            "training": {
                "steps": 1000,
                "batch_size": 2 if tiny else model.batch,
                "precision": "bf16",
                # All weights of two billion parameters with moments and an average leave little room.
                "gradient_checkpointing": student == "full" and name != "sd15",
            }
            | training,
            "evaluation": {
                "steps": [1],
                "ddim_steps": [],
                "dpmsolver_steps": [],
                "features": "none",
                "samples": 2,
                "endpoint_samples": 1,
                "endpoint_solver_steps": 2,
                "batch_size": 1,
            },
            "export": {"steps": []},
        }
        if not tiny:
            settings["pipeline"] = {"height": OPENED_AT, "width": OPENED_AT}
        file = self.work / f"{name}-{student}-{side}{'-short' * bool(training)}.yaml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return file

    def side(self, side: int) -> list[str]:
        """Return the arguments of a worker for images of this side; tiny models have one size."""
        return [] if self.job.options.tiny else ["--side", str(side)]

    def start(self, act: str, row: str) -> None:
        """Start a worker on the CPU: ``estimate`` of the memory, or ``open``."""
        if self.job.record.has(f"{act}: {row}") or (act, row) in self.waiting:
            return
        name, student, side = row.split(", ")
        recipe = self.recipe(name, student, int(side))
        out = recipe.with_suffix(f".{act}.json")
        out.unlink(missing_ok=True)
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2 - 1))}
        command = self.worker(act, recipe, out, *self.side(int(side)))
        future = self.background.submit(command, recipe.with_suffix(f".{act}.log"), threads)
        self.waiting[act, row] = future, out, time.monotonic()

    def collect(self) -> None:
        """Write the rows of finished workers."""
        for (act, row), (future, out, since) in list(self.waiting.items()):
            if future.done():
                del self.waiting[act, row]
                values = {"what": act, "of": row, "seconds": time.monotonic() - since}
                error = RuntimeError(NO_TIME) if future.canceled() else future.exception()
                if error is None:
                    self.job.record.add(f"{act}: {row}", "measured", **values | read(out))
                else:
                    status = "skipped" if str(error) == NO_TIME else "failed"
                    self.job.record.add(f"{act}: {row}", status, **values, reason=str(error))

    def step(self, recipe: Path, side: int, deadline: Deadline) -> dict[str, Any]:
        """Measure training steps in a separate process; after a kill, the finished ones count."""
        out = recipe.with_suffix(".step.json")
        out.unlink(missing_ok=True)
        steps = ["--steps", 2 if self.job.options.tiny else STEPS, *self.side(side)]
        command = self.worker("step", recipe, recipe.with_suffix(".run"), out, *steps)
        log = recipe.with_suffix(".step.log")
        with started(command, log) as process:
            while process.poll() is None and deadline.remaining() > 1:
                time.sleep(0.1)
            code = process.poll()
        found = read(out)
        # The first step loads kernels and is not counted.
        if len(found.get("seconds_of_steps", ())) < 2:
            raise RuntimeError("no time for two steps" if code is None else last_line(log))
        seconds = statistics.median(found["seconds_of_steps"][1:])
        return found | {
            "seconds_a_step": seconds,
            "batch": yaml.safe_load(recipe.read_text())["training"]["batch_size"],
        }

    def rows(self, name: str) -> Iterator[Row]:
        """Return the rows of a model: building it, LoRA and full student, at its sizes."""
        model: Model = MODELS[name]
        tiny = self.job.options.tiny
        yield Row(f"{name}, build", partial(self.built, name), "build", 3 if tiny else 40, {"what": "build"})
        for side in model.sides[:1] if tiny else model.sides:
            # For a trial with tiny models, one full student is enough.
            full = side == ESTIMATED and (name == "sd15" or not tiny)
            for student in ("LoRA", "full") if full else ("LoRA",):
                recipe, row = self.recipe(name, student, side), f"{name}, {student}, {side}"
                about = {"what": "step", "model": model.title, "student": f"{student}, {side} x {side}"}
                yield Row(row, partial(self._stepped, recipe, row), f"step {name}", 3 if tiny else 30, about)

    def _stepped(self, recipe: Path, row: str, deadline: Deadline) -> dict[str, Any]:
        name, side = row.split(", ")[0], int(row.split(", ")[-1])
        self.built(name)
        if side == ESTIMATED:
            self.start("estimate", row)
        try:
            return self.step(recipe, side, deadline)
        finally:
            if row == OPENED:
                self.start("open", row)

    def fsdp(self) -> list[Row]:
        """Run FSDP: kill after the first checkpoint, resume to the end, export, reload."""
        run = self.work / "fsdp"
        recipe = self.recipe("sd15", "full", 512, steps=4, checkpoint_every=2, checkpoints_total_limit=1)
        # FSDP needs a GPU; elsewhere the same steps run without it.
        launch = ["--use_fsdp", "--fsdp_version", "2"] if self.job.options.device == "cuda" else ["--cpu"]
        command = ["-m", "accelerate.commands.launch", *launch, "--num_processes", "1", "--num_machines", "1"]
        command += ["--dynamo_backend", "no", "-m", "fmm_distill"]
        command += ["--recipe", str(recipe), "--output", str(run)]
        reload = self.worker("reload", run / "student", self.work / "reload.json")
        guess = 3 if self.job.options.tiny else 50
        about = {"what": "FSDP 2" if "--use_fsdp" in launch else "accelerate launch, no FSDP: there is no GPU"}
        calls = {
            "killed after a checkpoint": partial(killed, command, run),
            "resumed to the end, exported": partial(resumed, command, run),
            "reloaded by diffusers": partial(reloaded, reload, run, self.work / "reload.json"),
        }
        return [Row(f"launch: {name}", call, name, guess, about) for name, call in calls.items()]


def killed(command: list[str], run: Path, _: Deadline) -> dict[str, Any]:
    """Start a run and kill it one step after its first checkpoint."""
    shutil.rmtree(run, ignore_errors=True)
    log, lines = run.with_suffix(".killed.log"), run / "steps.jsonl"
    with started(command, log) as process:
        while not (lines.is_file() and len(lines.read_text(encoding="utf-8").splitlines()) > 2):
            if process.poll() is not None:
                raise RuntimeError(f"exit {process.returncode} before the third step: {last_line(log)}")
            time.sleep(0.02)
        kill(process)
    record = json.loads(lines.read_text(encoding="utf-8").splitlines()[1])
    return {"says": f"peak {record['peak_memory_gib']:.2f} GiB, {record['images_per_second']:.2f} images/s"}


def resumed(command: list[str], run: Path, _: Deadline) -> dict[str, Any]:
    """Run the same command again."""
    log = run.with_suffix(".resumed.log")
    call(command, log)
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    found = [line for line in lines if line.startswith(("going on from", "resum", "FSDP:"))]
    if not (run / "evaluation.json").is_file() or not (run / "student" / "model_index.json").is_file():
        raise RuntimeError(f"no evaluation or no export: {last_line(log)}")
    # The next models need its disk space.
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    return {"says": "; ".join(found)}


def reloaded(command: list[str], run: Path, out: Path, _: Deadline) -> dict[str, Any]:
    """Open the export with diffusers."""
    call(command, run.with_suffix(".reload.log"))
    shutil.rmtree(run, ignore_errors=True)
    return read(out)


def run(job: Job) -> None:
    """Run all parts; models are built and memory is estimated at the same time as rows are measured."""
    with Background(2) as background:
        large = Large(job, background)
        planned = [list(large.rows(name)) for name in MODELS]
        planned.insert(1, large.fsdp())
        large.build(FSDP_DISK)
        for (_, deadline), rows in zip(job.parts(), planned, strict=True):
            take(rows, deadline, job.record)
            large.collect()
            if rows is planned[1]:
                large.build(0)
        take([row for rows in planned for row in rows], job.deadline.within(job.deadline.remaining() - 8), job.record)
        while large.waiting and job.deadline.remaining() > 6:
            time.sleep(0.2)
            large.collect()
    large.collect()
