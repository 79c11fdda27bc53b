"""``fmm-distill env``: versions and device, for a bug report."""

from __future__ import annotations

import click

__all__ = ["env"]


@click.command()
def env() -> None:
    """Print the versions and the device for a bug report."""
    from fmm_distill.run.folder import environment

    for name, value in environment().items():
        click.echo(f"{name}: {value}")
