"""Tiny real pipelines of the diffusion families: diffusers' own classes, small and with random weights."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    DanceDiffusionPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    IPNDMScheduler,
    LDMPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    TextToVideoSDPipeline,
    UNet1DModel,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    VQModel,
)
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from tests.tiny.base import Tiny, seeded
from tests.tiny.tokenizers import bert_tokenizer, clip_tokenizer, t5_tokenizer

# The schedule of Stable Diffusion 1 and 2 and of SDXL.
SD_SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
# The width of every text encoder.
WIDTH = 8


def redraw(module: nn.Module) -> nn.Module:
    """Draws every parameter anew.

    Several classes start with zero output layers or gates, and then nothing would depend on the time or the text.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim < 2:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
            else:
                # By the number of inputs, so that activations stay near unit size through the layers.
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return module


def clip_encoder(kind: type = CLIPTextModel, projection: int = WIDTH) -> nn.Module:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return redraw(kind(config))


def t5_encoder() -> nn.Module:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=WIDTH,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return redraw(T5EncoderModel(config))


def bert_encoder() -> nn.Module:
    config = BertConfig(
        vocab_size=len(bert_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
    )
    return redraw(BertModel(config))


def image_vae(levels: int = 2, **config: object) -> AutoencoderKL:
    """An autoencoder that shrinks images ``2 ** (levels - 1)`` times."""
    return AutoencoderKL(
        block_out_channels=(4,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=4 * 2 ** (levels - 1),
        **config,
    )


def conditional_unet(**config: object) -> nn.Module:
    """Stable Diffusion's network for 4x4 latents."""
    settings = {
        "sample_size": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
    }
    return redraw(UNet2DConditionModel(**settings | config))


def stable_diffusion(scheduler: object) -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=image_vae(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=conditional_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd1() -> DiffusionPipeline:
    return stable_diffusion(PNDMScheduler(**SD_SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False))


def sd2() -> DiffusionPipeline:
    schedule = DDIMScheduler(**SD_SCHEDULE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
    return stable_diffusion(schedule)


def xl_unet(time_ids: int, cross_attention_dim: int) -> nn.Module:
    """SDXL's network: its time embedding also takes the pooled text and ``time_ids`` numbers on the picture's size."""
    return conditional_unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * time_ids + WIDTH,
        cross_attention_dim=cross_attention_dim,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def sdxl() -> DiffusionPipeline:
    return StableDiffusionXLPipeline(
        vae=image_vae(scaling_factor=0.13025),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        # As OpenCLIP does it.
        tokenizer_2=clip_tokenizer(pad_token="!"),
        # The two encoders' outputs side by side.
        unet=xl_unet(time_ids=6, cross_attention_dim=2 * WIDTH),
        scheduler=EulerDiscreteScheduler(**SD_SCHEDULE, timestep_spacing="leading"),
    )


def sdxl_refiner() -> DiffusionPipeline:
    return StableDiffusionXLImg2ImgPipeline(
        vae=image_vae(scaling_factor=0.13025),
        text_encoder=None,
        text_encoder_2=clip_encoder(CLIPTextModelWithProjection),
        tokenizer=None,
        tokenizer_2=clip_tokenizer(pad_token="!"),
        unet=xl_unet(time_ids=5, cross_attention_dim=WIDTH),
        scheduler=EulerDiscreteScheduler(**SD_SCHEDULE, timestep_spacing="leading"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    )


def dit() -> DiffusionPipeline:
    labels = {number: f"thing {number}, alias {number}" for number in range(10)}
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        # DiTPipeline has the number of the null class written in it: 1000, the row after ImageNet's classes.
        num_embeds_ada_norm=1000,
    )
    pipeline = DiTPipeline(
        transformer=redraw(transformer), vae=image_vae(), scheduler=DDIMScheduler(clip_sample=False), id2label=labels
    )
    # The published DiT has its labels in model_index.json; the class itself doesn't save them.
    pipeline.register_to_config(id2label={str(number): names for number, names in labels.items()})
    return pipeline


def ldm() -> DiffusionPipeline:
    vqvae = VQModel(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        num_vq_embeddings=16,
        norm_num_groups=2,
        sample_size=8,
    )
    unet = UNet2DModel(
        sample_size=4,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    schedule = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, clip_sample=False)
    return LDMPipeline(vqvae=vqvae, unet=redraw(unet), scheduler=schedule)


def pixart(kind: type) -> DiffusionPipeline:
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=4,
        patch_size=2,
        caption_channels=WIDTH,
    )
    return kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=image_vae(),
        transformer=redraw(transformer),
        scheduler=DPMSolverMultistepScheduler(),
    )


def pixart_alpha() -> DiffusionPipeline:
    return pixart(PixArtAlphaPipeline)


def pixart_sigma() -> DiffusionPipeline:
    return pixart(PixArtSigmaPipeline)


def hunyuan_dit() -> DiffusionPipeline:
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        hidden_size=16,
        in_channels=4,
        patch_size=2,
        sample_size=4,
        # The fewest with a skip connection.
        num_layers=4,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=8,
    )
    schedule = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.02,
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )
    return HunyuanDiTPipeline(
        # The pipeline's rotary embedding takes it for granted that the autoencoder shrinks eight times.
        vae=image_vae(levels=4),
        text_encoder=bert_encoder(),
        tokenizer=bert_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=redraw(transformer),
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def unet1d() -> DiffusionPipeline:
    unet = UNet1DModel(
        sample_size=16,
        sample_rate=16,
        # An attention head has 32 channels.
        block_out_channels=(32, 32),
        # The time embedding is appended to the input's channels.
        time_embedding_dim=16,
        extra_in_channels=16,
        down_block_types=("DownBlock1DNoSkip", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1DNoSkip"),
    )
    return DanceDiffusionPipeline(unet=redraw(unet), scheduler=IPNDMScheduler())


def text_to_video() -> DiffusionPipeline:
    unet = UNet3DConditionModel(
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
    )
    return TextToVideoSDPipeline(
        vae=image_vae(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=redraw(unet),
        scheduler=DDIMScheduler(**SD_SCHEDULE, clip_sample=False, set_alpha_to_one=False),
    )


def cogview3() -> DiffusionPipeline:
    transformer = CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=WIDTH,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=4,
    )
    schedule = CogVideoXDDIMScheduler(
        **SD_SCHEDULE | {"steps_offset": 0},
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return CogView3PlusPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=image_vae(),
        transformer=redraw(transformer),
        scheduler=schedule,
    )


# The sizes that a pipeline takes from its network by itself aren't repeated here.
PIPELINES: dict[str, Tiny] = {
    "sd1": Tiny(seeded(sd1), {}),
    "sd2": Tiny(seeded(sd2), {}),
    "sdxl": Tiny(seeded(sdxl), {}),
    # Takes an image too.
    "sdxl-refiner": Tiny(seeded(sdxl_refiner), {}),
    "dit": Tiny(seeded(dit), {}),
    "ldm": Tiny(seeded(ldm), {}),
    "pixart-alpha": Tiny(
        seeded(pixart_alpha), {"max_sequence_length": 32, "use_resolution_binning": False, "clean_caption": False}
    ),
    "pixart-sigma": Tiny(
        seeded(pixart_sigma), {"max_sequence_length": 32, "use_resolution_binning": False, "clean_caption": False}
    ),
    "hunyuan-dit": Tiny(seeded(hunyuan_dit), {"use_resolution_binning": False}),
    "unet1d": Tiny(seeded(unet1d), {}),
    "text-to-video": Tiny(seeded(text_to_video), {"num_frames": 2}),
    "cogview3": Tiny(seeded(cogview3), {"max_sequence_length": 32}),
}
