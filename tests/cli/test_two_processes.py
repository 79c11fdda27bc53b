"""The whole command on two processes, from the folder to the export."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cli.runs import checkpoints, losses
from tests.processes import on_two_processes


def launched(*command):
    # `accelerate launch --cpu` starts one process with any settings; on GPUs it does what is done here.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, *map(str, command)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("start", [on_two_processes, pytest.param(launched, marks=pytest.mark.slow)])
def test_a_run_on_two_processes_gives_the_numbers_of_one_process(tmp_path, tiny, finished, start):
    command = ["--recipe", tiny, "--output", tmp_path / "run"]
    command += ["--set", "evaluation.every=5", "--set", "logging.trackers=[tensorboard]"]
    run = start("fmm_distill", *command)
    assert run.returncode == 0, run.stderr
    # Only the first process speaks and writes.
    lines = run.stdout.splitlines()
    assert "evaluating" in lines
    assert len(set(lines)) == len(lines)
    assert checkpoints(tmp_path / "run") == checkpoints(finished[0])
    ours, theirs = losses(tmp_path / "run"), losses(finished[0])
    assert [line[0] for line in ours] == [line[0] for line in theirs]
    # Unequal in the last digits, or it was one process.
    assert ours != theirs
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=2e-3)


END = """
import atexit, os, sys
import torch.distributed as distributed
from fmm_distill.cli import main

class Destroyed:
    def __del__(self, write=os.write):
        write(1, b"destroyed\\n")

atexit.register(os.write, 1, b"registered\\n")
held = Destroyed()
if "connected" in sys.argv:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
sys.argv = ["fmm-distill", "losses", "--nowhere"]
main()
"""


@pytest.mark.parametrize("connected", [True, False])
def test_a_process_of_several_ends_without_destructors(connected):
    """They abort some runs after all is written; what is registered for the end of Python still runs."""
    command = [sys.executable, "-c", END, *(["connected"] if connected else [])]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    assert run.stdout.splitlines() == ["registered", *([] if connected else ["destroyed"])]
    assert run.stderr.startswith("error: No such option")
