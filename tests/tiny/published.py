"""Pipelines with the published configuration of models that are called with images, at a small width and depth.

A folder of each has everything of the published one that decides how its pipeline is called, with random weights, and a
network with one head and one block of each kind. ``config`` is the published configuration of the network: on the
device ``meta`` it has the published number of parameters and no memory.

Sources are the scripts that wrote the published folders (``scripts/convert_*_to_diffusers.py`` of diffusers), and the
defaults of diffusers' classes where these scripts take them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    CogVideoXImageToVideoPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Transformer3DModel,
    LTXImageToVideoPipeline,
    LTXVideoTransformer3DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from transformers import ByT5Tokenizer

from tests.tiny import flow_more, tokenizers
from tests.tiny import published_parts as parts
from tests.tiny.base import seeded

__all__ = ["MODELS", "Published"]

# Width of the text encoders.
TEXT = flow_more.WIDTH


@dataclass(frozen=True)
class Published:
    """A model with the published configuration of its pipeline.

    Attributes:
        model: its id on the Hub.
        recipe: the recipe for it.
        network: the class of its network.
        config: the published configuration of the network, where it is not the class's default.
        reduced: what the small network has otherwise: depth, heads, and widths of texts.
        parts: makes the pipeline of a network.
        settings: changes of the recipe for this model, as after ``--set``.
        small: further changes, to a size for tests.
        resolution: what the small network has otherwise where it, and no setting, decides the size of a sample.
    """

    model: str
    recipe: str
    network: type[torch.nn.Module]
    config: dict[str, Any]
    reduced: dict[str, Any]
    parts: Callable[[torch.nn.Module], DiffusionPipeline]
    settings: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    resolution: dict[str, Any] = field(default_factory=dict)

    def build(self, *, small: bool = True) -> DiffusionPipeline:
        """Return the pipeline, the same one every time.

        Args:
            small: of a size for tests, where the network decides the size.
        """
        config = self.config | self.reduced | (self.resolution if small else {})
        return seeded(lambda: self.parts(flow_more.redraw(self.network(**config))))()

    def full_network(self) -> torch.nn.Module:
        """Return the network at its published size, without memory."""
        with torch.device("meta"):
            return self.network(**self.config)


def flux_parts(network: torch.nn.Module) -> dict[str, object]:
    return {
        "transformer": network,
        "scheduler": parts.flux_scheduler(),
        "vae": parts.flux_vae(),
        "text_encoder": flow_more.clip(16),
        "tokenizer": tokenizers.clip_tokenizer(),
        "text_encoder_2": flow_more.t5(),
        "tokenizer_2": tokenizers.t5_tokenizer(),
    }


def flux2(network: torch.nn.Module) -> DiffusionPipeline:
    return Flux2Pipeline(
        transformer=network,
        scheduler=parts.flux_scheduler(),
        vae=parts.flux2_vae(),
        text_encoder=parts.mistral3(),
        # The published one is a Pixtral processor, which needs torchvision and adds nothing to a text.
        tokenizer=tokenizers.mistral_tokenizer(SYSTEM_MESSAGE),
    )


def flux2_klein(network: torch.nn.Module) -> DiffusionPipeline:
    return Flux2KleinPipeline(
        transformer=network,
        scheduler=parts.flux_scheduler(),
        vae=parts.flux2_vae(),
        text_encoder=parts.qwen3(),
        tokenizer=tokenizers.qwen_tokenizer(),
        is_distilled=False,
    )


def qwen_edit(kind: type[DiffusionPipeline]) -> Callable[[torch.nn.Module], DiffusionPipeline]:
    def make(network: torch.nn.Module) -> DiffusionPipeline:
        # Their processor of videos, which no image passes, needs torchvision.
        from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

        tokenizer = tokenizers.qwen_vl_tokenizer()
        return kind(
            transformer=network,
            scheduler=parts.qwen_scheduler(),
            vae=parts.qwen_vae(),
            text_encoder=parts.qwen_vl(tokenizer),
            tokenizer=tokenizer,
            processor=Qwen2VLProcessor(
                image_processor=Qwen2VLImageProcessor(),
                video_processor=Qwen2VLVideoProcessor(),
                tokenizer=tokenizer,
                chat_template=tokenizer.chat_template,
            ),
        )

    return make


def wan(network: torch.nn.Module) -> DiffusionPipeline:
    return WanImageToVideoPipeline(
        transformer=network,
        scheduler=parts.wan_scheduler(),
        vae=parts.wan_vae(),
        text_encoder=flow_more.umt5(),
        tokenizer=tokenizers.t5_tokenizer(),
        image_encoder=parts.clip_vision(),
        image_processor=parts.clip_images(),
    )


def cogvideox(network: torch.nn.Module) -> DiffusionPipeline:
    return CogVideoXImageToVideoPipeline(
        transformer=network,
        scheduler=parts.cogvideox_scheduler(),
        vae=parts.cogvideox_vae(),
        text_encoder=flow_more.t5(),
        tokenizer=tokenizers.t5_tokenizer(),
    )


def ltx(network: torch.nn.Module) -> DiffusionPipeline:
    return LTXImageToVideoPipeline(
        transformer=network,
        scheduler=parts.ltx_scheduler(),
        vae=parts.ltx_vae(),
        text_encoder=flow_more.t5(),
        tokenizer=tokenizers.t5_tokenizer(),
    )


def hunyuan_video(network: torch.nn.Module) -> DiffusionPipeline:
    tokenizer = tokenizers.qwen_vl_tokenizer()
    tokenizer.padding_side = "right"
    return HunyuanVideo15ImageToVideoPipeline(
        transformer=network,
        # scripts/convert_hunyuan_video1_5_to_diffusers.py: SCHEDULER_CONFIGS and GUIDANCE_CONFIGS of 480p_i2v.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        vae=parts.hunyuan_vae(),
        text_encoder=parts.qwen_vl_text(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=flow_more.t5(),
        tokenizer_2=ByT5Tokenizer(),
        image_encoder=parts.siglip(),
        feature_extractor=parts.siglip_images(),
    )


def svd(network: torch.nn.Module) -> DiffusionPipeline:
    return StableVideoDiffusionPipeline(
        unet=network,
        scheduler=parts.svd_scheduler(),
        vae=parts.svd_vae(),
        image_encoder=parts.clip_vision(),
        feature_extractor=parts.clip_images(),
    )


ONE_HEAD = {"num_attention_heads": 1, "num_layers": 1}
# Depth, heads, and the widths of T5 and CLIP. A head has the published 128 channels, which its rotary axes share.
SMALL_FLUX = ONE_HEAD | {"num_single_layers": 1, "joint_attention_dim": TEXT, "pooled_projection_dim": 16}
SMALL_QWEN = ONE_HEAD | {"joint_attention_dim": TEXT}
# scripts/convert_flux2_to_diffusers.py: get_flux2_transformer_config.
FLUX2_DEV = {
    "patch_size": 1,
    "in_channels": 128,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": (32, 32, 32, 32),
    "rope_theta": 2000,
    "eps": 1e-6,
}
FLUX2_KLEIN_4B = FLUX2_DEV | {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
# scripts/convert_wan_to_diffusers.py: get_transformer_config, Wan-I2V-14B-480p.
WAN_I2V_14B = {
    "image_dim": 1280,
    "added_kv_proj_dim": 5120,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "in_channels": 36,
    "num_attention_heads": 40,
    "num_layers": 40,
    "out_channels": 16,
    "patch_size": (1, 2, 2),
    "qk_norm": "rms_norm_across_heads",
    "text_dim": 4096,
}
# scripts/convert_cogvideox_to_diffusers.py: convert_transformer and get_transformer_init_kwargs, version 1.0, I2V; the
# numbers of layers and heads of the 5B models are in its comments.
COGVIDEOX_5B_I2V = {
    "in_channels": 32,
    "num_layers": 42,
    "num_attention_heads": 48,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
    "ofs_embed_dim": None,
    "patch_size": 2,
    "patch_size_t": None,
    "patch_bias": True,
    "sample_height": 60,
    "sample_width": 90,
    "sample_frames": 49,
}
# scripts/convert_ltx_to_diffusers.py: get_transformer_config, before 0.9.7.
LTX_2B = {
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "patch_size_t": 1,
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "cross_attention_dim": 2048,
    "num_layers": 28,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
    "attention_bias": True,
    "attention_out_bias": True,
}
SQUARE = ("pipeline={height: 64, width: 64}", "prompts.image_size=[64, 64]")
VIDEO = ("pipeline={height: 64, width: 96, num_frames: 9}", "prompts.image_size=[64, 96]")

MODELS: dict[str, Published] = {
    # scripts/convert_flux_to_diffusers.py: the class's defaults, and an embedded guidance scale.
    "flux-kontext": Published(
        "black-forest-labs/FLUX.1-Kontext-dev",
        "edit",
        FluxTransformer2DModel,
        {"guidance_embeds": True},
        SMALL_FLUX,
        lambda network: FluxKontextPipeline(**flux_parts(network)),
        # Its call enlarges an image to a million pixels.
        small=("pipeline={height: 64, width: 64, max_area: 4096, _auto_resize: false}", "prompts.image_size=[64, 64]"),
    ),
    # 64 channels of packed latents, 64 of the masked image, and 256 of a mask in pixels: --in_channels and
    # --out_channels of scripts/convert_flux_to_diffusers.py.
    "flux-fill": Published(
        "black-forest-labs/FLUX.1-Fill-dev",
        "edit",
        FluxTransformer2DModel,
        {"guidance_embeds": True, "in_channels": 384, "out_channels": 64},
        SMALL_FLUX,
        lambda network: FluxFillPipeline(**flux_parts(network)),
        settings=("prompts.images={image: source, mask_image: mask}", "guidance.scale=30"),
        small=SQUARE,
    ),
    "flux2-dev": Published(
        "black-forest-labs/FLUX.2-dev",
        "edit",
        Flux2Transformer2DModel,
        FLUX2_DEV,
        ONE_HEAD | {"num_single_layers": 1, "joint_attention_dim": 3 * TEXT},
        flux2,
        settings=("guidance.scale=4",),
        small=SQUARE,
    ),
    "flux2-klein": Published(
        "black-forest-labs/FLUX.2-klein-base-4B",
        "edit",
        Flux2Transformer2DModel,
        FLUX2_KLEIN_4B,
        ONE_HEAD | {"num_single_layers": 1, "joint_attention_dim": 3 * TEXT},
        flux2_klein,
        settings=("guidance.scale=4", "student.regression_steps=1000"),
        small=SQUARE,
    ),
    # The class's defaults, which are those of transformer/config.json.
    "qwen-edit": Published(
        "Qwen/Qwen-Image-Edit",
        "edit",
        QwenImageTransformer2DModel,
        {},
        SMALL_QWEN,
        qwen_edit(QwenImageEditPipeline),
        settings=("guidance.scale=4", "student.regression_steps=1000"),
        small=SQUARE,
    ),
    "qwen-edit-plus": Published(
        "Qwen/Qwen-Image-Edit-2509",
        "edit",
        QwenImageTransformer2DModel,
        {},
        SMALL_QWEN,
        qwen_edit(QwenImageEditPlusPipeline),
        settings=("guidance.scale=4", "student.regression_steps=1000"),
        small=SQUARE,
    ),
    "wan": Published(
        "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
        "image-to-video",
        WanTransformer3DModel,
        WAN_I2V_14B,
        ONE_HEAD | {"added_kv_proj_dim": 128, "image_dim": parts.VISION, "ffn_dim": 32, "text_dim": TEXT},
        wan,
        small=VIDEO,
    ),
    "cogvideox": Published(
        "zai-org/CogVideoX-5b-I2V",
        "image-to-video",
        CogVideoXTransformer3DModel,
        COGVIDEOX_5B_I2V,
        ONE_HEAD | {"text_embed_dim": TEXT},
        cogvideox,
        settings=(
            "pipeline={height: 480, width: 720, num_frames: 49}",
            "prompts.image_size=[480, 720]",
            "guidance.scale=6",
        ),
        small=VIDEO,
        resolution={"sample_height": 8, "sample_width": 12, "sample_frames": 9},
    ),
    "ltx": Published(
        "Lightricks/LTX-Video",
        "image-to-video",
        LTXVideoTransformer3DModel,
        LTX_2B,
        ONE_HEAD | {"cross_attention_dim": 64, "caption_channels": TEXT},
        ltx,
        settings=("guidance.scale=3",),
        small=VIDEO,
    ),
    # scripts/convert_hunyuan_video1_5_to_diffusers.py: TRANSFORMER_CONFIGS of 480p_i2v_distilled, which share their
    # network with 480p_i2v; else the class's defaults.
    "hunyuan-video-1.5": Published(
        "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_i2v",
        "image-to-video",
        HunyuanVideo15Transformer3DModel,
        {"target_size": 640, "task_type": "i2v"},
        ONE_HEAD
        | {"num_refiner_layers": 1, "text_embed_dim": TEXT, "text_embed_2_dim": TEXT, "image_embed_dim": parts.VISION},
        hunyuan_video,
        settings=("pipeline={num_frames: 121}", "prompts.image_size=[480, 848]", "guidance.scale=6"),
        small=("pipeline={num_frames: 5}",),
        resolution={"target_size": 64},
    ),
    # scripts/convert_svd_to_diffusers.py; the class's defaults are those of the model of 25 frames.
    "svd": Published(
        "stabilityai/stable-video-diffusion-img2vid-xt",
        "image-to-video",
        UNetSpatioTemporalConditionModel,
        {"sample_size": 96},
        {
            "block_out_channels": (32, 32, 32, 32),
            "num_attention_heads": (1, 1, 1, 1),
            "layers_per_block": 1,
            "cross_attention_dim": parts.VISION,
        },
        svd,
        settings=(
            "pipeline={height: 576, width: 1024, num_frames: 25}",
            "prompts.image_size=[576, 1024]",
            "prompts.column=null",
            "guidance.scale=3",
        ),
        small=("pipeline={height: 64, width: 128, num_frames: 3}", "prompts.image_size=[64, 128]"),
    ),
}
