"""The files that a recipe names: their absolute paths, and what tells their content from another's."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmm_distill.config.settings import FEATURES
from fmm_distill.errors import UserError
from fmm_distill.io.hashes import sha256_of_file, sha256_of_text
from fmm_distill.io.reading import check_keys, read_mapping

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.config.settings import DataSettings
    from fmm_distill.data.samples import Images

__all__ = [
    "INPUTS",
    "about_images",
    "check_images",
    "check_inputs",
    "contents",
    "read_inputs",
    "same_content",
    "with_paths",
]

INPUTS = "inputs.json"
# Smaller files are read at every start; of larger ones the stamp of the file system tells that they are the same.
_LARGE = 256 * 2**20
_SUFFIXES = (".safetensors", ".json", ".txt", ".model")
_TODO = "remove it, and the run takes the teacher and the data as they are"


def with_paths(recipe: Recipe) -> Recipe:
    """Make every path of a recipe absolute, with links followed; ids of the Hub and built-in names stay."""
    guidance, data, evaluation, prompts = recipe.guidance, recipe.data, recipe.evaluation, recipe.prompts
    features = evaluation.features if evaluation.features in FEATURES else _if_there(evaluation.features)
    reference = None if evaluation.reference is None else _data(evaluation.reference)
    measured = {"features": features, "reference": reference, "clip": _if_there(evaluation.clip)}
    asked = {"file": _if_there(prompts.file), "dataset": _if_there(prompts.dataset)}
    return recipe.model_copy(
        update={
            "teacher": _teacher(recipe.teacher),
            "guidance": guidance.model_copy(update={"weaker": guidance.weaker and _teacher(guidance.weaker)}),
            "data": _data(data),
            "evaluation": evaluation.model_copy(update=measured),
            "prompts": prompts.model_copy(update=asked),
        }
    )


def _teacher(source: str) -> str | None:
    # Compared as an id of the Hub, a missing path would be reported as another recipe.
    if source.startswith(("/", "./", "../", "~")) and not Path(source).expanduser().exists():
        raise UserError(
            f"{source}: no such folder; expected a pipeline folder, a Hub id or builtin:digits; if the teacher of a "
            "run has moved, pass its new path"
        )
    return _if_there(source, folder=True)


def _data(settings: DataSettings) -> DataSettings:
    if not settings.has_images:
        return settings
    return settings.model_copy(update={"source": _if_there(settings.source)})


def _if_there(text: str | None, *, folder: bool = False) -> str | None:
    """A path where there is one of this name, as it is opened; otherwise the text, which is an id then."""
    if text is None or text.startswith("builtin:"):
        return text
    path = Path(text).expanduser()
    return str(path.resolve()) if (path.is_dir() if folder else path.exists()) else text


def contents(recipe: Recipe, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the files are that a recipe with absolute paths names, by the name of its setting.

    Args:
        known: an earlier answer, from which digests of large files are taken that were not touched since.
    """
    known = known or {}
    found: dict[str, Any] = {}
    for name, source in (("teacher", recipe.teacher), ("guidance.weaker", recipe.guidance.weaker)):
        if source is not None and Path(source).is_absolute() and Path(source).is_dir():
            found[name] = _pipeline(Path(source), known.get(name, {}))
    if recipe.data.has_images and Path(recipe.data.source).is_absolute() and Path(recipe.data.source).exists():
        found["data.source"] = _files(Path(recipe.data.source))
    return found


def _pipeline(folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Digests and stamps of a pipeline's files: those at the top of its folder and those of its components."""
    parts = (part for part in sorted(folder.iterdir()) if part.is_dir() and not part.name.startswith("."))
    # The oldest repositories have their one network next to model_index.json.
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and path.suffix in _SUFFIXES]
    files += [path for part in parts for path in sorted(part.rglob("*")) if path.suffix in _SUFFIXES]
    return {path.relative_to(folder).as_posix(): _file(path, known, folder) for path in files if path.is_file()}


