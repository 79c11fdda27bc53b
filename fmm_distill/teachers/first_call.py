"""The first call of a stock network: any error of it becomes one line, with the shape and the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.errors import UserError
from fmm_distill.teachers.call_errors import format_shape, refuse_call
from fmm_distill.teachers.components import STOCK_ERRORS

if TYPE_CHECKING:
    from fmm_distill.teachers.base import Teacher

__all__ = ["check_first_call", "check_latents", "image_size"]


def image_size(sample_size: Any, source: str, file: str) -> tuple[int, int]:  # noqa: ANN401 whatever JSON holds
    """Return height and width of a network's samples, from the ``sample_size`` of its configuration.

    Args:
        file: the name of the configuration, for messages.

    Raises:
        UserError: if it is neither a positive integer nor two of them.
    """
    if sample_size is None:
        raise UserError(f"{source}: expected sample_size, the image size, in {file}, got none; try to add it there")
    size = [sample_size, sample_size] if isinstance(sample_size, int) else sample_size
    numbers = isinstance(size, list | tuple) and all(type(side) is int and side > 0 for side in size)
    if not numbers or len(size) != 2:
        raise UserError(
            f"{source}: {file} has sample_size {sample_size!r}; expected one positive integer, or [height, width]; "
            "try to set it there"
        )
    return size[0], size[1]


@torch.no_grad()
def check_first_call(teacher: Teacher) -> None:
    """Call the network at both ends of its schedule.

    Raises:
        UserError: if it does not run, changes the shape, or returns numbers that are not finite.
    """
    # At the ends, where a prediction is multiplied by the largest factors.
    ends = torch.tensor([teacher.schedule.t_min, teacher.schedule.t_max], dtype=torch.float64)
    # Two samples: a network that mixes up its batch dimension fails here.
    x, source = torch.zeros(2, *teacher.event_shape), teacher.source
    try:
        cond = None if teacher.conditions is None else teacher.conditions.pick(torch.zeros(2))
        output = teacher.parametrization.call(
            teacher.network, x, teacher.schedule.network_time(ends).float(), cond, None
        )
        if output.shape != x.shape:
            raise UserError(
                f"{source}: its {type(teacher.network).__name__} makes {format_shape(tuple(output.shape[1:]))} of a "
                f"sample of {format_shape(teacher.event_shape)}; expected the same shape; try a sample_size that its "
                "blocks halve evenly"
            )
        velocity = teacher.velocity(x, ends, cond)
    except STOCK_ERRORS as error:
        raise refuse_call(source, teacher.network, teacher.event_shape, error) from error
    if not velocity.isfinite().all():
        raise UserError(
            f"{source}: expected finite outputs at the ends of its scheduler's times, got NaN or infinite numbers; try "
            "the scheduler that the network was trained with"
        )


def check_latents(network: Any, autoencoder: Any, source: str) -> None:  # noqa: ANN401 diffusers classes
    """Check that the latents of an autoencoder have as many channels as the network's samples.

    Raises:
        UserError: otherwise.
    """
    own, other = network.config.get("in_channels"), autoencoder.config.get("latent_channels")
    if isinstance(own, int) and isinstance(other, int) and own != other:
        raise UserError(
            f"{source}: its {type(network).__name__} has samples of {own} channels, its {type(autoencoder).__name__} "
            f"latents of {other}; expected the same number; try to download the pipeline again"
        )
