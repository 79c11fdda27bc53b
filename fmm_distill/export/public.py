"""The texts of an exported student without the paths of this machine, as they are published."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fmm_distill.export.local_paths import config_without_paths, is_local, public_name, without_paths
from fmm_distill.export.manifest import StudentManifest
from fmm_distill.io.reading import read_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["known_paths", "public_evaluation", "public_json", "public_manifest", "public_recipe", "public_teacher"]

_TODO = "export the student again"


def public_teacher(teacher: str, revision: str | None) -> str:
    """Return the public name of a teacher: a Hub id, which has a revision, as it is, or ``local:<folder>``."""
    return teacher if revision is not None or teacher.startswith("builtin:") else public_name(teacher)


def known_paths(folder: Path, manifest: StudentManifest) -> dict[str, str]:
    """Return the public names of the paths in an exported student's recipe, by the path as written and as resolved."""
    named = _sources(manifest, _recipe(folder))
    paths = {value: public_name(value) for value, local in named if local}
    # Messages and configurations may have the path in either form.
    full = {str(Path(path).expanduser().absolute()): name for path, name in paths.items()}
    return full | {str(Path(path).expanduser()): name for path, name in paths.items()} | paths


def public_manifest(manifest: StudentManifest, known: Mapping[str, str]) -> StudentManifest:
    """Return the manifest with each path replaced by its public name."""
    facts: dict[str, Any] = without_paths(asdict(manifest), known)
    facts["scheduler"] = config_without_paths(facts["scheduler"])
    facts["teacher"] = public_teacher(manifest.teacher, manifest.revision)
    if (adapter := manifest.ip_adapter) is not None:
        facts["ip_adapter"]["source"] = public_teacher(adapter["source"], adapter["revision"])
    facts["init"] = manifest.init and public_teacher(manifest.init, manifest.init_revision)
    return StudentManifest(**(facts | {"steps": manifest.steps}))


def public_json(file: Path, known: Mapping[str, str]) -> str:
    """Return the text of a JSON file with each path replaced by its public name."""
    found = read_mapping(file, todo=_TODO)
    plain = without_paths(found, known)
    return file.read_text(encoding="utf-8") if plain == found else json.dumps(plain, indent=2) + "\n"


def public_evaluation(folder: Path, known: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the contents of ``evaluation.json`` of an exported student; None: it was not evaluated."""
    file = folder / "evaluation.json"
    if not file.is_file():
        return None
    return without_paths(read_mapping(file, {"protocol": dict, "rows": list}, todo=_TODO), known)


def public_recipe(folder: Path, manifest: StudentManifest, known: Mapping[str, str]) -> str:
    """Return the text of ``recipe.yaml`` with each path replaced by its public name; Hub ids stay."""
    recipe = _recipe(folder)
    for group, key in _path_settings(recipe):
        value = group[key]
        if value in known and (value, True) in _sources(manifest, recipe):
            group[key] = known[value]
    far = {path: name for path, name in known.items() if "/" in path or "\\" in path}
    return yaml.safe_dump(without_paths(recipe, far), sort_keys=False, allow_unicode=True)


def _recipe(folder: Path) -> dict[str, Any]:
    file = folder / "recipe.yaml"
    return read_mapping(file, todo=_TODO) if file.is_file() else {}


def _path_settings(recipe: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Return the settings that may be paths: the mapping that holds each, and its key there."""
    evaluation = _group(recipe, "evaluation")
    settings = [(recipe, "teacher"), (_group(recipe, "guidance"), "weaker"), (_group(recipe, "data"), "source")]
    settings += [
        (_group(recipe, "student"), "init"),
        (_group(recipe, "prompts"), "file"),
        (_group(recipe, "prompts"), "dataset"),
        (_group(recipe, "ip_adapter"), "source"),
    ]
    settings += [(evaluation, "features"), (evaluation, "clip"), (_group(evaluation, "reference"), "source")]
    return [(group, key) for group, key in settings if isinstance(group.get(key), str)]


def _group(settings: dict[str, Any], name: str) -> dict[str, Any]:
    group = settings.get(name)
    return group if isinstance(group, dict) else {}


def _sources(manifest: StudentManifest, recipe: dict[str, Any]) -> list[tuple[str, bool]]:
    """Return each source of a student, and whether it is on this machine."""
    data = str(manifest.training["data"])
    # The manifest decides these: their folders may be gone since the export.
    decided = {
        manifest.teacher: public_teacher(manifest.teacher, manifest.revision) != manifest.teacher,
        data: data not in ("none", "teacher", manifest.dataset) and not data.startswith("builtin:"),
    }
    if manifest.init is not None:
        decided[manifest.init] = public_teacher(manifest.init, manifest.init_revision) != manifest.init
    if (adapter := manifest.ip_adapter) is not None:
        source = adapter["source"]
        decided[source] = public_teacher(source, adapter["revision"]) != source
    found = list(decided.items())
    for group, key in _path_settings(recipe):
        value = group[key]
        file = key == "file" or (key == "features" and value.endswith(".pt"))
        found.append((value, decided.get(value, file or (key != "features" and is_local(value)))))
    return found
