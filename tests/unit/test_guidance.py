from __future__ import annotations

import pytest
import torch

from fmm_distill.config.recipe import parse
from fmm_distill.errors import UserError
from fmm_distill.run.plan import open_teacher
from fmm_distill.teachers.guidance import Guidance
from tests.conftest import save_teacher, tiny_unet


@pytest.fixture
def two(tmp_path):
    """A teacher and a weaker one: the same network with its last layer halved."""
    network = tiny_unet()
    save_teacher(tmp_path / "strong", network)
    with torch.no_grad():
        network.conv_out.weight /= 2
    save_teacher(tmp_path / "weak", network)
    return str(tmp_path / "strong"), str(tmp_path / "weak")


def opened(strong, **guidance):
    return open_teacher(parse({"teacher": strong, "guidance": guidance}, "here"))


@torch.no_grad()
def test_autoguidance_is_the_difference_to_a_weaker_teacher(two):
    strong, weak = two
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    better, worse = opened(strong).velocity(x, t), opened(weak).velocity(x, t)
    guided = opened(strong, scale=2.5, weaker=weak, interval=(0.4, 1.0)).velocity(x, t)
    torch.testing.assert_close(guided[1:], (worse + 2.5 * (better - worse))[1:])
    assert torch.equal(guided[0], better[0])
    assert (guided[1:] - better[1:]).abs().max() > 1e-3


def test_a_weaker_teacher_of_another_shape(two, tmp_path):
    save_teacher(tmp_path / "large", tiny_unet(sample_size=16))
    with pytest.raises(
        UserError, match=r"guidance\.weaker .*large: expected the teacher's shape and range of time .*got .*16"
    ):
        opened(two[0], scale=2.0, weaker=str(tmp_path / "large"))


def test_a_weaker_teacher_without_a_scale(two):
    with pytest.raises(UserError, match=r"guidance\.weaker: expected a guidance\.scale other than 1"):
        opened(two[0], weaker=two[1])


def test_outside_the_interval_the_null_answer_is_not_asked_for():
    v, t = torch.ones(2, 3), torch.tensor([0.1, 0.2])

    def never():
        raise AssertionError("not needed")

    assert Guidance(3.0, (0.5, 1.0)).guided(v, never, t) is v
    assert Guidance(1.0).guided(v, never, t) is v
    guided = Guidance(3.0, (0.15, 1.0)).guided(v, lambda: torch.zeros(2, 3), t)
    assert guided.tolist() == [[1, 1, 1], [3, 3, 3]]
