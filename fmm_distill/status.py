"""Where a run stands, read from the files of its folder alone, while it goes on or after it was killed."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from fmm_distill import checkpoint
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["RunFiles", "describe", "draw", "read_run"]

WINDOW = 100
SIZES = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass
class RunFiles:
    """What the files of a run say.

    Attributes:
        recipe: its settings.
        records: lines of ``steps.jsonl``.
        evaluations: lines of ``evaluations.jsonl``.
        final: the evaluation at the end, if the run came to it.
        newest: the newest checkpoint's folder, its step and its state.
    """

    folder: Path
    recipe: dict[str, Any]
    records: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    final: dict[str, Any] | None
    newest: tuple[Path, int, dict[str, Any]] | None

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return int(self.recipe["student"]["regression_steps"]) + int(self.recipe["training"]["steps"])


def read_run(folder: Path) -> RunFiles:
    """Read a run's files; half a last line of a log is left out.

    Raises:
        UserError: if the folder is no run, or a log of it has a line that is no JSON.
    """
    written = folder / "recipe.yaml"
    if not written.is_file():
        raise UserError(f"{folder} is no run folder (no recipe.yaml); wanted what --output was given")
    final = folder / "evaluation.json"
    return RunFiles(
        folder,
        yaml.safe_load(written.read_text(encoding="utf-8")),
        _lines(folder / "steps.jsonl"),
        _lines(folder / "evaluations.jsonl"),
        json.loads(final.read_text(encoding="utf-8")) if final.is_file() else None,
        checkpoint.newest_state(folder / "checkpoints"),
    )


def _lines(log: Path) -> list[dict[str, Any]]:
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    found = []
    # What comes after the last newline is being written, or was when the run was killed.
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UserError(
                f"{log}: line {number} is no JSON; wanted one object a line, as the run wrote it: remove the lines "
                "from there on, and the run goes on from its newest checkpoint"
            ) from error
    return found


def describe(run: RunFiles, now: float | None = None) -> str:
    """One line a property.

    Args:
        now: seconds since 1970; None: the clock's.
    """
    now = time.time() if now is None else now
    recipe = run.recipe
    beside = " and ".join([recipe["loss"]["name"], *(term["loss"]["name"] for term in recipe["also"])])
    losses = ", then ".join([*(stage["loss"]["name"] for stage in recipe["before"]), beside])
    lines = {"teacher": str(recipe["teacher"]), "losses": losses} | _progress(run, now)
    lines["checkpoint"] = _newest(run, now)
    lines["bad steps"] = _bad_steps(run)
    lines["evaluated"] = _evaluated(run)
    lines["size"] = _size(run.folder)
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def _progress(run: RunFiles, now: float) -> dict[str, str]:
    if not run.records:
        return {"step": f"0 of {run.total:,} (no step is logged yet)"}
    last, done = run.records[-1], run.records[-1]["step"] + 1
    share = 100 * done / run.total
    ago = _duration(now - (run.folder / "steps.jsonl").stat().st_mtime)
    when = f", written {ago} ago" if done < run.total else ""
    lines = {"step": f"{done:,} of {run.total:,} ({share:.1f} %{when})", "phase": str(last["phase"])}
    lines["loss"] = _loss(run.records)
    seconds = _seconds_per_step(run)
    lines["rate"] = f"{run.recipe['training']['batch_size'] / seconds:,.1f} images per second, {seconds:.3g} s a step"
    if done < run.total:
        lines["time left"] = f"{_duration((run.total - done) * seconds)} at that rate"
    return lines


def _loss(records: Sequence[Mapping[str, Any]]) -> str:
    now, before = _mean_loss(records[-WINDOW:]), _mean_loss(records[-2 * WINDOW : -WINDOW])
    if now is None:
        return f"no number in the last {min(WINDOW, len(records))} steps"
    text = f"{now:.4g} (mean of the last {min(WINDOW, len(records))} steps"
    if before is None:
        return text + ")"
    phases = {record["phase"] for record in records[-2 * WINDOW :]}
    mixed = "; of two phases, not to be compared" if len(phases) > 1 else ""
    change = f", {100 * (now / before - 1):+.1f} %" if before > 0 else ""
    count = len(records[-2 * WINDOW : -WINDOW])
    return f"{text}; of the {count} before {before:.4g}{change}{mixed})"


def _mean_loss(records: Sequence[Mapping[str, Any]]) -> float | None:
    losses = [record["loss"] for record in records if record["loss"] is not None]
    return sum(losses) / len(losses) if losses else None


def _seconds_per_step(run: RunFiles) -> float:
    batch, records = run.recipe["training"]["batch_size"], run.records[-WINDOW:]
    return float(sum(batch / record["images_per_second"] for record in records) / len(records))


def _newest(run: RunFiles, now: float) -> str:
    if run.newest is None:
        return "none yet"
    path, step, _ = run.newest
    written = (path / "manifest.json").stat().st_mtime
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written))
    return f"step {step:,}, written {date} ({_duration(now - written)} ago)"


def _bad_steps(run: RunFiles) -> str:
    step, faults = 0, {"skipped": 0, "rate": 1.0}
    if run.newest is not None:
        step, faults = run.newest[1], run.newest[2]["faults"]
    # Steps that a gradient scaler left out to find its scale carry a text there.
    later = sum(isinstance(record.get("skipped"), list) for record in run.records if record["step"] >= step)
    halved = "; the learning rate was halved" if faults["rate"] < 1 else "; the learning rate is the recipe's"
    return f"{faults['skipped'] + later:,} left out{halved}"


def _evaluated(run: RunFiles) -> str:
    times = len(run.evaluations)
    on_the_way = f", {times} {'time' if times == 1 else 'times'} on the way" if times else ""
    return ("yes" if run.final is not None else "not at the end yet") + on_the_way


def _size(folder: Path) -> str:
    size = 0.0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118 os.walk's own
            except FileNotFoundError:
                # A run at work has removed an old checkpoint since its folder was listed.
                continue
    unit = 0
    while size >= 1024 and unit < len(SIZES) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {SIZES[unit]}" if unit else f"{size:.0f} B"


def _duration(seconds: float) -> str:
    seconds = round(max(0.0, seconds))
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours = seconds // 60, seconds // 3600
    if hours < 48:
        return f"{minutes} min" if minutes < 60 else f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def draw(run: RunFiles, picture: Path) -> None:
    """Draw the curves of a run that has logged a step.

    Raises:
        UserError: if the picture can't be written, or has no name of a PNG.
    """
    from fmm_distill.curves import draw_curves

    evaluations = list(run.evaluations)
    if run.final is not None:
        evaluations.append({"step": run.total, "rows": run.final["rows"]})
    with checkpoint.writing(picture):
        draw_curves(run.records, evaluations, run.total, picture)
