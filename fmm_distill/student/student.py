"""The student: a network conditioned on two times, read as a flow map on the teacher's schedule."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from diffusers import ModelMixin
from torch import nn

from fmm_distill.core.flow_map import LearnedFlowMap
from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.staged import StagedNetwork, stages_of
from fmm_distill.core.torch_state import own_state
from fmm_distill.errors import UserError
from fmm_distill.student.own_network import MapNetwork, TwoTimeNetwork
from fmm_distill.student.scaled import ScaledWeights, freeze_base, ranks_of_layers
from fmm_distill.student.scaled_layers import scaled_layers
from fmm_distill.student.stages import of_stage, per_stage
from fmm_distill.student.time_embedding import find_jump_hosts
from fmm_distill.student.two_time import two_time
from fmm_distill.teachers.frozen_adapter import share_adapter
from fmm_distill.teachers.velocity_field import VelocityNetwork, VelocityParametrization

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.parametrization import Parametrization
    from fmm_distill.core.schedules import Schedule
    from fmm_distill.core.time_axis import Prediction
    from fmm_distill.teachers.base import Teacher

__all__ = ["Student", "StudentPrediction", "is_new"]

StudentPrediction = Literal["teacher", "v_prediction"]


class Student(LearnedFlowMap):
    """A two-time network read as a flow map on the teacher's schedule.

    ``u`` is ``eps_hat - x0_hat`` of the network's output, so that a jump is a DDIM step (Song et al. 2021,
    arXiv 2010.02502, eq. 12 with sigma = 0) from t to r.

    ``from_teacher`` makes an untrained one; ``fmm_distill.load_student`` opens one that was exported.

    Attributes:
        started_from: the class of the network that it was started from; None: the teacher's network.
    """

    started_from: str | None = None

    def __init__(self, network: nn.Module, parametrization: Parametrization) -> None:
        super().__init__()
        self.network = network
        self.parametrization = parametrization
        self.clock = parametrization.schedule
        self.t_max = parametrization.schedule.t_max

    @classmethod
    @own_state()
    def from_teacher(
        cls,
        teacher: Teacher,
        prediction: StudentPrediction = "teacher",
        *,
        network: nn.Module | None = None,
        scaled: ScaledWeights | None = None,
        seed: int = 0,
    ) -> Self:
        """Return a student with the teacher's weights, or with those of ``network``.

        The length h of a jump is an input of the network by an embedding, or it scales a change of the weights.

        With the teacher's weights and prediction the student equals the teacher for every (t, r) until it is trained.
        With ``prediction="v_prediction"`` and another teacher the weights are only a start: the diagonal has to be
        regressed on the teacher's velocity first (``student.regression_steps`` of a recipe).

        Args:
            scaled: the changes of the weights that h scales; None: h is embedded, and every weight is trained.
            network: the network to start from, which a teacher without a network needs: a network that is called as
                the stock ones of diffusers are, ``network(x, timestep).sample``, and that predicts the velocity, or a
                ``LearnedFlowMap`` of your own, which measures jumps on the teacher's time axis.
            seed: seed of the new layers' initialization.

        Raises:
            UserError: if there is no network, it has no time embedding to add the jump to, it is not called with h, or
                the teacher's schedule does not have the prediction.
        """
        if isinstance(network, LearnedFlowMap):
            return cls._of_map(teacher, network)
        started_from = None if network is None else type(network).__name__
        if network is not None:
            teacher = _with_network(teacher, network)
        if isinstance(teacher.network, VelocityNetwork):
            raise UserError(
                f"{teacher.source}: a velocity field has no network that a student could start from; expected "
                "network=... (student=... in distill), a diffusers network for its samples or a LearnedFlowMap"
            )
        chosen = teacher.prediction if prediction == "teacher" else prediction
        if chosen != teacher.prediction and teacher.prediction not in ("epsilon", "sample", "v_prediction"):
            raise UserError(
                f"student.prediction: expected teacher for a teacher of {teacher.prediction}, got {chosen}; "
                "leave it out"
            )
        parametrization = replace(teacher.parametrization, prediction=chosen)

        def checked_copy(one: Teacher) -> nn.Module:
            copied = _two_time_copy(one, scaled, seed).eval()
            _check_first_call(cls(copied, of_stage(parametrization)), one)
            return copied

        student = cls(per_stage(teacher, checked_copy), parametrization)
        student.started_from = started_from
        return student

    @classmethod
    def _of_map(cls, teacher: Teacher, flow_map: LearnedFlowMap) -> Self:
        student = cls(MapNetwork(flow_map).eval(), VelocityParametrization(teacher.schedule, "flow_prediction"))
        student.started_from = type(flow_map).__name__
        clock = getattr(flow_map, "clock", None)
        if clock is not None:
            t = torch.linspace(teacher.schedule.t_min, teacher.schedule.t_max, 5, dtype=torch.float64)
            # Differences, since a constant offset of the clock changes no length.
            own, expected = (one.warp(t) - one.warp(t[:1]) for one in (clock, student.clock))
            # A map whose h had another meaning would be trained and sampled on different jumps.
            if not torch.allclose(own, expected, rtol=1e-6):
                raise UserError(
                    f"student: expected a {type(flow_map).__name__} whose clock is the teacher's time axis, got "
                    f"{type(clock).__name__}; try clock = teacher.schedule"
                )
        return student

    @property
    def schedule(self) -> Schedule:
        """The teacher's noise levels."""
        return self.parametrization.schedule

    @property
    def prediction(self) -> Prediction:
        """The quantity that the network predicts."""
        return self.parametrization.prediction

    @contextmanager
    def equal_jumps(self) -> Iterator[None]:
        """Evaluate jumps of one length for all samples of a call; a scaled network then forms its weights once."""
        states = [cast("Any", part).call_state for part in stages_of(self.network) if hasattr(part, "call_state")]
        before = [state.group for state in states]
        for state in states:
            state.group = 0
        try:
            yield
        finally:
            for state, group in zip(states, before, strict=True):
                state.group = group

    def mean_velocity_of_jump(
        self,
        x: Float[Tensor, "batch *event"],
        t: Float[Tensor, " batch"],
        h: Float[Tensor, " batch"],
        cond: Conditioning | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """Return u of the jump of length ``h = clock.warp(t) - clock.warp(r)`` that starts at t."""
        return self.parametrization.velocity(self.network, x, t, cond, h)


def _with_network(teacher: Teacher, network: nn.Module) -> Teacher:
    """Return the teacher with the network that a student starts from in place of its own."""
    if isinstance(teacher.network, StagedNetwork):
        raise UserError(
            f"{teacher.source}: expected a student that starts from the teacher's two networks, got "
            f"{type(network).__name__}; leave network (student in distill) out"
        )
    parametrization = teacher.parametrization
    if isinstance(teacher.network, VelocityNetwork):
        parametrization = Parametrization(teacher.schedule, "flow_prediction")
    return replace(teacher, network=network, parametrization=parametrization)


def _two_time_copy(teacher: Teacher, scaled: ScaledWeights | None, seed: int) -> nn.Module:
    """Return a copy of the teacher's network with h as one more input."""
    guidance_range = None if teacher.guidance is None else teacher.guidance.range
    # A range of guidance is an embedding for both kinds of students.
    hosts = find_jump_hosts(teacher) if scaled is None or guidance_range is not None else {}
    ranks = None if scaled is None else ranks_of_layers(teacher, scaled)
    factors = scaled is not None and scaled.diagonal and scaled.rank > 0
    # The first layer of the new embedding is random: from a seed of its own, so that a run is reproducible.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not isinstance(teacher.network, ModelMixin):
            network: nn.Module = TwoTimeNetwork(teacher.network, hosts, guidance_range, ranks, diagonal=factors)
        else:
            config = teacher.config | {"jump_hosts": list(hosts), "jump_widths": list(hosts.values())}
            config |= {"scaled_layers": ranks, "diagonal": factors, "guidance_range": guidance_range}
            network = cast("Any", two_time(cast("Any", type(teacher.network)))).from_config(config)
            _load_teacher(network, teacher.network)
            share_adapter(teacher.network, network)
    if scaled is not None:
        freeze_base(network, diagonal=scaled.diagonal)
    return network


def _load_teacher(network: nn.Module, teacher: nn.Module) -> None:
    """Load the teacher's weights; all others are zero at first, or random."""
    # Not strict, since these are new; any other difference is an error below.
    missing, unexpected = network.load_state_dict(teacher.state_dict(), strict=False)
    if unexpected or not all(is_new(key) for key in missing):
        raise RuntimeError(f"two-time network does not match the teacher: missing {missing}, unexpected {unexpected}")


def is_new(name: str) -> bool:
    """Return whether the teacher's network has no parameter of this name: it depends on the jump."""
    return "jump_embedding." in name or name.rpartition(".")[2].startswith(("jump_", "diagonal_"))


@torch.no_grad()
def _check_first_call(student: Student, teacher: Teacher) -> None:
    """Call the student once, and refuse a call that leaves out h.

    Some networks cache tables of positions in their first call, which forward mode would wrap.
    """
    device = next(student.parameters()).device
    cond = teacher.conditioned_on(torch.zeros(1))
    cond = None if cond is None else cond.to(device)
    # A jump of length 0, which every student computes, trained or not.
    t = torch.full((1,), teacher.schedule.t_max, dtype=torch.float64, device=device)
    calls: list[bool] = []
    network = cast("Any", student.network)
    part = next(iter((*network.jump_embedding, *scaled_layers(network).values())))
    hook = part.register_forward_hook(lambda *_: calls.append(network.jump.h is not None))
    try:
        student.mean_velocity(torch.zeros(1, *teacher.event_shape, device=device), t, t, cond)
    finally:
        hook.remove()
    if not any(calls):
        raise UserError(
            f"{teacher.source}: expected the call of its Parametrization to pass h on, got one that leaves it out; try "
            "network(x, time, h=h) where h is not None"
        )
