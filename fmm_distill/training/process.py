"""Processes: the accelerator of a run, checks of the launch, and work of the first process."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
    broadcast_object_list,
)

from fmm_distill.core.torch_state import changed_state, own_state
from fmm_distill.errors import FmmDistillError, UserError
from fmm_distill.io.streams import lossy_streams
from fmm_distill.training.fsdp import check_sharding, gather_in_float32, is_sharded
from fmm_distill.training.optimizer import check_optimizer
from fmm_distill.training.trackers import check_trackers, tracker_folder
from fmm_distill.training.variables import (
    check_compile,
    check_variables,
    ignored_variables,
    is_set,
    launched,
    set_variables,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from fmm_distill.config.recipe import Recipe


__all__ = [
    "PATIENCE",
    "allow_unused_parameters",
    "alone",
    "check_training",
    "first_process_logs",
    "join_processes",
    "make_accelerator",
    "on_first",
]

logger = logging.getLogger(__name__)

# The first process evaluates and exports while the others wait; NCCL's default timeout of ten minutes is too short.
PATIENCE = timedelta(hours=12)

# Kinds of distribution that check_sharding checks.
SPLITS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)

_one_run = threading.Lock()


@contextmanager
def alone() -> Iterator[None]:
    """Allow one run at a time in this process, in torch's default state; restore the caller's state at the end.

    Raises:
        UserError: if another run is active, in this thread or in another.
    """
    # Not blocking: within one thread it would wait for itself.
    if not _one_run.acquire(blocking=False):
        raise UserError(
            "another distill() is active in this process, and accelerate has one state per process: wait for it, or "
            "start this one in a process of its own"
        )
    variable = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    loading, gradients = os.environ.get(variable), dict(GradientState._shared_state)
    try:
        if changed := changed_state():
            logger.warning(f"set aside while this runs, and restored afterwards: {', '.join(changed)}")
        with own_state(), lossy_streams():
            yield
    finally:
        # An accelerator of the caller shares this state.
        GradientState._shared_state.clear()
        GradientState._shared_state.update(gradients)
        if loading is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = loading
        _one_run.release()


def check_training(recipe: Recipe) -> None:
    """Check the settings of training against this machine and this launch.

    Raises:
        UserError: on the first that does not work here.
    """
    training = recipe.training
    check_variables()
    check_compile(training.compile)
    check_trackers(recipe)
    check_optimizer(recipe.optimizer)
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise UserError(
            "expected a writable folder for temporary files, which the check of the export needs, got none; set TMPDIR"
        ) from error
    if training.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("training.precision: expected fp32 or bf16 without a GPU, got fp16; try bf16")
    processes = launched()
    parts = processes * training.gradient_accumulation_steps
    # An uneven part would have another weight in the mean over processes.
    if training.batch_size % parts:
        raise UserError(
            f"training.batch_size: expected a multiple of {parts} for {processes} processes x "
            f"{training.gradient_accumulation_steps} gradient accumulation steps, got {training.batch_size}"
        )
    groups = recipe.time_sampling.groups
    if groups % parts and groups:
        raise UserError(
            f"time_sampling.groups: expected a multiple of {parts}, the number of parts of a batch, got {groups}"
        )


def _has_unused_parameters(module: nn.Module, velocity: Tensor) -> bool:
    """Return whether a trained parameter has no gradient: the last block of some networks has outputs for the text.

    Args:
        velocity: an output of the module.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(velocity.sum(), trained, allow_unused=True)
    return any(gradient is None for gradient in gradients)


def allow_unused_parameters(accelerator: Accelerator, outputs: Mapping[nn.Module, Tensor]) -> None:
    """Make processes exchange gradients of parameters that not every loss has a gradient for, if there are any.

    Args:
        outputs: a velocity of each module that is trained.
    """
    if not any(_has_unused_parameters(module, velocity) for module, velocity in outputs.items()):
        return
    handler = accelerator.ddp_handler or DistributedDataParallelKwargs()
    accelerator.ddp_handler = replace(handler, find_unused_parameters=True)


