"""Where teachers of prompts have gone wrong: told guidance, padding, other noise levels, half precision, old files."""

from __future__ import annotations

import gc
import json
import os
import re
import weakref

import pytest
import torch

from fmm_distill.config.recipe import parse
from fmm_distill.config.settings import EvaluationSettings
from fmm_distill.core.derivatives.engines import derivative_in_r
from fmm_distill.errors import UserError
from fmm_distill.evaluation.evaluator import evaluate
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.verify import Exported, verify
from fmm_distill.run.distill import distill
from fmm_distill.run.plan import forecast
from fmm_distill.run.reopen import open_run
from fmm_distill.student.student import Student
from fmm_distill.teachers.components import open_pipeline
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.load import load_teacher
from fmm_distill.training.trainer import Trainer
from tests.conformance.test_prompted import FAMILIES, PROMPTS, saved
from tests.conformance.test_prompted_export import moved
from tests.tiny.diffusion import PIPELINES


@pytest.mark.parametrize("name", ["flux", "flux2", "hunyuan-video"])
def test_a_network_that_is_told_its_guidance_is_told_the_scale(tmp_path, name):
    source, call = saved(name, tmp_path)
    one, four = (load_teacher(source, prompts=PROMPTS, call=call, guidance=Guidance(scale)) for scale in (1.0, 4.0))
    assert four.guidance is None
    told = [teacher.conditions.prompts.inputs["guidance"] for teacher in (one, four)]
    torch.testing.assert_close(told[1], 4 * told[0])
    with pytest.raises(UserError, match=r"guidance\.interval: expected \[0, 1\] for a network that is conditioned on"):
        load_teacher(source, prompts=PROMPTS, call=call, guidance=Guidance(4.0, (0.2, 0.6)))


def test_prompts_padded_beside_a_long_one_are_verified_as_the_pipeline_pads_them(tmp_path):
    source, call = saved("cogview4", tmp_path / "teacher")
    prompts = (*"abcdefgh", "a prompt that is a good deal longer than all the others together")
    teacher = load_teacher(source, prompts=prompts, call=call)
    student = moved(Student.from_teacher(teacher))
    folder = export_pipeline(student, teacher, tmp_path / "student", (2,))
    assert len(verify(Exported(student, exporter_of(teacher), folder, (2,)))) == 2


def test_cogvideox_is_measured_against_solvers_with_its_own_noise_levels(tmp_path):
    pipeline = FAMILIES["cogvideox"].build()
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, snr_shift_scale=3.0)
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    teacher = load_teacher(str(tmp_path), prompts=PROMPTS, call=dict(FAMILIES["cogvideox"].call))
    settings = EvaluationSettings(
        steps=(50,), ddim_steps=(50,), dpmsolver_steps=(50,), samples=4, endpoint_samples=4, endpoint_solver_steps=100
    )
    rows = evaluate({"student": Student.from_teacher(teacher)}, teacher, settings, None, torch.device("cpu")).rows
    # The untrained student is its teacher's DDIM.
    assert [row.sampler for row in rows] == ["student", "teacher-ddim"]
    assert rows[0].endpoint_error == pytest.approx(rows[1].endpoint_error, rel=1e-3)


def test_central_differences_stay_in_single_precision_under_autocast(tmp_path):
    source, call = saved("sd1", tmp_path)
    teacher = load_teacher(source, prompts=PROMPTS, call=call)
    student = moved(Student.from_teacher(teacher))
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    t, r = (teacher.schedule.time_at(torch.tensor(s, dtype=torch.float64)) for s in ([0.6, 0.9], [0.2, 0.5]))
    with torch.no_grad():
        exact = derivative_in_r(student, x, t, r, cond=teacher.conditions.prompts)
        with torch.autocast("cpu", torch.bfloat16):
            central = derivative_in_r(student, x, t, r, cond=teacher.conditions.prompts, engine="central")
    assert (central - exact).norm() < 1e-3 * exact.norm()


