"""Generate the samples of an evaluation batch by batch, on all processes, and store their features."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fmm_distill.core.staged import stages_of
from fmm_distill.data.row_store import Layout
from fmm_distill.evaluation.draws import NOISE_SEED, draw_samples_of
from fmm_distill.evaluation.features import unit_images
from fmm_distill.io.hashes import sha256_of_tensors
from fmm_distill.io.lock import locked
from fmm_distill.training.memory import peak_memory_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from accelerate import Accelerator
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.evaluation.draws import SampleDraws
    from fmm_distill.evaluation.features import FeatureNetwork
    from fmm_distill.evaluation.samplers import Sampler
    from fmm_distill.teachers.base import Teacher

__all__ = ["Cost", "GeneratedSamples", "GenerationSpec", "SampleGenerator"]

logger = logging.getLogger(__name__)

# Samples of a file of the cache: an interruption loses at most these, and processes divide the work by files.
_PART = 512
_SEAL = "sha256"
# Samples of the warm-up, whose memory is measured.
WARM_UP = 16


@dataclass(frozen=True)
class Cost:
    """Cost of a sampler.

    Attributes:
        calls: network calls per batch.
        memory: peak bytes of tensors for a batch of ``WARM_UP`` samples, in addition to the weights.
    """

    calls: int
    memory: int


@dataclass(frozen=True)
class GeneratedSamples:
    """Results of a sampler in the order of the samples, on the CPU.

    Attributes:
        samples: the first ones, as many as ``GenerationSpec.stored``.
        features, scores: outputs of the feature network; None without one.
        clip: CLIP scores; None: not measured.
        seconds: per sample.
    """

    samples: Float[Tensor, "batch *event"]
    features: Float[Tensor, "batch d"] | None
    scores: Float[Tensor, "batch classes"] | None
    clip: Float[Tensor, " batch"] | None
    seconds: Float[Tensor, " batch"]
    cost: Cost

    def limit(self, count: int) -> GeneratedSamples:
        """Return the same with the features, scores and CLIP scores of the first ``count`` samples."""

        def cut(rows: Tensor | None) -> Tensor | None:
            return None if rows is None else rows[:count]

        return replace(self, features=cut(self.features), scores=cut(self.scores), clip=cut(self.clip))


@dataclass(frozen=True)
class GenerationSpec:
    """The samples to generate, and the networks that look at them.

    Attributes:
        count: the number of samples.
        stored: the number of samples that are returned themselves; of the others, features and scores alone.
        features: None: images are not looked at.
        clip: scores images in [0, 1], given the numbers of their samples; None: not measured.
        decodes: seconds include decoding; always true with features or CLIP scores.
        accelerator: of several processes, which divide the work; None: this process does it all.
    """

    teacher: Teacher
    device: torch.device
    count: int
    stored: int
    batch_size: int
    seed: int = NOISE_SEED
    features: FeatureNetwork | None = None
    clip: Callable[[Tensor, range], Tensor] | None = None
    decodes: bool = False
    accelerator: Accelerator | None = None


class SampleGenerator:
    """Generates samples that don't depend on the batch size or on the number of processes.

    Args:
        progress: called with the number of samples times steps as they are done.
    """

    def __init__(self, spec: GenerationSpec, progress: Callable[[int], object] | None = None) -> None:
        self.spec, self.progress = spec, progress
        self.teacher, self.device, self.features = spec.teacher, spec.device, spec.features
        self.decodes = spec.decodes or spec.features is not None or spec.clip is not None

    def run(self, sampler: Sampler, cache: Path | None = None) -> GeneratedSamples:
        """Generate all samples of a sampler.

        Args:
            cache: a folder for finished parts, from which an interrupted call resumes; several processes need it.
                None: in memory.
        """
        cost, size = self._warm_up(sampler), self.spec.batch_size

        def make(_: int, start: int, stop: int) -> dict[str, Tensor]:
            parts = [self._batch(sampler, range(i, min(i + size, stop))) for i in range(start, stop, size)]
            return {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0]}

        count = self.spec.count
        rows = make(0, 0, count) if cache is None else self._cached(make, sampler.steps, cache)
        return GeneratedSamples(
            rows["samples"][: self.spec.stored],
            rows.get("features"),
            rows.get("scores"),
            rows.get("clip"),
            rows["seconds"],
            cost,
        )

    def draws(self, numbers: range) -> SampleDraws:
        """Return the noises and conditions of these samples."""
        return draw_samples_of(self.teacher, numbers, self.spec.seed, self.device)

    @torch.no_grad()
    def _warm_up(self, sampler: Sampler) -> Cost:
        """Run the sampler once on few samples: kernels are selected, memory is reserved, and the cost is counted."""
        calls: list[int] = []

        def counted(draws: SampleDraws) -> Tensor:
            # Without the decoding: a pipeline decodes at the end of a call, whose network runs as well.
            hooks = [
                network.register_forward_hook(lambda *_: calls.append(1)) for network in stages_of(sampler.network)
            ]
            try:
                return sampler.run(draws)
            finally:
                for hook in hooks:
                    hook.remove()

        draws = self.draws(range(WARM_UP))
        memory = peak_memory_of(lambda: self._sample(replace(sampler, run=counted), draws), self.device)
        return Cost(len(calls), memory)

    def _sample(self, sampler: Sampler, draws: SampleDraws) -> tuple[Tensor, Tensor | None]:
        """Return samples, and their images where they are decoded; both on the sampler's device."""
        x = sampler.run(draws)
        if sampler.makes_images:
            return x, x
        return x, self.teacher.codec.decode(x) if self.decodes else None

    @torch.no_grad()
    def _batch(self, sampler: Sampler, numbers: range) -> dict[str, Tensor]:
        draws = self.draws(numbers)
        started = time.perf_counter()
        x, decoded = self._sample(sampler, draws)
        if self.device.type == "cuda":
            # Kernels run asynchronously: without it only their launches would be timed.
            torch.cuda.synchronize(self.device)
        seconds = (time.perf_counter() - started) / len(numbers)
        # Per sample: parts of different batch sizes then have one median.
        rows = {"seconds": torch.full((len(numbers),), seconds, dtype=torch.float64)}
        # Complete batches; ``run`` cuts the last one to the number of stored samples.
        if numbers.start < self.spec.stored:
            # Off the GPU at once, where all samples of an evaluation may not fit.
            rows["samples"] = x.cpu()
        if decoded is not None:
            images = unit_images(decoded)
            if self.features is not None:
                output = self.features(images.to(self.device))
                rows["features"] = output.features.float().cpu()
                if output.scores is not None:
                    rows["scores"] = output.scores.float().cpu()
            if self.spec.clip is not None:
                rows["clip"] = self.spec.clip(images, numbers).cpu()
            # Conversion to uint8 turns NaN into a valid pixel, so that the networks don't see it.
            broken = images.flatten(1).isnan().any(1).cpu()
            for name in {"features", "scores", "clip"} & rows.keys():
                rows[name][broken] = torch.nan
        if self.progress is not None:
            self.progress(len(numbers) * sampler.steps)
        return rows

    def _cached(
        self, make: Callable[[int, int, int], dict[str, Tensor]], steps: int, folder: Path
    ) -> dict[str, Tensor]:
        """Return all rows by way of the disk: parts of earlier calls are reused, and processes divide the others."""
        width = 0 if self.features is None else self.features.width + self.features.classes
        # Bytes per sample: float32 numbers, and 16 for the seconds and a CLIP score.
        row = 16 + 4 * (width + torch.Size(self.teacher.event_shape).numel())
        layout = Layout(folder, self.spec.count, row, _PART)
        # Another evaluation of the same samples waits, and then reuses the files.
        with locked(folder, "an evaluation", wait=True):
            self._fill(layout, make, steps)
            parts = [load_file(file) for file in layout.files]
            # The first process holds the lock until all processes have read.
            self._wait()
        return {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0] if name != _SEAL}

    def _fill(
        self,
        layout: Layout,
        make: Callable[[int, int, int], dict[str, Tensor]],
        steps: int,
    ) -> None:
        """Generate the missing and the damaged parts, divided among the processes."""
        process, processes, accelerator = 0, 1, self.spec.accelerator
        if accelerator is not None:
            process, processes = accelerator.process_index, accelerator.num_processes
        if process == 0:
            for file in layout.files:
                if file.is_file() and not _is_intact(file):
                    logger.warning(f"{file} is damaged; its samples are generated again")
                    file.unlink()
        self._wait()
        mine = enumerate(layout.files[process::processes])
        there = sum(
            min(layout.size, self.spec.count - (process + i * processes) * layout.size) for i, f in mine if f.is_file()
        )
        if self.progress is not None:
            self.progress(there * steps)
        layout.fill(lambda *numbers: _sealed(make(*numbers)), process, processes)
        self._wait()

    def _wait(self) -> None:
        if self.spec.accelerator is not None:
            self.spec.accelerator.wait_for_everyone()


def _digest(tensors: dict[str, Tensor]) -> Tensor:
    # A tensor of 32 bytes, because the file holds tensors alone.
    return torch.frombuffer(bytearray.fromhex(sha256_of_tensors(tensors)), dtype=torch.uint8)


def _sealed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {_SEAL: _digest(tensors)}


def _is_intact(file: Path) -> bool:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError):
        return False
    seal = tensors.pop(_SEAL, None)
    return seal is not None and torch.equal(seal, _digest(tensors))
