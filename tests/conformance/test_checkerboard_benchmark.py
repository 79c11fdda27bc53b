"""The checkerboard benchmark: its data, its yardsticks, its network, and a small run from end to end."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.checkerboard import experiment as checkerboard
from experiments.checkerboard.report import markdown
from experiments.plane import (
    HALF_WIDTH,
    REACH,
    WIDTH,
    Board,
    Perceptron,
    PlaneTeacher,
    closed_form,
    divergence,
    endpoint_error,
    sample,
    solved,
)
from fmm_distill.core.flow_map import diagonal
from fmm_distill.core.time_axis import LinearClock
from fmm_distill.losses.registry import BUILT_IN
from fmm_distill.teachers.closed_form import Checkerboard

TINY = checkerboard.Budget(
    width=8, teacher_steps=3, steps=4, long_steps=4, seeds=2, solver_steps=2, points=500, curve=2
)


def places(count):
    return torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_data_are_those_of_the_closed_form():
    ours = Board().at(places(200_000)) / HALF_WIDTH
    square = ((ours + 1) * 2).floor()
    assert ((square.sum(1) % 2) == 0).all()
    theirs = Checkerboard().sample(200_000, torch.Generator().manual_seed(1))
    for power in (1, 2, 4):
        assert (ours**power).mean(0) == pytest.approx((theirs**power).mean(0), abs=0.01)
    assert (ours[:, 0] * ours[:, 1]).mean() == pytest.approx(1 / 16, abs=0.005)
    counts = (square[:, 0] * 4 + square[:, 1]).unique(return_counts=True)[1]
    assert len(counts) == 8
    assert (counts / 25_000 - 1).abs().max() < 0.05
    within = (ours + 1) * 2 % 1
    # The two coordinates within a square come from different bits of one number.
    assert torch.corrcoef(within.T)[0, 1].abs() < 0.01
    assert ours.std() == pytest.approx(1 / HALF_WIDTH, abs=0.005)


@pytest.mark.parametrize(("bins", "floor"), [(50, 0.065), (48, 0.009)])
def test_perfect_samples_have_the_floor(bins, floor):
    assert divergence(Board().at(places(64_000)), bins) == pytest.approx(floor, abs=0.002)


def test_divergence_of_what_can_be_counted():
    # Half of the points on one white square of 2 x 2 bins, the other half off the board: 1 point for each empty bin.
    square = torch.tensor([[-0.9, -0.9], [-0.9, -0.6], [-0.6, -0.9], [-0.6, -0.6]]).repeat(8, 1) * HALF_WIDTH
    points = torch.cat([square, torch.full((32, 2), 9.0)])
    share = torch.tensor([8 / 92] * 4 + [1 / 92] * 28, dtype=torch.float64)
    assert divergence(points, 8) == pytest.approx(-(share * 32).log().mean().item())


def test_a_jump_starts_as_an_euler_step():
    network = Perceptron(1, width=16)
    x, t, r = torch.randn(5, 2), torch.rand(5) / 2 + 0.5, torch.rand(5) / 2
    assert torch.equal(network.mean_velocity(x, t, r), network.mean_velocity(x, t, t))
    assert torch.equal(sample(network, x, 4), sample(checkerboard.Euler(network), x, 4))
    with torch.no_grad():
        next(network.parameters()).add_(0.1)
    assert not torch.equal(network.mean_velocity(x, t, r), network.mean_velocity(x, t, t))
    assert not torch.equal(sample(network, x, 4), sample(checkerboard.Euler(network), x, 4))


def test_the_network_is_bounded_where_no_sample_goes():
    network = Perceptron(1, width=16)
    t, r = torch.full((2,), 0.5), torch.zeros(2)
    far = torch.tensor([[1e3, 0.3], [-0.2, -1e3]])
    edge = torch.tensor([[REACH * HALF_WIDTH, 0.3], [-0.2, -REACH * HALF_WIDTH]])
    torch.testing.assert_close(network.mean_velocity(far, t, r), network.mean_velocity(edge, t, r))
    assert not torch.allclose(network.mean_velocity(far, t, r), network.mean_velocity(0.9 * edge, t, r))


def test_the_closed_form_makes_the_board_of_noise():
    noise = torch.randn(8000, 2, generator=torch.Generator().manual_seed(3))
    ends = solved(closed_form(), noise, 50)
    off = (((ends / HALF_WIDTH + 1) * 2).floor().sum(1) % 2 != 0) | (ends.abs() > HALF_WIDTH).any(1)
    assert off.float().mean() < 0.03
    assert divergence(ends, 16) < 0.05


def test_a_lost_sample_counts_as_a_boards_width_away():
    ends = torch.zeros(4, 2)
    points = torch.tensor([[0.3, 0.4], [torch.inf, 0.0], [1e12, 0.0], [torch.nan, 0.0]])
    expected = ((0.5**2 / 2 + 3 * WIDTH**2) / 4) ** 0.5
    assert endpoint_error(points, ends) == pytest.approx(expected)
    assert divergence(points[[0, 0, 0, 1]], 4) != divergence(points[[1, 1, 2, 3]], 4)
    assert divergence(points[1:], 4) == pytest.approx(torch.tensor((8 + 3) / 8).log().item())


def test_a_run_that_diverges_has_a_result(tmp_path, monkeypatch):
    hot = checkerboard.METHODS["lagrangian"] | {"loss": {"name": "lagrangian", "stop_gradient": "nowhere"}}
    base = checkerboard.recipe_for

    def recipe_for(*arguments):
        recipe = base(*arguments)
        training = recipe.training.model_copy(update={"max_grad_norm": 1e30})
        optimizer = recipe.optimizer.model_copy(update={"lr": 1e30})
        return recipe.model_copy(update={"training": training, "optimizer": optimizer})

    monkeypatch.setattr(checkerboard, "recipe_for", recipe_for)
    bench = checkerboard.Experiment(TINY, tmp_path)
    network = Perceptron(0, width=TINY.width)
    teacher = PlaneTeacher(diagonal(network), LinearClock())
    result = bench.student("hot", checkerboard.Run(hot, 4), network, teacher, torch.zeros_like(bench.noise))
    assert list(result["endpoint"].values()) == [pytest.approx(WIDTH)] * 5
    assert bench.student("hot", checkerboard.Run(hot, 4), network, teacher, bench.noise) == result


def test_settings_of_a_run_are_not_mixed(tmp_path):
    first, other = (checkerboard.recipe_for(checkerboard.METHODS[name], 4, 0, 1) for name in ("lagrangian", "eulerian"))
    checkerboard.save_recipe(first, tmp_path / "run")
    checkerboard.save_recipe(first, tmp_path / "run")
    with pytest.raises(SystemExit, match="other settings"):
        checkerboard.save_recipe(other, tmp_path / "run")


def test_chunks_change_nothing(monkeypatch):
    network, noise = Perceptron(1, width=16), torch.randn(37, 2)
    teacher = PlaneTeacher(diagonal(network), LinearClock())
    whole = sample(network, noise, 2), solved(teacher, noise, 3)
    monkeypatch.setattr("experiments.plane.CHUNK", 5)
    torch.testing.assert_close((sample(network, noise, 2), solved(teacher, noise, 3)), whole)


def test_every_loss_is_in_the_table():
    assert {method["loss"]["name"] for method in checkerboard.METHODS.values()} == set(BUILT_IN)
    for method in checkerboard.METHODS.values():
        assert checkerboard.recipe_for(method, 7, 3, 2).training.seed == 3


@pytest.mark.slow
def test_a_small_benchmark_resumes_and_reports(tmp_path, monkeypatch, capsys):
    names = ["lagrangian", "progressive-half", "consistency", "operator_regression", "mean_flow"]
    results = checkerboard.run_experiment(TINY, tmp_path, names)
    assert {name: len(runs) for name, runs in results["runs"].items()} == dict.fromkeys(names, 2)
    first = [tuple(runs[0]["endpoint"].values()) for runs in results["runs"].values()]
    assert len(set(first)) == len(names)
    for runs in results["runs"].values():
        assert list(runs[0]["kl_50"]) == ["1", "2", "4", "8", "16"]
        assert runs[0]["endpoint"] != runs[1]["endpoint"]
    assert all(0 < share < 1 for share in results["outside"].values())
    assert [point["samples"] for point in results["long"]["curve"]] == [2 * 1024, 4 * 1024]
    checkerboard.pictures(results, tmp_path)
    assert (tmp_path / "checkerboard.png").stat().st_size > 10_000
    assert (tmp_path / "checkerboard-curve.png").stat().st_size > 10_000
    table = markdown(results | {"minutes": 1.0})
    assert all(table.count(f"| {name} |") == 4 for name in names)

    capsys.readouterr()
    monkeypatch.setattr(checkerboard, "outside", lambda *_: 0.5)
    again = checkerboard.run_experiment(TINY, tmp_path, names)
    assert "distill:" not in capsys.readouterr().err
    assert again["runs"] == results["runs"]
    assert again["teacher"] == results["teacher"]

    # What is missing is made again, to the last bit.
    (tmp_path / "lagrangian-1" / "result.json").unlink()
    (tmp_path / "lagrangian-1" / "steps.jsonl").unlink()
    third = checkerboard.run_experiment(TINY, tmp_path, names)["runs"]["lagrangian"][1]
    assert third["endpoint"] == results["runs"]["lagrangian"][1]["endpoint"]


def test_another_budget_is_refused(tmp_path):
    (tmp_path / "budget.json").write_text(json.dumps({"width": 9}))
    with pytest.raises(SystemExit, match="another budget"):
        checkerboard.run_experiment(TINY, tmp_path, [])
