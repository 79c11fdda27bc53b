"""The adapters of a scaled student in its teacher's stock pipeline, by the code of its model card."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from fmm_distill.config.recipe import parse
from fmm_distill.export.card import card
from fmm_distill.export.manifest import make_manifest, read_manifest, write_manifest
from fmm_distill.export.write import write_student
from fmm_distill.student.scaled import ScaledWeights
from fmm_distill.student.scaled_adapters import share_network
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_prompted_export import opened
from tests.conformance.test_teachers import saved
from tests.tiny.diffusion import PIPELINES as FAMILY
from tests.tiny.randomized import randomized

RANK = 3
STEPS = (1, 2, 4)
# UNets, transformers with a grid of their own and with one of the scheduler, one whose pipeline loads no adapters, one
# that takes no sigmas, and one whose jumps are not equal.
FAMILIES = ("sd1", "sdxl", "flux", "sd3", "bria", "wan", "cogview4")
# Those whose code has equal jumps of any number of steps.
ANY = ("sd1", "sdxl", "flux", "sd3", "bria")


def exported(name, folder, *, diagonal=False):
    return exported_of(opened(name, folder / "teacher"), folder, diagonal=diagonal)


def exported_of(teacher, folder, *, diagonal=False):
    # Another prediction is what a change at h = 0 is for; the scheduler has to have it too.
    prediction = "v_prediction" if diagonal else "teacher"
    student = randomized(Student.from_teacher(teacher, prediction, scaled=ScaledWeights(RANK, diagonal=diagonal)))
    shared = share_network(student, teacher)
    target = folder / "student"
    target.mkdir()
    export = write_student(student, shared, target, STEPS)
    recipe = parse({"teacher": "builtin:digits"}, "here")
    write_manifest(target, make_manifest(student, shared, recipe, STEPS, exporter=export.exporter))
    return export


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return {name: exported(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    return exported("sd1", tmp_path_factory.mktemp("guided"), diagonal=True)


def block_with(text, part):
    """The Python code of a card that has this part."""
    [block] = [one.split("\n```")[0] for one in text.split("```python\n") if part in one]
    return block


def code_of(export):
    code = block_with(card(export.folder), "set_adapters")
    # The paths are not on the card.
    code = code.replace("local:teacher", str(export.folder.parent / "teacher"))
    return code.replace("<this folder>", str(export.folder))


@torch.no_grad()
def run(code, call, steps):
    """Run the code of a card for a number of steps; return its pipeline and its samples."""
    lines = code.replace("steps = 4\n", f"steps = {steps}\n").replace("steps-4/", f"steps-{steps}/").splitlines()
    *setup, last = lines
    given = {"torch": torch, "keywords": call}
    exec("\n".join(setup), given)
    given["pipeline"].set_progress_bar_config(disable=True)
    # The prompts of the verification, as latents, from the noise of a seed.
    seeded = (
        'generator=torch.Generator().manual_seed(0), prompt=keywords["prompt"], output_type="latent", return_dict=False'
    )
    exec(last.replace('"a prompt"', seeded), given)
    return given["pipeline"], torch.as_tensor(given["samples"])


@torch.no_grad()
def any_step(export, call, steps):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(export.folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipeline(**call, num_inference_steps=steps, generator=generator, return_dict=False)[0])


@pytest.mark.parametrize("name", ANY)
def test_the_code_of_the_card_is_the_any_step_pipeline(exports, name):
    export = exports[name]
    call, code = export.exporter.verification_call(2), code_of(export)
    assert "1 / steps" in code
    for steps in (1, 2, 4, 8):
        samples = run(code, call, steps)[1]
        own = any_step(export, call, steps)
        assert (samples - own).abs().max() < 1e-4 * own.abs().max(), steps


@pytest.mark.slow
def test_exploding_levels_have_the_scheduler_of_a_number_of_steps(tmp_path):
    tiny, folder = FAMILY["sdxl"], tmp_path / "teacher"
    built = tiny.build()
    built.scheduler = diffusers.EDMEulerScheduler(sigma_max=80.0)
    built.save_pretrained(folder, safe_serialization=True)
    teacher = load_teacher(str(folder), prompts=("a cat", "two dogs"), call=dict(tiny.call))
    export = exported_of(teacher, tmp_path)
    code = code_of(export)
    assert 'subfolder="steps-4/scheduler"' in code
    assert "sigmas=" not in code
    for steps in STEPS:
        samples = run(code, export.exporter.verification_call(2), steps)[1]
        own = any_step(export, export.exporter.verification_call(2), steps)
        assert (samples - own).abs().max() < 1e-4 * own.abs().max(), steps


def test_equal_steps_are_in_the_call_where_the_scheduler_makes_others(exports):
    codes = {name: code_of(export) for name, export in exports.items()}
    sigmas = {name for name, code in codes.items() if "sigmas=[1 - i / steps for i in range(steps)]" in code}
    assert sigmas == {"sd3"}
    assert {name for name, code in codes.items() if 'subfolder="steps-4/scheduler"' in code} == {
        "wan",
        "cogview4",
    }


@pytest.mark.parametrize("name", ["wan", "cogview4"])
def test_a_grid_of_its_own_comes_from_the_pipeline_of_that_number(exports, name):
    export = exports[name]
    call, code = export.exporter.verification_call(2), code_of(export)
    assert ("1 / steps" in code) == (name == "wan")
    for steps in STEPS:
        samples = run(code, call, steps)[1]
        folded = diffusers.DiffusionPipeline.from_pretrained(export.folder / f"steps-{steps}")
        folded.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            own = folded(**call, num_inference_steps=steps, generator=generator, return_dict=False)[0]
        # The strength on the card has six digits.
        assert (samples - own).abs().max() < 1e-4 * own.abs().max(), steps


def test_every_layer_has_the_scale_of_one_and_adapters_can_be_fused_and_deleted(exports):
    export = exports["sd1"]
    call = export.exporter.verification_call(2)
    pipeline, _ = run(code_of(export), call, 4)
    layers = [module for module in pipeline.unet.modules() if hasattr(module, "lora_A") and hasattr(module, "scaling")]
    assert len(layers) == len(export.student.network.config.scaled_layers)
    assert any(isinstance(layer.get_base_layer(), torch.nn.Conv2d) for layer in layers)
    assert {layer.scaling["student"] for layer in layers} == {1 / 4}
    assert {layer.lora_A["student"].weight.shape[0] for layer in layers} == {RANK}
    given = {"num_inference_steps": 4, "output_type": "latent", "return_dict": False, "guidance_scale": 1.0}
    prompt = call["prompt"][:1]

    @torch.no_grad()
    def generated():
        return pipeline(prompt, generator=torch.Generator().manual_seed(0), **given)[0]

    # From here on pipelines get their prompts in a list, as above.
    before = generated()
    pipeline.fuse_lora()
    assert (generated() - before).abs().max() < 1e-4 * before.abs().max()
    pipeline.unfuse_lora()
    pipeline.delete_adapters("student")
    stock = diffusers.StableDiffusionPipeline.from_pretrained(export.folder.parent / "teacher")
    stock.scheduler, plain = pipeline.scheduler, generated()
    with torch.no_grad():
        expected = stock(prompt, generator=torch.Generator().manual_seed(0), **given)[0]
    assert (plain - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (plain - before).abs().max() > 1e-2 * before.abs().max()


# peft warns of a second adapter.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_the_change_at_h_0_is_an_adapter_of_the_strength_1(guided):
    call, code = guided.exporter.verification_call(2), code_of(guided)
    assert 'set_adapters(["guidance", "student"], [1.0, 1 / steps])' in code
    for steps in STEPS:
        samples = run(code, call, steps)[1]
        own = any_step(guided, call, steps)
        assert (samples - own).abs().max() < 1e-4 * own.abs().max()
        # Both in one file.
        lines = [line for line in code.splitlines() if "guidance.safetensors" not in line]
        both = "\n".join(lines).replace('["guidance", "student"], [1.0, 1 / steps]', '"student", 1.0')
        both = both.replace("pytorch_lora_weights", f"steps-{steps}")
        assert (run(both, call, steps)[1] - own).abs().max() < 1e-4 * own.abs().max()


@torch.no_grad()
def test_the_file_of_a_network_without_adapters_of_its_own(tmp_path):
    """DiTPipeline loads no adapters; peft does."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    export = exported("dit", tmp_path)
    manifest = read_manifest(export.folder)
    assert manifest.lora
    assert manifest.lora_code is None
    assert "DiTPipeline of diffusers" in card(export.folder).split("## LoRA")[1].split("##")[0]
    network = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "teacher", subfolder="transformer")
    state = load_file(export.folder / "lora" / "pytorch_lora_weights.safetensors")
    state = {name.removeprefix("transformer."): value for name, value in state.items()}
    names = sorted({name.partition(".lora_")[0] for name in state})
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names), network, "student")
    loaded = set_peft_model_state_dict(network, state, "student")
    assert not loaded.unexpected_keys
    for module in network.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("student", 1 / 4)
    folded = diffusers.DiTTransformer2DModel.from_pretrained(export.folder / "steps-4", subfolder="transformer")
    x, labels = torch.randn(2, *export.teacher.event_shape), torch.tensor([0, 1])
    ours, theirs = (net(x, torch.tensor([500, 500]), labels).sample for net in (network, folded))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_the_card_of_a_network_without_a_pipeline_for_adapters(tmp_path):
    saved(tmp_path / "teacher", "DDIMScheduler")
    teacher = load_teacher(str(tmp_path / "teacher"))
    student = randomized(Student.from_teacher(teacher, scaled=ScaledWeights(RANK)))
    (tmp_path / "student").mkdir()
    export = write_student(student, share_network(student, teacher), tmp_path / "student", STEPS)
    manifest = make_manifest(student, teacher, parse({"teacher": "builtin:digits"}, "here"), STEPS)
    write_manifest(export.folder, manifest)
    assert manifest.strengths == {"1": 1.0, "2": 0.5, "4": 0.25}
    assert "no stock pipeline takes it: stock pipelines of UNet2DModel take no adapters" in card(export.folder)


def test_the_keywords_of_the_code_exist(exports):
    for name, export in exports.items():
        code = code_of(export)
        kind = getattr(diffusers, export.exporter.pipeline.class_name)
        assert "num_inference_steps" in inspect.signature(kind.__call__).parameters
        assert f"{kind.__name__}.from_pretrained" in code, name
