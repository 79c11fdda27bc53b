"""Codecs: conversions between the samples of a teacher and images or sounds."""

from __future__ import annotations

import copy
import inspect
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from fmm_distill.core.staged import parts_of, stages_of
from fmm_distill.errors import UserError
from fmm_distill.io.hashes import sha256_of_tensors
from fmm_distill.teachers.components import open_pipeline
from fmm_distill.teachers.guiders import turn_guiders_off
from fmm_distill.teachers.recording import patched_method, run_pipeline, tensor_of
from fmm_distill.teachers.stepped_samples import to_stepped

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor, nn

__all__ = ["Codec", "LatentCodec", "PipelineCodec", "Pixels", "Waves", "decoded_of", "encoder_of", "is_sound"]

# The largest difference of a decoded image between a pipeline and its autoencoder alone.
_TOLERANCE = 1e-3
# Batch, channels and length.
_AXES_OF_SOUND = 3


class Codec(Protocol):
    """Converts samples to images in [-1, 1] and back.

    Attributes:
        outputs: the name of what decoded samples are, ``images`` or ``audios``, as pipelines name their output.
        autoencoder: the ``VQModel`` or other autoencoder that decodes; None: there is none, or the pipeline has it.
    """

    outputs: str
    autoencoder: Any | None

    def decode(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch channels height width"]:
        """Decode samples to images in [-1, 1], not clipped."""
        ...

    def encode(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch *event"]:
        """Encode images in [-1, 1] to samples."""
        ...


class Pixels:
    """A teacher whose samples are images."""

    outputs = "images"
    autoencoder: Any | None = None

    def decode(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Return the samples."""
        return x

    def encode(self, images: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Return the images."""
        return images


class Waves:
    """A teacher whose samples are sounds, shape ``[batch, channels, length]``, in [-1, 1]."""

    outputs = "audios"
    autoencoder: Any | None = None

    def decode(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Return the samples."""
        return x

    def encode(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch *event"]:
        """Refuse: sounds are not supported as data.

        Raises:
            UserError: always.
        """
        raise UserError("--data: expected none for a teacher of sounds (sounds are no data yet); try none")


class LatentCodec:
    """A stock autoencoder: ``latents = (mode of encode(images) - shift) * scaling_factor``.

    Args:
        autoencoder: ``AutoencoderKL``, ``AutoencoderDC``, ``VQModel`` or another whose ``decode`` gives ``.sample``.
        event_shape: of the teacher's samples, where they have further axes of length 1; None: that of the latents.
        shifted: whether the shift of its configuration is applied; some pipelines leave it out.
    """

    outputs = "images"

    def __init__(
        self,
        autoencoder: Any,  # noqa: ANN401 a diffusers class
        event_shape: tuple[int, ...] | None = None,
        *,
        shifted: bool = True,
    ) -> None:
        self.autoencoder, self.event_shape = autoencoder.eval().requires_grad_(False), event_shape
        self.factor = float(autoencoder.config.scaling_factor)
        self.shift = float(autoencoder.config.get("shift_factor") or 0.0) if shifted else 0.0

    @torch.no_grad()
    def decode(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch channels height width"]:
        """Decode latents to images."""
        own = next(self.autoencoder.parameters())
        latents = (x / self.factor + self.shift).to(own.device, own.dtype)
        images: Tensor = self.autoencoder.decode(latents).sample
        return images.to(x)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch *event"]:
        """Encode images to the mode of their latents."""
        own = next(self.autoencoder.parameters())
        encoded = self.autoencoder.encode(images.to(own.device, own.dtype))
        if hasattr(encoded, "latent_dist"):
            # Not a draw: stored latents are a function of the image alone.
            latents: Tensor = encoded.latent_dist.mode()
        else:
            latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        latents = ((latents - self.shift) * self.factor).to(images)
        return latents if self.event_shape is None else latents.reshape(-1, *self.event_shape)

    def to(self, device: torch.device | str) -> LatentCodec:
        """Move the autoencoder to ``device``, and return the codec."""
        self.autoencoder.to(device)
        return self

    def digest(self) -> str:
        """Return a digest of weights and factors, equal for codecs that encode images to the same latents."""
        prefix = f"{type(self.autoencoder).__name__} {self.factor} {self.shift}"
        return sha256_of_tensors(self.autoencoder.state_dict(), prefix)


class PipelineCodec:
    """Decodes by a stock pipeline: the pipeline is run with zeros in the place of its network's output.

    It is opened at the first call: until then its encoders take no memory.

    Args:
        component: the name of the network in the pipeline.
        call: keywords of a call of the pipeline for one sample; what it is of has no effect on the decoding.
        event_shape: the shape of a sample.
        output_shape: of the network's output for a sample, which may have a learned variance, and lack channels or
            tokens of a condition that are in the network's input; None: ``event_shape``.
        positions: of a sample's numbers among those of the scheduler's; see ``find_positions``.
    """

    outputs = "images"
    autoencoder: Any | None = None

    def __init__(
        self,
        folder: Path,
        component: str,
        network: nn.Module,
        call: dict[str, Any],
        event_shape: tuple[int, ...],
        output_shape: tuple[int, ...] | None = None,
        positions: Tensor | None = None,
    ) -> None:
        self.folder, self.component, self.network = folder, component, network
        self.event_shape, self.output_shape = event_shape, output_shape or event_shape
        self.positions = positions
        self.call = call | {"output_type": "np", "return_dict": False, "generator": None}
        self._pipeline: Any = None

    @torch.no_grad()
    def decode(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch channels *size"]:
        """Decode samples, one at a time, to images, frames or sounds; see ``decoded_of``."""
        device = next(self.network.parameters()).device
        pipeline = self.opened().to(device)
        images = []
        # One at a time: the call has one prompt, and a batch of decoded videos may not fit into memory.
        for row in x.to(device).split(1):
            with ExitStack() as stack:
                for network in stages_of(self.network):
                    stack.enter_context(patched_method(network, "forward", self._zero_output))
                stack.enter_context(patched_method(pipeline.scheduler, "step", _ends(row, self.positions)))
                # A copy: some pipelines change the lists that they are called with.
                made = run_pipeline(pipeline, copy.deepcopy(self.call))
            images.append(decoded_of(made))
        return torch.cat(images).to(x.device)

    def encode(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch *event"]:
        """Encode images to samples by the pipeline's autoencoder alone; see ``encoder``."""
        return self.encoder(tuple(images.shape[1:])).encode(images)

    @torch.no_grad()
    def encoder(self, shape: tuple[int, ...]) -> LatentCodec:
        """Return the pipeline's autoencoder, after a check that the pipeline decodes as the autoencoder alone does.

        Args:
            shape: of an image, (channels, height, width).

        Raises:
            UserError: if the pipeline has no such autoencoder, or packs, scales or shifts its latents in another way.
        """
        vae = getattr(self.opened(), "vae", None)
        reason = self._no_encoder(vae, shape)
        if reason is None:
            # Smooth, and different in every channel: a wrong factor, shift or order changes the decoded image.
            height, width = (torch.linspace(-0.7, 0.7, size) for size in shape[1:])
            probe = ((height[:, None] + width).sin() * torch.linspace(-1, 1, shape[0])[:, None, None])[None]
            plain = tuple(LatentCodec(vae).encode(probe).shape[1:])
            # Axes of length 1, such as the single frame of a video, need no packing.
            if [n for n in plain if n > 1] != [n for n in self.event_shape if n > 1]:
                own, theirs = (" x ".join(map(str, axes)) for axes in (self.event_shape, plain))
                reason = f"its samples are {own}, its autoencoder's latents {theirs}: it packs them"
            else:
                reason = "it does not decode its samples by its autoencoder's factor and shift"
                for shifted in (True, False):
                    codec = LatentCodec(vae, self.event_shape, shifted=shifted)
                    if self._agrees(codec, probe, plain):
                        return codec
        raise UserError(
            f"--data: expected none or teacher: {type(self.opened()).__name__} can't encode images to its samples "
            f"({reason})"
        )

    @staticmethod
    def _no_encoder(vae: Any, shape: tuple[int, ...]) -> str | None:  # noqa: ANN401 a diffusers class
        if len(shape) != 3:
            return f"it makes samples of {' x '.join(map(str, shape))}, no images"
        if vae is None or vae.config.get("scaling_factor") is None:
            return "it has no autoencoder named vae with one scaling_factor"
        return None

    def _agrees(self, codec: LatentCodec, images: Tensor, plain: tuple[int, ...]) -> bool:
        """Decide whether the pipeline decodes as the autoencoder does, whose latents have the shape ``plain``."""
        latents = codec.encode(images)
        decoded, expected = codec.decode(latents.reshape(-1, *plain)).clamp(-1, 1), self.decode(latents)
        return expected.shape == decoded.shape and bool((expected.to(decoded) - decoded).abs().max() <= _TOLERANCE)

    def release(self) -> None:
        """Drop the pipeline until the next call: its text encoders are large."""
        self._pipeline = None

    def opened(self) -> Any:  # noqa: ANN401 a diffusers class
        """Return the pipeline, which is opened at the first call and stays open until ``release``."""
        if self._pipeline is None:
            self._pipeline = turn_guiders_off(open_pipeline(self.folder, **parts_of(self.network, self.component)))
        return self._pipeline

    def _zero_output(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward method whose output is zeros of the shape that the network's has."""

        def forward(*args: Any, **kwargs: Any) -> _Both:  # noqa: ANN401 the network's own
            x = args[0] if args else next(iter(kwargs.values()))
            # Of the first argument the number of rows alone: a condition may be joined to its channels.
            rows = tensor_of(x).new_zeros(len(x), *self.output_shape)
            return _Both(list(rows) if isinstance(x, list) else rows)

        return forward


def decoded_of(made: Any) -> Float[Tensor, "batch channels *size"]:  # noqa: ANN401 an array or a tensor
    """Return the output of a pipeline, or its first entry, as decoded samples, the channels after the batch.

    Images ``[batch, height, width, channels]`` and frames ``[batch, frames, height, width, channels]`` in [0, 1] become
    numbers in [-1, 1]. Sounds are in [-1, 1]; those of one channel have no axis of channels in some pipelines.
    """
    # Some pipelines return no tuple of one entry, but the entry itself.
    values = torch.as_tensor(made if isinstance(made, np.ndarray | torch.Tensor) else made[0]).float()
    if values.ndim > _AXES_OF_SOUND:
        return values.movedim(-1, 1) * 2 - 1
    return values.reshape(len(values), -1, values.shape[-1])


def is_sound(decoded: Tensor) -> bool:
    """Return whether decoded samples are sounds, ``[batch, channels, length]``, and not images or frames."""
    return decoded.ndim == _AXES_OF_SOUND


def encoder_of(codec: Codec, shape: tuple[int, ...]) -> LatentCodec:
    """Return the autoencoder of a teacher's samples, for images of this shape (channels, height, width).

    Raises:
        UserError: if no autoencoder encodes images to samples.
    """
    if isinstance(codec, PipelineCodec):
        return codec.encoder(shape)
    if isinstance(codec, LatentCodec):
        return codec
    raise UserError(f"--data: expected none, {type(codec).__name__} has no autoencoder to encode images with")


class _Both(tuple[Any, Any]):
    """The output of a stock network or scheduler, as a tuple and by attribute."""

    def __new__(cls, value: Any) -> _Both:  # noqa: ANN401 a tensor or a list of them
        return super().__new__(cls, (value, value))

    @property
    def sample(self) -> Any:  # noqa: ANN401 as above
        """The output of a network."""
        return self[0]

    prev_sample = sample


def _ends(row: Tensor, positions: Tensor | None) -> Callable[[Any], Callable[..., _Both]]:
    """Return a maker of scheduler steps that end at ``row`` from every start."""

    def make(original: Callable[..., Any]) -> Callable[..., _Both]:
        parameters = inspect.signature(original)

        def step(*args: Any, **kwargs: Any) -> _Both:  # noqa: ANN401 the scheduler's own
            sample = parameters.bind(*args, **kwargs).arguments["sample"]
            return _Both(to_stepped(row, tuple(sample.shape), positions))

        return step

    return make
