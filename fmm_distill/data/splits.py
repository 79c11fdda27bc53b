"""Splits of data on disk: the part of a dataset that a folder or a file is, by unambiguous names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["base_of", "of_file", "of_folder", "sliced", "splits_of_folders"]

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _WORDS.items() for word in words}

# train-00000-of-00001.parquet, as the Hub writes it; a split may have any name there.
_SHARD = re.compile(r"([A-Za-z_][\w.]*)-\d{5}-of-\d{5}(?:-\w+)?")
# train.parquet, train-0.parquet, train_01.parquet
_NUMBERED = re.compile(rf"({'|'.join(_SPLIT_OF)})(?:[-_.]?\d+)*", re.IGNORECASE)


def base_of(split: str) -> str:
    """The split that ``data.split`` names, without a slice such as ``[:1000]``; val and valid are validation."""
    name = split.partition("[")[0].strip()
    return _SPLIT_OF.get(name.lower(), name)


def of_folder(name: str) -> str | None:
    """The split that a folder's name is; None: it is no such name."""
    return _SPLIT_OF.get(name.lower())


def of_file(stem: str) -> str | None:
    """The split that a file's name without its extension states; None: it states none."""
    shard = _SHARD.fullmatch(stem)
    if shard is not None:
        return _SPLIT_OF.get(shard[1].lower(), shard[1])
    numbered = _NUMBERED.fullmatch(stem)
    return None if numbered is None else _SPLIT_OF[numbered[1].lower()]


def splits_of_folders(names: Iterable[str]) -> dict[str, str] | None:
    """The split of each folder, if every one of them has the name of a split; None: they are other folders."""
    found = {name: of_folder(name) for name in names}
    if not found or None in found.values():
        return None
    return {name: split for name, split in found.items() if split is not None}


def sliced(datasets: Any, rows: Any, split: str) -> Any:  # noqa: ANN401 a module and its class
    """Return the rows of a split, cut to its slice: ``train[:1000]``, ``train[10%:20%]``.

    Raises:
        UserError: on a slice that can't be read.
    """
    if "[" not in split and "+" not in split:
        return rows
    name = split.partition("[")[0].strip()
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    except (ValueError, AssertionError, KeyError) as error:
        raise UserError(
            f"data.split {split}: not a slice of {name} ({error}); expected such as {name}[:1000]"
        ) from error
    index: list[int] = []
    for part in parts:
        index += range(part.from_ or 0, len(rows) if part.to is None else part.to)
    # Indices instead of a slice: percentages and sums of slices are lists of ranges.
    return rows.select(index)
