"""Samplers at work: batch by batch, on all processes, each sample's features kept until all are made."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fmm_distill.data.row_store import Layout
from fmm_distill.evaluation.draws import draw_samples_of
from fmm_distill.evaluation.features import unit_images
from fmm_distill.io.lock import locked
from fmm_distill.training.memory import held_by

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from accelerate import Accelerator
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.evaluation.draws import SampleDraws
    from fmm_distill.evaluation.features import Features
    from fmm_distill.evaluation.samplers import Sampler
    from fmm_distill.teachers.base import Teacher

__all__ = ["Cost", "Generator", "Made"]

logger = logging.getLogger(__name__)

# Samples that a kill can cost, and that processes share the work by.
_PART = 512
_SEAL = "sha256"
# Samples of the warm-up, in which memory is watched.
WARM_UP = 16


@dataclass(frozen=True)
class Cost:
    """What a sampler costs.

    Attributes:
        calls: of the network, for a batch.
        memory: bytes that the tensors of a batch of ``WARM_UP`` samples take at most, beside the weights.
    """

    calls: int
    memory: int


@dataclass(frozen=True)
class Made:
    """What was made of all samples, in their order, on the CPU.

    Attributes:
        samples: the first ones themselves, as many as were asked for.
        features, scores: what the feature network sees in them; None: there is none.
        clip: how well each fits its prompt; None: not measured.
        seconds: of each.
    """

    samples: Float[Tensor, "batch *event"]
    features: Float[Tensor, "batch d"] | None
    scores: Float[Tensor, "batch classes"] | None
    clip: Float[Tensor, " batch"] | None
    seconds: Float[Tensor, " batch"]
    cost: Cost


class Generator:
    """Makes the samples of an evaluation, the same whatever the batches and the processes are.

    Args:
        count: of samples; the first ``first`` of them are kept themselves.
        features: None: images are not looked at.
        clip: scores of images in [0, 1] and the numbers of their samples; None: not measured.
        decodes: whether the seconds are to the decoded image.
        accelerator: of several processes, which share the work; None: this one does it all.
        progress: takes a number of network calls times samples as they are done.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        count: int,
        first: int,
        batch: int,
        seed: int,
        device: torch.device,
        features: Features | None,
        clip: Callable[[Tensor, range], Tensor] | None = None,
        decodes: bool = False,
        accelerator: Accelerator | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.teacher, self.count, self.first, self.batch, self.seed = teacher, count, first, batch, seed
        self.device, self.features, self.clip = device, features, clip
        self.decodes = decodes or features is not None or clip is not None
        self.accelerator, self.progress = accelerator, progress

    def run(self, sampler: Sampler, keep: Path | None = None) -> Made:
        """All samples of a sampler.

        Args:
            keep: its folder for what is made until all is there, which several processes need; None: in memory.
        """
        cost = self._warm_up(sampler)

        def make(_: int, start: int, stop: int) -> dict[str, Tensor]:
            parts = [
                self._batch(sampler, range(i, min(i + self.batch, stop)), cost) for i in range(start, stop, self.batch)
            ]
            return {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0]}

        rows = make(0, 0, self.count) if keep is None else self._kept(make, sampler.steps, keep)
        samples = rows["samples"][: self.first]
        return Made(samples, rows.get("features"), rows.get("scores"), rows.get("clip"), rows["seconds"], cost)

    def draws(self, numbers: range) -> SampleDraws:
        """What these samples start from."""
        return draw_samples_of(self.teacher, numbers, self.seed, self.device)

    @torch.no_grad()
    def _warm_up(self, sampler: Sampler) -> Cost:
        """Run it once on few samples: kernels are chosen, memory is reserved, and what it takes is counted."""
        calls: list[int] = []
        hook = sampler.network.register_forward_hook(lambda *_: calls.append(1))
        draws = self.draws(range(WARM_UP))
        try:
            memory = held_by(lambda: self._sampled(sampler, draws), self.device)
        finally:
            hook.remove()
        return Cost(len(calls), memory)

    def _sampled(self, sampler: Sampler, draws: SampleDraws) -> tuple[Tensor, Tensor | None]:
        """Samples, and their images if those are wanted; both on the device where they were made."""
        x = sampler.run(draws)
        if sampler.makes_images:
            return x, x
        return x, self.teacher.codec.decode(x) if self.decodes else None

    @torch.no_grad()
    def _batch(self, sampler: Sampler, numbers: range, cost: Cost) -> dict[str, Tensor]:
        draws = self.draws(numbers)
        started = time.perf_counter()
        x, decoded = self._sampled(sampler, draws)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = (time.perf_counter() - started) / len(numbers)
        made = {"seconds": torch.full((len(numbers),), seconds, dtype=torch.float64)}
        if numbers.start < self.first:
            made["samples"] = x.cpu()
        if decoded is not None:
            images = unit_images(decoded)
            if self.features is not None:
                seen = self.features(images.to(self.device))
                made["features"] = seen.features.float().cpu()
                if seen.scores is not None:
                    made["scores"] = seen.scores.float().cpu()
            if self.clip is not None:
                made["clip"] = self.clip(images, numbers).cpu()
            # Rounding to bytes would make a pixel of what is no number.
            broken = images.flatten(1).isnan().any(1).cpu()
            for name in {"features", "scores", "clip"} & made.keys():
                made[name][broken] = torch.nan
        if self.progress is not None:
            self.progress(len(numbers) * sampler.steps)
        return made

    def _kept(self, make: Callable[[int, int, int], dict[str, Tensor]], steps: int, folder: Path) -> dict[str, Tensor]:
        """The same by way of the disk: what another call has made is taken, and each process makes its share."""
        width = 0 if self.features is None else self.features.count + self.features.classes
        row = 16 + 4 * (width + torch.Size(self.teacher.event_shape).numel())
        layout = Layout(folder, self.count, row, _PART)
        # Another evaluation of the same samples waits, and then takes what this one has made.
        with locked(folder, "an evaluation", wait=True):
            self._fill(layout, make, steps)
            parts = [load_file(file) for file in layout.files]
            # The lock is that of the first process: it is held until all have read.
            self._wait()
        return {name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0] if name != _SEAL}

    def _fill(
        self,
        layout: Layout,
        make: Callable[[int, int, int], dict[str, Tensor]],
        steps: int,
    ) -> None:
        """Make what is not on the disk or is damaged there; each process makes its share."""
        process, processes = 0, 1
        if self.accelerator is not None:
            process, processes = self.accelerator.process_index, self.accelerator.num_processes
        if process == 0:
            for file in layout.files:
                if file.is_file() and not _is_whole(file):
                    logger.warning(f"{file} is damaged; it is made again")
                    file.unlink()
        self._wait()
        mine = enumerate(layout.files[process::processes])
        there = sum(
            min(layout.size, self.count - (process + i * processes) * layout.size) for i, f in mine if f.is_file()
        )
        if self.progress is not None:
            self.progress(there * steps)
        layout.fill(lambda *numbers: _sealed(make(*numbers)), process, processes)
        self._wait()

    def _wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


def _digest(tensors: dict[str, Tensor]) -> Tensor:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _sealed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {_SEAL: _digest(tensors)}


def _is_whole(file: Path) -> bool:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError):
        return False
    seal = tensors.pop(_SEAL, None)
    return seal is not None and torch.equal(seal, _digest(tensors))
