"""Training steps of FastGen's mean-flow, sCM and ECT losses, run from a checkout, on a student of this package.

The files of the losses run unchanged. Their imports of FastGen's framework (configurations, logging) are replaced by
empty names, and its networks by those of this package. Trainer, optimizer and average are those with which this
package's losses are timed, so that a step differs only in the loss.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fmm_distill.core.draws import draw
from fmm_distill.data.starting_points import draw_conditioning
from fmm_distill.training.ema import averaged

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from accelerate import Accelerator
    from torch import Tensor

    from fmm_distill.core.draws import Draws
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["ECT", "PEERS", "PeerStep"]

PEERS = ("fastgen mean_flow", "fastgen mean_flow, differences", "fastgen sCM")
# Not timed: its step has no derivative.
ECT = "fastgen ECT"
# Stages of ECT's schedule in a run (config_cm.py: iterations times batch by 8000 are the thousands of images a stage).
ECT_STAGES = 8
SIGMA_DATA = 0.5


class _Runs(TorchFunctionMode):
    """Calls ``group_norm`` with contiguous inputs, which diffusers' networks need in torch's own forward mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Torch's protocol for function modes."""
        if func is F.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def forward_mode() -> Any:
    """Select an attention with a forward-mode rule, and ``_Runs``, inside a transform of torch.func."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH), _Runs():
        yield


def fake(name: str, **values: object) -> types.ModuleType:
    """Register a replacement of a missing module, with these names."""
    module = types.ModuleType(name)
    # Without a path it would not be a package.
    module.__path__ = []
    vars(module).update(values)
    return _registered(name, module)


def real(name: str, file: Path) -> types.ModuleType:
    """Load a file of the checkout under its own name."""
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _registered(name, module)
    spec.loader.exec_module(module)
    return module


def _registered(name: str, module: types.ModuleType) -> types.ModuleType:
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
    return module


def load(checkout: Path) -> dict[str, types.ModuleType]:
    """Load FastGen's schedules and both losses."""

    def expand_like(x: Tensor, like: Tensor) -> Tensor:
        return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))

    def quiet(*_: object, **__: object) -> None:
        return None

    fake("fastgen")
    fake("fastgen.methods", CMModel=object, FastGenModel=object)
    fake("fastgen.networks")
    fake("fastgen.utils", expand_like=expand_like)
    fake("fastgen.utils.logging_utils", **dict.fromkeys(("debug", "info", "warning", "critical", "error"), quiet))
    kinds = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
    fake("fastgen.utils.basic_utils", PRECISION_MAP=kinds, convert_cfg_to_dict=vars)
    files = {
        "noise_schedule": "networks.noise_schedule",
        "network": "networks.network",
        "mean_flow": "methods.consistency_model.mean_flow",
        "sCM": "methods.consistency_model.sCM",
        "CM": "methods.consistency_model.CM",
    }
    fake("fastgen.methods.consistency_model")
    return {
        name: real(f"fastgen.{module}", checkout / "fastgen" / f"{module.replace('.', '/')}.py")
        for name, module in files.items()
    }


