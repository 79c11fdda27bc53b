"""Students of pipelines told prompts, classes or nothing, in stock diffusers, in a process without this package."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

from fmm_distill.config.recipe import parse
from fmm_distill.core.staged import parts_of, stages_of
from fmm_distill.export.choose import exporter_of
from fmm_distill.export.load import load_student
from fmm_distill.export.manifest import make_manifest, write_manifest
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.export.remote.stock_pipeline import flow_map_pipeline
from fmm_distill.export.verify import Exported, verify, verify_all
from fmm_distill.student.lora import default_targets
from fmm_distill.student.sampling import sample
from fmm_distill.student.stages import jump_embeddings
from fmm_distill.student.student import Student
from fmm_distill.teachers.conditions import Classes
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_prompted import FAMILIES, PROMPTS, SLOW
from tests.slow import with_slow
from tests.tables import check_table
from tests.tiny.diffusion import PIPELINES

STEPS = (1, 4)
# They have adapters of their own.
UNPROMPTED = ("dit", "unet1d")
# A UNet, transformers of one and of two streams of tokens, a distilled guidance, sound and video: what all do is opened
# again by their pipelines.
LOADED_SOON = (*UNPROMPTED, "sd1", "pixart-alpha", "sd3", "flux", "stable-audio", "wan")
# Their stock pipelines fail at one step: one divides by the number of steps less one.
FROM_TWO = {"mochi": (2, 4)}


def moved(student):
    """A student whose jumps differ from its teacher's steps, and from one another."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for embedding in jump_embeddings(student.network):
            torch.nn.init.normal_(embedding.linear_2.weight, std=0.3)
    return student.eval()


def opened(name, folder):
    if name in UNPROMPTED:
        PIPELINES[name].build().save_pretrained(folder)
        return load_teacher(str(folder))
    tiny = (FAMILIES | SLOW)[name]
    tiny.build().save_pretrained(folder, safe_serialization=True)
    return load_teacher(str(folder), prompts=PROMPTS, call=dict(tiny.call))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Every family's student, exported; the folders are opened in one process, which is what takes long."""
    made = {}
    for name in (*UNPROMPTED, *FAMILIES):
        folder, steps = tmp_path_factory.mktemp(name), FROM_TWO.get(name, STEPS)
        teacher = opened(name, folder / "teacher")
        student = moved(Student.from_teacher(teacher))
        made[name] = Exported(
            student, exporter_of(teacher), export_pipeline(student, teacher, folder / "student", steps), steps
        )
    return made, dict(zip(made, verify_all(list(made.values())), strict=True))


