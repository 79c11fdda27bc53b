"""IP-Adapters: what their settings and files have to be, and weights that don't belong to the network's own."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from fmm_distill.config.recipe import Recipe, parse
from fmm_distill.errors import UserError
from fmm_distill.evaluation.draws import draw_samples_of
from fmm_distill.evaluation.stock import other_pipeline, reference_pipeline
from fmm_distill.export.adapter_code import adapter_lines, describe_adapter
from fmm_distill.export.manifest import read_manifest
from fmm_distill.run.distill import distill
from fmm_distill.run.evaluate import EvaluationRequest, open_target
from fmm_distill.run.inputs import check_inputs, contents, with_paths
from fmm_distill.student.fold import stock_part
from fmm_distill.student.student import Student
from fmm_distill.teachers.frozen_adapter import adapter_of
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.ip_adapter import IpAdapter
from fmm_distill.teachers.load import load_teacher
from fmm_distill.teachers.prompted.one_by_one import join_recordings
from fmm_distill.teachers.prompts import Prompts
from tests.tiny import diffusion
from tests.tiny.image_conditions import picture
from tests.tiny.ip_adapters import ENCODER, WEIGHTS, save_adapter
from tests.unit.test_one_by_one import run_of

IMAGES = {"ip_adapter_image": tuple(picture(seed, (16, 16)) for seed in range(2))}
PROMPTS = Prompts(("a cat", "two dogs"), IMAGES)
ENTRY = "added_cond_kwargs.image_embeds.0"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline, and an adapter of it."""
    pipeline, folder = diffusion.PIPELINES["sd1"].build(), tmp_path_factory.mktemp("sd1")
    pipeline.save_pretrained(folder / "teacher", safe_serialization=True)
    save_adapter(folder / "adapter", pipeline)
    return folder


@pytest.fixture(scope="module")
def teacher(folders):
    return load_teacher(
        str(folders / "teacher"), prompts=PROMPTS, ip_adapter=IpAdapter(str(folders / "adapter"), WEIGHTS, scale=0.6)
    )


def recipe_of(**changes):
    images = {"dataset": "looks.jsonl", "images": {"ip_adapter_image": "look"}}
    return parse({"teacher": "some/teacher", "prompts": images} | changes, "here")


def test_settings_belong_together():
    adapter = {"source": "h94/IP-Adapter", "weight_name": WEIGHTS}
    recipe = recipe_of(ip_adapter=adapter)
    assert recipe.ip_adapter.scale == 1
    assert parse(yaml.safe_load(recipe.to_yaml()), "here") == recipe
    with pytest.raises(UserError, match=r"ip_adapter_image: expected ip_adapter\.source with it, got none"):
        recipe_of()
    with pytest.raises(UserError, match=r"expected its images in prompts\.images\.ip_adapter_image with h94/IP-Adap"):
        recipe_of(ip_adapter=adapter, prompts={})
    with pytest.raises(UserError, match=r"ip_adapter\.weight_name: expected the name of a file"):
        recipe_of(ip_adapter={"source": "h94/IP-Adapter"})
    with pytest.raises(UserError, match=r"ip_adapter\.scale: expected ip_adapter\.source with it, got none"):
        recipe_of(prompts={}, ip_adapter={"scale": 0.5})


