"""Images through a pipeline's own autoencoder, and whole runs whose data belong to what a teacher is told."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from fmm_distill.config.recipe import parse
from fmm_distill.config.settings import DataSettings
from fmm_distill.data.prepare import open_images
from fmm_distill.errors import UserError
from fmm_distill.run.distill import distill
from fmm_distill.run.plan import plan
from fmm_distill.run.reopen import open_run
from fmm_distill.teachers.codec import LatentCodec, encoder_of
from fmm_distill.teachers.load import load_teacher
from fmm_distill.training.trainer import Trainer
from tests.conformance.test_prompted import FAMILIES, saved
from tests.conftest import save_teacher, tiny_unet
from tests.logs import logged
from tests.tiny.diffusion import PIPELINES
from tests.unit.test_data import parquet, png

ENCODED = (
    "sd1",
    "sdxl",
    "pixart-sigma",
    "hunyuan-dit",
    "cogview3",
    "sd3",
    "sana",
    "auraflow",
    "lumina2",
    "z-image",
    "cogview4",
)
REFUSED = {
    "flux": "it packs them",
    "qwen-image": "no autoencoder named vae with one scaling_factor",
    "latte": "no images",
}


def opened(name, folder):
    source, call = saved(name, folder)
    return load_teacher(source, prompts=("a cat",), call=call)


def image_shape(teacher):
    return tuple(teacher.codec.decode(torch.zeros(1, *teacher.event_shape)).shape[1:])


@pytest.mark.parametrize("name", ENCODED)
def test_a_pipeline_decodes_what_its_autoencoder_encodes(tmp_path, name):
    teacher = opened(name, tmp_path / "teacher")
    shape = image_shape(teacher)
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encoder_of(teacher.codec, shape).encode(images)
    assert latents.shape == (2, *teacher.event_shape)
    # The stock class from disk, asked for no sample of its own but for the pixels of these.
    vae = DiffusionPipeline.from_pretrained(tmp_path / "teacher").vae
    with torch.no_grad():
        encoded = vae.encode(images)
        raw = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        wanted = vae.decode(raw).sample.clamp(-1, 1)
    torch.testing.assert_close(teacher.codec.decode(latents), wanted, rtol=0, atol=1e-4)
    assert (latents - raw.reshape(latents.shape)).abs().max() > 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_where_there_is_no_way_back_the_reason_is_told(tmp_path, name):
    teacher = opened(name, tmp_path / "teacher")
    kind = type(FAMILIES[name].build()).__name__
    with pytest.raises(UserError, match=f"expected none or teacher: {kind} can't encode images .*{REFUSED[name]}"):
        encoder_of(teacher.codec, image_shape(teacher))


def test_a_pipeline_that_moves_its_latents_is_found_out(tmp_path, monkeypatch):
    teacher = opened("sd1", tmp_path / "teacher")
    decode = diffusers.AutoencoderKL.decode
    own = encoder_of(teacher.codec, image_shape(teacher)).autoencoder

    def moved(self, z, *rest, **more):
        # Called by the pipeline with return_dict=False, by the codec without.
        return decode(self, z + 0.3 if "return_dict" in more else z, *rest, **more)

    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", moved)
    assert isinstance(own, diffusers.AutoencoderKL)
    with pytest.raises(UserError, match="otherwise than by its autoencoder's factor and shift"):
        encoder_of(teacher.codec, image_shape(teacher))


EVALUATION = {
    "steps": [1],
    "ddim_steps": [],
    "dpmsolver_steps": [],
    "endpoint_samples": 2,
    "endpoint_solver_steps": 2,
}
SHORT = {
    "training": {"steps": 2, "batch_size": 6, "checkpoint_every": 2},
    "evaluation": EVALUATION,
    "export": {"steps": []},
    "time_sampling": {"prior": 0.0},
}


class Seen:
    """What a run's jumps start from, and what is told with it."""

    def __init__(self, monkeypatch):
        self.picked = []
        step = Trainer.train_step

        def watched(trainer, number, request):
            pick = trainer.images.pick
            if not self.picked:
                monkeypatch.setattr(trainer.images, "pick", lambda draws: self.keep(draws, pick(draws)))
            return step(trainer, number, request)

        monkeypatch.setattr(Trainer, "train_step", watched)

    def keep(self, draws, picked):
        self.picked.append((draws, picked))
        return picked


