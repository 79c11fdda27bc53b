"""What an exported student is: the facts of its card, in ``student.json`` beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill import __version__
from fmm_distill.errors import UserError
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.contents import record
from fmm_distill.io.files import write_text
from fmm_distill.io.reading import check_keys, read_lines, read_mapping
from fmm_distill.student.lora import has_lora

if TYPE_CHECKING:
    from types import UnionType

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["ABOUT", "About", "about_student", "read_about", "write_about"]

ABOUT = "student.json"
_TYPES: dict[str, type | UnionType] = {
    "fmm_distill": str,
    "teacher": str,
    "revision": str | None,
    "license": dict,
    "pipeline_tag": str | None,
    "steps": list,
    "not_folded": str | None,
    "any_step": str,
    "folded": str,
    "limits": str,
    "pipeline": str | None,
    "scheduler": dict,
    "call": dict,
    "guidance": dict | None,
    "lora": bool,
    "dataset": str | None,
    "made": dict,
    "where": dict | None,
    "hours": float | None,
}
_MADE: dict[str, type | UnionType] = {
    "loss": str,
    "papers": list,
    "steps": int,
    "batch_size": int,
    "seed": int,
    "data": str,
}


@dataclass(frozen=True)
class About:
    """What people and programs have to know of an exported student.

    Attributes:
        fmm_distill: the version that wrote it.
        teacher: the id or folder of its teacher; ``revision``: the commit, if it is on the Hub.
        license: what the Hub calls ``license``, and its name and link where it has them; empty: not stated.
        pipeline_tag: the Hub's name of the task; None: it has none.
        steps: the numbers of steps with a folded pipeline.
        not_folded: why there are none, if there can be none.
        any_step, folded: how the pipelines are called; ``{steps}`` stands for the number of steps.
        limits: what it can't do, what guidance is in its weights.
        pipeline: the stock class of its teacher's pipeline, where students are copies of it; None: they are not.
        scheduler: the configuration of its teacher's scheduler, with what the student predicts.
        call: keywords of that pipeline's call besides prompt and guidance.
        guidance: the scale that its network is told, and the range that it knows or null; None: it is told none.
        lora: whether its adapters are beside it.
        dataset: the Hub id of the images it was trained with, if there is one.
        made: loss, papers, steps, batch size, seed and data of its training.
        where: versions and device; None: not kept.
        hours: of training; None: not kept.
    """

    fmm_distill: str
    teacher: str
    revision: str | None
    license: dict[str, Any]
    pipeline_tag: str | None
    steps: tuple[int, ...]
    not_folded: str | None
    any_step: str
    folded: str
    limits: str
    pipeline: str | None
    scheduler: dict[str, Any]
    call: dict[str, Any]
    guidance: dict[str, Any] | None
    lora: bool
    dataset: str | None
    made: dict[str, Any]
    where: dict[str, Any] | None
    hours: float | None

    def to_json(self) -> str:
        """As ``student.json`` has it."""
        return json.dumps(asdict(self), indent=2) + "\n"


def about_student(
    student: Student,
    teacher: Teacher,
    recipe: Recipe,
    steps: tuple[int, ...],
    run: Path | None = None,
    trained: int | None = None,
) -> About:
    """The facts of a student that is exported with ``steps`` folded pipelines.

    Args:
        run: the run's folder, for hardware and hours.
        trained: steps that were made; None: all of the recipe.
    """
    exporter = exporter_of(teacher)
    reason = exporter.not_fixed
    return About(
        fmm_distill=__version__,
        teacher=teacher.source,
        revision=teacher.revision,
        license=dict(teacher.license or {}),
        pipeline_tag=_task(teacher),
        steps=() if reason else steps,
        not_folded=reason,
        any_step=_example(teacher, any_step=True),
        folded=_example(teacher, any_step=False),
        limits=_limits(recipe, teacher),
        pipeline=None if teacher.pipeline is None else teacher.pipeline.class_name,
        scheduler=_scheduler(student, teacher),
        call={} if teacher.pipeline is None else dict(teacher.pipeline.call),
        guidance=_guidance(teacher),
        lora=has_lora(student.network),
        dataset=_dataset(recipe),
        made=_made(recipe, trained),
        where=_environment(run),
        hours=_hours(run, recipe),
    )


def write_about(folder: Path, about: About) -> None:
    """Write ``student.json``."""
    write_text(folder / ABOUT, about.to_json())
    record(folder, ABOUT)


def read_about(folder: Path) -> About:
    """What ``write_about`` wrote.

    Raises:
        UserError: if the folder holds no student, or one of another version of fmm_distill.
    """
    file = folder / ABOUT
    if not file.is_file():
        raise UserError(f"{folder} holds no exported student (no {ABOUT}); wanted what fmm-distill export writes")
    todo = f"export the student again with fmm_distill {__version__}"
    kept = read_mapping(file, todo=todo)
    if missing := sorted(_TYPES.keys() - kept.keys()):
        raise UserError(f"{file} was written by fmm_distill {kept.get('fmm_distill')}, without {missing[0]}; {todo}")
    check_keys(str(file), kept, _TYPES, todo=todo)
    check_keys(f"{file}: made", kept["made"], _MADE, todo=todo)
    check_keys(f"{file}: scheduler", kept["scheduler"], {"_class_name": str}, todo=todo)
    if kept["guidance"] is not None:
        check_keys(f"{file}: guidance", kept["guidance"], {"scale": float, "range": list | None}, todo=todo)
    for number, n in enumerate(kept["steps"]):
        check_keys(f"{file}: steps", {str(number): n}, {str(number): int}, todo=todo)
    return About(**({name: kept[name] for name in _TYPES} | {"steps": tuple(kept["steps"])}))


def _example(teacher: Teacher, *, any_step: bool) -> str:
    if teacher.conditions is None:
        outputs = teacher.codec.outputs
        return f"{outputs} = pipeline(batch_size=4, num_inference_steps={{steps}}).{outputs}"
    pipeline = teacher.pipeline
    given = {} if pipeline is None else pipeline.call | pipeline.unguided()
    if any_step and pipeline is not None and teacher.guidance is not None and teacher.guidance.range is not None:
        given |= {str(pipeline.guidance): teacher.guidance.scale}
    keywords = "".join(f", {key}={value!r}" for key, value in given.items())
    if teacher.conditions.noun == "classes":
        return f"images = pipeline(class_labels=[0, 1], num_inference_steps={{steps}}{keywords})[0]"
    return f'samples = pipeline("a prompt", num_inference_steps={{steps}}{keywords})[0]'


def _limits(recipe: Recipe, teacher: Teacher) -> str:
    copies = "It follows its teacher's ODE: it can't generate what the teacher can't."
    if teacher.conditions is None:
        return f"Unconditional. {copies}"
    scale = recipe.guidance.scale if teacher.guidance is None else teacher.guidance.scale
    baked = f"guidance {scale:g} is in its weights" if scale != 1 else "its teacher was not guided"
    call = "Turn the pipeline's own guidance off, as above: it would be applied on top."
    if teacher.pipeline is not None and teacher.pipeline.guidance is None:
        call = "Its network takes the guidance as an input: call it with the keywords above."
    if teacher.guidance is not None and (scales := teacher.guidance.range) is not None:
        baked = f"guidance from {scales[0]:g} to {scales[1]:g} is an input of the any-step pipeline"
        call = (
            f"In the pipelines of a fixed number of steps {scale:g} is in the weights: turn their own guidance off, as "
            "above, or it is applied on top."
        )
    return f"Trained on {len(teacher.conditions.names)} {teacher.conditions.noun}; {baked}. {call} {copies}"


def _task(teacher: Teacher) -> str | None:
    # The Hub has no task of sounds without a condition.
    if teacher.codec.outputs == "audios":
        return None
    if teacher.conditions is None or teacher.conditions.noun != "prompts":
        return "unconditional-image-generation"
    return {5: "text-to-video", 3: "text-to-audio"}.get(
        teacher.codec.decode(torch.zeros(1, *teacher.event_shape)).ndim, "text-to-image"
    )


def _scheduler(student: Student, teacher: Teacher) -> dict[str, Any]:
    changed = {} if student.prediction == teacher.prediction else {"prediction_type": student.prediction}
    # Arrays of betas or sigmas become lists, as schedulers read them.
    plain = {
        key: value.tolist() if hasattr(value, "tolist") else value for key, value in teacher.scheduler_config.items()
    }
    return plain | changed


def _guidance(teacher: Teacher) -> dict[str, Any] | None:
    if teacher.pipeline is not None and teacher.pipeline.network_guidance is not None:
        return {"scale": teacher.pipeline.network_guidance, "range": None}
    if teacher.guidance is None or teacher.guidance.range is None:
        return None
    return {"scale": teacher.guidance.scale, "range": list(teacher.guidance.range)}


def _dataset(recipe: Recipe) -> str | None:
    source = recipe.data.source
    named = recipe.data.has_images and source.count("/") == 1 and not source.startswith((".", "/", "~", "builtin:"))
    return source if named and not Path(source).exists() else None


def _made(recipe: Recipe, trained: int | None) -> dict[str, Any]:
    total = recipe.student.regression_steps + recipe.training.steps
    losses = [*(stage.loss for stage in recipe.before), recipe.loss, *(term.loss for term in recipe.also)]
    return {
        "loss": recipe.loss_names,
        "papers": list(dict.fromkeys(loss.paper for loss in losses)),
        "steps": total if trained is None else trained,
        "batch_size": recipe.training.batch_size,
        "seed": recipe.training.seed,
        "data": recipe.data.source,
    }


def _environment(run: Path | None) -> dict[str, Any] | None:
    kept = None if run is None else run / "environment.json"
    if kept is None or not kept.is_file():
        return None
    return read_mapping(kept, todo="remove it, then run the same command again")


def _hours(run: Path | None, recipe: Recipe) -> float | None:
    """Of the steps that the log has; a last line that is not whole is none."""
    log = None if run is None else run / "steps.jsonl"
    if log is None or not log.is_file():
        return None
    lines = read_lines(log, {"images_per_second": float}, todo="repair or remove the line")
    rates = [line["images_per_second"] for line in lines]
    return sum(recipe.training.batch_size / rate for rate in rates) / 3600
