"""The exporter of ``UNet2DModel`` teachers: a pipeline of this package's own, and stock pipelines of fixed steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor

from fmm_distill.export.remote.pipeline import FlowMapPipeline
from fmm_distill.export.schedulers import make_scheduler, settings_of, why_levels_do_not_fold
from fmm_distill.student.fold import fold

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["UNet2DExporter"]


class UNet2DExporter:
    """Exports students of ``UNet2DModel``, of pixels or of the latents of a ``VQModel``.

    Stock pipelines of this network take no second time, so the any-step pipeline is ``FlowMapPipeline``, whose code
    travels with it. See ``Exporter`` for the attributes.
    """

    component = "unet"
    not_any_step: str | None = None

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.autoencoder = teacher.codec.autoencoder
        self.not_fixed = self._why_not_fixed()

    def _why_not_fixed(self) -> str | None:
        teacher = self.teacher
        if (reason := why_levels_do_not_fold(teacher.schedule)) is not None:
            return reason
        if teacher.config["out_channels"] != teacher.config["in_channels"]:
            return "no stock pipeline of UNet2DModel leaves out a learned variance"
        if teacher.conditions is not None:
            return "no stock pipeline passes a class to UNet2DModel"
        if teacher.schedule.kind == "flow" and self.autoencoder is not None:
            return "no stock pipeline decodes a VQModel after a flow"
        return None

    def settings(self, scheduler: Any) -> dict[str, Any]:  # noqa: ANN401 a diffusers class
        """Return the ``flow_map`` entry of the network's configuration: what the any-step pipeline measures h by."""
        latents = self.autoencoder is not None
        return {"kind": self.teacher.schedule.kind, "latents": latents, "scheduler": settings_of(scheduler)}

    def any_step(self, student: Student, folder: Path, *, linked: bool = False) -> None:
        """Write ``FlowMapPipeline`` with the two-time network."""
        scheduler, network = make_scheduler(self.teacher, student.prediction), cast("Any", student.network)
        network.register_to_config(flow_map=self.settings(scheduler))
        pipeline = FlowMapPipeline(unet=network, scheduler=scheduler, vqvae=self.autoencoder)
        pipeline.save_pretrained(folder, safe_serialization=True)

    def fixed(self, student: Student, steps: int, folder: Path) -> None:
        """Write the stock pipeline of unconditional images with the folded network."""
        scheduler = self._fixed_scheduler(student, steps)
        network = fold(student, self.teacher, self.fixed_grid(student, steps))
        if self.autoencoder is not None:
            pipeline = diffusers.LDMPipeline(unet=network, scheduler=scheduler, vqvae=self.autoencoder)
        else:
            # DDIMPipeline replaces every scheduler by a DDIMScheduler, which does not have the levels of the others.
            kind = diffusers.DDIMPipeline if type(scheduler) is diffusers.DDIMScheduler else diffusers.DDPMPipeline
            pipeline = kind(unet=network, scheduler=scheduler)
        pipeline.save_pretrained(folder / f"steps-{steps}", safe_serialization=True)

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """Return the schedule's own grid."""
        return self.teacher.schedule.grid(steps)

    def fixed_grid(self, student: Student, steps: int) -> Float[Tensor, " points"]:
        """Return the times that the stock scheduler of ``steps`` steps takes."""
        if self.teacher.schedule.kind != "flow":
            return self.teacher.schedule.grid(steps)
        scheduler = self._fixed_scheduler(student, steps)
        # Without sigmas, as the stock pipeline calls it.
        scheduler.set_timesteps(steps)
        times: Tensor = scheduler.sigmas.double()
        return times

    def _fixed_scheduler(self, student: Student, steps: int) -> Any:  # noqa: ANN401 a diffusers class
        """The stock scheduler whose steps are the jumps of a grid of ``steps``."""
        stretched = self.teacher.schedule.kind == "flow" and steps > 1
        return make_scheduler(self.teacher, student.prediction, steps if stretched else None)

    def verification_call(self, count: int) -> dict[str, Any]:
        """Return the keywords for ``count`` images, of the first classes where there are classes."""
        call: dict[str, Any] = {"batch_size": count, "output_type": "np"}
        conditions = self.teacher.conditions
        if conditions is None:
            return call
        return call | {"class_labels": [i % len(conditions.names) for i in range(count)]}

    def any_step_call(self, call: dict[str, Any]) -> dict[str, Any]:
        """Return the same keywords."""
        return call

    def start(
        self, call: dict[str, Any], count: int, seed: int
    ) -> tuple[Float[Tensor, "batch *event"], Conditioning | None]:
        """Return the noise of the seed, and the first conditions."""
        generator = torch.Generator().manual_seed(seed)
        noise = randn_tensor((count, *self.teacher.event_shape), generator=generator, dtype=torch.float32)
        return noise, self.teacher.first_conditions(count)

    def shared_bytes(self) -> int:
        """Return 0: each pipeline has its own files."""
        return 0

    def own_modules(self, student: Student) -> Sequence[nn.Module]:
        """Return the network, and the autoencoder where there is one."""
        return [student.network] if self.autoencoder is None else [student.network, self.autoencoder]
