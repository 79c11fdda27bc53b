"""LoRA files that are extracted from a scaled student of full rank."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fmm_distill import distill
from fmm_distill.config.recipe import parse
from fmm_distill.errors import UserError
from fmm_distill.export.verify import verify
from fmm_distill.export.write import write_student
from fmm_distill.run.publish import pack
from fmm_distill.student.extract import extract_adapters
from fmm_distill.student.fold import fold
from fmm_distill.student.scaled import ScaledWeights
from fmm_distill.student.scaled_adapters import share_network
from fmm_distill.student.scaled_layers import product_of, scaled_layers
from fmm_distill.student.student import Student
from tests.conformance.test_prompted_export import opened
from tests.conformance.test_scaled_lora import run
from tests.logs import logged
from tests.tiny.randomized import randomized

# Larger than every layer of the tiny networks.
FULL = 400


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return opened("sd1", tmp_path_factory.mktemp("sd1") / "teacher")


@pytest.fixture(scope="module")
def student(teacher):
    return randomized(Student.from_teacher(teacher, scaled=ScaledWeights()))


def test_the_student_stays_as_it_is_and_large_weights_are_shared(student):
    before = {name: value.clone() for name, value in student.named_parameters()}
    found = extract_adapters(student, None, 2, "unet")
    own, low = dict(student.named_parameters()), dict(found.student.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in before.items())
    layers = [f"network.{name}" for name in scaled_layers(student.network)]
    assert all(low[f"{name}.weight"] is own[f"{name}.weight"] for name in layers)
    assert all(low[f"{name}.jump_weight"] is not own[f"{name}.jump_weight"] for name in layers)


def test_the_full_rank_is_the_change_without_biases(student):
    found = extract_adapters(student, None, FULL, "unet")
    assert set(found.adapters) == {"student"}
    layers = scaled_layers(student.network)
    assert len(found.adapters["student"]) == 2 * len(layers)
    for name, layer in layers.items():
        first, second = (found.adapters["student"][f"unet.{name}.lora_{factor}.weight"] for factor in "AB")
        assert first.shape[0] == second.shape[1] == FULL
        assert (product_of(first, second) - layer.jump_weight).abs().max() < 1e-6
    assert found.errors["student"] < 1e-5
    own, low, plain = (dict(one.network.named_parameters()) for one in (student, found.student, found.without_biases))
    biases = [name for name in own if name.endswith("jump_bias")]
    assert biases
    for name, value in plain.items():
        assert torch.equal(value, torch.zeros_like(value) if name in biases else own[name])
        assert (low[name] - value).abs().max() < 1e-6


def test_the_error_is_that_of_the_singular_values_that_are_left_out(student):
    rank, lost, size = 2, 0.0, 0.0
    for layer in scaled_layers(student.network).values():
        values = torch.linalg.svdvals(layer.jump_weight.detach().double().flatten(1))
        lost, size = lost + float(values[rank:].square().sum()), size + float(values.square().sum())
    found = extract_adapters(student, None, rank, "unet")
    assert found.errors["student"] == pytest.approx((lost / size) ** 0.5, rel=1e-5)


def test_a_large_layer_is_decomposed_by_a_random_projection(student, monkeypatch):
    exact = extract_adapters(student, None, 2, "unet").errors["student"]
    monkeypatch.setattr("fmm_distill.student.extract._EXACT_SIZE", 4)
    monkeypatch.setattr("fmm_distill.student.extract._MORE", 4)
    state = torch.get_rng_state()
    assert extract_adapters(student, None, 2, "unet").errors["student"] == pytest.approx(exact, rel=1e-2)
    assert torch.equal(torch.get_rng_state(), state)


# peft warns of a second adapter.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@torch.no_grad()
def test_the_change_at_h_0_is_a_file_too(teacher, tmp_path):
    student = randomized(Student.from_teacher(teacher, scaled=ScaledWeights(diagonal=True)))
    generator = torch.Generator().manual_seed(0)
    for layer in scaled_layers(student.network).values():
        layer.weight.add_(0.02 * torch.randn(layer.weight.shape, generator=generator))
        if layer.bias is not None:
            layer.bias.add_(0.02)
    (tmp_path / "student").mkdir()
    export = write_student(student, teacher, tmp_path / "student", (1, 4), lora_rank=FULL)
    assert set(export.extracted.adapters) == {"student", "guidance"}
    assert max(export.extracted.errors.values()) < 1e-5
    code = f"""import diffusers