def greys(shape, count):
    """Images whose gray is their number."""
    return torch.linspace(0, 255, count).byte().reshape(-1, 1, 1, 1).expand(count, *shape)


def test_classes_belong_to_images_in_a_whole_run(tmp_path, monkeypatch):
    teacher = save_teacher(tmp_path / "teacher", tiny_unet(num_class_embeds=7))
    pixels = greys((8, 8, 1), 5)
    labels = [6, 0, 3, 1, 3]
    source = parquet(tmp_path / "a.parquet", [png(image.numpy()) for image in pixels], label=labels)
    data = {"source": str(source), "condition": "label", "flip": True}
    seen, network_told = Seen(monkeypatch), []
    recipe = parse({"teacher": str(teacher), "data": data} | SHORT, "here")
    forward = diffusers.UNet2DModel.forward

    def told(self, sample, timestep, class_labels=None, **more):
        if self.training is False and len(sample) == 6:
            network_told.append(class_labels.tolist())
        return forward(self, sample, timestep, class_labels=class_labels, **more)

    monkeypatch.setattr(diffusers.UNet2DModel, "forward", told)
    with monkeypatch.context() as patch:
        patch.setattr("fmm_distill.run.distill.finish", lambda *_: None)
        distill(recipe, tmp_path / "run")
    assert len(seen.picked) == 2
    for _, picked in seen.picked:
        number = ((picked.images[:, 0, 0, 0] + 1) / 2 * 4).round().long()
        assert [labels[i] for i in number] in network_told
    drawn = [load_teacher(str(teacher)).conditions.pick(draws.condition) for draws, _ in seen.picked]
    assert any(one.inputs["class_labels"].tolist() not in network_told for one in drawn)


def test_captions_become_the_prompts_and_belong_to_images(tmp_path, monkeypatch):
    source, call = saved("sd1", tmp_path / "teacher")
    captions = ["a red cat", "two dogs", "a red cat", "a blue car in the snow"]
    files = [png(image.numpy()) for image in greys((8, 8, 3), 4)]
    data = {"source": str(parquet(tmp_path / "a.parquet", files, text=captions)), "condition": "text"}
    seen, said = Seen(monkeypatch), []
    recipe = parse({"teacher": source, "pipeline": call, "data": data} | SHORT, "here")
    with monkeypatch.context() as patch:
        patch.setattr("fmm_distill.run.distill.finish", lambda *_: None)
        with logged(said):
            distill(recipe, tmp_path / "run")
    prompts = ("a red cat", "two dogs", "a blue car in the snow")
    assert tuple(json.loads((tmp_path / "run" / "prompts.json").read_text())) == prompts
    assert sum("4 latents take" in line for line in said) == 1
    job = open_run(tmp_path / "run")
    encoder = encoder_of(job.teacher.codec, (3, 8, 8))
    latents = encoder.encode(job.images.take(torch.arange(4))[0])
    for draws, picked in seen.picked:
        which = (picked.images[:, None] - latents).flatten(2).abs().sum(2).argmin(1)
        told = job.teacher.conditions.pick(picked.with_conditions(draws).condition).inputs["encoder_hidden_states"]
        rows = job.teacher.conditions.prompts.inputs["encoder_hidden_states"]
        wanted = torch.stack([rows[prompts.index(captions[i])] for i in which])
        assert told.equal(wanted)
    # A caption that the run did not have.
    files = [png(image.numpy()) for image in greys((8, 8, 3), 4)]
    parquet(tmp_path / "a.parquet", files, text=[*captions[:3], "a cow"])
    with pytest.raises(UserError, match=r"data\.source: expected the files that the run"):
        open_run(tmp_path / "run")
    # Where the other data are meant, the run can't have been trained on it.
    (tmp_path / "run" / "inputs.json").unlink()
    with pytest.raises(UserError, match="row 3: expected one of the run's prompts, got 'a cow'"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("told", "condition", "wanted"),
    [
        ("class", None, "expected data.condition, the images' classes or captions, because .* is conditional"),
        ("class", "text", "expected a pipeline with a text encoder for prompts and pipeline"),
        ("nothing", "label", r"data\.condition label: expected null, because .* is unconditional"),
        ("prompt", "label", "row 0: expected one of the run's prompts, got 0"),
    ],
)
def test_data_that_do_not_belong_to_a_teacher(tmp_path, told, condition, wanted):
    files = [png(image.numpy()) for image in greys((8, 8, 3), 2)]
    source = parquet(tmp_path / "a.parquet", files, label=[0, 1], text=["a", "b"])
    if told == "prompt":
        teacher, call = saved("sd1", tmp_path / "teacher")
    else:
        changes = {"num_class_embeds": 3} if told == "class" else {}
        teacher, call = save_teacher(tmp_path / "teacher", tiny_unet(in_channels=3, out_channels=3, **changes)), {}
    data = {"source": str(source), "condition": condition}
    recipe = parse({"teacher": str(teacher), "pipeline": call, "data": data} | SHORT, "here")
    with pytest.raises(UserError, match=wanted) as caught:
        plan(recipe)
    assert "\n" not in str(caught.value)


