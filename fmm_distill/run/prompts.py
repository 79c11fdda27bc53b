"""The prompts of a run and the digests of their images, stored in its folder and compared when it continues."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fmm_distill.data.prompts import load_prompts
from fmm_distill.errors import UserError
from fmm_distill.io.files import write_text
from fmm_distill.io.reading import read_list
from fmm_distill.teachers.conditions import Embeddings
from fmm_distill.teachers.prompts import Prompts

if TYPE_CHECKING:
    from pathlib import Path

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.teachers.base import Teacher

__all__ = ["IMAGES", "PROMPTS", "check_prompts", "prompts_of_run", "store_prompts"]

PROMPTS, IMAGES = "prompts.json", "prompt_images.json"
_LOST = "restore it from a copy, or start another run in another --output"


def store_prompts(folder: Path, teacher: Teacher) -> None:
    """Write the prompts of a run, and a digest of the images of each where there are any."""
    if not isinstance(teacher.conditions, Embeddings):
        return
    write_text(folder / PROMPTS, json.dumps(teacher.conditions.names, indent=0) + "\n")
    if teacher.conditions.images:
        write_text(folder / IMAGES, json.dumps(teacher.conditions.given.digests(), indent=0) + "\n")


def check_prompts(folder: Path, teacher: Teacher) -> None:
    """Refuse to continue a run with other prompts or other images."""
    # Read for every teacher: a damaged file is reported.
    stored = _stored(folder, PROMPTS) if (folder / PROMPTS).is_file() else None
    if stored is not None and isinstance(teacher.conditions, Embeddings):
        _check_same(folder, stored, teacher.conditions.given)


def prompts_of_run(folder: Path, recipe: Recipe) -> Prompts | None:
    """Return the prompts that a run began with; None: it has none.

    The texts are those in its folder. Images are read from the recipe's dataset again.

    Raises:
        UserError: if the images are not on this machine, or have changed.
    """
    if not (folder / PROMPTS).is_file():
        return None
    texts = _stored(folder, PROMPTS)
    if not recipe.prompts.images:
        return Prompts(texts)
    try:
        found = load_prompts(recipe.prompts)
    except UserError as error:
        raise UserError(f"{error}; the run in {folder} needs its images: restore them") from error
    _check_same(folder, texts, found)
    return found


def _check_same(folder: Path, texts: tuple[str, ...], prompts: Prompts) -> None:
    if texts != prompts.texts:
        raise UserError(
            f"--output {folder}: expected the {len(texts)} prompts in its {PROMPTS}, got others; restore the file of "
            "prompts, or choose another folder"
        )
    if not (folder / IMAGES).is_file():
        return
    before, now = _stored(folder, IMAGES), prompts.digests()
    different = [i for i, digest in enumerate(now) if before[i : i + 1] != (digest,)]
    if different:
        raise UserError(
            f"--output {folder}: expected the images that the run began with, got others for {len(different)} of "
            f"{len(now)} prompts, the first of them number {different[0]}; restore the images, or choose another folder"
        )


def _stored(folder: Path, name: str) -> tuple[str, ...]:
    return tuple(read_list(folder / name, str, todo=_LOST))
