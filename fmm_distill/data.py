"""Images to compare with, and (as an option) to start jumps from. Distilling itself needs none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file

from fmm_distill.errors import UserError
from fmm_distill.teachers.load import BUILTIN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float, UInt8
    from torch import Tensor

    from fmm_distill.recipe import PromptSettings
    from fmm_distill.teachers.codec import Codec

__all__ = ["Encoded", "Images", "Samples", "load_images", "load_prompts"]


class Samples(Protocol):
    """Data that jumps may start from."""

    def pick(self, places: Float[Tensor, " batch"]) -> Float[Tensor, "batch *event"]:
        """The samples at these places, uniform in [0, 1)."""
        ...


class Images:
    """A set of images of one shape, as floats in [-1, 1].

    Args:
        pixels: uint8, shape ``[count, channels, height, width]``.
        levels: the number that stands for white.
        source: where they come from, for messages and protocols.
    """

    def __init__(self, pixels: UInt8[Tensor, "count channels height width"], source: str, levels: int = 255) -> None:
        self.pixels, self.levels, self.source = pixels, levels, source

    def __len__(self) -> int:
        return len(self.pixels)

    def pick(self, places: Float[Tensor, " batch"]) -> Float[Tensor, "batch channels height width"]:
        """The images at shares of the way through the set, each in [0, 1)."""
        index = (places.cpu() * len(self)).long().clamp_max(len(self) - 1)
        return self.pixels[index].float() / self.levels * 2 - 1

    def batches(self, size: int) -> Iterator[Float[Tensor, "batch channels height width"]]:
        """All images in order, in [0, 1]."""
        for part in self.pixels.split(size):
            yield part.float() / self.levels


class Encoded:
    """Images as a teacher's latents, encoded once and kept in memory.

    Args:
        images: pictures of the size that the codec decodes to.
    """

    def __init__(self, images: Images, codec: Codec, batch: int = 64) -> None:
        parts = [codec.encode(part * 2 - 1) for part in images.batches(batch)]
        self.latents = torch.cat(parts)

    def pick(self, places: Float[Tensor, " batch"]) -> Float[Tensor, "batch *event"]:
        """The latents at shares of the way through the set, each in [0, 1)."""
        return self.latents[(places.cpu() * len(self.latents)).long().clamp_max(len(self.latents) - 1)]


def load_images(source: str, event_shape: tuple[int, ...]) -> Images:
    """Every image of a dataset, checked against the teacher's shape (channels, height, width).

    Args:
        source: ``builtin:digits``, a parquet file, a folder of parquet files or images, or a Hub dataset.

    Raises:
        UserError: if it can't be found, has no images, or images of another size. Nothing is resized in silence.
    """
    if source == "builtin:digits":
        images = Images(load_file(BUILTIN / "digits" / "images.safetensors")["images"], source, levels=16)
        _check_shape(images.pixels.shape[1:], event_shape, source)
        return images
    if source.startswith("builtin:"):
        raise UserError(f"--data {source}: no such built-in images; known: builtin:digits")
    rows, column = _open(source)
    mode = {1: "L", 3: "RGB"}.get(event_shape[0])
    if mode is None:
        raise UserError(f"--data {source}: the teacher has {event_shape[0]} channels; images have 1 or 3: use none")
    pixels = torch.empty(len(rows), *event_shape, dtype=torch.uint8)
    for i, image in enumerate(rows[column]):
        array = np.array(image.convert(mode)).reshape(image.height, image.width, event_shape[0])
        _check_shape((event_shape[0], image.height, image.width), event_shape, f"{source}, image {i}")
        pixels[i] = torch.from_numpy(array).movedim(-1, 0)
    return Images(pixels, source)


def _check_shape(got: tuple[int, ...], wanted: tuple[int, ...], where: str) -> None:
    if tuple(got) != tuple(wanted):
        raise UserError(
            f"--data {where}: {' x '.join(map(str, got))} (channels x height x width); the teacher makes "
            f"{' x '.join(map(str, wanted))}: bring images of that size, or use --data none"
        )


def _open(source: str) -> tuple[Any, str]:
    """A dataset and the name of its image column; the test split is left alone."""
    datasets = _datasets(f"--data {source}")
    path = Path(source).expanduser()
    try:
        if path.is_file() or (path.is_dir() and list(path.rglob("*.parquet"))):
            files = [path] if path.is_file() else _training_files(path)
            rows = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
        elif path.is_dir():
            rows = datasets.load_dataset("imagefolder", data_dir=str(path), split="train")
        else:
            rows = datasets.load_dataset(source, split="train")
    except Exception as error:
        raise UserError(
            f"--data {source}: no images could be read ({_line(error)}); wanted none, a Hub dataset, a parquet file or "
            "folder, or a folder of images"
        ) from error
    columns = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if not columns:
        raise UserError(f"--data {source}: no image column among {', '.join(rows.features)}; wanted one")
    return rows, columns[0]


def load_prompts(settings: PromptSettings) -> tuple[str, ...]:
    """Prompts, in the order of their source; none where the recipe names no source.

    Raises:
        UserError: if the source can't be read or holds no prompt.
    """
    if settings.file is not None:
        path = Path(settings.file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompts.file {path}: can't be read ({error}); wanted text, one prompt a line") from error
        found = tuple(line.strip() for line in lines if line.strip())
        if not found:
            raise UserError(f"prompts.file {path}: no line in it; wanted one prompt a line")
        return found
    return () if settings.dataset is None else _column(settings.dataset, settings.column)


def _column(source: str, column: str) -> tuple[str, ...]:
    datasets = _datasets(f"prompts.dataset {source}")
    kind = {".parquet": "parquet", ".csv": "csv"}.get(Path(source).suffix)
    try:
        if kind is None:
            rows = datasets.load_dataset(source, split="train")
        else:
            rows = datasets.load_dataset(kind, data_files=[source], split="train")
    except Exception as error:
        raise UserError(f"prompts.dataset {source}: can't be read ({_line(error)}); wanted a dataset") from error
    if column not in rows.features:
        raise UserError(f"prompts.column {column}: {source} has {', '.join(rows.features)}; wanted one of them")
    found = tuple(str(text) for text in rows[column] if text not in (None, ""))
    if not found:
        raise UserError(f"prompts.dataset {source}: no prompt in its column {column}; wanted text")
    return found


def _datasets(what: str) -> Any:  # noqa: ANN401 a module
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{what}: reading it needs `pip install fmm-distill[data]`") from error
    datasets.disable_progress_bars()
    return datasets


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _training_files(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*.parquet"))
    return [file for file in files if "train" in file.name] or files
