"""The folder of a run: whose it is, what may change in it, and what explains it."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill import __version__
from fmm_distill.config.recipe import parse
from fmm_distill.errors import UserError
from fmm_distill.evaluation.result import Evaluation, from_json
from fmm_distill.io.files import write_text, writing
from fmm_distill.io.reading import BrokenFileError, read_list, read_mapping
from fmm_distill.run import inputs
from fmm_distill.run.marker import check_clearable, check_vacant, clear, is_run, mark, require_run
from fmm_distill.training import checkpoint

if TYPE_CHECKING:
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.data.samples import Images
    from fmm_distill.teachers.base import Teacher

__all__ = [
    "PROMPTS",
    "check_files",
    "check_folder",
    "check_images",
    "check_prompts",
    "environment",
    "keep_commits",
    "keep_inputs",
    "kept_prompts",
    "kept_recipe",
    "make_folder",
    "pinned",
    "read_evaluation",
    "read_recipe",
    "steps_done",
    "take_changes",
]

PROMPTS = "prompts.json"
_RECIPE, _COMMITS, _EVALUATION = "recipe.yaml", "teacher.json", "evaluation.json"
# What a run may continue with otherwise than it began: the steps already made stay what they are.
_FREE = (
    "training.steps",
    "training.checkpoint_every",
    "training.checkpoints_total_limit",
    "training.max_non_finite_steps",
)
_FREE_GROUPS = ("evaluation.", "export.", "logging.")
# Paths may change if the files there are the same.
_INPUTS = ("teacher", "guidance.weaker", "data.source")
# Where prompts come from: check_prompts compares the prompts themselves.
_PROMPT_SOURCES = ("prompts.file", "prompts.dataset")
_LOST = "restore it from a copy, or start another run in another --output"


def check_folder(folder: Path, recipe: Recipe, *, fresh: bool, seen: dict[str, Any]) -> list[str]:
    """Refuse a folder that is not this recipe's, before anything is opened or written.

    Args:
        recipe: with absolute paths (``inputs.with_paths``).
        seen: stores the digests of the teacher and the data for a second call; empty in the first.

    Returns:
        What is changed in the recipe of a run that may continue: each setting, its value before and after.

    Raises:
        UserError: on a folder of something else, of a run with another recipe or other inputs, or of one that has done
            more steps; with ``fresh`` on one that holds more than a run.
    """
    if not is_run(folder):
        check_vacant(folder)
        return []
    if fresh:
        check_clearable(folder)
        return []
    if not (folder / _RECIPE).exists() and steps_done(folder) == 0:
        # Killed before the recipe was written.
        return []
    there, here = _flat(kept_recipe(folder).model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    different = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    before = inputs.read_inputs(folder) or {}
    seen.update(now := seen or inputs.contents(recipe, before))
    moved = {key for key in _INPUTS if inputs.same_content(key, before, now)}
    # A recipe without prompts has nothing that check_prompts could compare.
    if (folder / PROMPTS).is_file() and any(here.get(key) for key in _PROMPT_SOURCES):
        moved.update(_PROMPT_SOURCES)
    fixed = [key for key in different if key not in {*_FREE, *moved} and not key.startswith(_FREE_GROUPS)]
    if fixed:
        shown = "; ".join(f"{key}: {there.get(key)} there, {here.get(key)} here" for key in fixed[:6])
        raise UserError(
            f"--output {folder} is a run of another recipe ({shown}); choose another folder, or --fresh to remove what "
            "that run wrote"
        )
    inputs.check_inputs(folder, before, now)
    done = steps_done(folder)
    total = recipe.student.regression_steps + recipe.training.steps
    if done > total:
        raise UserError(
            f"training.steps {recipe.training.steps}: the run in {folder} has done {done} steps already; expected "
            "as many or more, or another --output"
        )
    return [f"{key}: {there.get(key)} until step {done}, {here.get(key)} from there" for key in different]


def steps_done(folder: Path) -> int:
    """The step of a run's newest checkpoint; 0 without any."""
    newest = checkpoint.newest(folder / "checkpoints")
    return (None if newest is None else checkpoint.step_of(newest)) or 0


