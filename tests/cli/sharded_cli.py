"""The command line where accelerate splits weights over processes: sharded_cli.py PRECISION ARGUMENTS."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator

from fmm_distill.cli import main
from tests.unit.split_training import split_weights

if __name__ == "__main__":
    torch.set_num_threads(1)
    precision = sys.argv.pop(1)
    # A process has one state: the command's own accelerator finds this one.
    split_weights(Accelerator(cpu=True, mixed_precision=precision), ["ResnetBlock2D"])
    main()
