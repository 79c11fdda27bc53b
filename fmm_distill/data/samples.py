"""Data that jumps can start from, and images to compare with. Distillation itself needs none."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from safetensors.torch import load_file

from fmm_distill.core.device import to_device
from fmm_distill.core.time_axis import expand
from fmm_distill.data.tables import Unreadable, check_shape, open_table
from fmm_distill.errors import UserError
from fmm_distill.teachers.conditions import Classes
from fmm_distill.teachers.load import BUILTIN

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jaxtyping import Float, Int, UInt8
    from torch import Tensor

    from fmm_distill.config.settings import DataSettings
    from fmm_distill.core.draws import Draws
    from fmm_distill.data.tables import Table
    from fmm_distill.teachers.conditions import Conditions

__all__ = [
    "Batch",
    "ImageBatch",
    "Images",
    "LazyPixels",
    "Samples",
    "captions_of",
    "load_images",
    "positions_of",
]

logger = logging.getLogger(__name__)

# Images that take more bytes stay where they are and are decoded again each time.
IN_MEMORY = 2 * 2**30
# Images of one call of the decoders, which work in parallel.
_BATCH = 256


class Batch(Protocol):
    """The data of the samples of a batch.

    Attributes:
        images: x_0 of the samples, shape ``[batch, *event]``; None for points on trajectories.
    """

    @property
    def images(self) -> Float[Tensor, "batch *event"] | None:
        """See the class."""
        ...

    def with_conditions(self, draws: Draws) -> Draws:
        """Return the draws with the conditions of the data in place of random ones."""
        ...

    def points(self, draws: Draws, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch *event"]:
        """Return x_t of the samples, for t below t_max."""
        ...

    def rows(self, index: Int[Tensor, " some"]) -> Batch:
        """Return the samples at these rows."""
        ...

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``."""
        ...


class Samples(Protocol):
    """Data that jumps can start from."""

    def pick(self, draws: Draws) -> Batch:
        """Return the data at the positions ``draws.image``, uniform in [0, 1)."""
        ...


