"""Weights that are not plain, complete and of the network: refused by their names before they are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from fmm_distill.errors import UserError
from fmm_distill.teachers.load import find_index, load_teacher
from fmm_distill.teachers.weight_files import check_weight_files
from tests.conftest import save_teacher, tiny_unet
from tests.logs import logged
from tests.tiny import diffusion

WEIGHTS = "diffusion_pytorch_model.safetensors"
PROMPTS = ("a cat", "dogs")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network of pixels, and a pipeline of prompts."""
    folder = tmp_path_factory.mktemp("saved")
    save_teacher(folder / "unet2d")
    diffusion.PIPELINES["sd1"].build().save_pretrained(folder / "sd1", safe_serialization=True)
    return folder


@pytest.fixture(params=["unet2d", "sd1"])
def folder(saved, request, tmp_path):
    """A copy to break."""
    return shutil.copytree(saved / request.param, tmp_path / "pipeline")


def opened(folder, **given):
    prompts = PROMPTS if (folder / "text_encoder").is_dir() else ()
    return load_teacher(str(folder), prompts=prompts, **given)


def refused(folder, match, **given):
    with pytest.raises(UserError, match=match) as caught:
        opened(folder, **given)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder, change, component="unet", name=WEIGHTS):
    file = folder / component / name
    weights = change(load_file(file))
    file.unlink()
    save_file({key: value.contiguous() for key, value in weights.items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "quanto", "gguf"])
def test_quantized_by_the_configuration(folder, method):
    edit(folder / "unet" / "config.json", quantization_config={"quant_method": method, "load_in_4bit": True})
    assert "dequantize()" in refused(folder, rf"got quantized ones in its unet \({method}\)")


def test_a_quantized_text_encoder(saved, tmp_path):
    folder = shutil.copytree(saved / "sd1", tmp_path / "pipeline")
    edit(folder / "text_encoder" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    refused(folder, r"got quantized ones in its text_encoder \(bitsandbytes\)")


def test_packed_in_one_file(folder):
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "model-Q4_K.gguf")
    refused(folder, r"got quantized ones in its unet \(model-Q4_K\.gguf\)")


@pytest.mark.parametrize(
    "beside",
    [
        {"conv_in.weight": torch.ones(4, dtype=torch.uint8), "conv_in.weight.absmax": torch.ones(1)},
        {"conv_in.weight": torch.ones(4, dtype=torch.int8)},
        {"conv_in.weight_scale": torch.ones(1)},
    ],
    ids=["absmax", "whole numbers", "scale"],
)
def test_quantized_by_the_file(folder, beside):
    rewrite(folder, lambda weights: weights | beside)
    refused(folder, r"got quantized ones in its unet \(conv_in\.weight")


@pytest.mark.parametrize("key", ["conv_in.base_layer.weight", "conv_in.lora_A.default.weight", "mid.lora.down.weight"])
def test_adapters_that_are_not_fused(folder, key):
    rewrite(folder, lambda weights: weights | {key: torch.ones(2)})
    assert "fuse_lora" in refused(folder, rf"got adapters in unet/.* \({key}")


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_a_variant_alone(folder, variant):
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / f"diffusion_pytorch_model.{variant}.safetensors")
    refused(folder, rf"expected default weights of its unet, got variants \({variant}\); try --set variant={variant}")
    assert opened(folder, variant=variant).network is not None


def test_shards_that_are_not_there(folder):
    network = opened(folder).network
    shutil.rmtree(folder / "unet")
    network.save_pretrained(folder / "unet", max_shard_size="10KB")
    shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    assert opened(folder).network is not None
    shards[1].unlink()
    refused(folder, rf"1 of the {len(shards)} shards that unet/.*index\.json names are missing \({shards[1].name}\)")
    (folder / "unet" / f"{WEIGHTS}.index.json").unlink()
    refused(folder, r"unet has shards and no diffusion_pytorch_model\.safetensors\.index\.json")


def test_pickles_alone(folder):
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    assert "safe_serialization=True" in refused(folder, r"in unet, got diffusion_pytorch_model\.bin")


def test_a_file_that_is_cut(folder):
    file = folder / "unet" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, r"unet/diffusion_pytorch_model\.safetensors can't be read")


