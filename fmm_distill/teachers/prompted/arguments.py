"""The arguments of a network's call as conditions: rows of the samples, and values that all samples share.

Which axis of an argument follows the samples is found by behavior: the arguments of calls with other prompts, in
another order and of another number are compared. An axis of the right length alone proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.core.conditioning import Conditioning
from fmm_distill.core.parametrization import keywords
from fmm_distill.errors import UserError
from fmm_distill.teachers.conditions import WITHOUT
from fmm_distill.teachers.prompted.rows import (
    LENGTHS,
    EqualEntries,
    Ragged,
    RaggedRows,
    Rows,
    is_close,
    rows_of_list,
    rows_of_tensor,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from fmm_distill.teachers.prompted.rows import AnyRows

__all__ = ["ArgumentLayout", "Probes", "read_layout"]


@dataclass(frozen=True)
class Probes:
    """The arguments of calls with prompts A, B and C, of which A is the longest.

    Attributes:
        two, swapped, three: those of the prompts (A, B), (B, A) and (A, B, C).
    """

    two: Mapping[str, Any]
    swapped: Mapping[str, Any]
    three: Mapping[str, Any]

    @property
    def all(self) -> tuple[Mapping[str, Any], ...]:
        """All of them."""
        return self.two, self.swapped, self.three


@dataclass(frozen=True)
class ArgumentLayout:
    """The parts of a call's arguments that are rows of the samples.

    The path of a part is the name of the argument and the keys that lead to it, joined by dots:
    ``added_cond_kwargs.text_embeds``, ``text_encoder_layers.0``.

    Attributes:
        own: names of the sample and of the times, which are no conditions.
        rows: by path, how the rows of the samples are arranged.
        containers: types of the dictionaries, lists and tuples that hold rows, by path.
        fixed: paths of the tensors that all samples share.
    """

    own: tuple[str, ...]
    rows: Mapping[str, AnyRows] = field(default_factory=dict)
    containers: Mapping[str, type] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()

    @property
    def takes_one(self) -> bool:
        """True if a call has one sample: the rows of several have several lengths."""
        return any(isinstance(rows, RaggedRows) for rows in self.rows.values())

    def split(self, arguments: Mapping[str, Any], count: int) -> Conditioning:
        """Split the arguments of a call with ``count`` samples into rows and shared values.

        Raises:
            UserError: if an argument has another form than in the calls from which the layout was read.
        """
        inputs: dict[str, Tensor] = {}
        shared: dict[str, Any] = {}
        for name, value in arguments.items():
            # A tuple has the same form for all networks; outputs with names do not.
            if name not in (*self.own, "return_dict"):
                self._split(name, value, count, (inputs, shared))
        return Conditioning(inputs, shared | {"return_dict": False})

    def _split(self, path: str, value: Any, count: int, found: tuple[dict[str, Tensor], dict[str, Any]]) -> None:  # noqa: ANN401 any argument
        inputs, shared = found
        if path in self.containers and value is not None:
            for key, item in _items(value):
                self._split(f"{path}.{key}", item, count, found)
        elif path in self.rows and value is not None:
            rows = self.rows[path]
            if isinstance(rows, EqualEntries):
                shared[path] = value[0]
            else:
                inputs |= rows.split(path, value, count)
        elif isinstance(value, torch.Tensor) and path not in self.fixed:
            raise UserError(
                f"expected the network's arguments of other prompts, got {path} in addition; try prompts of another "
                "length"
            )
        else:
            shared[path] = value

    def join(self, cond: Conditioning | None, h: Tensor | None, count: int) -> dict[str, Any]:
        """Return the keywords of a call for conditions of ``split`` and a jump length: its inverse.

        Args:
            count: the number of samples.
        """
        if cond is None:
            return keywords(None, h)
        equal = {path for path, rows in self.rows.items() if isinstance(rows, EqualEntries)}
        shared = {path: [value] * count if path in equal else value for path, value in cond.shared.items()}
        inputs: dict[str, Any] = {}
        for path in cond.inputs:
            # What is joined to the sample is no argument of its own, and has its rows first.
            rows = self.rows.get(path, Rows(0))
            # Inputs of the empty prompt are stored with those of the prompt, and are passed in their place.
            if not path.startswith((LENGTHS, WITHOUT)) and not isinstance(rows, EqualEntries):
                inputs[path] = rows.join(path, cond.inputs)
        arguments = keywords(replace(cond, inputs=inputs, shared=shared), h)
        # Inner containers first: an outer one becomes a list of what they are then.
        for path in sorted(self.containers, key=len, reverse=True):
            _close(arguments, path, self.containers[path])
        return arguments


def read_layout(probes: Probes, own: tuple[str, ...], source: str) -> ArgumentLayout:
    """Find the rows of the samples in the arguments of a call.

    Args:
        own: names of the sample and of the times.
        source: the id or folder of the pipeline, for messages.

    Raises:
        UserError: if an argument mixes the samples, or if the rows of a sample depend on the other samples.
    """
    rows: dict[str, AnyRows] = {}
    containers: dict[str, type] = {}
    fixed: set[str] = set()
    for name, value in probes.two.items():
        if name not in (*own, "return_dict"):
            try:
                parts = list(_parts(name, value, probes.swapped.get(name), probes.three.get(name)))
            except UserError as error:
                raise UserError(f"{source}: {error}") from error
            containers |= {path: found for path, found in parts if isinstance(found, type)}
            rows |= {path: found for path, found in parts if found is not None and not isinstance(found, type)}
            fixed |= {path for path, found in parts if found is None}
    holding = {path for path in containers if any(row.startswith(f"{path}.") for row in rows)}
    # A container without rows is shared as one value.
    fixed = {path for path in fixed if "." not in path or path.rpartition(".")[0] in holding}
    layout = ArgumentLayout(own, rows, {path: containers[path] for path in holding}, frozenset(fixed))
    _check(layout, probes, source)
    return layout


def _parts(path: str, two: Any, swapped: Any, three: Any) -> Iterator[tuple[str, AnyRows | type | None]]:  # noqa: ANN401 any argument
    """Yield the path of each part of an argument: with its rows, None for a shared tensor, or a container's type."""
    if isinstance(two, torch.Tensor):
        same = isinstance(swapped, torch.Tensor) and isinstance(three, torch.Tensor)
        yield path, rows_of_tensor(path, two, swapped, three) if same else None
    elif isinstance(two, Ragged):
        yield path, RaggedRows()
    elif isinstance(two, list) and isinstance(three, list) and (len(two), len(three)) == (2, 3):
        yield path, rows_of_list(two, three)
    elif isinstance(two, dict | list | tuple) and type(two) is type(swapped) is type(three) and len(two) == len(three):
        yield path, type(two)
        for (key, item), (_, second), (_, third) in zip(_items(two), _items(swapped), _items(three), strict=True):
            yield from _parts(f"{path}.{key}", item, second, third)


