"""The command line: bare, it distils; the rest are verbs, one file each. Heavy imports stay in command bodies."""

from __future__ import annotations

import os
import sys

import click

from fmm_distill.cli.distill import distil
from fmm_distill.cli.env import env
from fmm_distill.cli.evaluate import evaluate
from fmm_distill.cli.export import export
from fmm_distill.cli.inspect import inspect
from fmm_distill.cli.losses import losses
from fmm_distill.cli.recipes import recipes
from fmm_distill.cli.sample import sample
from fmm_distill.errors import FmmDistillError, UserError
from fmm_distill.stopping import TrainingStoppedError

__all__ = ["command", "main"]

command = distil
for verb in (inspect, sample, evaluate, export, recipes, losses, env):
    command.add_command(verb)


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit 2, a failed run one line and exit 3."""
    # OpenMP's threads spin while they wait: beside another busy process on two cores a step took nine times as long.
    # Waiting passively costs a tenth when alone. The user's own setting wins.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        command(prog_name="fmm-distill", standalone_mode=False)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "fmm-distill"
        click.echo(f"error: {error.format_message()} (see {where} --help)", err=True)
        sys.exit(2)
    except click.Abort:
        click.echo("stopped; the same command goes on from the newest checkpoint", err=True)
        sys.exit(130)
    except TrainingStoppedError as error:
        click.echo(str(error), err=True)
        sys.exit(128 + error.signal)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except FmmDistillError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(3)
