"""Tiny IP-Adapters: random weights for the network of a pipeline, in the files of the published ones."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.tiny.diffusion import redraw

__all__ = ["ENCODER", "WEIGHTS", "image_encoder", "save_adapter"]

WEIGHTS, ENCODER = "ip-adapter.safetensors", "image_encoder"
# Features of the image encoder: its last layer, and its embedding.
_HIDDEN, _EMBEDDED, _SIZE = 16, 12, 16


def image_encoder() -> nn.Module:
    return redraw(
        CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=_HIDDEN,
                intermediate_size=16,
                projection_dim=_EMBEDDED,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=_SIZE,
                patch_size=8,
            )
        )
    ).eval()


def _plain(width: int) -> dict[str, Tensor]:
    """Four tokens of the image's embedding."""
    state = redraw(ImageProjection(_EMBEDDED, width, num_image_text_embeds=4)).state_dict()
    return {key.replace("image_embeds.", "proj."): value for key, value in state.items()}


def _plus(width: int) -> dict[str, Tensor]:
    """Tokens of a resampler of the image's patches, under the names of the published files."""
    made = IPAdapterPlusImageProjection(_HIDDEN, width, hidden_dims=8, depth=1, dim_head=4, heads=2, num_queries=2)
    state = redraw(made).state_dict()
    found = {}
    for key, value in state.items():
        if "attn.to_k" in key:
            found["layers.0.0.to_kv.weight"] = torch.cat((value, state[key.replace("to_k", "to_v")]))
        elif "attn.to_v" not in key:
            name = key.replace("attn.to_out.0", "to_out").replace("attn.", "")
            for new, old in (("ln0", "0.norm1"), ("ln1", "0.norm2")):
                name = name.replace(f"0.{new}", f"0.{old}")
            for own, published in (
                ("layers.0.ff.0", "layers.0.1.0"),
                ("layers.0.ff.1.net.0.proj", "layers.0.1.1"),
                ("layers.0.ff.1.net.2", "layers.0.1.3"),
                ("layers.0.to_q", "layers.0.0.to_q"),
                ("layers.0.to_out", "layers.0.0.to_out"),
                ("layers.0.0.norm", "layers.0.0.norm"),
            ):
                name = name.replace(own, published)
            found[name] = value
    return found


def save_adapter(folder: Path, pipeline: DiffusionPipeline, *, plus: bool = False) -> Path:
    """An adapter for this pipeline's network, with its image encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        width = pipeline.unet.config.cross_attention_dim
        tensors = {f"image_proj.{key}": value for key, value in (_plus if plus else _plain)(width).items()}
        names = [name.removesuffix(".processor") for name in pipeline.unet.attn_processors if "attn2" in name]
        for number, name in enumerate(names):
            inner = pipeline.unet.get_submodule(name).to_k.out_features
            for part in ("k", "v"):
                weight = torch.randn(inner, width) * width**-0.5
                tensors[f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"] = weight
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS)
        image_encoder().save_pretrained(folder / ENCODER)
    return folder
