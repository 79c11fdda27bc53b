"""The files of a stock pipeline that its exports share: copied, or linked."""

from __future__ import annotations

import os
import re
import shutil
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmm_distill.teachers.guiders import write_guiders_off
from fmm_distill.teachers.ip_adapter import FOLDER

if TYPE_CHECKING:
    from collections.abc import Collection

    from fmm_distill.teachers.pipeline import StockPipeline

__all__ = ["copy_parts", "further_folders", "parts_bytes"]

# Configurations, weights, chat templates and vocabularies.
_OPENED = (".json", ".safetensors", ".jinja", ".model", ".spm", ".tiktoken", "vocab.txt", "merges.txt")
_NOT_OPENED = (".bin.index.json",)
# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json
_VARIANT = re.compile(r"\.\w+(-\d+-of-\d+)?\.safetensors$|\.safetensors\.index\.\w+\.json$")


def copy_parts(
    pipeline: StockPipeline, target: Path, source: Path | None = None, *, linked: bool = False
) -> dict[str, Any]:
    """Copy the components other than network and scheduler, its guiders turned off, and return the pipeline's index.

    Args:
        source: an earlier copy on the same disk: its files are linked, not copied.
        linked: write links to the teacher's own files, wherever they are.
    """
    for name in _folders(pipeline):
        if source is not None and (source / name).is_dir():
            # Hard links: each pipeline is complete on its own, and the files are on the disk once.
            shutil.copytree(source / name, target / name, copy_function=_linked)
        elif (pipeline.folder / name).is_dir():
            copy_file = _pointed_to if linked else shutil.copy2
            # The file of an IP-Adapter has any name.
            ignore = None if name == FOLDER else _unused
            shutil.copytree(pipeline.folder / name, target / name, ignore=ignore, copy_function=copy_file)
    write_guiders_off(target)
    return pipeline.index


def parts_bytes(pipeline: StockPipeline) -> int:
    """Return the number of bytes that ``copy_parts`` copies."""
    total = 0
    for name in _folders(pipeline):
        files = [file for file in (pipeline.folder / name).rglob("*") if file.is_file()]
        unused = [] if name == FOLDER else _unused("", [file.name for file in files])
        total += sum(file.stat().st_size for file in files if file.name not in unused)
    return total


def further_folders(folder: Path, name: str, index: Collection[str]) -> list[str]:
    """Return the folders of a component after its first: several ControlNets are ``controlnet``, ``controlnet_1``, ...

    Args:
        index: the names of all components.
    """
    more = (f"{name}_{number}" for number in count(1))
    return list(takewhile(lambda each: (folder / each).is_dir() and each not in index, more))


def _folders(pipeline: StockPipeline) -> list[str]:
    """Return the names of the folders of the components, and of an IP-Adapter."""
    # An index of a stranger must not write outside of the export.
    parts = [name for name in pipeline.parts if Path(name).name == name]
    found = [each for name in parts for each in (name, *further_folders(pipeline.folder, name, pipeline.index))]
    return found if pipeline.ip_adapter is None else [*found, FOLDER]


def _unused(folder: str, names: list[str]) -> list[str]:
    """The files of a component's folder that stock diffusers does not open: pickles, code, variants, a user's own."""
    return [name for name in names if not (_is_opened(name) or ((Path(folder) / name).is_dir() and name[0] != "."))]


def _is_opened(name: str) -> bool:
    hidden = name.startswith(".")
    return not hidden and name.endswith(_OPENED) and not name.endswith(_NOT_OPENED) and not _VARIANT.search(name)


def _linked(source: str, target: str) -> None:
    """Make a hard link, or a copy where the disk has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _pointed_to(source: str, target: str) -> None:
    """Make a symbolic link, or a copy where the disk has none."""
    try:
        Path(target).symlink_to(Path(source).resolve())
    except OSError:
        shutil.copy2(source, target)
