"""The command line: bare, it distills; the rest are verbs, one file each. Heavy imports stay in command bodies."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

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
    """Run the command line; a user's mistake is one line on stderr and exit 2, a failed run one line and exit 3."""
    # OpenMP's threads spin while they wait: beside another busy process on two cores a step took nine times as long.
    # Waiting passively costs a tenth when alone. The user's own setting wins.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Of the processes that a launcher starts the first one prints, --help and --dry-run included.
    first = os.environ.get("RANK", "0") == "0"
    with lossy_streams(last=True) as (out, _):
        with nullcontext() if first else Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere or sys.stdout):
            line, status = _run()
        out.flush()
        # A pipe's reader that has seen enough is no error, and a run does not end with its lines.
        if status == 0 and out.lost is not None and not isinstance(out.lost, BrokenPipeError):
            line = f"standard output could not be written ({out.lost.strerror}): lines of it are lost"
            status = 0 if _is_run(sys.argv[1:]) else 2
        if line is not None:
            click.echo(line, err=True)
    if line is not None or status:
        sys.exit(status)


def _run() -> tuple[str | None, int]:
    """The command of ``sys.argv``: its line for stderr and its exit status."""
    rank = os.environ.get("RANK", "0")
    first = rank == "0"
    # Another process may fail alone, for want of memory or of a file on its machine: it says which one it is.
    error_line = "error: {}" if first else f"process {rank}: error: {{}}"
    try:
        _check_text(sys.argv[1:])
        command(prog_name="fmm-distill", standalone_mode=False)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "fmm-distill"
        text = " ".join(error.format_message().split())
        return error_line.format(f"{text}{_recipe_of(sys.argv[1:], error)} (see {where} --help)"), 2
    except click.Abort:
        return "stopped; the same command goes on where it was" if first else None, 130
    except TrainingStoppedError as error:
        # All processes stop together.
        return str(error) if first else None, 128 + error.signal
    except UserError as error:
        return error_line.format(error), 2
    except FmmDistillError as error:
        return error_line.format(error), 3
    return None, 0


def _recipe_of(arguments: list[str], error: click.UsageError) -> str:
    """The option that is missing before the name of a recipe."""
    from fmm_distill.config.recipe import recipe_names

    known = "No such command" in error.format_message() and arguments[:1] and arguments[0] in recipe_names()
    return f" `fmm-distill --recipe {arguments[0]}` distills by that recipe." if known else ""


def _check_text(arguments: list[str]) -> None:
    """Refuse arguments that are no text in this process's encoding: names with them could not be logged or exported."""
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            shown = argument.encode("utf-8", "backslashreplace").decode()
            raise UserError(
                f"{shown}: expected a name in UTF-8; rename it, or start with PYTHONUTF8=1 in the environment"
            )


def _is_run(arguments: list[str]) -> bool:
    """Whether the bare command distilled, which leaves everything in its folder."""
    given = {argument.partition("=")[0] for argument in arguments}
    return "--recipe" in given and not given & {"--dry-run", "--help", "-h", "--version"}
