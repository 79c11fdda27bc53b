"""The memory that is foretold, against the memory that is taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fmm_distill.config.recipe import Recipe
from fmm_distill.run.plan import plan
from fmm_distill.student.lora import add_lora
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from fmm_distill.training.compile import checkpoint_blocks
from fmm_distill.training.ema import averaged, frozen_copy
from fmm_distill.training.memory import Memory, forecast_memory
from tests.conftest import save_teacher, tiny_unet

ROOT = Path(__file__).parents[2]
# Most weights stand where images are small: large in memory, small in time.
LARGE = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64, 320, 640),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 32,
    "attention_head_dim": 64,
}
LAGRANGIAN = {"name": "lagrangian", "stop_gradient": "target"}
STEPS = {"steps": 2, "batch_size": 2}
KL = {"steps": 2, "critic": {"warmup_steps": 1}}
SIM = KL | {"loss": {"name": "score_implicit_matching"}}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("large"), tiny_unet(**LARGE))


# Every weight is trained; tests/unit/test_scaled_runs.py counts what a scaled student has.
EMBEDDED = {"kind": "embedded"}


def foretold(folder: Path, settings: dict, processes: int = 1) -> Memory:
    recipe = Recipe.model_validate({"student": EMBEDDED} | settings | {"teacher": str(folder)})
    job = plan(recipe)
    if recipe.training.gradient_checkpointing:
        checkpoint_blocks(job.student)
    return forecast_memory(job.student, job.teacher, recipe, processes)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"loss": LAGRANGIAN | {"derivative": "central"}}, marks=pytest.mark.slow),
        pytest.param(
            {"loss": {"name": "lagrangian", "stop_gradient": "nowhere", "derivative": "exact"}}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"loss": LAGRANGIAN, "student": {"lora": {"rank": 8}}, "training": STEPS | {"batch_size": 12}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"loss": LAGRANGIAN, "training": STEPS | {"batch_size": 12, "gradient_checkpointing": True}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "loss": LAGRANGIAN,
                "student": {"kind": "scaled"},
                "time_sampling": {"groups": 2},
                "training": STEPS | {"batch_size": 12},
            },
            marks=pytest.mark.slow,
        ),
        {"loss": LAGRANGIAN, "student": {"kind": "scaled", "lora": {"rank": 8}}},
        pytest.param({"loss": LAGRANGIAN, "matching": KL}, marks=pytest.mark.slow),
        pytest.param({"loss": LAGRANGIAN, "matching": SIM, "student": {"kind": "scaled"}}, marks=pytest.mark.slow),
        pytest.param(
            {"loss": LAGRANGIAN, "matching": SIM, "student": {"kind": "embedded", "lora": {"rank": 8}}},
            marks=pytest.mark.slow,
        ),
    ],
    ids=[
        "central",
        "full-gradient",
        "lora",
        "checkpointed",
        "scaled",
        "scaled-lora",
        "matching",
        "matching-scaled",
        "matching-lora",
    ],
)
def test_the_peak_of_a_step(large, teacher_folder, tmp_path, settings):
    settings = settings | {"training": settings.get("training", STEPS) | {"ema": (0.9, 0.99)}}
    command = [
        sys.executable,
        "-m",
        "tests.unit.measured_memory",
        teacher_folder,
        large,
        tmp_path,
        json.dumps(settings),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    memory = foretold(large, settings)
    assert memory.peak == pytest.approx(int(done.stdout), rel=0.25)


def test_the_student_stays_as_it_is(teacher_folder):
    settings = {"teacher": str(teacher_folder), "student": EMBEDDED, "training": {"precision": "bf16"}}
    recipe = Recipe.model_validate(settings)
    job = plan(recipe)
    before = {name: value.clone() for name, value in job.student.state_dict().items()}
    forecast_memory(job.student, job.teacher, recipe)
    assert all(value.equal(before[name]) for name, value in job.student.state_dict().items())
    for parameter in job.student.parameters():
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks
        assert parameter.requires_grad


def test_what_is_counted(teacher_folder):
    """Averages, copies, parts and processes each add what they hold."""
    base = foretold(teacher_folder, {"loss": LAGRANGIAN, "training": STEPS})
    student = Student.from_teacher(load_teacher(str(teacher_folder)))
    trained = 4 * sum(p.numel() for p in student.parameters())
    assert base.optimizer == 2 * trained
    assert trained <= base.averages < 1.01 * trained
    rates = foretold(teacher_folder, {"loss": LAGRANGIAN, "training": STEPS | {"ema": (0.9, 0.99, 0.999)}})
    assert rates.peak - base.peak == 2 * base.averages
    progressive = {"loss": {"name": "progressive", "target": "frozen"}, "training": STEPS}
    assert foretold(teacher_folder, progressive).averages == 2 * base.averages
    parts = foretold(
        teacher_folder, {"loss": LAGRANGIAN, "training": STEPS | {"batch_size": 4, "gradient_accumulation_steps": 2}}
    )
    assert parts.gradients == trained
    assert base.peak < parts.peak <= base.peak + trained
    shared = foretold(teacher_folder, {"loss": LAGRANGIAN, "training": STEPS | {"batch_size": 4}}, processes=2)
    assert shared.peak == base.peak + trained
    more = foretold(teacher_folder, {"loss": LAGRANGIAN, "training": STEPS | {"batch_size": 64}})
    assert more.peak - base.peak == pytest.approx(62 * more.per_sample, rel=0.1)


def test_blocks_that_are_computed_again_keep_less(teacher_folder):
    settings = {"loss": LAGRANGIAN, "training": STEPS | {"batch_size": 64}}
    base = foretold(teacher_folder, settings)
    settings["training"] |= {"gradient_checkpointing": True}
    again = foretold(teacher_folder, settings)
    assert again.per_sample < 0.8 * base.per_sample
    assert again.weights == base.weights


def test_the_phase_that_takes_most_counts(teacher_folder):
    light, heavy = {"name": "flow_matching"}, {"name": "lagrangian", "stop_gradient": "nowhere", "derivative": "exact"}
    least = foretold(teacher_folder, {"loss": light, "training": STEPS})
    most = foretold(teacher_folder, {"loss": heavy, "training": STEPS})
    first = [{"loss": heavy, "fraction": 0.5}]
    assert foretold(teacher_folder, {"loss": light, "stages": first, "training": STEPS}).peak == most.peak
    beside = [{"loss": heavy, "fraction": 0.5}]
    both = foretold(teacher_folder, {"loss": light, "extra_losses": beside, "training": STEPS | {"batch_size": 64}})
    alone = [
        foretold(teacher_folder, {"loss": loss, "training": STEPS | {"batch_size": 64}}) for loss in (light, heavy)
    ]
    assert least.peak < most.peak
    assert both.peak == pytest.approx((alone[0].peak + alone[1].peak) / 2, rel=0.1)


def test_copies_share_what_is_not_trained(teacher_folder):
    teacher = load_teacher(str(teacher_folder))
    student = Student.from_teacher(teacher)
    add_lora(student, teacher, 2)
    for copied in (frozen_copy(student), averaged(student, 0.9).module):
        for own, kept in zip(student.parameters(), copied.parameters(), strict=True):
            assert (own.data_ptr() == kept.data_ptr()) == (not own.requires_grad)
            assert not kept.requires_grad
        assert not copied.training
    trained = [p for p in student.parameters() if p.requires_grad]
    assert 0 < len(trained) < len(list(student.parameters()))


def test_the_estimate_of_a_scaled_student_grows_with_its_samples(teacher_folder):
    """One sample has formed weights, several have two products: their memory is not on one line."""
    few, many = (
        foretold(
            teacher_folder, {"student": {"kind": "scaled"}, "loss": LAGRANGIAN, "training": STEPS | {"batch_size": n}}
        )
        for n in (2, 64)
    )
    embedded = foretold(teacher_folder, {"loss": LAGRANGIAN, "training": STEPS | {"batch_size": 64}})
    assert many.activations - few.activations == pytest.approx(62 * many.per_sample, rel=0.1)
    assert many.activations > embedded.activations


def test_the_memory_of_the_second_stage(teacher_folder):
    """The critic is there from the start; the optimizers' states are there in their stages."""
    settings = {"loss": LAGRANGIAN, "training": STEPS}
    alone = foretold(teacher_folder, settings)
    both = foretold(teacher_folder, settings | {"matching": KL | {"fraction": 0.5}})
    network = 4 * sum(p.numel() for p in load_teacher(str(teacher_folder)).network.parameters())
    assert both.peak_of in ("the critic", "the matching")
    # The student's second optimizer has the state of its first one, which is free by then.
    assert both.optimizer == alone.optimizer
    assert both.averages == alone.averages
    assert both.weights == alone.weights
    # The weights, their average and Adam's two moments.
    assert both.critic == 4 * network
    assert f"critic {both.critic / 2**20:.1f}, " in str(both)
    assert f"at peak of {both.peak_of}: " in str(both)
    assert "critic" not in str(alone)
    stateless = KL | {"critic": KL["critic"] | {"optimizer": {"name": "SGD"}}}
    assert foretold(teacher_folder, settings | {"matching": stateless}).critic == 2 * network
    # A map that takes more than the matching is the peak, without the states of the second stage.
    heavy = {"name": "lagrangian", "stop_gradient": "nowhere", "derivative": "exact"}
    light = KL | {"fraction": 1.0, "rollout": {"steps": [1]}}
    large = {"loss": heavy, "training": STEPS | {"batch_size": 64}}
    map_alone, first = foretold(teacher_folder, large), foretold(teacher_folder, large | {"matching": light})
    assert first.peak_of == "the map"
    assert first.peak == map_alone.peak + 2 * network
    # A Fisher divergence passes back through both networks, and more jumps have a gradient with all of them.
    stages = [KL, SIM, SIM | {"rollout": {"gradient": "all"}}]
    grows = [
        foretold(teacher_folder, settings | {"matching": stage | {"fraction": 1.0}}).per_sample for stage in stages
    ]
    assert grows[0] < grows[1] < grows[2]
    parts = STEPS | {"batch_size": 4, "gradient_accumulation_steps": 2}
    several = foretold(teacher_folder, settings | {"training": parts, "matching": KL})
    assert several.gradients == 4 * sum(
        p.numel() for p in Student.from_teacher(load_teacher(str(teacher_folder))).parameters()
    )
    shared = foretold(teacher_folder, settings | {"matching": KL, "training": STEPS | {"batch_size": 4}}, processes=2)
    assert shared.peak == both.peak + alone.optimizer // 2 + network
