"""Run by ``test_kills``: a run in forked processes, each killed at a random moment, until one comes to its end.

The first two kills may come while the export is tried, the others come after it.

python killed_training.py RECIPE FOLDER KILLS
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch

import fmm_distill.run.distill  # noqa: F401 once, not in every process
from fmm_distill.cli import main

# Looks at a process that has ended without taking its status.
ALIVE = os.WEXITED | os.WNOHANG | os.WNOWAIT


def is_tried(folder: str) -> bool:
    return Path(folder, "trial.json").exists()


def train(recipe: str, folder: str, dies_at_call: int, *, early: bool) -> None:
    """The command line up to the end of training; at a call of what makes files durable the process dies."""
    calls = 0

    def deadly(function):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += early or is_tried(folder)
            if calls and calls == dies_at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    sys.argv = ["fmm-distill", "--recipe", recipe, "--output", folder]
    with (
        # A process that is killed leaves the answer of a shared server to the next one.
        patch("fmm_distill.export.verify.subprocess", subprocess),
        patch("fmm_distill.run.distill.finish"),
        patch("os.fsync", deadly(os.fsync)),
        patch("os.rename", deadly(os.rename)),
        patch("os.replace", deadly(os.replace)),
        patch("os.rmdir", deadly(os.rmdir)),
        patch("os.unlink", deadly(os.unlink)),
    ):
        main()


def forked(recipe: str, folder: str, seconds: float | None, dies_at_call: int, *, early: bool = False) -> int:
    """The exit status of one try: minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            train(recipe, folder, dies_at_call, early=early)
        os._exit(0)
    if seconds is not None:
        while not early and not is_tried(folder) and os.waitid(os.P_PID, child, ALIVE) is None:
            time.sleep(0.05)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    recipe, folder, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
    draw = random.Random(0)
    statuses, steps = [], []
    for kill in range(kills):
        by_time = kill % 2 == 0
        seconds, call = (draw.uniform(0.5, 1.5), 0) if by_time else (None, draw.randint(1, 40))
        statuses.append(forked(recipe, folder, seconds, call, early=kill < 2))
        found = sorted(Path(folder, "checkpoints").glob("step-*"))
        steps.append(int(found[-1].name.removeprefix("step-")) if found else 0)
    statuses.append(forked(recipe, folder, None, 0))
    print(json.dumps({"statuses": statuses, "steps": steps}))
