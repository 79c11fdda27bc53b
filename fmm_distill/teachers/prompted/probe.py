"""A stock pipeline that is run with keywords of ours, to see what it gives its network."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.errors import UserError
from fmm_distill.teachers.prompted.keywords import refused_keyword
from fmm_distill.teachers.recording import record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from fmm_distill.teachers.recording import Recording

__all__ = ["PROBES", "STEPS", "CallKeywords", "DrivenPipeline", "check_call"]

STEPS = 4
PROBES = ("a red cat on a mat", "dogs")


@dataclass(frozen=True)
class CallKeywords:
    """The keywords of a pipeline's call.

    Attributes:
        fixed: those that never change.
        guidance: the keyword of classifier-free guidance, where there is one.
        off: its value that turns guidance off.
    """

    fixed: dict[str, Any]
    guidance: str | None
    off: float

    @classmethod
    def of(cls, pipeline: Any, call: dict[str, Any], scale: float) -> CallKeywords:  # noqa: ANN401 a diffusers class
        """Those of a pipeline that is called with ``call`` and guided by ``scale``."""
        taken = inspect.signature(pipeline.__call__).parameters
        fixed = {"output_type": "latent"} | call
        if "true_cfg_scale" in taken:
            # guidance_scale is then an input of the network itself.
            return cls(fixed | {"guidance_scale": scale}, "true_cfg_scale", 1.0)
        if "guidance_scale" not in taken:
            return cls(fixed, None, 1.0)
        # One pipeline adds guidance_scale times the difference to the conditional answer: 0 is off there.
        off = 0.0 if type(pipeline).__name__.startswith("ZImage") else 1.0
        return cls(fixed, "guidance_scale", off)

    def call(self, prompts: Sequence[str], steps: int, guidance: float | None = None) -> dict[str, Any]:
        """The keywords for these prompts."""
        given = {**self.fixed, "prompt": list(prompts), "num_inference_steps": steps}
        given["generator"] = torch.Generator().manual_seed(0)
        if self.guidance:
            given[self.guidance] = self.off if guidance is None else guidance
        return given


@dataclass(frozen=True)
class DrivenPipeline:
    """A pipeline, the name of its network, and the keywords that it is called with."""

    pipeline: Any
    component: str
    keys: CallKeywords

    @property
    def network(self) -> nn.Module:
        """The network that is distilled."""
        network: nn.Module = getattr(self.pipeline, self.component)
        return network

    @property
    def kind(self) -> str:
        """The pipeline's class."""
        return type(self.pipeline).__name__

    def record(self, steps: int = STEPS) -> Recording:
        """A run of ``PROBES``, unguided."""
        return record(self.pipeline, self.component, self.keys.call(PROBES, steps))

    def record_guided(self, scale: float) -> Recording:
        """A run of ``PROBES`` with the pipeline's own guidance."""
        call = self.keys.call(PROBES, STEPS, guidance=scale)
        if self.keys.guidance == "true_cfg_scale":
            call["negative_prompt"] = [""] * len(PROBES)
        return record(self.pipeline, self.component, call)

    def given(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The arguments of the network's first call for these prompts; the network itself does not run."""
        call = self.keys.call(prompts, STEPS)
        return record(self.pipeline, self.component, call, first_only=True).calls[0].given


def check_call(pipeline: Any, call: dict[str, Any], source: str) -> None:  # noqa: ANN401 a diffusers class
    """Refuse a pipeline that starts from an image, and keywords that it does not take."""
    taken = inspect.signature(pipeline.__call__).parameters
    if "prompt" not in taken or ("image" in taken and taken["image"].default is inspect.Parameter.empty):
        raise UserError(f"{source}: {type(pipeline).__name__} starts from an image; wanted one that starts from noise")
    if "image" in taken and "Img2Img" in type(pipeline).__name__:
        raise UserError(
            f"{source}: {type(pipeline).__name__} refines an image that another model made; wanted the base model"
        )
    if (refusal := refused_keyword(call)) is not None:
        raise UserError(refusal)
    wrong = [key for key in call if key not in taken]
    if wrong:
        raise UserError(
            f"pipeline.{wrong[0]}: {type(pipeline).__name__} takes no {wrong[0]}; it takes {', '.join(taken)}"
        )
