"""The student: the teacher's network with one more input, as a flow map; and the fold back into a stock network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from diffusers import UNet2DModel

from fmm_distill.flow_map import LearnedFlowMap
from fmm_distill.interpolant import expand, velocity_from_prediction
from fmm_distill.two_time import TwoTimeUNet2DModel

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.interpolant import Prediction, Schedule
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.velocity import Conditioning

__all__ = ["Student", "StudentPrediction", "fold", "make_student"]

StudentPrediction = Literal["teacher", "v_prediction"]


class Student(LearnedFlowMap):
    """A two-time network read as a flow map on the teacher's schedule.

    ``u`` is ``eps_hat - x0_hat`` of the network's output, so that a jump is a DDIM step (Song et al. 2021,
    arXiv 2010.02502, eq. 12 with sigma = 0) from t to r.
    """

    def __init__(self, network: TwoTimeUNet2DModel, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.clock = schedule
        self.t_max = schedule.t_max

    def mean_velocity_of_jump(
        self,
        x: Float[Tensor, "batch *event"],
        t: Float[Tensor, " batch"],
        h: Float[Tensor, " batch"],
        cond: Conditioning | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """u of the jump of length h (a share of all timesteps) that starts at t."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        x_teacher = expand(alpha + sigma, x) * x
        # Times are never cast below float32: 999 is 1000 in bfloat16.
        precise = torch.promote_types(x.dtype, torch.float32)
        timestep = self.schedule.timestep(t).clamp_min(0).to(precise)
        output = self.network(x_teacher, timestep, h.to(precise)).sample.to(x.dtype)
        return velocity_from_prediction(self.prediction, output, x_teacher, alpha, sigma)


def make_student(teacher: Teacher, prediction: StudentPrediction = "teacher", *, seed: int = 0) -> Student:
    """A student with the teacher's weights; equal to the teacher for every (t, r) where it keeps its prediction.

    With ``prediction="v_prediction"`` and another teacher the weights are only a start: the diagonal has to be
    regressed on the teacher's velocity first (the trainer does, see ``student.regression_steps``).
    """
    config = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
    # The new embedding's first layer is drawn: from a seed of its own, so that a run can begin twice.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TwoTimeUNet2DModel.from_config(config)
    missing, unexpected = network.load_state_dict(teacher.network.state_dict(), strict=False)
    if unexpected or any(not key.startswith("jump_embedding.") for key in missing):
        raise RuntimeError(f"two-time network does not match the teacher: missing {missing}, unexpected {unexpected}")
    kept = teacher.prediction if prediction == "teacher" else prediction
    return Student(network.eval(), teacher.schedule, kept)


@torch.no_grad()
def fold(network: TwoTimeUNet2DModel, steps: int) -> UNet2DModel:
    """The stock network that equals ``network`` on the uniform grid of ``steps`` jumps.

    There h is 1 / steps in every jump, so its embedding is one vector: it goes into the bias that it was added to.
    """
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    stock = UNet2DModel.from_config(config)
    state = {key: value for key, value in network.state_dict().items() if not key.startswith("jump_embedding.")}
    stock.load_state_dict(state)
    h = torch.full((1,), 1 / steps, device=network.device)
    stock.time_embedding.linear_2.bias += network.jump_embedding(h)[0].to(stock.device)
    return stock.eval()
