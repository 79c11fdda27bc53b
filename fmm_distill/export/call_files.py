"""The images in the keywords of a pipeline's call, as files that another process reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["FILE", "images_to_files"]

# The key of an image file, in the place of an image.
FILE = "image file"


def images_to_files(call: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return keywords as JSON has them, with ``{"image file": path}`` for each PIL image, which is written there."""
    return {name: _plain(value, folder / name) for name, value in call.items()}


def _plain(value: Any, path: Path) -> Any:  # noqa: ANN401 any keyword
    if isinstance(value, list | tuple):
        return [_plain(item, path.with_name(f"{path.name}-{i}")) for i, item in enumerate(value)]
    if not callable(getattr(value, "save", None)):
        return value
    # PNG holds all modes of images without a loss.
    file = path.with_name(f"{path.name}.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    value.save(file)
    return {FILE: str(file)}
