from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    RePaintScheduler,
    UniPCMultistepScheduler,
)

from fmm_distill.core.parametrization import Parametrization, call_stock
from fmm_distill.core.schedules import VariancePreserving
from fmm_distill.errors import UserError
from fmm_distill.teachers.load import BUILTIN, find_index, load_teacher
from fmm_distill.teachers.scheduler import read_scheduler
from tests.conftest import save_teacher, tiny_unet


def edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


@pytest.fixture
def folder(teacher_folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(teacher_folder, tmp_path / "pipeline")


def refused(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        load_teacher(str(folder))
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message


def test_loads_a_saved_pipeline(teacher, teacher_folder):
    assert teacher.event_shape == (1, 8, 8)
    assert teacher.prediction == "v_prediction"
    assert teacher.source == str(teacher_folder)
    assert teacher.revision is None
    assert teacher.license == {}
    assert "UNet2DModel" in teacher.adapter
    assert teacher.scheduler_config["beta_schedule"] == "linear"
    assert teacher.config["block_out_channels"] in ([8, 16], (8, 16))
    assert teacher.schedule.num_timesteps == 1000
    assert not teacher.network.training


def test_loads_the_weights(teacher):
    expected = tiny_unet().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in teacher.network.state_dict().items())


def test_loads_single_precision_from_half(tmp_path):
    teacher = load_teacher(str(save_teacher(tmp_path, tiny_unet().half())))
    assert {value.dtype for value in teacher.network.parameters()} == {torch.float32}


def test_finds_the_license(folder):
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: own\ntags: [a]\n---\n# A model\n")
    assert load_teacher(str(folder)).license == {"license": "other", "license_name": "own"}


def test_a_rectangle(tmp_path):
    assert load_teacher(str(save_teacher(tmp_path, tiny_unet(sample_size=(8, 16))))).event_shape == (1, 8, 16)


def test_layout_with_weights_at_the_root(folder, teacher):
    # As google/ddpm-cifar10-32 has it: the unet's files, and the scheduler's, beside model_index.json.
    for component in ("unet", "scheduler"):
        for file in (folder / component).iterdir():
            file.rename(folder / file.name)
        (folder / component).rmdir()
    loaded = load_teacher(str(folder))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.9], dtype=torch.float64)
    assert torch.equal(loaded.velocity(x, t), teacher.velocity(x, t))


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler]
)
@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_schedulers_of_one_schedule_are_one_teacher(tmp_path, scheduler, beta_schedule):
    same = {"beta_schedule": beta_schedule, "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon"}
    reference = load_teacher(str(save_teacher(tmp_path / "ddpm", scheduler=DDPMScheduler(**same))))
    # DDPMPipeline takes only its own scheduler: name the other in the folder.
    folder = save_teacher(tmp_path / "other", scheduler=DDPMScheduler(**same))
    scheduler(**same).save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", scheduler.__name__])
    other = load_teacher(str(folder))
    assert other.scheduler_config["_class_name"] == scheduler.__name__
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([reference.schedule.t_min, 0.5, reference.schedule.t_max], dtype=torch.float64)
    assert torch.equal(other.velocity(x, t), reference.velocity(x, t))


def test_missing_folder(tmp_path):
    assert "no such folder" in refused(tmp_path / "nowhere", "expected a pipeline folder")


@pytest.mark.parametrize("source", ["./nowhere", "~/nowhere", "a/b/c"])
def test_missing_relative_folder(source):
    with pytest.raises(UserError, match="no such folder"):
        load_teacher(source)


def test_hub_out_of_reach():
    # Offline in these tests.
    with pytest.raises(
        UserError, match=r"nobody/nothing: no such folder here, .*the cache is incomplete, and HF_HUB_OFFLINE=1"
    ):
        load_teacher("nobody/nothing")


def test_no_hub_id():
    with pytest.raises(UserError, match="neither a folder nor a Hub id"):
        load_teacher("no such id")


def test_folder_without_index(folder):
    (folder / "model_index.json").unlink()
    refused(folder, "no model_index.json")


def test_broken_index(folder):
    (folder / "model_index.json").write_text('{"unet": [')
    refused(folder, "model_index.json is not JSON")


def test_pickled_weights(folder):
    unet = folder / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.bin")
    message = refused(folder, "diffusion_pytorch_model.bin")
    assert "safe_serialization=True" in message


def test_no_weights(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused(folder, "no weights")


def test_unknown_scheduler(folder):
    RePaintScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "RePaintScheduler"])
    assert "DDPMScheduler" in refused(folder, "scheduler RePaintScheduler; expected one of")


def test_a_map_is_no_teacher(folder):
    CMStochasticIterativeScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "CMStochasticIterativeScheduler"])
    refused(folder, "expected a denoiser, got a consistency model")


def test_unknown_prediction(folder):
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction")
    assert "v_prediction" in refused(folder, "prediction_type 'flow_prediction'")


