"""Other ways to compute the same networks, each compared with the plain one before it is used."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.checkpoint import checkpoint

from fmm_distill.core.derivatives.engines import derivative_in_r
from fmm_distill.core.derivatives.precision import without_tensor_float
from fmm_distill.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from fmm_distill.config.settings import TrainingSettings
    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import LearnedFlowMap
    from fmm_distill.teachers.base import Distillable

    Points = tuple[Tensor, Tensor, Tensor, Conditioning | None]

__all__ = ["accelerate_networks", "checkpoint_blocks", "network_of"]

logger = logging.getLogger(__name__)

# Compiled float32 arithmetic is in another order; half precision compiles to the same number of digits.
TOLERANCE = 1e-3


def accelerate_networks(training: TrainingSettings, student: LearnedFlowMap, teacher: Distillable, at: Points) -> None:
    """Switch on ``training.gradient_checkpointing`` and ``training.compile``, if they change nothing.

    Args:
        at: x, t, r and a condition where values, derivatives and gradients are compared.

    Raises:
        UserError: if a network takes no such option, or answers otherwise with it.
    """
    options: list[tuple[str, Callable[[], None]]] = []
    if training.gradient_checkpointing:
        options.append(("training.gradient_checkpointing", lambda: checkpoint_blocks(student)))
    if training.compile != "none":
        options.append((f"training.compile: {training.compile}", lambda: _compile(training.compile, student, teacher)))
    for name, switch_on in options:
        before = _answers(student, teacher, at)
        try:
            switch_on()
            after = _answers(student, teacher, at)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"{name}: {type(network_of(student)).__name__} does not run with it "
                f"({first_line(error)}); wanted the setting left out"
            ) from error
        differences = {key: _difference(after[key], before[key]) for key in before}
        worst = max(differences, key=lambda key: differences[key])
        if not differences[worst] <= TOLERANCE:
            raise UserError(
                f"{name}: the {worst} differs by {differences[worst]:.1e} (relative) from the plain network's, above "
                f"{TOLERANCE:g}; wanted the setting left out"
            )
        logger.info(
            f"{name}: compared with the plain networks, largest relative difference {differences[worst]:.0e} ({worst})"
        )


def network_of(student: LearnedFlowMap) -> nn.Module:
    """The network of a student, which may be the map itself."""
    return cast("nn.Module", getattr(student, "network", student))


@without_tensor_float()
def _answers(student: LearnedFlowMap, teacher: Distillable, at: Points) -> dict[str, list[Tensor]]:
    """Values, the derivative in r and the gradients of both."""
    x, t, r, cond = at
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    u = student.mean_velocity(x, t, r, cond)
    value = torch.autograd.grad(u.square().mean(), trained, allow_unused=True)
    du_dr = derivative_in_r(student, x, t, r, cond=cond, engine="central")
    # The derivative itself is zero in a student that was never trained; its gradient is not.
    slope = torch.autograd.grad(du_dr.mean(), trained, allow_unused=True)
    with torch.no_grad():
        teachers = teacher.velocity(x, t, cond)
    found: dict[str, list[Any]] = {
        "teacher's velocity": [teachers],
        "student's velocity": [u.detach()],
        "student's gradient": list(value),
        "gradient of the derivative in r": list(slope),
    }
    return {name: [part for part in parts if part is not None] for name, parts in found.items()}


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Of all parts together, relative to their size."""
    if len(ours) != len(theirs):
        return float("inf")
    change = sum(float((a - b).double().square().sum()) for a, b in zip(ours, theirs, strict=True))
    size = sum(float(b.double().square().sum()) for b in theirs)
    return float((change / max(size, torch.finfo(torch.float64).tiny)) ** 0.5)


def checkpoint_blocks(student: LearnedFlowMap) -> None:
    """Let the network's blocks be computed again in the backward pass, with the jump that they were computed with.

    The backward pass comes when other calls have been made, or none is under way.
    """
    told = cast("Any", network_of(student))

    def checkpointed(block: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401 the network's own
        jump = told.jump

        def again(*inputs: Any) -> Any:  # noqa: ANN401 as above
            with told.jumping(jump):
                return block(*inputs)

        return checkpoint(again, *args, use_reentrant=False)

    told.enable_gradient_checkpointing(checkpointed)
    student.needs_functional_jvp = True


def _compile(backend: str, student: LearnedFlowMap, teacher: Distillable) -> None:
    """Compile both networks where they stand: names of weights and the modules themselves stay."""
    network_of(student).compile(backend=backend)
    if isinstance(network := getattr(teacher, "network", None), torch.nn.Module):
        network.compile(backend=backend)
