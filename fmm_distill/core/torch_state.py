"""torch's state in this process: what a caller has changed is set aside while this package works, then restored."""

from __future__ import annotations

import random
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["changed_state", "own_state"]

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def own_state() -> Iterator[None]:
    """Set torch's modes to those that this package computes with, and restore the caller's.

    Autocast, inference mode, ``no_grad`` and a default device are set aside in this thread. Default dtype, precision of
    matrix products, strictness of deterministic algorithms and the states of the global random generators belong to
    the process: the first call that is active sets them, and the last restores them.

    Raises:
        UserError: inside of a ``torch.func`` transform or a level of forward mode, which can't be set aside.
    """
    _check_levels()
    with _shared, ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in _AUTOCAST:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def changed_state() -> list[str]:
    """The modes of the caller that ``own_state`` sets aside, in words."""
    found = [f"torch.autocast({device!r})" for device in _AUTOCAST if torch.is_autocast_enabled(device)]
    if torch.is_inference_mode_enabled():
        found.append("torch.inference_mode()")
    elif not torch.is_grad_enabled():
        found.append("torch.no_grad()")
    if torch.get_default_dtype() != torch.float32:
        found.append(f"the default dtype {str(torch.get_default_dtype()).removeprefix('torch.')}")
    if torch.get_default_device().type != "cpu":
        found.append(f"the default device {torch.get_default_device()}")
    if any(place.fp32_precision != "ieee" for place in _products()) or _matmul() not in (None, "highest"):
        found.append("a lower precision of float32 matrix products")
    return found


def _check_levels() -> None:
    # Private, and the only places where torch has them.
    if torch.autograd.forward_ad._current_level >= 0:
        raise UserError(
            "called inside of torch.autograd.forward_ad.dual_level(), which can't be nested: leave it first"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UserError("called inside of a torch.func transform (grad, vmap, jvp, ...): leave it first")


def _matmul() -> str | None:
    """The precision of float32 matrix products; None where torch's newer switches have set it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _products() -> tuple[Any, ...]:
    """Where torch's newer switches are, if they are what the caller has used: the older one refuses to be read then."""
    if _matmul() is not None:
        return ()
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.mkldnn.matmul


class _Shared:
    """State of the process: set by the first of the calls that are active together, restored by the last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.active = 0
        self.kept: dict[str, Any] = {}

    def __enter__(self) -> None:
        with self.lock:
            if self.active == 0:
                self.kept = self._keep()
                self._set()
            self.active += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.active -= 1
            if self.active == 0:
                self._restore()

    def _keep(self) -> dict[str, Any]:
        # Other devices' generators are not asked for: that would start the device.
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return {
            "dtype": torch.get_default_dtype(),
            "matmul": _matmul(),
            "products": [(place, place.fp32_precision) for place in _products()],
            "deterministic": torch.get_deterministic_debug_mode(),
            "threads": torch.get_num_threads(),
            "torch": torch.get_rng_state(),
            "cuda": cuda,
            "numpy": np.random.get_state(),
            "random": random.getstate(),
            "errors": np.geterr(),
        }

    def _set(self) -> None:
        torch.set_default_dtype(torch.float32)
        if self.kept["matmul"] not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        for place, _ in self.kept["products"]:
            place.fp32_precision = "ieee"
        if self.kept["deterministic"] == 2:
            # An operation without a deterministic form would end a run in the middle.
            torch.set_deterministic_debug_mode("warn")
        np.seterr(divide="warn", over="warn", under="ignore", invalid="warn")

    def _restore(self) -> None:
        kept = self.kept
        torch.set_default_dtype(kept["dtype"])
        if kept["matmul"] is not None and kept["matmul"] != _matmul():
            torch.set_float32_matmul_precision(kept["matmul"])
        for place, precision in kept["products"]:
            place.fp32_precision = precision
        if kept["deterministic"] != torch.get_deterministic_debug_mode():
            torch.set_deterministic_debug_mode(kept["deterministic"])
        if kept["threads"] != torch.get_num_threads():
            torch.set_num_threads(kept["threads"])
        torch.set_rng_state(kept["torch"])
        if kept["cuda"] is not None:
            torch.cuda.set_rng_state(kept["cuda"])
        np.random.set_state(kept["numpy"])
        random.setstate(kept["random"])
        np.seterr(**kept["errors"])


_shared = _Shared()
