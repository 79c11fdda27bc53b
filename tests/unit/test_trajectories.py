"""Solved trajectories lie on the closed-form flow, and are the same however they come about."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from fmm_distill.config.settings import TrajectorySettings
from fmm_distill.core.draws import draw
from fmm_distill.core.flow_map import FlowMap
from fmm_distill.core.time_axis import LinearClock
from fmm_distill.data import row_store as parts
from fmm_distill.data.starting_points import StartingPoints
from fmm_distill.data.trajectories import Trajectories, solve_trajectories, trajectory_layout
from fmm_distill.errors import UserError
from fmm_distill.teachers.conditions import Classes
from fmm_distill.teachers.guidance import Guidance
from tests.conformance.truths import TRUTHS

AXIS = LinearClock(0.01, 1.0)


@dataclass
class TrueTeacher:
    """A closed-form field in float64; of a class it is told, the field is that of a moved origin."""

    truth: FlowMap
    event_shape: tuple[int, ...]
    conditions: Classes | None = None
    guidance: Guidance | None = None
    schedule = AXIS

    def velocity(self, x, t, cond=None):
        return self.truth.velocity(x, t) if cond is None else self.truth.velocity(x - self.shift(cond), t)

    def shift(self, cond):
        labels = cond.inputs["class_labels"].double()
        return labels.reshape(-1, *[1] * len(self.event_shape))

    def prior(self, noise):
        return noise.double()

    def to(self, device):
        return self


def true_teacher(name, **more):
    truth, shape = TRUTHS[name]
    return TrueTeacher(truth, shape, **more)


def solved(teacher, folder, settings, **more):
    layout = trajectory_layout(folder, settings, teacher.event_shape)
    solve_trajectories(teacher, settings, layout, 3, **more)
    return Trajectories(layout, teacher.schedule, settings.points)


def exact(teacher, trajectories, index, t):
    start = trajectories.parts.rows("states", index)[:, 0]
    return teacher.truth(start, torch.full_like(t, AXIS.t_max), t)


# Measured for docs/decisions.md: the root mean square error at points 9 is between 6e-6 and 1.3e-4.
@pytest.mark.parametrize(("points_kept", "bound"), [(9, 2e-4), (17, 1.5e-5)])
@pytest.mark.parametrize("name", TRUTHS)
def test_points_lie_on_the_closed_form_flow(tmp_path, name, points_kept, bound):
    teacher = true_teacher(name)
    trajectories = solved(teacher, tmp_path, TrajectorySettings(count=100, points=points_kept, solver_steps=64))
    draws = draw(1, 0, 500, teacher.event_shape)
    picked = trajectories.pick(draws)
    t = AXIS.time_at(draws.first)
    x = StartingPoints(teacher, None, picked)(draws, t)
    error = x - exact(teacher, trajectories, picked.index, t)
    assert error.square().mean().sqrt() < bound
    # The bound says something: a straight line between the kept points is far off.
    assert len(set(picked.index.tolist())) > 90


def test_points_at_the_kept_times_are_the_kept_states(tmp_path):
    teacher = true_teacher("modes-plane")
    trajectories = solved(teacher, tmp_path, TrajectorySettings(count=5, points=5, solver_steps=8))
    states = trajectories.parts.rows("states", torch.arange(5))
    for k, time in enumerate(trajectories.times):
        x = trajectories.at(torch.arange(5), time.expand(5))
        torch.testing.assert_close(x, states[:, k], rtol=0, atol=1e-12)


def test_starts_at_t_max_are_the_prior_of_the_sample_itself(tmp_path):
    teacher = true_teacher("modes-plane")
    trajectories = solved(teacher, tmp_path, TrajectorySettings(count=5, points=3, solver_steps=4))
    draws = draw(0, 0, 6, (2,))
    t = torch.tensor([1.0, 0.5, 1.0, 0.2, 0.9, 1.0], dtype=torch.float64)
    x = StartingPoints(teacher, None, trajectories.pick(draws))(draws, t)
    assert x[t == 1].equal(draws.noise[t == 1].double())
    assert not (x[t < 1] == draws.noise[t < 1]).any()


def test_trajectories_are_told_what_they_were_solved_with(tmp_path):
    classes, guidance = Classes(("a", "b", "c"), None), Guidance(2.0, range=(1.0, 3.0))
    teacher = true_teacher("gaussian-narrow", conditions=classes, guidance=guidance)
    trajectories = solved(teacher, tmp_path, TrajectorySettings(count=60, points=9, solver_steps=32))
    draws = draw(1, 0, 200, (2,))
    picked = trajectories.pick(draws)
    told = picked.with_conditions(draws)
    cond = classes.pick(told.condition)
    assert set(cond.inputs["class_labels"].tolist()) == {0, 1, 2}
    t = AXIS.time_at(draws.first)
    shift, start = teacher.shift(cond), trajectories.parts.rows("states", picked.index)[:, 0]
    wanted = teacher.truth(start - shift, torch.ones_like(t), t) + shift
    torch.testing.assert_close(picked.points(told, t), wanted, rtol=0, atol=1e-3)
    assert told.guidance.equal(trajectories.parts.rows("guidance", picked.index))
    assert told.guidance.unique().numel() > 40
    rows = torch.tensor([4, 0, 9])
    assert picked.rows(rows).points(told.rows(rows), t[rows]).equal(picked.points(told, t)[rows])


def test_a_share_starts_from_the_students_own_jumps(tmp_path):
    teacher = true_teacher("modes-plane")
    trajectories = solved(teacher, tmp_path, TrajectorySettings(count=50, points=9, solver_steps=16))
    draws = draw(0, 0, 2000, (2,))
    t = torch.where(draws.kind < 0.2, 1.0, AXIS.time_at(draws.first))

    def student(x, t, r, cond):
        return torch.full_like(x, 77.0)

    x = StartingPoints(teacher, student, trajectories.pick(draws), on_policy=0.3)(draws, t)
    own = (x == 77).all(1)
    assert own.equal((draws.policy < 0.3) & (t < 1))
    assert own[t < 1].double().mean() == pytest.approx(0.3, abs=0.03)
    nothing = StartingPoints(teacher, student, trajectories.pick(draws), on_policy=0.0)(draws, t)
    assert nothing[~own].equal(x[~own])
    assert not (nothing == 77).any()
    assert (StartingPoints(teacher, student, trajectories.pick(draws), on_policy=1.0)(draws, t)[t < 1] == 77).all()


SMALL = TrajectorySettings(count=23, points=3, solver_steps=4)


@pytest.fixture
def small_parts(monkeypatch):
    # Five trajectories a part.
    monkeypatch.setattr(parts, "PART_BYTES", 5 * (2 * 3 * 4 * 2 + 16))


def files(folder):
    return {file.name: load_file(file) for file in sorted(folder.iterdir())}


def assert_same_files(folder, other):
    ours, theirs = files(folder), files(other)
    assert list(ours) == list(theirs) == [f"part-{i:05d}.safetensors" for i in range(5)]
    for name, tensors in ours.items():
        assert tensors.keys() == theirs[name].keys()
        assert all(tensors[key].equal(theirs[name][key]) for key in tensors)


class Killed(KeyboardInterrupt):
    """The process ends here."""


@pytest.mark.parametrize("calls", [1, 30, 70])
@pytest.mark.usefixtures("small_parts")
def test_trajectories_are_bit_equal_after_a_kill(tmp_path, calls):
    whole = true_teacher("modes-plane")
    solved(whole, tmp_path / "whole", SMALL)

    class Dying(TrueTeacher):
        left = calls

        def velocity(self, x, t, cond=None):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return super().velocity(x, t, cond)

    dying = Dying(whole.truth, whole.event_shape)
    with pytest.raises(Killed):
        solved(dying, tmp_path / "killed", SMALL)
    there = {file: file.stat().st_mtime_ns for file in (tmp_path / "killed").iterdir()}
    assert len(there) == calls // 19
    solved(whole, tmp_path / "killed", SMALL)
    assert_same_files(tmp_path / "killed", tmp_path / "whole")
    assert all(file.stat().st_mtime_ns == time for file, time in there.items())


@pytest.mark.usefixtures("small_parts")
def test_processes_share_the_parts(tmp_path):
    teacher = true_teacher("modes-plane")
    solved(teacher, tmp_path / "one", SMALL)
    layout = trajectory_layout(tmp_path / "two", SMALL, (2,))
    solve_trajectories(teacher, SMALL, layout, 3, shard=(1, 2))
    assert sorted(files(tmp_path / "two")) == ["part-00001.safetensors", "part-00003.safetensors"]
    solve_trajectories(teacher, SMALL, layout, 3, shard=(0, 2))
    assert_same_files(tmp_path / "two", tmp_path / "one")


def test_another_seed_has_other_noises(tmp_path):
    teacher = true_teacher("modes-plane")
    layouts = [trajectory_layout(tmp_path / str(seed), SMALL, (2,)) for seed in (3, 4)]
    for seed, layout in zip((3, 4), layouts, strict=True):
        solve_trajectories(teacher, SMALL, layout, seed)
    one, other = (Trajectories(layout, AXIS, 3).parts.rows("states", torch.arange(23)) for layout in layouts)
    assert not (one == other).any()
    assert one[:, 0].unique().numel() == 46


def test_a_full_disk_is_told_before_anything_is_solved(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    layout = trajectory_layout(tmp_path / "new", replace_count(free // 10), (2,))
    with pytest.raises(UserError, match=r"trajectories: expected [0-9,.]+ MiB free in .*, got [0-9,.]+ MiB; make room"):
        layout.check_room("trajectories")


def replace_count(count):
    return SMALL.model_copy(update={"count": count})


@pytest.mark.usefixtures("small_parts")
def test_a_damaged_part_is_named(tmp_path):
    teacher = true_teacher("modes-plane")
    solved(teacher, tmp_path, SMALL)
    part = tmp_path / "part-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"part-00002\.safetensors is missing or damaged .* remove it"):
        solved(teacher, tmp_path, SMALL)


def test_draws_of_a_trajectory_are_none_of_a_training_step(tmp_path):
    teacher = true_teacher("modes-plane")
    trajectories = solved(teacher, tmp_path, replace_count(4))
    noises = trajectories.parts.rows("states", torch.arange(4))[:, 0]
    for step in range(20):
        steps = draw(3, step, 64, (2,)).noise.double()
        assert (noises[:, None] - steps).abs().sum(2).min() > 1e-6
    assert draw(3, -1, 4, (2,)).noise.double().equal(noises)
