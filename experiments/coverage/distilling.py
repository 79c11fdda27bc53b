"""Distill the saved pipeline of a test class by the command line: two steps, an export, its verification."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from experiments.coverage.checks import PROMPTS
from experiments.coverage.guard import install_guard
from experiments.coverage.opening import has_text

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["distill", "last_line"]

_SETTINGS = (
    "matching=null",
    "student.regression_steps=0",
    "student.lora.rank=0",
    "guidance.scale=1.0",
    "optimizer.lr=3e-3",
    "training.steps=2",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=1",
    "training.warmup_steps=0",
    "training.ema=0.0",
    "training.precision=fp32",
    "evaluation.steps=[1]",
    "evaluation.ddim_steps=[]",
    "evaluation.dpmsolver_steps=[]",
    "evaluation.samples=2",
    "evaluation.endpoint_samples=2",
    "evaluation.endpoint_solver_steps=2",
    "evaluation.batch_size=2",
)


def distill(folder: Path, call: dict[str, Any], output: Path, steps: tuple[int, ...], student: str) -> dict[str, Any]:
    """Run ``fmm-distill`` in this process, and return its exit code and what its verification found.

    Args:
        steps: of the exported pipelines.
        student: the kind of the student, ``scaled`` or ``embedded``.
    """
    from fmm_distill.cli import main

    install_guard(folder)
    settings = [*_SETTINGS, f"export.steps={list(steps)}", f"student.kind={student}"]
    if has_text(folder):
        prompts = output.with_suffix(".prompts.txt")
        prompts.write_text("\n".join(PROMPTS[:2]) + "\n", encoding="utf-8")
        settings += [f"prompts.file={prompts}", *(f"pipeline.{name}={json.dumps(call[name])}" for name in call)]
    sys.argv = ["fmm-distill", "--teacher", str(folder), "--recipe", "text", "--output", str(output), "--fresh"]
    sys.argv += [part for setting in settings for part in ("--set", setting)]
    try:
        main()
        code: Any = 0
    except SystemExit as error:
        code = error.code or 0
    verified = output / "student" / "verification.json"
    report = json.loads(verified.read_text(encoding="utf-8")) if verified.is_file() else {}
    return {
        "code": code,
        "passed": bool(report.get("passed")),
        "exports": sorted(report.get("pipelines", {})),
        "folders": sorted(path.name for path in (output / "student").glob("steps-*")),
    }


def last_line(log: Path) -> str:
    """Return the last line of a log that is no frame of a traceback: the tool's one line, or Python's."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
