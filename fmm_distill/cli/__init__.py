"""The command line: bare, it distils; the rest are verbs, one file each. Heavy imports stay in command bodies."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import NoReturn

import click

from fmm_distill.cli.distill import distil
from fmm_distill.cli.env import env
from fmm_distill.cli.evaluate import evaluate
from fmm_distill.cli.export import export
from fmm_distill.cli.inspect import inspect
from fmm_distill.cli.losses import losses
from fmm_distill.cli.publish import publish
from fmm_distill.cli.recipes import recipes
from fmm_distill.cli.sample import sample
from fmm_distill.cli.status import status
from fmm_distill.errors import FmmDistillError, UserError
from fmm_distill.stopping import TrainingStoppedError

__all__ = ["command", "main"]

command = distil
for verb in (inspect, status, sample, evaluate, export, publish, recipes, losses, env):
    command.add_command(verb)


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit 2, a failed run one line and exit 3."""
    # OpenMP's threads spin while they wait: beside another busy process on two cores a step took nine times as long.
    # Waiting passively costs a tenth when alone. The user's own setting wins.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Of the processes that a launcher starts the first one prints, --help and --dry-run included.
    rank = os.environ.get("RANK", "0")
    first = rank == "0"
    # Another process may fail alone, for want of memory or of a file on its machine: it says which one it is.
    error_line = "error: {}" if first else f"process {rank}: error: {{}}"
    try:
        with nullcontext() if first else Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere or sys.stdout):
            command(prog_name="fmm-distill", standalone_mode=False)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "fmm-distill"
        _end(error_line.format(f"{error.format_message()} (see {where} --help)"), 2)
    except click.Abort:
        _end("stopped; the same command goes on where it was" if first else None, 130)
    except TrainingStoppedError as error:
        # All processes stop together.
        _end(str(error) if first else None, 128 + error.signal)
    except UserError as error:
        _end(error_line.format(error), 2)
    except FmmDistillError as error:
        _end(error_line.format(error), 3)


def _end(line: str | None, status: int) -> NoReturn:
    if line is not None:
        click.echo(line, err=True)
    sys.exit(status)
