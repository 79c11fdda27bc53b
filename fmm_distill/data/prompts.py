"""Prompts of a recipe: the lines of a text file, or a column of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmm_distill.data import records
from fmm_distill.data.image_files import list_files
from fmm_distill.data.sources import Source, from_hub, from_parquet, from_saved, is_saved, load_parquet, refuse_file
from fmm_distill.data.text_files import lines_of, read_text, trimmed
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from fmm_distill.config.settings import PromptSettings

__all__ = ["load_prompts"]

_EXPECTED = "a Hub dataset, or a parquet, CSV, TSV, JSON or JSON-lines file with a column of prompts"


def load_prompts(settings: PromptSettings) -> tuple[str, ...]:
    """Prompts, in the order of their source; none where the recipe names no source.

    Raises:
        UserError: if the source can't be read or holds no prompt.
    """
    if settings.file is not None:
        path = Path(settings.file).expanduser()
        lines = lines_of(read_text(path, f"prompts.file {path}"))
        found = tuple(prompt for prompt in map(trimmed, lines) if prompt)
        if not found:
            raise UserError(f"prompts.file {path}: no line in it; expected one prompt per line")
        return found
    return () if settings.dataset is None else _column(settings.dataset, settings.column)


def _column(name: str, column: str) -> tuple[str, ...]:
    source = Source(f"prompts.dataset {name}", name, _EXPECTED)
    rows = _rows(source)
    # A dataset's other columns may be images, which would be decoded.
    names = tuple(getattr(rows, "features", rows))
    if column not in names:
        raise UserError(f"prompts.column {column}: {name} has {', '.join(names)}; expected one of them")
    values = [value for value in rows[column] if value is not None]
    for value in values:
        if not isinstance(value, str | int | float):
            raise UserError(f"prompts.column {column}: {name} has {type(value).__name__} in it; expected text")
    found = tuple(text for text in map(str, values) if trimmed(text))
    if not found:
        raise source.refuse(f"no prompt in its column {column}; expected text")
    return found


def _rows(source: Source) -> Any:  # noqa: ANN401 columns by name, or a datasets class
    path = source.path
    kind = path.suffix.lower()
    if path.is_dir():
        if is_saved(path):
            return from_saved(source, "train")
        listing = list_files(path)
        if not listing.parquet:
            raise source.refuse(f"no parquet file in this folder; expected {_EXPECTED}")
        return from_parquet(listing, source, "train")[0]
    if not path.is_file():
        return from_hub(source, None, "train")
    if kind in records.KINDS:
        return records.read_records(path, source.what)
    if kind == ".parquet":
        return load_parquet([path], source)
    if kind == ".arrow":
        return from_saved(source, "train")
    if kind == ".txt":
        raise source.refuse("it is a text file; for one prompt per line set prompts.file to it")
    raise refuse_file(source)
