"""The rows of a run: one per test class, written to disk as soon as a stage of it is finished."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import transformers
from huggingface_hub import constants

from experiments.coverage import building, distilling, opening
from experiments.coverage.jobs import run_forked
from experiments.coverage.sizes import FUNCTIONS, shrink
from experiments.coverage.suite import find_cases

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from experiments.coverage.suite import Case

__all__ = ["STAGES", "Coverage", "Row", "read_rows"]

# Seconds after which a job counts as crashed.
LIMITS = {"build": 180.0, "open": 580.0, "distill": 580.0}
STAGES = tuple(LIMITS)
# One step and four; the second where the stock pipeline does not run with one.
_STEPS = ((1, 4), (2, 4))
_EMBEDDED = "try student.kind: embedded"

Row = dict[str, Any]

logger = logging.getLogger(__name__)


def read_rows(file: Path) -> dict[str, Row]:
    """Return rows by their keys; of several with one key the last."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {row["key"]: row for row in map(json.loads, lines)}


@dataclass
class Coverage:
    """The stages of all test classes of a checkout.

    Attributes:
        checkout: of diffusers.
        work: the folder of pipelines, runs, logs and rows.
        limits: seconds of each stage.
    """

    checkout: Path
    work: Path
    limits: dict[str, float] = field(default_factory=lambda: dict(LIMITS))

    def __post_init__(self) -> None:
        for name in ("pipelines", "runs", "logs"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        self.rows = read_rows(self._file)

    @property
    def _file(self) -> Path:
        return self.work / "rows.jsonl"

    def run(self, stages: Iterable[str], only: str = "", *, again: bool = False) -> None:
        """Run the stages of the classes whose keys match ``only``; finished ones are not run again.

        Args:
            only: a regular expression.
            again: open and distill the selected classes a second time. Their pipelines are not built again.
        """
        _preload()
        chosen = [case for case in find_cases(self.checkout) if re.search(only, case.key)]
        if not chosen:
            raise SystemExit(f"--only {only}: expected a part of a test class of {self.checkout}, found none")
        for case in chosen:
            row = self.rows.get(case.key, {"key": case.key})
            if again:
                row = {"key": case.key} | ({"build": row["build"]} if "build" in row else {})
            for stage in (stage for stage in STAGES if stage in stages):
                if self._is_due(row, stage):
                    # A later stage is that of the pipeline as it was built and opened before.
                    row = {name: value for name, value in row.items() if name not in _after(stage)}
                    row[stage] = getattr(self, f"_{stage}")(case, row)
                    self._write(row)
                    logger.info(f"{case.key}: {stage}: {_in_short(row[stage])}")

    def _is_due(self, row: Row, stage: str) -> bool:
        if stage in row:
            return False
        if stage == "build":
            return True
        built = "pipeline" in row.get("build", {})
        return built and (stage == "open" or "event_shape" in row.get("open", {}))

    def _write(self, row: Row) -> None:
        self.rows[row["key"]] = row
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _build(self, case: Case, row: Row) -> Row:
        folder = self._folder(case)
        made = self._job(case, "build", lambda scratch: building.build(case, self.checkout, folder, scratch))
        return {"tested": case.pipeline} | made

    def _open(self, case: Case, row: Row) -> Row:
        folder, call, forms = self._folder(case), row["build"]["call"], row["build"].get("images", {})
        return self._job(case, "open", lambda _: opening.open_and_check(folder, call, forms))

    def _distill(self, case: Case, row: Row) -> Row:
        steps = _STEPS[0] if row["open"].get("one_step", True) else _STEPS[1]
        made = self._distill_as(case, row, steps, "scaled")
        # The advice of the tool where the grid of the stock pipeline has jumps of very different lengths.
        return self._distill_as(case, row, steps, "embedded") if _EMBEDDED in made.get("error", "") else made

    def _distill_as(self, case: Case, row: Row, steps: tuple[int, ...], student: str) -> Row:
        folder, call, forms = self._folder(case), row["build"]["call"], row["build"].get("images", {})
        export = distilling.Export(steps, student)
        output = self.work / "runs" / case.slug
        shutil.rmtree(output, ignore_errors=True)
        made = self._job(case, "distill", lambda scratch: distilling.distill(folder, call, forms, output, export))
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        if made.get("code") or ("error" not in made and not made["passed"]):
            made["error"] = distilling.last_line(self._log(case, "distill"))
        return made | {"steps": list(steps), "student": student}

    def _job(self, case: Case, stage: str, work: Callable[[Path], Row]) -> Row:
        with tempfile.TemporaryDirectory() as scratch:
            outcome = run_forked(
                lambda: _with_own_cache(work, Path(scratch)), self.limits[stage], self._log(case, stage)
            )
        if outcome.error is not None:
            return {"error": outcome.error, "took": outcome.seconds}
        return (outcome.value or {}) | {"took": outcome.seconds}

    def _folder(self, case: Case) -> Path:
        return self.work / "pipelines" / case.slug

    def _log(self, case: Case, stage: str) -> Path:
        return self.work / "logs" / f"{case.slug}.{stage}.log"


def _preload() -> None:
    """Import what most jobs import: their children are forks of this process."""
    for name in (
        "fmm_distill.cli",
        "fmm_distill.run.distill",
        "fmm_distill.export.verify",
        "transformers.modeling_utils",
        *FUNCTIONS,
    ):
        importlib.import_module(name)
    for name in ("StableDiffusionXLPipeline", "FluxPipeline", "WanPipeline", "UNet2DModel"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "CLIPTokenizer", "T5EncoderModel", "T5Tokenizer", "Qwen2VLProcessor"):
        getattr(transformers, name)


def _with_own_cache(work: Callable[[Path], Row], scratch: Path) -> Row:
    """Run a job with a cache of embeddings of its own: those of an earlier version would hide a change of the code."""
    os.environ["HF_HOME"] = constants.HF_HOME = str(scratch)
    shrink(scratch)
    return work(scratch)


def _in_short(made: Row) -> str:
    """Return the end of a stage for the log."""
    failed = made.get("error") or made.get("refused")
    if failed:
        return str(failed)[:200]
    return "skipped" if made.get("skipped") else f"{made.get('checks', 'done')} in {made['took']} s"


def _after(stage: str) -> Sequence[str]:
    return STAGES[STAGES.index(stage) + 1 :]
