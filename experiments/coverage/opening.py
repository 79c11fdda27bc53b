"""Open the saved pipeline of a test class as a teacher, and check what was opened."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from experiments.coverage import checks
from experiments.coverage.guard import install_guard
from experiments.coverage.images import draw_prompts
from experiments.coverage.jobs import grown_mib
from experiments.coverage.tasks import call_base, compare_task, task_in
from fmm_distill.errors import UserError
from fmm_distill.teachers.load import find_index, load_teacher
from fmm_distill.teachers.requirements import takes_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from experiments.coverage.images import Form
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.prompts import Prompts

__all__ = ["has_text", "open_and_check"]


def has_text(folder: Path) -> bool:
    """Return whether the tool opens a folder with prompts."""
    return takes_prompts(find_index(str(folder)))


def open_and_check(folder: Path, call: dict[str, Any], forms: Mapping[str, Form]) -> dict[str, Any]:
    """Open a folder with two prompts and the keywords of its test; an error of the user is a refusal.

    Args:
        forms: of the images that its test calls it with.
    """
    install_guard(folder)
    task, tested, given = task_in(folder), call, forms
    call, forms = call_base(task, call, forms)
    text, samples = bool(forms) or has_text(folder), draw_prompts(checks.PROMPTS, forms)

    def reopen(prompts: Prompts) -> Teacher:
        return load_teacher(str(folder), prompts=prompts, call=call) if text else load_teacher(str(folder))

    before, start = grown_mib(), time.monotonic()
    try:
        teacher = reopen(samples.some((0, 1)))
    except UserError as error:
        refused = {"refused": " ".join(str(error).split())}
        return refused if error.__cause__ is None else refused | _stock_failure(folder)
    own = folder if teacher.pipeline is None else teacher.pipeline.folder
    described = {
        "task": None if task is None else {"base": task.base, "method": task.method},
        "images": sorted(forms),
        "seconds": round(time.monotonic() - start, 1),
        "mib": grown_mib(before),
        "prediction": teacher.prediction,
        "event_shape": list(teacher.event_shape),
        "guidable": _guidable(teacher),
    }
    runs: dict[str, Callable[[], float | str]] = {
        "step": lambda: checks.compare_steps(teacher, own),
        "order": lambda: checks.compare_batches(teacher, samples, reopen),
        "start": lambda: checks.compare_start(teacher, scaled=True),
        "start, embedded": lambda: checks.compare_start(teacher, scaled=False),
    }
    if forms:
        runs["image"] = lambda: checks.compare_images(teacher, samples, forms, reopen)
    if task is not None:
        runs["task"] = lambda: compare_task(teacher, task, folder, tested, given)
    found = {name: _attempt(run) for name, run in runs.items()}
    return described | {"checks": found, "one_step": checks.runs_with(teacher, own, 1)}


def _stock_failure(folder: Path) -> dict[str, Any]:
    """Return the reason why diffusers itself does not open a folder that it wrote; empty if it does."""
    try:
        checks.open_stock(folder)
    except Exception as error:  # noqa: BLE001 any failure is the answer
        text = " ".join(str(error).split())
        return {"not reopened": f"diffusers does not open what it saved: {type(error).__name__}: {text}"}
    return {}


def _guidable(teacher: Teacher) -> bool | str:
    """Return True, or the reason why guidance can't be applied."""
    if teacher.conditions is None:
        return "unconditional"
    try:
        teacher.conditions.check_null()
    except UserError as error:
        return str(error)
    return True


def _attempt(run: Callable[[], float | str]) -> float | str:
    """Return what a check finds, to two digits; a failure is a finding too."""
    try:
        found = run()
    except Exception as error:  # noqa: BLE001 the other checks still run
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return found if isinstance(found, str) else float(f"{found:.1e}")
