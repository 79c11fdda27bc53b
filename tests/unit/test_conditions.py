"""What samples are told in training: drawn by seed, step and place, the same for student and teacher."""

from __future__ import annotations

import pytest
import torch

from fmm_distill.config.recipe import parse
from fmm_distill.core.conditioning import Conditioning
from fmm_distill.core.draws import draw
from fmm_distill.student.student import Student
from fmm_distill.teachers.conditions import Classes
from fmm_distill.teachers.load import load_teacher
from fmm_distill.training.objective import Objective
from tests.conftest import save_teacher, tiny_unet


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(str(save_teacher(tmp_path_factory.mktemp("teacher"), tiny_unet(num_class_embeds=7))))


def labels_of(network):
    seen = []
    network.register_forward_pre_hook(lambda _, __, given: seen.append(given["class_labels"].clone()), with_kwargs=True)
    return seen


@pytest.mark.parametrize("also", [False, True])
@pytest.mark.parametrize("prior", [1.0, 0.25])
def test_student_and_teacher_are_told_what_was_drawn(teacher, also, prior):
    terms = [{"loss": {"name": "flow_matching", "velocity": "teacher"}, "fraction": 0.5}] if also else []
    recipe = parse({"loss": {"name": "lagrangian"}, "time_sampling": {"prior": prior}, "extra_losses": terms}, "here")
    student = Student.from_teacher(teacher)
    draws = draw(0, 3, 64, teacher.event_shape)
    drawn = teacher.conditions.pick(draws.condition).inputs["class_labels"]
    assert set(drawn.tolist()) == set(range(7))
    students, teachers = labels_of(student.network), labels_of(teacher.network)
    Objective(student, teacher, recipe, recipe.losses)(draws, None, 0)
    teacher.network._forward_pre_hooks.clear()
    teacher.network._forward_pre_hooks_with_kwargs.clear()
    parts = [drawn]
    if also:
        first = draws.position < 0.5
        parts = [drawn[first], drawn[~first]]
    # The teacher is asked once for every sample of every term.
    assert [labels.tolist() for labels in teachers] == [labels.tolist() for labels in parts]
    asked = [labels.tolist() for labels in students]
    assert all(labels.tolist() in asked for labels in parts)
    if prior < 1:
        # Starts within the way are jumps of the student, told the same as what they start.
        assert len(asked) > len(parts)


def test_the_draw_is_of_the_seed_and_the_step():
    one, same, other = (draw(seed, step, 8, (1,)).condition for seed, step in ((0, 1), (0, 1), (0, 2)))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_classes_are_equally_likely_and_none_is_left_out():
    classes = Classes(tuple("abc"), null_label=3)
    picked = classes.pick(torch.linspace(0, 1, 300)).inputs["class_labels"]
    assert [int((picked == k).sum()) for k in range(3)] == [100, 100, 100]
    assert classes.null(classes.pick(torch.zeros(2))).inputs["class_labels"].tolist() == [3, 3]


def test_a_condition_is_cut_and_moved_whole():
    shared = {"sizes": (torch.ones(2), {"deep": [torch.zeros(1)]}), "name": "x"}
    cond = Conditioning({"a": torch.arange(4), "b.c": torch.arange(8).reshape(4, 2)}, shared)
    assert len(cond) == 4
    some = cond.rows(torch.tensor([2, 0]))
    assert some.inputs["a"].tolist() == [2, 0]
    assert some.inputs["b.c"].tolist() == [[4, 5], [0, 1]]
    assert cond.part(1, 3).inputs["a"].tolist() == [1, 2]
    moved = cond.to("meta")
    assert moved.inputs["a"].device.type == moved.shared["sizes"][0].device.type == "meta"
    assert moved.shared["sizes"][1]["deep"][0].device.type == "meta"
    assert moved.shared["name"] == "x"
