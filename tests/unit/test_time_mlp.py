from __future__ import annotations

import pytest
import torch
from torch import nn

from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import FlowMatching
from fmm_distill.errors import UserError
from fmm_distill.student.time_embedding import find_jump_hosts
from fmm_distill.teachers.base import Teacher


class Waves(nn.Module):
    def forward(self, time):
        return torch.cat([time[:, None].sin(), time[:, None].cos()], -1)


class Network(nn.Module):
    """Embeds the time by ``layers``, one after the other."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.out = nn.Conv1d(1, 1, 1)

    def forward(self, x, time):
        embedded = time[:, None]
        for layer in self.layers:
            embedded = layer(time if isinstance(layer, Waves) else embedded)
        return type("Output", (), {"sample": self.out(x) + embedded.sum(-1)[:, None, None]})()


def teacher_of(*layers):
    return Teacher(Network(*layers), Parametrization(FlowMatching(), "flow_prediction"), (1, 4), "here", "own", {})


def test_the_second_of_two_linear_layers():
    assert find_jump_hosts(teacher_of(Waves(), nn.Linear(2, 6), nn.SiLU(), nn.Linear(6, 5))) == {"layers.3": 5}


def test_a_layer_of_another_kind_where_no_linear_one_is_told_the_time():
    assert find_jump_hosts(teacher_of(Waves())) == {"layers.0": 2}
    assert find_jump_hosts(teacher_of(Waves(), nn.SiLU())) == {"layers.1": 2}


@pytest.mark.parametrize(
    ("layers", "found"), [((), "none"), ((Waves(), nn.Linear(2, 6)), r"layers\.1")], ids=["none", "one"]
)
def test_nowhere_to_add_the_jump(layers, found):
    with pytest.raises(UserError, match=rf"here: no time embedding found in Network: .*, got {found}$"):
        find_jump_hosts(teacher_of(*layers))
