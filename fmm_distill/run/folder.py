"""The folder of a run: the recipe, the inputs and the environment stored in it, and the changes that a run allows."""

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
from fmm_distill.export.adapter_code import ip_adapter_of
from fmm_distill.io.files import write_text, writing
from fmm_distill.io.reading import BrokenFileError, check_keys, read_mapping
from fmm_distill.run import inputs
from fmm_distill.run.marker import check_clearable, check_vacant, clear, is_run, mark, require_run
from fmm_distill.run.prompts import PROMPTS
from fmm_distill.training import checkpoint

if TYPE_CHECKING:
    from fmm_distill.config.recipe import Recipe
    from fmm_distill.data.samples import Images
    from fmm_distill.teachers.base import Teacher

__all__ = [
    "check_files",
    "check_folder",
    "check_images",
    "environment",
    "make_folder",
    "pinned",
    "read_evaluation",
    "read_recipe",
    "steps_done",
    "steps_exported",
    "store_commits",
    "store_inputs",
    "stored_recipe",
    "take_changes",
]

_RECIPE, _COMMITS, _EVALUATION = "recipe.yaml", "teacher.json", "evaluation.json"
# Settings that may change when a run continues: none of them changes the steps that are done.
_FREE = (
    "training.steps",
    "training.checkpoint_every",
    "training.checkpoints_total_limit",
    "training.max_non_finite_steps",
    "matching.steps",
)
_FREE_GROUPS = ("evaluation.", "export.", "logging.", "matching.stop", "matching.evaluate_every")
# Paths that may change if the files have the same content.
_INPUTS = ("teacher", "guidance.weaker", "data.source", "student.init")
# Sources of prompts; check_prompts compares the prompts themselves.
_PROMPT_SOURCES = ("prompts.file", "prompts.dataset")
_LOST = "restore it from a copy, or start another run in another --output"


