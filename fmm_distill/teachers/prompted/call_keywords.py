"""The keywords that a stock pipeline is called with, and the check of those that a user gives."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.errors import UserError
from fmm_distill.teachers.prompted.neutral import neutral_keywords
from fmm_distill.teachers.prompted.refused_keywords import refused_keyword

if TYPE_CHECKING:
    from fmm_distill.teachers.prompts import Prompts

__all__ = ["CallKeywords", "as_tuple", "check_keywords"]

# The scales of the first and of the last frame of a video.
_OVER_FRAMES = ("min_guidance_scale", "max_guidance_scale")


@dataclass(frozen=True)
class CallKeywords:
    """The keywords of a pipeline's call.

    Attributes:
        fixed: those with the same value in every call.
        guidance: the keyword of classifier-free guidance; None: the pipeline has none.
        first_guidance: the keyword of its scale at the first frame, where the scale changes over the frames of a video
            and ``guidance`` is that at the last; both are set to one scale.
        off: the value that turns guidance off.
        one_prompt: the pipeline takes one prompt at a time, no list.
        takes_prompt: the pipeline takes prompts, and not images alone.
    """

    fixed: dict[str, Any]
    guidance: str | None
    off: float
    one_prompt: bool = False
    takes_prompt: bool = True
    first_guidance: str | None = None

    @classmethod
    def of(cls, pipeline: Any, call: dict[str, Any], scale: float) -> CallKeywords:  # noqa: ANN401 a diffusers class
        """Return the keywords of a pipeline.

        Args:
            call: the keywords that the user gives.
            scale: the guidance scale of a network that is conditioned on it.
        """
        parameters = inspect.signature(pipeline.__call__).parameters
        # The user's own keywords win.
        fixed = {"output_type": "latent"} | neutral_keywords(parameters) | call
        takes_prompt = "prompt" in parameters
        if "true_cfg_scale" in parameters:
            # guidance_scale is then an input of the network itself, where there is one.
            own = {"guidance_scale": scale} if "guidance_scale" in parameters else {}
            return cls(fixed | own, "true_cfg_scale", 1.0, takes_prompt=takes_prompt)
        if parameters.keys() >= set(_OVER_FRAMES):
            first, last = _OVER_FRAMES
            return cls(fixed, last, 1.0, takes_prompt=takes_prompt, first_guidance=first)
        guidance = "guidance_scale" if "guidance_scale" in parameters else None
        return cls(fixed, guidance, 1.0, takes_prompt=takes_prompt)

    def with_guidance_input(self, scale: float) -> CallKeywords:
        """Return the keywords of a pipeline whose ``guidance_scale`` is an input of its network."""
        return replace(self, fixed=self.fixed | {"guidance_scale": scale}, guidance=None, off=1.0)

    def call(self, prompts: Prompts, steps: int, guidance: float | None = None) -> dict[str, Any]:
        """Return the keywords of a call with these prompts, or with the first one of a pipeline that takes no list.

        Args:
            guidance: its scale; None: without guidance.
        """
        own = prompts.keywords(one=self.one_prompt, prompt=self.takes_prompt)
        given = {**self.fixed, **own, "num_inference_steps": steps}
        # A new generator with one seed: each recorded run starts from the same noise.
        given["generator"] = torch.Generator().manual_seed(0)
        return given | self.guided(self.off if guidance is None else guidance)

    def guided(self, scale: float) -> dict[str, Any]:
        """Return the keywords of classifier-free guidance at this scale."""
        return {name: scale for name in (self.guidance, self.first_guidance) if name is not None}


def as_tuple(value: Any) -> Any:  # noqa: ANN401 any keyword
    """Return a list of numbers as a tuple, and any other value as it is."""
    numbers = isinstance(value, list) and value and all(isinstance(each, int | float) for each in value)
    return tuple(value) if numbers else value


def check_keywords(pipeline: Any, call: dict[str, Any]) -> None:  # noqa: ANN401 a diffusers class
    """Check that a pipeline takes these keywords.

    Raises:
        UserError: otherwise.
    """
    parameters, kind = inspect.signature(pipeline.__call__).parameters, type(pipeline).__name__
    if (refusal := refused_keyword(call)) is not None:
        raise UserError(refusal)
    wrong = [key for key in call if key not in parameters]
    if wrong:
        takes = [key for key in parameters if refused_keyword((key,)) is None]
        # A recipe may have set it, which another value for all keywords replaces.
        rest = ", ".join(f"{key}: {value}" for key, value in call.items() if key in parameters)
        raise UserError(
            f"pipeline.{wrong[0]}: {kind} takes no {wrong[0]}; it takes {', '.join(takes)}; try --set "
            f"'pipeline={{{rest}}}'"
        )
