"""Students of pipelines that start from prompts or classes, in stock diffusers, in a process without this package."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline

from fmm_distill.export.folder import export_pipeline
from fmm_distill.export.verify import verify
from fmm_distill.student import make_student
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_prompted import FAMILIES, PROMPTS
from tests.tiny.diffusion import PIPELINES

# Their last samples are drawn, or their stock pipeline can't be called so; each with the reason.
STEPS = (1, 2, 4)


def moved(student):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for embedding in student.network.jump_embedding:
            torch.nn.init.normal_(embedding.linear_2.weight, std=0.3)
    return student.eval()


def prompted(name, folder):
    tiny = FAMILIES[name]
    tiny.build().save_pretrained(folder, safe_serialization=True)
    return load_teacher(str(folder), prompts=PROMPTS, call=dict(tiny.call))


@pytest.mark.parametrize("name", FAMILIES)
def test_folded_and_any_step_pipelines_agree_with_the_sampler(tmp_path, name):
    teacher = prompted(name, tmp_path / "teacher")
    student = moved(make_student(teacher))
    folder = export_pipeline(student, teacher, tmp_path / "student", STEPS)
    differences = verify(student, teacher, folder, STEPS)
    print(name, differences)
    assert max(differences.values()) < 1e-4
