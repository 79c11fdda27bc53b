"""Reading of JSON and YAML files that this package wrote: the expected object, or a one-line error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import UnionType

__all__ = ["BrokenFileError", "check_keys", "read_lines", "read_list", "read_mapping"]

_NAMES = {
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
    str: "text",
    int: "an integer",
    float: "a number",
    type(None): "null",
}


class BrokenFileError(UserError):
    """A file of this package is missing, damaged, or has other content."""


def read_mapping(path: Path, keys: Mapping[str, type | UnionType] | None = None, *, todo: str) -> dict[str, Any]:
    """Read a mapping from a JSON or YAML file; the suffix of the path decides.

    Args:
        keys: required keys and the types of their values, such as ``{"step": int, "revision": str | None}``.
        todo: the advice that ends an error message, such as "export the student again".

    Raises:
        BrokenFileError: if the file can't be read, or its content is not such a mapping.
    """
    found: dict[str, Any] = _checked(path, _parsed(path, todo), dict, todo)
    check_keys(str(path), found, keys or {}, todo=todo)
    return found


def read_list(path: Path, of: type | UnionType, *, todo: str) -> list[Any]:
    """Read a list of items of one type from a JSON or YAML file.

    Raises:
        BrokenFileError: if the file can't be read, or its content is not such a list.
    """
    found: list[Any] = _checked(path, _parsed(path, todo), list, todo)
    for index, item in enumerate(found):
        if not _is_of(item, of):
            raise BrokenFileError(f"{path}: item {index}: expected {_name(of)}, got {_name(type(item))}; {todo}")
    return found


def read_lines(path: Path, keys: Mapping[str, type | UnionType], *, todo: str) -> list[dict[str, Any]]:
    """Read a log of one JSON object per line. A missing file is an empty log; an unfinished last line is left out.

    Raises:
        BrokenFileError: if a line is not such an object; the message has its number.
    """
    if not path.exists():
        return []
    text = _text(path, todo)
    found = []
    # The text after the last newline is being written, or was when the run was killed.
    for number, line in enumerate(text[: text.rfind("\n") + 1].split("\n")[:-1], 1):
        where = f"{path}: line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BrokenFileError(f"{where}: not JSON ({_first_line(error)}); {todo}") from error
        if not isinstance(record, dict):
            raise BrokenFileError(f"{where}: expected a mapping, got {_name(type(record))}; {todo}")
        check_keys(where, record, keys, todo=todo)
        found.append(record)
    return found


def check_keys(where: str, found: Mapping[str, Any], keys: Mapping[str, type | UnionType], *, todo: str) -> None:
    """Refuse a mapping without a required key or with a value of another type.

    Args:
        where: the file and the position in it, for the message.

    Raises:
        BrokenFileError: with the name of the key.
    """
    for key, kind in keys.items():
        if key not in found:
            raise BrokenFileError(f"{where}: {key} is missing; {todo}")
        if not _is_of(found[key], kind):
            raise BrokenFileError(f"{where}: {key}: expected {_name(kind)}, got {_name(type(found[key]))}; {todo}")


def _parsed(path: Path, todo: str) -> Any:  # noqa: ANN401 any JSON or YAML value
    text = _text(path, todo)
    if not text.strip():
        raise BrokenFileError(f"{path} is empty; {todo}")
    is_yaml = path.suffix in (".yaml", ".yml")
    try:
        return yaml.safe_load(text) if is_yaml else json.loads(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # A JSON error at the end of the text means that the file was cut off.
        torn = isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip())
        fault = "is truncated" if torn else f"is not {'YAML' if is_yaml else 'JSON'}"
        raise BrokenFileError(f"{path} {fault} ({_first_line(error)}); {todo}") from error


def _text(path: Path, todo: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise BrokenFileError(f"{path} is missing; {todo}") from error
    except OSError as error:
        raise BrokenFileError(f"{path} can't be read ({error.strerror or error}); {todo}") from error
    except UnicodeDecodeError as error:
        raise BrokenFileError(f"{path} is not UTF-8 text (byte {error.start}); {todo}") from error


def _checked(path: Path, found: Any, kind: type, todo: str) -> Any:  # noqa: ANN401 any JSON or YAML value
    if not isinstance(found, kind):
        raise BrokenFileError(f"{path}: expected {_name(kind)}, got {_name(type(found))}; {todo}")
    return found


def _is_of(value: object, kind: type | UnionType) -> bool:
    kinds = _kinds(kind)
    # In Python True is an int, in JSON it is not; in JSON 1 is a number like 1.0.
    if isinstance(value, bool):
        return bool in kinds or object in kinds
    return isinstance(value, kinds) or (isinstance(value, int) and float in kinds)


def _name(kind: type | UnionType) -> str:
    return " or ".join(_NAMES.get(one, one.__name__) for one in _kinds(kind))


def _kinds(kind: type | UnionType) -> tuple[type, ...]:
    return (kind,) if isinstance(kind, type) else kind.__args__


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
