"""The end of a run: evaluation, pictures, export and verification."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator

from fmm_distill.errors import FmmDistillError, UserError
from fmm_distill.evaluation.evaluator import evaluate
from fmm_distill.evaluation.gallery import COLUMNS, SEED, Gallery
from fmm_distill.evaluation.pictures import plot_samples, plot_steps
from fmm_distill.evaluation.result import Evaluation, choose, table
from fmm_distill.export.card import write_card
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.contents import CONTENTS
from fmm_distill.export.exporter import check_steps
from fmm_distill.export.manifest import make_manifest
from fmm_distill.export.place import check_replaceable, replacing
from fmm_distill.export.verify import summary, verify
from fmm_distill.export.write import write_student
from fmm_distill.io.files import write_text, writing
from fmm_distill.run.folder import steps_done
from fmm_distill.run.plan import Plan
from fmm_distill.training.early_stopping import describe_end, judge_run
from fmm_distill.training.trackers import log_picture, log_rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.core.flow_map import LearnedFlowMap
    from fmm_distill.export.agreement import Agreement
    from fmm_distill.student.student import Student

__all__ = ["Trained", "export_student", "finish", "how_to_load"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """The run that a student comes from.

    Attributes:
        folder: of the run.
        steps: the number of training steps.
        evaluation: of this student; None: there are no numbers of it.
    """

    folder: Path
    steps: int
    evaluation: Evaluation | None


def finish(
    job: Plan,
    averages: Mapping[float, LearnedFlowMap],
    folder: Path,
    accelerator: Accelerator,
    exported: int,
) -> None:
    """Evaluate the averages and export the best, whose weights the student has afterwards.

    Args:
        exported: the number of training steps of the averages.
    """
    student = folder / "student"
    # Before an evaluation that may take hours.
    check_replaceable(student)
    logger.info("evaluating")
    names = {f"student, ema {rate:g}": rate for rate in averages}
    students = {name: cast("Student", averages[rate].eval()) for name, rate in names.items()}
    settings, device = job.recipe.evaluation, accelerator.device
    measured = evaluate(students, job.teacher, settings, job.reference, device)
    rate, evaluation = choose(measured, names)
    # Into the student of the plan, whose teacher may share its network (adapters).
    job.student.load_state_dict(averages[rate].state_dict())
    job.student.eval()
    _draw(job, evaluation, folder, device)
    verdict = judge_run(job.recipe, folder)
    if verdict is not None:
        evaluation.protocol |= {"exported_step": exported, "second_stage": describe_end(job.recipe, verdict)}
    trained = Trained(folder, exported, evaluation)
    logger.info("exporting")
    agreements = export_student(job, student, job.recipe.export.steps, trained, wait=True)
    evaluation.protocol["reloaded_difference"] = max(one.difference for one in agreements.values())
    # After the export: this file marks the run as finished.
    write_text(folder / "evaluation.json", json.dumps(evaluation.to_json(), indent=2) + "\n")
    # Trackers accept no step before the last one.
    done = steps_done(folder)
    log_rows(accelerator, evaluation.to_json()["rows"], done)
    log_picture(accelerator, folder / "samples.png", done)
    logger.info(table(evaluation))
    logger.info(f"reloaded with stock diffusers: {summary(agreements)}")
    logger.info(how_to_load(folder, job.recipe))


def export_student(
    job: Plan,
    target: Path,
    steps: tuple[int, ...],
    trained: Trained,
    *,
    wait: bool = False,
) -> dict[str, Agreement]:
    """Write, describe and verify a student as pipelines; ``target`` is replaced once all of this is done.

    A student with adapters has the merged weights, and the adapters in ``lora/``.

    Args:
        steps: the numbers of steps with a pipeline of their own.
        wait: wait for another export into ``target`` instead of refusing.

    Raises:
        UserError: on a number of steps that does not divide the timesteps, files in ``target`` that no export wrote,
            another export into it at the same time, or a full disk.
        FmmDistillError: if a pipeline does not open or differs from the student; an export that was there before stays.
    """
    if exporter_of(job.teacher).not_any_step is None:
        check_steps(steps, job.student.schedule)
    # Pipelines are opened on the CPU, where both stay: nothing is done with them afterwards.
    failed: FmmDistillError | None = None
    agreements: dict[str, Agreement] = {}
    with replacing(target, wait=wait) as new:
        exported = write_student(job.student, job.teacher, new, steps, lora_rank=job.recipe.export.lora_rank)
        facts = (trained.folder, trained.steps, exported.exporter)
        manifest = make_manifest(job.student, job.teacher, job.recipe, steps, *facts)
        try:
            agreements = verify(exported)
        except UserError:
            raise
        except FmmDistillError as error:
            failed = FmmDistillError(str(error).replace(str(new), str(target)))
            if (target / CONTENTS).is_file():
                raise FmmDistillError(f"{failed}; the former export stays there") from error
        # After the verification, whose results are on the card.
        write_card(new, manifest, trained.evaluation, trained.folder)
    # A first export is put there all the same, to be looked at; it is not published.
    if failed is not None:
        raise failed
    return agreements


def _draw(job: Plan, evaluation: Evaluation, folder: Path, device: torch.device) -> None:
    settings = job.recipe.evaluation
    gallery = Gallery(job.teacher, settings.endpoint_solver_steps, COLUMNS, SEED, device)
    rows = gallery.rows(job.student, settings.steps, settings.stochasticity)
    with writing(folder / "samples.png"):
        plot_samples(rows, folder / "samples.png")
        plot_steps(evaluation, folder / "steps.png")


def how_to_load(folder: Path, recipe: Recipe) -> str:
    """Return the lines that load a finished run's student."""
    student = folder / "student"
    if not (student / "model_index.json").is_file():
        return f'load it in Python, with its teacher: load_student("{student}", teacher=...)'
    n = recipe.export.steps[-1] if recipe.export.steps else 0
    folded = student / f"steps-{n}"
    lines = ["load it with diffusers alone (README.md there has the complete call):"]
    lines += ["  from diffusers import DiffusionPipeline"]
    if folded.is_dir():
        lines += [f'  pipeline = DiffusionPipeline.from_pretrained("{folded}")  # num_inference_steps={n}']
    lines += [
        "or, for any number of steps:",
        f'  pipeline = DiffusionPipeline.from_pretrained("{student}", trust_remote_code=True)',
    ]
    return "\n".join(lines)
