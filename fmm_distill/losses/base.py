"""What every loss shares: the base of its settings, and the mean square of a residual."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast, get_args

import torch
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["DerivativeSettings", "LossSettings", "squared_norm"]


class Settings(BaseModel):
    """A closed, frozen group of settings: an unknown key is an error, and so is a value of a neighboring type.

    Of every group: numbers are finite, ``true`` is no number, a text with a number in it is one (YAML reads ``1e-4`` as
    text), and texts are not empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        kinds = {name: _kinds(cast("Any", field.annotation)) for name, field in cls.model_fields.items()}
        return {key: _as_number(part, kinds[key]) if key in kinds else part for key, part in value.items()}

    @field_validator("*")
    @classmethod
    def _texts(cls, value: object) -> object:
        if isinstance(value, dict):
            # Keywords of other people's calls, where an empty text has a meaning.
            _check_letters("".join(part for pair in value.items() for part in pair if isinstance(part, str)))
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, str):
                _check_text(part)
        return value


@cache
def _kinds(annotation: Any) -> frozenset[Any]:  # noqa: ANN401 a type or an alias of types
    """The types that an annotation is made of, those of elements included."""
    parts = get_args(annotation)
    return frozenset().union(*map(_kinds, parts)) if parts else frozenset([annotation])


def _as_number(value: object, kinds: frozenset[Any]) -> object:
    """A value of a field with numbers, which pydantic is to see without its own leniency; of a list its elements."""
    if not kinds & {int, float} or kinds & {bool, str}:
        return value
    if isinstance(value, list | tuple):
        return [_as_number(part, kinds) for part in value]
    if isinstance(value, bool):
        # As text it is refused: pydantic takes true for 1.
        return str(value).lower()
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d{1,3}", value.strip()):
        number = float(value)
        return int(number) if number.is_integer() else number
    return value


def _check_text(value: str) -> None:
    if not value.strip():
        raise ValueError("expected a text that is not empty; leave the setting out, or write null where it may be")
    _check_letters(value)


def _check_letters(value: str) -> None:
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError("expected text in UTF-8 without NUL characters")


class LossSettings(Settings):
    """Settings that every loss has.

    Attributes:
        summary: one sentence for ``fmm-distill losses``.
        paper: where the loss comes from.
        diagonal: whether it trains jumps of length 0 alone, so that r plays no part.
        takes: what the function takes besides the five arguments that all have: ``target_map``, a map whose outputs
            are targets (the student's own moving average, a frozen copy), and ``share``, uniform on [0, 1], shape
            ``[batch]``, which places a middle time.
    """

    summary: ClassVar[str]
    paper: ClassVar[str]
    diagonal: ClassVar[bool] = False
    takes: ClassVar[frozenset[str]] = frozenset()

    @property
    def follows(self) -> Literal["average", "frozen"] | None:
        """Which copy of the student makes the target's jumps, where one does."""
        target = getattr(self, "target", None) if "target_map" in self.takes else None
        if target == "average":
            return "average"
        return "frozen" if target == "frozen" else None

    @property
    def sees_no_teacher(self) -> bool:
        """Whether the loss only makes a map agree with itself, so that another one has to teach it the velocity."""
        return False

    def at_step(self, step: int) -> Self:
        """The settings in force at a step; those with a warm-up differ from step to step."""
        return self


class DerivativeSettings(LossSettings):
    """Settings of a loss that differentiates the map.

    Attributes:
        in_r: whether in the target time alone, where central differences are within 1e-3 of forward mode.
    """

    in_r: ClassVar[bool] = False

    derivative: Literal["auto", "exact", "central"] = "auto"
    """How derivatives are taken: forward mode, central differences, or whichever runs (it is said which)."""

    @property
    def differentiates(self) -> bool:
        """Whether a derivative is taken at all: not where a finite step stands in its place."""
        return True

    @property
    def keeps_graph(self) -> bool:
        """Whether gradients pass through the derivative."""
        return True


def squared_norm(residual: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
    """Mean over the event of the squared residual, in float32 at least."""
    return residual.flatten(1).to(torch.promote_types(residual.dtype, torch.float32)).square().mean(1)
