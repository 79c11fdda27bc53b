"""The parts that the tiny flow matching pipelines share: autoencoders, text encoders, and how to draw weights."""

from __future__ import annotations

from typing import TypeVar

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

Module = TypeVar("Module", bound=torch.nn.Module)

# Of every text encoder and denoiser: two heads of 16 channels.
WIDTH = 32
DECODER = {
    "vocab_size": 512,
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}


@torch.no_grad()
def redraw(module: Module) -> Module:
    """Draws every parameter anew: many classes start with gates and output layers of zeros, which hide the inputs."""
    for name, value in module.named_parameters():
        if value.ndim > 1:
            value.normal_(0, 1.25 * value[0].numel() ** -0.5)
            continue
        value.normal_(0, 0.2)
        if "norm" in name and name.endswith("weight"):
            # Large queries and keys make attention sharp, or it would average the letters of every prompt alike.
            value += 2 if "norm_q" in name or "norm_k" in name else 1
    return module


def dynamic_shifting(**changes: object) -> FlowMatchEulerDiscreteScheduler:
    """The schedule of FLUX.1-dev, whose shift grows with the number of image tokens."""
    config = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    return FlowMatchEulerDiscreteScheduler(**(config | changes))


def image_vae(latent_channels: int = 4) -> AutoencoderKL:
    """The image autoencoder of most families; like all of them here it halves height and width."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=latent_channels,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def thin_vae() -> AutoencoderKL:
    """An image autoencoder by 8 without attention, for pipelines that take that factor for granted."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def deep_compression_vae() -> AutoencoderDC:
    """Sana's autoencoder, by 4."""
    return AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.41407,
    )


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 1.5, 2.0, 0.5],
    )


def flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )


def hunyuan_image_vae() -> AutoencoderKLHunyuanImage:
    return AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        # Its normalization has 32 groups.
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.75,
    )


def clip(width: int, projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """CLIP's text encoder for ``clip_tokenizer``."""
    config = CLIPTextConfig(
        vocab_size=514,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
    )
    return redraw((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def t5() -> T5EncoderModel:
    return redraw(
        T5EncoderModel(T5Config(vocab_size=128, d_model=WIDTH, d_kv=16, d_ff=WIDTH, num_layers=1, num_heads=2))
    )


def umt5() -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=512, d_model=WIDTH, d_kv=16, d_ff=WIDTH, num_layers=1, num_heads=2)
    return redraw(UMT5EncoderModel(config))


def gemma() -> Gemma2Model:
    return redraw(Gemma2Model(Gemma2Config(**DECODER, head_dim=16, query_pre_attn_scalar=16)))


def glm() -> GlmModel:
    return redraw(GlmModel(GlmConfig(**DECODER, head_dim=16, eos_token_id=0)))


def qwen3() -> Qwen3Model:
    return redraw(Qwen3Model(Qwen3Config(**DECODER, head_dim=16)))


def qwen3_lm() -> Qwen3ForCausalLM:
    """Qwen3 with the head of a language model, whose hidden states are used."""
    return redraw(Qwen3ForCausalLM(Qwen3Config(**DECODER | {"vocab_size": 1024}, head_dim=16)))


def qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with a vision tower that no text ever reaches."""
    text = DECODER | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    text |= {"bos_token_id": 0, "eos_token_id": 0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    ids = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return redraw(Qwen2_5_VLForConditionalGeneration(config))


def mistral3() -> Mistral3ForConditionalGeneration:
    """Mistral 3 with a vision tower that no text ever reaches."""
    text = DECODER | {"model_type": "mistral", "head_dim": 16, "num_hidden_layers": 3}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=500)
    return redraw(Mistral3ForConditionalGeneration(config))
