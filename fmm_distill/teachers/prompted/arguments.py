"""The arguments of a network's call as conditions: rows of the samples, and values that all samples share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.core.conditioning import Conditioning
from fmm_distill.core.parametrization import keywords

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["join_arguments", "split_arguments"]

# Marks on names of conditions. A list of tensors of several lengths is stored padded, with its lengths under the first;
# a list of equal values is stored as one shared value under a name that ends in the second.
_LENGTHS = "lengths of"
_EACH = " of each"


def split_arguments(
    arguments: dict[str, Any], own: tuple[str, str], count: int, single: dict[str, Any]
) -> Conditioning:
    """Split the arguments of a network's call, sample and time excluded, into rows and shared values.

    A tensor has rows if its first dimension follows the number of samples.

    Args:
        own: names of the sample and of the time.
        count: the number of samples.
        single: the arguments of the same call with one sample.
    """
    inputs: dict[str, Tensor] = {}
    shared: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in (*own, "return_dict"):
            continue
        one = single.get(name)
        if isinstance(value, dict):
            shared[name] = {}
            for key, item in value.items():
                if _is_rows(item, one[key] if one else None, count):
                    inputs[f"{name}.{key}"] = item
                else:
                    shared[name][key] = item
        elif _is_rows(value, one, count):
            inputs[name] = value
        elif isinstance(value, list) and len(value) == count and isinstance(one, list) and len(one) == 1:
            if all(isinstance(row, torch.Tensor) for row in value):
                inputs[name] = torch.nn.utils.rnn.pad_sequence(value, batch_first=True)
                inputs[f"{_LENGTHS}.{name}"] = torch.tensor([len(row) for row in value])
            else:
                # Every sample gets the first value: with one size for all samples they are equal.
                shared[name + _EACH] = value[0]
        else:
            shared[name] = value
    # A tuple has the same form for all networks; outputs with names do not.
    return Conditioning(inputs, shared | {"return_dict": False})


def join_arguments(cond: Conditioning | None, h: Tensor | None, count: int) -> dict[str, Any]:
    """Return the keywords of a call for conditions of ``split_arguments`` and a jump length: its inverse.

    Args:
        count: the number of samples.
    """
    arguments = keywords(cond, h)
    for name, rows in arguments.pop(_LENGTHS, {}).items():
        arguments[name] = [row[: int(length)] for row, length in zip(arguments[name], rows, strict=True)]
    for name in [name for name in arguments if name.endswith(_EACH)]:
        arguments[name.removesuffix(_EACH)] = [arguments.pop(name)] * count
    return arguments


def _is_rows(value: Any, one: Any, count: int) -> bool:  # noqa: ANN401 any argument of a network
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or len(value) != count:
        return False
    # Some pipelines pass a mask only for several prompts, of which the shorter are padded.
    return not isinstance(one, torch.Tensor) or len(one) == 1
