"""Contexts that switch off half precision and TensorFloat-32 around derivatives."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["full_precision", "without_tensor_float"]


def full_precision(like: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of ``like``.

    In half precision a tangent loses two digits, and a difference of two calls is noise.
    """
    # Autocast is a state of one device type, so the context needs the device of the calls.
    return torch.autocast(like.device.type, enabled=False)


@contextlib.contextmanager
def without_tensor_float() -> Iterator[None]:
    """Switch TensorFloat-32 off, the default of convolutions on a GPU.

    Its mantissa of 10 bits leaves no digits to the small difference of two calls. The backward pass of a difference is
    a difference as well. Forward mode subtracts nothing and may use TensorFloat-32.
    """
    # torch 2.8 has the older switches only. Later versions refuse to read them once the newer ones are set.
    switch, off = ("fp32_precision", "ieee") if hasattr(torch.backends.cudnn, "conv") else ("allow_tf32", False)
    convolutions: Any = getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
    backends: tuple[Any, ...] = (convolutions, torch.backends.cuda.matmul)
    before = [getattr(backend, switch) for backend in backends]
    try:
        for backend in backends:
            setattr(backend, switch, off)
        yield
    finally:
        for backend, setting in zip(backends, before, strict=True):
            setattr(backend, switch, setting)
