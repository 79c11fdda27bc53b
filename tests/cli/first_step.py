"""Run by ``test_imports``: the command line up to the end of the first training step; prints what is loaded then.

python first_step.py JOBS ANSWERS ARGUMENTS

JOBS and ANSWERS are the streams of the server that verifies exports.
"""

from __future__ import annotations

import json
import sys

from fmm_distill.cli import command
from fmm_distill.export import verify
from fmm_distill.training.trainer import Trainer
from tests.processes import ForkServer


class FirstStepError(Exception):
    """Ends the run."""


step_of = Trainer.train_step


def step(self: Trainer, *given: object) -> None:
    step_of(self, *given)
    raise FirstStepError


if __name__ == "__main__":
    Trainer.train_step = step
    jobs, answers, *arguments = sys.argv[1:]
    verify.subprocess = ForkServer.attached(int(jobs), int(answers))
    try:
        command(arguments, standalone_mode=False)
    except FirstStepError:
        print("\n" + json.dumps(sorted(sys.modules)))
