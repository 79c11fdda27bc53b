"""Stage ``sampling``: an exported pipeline against the calls of its network alone, eager and as a CUDA graph."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.rows import Row, take
from benchmarks.sampling import bare_calls, compare, exported

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import DiffusionPipeline

    from benchmarks.gpu.budget import Deadline
    from benchmarks.gpu.stage import Job

STEPS = (1, 4, 16)
BATCHES = (1, 64)
REPEATS = 20


def graphed(bare: Callable[[], object]) -> Callable[[], object]:
    """Return the same calls as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Kernels are selected and workspaces allocated before the capture.
        for _ in range(3):
            bare()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bare()
    return graph.replay


def row(pipeline: DiffusionPipeline, steps: int, batch: int, half: bool, repeats: int, _: Deadline) -> dict[str, Any]:
    """Measure one number of steps at one batch size."""
    # A cached cast from outside would not be part of the graph.
    with torch.autocast(pipeline.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
        bare = bare_calls(pipeline, steps, batch)
        others = {"graph": graphed(bare)} if pipeline.device.type == "cuda" else {}
        found = compare(pipeline, steps, batch, repeats, others)
    return found if others else found | {"says": "no CUDA graph without a GPU"}


def run(job: Job) -> None:
    """Measure all rows of one pipeline."""
    tiny, device = job.options.tiny, job.options.device
    if device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        pipeline = exported(Path(folder), "tiny" if tiny else "large").to(device)
        rows = []
        for half in (True, False):
            for batch in BATCHES[: 1 if tiny else None]:
                for steps in STEPS[: 2 if tiny else None]:
                    setting = f"UNet, {'bf16' if half else 'fp32'}, batch {batch}"
                    measure = partial(row, pipeline, steps, batch, half, 3 if tiny else REPEATS)
                    about = {"setting": setting, "batch": batch}
                    rows.append(Row(f"{setting}, {steps} steps", measure, f"{steps} {batch}", 1 if tiny else 10, about))
        ((_, deadline),) = list(job.parts())
        take(rows, deadline, job.record)
