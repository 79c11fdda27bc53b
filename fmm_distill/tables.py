"""Datasets as tables: their rows opened by index, their images decoded one by one, their other columns."""

from __future__ import annotations

import io
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import UInt8
    from torch import Tensor

    from fmm_distill.settings import DataSettings

__all__ = ["Table", "Unreadable", "check_shape", "datasets_library", "first_line", "open_table"]

# What Pillow raises on bytes that are no image, or only a part of one.
_FAULTS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Unreadable:
    """An image that can't be decoded.

    Attributes:
        name: its file, or its row where it has none.
        reason: what the decoder said.
    """

    name: str
    reason: str


class Table:
    """The rows of a dataset, memory-mapped; an image is decoded when it is asked for.

    Args:
        rows: a ``datasets.Dataset`` whose image column is not decoded.
        column: the image column.
        settings: of the data, for how images are fitted and for messages.
    """

    def __init__(self, rows: Any, column: str, settings: DataSettings) -> None:  # noqa: ANN401 a datasets class
        self.rows, self.column, self.settings = rows, column, settings
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """What the pixels are a function of: the files' digest as ``datasets`` keeps it, the column and the fit."""
        return f"{self.rows._fingerprint} {self.column} {self.settings.fit}"

    def values(self, column: str) -> list[Any]:
        """A column's values, in the order of the rows.

        Raises:
            UserError: if there is no such column.
        """
        if column not in self.rows.features:
            known = ", ".join(name for name in self.rows.features if name != self.column) or "none besides the images"
            raise UserError(f"data.condition {column}: {self.settings.source} has no such column; it has {known}")
        return list(self.rows[column])

    def pictures(
        self, index: Sequence[int], shape: tuple[int, ...]
    ) -> list[UInt8[Tensor, "channels height width"] | Unreadable]:
        """The images at these rows, of this shape (channels, height, width), or why they can't be read.

        Raises:
            UserError: on an image of another size where ``data.fit`` is none.
        """
        files = self.rows[list(index)][self.column]
        # Pillow decodes outside the interpreter's lock.
        return list(self._pool.map(lambda i, file: self._picture(i, file, shape), index, files))

    def _picture(self, i: int, file: dict[str, Any] | None, shape: tuple[int, ...]) -> Tensor | Unreadable:
        channels, height, width = shape
        name = (file or {}).get("path") or f"row {i}"
        if file is None or (file["bytes"] is None and file["path"] is None):
            return Unreadable(name, "empty")
        try:
            with Image.open(io.BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"]) as opened:
                image = ImageOps.exif_transpose(opened).convert({1: "L", 3: "RGB"}[channels])
        except _FAULTS as error:
            return Unreadable(name, first_line(error))
        if self.settings.fit == "crop":
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        check_shape((channels, image.height, image.width), shape, f"{self.settings.source}, image {i}")
        return torch.from_numpy(np.array(image).reshape(height, width, channels)).movedim(-1, 0)


def check_shape(got: tuple[int, ...], wanted: tuple[int, ...], where: str) -> None:
    """Refuse images of another shape (channels, height, width) than the teacher's."""
    if tuple(got) != tuple(wanted):
        raise UserError(
            f"--data {where}: {' x '.join(map(str, got))} (channels x height x width); the teacher makes "
            f"{' x '.join(map(str, wanted))}: bring images of that size, --set data.fit=crop to have them resized and "
            "cropped, or --data none"
        )


def open_table(settings: DataSettings) -> Table:
    """The dataset of a recipe and its image column.

    Raises:
        UserError: if it can't be found or read, or has no image column, or several and none is named.
    """
    source = settings.source
    datasets = datasets_library(f"--data {source}")
    rows = _rows(datasets, settings)
    columns = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if settings.image is not None:
        if settings.image not in rows.features:
            raise UserError(f"data.image {settings.image}: {source} has {', '.join(rows.features)}; wanted one of them")
        columns = [settings.image]
    if len(columns) != 1:
        found = "no image column" if not columns else f"{len(columns)} image columns ({', '.join(columns)})"
        raise UserError(f"--data {source}: {found} among {', '.join(rows.features)}; wanted one: name it in data.image")
    try:
        rows = rows.cast_column(columns[0], datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"data.image {columns[0]}: {rows.features[columns[0]]} holds no images; wanted their files or bytes"
        ) from error
    return Table(rows, columns[0], settings)


def _rows(datasets: Any, settings: DataSettings) -> Any:  # noqa: ANN401 a module and its class
    source, split = settings.source, settings.split
    path = Path(source).expanduser()
    try:
        if path.is_file() or (path.is_dir() and list(path.rglob("*.parquet"))):
            files = _files(path, split)
            rows = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
        elif path.is_dir():
            rows = datasets.load_dataset("imagefolder", data_dir=str(path), split=split)
        else:
            rows = datasets.load_dataset(source, split=split)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--data {source}: no images could be read ({first_line(error)}); wanted none, teacher, a Hub dataset, a "
            "parquet file or folder, or a folder of images"
        ) from error
    if not len(rows):
        raise UserError(f"--data {source}: no images in its split {split}; wanted at least one")
    return rows


def _files(path: Path, split: str) -> list[Path]:
    """The parquet files of a split, which their names tell; without such names all are for training."""
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    named = files if path.is_file() and split == "train" else [file for file in files if split in file.name]
    if not named and split != "train":
        raise UserError(
            f"data.split {split}: no parquet file of {path} has it in its name; wanted {split}-*.parquet, or train"
        )
    return named or files


def datasets_library(what: str) -> Any:  # noqa: ANN401 a module
    """The module ``datasets``, or what to install for it."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{what}: reading it needs `pip install fmm-distill[data]`") from error
    datasets.disable_progress_bars()
    return datasets


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