def test_unknown_pipeline(tmp_path):
    index = {"_class_name": "Other", "transformer": ["diffusers", "DiTTransformer2DModel"], "vae": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    message = refused(tmp_path, "no adapter for transformer: DiTTransformer2DModel;")
    assert "expected UNet2DModel" in message
    assert find_index(str(tmp_path)).components == {"transformer": ("diffusers", "DiTTransformer2DModel")}


def test_empty_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    refused(tmp_path, "an empty pipeline")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier'"),
        ({"out_channels": 3}, "1 channels in, 3 out"),
        ({"sample_size": None}, "expected sample_size"),
    ],
    ids=str,
)
def test_networks_that_it_can_not_read(tmp_path, change, match):
    refused(save_teacher(tmp_path, tiny_unet(**change)), match)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights(tmp_path, value):
    unet = tiny_unet()
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] = value
    refused(save_teacher(tmp_path, unet), r"conv_in\.weight has NaN")


def test_zero_terminal_snr(tmp_path):
    for prediction in ("v_prediction", "sample"):
        scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type=prediction)
        teacher = load_teacher(str(save_teacher(tmp_path / prediction, scheduler=scheduler)))
        assert teacher.schedule.t_max == 1
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="epsilon")
    with pytest.raises(UserError, match="got epsilon, which is undefined there"):
        load_teacher(str(save_teacher(tmp_path / "epsilon", scheduler=scheduler)))


@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        (HeunDiscreteScheduler, {"beta_schedule": "exp", "prediction_type": "epsilon"}, "exp is not implemented"),
        (
            UniPCMultistepScheduler,
            {"use_flow_sigmas": True, "prediction_type": "epsilon"},
            "expected one of flow_prediction",
        ),
        (EulerDiscreteScheduler, {"prediction_type": "flow_prediction"}, "flow_prediction"),
    ],
    ids=["betas", "flow sigmas", "flow"],
)
def test_schedulers_that_are_not_read(tmp_path, kind, settings, match):
    folder = save_teacher(tmp_path)
    kind(**settings).save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DDPMScheduler", kind.__name__))
    with pytest.raises(UserError, match=match):
        load_teacher(str(folder))


@pytest.mark.parametrize("settings", [{"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {}])
@pytest.mark.parametrize("ends", [{"sigma_min": 0.002, "sigma_max": 700.0}, {}])
def test_continuous_timesteps_are_a_preconditioned_variance_exploding_schedule(settings, ends):
    """With a network that is exact for a Gaussian of deviation 2: the closed form, and the scheduler's own steps."""
    scheduler = EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", beta_schedule="scaled_linear", **settings, **ends
    )
    spec = read_scheduler(scheduler, "here")
    assert spec.config["_class_name"] == "EDMEulerScheduler"
    parametrization = Parametrization(spec.schedule, spec.prediction, call_stock, spec.sigma_data)
    deviation, times = 2.0, []

    class Exact(torch.nn.Module):
        """The output with which the denoised sample is that of the Gaussian."""

        def forward(self, given, time):
            times.append(time)
            sigma = (4 * time).double().exp().reshape(-1, 1)
            sample = given * (sigma**2 + 1).sqrt()
            denoised = sample * deviation**2 / (deviation**2 + sigma**2)
            output = (denoised - sample / (sigma**2 + 1)) / (-sigma / (sigma**2 + 1).sqrt())
            return SimpleNamespace(sample=output)

    scheduler.set_timesteps(6)
    sigmas, network = scheduler.sigmas.double(), Exact()
    sample = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sigmas[0]
    for timestep, start, end in zip(scheduler.timesteps, sigmas[:-1], sigmas[1:], strict=True):
        output = network(scheduler.scale_model_input(sample, timestep), timestep.expand(3)).sample
        after = scheduler.step(output, timestep, sample).prev_sample
        t, r = start / (1 + start), end / (1 + end)
        v = parametrization.velocity(network, sample / (1 + start), t.expand(3))
        torch.testing.assert_close((sample / (1 + start) - (t - r) * v) * (1 + end), after, rtol=1e-5, atol=1e-5)
        # The velocity of the closed form: the mean of the noise minus that of the data.
        noise, data = sample * start / (deviation**2 + start**2), sample * deviation**2 / (deviation**2 + start**2)
        torch.testing.assert_close(v, noise - data, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(times[-2].double(), times[-1].double(), rtol=1e-6, atol=1e-7)
        sample = after
    # Jumps are measured between the ends that the scheduler has; without its own ones it may leave out the last.
    ours = spec.schedule.warp(sigmas[:1] / (1 + sigmas[:1]))
    assert float(ours) == pytest.approx(1, abs=1e-2)
    if settings.get("use_karras_sigmas"):
        places = spec.schedule.warp(sigmas[:-1] / (1 + sigmas[:-1]))
        torch.testing.assert_close(places, torch.linspace(1, 0, 6, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_continuous_timesteps_of_another_prediction_are_discrete():
    spec = read_scheduler(EulerDiscreteScheduler(timestep_type="continuous"), "here")
    assert isinstance(spec.schedule, VariancePreserving)


def test_unknown_builtin():
    with pytest.raises(UserError, match=r"builtin:letters: expected one of .*builtin:digits"):
        load_teacher("builtin:letters")


@pytest.mark.parametrize("name", sorted(path.parent.name for path in BUILTIN.glob("*/model_index.json")))
def test_builtin(name):
    teacher = load_teacher(f"builtin:{name}")
    x = torch.randn(1, *teacher.event_shape)
    assert teacher.velocity(x, torch.full((1,), 0.5)).isfinite().all()
