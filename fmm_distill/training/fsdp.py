"""A student that FSDP2 splits over processes: whole tensors to shards and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from accelerate.utils import DistributedType, fsdp2_prepare_model
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator
    from torch import Tensor, nn

    from fmm_distill.config.settings import TrainingSettings

__all__ = ["check_sharding", "is_sharded", "local", "name_blocks", "placed_like", "shard", "whole", "whole_state"]


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether accelerate splits weights over processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(accelerator: Accelerator, training: TrainingSettings, lora_rank: int = 0) -> None:
    """Refuse ways to split a student that training does not go with, before anything is opened.

    Args:
        lora_rank: of the student's adapters; 0: none.

    Raises:
        UserError: on another way than FSDP2, and on settings that do not run under it.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"accelerate is set up for {kind.value}: not supported; wanted plain multi-GPU, or FSDP with "
            "fsdp_version: 2, which splits weights, gradients and averages too (accelerate config)"
        )
    if not is_sharded(accelerator):
        return
    if not accelerator.is_fsdp2:
        raise UserError(
            "accelerate is set up for FSDP of version 1: not supported; wanted fsdp_version: 2 (accelerate config, or "
            "accelerate launch --use_fsdp --fsdp_version 2)"
        )
    if training.compile != "none":
        raise UserError(
            f"training.compile: {training.compile} does not go with FSDP here; wanted none, or plain multi-GPU"
        )
    if lora_rank:
        raise UserError(
            f"student.lora.rank: {lora_rank} does not go with FSDP: the teacher is the student's own network without "
            "its adapters, and the first process asks it alone when it evaluates; wanted 0, or plain multi-GPU"
        )
    plugin = accelerator.state.fsdp_plugin
    if plugin.activation_checkpointing:
        raise UserError(
            "fsdp_activation_checkpointing wraps blocks that do not know the second time; wanted it off, and "
            "training.gradient_checkpointing in its place"
        )
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        raise UserError(
            "fsdp_auto_wrap_policy: SIZE_BASED_WRAP would wrap the flow map around the network too, which is not "
            "called as a module; wanted TRANSFORMER_BASED_WRAP, or NO_WRAP"
        )
    # Shards are gathered as they are, in float32: the student runs under autocast, its derivatives do not.
    plugin.mixed_precision_policy = None


def name_blocks(accelerator: Accelerator, network: nn.Module) -> str:
    """Tell accelerate which blocks of a network are gathered one at a time, where its user did not; and say which.

    Raises:
        UserError: if the user named a class that the network has none of.
    """
    plugin = cast("Any", accelerator.state.fsdp_plugin)
    there = {type(module).__name__ for module in network.modules()}
    if plugin.transformer_cls_names_to_wrap is None:
        known = getattr(network, "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = [name for name in dict.fromkeys(known) if name in there]
    missing = [name for name in plugin.transformer_cls_names_to_wrap if name not in there]
    if missing:
        raise UserError(
            f"fsdp_transformer_layer_cls_to_wrap: {type(network).__name__} has no {', '.join(missing)}; wanted some of "
            f"{', '.join(sorted(there))}, or nothing: then its own list of blocks is taken"
        )
    names = plugin.transformer_cls_names_to_wrap if plugin.auto_wrap_policy is not None else []
    parts = ", ".join(names) or "the whole network"
    return f"FSDP: split over {accelerator.num_processes} processes; gathered at a time: {parts}"


def shard(network: nn.Module, accelerator: Accelerator) -> None:
    """Split the network of a copy that is not trained, as ``accelerator.prepare`` splits the student."""
    split = fsdp2_prepare_model(accelerator, network)
    # No backward pass follows a copy's call, and that is where a root gives back what it gathered.
    split.set_reshard_after_forward(True)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor. Of one that is split every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The tensors of a state, those that are split gathered one by one on the CPU. Every process has to ask.

    Args:
        keep: whether this process wants them; the others get nothing.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        gathered = whole(tensor).detach().cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = gathered
    return found


def placed_like(state: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors split as those of the same names are. Every process has to have the same ones."""
    return {name: _placed(value, there.get(name)) for name, value in state.items()}


def _placed(value: Tensor, there: Tensor | None) -> Tensor:
    if not isinstance(there, DTensor) or value.shape != there.shape or isinstance(value, DTensor):
        return value
    # No source: each process takes its part of what it has, and sends nothing.
    return distribute_tensor(value.to(there.device), there.device_mesh, there.placements, src_data_rank=None)
