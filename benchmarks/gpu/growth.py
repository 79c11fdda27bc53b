"""Stage ``growth``: time and memory of a step against its sizes, as in ``benchmarks/growth.py``."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.rows import Row, take
from benchmarks.growth import SIZES, grow, options
from benchmarks.growth_report import plot

if TYPE_CHECKING:
    from benchmarks.gpu.budget import Deadline
    from benchmarks.gpu.stage import Job

AXES = {"batch": "batch (UNet)", "tokens": "tokens (DiT)", "parameters": "parameters (UNet)"}
# Sizes that keep a GPU busy: smaller ones wait for kernel launches.
BATCHES = (8, 16, 32, 64, 128)
TOKENS = (64, 256, 576, 1024, 2304)


def axis_row(axis: str, given: argparse.Namespace, folder: Path, _: Deadline) -> dict[str, Any]:
    """Measure the curves of one axis."""
    return grow(axis, given.sizes, given, folder)


def options_row(given: argparse.Namespace, folder: Path, _: Deadline) -> dict[str, Any]:
    """Measure checkpointing and accumulation."""
    return {"options": options(given.sizes, given, folder)}


def run(job: Job) -> None:
    """Measure a row per axis and the options, and plot them."""
    tiny, device = job.options.tiny, job.options.device
    if device == "cpu":
        torch.set_num_threads(1)
    sizes = SIZES["tiny"] if tiny else replace(SIZES["large"], batches=BATCHES, tokens=TOKENS)
    precision = "fp32" if device == "cpu" else "bf16"
    given = argparse.Namespace(device=device, precision=precision, repeats=2 if tiny else 5, sizes=sizes)
    with tempfile.TemporaryDirectory() as folder:
        place, guess = Path(folder), 5 if tiny else 60
        rows = [Row(axis, partial(axis_row, axis, given, place), "axis", guess, {}) for axis in AXES]
        rows.append(Row("options", partial(options_row, given, place), "options", guess, {}))
        ((_, deadline),) = list(job.parts())
        take(rows, deadline, job.record)
    curves = [curve for row in job.record.found["rows"].values() for curve in row.get("curves", ())]
    if {curve["axis"] for curve in curves} == set(AXES):
        plot({"curves": curves, "about": {"axes": AXES}}, job.options.output / "gpu-growth.png")
