"""The timed and counted losses: their settings and the network passes that a step needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel

from fmm_distill.config.recipe import Recipe
from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import VariancePreserving
from fmm_distill.data.samples import ImageBatch, row_of
from fmm_distill.losses import registered_losses
from fmm_distill.losses.base import DerivativeLoss
from fmm_distill.student.student import Student
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.conditions import Classes
from fmm_distill.training.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator

    from fmm_distill.core.draws import Draws

__all__ = [
    "BASELINE",
    "CASES",
    "NETWORKS",
    "Case",
    "Passes",
    "make_dit",
    "make_teacher",
    "make_trainer",
    "make_unet",
    "teacher_of",
]


@dataclass(frozen=True)
class Passes:
    """Network passes of a step; a tangent and a gradient of a network's input each count as a forward pass.

    Attributes:
        teacher: forward passes of the teacher, and of a critic, whose network is the teacher's.
        student: forward passes of the student and its copies, including tangents.
        backward: backward passes of the student and of a critic, each about two forward passes.
    """

    teacher: float
    student: float
    backward: float


@dataclass(frozen=True)
class Case:
    """A loss with its settings. With ``data``, starting points need no pass of the student.

    With ``matching`` the steps are those of the second stage, all samples of which are matched.
    """

    name: str
    loss: dict[str, Any]
    # None: not counted.
    floor: Passes | None
    time_sampling: dict[str, Any] = field(default_factory=dict)
    data: bool = True
    matching: dict[str, Any] | None = None

    @property
    def first_step(self) -> int:
        """The first step of the stage that is timed and counted."""
        return 0 if self.matching is None else 1

    def engines(self) -> list[str]:
        """The engines of its derivative; empty for a loss without derivatives."""
        if self.matching is not None:
            return ["none"]
        takes = issubclass(registered_losses()[self.loss["name"]], DerivativeLoss) and not self.loss.get("step")
        return ["exact", "central"] if takes else ["none"]

    def settings(self, engine: str) -> dict[str, Any]:
        """Return the settings of the loss with this engine."""
        return self.loss if engine == "none" else self.loss | {"derivative": engine}


_MAP = {"name": "lagrangian", "stop_gradient": "target"}
# The critic alone in all steps, or in none.
_CRITIC, _NO_WARMUP = {"critic": {"warmup_steps": 1000}}, {"critic": {"warmup_steps": 0}}
_KL, _FISHER = {"loss": {"name": "distribution_matching"}}, {"loss": {"name": "score_implicit_matching"}}
_ALL = {"rollout": {"gradient": "all"}}

BASELINE = Case("flow matching", {"name": "flow_matching", "velocity": "data"}, Passes(0, 1, 1))
_TO_DATA = {"prior": 0, "data": 1}
_DYADIC = {"prior": 0, "dyadic": 3}
CASES = (
    Case("flow_matching", {"name": "flow_matching"}, Passes(1, 1, 1)),
    Case("lagrangian, target", {"name": "lagrangian", "stop_gradient": "target"}, Passes(1, 2, 1)),
    # Half of the jumps start from one of the student's own.
    Case(
        "lagrangian, target, no data", {"name": "lagrangian", "stop_gradient": "target"}, Passes(1, 2.5, 1), data=False
    ),
    Case("lagrangian, teacher", {"name": "lagrangian", "stop_gradient": "teacher_input"}, Passes(1, 2, 2)),
    Case("lagrangian, none", {"name": "lagrangian", "stop_gradient": "nowhere"}, Passes(2, 2, 2)),
    Case("eulerian, target", {"name": "eulerian", "stop_gradient": "target"}, Passes(1, 2, 1)),
    Case("eulerian, teacher", {"name": "eulerian", "stop_gradient": "teacher_input"}, Passes(1, 3, 2)),
    Case("eulerian, none", {"name": "eulerian", "stop_gradient": "nowhere"}, Passes(1, 2, 2)),
    Case("progressive", {"name": "progressive", "target": "frozen"}, Passes(0, 3, 1)),
    Case(
        "progressive_distillation", {"name": "progressive_distillation", "target": "frozen"}, Passes(0, 3, 1), _DYADIC
    ),
    Case("consistency, step 0.05", {"name": "consistency", "step": 0.05}, Passes(1, 2, 1), _TO_DATA),
    Case("consistency, step 0", {"name": "consistency"}, Passes(1, 2, 1), _TO_DATA),
    Case("consistency_trajectory", {"name": "consistency_trajectory"}, Passes(4, 5, 1)),
    Case("mean_flow", {"name": "mean_flow"}, Passes(0, 2, 1)),
    Case("mean_flow, improved", {"name": "mean_flow", "improved": True}, Passes(0, 3, 1)),
    Case("flow_map_matching", {"name": "flow_map_matching"}, Passes(0, 3, 3)),
    Case("terminal_velocity", {"name": "terminal_velocity"}, Passes(0, 4, 3)),
    Case("operator_regression", {"name": "operator_regression", "solver_steps": 2}, Passes(8, 1, 1), {"prior": 1}),
    # A rollout of 1, 2, 4 or 8 steps from a random point takes 1.53 jumps on average, 2.06 with the gradient in all of
    # them: one of the student's step, and one of each of the critic's two updates, which pass forward and backward
    # through the critic. A step of the student passes through teacher and critic, in the Fisher family also back to
    # their inputs. The critic alone is compared with the teacher.
    Case("critic update", _MAP, Passes(2, 1.53, 1), data=False, matching=_CRITIC),
    Case("distribution_matching", _MAP, Passes(4, 4.59, 3), data=False, matching=_NO_WARMUP | _KL),
    Case("distribution_matching, all jumps", _MAP, Passes(4, 6.19, 4.06), data=False, matching=_NO_WARMUP | _KL | _ALL),
    Case("score_implicit_matching", _MAP, Passes(6, 4.59, 3), data=False, matching=_NO_WARMUP | _FISHER),
    Case(
        "score_implicit_matching, all jumps",
        _MAP,
        Passes(6, 6.19, 4.06),
        data=False,
        matching=_NO_WARMUP | _FISHER | _ALL,
    ),
)


def make_unet(channels: tuple[int, ...], layers: int, attention: int, size: int = 32) -> UNet2DModel:
    """Return a UNet with attention at one level, as in the DDPM of CIFAR-10."""
    levels = range(len(channels))
    return UNet2DModel(
        sample_size=size,
        in_channels=3,
        out_channels=3,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=tuple("AttnDownBlock2D" if i == attention else "DownBlock2D" for i in levels),
        up_block_types=tuple("AttnUpBlock2D" if i == attention else "UpBlock2D" for i in reversed(levels)),
        norm_num_groups=min(32, channels[0]),
    )


def make_dit(layers: int, heads: int, head_dim: int = 64, size: int = 32) -> DiTTransformer2DModel:
    """Return a class-conditional transformer with one token per four pixels of a latent image."""
    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=size,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


NETWORKS = {
    ("unet", "tiny"): lambda: make_unet((8, 16), 1, 1, 8),
    ("unet", "small"): lambda: make_unet((64, 96, 128, 128), 1, 1),
    ("unet", "large"): lambda: make_unet((128, 256, 256, 256), 2, 1),
    ("dit", "tiny"): lambda: make_dit(2, 2, 8, 4),
    ("dit", "small"): lambda: make_dit(12, 6),
    ("dit", "large"): lambda: make_dit(12, 12),
}


class _Fixed:
    """64 samples of noise instead of images: their content does not affect the cost."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.samples = torch.randn(64, *shape, generator=torch.Generator().manual_seed(0))

    def pick(self, draws: Draws) -> ImageBatch:
        return ImageBatch(self.samples[row_of(draws.image, len(self.samples))])