@pytest.mark.parametrize("name", [*UNPROMPTED, *FAMILIES])
def test_folded_and_any_step_pipelines_agree_with_the_sampler(exports, name):
    export, differences = exports[0][name], exports[1][name]
    kinds = ("any",) if export.exporter.not_fixed else ("any", "folded")
    assert sorted(differences) == sorted(f"{kind}-{n}" for kind in kinds for n in export.steps)
    assert all(one.passed for one in differences.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_pipelines_of_other_layouts_agree_with_the_sampler(tmp_path, name):
    teacher = opened(name, tmp_path / "teacher")
    student = moved(Student.from_teacher(teacher))
    folder = export_pipeline(student, teacher, tmp_path / "student", STEPS)
    found = verify(Exported(student, exporter_of(teacher), folder, STEPS))
    assert sorted(found) == ["any-1", "any-4", "folded-1", "folded-4"]
    assert all(one.passed for one in found.values())


@torch.no_grad()
@pytest.mark.parametrize("name", with_slow([*UNPROMPTED, *FAMILIES], LOADED_SOON))
def test_a_student_loads_from_its_folder_as_the_map_that_it_was(exports, name, monkeypatch, tmp_path):
    export = exports[0][name]
    teacher = export.teacher
    recipe = parse({"teacher": "builtin:digits"}, "here")
    write_manifest(export.folder, make_manifest(export.student, teacher, recipe, export.steps))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    loaded = load_student(export.folder, prompts=PROMPTS if name in FAMILIES else ())
    noise = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    told = None if teacher.conditions is None else teacher.conditioned_on(torch.tensor([0.0, 0.0], dtype=torch.float64))
    own = sample(export.student, noise, 3, told)
    made = loaded.generate(noise, 3, None if told is None else [0, 0])
    assert (made - own).abs().max() <= 1e-5 * own.abs().max()


def test_all_families_but_one_fold(exports):
    assert [name for name, export in exports[0].items() if export.exporter.not_fixed] == ["unet1d"]


def test_the_second_time_goes_into_every_block_that_embeds_the_time(exports):
    hosts = {
        f"{name}, {i}" if i else name: part.config["jump_hosts"]
        for name, export in exports[0].items()
        for i, part in enumerate(stages_of(export.student.network))
    }
    blocks = len(exports[0]["dit"].teacher.network.transformer_blocks)
    assert blocks > 1
    assert {name: len(found) for name, found in hosts.items() if len(found) > 1} == {"dit": blocks}


def test_folded_pipelines_are_stock_through_and_through(exports):
    for export in exports[0].values():
        for folder in export.folder.glob("steps-*"):
            index = json.loads((folder / "model_index.json").read_text())
            assert hasattr(diffusers, index["_class_name"])
            assert not list(folder.rglob("*.py"))
            networks = parts_of(export.teacher.network, export.exporter.component)
            for name, network in networks.items():
                config = json.loads((folder / name / "config.json").read_text())
                assert "flow_map" not in config
                assert config["_class_name"] == type(network).__name__
            # What no number of steps changes stands on the disk once.
            shared = [path for path in folder.rglob("*.safetensors") if path.parent.name not in networks]
            assert shared
            assert all(path.stat().st_nlink > 1 for path in shared)


@pytest.fixture
def any_step(exports):
    """The any-step pipeline of a Stable Diffusion student, without a process of its own."""
    export = exports[0]["sd1"]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(export.teacher.pipeline.folder)
    pipeline.unet = export.student.network
    made = flow_map_pipeline(diffusers.StableDiffusionPipeline)(**pipeline.components)
    made.scheduler = diffusers.DDIMScheduler.from_pretrained(export.folder / "scheduler")
    made.set_progress_bar_config(disable=True)
    return export, made


@pytest.mark.parametrize("steps", [3, 7])
def test_numbers_of_steps_that_do_not_divide_the_timesteps(any_step, steps):
    export, pipeline = any_step
    noise = torch.randn(1, *export.teacher.event_shape, generator=torch.Generator().manual_seed(0))
    made = pipeline(PROMPTS[0], num_inference_steps=steps, latents=noise, output_type="latent").images
    cond = export.teacher.conditions.prompts.rows(torch.tensor([0]))
    assert (made - sample(export.student, noise, steps, cond)).abs().max() < 1e-4


def test_guidance_is_off_unless_asked_for_and_then_warned_of(any_step, caplog):
    _, pipeline = any_step
    call = {"prompt": PROMPTS[0], "num_inference_steps": 2, "output_type": "latent"}

    def run(**more):
        return pipeline(**call, **more, generator=torch.Generator().manual_seed(0)).images

    assert torch.equal(run(), run(guidance_scale=1.0))
    diffusers.utils.logging.enable_propagation()
    try:
        assert (run(guidance_scale=4.0) - run()).abs().max() > 1e-3
    finally:
        diffusers.utils.logging.disable_propagation()
    assert "guidance is in the student's weights" in caplog.text


def test_a_callback_sees_every_jump_and_may_change_the_latents(any_step):
    _, pipeline = any_step
    seen = []

    def stop(pipe, step, timestep, given):
        seen.append(int(timestep))
        return {"latents": torch.zeros_like(given["latents"])}

    call = {"num_inference_steps": 4, "output_type": "latent", "callback_on_step_end": stop}
    assert pipeline(PROMPTS[0], **call).images.abs().max() == 0
    assert seen == [999, 749, 499, 249]
    assert len(pipeline([*PROMPTS], **call, num_images_per_prompt=2).images) == 4


def line(name, teacher, folds):
    guided = isinstance(teacher.conditions, Classes) or getattr(teacher.conditions, "empty", None) is not None
    told = "nothing" if teacher.conditions is None else "prompt"
    pipeline = teacher.pipeline.class_name
    scheduler = teacher.scheduler_config["_class_name"].removesuffix("Scheduler")
    adapted = len(default_targets(teacher.network))
    networks = [f"`{type(part).__name__}`" for part in stages_of(teacher.network)]
    cells = [
        name,
        f"`{pipeline}`",
        networks[0] if len(networks) == 1 else f"two {networks[0]}",
        f"{scheduler}, {teacher.prediction}",
        "class" if isinstance(teacher.conditions, Classes) else told,
        "yes" if guided else "no",
        "any grid" if folds else "no",
        str(adapted),
    ]
    return f"| {' | '.join(cells)} |"


def rows_of(exports):
    head = [
        "tried",
        "pipeline",
        "network",
        "scheduler, prediction",
        "condition",
        "guidance",
        "fold",
        "layers with LoRA",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [line(name, export.teacher, not export.exporter.not_fixed) for name, export in exports.items()]
    return "\n".join(lines)


def test_the_list_in_the_docs_is_what_was_tried(exports):
    check_table("teachers.md", f"{rows_of(exports[0])}\n")
