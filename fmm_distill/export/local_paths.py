"""Public names for the paths of this machine in the files of an exported student."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from fmm_distill.errors import UserError
from fmm_distill.io.files import atomic_file, write_text

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LOCAL", "config_without_paths", "is_local", "public_name", "strip", "without_known", "without_paths"]

LOCAL = "local:"
_OWN = (LOCAL, "builtin:")
# Absolute on any system: a student that was trained on one machine may be published from another.
_STARTS = r"(?:file://|~(?:[A-Za-z_][\w.-]*)?[/\\]|[A-Za-z]:[/\\]|\\\\|/)"
_ABSOLUTE = re.compile(rf"{_STARTS}[^\n]*[^\s/\\][^\n]*|~(?:[A-Za-z_][\w.-]*)?")
# In a sentence a path ends at a space, a quote, a bracket or a comma; before it there is no letter, as in "a/b".
_WITHIN = re.compile(rf"(?<![\w./\\<-])(?:{_STARTS})[\w.@+~-][^\s'\"`<>()\[\]{{}},;]*")
_PUNCTUATION = re.compile(r"[,;()]|:\s")
_HOME = re.compile(r"(?:/home|/Users|[A-Za-z]:[/\\]Users)[/\\][^/\\]+[/\\]?|~[\w.-]*[/\\]?|/root/?", re.IGNORECASE)
# Their strings are pieces of text, of which some look like paths.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
_NAME_KEYS = ("_name_or_path", "name_or_path")


def is_local(source: str) -> bool:
    """Decide whether a source is a file or folder of this machine, not a Hub id or ``builtin:<name>``."""
    if source.startswith(_OWN):
        return False
    outside = source.startswith((".", "~")) or source.count("/") > 1 or "\\" in source
    return outside or _ABSOLUTE.fullmatch(source) is not None or Path(source).exists()


def public_name(source: str) -> str:
    """``local:<the last name of the path>``; of a home folder, whose last name is its user's, ``local:folder``."""
    if source.startswith(_OWN):
        return source
    path = source.removeprefix("file://")
    # Windows' separators include those of other systems. The names of "." and ".." are those of where they lead.
    name = PureWindowsPath(path).name
    name = Path(path).resolve().name if name in ("", ".", "..") else name
    of_user = _HOME.fullmatch(path) is not None or name == Path.home().name
    return f"{LOCAL}folder" if of_user or not name else f"{LOCAL}{name}"


def without_paths(value: Any, known: Mapping[str, str]) -> Any:  # noqa: ANN401 any JSON
    """Return JSON values with every path of this machine replaced by a public name.

    Args:
        known: paths that may be inside a text, also those with spaces and relative ones, to their names.
    """
    if isinstance(value, dict):
        return {key: without_paths(each, known) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(each, known) for each in value]
    return _plain(value, known) if isinstance(value, str) else value


def without_known(text: str, known: Mapping[str, str]) -> str:
    """Return a text with each of the known paths replaced by its public name."""
    # A name without a separator is also a word.
    paths = sorted((path for path in known if "/" in path or "\\" in path), key=len, reverse=True)
    if not paths:
        return text
    either = "|".join(map(re.escape, paths))
    return re.sub(rf"(?<![\w./\\-])(?:{either})(?![\w-])", lambda found: known[found[0]], text)


def _plain(text: str, known: Mapping[str, str]) -> str:
    if text in known:
        return known[text]
    text = without_known(text, known)
    # A text with punctuation is a sentence that begins with a path.
    if _ABSOLUTE.fullmatch(text) and not _PUNCTUATION.search(text):
        return public_name(text)
    return _WITHIN.sub(lambda found: public_name(found[0]), text)


def strip(folder: Path) -> None:
    """Rewrite the files in a folder of pipelines without the paths that libraries write into them.

    diffusers and transformers record the origin of a component as ``_name_or_path`` and ``tokenizer_file``, and
    weight files have metadata.

    Raises:
        UserError: if a configuration is not JSON.
    """
    for file in sorted(folder.rglob("*.json")):
        if file.name not in _VOCABULARIES:
            _strip_config(file)
    for file in sorted(folder.rglob("*.safetensors")):
        _strip_metadata(file)


def _strip_config(file: Path) -> None:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{file.parent.name}/{file.name} of the teacher is not JSON ({error}); fetch it again"
        ) from error
    stripped = config_without_paths(config)
    if stripped != config:
        write_text(file, json.dumps(stripped, indent=2, ensure_ascii=False) + "\n")


def _strip_metadata(file: Path) -> None:
    """Rewrite a safetensors file: the length of its header in 8 bytes, the header as JSON, the tensors."""
    with file.open("rb") as old:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        metadata = header.get("__metadata__", {})
        stripped = without_paths(metadata, {})
        if stripped == metadata:
            return
        text = json.dumps(header | {"__metadata__": stripped}, separators=(",", ":")).encode()
        # The tensors begin at a multiple of 8 bytes.
        text += b" " * (-len(text) % 8)
        with atomic_file(file) as partial, partial.open("wb") as new:
            new.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(old, new)


def config_without_paths(value: Any, key: str = "") -> Any:  # noqa: ANN401 any JSON
    """Return a component's settings with each path replaced by its last name.

    Args:
        key: the name of the setting that has the value.
    """
    if isinstance(value, dict):
        return {name: config_without_paths(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [config_without_paths(each) for each in value]
    if not isinstance(value, str):
        return value
    # A setting such as a special token may begin with a slash: a path has two names at least.
    absolute = _ABSOLUTE.fullmatch(value) is not None and len(re.findall(r"[/\\]+[^/\\]", value)) > 1
    if absolute or (key in _NAME_KEYS and is_local(value)):
        return public_name(value).removeprefix(LOCAL)
    return value
