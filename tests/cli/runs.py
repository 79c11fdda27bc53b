"""Tiny runs, in this process and in others."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import yaml
from safetensors.torch import load_file

from fmm_distill.cli import main
from fmm_distill.training.signals import StopRequest
from fmm_distill.training.trainer import Trainer

STEPS = 12
TINY = {
    "data": "none",
    "loss": {"name": "lagrangian", "stop_gradient": "target"},
    "training": {"steps": STEPS, "batch_size": 8, "checkpoint_every": 3, "checkpoints_total_limit": 2},
    "evaluation": {
        "steps": [1, 2],
        "ddim_steps": [1],
        "dpmsolver_steps": [2],
        "samples": 8,
        "endpoint_samples": 4,
        "endpoint_solver_steps": 4,
        "features": "none",
    },
    "export": {"steps": [1, 2]},
}


def write_recipe(file: Path, teacher: Path) -> Path:
    file.write_text(yaml.safe_dump({"teacher": str(teacher)} | TINY), encoding="utf-8")
    return file


def call(*arguments: object) -> tuple[int, str, str]:
    """The command line in this process: exit status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["fmm-distill", *map(str, arguments)]
    with patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue(), err.getvalue()


def spawn(*arguments: object, **changes: object) -> subprocess.Popen:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "fmm_distill", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, **changes)


@contextlib.contextmanager
def training_only(stop_before: int | None = None):
    """Runs end after training, or are interrupted (Ctrl-C) as a step begins."""
    step_of = Trainer.train_step

    def step(self: Trainer, number: int, request: StopRequest) -> tuple[dict, bool]:
        if number == stop_before:
            raise KeyboardInterrupt
        return step_of(self, number, request)

    with patch("fmm_distill.run.distill.finish"), patch.object(Trainer, "train_step", step):
        yield


def losses(folder: Path) -> list[tuple]:
    lines = (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    return [tuple(json.loads(line)[key] for key in ("step", "loss", "weighted", "gradient_norm")) for line in lines]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same_run(folder: Path, reference: Path) -> None:
    """Bit-equal losses, weights, averages and moments."""
    assert losses(folder) == losses(reference)
    for name in ("student", "ema-0.999", "optimizer"):
        file = Path("checkpoints") / f"step-{STEPS:08d}" / f"{name}.safetensors"
        ours, theirs = load_file(folder / file), load_file(reference / file)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), name


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
