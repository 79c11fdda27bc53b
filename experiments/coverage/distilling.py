"""Distill the saved pipeline of a test class by the command line: two steps, an export, its verification."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.coverage.checks import PROMPTS
from experiments.coverage.guard import install_guard
from experiments.coverage.images import draw_prompts
from experiments.coverage.opening import has_text
from experiments.coverage.tasks import call_base, task_in

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from experiments.coverage.images import Form

__all__ = ["Export", "distill", "last_line", "prompt_settings"]

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


@dataclass(frozen=True)
class Export:
    """The kind of the student and the numbers of steps that are exported.

    Attributes:
        steps: numbers of steps of the exported pipelines.
        student: the kind of the student, ``scaled`` or ``embedded``.
    """

    steps: tuple[int, ...]
    student: str


def distill(
    folder: Path,
    call: dict[str, Any],
    forms: Mapping[str, Form],
    output: Path,
    export: Export,
) -> dict[str, Any]:
    """Run ``fmm-distill`` in this process, and return its exit code and what its verification found.

    Args:
        forms: of the images that the pipeline is called with.
    """
    install_guard(folder)
    call, forms = call_base(task_in(folder), call, forms)
    settings = [*_SETTINGS, f"export.steps={list(export.steps)}", f"student.kind={export.student}"]
    # A recipe has no mappings for the pipeline, which is then called in Python alone.
    in_python = any(isinstance(value, dict) for value in call.values())
    code = (_run_python if in_python else _run_command)(folder, call, forms, output, settings)
    verified = output / "student" / "verification.json"
    report = json.loads(verified.read_text(encoding="utf-8")) if verified.is_file() else {}
    return {
        "code": code,
        "passed": bool(report.get("passed")),
        "exports": sorted(report.get("pipelines", {})),
        "folders": sorted(path.name for path in (output / "student").glob("steps-*")),
    }


def _run_command(
    folder: Path, call: dict[str, Any], forms: Mapping[str, Form], output: Path, settings: list[str]
) -> Any:
    """Run the command line; return its exit code."""
    from fmm_distill.cli import main

    if forms or has_text(folder):
        settings = [*settings, *prompt_settings(output.with_suffix(".prompts"), forms, text=has_text(folder))]
        settings += [f"pipeline.{name}={json.dumps(value)}" for name, value in call.items()]
    sys.argv = ["fmm-distill", "--teacher", str(folder), "--recipe", "text", "--output", str(output), "--fresh"]
    sys.argv += [part for setting in settings for part in ("--set", setting)]
    try:
        main()
    except SystemExit as error:
        return error.code or 0
    return 0


def _run_python(
    folder: Path, call: dict[str, Any], forms: Mapping[str, Form], output: Path, settings: list[str]
) -> Any:
    """Run the same in Python; return the exit code that the command line has."""
    from fmm_distill.config.recipe import load_recipe
    from fmm_distill.errors import UserError
    from fmm_distill.run.distill import distill as run
    from fmm_distill.teachers.load import load_teacher

    try:
        teacher = load_teacher(str(folder), prompts=draw_prompts(PROMPTS[:2], forms), call=call)
        run(load_recipe("text", settings, teacher=str(folder)), output, teacher=teacher, fresh=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prompt_settings(folder: Path, forms: Mapping[str, Form], *, text: bool) -> list[str]:
    """Write two prompts, and the images of each; return their settings."""
    samples = draw_prompts(PROMPTS[:2], forms)
    folder.mkdir(parents=True, exist_ok=True)
    if not forms:
        (folder / "prompts.txt").write_text("\n".join(samples.texts) + "\n", encoding="utf-8")
        return [f"prompts.file={folder / 'prompts.txt'}"]
    rows = [
        {"text": prompt}
        | {name: _files(images[number], folder, f"{name}-{number}") for name, images in samples.images.items()}
        for number, prompt in enumerate(samples.texts)
    ]
    table = folder / "prompts.jsonl"
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    column = "text" if text else "null"
    return [
        f"prompts.dataset={table}",
        f"prompts.column={column}",
        *(f"prompts.images.{name}={name}" for name in forms),
    ]


def _files(image: Any, folder: Path, name: str) -> str | list[Any]:
    """Write an image, or a list of them; return the names of the files."""
    if isinstance(image, list):
        return [_files(each, folder, f"{name}-{number}") for number, each in enumerate(image)]
    image.save(folder / f"{name}.png")
    return f"{name}.png"


def last_line(log: Path) -> str:
    """Return the last line of a log that is no frame of a traceback: the tool's one line, or Python's."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
