"""FSDP2: checks, the split of a student over processes, and full tensors to shards and back."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, DistributedType, fsdp2_prepare_model
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from fmm_distill.errors import UserError
from fmm_distill.training.compile import network_of
from fmm_distill.training.optimizer import optimizer_factory, stores_factors
from fmm_distill.training.variables import is_set

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from accelerate import Accelerator
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fmm_distill.config.recipe import Recipe
    from fmm_distill.core.flow_map import LearnedFlowMap
    from fmm_distill.training.optimizer import OptimizerFactory

__all__ = [
    "autocast",
    "check_moments",
    "check_sharding",
    "clip_gradients",
    "full_state",
    "full_tensor",
    "gather_in_float32",
    "is_sharded",
    "local",
    "placed_like",
    "shard",
    "splits_weights",
    "wrap",
    "wrap_blocks",
    "wrapped_blocks",
]


def is_sharded(accelerator: Accelerator) -> bool:
    """Return True if accelerate splits weights over processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def splits_weights() -> bool:
    """Return True if this launch splits weights over processes, whether its accelerator exists already or not."""
    state = AcceleratorState._shared_state.get("distributed_type")
    return is_set("ACCELERATE_USE_FSDP") or state == DistributedType.FSDP


def check_sharding(accelerator: Accelerator, recipe: Recipe) -> None:
    """Check that the student can be trained the way accelerate splits it, before anything is opened.

    Raises:
        UserError: on DeepSpeed, Megatron-LM and FSDP 1, and on settings that do not run under FSDP2.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"accelerate: expected plain multi-GPU or FSDP2, got {kind.value}, which is not supported; try "
            "fsdp_version: 2, which splits weights, gradients and averages (accelerate config)"
        )
    if not is_sharded(accelerator):
        return
    if not accelerator.is_fsdp2:
        raise UserError(
            "accelerate: expected fsdp_version: 2, got version 1; try accelerate config, or accelerate launch "
            "--use_fsdp --fsdp_version 2"
        )
    if recipe.training.compile != "none":
        raise UserError(
            f"training.compile: expected none under FSDP, got {recipe.training.compile}; try none, or plain multi-GPU"
        )
    if lora_rank := recipe.student.lora.rank:
        raise UserError(
            f"student.lora.rank: expected 0 under FSDP, got {lora_rank}: the first process alone evaluates the "
            "teacher, which is the student's split network without its adapters; try 0, or plain multi-GPU"
        )
    matching = recipe.matching
    seconds = [] if matching is None else [matching.optimizer, matching.critic.optimizer]
    for settings in (recipe.optimizer, *seconds):
        check_moments(optimizer_factory(settings))
    plugin = accelerator.state.fsdp_plugin
    if plugin.activation_checkpointing:
        raise UserError(
            "fsdp_activation_checkpointing: expected false, got true: it wraps blocks that need the second time of "
            "a jump; try training.gradient_checkpointing"
        )
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        raise UserError(
            "fsdp_auto_wrap_policy: expected TRANSFORMER_BASED_WRAP or NO_WRAP, got SIZE_BASED_WRAP, which also wraps "
            "the flow map around the network; try TRANSFORMER_BASED_WRAP"
        )


def check_moments(factory: OptimizerFactory) -> None:
    """Check that the state of an optimizer can be split as its parameters are.

    Raises:
        UserError: if it stores factors of its moments, as Adafactor does.
    """
    if stores_factors(factory):
        raise UserError(
            "optimizer: expected moments of the shape of their parameters under FSDP, got an optimizer that stores "
            "factors of them; try AdamW, or plain multi-GPU"
        )


def gather_in_float32(accelerator: Accelerator) -> None:
    """Make FSDP gather weights in float32: the student runs under autocast, its derivatives do not."""
    accelerator.state.fsdp_plugin.mixed_precision_policy = None


def wrapped_blocks(accelerator: Accelerator, network: nn.Module) -> list[str]:
    """Return the class names of the blocks that FSDP gathers one at a time: the user's, or the network's own list.

    Raises:
        UserError: if the user named a class that the network does not contain.
    """
    plugin = cast("Any", accelerator.state.fsdp_plugin)
    present = {type(module).__name__ for module in network.modules()}
    names = plugin.transformer_cls_names_to_wrap
    if names is None:
        known = getattr(network, "_no_split_modules", None) or ()
        return [name for name in dict.fromkeys(known) if name in present]
    if missing := [name for name in names if name not in present]:
        raise UserError(
            f"fsdp_transformer_layer_cls_to_wrap: expected classes of {type(network).__name__}, got "
            f"{', '.join(missing)}; try some of {', '.join(sorted(present))}, or leave it out"
        )
    return list(names)


def wrap_blocks(accelerator: Accelerator, names: list[str]) -> str:
    """Make FSDP gather these blocks one at a time, and return a line that describes the split."""
    plugin = cast("Any", accelerator.state.fsdp_plugin)
    plugin.transformer_cls_names_to_wrap = names
    parts = (", ".join(names) if plugin.auto_wrap_policy is not None else "") or "the complete network"
    return f"FSDP: split over {accelerator.num_processes} processes; gathered at a time: {parts}"


def shard(network: nn.Module, accelerator: Accelerator) -> None:
    """Split the network of a copy that is not trained, as ``accelerator.prepare`` splits the student."""
    split = fsdp2_prepare_model(accelerator, network)
    # FSDP frees a root's gathered weights in the backward pass, and a copy has none.
    split.set_reshard_after_forward(True)


def wrap(
    accelerator: Accelerator,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    copies: Iterable[nn.Module] = (),
    *,
    method: str | None = None,
) -> tuple[Any, ...]:
    """Return a module and its optimizers as accelerate distributes them.

    Under FSDP the networks of the student's copies are split in place, as the student's own is.

    Args:
        method: a method of the module that calls its networks too, outside of ``forward``.
    """
    if not is_sharded(accelerator):
        return cast("tuple[Any, ...]", accelerator.prepare(module, *optimizers))
    for other in copies:
        shard(network_of(cast("LearnedFlowMap", other)), accelerator)
    prepared: tuple[Any, ...] = accelerator.prepare(module, *optimizers)
    if method is not None:
        # In place, so that whoever holds the module can call the method.
        register_fsdp_forward_method(prepared[0], method)
        # A call without a backward pass would leave the root's weights gathered, and the next update would not reach
        # them.
        prepared[0].set_reshard_after_forward(True, recurse=False)
    return prepared


def clip_gradients(
    accelerator: Accelerator,
    optimizer: Optimizer,
    parameters: Iterable[nn.Parameter],
    largest: float,
) -> Tensor:
    """Scale the gradients of one optimizer to a norm of at most ``largest``, and return their norm before."""
    # accelerate's own call unscales the gradients of all optimizers, and two of them share the student's.
    accelerator.unscale_gradients(optimizer)
    return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, largest))


def autocast(accelerator: Accelerator) -> AbstractContextManager[None]:
    """Return the autocast context of a split module; accelerate applies it to other modules itself."""
    if not is_sharded(accelerator):
        return nullcontext()
    # A cached cast outlives the gathered weights that it was made of, and gradients go missing.
    return accelerator.autocast(AutocastKwargs(cache_enabled=False))


def local(tensor: Tensor) -> Tensor:
    """Return the shard of this process, or the tensor itself if it is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be split. Every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(state: Mapping[str, Tensor], *, main: bool) -> dict[str, Tensor]:
    """Gather the split tensors of a state one by one on the CPU. Every process has to call it.

    Args:
        main: True in the process that needs the state; the others get an empty one.
    """
    gathered: dict[str, Tensor] = {}
    for name, tensor in state.items():
        # One tensor at a time: all of them together may exceed the memory of one device.
        full = full_tensor(tensor).detach().cpu() if isinstance(tensor, DTensor) else tensor
        if main:
            gathered[name] = full
    return gathered


def placed_like(state: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split full tensors as the targets of the same names are split. Every process has to pass the same tensors."""
    return {name: _placed(value, targets.get(name)) for name, value in state.items()}


def _placed(value: Tensor, target: Tensor | None) -> Tensor:
    if not isinstance(target, DTensor) or value.shape != target.shape or isinstance(value, DTensor):
        return value
    # Without a source rank each process takes its shard of its own copy, and nothing is sent.
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
