"""The runner over diffusers' test classes, on a suite of two classes, and its checks on teachers that are wrong."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from experiments.coverage import checks, distilling, rows
from experiments.coverage.installed import uncovered
from experiments.coverage.jobs import run_forked
from experiments.coverage.kinds import KINDS, kind_of
from experiments.coverage.report import entries_of, markdown, totals
from experiments.coverage.stepping import first_order
from experiments.coverage.suite import commit_of, find_cases
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.prompts import Prompts
from tests.conftest import save_teacher, tiny_unet

FILE = "tests/pipelines/tiny/test_tiny.py"
SUITE = """
import torch
from diffusers import (
    CMStochasticIterativeScheduler, ConsistencyModelPipeline, DDIMPipeline, DDIMScheduler, UNet2DModel
)

class Mixin:
    def get_dummy_components(self):
        unet = UNet2DModel(
            sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
            norm_num_groups=4, layers_per_block=1,
        )
        torch.nn.init.zeros_(unet.conv_out.weight)
        return {"unet": unet, "scheduler": self.scheduler()}

    def get_dummy_inputs(self, device, seed=0):
        return {"batch_size": 1, "num_inference_steps": 2, "generator": torch.Generator(), "output_type": "np"}

class DDIMFastTests(Mixin):
    pipeline_class = DDIMPipeline
    scheduler = DDIMScheduler

class ConsistencyFastTests(Mixin):
    pipeline_class: type = ConsistencyModelPipeline
    scheduler = CMStochasticIterativeScheduler

class TrainedSlowTests:
    pipeline_class = DDIMPipeline