MISTAKES = {
    "no images": ({}, "expected its images in prompts.images.ip_adapter_image, got none"),
    "no folder": ({"source": "/nowhere/at/all"}, "no such folder; expected a folder or a Hub id"),
    "a file": ({"source": "{folder}/adapter/" + WEIGHTS}, "expected a folder or a Hub id, got the file"),
    "no file": ({"weight_name": "other.safetensors"}, f"no file other.safetensors in .* [(]{WEIGHTS}"),
    "no subfolder": ({"subfolder": "models"}, f"no file models/{WEIGHTS}"),
    "pickled": ({"weight_name": "ip-adapter.bin"}, "expected a file in .safetensors, got ip-adapter.bin"),
    "no encoder": ({"image_encoder_folder": "clip"}, "expected the image encoder of .* in clip, .* got none"),
    "a folder at a revision": ({"revision": "main"}, "ip_adapter.revision: expected none for the folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line(folders, name):
    changes, line = MISTAKES[name]
    changes = {key: value.format(folder=folders) for key, value in changes.items()}
    adapter = replace(IpAdapter(str(folders / "adapter"), WEIGHTS), **changes)
    prompts = Prompts(PROMPTS.texts) if name == "no images" else PROMPTS
    with pytest.raises(UserError, match=line) as error:
        load_teacher(str(folders / "teacher"), prompts=prompts, ip_adapter=adapter)
    assert "\n" not in str(error.value)


def test_images_without_an_adapter_are_refused(folders):
    with pytest.raises(UserError, match=r"ip_adapter_image: expected ip_adapter\.source with it, got none"):
        load_teacher(str(folders / "teacher"), prompts=PROMPTS)


def test_several_images_of_a_sample_are_refused(folders):
    several = Prompts(
        PROMPTS.texts, {"ip_adapter_image": tuple([image, image] for image in IMAGES["ip_adapter_image"])}
    )
    with pytest.raises(UserError, match="expected one image per row, got a list of 2"):
        load_teacher(str(folders / "teacher"), prompts=several, ip_adapter=IpAdapter(str(folders / "adapter"), WEIGHTS))


def test_a_pipeline_that_takes_no_adapter_is_refused(folders, tmp_path):
    shutil.copytree(folders / "teacher", tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"unet": ["diffusers", "UNet3DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    adapter = IpAdapter(str(folders / "adapter"), WEIGHTS)
    with pytest.raises(UserError, match="expected a pipeline with a UNet2DConditionModel that takes IP-Adapters"):
        load_teacher(str(tmp_path), prompts=PROMPTS, ip_adapter=adapter)


@pytest.mark.parametrize("name", ["texts", "layers", "faces", "images", "other"])
def test_an_adapter_of_another_network_is_refused(folders, tmp_path, name):
    own = load_file(folders / "adapter" / WEIGHTS)
    changed = {
        "texts": ({key: torch.cat((value, value), 1) for key, value in own.items() if "_ip." in key}, "16 features"),
        "layers": (
            own | {"ip_adapter.99.to_k_ip.weight": torch.ones(8, 8)},
            "one of 5 attention layers, where the network has 4",
        ),
        "faces": ({"ip_adapter.0.to_k_lora.down.weight": torch.ones(1, 1)}, r"one of faces \(FaceID\)"),
        "images": ({"image_proj.proj.weight": torch.ones(32, 99)}, "an image encoder with projection_dim 99 .* got 12"),
        "other": ({}, "got a file without to_k_ip"),
    }
    tensors, line = changed[name]
    tensors = tensors if name == "other" else own | tensors
    tensors = tensors or {"weight": torch.ones(1)}
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / WEIGHTS)
    shutil.copytree(folders / "adapter" / ENCODER, tmp_path / ENCODER)
    with pytest.raises(UserError, match=line):
        load_teacher(str(folders / "teacher"), prompts=PROMPTS, ip_adapter=IpAdapter(str(tmp_path), WEIGHTS))


def public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


def effect(teacher, network):
    """The change of an output by the image of another sample."""
    x = torch.randn(2, *teacher.event_shape, generator=torch.Generator().manual_seed(0))
    cond, t = teacher.conditions.prompts, torch.full((2,), 0.5)
    turned = replace(cond, inputs={**cond.inputs, ENTRY: cond.inputs[ENTRY].flip(0)})
    with torch.no_grad():
        own, other = (teacher.parametrization.call(network, x, t, each, None) for each in (cond, turned))
    return float((own - other).norm() / own.norm())


def test_the_weights_of_the_adapter_are_not_the_networks_own(folders, teacher):
    """Not in its state and its configuration, where stock diffusers can't open them; copies use the same ones."""
    stock = DiffusionPipeline.from_pretrained(folders / "teacher").unet
    student = Student.from_teacher(teacher)
    expected = effect(teacher, teacher.network)
    assert expected > 0.01
    for network in (teacher.network, stock_part(student.network)):
        assert network.state_dict().keys() == stock.state_dict().keys()
        assert public(network.config) == public(stock.config)
        assert effect(teacher, network) == pytest.approx(expected)
    own = sum(parameter.numel() for parameter in adapter_of(teacher.network).parameters())
    assert own > 0
    new = [key for key in student.network.state_dict() if key not in stock.state_dict()]
    assert new
    assert all(key.startswith("jump_embedding.") for key in new)
    copied = copy.deepcopy(student)
    assert adapter_of(copied.network) is adapter_of(teacher.network)
    # Another configuration is a new object.
    copied.network.register_to_config(flow_map={"some": "levels"})
    assert effect(teacher, copied.network) == pytest.approx(expected)


@pytest.mark.slow
def test_an_adapter_that_reads_the_patches_of_the_image(folders, tmp_path):
    """The Plus form: guidance compares with the encoding of a gray image and not with zeros."""
    adapter = save_adapter(tmp_path, diffusion.PIPELINES["sd1"].build(), plus=True)
    teacher = load_teacher(str(folders / "teacher"), prompts=PROMPTS, ip_adapter=IpAdapter(str(adapter), WEIGHTS))
    assert effect(teacher, teacher.network) > 0.01
    assert teacher.conditions.prompts.inputs[ENTRY].ndim == 4
    assert teacher.conditions.empty.row.inputs[ENTRY].any()


@torch.no_grad()
def test_another_pipeline_of_an_evaluation_has_the_adapter(folders, teacher):
    """The same pipeline as another one, and the teacher's own, make the same images of the same noise."""
    # Another pipeline has its own guidance, 7.5 by default.
    teacher = replace(teacher, guidance=Guidance(7.5))
    (other,) = other_pipeline(str(folders / "teacher"), teacher, torch.device("cpu"), (2,))
    draws = draw_samples_of(teacher, range(2), 11)
    expected = reference_pipeline(teacher, torch.device("cpu"), 2).run(draws)
    torch.testing.assert_close(other.run(draws), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_network_uses_its_adapter(teacher):
    student = Student.from_teacher(teacher)
    expected = effect(teacher, student.network)
    student.network.compile(backend="eager")
    assert effect(teacher, student.network) == pytest.approx(expected, rel=1e-4)


def test_entries_that_are_batches_are_joined():
    """A list with one batch per adapter, and not one with an entry per sample, also where both have one entry."""
    runs = [
        run_of(image_embeds=[torch.full((1, 2, 3), float(i))], texts=[torch.full((4, 3), float(i))]) for i in (0, 1)
    ]
    arguments = join_recordings(runs).calls[0].arguments
    assert [entry.shape for entry in arguments["image_embeds"]] == [(2, 2, 3)]
    assert arguments["image_embeds"][0][:, 0, 0].tolist() == [0, 1]
    assert [entry.shape for entry in arguments["texts"]] == [(4, 3), (4, 3)]


def test_a_run_has_digests_of_the_adapters_files(folders):
    adapter = {"source": str(folders / "adapter"), "weight_name": WEIGHTS}
    recipe = with_paths(recipe_of(ip_adapter=adapter))
    assert isinstance(recipe, Recipe)
    found = contents(recipe)
    assert set(found["ip_adapter"]) == {WEIGHTS, f"{ENCODER}/config.json", f"{ENCODER}/model.safetensors"}
    changed = found | {"ip_adapter": found["ip_adapter"] | {WEIGHTS: {"sha256": "another", "stamp": []}}}
    with pytest.raises(UserError, match=f"ip_adapter: expected the files .* got others [(]{WEIGHTS} has changed"):
        check_inputs(folders, found, changed)


def test_the_card_has_origin_and_license():
    facts = {"source": "h94/IP-Adapter", "revision": "abc", "license": "apache-2.0"}
    facts |= {"weight_name": WEIGHTS, "scale": 0.6}
    (text,) = describe_adapter(facts)
    assert "copies from h94/IP-Adapter (revision abc), license: apache-2.0" in text
    assert "at the scale 0.6" in text
    load, scale = adapter_lines(facts, '"me/student"', ', revision="two"')
    assert (
        load
        == f'pipeline.load_ip_adapter("me/student", subfolder="ip_adapter", weight_name="{WEIGHTS}", revision="two")'
    )
    assert scale == "pipeline.set_ip_adapter_scale(0.6)"
    assert adapter_lines(None, "") == describe_adapter(None) == []


@pytest.mark.slow
def test_a_run_trains_resumes_and_is_evaluated_without_the_adapters_own_files(folders, tmp_path):
    rows = []
    for number, text in enumerate(PROMPTS.texts):
        picture(number, (16, 16)).save(tmp_path / f"{number}.png")
        rows.append({"text": text, "look": f"{number}.png"})
    (tmp_path / "looks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shutil.copytree(folders / "adapter", tmp_path / "adapter")
    plain = {
        "teacher": str(folders / "teacher"),
        "prompts": {"dataset": str(tmp_path / "looks.jsonl"), "images": {"ip_adapter_image": "look"}},
        "ip_adapter": {"source": str(tmp_path / "adapter"), "weight_name": WEIGHTS, "scale": 0.6},
        "student": {"kind": "scaled", "lora": {"rank": 2}},
        "training": {"steps": 2, "batch_size": 2, "checkpoint_every": 2},
        "evaluation": {"steps": [1], "ddim_steps": [1], "dpmsolver_steps": [], "samples": 2}
        | {"endpoint_samples": 2, "endpoint_solver_steps": 2, "batch_size": 2},
        "export": {"steps": [2]},
    }
    run = tmp_path / "run"
    distill(parse(plain, "here"), run)
    plain["training"]["steps"] = 3
    distill(parse(plain, "here"), run)
    student = run / "student"
    assert json.loads((student / "verification.json").read_text())["passed"]
    assert read_manifest(student).ip_adapter["scale"] == 0.6
    assert read_manifest(student).pipeline_tag == "text-to-image"
    code = (student / "README.md").read_text()
    assert code.count('subfolder="ip_adapter"') == 3
    shutil.rmtree(tmp_path / "adapter")
    target = open_target(str(student), EvaluationRequest())
    assert target.teacher.pipeline.ip_adapter.scale == 0.6
    assert effect(target.teacher, target.teacher.network) > 0.01
    call = {"generator": torch.manual_seed(0), "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
    images = []
    for number in range(2):
        pipeline = DiffusionPipeline.from_pretrained(student / "steps-2")
        pipeline.load_ip_adapter(str(student / "steps-2"), subfolder="ip_adapter", weight_name=WEIGHTS)
        pipeline.set_ip_adapter_scale(0.6)
        call["generator"] = torch.manual_seed(0)
        images.append(pipeline("a cat", ip_adapter_image=IMAGES["ip_adapter_image"][number], **call).images)
    assert abs(images[0] - images[1]).max() > 1e-3
