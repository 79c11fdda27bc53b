"""Small sizes in the place of those of about 1024 x 1024 pixels, to which some pipelines resize every image.

The suite replaces some of them, or computes at the large size. A copy of this file named ``sitecustomize`` on the path
replaces them in each process that Python starts, such as the one that opens exports: it imports nothing of the package.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["FUNCTIONS", "shrink"]

_SIDE = 32
_COPY = "sitecustomize"
# By module: the name of its function of sizes, and what that returns.
FUNCTIONS = {
    "diffusers.pipelines.joyimage.image_processor": ("find_best_bucket", (_SIDE, _SIDE)),
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit": ("calculate_dimensions", (_SIDE, _SIDE, None)),
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus": ("calculate_dimensions", (_SIDE, _SIDE)),
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of the table, and replaces their functions when they are imported."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname not in FUNCTIONS:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec: ModuleSpec | None = next((one for one in found if one is not None), None)
        if spec is not None and spec.loader is not None:
            _replace_after(spec.loader, fullname)
        return spec


def _replace_after(loader: Any, name: str) -> None:
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        function, sizes = FUNCTIONS[name]
        setattr(module, function, lambda *_: sizes)

    loader.exec_module = exec_module


def shrink(folder: Path) -> None:
    """Replace the sizes in this process and in those that it starts.

    Args:
        folder: for the copy of this file.
    """
    shutil.copy(__file__, folder / f"{_COPY}.py")
    paths = [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    for name, (function, sizes) in FUNCTIONS.items():
        setattr(importlib.import_module(name), function, lambda *_, sizes=sizes: sizes)


if __name__ == _COPY:
    sys.meta_path.insert(0, _Finder())
