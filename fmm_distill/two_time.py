"""A stock diffusers network with a second time. Imports only torch and diffusers: it travels with the student."""

import contextlib
import functools
import inspect

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn


class JumpEmbedding(nn.Module):
    """``g(h) - g(0)``: a sinusoid of low frequency and two linear layers, the last one zero at the start.

    So h = 0 adds nothing, at any time of training. A bias of the last layer would cancel: there is none.
    ``guided`` adds another such term of the guidance, a share of its range.
    """

    num_frequencies = 32

    def __init__(self, width: int, guided: bool = False) -> None:
        super().__init__()
        self.guidance = JumpEmbedding(width) if guided else None
        self.linear_1 = nn.Linear(2 * self.num_frequencies, width)
        self.linear_2 = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.linear_2.weight)

    def forward(self, h: torch.Tensor, share: torch.Tensor | None = None) -> torch.Tensor:
        """Shape ``[batch]`` (the jump's length as a share of the whole way) to ``[batch, width]``."""
        jump = self.linear_2(self._hidden(h) - self._hidden(torch.zeros_like(h)))
        return jump if self.guidance is None else jump + self.guidance(share)

    def _hidden(self, h: torch.Tensor) -> torch.Tensor:
        # Angular frequencies from 10 down to 0.1 on h in [0, 1]: smooth enough to be differentiated.
        waves = get_timestep_embedding(h, 2 * self.num_frequencies, scale=10.0, max_period=100)
        return nn.functional.silu(self.linear_1(waves.to(self.linear_1.weight.dtype)))


class _TwoTime:
    """What ``two_time`` mixes into a stock class."""

    def __init__(
        self,
        *args: object,
        jump_hosts: list[str],
        jump_widths: list[int],
        guidance_range: list[float] | None = None,
        flow_map: dict | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(*args, **kwargs)
        own = {"jump_widths": jump_widths, "guidance_range": guidance_range, "flow_map": flow_map}
        self.register_to_config(jump_hosts=jump_hosts, **own)
        self.jump_embedding = nn.ModuleList([JumpEmbedding(width, guidance_range is not None) for width in jump_widths])
        # The jump's length and the guidance's share that are being told.
        self.jump = (None, None)
        for index, name in enumerate(jump_hosts):
            self.get_submodule(name).register_forward_hook(functools.partial(self._add_jump, index))

    def _add_jump(self, index: int, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        h, share = self.jump
        if h is None:
            return output
        jump = self.jump_embedding[index](h, share).to(output.dtype)
        # A network that embeds a time for every token or frame has several rows a sample.
        rows = output.numel() // output.shape[-1]
        return output + jump.repeat_interleave(rows // len(jump), 0).reshape(output.shape)

    @contextlib.contextmanager
    def jumping(self, jump: tuple):
        """Inside of it the network is told this jump."""
        before, self.jump = self.jump, jump
        try:
            yield
        finally:
            self.jump = before

    def guidance_share(self, w: torch.Tensor | None) -> torch.Tensor | None:
        """The scale of guidance as a share of its range."""
        if (w is None) != (self.config.guidance_range is None):
            wanted = "takes no w" if w is not None else f"wants w in {self.config.guidance_range} with h"
            raise ValueError(f"{type(self).__name__} {wanted}: the scale of guidance, one a sample")
        if w is None:
            return None
        low, high = self.config.guidance_range
        return (w - low) / (high - low)

    def forward(self, *args: object, h: torch.Tensor | None = None, w: torch.Tensor | None = None, **kwargs: object):
        """The stock forward; h, shape ``[batch]``, is the length of the jump as a share of the whole way.

        w, shape ``[batch]``, goes with h where there is a ``guidance_range``: the scale of guidance.
        """
        with self.jumping((None, None) if h is None else (h, self.guidance_share(w))):
            return super().forward(*args, **kwargs)


@functools.cache
def two_time(stock: type) -> type:
    """``TwoTime<stock>``: the stock network class that is also told the length h of the jump, ``model(..., h=h)``.

    Without h it is the stock model. Its configuration has four more entries: ``jump_hosts``, the layers at the ends of
    the time embeddings that h is added to, ``jump_widths``, how many features each gives, ``guidance_range``, the
    scales of guidance that it can be told by ``w=w``, and ``flow_map``, how a pipeline measures h. The state dict is
    the stock one's plus ``jump_embedding.*``.
    """
    name = f"TwoTime{stock.__name__}"
    made = type(name, (_TwoTime, stock), {"__module__": __name__, "__doc__": two_time.__doc__})
    # diffusers reads a configuration's keys from the signature.
    stock_parameters = [p for p in inspect.signature(stock.__init__).parameters.values() if p.kind != p.VAR_KEYWORD]
    own = [
        inspect.Parameter("jump_hosts", inspect.Parameter.KEYWORD_ONLY),
        inspect.Parameter("jump_widths", inspect.Parameter.KEYWORD_ONLY),
        inspect.Parameter("guidance_range", inspect.Parameter.KEYWORD_ONLY, default=None),
        inspect.Parameter("flow_map", inspect.Parameter.KEYWORD_ONLY, default=None),
    ]

    def __init__(self, *args: object, **kwargs: object) -> None:  # noqa: N807 it becomes the class's own
        _TwoTime.__init__(self, *args, **kwargs)

    __init__.__signature__ = inspect.Signature([*stock_parameters, *own])
    made.__init__ = __init__
    return made
