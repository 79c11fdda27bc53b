"""The processes of the CIFAR-10 experiment, each with a log, which are timed and stopped together."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Processes"]

ROOT = Path(__file__).parents[2]
# Steps before the speed of a process is constant.
WARM = 3


class Processes:
    """Processes of one run, each with a log in ``logs``.

    Args:
        parallel: the number of processes at a time, which divide the cores.
    """

    def __init__(self, logs: Path, parallel: int) -> None:
        self.logs, self.running = logs, dict[str, subprocess.Popen[bytes]]()
        self.environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": str(max(1, min(2, (os.cpu_count() or 1) // parallel))),
        }

    def start(self, name: str, command: list[str]) -> None:
        """Start a process that appends its output to its log."""
        self.logs.mkdir(exist_ok=True)
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=self.environment, cwd=ROOT)
        self.running[name] = process

    def start_distilling(self, name: str, recipe: Path, output: Path) -> None:
        """Start to train a student with the package's own command."""
        command = [sys.executable, "-m", "fmm_distill", "--recipe", str(recipe), "--output", str(output)]
        self.start(name, command)

    def wait_for_one(self) -> list[str]:
        """Wait until a process ends, if any runs, and return the names of those that ended without error."""
        while self.running and not self.finished():
            time.sleep(0.2)
        return [name for name in self.finished() if self.code(name) == 0]

    def finished(self) -> list[str]:
        """Return the names of ended processes whose exit code was not requested yet."""
        for name, process in self.running.items():
            self._reap(name, process)
        return [name for name, process in self.running.items() if process.returncode is not None]

    def cpu_seconds(self, name: str) -> float:
        """Return the CPU seconds of the processes of this name, over all calls."""
        file = self._cpu_file(name)
        return float(file.read_text(encoding="utf-8")) if file.is_file() else 0.0

    def _cpu_file(self, name: str) -> Path:
        return self.logs / f"{name}.cpu-seconds"

    def _reap(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """Update the exit code, as ``poll`` does, and record the CPU time, which ``poll`` doesn't return."""
        if process.returncode is not None:
            return
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = self.cpu_seconds(name) + usage.ru_utime + usage.ru_stime
            self._cpu_file(name).write_text(f"{seconds:.3f}", encoding="utf-8")

    def code(self, name: str, seconds: float = 0.0) -> int:
        """Return the exit code of a process, which is stopped after so many seconds; a code other than 0 is printed."""
        process = self.running[name]
        if not self._wait(name, process, seconds):
            process.send_signal(signal.SIGTERM)
            if not self._wait(name, process, 8):
                process.kill()
                self._wait(name, process, math.inf)
        code: int = process.returncode
        del self.running[name]
        if code:
            print(f"{name}: ended with exit code {code}; see {self.logs / name}.log", flush=True)
        return code

    def _wait(self, name: str, process: subprocess.Popen[bytes], seconds: float) -> bool:
        """Return whether the process ends within so many seconds."""
        until = time.monotonic() + seconds
        while True:
            self._reap(name, process)
            if process.returncode is not None:
                return True
            if time.monotonic() > until:
                return False
            time.sleep(0.05)

    def stop(self) -> None:
        """Send SIGTERM to all processes, which then save and stop, and wait for them."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for name in list(self.running):
            self.code(name, 8)

    def kill(self, names: list[str]) -> None:
        """Kill processes whose results are not needed."""
        for name in names:
            self.running[name].kill()
            self._wait(name, self.running[name], math.inf)
            del self.running[name]

    def _is_running(self, name: str) -> bool:
        self._reap(name, self.running[name])
        return self.running[name].returncode is None

    def step_seconds(self, logs: dict[str, Path], seconds: float, left: Callable[[], float]) -> dict[str, float]:
        """Return the device seconds per image of each process: its time in a step, divided by the number of processes.

        Args:
            logs: the JSON lines that each process writes, one per step.
            seconds: duration of the measurement, after the speed of all processes is constant.
            left: returns the seconds that are left.
        """
        if not logs:
            return {}
        while left() > 0 and any(count(log) < WARM and self._is_running(name) for name, log in logs.items()):
            time.sleep(0.1)
        before = {name: count(log) for name, log in logs.items()}
        time.sleep(max(min(seconds, left()), 0))
        found = {}
        for name, log in logs.items():
            lines = lines_of(log)[before[name] :]
            # A step may be longer than the measurement: the last one counts then.
            lines = lines or lines_of(log)[-1:]
            if lines and self._is_running(name):
                found[name] = statistics.mean(1 / json.loads(line)["images_per_second"] for line in lines) / len(logs)
        return found


def lines_of(log: Path) -> list[str]:
    """Return the complete lines of a log that is being written."""
    return log.read_text(encoding="utf-8").split("\n")[:-1] if log.is_file() else []


def count(log: Path) -> int:
    return len(lines_of(log))
