"""Compiled networks and blocks that are computed twice: the same numbers, or a refusal."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator

from fmm_distill.config.settings import TrainingSettings
from fmm_distill.errors import UserError
from fmm_distill.losses.time_sampling import TimeSampling
from fmm_distill.student.student import Student
from fmm_distill.training.compile import accelerate_networks
from fmm_distill.training.trainer import Trainer
from tests.conformance.test_prompted_export import moved, opened
from tests.logs import logged
from tests.unit.test_trainer import flat, losses, recipe_of, train

DETACHED = {"name": "eulerian", "stop_gradient": "target"}
THROUGH = {"name": "lagrangian", "stop_gradient": "teacher_input"}


@pytest.mark.parametrize("loss", [THROUGH, DETACHED], ids=["through", "detached"])
def test_computing_blocks_again_changes_nothing(tmp_path, teacher_folder, loss):
    central = loss | ({"derivative": "central"} if loss is THROUGH else {})
    plain = train(recipe_of(teacher_folder, central), tmp_path / "plain")
    trainer = train(recipe_of(teacher_folder, loss, gradient_checkpointing=True), tmp_path / "again")
    assert trainer.student.network.is_gradient_checkpointing
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    difference = flat(trainer.student.state_dict()) - flat(plain.student.state_dict())
    assert difference.norm() < 1e-3 * flat(plain.student.state_dict()).norm()


def said_by(recipe, folder, teacher_folder):
    from fmm_distill.teachers.load import load_teacher

    lines, teacher = [], load_teacher(str(teacher_folder))
    with logged(lines):
        Trainer(Student.from_teacher(teacher), teacher, recipe, None, folder, Accelerator(cpu=True))
    return lines


def test_the_engine_follows(tmp_path, teacher_folder):
    def engine(loss):
        lines = said_by(recipe_of(teacher_folder, loss, gradient_checkpointing=True), tmp_path, teacher_folder)
        assert lines[0].startswith("training.gradient_checkpointing: compared with the plain networks")
        return lines[1]

    assert engine(THROUGH).startswith("derivatives: central (forward mode does not run through training.gradient")
    # Without gradients nothing is computed again, and forward mode is the better one along the flow.
    assert engine(DETACHED).startswith("derivatives: exact")
    with pytest.raises(
        UserError, match=r"loss lagrangian: expected derivative central or auto with training\.gradient"
    ):
        engine(THROUGH | {"derivative": "exact"})


def test_differences_are_taken_in_r_alone_where_both_engines_run(tmp_path, teacher_folder):
    def said(loss):
        return said_by(recipe_of(teacher_folder, loss), tmp_path, teacher_folder)[0]

    for loss in (THROUGH, THROUGH | {"stop_gradient": "target"}):
        assert said(loss).startswith("derivatives: central (it costs less than forward mode here")
    assert said(DETACHED).startswith("derivatives: exact (forward mode runs")
    with_step = said_by(recipe_of(teacher_folder, DETACHED | {"step": 0.1}), tmp_path, teacher_folder)
    assert not any(line.startswith("derivatives") for line in with_step)


@pytest.mark.parametrize("name", ["dit", "sd1", "flux", "wan"])
def test_blocks_that_embed_the_time_themselves_are_computed_again_with_their_own_jump(tmp_path, name):
    teacher = opened(name, tmp_path / "teacher")
    student = moved(Student.from_teacher(teacher))
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = teacher.schedule.time_at(torch.tensor([0.7, 1.0], dtype=torch.float64))
    r, cond = (
        teacher.schedule.time_at(torch.tensor([0.1, 0.4], dtype=torch.float64)),
        teacher.conditioned_on(torch.zeros(2)),
    )

    def gradient():
        student.zero_grad()
        # Two jumps are under way before the first gradient is taken.
        u, other = (student.mean_velocity(x, t, end, cond) for end in (r, t))
        (u.square().mean() + (u * other.detach()).mean()).backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    plain, lines = gradient(), []
    training = TrainingSettings(gradient_checkpointing=True)
    with logged(lines):
        accelerate_networks(training, student, teacher, (x, t, r, cond))
    assert "compared with the plain networks" in lines[0]
    torch.testing.assert_close(gradient(), plain, atol=1e-5, rtol=1e-4)


def test_a_network_that_answers_otherwise_is_refused(teacher, monkeypatch):
    student = Student.from_teacher(teacher)
    block = student.network.down_blocks[0].resnets[0]
    # A block that forgets, in the second pass, what it was told: dropout on, drawn anew.
    plain = block.forward
    passes = []

    def forward(*args, **kwargs):
        passes.append(1)
        return plain(*args, **kwargs) * (1.0 if len(passes) % 3 else 1.01)

    monkeypatch.setattr(block, "forward", forward)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.full((2,), teacher.schedule.t_max, dtype=torch.float64)
    with pytest.raises(
        UserError, match=r"training\.gradient_checkpointing: the .* differs by .* wanted the setting left"
    ):
        accelerate_networks(TrainingSettings(gradient_checkpointing=True), student, teacher, (x, t, t / 2, None))


@pytest.mark.slow
def test_compiled_networks_train_to_the_same_numbers(tmp_path, teacher_folder):
    loss = {"name": "lagrangian", "stop_gradient": "target"}
    # From noise alone every call has one shape, and is traced once.
    times = {"time_sampling": TimeSampling(prior=1.0)}
    central = recipe_of(teacher_folder, loss | {"derivative": "central"}).model_copy(update=times)
    plain = train(central, tmp_path / "plain")
    trainer = train(recipe_of(teacher_folder, loss, compile="eager").model_copy(update=times), tmp_path / "traced")
    assert trainer.student.network._compiled_call_impl is not None
    assert trainer.teacher.network._compiled_call_impl is not None
    assert losses(tmp_path / "traced") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert trainer.student.state_dict().keys() == plain.student.state_dict().keys()
    assert json.loads((tmp_path / "traced" / "steps.jsonl").read_text().splitlines()[-1])["step"] == 2


@pytest.mark.slow
def test_compiled_by_inductor(tmp_path, teacher_folder):
    loss = {"name": "lagrangian", "stop_gradient": "target"}
    train(recipe_of(teacher_folder, loss | {"derivative": "central"}), tmp_path / "plain")
    train(recipe_of(teacher_folder, loss, compile="inductor"), tmp_path / "compiled")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