class MissingFastTests(Mixin):
    pipeline_class = DDIMPipeline

    def get_dummy_components(self):
        raise OSError("no such repository")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    file = folder / FILE
    file.parent.mkdir(parents=True)
    for package in (file.parent, *file.parent.parents[:2]):
        (package / "__init__.py").touch()
    file.write_text(SUITE, encoding="utf-8")
    (file.parent / "test_helpers.py").write_text("import not_installed\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def opened(checkout, tmp_path_factory):
    """The work folder of a run that has built and opened all classes."""
    work = tmp_path_factory.mktemp("work")
    rows.Coverage(checkout, work).run(["build", "open"])
    return work


def test_cases_are_the_classes_that_name_a_pipeline(checkout):
    cases = find_cases(checkout)
    assert [case.name for case in cases] == [
        "DDIMFastTests",
        "ConsistencyFastTests",
        "TrainedSlowTests",
        "MissingFastTests",
    ]
    assert {case.file for case in cases} == {FILE}
    assert len({case.slug for case in cases}) == len(cases)
    # The folder is in no repository of its own.
    assert commit_of(checkout) == "unknown"


def test_every_class_has_a_row_with_its_result(checkout, opened):
    entries = {
        entry["key"].rpartition("::")[2]: entry for entry in entries_of(rows.Coverage(checkout, opened).rows.values())
    }
    assert {name: entry["result"] for name, entry in entries.items()} == {
        "DDIMFastTests": "opened",
        "ConsistencyFastTests": "refused",
        "MissingFastTests": "not built",
    }
    ddim = entries["DDIMFastTests"]
    assert (ddim["pipeline"], ddim["kind"], ddim["event_shape"]) == ("DDIMPipeline", "unconditional", [3, 8, 8])
    assert ddim["checks"].keys() == {"step", "order", "start", "start, embedded"}
    assert ddim["wrong"] == []
    assert ddim["seconds"] >= 0 <= ddim["mib"]
    assert "consistency model" in entries["ConsistencyFastTests"]["reason"]
    assert entries["MissingFastTests"]["reason"] == "OSError: no such repository"


def test_layers_of_zeros_are_drawn_again(opened):
    folder = next((opened / "pipelines").glob("*DDIM*"))
    assert diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet").conv_out.weight.abs().min() > 0


def test_a_finished_stage_is_not_run_again(checkout, opened, monkeypatch):
    lines = (opened / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    monkeypatch.setattr(rows, "run_forked", pytest.fail)
    again = rows.Coverage(checkout, opened)
    again.run(["build", "open"])
    assert (opened / "rows.jsonl").read_text(encoding="utf-8").splitlines() == lines
    assert len(again.rows) == 4


def test_again_opens_and_builds_nothing(checkout, opened, tmp_path):
    coverage = rows.Coverage(checkout, opened)
    before = dict(coverage.rows)
    coverage.run(["build", "open"], "Consistency", again=True)
    key = f"{FILE}::ConsistencyFastTests"
    assert coverage.rows[key]["build"] is before[key]["build"]
    # Twice the same result, from its own file too.
    assert coverage.rows[key]["open"]["refused"] == before[key]["open"]["refused"]
    assert rows.read_rows(opened / "rows.jsonl") == coverage.rows
    with pytest.raises(SystemExit, match="found none"):
        coverage.run(["open"], "NoSuchClass")


@pytest.fixture
def distilled(checkout, opened, tmp_path, monkeypatch):
    """The function that distills a class whose command does what the test gives, and returns its row of the page."""
    # A copy of the record, to which each test adds its row.
    shutil.copy(opened / "rows.jsonl", tmp_path)
    (tmp_path / "pipelines").symlink_to(opened / "pipelines")

    def run(command):
        monkeypatch.setattr(distilling, "distill", command)
        coverage = rows.Coverage(checkout, tmp_path)
        coverage.run(["distill"], "DDIMFastTests")
        [entry] = [entry for entry in entries_of(coverage.rows.values()) if entry["key"].endswith("DDIMFastTests")]
        return entry

    return run


@pytest.mark.parametrize(
    ("code", "passed", "result"), [(0, True, "distilled"), (2, False, "opened"), (0, False, "opened")]
)
def test_a_distilled_class_has_a_verified_export(distilled, code, passed, result):
    def command(folder, call, forms, output, export):
        assert folder.is_dir()
        assert (forms, export) == ({}, distilling.Export((1, 4), "scaled"))
        print("step 1\nexpected this, got that; try more", file=sys.stderr)
        return {"code": code, "passed": passed}

    entry = distilled(command)
    assert (entry["result"], entry["reason"]) == (result, "" if passed else "expected this, got that")


def test_an_embedded_student_is_distilled_where_the_tool_advises_it(distilled):
    def command(folder, call, forms, output, export):
        print("error: expected equal jumps; try student.kind: embedded", file=sys.stderr)
        return {"code": 0, "passed": True} if export.student == "embedded" else {"code": 2, "passed": False}

    entry = distilled(command)
    assert entry["result"] == "distilled"
    assert [note for note in entry["notes"] if note.startswith("distilled as an embedded student")]


def test_a_job_returns_its_value_its_error_or_its_end(tmp_path):
    def run(work, seconds=20.0):
        return run_forked(work, seconds, tmp_path / "job.log")

    assert run(lambda: {"pid": os.getpid()}).value["pid"] != os.getpid()
    failed = run(lambda: {"value": 1 / 0})
    assert (failed.value, failed.error) == (None, "ZeroDivisionError: division by zero")
    assert "1 / 0" in failed.trace
    assert run(lambda: sys.exit(3)).error == "SystemExit: 3"
    assert run(lambda: os._exit(5)).error == "the process ended with status 5"
    assert run(lambda: time.sleep(60), 0.1).error == "no end within 0.1 s"
    run(lambda: {"printed": print("a line")})
    assert (tmp_path / "job.log").read_text() == "a line\n"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("StableDiffusionXLPipeline", "text-to-image"),
        ("WanPipeline", "text-to-video"),
        ("StableAudioPipeline", "audio"),
        ("DiTPipeline", "class"),
        ("DDPMPipeline", "unconditional"),
        ("StableDiffusionXLControlNetInpaintPipeline", "controlnet"),
        ("StableDiffusionXLInpaintPipeline", "inpaint"),
        ("StableDiffusionXLImg2ImgPipeline", "image-to-image"),
        ("WanImageToVideoPipeline", "image-to-video"),
        ("WanVideoToVideoPipeline", "video-to-video"),
        ("QwenImageEditPipeline", "edit"),
        ("IFSuperResolutionPipeline", "upscaler"),
        ("KandinskyV22PriorPipeline", "prior"),
        ("KandinskyV22Pipeline", "text-to-image"),
        ("MarigoldDepthPipeline", "other"),
    ],
)
def test_kinds_of_installed_classes(name, kind):
    installed = dict(uncovered(()))
    assert installed[name] == kind
    assert set(installed.values()) <= set(KINDS)


def test_classes_with_a_row_are_not_named_again():
    assert "WanPipeline" not in dict(uncovered({"WanPipeline"}))
    assert kind_of("ConsistencyModelPipeline", ("batch_size", "class_labels")) == "unconditional"


def row(name, parameters=("prompt",), **stages):
    build = {"pipeline": name, "parameters": list(parameters), "call": {}}
    return {"key": f"tests/pipelines/a/test_a.py::{name}Tests", "build": build, **stages}


def with_images(name, **stages):
    made = row(name, ("prompt", "image"), **stages)
    made["build"]["images"] = {"image": {"size": [8, 8], "mode": "RGB"}}
    return made


def opening(**changes):
    found = {"step": 1e-7, "order": 0.0, "start": 0.0, "start, embedded": "UserError: no time embedding"}
    described = {"prediction": "epsilon", "event_shape": [4, 8, 8], "guidable": True, "seconds": 1.0, "mib": 5}
    return described | {"checks": found | changes, "one_step": True}


