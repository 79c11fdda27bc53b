"""An export that is the student passes whatever its schedule amplifies; one that is another map does not."""

from __future__ import annotations

import copy
import inspect
import json
import runpy
import shutil
import sys
from dataclasses import replace
from importlib.resources import files

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from fmm_distill.core.schedules import VarianceExploding
from fmm_distill.errors import FmmDistillError, UserError
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.schedulers import LEVELS, SWITCHES, make_scheduler
from fmm_distill.export.verify import Exported, agreements_of
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.scheduler import read_scheduler
from tests.conformance.test_prompted import FAMILIES, PROMPTS
from tests.conformance.test_prompted_export import moved
from tests.conformance.test_teachers import saved
from tests.conftest import save_teacher, tiny_unet
from tests.tiny.diffusion import PIPELINES

STEPS = (1, 4)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0, "steps_offset": 1}
# Name to scheduler and settings; the networks are random, so that outputs and their errors are amplified in full.
UNETS = {
    "linear epsilon": ("DDPMScheduler", {}),
    "cosine epsilon": ("DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    "cosine sample": ("UniPCMultistepScheduler", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}),
    "no signal at first": ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    "score": ("ScoreSdeVeScheduler", {"sigma_max": 1348.0}),
    "edm": ("EDMEulerScheduler", {"sigma_max": 1348.0}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "video levels": ("CogVideoXDDIMScheduler", {"prediction_type": "v_prediction"}),
}
# Switches of the teacher's own sampling, which are no part of its levels.
PROMPTED = {
    "sd1": (
        "sd1",
        "DDIMScheduler",
        {"clip_sample": False, "thresholding": True, "set_alpha_to_one": False, "steps_offset": 1},
    ),
    "sd1 flow": ("sd1", "DPMSolverMultistepScheduler", FLOW),
    "sdxl flow": ("sdxl", "UniPCMultistepScheduler", FLOW),
    "pixart flow": ("pixart-alpha", "DPMSolverMultistepScheduler", FLOW),
    "stochastic": ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "stochastic_sampling": True}),
    "karras": ("sd3", "FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_karras_sigmas": True}),
}


def unet(name, folder):
    scheduler, settings = UNETS[name]
    saved(folder, scheduler, **settings)
    if name == "score":
        save_teacher(folder / "network", tiny_unet(time_embedding_type="fourier"))
        shutil.copytree(folder / "network" / "unet", folder / "unet", dirs_exist_ok=True)
    return load_teacher(str(folder))


def prompted(name, folder):
    family, scheduler, settings = PROMPTED[name]
    pipeline = FAMILIES[family].build()
    pipeline.scheduler = getattr(diffusers, scheduler)(**settings)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return load_teacher(str(folder), prompts=PROMPTS, call=dict(FAMILIES[family].call))


def quantized(name, folder):
    PIPELINES["ldm"].build().save_pretrained(folder)
    return load_teacher(str(folder))


def angular(name, folder):
    """As with the scheduler of the released stable audio, which needs another package: its network has the angle."""
    FAMILIES["stable-audio"].build().save_pretrained(folder, safe_serialization=True)
    teacher = load_teacher(str(folder), prompts=PROMPTS, call=dict(FAMILIES["stable-audio"].call))
    schedule = teacher.schedule
    ends = (schedule.sigma_min, schedule.sigma_max)
    schedule = VarianceExploding(*ends, rho=schedule.rho, network_input="atan", num_timesteps=schedule.num_timesteps)
    return replace(teacher, parametrization=replace(teacher.parametrization, schedule=schedule))


MAKE = dict.fromkeys(UNETS, unet) | dict.fromkeys(PROMPTED, prompted) | {"quantized": quantized, "angle": angular}


