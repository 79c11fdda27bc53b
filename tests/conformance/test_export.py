"""What is exported opens in stock diffusers and gives the student's images."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler

from fmm_distill.errors import FmmDistillError, UserError
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.remote.pipeline import FlowMapPipeline
from fmm_distill.export.verify import Exported, verify, verify_all
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_teachers import saved
from tests.conftest import save_teacher
from tests.processes import own_processes

STEPS = (1, 2, 4, 8)


def moved_student(teacher):
    """A student whose jumps differ from its teacher's steps, and from one another."""
    student = Student.from_teacher(teacher)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.nn.init.normal_(student.network.jump_embedding[0].linear_2.weight, std=0.3)
    return student.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, teacher_folder):
    teacher = load_teacher(str(teacher_folder))
    student = moved_student(teacher)
    folder = export_pipeline(student, teacher, tmp_path_factory.mktemp("export") / "student", STEPS)
    with own_processes():
        return student, teacher, folder, verify(Exported(student, exporter_of(teacher), folder, STEPS))


def test_folded_and_any_step_pipelines_agree_with_the_sampler(exported):
    _, _, folder, differences = exported
    assert sorted(differences) == sorted(f"{kind}-{n}" for kind in ("any", "folded") for n in STEPS)
    assert all(one.passed for one in differences.values())
    kept = json.loads((folder / "verification.json").read_text())
    assert kept == {"passed": True, "pipelines": {key: one.to_json() for key, one in differences.items()}}


def test_the_jump_matters(exported):
    """Else the comparison above would hold for a student that forgot its second time."""
    student, *_ = exported
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    one = sample(student, noise, 2)
    with torch.no_grad():
        kept = student.network.jump_embedding[0].linear_2.weight.clone()
        student.network.jump_embedding[0].linear_2.weight.zero_()
        assert (sample(student, noise, 2) - one).abs().max() > 1e-2
        student.network.jump_embedding[0].linear_2.weight.copy_(kept)


def test_a_student_that_differs_from_its_export_is_noticed(exported, tmp_path):
    student, teacher, folder, _ = exported
    copy = shutil.copytree(folder, tmp_path / "student")
    with torch.no_grad():
        student.network.conv_out.bias += 0.01
    try:
        with pytest.raises(FmmDistillError, match="the reloaded export differs"):
            verify(Exported(student, exporter_of(teacher), copy, (1,)))
    finally:
        with torch.no_grad():
            student.network.conv_out.bias -= 0.01


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 3, 7, 8])
def test_any_number_of_steps_for_every_prediction(tmp_path, prediction, steps):
    scheduler = DDPMScheduler(prediction_type=prediction, clip_sample=False)
    teacher = load_teacher(str(save_teacher(tmp_path / "teacher", scheduler=scheduler)))
    student = moved_student(teacher)
    student.network.register_to_config(flow_map=exporter_of(teacher).settings(scheduler))
    pipeline = FlowMapPipeline(unet=student.network, scheduler=scheduler, vqvae=None)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(3, steps, torch.Generator().manual_seed(4), output_type="pt").images
    own = sample(student, torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(4)), steps)
    # A tiny random network that predicts epsilon is amplified by 157 at the start, rounding included.
    assert (made - (own / 2 + 0.5).clamp(0, 1)).abs().max() < (1e-3 if prediction == "epsilon" else 1e-4)


def test_the_scheduler_of_an_export_clips_nothing(tmp_path):
    folder = save_teacher(tmp_path / "teacher", scheduler=DDPMScheduler(clip_sample=True, thresholding=True))
    teacher = load_teacher(str(folder))
    target = export_pipeline(Student.from_teacher(teacher), teacher, tmp_path / "student", (2,))
    for place in ("scheduler", "steps-2/scheduler"):
        config = json.loads((target / place / "scheduler_config.json").read_text())
        assert (config["clip_sample"], config["thresholding"]) == (False, False)
        assert config["timestep_spacing"] == "trailing"


def test_an_export_replaces_an_export_and_nothing_else(tmp_path, teacher):
    student = Student.from_teacher(teacher)
    target = export_pipeline(student, teacher, tmp_path / "student", (1, 2))
    export_pipeline(student, teacher, target, (4,))
    assert sorted(path.name for path in target.glob("steps-*")) == ["steps-4"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="expected an exported student or an empty folder"):
        export_pipeline(student, teacher, tmp_path / "mine")
    with pytest.raises(UserError, match=r"export\.steps: expected divisors of the teacher's 1000 timesteps, got 3"):
        export_pipeline(student, teacher, tmp_path / "new", (1, 3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "student"]


OTHERS = {
    "euler": ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    "zero-snr": ("DDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    "unipc": ("UniPCMultistepScheduler", {"prediction_type": "epsilon"}),
}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Exports of other schedulers, opened in one process, which is what takes long."""
    made = {}
    for key, (name, settings) in OTHERS.items():
        folder = tmp_path_factory.mktemp(key)
        teacher = load_teacher(saved(folder / "teacher", name, **settings))
        student = moved_student(teacher)
        target = export_pipeline(student, teacher, folder / "student", (1, 4))
        made[key] = Exported(student, exporter_of(teacher), target, (1, 4))
    return dict(zip(made, verify_all(list(made.values())), strict=True))


@pytest.mark.parametrize("key", OTHERS)
def test_students_of_other_schedulers_export_too(others, key):
    assert len(others[key]) == 4
    assert all(one.passed for one in others[key].values())
