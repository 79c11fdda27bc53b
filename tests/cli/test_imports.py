"""What a run loads before its first step. transformers, peft and scipy are not in it: diffusers loads them itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from tests.processes import STOCK

# What draws and what measures, trackers, data, and what other ways to train use.
UNUSED = (
    "matplotlib",
    "torchmetrics",
    "torch.utils.tensorboard",
    "tensorboard",
    "tensorflow",
    "wandb",
    "datasets",
    "pandas",
    "pyarrow",
    "sklearn",
    "torchdiffeq",
    "torchvision",
    "onnx",
    "triton",
    "IPython",
    "fmm_distill.run.curves",
)


def test_a_run_loads_nothing_heavy_that_it_does_not_use(tmp_path):
    program = Path(__file__).with_name("first_step.py")
    STOCK.start()
    streams = (STOCK.jobs.fileno(), STOCK.answers.fileno())
    arguments = [*map(str, streams), "--recipe", "digits", "--set", "training.steps=1", "--set", "matching=null"]
    arguments += ["--output", str(tmp_path / "run")]
    changes = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command, environment = [sys.executable, str(program), *arguments], os.environ | changes
    done = subprocess.run(command, env=environment, pass_fds=streams, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"torch", "diffusers", "fmm_distill.training.trainer"} <= loaded
    assert [name for name in UNUSED if name in loaded] == []
    # What is not installed can't be loaded: of these the tests have those.
    assert all(find_spec(name) for name in ("matplotlib", "torchmetrics", "tensorboard", "datasets", "pandas"))
