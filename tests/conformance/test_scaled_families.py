"""Students whose weights change with the length of the jump, of every family of networks."""

from __future__ import annotations

import pytest
import torch

from fmm_distill.student.fold import fold
from fmm_distill.student.scaled import ScaledWeights, scaled_ranks
from fmm_distill.student.student import Student, is_new
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_prompted import FAMILIES
from tests.conformance.test_prompted_export import opened
from tests.conftest import save_teacher
from tests.logs import logged
from tests.scaled import one_by_one, points, randomize, relative, scaled_student

# A UNet of pixels, one of sounds, transformers of one and of two streams, of frames, with lists of samples.
NAMES = ("pixels", "unet1d", "dit", "sd1", "sdxl", "pixart-alpha", "sd3", "flux", "z-image", "wan", "latte")
SLOW = ("text-to-video", *(name for name in FAMILIES if name not in NAMES and name != "text-to-video"))
# More tokens than other prompts are padded to.
LONG = "two dogs in the snow " * 12


@pytest.fixture(scope="module", params=[*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def teacher(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    if request.param == "pixels":
        return load_teacher(str(save_teacher(folder)))
    return opened(request.param, folder)


@pytest.mark.parametrize("rank", [0, 2])
@torch.no_grad()
def test_the_student_is_its_teacher_its_samples_and_its_folds(teacher, rank):
    student = Student.from_teacher(teacher, scaled=ScaledWeights(rank=rank))
    x, t, r, cond = points(teacher)
    v = teacher.velocity(x, t, cond)
    tolerance = {"rtol": 0, "atol": 1e-6 * float(v.abs().max())}
    # Untrained at any length, and trained at length 0.
    torch.testing.assert_close(student.mean_velocity(x, t, r, cond), v, **tolerance)
    randomize(student)
    torch.testing.assert_close(student.mean_velocity(x, t, t, cond), v, **tolerance)
    # Samples with different lengths do not see each other's.
    u = student.mean_velocity(x, t, r, cond)
    assert relative(u, one_by_one(student, x, t, r, cond)) < 1e-5
    assert relative(u, v) > 1e-2
    # At one length it is a network of the stock class.
    h = torch.full((2,), 0.25)
    stock = fold(student, teacher, teacher.schedule.grid(4))
    assert type(stock) is type(teacher.network)
    at_one_length = student.mean_velocity_of_jump(x, t, h, cond)
    assert relative(student.parametrization.velocity(stock, x, t, cond), at_one_length) < 1e-5
    student.network.call_state.group = 0
    assert relative(student.mean_velocity_of_jump(x, t, h, cond), at_one_length) < 1e-5


def test_every_layer_of_every_family_takes_part(teacher):
    lines = []
    with logged(lines):
        student = Student.from_teacher(teacher, scaled=ScaledWeights())
    assert lines == []
    x, t, r, cond = points(teacher)
    called = set()
    kinds = torch.nn.Linear | torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d
    for name, module in student.network.named_modules():
        if isinstance(module, kinds):
            module.register_forward_hook(lambda *_, name=name: called.add(name))
    student.mean_velocity(x, t, r, cond).square().sum().backward()
    assert set(scaled_ranks(student.network)) == called
    gradients = [p.grad is not None for name, p in student.network.named_parameters() if is_new(name)]
    # The last block of one family has outputs for the text that nothing reads.
    assert sum(gradients) >= 0.9 * len(gradients) > 0


def test_prompts_of_different_lengths_that_are_joined_to_one_list_of_tokens(tmp_path):
    tiny, lines = FAMILIES["z-image"], []
    tiny.build().save_pretrained(tmp_path)
    teacher = load_teacher(str(tmp_path), prompts=("a cat", LONG), call=dict(tiny.call))
    with logged(lines):
        student = scaled_student(teacher)
    assert [line.partition(":")[0] for line in lines] == ["cap_embedder.1"]
    x, t, r, cond = points(teacher, 4)
    with torch.no_grad():
        u = student.mean_velocity(x, t, r, cond)
        assert relative(u, one_by_one(student, x, t, r, cond)) < 1e-5
        assert relative(u, teacher.velocity(x, t, cond)) > 1e-2
