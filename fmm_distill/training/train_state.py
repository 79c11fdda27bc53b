"""The state of training: all that a checkpoint stores and restores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.errors import UserError
from fmm_distill.training import checkpoint
from fmm_distill.training.ema import load_trained, trained_state
from fmm_distill.training.fsdp import full_state, placed_like

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from torch.optim.swa_utils import AveragedModel

__all__ = ["CriticState", "OptimizerState", "TrainState", "check_same_optimizer"]

# Types that JSON holds exactly: a float is written with all its digits.
PLAIN = (bool, int, float, str, list, tuple, type(None))


@dataclass(frozen=True)
class OptimizerState:
    """The state of any optimizer as named tensors and plain numbers.

    A key is ``<index>.<name>``, with the parameter's index in ``parameters``, whatever groups the optimizer makes of
    them. Values of a parameter group that steps have changed are stored too, except the learning rate, which the
    schedule sets.

    Attributes:
        parameters: all parameters that the optimizer was built for, and possibly more.
        defaults: values of the parameter groups as they were built.
    """

    optimizer: torch.optim.Optimizer
    parameters: Sequence[nn.Parameter]
    defaults: Sequence[Mapping[str, Any]]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the state, those of this process under FSDP."""
        return {key: value for key, value in self._items() if isinstance(value, torch.Tensor)}

    def plain(self) -> dict[str, Any]:
        """Return what is not a tensor, as JSON holds it.

        Raises:
            TypeError: if the state has a value that a checkpoint can't store exactly.
        """
        values = {key: value for key, value in self._items() if not isinstance(value, torch.Tensor)}
        groups = [
            {
                key: value
                for key, value in group.items()
                if key not in ("params", "lr") and _differs(value, default.get(key))
            }
            for group, default in zip(self.optimizer.param_groups, self.defaults, strict=True)
        ]
        for key, value in [*values.items(), *(item for group in groups for item in group.items())]:
            if not isinstance(value, PLAIN):
                raise TypeError(
                    f"{type(self.optimizer).__name__}: expected a state of tensors and plain values, got {key} of "
                    f"type {type(value).__name__}, which a checkpoint can't store"
                )
        return {"name": type(self.optimizer).__name__, "state": values, "groups": groups}

    def load(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Restore what ``tensors`` and ``plain`` returned.

        Raises:
            UserError: if they are the state of another optimizer.
        """
        check_same_optimizer(plain.get("name"), type(self.optimizer).__name__)
        order = {id(parameter): i for i, parameter in enumerate(self._ordered())}
        state: dict[int, dict[str, Any]] = {}
        for key, value in [*tensors.items(), *plain["state"].items()]:
            number, _, name = key.partition(".")
            parameter = self.parameters[int(number)]
            if isinstance(value, torch.Tensor) and value.dim():
                # A moment of the parameter's shape is split over the processes as the parameter is.
                value = placed_like({name: value}, {name: parameter})[name]
            state.setdefault(order[id(parameter)], {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        for group, changed in zip(groups, plain["groups"], strict=True):
            group |= {key: _like(value, group.get(key)) for key, value in changed.items()}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _ordered(self) -> list[nn.Parameter]:
        """Return the parameters in the order in which the optimizer numbers them."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _items(self) -> list[tuple[str, Any]]:
        # By identity: tensors compare element by element.
        index = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        ordered, state = self._ordered(), self.optimizer.state_dict()["state"]
        return [
            (f"{index[id(ordered[number])]}.{name}", value)
            for number, values in state.items()
            for name, value in values.items()
        ]


def check_same_optimizer(before: str | None, now: str) -> None:
    """Refuse to continue a run with another optimizer than it began with.

    Args:
        before: the name of the class that the run began with; None: not recorded.
        now: the name of the class that would continue it.

    Raises:
        UserError: if the names differ.
    """
    if before not in (None, now):
        raise UserError(
            f"optimizer: expected {before}, which the run began with, got {now}; pass that one again "
            "(distill(..., optimizer=...)), or start again with --fresh"
        )


def _differs(value: Any, other: Any) -> bool:  # noqa: ANN401 values of a parameter group
    if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
        return not torch.equal(value, other)
    # Identity first: some values do not compare equal to themselves, such as NaN.
    return value is not other and bool(value != other)


def _like(value: Any, there: Any) -> Any:  # noqa: ANN401 a value of a parameter group
    """Return a value as it was before JSON made a list of its tuple."""
    return tuple(value) if isinstance(there, tuple) else value


def _average_state(average: AveragedModel, network: nn.Module) -> dict[str, Tensor]:
    return trained_state(network, average.module) | {"n_averaged": average.n_averaged}


def _load_average(average: AveragedModel, network: nn.Module, stored: Mapping[str, Tensor]) -> None:
    state = dict(stored)
    average.n_averaged.copy_(state.pop("n_averaged"))
    load_trained(average.module, network, state)


@dataclass(frozen=True)
class CriticState:
    """The critic of a second stage, its moving average and the state of its optimizer."""

    network: nn.Module
    average: AveragedModel
    optimizer: OptimizerState

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint: file stem to named tensors."""
        average = _average_state(self.average, self.network)
        optimizer = self.optimizer.tensors()
        return {"critic": trained_state(self.network), "critic_average": average, "critic_optimizer": optimizer}

    def load(self, stored: checkpoint.Checkpoint) -> None:
        """Restore all from a checkpoint."""
        load_trained(self.network, self.network, stored.tensors["critic"])
        _load_average(self.average, self.network, stored.tensors["critic_average"])
        self.optimizer.load(stored.tensors["critic_optimizer"], stored.state["critic_optimizer"])


@dataclass(frozen=True)
class TrainState:
    """Everything that training changes.

    Attributes:
        averages: moving averages of the student, by their decay.
        frozen: the frozen target network; None: no loss has one.
        weight: the learned weight of the loss; None: it is not learned.
        optimizer: the optimizer's state.
        scaler: the gradient scaler of fp16; None: in other precisions.
        critic: the critic of a second stage, its average and its optimizer; None: there is none.
    """

    student: nn.Module
    averages: Mapping[float, AveragedModel]
    frozen: nn.Module | None
    weight: nn.Module | None
    optimizer: OptimizerState
    scaler: torch.amp.GradScaler | None
    critic: CriticState | None = None

    def tensors(self, *, main: bool) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint: file stem to named tensors. Every process has to call it.

        Args:
            main: True in the process that writes; the others get nothing.
        """
        tensors = {"student": trained_state(self.student), "optimizer": self.optimizer.tensors()}
        for rate, average in self.averages.items():
            tensors[checkpoint.average_name(rate)] = _average_state(average, self.student)
        if self.frozen is not None:
            tensors["frozen"] = trained_state(self.student, self.frozen)
        if self.weight is not None:
            tensors["weight"] = dict(self.weight.state_dict())
        if self.critic is not None:
            tensors |= self.critic.tensors()
        return {stem: full_state(named, main=main) for stem, named in tensors.items()}

    def plain(self) -> dict[str, Any]:
        """Return what is not a tensor, as JSON holds it."""
        scaler = None if self.scaler is None else self.scaler.state_dict()
        critic = {} if self.critic is None else {"critic_optimizer": self.critic.optimizer.plain()}
        return {"scaler": scaler, "optimizer": self.optimizer.plain()} | critic

    def load(self, stored: checkpoint.Checkpoint) -> None:
        """Restore the student, its averages, the target network, the optimizer and the scaler from a checkpoint."""
        load_trained(self.student, self.student, stored.tensors["student"])
        for rate, average in self.averages.items():
            _load_average(average, self.student, stored.tensors[checkpoint.average_name(rate)])
        if self.frozen is not None:
            load_trained(self.frozen, self.student, stored.tensors["frozen"])
        if self.weight is not None:
            self.weight.load_state_dict(placed_like(stored.tensors["weight"], self.weight.state_dict()))
        if self.critic is not None:
            self.critic.load(stored)
        self.optimizer.load(stored.tensors["optimizer"], stored.state["optimizer"])
        if stored.state["scaler"] is not None and self.scaler is not None:
            self.scaler.load_state_dict(stored.state["scaler"])
