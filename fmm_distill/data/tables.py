"""Datasets as tables: their rows opened by index, their images decoded one by one, their other columns."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

from fmm_distill.data import records, splits
from fmm_distill.data.image_files import list_files, read_folder, read_list
from fmm_distill.data.pixels import DECODING_ERRORS, VERSION, UnsupportedPixelsError, to_pixels
from fmm_distill.data.sources import (
    Source,
    datasets_library,
    from_hub,
    from_parquet,
    from_saved,
    is_saved,
    load_parquet,
    refuse_file,
)
from fmm_distill.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from jaxtyping import UInt8
    from torch import Tensor

    from fmm_distill.config.settings import DataSettings
    from fmm_distill.data.image_files import Rows

__all__ = ["Table", "Unreadable", "check_shape", "open_table"]

_EXPECTED = (
    "none, teacher, a Hub dataset, a folder of images, a parquet file or folder, a save_to_disk folder, or a CSV or "
    "JSON-lines file with a column file_name"
)


@dataclass(frozen=True)
class Unreadable:
    """An image that can't be decoded.

    Attributes:
        name: its file, or its row where it has none.
        reason: the decoder's message.
    """

    name: str
    reason: str


class Table:
    """The rows of a dataset, memory-mapped; an image is decoded at each access.

    Args:
        rows: a ``datasets.Dataset`` whose image column is not decoded.
        column: the image column.
        settings: of the data, for how images are fitted and for messages.
        digest: of the files.
        notes: lines on what of the source was left out, and why.

    Attributes:
        changed: for each kind of conversion the images that it changed so far, and the name of the first.
    """

    def __init__(
        self,
        rows: Any,  # noqa: ANN401 a datasets class
        column: str,
        settings: DataSettings,
        *,
        digest: str,
        notes: Sequence[str] = (),
    ) -> None:
        self.rows, self.column, self.settings, self.digest, self.notes = rows, column, settings, digest, notes
        self.changed: dict[str, tuple[int, str]] = {}
        # Threads suffice, and unlike processes they need no copies of the table.
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Return a text of all that the pixels depend on: the files, the column and the conversion."""
        return f"{self.digest} {self.column} {self.settings.fit} {self.settings.background} {VERSION}"

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
        found = list(self._pool.map(lambda i, file: self._picture(i, file, shape), index, files))
        for i, file, picture in zip(index, files, found, strict=True):
            for note in () if isinstance(picture, Unreadable) else picture[1]:
                count, first = self.changed.get(note, (0, _name(i, file)))
                self.changed[note] = count + 1, first
        return [picture if isinstance(picture, Unreadable) else picture[0] for picture in found]

    def _picture(
        self, i: int, file: dict[str, Any] | None, shape: tuple[int, ...]
    ) -> tuple[Tensor, list[str]] | Unreadable:
        channels, height, width = shape
        if file is None or (file["bytes"] is None and file["path"] is None):
            return Unreadable(_name(i, file), "empty")
        try:
            with Image.open(io.BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"]) as opened:
                image, notes = to_pixels(opened, channels, self.settings.background)
        except UnsupportedPixelsError as error:
            raise UserError(f"--data {self.settings.source}: {_name(i, file)} can't be used: {error}") from error
        except DECODING_ERRORS as error:
            return Unreadable(_name(i, file), first_line(error))
        if self.settings.fit == "crop":
            # Pillow antialiases when it shrinks an image, which torch does not do by default.
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        check_shape((channels, image.height, image.width), shape, f"{self.settings.source}, image {i}")
        # A copy: the array of a Pillow image is read-only, and torch warns of that.
        return torch.from_numpy(np.array(image).reshape(height, width, channels)).movedim(-1, 0), notes


def _name(i: int, file: dict[str, Any] | None) -> str:
    """An image's file, or its row."""
    return (file or {}).get("path") or f"row {i}"


def check_shape(got: tuple[int, ...], expected: tuple[int, ...], where: str) -> None:
    """Refuse images of another shape (channels, height, width) than the teacher's."""
    if tuple(got) != tuple(expected):
        raise UserError(
            f"--data {where}: expected {' x '.join(map(str, expected))} (channels x height x width), the size of the "
            f"teacher's images, got {' x '.join(map(str, got))}; try --set data.fit=crop to resize and crop them, or "
            "--data none"
        )


def open_table(settings: DataSettings) -> Table:
    """The dataset of a recipe and its image column.

    Raises:
        UserError: if it can't be found or read, or has no image column, or several and none is named.
    """
    source = Source(f"--data {settings.source}", settings.source, _EXPECTED, ("none", "teacher"))
    datasets = datasets_library(source.what)
    opened = _open(datasets, source, settings)
    rows = opened.rows if opened.cut else splits.sliced(datasets, opened.rows, settings.split)
    if not len(rows):
        raise source.refuse(f"no images in its split {settings.split}; expected at least one")
    columns = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if settings.image is not None:
        if settings.image not in rows.features:
            raise UserError(
                f"data.image {settings.image}: {source.name} has {', '.join(rows.features)}; expected one of them"
            )
        columns = [settings.image]
    if len(columns) != 1:
        found = "no image column" if not columns else f"{len(columns)} image columns ({', '.join(columns)})"
        raise source.refuse(f"{found} among {', '.join(rows.features)}; expected one: name it in data.image")
    try:
        rows = rows.cast_column(columns[0], datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"data.image {columns[0]}: {rows.features[columns[0]]} holds no images; expected their files or bytes"
        ) from error
    digest = f"{opened.digest} {settings.split}" if opened.digest else rows._fingerprint
    return Table(rows, columns[0], settings, digest=digest, notes=opened.notes)


@dataclass(frozen=True)
class _Opened:
    """The rows of a source.

    Attributes:
        notes: lines on what was left out.
        digest: of the files; empty: ``datasets`` has one of the rows.
        cut: whether the slice in ``data.split`` is taken already.
    """

    rows: Any
    notes: Sequence[str] = ()
    digest: str = ""
    cut: bool = False


def _open(datasets: Any, source: Source, settings: DataSettings) -> _Opened:  # noqa: ANN401 a module
    path, split = source.path, settings.split
    if settings.config is not None and path.exists():
        raise UserError(f"data.config {settings.config}: {source.name} is on this disk; expected null: give its folder")
    if path.is_file():
        return _open_file(datasets, source, settings)
    if not path.is_dir():
        return _Opened(from_hub(source, settings.config, split), cut=True)
    if is_saved(path):
        return _Opened(from_saved(source, split))
    listing = list_files(path)
    if listing.images and listing.parquet:
        raise source.refuse(
            f"it has {len(listing.images)} image files and {len(listing.parquet)} parquet files "
            f"({listing.parquet[0]}); expected one kind: give the folder or the file of one"
        )
    if listing.parquet:
        return _Opened(*from_parquet(listing, source, split))
    if not listing.images:
        kinds = ", ".join(f"{count} {ending}" for ending, count in listing.others.most_common(5)) or "no files"
        hidden = f" and {listing.hidden} hidden images" if listing.hidden else ""
        hint = _hint(listing.others)
        raise source.refuse(f"no images in this folder, which has {kinds}{hidden}{hint}; expected {source.expected}")
    found = read_folder(listing, source.name, split)
    return _Opened(_dataset(datasets, found), found.notes, found.digest)


def _hint(others: Mapping[str, int]) -> str:
    if ".arrow" in others:
        return ": give the folder in it that save_to_disk wrote"
    return ": unpack it first" if any(ending in (".zip", ".tar", ".gz", ".tgz") for ending in others) else ""


def _open_file(datasets: Any, source: Source, settings: DataSettings) -> _Opened:  # noqa: ANN401 a module
    path, kind, base = source.path, source.path.suffix.lower(), splits.base_of(settings.split)
    if kind == ".arrow":
        return _Opened(from_saved(source, settings.split))
    if kind not in (".parquet", *records.KINDS):
        raise refuse_file(source)
    if base not in ("train", splits.of_file(path.stem)):
        raise source.refuse(f"no split {settings.split}: its name does not state one; expected train, for all of it")
    if kind == ".parquet":
        return _Opened(load_parquet([path], source))
    found = read_list(path, source.name, settings.image)
    return _Opened(_dataset(datasets, found), found.notes, found.digest)


def _dataset(datasets: Any, found: Rows) -> Any:  # noqa: ANN401 a module and its class
    rows = datasets.Dataset.from_dict(found.columns)
    for name in found.images:
        rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows.cast_column("label", datasets.ClassLabel(names=list(found.classes))) if found.classes else rows