def _check(layout: ArgumentLayout, probes: Probes, source: str) -> None:
    """Check that rows follow their prompts, and that shared values don't depend on them."""
    two, swapped, three = (
        layout.split(arguments, count) for arguments, count in ((probes.two, 2), (probes.swapped, 2), (probes.three, 3))
    )
    order = torch.tensor([1, 0])
    for path, rows in two.inputs.items():
        others = (swapped.inputs.get(path), three.inputs.get(path))
        if (
            others[0] is None
            or others[1] is None
            or not (is_close(rows, others[0][order]) and is_close(rows, others[1][:2]))
        ):
            raise UserError(
                f"{source}: expected inputs of a prompt that don't depend on the other prompts of a call, got "
                f"others in {path}, such as a second sample or a random embedding; write an adapter for it "
                "(docs/add-a-teacher.md)"
            )
    for path, value in two.shared.items():
        if not all(_is_same(value, other.shared.get(path)) for other in (swapped, three)):
            raise UserError(
                f"{source}: expected one value of {path} for all prompts, or one per prompt, got a value that depends "
                "on all of them; write an adapter for it (docs/add-a-teacher.md)"
            )


def _is_same(one: Any, other: Any) -> bool:  # noqa: ANN401 any argument
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return is_close(one, other)
    if isinstance(one, dict | list | tuple) and type(one) is type(other):
        pairs = zip(_items(one), _items(other), strict=False)
        return len(one) == len(other) and all(a == b and _is_same(x, y) for (a, x), (b, y) in pairs)
    # Objects of other kinds may be made anew for each call.
    plain = bool | int | float | str | None
    return one == other if isinstance(one, plain) and isinstance(other, plain) else type(one) is type(other)


def _items(container: Any) -> Sequence[tuple[Any, Any]]:  # noqa: ANN401 a dictionary, list or tuple
    return list(container.items() if isinstance(container, dict) else enumerate(container))


def _close(arguments: dict[str, Any], path: str, kind: type) -> None:
    """Make the dictionary at a path a list or tuple, if it is one."""
    *groups, last = path.split(".")
    target: Any = arguments
    for group in groups:
        target = target.get(group, {})
    if kind is not dict and last in target:
        entries = target[last]
        target[last] = kind(entries[key] for key in sorted(entries, key=int))
