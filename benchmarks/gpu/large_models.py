"""Pipelines of published sizes with random weights, created on the device and saved in half precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.tiny import diffusion, flow
from tests.tiny.diffusion import SD_SCHEDULE, redraw
from tests.tiny.tokenizers import clip_tokenizer, t5_tokenizer

__all__ = ["MODELS", "Model", "build"]

# Width, width of the feed-forward layers, layers, heads: CLIP's ViT-L/14 and OpenCLIP's ViT-bigG/14.
CLIP_L = (768, 3072, 12, 12)
CLIP_G = (1280, 5120, 32, 20)
VOCABULARY = 49408


@dataclass(frozen=True)
class Model:
    """A model of a published size.

    Attributes:
        make: creates the pipeline in its published configuration.
        tiny: the same classes with a few thousand weights.
        disk: bytes of the saved pipeline.
        sides: of the images that it is trained on; 512 first, the size whose memory is estimated on the CPU in time.
        batch: of a training step.
    """

    title: str
    make: Callable[[], DiffusionPipeline]
    tiny: Callable[[], DiffusionPipeline]
    disk: int
    sides: tuple[int, ...]
    batch: int


def encoder(sizes: tuple[int, int, int, int], kind: type, act: str) -> torch.nn.Module:
    """Return a text encoder of the published size, with a tokenizer of single letters."""
    width, feed_forward, layers, heads = sizes
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def autoencoder(channels: int, **config: Any) -> AutoencoderKL:
    """Return an autoencoder with eight times smaller latents, as in Stable Diffusion."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **config,
    )


def scheduler(kind: type, **config: Any) -> Any:
    """Return a scheduler on the CPU, wherever the networks are: NumPy reads its tables."""
    with torch.device("cpu"):
        return kind(**config)


def sd15() -> DiffusionPipeline:
    """Create Stable Diffusion 1.5: the defaults of diffusers except for the width of the text."""
    return StableDiffusionPipeline(
        vae=autoencoder(4, sample_size=512),
        text_encoder=encoder(CLIP_L, CLIPTextModel, "quick_gelu"),
        tokenizer=clip_tokenizer(),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=scheduler(DDIMScheduler, **SD_SCHEDULE, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> DiffusionPipeline:
    """Create Stable Diffusion XL."""
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return StableDiffusionXLPipeline(
        vae=autoencoder(4, sample_size=1024, scaling_factor=0.13025),
        text_encoder=encoder(CLIP_L, CLIPTextModel, "quick_gelu"),
        text_encoder_2=encoder(CLIP_G, CLIPTextModelWithProjection, "gelu"),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        unet=unet,
        scheduler=scheduler(EulerDiscreteScheduler, **SD_SCHEDULE, timestep_spacing="leading"),
    )


def t5() -> torch.nn.Module:
    """Return an encoder with the published width of T5."""
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 256, "num_layers": 1, "num_heads": 1}
    return T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), feed_forward_proj="gated-gelu", **sizes))


def sd3() -> DiffusionPipeline:
    """Create Stable Diffusion 3 medium with one layer of T5: only the transformer is timed.

    A saved pipeline without a third encoder opens only where None is passed for it.
    """
    transformer = SD3Transformer2DModel(
        sample_size=128,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler(FlowMatchEulerDiscreteScheduler, shift=3.0),
        vae=autoencoder(
            16,
            sample_size=1024,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=encoder(CLIP_L, CLIPTextModelWithProjection, "quick_gelu"),
        tokenizer=clip_tokenizer(),
        text_encoder_2=encoder(CLIP_G, CLIPTextModelWithProjection, "gelu"),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
    )


MODELS = {
    "sd15": Model("SD 1.5", sd15, diffusion.sd1, 3 * 2**30, (512,), 8),
    "sd3": Model("flow transformer, 2B", sd3, flow.sd3, 7 * 2**30, (512, 1024), 4),
    "sdxl": Model("SDXL", sdxl, diffusion.sdxl, 8 * 2**30, (512, 1024), 4),
}


def build(name: str, folder: Path, device: str, *, tiny: bool) -> dict[str, int]:
    """Save a pipeline, and return its numbers of parameters by component."""
    torch.manual_seed(0)
    if tiny:
        pipeline = MODELS[name].tiny()
    else:
        # Initialization takes seconds on a GPU, minutes on a CPU.
        with torch.device(device):
            pipeline = MODELS[name].make()
    counts = {}
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            # With zero output layers, nothing would depend on the time or the text.
            redraw(module.to(device))
            counts[part] = sum(parameter.numel() for parameter in module.parameters())
            if not tiny:
                module.half()
    pipeline.save_pretrained(folder)
    return counts
