"""Encodings of the images that a pipeline is called with."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from fmm_distill.teachers.recording import patched_method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fmm_distill.teachers.prompts import Prompts

__all__ = ["encoding_by_mode"]


@contextmanager
def encoding_by_mode(pipeline: Any, prompts: Prompts) -> Iterator[None]:  # noqa: ANN401 a diffusers class
    """Encode images to the mode of their latents inside of the context, and not to a draw.

    Stored conditions are then a function of the image alone. Pipelines that draw add noise of the standard deviation
    that the autoencoder gives, which is far below that of the latents.
    """
    with ExitStack() as stack:
        for part in pipeline.components.values() if prompts.images else ():
            if isinstance(part, nn.Module) and callable(getattr(part, "encode", None)):
                stack.enter_context(patched_method(part, "encode", _by_mode))
        yield


def _by_mode(original: Callable[..., Any]) -> Callable[..., Any]:
    def encode(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 those of the autoencoder
        encoded = original(*args, **kwargs)
        posterior: Any = encoded[0] if isinstance(encoded, tuple) else getattr(encoded, "latent_dist", None)
        if hasattr(posterior, "mode") and hasattr(posterior, "sample"):
            posterior.sample = lambda generator=None: posterior.mode()
        return encoded

    return encode
