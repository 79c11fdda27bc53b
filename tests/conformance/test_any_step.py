"""Any-step pipelines used like any other pipeline of diffusers: saved, compiled, cast, with another scheduler."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import diffusers
import pytest
import torch

from fmm_distill.export.choose import exporter_of
from fmm_distill.export.pipelines import export_pipeline
from fmm_distill.student.sampling import sample
from fmm_distill.student.student import Student
from fmm_distill.teachers.load import load_teacher
from tests.conformance.test_prompted import PROMPTS
from tests.conformance.test_prompted_export import moved, opened
from tests.conftest import save_teacher
from tests.tiny.diffusion import PIPELINES

SEED = 5
PROMPTED = {"prompt": "a dog", "output_type": "latent"}
CALLS = {
    "pixels": {"output_type": "pt"},
    "edm": {"output_type": "pt"},
    "ldm": {"output_type": "latent"},
    "dit": {"class_labels": [1], "output_type": "np"},
    "sd1": PROMPTED,
    "sd3": PROMPTED,
    "bria": PROMPTED | {"height": 16, "width": 16, "max_sequence_length": 16},
    "cogvideox": PROMPTED,
}
# Opens folders without the package, saves each of them again and opens that.
STRANGER = """
import json, sys
sys.modules["fmm_distill"] = None
import torch
from diffusers import AutoModel, DiffusionPipeline

def made_by(folder, call, options):
    options = options | {"dtype": getattr(torch, options["dtype"])}
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    call = call | {"num_inference_steps": 3, "return_dict": False, "generator": torch.Generator().manual_seed(5)}
    return pipeline, torch.as_tensor(pipeline(**call)[0]).float()

found = {}
for folder, component, call, options in json.loads(sys.argv[1]):
    pipeline, made = made_by(folder, call, options)
    pipeline.save_pretrained(folder + " again")
    again, same = made_by(folder + " again", call, {"dtype": options["dtype"]})
    alone = AutoModel.from_pretrained(f"{folder} again/{component}", trust_remote_code=True)
    found[folder] = [made.tolist(), float((made - same).abs().max() / made.abs().max()), type(alone).__name__]
