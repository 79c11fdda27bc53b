"""The files that a recipe names: their absolute paths and their digests."""

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
from fmm_distill.run.earlier_files import files_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.config.settings import DataSettings, IpAdapterSettings
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
# Smaller files are hashed at every start; larger ones only if their size or times have changed.
_LARGE = 256 * 2**20
_SUFFIXES = (".safetensors", ".json", ".txt", ".model")
_TODO = "remove it, and the run accepts the present teacher and data"


def with_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths, links resolved; Hub ids and built-in names stay as they are."""
    guidance, data, evaluation, prompts = recipe.guidance, recipe.data, recipe.evaluation, recipe.prompts
    features = evaluation.features if evaluation.features in FEATURES else _if_there(evaluation.features)
    reference = None if evaluation.reference is None else _data(evaluation.reference)
    measured = {"features": features, "reference": reference, "clip": _if_there(evaluation.clip)}
    sources = {"file": _if_there(prompts.file), "dataset": _if_there(prompts.dataset)}
    student, adapter = recipe.student, recipe.ip_adapter
    return recipe.model_copy(
        update={
            "teacher": _teacher(recipe.teacher),
            "guidance": guidance.model_copy(update={"weaker": guidance.weaker and _teacher(guidance.weaker)}),
            "ip_adapter": adapter.model_copy(update={"source": _if_there(adapter.source, folder=True)}),
            "data": _data(data),
            "student": student.model_copy(update={"init": _if_there(student.init, folder=True)}),
            "evaluation": evaluation.model_copy(update=measured),
            "prompts": prompts.model_copy(update=sources),
        }
    )


def _teacher(source: str) -> str | None:
    # A missing path would pass as a Hub id, and the run would be refused as one of another recipe.
    if source.startswith(("/", "./", "../", "~")) and not Path(source).expanduser().exists():
        raise UserError(
            f"{source}: expected a pipeline folder, a Hub id or builtin:digits, got nothing there; if the teacher of a "
            "run has moved, pass its new path"
        )
    return _if_there(source, folder=True)


def _data(settings: DataSettings) -> DataSettings:
    if not settings.has_images:
        return settings
    return settings.model_copy(update={"source": _if_there(settings.source)})


def _if_there(text: str | None, *, folder: bool = False) -> str | None:
    """Return the absolute path if it exists; otherwise the text, which is then an id."""
    if text is None or text.startswith("builtin:"):
        return text
    path = Path(text).expanduser()
    return str(path.resolve()) if (path.is_dir() if folder else path.exists()) else text


def contents(recipe: Recipe, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the digests of the files that a recipe with absolute paths names, by the name of the setting.

    Args:
        known: an earlier result, whose digests are reused for large files with the same size and times.
    """
    known = known or {}
    found: dict[str, Any] = {}
    for name, source in (("teacher", recipe.teacher), ("guidance.weaker", recipe.guidance.weaker)):
        if source is not None and Path(source).is_absolute() and Path(source).is_dir():
            found[name] = _pipeline(Path(source), known.get(name, {}))
    adapter = recipe.ip_adapter
    if adapter.source is not None and Path(adapter.source).is_absolute() and Path(adapter.source).is_dir():
        found["ip_adapter"] = _adapter(adapter, known.get("ip_adapter", {}))
    init = recipe.student.init
    if init is not None and Path(init).is_absolute() and Path(init).is_dir():
        files = files_of(Path(init), init)
        before = known.get("student.init", {})
        found["student.init"] = {name: _file(path, before, files.folder) for name, path in files.read.items()}
    if recipe.data.has_images and Path(recipe.data.source).is_absolute() and Path(recipe.data.source).exists():
        found["data.source"] = _files(Path(recipe.data.source))
    return found


def _pipeline(folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return digests and stamps of the files at the top of a pipeline's folder and in its components."""
    parts = (part for part in sorted(folder.iterdir()) if part.is_dir() and not part.name.startswith("."))
    # The oldest repositories have the network next to model_index.json.
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".") and path.suffix in _SUFFIXES]
    files += [path for part in parts for path in sorted(part.rglob("*")) if path.suffix in _SUFFIXES]
    return {path.relative_to(folder).as_posix(): _file(path, known, folder) for path in files if path.is_file()}


