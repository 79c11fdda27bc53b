"""Two processes, of which the first one works, fails on purpose, and fails by a fault; each writes how it ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate import Accelerator

from fmm_distill.errors import UserError
from fmm_distill.training.process import on_first


def refuse() -> None:
    raise UserError("no room")


def break_down() -> None:
    raise RuntimeError("a fault")


accelerator, ends = Accelerator(cpu=True), []
for work in (lambda: None, refuse, break_down):
    try:
        on_first(accelerator, work)
        ends.append(None)
    except (UserError, RuntimeError) as error:
        ends.append(f"{type(error).__name__}: {error}")
(Path(sys.argv[1]) / str(accelerator.process_index)).write_text(json.dumps(ends))
accelerator.end_training()