def test_weights_of_another_network(folder):
    rewrite(folder, lambda weights: {f"model.{key}": value for key, value in weights.items()})
    refused(folder, r"weights of its unet are missing in its file \(conv_in\.bias, conv_in\.weight")


def test_a_part_of_the_weights(folder):
    rewrite(folder, lambda weights: {key: value for key, value in weights.items() if "conv_out" not in key})
    refused(folder, r"2 weights of its unet are missing in its file \(conv_out\.bias, conv_out\.weight\)")


def test_more_weights_than_the_network_has(folder):
    rewrite(folder, lambda weights: weights | {"down_blocks.7.resnets.0.conv1.weight": torch.ones(2)})
    refused(folder, r"has 1 weights that its class does not have \(down_blocks\.7")


@pytest.mark.parametrize(
    ("component", "name", "part"),
    [("text_encoder", "model.safetensors", "final_layer_norm"), ("vae", WEIGHTS, "decoder.conv_out")],
)
def test_encoders_and_decoders_are_complete_too(saved, tmp_path, component, name, part):
    folder = shutil.copytree(saved / "sd1", tmp_path / "pipeline")
    rewrite(folder, lambda weights: {key: v for key, v in weights.items() if part not in key}, component, name)
    refused(folder, rf"2 weights of its {component} are missing in its file")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
def test_few_digits_are_opened_as_they_are(folder, kind):
    lines: list[str] = []
    expected = opened(folder).network.conv_in.weight.to(kind).float()
    rewrite(folder, lambda weights: {key: value.to(kind) for key, value in weights.items()})
    with logged(lines):
        network = opened(folder).network
    assert network.dtype is torch.float32
    assert torch.equal(network.conv_in.weight, expected)
    assert len(lines) == (kind is torch.float8_e4m3fn)
    assert all("stored in F8_E4M3 without scales" in line for line in lines)


def test_older_names_of_attention_are_no_missing_weights(tmp_path):
    save_teacher(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(weights):
        for new, name in old.items():
            weights = {key.replace(f".{new}.", f".{name}."): value for key, value in weights.items()}
        return weights

    rewrite(tmp_path, renamed)
    found = opened(tmp_path).network.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in tiny_unet().state_dict().items())


@pytest.mark.parametrize("name", ["model.safetensors", "v1-5.ckpt", "flux.gguf"])
def test_a_single_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"1")
    with pytest.raises(UserError) as caught:
        load_teacher(str(tmp_path / name))
    assert ("quantized" if name.endswith("gguf") else "from_single_file") in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        load_teacher(str(tmp_path / "other" / name))
    with pytest.raises(UserError, match=r"it has (model|v1-5|flux)\."):
        load_teacher(str(tmp_path))


def test_folders_that_are_no_pipeline(tmp_path):
    with pytest.raises(UserError, match="an address"):
        load_teacher("https://huggingface.co/owner/name")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="it has one component"):
        load_teacher(str(tmp_path))
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"1")
    with pytest.raises(UserError, match="it has a LoRA"):
        load_teacher(str(tmp_path))


@pytest.mark.parametrize("width", [32, 256])
def test_a_consistency_model_under_another_scheduler(saved, tmp_path, width):
    folder = shutil.copytree(saved / "sd1", tmp_path / "pipeline")
    diffusion.conditional_unet(time_cond_proj_dim=width).save_pretrained(folder / "unet")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    refused(folder, rf"time_cond_proj_dim {width}.* which is a map to data")


def test_the_older_name_of_a_sample_prediction(tmp_path):
    save_teacher(tmp_path)
    file = tmp_path / "scheduler" / "scheduler_config.json"
    edit(file, prediction_type="epsilon", predict_epsilon=False)
    refused(tmp_path, "predict_epsilon: false.* try prediction_type: sample")
    edit(file, predict_epsilon=True)
    assert opened(tmp_path).prediction == "epsilon"


def test_what_is_looked_at_are_headers_alone(saved, monkeypatch):
    """Refusals come before a large network is read."""

    def load(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr("diffusers.ModelMixin.from_pretrained", load)
    monkeypatch.setattr("safetensors.torch.load_file", load)
    check_weight_files(find_index(str(saved / "sd1")))
