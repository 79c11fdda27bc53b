"""Teachers without a stock pipeline: their students are saved as weights and configuration, and open again."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from fmm_distill.config.recipe import parse
from fmm_distill.core.flow_map import LearnedFlowMap
from fmm_distill.core.parametrization import Parametrization, call_stock
from fmm_distill.core.schedules import FlowMatching
from fmm_distill.errors import FmmDistillError, UserError
from fmm_distill.export.card import card
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.exporter import describe_export
from fmm_distill.export.load import load_student
from fmm_distill.export.manifest import make_manifest, write_manifest
from fmm_distill.export.verify import verify
from fmm_distill.export.write import export_bytes, write_student
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.conditions import Classes
from fmm_distill.teachers.first_timesteps import on_first_timesteps
from fmm_distill.teachers.scheduler import read_scheduler
from fmm_distill.teachers.velocity_field import as_teacher
from tests.conformance.test_prompted_export import moved
from tests.conftest import tiny_unet

RECIPE = parse({"teacher": "builtin:digits"}, "here")


def dit_in_pixels():
    """A transformer on images, told a class: no pipeline of diffusers has one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=1,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=4,
        )
    network.eval().requires_grad_(False)
    conditions = Classes(tuple("0123"), null_label=4)
    parametrization = Parametrization(FlowMatching(), "flow_prediction")
    return Teacher(network, parametrization, (1, 8, 8), "mine", "my own", {}, conditions=conditions)


class Drift:
    """A velocity field without a network."""

    event_shape = (2,)

    def velocity(self, x, t, cond=None):
        return x * t.to(x)[:, None]


class OwnMap(LearnedFlowMap):
    """A map of one's own on the plane."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Linear(4, 2)

    def mean_velocity_of_jump(self, x, t, h, cond=None):
        return self.layers(torch.cat([x, t.to(x)[:, None], h.to(x)[:, None]], 1))


def exported(student, teacher, folder):
    folder.mkdir()
    made = write_student(student, teacher, folder, ())
    write_manifest(folder, make_manifest(student, teacher, RECIPE, ()))
    return made


def test_a_transformer_in_pixels(tmp_path):
    teacher = dit_in_pixels()
    student = moved(Student.from_teacher(teacher))
    made = exported(student, teacher, tmp_path / "student")
    assert {key: (one.difference, one.passed) for key, one in verify(made).items()} == {"weights": (0.0, True)}
    files = sorted(path.name for path in (tmp_path / "student" / "network").iterdir())
    assert "config.json" in files
    assert "diffusion_pytorch_model.safetensors" in files
    assert not (tmp_path / "student" / "model_index.json").exists()
    loaded = load_student(tmp_path / "student", teacher=dit_in_pixels())
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    own = sample(student, noise, 3, teacher.first_conditions(3))
    assert torch.equal(loaded.generate(noise, 3), own)


def own_call(network, x, time, cond, h):
    """Calls of one's own: no pipeline knows them."""
    return call_stock(network, x, time, cond, h)


def epsilon_in_its_own_way():
    spec = read_scheduler(DDPMScheduler(prediction_type="epsilon", clip_sample=False), "mine")
    parametrization = Parametrization(spec.schedule, spec.prediction, call=own_call)
    network = tiny_unet().eval().requires_grad_(False)
    return Teacher(network, parametrization, (1, 8, 8), "mine", "my own", spec.config)


def test_a_student_of_fewer_timesteps_with_another_prediction(tmp_path):
    teacher = on_first_timesteps(epsilon_in_its_own_way(), 800)
    student = moved(Student.from_teacher(teacher, "v_prediction"))
    exported(student, teacher, tmp_path / "student")
    loaded = load_student(tmp_path / "student", teacher=epsilon_in_its_own_way())
    assert loaded.flow_map.schedule.num_timesteps == 800
    assert loaded.flow_map.prediction == "v_prediction"
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(loaded.generate(noise, 2), sample(student, noise, 2), atol=1e-6)


def test_a_map_of_ones_own(tmp_path):
    teacher = as_teacher(Drift())
    torch.manual_seed(0)
    student = Student.from_teacher(teacher, network=OwnMap())
    made = exported(student, teacher, tmp_path / "student")
    assert verify(made)["weights"].passed
    config = json.loads((tmp_path / "student" / "network" / "config.json").read_text())
    assert config["_class_name"]
    loaded = load_student(tmp_path / "student", teacher=Drift(), network=OwnMap())
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.generate(noise, 3), sample(student, noise, 3))
    assert export_bytes(student, teacher, (1, 2)) == sum(4 * value.numel() for value in student.parameters())


def test_what_is_left_out_is_reported_with_its_reason(tmp_path):
    teacher = dit_in_pixels()
    exporter = exporter_of(teacher)
    line = describe_export(exporter, (1, 4))
    assert line.startswith("weights and configuration alone, no pipeline (the teacher names no stock pipeline")
    student = Student.from_teacher(teacher)
    with pytest.raises(UserError, match=r"export\.steps: expected none, got 4; the teacher names no stock pipeline"):
        exporter.fixed(student, 4, tmp_path)
    exported(student, teacher, tmp_path / "student")
    text = card(tmp_path / "student")
    assert "and no pipeline" in text
    assert 'load_student("<this folder>", teacher=teacher)' in text
    assert "DiffusionPipeline" not in text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheduler_config": {}}, "scheduler_config names no scheduler of diffusers"),
        ({"call": lambda network, x, time, cond, h: network(x, time).sample}, "in its own way"),
    ],
)
def test_a_unet_that_the_any_step_pipeline_would_call_otherwise(changes, reason):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler"} | changes.get("scheduler_config", {})
    config = changes.get("scheduler_config", config)
    given = {"call": changes["call"]} if "call" in changes else {}
    parametrization = Parametrization(FlowMatching(), "flow_prediction", **given)
    teacher = Teacher(tiny_unet(), parametrization, (1, 8, 8), "mine", "my own", config)
    assert reason in exporter_of(teacher).not_any_step


def test_weights_that_were_changed_are_noticed(tmp_path):
    teacher = dit_in_pixels()
    made = exported(Student.from_teacher(teacher), teacher, tmp_path / "student")
    file = tmp_path / "student" / "network" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1e-3}, file)
    with pytest.raises(FmmDistillError, match="the reloaded export differs from the student"):
        verify(made)


def test_a_teacher_that_can_not_be_loaded_is_asked_for(tmp_path):
    teacher = dit_in_pixels()
    exported(Student.from_teacher(teacher), teacher, tmp_path / "student")
    with pytest.raises(UserError, match=r"holds weights alone, .* pass load_student\(\.\.\., teacher=\.\.\.\)"):
        load_student(tmp_path / "student")