pipeline = diffusers.StableDiffusionPipeline.from_pretrained("{teacher.pipeline.folder}")
folder = "{export.folder}/lora"
pipeline.load_lora_weights(folder, weight_name="guidance.safetensors", adapter_name="guidance")
pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name="student")
pipeline.set_adapters(["guidance", "student"], [1.0, 1 / 4])
pipeline.fuse_lora()
samples = pipeline("a prompt", num_inference_steps=1, guidance_scale=1.0)[0]"""
    pipeline, _ = run(code, export.exporter.verification_call(1), 4)
    folded = fold(export.extracted.student, teacher, teacher.schedule.grid(4))
    for name in scaled_layers(student.network):
        fused, expected = pipeline.unet.get_submodule(name), folded.get_submodule(name)
        assert (fused.get_base_layer().weight - expected.weight).abs().max() < 1e-5
        if expected.bias is not None:
            assert torch.equal(fused.get_base_layer().bias, expected.bias)


def test_the_loss_is_measured_and_logged(teacher, student, tmp_path):
    (tmp_path / "student").mkdir()
    export = write_student(student, share_network(student, teacher), tmp_path / "student", (1, 4), lora_rank=2)
    said = []
    with logged(said):
        verify(export)
    found = json.loads((export.folder / "verification.json").read_text())["lora"]
    assert found["rank"] == 2
    assert found["weights"] == {"student": export.extracted.errors["student"]}
    assert set(found["samples"]) == set(found["samples_without_biases"]) == {"1", "4"}
    assert all(found["samples"][n] > found["samples_without_biases"][n] > 0 for n in ("1", "4"))
    assert f"LoRA of rank 2: it loses {found['weights']['student']:.1%} of student" in "\n".join(said)
    state = load_file(export.folder / "lora" / "pytorch_lora_weights.safetensors")
    assert state.keys() == export.extracted.adapters["student"].keys()


@pytest.mark.parametrize(("scaled", "got"), [(None, "an embedded one"), (ScaledWeights(2), "one with adapters")])
def test_students_without_a_change_of_full_rank_are_refused(teacher, scaled, got):
    with pytest.raises(UserError, match=rf"export\.lora_rank: expected a scaled student of full rank .*got {got}"):
        extract_adapters(Student.from_teacher(teacher, scaled=scaled), None, 2, "unet")


def test_a_run_with_extracted_adapters(teacher, tmp_path):
    recipe = parse(
        {
            "teacher": str(teacher.source),
            "student": {"kind": "scaled"},
            "training": {"steps": 2, "batch_size": 2, "checkpoint_every": 2},
            "evaluation": {
                "steps": [2],
                "ddim_steps": [2],
                "dpmsolver_steps": [],
                "samples": 4,
                "endpoint_samples": 4,
                "endpoint_solver_steps": 4,
            },
            "export": {"steps": [2], "lora_rank": 2},
        },
        "here",
    )
    distill(recipe, tmp_path / "run")
    upload = pack(tmp_path / "run", "me/student")
    assert "lora/pytorch_lora_weights.safetensors" in upload.files
    assert "The adapters have rank 2 and were extracted from changes of full rank." in upload.card
    assert 'pipeline.load_lora_weights("me/student", weight_name="lora/pytorch_lora_weights.safetensors"' in upload.card
    assert "| student | 2 | 0.5 | 2 |" in upload.card
    facts = json.loads((tmp_path / "run" / "student" / "student.json").read_text())
    assert facts["kind"] == "scaled"
    assert facts["strengths"] == {"2": 0.5}
