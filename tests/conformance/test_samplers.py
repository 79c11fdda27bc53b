"""Beside the student: stock solvers end where the teacher's ODE ends, stock pipelines start from the same noise."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from fmm_distill.config.settings import EvaluationSettings
from fmm_distill.errors import UserError
from fmm_distill.evaluation.draws import draw_samples_of
from fmm_distill.evaluation.evaluator import evaluate
from fmm_distill.evaluation.samplers import of_teacher
from fmm_distill.evaluation.solvers import describe_solvers, steps_within
from fmm_distill.evaluation.stock import other_pipeline, reference_pipeline
from fmm_distill.student.student import Student
from fmm_distill.teachers.guidance import Guidance
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_prompted import FAMILIES
from tests.conftest import save_teacher

CPU = torch.device("cpu")
SOLVERS = {"ddim": (20,), "dpmsolver": (20,), "unipc": (20,), "heun": (14,)}


def settings(numbers=SOLVERS, **changes):
    given = {f"{name}_steps": steps for name, steps in numbers.items()}
    return EvaluationSettings(
        **({"samples": 2, "endpoint_samples": 2, "endpoint_solver_steps": 40, "steps": (2,)} | given | changes)
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_solver_comes_to_the_odes_end(tmp_path, prediction):
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False, beta_schedule="scaled_linear")
    teacher = load_teacher(str(save_teacher(tmp_path, scheduler=scheduler)))
    few = settings(dict.fromkeys(SOLVERS, (4,)))
    rows = {
        (row.sampler, row.steps): row
        for some in (few, settings())
        for row in evaluate({"student": Student.from_teacher(teacher)}, teacher, some, None, CPU).rows
    }
    for name in ("teacher-ddim", "teacher-dpmsolver++", "teacher-unipc", "teacher-heun"):
        (many,) = [row for (sampler, steps), row in rows.items() if sampler == name and steps > 4]
        assert many.endpoint_error < rows[name, 4].endpoint_error / 3, name
        # Heun asks twice but in its last step.
        assert many.calls == (27 if name == "teacher-heun" else 20)
    # Of second order, and so closer than DDIM.
    assert rows["teacher-heun", 14].endpoint_error < rows["teacher-ddim", 20].endpoint_error
    for name in ("teacher-dpmsolver++", "teacher-unipc"):
        assert rows[name, 20].endpoint_error < rows["teacher-ddim", 20].endpoint_error / 2


def test_solvers_that_a_schedule_has_not_are_named(tmp_path):
    flow = load_teacher(str(save_teacher(tmp_path / "flow", scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0))))
    names = [sampler.name for sampler in of_teacher(flow, settings())]
    assert names == ["teacher-euler", "teacher-heun"]
    assert describe_solvers(flow, settings()).endswith(
        "; without dpmsolver, unipc: not available for this noise schedule"
    )
    zero = load_teacher(
        str(
            save_teacher(
                tmp_path / "zero", scheduler=DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="sample")
            )
        )
    )
    assert "teacher-heun" not in [sampler.name for sampler in of_teacher(zero, settings())]
    assert "without heun: HeunDiscreteScheduler divides by the signal" in describe_solvers(zero, settings())


def test_numbers_of_steps_within_calls(teacher):
    found = steps_within(teacher, (1, 2, 4, 8))
    assert found == {
        "ddim_steps": (1, 2, 4, 8),
        "dpmsolver_steps": (1, 2, 4, 8),
        "unipc_steps": (1, 2, 4, 8),
        "heun_steps": (1, 2, 4),
    }
    # Two answers a step.
    teacher.guidance = Guidance(2.0)
    assert steps_within(teacher, (1, 2, 4, 8))["ddim_steps"] == (1, 2, 4)


def images_of(pipeline, teacher, count, steps):
    draws = draw_samples_of(teacher, range(count), 11)
    generators = draws.generators(after_noise=False)
    made = pipeline(batch_size=count, generator=generators, num_inference_steps=steps, output_type="np").images
    return torch.from_numpy(made).movedim(-1, 1)


def test_the_reference_is_the_teachers_own_pipeline(teacher_folder, teacher):
    """An ancestral sampler, sample by sample its own noise: the same in any batch, and what diffusers makes."""
    sampler = reference_pipeline(teacher, CPU, 3)
    whole = sampler.run(draw_samples_of(teacher, range(6), 11))
    parts = torch.cat([sampler.run(draw_samples_of(teacher, range(i, i + 2), 11)) for i in (0, 2, 4)])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-4)
    pipeline = DiffusionPipeline.from_pretrained(teacher_folder)
    pipeline.set_progress_bar_config(disable=True)
    torch.testing.assert_close(whole / 2 + 0.5, images_of(pipeline, teacher, 6, 3), rtol=0, atol=1e-5)
    assert sampler.description.startswith("DDPMPipeline, DDPMScheduler, 3 steps")
    assert reference_pipeline(teacher, CPU).steps == 1000
    assert sampler.network is teacher.network


def test_a_pipeline_starts_from_the_students_noise(tmp_path):
    """DDIM in one step, by the stock pipeline and by the solver that stands beside the student."""
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    teacher = load_teacher(str(save_teacher(tmp_path, scheduler=scheduler)))
    draws = draw_samples_of(teacher, range(4), 11)
    (ddim,) = of_teacher(teacher, settings({"ddim": (2,), "dpmsolver": ()}))
    with torch.no_grad():
        expected = ddim.run(draws)
    for sampler in (reference_pipeline(teacher, CPU, 2), *other_pipeline(str(tmp_path), teacher, CPU, (2,))):
        torch.testing.assert_close(sampler.run(draws), expected.clamp(-1, 1), rtol=0, atol=1e-4)


def test_a_pipeline_of_prompts_is_told_the_samples_prompts(tmp_path):
    family = FAMILIES["sd1"]
    family.build().save_pretrained(tmp_path, safe_serialization=True)
    teacher = load_teacher(str(tmp_path), prompts=("a cat", "two dogs"), call=dict(family.call))
    sampler = reference_pipeline(teacher, CPU, 2)
    draws = draw_samples_of(teacher, range(4), 11)
    with torch.no_grad():
        whole = sampler.run(draws)
        alone = torch.cat([sampler.run(draw_samples_of(teacher, range(i, i + 1), 11)) for i in range(4)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-3)
    decoded = teacher.codec.decode(draws.noise)
    assert whole.shape == decoded.shape


def test_pipelines_of_other_images_are_refused(tmp_path, teacher):
    from tests.conftest import tiny_unet

    other = save_teacher(tmp_path / "large", tiny_unet(sample_size=16))
    with pytest.raises(UserError, match=r"expected images of shape \(1, 8, 8\), as the teacher\'s; got \(1, 16, 16\)"):
        other_pipeline(str(other), teacher, CPU, (2,))
    with pytest.raises(UserError, match="no such folder"):
        other_pipeline(str(tmp_path / "nowhere"), teacher, CPU, (2,))
    noisy = save_teacher(tmp_path / "ddpm", scheduler=DDPMScheduler(prediction_type="v_prediction"))
    samplers = other_pipeline(str(noisy), teacher, CPU, (2, 4))
    assert [(sampler.name, sampler.steps) for sampler in samplers] == [(str(noisy), 2), (str(noisy), 4)]
    # One copy of the weights, however many numbers of steps.
    assert samplers[0].network is samplers[1].network
    with pytest.raises(UserError, match="expected 1 to 1000 steps, its number of timesteps; got 1001"):
        other_pipeline(str(noisy), teacher, CPU, (2, 1001))


@torch.no_grad()
def test_a_true_scale_of_guidance_has_a_negative_prompt(tmp_path):
    """Without one the stock pipeline ignores ``true_cfg_scale``: its images would be those without guidance."""
    family = FAMILIES["qwen-image"]
    family.build().save_pretrained(tmp_path, safe_serialization=True)
    images = []
    for guidance in (None, Guidance(4.0)):
        teacher = load_teacher(str(tmp_path), prompts=("a cat",), call=dict(family.call), guidance=guidance)
        images.append(reference_pipeline(teacher, CPU, 2).run(draw_samples_of(teacher, range(1), 11)))
    assert (images[0] - images[1]).abs().max() > 1e-3
