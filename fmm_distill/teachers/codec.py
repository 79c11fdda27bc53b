"""From a teacher's samples to images or sounds and back."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from fmm_distill.errors import UserError
from fmm_distill.teachers.components import open_pipeline
from fmm_distill.teachers.recording import replaced, run_pipeline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor, nn

__all__ = ["Codec", "LatentCodec", "PipelineCodec", "Pixels", "Waves"]


class Codec(Protocol):
    """Samples to images in [-1, 1] and back."""

    def decode(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch channels height width"]:
        """Images of samples, in the range -1 to 1 (not clipped)."""
        ...

    def encode(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch *event"]:
        """Samples of images in the range -1 to 1."""
        ...


class Pixels:
    """A teacher whose samples are images."""

    def decode(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """The samples themselves."""
        return x

    def encode(self, images: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """The images themselves."""
        return images


class Waves:
    """A teacher whose samples are sounds, shape ``[batch, channels, length]``, in [-1, 1]."""

    def decode(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """The samples themselves."""
        return x

    def encode(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch *event"]:
        """Not known.

        Raises:
            UserError: always.
        """
        raise UserError("--data: the teacher makes sounds, and data are images (not yet); take none")


class LatentCodec:
    """A stock autoencoder: ``latents = (mode of encode(images) - shift) * scaling_factor``.

    Args:
        autoencoder: ``AutoencoderKL``, ``AutoencoderDC``, ``VQModel`` or another whose ``decode`` gives ``.sample``.
    """

    def __init__(self, autoencoder: Any) -> None:  # noqa: ANN401 a diffusers class
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.factor = float(autoencoder.config.scaling_factor)
        self.shift = float(autoencoder.config.get("shift_factor") or 0.0)

    @torch.no_grad()
    def decode(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch channels height width"]:
        """Images of latents."""
        own = next(self.autoencoder.parameters())
        latents = (x / self.factor + self.shift).to(own.device, own.dtype)
        images: Tensor = self.autoencoder.decode(latents).sample
        return images.to(x)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch *event"]:
        """The most likely latents of images."""
        own = next(self.autoencoder.parameters())
        encoded = self.autoencoder.encode(images.to(own.device, own.dtype))
        latents: Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return ((latents - self.shift) * self.factor).to(images)


class PipelineCodec:
    """A stock pipeline's own way from its last sample to an image: the pipeline is run with its network left out.

    It is opened when it is first needed: until then its encoders take no memory.
    """

    def __init__(self, folder: Path, component: str, network: nn.Module, call: dict[str, Any], keys: Any) -> None:  # noqa: ANN401
        self.folder, self.component, self.network, self.keys = folder, component, network, keys
        self.call = call | {"output_type": "np", "return_dict": False}
        self._pipeline: Any = None

    @torch.no_grad()
    def decode(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch channels *size"]:
        """Images (or frames, shape ``[batch, channels, frames, height, width]``) of samples, one after the other."""
        if self._pipeline is None:
            self._pipeline = open_pipeline(self.folder, **{self.component: self.network})
        device = next(self.network.parameters()).device
        self._pipeline.to(device)
        images = []
        for row in x.to(device).split(1):
            with (
                replaced(self.network, "forward", self._silent),
                replaced(self._pipeline.scheduler, "step", _ends(row)),
            ):
                made = run_pipeline(self._pipeline, self.call | {"generator": None})[0]
            images.append(torch.as_tensor(made).movedim(-1, 1).float() * 2 - 1)
        return torch.cat(images).to(x.device)

    def encode(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch *event"]:
        """Not known: a pipeline that starts from prompts has no way back.

        Raises:
            UserError: always.
        """
        raise UserError("--data: a pipeline that starts from prompts has no way from images to its samples; take none")

    def _silent(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The network's answer of the right shape, without asking it."""

        def forward(*args: Any, **kwargs: Any) -> _Both:  # noqa: ANN401 the network's own
            x = args[0] if args else next(iter(kwargs.values()))
            if isinstance(x, list):
                return _Both([torch.zeros_like(row) for row in x])
            config = cast("Any", self.network).config
            learned = config.get("out_channels") == 2 * config.get("in_channels", 0)
            return _Both(torch.cat([torch.zeros_like(x)] * (2 if learned else 1), 1))

        return forward


class _Both(tuple[Any, Any]):
    """An output of a stock network or scheduler, however it is read."""

    def __new__(cls, value: Any) -> _Both:  # noqa: ANN401 a tensor or a list of them
        return super().__new__(cls, (value, value))

    @property
    def sample(self) -> Any:  # noqa: ANN401 as above
        """A network's."""
        return self[0]

    prev_sample = sample


def _ends(row: Tensor) -> Callable[[Any], Callable[..., _Both]]:
    """A scheduler's step that ends at ``row`` wherever it starts."""

    def make(original: Callable[..., Any]) -> Callable[..., _Both]:
        parameters = inspect.signature(original)

        def step(*args: Any, **kwargs: Any) -> _Both:  # noqa: ANN401 the scheduler's own
            sample = parameters.bind(*args, **kwargs).arguments["sample"]
            # One pipeline hands its scheduler frames in place of samples.
            frames = row.ndim == sample.ndim + 1
            return _Both(row.transpose(1, 2).reshape(sample.shape) if frames else row)

        return step

    return make
