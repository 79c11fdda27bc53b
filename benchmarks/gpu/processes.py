"""Processes of a stage, each with a log, which end with the stage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.machine import ROOT
from benchmarks.gpu.rows import NO_TIME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

__all__ = ["Background", "call", "last_line", "started"]


@contextmanager
def started(
    command: Sequence[str], log: Path, changes: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a Python process in its own group, which is killed at the end of the block.

    Args:
        changes: to the environment.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"} | dict(changes or {})
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children."""
    with suppress(ProcessLookupError):
        # The children of a launcher are in its group.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def call(command: Sequence[str], log: Path, changes: Mapping[str, str] | None = None) -> None:
    """Run a process to its end.

    Raises:
        RuntimeError: with the last line of the log, if the process fails.
    """
    with started(command, log, changes) as process:
        if process.wait():
            raise RuntimeError(f"exit {process.returncode}: {last_line(log)}")


def last_line(log: Path) -> str:
    """Return the last line of a log, usually an error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or line.startswith("error:")]
    return ([*lines, *errors] or ["no output"])[-1][:300]


class Background:
    """Background calls, a few at a time, which are killed at the end of the block."""

    def __init__(self, workers: int) -> None:
        self._pool, self._over = ThreadPoolExecutor(workers), threading.Event()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, command: Sequence[str], log: Path, changes: Mapping[str, str] | None = None) -> Future[None]:
        """Start a call as soon as the number of running calls permits."""
        return self._pool.submit(self._run, command, log, changes)

    def _run(self, command: Sequence[str], log: Path, changes: Mapping[str, str] | None) -> None:
        if self._over.is_set():
            raise RuntimeError(NO_TIME)
        with started(command, log, changes) as process:
            self._wait(process, self._over.wait)
            if process.poll() is None:
                raise RuntimeError(NO_TIME)
        if process.returncode:
            raise RuntimeError(f"exit {process.returncode}: {last_line(log)}")

    @staticmethod
    def _wait(process: subprocess.Popen[bytes], over: Callable[[float], bool]) -> None:
        while process.poll() is None and not over(0.1):
            pass
