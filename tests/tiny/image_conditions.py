"""Tiny real pipelines that are called with images: diffusers' own classes, small and with random weights.

Components are those of the families without images, with more input channels where an image is joined to the sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLTemporalDecoder,
    CogVideoXImageToVideoPipeline,
    ControlNetModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Transformer3DModel,
    LongCatImageEditPipeline,
    LTXImageToVideoPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInpaintPipeline,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
    WanImageToVideoPipeline,
)
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image
from torch import nn
from transformers import ByT5Tokenizer, CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

from tests.tiny import diffusion, flow, flow_more, published_parts, tokenizers, video
from tests.tiny.base import Tiny, seeded
from tests.tiny.diffusion import redraw

__all__ = ["LARGE", "PIPELINES", "SLOW", "Conditioned", "images_for", "picture"]


@dataclass(frozen=True)
class Conditioned(Tiny):
    """A pipeline that is called with images.

    Attributes:
        images: keywords of the call, and the sides of their images, height and width.
        references: images per sample and keyword, in a list; 0: one, in no list.
        ip_adapter: the image is that of an IP-Adapter, which is no part of the pipeline's folder.
    """

    images: dict[str, tuple[int, int]]
    references: int = 0
    ip_adapter: bool = False


def picture(seed: int, size: tuple[int, int], *, mask: bool = False) -> Image.Image:
    """A smooth picture of a seed; of a mask the right part is white."""
    height, width = size
    if mask:
        columns = np.arange(width)[None].repeat(height, 0)
        return Image.fromarray(((columns > width // (2 + seed % 3)) * 255).astype(np.uint8), "L")
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def images_for(tiny: Conditioned, count: int, first: int = 0) -> dict[str, tuple[Image.Image, ...]]:
    """Images for the keywords of a call with this many samples, all of them different."""
    made = {}
    for name, size in tiny.images.items():
        each = [
            [picture(17 * i + 5 * k + first, size, mask="mask" in name) for k in range(tiny.references or 1)]
            for i in range(count)
        ]
        made[name] = tuple(one if tiny.references else one[0] for one in each)
    return made


def changed(network: nn.Module, **config: object) -> nn.Module:
    """A network of the same class with other settings."""
    return redraw(type(network).from_config(network.config, **config))


def sd_inpaint() -> DiffusionPipeline:
    parts = diffusion.sd1().components
    return StableDiffusionInpaintPipeline(
        **parts | {"unet": changed(parts["unet"], in_channels=9)}, requires_safety_checker=False
    )


def sdxl_inpaint() -> DiffusionPipeline:
    parts = diffusion.sdxl().components
    return StableDiffusionXLInpaintPipeline(**parts | {"unet": changed(parts["unet"], in_channels=9)})


def instruct_pix2pix() -> DiffusionPipeline:
    parts = diffusion.sd1().components
    return StableDiffusionInstructPix2PixPipeline(
        **parts | {"unet": changed(parts["unet"], in_channels=8)}, requires_safety_checker=False
    )


def sd_controlnet() -> DiffusionPipeline:
    parts = diffusion.sd1().components
    controlnet = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8))
    return StableDiffusionControlNetPipeline(**parts, controlnet=redraw(controlnet), requires_safety_checker=False)


def two_controlnets() -> DiffusionPipeline:
    parts = diffusion.sd1().components
    both = [
        redraw(ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8))) for _ in range(2)
    ]
    return StableDiffusionControlNetPipeline(**parts, controlnet=both, requires_safety_checker=False)


def sdxl_controlnet() -> DiffusionPipeline:
    parts = diffusion.sdxl().components
    controlnet = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8))
    return StableDiffusionXLControlNetPipeline(**parts, controlnet=redraw(controlnet))


def sd3_controlnet() -> DiffusionPipeline:
    parts = flow.sd3().components
    controlnet = SD3ControlNetModel.from_config(parts["transformer"].config, num_layers=1, dual_attention_layers=())
    return StableDiffusion3ControlNetPipeline(**parts, controlnet=redraw(controlnet))


def flux_controlnet() -> DiffusionPipeline:
    parts = flow.flux().components
    controlnet = FluxControlNetModel.from_config(parts["transformer"].config)
    return FluxControlNetPipeline(**parts, controlnet=redraw(controlnet))


def flux_parts() -> dict[str, object]:
    return {
        name: part
        for name, part in flow.flux().components.items()
        if name not in ("image_encoder", "feature_extractor")
    }


def flux_kontext() -> DiffusionPipeline:
    return FluxKontextPipeline(**flow.flux().components)


def flux_fill() -> DiffusionPipeline:
    """Packed: latents, latents of the masked image, and the pixels of the mask."""
    parts = flux_parts()
    pixels = 4 * 2 ** (2 * (len(parts["vae"].config.block_out_channels) - 1))
    wide = changed(parts["transformer"], in_channels=16 + 16 + pixels, out_channels=16)
    return FluxFillPipeline(**parts | {"transformer": wide})


def flux_control() -> DiffusionPipeline:
    parts = flux_parts()
    return FluxControlPipeline(
        **parts | {"transformer": changed(parts["transformer"], in_channels=32, out_channels=16)}
    )


def cogvideox_image() -> DiffusionPipeline:
    parts = video.PIPELINES["cogvideox-dpm"].build().components
    return CogVideoXImageToVideoPipeline(**parts | {"transformer": changed(parts["transformer"], in_channels=8)})


def wan_image() -> DiffusionPipeline:
    """Joined: a mask of four channels, and the latents of the first frame, as in Wan 2.1 and 2.2."""
    parts = video.wan_euler().components
    wide = changed(parts["transformer"], in_channels=12)
    return WanImageToVideoPipeline(**parts | {"transformer": wide}, image_encoder=None, image_processor=None)


def wan_image_two() -> DiffusionPipeline:
    """Wan 2.2 A14B: as ``wan_image``, with a network for low noise levels."""
    pipeline = wan_image()
    pipeline.register_modules(transformer_2=wan_image().transformer)
    pipeline.register_to_config(boundary_ratio=0.9)
    return pipeline


def wan_first_frame() -> DiffusionPipeline:
    """Wan 2.2 5B: the first frame is given, and its tokens have the time 0."""
    parts = video.wan_ti2v().components
    redraw(parts["transformer"])
    return WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None, expand_timesteps=True)


def hunyuan_video_image() -> DiffusionPipeline:
    """HunyuanVideo 1.5: joined latents of the first frame and a mask, and the tokens of an image encoder."""
    tokenizer = tokenizers.qwen_vl_tokenizer()
    tokenizer.padding_side = "right"
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        **flow.HEADS,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=1.0,
        text_embed_dim=flow_more.WIDTH,
        text_embed_2_dim=flow_more.WIDTH,
        image_embed_dim=published_parts.VISION,
        rope_axes_dim=flow.AXES,
        # Its call takes no size: this side, with the proportions of the image.
        target_size=16,
        task_type="i2v",
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    return HunyuanVideo15ImageToVideoPipeline(
        transformer=redraw(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        guider=ClassifierFreeGuidance(),
        vae=vae,
        text_encoder=published_parts.qwen_vl_text(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=flow_more.t5(),
        tokenizer_2=ByT5Tokenizer(),
        image_encoder=published_parts.siglip(),
        feature_extractor=published_parts.siglip_images(),
    )


def longcat_edit() -> DiffusionPipeline:
    """LongCat-Image-Edit: the tokens of the image follow those of the sample; its call takes a million pixels."""
    # Their processor of videos, which no image passes, needs torchvision.
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = tokenizers.qwen_vl_tokenizer()
    parts = flow.longcat_image().components | {
        "vae": published_parts.flux_vae(),
        "text_encoder": published_parts.qwen_vl(tokenizer),
        "tokenizer": tokenizer,
        "text_processor": Qwen2VLProcessor(
            image_processor=Qwen2VLImageProcessor(), video_processor=Qwen2VLVideoProcessor(), tokenizer=tokenizer
        ),
    }
    return LongCatImageEditPipeline(**parts)


def ltx_image() -> DiffusionPipeline:
    parts = video.ltx().components | {"scheduler": FlowMatchEulerDiscreteScheduler()}
    redraw(parts["transformer"])
    return LTXImageToVideoPipeline(**parts)


def svd() -> DiffusionPipeline:
    """Frames before channels, continuous timesteps, and an image in place of the prompt."""
    # 32 groups are fixed in the code of the network: those of one channel each would remove the time embedding.
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(64,),
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("CrossAttnUpBlockSpatioTemporal",),
        layers_per_block=1,
        cross_attention_dim=16,
        num_attention_heads=(2,),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "block_out_channels": [32, 32]}
    vae = AutoencoderKLTemporalDecoder(latent_channels=4, layers_per_block=1, **blocks)
    # The pipeline resizes every picture to 224.
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=224,
        patch_size=56,
    )
    scheduler = published_parts.svd_scheduler()
    encoder = CLIPVisionModelWithProjection(config)
    return StableVideoDiffusionPipeline(vae, encoder, redraw(unet), scheduler, CLIPImageProcessorPil())


SIDE = (16, 16)
_FLUX = dict(flow.PIPELINES["flux"].call)
_WAN = dict(video.PIPELINES["wan"].call)
PIPELINES: dict[str, Conditioned] = {
    "sd-inpaint": Conditioned(seeded(sd_inpaint), {}, {"image": (8, 8), "mask_image": (8, 8)}),
    "sdxl-inpaint": Conditioned(seeded(sdxl_inpaint), {}, {"image": (8, 8), "mask_image": (8, 8)}),
    "sd-ip-adapter": Conditioned(diffusion.PIPELINES["sd1"].build, {}, {"ip_adapter_image": (12, 16)}, ip_adapter=True),
    "sdxl-ip-adapter": Conditioned(
        diffusion.PIPELINES["sdxl"].build, {}, {"ip_adapter_image": (12, 16)}, ip_adapter=True
    ),
    "instruct-pix2pix": Conditioned(seeded(instruct_pix2pix), {}, {"image": (8, 8)}),
    "sd-controlnet": Conditioned(seeded(sd_controlnet), {}, {"image": (8, 8)}),
    "two-controlnets": Conditioned(seeded(two_controlnets), {}, {"image": (8, 8)}, 2),
    "sdxl-controlnet": Conditioned(seeded(sdxl_controlnet), {}, {"image": (8, 8)}),
    "sd3-controlnet": Conditioned(seeded(sd3_controlnet), dict(flow.PIPELINES["sd3"].call), {"control_image": SIDE}),
    "flux-controlnet": Conditioned(seeded(flux_controlnet), _FLUX, {"control_image": SIDE}),
    "flux-kontext": Conditioned(
        seeded(flux_kontext), _FLUX | {"max_area": 256, "_auto_resize": False}, {"image": SIDE}
    ),
    # No smaller images are taken.
    "flux2-edit": Conditioned(
        seeded(flow.flux2_klein), dict(flow.PIPELINES["flux2-klein"].call), {"image": (64, 64)}, 2
    ),
    "flux-fill": Conditioned(seeded(flux_fill), _FLUX, {"image": SIDE, "mask_image": SIDE}),
    "flux-control": Conditioned(seeded(flux_control), _FLUX, {"control_image": SIDE}),
    "cogvideox-image": Conditioned(
        seeded(cogvideox_image), dict(video.PIPELINES["cogvideox-dpm"].call), {"image": SIDE}
    ),
    "wan-image": Conditioned(seeded(wan_image), _WAN, {"image": SIDE}),
    "wan-first-frame": Conditioned(seeded(wan_first_frame), _WAN, {"image": SIDE}),
    "svd": Conditioned(seeded(svd), {"num_frames": 2, "height": 8, "width": 8}, {"image": (8, 8)}),
    "ltx-image": Conditioned(seeded(ltx_image), dict(video.PIPELINES["ltx"].call), {"image": SIDE}),
}
# Opened in the same way as ``wan-image``, which takes long.
SLOW = {"wan-image-two": Conditioned(seeded(wan_image_two), _WAN, {"image": SIDE})}
# Their calls have long texts, or enlarge the image to a million pixels.
LARGE: dict[str, Conditioned] = {
    "hunyuan-video-image": Conditioned(seeded(hunyuan_video_image), {"num_frames": 3}, {"image": SIDE}),
    "longcat-edit": Conditioned(seeded(longcat_edit), {}, {"image": (64, 64)}),
}
