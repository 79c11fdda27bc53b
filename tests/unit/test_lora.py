from __future__ import annotations

import json

import diffusers
import pytest
import torch
import yaml

from fmm_distill import distill
from fmm_distill.config.recipe import parse
from fmm_distill.errors import UserError
from fmm_distill.export.pipelines import write_lora
from fmm_distill.losses import Jump
from fmm_distill.losses.lagrangian import Lagrangian
from fmm_distill.run.publish import pack
from fmm_distill.student.lora import add_lora, default_targets, has_lora, merged
from fmm_distill.student.student import Student
from fmm_distill.training.ema import averaged
from tests.conformance.test_prompted_export import opened
from tests.logs import logged

FAMILIES = ("sd1", "sdxl", "dit", "flux", "z-image", "sana", "wan", "stable-audio")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tmp_path_factory.mktemp(name) / "teacher" for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def pair(request, folders):
    teacher = opened(request.param, folders[request.param])
    student = Student.from_teacher(teacher)
    teacher = add_lora(student, teacher, 2)
    return request.param, teacher, student


def points(teacher):
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t = teacher.schedule.time_at(torch.tensor([0.6, 0.9], dtype=torch.float64))
    r = teacher.schedule.time_at(torch.tensor([0.2, 0.5], dtype=torch.float64))
    return x, t, r, teacher.conditions.pick(torch.tensor([0.1, 0.9]))


def trained(student):
    return {name: parameter for name, parameter in student.network.named_parameters() if parameter.requires_grad}


