"""The exporter of teachers without a pipeline: the student's weights and configuration."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import save_file

from fmm_distill.errors import UserError
from fmm_distill.student.scaled import scaled_ranks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["NETWORK", "SCALED", "WEIGHTS", "WeightsExporter"]

NETWORK = "network"
# The key of a configuration that names the scaled layers, as those of diffusers networks do.
SCALED = "scaled_layers"
WEIGHTS = "diffusion_pytorch_model.safetensors"


class WeightsExporter:
    """Saves the student's network alone, in ``network/``; see ``Exporter`` for the attributes.

    A network of diffusers is saved as ``save_pretrained`` writes it, with the code of the second time. Of another one
    there are the weights and the name of its class. ``load_student`` puts them into the student of the same teacher.

    Args:
        reason: why there is no pipeline.
    """

    component = NETWORK

    def __init__(self, teacher: Teacher, reason: str) -> None:
        self.teacher = teacher
        self.not_any_step: str | None = reason
        self.not_fixed: str | None = reason

    def any_step(self, student: Student, folder: Path, *, linked: bool = False) -> None:
        """Write weights and configuration."""
        network, target = cast("Any", student.network), folder / NETWORK
        if hasattr(network, "save_pretrained"):
            # One file: load_student reads it by its name.
            network.save_pretrained(target, safe_serialization=True, max_shard_size="1TB")
            return
        target.mkdir()
        # safetensors refuses strided tensors.
        state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
        save_file(state, target / WEIGHTS)
        kind = type(network)
        config = {"_class_name": kind.__name__, "module": kind.__module__, SCALED: scaled_ranks(network)}
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def fixed(self, student: Student, steps: int, folder: Path) -> None:
        """Refuse: there is no pipeline to fold a student into."""
        raise UserError(f"export.steps: expected none, got {steps}; {self.not_fixed}")

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """Return the schedule's own grid."""
        return self.teacher.schedule.grid(steps)

    def shared_bytes(self) -> int:
        """Return 0: there are no other components."""
        return 0

    def own_modules(self, student: Student) -> Sequence[nn.Module]:
        """Return the network."""
        return [student.network]