def make_teacher(kind: str, size: str) -> Teacher:
    """Return a network with fixed random weights: ``unet`` on pixels, or class-conditional ``dit`` on latents."""
    torch.manual_seed(0)
    return teacher_of(NETWORKS[kind, size]())


def teacher_of(network: UNet2DModel | DiTTransformer2DModel) -> Teacher:
    """Return a network as a teacher with the linear schedule."""
    side, channels = network.config.sample_size, network.config.in_channels
    conditional = isinstance(network, DiTTransformer2DModel)
    return Teacher(
        network=network.requires_grad_(False).eval(),
        parametrization=Parametrization(VariancePreserving(DDPMScheduler().alphas_cumprod), "v_prediction"),
        event_shape=(channels, side, side),
        source="random weights",
        adapter="benchmark",
        scheduler_config={},
        conditions=Classes(tuple(str(i) for i in range(1000)), null_label=1000) if conditional else None,
    )


def make_trainer(
    case: Case,
    engine: str,
    teacher: Teacher,
    batch: int,
    accelerator: Accelerator,
    folder: Path,
    training: Mapping[str, Any] | None = None,
) -> Trainer:
    """Return a trainer of a new student of this teacher, with one average.

    Args:
        training: further settings of the training.
    """
    settings = {
        "teacher": "random weights",
        "loss": case.settings(engine),
        "time_sampling": case.time_sampling,
        "data": "fixed samples" if case.data else "none",
        "training": {"steps": 100000, "batch_size": batch} | dict(training or {}),
    }
    if case.matching is not None:
        settings["matching"] = {"steps": 100000, "fraction": 1.0} | case.matching
        # Of the map alone: the shortest first stage.
        settings["training"] |= {"steps": case.first_step}
        settings["student"] = {"kind": "embedded"}
    recipe = Recipe.model_validate(settings)
    samples = _Fixed(teacher.event_shape) if case.data else None
    return Trainer(Student.from_teacher(teacher), teacher, recipe, samples, folder, accelerator)
