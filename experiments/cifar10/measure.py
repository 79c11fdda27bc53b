"""Measure the Fréchet distance and the endpoint error of samplers on the same noises, on one device."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file

from fmm_distill.core.solvers import endpoint
from fmm_distill.evaluation.features import open_features, unit_images
from fmm_distill.evaluation.metrics import FrechetDistance
from fmm_distill.io.files import write_text
from fmm_distill.student.sampling import sample

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from experiments.cifar10.budget import Budget
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

    Sampler = Callable[[Tensor], Tensor]

NOISE_SEED = 20_240_607
PICTURED = 10


def save_atomically(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file that exists completely or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    save_file(tensors, partial)
    partial.replace(file)


class Judge:
    """Measures samplers with noises, endpoints of the teacher's ODE and features of the reference, computed once.

    Args:
        features: a TorchScript file: images in [0, 1] to features.
        pixels: reference images, uint8, shape ``[count, 3, size, size]``.
        budget: numbers of samples and steps, and the precision of sampling; the ODE is solved in float32.
        cache: a folder for features, endpoints and protocol, which a second judge reads.
    """

    @torch.no_grad()
    def __init__(
        self,
        teacher: Teacher,
        features: Path,
        pixels: Tensor,
        device: str,
        budget: Budget,
        cache: Path,
    ) -> None:
        self.teacher, self.device, self.budget = teacher.to(device), device, budget
        self.batch, self.precision = budget.measure_batch, budget.precision
        noise = torch.randn(budget.samples, *teacher.event_shape, generator=torch.Generator().manual_seed(NOISE_SEED))
        self.noise = noise.to(device)
        found = open_features(str(features), teacher.event_shape)
        assert found is not None
        self.features = found.to(torch.device(device))
        some = self.noise[: budget.endpoint_samples]
        tensors, protocol = cache / "judge.safetensors", cache / "protocol.json"
        if not tensors.is_file():
            reference = torch.cat([self._features(part.to(device).float() / 255) for part in pixels.split(self.batch)])
            self.endpoints = self._solve(some, budget.solver_steps)
            about = self._protocol(pixels, some)
            write_text(protocol, json.dumps(about))
            # Written last: its presence means that both files are complete.
            save_atomically({"reference": reference, "truth": self.endpoints.cpu()}, tensors)
        known = load_file(tensors)
        self.endpoints = known["truth"].to(device)
        self.frechet = FrechetDistance(known["reference"], budget.samples, with_error=False)
        self.protocol: dict[str, Any] = json.loads(protocol.read_text(encoding="utf-8"))

    def _protocol(self, pixels: Tensor, some: Tensor) -> dict[str, Any]:
        """Return the conditions of the measurement, and the effects of the solver's steps and of half precision."""
        samples, solver_steps = self.budget.samples, self.budget.solver_steps
        halved = self._solve(some, max(solver_steps // 2, 1))
        ddim = _stock(self.teacher, "ddim", 16)
        exact = torch.cat([ddim(part) for part in some.split(self.batch)])
        moved = (exact - self._sample(ddim, some)).square().mean().sqrt().item()
        return {
            "samples": samples,
            "reference": f"{len(pixels)} training images of {pixels.shape[-2]} x {pixels.shape[-1]}",
            "features": f"{self.features.width} features of the classifier (sha256 {self.features.digest[:12]}), "
            f"images {self.features.preprocessing}",
            "endpoint_samples": len(some),
            "ode_solver": f"RK4, {solver_steps} steps, then the stock last step to x0_hat",
            "ode_solver_error": (self.endpoints - halved).square().mean().sqrt().item(),
            "ode_range": self.endpoints.abs().max().item(),
            "ode_outside": (self.endpoints.abs() > 1.1).float().mean().item(),
            "precision": self.precision,
            "precision_moves_ddim_16": moved,
            "noise_seed": NOISE_SEED,
        }

    def _features(self, images: Tensor) -> Tensor:
        """Return features of images in [0, 1], on the CPU: distances need float64, which some devices lack."""
        # The optimizing executor of TorchScript compiles again for every batch size.
        with torch.jit.optimized_execution(False):
            return self.features(images).features.cpu()

    def _solve(self, noise: Tensor, steps: int) -> Tensor:
        teacher = self.teacher
        parts = [endpoint(teacher.velocity, teacher.schedule, teacher.prior(x), steps) for x in noise.split(self.batch)]
        return torch.cat(parts)

    def _sample(self, sampler: Sampler, noise: Tensor) -> Tensor:
        """Return samples in the budget's precision; the protocol has the effect of bfloat16."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            return torch.cat([sampler(part) for part in noise.split(self.batch)]).float()

    @torch.no_grad()
    def row(self, sampler: Sampler) -> tuple[dict[str, float], Tensor]:
        """Return Fréchet distance, endpoint error and images per second of a sampler, and its first samples."""
        started = time.perf_counter()
        x = self._sample(sampler, self.noise)
        error = (x[: len(self.endpoints)] - self.endpoints).square().mean().sqrt().item()
        # The error above waits for the device.
        rate = len(x) / (time.perf_counter() - started)
        seen = torch.cat([self._features(unit_images(part)) for part in x.split(self.batch)])
        return self.scores(seen) | {"endpoint": error, "images_per_second": rate}, x[:PICTURED].cpu()

    def scores(self, features: Tensor) -> dict[str, float]:
        """Return the quantities of the features of all samples."""
        return {"frechet": self.frechet(features)["frechet"].value}

    def student(
        self, student: Student, steps: tuple[int, ...]
    ) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
        """Return one row per number of jumps, and the first samples of each."""
        student = student.to(self.device).eval()
        return self._rows({str(n): _jumps(student, n) for n in steps})

    def solver(self, kind: str, steps: tuple[int, ...]) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
        """Return the same of the teacher under a stock scheduler, ``ddim`` or ``dpmsolver++``."""
        return self._rows({str(n): _stock(self.teacher, kind, n) for n in steps})

    def _rows(self, samplers: dict[str, Sampler]) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
        found = {name: self.row(sampler) for name, sampler in samplers.items()}
        return {name: row for name, (row, _) in found.items()}, {name: x for name, (_, x) in found.items()}


def open_judge(teacher: Teacher, work: Path, budget: Budget, device: str, cache: Path) -> Judge:
    """Return the judge of a teacher's students, with the images and the classifier in ``work``."""
    return Judge(
        teacher,
        work / "classifier" / "classifier.pt",
        load_file(work / "images.safetensors")["train"],
        device,
        budget,
        cache,
    )


def _jumps(student: Student, steps: int) -> Sampler:
    return lambda noise: sample(student, noise, steps)


def _stock(teacher: Teacher, kind: str, steps: int) -> Sampler:
    """Return a sampler of diffusers with the teacher's own network and configuration, and trailing spacing."""
    classes = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler}
    settings: dict[str, Any] = {"timestep_spacing": "trailing"}
    if kind == "dpmsolver++":
        settings |= {"algorithm_type": "dpmsolver++", "solver_order": 2}

    def run(noise: Tensor) -> Tensor:
        scheduler = classes[kind].from_config(teacher.scheduler_config | settings)
        scheduler.set_timesteps(steps, device=noise.device)
        x = noise
        for timestep in scheduler.timesteps:
            x = scheduler.step(teacher.network(x, timestep).sample, timestep, x).prev_sample
        return x

    return run
