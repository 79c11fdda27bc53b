"""The state of torch in this process: modes that a caller has changed are suspended in this package, then restored."""

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

# Devices with an autocast state of their own.
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def own_state() -> Iterator[None]:
    """Set the modes of torch that this package computes with, and restore the caller's.

    Autocast, inference mode, ``no_grad`` and a default device are suspended in this thread. Default dtype, precision of
    matrix products, strictness of deterministic algorithms and the states of the global random generators belong to
    the process: the first of several active calls sets them, the last restores them.

    Raises:
        UserError: inside of a ``torch.func`` transform or a level of forward mode, which can't be suspended.
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
    """Return descriptions of the caller's modes that ``own_state`` suspends."""
    found = [f"torch.autocast({device!r})" for device in _AUTOCAST if torch.is_autocast_enabled(device)]
    if torch.is_inference_mode_enabled():
        found.append("torch.inference_mode()")
    elif not torch.is_grad_enabled():
        found.append("torch.no_grad()")
    if torch.get_default_dtype() != torch.float32:
        found.append(f"the default dtype {str(torch.get_default_dtype()).removeprefix('torch.')}")
    if torch.get_default_device().type != "cpu":
        found.append(f"the default device {torch.get_default_device()}")
    if any(backend.fp32_precision != "ieee" for backend in _product_backends()) or _matmul() not in (None, "highest"):
        found.append("a lower precision of float32 matrix products")
    return found


def _check_levels() -> None:
    # torch has no public way to read the active levels.
    if torch.autograd.forward_ad._current_level >= 0:
        raise UserError(
            "expected no active forward mode, got torch.autograd.forward_ad.dual_level(); try to leave it first"
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UserError(
            "expected no active transform, got a torch.func transform (grad, vmap, jvp, ...); try to leave it first"
        )


def _matmul() -> str | None:
    """Return the precision of float32 matrix products; None: it was set by torch's newer switches."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _product_backends() -> tuple[Any, ...]:
    """Return the backends with torch's newer switches, if the caller has used them; the older can't be read then."""
    if _matmul() is not None:
        return ()
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.mkldnn.matmul


class _Shared:
    """The state of the process: set by the first of several active calls, restored by the last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.active = 0
        self.saved: dict[str, Any] = {}

    def __enter__(self) -> None:
        with self.lock:
            if self.active == 0:
                self.saved = self._save()
                self._set()
            # Counted, since calls of several threads may end in any order.
            self.active += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.active -= 1
            if self.active == 0:
                self._restore()

    def _save(self) -> dict[str, Any]:
        # Reading the generator of a device that is not initialized would initialize it.
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return {
            "dtype": torch.get_default_dtype(),
            "matmul": _matmul(),
            "products": [(backend, backend.fp32_precision) for backend in _product_backends()],
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
        if self.saved["matmul"] not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        for backend, _ in self.saved["products"]:
            backend.fp32_precision = "ieee"
        if self.saved["deterministic"] == 2:
            # In error mode, an operation without a deterministic form would stop a run in the middle.
            torch.set_deterministic_debug_mode("warn")
        # numpy's defaults: in a caller's ``raise`` mode an underflow would end a run.
        np.seterr(divide="warn", over="warn", under="ignore", invalid="warn")

    def _restore(self) -> None:
        saved = self.saved
        torch.set_default_dtype(saved["dtype"])
        if saved["matmul"] is not None and saved["matmul"] != _matmul():
            torch.set_float32_matmul_precision(saved["matmul"])
        for backend, precision in saved["products"]:
            backend.fp32_precision = precision
        if saved["deterministic"] != torch.get_deterministic_debug_mode():
            torch.set_deterministic_debug_mode(saved["deterministic"])
        if saved["threads"] != torch.get_num_threads():
            torch.set_num_threads(saved["threads"])
        # The package has generators of its own, but stock networks and pipelines may draw from the global ones.
        torch.set_rng_state(saved["torch"])
        if saved["cuda"] is not None:
            torch.cuda.set_rng_state(saved["cuda"])
        np.random.set_state(saved["numpy"])
        random.setstate(saved["random"])
        np.seterr(**saved["errors"])


_shared = _Shared()
