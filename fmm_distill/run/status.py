"""The progress of a run, read from the files in its folder while it is active, interrupted or finished."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fmm_distill.io.files import writing
from fmm_distill.io.reading import BrokenFileError, check_keys, read_lines, read_mapping
from fmm_distill.run.marker import require_run
from fmm_distill.training import checkpoint
from fmm_distill.training.early_stopping import judge, quantity_of
from fmm_distill.training.nonfinite import OF_CRITIC

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import UnionType

    from fmm_distill.training.early_stopping import Verdict

__all__ = ["RunFiles", "describe", "plot", "read_run"]

# Steps of the running mean of the loss and of the rate.
WINDOW = 100
# Steps of the mean of the critic's errors, which change fast at the start of its warm-up.
_HEALTH = 20
_CUT = "remove this line and those after it, and the run continues from its newest checkpoint"
_STEP = {"step": int, "phase": str, "loss": float | None, "images_per_second": float}
SIZES = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass
class RunFiles:
    """The content of a run's files.

    Attributes:
        folder: the run folder.
        recipe: the settings of the run.
        records: the lines of ``steps.jsonl``.
        evaluations: the lines of ``evaluations.jsonl``.
        final: the evaluation at the end; None: the run is not finished.
        newest: the newest checkpoint, without its tensors; None: there is none.
        logged: the time of the last change of ``steps.jsonl``, in seconds since 1970; None: there is no log.
    """

    folder: Path
    recipe: dict[str, Any]
    records: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    final: dict[str, Any] | None
    newest: checkpoint.State | None
    logged: float | None = None

    @property
    def map_steps(self) -> int:
        """The number of steps before a second stage, regression steps included."""
        return int(self.recipe["student"]["regression_steps"]) + int(self.recipe["training"]["steps"])

    @property
    def matching(self) -> Mapping[str, Any] | None:
        """The settings of the second stage; None: there is none."""
        # Recipes of earlier versions have no such key.
        return self.recipe.get("matching")

    @property
    def first(self) -> int:
        """The first step of the student in the second stage."""
        return self.map_steps + (0 if self.matching is None else int(self.matching["critic"]["warmup_steps"]))

    @property
    def total(self) -> int:
        """The number of steps of the run, those of the critic alone included."""
        return self.first + (0 if self.matching is None else int(self.matching["steps"]))

    @property
    def verdict(self) -> Verdict | None:
        """The judgment of the evaluations of the second stage; None without early stopping."""
        rule = None if self.matching is None else self.matching.get("stop")
        if rule is None:
            return None
        settings = {key: value for key, value in self.recipe["evaluation"].items() if key != "every"}
        return judge(
            [one for one in self.evaluations if one["step"] >= self.map_steps and one.get("settings") == settings], rule
        )


def read_run(folder: Path) -> RunFiles:
    """Read a run's files; an unfinished last line of a log is left out.

    Raises:
        UserError: if the folder is not a run folder, or one of its files is damaged.
    """
    require_run(folder)
    log = folder / "steps.jsonl"
    return RunFiles(
        folder,
        _recipe(folder / "recipe.yaml"),
        read_lines(log, _STEP, todo=_CUT),
        read_lines(folder / "evaluations.jsonl", {"step": int, "rows": list}, todo=_CUT),
        _final(folder / "evaluation.json"),
        checkpoint.newest_state(folder / "checkpoints"),
        log.stat().st_mtime if log.exists() else None,
    )


def _recipe(written: Path) -> dict[str, Any]:
    """Read the settings that are shown; others may belong to another version, and are not checked."""
    todo = "restore it from a copy, or start another run in another --output"
    groups = {"teacher": str, "student": dict, "training": dict, "loss": dict, "extra_losses": list, "stages": list}
    found = read_mapping(written, groups, todo=todo)
    for group, keys in (
        ("student", {"regression_steps": int}),
        ("training", {"steps": int, "batch_size": int}),
        ("loss", {"name": str}),
    ):
        check_keys(f"{written}: {group}", found[group], keys, todo=todo)
    for group in ("extra_losses", "stages"):
        for index, term in enumerate(found[group]):
            where = f"{written}: {group}: item {index}"
            check_keys(where, {"item": term}, {"item": dict}, todo=todo)
            check_keys(where, term, {"loss": dict}, todo=todo)
            check_keys(f"{where}: loss", term["loss"], {"name": str}, todo=todo)
    if found.get("matching") is not None:
        _check_matching(f"{written}: matching", found, todo)
    return found


def _check_matching(where: str, found: Mapping[str, Any], todo: str) -> None:
    check_keys(where, found, {"matching": dict}, todo=todo)
    matching = found["matching"]
    check_keys(where, matching, {"steps": int, "loss": dict, "critic": dict}, todo=todo)
    check_keys(f"{where}.loss", matching["loss"], {"name": str}, todo=todo)
    check_keys(f"{where}.critic", matching["critic"], {"warmup_steps": int}, todo=todo)
    if (rule := matching.get("stop")) is not None:
        number = float | None
        keys: dict[str, type | UnionType] = {"metric": str, "calls": int | None, "patience": int | None}
        keys |= {"max_endpoint_error": number, "min_recall": number}
        check_keys(where, {"stop": rule}, {"stop": dict}, todo=todo)
        check_keys(f"{where}.stop", rule, keys, todo=todo)


def _final(written: Path) -> dict[str, Any] | None:
    try:
        return read_mapping(
            written, {"rows": list}, todo="remove it, and the same distillation command evaluates and exports again"
        )
    except BrokenFileError:
        # A run that continues has removed it since.
        if not written.exists():
            return None
        raise


def describe(run: RunFiles, now: float | None = None) -> str:
    """Return one line per property of a run.

    Args:
        now: the present time in seconds since 1970; None: that of the clock.
    """
    now = time.time() if now is None else now
    recipe = run.recipe
    last = " and ".join([recipe["loss"]["name"], *(term["loss"]["name"] for term in recipe["extra_losses"])])
    matched = [] if run.matching is None else [run.matching["loss"]["name"]]
    losses = ", then ".join([*(stage["loss"]["name"] for stage in recipe["stages"]), last, *matched])
    lines = {"teacher": str(recipe["teacher"]), "losses": losses} | _progress(run, now)
    lines["checkpoint"] = _newest(run, now)
    lines["skipped"] = _skipped_steps(run)
    lines["evaluated"] = _evaluated(run)
    if (verdict := run.verdict) is not None and run.matching is not None:
        lines["best"] = _best(run, verdict, run.matching["stop"])
    lines["size"] = _size(run.folder)
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def _progress(run: RunFiles, now: float) -> dict[str, str]:
    if not run.records:
        return {"step": f"0 of {run.total:,} (no step logged yet)"}
    # Steps count from 0 in the log.
    last, done = run.records[-1], run.records[-1]["step"] + 1
    percent = 100 * done / run.total
    ago = _duration(now - (run.logged or now))
    verdict = run.verdict
    stopped = verdict is not None and verdict.reason is not None and verdict.last == done
    ended = run.final is not None or done == run.total or stopped
    when = "" if ended else f", logged {ago} ago"
    lines = {"step": f"{done:,} of {run.total:,} ({percent:.1f} %{when})", "phase": _phase(run, done)}
    # Each phase has a loss and a rate of its own.
    count = next((i for i, one in enumerate(reversed(run.records)) if one["phase"] != last["phase"]), len(run.records))
    phase = run.records[-count:]
    lines["loss"] = _loss(phase)
    if "teacher_loss" in last:
        of_images = run.matching is not None and run.matching["loss"].get("real") is not None
        lines["critic"] = _critic(phase, comparable=not of_images)
    seconds = _seconds_per_step(run.recipe["training"]["batch_size"], phase)
    lines["rate"] = f"{run.recipe['training']['batch_size'] / seconds:,.1f} images per second, {seconds:.3g} s per step"
    if not ended:
        lines["time left"] = f"{_duration((run.total - done) * seconds)} at that rate"
    return lines


def _loss(records: Sequence[Mapping[str, Any]]) -> str:
    now, before = _mean_loss(records[-WINDOW:]), _mean_loss(records[-2 * WINDOW : -WINDOW])
    if now is None:
        return f"not finite in the last {min(WINDOW, len(records))} steps"
    text = f"{now:.4g} (mean of the last {min(WINDOW, len(records))} steps"
    if before is None:
        return text + ")"
    change = f", {100 * (now / before - 1):+.1f} %" if before > 0 else ""
    count = len(records[-2 * WINDOW : -WINDOW])
    return f"{text}; of the previous {count}: {before:.4g}{change})"


def _phase(run: RunFiles, done: int) -> str:
    name = str(run.records[-1]["phase"])
    if run.matching is None or done <= run.map_steps:
        return name
    if done <= run.first:
        return f"{name}, {done - run.map_steps:,} of {run.first - run.map_steps:,} (its warm-up; the student waits)"
    return f"{name}, {done - run.first:,} of {run.matching['steps']:,}"


def _critic(records: Sequence[Mapping[str, Any]], *, comparable: bool) -> str:
    """Return the errors of critic and teacher on generated samples: a critic that is ready has the lower one.

    Args:
        comparable: both are velocities of the generated samples. A critic that learns from images too is of a mixture.
    """
    shown = records[-_HEALTH:]
    # In the critic's own phase its loss is this error.
    errors = [
        [one[key] for one in shown if one[key] is not None]
        for key in ("critic_loss" if "critic_loss" in shown[-1] else "loss", "teacher_loss")
    ]
    if not all(errors):
        return f"not finite in the last {len(shown)} steps"
    critic, teacher = (sum(values) / len(values) for values in errors)
    judgment = "ready" if critic <= teacher else "behind the teacher: its gradient is not to be trusted yet"
    if not comparable:
        judgment = "learns from images too, so that its error decides nothing"
    return f"{judgment} (error {critic:.4g} on samples, of the teacher {teacher:.4g}; mean of {len(shown)} steps)"


def _best(run: RunFiles, verdict: Verdict, rule: Mapping[str, Any]) -> str:
    where = "its map" if verdict.step <= run.map_steps else f"step {verdict.step - run.first:,} of the student"
    text = f"{quantity_of(rule)} {verdict.value:.4g} after {where}"
    if verdict.reason is not None:
        return f"{text}; ended after step {max(0, verdict.last - run.first):,}: {verdict.reason}"
    count = (
        "no evaluation"
        if not verdict.since
        else "1 evaluation"
        if verdict.since == 1
        else f"{verdict.since} evaluations"
    )
    return f"{text}; {count} since"


def _mean_loss(records: Sequence[Mapping[str, Any]]) -> float | None:
    losses = [record["loss"] for record in records if record["loss"] is not None]
    return sum(losses) / len(losses) if losses else None


def _seconds_per_step(batch: int, phase: Sequence[Mapping[str, Any]]) -> float:
    records = phase[-WINDOW:]
    return float(sum(batch / record["images_per_second"] for record in records) / len(records))


def _newest(run: RunFiles, now: float) -> str:
    if run.newest is None:
        return "none yet"
    step, written = run.newest.step, run.newest.written
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written))
    return f"step {step:,}, written {date} ({_duration(now - written)} ago)"


def _skipped_steps(run: RunFiles) -> str:
    step, non_finite = 0, {"skipped": 0, "lr_scale": 1.0}
    if run.newest is not None:
        step, non_finite = run.newest.step, run.newest.state["non_finite_steps"]
    # Steps that the gradient scaler skipped have a text there, and are no failures.
    found = [record.get("skipped") for record in run.records if record["step"] >= step]
    later = sum(isinstance(skipped, list) or skipped == OF_CRITIC for skipped in found)
    halved = "; the learning rate was halved" if non_finite["lr_scale"] < 1 else ""
    return f"{non_finite['skipped'] + later:,} non-finite steps{halved}"


def _evaluated(run: RunFiles) -> str:
    times = len(run.evaluations)
    on_the_way = f", {times} {'time' if times == 1 else 'times'} during training" if times else ""
    return ("at the end" if run.final is not None else "not at the end yet") + on_the_way


def _size(folder: Path) -> str:
    size = 0.0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(root, name)).st_size  # noqa: PTH118 os.walk's own
            except FileNotFoundError:
                # An active run has removed an old checkpoint since its folder was listed.
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


def plot(run: RunFiles, picture: Path) -> None:
    """Plot the curves of a run that has logged a step into a PNG file.

    Raises:
        UserError: if the file can't be written.
    """
    from fmm_distill.run.curves import StageSteps, plot_curves

    stage, verdict = None, run.verdict
    if run.matching is not None:
        ended = run.final is not None or (verdict is not None and verdict.reason is not None)
        best = None if verdict is None else verdict.step
        stage = StageSteps(run.map_steps, run.first, run.matching["steps"], run.matching["loss"]["name"], best, ended)
    with writing(picture):
        plot_curves(run.records, _plotted(run), run.total, picture, stage)


def _plotted(run: RunFiles) -> list[dict[str, Any]]:
    """Return the evaluations during training and, if they do not end with it, the state of the final one."""
    found = list(run.evaluations)
    # With early stopping the exported state was evaluated during training.
    if run.final is None or run.verdict is not None:
        return found
    rows = run.final["rows"]
    counts = {one["protocol"].get("precision_recall") for one in found if isinstance(one.get("protocol"), dict)}
    protocol = run.final.get("protocol")
    if counts and isinstance(protocol, dict) and protocol.get("precision_recall") not in counts:
        # Fractions of more samples, and of smaller balls around them, are not comparable.
        rows = [row | {"precision": None, "recall": None} for row in rows]
    return [*found, {"step": run.total, "rows": rows}]
