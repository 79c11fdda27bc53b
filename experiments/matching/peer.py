"""DMD2 by FastGen's own code, run from a checkout, on this package's teacher.

Its classes for the method, the losses, the noise schedule and the sampler run unchanged. Their imports of FastGen's
framework are replaced by empty names, and its networks by the teacher's in EDM's form. The loop around them does what
FastGen's trainer does: one update per iteration, of the student or of the fake score.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.step_peers import fake, load, real
from fmm_distill.training.ema import averaged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from fmm_distill.core.parametrization import Parametrization
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

    Velocity = Callable[[Any, Tensor, Tensor], Tensor]

__all__ = ["DMD2", "DMD2Settings"]

# Of config_dmd2_cifar10.py and the configurations that it extends.
WEIGHT_DECAY, BETAS, MAX_GRAD_NORM = 0.01, (0.9, 0.999), 10.0
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


@dataclass(frozen=True)
class DMD2Settings:
    """Settings of FastGen's DMD2; the defaults are those of its CIFAR-10 configuration, without a discriminator.

    Attributes:
        lr: of the student and of the fake score.
        student_update_freq: iterations per update of the student; all others update the fake score.
        student_sample_steps: 1, or the number of times at which the student is trained on noised images.
        ema: largest decay of the moving average; theirs are for 100,000 iterations.
    """

    lr: float = 1e-4
    student_update_freq: int = 5
    student_sample_steps: int = 1
    ema: float = 0.95


class EDMNetwork(nn.Module):
    """A velocity as the denoiser of ``x_0 + sigma eps``, as FastGen calls its EDM networks.

    Args:
        network: the module whose weights the velocity has.
    """

    net_pred_type = "x0"

    def __init__(self, network: nn.Module, velocity: Velocity, schedule: nn.Module) -> None:
        super().__init__()
        self.network, self.velocity, self.noise_scheduler = network, velocity, schedule

    def forward(self, x: Tensor, sigma: Tensor, condition: object = None, fwd_pred_type: str | None = None) -> Tensor:
        """Return x_0 of ``x = x_0 + sigma eps``."""
        assert fwd_pred_type in (None, "x0")
        sigma = sigma.double()
        t = sigma / (1 + sigma)
        y = (x / (1 + sigma).reshape(-1, 1, 1, 1)).to(x.dtype)
        return y - t.reshape(-1, 1, 1, 1).to(y.dtype) * self.velocity(self.network, y, t)


def _velocity(parametrization: Parametrization, network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Return the velocity of a network of one time."""
    return parametrization.velocity(network, x, t, None)


def _of_jump(student: Student, x: Tensor, t: Tensor) -> Tensor:
    """Return the mean velocity of a student's jumps to data."""
    return student.mean_velocity(x, t, torch.zeros_like(t))


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def load_dmd2(checkout: Path) -> dict[str, ModuleType]:
    """Load FastGen's schedules, its model class, the losses of DMD2 and its method."""

    def nothing(*_: object, **__: object) -> None:
        return None

    def inference_mode(*modules: nn.Module, precision_amp: object = None, device_type: str = "cpu") -> Any:
        return torch.no_grad()

    modules = load(checkout)
    fake("fastgen.configs")
    fake("fastgen.configs.opt", get_scheduler=nothing)
    fake("fastgen.utils.distributed", synchronize=nothing, world_size=lambda: 1, is_rank0=lambda: True)
    fake("fastgen.utils.io_utils", s3_load=nothing)
    sys.modules["fastgen.utils"].instantiate = nothing  # type: ignore[attr-defined]
    sys.modules["fastgen.utils.basic_utils"].inference_mode = inference_mode  # type: ignore[attr-defined]
    modules["model"] = real("fastgen.methods.model", checkout / "fastgen/methods/model.py")
    sys.modules["fastgen.methods"].FastGenModel = modules["model"].FastGenModel  # type: ignore[attr-defined]
    modules["losses"] = real("fastgen.methods.common_loss", checkout / "fastgen/methods/common_loss.py")
    fake("fastgen.methods.distribution_matching")
    name = "distribution_matching.dmd2"
    modules["dmd2"] = real(f"fastgen.methods.{name}", checkout / f"fastgen/methods/{name.replace('.', '/')}.py")
    return modules


