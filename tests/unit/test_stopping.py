"""Signals of the caller are its own again after a run, also after an error."""

from __future__ import annotations

import ctypes
import signal

import pytest

from fmm_distill.training.signals import stop_requests

HANDLERS = {"default": signal.SIG_DFL, "ignored": signal.SIG_IGN, "python": lambda *_: None}


def stopped(number: int) -> None:
    with stop_requests() as request:
        signal.raise_signal(number)
        raise ZeroDivisionError(request.signal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("handler", HANDLERS)
def test_a_handler_is_put_back(number, handler):
    before = signal.signal(number, HANDLERS[handler])
    try:
        with pytest.raises(ZeroDivisionError, match=str(int(number))):
            stopped(number)
        assert signal.getsignal(number) == HANDLERS[handler]
    finally:
        signal.signal(number, before)


def test_a_handler_of_another_library_stays():
    before = signal.getsignal(signal.SIGTERM)
    called = []
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(called.append)
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGTERM), handler)
    known = signal.getsignal
    try:
        # Python knows of no handler that a library has installed before it started.
        signal.getsignal = lambda number: None if number == signal.SIGTERM else known(number)
        with stop_requests() as request:
            signal.raise_signal(signal.SIGTERM)
        assert request.signal == 0
        assert called == [signal.SIGTERM]
    finally:
        signal.getsignal = known
        signal.signal(signal.SIGTERM, before)
