"""Stand-ins in a process that opens a pipeline: for the guard of Cosmos, a package of its own, and for large sizes."""

from __future__ import annotations

import importlib
import json
import pkgutil
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, ModelMixin

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["install"]

_GUARDED = "diffusers.pipelines.cosmos"
_GUARD = "CosmosSafetyChecker"


class OpenGuard(ModelMixin, ConfigMixin):
    """A guard that lets every prompt and every video pass."""

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


def install(folder: Path) -> None:
    """Replace in this process what the suite replaces in its tests of the pipeline in ``folder``."""
    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    if "JoyImage" in name:
        # It resizes all images to about 1024 x 1024 pixels.
        joyimage = importlib.import_module("diffusers.pipelines.joyimage.image_processor")
        joyimage.find_best_bucket = lambda *sizes: (32, 32)  # type: ignore[attr-defined]
    if "Cosmos" not in name:
        return
    package = importlib.import_module(_GUARDED)
    for entry in pkgutil.iter_modules(package.__path__, f"{_GUARDED}."):
        module = importlib.import_module(entry.name)
        if hasattr(module, _GUARD):
            setattr(module, _GUARD, OpenGuard)