def test_a_dit_is_told_the_labels_of_its_latents(tmp_path):
    PIPELINES["dit"].build().save_pretrained(tmp_path / "teacher")
    teacher = load_teacher(str(tmp_path / "teacher"))
    assert isinstance(teacher.codec, LatentCodec)
    shape = image_shape(teacher)
    files = [png(image.numpy()) for image in greys((*shape[1:], 3), 3)]
    source = parquet(tmp_path / "a.parquet", files, label=[1, 0, 1])
    images = open_images(DataSettings(source=str(source), condition="label"), teacher, None)
    assert teacher.conditions.pick(images.conditions).inputs["class_labels"].tolist() == [1, 0, 1]


def test_a_run_from_teacher_data_goes_on_with_the_same_numbers(tmp_path, teacher_folder, monkeypatch):
    data = {"source": "teacher", "on_policy": 0.25, "trajectories": {"count": 12, "points": 3, "solver_steps": 4}}
    recipe = parse({"teacher": str(teacher_folder), "data": data} | SHORT, "here")
    said, logs = [], []
    for name in ("one", "two"):
        with monkeypatch.context() as patch:
            patch.setattr("fmm_distill.run.distill.finish", lambda *_: None)
            if name == "two":
                patch.setattr(Trainer, "run", _interrupted)
                with pytest.raises(KeyboardInterrupt), logged(said):
                    distill(recipe, tmp_path / name)
                patch.undo()
                patch.setattr("fmm_distill.run.distill.finish", lambda *_: None)
            with logged(said):
                distill(recipe, tmp_path / name)
        lines = (tmp_path / name / "steps.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["loss"] for line in lines])
    assert logs[0] == logs[1]
    assert [file.name for file in (tmp_path / "one" / "trajectories").iterdir()] == ["part-00000.safetensors"]
    assert any("12 trajectories of 3 points take 0.0 MiB" in line and "19 calls" in line for line in said)
    own = parse({"teacher": str(teacher_folder), "data": "none"} | SHORT, "here")
    with monkeypatch.context() as patch:
        patch.setattr("fmm_distill.run.distill.finish", lambda *_: None)
        with logged(said):
            distill(own, tmp_path / "none")
    first = json.loads((tmp_path / "none" / "steps.jsonl").read_text().splitlines()[0])
    assert first["loss"] != logs[0][0]


def _interrupted(*_):
    raise KeyboardInterrupt