def _losses_differ(recipe: Recipe) -> bool:
    """Return whether there are steps in which a trained parameter has no gradient."""
    # The regression of a scaled student trains other parameters than the losses after it, and samples that are matched
    # have no learned weight.
    regression = recipe.student_kind == "scaled" and recipe.student.regression_steps > 0
    return regression or (recipe.matching is not None and recipe.weight.kind == "learned")


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """Return the accelerator of a run in ``folder``, with the recipe's precision, accumulation and trackers."""
    training = recipe.training
    check_training(recipe)
    expected = {"fp32": "no"}.get(training.precision, training.precision)
    before = AcceleratorState._shared_state.get("_mixed_precision", expected)
    if before != expected:
        raise UserError(
            f"training.precision: expected {before.replace('no', 'fp32')}, in which this process has run, got "
            f"{training.precision}; start another process, as accelerate has one precision per process"
        )
    if is_set("ACCELERATE_USE_FSDP"):
        # transformers would open text encoders without their buffers in all processes but the first.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    lines = ignored_variables(recipe)
    accelerator = _accelerator(
        mixed_precision=expected,
        # Arguments that are not passed are read from the environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=training.gradient_accumulation_steps),
        log_with=list(recipe.logging.trackers) or None,
        project_config=ProjectConfiguration(str(folder), str(tracker_folder(folder))),
        # Before torch 2.11 a weight cast to half precision without gradients, for a jump to the start, stays in the
        # cache for the call that is to have them, and gets none (pytorch issue 112583).
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=PATIENCE),
            AutocastKwargs(cache_enabled=False),
            DistributedDataParallelKwargs(find_unused_parameters=_losses_differ(recipe)),
        ],
    )
    if is_set("ACCELERATE_USE_FSDP") and accelerator.distributed_type not in SPLITS:
        raise UserError(
            "ACCELERATE_USE_FSDP is set, but accelerate splits nothing here: one process without a launcher, or no "
            "GPU; unset it, or start with accelerate launch"
        )
    check_sharding(accelerator, recipe)
    if is_sharded(accelerator):
        gather_in_float32(accelerator)
    for line in lines if accelerator.is_main_process else ():
        logger.warning(line)
    return accelerator


def join_processes() -> Accelerator:
    """Return an accelerator of processes that evaluate together."""
    check_variables()
    precision = AcceleratorState._shared_state.get("_mixed_precision", "no")
    return _accelerator(mixed_precision=precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


def _accelerator(**settings: Any) -> Accelerator:  # noqa: ANN401 accelerate's own arguments
    """Return an accelerator without compilation, after a check that it joins all launched processes."""
    _check_device()
    plain = TorchDynamoPlugin(
        backend="no", mode="default", dynamic=False, fullgraph=False, use_regional_compilation=False
    )
    try:
        accelerator = Accelerator(dynamo_plugin=plain, **settings)
    except (ImportError, NotImplementedError, AssertionError, KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"accelerate does not start ({reason}); the environment has {set_variables()}") from error
    # All accelerators of a process share their state, also with an older one of the caller.
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise UserError(
            "expected no compilation by accelerate, got an Accelerator of this process that compiles; start another "
            "process, and set training.compile"
        )
    check_joined(accelerator)
    return accelerator


def _check_device() -> None:
    """Refuse a device of ``ACCELERATE_TORCH_DEVICE`` that does not exist, or that several processes would share."""
    name = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if name is None:
        return
    try:
        device = torch.device(name)
        # A name may parse although the device is absent: only an operation on it shows that.
        torch.empty(1, device=device).add_(1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"ACCELERATE_TORCH_DEVICE={name}: expected a device of this machine; unset it, or try cpu or cuda"
        ) from error
    if launched() > 1 and device.type != "cpu":
        raise UserError(
            f"ACCELERATE_TORCH_DEVICE={name}: expected one device per process, got one for {launched()}; unset it"
        )


def check_joined(accelerator: Accelerator) -> None:
    """Check that accelerate joins all processes that were launched together.

    Raises:
        UserError: with both numbers.
    """
    if accelerator.num_processes != launched():
        raise UserError(
            f"{launched()} processes were launched, but accelerate joins {accelerator.num_processes}: on CPU set "
            "ACCELERATE_USE_CPU=true, so that they don't run side by side in one folder"
        )


def on_first(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do ``work`` in the first process while the others wait. An exception ends all of them.

    Raises:
        UserError: in the other processes, with the first one's message.
    """
    failure: list[str | None] = ["the first process has failed"]
    try:
        if accelerator.is_main_process:
            work()
            failure = [None]
    except FmmDistillError as error:
        failure = [str(error)]
        raise
    finally:
        broadcast_object_list(failure)
    # The other processes end too, instead of waiting in their next collective until the timeout.
    if failure[0] is not None:
        raise UserError(failure[0])


@contextmanager
def first_process_logs(accelerator: Accelerator) -> Iterator[None]:
    """Log nothing of this package in processes other than the first, until the end of the context."""
    if accelerator.is_main_process:
        yield
        return
    # A filter of a logger does not see the records of the loggers below it; its level does.
    package = logging.getLogger("fmm_distill")
    level = package.level
    package.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        package.setLevel(level)