def step(teacher, student):
    x, t, r, cond = points(teacher)
    optimizer = torch.optim.AdamW(trained(student).values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        Lagrangian()(student, teacher.velocity, Jump(x, t, r, cond, t)).sum().backward()
        optimizer.step()


def test_initial_adapters_follow_the_seed_and_leave_the_generator_alone(folders):
    teacher = opened("dit", folders["dit"])

    def adapters(seed):
        student = Student.from_teacher(teacher)
        add_lora(student, teacher, 2, seed=seed)
        return {name: value for name, value in student.network.state_dict().items() if ".lora_A" in name}

    before = torch.random.get_rng_state()
    one, same, other = adapters(1), adapters(1), adapters(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_adapters_are_trained_and_the_teacher_shares_the_rest(pair):
    _, teacher, student = pair
    x, t, r, cond = points(teacher)
    with torch.no_grad():
        before = teacher.velocity(x, t, cond)
        assert torch.equal(student.mean_velocity(x, t, r, cond), before)
    names = trained(student)
    assert any("lora_A" in name for name in names)
    assert all(".lora_" in name or name.startswith("jump_embedding.") for name in names)
    assert not list(teacher.network.parameters())
    kept = {name: value.clone() for name, value in student.network.state_dict().items() if name not in names}
    step(teacher, student)
    with torch.no_grad():
        assert torch.equal(teacher.velocity(x, t, cond), before)
        assert (student.mean_velocity(x, t, t, cond) - before).abs().max() > 1e-4 * before.abs().max()
    assert all(torch.equal(student.network.state_dict()[name], value) for name, value in kept.items())
    # Asking the teacher leaves the adapters on and trainable.
    assert trained(student).keys() == names.keys()


def test_the_teacher_that_was_passed_stays_as_it_is(folders):
    teacher = opened("sd1", folders["sd1"])
    network, codec = teacher.network, teacher.codec
    student = Student.from_teacher(teacher)
    assert codec.opened().unet is network
    shared = add_lora(student, teacher, 2)
    assert shared.codec.opened().unet is student.network
    assert codec.opened().unet is network
    assert teacher.network is network
    assert teacher.codec is codec
    assert codec.network is network
    assert shared.codec.network is student.network
    assert not has_lora(network)


def test_merged_weights_say_the_same(pair):
    _, teacher, student = pair
    step(teacher, student)
    plain = merged(student)
    assert has_lora(student.network)
    assert not has_lora(plain.network)
    assert set(plain.network.state_dict()) == {
        name.replace(".base_layer", "") for name in student.network.state_dict() if ".lora_" not in name
    }
    x, t, r, cond = points(teacher)
    with torch.no_grad():
        ours, theirs = (s.mean_velocity(x, t, r, cond) for s in (student, plain))
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


def test_an_average_holds_the_large_weights_once(pair):
    _, teacher, student = pair
    average = averaged(student, 0.9)
    ours, theirs = dict(student.named_parameters()), dict(average.module.named_parameters())
    assert all((theirs[name].data_ptr() == p.data_ptr()) != p.requires_grad for name, p in ours.items())
    before = {name: p.clone() for name, p in ours.items() if not p.requires_grad}
    step(teacher, student)
    average.update_parameters(student)
    assert all(torch.equal(ours[name], value) for name, value in before.items())


def test_the_file_is_what_diffusers_loads(tmp_path, folders):
    teacher = opened("sd1", folders["sd1"])
    student = Student.from_teacher(teacher)
    teacher = add_lora(student, teacher, 2)
    step(teacher, student)
    write_lora(student, "unet", tmp_path)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folders["sd1"])
    pipeline.load_lora_weights(tmp_path / "lora")
    x, t, _, cond = points(teacher)
    with torch.no_grad():
        ours = student.mean_velocity(x, t, t, cond)
        theirs = student.parametrization.velocity(pipeline.unet, x, t, cond)
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


def test_default_targets_are_attention_and_feed_forward(folders):
    network = opened("sd1", folders["sd1"]).network
    found = default_targets(network)
    assert {name.rpartition(".")[2] for name in found} == {"to_q", "to_k", "to_v", "0", "proj", "2"}
    assert all("attn" in name or ".ff." in name for name in found)


def test_targets_that_are_not_there(folders):
    teacher = opened("sd1", folders["sd1"])
    with pytest.raises(
        UserError, match=r"linear layers of TwoTimeUNet2DConditionModel for nowhere, got none; try .*targets"
    ):
        add_lora(Student.from_teacher(teacher), teacher, 2, ("nowhere",))


def test_a_whole_run(tmp_path, folders):
    opened("sd1", folders["sd1"])
    (tmp_path / "prompts.txt").write_text("a red cat\n\ntwo dogs\n")
    recipe = parse(
        {
            "teacher": str(folders["sd1"]),
            "prompts": {"file": str(tmp_path / "prompts.txt")},
            "guidance": {"scale": 2.0},
            "student": {"lora": {"rank": 2}},
            "training": {"steps": 4, "batch_size": 4, "checkpoint_every": 2},
            "evaluation": {
                "steps": [2],
                "ddim_steps": [2],
                "dpmsolver_steps": [2],
                "samples": 4,
                "endpoint_samples": 4,
                "endpoint_solver_steps": 4,
            },
            "export": {"steps": [2]},
        },
        "here",
    )
    said = []
    with logged(said):
        evaluation = distill(recipe, tmp_path / "run")
    assert "2 prompts, guided by 2" in "\n".join(said)
    assert "in adapters of rank 2" in "\n".join(said)
    calls = {row.sampler: row.calls for row in evaluation.rows}
    # A guided teacher asks twice a step.
    assert calls == {"student": 2, "teacher-ddim": 4, "teacher-dpmsolver++": 4}
    student = tmp_path / "run" / "student"
    assert json.loads((student / "verification.json").read_text())["passed"]
    assert {path.name for path in (student / "lora").iterdir()} == {
        "jump_embedding.safetensors",
        "pytorch_lora_weights.safetensors",
    }
    card = yaml.safe_load((student / "README.md").read_text().split("---")[1])
    assert card["pipeline_tag"] == "text-to-image"
    assert "guidance 2 is in its weights" in (student / "README.md").read_text()
    upload = pack(tmp_path / "run", "me/student")
    assert {"lora/jump_embedding.safetensors", "lora/pytorch_lora_weights.safetensors"} <= upload.files.keys()
    assert "`lora/` holds the trained adapters" in upload.card
