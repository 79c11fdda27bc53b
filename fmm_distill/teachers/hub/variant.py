"""A variant of a pipeline's weights, such as fp16, under the file names of the default weights."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from fmm_distill.errors import UserError
from fmm_distill.teachers.hub.links import linked_folder

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["link_variant"]


def link_variant(source: str, folder: Path, variant: str) -> Path:
    """Return a folder of links to the pipeline's files, with the variant's files under the default names.

    Stock classes open the folder, and copies of it, without the name of the variant. Components without this variant
    have their default weights.

    Raises:
        UserError: if no component has this variant.
    """

    def fill(target: Path) -> None:
        shutil.copyfile(folder / "model_index.json", target / "model_index.json")
        found = 0
        for part in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
            there = target if part == folder else target / part.name
            there.mkdir(exist_ok=True)
            found += _link_part(part, there, variant)
        if not found:
            raise UserError(f"{source}: expected weights of variant {variant}, got none; try another, or no variant")

    return linked_folder("variants", folder, variant, fill)


def _link_part(part: Path, target: Path, variant: str) -> int:
    """Link the files of one component; return how many are of the variant."""
    files = [path for path in sorted(part.iterdir()) if path.is_file() and path.name != "model_index.json"]
    plain = {path.name: _plain_name(path.name, variant) for path in files}
    chosen = {name for name in plain if plain[name] != name}
    for path in files:
        name = plain[path.name]
        if path.name not in chosen and chosen and ".safetensors" in path.name:
            # The default weights, which the variant replaces.
            continue
        if path.name in chosen and path.suffix == ".json":
            # The index names the shards by the names of the variant.
            index = json.loads(path.read_text(encoding="utf-8"))
            index["weight_map"] = {key: _plain_name(file, variant) for key, file in index["weight_map"].items()}
            (target / name).write_text(json.dumps(index), encoding="utf-8")
        else:
            # Resolved, since links of the cache are relative to their own folder.
            (target / name).symlink_to(path.resolve())
    return len(chosen)


def _plain_name(name: str, variant: str) -> str:
    """Return the default name of a file of the variant.

    The variant is in one of three positions: ``model.fp16.safetensors``, ``model.fp16-00001-of-00002.safetensors``,
    ``model.safetensors.index.fp16.json``.
    """
    for suffix in (".safetensors", "-", ".json", ".index.json"):
        name = name.replace(f".{variant}{suffix}", suffix)
    return name
