"""The conditions of a teacher: class labels, or the embeddings of prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from fmm_distill.core.conditioning import Conditioning
from fmm_distill.errors import UserError
from fmm_distill.teachers.prompts import Prompts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["WITHOUT", "Classes", "Conditions", "Embeddings", "ImageGuidance", "NullInputs"]

# Before the name of an input of the empty prompt, among the inputs of a prompt.
WITHOUT = "without the prompt."


class Conditions(Protocol):
    """A finite set of conditions.

    Attributes:
        names: one per condition.
        noun: the name of what they are, such as ``classes`` or ``prompts``.
    """

    noun: str
    names: tuple[str, ...]

    def pick(self, positions: Float[Tensor, " batch"]) -> Conditioning:
        """Return the conditions at these positions in [0, 1); every condition has an interval of the same length."""
        ...

    def check_null(self) -> None:
        """Check that the network has an unconditional input.

        Raises:
            UserError: otherwise.
        """
        ...

    def null(self, cond: Conditioning) -> Conditioning:
        """Return the unconditional inputs of the network, for samples with these conditions.

        Raises:
            UserError: if the network has none.
        """
        ...


def _index(positions: Tensor, count: int) -> Int[Tensor, " batch"]:
    # Rounding can lift the largest position below 1 to ``count``.
    return (positions.cpu() * count).long().clamp_max(count - 1)


class Classes:
    """Class labels from 0 to count - 1.

    Args:
        names: one per class.
        null_label: the label for no class; None: the network has none.
        keyword: of the network's call.
    """

    noun = "classes"

    def __init__(self, names: tuple[str, ...], null_label: int | None, keyword: str = "class_labels") -> None:
        self.names, self.null_label, self.keyword = names, null_label, keyword

    def pick(self, positions: Float[Tensor, " batch"]) -> Conditioning:
        """Return the labels at these positions."""
        return Conditioning({self.keyword: _index(positions, len(self.names))})

    def check_null(self) -> None:
        """Check that there is a label for no class."""
        # A label of another class in its place would guide away from that class.
        if self.null_label is None:
            raise UserError(
                "guidance: expected a label for no class, got a class-conditional teacher without one; try "
                "guidance.scale 1"
            )

    def null(self, cond: Conditioning) -> Conditioning:
        """Return the label for no class."""
        self.check_null()
        return Conditioning({self.keyword: torch.full_like(cond.inputs[self.keyword], cast("int", self.null_label))})


@dataclass(frozen=True)
class NullInputs:
    """The network's inputs of the empty prompt.

    Attributes:
        row: one row of each input, for all samples.
        own: inputs that are those of the sample itself, such as its image.
        per_image: inputs that are a function of the sample's image, such as a prompt's embedding next to the image.
        norm_axis: the axis of the guided output's norms; see ``Guidance``.
    """

    row: Conditioning
    own: frozenset[str] = frozenset()
    per_image: frozenset[str] = frozenset()
    norm_axis: int = 0

    def add_to(self, rows: Conditioning, empty: Conditioning) -> Conditioning:
        """Return embeddings of prompts with the inputs of the empty prompt that are a function of the image.

        Args:
            empty: the embeddings of the empty prompt with each image.
        """
        more = {WITHOUT + name: value for name, value in empty.inputs.items() if name in self.per_image}
        return replace(rows, inputs={**rows.inputs, **more})

    def of(self, cond: Conditioning) -> Conditioning:
        """Return the unconditional inputs for samples with these conditions."""
        count = len(cond)
        inputs = {}
        for name, row in self.row.inputs.items():
            if name in self.own:
                inputs[name] = cond.inputs[name]
            elif name in self.per_image:
                inputs[name] = cond.inputs[WITHOUT + name]
            else:
                # Contiguous, as the rows of a batch are: some networks take views of them.
                inputs[name] = row.expand(count, *row.shape[1:]).contiguous()
        return replace(self.row, inputs=inputs)


@dataclass(frozen=True)
class ImageGuidance:
    """The second guidance of a pipeline, by its image.

    Attributes:
        keyword: of its scale in the pipeline's call.
        null: the network's inputs without prompt and image.
    """

    keyword: str
    null: NullInputs


class Embeddings:
    """The embeddings of prompts, one row per prompt, and of the empty prompt.

    Args:
        names: the prompts.
        empty: the inputs of the empty prompt; None: guidance can't use it.
        reason: why ``empty`` is None, for messages.
        images: by keyword of the pipeline's call, the image of each prompt; empty: the pipeline takes none.
        image_guidance: the pipeline's second guidance; None: it has none.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        rows: Conditioning,
        empty: NullInputs | None,
        reason: str = "",
        images: Mapping[str, tuple[Any, ...]] | None = None,
        image_guidance: ImageGuidance | None = None,
    ) -> None:
        self.names, self.prompts, self.empty, self.reason = names, rows, empty, reason
        self.image_guidance = image_guidance
        self.images: Mapping[str, tuple[Any, ...]] = images or {}
        self.noun = ("prompts and images" if any(names) else "images") if self.images else "prompts"

    @property
    def given(self) -> Prompts:
        """The arguments of the pipeline's call for the prompts."""
        return Prompts(self.names, self.images)

    def pick(self, positions: Float[Tensor, " batch"]) -> Conditioning:
        """Return the embeddings of the prompts at these positions."""
        return self.prompts.rows(_index(positions, len(self.names)))

    def check_null(self) -> None:
        """Check that there are embeddings of the empty prompt."""
        if self.empty is None:
            raise UserError(f"guidance: {self.reason}; try guidance.scale 1")

    def null(self, cond: Conditioning) -> Conditioning:
        """Return the embeddings of the empty prompt."""
        self.check_null()
        return cast("NullInputs", self.empty).of(cond)

    def check_without_image(self) -> None:
        """Check that the pipeline guides by its image too.

        Raises:
            UserError: otherwise.
        """
        if self.image_guidance is None:
            raise UserError(
                "guidance.image_scale: expected 1 for a pipeline without a second guidance by its image, as "
                "InstructPix2Pix has it; leave it out"
            )

    def without_image(self, cond: Conditioning) -> Conditioning:
        """Return the inputs without prompt and image."""
        self.check_without_image()
        return cast("ImageGuidance", self.image_guidance).null.of(cond)
