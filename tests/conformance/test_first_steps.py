"""The first step of a pipeline is ours, with every scheduler; a velocity of the wrong sign or scale is found."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import diffusers
import pytest
import torch

from fmm_distill.errors import UserError
from fmm_distill.teachers.prompted import probe as probes
from fmm_distill.teachers.prompted.embeddings import find_null
from fmm_distill.teachers.prompted.first_step import step_error
from fmm_distill.teachers.prompted.probe import PipelineProbe
from fmm_distill.teachers.prompts import Prompts
from fmm_distill.teachers.recording import record
from fmm_distill.teachers.scheduler import DISCRETE
from tests.tiny.diffusion import PIPELINES
from tests.tiny.flow import PIPELINES as FLOWS

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SWITCHES = [
    ("DDIMScheduler", {"clip_sample": True, "clip_sample_range": 0.1}),
    ("DDIMScheduler", {"thresholding": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("PNDMScheduler", {"skip_prk_steps": True, "prediction_type": "v_prediction"}),
]
CASES = [(name, {}) for name in DISCRETE] + SWITCHES


@pytest.fixture(scope="module")
def stable_diffusion():
    return PIPELINES["sd1"].build()


def probe_of(pipeline, scheduler, settings):
    pipeline.scheduler = getattr(diffusers, scheduler)(**(BETAS | settings))
    return PipelineProbe.of(pipeline, "unet", dict(PIPELINES["sd1"].call), 1.0, "here", Prompts(("",)))


# Of two stock schedulers and NumPy 2 (diffusers 0.42).
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize(("scheduler", "settings"), CASES)
def test_the_first_step_is_that_of_the_scheduler(stable_diffusion, monkeypatch, scheduler, settings):
    found = []

    def error_of(*given):
        found.append(step_error(*given))
        return found[-1]

    monkeypatch.setattr(probes, "step_error", error_of)
    probe = probe_of(stable_diffusion, scheduler, settings)
    assert found == [pytest.approx(0, abs=1e-5)]
    assert probe.call.sign == 1
    # The pipeline has its own scheduler again.
    assert type(stable_diffusion.scheduler).__name__ == scheduler


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda spec: replace(spec, prediction="v_prediction"), 0.1),
        (lambda spec: replace(spec, prediction="sample"), 0.1),
        (lambda spec: replace(spec, sigma_data=0.5), 0.1),
    ],
)
def test_a_wrong_reading_of_the_scheduler_is_found(stable_diffusion, change, error):
    probe = probe_of(stable_diffusion, "DDIMScheduler", {"clip_sample": False})
    cond = probe.call.conditions_of(probe.recording.calls[0].arguments, 2)
    assert step_error(probe.recording, probe.spec, probe.call, probe.network, cond) < 1e-5
    assert step_error(probe.recording, change(probe.spec), probe.call, probe.network, cond) > error
    turned = replace(probe.call, sign=-1.0)
    wrong = step_error(probe.recording, probe.spec, turned, probe.network, cond)
    assert wrong > 0.1


class Backwards(diffusers.FlowMatchEulerDiscreteScheduler):
    """Steps against what it is given, as the stock class does where every token has a time of its own."""

    def step(self, model_output, timestep, sample, **kwargs):
        return super().step(-model_output, timestep, sample, **kwargs)


def flow_probe(scheduler):
    pipeline = FLOWS["sd3"].build()
    pipeline.scheduler = scheduler
    return PipelineProbe.of(pipeline, "transformer", dict(FLOWS["sd3"].call), 1.0, "here", Prompts(("",)))


def test_the_sign_is_that_of_the_step_and_guidance_follows_it():
    Backwards.__name__ = "FlowMatchEulerDiscreteScheduler"
    plain, turned = flow_probe(diffusers.FlowMatchEulerDiscreteScheduler()), flow_probe(Backwards())
    assert (plain.call.sign, plain.turned) == (1, False)
    assert (turned.call.sign, turned.turned) == (-1, True)
    assert find_null(turned)[0] is not None


class Halved(diffusers.FlowMatchEulerDiscreteScheduler):
    def step(self, model_output, timestep, sample, **kwargs):
        return super().step(0.5 * model_output, timestep, sample, **kwargs)


def test_another_step_is_refused():
    Halved.__name__ = "FlowMatchEulerDiscreteScheduler"
    with pytest.raises(UserError, match="here: expected a first step like that of its pipeline, got one that differs"):
        flow_probe(Halved())


class Copying(diffusers.StableDiffusion3Pipeline):
    """Steps a copy of its scheduler next to it, as pipelines of sound and video do."""

    def __call__(self, *args, **kwargs):
        other = copy.deepcopy(self.scheduler)
        other.set_timesteps(2)
        sample, start = torch.ones(1, 1), float(other.timesteps[0])
        for timestep in other.timesteps:
            sample = other.step(sample, timestep, sample).prev_sample
        made = super().__call__(*args, **kwargs)
        self.stepped = (other.step_index, start)
        return made


def test_a_copied_scheduler_is_itself():
    pipeline = FLOWS["sd3"].build()
    pipeline = Copying(**pipeline.components)
    call = {**FLOWS["sd3"].call, "prompt": "a cat", "num_inference_steps": 4, "output_type": "latent"}
    seen = record(pipeline, "transformer", call | {"guidance_scale": 1.0})
    assert len(seen.steps) == 4
    assert len(seen.grids) == 1
    assert pipeline.stepped[0] == 2


class OnlyCopies(diffusers.StableDiffusion3Pipeline):
    """Never steps its own scheduler, as with one time per frame."""

    def __call__(self, *args, **kwargs):
        own, self.scheduler = self.scheduler, copy.deepcopy(self.scheduler)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self.scheduler = own


def test_a_pipeline_that_steps_copies_of_its_scheduler():
    pipeline = OnlyCopies(**FLOWS["sd3"].build().components)
    call = {**FLOWS["sd3"].call, "prompt": "a cat", "num_inference_steps": 4, "output_type": "latent"}
    with pytest.raises(UserError, match="OnlyCopies: expected steps of its scheduler, got none: it steps copies"):
        record(pipeline, "transformer", call | {"guidance_scale": 1.0})


def test_what_a_pipeline_changes_in_place_is_recorded_as_it_was():
    class InPlace(diffusers.FlowMatchEulerDiscreteScheduler):
        def step(self, model_output, timestep, sample, **kwargs):
            (made,) = super().step(model_output, timestep, sample, **kwargs | {"return_dict": False})
            sample.copy_(made)
            return (sample,)

    pipeline = FLOWS["sd3"].build()
    pipeline.scheduler = InPlace()
    call = {**FLOWS["sd3"].call, "prompt": "a cat", "num_inference_steps": 4, "output_type": "latent"}
    seen = record(pipeline, "transformer", call | {"guidance_scale": 1.0})
    inputs = [step.arguments["hidden_states"] for step in seen.calls]
    assert all(not torch.equal(one, other) for one, other in pairwise(inputs))
