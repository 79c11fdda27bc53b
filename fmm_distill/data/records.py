"""Rows of CSV, TSV, JSON and JSON-lines files, by column. Values are what the file holds: nothing is guessed."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import TYPE_CHECKING, Any

from fmm_distill.data.text_files import lines_of, read_text
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["KINDS", "integers", "read_records"]

KINDS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")

# 007 is a name, not a number.
_INTEGER = re.compile(r"-?(0|[1-9]\d*)", re.ASCII)


def read_records(path: Path, what: str) -> dict[str, list[Any]]:
    """The columns of a file of rows; a value that a row lacks is None. Fields of CSV and TSV files are text.

    Args:
        what: the setting and the file, for messages.

    Raises:
        UserError: if the file can't be read or holds no rows.
    """
    text = read_text(path, what)
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return _separated(text, "," if kind == ".csv" else "\t", what)
    return _json(text, what, lines=kind != ".json")


def integers(values: list[Any]) -> list[Any]:
    """A column of text as integers where each of its values is one; otherwise the column as it is."""
    present = [value for value in values if value is not None]
    if not present or not all(isinstance(value, str) and _INTEGER.fullmatch(value) for value in present):
        return values
    return [None if value is None else int(value) for value in values]


def _separated(text: str, separator: str, what: str) -> dict[str, list[Any]]:
    # strict: an open quote is an error, not one field to the end of the file.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        names = next(reader, [])
        if not names or len(set(names)) < len(names):
            raise UserError(f"{what}: its first line is {names}; expected the columns' names, each once")
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise UserError(
                    f"{what}: line {reader.line_num} has {len(row)} fields and the first line {len(names)}; expected "
                    "as many: put quotes around a text with a separator in it"
                )
            for name, value in zip(names, row, strict=True):
                # CSV has no other way to write a missing value than the empty field.
                columns[name].append(value or None)
    except csv.Error as error:
        raise UserError(f"{what}: line {reader.line_num} can't be read ({error}); expected separated fields") from error
    return columns


def _json(text: str, what: str, *, lines: bool) -> dict[str, list[Any]]:
    if not lines:
        try:
            rows = json.loads(text)
        except ValueError:
            # Files of JSON lines are often named .json.
            return _json(text, what, lines=True)
        # A file of one line is one row.
        rows = [rows] if isinstance(rows, dict) else rows
        numbered = list(enumerate(rows, 1)) if isinstance(rows, list) else [(1, rows)]
        unit = "entry"
    else:
        numbered, unit = [], "line"
        for number, line in enumerate(lines_of(text), 1):
            if not line.strip():
                continue
            try:
                numbered.append((number, json.loads(line)))
            except ValueError as error:
                raise UserError(f"{what}: line {number} is not JSON ({error}); expected one object per line") from error
    columns: dict[str, list[Any]] = {}
    for position, (number, row) in enumerate(numbered):
        if not isinstance(row, dict):
            raise UserError(f"{what}: {unit} {number} is {type(row).__name__}; expected an object of columns")
        for name in row:
            columns.setdefault(name, [None] * position)
        for name, values in columns.items():
            values.append(row.get(name))
    return columns
