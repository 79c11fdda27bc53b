"""The student: the teacher's network with one more input, as a flow map; and the fold back into a stock network."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from fmm_distill.core.flow_map import LearnedFlowMap
from fmm_distill.core.torch_state import own_state
from fmm_distill.errors import UserError
from fmm_distill.student.time_embedding import find_jump_hosts
from fmm_distill.student.two_time import two_time

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.parametrization import Parametrization
    from fmm_distill.core.schedules import Schedule
    from fmm_distill.core.time_axis import Prediction
    from fmm_distill.teachers.base import Teacher

__all__ = ["OWN_SETTINGS", "Student", "StudentPrediction", "fold", "make_student", "stock_part"]

StudentPrediction = Literal["teacher", "v_prediction"]
# What the configuration of a two-time network holds more than the stock one's.
OWN_SETTINGS = ("jump_hosts", "jump_widths", "guidance_range", "flow_map")


class Student(LearnedFlowMap):
    """A two-time network read as a flow map on the teacher's schedule.

    ``u`` is ``eps_hat - x0_hat`` of the network's output, so that a jump is a DDIM step (Song et al. 2021,
    arXiv 2010.02502, eq. 12 with sigma = 0) from t to r.
    """

    def __init__(self, network: nn.Module, parametrization: Parametrization) -> None:
        super().__init__()
        self.network = network
        self.parametrization = parametrization
        self.clock = parametrization.schedule
        self.t_max = parametrization.schedule.t_max

    @property
    def schedule(self) -> Schedule:
        """The teacher's noise levels."""
        return self.parametrization.schedule

    @property
    def prediction(self) -> Prediction:
        """What the network predicts."""
        return self.parametrization.prediction

    def mean_velocity_of_jump(
        self,
        x: Float[Tensor, "batch *event"],
        t: Float[Tensor, " batch"],
        h: Float[Tensor, " batch"],
        cond: Conditioning | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """u of the jump of length h (a share of the whole way) that starts at t."""
        return self.parametrization.velocity(self.network, x, t, cond, h)


@own_state()
def make_student(teacher: Teacher, prediction: StudentPrediction = "teacher", *, seed: int = 0) -> Student:
    """A student with the teacher's weights; equal to the teacher for every (t, r) where it keeps its prediction.

    With ``prediction="v_prediction"`` and another teacher the weights are only a start: the diagonal has to be
    regressed on the teacher's velocity first (the trainer does, see ``student.regression_steps``).

    Raises:
        UserError: on a network without a time embedding to add the jump to, or a prediction that the teacher's schedule
            does not have.
    """
    kept = teacher.prediction if prediction == "teacher" else prediction
    if kept != teacher.prediction and teacher.prediction not in ("epsilon", "sample", "v_prediction"):
        raise UserError(f"student.prediction: {kept} on a teacher of {teacher.prediction}; wanted teacher")
    hosts = find_jump_hosts(teacher)
    config = teacher.config | {"jump_hosts": list(hosts), "jump_widths": list(hosts.values())}
    config["guidance_range"] = None if teacher.guidance is None else teacher.guidance.range
    # The new embedding's first layer is drawn: from a seed of its own, so that a run can begin twice.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _open(two_time(cast("Any", type(teacher.network))), config)
    missing, unexpected = network.load_state_dict(teacher.network.state_dict(), strict=False)
    if unexpected or any(not key.startswith("jump_embedding.") for key in missing):
        raise RuntimeError(f"two-time network does not match the teacher: missing {missing}, unexpected {unexpected}")
    student = Student(network.eval(), replace(teacher.parametrization, prediction=kept))
    _fill_tables(student, teacher)
    return student


@torch.no_grad()
def _fill_tables(student: Student, teacher: Teacher) -> None:
    """One ordinary call: some networks keep tables of positions from their first, and forward mode would wrap them."""
    device = next(student.parameters()).device
    cond = _some_condition(teacher, device)
    t = torch.full((1,), teacher.schedule.t_max, dtype=torch.float64, device=device)
    student.mean_velocity(torch.zeros(1, *teacher.event_shape, device=device), t, t, cond)


def _some_condition(teacher: Teacher, device: torch.device) -> Conditioning | None:
    cond = teacher.conditioned_on(torch.zeros(1))
    return None if cond is None else cond.to(device)


def _open(kind: Any, config: dict[str, Any]) -> nn.Module:  # noqa: ANN401 a diffusers class
    return cast("nn.Module", kind.from_config(config))


def stock_part(network: nn.Module) -> nn.Module:
    """A stock network of the same class with the weights of a two-time one, its jump embeddings left out."""
    config = {key: value for key, value in cast("Any", network).config.items() if not key.startswith("_")}
    config = {key: value for key, value in config.items() if key not in OWN_SETTINGS}
    stock = _open(type(network).__bases__[-1], config)
    state = {key: value for key, value in network.state_dict().items() if not key.startswith("jump_embedding.")}
    stock.load_state_dict(state)
    return stock.eval()


@torch.no_grad()
def fold(student: Student, teacher: Teacher, times: Float[Tensor, " points"]) -> nn.Module:
    """The stock network that equals the student's on the grid ``times``, one jump between neighbors.

    On a uniform grid the jumps have one length h, so their embeddings are one vector: it goes into the bias that it was
    added to. On another the smallest change of weight and bias that gives every jump its own vector at the time
    where it starts (least squares; the times are fewer than the layer's inputs). A range of guidance folds to the
    teacher's scale.

    Raises:
        UserError: on a grid with more different jumps than the layer can hold.
    """
    network = cast("Any", student.network)
    stock = stock_part(student.network)
    device = next(student.network.parameters()).device
    starts, places = times[:-1].to(device), student.clock.warp(times.to(device))
    lengths = (places[:-1] - places[1:]).float()
    scale = None if network.config["guidance_range"] is None else cast("Any", teacher.guidance).scale
    share = network.guidance_share(None if scale is None else torch.full_like(lengths, scale))
    for name, embedding in zip(network.config["jump_hosts"], network.jump_embedding, strict=True):
        host = cast("nn.Linear", stock.get_submodule(name))
        wanted = embedding(lengths, share).double()
        mean = torch.zeros_like(wanted[0]) if host.bias is None else wanted.mean(0)
        if host.bias is not None:
            host.bias.add_(mean.to(host.bias))
        rest = wanted - mean
        if float(rest.abs().max()) > 1e-6 * float(wanted.abs().max()):
            _tilt(host, _host_inputs(student, teacher, name, starts), rest)
    return stock


def _host_inputs(student: Student, teacher: Teacher, name: str, times: Tensor) -> Tensor:
    """What the layer that h is added to is given at these times: it depends on them alone."""
    seen: list[Tensor] = []
    host = student.network.get_submodule(name)
    hook = host.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    cond = _some_condition(teacher, times.device)
    try:
        for t in times:
            x = torch.zeros(1, *teacher.event_shape, device=times.device)
            student.mean_velocity_of_jump(x, t[None], torch.zeros(1, device=times.device), cond)
    finally:
        hook.remove()
    return torch.cat([inputs.reshape(-1, inputs.shape[-1])[:1] for inputs in seen])


def _tilt(host: nn.Linear, inputs: Tensor, wanted: Tensor) -> None:
    """The smallest change of weight and bias (where there is one) that adds ``wanted`` at ``inputs``."""
    constant = inputs.new_full((len(inputs), 1), float(host.bias is not None))
    rows = torch.cat([inputs, constant], 1).double()
    change = torch.linalg.pinv(rows) @ wanted
    if float((rows @ change - wanted).abs().max()) > 1e-5 * float(wanted.abs().max()):
        raise UserError(
            f"a grid of {len(inputs)} different jumps does not fold into a layer of {host.in_features} inputs; wanted "
            "fewer steps in export.steps"
        )
    host.weight.add_(change[:-1].T.to(host.weight))
    if host.bias is not None:
        host.bias.add_(change[-1].to(host.bias))
