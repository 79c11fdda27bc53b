"""The folder of a run: whose it is, what may change in it, and what explains it."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from fmm_distill import __version__, checkpoint
from fmm_distill.errors import UserError
from fmm_distill.evaluation.result import Evaluation, from_json
from fmm_distill.recipe import parse

if TYPE_CHECKING:
    from fmm_distill.recipe import Recipe
    from fmm_distill.teachers.base import Teacher

__all__ = [
    "PROMPTS",
    "check_folder",
    "check_prompts",
    "environment",
    "keep_commits",
    "kept_prompts",
    "kept_recipe",
    "make_folder",
    "pinned",
    "read_evaluation",
    "steps_done",
    "take_changes",
]

PROMPTS = "prompts.json"
_COMMITS = "teacher.json"
# What a run may go on with otherwise than it began: the steps already made stay what they are.
_FREE = ("training.steps", "training.checkpoint_every", "training.keep_checkpoints", "training.bad_steps")
_FREE_GROUPS = ("evaluation.", "export.", "logging.")


def check_folder(folder: Path, recipe: Recipe, *, fresh: bool) -> list[str]:
    """Refuse a folder that is not this recipe's, before anything is opened or written.

    Returns:
        What is changed in the recipe of a run that may go on so: each setting, what it was and what it becomes.

    Raises:
        UserError: on a folder of something else, of a run with another recipe, or of one that has done more steps.
    """
    written = folder / "recipe.yaml"
    if not written.is_file():
        if folder.exists() and (not folder.is_dir() or any(path.suffix != ".partial" for path in folder.iterdir())):
            raise UserError(f"--output {folder} is not empty and holds no run (no recipe.yaml); choose another folder")
        return []
    if fresh:
        return []
    there = _flat(yaml.safe_load(written.read_text(encoding="utf-8")))
    here = _flat(yaml.safe_load(recipe.to_yaml()))
    different = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    fixed = [key for key in different if key not in _FREE and not key.startswith(_FREE_GROUPS)]
    if fixed:
        shown = "; ".join(f"{key}: {there.get(key)} there, {here.get(key)} here" for key in fixed[:6])
        raise UserError(
            f"--output {folder} is a run of another recipe ({shown}); choose another folder, or --fresh to remove it"
        )
    done = steps_done(folder)
    total = recipe.student.regression_steps + recipe.training.steps
    if done > total:
        raise UserError(
            f"training.steps {recipe.training.steps}: the run in {folder} has done {done} steps already; wanted "
            "as many or more, or another --output"
        )
    return [f"{key}: {there.get(key)} until step {done}, {here.get(key)} from there" for key in different]


def steps_done(folder: Path) -> int:
    """The step of a run's newest checkpoint; 0 without any."""
    newest = checkpoint.newest(folder / "checkpoints")
    return 0 if newest is None else int(newest.name.removeprefix("step-"))


def take_changes(folder: Path, recipe: Recipe) -> None:
    """Keep the old recipe beside the new one; a finished run is finished no more."""
    # The evaluation is what makes a run finished: it goes first, so that a kill leaves no run that only seems so.
    (folder / "evaluation.json").unlink(missing_ok=True)
    old = (folder / "recipe.yaml").read_text(encoding="utf-8")
    checkpoint.write_text(folder / f"recipe-until-{steps_done(folder)}.yaml", old)
    checkpoint.write_text(folder / "recipe.yaml", recipe.to_yaml())


def make_folder(folder: Path, recipe: Recipe, *, fresh: bool) -> None:
    """Make the folder with its recipe and its environment; what stands there stays unless ``fresh``."""
    with checkpoint.writing(folder):
        if fresh and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    texts = {"recipe.yaml": recipe.to_yaml(), "environment.json": json.dumps(environment(), indent=2) + "\n"}
    for name, text in texts.items():
        if not (folder / name).is_file():
            checkpoint.write_text(folder / name, text)


def keep_commits(folder: Path, teacher: Teacher) -> None:
    """Write which commits of the Hub the run's teachers are, once; a folder's or a built-in teacher's is null."""
    weaker = None if teacher.weaker is None else teacher.weaker.revision
    if not (folder / _COMMITS).is_file():
        kept = {"revision": teacher.revision, "guidance.weaker_revision": weaker}
        checkpoint.write_text(folder / _COMMITS, json.dumps(kept, indent=2) + "\n")


def pinned(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the commits that the run in ``folder`` began with, if there is one: a branch may have moved."""
    if not (folder / _COMMITS).is_file():
        return recipe
    kept = json.loads((folder / _COMMITS).read_text(encoding="utf-8"))
    weaker = kept["guidance.weaker_revision"] or recipe.guidance.weaker_revision
    guidance = recipe.guidance.model_copy(update={"weaker_revision": weaker})
    return recipe.model_copy(update={"revision": kept["revision"] or recipe.revision, "guidance": guidance})


def environment() -> dict[str, Any]:
    """Versions and device, for the run folder and for bug reports."""
    packages = ("torch", "diffusers", "accelerate", "safetensors", "huggingface-hub", "torchmetrics")
    return {
        "fmm_distill": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
    }


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def kept_prompts(folder: Path) -> tuple[str, ...] | None:
    """The prompts of a run, which the recipe names by their file alone."""
    kept = folder / PROMPTS
    return tuple(json.loads(kept.read_text(encoding="utf-8"))) if kept.is_file() else None


def check_prompts(folder: Path, teacher: Teacher, *, fresh: bool) -> None:
    """Refuse to go on with other prompts than the run began with."""
    kept = None if fresh else kept_prompts(folder)
    if kept is not None and teacher.conditions is not None and kept != teacher.conditions.names:
        raise UserError(
            f"--output {folder} is a run of {len(kept)} other prompts (prompts.json there); choose another folder, "
            "restore the file of prompts, or --fresh to begin anew"
        )


def kept_recipe(folder: Path) -> Recipe:
    """The recipe of a run.

    Raises:
        UserError: if the folder is no run.
    """
    written = folder / "recipe.yaml"
    if not written.is_file():
        raise UserError(f"{folder} is no run folder (no recipe.yaml); wanted what --output was given")
    return parse(yaml.safe_load(written.read_text(encoding="utf-8")), str(written))


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation of a run that came to its end: it is the last file that a run writes."""
    if not (folder / "evaluation.json").is_file():
        return None
    return from_json(json.loads((folder / "evaluation.json").read_text(encoding="utf-8")))
