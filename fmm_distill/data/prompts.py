"""Prompts of a recipe: the lines of a text file, or columns of a dataset, of texts and of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmm_distill.data import records
from fmm_distill.data.condition_images import ImageColumn
from fmm_distill.data.image_files import list_files
from fmm_distill.data.sources import Source, from_hub, from_parquet, from_saved, is_saved, load_parquet, refuse_file
from fmm_distill.data.text_files import lines_of, read_text, trimmed
from fmm_distill.errors import UserError
from fmm_distill.teachers.prompts import Prompts

if TYPE_CHECKING:
    from fmm_distill.config.settings import PromptSettings

__all__ = ["load_prompts"]

_EXPECTED = "a Hub dataset, or a parquet, CSV, TSV, JSON or JSON-lines file with a column of prompts"


def load_prompts(settings: PromptSettings) -> Prompts:
    """Prompts with their images, in the order of their source; none where the recipe names no source.

    Rows without a text are left out, unless they have images: these are given with the empty prompt.

    Raises:
        UserError: if the source can't be read, holds no prompt, or lacks an image in a row.
    """
    if settings.file is not None:
        path = Path(settings.file).expanduser()
        lines = lines_of(read_text(path, f"prompts.file {path}"))
        found = tuple(prompt for prompt in map(trimmed, lines) if prompt)
        if not found:
            raise UserError(f"prompts.file {path}: no line in it; expected one prompt per line")
        return Prompts(found)
    if settings.dataset is None:
        return Prompts(())
    source = Source(f"prompts.dataset {settings.dataset}", settings.dataset, _EXPECTED)
    rows = _rows(source)
    texts = _texts(rows, settings, source)
    if not settings.images:
        found = tuple(text for text in texts if trimmed(text))
        if not found:
            raise source.refuse(f"no prompt in its column {settings.column}; expected text")
        return Prompts(found)
    if not texts:
        raise source.refuse("no rows in it; expected one per image")
    folder = _folder(source)
    return Prompts(
        texts,
        {
            keyword: ImageColumn(keyword, column, source.name, folder, settings.image_size).load(rows)
            for keyword, column in settings.images.items()
        },
    )


def _texts(rows: Any, settings: PromptSettings, source: Source) -> tuple[str, ...]:  # noqa: ANN401 see _rows
    """Return one text per row, empty where there is none."""
    # A dataset's other columns may be images, which would be decoded.
    names, column = tuple(getattr(rows, "features", rows)), settings.column
    if column is None:
        return ("",) * (len(rows) if hasattr(rows, "features") else len(next(iter(rows.values()), ())))
    if column not in names:
        or_null = ", or null for no prompts" if settings.images else ""
        raise UserError(f"prompts.column {column}: {source.name} has {', '.join(names)}; expected one of them{or_null}")
    values = list(rows[column])
    for value in values:
        if not isinstance(value, str | int | float | None):
            raise UserError(f"prompts.column {column}: {source.name} has {type(value).__name__} in it; expected text")
    texts = ("" if value is None else str(value) for value in values)
    return tuple(text if trimmed(text) else "" for text in texts)


def _folder(source: Source) -> Path | None:
    """Return the folder that names of files are relative to; None: the dataset is on the Hub."""
    path = source.path
    if not path.exists():
        return None
    return (path if path.is_dir() else path.parent).absolute()


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
