"""Jobs in forked children: a crash, an exit or a hang of one job does not end the others."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Outcome", "grown_mib", "run_forked"]

# Seconds between two looks at a child.
_POLL = 0.02


@dataclass(frozen=True)
class Outcome:
    """The end of a job.

    Attributes:
        value: what it returned; None if it failed.
        error: the exception in one line, or the reason why there is no value; None: it succeeded.
        trace: the traceback, for a person who looks for the cause.
    """

    value: dict[str, Any] | None
    error: str | None
    trace: str
    seconds: float


def run_forked(work: Callable[[], dict[str, Any]], seconds: float, log: Path) -> Outcome:
    """Run ``work`` in a forked child, and end the child with all its own children after the given seconds.

    Args:
        work: returns JSON values.
        log: the file for all that the child prints; its result is written next to it.
    """
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    start = time.monotonic()
    with warnings.catch_warnings():
        # The child uses no lock that another thread may hold: it computes on one thread of its own.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _run_child(work, log, result)
    try:
        status = _wait(pid, start + seconds)
    except BaseException:
        # An interrupt of the parent ends the child too.
        _end(pid)
        raise
    took = round(time.monotonic() - start, 1)
    if status is None:
        return Outcome(None, f"no end within {seconds:g} s", "", took)
    if not result.is_file():
        return Outcome(None, f"the process ended with status {os.waitstatus_to_exitcode(status)}", "", took)
    written = json.loads(result.read_text(encoding="utf-8"))
    return Outcome(written["value"], written["error"], written["trace"], took)


def grown_mib(before: int | None = None) -> int:
    """Return the largest memory of this process so far in MiB, less ``before``."""
    # Linux counts in KiB.
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return largest - (before or 0)


def _run_child(work: Callable[[], dict[str, Any]], log: Path, result: Path) -> None:
    # The threads of a parallel loop in the parent do not exist here: a loop that waits for them would hang.
    torch.set_num_threads(1)
    # A group of its own, so that programs that the job starts end with it.
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # The parent may have replaced these by objects that write elsewhere, as pytest does.
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
    written: dict[str, Any] = {"value": None, "error": None, "trace": ""}
    try:
        written["value"] = work()
    except BaseException as error:  # noqa: BLE001 an assertion or an exit of a job is its result too
        text = " ".join(str(error).split())
        written["error"] = f"{type(error).__name__}: {text}"
        written["trace"] = traceback.format_exc()
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps(written, default=repr), encoding="utf-8")
    partial.replace(result)
    sys.stdout.flush()
    sys.stderr.flush()
    # No clean-up of the parent's libraries.
    os._exit(0)


def _wait(pid: int, deadline: float) -> int | None:
    """Return the wait status of a child; None if it was ended at the deadline."""
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(_POLL)
    _end(pid)
    return None


def _end(pid: int) -> None:
    """End a child and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    # A child that has no group of its own yet has started nothing.
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