def recipe_of(source, prompts, **changes):
    settings = {
        "teacher": source,
        "prompts": {"file": str(prompts)},
        "training": {"steps": 2, "batch_size": 2, "checkpoint_every": 1},
        "evaluation": {
            "steps": [1],
            "ddim_steps": [1],
            "dpmsolver_steps": [1],
            "samples": 2,
            "endpoint_samples": 2,
            "endpoint_solver_steps": 2,
        },
        "export": {"steps": [1]},
    }
    return parse(settings | changes, "here")


def test_a_run_keeps_its_prompts(tmp_path):
    source, _ = saved("sd1", tmp_path / "teacher")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    recipe = recipe_of(source, prompts)
    assert re.search(r"[GM]iB at peak: weights .*, activations ", forecast(recipe, tmp_path / "run"))
    distill(recipe, tmp_path / "run")
    prompts.write_text("a cat\na dog\n")
    assert open_run(tmp_path / "run").teacher.conditions.names == ("a cat",)
    (tmp_path / "run" / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"expected the 1 prompts in its prompts\.json, got others"):
        distill(recipe, tmp_path / "run")


def test_encoders_leave_memory_before_training_and_after_the_run(tmp_path, monkeypatch):
    source, _ = saved("sd1", tmp_path / "teacher")
    opened, alive = [], []

    def watched(*args, **kwargs):
        pipeline = open_pipeline(*args, **kwargs)
        opened.extend(weakref.ref(part) for part in (pipeline, pipeline.text_encoder, pipeline.vae))
        return pipeline

    def run(trainer, *given):
        alive.append([part() for part in opened if part() is not None])
        train(trainer, *given)

    train = Trainer.run
    monkeypatch.setattr("fmm_distill.teachers.prompted.load.open_pipeline", watched)
    monkeypatch.setattr("fmm_distill.teachers.codec.open_pipeline", watched)
    monkeypatch.setattr(Trainer, "run", run)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    recipe = recipe_of(source, prompts, student={"lora": {"rank": 2}})
    # Without help of the garbage collector, which may come late.
    gc.disable()
    try:
        distill(recipe, tmp_path / "run")
    finally:
        gc.enable()
    assert alive == [[]]
    # The decoder's pipeline was opened since, and is gone as well.
    assert len(opened) >= 6
    gc.collect()
    assert not [part() for part in opened if part() is not None]


def test_a_disk_without_hard_links(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError("no hard links here")

    PIPELINES["dit"].build().save_pretrained(tmp_path / "teacher")
    teacher = load_teacher(str(tmp_path / "teacher"))
    monkeypatch.setattr(os, "link", refused)
    folder = export_pipeline(Student.from_teacher(teacher), teacher, tmp_path / "student", (2,))
    assert (folder / "steps-2" / "vae" / "config.json").is_file()


def test_a_pipeline_of_the_repositorys_own_code(tmp_path):
    PIPELINES["dit"].build().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": ["mine", "MyPipeline"]}))
    with pytest.raises(UserError, match=r"its pipeline is code of the repository .*MyPipeline"):
        load_teacher(str(tmp_path))


def test_a_component_that_is_missing(tmp_path):
    PIPELINES["dit"].build().save_pretrained(tmp_path)
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="its vae is missing"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("key", ["prompt", "guidance_scale", "num_inference_steps", "timesteps", "sigmas"])
def test_keywords_that_are_the_programs_own(tmp_path, key):
    source, call = saved("sd1", tmp_path)
    with pytest.raises(UserError, match=rf"pipeline\.{key} is set by the program"):
        load_teacher(source, call=call | {key: 3})
    known = r"it takes height, width, .*; try --set 'pipeline=\{\}'"
    with pytest.raises(UserError, match=r"pipeline\.hight: StableDiffusionPipeline takes no hight; " + known):
        load_teacher(source, call=call | {"hight": 3})


@pytest.mark.parametrize("interval", [[0.9, 0.1], [0.5, 0.5]])
def test_an_interval_that_holds_no_time(interval):
    with pytest.raises(UserError, match=r"guidance\.interval: expected two increasing times in \[0, 1\]"):
        parse({"guidance": {"scale": 2.0, "interval": interval}}, "here")
