"""The base class of every group of settings: closed, frozen, and strict about numbers and text."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, cast, get_args

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

__all__ = ["Settings", "value_types"]


class Settings(BaseModel):
    """A closed, frozen group of settings.

    An unknown key is an error, and so is a value of a neighboring type. Numbers are finite, ``true`` is not a number,
    a text that holds a number in scientific notation is one (YAML reads ``1e-4`` as text), and texts are not empty.
    """

    # Closed: a mistyped key is an error instead of a setting without effect.
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        types = {name: value_types(cast("Any", field.annotation)) for name, field in cls.model_fields.items()}
        return {key: _as_number(part, types[key]) if key in types else part for key, part in value.items()}

    @field_validator("*")
    @classmethod
    def _texts(cls, value: object) -> object:
        if isinstance(value, dict):
            # Keywords of calls to other libraries, where an empty text has a meaning.
            listed = [part for item in value.values() if isinstance(item, list) for part in item]
            _check_letters("".join(part for part in (*value, *value.values(), *listed) if isinstance(part, str)))
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, str):
                _check_text(part)
        return value


@cache
def value_types(annotation: Any) -> frozenset[Any]:  # noqa: ANN401 a type or an alias of types
    """Return the types that an annotation is made of, including those of its elements."""
    parts = get_args(annotation)
    return frozenset().union(*map(value_types, parts)) if parts else frozenset([annotation])


def _as_number(value: object, types: frozenset[Any]) -> object:
    """Prepare a value of a numeric field, so that pydantic's leniency does not apply; of a list, each element."""
    # A field that also takes text or a truth value gets its value as it is written.
    if not types & {int, float} or types & {bool, str}:
        return value
    if isinstance(value, list | tuple):
        return [_as_number(part, types) for part in value]
    if isinstance(value, bool):
        # pydantic takes true for 1, and refuses it as text.
        return str(value).lower()
    # Three digits of exponent at most, as float64 has.
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,3}", value.strip()):
        number = float(value)
        return int(number) if number.is_integer() else number
    return value


def _check_text(value: str) -> None:
    if not value.strip():
        raise ValueError("expected a text that is not empty; leave the setting out, or write null where it may be")
    _check_letters(value)


def _check_letters(value: str) -> None:
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("expected text in UTF-8 without NUL characters")