print(json.dumps(found))
"""


def teacher_of(name, folder):
    if name == "pixels":
        return load_teacher(str(save_teacher(folder)))
    if name == "edm":
        scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
        return load_teacher(str(save_teacher(folder, scheduler=scheduler)))
    if name == "ldm":
        PIPELINES[name].build().save_pretrained(folder)
        return load_teacher(str(folder))
    return opened(name, folder)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    made = {}
    for name in CALLS:
        folder = tmp_path_factory.mktemp(name)
        teacher = teacher_of(name, folder / "teacher")
        student = moved(Student.from_teacher(teacher))
        student_folder = export_pipeline(student, teacher, folder / "student", ())
        component = exporter_of(teacher).component
        made[name] = SimpleNamespace(student=student, teacher=teacher, folder=student_folder, component=component)
    return made


def open_folder(folder, **options):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def made_by(pipeline, name, **given):
    call = CALLS[name] | {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(SEED)} | given
    return torch.as_tensor(pipeline(**call, return_dict=False)[0]).float()


def differ(one, other):
    return float((one - other).abs().max() / other.abs().max())


@pytest.fixture
def logged(caplog):
    diffusers.utils.logging.enable_propagation()
    yield lambda: caplog.text
    diffusers.utils.logging.disable_propagation()


SAVED = [
    ("pixels", {}, {"dtype": "float32"}),
    ("ldm", {"max_shard_size": "20KB"}, {"dtype": "float32"}),
    ("sd1", {"variant": "fp16"}, {"dtype": "float16", "variant": "fp16"}),
    ("sd3", {"safe_serialization": False}, {"dtype": "float32"}),
    ("dit", {}, {"dtype": "bfloat16"}),
    ("cogvideox", {}, {"dtype": "float32"}),
]


def test_saved_pipelines_open_in_a_process_without_the_package(exports, tmp_path):
    jobs, expected = [], {}
    for name, how, options in SAVED:
        pipeline = open_folder(exports[name].folder)
        if options["dtype"] != "float32":
            pipeline.to(getattr(torch, options["dtype"]))
        folder = tmp_path / f"{name} of à user.v1"
        pipeline.save_pretrained(folder, **how)
        expected[str(folder)] = made_by(pipeline, name), torch.finfo(pipeline.dtype).eps * 2 + 1e-6
        jobs.append([str(folder), exports[name].component, CALLS[name], options])
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-P", "-c", STRANGER, json.dumps(jobs)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for folder, (made, again, kind) in json.loads(done.stdout.splitlines()[-1]).items():
        # Loading in a lower precision rounds a table of positions that casting afterwards rounds again.
        assert differ(torch.tensor(made), expected[folder][0]) < expected[folder][1]
        assert again < 1e-5
        assert kind.startswith("TwoTime")


@pytest.mark.parametrize(
    ("name", "fullgraph"), [("pixels", False), pytest.param("sd1", True, marks=pytest.mark.slow), ("sd3", True)]
)
def test_compiled_networks(exports, tmp_path, name, fullgraph):
    expected = made_by(open_folder(exports[name].folder), name)
    wrapped, inside = open_folder(exports[name].folder), open_folder(exports[name].folder)
    component = exports[name].component
    network = getattr(wrapped, component)
    setattr(wrapped, component, torch.compile(network, backend="eager", fullgraph=fullgraph))
    getattr(inside, component).compile(backend="eager", fullgraph=fullgraph)
    assert differ(made_by(wrapped, name), expected) < 1e-5
    assert differ(made_by(inside, name), expected) < 1e-5
    wrapped.save_pretrained(tmp_path)
    assert differ(made_by(open_folder(tmp_path), name), expected) < 1e-5


@pytest.mark.parametrize("name", ["pixels", "edm", "sd1", "sd3"])
def test_layerwise_casting(exports, name):
    pipeline = open_folder(exports[name].folder, dtype=torch.bfloat16)
    expected = made_by(pipeline, name)
    network = getattr(pipeline, exports[name].component)
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    # Eight bits of weights: three of them the mantissa.
    assert 0 < differ(made_by(pipeline, name), expected) < 0.15


@pytest.mark.parametrize("name", ["pixels", "sd1", "sd3"])
def test_group_offloading(exports, name):
    pipeline = open_folder(exports[name].folder)
    expected = made_by(pipeline, name)
    cpu = torch.device("cpu")
    getattr(pipeline, exports[name].component).enable_group_offload(cpu, cpu, "leaf_level")
    assert differ(made_by(pipeline, name), expected) < 1e-5


OTHERS = [
    ("pixels", "DPMSolverMultistepScheduler"),
    ("edm", "EDMDPMSolverMultistepScheduler"),
    ("dit", "DDPMScheduler"),
    ("sd1", "EulerDiscreteScheduler"),
    ("sd3", "FlowMatchHeunDiscreteScheduler"),
    ("sd3", "UniPCMultistepScheduler"),
    ("bria", "FlowMatchLCMScheduler"),
    ("cogvideox", "CogVideoXDPMScheduler"),
]


@pytest.mark.parametrize(("name", "other"), OTHERS)
def test_the_scheduler_of_the_student_takes_the_place_of_another(exports, name, other, logged, tmp_path):
    pipeline = open_folder(exports[name].folder)
    own = type(pipeline.scheduler).__name__
    expected = made_by(pipeline, name)
    pipeline.scheduler = getattr(diffusers, other).from_config(pipeline.scheduler.config)
    assert differ(made_by(pipeline, name), expected) < 1e-5
    assert differ(made_by(pipeline, name), expected) < 1e-5
    assert logged().count(f"the steps of {other} are not this student's jumps: {own} steps") == 1
    assert type(pipeline.scheduler).__name__ == other
    pipeline.save_pretrained(tmp_path)
    assert differ(made_by(open_folder(tmp_path), name), expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("pixels", {"beta_schedule": "scaled_linear"}, "other betas"),
        ("pixels", {"prediction_type": "sample"}, r"prediction_type='sample' \(expected 'v_prediction'\)"),
        ("sd1", {"num_train_timesteps": 500}, r"num_train_timesteps=500 \(expected 1000\)"),
        ("sd1", {"beta_end": 0.02}, "other betas"),
        ("edm", {"sigma_max": 40.0}, r"sigma_max=40.0 \(expected 80.0\)"),
        ("sd3", {"num_train_timesteps": 100}, r"num_train_timesteps=100 \(expected 1000\)"),
    ],
)
def test_a_scheduler_of_other_levels_is_refused(exports, name, changes, match):
    pipeline = open_folder(exports[name].folder)
    expected, own = made_by(pipeline, name), pipeline.scheduler
    pipeline.scheduler = type(own).from_config(own.config, **changes)
    with pytest.raises(ValueError, match=match):
        made_by(pipeline, name)
    pipeline.scheduler = own
    assert torch.equal(made_by(pipeline, name), expected)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("pixels", {"timestep_spacing": "leading"}),
        ("sd1", {"timestep_spacing": "linspace", "clip_sample": True}),
        ("sd3", {"stochastic_sampling": True}),
        ("sd3", {"shift_terminal": 0.1}),
    ],
)
def test_settings_without_effect_are_logged(exports, name, changes, logged):
    pipeline = open_folder(exports[name].folder)
    expected = made_by(pipeline, name)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)
    assert torch.equal(made_by(pipeline, name), expected)
    assert all(f"{key}={value!r}" in logged() for key, value in changes.items())
    assert "of no effect" in logged()


@torch.no_grad()
@pytest.mark.parametrize("shift", [1.0, 1.7])
def test_a_flow_student_takes_another_grid(exports, shift):
    student, teacher = exports["sd3"].student, exports["sd3"].teacher
    pipeline = open_folder(exports["sd3"].folder)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, shift=shift)
    noise = torch.randn(1, *teacher.event_shape, generator=torch.Generator().manual_seed(SEED))
    made = made_by(pipeline, "sd3", prompt=PROMPTS[0], latents=noise)
    shares = torch.tensor([1, 2 / 3, 1 / 3, 0], dtype=torch.float64)
    cond = teacher.conditions.prompts.rows(torch.tensor([0]))
    own = sample(student, noise, shift * shares / (1 + (shift - 1) * shares), cond)
    assert differ(made, own) < 1e-4


@pytest.mark.parametrize("name", ["pixels", "sd1", "sd3"])
def test_threads_nested_calls_and_failures_leave_nothing_behind(exports, name):
    pipeline = open_folder(exports[name].folder)
    expected, own = made_by(pipeline, name), pipeline.scheduler
    network, found = getattr(pipeline, exports[name].component), []
    threads = [threading.Thread(target=lambda: found.append(made_by(pipeline, name))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    assert all(torch.equal(one, expected) for one in found)

    def nested(pipe, step, timestep, given):
        found.append(made_by(pipe, name, num_inference_steps=2))
        return given

    def failing(pipe, step, timestep, given):
        raise KeyError(step)

    assert torch.equal(made_by(pipeline, name, callback_on_step_end=nested), expected)
    with pytest.raises(KeyError):
        made_by(pipeline, name, callback_on_step_end=failing)
    assert pipeline.scheduler is own
    assert not network._forward_pre_hooks
    assert network.jump.h is None
    assert torch.equal(made_by(pipeline, name), expected)


@pytest.mark.parametrize("name", ["pixels", "sd1", "sd3"])
@pytest.mark.parametrize("steps", [0, -1, "4", 2.0])
def test_what_is_no_number_of_steps(exports, name, steps):
    pipeline = open_folder(exports[name].folder)
    with pytest.raises(ValueError, match="num_inference_steps must be an integer from 1"):
        made_by(pipeline, name, num_inference_steps=steps)


def test_latents_without_their_autoencoder(exports):
    pipeline = open_folder(exports["ldm"].folder, vqvae=None)
    assert pipeline.vqvae is None
    expected = made_by(open_folder(exports["ldm"].folder), "ldm")
    assert torch.equal(made_by(pipeline, "ldm"), expected)
    with pytest.raises(ValueError, match=r"needs the vqvae .* output_type=\"latent\""):
        pipeline(output_type="pt")


def test_an_index_without_the_autoencoder_opens(exports, tmp_path):
    folder = shutil.copytree(exports["ldm"].folder, tmp_path / "student")
    shutil.rmtree(folder / "vqvae")
    index = json.loads((folder / "model_index.json").read_text())
    del index["vqvae"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert open_folder(folder).vqvae is None
    # As SD pipelines without a safety checker are saved.
    (folder / "model_index.json").write_text(json.dumps(index | {"vqvae": [None, None]}))
    pipeline = open_folder(folder)
    assert pipeline.vqvae is None
    pipeline.save_pretrained(tmp_path / "again")
    expected = made_by(open_folder(exports["ldm"].folder), "ldm")
    assert torch.equal(made_by(open_folder(tmp_path / "again"), "ldm"), expected)


def test_a_folder_whose_autoencoder_is_gone_has_the_message_of_diffusers(exports, tmp_path):
    folder = shutil.copytree(exports["ldm"].folder, tmp_path / "student")
    shutil.rmtree(folder / "vqvae")
    with pytest.raises(OSError, match=r"no file named config\.json"):
        open_folder(folder)
    assert open_folder(folder, vqvae=None).vqvae is None


@pytest.mark.parametrize("name", ["pixels", "ldm", "sd1"])
def test_copies_and_components(exports, name):
    """The code of the first pipeline is run again for the second: objects of the first still work."""
    first = open_folder(exports[name].folder)
    expected, component = made_by(first, name), exports[name].component
    second = open_folder(exports[name].folder)
    network = getattr(first, component)
    for other in (
        copy.deepcopy(first),
        pickle.loads(pickle.dumps(first)),
        type(second)(**first.components),
        type(first).from_pipe(first),
        open_folder(exports[name].folder, **{component: network}),
    ):
        other.set_progress_bar_config(disable=True)
        assert differ(made_by(other, name), expected) < 1e-5
    assert type(network) is type(getattr(second, component))
    rebuilt = type(network).from_config(network.config).eval()
    rebuilt.load_state_dict(network.state_dict())
    setattr(second, component, rebuilt)
    assert differ(made_by(second, name), expected) < 1e-5


def test_one_name_and_two_contents(exports, tmp_path):
    """A file that a user changed does not change a pipeline that is open, and is saved under a name of its own."""
    first = open_folder(exports["pixels"].folder)
    expected = made_by(first, "pixels")
    folder = shutil.copytree(exports["pixels"].folder, tmp_path / "changed")
    (file,) = folder.glob("flow_map_*.py")
    file.write_text(file.read_text().replace("images = (x / 2 + 0.5).clamp(0, 1)", "images = 0 * x"))
    second = open_folder(folder)
    assert made_by(second, "pixels").abs().max() == 0
    assert torch.equal(made_by(first, "pixels"), expected)
    for pipeline in (first, second):
        pipeline.save_pretrained(tmp_path / "saved")
        assert torch.equal(made_by(open_folder(tmp_path / "saved"), "pixels"), made_by(pipeline, "pixels"))
    assert len(list((tmp_path / "saved").glob("flow_map_*.py"))) == 2


@pytest.mark.parametrize("name", ["sd1", "dit", "sd3"])
def test_replaced_layers_still_add_the_jump(exports, name):
    """As quantization does when it opens a network."""
    pipeline = open_folder(exports[name].folder)
    expected, network = made_by(pipeline, name), getattr(pipeline, exports[name].component)
    for host in network.config.jump_hosts:
        old, (parent, _, leaf) = network.get_submodule(host), host.rpartition(".")
        new = torch.nn.Linear(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        setattr(network.get_submodule(parent), leaf, new)
    assert differ(made_by(pipeline, name), expected) < 1e-5


def test_a_network_that_is_no_student_is_refused(exports):
    for name in ("pixels", "sd1"):
        pipeline, teacher = open_folder(exports[name].folder), exports[name].teacher
        setattr(pipeline, exports[name].component, teacher.network)
        with pytest.raises(ValueError, match="is no student; expected the TwoTime class"):
            made_by(pipeline, name)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"latents": torch.zeros(1, 2, 8, 8)}, r"latents must have the shape \(1, 1, 8, 8\)"),
        ({"timesteps": [499, 999]}, "integers that decrease, from at most 999 to at least 0"),
        ({"timesteps": [1000]}, "integers that decrease"),
        ({"generator": [torch.Generator()] * 3}, "expected 1 generators"),
    ],
)
def test_calls_that_pixels_can_not_be_made_of(exports, given, match):
    with pytest.raises(ValueError, match=match):
        made_by(open_folder(exports["pixels"].folder), "pixels", **given)


def test_half_precision_keeps_the_jumps(exports):
    """The length of a jump is embedded before it is rounded."""
    for name in ("pixels", "sd1", "sd3"):
        expected = made_by(open_folder(exports[name].folder), name)
        half = open_folder(exports[name].folder, dtype=torch.float16)
        assert differ(made_by(half, name), expected) < 1e-2