@dataclass(frozen=True)
class ImageBatch:
    """Images (or their latents) of the samples of a batch; jumps start from them, noised.

    Attributes:
        images: x_0, shape ``[batch, *event]``.
        conditions: positions of their conditions in [0, 1), shape ``[batch]``, on the CPU; None: no conditions.
    """

    images: Float[Tensor, "batch *event"]
    conditions: Float[Tensor, " batch"] | None = None

    def with_conditions(self, draws: Draws) -> Draws:
        """Return the draws with the images' own conditions."""
        return draws if self.conditions is None else replace(draws, condition=self.conditions)

    def points(self, draws: Draws, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch *event"]:
        """Return ``(1 - t) x_0 + t eps``."""
        t = to_device(t, self.images.device)
        return expand(1 - t, self.images) * self.images + expand(t, self.images) * draws.noise

    def rows(self, index: Int[Tensor, " some"]) -> Self:
        """Return the samples at these rows; the index is on the CPU."""
        conditions = None if self.conditions is None else self.conditions[index]
        return type(self)(self.images[to_device(index, self.images.device)], conditions)

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on ``device``."""
        return type(self)(to_device(self.images, device), self.conditions)


class LazyPixels:
    """Images of a table that are decoded at each access.

    One that can't be read is replaced by the next that can, so that a position is the same image in every process.

    Args:
        shape: channels, height and width of each.
    """

    def __init__(self, table: Table, shape: tuple[int, ...]) -> None:
        self.table, self.shape = table, shape
        self.unreadable: dict[int, Unreadable] = {}
        self._logged: set[str] = set()

    def __len__(self) -> int:
        return len(self.table)

    def take(self, index: Int[Tensor, " batch"]) -> tuple[UInt8[Tensor, "batch channels height width"], Tensor]:
        """Return the images at these rows, and the rows that they were read from.

        Raises:
            UserError: if more than ``data.max_corrupt`` of all images are unreadable.
        """
        # A copy, in which rows of unreadable images are replaced.
        real = index.clone()
        found: list[Tensor | None] = [None] * len(index)
        missing = list(range(len(index)))
        while missing:
            rows = [int(real[k]) for k in missing]
            pictures = self.table.pictures(rows, self.shape)
            for k, row, picture in zip(missing, rows, pictures, strict=True):
                if isinstance(picture, Unreadable):
                    self._note(row, picture)
                    real[k] = (row + 1) % len(self)
                else:
                    found[k] = picture
            missing = [k for k in missing if found[k] is None]
        for note, (_, first) in self.table.changed.items():
            if note not in self._logged:
                self._logged.add(note)
                logger.warning(f"data: {first} and perhaps others {note}")
        return torch.stack([picture for picture in found if picture is not None]), real

    def _note(self, row: int, picture: Unreadable) -> None:
        if not self.unreadable:
            logger.warning(
                f"data: {picture.name} can't be read ({picture.reason}); the next image replaces it and any other"
            )
        self.unreadable[row] = picture
        _check_readable(self.unreadable, self.table)


class Images:
    """A set of images of one shape, as floats in [-1, 1].

    Args:
        pixels: uint8, shape ``[count, channels, height, width]``; or images that are decoded at each access.
        levels: the value of white.
        source: the dataset, for messages and protocols.
        conditions: positions of their conditions in [0, 1), shape ``[count]``; None: no conditions.
        flip: mirror each picked image (left and right) with chance 1/2.
        split: the split of the source, if it has splits.
        resized: whether images of other sizes were resized, with antialiasing, and cropped.
    """

    def __init__(
        self,
        pixels: UInt8[Tensor, "count channels height width"] | LazyPixels,
        source: str,
        levels: int = 255,
        conditions: Float[Tensor, " count"] | None = None,
        *,
        flip: bool = False,
        split: str | None = None,
        resized: bool = False,
    ) -> None:
        self.pixels, self.levels, self.source = pixels, levels, source
        self.conditions, self.flip, self.split, self.resized = conditions, flip, split, resized

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of one image."""
        return self.pixels.shape if isinstance(self.pixels, LazyPixels) else tuple(self.pixels.shape[1:])

    @property
    def fingerprint(self) -> str:
        """Return a text that identifies these images: a digest of the pixels, or of what decoded ones depend on."""
        if isinstance(self.pixels, LazyPixels):
            return f"{self.pixels.table.fingerprint} {self.shape}"
        # The buffer of the array itself: ``tobytes`` would copy it.
        digest = hashlib.sha256(self.pixels.contiguous().numpy().data)
        return f"{digest.hexdigest()} {tuple(self.pixels.shape)} {self.levels}"

    def take(self, index: Int[Tensor, " batch"]) -> tuple[Float[Tensor, "batch channels height width"], Tensor]:
        """Return the images at these rows, in [-1, 1], and the rows that they were read from (see ``LazyPixels``)."""
        gray, index = self._unit(index)
        return gray * 2 - 1, index

    def _unit(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same as ``take``, in [0, 1]."""
        if isinstance(self.pixels, LazyPixels):
            pixels, index = self.pixels.take(index)
        else:
            pixels = self.pixels[index]
        return pixels.float() / self.levels, index

    def pick(self, draws: Draws) -> ImageBatch:
        """Return the images at the positions ``draws.image``, mirrored where ``draws.flip`` is below 1/2."""
        images, index = self.take(row_of(draws.image, len(self)))
        if self.flip:
            images = torch.where(expand(mirrored(draws).cpu(), images).bool(), images.flip(-1), images)
        return ImageBatch(images, None if self.conditions is None else self.conditions[index])

    def batches(self, size: int) -> Iterator[Float[Tensor, "batch channels height width"]]:
        """Yield all readable images once, in order, in [0, 1]."""
        for index in torch.arange(len(self)).split(size):
            images, rows = self._unit(index)
            # An image that replaces an unreadable one would be counted twice.
            yield images[rows == index]


def row_of(positions: Float[Tensor, " batch"], count: int) -> Int[Tensor, " batch"]:
    """Return the rows at positions in a set of ``count``, each in [0, 1)."""
    return (positions.cpu() * count).long().clamp_max(count - 1)


def mirrored(draws: Draws) -> Tensor:
    """Return the samples whose images are mirrored."""
    return draws.flip < 0.5


def load_images(
    settings: DataSettings,
    event_shape: tuple[int, ...],
    conditions: Conditions | None = None,
    *,
    table: Table | None = None,
    in_memory: int = IN_MEMORY,
) -> Images:
    """Load every image of a dataset, checked against the teacher's shape (channels, height, width).

    Args:
        conditions: the teacher's conditions, if the column ``data.condition`` is read.
        table: the dataset, if it is open already.
        in_memory: largest size in bytes of the decoded images; larger sets are decoded at each access.

    Raises:
        UserError: if it can't be found, has no images, images of another size or too many unreadable ones, or if a
            condition is not one of the teacher's.
    """
    if settings.source.startswith("builtin:"):
        return _builtin(settings, event_shape, conditions)
    if len(event_shape) != 3 or event_shape[0] not in (1, 3):
        shown = " x ".join(map(str, event_shape))
        raise UserError(
            f"--data {settings.source}: the teacher makes {shown}; expected none, because images have 1 or 3 channels"
        )
    table = open_table(settings) if table is None else table
    for note in table.notes:
        logger.warning(note)
    positions = None
    if settings.condition is not None and conditions is not None:
        where = f"data.condition {settings.condition}"
        positions = positions_of(table.values(settings.condition), conditions, where)
    if len(table) * event_shape[0] * event_shape[1] * event_shape[2] > in_memory:
        pixels = LazyPixels(table, event_shape)
        return _images(pixels, settings, positions)
    decoded, rows = _decode(table, event_shape)
    return _images(decoded, settings, None if positions is None else positions[rows])


def _images(pixels: Tensor | LazyPixels, settings: DataSettings, positions: Tensor | None) -> Images:
    crop = settings.fit == "crop"
    return Images(pixels, settings.source, conditions=positions, flip=settings.flip, split=settings.split, resized=crop)


def _builtin(settings: DataSettings, event_shape: tuple[int, ...], conditions: Conditions | None) -> Images:
    if settings.source != "builtin:digits":
        raise UserError(f"--data {settings.source}: no such built-in images; known: builtin:digits")
    file = load_file(BUILTIN / "digits" / "images.safetensors")
    check_shape(tuple(file["images"].shape[1:]), event_shape, settings.source)
    positions = None
    if settings.condition is not None and conditions is not None:
        if settings.condition not in file or settings.condition == "images":
            raise UserError(f"data.condition {settings.condition}: builtin:digits has no such column; it has labels")
        positions = positions_of(file[settings.condition].tolist(), conditions, f"data.condition {settings.condition}")
    return Images(file["images"], settings.source, levels=16, conditions=positions, flip=settings.flip)


def _decode(table: Table, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return all readable images, and their rows."""
    # Filled in place: a list of images that is stacked at the end needs twice the memory.
    pixels = torch.empty(len(table), *shape, dtype=torch.uint8)
    readable: list[int] = []
    unreadable: dict[int, Unreadable] = {}
    for start in range(0, len(table), _BATCH):
        rows = range(start, min(start + _BATCH, len(table)))
        for row, picture in zip(rows, table.pictures(rows, shape), strict=True):
            if isinstance(picture, Unreadable):
                unreadable[row] = picture
                continue
            pixels[len(readable)] = picture
            readable.append(row)
    if unreadable:
        _check_readable(unreadable, table)
        first = next(iter(unreadable.values()))
        logger.warning(
            f"data: {len(unreadable)} of {len(table)} images can't be read and are skipped, the first of them "
            f"{first.name} ({first.reason})"
        )
    for note, (count, name) in table.changed.items():
        logger.warning(f"data: {count} of {len(table)} images {note}; the first of them is {name}")
    return pixels[: len(readable)], torch.tensor(readable)


def _check_readable(unreadable: dict[int, Unreadable], table: Table) -> None:
    limit = table.settings.max_corrupt
    if len(unreadable) > limit * len(table) or len(unreadable) == len(table):
        first = next(iter(unreadable.values()))
        raise UserError(
            f"--data {table.settings.source}: {len(unreadable)} of {len(table)} images can't be read, the first of "
            f"them {first.name} ({first.reason}); expected at most a fraction of {limit:g}: repair or remove them, or "
            "raise data.max_corrupt"
        )


def positions_of(values: Sequence[Any], conditions: Conditions, where: str) -> Float[Tensor, " count"]:
    """Return the positions in [0, 1) of the conditions in a column: class numbers, or captions among the prompts.

    Raises:
        UserError: on a value that is not a condition of the teacher.
    """
    count = len(conditions.names)
    if isinstance(conditions, Classes):
        for row, value in enumerate(values):
            # bool is a subclass of int, and True no class.
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
                raise UserError(f"{where}: row {row}: expected a class of the teacher, 0 to {count - 1}, got {value!r}")
        index = torch.tensor(values, dtype=torch.float64)
    else:
        known = {name: i for i, name in enumerate(conditions.names)}
        for row, value in enumerate(values):
            if value not in known:
                raise UserError(f"{where}: row {row}: expected one of the run's prompts, got {value!r}")
        index = torch.tensor([known[value] for value in values], dtype=torch.float64)
    # The middle of a condition's interval: rounding does not move it to a neighbor.
    return (index + 0.5) / count


def captions_of(table: Table, column: str) -> tuple[str, ...]:
    """Return the captions of a column, each once, in the order of the rows; none if the column holds no text.

    Raises:
        UserError: if some rows have text and others none.
    """
    values = table.values(column)
    if not any(isinstance(value, str) for value in values):
        return ()
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise UserError(
                f"data.condition {column}: row {row}: expected a caption, which may be empty, got {value!r}"
            )
    return tuple(dict.fromkeys(values))
