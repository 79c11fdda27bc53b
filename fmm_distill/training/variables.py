"""Environment variables that would change a run against its recipe: refused, or ignored with a line.

``accelerate launch`` sets many of them from its options and from ``default_config.yaml``. The recipe wins: what it also
sets is passed to accelerate explicitly. What it can't express is refused with the variable's name.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from fmm_distill.config.recipe import Recipe

__all__ = ["check_compile", "check_variables", "ignored_variables", "is_set", "launched", "set_variables"]

# accelerate's own words for yes and no.
YES, NO = ("1", "on", "t", "true", "y", "yes"), ("0", "off", "f", "false", "n", "no", "")
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed is not supported; take plain multi-GPU, or FSDP with fsdp_version: 2",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported; take plain multi-GPU, or FSDP with fsdp_version: 2",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "device meshes are not supported; take plain multi-GPU, or FSDP",
    "ACCELERATE_INIT_INCLUDE_BUFFERS": "networks would be opened without their buffers",
}
FLAGS = (
    *REFUSED,
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_SAGEMAKER",
    "FORK_LAUNCHED",
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "USE_TORCH_XLA",
)
# The sizes and ranks that a launcher sets; accelerate reads those of MPI where the first of each is missing.
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
LOCAL = (
    *("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    *("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
# Exact up to rounding; the others round to 8 or 16 bits.
ATTENTION = ("native", "flex", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math", "xformers", "")


def check_variables() -> None:
    """Refuse variables that accelerate or diffusers would follow and a recipe can't express, and unreadable ones.

    Raises:
        UserError: with the variable's name.
    """
    for name in FLAGS:
        if is_set(name) and name in REFUSED:
            raise UserError(f"{name}={os.environ[name]}: {REFUSED[name]} (unset it, or run accelerate config)")
    kind = os.environ.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE")
    if is_set("ACCELERATE_USE_SAGEMAKER") and kind != "NO":
        raise UserError("ACCELERATE_USE_SAGEMAKER: SageMaker's own data parallelism is not supported; unset it")
    eight = os.environ.get("ACCELERATE_FP8_BACKEND", "NO")
    if eight.upper() not in ("NO", ""):
        # accelerate replaces layers for it, whatever the precision is.
        raise UserError(
            f"ACCELERATE_FP8_BACKEND={eight}: fp8 is not supported; unset it, or start with --mixed_precision no"
        )
    # Each is read once, so that a value that is no number is an error with its name.
    for name in (*SIZES, *RANKS, *LOCAL):
        _number(name, 0)
    if (rank := _number("RANK", 0)) >= launched():
        raise UserError(f"RANK={rank}, but WORLD_SIZE is {launched()}: unset it, or start with a launcher")
    attention = os.environ.get("DIFFUSERS_ATTN_BACKEND", "")
    if attention.lower() not in ATTENTION:
        raise UserError(
            f"DIFFUSERS_ATTN_BACKEND={attention}: teacher and student would compute attention in fewer bits; unset it, "
            "or take native"
        )
    level = os.environ.get("ACCELERATE_LOG_LEVEL", "INFO")
    if level.upper() not in logging.getLevelNamesMapping():
        raise UserError(f"ACCELERATE_LOG_LEVEL={level}: no level of logging; unset it, or take info")


def check_compile(backend: str) -> None:
    """Refuse ``training.compile`` if a variable switches torch's compiler off."""
    if backend == "none":
        return
    for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        if os.environ.get(name) == "1":
            raise UserError(f"{name}=1: training.compile: {backend} would compile nothing; unset it, or take none")


def ignored_variables(recipe: Recipe) -> list[str]:
    """Return a line for each variable that contradicts the recipe, which wins."""
    training = recipe.training
    settings = {
        "ACCELERATE_MIXED_PRECISION": ("training.precision", training.precision, {"no": "fp32"}, ("no", "fp32")),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            "training.gradient_accumulation_steps",
            str(training.gradient_accumulation_steps),
            {},
            ("auto",),
        ),
        "ACCELERATE_DYNAMO_BACKEND": ("training.compile", training.compile, {"no": "none"}, ("no", "none")),
    }
    lines = []
    for name, (setting, ours, words, unset) in settings.items():
        value = os.environ.get(name, "").lower()
        # The launcher sets a default where its user gave nothing.
        if value and value not in unset and words.get(value, value) != ours:
            lines.append(f"{name}={value} is ignored: the recipe has {setting}: {ours}")
    if is_set("ACCELERATE_USE_FSDP") and is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        lines.append(
            "FSDP_CPU_RAM_EFFICIENT_LOADING is ignored: each process opens the teacher, text encoders included"
        )
    return lines


def is_set(name: str) -> bool:
    """Return True if a flag is on, in the words that accelerate accepts.

    Raises:
        UserError: if it is neither yes nor no.
    """
    value = os.environ.get(name, "")
    if value.lower() not in (*YES, *NO) or (name in os.environ and not value and name in FLAGS):
        raise UserError(f"{name}={value}: expected true or false; unset it, or take one of them")
    return value.lower() in YES


def launched() -> int:
    """Return the number of processes that torch's launcher, or else MPI's, started together."""
    sizes = [_number(name, 1) for name in SIZES if name in os.environ]
    return max(1, sizes[0] if "WORLD_SIZE" in os.environ else max(sizes, default=1))


def set_variables() -> str:
    """Return the variables of accelerate that are set, for a message."""
    prefixes = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")
    names = [name for name in sorted(os.environ) if name.startswith(prefixes)]
    return ", ".join(f"{name}={os.environ[name]}" for name in names) or "none of accelerate's variables"


def _number(name: str, default: int) -> int:
    value = os.environ.get(name)
    if value is None:
        return default
    try:
        return int(value)
    except ValueError as error:
        raise UserError(f"{name}={value}: expected an integer; unset it, or start with a launcher") from error
