"""The command line: the bare command distills, and each verb has a file. Heavy imports are in the command bodies."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import click

from fmm_distill.cli.distill import distill
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
from fmm_distill.io.streams import lossy_streams
from fmm_distill.training.signals import TrainingStoppedError

__all__ = ["command", "main"]

command = distill
for verb in (inspect, status, sample, evaluate, export, publish, recipes, losses, env):
    command.add_command(verb)


def main() -> None:
    """Run the command line. A mistake of the user is one line on stderr and exit code 2, a failed run exit code 3."""
    # OpenMP's threads spin while they wait, which made a step nine times as long on two cores that another process
    # used as well. Passive waiting costs a tenth of a step on a free machine. A setting of the user has priority.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The first process of a launcher prints, also for --help and --dry-run.
    first = os.environ.get("RANK", "0") == "0"
    with lossy_streams(last=True) as (out, _):
        with nullcontext() if first else Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere or sys.stdout):
            line, status = _run()
        out.flush()
        # A reader that closes its pipe is no error, and a run is complete without its output.
        if status == 0 and out.lost is not None and not isinstance(out.lost, BrokenPipeError):
            line = f"standard output could not be written ({out.lost.strerror}); some lines are lost"
            status = 0 if _is_run(sys.argv[1:]) else 2
        if line is not None:
            click.echo(line, err=True)
    if _is_in_group():
        # In 3 of 100 runs of two processes a destructor of torch 2.13 aborts one of them at its end, and the launcher
        # then ends the others. All that a run has to write is written.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if line is not None or status:
        sys.exit(status)


def _is_in_group() -> bool:
    """Return whether this process is one of several that torch has connected."""
    distributed: Any = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _run() -> tuple[str | None, int]:
    """Run the command in ``sys.argv``; return its line for stderr and its exit code."""
    rank = os.environ.get("RANK", "0")
    first = rank == "0"
    # Another process may fail alone, for lack of memory or of a file on its machine, so its line has its rank.
    error_line = "error: {}" if first else f"process {rank}: error: {{}}"
    try:
        _check_text(sys.argv[1:])
        command(prog_name="fmm-distill", standalone_mode=False)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "fmm-distill"
        text = " ".join(error.format_message().split())
        return error_line.format(f"{text}{_recipe_of(sys.argv[1:], error)} (see {where} --help)"), 2
    except click.Abort:
        return "stopped; run the same command to resume" if first else None, 130
    except TrainingStoppedError as error:
        # All processes stop together.
        return str(error) if first else None, 128 + error.signal
    except UserError as error:
        return error_line.format(error), 2
    except FmmDistillError as error:
        return error_line.format(error), 3
    return None, 0


def _recipe_of(arguments: list[str], error: click.UsageError) -> str:
    """Return advice for the name of a recipe without ``--recipe``."""
    from fmm_distill.config.recipe import recipe_names

    known = "No such command" in error.format_message() and arguments[:1] and arguments[0] in recipe_names()
    return f" `fmm-distill --recipe {arguments[0]}` distills by that recipe." if known else ""


def _check_text(arguments: list[str]) -> None:
    """Refuse arguments that this process can't decode: such names can't be logged or exported."""
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            shown = argument.encode("utf-8", "backslashreplace").decode()
            raise UserError(
                f"{shown}: expected a name in UTF-8; rename it, or start with PYTHONUTF8=1 in the environment"
            )


def _is_run(arguments: list[str]) -> bool:
    """Tell if the bare command has distilled; its results are then in the run folder."""
    given = {argument.partition("=")[0] for argument in arguments}
    return "--recipe" in given and not given & {"--dry-run", "--help", "-h", "--version"}
