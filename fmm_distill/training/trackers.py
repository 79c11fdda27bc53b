"""Trackers: numbers and pictures of a run in TensorBoard, wandb or trackio, through accelerate."""

from __future__ import annotations

import importlib
import json
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from accelerate.tracking import get_available_trackers

from fmm_distill.errors import UserError
from fmm_distill.io.files import write_text
from fmm_distill.io.reading import read_mapping
from fmm_distill.training.callbacks import Callback

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from accelerate import Accelerator

    from fmm_distill.config.recipe import Recipe

__all__ = ["TrackerLog", "check_trackers", "log_picture", "log_rows", "tracked", "tracker_folder"]

PROJECT = "fmm_distill"


def check_trackers(recipe: Recipe) -> None:
    """Check that the recipe's trackers are installed, before anything starts.

    Raises:
        UserError: if one is not.
    """
    installed = [str(name) for name in get_available_trackers()]
    missing = [name for name in recipe.logging.trackers if name not in installed]
    if missing:
        raise UserError(
            f"logging.trackers: expected installed packages, got {', '.join(missing)}, not installed; try `pip install "
            f"{' '.join(missing)}`, or leave it out (steps.jsonl is always written)"
        )


def tracker_folder(folder: Path) -> Path:
    """Return the folder of trackers that write files, in a run folder."""
    return folder / "tensorboard"


@contextmanager
def tracked(accelerator: Accelerator, recipe: Recipe, folder: Path, done: int) -> Iterator[None]:
    """Start the recipe's trackers, and close them at the end of the context.

    Args:
        folder: the folder of the run, which exists.
        done: number of steps done; above 0 the trackers resume their runs.

    Raises:
        UserError: if a tracker does not start, such as wandb without an account.
    """
    if not recipe.logging.trackers or not accelerator.is_main_process:
        yield
        return
    try:
        config = _flat(recipe.model_dump(mode="json")) if done == 0 else None
        accelerator.init_trackers(PROJECT, config, _settings(folder, done))
    except _failures(recipe) as error:
        raise UserError(
            f"logging.trackers: expected {', '.join(recipe.logging.trackers)} to start, got an error "
            f"({' '.join(str(error).split())}); repair it or leave it out"
        ) from error
    try:
        yield
    finally:
        # accelerate's end_training would also end the process group, which a second run in this process needs.
        for tracker in accelerator.trackers:
            tracker.finish()


def _settings(folder: Path, done: int) -> dict[str, dict[str, Any]]:
    """Return the settings with which each tracker resumes its run."""
    file = folder / "tracker.json"
    if not file.is_file():
        write_text(file, json.dumps({"id": secrets.token_hex(6)}) + "\n")
    run = read_mapping(file, {"id": str}, todo="remove it, and the trackers start a new run")["id"]
    return {
        # TensorBoard hides the points of steps that a resumed run repeats.
        "tensorboard": {"purge_step": done + 1} if done else {},
        "wandb": {"id": run, "name": folder.name, "dir": str(folder), "resume": "allow"},
        "trackio": {"name": f"{folder.name}-{run}", "resume": "allow"},
    }


def _failures(recipe: Recipe) -> tuple[type[Exception], ...]:
    """Return the exceptions of trackers that can't start."""
    if "wandb" not in recipe.logging.trackers:
        return (ImportError, OSError, RuntimeError, ValueError)
    wandb = importlib.import_module("wandb")
    return (ImportError, OSError, RuntimeError, ValueError, cast("type[Exception]", wandb.errors.Error))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by their dotted paths. Trackers take plain values, so that lists become text."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value) if isinstance(value, list) else value
    return flat


class TrackerLog(Callback):
    """The finite numbers of each step, for the trackers of an accelerator."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the numbers under the number of steps done."""
        numbers = {f"train/{key}": value for key, value in metrics.items() if isinstance(value, int | float)}
        # The step is the axis of every tracker and no curve of its own.
        del numbers["train/step"]
        self.accelerator.log(numbers, step=step)


def log_rows(accelerator: Accelerator, rows: Iterable[Mapping[str, Any]], step: int) -> None:
    """Log the rows of an evaluation as ``evaluation/<quantity>/<sampler>, <number of steps>``."""
    numbers = {
        f"evaluation/{quantity}/{row['sampler']}, {row['steps']}": row[quantity]
        for row in rows
        for quantity in ("endpoint_error", "frechet", "precision", "recall")
        if row[quantity] is not None
    }
    accelerator.log(numbers, step=step)


def log_picture(accelerator: Accelerator, picture: Path, step: int) -> None:
    """Log a picture file to the trackers that take images."""
    trackers = [tracker for tracker in accelerator.trackers if tracker.name in ("tensorboard", "wandb")]
    if not trackers:
        return
    import matplotlib.image

    for tracker in trackers:
        # Without alpha, which matplotlib adds to every PNG.
        pixels = (matplotlib.image.imread(picture)[..., :3] * 255).round().astype("uint8")
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": pixels[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({"samples": [pixels]}, step=step)