def changed(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def scheduler_setting(**settings):
    """In the folded pipelines: the any-step one refuses other levels itself."""

    def corrupt(folder):
        for place in folder.glob("steps-*"):
            changed(place / "scheduler" / "scheduler_config.json", **settings)

    return corrupt


def transposed(folder):
    """One square matrix of the network."""
    for file in folder.rglob("diffusion_pytorch_model.safetensors"):
        weights = load_file(file)
        square = [name for name, value in weights.items() if value.ndim > 1 and value.shape[0] == value.shape[1]]
        chosen = [name for name in square if name.endswith(("up_blocks.1.resnets.1.conv2.weight", "to_q.weight"))]
        name = max(chosen, default=None)
        if name is not None:
            save_file(weights | {name: weights[name].transpose(0, 1).contiguous()}, file)


def other_jump(folder):
    """In the any-step pipeline."""
    for file in folder.glob("*/diffusion_pytorch_model.safetensors"):
        weights = load_file(file)
        jumps = {name: 0.9 * value for name, value in weights.items() if name.endswith("linear_1.weight")}
        save_file(weights | {name: value for name, value in jumps.items() if "jump_embedding" in name}, file)


# One less: the last timestep, where a jump from noise starts, is that before it.
one_timestep_less = scheduler_setting(num_train_timesteps=999)


BROKEN = {
    ("linear epsilon", "jump"): other_jump,
    ("linear epsilon", "prediction"): scheduler_setting(prediction_type="v_prediction"),
    ("linear epsilon", "timestep"): one_timestep_less,
    ("cosine epsilon", "weight"): transposed,
    ("cosine epsilon", "timestep"): one_timestep_less,
    ("cosine sample", "clipped"): scheduler_setting(clip_sample=True),
    ("no signal at first", "last alpha"): scheduler_setting(set_alpha_to_one=False),
    ("no signal at first", "betas"): scheduler_setting(rescale_betas_zero_snr=False),
    ("score", "weight"): transposed,
    ("edm", "weight"): transposed,
    ("edm", "jump"): other_jump,
    ("flow", "shift"): scheduler_setting(shift=2.9),
    ("flow", "timestep"): one_timestep_less,
    ("quantized", "weight"): transposed,
    ("quantized", "betas"): scheduler_setting(beta_end=0.0196),
    ("sd1", "weight"): transposed,
    ("sd1", "prediction"): scheduler_setting(prediction_type="sample"),
    ("sd1", "timestep"): one_timestep_less,
    ("sd1", "jump"): other_jump,
    ("angle", "jump"): other_jump,
    ("stochastic", "steps"): scheduler_setting(stochastic_sampling=True),
    ("karras", "levels"): scheduler_setting(use_karras_sigmas=True),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Exports as they are and broken ones, all opened in one process, which is what takes long."""
    exports = {}
    for name, make in MAKE.items():
        folder = tmp_path_factory.mktemp("export")
        teacher = make(name, folder / "teacher")
        student = moved(Student.from_teacher(teacher))
        exports[name] = Exported(
            student, exporter_of(teacher), export_pipeline(student, teacher, folder / "student", STEPS), STEPS
        )
    for (name, kind), corrupt in BROKEN.items():
        copy = exports[name].folder.with_name(f"student-{kind}".replace(" ", "-"))
        corrupt(shutil.copytree(exports[name].folder, copy))
        exports[name, kind] = replace(exports[name], folder=copy)
    return exports, dict(zip(exports, agreements_of(list(exports.values())), strict=True))


@pytest.mark.parametrize("name", MAKE)
def test_no_schedule_raises_a_false_alarm(found, name):
    exports, agreements = found
    kinds = ("any",) if exports[name].exporter.not_fixed else ("any", "folded")
    assert sorted(agreements[name]) == sorted(f"{kind}-{n}" for kind in kinds for n in STEPS)
    assert all(one.passed for one in agreements[name].values()), agreements[name]


@pytest.mark.parametrize("key", BROKEN, ids=" ".join)
def test_a_broken_export_is_noticed(found, key):
    agreements = found[1][key]
    assert any(one.difference > 2 * one.tolerance for one in agreements.values()), agreements


@pytest.mark.parametrize(("name", "settings"), [("score", {"sigma_max": 1300.0}), ("edm", {"sigma_max": 70.0})])
def test_levels_that_the_any_step_pipeline_refuses_are_no_verified_export(found, tmp_path, name, settings):
    export = found[0][name]
    copy = shutil.copytree(export.folder, tmp_path / "student")
    changed(copy / "scheduler" / "scheduler_config.json", **settings)
    with pytest.raises(FmmDistillError, match="does not fit this student"):
        agreements_of([replace(export, folder=copy)])


def test_pipelines_that_need_more_of_a_scheduler_have_the_any_step_pipeline_alone(found):
    reasons = {name: export.exporter.not_fixed for name, export in found[0].items() if "flow" in name}
    assert reasons["flow"] is None
    assert all("init_noise_sigma" in reasons[name] for name in ("sd1 flow", "sdxl flow", "pixart flow"))


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("EDMEulerScheduler", {}, r"DiTPipeline starts from N\(0, I\)"),
        ("ScoreSdeVeScheduler", {}, r"DiTPipeline starts from N\(0, I\)"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, r"DiTPipeline starts from N\(0, I\)"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "its scheduler has invert_sigmas"),
    ],
)
def test_a_scheduler_that_no_export_can_have_is_refused_when_the_teacher_is_opened(tmp_path, name, settings, reason):
    if "DiT" in reason:
        PIPELINES["dit"].build().save_pretrained(tmp_path)
        getattr(diffusers, name)(**settings).save_pretrained(tmp_path / "scheduler")
        index = tmp_path / "model_index.json"
        index.write_text(index.read_text().replace("DDIMScheduler", name))
    else:
        saved(tmp_path, name, **settings)
    with pytest.raises(UserError, match=reason):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("name", LEVELS)
def test_every_setting_of_a_stock_scheduler_is_a_level_or_a_switch(name):
    """A new one in another diffusers has to be put into one of the tables."""
    parameters = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self", "prediction_type"}
    assert parameters == LEVELS[name] | SWITCHES[name].keys()
    assert not LEVELS[name] & SWITCHES[name].keys()


@pytest.mark.parametrize("name", ["karras", "stochastic", "sd1"])
def test_switches_are_set_and_levels_are_kept(found, name):
    teacher = found[0][name].teacher
    made = make_scheduler(teacher, teacher.prediction)
    kind = type(made).__name__
    assert {key: made.config[key] for key in SWITCHES[kind]} == dict(SWITCHES[kind])
    levels = {key: teacher.scheduler_config[key] for key in LEVELS[kind] if key in teacher.scheduler_config}
    assert {key: made.config[key] for key in levels} == levels


def test_a_scheduler_that_does_not_name_its_class_is_exported(found):
    """As one that a pipeline has made itself."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, invert_sigmas=True)
    assert "_class_name" not in scheduler.config
    spec = read_scheduler(scheduler, "here")
    assert spec.config["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    teacher = replace(found[0]["karras"].teacher, scheduler_config=spec.config)
    made = make_scheduler(teacher, teacher.prediction)
    assert made.config.shift == 2.0
    assert made.config.invert_sigmas


def test_a_copy_of_a_scheduler_is_watched_too(monkeypatch):
    """Some pipelines step a deep copy of their scheduler."""
    # The script hides the package from its own process.
    monkeypatch.setitem(sys.modules, "fmm_distill", sys.modules["fmm_distill"])
    script = runpy.run_path(str(files("fmm_distill") / "export" / "reload.py"))
    steps, stock = [], diffusers.FlowMatchEulerDiscreteScheduler()
    original = script["watch"](copy.copy(stock), steps)
    copied = copy.deepcopy(original)
    copied.set_timesteps(2)
    x, v = torch.ones(2, 3), torch.full((2, 3), 2.0)
    made = copied.step(v, copied.timesteps[0], x, return_dict=False)[0]
    assert original.step_index is None
    assert copied.step_index == 1
    assert [[torch.equal(*pair) for pair in zip(step, (x, made), strict=True)] for step in steps] == [[True, True]]
    assert type(original).__name__ == type(stock).__name__
    assert inspect.signature(original.step) == inspect.signature(stock.step)


def test_a_setting_that_is_not_known_is_named(found, monkeypatch):
    teacher = found[0]["karras"].teacher
    few = {**SWITCHES["FlowMatchEulerDiscreteScheduler"]}
    del few["use_karras_sigmas"]
    monkeypatch.setattr("fmm_distill.export.schedulers.SWITCHES", {**SWITCHES, "FlowMatchEulerDiscreteScheduler": few})
    with pytest.raises(UserError, match="sets use_karras_sigmas: True, a setting of FlowMatchEulerDiscreteScheduler"):
        make_scheduler(teacher, teacher.prediction)


def test_a_number_that_is_none_does_not_pass(found):
    agreement = found[1]["flow"]["any-1"]
    assert not replace(agreement, difference=float("nan")).passed
    assert not replace(agreement, image=float("nan")).passed
    assert not replace(agreement, image=1e-3).passed
    assert torch.tensor(agreement.tolerance).isfinite()
