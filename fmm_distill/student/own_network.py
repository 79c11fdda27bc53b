"""Networks that are no diffusers models, as the network of a student."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

from torch import nn

from fmm_distill.student.scaled_layers import Call, scale_layers
from fmm_distill.student.two_time import JumpEmbedding, Jumping

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import LearnedFlowMap

__all__ = ["MapNetwork", "TwoTimeNetwork"]


class TwoTimeNetwork(Jumping, nn.Module):
    """A copy of any network with the length h of the jump as one more input, ``network(..., h=h)``.

    It is the counterpart of ``two_time``, which makes a diffusers class. Without h it is the network. The state dict
    has the network's weights under ``network.`` and the new ones under ``jump_embedding.``.

    Args:
        hosts: the layers whose output h is added to, by name, and the number of their features.
        guidance_range: the scales of guidance that the network takes as ``w=w``; None: it takes none.
        scaled: the layers whose weights change with h, by name, and the ranks of their changes.
        diagonal: whether these layers have a change at h = 0 too.
    """

    def __init__(
        self,
        network: nn.Module,
        hosts: Mapping[str, int],
        guidance_range: tuple[float, float] | None = None,
        scaled: Mapping[str, int] | None = None,
        *,
        diagonal: bool = False,
    ) -> None:
        super().__init__()
        # A copy: training must not change the teacher, whose parameters are frozen.
        self.network = copy.deepcopy(network).requires_grad_()
        guided = guidance_range is not None
        self.jump_embedding = nn.ModuleList([JumpEmbedding(width, guided) for width in hosts.values()])
        self.guidance_range = guidance_range
        self.call_state, self.changes_weights = Call(), bool(scaled)
        scale_layers(self.network, dict(scaled or {}), self.call_state, diagonal=diagonal)
        for index, name in enumerate(hosts):
            self.network.get_submodule(name).register_forward_hook(functools.partial(self._add_jump, index))

    def forward(
        self,
        *args: Any,  # noqa: ANN401 the network's own
        h: Float[Tensor, " batch"] | None = None,
        w: Float[Tensor, " batch"] | None = None,
        **kwargs: Any,  # noqa: ANN401 as above
    ) -> Any:  # noqa: ANN401 as above
        """Call the network; h is the length of the jump, w the scale of guidance where there is a range."""
        fraction = None
        if w is not None and self.guidance_range is not None:
            low, high = self.guidance_range
            fraction = (w - low) / (high - low)
        with self.jumping(self.call_state.of(h, fraction)):
            return self.network(*args, **kwargs)


class MapNetwork(nn.Module):
    """A flow map of the user's own as the network of a student, so that its calls can be counted and compiled.

    Args:
        flow_map: takes ``mean_velocity_of_jump(x, t, h, cond)``.
    """

    def __init__(self, flow_map: LearnedFlowMap) -> None:
        super().__init__()
        self.flow_map = flow_map

    def forward(
        self,
        x: Float[Tensor, "batch *event"],
        t: Float[Tensor, " batch"],
        h: Float[Tensor, " batch"],
        cond: Conditioning | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """Return u of the jump of length h that starts at t."""
        return self.flow_map.mean_velocity_of_jump(x, t, h, cond)
