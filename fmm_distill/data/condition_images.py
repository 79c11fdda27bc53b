"""Images that a pipeline is called with: columns of a table as Pillow images of one size."""

from __future__ import annotations

import io
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from fmm_distill.data.pixels import DECODING_ERRORS, UnsupportedPixelsError, to_pixels
from fmm_distill.data.sources import datasets_library
from fmm_distill.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ImageColumn", "describe_images"]

logger = logging.getLogger(__name__)

# Transparent images are composited on it, as by default in ``data.background``.
_BACKGROUND = "white"
# More sizes than these are not named in a message.
_NAMED = 3


@dataclass(frozen=True)
class ImageColumn:
    """A column of images, for one keyword of a pipeline's call.

    Attributes:
        keyword: of the pipeline's call.
        column: its name in the table.
        source: the name of the table, for messages.
        folder: names of files are relative to it; None: the table is on the Hub, and names no files.
        size: height and width to which the images are resized and cropped; None: they are of one size.
    """

    keyword: str
    column: str
    source: str
    folder: Path | None
    size: tuple[int, int] | None = None

    @property
    def is_mask(self) -> bool:
        """Return whether the images are masks: gray, and resized without new values between two others."""
        return "mask" in self.keyword

    def load(self, rows: Any) -> tuple[Any, ...]:  # noqa: ANN401 columns by name, or a datasets class
        """Return one image per row, or a list of images per row.

        Args:
            rows: columns by name, or a ``datasets.Dataset``.

        Raises:
            UserError: on a row without a readable image, on rows of different lengths, or on images of different sizes
                where no size is set.
        """
        cells = [self._files(row, cell) for row, cell in enumerate(self._cells(rows))]
        lengths = [len(cell) if isinstance(cell, list) else None for cell in cells]
        for row, length in enumerate(lengths):
            if length != lengths[0]:
                first, own = ("one image" if n is None else f"a list of {n}" for n in (lengths[0], length))
                raise self._refuse(row, f"{first}, as in row 0", own)
        files = [(row, file) for row, cell in enumerate(cells) for file in (cell if isinstance(cell, list) else [cell])]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            # Pillow decodes outside the interpreter's lock.
            decoded = list(pool.map(lambda each: self._decode(*each), files))
        self._log_changes([notes for _, notes in decoded])
        images = iter(self._of_one_size([image for image, _ in decoded]))
        return tuple([next(images) for _ in cell] if isinstance(cell, list) else next(images) for cell in cells)

    def _cells(self, rows: Any) -> list[Any]:  # noqa: ANN401 see load
        """Return the values of the column; images of a dataset as their bytes or paths."""
        features = getattr(rows, "features", None)
        if self.column not in (rows if features is None else features):
            known = ", ".join(rows if features is None else features)
            raise UserError(
                f"prompts.images.{self.keyword} {self.column}: {self.source} has {known}; expected one of them"
            )
        if features is None:
            return list(rows[self.column])
        raw = _undecoded(datasets_library(f"prompts.dataset {self.source}"), features[self.column])
        rows = rows.select_columns([self.column])
        return list((rows if raw is None else rows.cast_column(self.column, raw))[self.column])

    def _files(self, row: int, cell: Any) -> Any:  # noqa: ANN401 a value of a table
        """Return the bytes or the path of the image in a cell, or a list of them."""
        if not isinstance(cell, list | tuple):
            return self._file(row, cell)
        if not cell:
            raise self._refuse(row, "an image", "an empty list")
        return [self._file(row, each) for each in cell]

    def _file(self, row: int, value: Any) -> bytes | Path:  # noqa: ANN401 a value of a table
        if isinstance(value, dict) and {"bytes", "path"} & value.keys():
            given = value.get("bytes")
            value = value.get("path") if given is None else given
        if isinstance(value, bytes):
            return value
        if value is None or value == "":
            raise self._refuse(row, "an image", "an empty cell")
        if not isinstance(value, str):
            raise self._refuse(row, "an image", f"{type(value).__name__} ({str(value)[:40]})")
        if value.startswith(("http://", "https://")):
            raise self._refuse(row, "an image", f"an address ({value}); download it, and give its file")
        path = Path(value).expanduser()
        if self.folder is None and not path.is_absolute():
            raise self._refuse(row, "an image", f"text ({value[:40]}); tables of file names are files on this disk")
        path = path if self.folder is None else self.folder / path
        if not path.is_file():
            raise self._refuse(row, "an image", f"{value}, of which there is no file ({path})")
        return path

    def _decode(self, row: int, file: bytes | Path) -> tuple[Image.Image, list[str]]:
        name = file.name if isinstance(file, Path) else "bytes"
        try:
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as opened:
                image, notes = to_pixels(opened, 1 if self.is_mask else 3, _BACKGROUND)
        except (UnsupportedPixelsError, *DECODING_ERRORS) as error:
            raise self._refuse(row, "an image", f"{name} that can't be read ({first_line(error)})") from error
        if self.size is not None:
            # A mask has two values, of which a mean is neither.
            method = Image.Resampling.NEAREST if self.is_mask else Image.Resampling.BICUBIC
            image = ImageOps.fit(image, self.size[::-1], method)
        return image, notes

    def _of_one_size(self, images: Sequence[Image.Image]) -> Sequence[Image.Image]:
        sizes = Counter((image.height, image.width) for image in images)
        if len(sizes) > 1:
            shown = [f"{height} x {width} ({count})" for (height, width), count in sizes.most_common(_NAMED)]
            more = [f"{len(sizes) - _NAMED} others"] if len(sizes) > _NAMED else []
            (height, width), _ = sizes.most_common(1)[0]
            raise UserError(
                f"prompts.images.{self.keyword} {self.column}: expected images of one size in {self.source}, got "
                f"{', '.join(shown + more)} (height x width); try --set 'prompts.image_size=[{height}, {width}]'"
            )
        return images

    def _log_changes(self, notes: Sequence[Sequence[str]]) -> None:
        counts = Counter(note.removesuffix(" (data.background)") for each in notes for note in each)
        for note, count in counts.items():
            logger.warning(f"prompts.images.{self.keyword}: {count} of {len(notes)} images {note}")

    def _refuse(self, row: int, expected: str, got: str) -> UserError:
        return UserError(
            f"prompts.images.{self.keyword}: expected {expected} in column {self.column}, row {row} of {self.source}, "
            f"got {got}"
        )


def describe_images(images: Mapping[str, tuple[Any, ...]]) -> str:
    """Return the sizes of the images of a pipeline's call as text, height x width, by keyword."""
    described = []
    for keyword, given in images.items():
        lists = [image if isinstance(image, list | tuple) else [image] for image in given]
        sizes = {(image.height, image.width) for each in lists for image in each}
        counts = {len(each) for each in lists}
        count = "" if counts == {1} else f"{' or '.join(map(str, sorted(counts)))} of "
        (height, width), *others = sorted(sizes)
        more = f" and {len(others)} other sizes" if others else ""
        described.append(f"{keyword}: {count}{height} x {width}{more}")
    return "; ".join(described)


def _undecoded(datasets: Any, kind: Any) -> Any:  # noqa: ANN401 a module and one of its features
    """Return the feature that gives images as bytes or paths, for one of images or lists of them; None: another."""
    plain = datasets.Image(decode=False)
    if isinstance(kind, datasets.Image):
        return plain
    if isinstance(kind, list):
        return [plain] if isinstance(kind[0], datasets.Image) else None
    return type(kind)(plain) if isinstance(getattr(kind, "feature", None), datasets.Image) else None