def _adapter(settings: IpAdapterSettings, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return digests and stamps of the files of an IP-Adapter."""
    source, folder = Path(str(settings.source)), settings.image_encoder_folder
    own = source / (settings.subfolder or "")
    encoder = (source if "/" in folder else own) / folder
    files = [own / str(settings.weight_name), *sorted(encoder.glob("*"))]
    there = [path for path in files if path.is_file() and path.suffix in _SUFFIXES]
    return {path.relative_to(source).as_posix(): _file(path, known, source) for path in there}


def _file(path: Path, known: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    status = path.stat()
    # ctime is in the stamp because tools that copy files restore mtime, and can't set ctime.
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    before = known.get(path.relative_to(folder).as_posix(), {})
    if status.st_size >= _LARGE and before.get("stamp") == stamp:
        return dict(before)
    return {"sha256": sha256_of_file(path), "stamp": stamp}


def _files(source: Path) -> dict[str, Any]:
    """Return the number of files, their bytes, and a digest of names and sizes, and of the content if it is small."""
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
    """Return the files below a folder, name to path, without hidden ones, which no reader of datasets opens.

    Links are followed; a folder that several links point to is listed once.
    """
    found: dict[Path, Path] = {}
    seen: set[str] = set()
    for root, below, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        # A link to a folder above itself would be followed forever.
        below[:] = [] if real in seen else sorted(name for name in below if not name.startswith("."))
        paths = [] if real in seen else [Path(root) / name for name in names if not name.startswith(".")]
        seen.add(real)
        found |= {path.relative_to(folder): path for path in paths if path.is_file()}
    return {name.as_posix(): path for name, path in sorted(found.items())}


def read_inputs(folder: Path) -> dict[str, Any] | None:
    """Read the digests of a run's inputs; None: the run has not stored them yet.

    Raises:
        UserError: if the file is damaged.
    """
    path = folder / INPUTS
    if not path.is_file():
        return None
    found = read_mapping(path, todo=_TODO)
    check_keys(str(path), found, dict.fromkeys(found, dict), todo=_TODO)
    for name in found.keys() & {"teacher", "guidance.weaker", "ip_adapter", "student.init"}:
        check_keys(f"{path}: {name}", found[name], dict.fromkeys(found[name], dict), todo=_TODO)
        for file, about in found[name].items():
            check_keys(f"{path}: {name}: {file}", about, {"sha256": str, "stamp": list}, todo=_TODO)
    return found


def same_content(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Tell if a setting names files of the same content in both, whatever their paths."""
    return name in there and name in here and not _differences(there[name], here[name])


def check_inputs(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a run whose teacher or data have changed since it began.

    Raises:
        UserError: with the names of the files.
    """
    for name in sorted(there.keys() & here.keys()):
        if found := _differences(there[name], here[name]):
            shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            raise UserError(
                f"{name}: expected the files that the run in {folder} began with, got others ({shown}); restore them, "
                f"or choose another --output. To accept the change, remove {folder / INPUTS}"
            )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    if "files" in there and "files" in here:
        if there.get("sha256") == here.get("sha256"):
            return []
        counts = f"{there['files']} files then, {here['files']} now"
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
    """Refuse a run whose dataset on the Hub has changed since it began, as far as ``datasets`` tells.

    Raises:
        UserError: with both numbers of images.
    """
    before = there.get("data.hub")
    if before is None or images is None or before == about_images(images):
        return
    raise UserError(
        f"data.source: expected {images.source} as the run in {folder} began with it ({before.get('images')} images), "
        f"got another version ({len(images)} images); restore it, or choose another --output. To accept the change, "
        f"remove {folder / INPUTS}"
    )


def about_images(images: Images) -> dict[str, Any]:
    """Return the number of images and a digest of their fingerprint, for a dataset on the Hub."""
    return {"images": len(images), "fingerprint": sha256_of_text(images.fingerprint)}
