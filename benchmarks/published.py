"""Sizes of published networks that are called with images: parameters, those of adapters, and their memory.

python -m benchmarks.published

The networks are built on the device ``meta``, from the published configurations of ``tests/tiny/published.py``.
"""

from __future__ import annotations

from torch import nn

from fmm_distill.student.scaled_layers import can_be_scaled
from tests.tiny.published import MODELS, Published

__all__ = ["adapter_parameters", "rows_of_models"]

# Of the recipes.
RANK = 64
# All weights are in float32.
BYTES, GIB = 4, 2**30


def adapter_parameters(network: nn.Module, rank: int, *, guided: bool) -> int:
    """Return the parameters of a student's changes of this rank.

    Args:
        guided: there is a second change, of the guidance, which does not depend on the length of the jump.
    """
    layers = [layer for layer in network.modules() if can_be_scaled(layer, rank)]
    each = sum(rank * (layer.weight[0].numel() + len(layer.weight)) for layer in layers)
    return (2 if guided else 1) * each


def is_guided(network: nn.Module) -> bool:
    """Return whether the recipe's guidance combines two outputs: the scale is no input of the network."""
    return not network.config.get("guidance_embeds", False)


def row_of(model: Published) -> tuple[str, ...]:
    network = model.full_network()
    count = sum(parameter.numel() for parameter in network.parameters())
    changes = adapter_parameters(network, RANK, guided=is_guided(network))
    weights = BYTES * (count + changes)
    # Gradients, two moments of the optimizer, and the average.
    trained = BYTES * 4 * changes
    sizes = (weights, trained, weights + trained)
    return (f"`{model.model}`", f"{count:,}", f"{changes:,}", *(f"{size / GIB:.1f}" for size in sizes))


def rows_of_models() -> str:
    """Return the table of the documentation."""
    head = ("model", "parameters", "changes of rank 64", "weights, GiB", "training of the changes, GiB", "sum, GiB")
    lines = [head, ("---", *["---:"] * 5), *(row_of(model) for model in MODELS.values())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(rows_of_models(), end="")
