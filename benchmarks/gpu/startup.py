"""Stage ``startup``: from the command line to the first training step, as in ``benchmarks/startup.py``."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import startup
from benchmarks.gpu.rows import Row, take

if TYPE_CHECKING:
    from benchmarks.gpu.budget import Deadline
    from benchmarks.gpu.stage import Job


def commands(folder: Path, repeats: int, _: Deadline) -> dict[str, Any]:
    """Measure all commands and a run to its first step, cold and warm."""
    return {"values": startup.starts(repeats, folder)}


def parts(folder: Path, repeats: int, _: Deadline) -> dict[str, Any]:
    """Measure the parts of a warm start."""
    seconds, packages = startup.parts(repeats, folder)
    return {"values": seconds, "packages": packages}


def imports(folder: Path, _: Deadline) -> dict[str, Any]:
    """Measure the imports of each package, and return the largest."""
    found = startup.imports(folder)
    return {"values": dict(list(found.items())[:15])}


def run(job: Job) -> None:
    """Measure all rows in one folder with their bytecode."""
    repeats = 1 if job.options.tiny else 3
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = [
            Row("command", partial(commands, place, repeats), "commands", 90 if job.options.tiny else 150, {}),
            Row("part of a warm start", partial(parts, place, repeats), "parts", 15, {}),
            Row("imports", partial(imports, place), "imports", 15, {}),
        ]
        ((_, deadline),) = list(job.parts())
        take(rows, deadline, job.record)
