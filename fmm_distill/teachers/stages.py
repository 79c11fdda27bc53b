"""The networks of a pipeline that has one for high noise levels and another one for low ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fmm_distill.core.staged import StagedNetwork, parts_of
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from fmm_distill.teachers.index import PipelineIndex

__all__ = ["boundary_of", "check_stages", "network_of", "networks_of"]

# The setting of a pipeline: the lowest time of its first network, as a fraction of the scheduler's timesteps. Without a
# value stock pipelines call the first network at all times, also where there is a second one.
_RATIO = "boundary_ratio"


def _second(component: str) -> str:
    return f"{component}_2"


def network_of(pipeline: Any, component: str) -> nn.Module:  # noqa: ANN401 a diffusers class
    """Return the network of a pipeline, or its two networks as one.

    Args:
        component: the name of the network, of the one of high noise levels where there are two.
    """
    network: nn.Module = getattr(pipeline, component)
    low = getattr(pipeline, _second(component), None)
    if low is None or boundary_of(pipeline) is None:
        return network
    return StagedNetwork(network, low, (component, _second(component)))


def networks_of(pipeline: Any, component: str) -> dict[str, Any]:  # noqa: ANN401 a diffusers class
    """Return the networks that a pipeline calls, by their names."""
    return parts_of(network_of(pipeline, component), component)


def boundary_of(pipeline: Any) -> float | None:  # noqa: ANN401 a diffusers class
    """Return the lowest timestep of the network of high noise levels; None: one network is called at all times."""
    ratio = pipeline.config.get(_RATIO)
    return None if ratio is None else float(ratio * pipeline.scheduler.config.num_train_timesteps)


def check_stages(index: PipelineIndex, component: str) -> str | None:
    """Check the networks of a pipeline, and return the name of the one of low noise levels; None: there is one network.

    Raises:
        UserError: if a second network is missing, or if it is unknown when the pipeline calls it.
    """
    settings = json.loads((index.folder / "model_index.json").read_text(encoding="utf-8"))
    ratio, second = settings.get(_RATIO), _second(component)
    kind = index.components[component][1]
    others = [name for name, (_, cls) in index.components.items() if cls == kind and name != component]
    if _RATIO not in settings and others:
        raise UserError(
            f"{index.source}: expected one network for all times, or two with a {_RATIO}, got a second {kind} "
            f"({others[0]}) without it; try a checkpoint with one network"
        )
    if ratio is None:
        return None
    if second not in index.components:
        raise UserError(
            f"{index.source}: expected a {second} for the times below {_RATIO} {ratio:g}, got none; try the complete "
            f"pipeline, or {_RATIO}: null in model_index.json, with which {component} is called at all times"
        )
    if not 0 < ratio < 1:
        raise UserError(
            f"{index.source}: expected a {_RATIO} between 0 and 1, with times of {component} and of {second}, got "
            f"{ratio:g}; try {_RATIO}: null in model_index.json, with which {component} is called at all times"
        )
    return second
