"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a student's network, by peft.

The network without its adapters is the teacher's, so one copy of the large weights serves both.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fmm_distill.errors import UserError
from fmm_distill.student.shared_network import SharedNetwork, without_checkpointing
from fmm_distill.student.stages import jump_embeddings, key_of
from fmm_distill.teachers.codec import PipelineCodec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["AdaptersOff", "add_lora", "default_targets", "has_lora", "lora_layers", "lora_state", "merged"]

# Names of attention and feed-forward blocks and of their layers in diffusers and in other transformers.
_ADAPTED = ("attn", "attention", "to_q", "to_k", "to_v", "to_out", "qkv", "ff", "ffn", "feed_forward")
# Modulations and embeddings in such blocks depend on times and conditions: the jump embedding already adapts these.
_EXCLUDED = ("norm", "ada", "embed", "mod")


class AdaptersOff(SharedNetwork):
    """A student's network whose adapters are disabled during its calls."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 the network's own
        """Call the network without its adapters, which is the teacher."""
        with _adapters_disabled(self.shared), without_checkpointing(self.shared):
            return self.shared(*args, **kwargs)


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """Return the layers of a network that have adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: layer for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)}


def has_lora(network: nn.Module) -> bool:
    """Return True if a network has adapters."""
    return any(name.endswith(("lora_A", "lora_B")) for name, _ in network.named_modules())


@contextmanager
def _adapters_disabled(network: nn.Module) -> Iterator[None]:
    layers = lora_layers(network).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def default_targets(network: nn.Module) -> list[str]:
    """Return the names of the linear layers of attention and feed-forward blocks."""
    targets = []
    for name, module in network.named_modules():
        parts = name.split(".")
        excluded = any(part.startswith(_EXCLUDED) or part.endswith(_EXCLUDED) for part in parts)
        if isinstance(module, nn.Linear) and not excluded and any(_matches(part, _ADAPTED) for part in parts):
            targets.append(name)
    return targets


def _matches(part: str, names: tuple[str, ...]) -> bool:
    """Match a part of a layer's name: ``attn1`` and ``ff_context`` match ``attn`` and ``ff``, ``affine`` does not."""
    return any(part == name or (part.startswith(name) and not part[len(name)].isalpha()) for name in names)


def add_lora(student: Student, teacher: Teacher, rank: int, targets: tuple[str, ...] = (), *, seed: int = 0) -> Teacher:
    """Add adapters to the student's network, in place, and freeze all weights but those and the jump embeddings.

    Args:
        targets: endings of the names of the layers that get adapters; empty: attention and feed-forward layers.
        seed: seed of the adapters' initial weights.

    Returns:
        The teacher on the student's network with disabled adapters. ``teacher`` itself does not change.

    Raises:
        UserError: if peft is missing, or no layer matches.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("student.lora needs `pip install fmm-distill[lora]`") from error
    network = student.network
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in linear if name.endswith(targets)] if targets else default_targets(network)
    chosen = [name for name in chosen if "jump_embedding." not in name]
    if not chosen:
        names = ", ".join(targets) or "attention or feed-forward"
        raise UserError(
            f"student.lora: expected linear layers of {type(network).__name__} for {names}, got none; try "
            f"student.lora.targets: [{linear[0].rpartition('.')[2]}]"
        )
    network.requires_grad_(False)
    # peft draws from the global generator, whose state belongs to the caller.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # alpha = rank: peft multiplies the adapters by alpha / rank, so their scale is 1 at every rank.
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen), network)
    for embedding in jump_embeddings(network):
        embedding.requires_grad_(True)
    codec = copy.copy(teacher.codec)
    if isinstance(codec, PipelineCodec):
        codec.network = network
        # An open pipeline holds the teacher's first network, which would stay in memory.
        codec.release()
    return replace(teacher, network=AdaptersOff(network).eval(), codec=codec)


def merged(student: Student) -> Student:
    """Return a copy of the student with its adapters merged into the weights: an ordinary two-time network."""
    # A copy: an export also saves the adapters, which the student itself still has.
    plain = copy.deepcopy(student)
    for name, layer in lora_layers(plain.network).items():
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(plain.network.get_submodule(parent), last, layer.get_base_layer())
    return plain


def lora_state(student: Student, component: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the adapters under the names that diffusers loads, and the jump embeddings."""
    adapters, jumps = {}, {}
    for name, value in student.network.state_dict().items():
        if ".lora_" in name:
            # peft names its adapter in the key, the file format of diffusers does not.
            adapters[key_of(student.network, component, name.replace(".default.", "."))] = value.contiguous()
        elif "jump_embedding." in name:
            jumps[name] = value.contiguous()
    return adapters, jumps
