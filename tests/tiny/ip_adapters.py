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
# Names of a resampler's layers in diffusers, and in the published files.
_PUBLISHED = (
    (".ln0.", ".0.norm1."),
    (".ln1.", ".0.norm2."),
    (".attn.to_out.0.", ".0.to_out."),
    (".attn.", ".0."),
    (".ff.0.", ".1.0."),
    (".ff.1.net.0.proj.", ".1.1."),
    (".ff.1.net.2.", ".1.3."),
)


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
    # The loader of diffusers takes four layers with heads of 64 features.
    made = IPAdapterPlusImageProjection(_HIDDEN, width, hidden_dims=8, heads=1, num_queries=2)
    state = redraw(made).state_dict()
    found = {}
    for key, value in state.items():
        if "attn.to_k" in key:
            both = torch.cat((value, state[key.replace("to_k", "to_v")]))
            found[key.replace("attn.to_k", "0.to_kv")] = both
        elif "attn.to_v" not in key:
            for own, published in _PUBLISHED:
                key = key.replace(own, published)
            found[key] = value
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