def _file(path: Path, known: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    status = path.stat()
    # The time of the last change of the file's entry can't be set by its owner, unlike that of its content.
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    before = known.get(path.relative_to(folder).as_posix(), {})
    if status.st_size >= _LARGE and before.get("stamp") == stamp:
        return dict(before)
    return {"sha256": sha256_of_file(path), "stamp": stamp}


def _files(source: Path) -> dict[str, Any]:
    """How many files there are, and a digest of their names and sizes, and of their content where it is little."""
    files = {source.name: source} if source.is_file() else _visible(source)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(json.dumps([name, sizes[name]]).encode())
        if total < _LARGE:
            digest.update(path.read_bytes())
    return {"files": len(files), "bytes": total, "sha256": digest.hexdigest()}


def _visible(folder: Path) -> dict[str, Path]:
    """The files below a folder without hidden ones, which no reader of datasets opens; name to path.

    Links are followed, and a folder that several links lead to is listed once.
    """
    found: dict[Path, Path] = {}
    seen: set[str] = set()
    for place, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        # A link to a folder above itself would never end.
        below[:] = [] if real in seen else sorted(name for name in below if not name.startswith("."))
        paths = [] if real in seen else [Path(place) / name for name in names if not name.startswith(".")]
        seen.add(real)
        found |= {path.relative_to(folder): path for path in paths if path.is_file()}
    return {name.as_posix(): path for name, path in sorted(found.items())}


def read_inputs(folder: Path) -> dict[str, Any] | None:
    """What a run began with; None: it has not written it yet.

    Raises:
        UserError: if the file is broken.
    """
    path = folder / INPUTS
    if not path.is_file():
        return None
    found = read_mapping(path, todo=_TODO)
    check_keys(str(path), found, dict.fromkeys(found, dict), todo=_TODO)
    for name in found.keys() & {"teacher", "guidance.weaker"}:
        check_keys(f"{path}: {name}", found[name], dict.fromkeys(found[name], dict), todo=_TODO)
        for file, about in found[name].items():
            check_keys(f"{path}: {name}: {file}", about, {"sha256": str, "stamp": list}, todo=_TODO)
    return found


def same_content(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Tell if a setting names the same files in both, wherever they are."""
    return name in there and name in here and not _differences(there[name], here[name])


def check_inputs(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a run whose teacher or data have changed since it began.

    Raises:
        UserError: with the files, and what to do.
    """
    for name in sorted(there.keys() & here.keys()):
        if found := _differences(there[name], here[name]):
            shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            raise UserError(
                f"{name}: its files are not those that the run in {folder} began with ({shown}); restore them, or "
                f"start a run in another --output. If the change is meant, remove {folder / INPUTS}"
            )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    if "files" in there and "files" in here:
        if there.get("sha256") == here.get("sha256"):
            return []
        counts = f"{there['files']} files there, {here['files']} here"
        return [counts if there["files"] != here["files"] else "other content"]
    return [*_changed(there, here)]


def _changed(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterable[str]:
    for file in sorted(there.keys() | here.keys()):
        if file not in here:
            yield f"{file} is missing"
        elif file not in there:
            yield f"{file} is new"
        elif there[file].get("sha256") != here[file].get("sha256"):
            yield f"{file} has changed"


def check_images(folder: Path, there: Mapping[str, Any], images: Images | None) -> None:
    """Refuse a run whose dataset on the Hub has changed since it began, as far as its library tells.

    Raises:
        UserError: with both numbers of images.
    """
    kept = there.get("data.hub")
    if kept is None or images is None or kept == about_images(images):
        return
    raise UserError(
        f"data.source: {images.source} is not what the run in {folder} began with ({kept.get('images')} images there, "
        f"{len(images)} here); restore it, or start a run in another --output. If the change is meant, remove "
        f"{folder / INPUTS}"
    )


def about_images(images: Images) -> dict[str, Any]:
    """What tells the images of a dataset on the Hub from others."""
    return {"images": len(images), "fingerprint": sha256_of_text(images.fingerprint)}
