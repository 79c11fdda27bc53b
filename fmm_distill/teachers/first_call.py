"""The first call of a network that others wrote: any fault of it is one line, with the shape and the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.errors import UserError, named
from fmm_distill.teachers.components import STOCK_ERRORS

if TYPE_CHECKING:
    from fmm_distill.teachers.base import Teacher

__all__ = ["check_first_call", "check_latents", "image_size", "refuse_call"]


def image_size(sample_size: Any, source: str, file: str) -> tuple[int, int]:  # noqa: ANN401 whatever JSON holds
    """Height and width of a network's samples, by the ``sample_size`` of its configuration.

    Args:
        file: the configuration's name, for messages.
    """
    if sample_size is None:
        raise UserError(f"{source}: {file} has no sample_size; expected the image size: add it there")
    size = [sample_size, sample_size] if isinstance(sample_size, int) else sample_size
    numbers = isinstance(size, list | tuple) and all(type(side) is int and side > 0 for side in size)
    if not numbers or len(size) != 2:
        raise UserError(
            f"{source}: {file} has sample_size {sample_size!r}; expected one whole number above 0, or [height, width]: "
            "set it there"
        )
    return size[0], size[1]


def refuse_call(owner: str, network: Any, shape: tuple[int, ...], error: Exception) -> UserError:  # noqa: ANN401
    """The refusal of a network that fails on its first call.

    Args:
        owner: the teacher or its pipeline.
        shape: of one sample.
    """
    return UserError(
        f"{owner}: its {type(network).__name__} does not run on a sample of {_by(shape)} ({named(error)}); expected a "
        "size, and inputs, that its blocks take: check its config.json"
    )


@torch.no_grad()
def check_first_call(teacher: Teacher) -> None:
    """Refuse a network that does not run, that gives another shape, or that its scheduler's ends make infinite.

    Raises:
        UserError: on any of these, whatever the network raises.
    """
    ends = torch.tensor([teacher.schedule.t_min, teacher.schedule.t_max], dtype=torch.float64)
    x, source = torch.zeros(2, *teacher.event_shape), teacher.source
    try:
        cond = None if teacher.conditions is None else teacher.conditions.pick(torch.zeros(2))
        output = teacher.parametrization.call(
            teacher.network, x, teacher.schedule.network_time(ends).float(), cond, None
        )
        if output.shape != x.shape:
            raise UserError(
                f"{source}: its {type(teacher.network).__name__} makes {_by(tuple(output.shape[1:]))} of a sample of "
                f"{_by(teacher.event_shape)}; expected the same shape: set a sample_size that its blocks halve evenly"
            )
        velocity = teacher.velocity(x, ends, cond)
    except STOCK_ERRORS as error:
        raise refuse_call(source, teacher.network, teacher.event_shape, error) from error
    if not velocity.isfinite().all():
        raise UserError(
            f"{source}: the network's output is not finite at the ends of its scheduler's times; expected a trained "
            "network, and a scheduler that belongs to it"
        )


def check_latents(network: Any, autoencoder: Any, source: str) -> None:  # noqa: ANN401 diffusers classes
    """Refuse an autoencoder whose latents have another number of channels than the network's samples."""
    own, other = network.config.get("in_channels"), autoencoder.config.get("latent_channels")
    if isinstance(own, int) and isinstance(other, int) and own != other:
        raise UserError(
            f"{source}: its {type(network).__name__} has samples of {own} channels, its {type(autoencoder).__name__} "
            f"latents of {other}; expected two that belong together: fetch the pipeline again"
        )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