class Flow(nn.Module):
    """A network on the rectified-flow axis, as in this package: u of a student, or v of a teacher."""

    def __init__(self, schedule: object, student: Student | None = None, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.noise_scheduler, self.student = schedule, student
        # In a tuple, so that it is not a submodule of this module.
        self._teacher = (teacher,)

    def forward(
        self, x: Tensor, t: Tensor, r: Tensor | None = None, condition: object = None, fwd_pred_type: str = "flow"
    ) -> Tensor:
        """Return the output of the network, as FastGen calls it."""
        assert fwd_pred_type == "flow"
        teacher = self._teacher[0]
        with forward_mode():
            if teacher is not None:
                return teacher.velocity(x, t.double(), condition)
            return self.student.mean_velocity(x, t.double(), t.double() if r is None else r.double(), condition)


class Denoiser(nn.Module):
    """The same network in EDM's form, x_0 of ``x_0 + sigma eps``; that of a student on its diagonal."""

    def __init__(self, schedule: object, velocity: Callable[..., Tensor], held: nn.Module | None = None) -> None:
        super().__init__()
        self.noise_scheduler, self._velocity, self.held = schedule, velocity, held
        self.logvar = nn.Linear(1, 1)

    def forward(
        self, x: Tensor, sigma: Tensor, condition: object = None, return_logvar: bool = False, fwd_pred_type: str = "x0"
    ) -> Any:
        """Return the output of the network, as FastGen calls it."""
        assert fwd_pred_type == "x0"
        sigma = sigma.reshape(-1).double()
        t = sigma / (1 + sigma)
        y = (x / (1 + sigma).reshape(-1, 1, 1, 1)).to(x.dtype)
        with forward_mode():
            x_0 = y - t.reshape(-1, 1, 1, 1).to(y.dtype) * self._velocity(y, t, condition)
        if not return_logvar:
            return x_0
        return x_0, self.logvar(sigma.log().float()[:, None] / 4)


class PeerStep:
    """One training step of a peer's loss with the update of this package's trainer: clipping, AdamW, one average.

    Attributes:
        images: returns images in [-1, 1] for some draws; noise by default.
        steps: of the run, for ECT's schedule.
        optimizer, average: of the student.
    """

    steps = 1

    def __init__(
        self, name: str, checkout: Path, student: Student, teacher: Teacher, batch: int, accelerator: Accelerator
    ) -> None:
        self.accelerator, self.student, self.teacher, self.batch = accelerator, student, teacher, batch
        self.modules, device = load(checkout), accelerator.device
        self.student.to(device)
        made = {"fastgen sCM": self._scm, ECT: self._ect}
        self.loss, module = made[name]() if name in made else self._mean_flow(differences=name.endswith("differences"))
        module.to(device)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
        self.module, self.optimizer = module, optimizer
        self.average = averaged(student, 0.999)
        self.images: Callable[[Draws], Tensor] = lambda draws: draws.noise * SIGMA_DATA

    def __call__(self, step: int) -> Tensor:
        """Run a complete step, and return the mean loss on the device."""
        draws = draw(0, step, self.batch, self.teacher.event_shape).part(0, self.batch, self.accelerator.device)
        condition = draw_conditioning(self.teacher, draws)
        with self.accelerator.autocast():
            loss = self.loss(self.images(draws), condition, step).float().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.student)
        self.optimizer.zero_grad()
        return loss.detach()

    def _mean_flow(self, *, differences: bool) -> tuple[Callable[..., Tensor], nn.Module]:
        """Return the loss of config_mf_cifar10.py with a teacher (use_cd), which takes two passes of the student."""
        device, low, high = self.accelerator.device, self.teacher.schedule.t_min, self.teacher.schedule.t_max
        schedule = self.modules["noise_schedule"].RFNoiseSchedule(max_t=high)
        model = object.__new__(self.modules["mean_flow"].MeanFlowModel)
        model.loss_config = SimpleNamespace(
            use_cd=True,
            use_jvp_finite_diff=differences,
            jvp_finite_diff_eps=5e-5,
            norm_method="poly_0.75",
            norm_const=1e-3,
            tangent_warmup_steps=0,
            tangent_spatial_invariance=False,
            loss_type="l2",
        )
        model.config = SimpleNamespace(
            guidance_scale=None, guidance_mixture_ratio=None, cond_dropout_prob=None, loss_config=model.loss_config
        )
        model.precision_amp_jvp, model.device = None, device
        model.net, model.teacher = Flow(schedule, self.student), Flow(schedule, teacher=self.teacher)

        def times(mean: float) -> Tensor:
            named = {"time_dist_type": "logitnormal", "train_p_mean": mean, "train_p_std": 1.6}
            return schedule.sample_t(self.batch, **named, min_t=low, max_t=high, device=device).float()

        def loss(images: Tensor, condition: object, step: int) -> Tensor:
            a, b = times(-0.6), times(-4.0)
            return model._compute_mf_loss(images, torch.maximum(a, b), torch.minimum(a, b), step, condition)[0]

        return loss, model.net

    def _denoiser(self, schedule: object) -> Denoiser:
        """Return the student's denoiser, with the velocity on the diagonal."""

        def of_student(x: Tensor, t: Tensor, condition: Any) -> Tensor:
            return self.student.mean_velocity(x, t, t, condition)

        return Denoiser(schedule, of_student, self.student)

    def _ect(self) -> tuple[Callable[..., Tensor], nn.Module]:
        """Return the loss of config_cm_cifar10.py: the teacher is used only for the initial weights."""
        schedule = self.modules["noise_schedule"].EDMNoiseSchedule()
        model = object.__new__(self.modules["CM"].CMModel)
        model.loss_config = SimpleNamespace(
            use_cd=False, huber_const=1e-8, use_squared_l2=False, weighting_ct_loss="default"
        )
        model.sample_t_cfg = SimpleNamespace(quantize=False, min_r=0.0)
        model.device, model.net = self.accelerator.device, self._denoiser(schedule)

        def loss(images: Tensor, condition: object, step: int) -> Tensor:
            named = {"time_dist_type": "lognormal", "train_p_mean": -1.1, "train_p_std": 2.0}
            t = schedule.sample_t(self.batch, **named, min_t=0.002, max_t=80.0, device=model.device).float()
            model.ratio = min(1 - 0.5 ** (ECT_STAGES * step // self.steps + 1), 0.999)
            return model._compute_cm_loss(model.net, images, t, condition)[0]

        return loss, model.net

    def _scm(self) -> tuple[Callable[..., Tensor], nn.Module]:
        """Return the loss of config_scm_cifar10.py, with a teacher."""
        device = self.accelerator.device
        schedule, scm = self.modules["noise_schedule"].EDMNoiseSchedule(), self.modules["sCM"]
        model = object.__new__(scm.SCMModel)
        model.loss_config = SimpleNamespace(
            use_cd=True,
            tangent_warmup_steps=10_000,
            tangent_warmup_const=0.1,
            prior_weighting_enabled=True,
            g_norm_spatial_invariance=True,
            divide_x_0_spatial_dim=True,
            use_jvp_finite_diff=False,
        )
        model.config = SimpleNamespace(guidance_scale=None, skip_layers=None)
        model.sample_t_cfg = SimpleNamespace(quantize=False)
        model.sigma_data, model.precision_amp_jvp, model.device = SIGMA_DATA, None, device

        model.net = self._denoiser(schedule)
        model.teacher = Denoiser(schedule, self.teacher.velocity).to(device)
        model.teacher_trigflow, model.net_trigflow = (
            scm.TrigFlowPrecond(network, sigma_data=SIGMA_DATA) for network in (model.teacher, model.net)
        )

        def loss(images: Tensor, condition: object, step: int) -> Tensor:
            named = {"time_dist_type": "lognormal", "train_p_mean": -1.0, "train_p_std": 1.4}
            sigma = schedule.sample_t(self.batch, **named, min_t=0.01, max_t=80.0, device=device).float()
            return model._compute_scm_loss(images, sigma, condition, iteration=step)[0]

        return loss, model.net
