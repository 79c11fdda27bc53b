"""Runs of students whose weights change with the length of the jump: resumed, split, and what they take of memory."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from fmm_distill.config.recipe import Recipe
from fmm_distill.data.samples import Images
from fmm_distill.losses import registered_losses
from fmm_distill.run.plan import open_teacher, plan
from fmm_distill.student.student import is_new
from fmm_distill.training import checkpoint
from fmm_distill.training.ema import averaged, frozen_copy, load_trained, trained_state
from fmm_distill.training.memory import forecast_memory
from fmm_distill.training.trainer import Trainer
from tests import processes
from tests.conformance.test_prompted import FAMILIES
from tests.conftest import save_teacher
from tests.scaled import train
from tests.tiny.diffusion import PIPELINES
from tests.unit.test_trainer import flat, losses

SPLIT = Path(__file__).parent / "split_scaled.py"
REGRESSION = {"prediction": "v_prediction", "regression_steps": 4}
# The rank, the student's other settings, and the number of groups of a batch.
CASES = {
    "full": (0, {}, 0),
    "full, groups": (0, {}, 4),
    "full, regression": (0, REGRESSION, 4),
    "low": (2, {}, 4),
    "low, regression": (2, REGRESSION, 0),
}
FULL = [name for name, (rank, _, _) in CASES.items() if rank == 0]
SOON = ("full, regression", "low")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("epsilon"), scheduler=DDPMScheduler(prediction_type="epsilon"))


def settings_of(folder, name, **training):
    rank, student, groups = CASES[name]
    plain = {"steps": 4, "batch_size": 8, "checkpoint_every": 3, "lr_schedule": "constant"}
    return {
        "teacher": str(folder),
        "loss": {"name": "lagrangian", "stop_gradient": "target"},
        "student": {"kind": "scaled", "lora": {"rank": rank}} | student,
        "time_sampling": {"groups": groups},
        "training": plain | training,
    }


def tensors(folder, name="student"):
    return load_file(checkpoint.newest(folder / "checkpoints") / f"{name}.safetensors")


@pytest.mark.parametrize(
    "name", [*SOON, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in SOON)]
)
def test_a_run_that_is_stopped_in_each_phase_ends_as_one_that_was_not(tmp_path, folder, name):
    settings = settings_of(folder, name, steps=8)
    trainer = train(settings, tmp_path / "complete")
    step_of = Trainer.train_step
    # In the regression, right after a checkpoint, and in the losses after it.
    for stop in (2, 3, 7):

        def step(self, number, request, stop=stop):
            if number == stop:
                raise KeyboardInterrupt
            return step_of(self, number, request)

        with patch.object(Trainer, "train_step", step), pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "stopped")
    train(settings, tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "complete")
    assert len(losses(tmp_path / "complete")) == trainer.total
    for file in ("student", "ema-0.999", "optimizer"):
        ours, theirs = tensors(tmp_path / "stopped", file), tensors(tmp_path / "complete", file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), file


def on_two_processes(folder, teacher_folder, names, *how, more=None):
    folder.mkdir()
    recipes = {name: settings_of(teacher_folder, name) for name in names}
    (folder / "recipes.json").write_text(json.dumps(recipes | (more or {})))
    run = processes.on_two_processes(SPLIT, folder / "recipes.json", folder, *how)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1])["processes"] == 2


def with_unused_parameters(folder):
    """Settings of a student of a network whose last block has outputs for the text."""
    tiny = FAMILIES["qwen-image"]
    tiny.build().save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("a cat\ntwo dogs\n")
    plain = settings_of(folder / "teacher", "full", steps=2)
    return plain | {"pipeline": dict(tiny.call), "prompts": {"file": str(folder / "prompts.txt")}}


@pytest.mark.parametrize(
    ("names", "how"),
    [
        (SOON, ()),
        pytest.param(tuple(CASES), (), marks=pytest.mark.slow),
        pytest.param(FULL, ("shard",), marks=pytest.mark.slow),
    ],
    ids=["some", "all", "shards"],
)
def test_two_processes_give_the_numbers_of_one(tmp_path, folder, names, how):
    """With all weights in each process, and split over the two, as FSDP does it for changes of full rank."""
    more = {} if how else {"outputs that nothing reads": with_unused_parameters(tmp_path)}
    on_two_processes(tmp_path / "two", folder, names, *how, more=more)
    assert all(len(losses(tmp_path / "two" / name)) == 2 for name in more)
    for name in names:
        settings = settings_of(folder, name)
        train(settings, tmp_path / name)
        start = flat(dict(trained_state(plan(Recipe.model_validate(settings)).student).items()))
        one, two = flat(tensors(tmp_path / name)), flat(tensors(tmp_path / "two" / name))
        assert (two - one).norm() < 5e-2 * (one - start).norm()
        assert tensors(tmp_path / name, "optimizer").keys() == tensors(tmp_path / "two" / name, "optimizer").keys()
        for ours, theirs in zip(losses(tmp_path / "two" / name), losses(tmp_path / name), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("name", ["full, groups", "low, regression"])
def test_parts_of_a_batch_give_the_numbers_of_the_batch(tmp_path, folder, name):
    train(settings_of(folder, name), tmp_path / "one")
    train(settings_of(folder, name, gradient_accumulation_steps=2), tmp_path / "parts")
    one, parts = (flat(tensors(tmp_path / run)) for run in ("one", "parts"))
    assert (parts - one).norm() < 1e-2 * one.norm()
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.parametrize("name", sorted(registered_losses()))
def test_groups_go_through_every_loss(tmp_path, folder, name):
    """The samples of a group have one length in every call that a loss makes."""
    kind = registered_losses()[name]
    loss = kind.model_validate({"name": name})
    if loss.diagonal:
        pytest.skip("it trains no jumps")
    times = {} if loss.needed_sampling is None else loss.needed_sampling.model_dump(exclude_unset=True)
    settings = settings_of(folder, "full, groups", steps=2) | {"loss": {"name": name}}
    settings |= {"time_sampling": times | {"groups": 2}, "data": "a folder" if loss.needs_data else "none"}
    pixels = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    trainer = train(settings, tmp_path, Images(pixels, "noise") if loss.needs_data else None)
    assert len(losses(tmp_path)) == 2
    assert all(0 <= value < float("inf") for value in losses(tmp_path))
    assert any(p.any() for key, p in trainer.student.named_parameters() if key.endswith("jump_weight"))


def storages(*modules):
    found = [t.untyped_storage() for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum({storage._cdata: storage.nbytes() for storage in found}.values())


def held_by(teacher):
    """The network whose weights a teacher computes with; one that is shared owns none."""
    return teacher.network._network[0] if hasattr(teacher.network, "_network") else teacher.network


@pytest.mark.parametrize("name", CASES)
def test_teacher_and_student_are_one_copy_of_the_weights(folder, name):
    rank, student, _ = CASES[name]
    recipe = Recipe.model_validate(settings_of(folder, name))
    job = plan(recipe)
    new = sum(p.numel() for key, p in job.student.named_parameters() if is_new(key))
    own = sum(p.numel() for p in job.student.parameters()) - new
    # Where a regression trains the weights themselves, the teacher's are a second copy.
    copies = 2 if student and not rank else 1
    counted = storages(job.student, held_by(job.teacher))
    assert counted == 4 * (copies * own + new)
    memory = forecast_memory(job.student, job.teacher, recipe)
    assert memory.weights == counted
    trained = 4 * sum(p.numel() for p in job.student.parameters() if p.requires_grad)
    assert memory.optimizer == 2 * trained
    assert memory.averages == trained
    assert trained == 4 * new if copies == 1 else trained > 4 * new
    # Averages and frozen copies share what is not trained.
    for copied in (averaged(job.student, 0.9).module, frozen_copy(job.student)):
        assert storages(job.student, copied) == storages(job.student) + trained
    # The forecast leaves no gradient, and no state of a call.
    assert all(p.grad is None for p in job.student.parameters())
    state = job.student.network.call_state
    assert (state.group, state.regression, state.jump.h) == (1, False, None)


@pytest.mark.parametrize("guidance", [{"scale": 2.0}, {"scale": 2.0, "range": [1.0, 3.0]}], ids=["scale", "range"])
@pytest.mark.parametrize("rank", [0, 2])
def test_guidance_is_learned_in_the_regression_and_stays(tmp_path, rank, guidance):
    """The diagonal moves towards the guided velocity; the losses after the regression leave it as it is."""
    PIPELINES["dit"].build().save_pretrained(tmp_path / "teacher")
    student = {"kind": "scaled", "lora": {"rank": rank}, "regression_steps": 6}
    training = {"steps": 3, "batch_size": 8, "checkpoint_every": 3, "checkpoints_total_limit": 9}
    settings = {"teacher": str(tmp_path / "teacher"), "guidance": guidance, "student": student, "training": training}
    settings |= {"loss": {"name": "lagrangian", "stop_gradient": "target"}, "optimizer": {"lr": 1e-3}}
    original = open_teacher(Recipe.model_validate(settings))
    trainer = train(settings, tmp_path / "run")
    x = torch.randn(3, *original.event_shape, generator=torch.Generator().manual_seed(0))
    t = original.schedule.time_at(torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64))
    cond = original.conditioned_on(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    scales = [cond.guided(w) for w in (1.0, 2.0, 3.0)] if "range" in guidance else [cond]
    with torch.no_grad():
        guided = [original.velocity(x, t, c) for c in scales]
        # The teacher of the run, which may have the student's weights, has not moved.
        assert all(torch.equal(trainer.teacher.velocity(x, t, c), v) for c, v in zip(scales, guided, strict=True))
        found = {}
        for step in (3, 6, 9):
            stored = checkpoint.load(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
            load_trained(trainer.student, trainer.student, stored.tensors["student"])
            found[step] = [trainer.student.mean_velocity(x, t, t, c) for c in scales]
            moved = [trainer.student.mean_velocity(x, t, t / 2, c) for c in scales]
            is_jump = step > 6
            assert all(torch.equal(u, v) != is_jump for u, v in zip(moved, found[step], strict=True))
    assert not torch.equal(found[3][-1], found[6][-1])
    assert all(torch.equal(one, other) for one, other in zip(found[6], found[9], strict=True))
