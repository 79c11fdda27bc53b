"""Autoencoders, encoders and schedulers with the published configuration of models, and a few channels and layers.

Everything that decides how a pipeline is called is as published: factors of compression, channels of the latents,
statistics, grids of an image encoder, shifts. Only widths and depths are smaller.
"""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.tiny.flow_more import DECODER, WIDTH, redraw

# Channels of the image encoders.
VISION = 16
_VISION = {"hidden_size": VISION, "intermediate_size": VISION, "num_hidden_layers": 2, "num_attention_heads": 2}
# Sections of the rotary embedding of Qwen2.5-VL for a head of 16 channels.
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}


def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """``scheduler/scheduler_config.json`` of black-forest-labs/FLUX.1-dev, -Kontext-dev and -Fill-dev.

    FLUX.2's conversion (scripts/convert_flux2_to_diffusers.py of diffusers) copies it.
    """
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def qwen_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """``scheduler/scheduler_config.json`` of Qwen/Qwen-Image, -Edit and -Edit-2509."""
    return FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def wan_scheduler() -> UniPCMultistepScheduler:
    """As in scripts/convert_wan_to_diffusers.py of diffusers, which made Wan-AI's folders."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )


def cogvideox_scheduler() -> CogVideoXDDIMScheduler:
    """As in scripts/convert_cogvideox_to_diffusers.py of diffusers, with the scale of the 5B models."""
    return CogVideoXDDIMScheduler(
        snr_shift_scale=1.0,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        clip_sample=False,
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )


def ltx_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """As in scripts/convert_ltx_to_diffusers.py of diffusers, version 0.9.0."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )


def svd_scheduler() -> EulerDiscreteScheduler:
    """``scheduler/scheduler_config.json`` of stabilityai/stable-video-diffusion-img2vid-xt."""
    return EulerDiscreteScheduler(
        beta_end=0.012,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        interpolation_type="linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )


def flux_vae() -> AutoencoderKL:
    """FLUX.1's autoencoder: by 8, 16 channels, as in scripts/convert_flux_to_diffusers.py of diffusers."""
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flux2_vae() -> AutoencoderKLFlux2:
    """FLUX.2's autoencoder, the defaults of its class: by 8, 32 channels, in patches of 2 x 2."""
    return AutoencoderKLFlux2(block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=4)


def qwen_vae() -> AutoencoderKLQwenImage:
    """Qwen-Image's autoencoder, the defaults of its class: by 8, 16 channels with their statistics."""
    return AutoencoderKLQwenImage(base_dim=2, num_res_blocks=1)


def wan_vae() -> AutoencoderKLWan:
    """Wan 2.1's autoencoder, the defaults of its class: by 8 and 4 in time, 16 channels with their statistics."""
    return AutoencoderKLWan(base_dim=2, num_res_blocks=1)


def cogvideox_vae() -> AutoencoderKLCogVideoX:
    """CogVideoX's autoencoder: by 8 and 4 in time, 16 channels; the scale of the 5B models."""
    return AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, scaling_factor=0.7
    )


def ltx_vae() -> AutoencoderKLLTXVideo:
    """LTX-Video 0.9.0's autoencoder: by 32 and 8 in time, 128 channels (scripts/convert_ltx_to_diffusers.py)."""
    return AutoencoderKLLTXVideo(
        latent_channels=128,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        patch_size=4,
        scaling_factor=1.0,
    )


def hunyuan_vae() -> AutoencoderKLHunyuanVideo15:
    """HunyuanVideo 1.5's autoencoder, the defaults of its class: by 16 and 4 in time, 32 channels."""
    return AutoencoderKLHunyuanVideo15(block_out_channels=(8, 8, 16, 32, 64), layers_per_block=1)


def svd_vae() -> AutoencoderKLTemporalDecoder:
    """Stable Video Diffusion's autoencoder: by 8, four channels, no compression in time."""
    return AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=0.18215,
    )


def clip_images() -> CLIPImageProcessorPil:
    """The processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K: the center of 224 x 224."""
    return CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224)


def clip_vision() -> CLIPVisionModelWithProjection:
    """laion/CLIP-ViT-H-14-laion2B-s32B-b79K: 224 x 224 in patches of 14, 257 tokens."""
    return redraw(
        CLIPVisionModelWithProjection(CLIPVisionConfig(**_VISION, image_size=224, patch_size=14, projection_dim=VISION))
    )


def siglip_images() -> SiglipImageProcessorPil:
    """The processor of black-forest-labs/FLUX.1-Redux-dev, which HunyuanVideo 1.5 takes: 384 x 384."""
    return SiglipImageProcessorPil(size={"height": 384, "width": 384})


def siglip() -> SiglipVisionModel:
    """SigLIP so400m at 384 x 384 in patches of 14: 729 tokens, a number that HunyuanVideo 1.5's pipeline has fixed."""
    return redraw(SiglipVisionModel(SiglipVisionConfig(**_VISION, image_size=384, patch_size=14)))


def qwen_vl(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL that sees images: in patches of 14, merged by 2 x 2."""
    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    image, video, start, end = tokenizer.convert_tokens_to_ids(list(marks))
    ids = {"image_token_id": image, "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end}
    text = DECODER | _ROPE | {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    text["max_position_embeddings"] = 8192
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    return redraw(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)))


def qwen_vl_text(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLTextModel:
    """The language model of Qwen2.5-VL, whose third hidden state from the end HunyuanVideo 1.5 reads."""
    text = DECODER | _ROPE | {"vocab_size": len(tokenizer), "num_hidden_layers": 3, "max_position_embeddings": 2048}
    return redraw(Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**text, bos_token_id=0, eos_token_id=0)))


def mistral3() -> Mistral3ForConditionalGeneration:
    """Mistral Small 3 with as many layers as FLUX.2's pipeline reads: the states 10, 20 and 30."""
    text = DECODER | {"model_type": "mistral", "head_dim": 16, "num_hidden_layers": 31}
    vision = _VISION | {"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 16, "patch_size": 4}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=500)
    return redraw(Mistral3ForConditionalGeneration(config))


def qwen3() -> Qwen3ForCausalLM:
    """Qwen3 with as many layers as the pipeline of FLUX.2 klein reads: the states 9, 18 and 27."""
    sizes = DECODER | {"vocab_size": 1024, "num_hidden_layers": 28}
    return redraw(Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)))