def take_changes(folder: Path, recipe: Recipe) -> None:
    """Store the old recipe next to the new one; a run that was finished is not any more."""
    # The evaluation is what makes a run finished: it goes first, so that a kill leaves no run that only seems so.
    (folder / _EVALUATION).unlink(missing_ok=True)
    old = (folder / _RECIPE).read_text(encoding="utf-8")
    write_text(folder / f"recipe-until-{steps_done(folder)}.yaml", old)
    write_text(folder / _RECIPE, recipe.to_yaml())


def make_folder(folder: Path, recipe: Recipe, *, fresh: bool) -> None:
    """Make the folder with its marker, its recipe and its environment; what is there stays unless ``fresh``."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The marker first: whatever a kill leaves is a run's then.
        mark(folder)
        if fresh:
            clear(folder)
            write_text(folder / _RECIPE, recipe.to_yaml())
    texts = {_RECIPE: recipe.to_yaml(), "environment.json": json.dumps(environment(), indent=2) + "\n"}
    for name, text in texts.items():
        if not (folder / name).is_file():
            write_text(folder / name, text)


def keep_commits(folder: Path, teacher: Teacher) -> None:
    """Write which commits of the Hub the run's teachers are, once; a folder's or a built-in teacher's is null."""
    weaker = None if teacher.weaker is None else teacher.weaker.revision
    if not (folder / _COMMITS).is_file():
        kept = {"revision": teacher.revision, "guidance.weaker_revision": weaker}
        write_text(folder / _COMMITS, json.dumps(kept, indent=2) + "\n")


def keep_inputs(folder: Path, recipe: Recipe, images: Images | None) -> None:
    """Write what the files of the teacher and the data are, once."""
    if (folder / inputs.INPUTS).is_file():
        return
    found = inputs.contents(recipe)
    if images is not None and "data.source" not in found and not recipe.data.source.startswith("builtin:"):
        found["data.hub"] = inputs.about_images(images)
    write_text(folder / inputs.INPUTS, json.dumps(found, indent=1) + "\n")


def check_files(folder: Path, recipe: Recipe) -> None:
    """Refuse to open a run again whose teacher or data are not those that it began with.

    Raises:
        UserError: with the files, and what to do.
    """
    before = inputs.read_inputs(folder) or {}
    inputs.check_inputs(folder, before, inputs.contents(recipe, before))


def check_images(folder: Path, images: Images | None) -> None:
    """Refuse a run whose dataset on the Hub is another than the one that it began with."""
    inputs.check_images(folder, inputs.read_inputs(folder) or {}, images)


def pinned(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the commits that the run in ``folder`` began with, if there is one: a branch may have moved."""
    if not (folder / _COMMITS).is_file():
        return recipe
    keys = {"revision": str | None, "guidance.weaker_revision": str | None}
    kept = read_mapping(folder / _COMMITS, keys, todo="remove it, and the run takes the recipe's own revisions")
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
    return tuple(read_list(kept, str, todo=_LOST)) if kept.is_file() else None


def check_prompts(folder: Path, teacher: Teacher) -> None:
    """Refuse to continue with other prompts than the run began with."""
    kept = kept_prompts(folder)
    if kept is not None and teacher.conditions is not None and kept != teacher.conditions.names:
        raise UserError(
            f"--output {folder} is a run of {len(kept)} other prompts (prompts.json there); choose another folder, or "
            "restore the file of prompts"
        )


def kept_recipe(folder: Path) -> Recipe:
    """The recipe of a run, with absolute paths.

    Raises:
        UserError: if the folder is no run, or its recipe is broken.
    """
    require_run(folder)
    return read_recipe(folder / _RECIPE)


def read_recipe(written: Path) -> Recipe:
    """A recipe that a run or an export wrote, with absolute paths.

    Raises:
        UserError: if the file is broken.
    """
    return inputs.with_paths(parse(read_mapping(written, {"teacher": str}, todo=_LOST), str(written)))


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation of a run that came to its end: it is the last file that a run writes.

    Raises:
        UserError: if the file is broken.
    """
    written = folder / _EVALUATION
    todo = "remove it, and the same distillation command measures and exports again"
    try:
        kept = read_mapping(written, {"protocol": dict, "rows": list}, todo=todo)
    except BrokenFileError:
        if not written.exists():
            return None
        raise
    try:
        return from_json(kept)
    except (TypeError, KeyError, AttributeError) as error:
        raise BrokenFileError(f"{written}: its rows are not those of an evaluation ({error}); {todo}") from error
