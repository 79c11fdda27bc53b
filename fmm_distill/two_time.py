"""A stock diffusers network with a second time. Imports only torch and diffusers: it travels with the student."""

import inspect

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn


class JumpEmbedding(nn.Module):
    """``g(h) - g(0)``: a sinusoid of low frequency and two linear layers, the last one zero at the start.

    So h = 0 adds nothing, at any time of training. A bias of the last layer would cancel: there is none.
    """

    num_frequencies = 32

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(2 * self.num_frequencies, width)
        self.linear_2 = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.linear_2.weight)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Shape ``[batch]`` (the jump's length as a share of all timesteps) to ``[batch, width]``."""
        return self.linear_2(self._hidden(h) - self._hidden(torch.zeros_like(h)))

    def _hidden(self, h: torch.Tensor) -> torch.Tensor:
        # Angular frequencies from 10 down to 0.1 on h in [0, 1]: smooth enough to be differentiated.
        waves = get_timestep_embedding(h, 2 * self.num_frequencies, scale=10.0, max_period=100)
        return nn.functional.silu(self.linear_1(waves.to(self.linear_1.weight.dtype)))


class TwoTimeUNet2DModel(UNet2DModel):
    """``UNet2DModel`` that is also told the length h of the jump: ``model(sample, timestep, h).sample``.

    Without h it is the stock model. The state dict is the stock one's plus ``jump_embedding.*``.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.jump_embedding = JumpEmbedding(self.time_embedding.linear_2.out_features)
        self._h = None
        self.time_embedding.register_forward_hook(self._add_jump)

    # diffusers reads a configuration's keys from here.
    __init__.__signature__ = inspect.signature(UNet2DModel.__init__)

    def _add_jump(self, module: nn.Module, args: tuple, embedding: torch.Tensor) -> torch.Tensor:
        return embedding if self._h is None else embedding + self.jump_embedding(self._h)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, h: torch.Tensor | None = None, return_dict=True):
        """The stock forward; h has shape ``[batch]`` and is ``(timestep - r_timestep) / num_train_timesteps``."""
        self._h = h
        try:
            return super().forward(sample, timestep, return_dict=return_dict)
        finally:
            self._h = None
