"""A stand-in for the guard of Cosmos, which is a package of its own."""

from __future__ import annotations

import importlib
import json
import pkgutil
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, ModelMixin

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["install_guard"]

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


def install_guard(folder: Path) -> None:
    """Replace the guard in this process if the pipeline in ``folder`` has one."""
    if "Cosmos" not in json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]:
        return
    package = importlib.import_module(_GUARDED)
    for entry in pkgutil.iter_modules(package.__path__, f"{_GUARDED}."):
        module = importlib.import_module(entry.name)
        if hasattr(module, _GUARD):
            setattr(module, _GUARD, OpenGuard)