def test_the_page_has_every_row_and_sums(tmp_path):
    refusal = {
        "refused": "/a/folder/of_a_model: scheduler X|Y; expected one of "
        + ", ".join(map("Scheduler{}".format, range(20)))
    }
    passed = {"code": 0, "passed": True, "steps": [1, 4]}
    entries = entries_of(
        [
            row("APipeline", open=opening(), distill=passed),
            row("BPipeline", open=opening(order=0.5), distill=passed | {"error": "no disk"}),
            row("CPipeline", open=refusal),
            row("DPipeline", open={"error": "AssertionError: odd"}),
            row("EEditPipeline", ("prompt", "image"), open=opening(), distill=passed | {"steps": [2, 4]}),
            with_images("IEditPipeline", open=opening(image=0.5)),
            with_images("JEditPipeline", open=opening(image="does not see image")),
            {
                "key": "tests/pipelines/a/test_a.py::FFastTests",
                "build": {"tested": "FPipeline", "error": "ImportError: cv2"},
            },
            {"key": "tests/pipelines/a/test_a.py::GSlowTests", "build": {"skipped": True}},
        ]
    )
    assert [entry["result"] for entry in entries] == [
        "distilled",
        "opened",
        "refused",
        "crashed",
        "not built",
        "distilled",
        "opened",
        "opened",
    ]
    counts = totals(entries)
    assert counts["all"]["classes"] == sum(counts[kind]["classes"] for kind in counts if kind != "all") == 8
    assert [entry["pipeline"] for entry in entries if entry["wrong"]] == ["BPipeline", "JEditPipeline"]
    versions = dict.fromkeys(("commit", "diffusers", "transformers", "torch", "fmm_distill"), "1.2")
    page = markdown(entries, versions, [("HPipeline", "audio")], earlier=entries[:1])
    assert page == markdown(entries, versions, [("HPipeline", "audio")], earlier=entries[:1])
    assert all(page.count(f"| `{name}` |") == 1 for name in ("APipeline", "BPipeline", "CPipeline", "HPipeline"))
    assert "wrong order: 5.0e-01; no disk" in page
    assert "| scheduler X/Y; expected one of Scheduler0, …, Scheduler19 |" in page
    assert "the student never sees a reference; its stock pipeline does not run with one step" in page
    assert "| not distilled yet; called with image |" in page
    assert "| wrong image: does not see image; not distilled yet; called with image |" in page
    assert "| all | 8 | 2 | 3 | 1 | 1 | 1 | 2 | 1, 1 |" in page
    assert "| text-to-image | 5 | 1 | 1 | 1 | 1 | 1 | 1 | 1, 1 |" in page
    assert "Outside the line" in page
    assert "LLaDA" in page


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    save_teacher(folder, tiny_unet(in_channels=3, out_channels=3))
    return load_teacher(str(folder))


def test_checks_of_a_right_teacher_are_zero_up_to_rounding(teacher):
    found = [
        checks.compare_steps(teacher, teacher.source),
        checks.compare_batches(teacher, Prompts(checks.PROMPTS), pytest.fail),
        checks.compare_start(teacher, scaled=True),
        checks.compare_start(teacher, scaled=False),
    ]
    assert max(found) < 1e-5
    assert checks.runs_with(teacher, teacher.source, 1)


def test_a_wrong_sign_is_a_wrong_step(teacher):
    def turned(network, x, time, cond, h):
        return -network(x, time).sample

    wrong = replace(teacher, parametrization=replace(teacher.parametrization, call=turned))
    assert checks.compare_steps(wrong, teacher.source) > 1e-2


def test_a_network_that_mixes_its_samples_is_a_wrong_order(teacher):
    def mixed(network, x, time, cond, h):
        return network(x, time).sample + torch.arange(len(x)).reshape(-1, 1, 1, 1)

    wrong = replace(teacher, parametrization=replace(teacher.parametrization, call=mixed))
    assert checks.compare_batches(wrong, Prompts(checks.PROMPTS), pytest.fail) > 1e-2


class CosineTime(diffusers.EDMDPMSolverMultistepScheduler):
    """As the cosine scheduler of Stable Audio, which needs another package."""

    def precondition_noise(self, sigma):
        return sigma.atan() * 2 / torch.pi


def test_solvers_are_compared_at_first_order():
    made = first_order(DPMSolverMultistepScheduler(num_train_timesteps=100, prediction_type="v_prediction"))
    assert isinstance(made, DDIMScheduler)
    assert made.config.prediction_type == "v_prediction"
    assert made.config.num_train_timesteps == 100
    assert not made.config.clip_sample
    flow = first_order(
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    )
    assert isinstance(flow, FlowMatchEulerDiscreteScheduler)
    assert type(first_order(diffusers.EDMDPMSolverMultistepScheduler())) is diffusers.EDMEulerScheduler
    assert first_order(CosineTime()) is None
    assert flow.config.shift == 3