class DMD2:
    """FastGen's DMD2 on a teacher: student and fake score start as the teacher.

    Args:
        images: returns a batch of images in [-1, 1]; with one step of the student, only their shape is used.
        student: a flow map whose jumps to data the student starts as; None: it starts as the teacher.
    """

    def __init__(
        self,
        checkout: Path,
        teacher: Teacher,
        settings: DMD2Settings,
        images: Callable[[], Tensor],
        *,
        student: Student | None = None,
    ) -> None:
        modules = load_dmd2(checkout)
        self.settings, self.images = settings, images
        schedule = modules["noise_schedule"].EDMNoiseSchedule(min_t=SIGMA_MIN, max_t=SIGMA_MAX)

        def network(trained: bool) -> EDMNetwork:
            made = EDMNetwork(copy.deepcopy(teacher.network), partial(_velocity, teacher.parametrization), schedule)
            return made.train(trained).requires_grad_(trained)

        model = object.__new__(modules["dmd2"].DMD2Model)
        nn.Module.__init__(model)
        model.teacher, model.fake_score = network(False), network(True)
        # A scaled student has frozen weights, which stay so.
        model.net = network(True) if student is None else EDMNetwork(student, _of_jump, schedule).train()
        times = {"time_dist_type": "polynomial", "min_t": SIGMA_MIN, "max_t": SIGMA_MAX, "t_list": None}
        model.config = SimpleNamespace(
            student_update_freq=settings.student_update_freq,
            student_sample_steps=settings.student_sample_steps,
            student_sample_type="sde",
            gan_loss_weight_gen=0.0,
            gan_r1_reg_weight=0.0,
            guidance_scale=None,
            skip_layers=None,
            fake_score_pred_type=None,
            sample_t_cfg=SimpleNamespace(**times),
        )
        model.device, model.input_shape, model.use_ema = torch.device("cpu"), list(teacher.event_shape), []
        model.precision, model.precision_amp_infer = torch.float32, None
        self.model, self.loop = model, modules["model"].FastGenModel
        self.optimizers = {
            network: torch.optim.AdamW(_trained(network), settings.lr, BETAS, weight_decay=WEIGHT_DECAY)
            for network in (model.net, model.fake_score)
        }
        self.average = averaged(model.net, settings.ema)
        self.iteration, self.cpu_seconds = 0, 0.0

    @property
    def student_steps(self) -> int:
        """Updates of the student so far."""
        return math.ceil(self.iteration / self.settings.student_update_freq)

    def step(self) -> dict[str, float]:
        """Run an iteration of FastGen's trainer, from its gradients to its average, and return its losses."""
        started, model = time.process_time(), self.model
        updates_student = self.iteration % self.settings.student_update_freq == 0
        real_images = self.images()
        losses, _ = model.single_train_step(
            {"real": real_images, "condition": None, "neg_condition": None}, self.iteration
        )
        losses["total_loss"].backward()
        network = model.net if updates_student else model.fake_score
        if updates_student:
            nn.utils.clip_grad_norm_(_trained(network), MAX_GRAD_NORM)
        self.optimizers[network].step()
        self.optimizers[network].zero_grad()
        if updates_student:
            self.average.update_parameters(model.net)
        self.iteration += 1
        self.cpu_seconds += time.process_time() - started
        return {name: value.item() for name, value in losses.items()}

    def train(self, seconds: float) -> Iterator[dict[str, float]]:
        """Run iterations until their CPU seconds are over."""
        while self.cpu_seconds < seconds:
            yield self.step()

    @torch.no_grad()
    def sample(self, noise: Tensor, steps: int) -> Tensor:
        """Return samples by FastGen's own loop: jumps to x_0, and fresh noise up to the next time in between."""
        net = self.average.module
        times = net.noise_scheduler.get_t_list(sample_steps=steps, device=noise.device)
        if self.settings.student_sample_steps == 1 and steps == 1:
            times[0] = SIGMA_MAX
        with torch.random.fork_rng(devices=[]):
            # The loop draws its noise from torch's own generator.
            torch.manual_seed(steps)
            latents = net.noise_scheduler.latents(noise=noise, t_init=times[0])
            found: Tensor = self.loop._student_sample_loop(net, latents, t_list=times, student_sample_type="sde")
        return found

    def state(self) -> dict[str, Any]:
        """Return all that continues this run."""
        networks = {"net": self.model.net, "fake_score": self.model.fake_score, "average": self.average}
        return {
            "networks": {name: network.state_dict() for name, network in networks.items()},
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers.values()],
            "iteration": self.iteration,
            "cpu_seconds": self.cpu_seconds,
            "generator": torch.get_rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue the run of a state."""
        networks = {"net": self.model.net, "fake_score": self.model.fake_score, "average": self.average}
        for name, network in networks.items():
            network.load_state_dict(state["networks"][name])
        for optimizer, saved in zip(self.optimizers.values(), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.iteration, self.cpu_seconds = state["iteration"], state["cpu_seconds"]
        torch.set_rng_state(state["generator"])