def check_folder(folder: Path, recipe: Recipe, *, fresh: bool, seen: dict[str, Any]) -> list[str]:
    """Refuse a folder that a run of this recipe can't use, before anything is opened or written.

    Args:
        recipe: the recipe with absolute paths (``inputs.with_paths``).
        fresh: the run is to start again.
        seen: a mapping that stores the digests of the teacher and the data for a second call; empty in the first.

    Returns:
        One line per setting that changes when the run continues, with its values before and after.

    Raises:
        UserError: if the folder has other content, a run with another recipe or other inputs, or a run with more steps;
            with ``fresh``, if it has files that are not of a run.
    """
    if not is_run(folder):
        check_vacant(folder)
        return []
    if fresh:
        check_clearable(folder)
        return []
    if not (folder / _RECIPE).exists() and steps_done(folder) == 0:
        # The run was killed before it wrote its recipe.
        return []
    stored = stored_recipe(folder)
    there, here = _flat(stored.model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    different = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    before = inputs.read_inputs(folder) or {}
    seen.update(now := seen or inputs.contents(recipe, before))
    moved = {key for key in _INPUTS if inputs.same_content(key, before, now)}
    # A recipe without prompts has nothing that check_prompts could compare.
    if (folder / PROMPTS).is_file() and any(here.get(key) for key in _PROMPT_SOURCES):
        moved.update(_PROMPT_SOURCES)
    fixed = [key for key in different if key not in {*_FREE, *moved} and not key.startswith(_FREE_GROUPS)]
    if fixed:
        shown = "; ".join(f"{key}: expected {there.get(key)}, got {here.get(key)}" for key in fixed[:6])
        raise UserError(
            f"--output {folder} is a run of another recipe ({shown}); choose another folder, or --fresh to remove that "
            "run"
        )
    inputs.check_inputs(folder, before, now)
    done = steps_done(folder)
    total = recipe.total_steps
    if stored.matching is not None and done > stored.map_steps != recipe.map_steps:
        raise UserError(
            f"training.steps: expected {stored.training.steps}, at which the run in {folder} began its second stage, "
            f"got {recipe.training.steps}; try matching.steps, or choose another --output"
        )
    if done > total:
        second = recipe.matching is not None and done > recipe.map_steps
        name, steps = "matching.steps", 0 if recipe.matching is None else recipe.matching.steps
        name, steps = (name, steps) if second else ("training.steps", recipe.training.steps)
        raise UserError(
            f"{name} {steps}: expected at least the {done} steps that the run in {folder} has done, "
            f"{'all stages' if second else 'regression steps'} included; raise it, or choose another --output"
        )
    return [f"{key}: {there.get(key)} until step {done}, {here.get(key)} from there" for key in different]


def steps_done(folder: Path) -> int:
    """Return the step of a run's newest checkpoint; 0 if there is none."""
    newest = checkpoint.newest(folder / "checkpoints")
    return (None if newest is None else checkpoint.step_of(newest)) or 0


def steps_exported(folder: Path) -> int:
    """Return the step of the checkpoint that a run exports: the newest, or the one that early stopping chose."""
    measured = read_evaluation(folder)
    chosen = None if measured is None else measured.protocol.get("exported_step")
    return steps_done(folder) if chosen is None else int(chosen)


def take_changes(folder: Path, recipe: Recipe) -> None:
    """Replace the recipe of a run, store the old one next to it, and mark the run as unfinished."""
    # The evaluation marks a run as finished. Removed first, a kill in here leaves an unfinished run.
    (folder / _EVALUATION).unlink(missing_ok=True)
    old = (folder / _RECIPE).read_text(encoding="utf-8")
    write_text(folder / f"recipe-until-{steps_done(folder)}.yaml", old)
    write_text(folder / _RECIPE, recipe.to_yaml())


def make_folder(folder: Path, recipe: Recipe, *, fresh: bool) -> None:
    """Create the folder with its marker, its recipe and its environment; existing files stay unless ``fresh``."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The marker comes first, so that whatever a kill leaves is recognized as a run.
        mark(folder)
        if fresh:
            clear(folder)
            write_text(folder / _RECIPE, recipe.to_yaml())
    texts = {_RECIPE: recipe.to_yaml(), "environment.json": json.dumps(environment(), indent=2) + "\n"}
    for name, text in texts.items():
        if not (folder / name).is_file():
            write_text(folder / name, text)


def store_commits(folder: Path, teacher: Teacher, init: str | None = None) -> None:
    """Write the Hub commits of the run's teachers, once; null for a folder and for a built-in teacher.

    Args:
        init: the commit of the student that the run starts from.
    """
    weaker = None if teacher.weaker is None else teacher.weaker.revision
    adapter = ip_adapter_of(teacher)
    if not (folder / _COMMITS).is_file():
        commits = {"revision": teacher.revision, "guidance.weaker_revision": weaker, "student.init_revision": init}
        commits["ip_adapter.revision"] = None if adapter is None else adapter.revision
        write_text(folder / _COMMITS, json.dumps(commits, indent=2) + "\n")


def store_inputs(folder: Path, recipe: Recipe, images: Images | None) -> None:
    """Write the digests of the teacher's and the data's files, once."""
    if (folder / inputs.INPUTS).is_file():
        return
    found = inputs.contents(recipe)
    if images is not None and "data.source" not in found and not recipe.data.source.startswith("builtin:"):
        found["data.hub"] = inputs.about_images(images)
    write_text(folder / inputs.INPUTS, json.dumps(found, indent=1) + "\n")


def check_files(folder: Path, recipe: Recipe) -> None:
    """Refuse to reopen a run whose teacher or data have changed since it began.

    Raises:
        UserError: with the names of the files.
    """
    before = inputs.read_inputs(folder) or {}
    inputs.check_inputs(folder, before, inputs.contents(recipe, before))


def check_images(folder: Path, images: Images | None) -> None:
    """Refuse a run whose dataset on the Hub has changed since it began."""
    inputs.check_images(folder, inputs.read_inputs(folder) or {}, images)


def pinned(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe at the Hub commits that the run in ``folder`` began with; a branch may have moved since."""
    if not (folder / _COMMITS).is_file():
        return recipe
    names = ("revision", "guidance.weaker_revision", "student.init_revision", "ip_adapter.revision")
    keys = dict.fromkeys(names, str | None)
    todo = "remove it, and the run uses the recipe's own revisions"
    # Runs of earlier versions have no earlier student and no IP-Adapter.
    commits = {"student.init_revision": None, "ip_adapter.revision": None} | read_mapping(folder / _COMMITS, todo=todo)
    check_keys(str(folder / _COMMITS), commits, keys, todo=todo)
    weaker = commits["guidance.weaker_revision"] or recipe.guidance.weaker_revision
    init = commits["student.init_revision"] or recipe.student.init_revision
    guidance = recipe.guidance.model_copy(update={"weaker_revision": weaker})
    student = recipe.student.model_copy(update={"init_revision": init})
    commit = commits["ip_adapter.revision"] or recipe.ip_adapter.revision
    adapter = recipe.ip_adapter.model_copy(update={"revision": commit})
    changes = {"revision": commits["revision"] or recipe.revision, "guidance": guidance, "student": student}
    changes["ip_adapter"] = adapter
    return recipe.model_copy(update=changes)


def environment() -> dict[str, Any]:
    """Return versions and device, for the run folder and for bug reports."""
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


def stored_recipe(folder: Path) -> Recipe:
    """Return the recipe of a run, with absolute paths.

    Raises:
        UserError: if the folder is not a run folder, or its recipe is damaged.
    """
    require_run(folder)
    return read_recipe(folder / _RECIPE)


def read_recipe(written: Path) -> Recipe:
    """Read a recipe that a run or an export wrote, with absolute paths.

    Raises:
        UserError: if the file is damaged.
    """
    return inputs.with_paths(parse(read_mapping(written, {"teacher": str}, todo=_LOST), str(written)))


def read_evaluation(folder: Path) -> Evaluation | None:
    """Return the final evaluation, the last file that a run writes; None: the run is not finished.

    Raises:
        UserError: if the file is damaged.
    """
    written = folder / _EVALUATION
    todo = "remove it, and the same distillation command evaluates and exports again"
    try:
        found = read_mapping(written, {"protocol": dict, "rows": list}, todo=todo)
    except BrokenFileError:
        if not written.exists():
            return None
        raise
    try:
        return from_json(found)
    except (TypeError, KeyError, AttributeError) as error:
        raise BrokenFileError(f"{written}: expected the rows of an evaluation, got others ({error}); {todo}") from error
