"""``fmm-distill losses [NAME]``: the losses, their papers, their requirements and their settings."""

from __future__ import annotations

import difflib
import json
import textwrap
from typing import TYPE_CHECKING, Literal, get_args, get_origin

import click

if TYPE_CHECKING:
    from fmm_distill.losses import Loss, MatchingLoss

__all__ = ["losses"]

_NEEDS = {"teacher": "a teacher", "self": "velocity: self with flow_matching as an extra loss", "data": "data"}
_MATCHING = "Losses of distribution matching, the second stage of a run, for the setting matching.loss:"
_NEEDS_OF_MATCHING = "a teacher and a critic, which the run trains; no data"


@click.command(short_help="List the losses, or show the settings of one.")
@click.argument("name", required=False)
def losses(name: str | None) -> None:
    """List the losses with their papers and their requirements; with NAME, the settings of one loss."""
    from fmm_distill.errors import UserError
    from fmm_distill.losses import matching_losses, registered_losses

    of_map, of_matching = registered_losses(), matching_losses()
    known: dict[str, type[Loss] | type[MatchingLoss]] = {**of_map, **of_matching}
    if name is None:
        for each, loss in of_map.items():
            click.echo(_entry(each, loss))
        click.echo(f"\n{_MATCHING}\n")
        for each, matching_loss in of_matching.items():
            click.echo(_entry(each, matching_loss))
        return
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        guess = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"losses: expected one of {', '.join(known)}, got {name}{guess}")
    click.echo(f"{_entry(name, known[name])}\n\n{_settings(known[name])}")


def _entry(name: str, loss: type[Loss] | type[MatchingLoss]) -> str:
    from fmm_distill.losses import Loss

    needs = _needs(loss) if issubclass(loss, Loss) else _NEEDS_OF_MATCHING
    summary = textwrap.indent(textwrap.fill(loss.summary, 96), "    ")
    return f"{name}\n{summary}\n    paper: {loss.paper}\n    needs: {needs}"


def _needs(loss: type[Loss]) -> str:
    """Return the sources of the velocity, and the extra loss that the default settings need."""
    sources = ("; or " if "self" in loss.velocities() else " or ").join(_NEEDS[source] for source in loss.velocities())
    if not loss.model_validate({}).needs_velocity_term:
        return sources
    return f"{sources}; and flow_matching as an extra loss{_exception(loss)}"


def _exception(loss: type[Loss]) -> str:
    """Return the settings without which a loss needs an extra loss, e.g. " unless target: ode"."""
    target = loss.model_fields.get("target")
    values = get_args(target.annotation) if target is not None and get_origin(target.annotation) is Literal else ()
    free = [value for value in values if not loss.model_validate({"target": value}).needs_velocity_term]
    return f" unless target: {' or '.join(free)}" if free else ""


def _settings(loss: type[Loss] | type[MatchingLoss]) -> str:
    """Return each setting with its default, followed by its description."""
    lines = []
    for key, field in loss.model_fields.items():
        if key == "name":
            continue
        default = loss.model_validate({}).model_dump(mode="json")[key]
        lines.append(f"{key}: {default if isinstance(default, str) else json.dumps(default)}")
        lines.append(textwrap.indent(textwrap.fill(field.description or "", 96), "    "))
    return "\n".join(lines)
