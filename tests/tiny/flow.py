"""Tiny text-to-image pipelines of the flow matching families."""

from __future__ import annotations

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from transformers import ByT5Tokenizer

from tests.tiny import flow_more as parts
from tests.tiny import tokenizers
from tests.tiny.base import Tiny, seeded

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
# Of a head's 16 channels: the share of each axis in the rotary embedding.
AXES = (4, 6, 6)


def sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 medium: normalized queries and a block of two attentions."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        **HEADS,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=parts.redraw(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.image_vae(),
        text_encoder=parts.clip(16, projection=True),
        tokenizer=tokenizers.clip_tokenizer(),
        text_encoder_2=parts.clip(16, projection=True),
        tokenizer_2=tokenizers.clip_tokenizer(),
        text_encoder_3=parts.t5(),
        tokenizer_3=tokenizers.t5_tokenizer(),
    )


def _flux(guidance_embeds: bool, scheduler: FlowMatchEulerDiscreteScheduler) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        **HEADS,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=AXES,
    )
    return FluxPipeline(
        transformer=parts.redraw(transformer),
        scheduler=scheduler,
        vae=parts.image_vae(),
        text_encoder=parts.clip(16),
        tokenizer=tokenizers.clip_tokenizer(),
        text_encoder_2=parts.t5(),
        tokenizer_2=tokenizers.t5_tokenizer(),
    )


def flux() -> FluxPipeline:
    return _flux(True, parts.dynamic_shifting())


def flux_schnell() -> FluxPipeline:
    return _flux(False, FlowMatchEulerDiscreteScheduler(shift=1.0))


def _sana(scheduler: FlowMatchEulerDiscreteScheduler | DPMSolverMultistepScheduler) -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        **HEADS,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=8,
    )
    return SanaPipeline(
        transformer=parts.redraw(transformer),
        scheduler=scheduler,
        vae=parts.deep_compression_vae(),
        text_encoder=parts.gemma(),
        tokenizer=tokenizers.gemma_tokenizer(),
    )


def sana() -> SanaPipeline:
    return _sana(FlowMatchEulerDiscreteScheduler(shift=3.0))


def sana_dpm() -> SanaPipeline:
    """Sana with the solver it is published with."""
    return _sana(DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0))


def auraflow() -> AuraFlowPipeline:
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        **HEADS,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    return AuraFlowPipeline(
        transformer=parts.redraw(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=parts.image_vae(),
        text_encoder=parts.umt5(),
        tokenizer=tokenizers.llama_tokenizer(),
    )


def lumina2() -> Lumina2Pipeline:
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=AXES,
        axes_lens=(300, 16, 16),
        cap_feat_dim=32,
    )
    return Lumina2Pipeline(
        transformer=parts.redraw(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=parts.thin_vae(),
        text_encoder=parts.gemma(),
        tokenizer=tokenizers.gemma_tokenizer(),
    )


def lumina_next() -> LuminaPipeline:
    """With a tokenizer that makes no token of the empty prompt."""
    transformer = LuminaNextDiT2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=32,
    )
    tokenizer = tokenizers.gemma_tokenizer()
    tokenizer.add_bos_token = False
    return LuminaPipeline(
        transformer=parts.redraw(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=parts.image_vae(),
        text_encoder=parts.gemma(),
        tokenizer=tokenizer,
    )


def qwen_image() -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, **HEADS, joint_attention_dim=32, axes_dims_rope=AXES
    )
    scheduler = parts.dynamic_shifting(
        shift=1.0, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02, time_shift_type="exponential"
    )
    return QwenImagePipeline(
        transformer=parts.redraw(transformer),
        scheduler=scheduler,
        vae=parts.qwen_vae(),
        text_encoder=parts.qwen_vl(),
        tokenizer=tokenizers.qwen_tokenizer(),
    )


def z_image() -> ZImagePipeline:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=list(AXES),
        axes_lens=[256, 16, 16],
    )
    return ZImagePipeline(
        transformer=parts.redraw(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.image_vae(),
        text_encoder=parts.qwen3(),
        tokenizer=tokenizers.qwen_tokenizer(),
    )


def cogview4() -> CogView4Pipeline:
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        **HEADS,
        text_embed_dim=32,
        time_embed_dim=32,
        condition_dim=8,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return CogView4Pipeline(
        transformer=parts.redraw(transformer),
        scheduler=scheduler,
        vae=parts.image_vae(),
        text_encoder=parts.glm(),
        tokenizer=tokenizers.glm_tokenizer(),
    )


def chroma() -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        **HEADS,
        joint_attention_dim=32,
        axes_dims_rope=AXES,
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=1,
    )
    return ChromaPipeline(
        transformer=parts.redraw(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=parts.image_vae(),
        text_encoder=parts.t5(),
        tokenizer=tokenizers.t5_tokenizer(),
    )


def flux2() -> Flux2Pipeline:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        **HEADS,
        joint_attention_dim=3 * 32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return Flux2Pipeline(
        transformer=parts.redraw(transformer),
        scheduler=parts.dynamic_shifting(),
        vae=parts.flux2_vae(),
        text_encoder=parts.mistral3(),
        # The published one sits in a Pixtral processor, which needs torchvision and adds nothing to a text.
        tokenizer=tokenizers.mistral_tokenizer(SYSTEM_MESSAGE),
    )


def flux2_klein() -> Flux2KleinPipeline:
    """Its latent output is no sample: unpacked, at another scale, and unpatchified."""
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        **HEADS,
        joint_attention_dim=2 * 32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = parts.flux2_vae()
    with torch.no_grad():
        # As in a trained autoencoder; those of a new one change nothing.
        vae.bn.running_mean.normal_(0, 0.3)
        vae.bn.running_var.uniform_(2, 4)
    return Flux2KleinPipeline(
        transformer=parts.redraw(transformer),
        scheduler=parts.dynamic_shifting(),
        vae=vae,
        text_encoder=parts.qwen3_lm(),
        tokenizer=tokenizers.qwen_tokenizer(),
    )


def bria() -> BriaPipeline:
    transformer = BriaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, **HEADS, joint_attention_dim=32, axes_dims_rope=list(AXES)
    )
    return BriaPipeline(
        transformer=parts.redraw(transformer),
        scheduler=parts.dynamic_shifting(),
        vae=parts.image_vae(),
        text_encoder=parts.t5(),
        tokenizer=tokenizers.t5_tokenizer(),
    )


def ovis_image() -> OvisImagePipeline:
    transformer = OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        **HEADS,
        joint_attention_dim=32,
        axes_dims_rope=AXES,
    )
    return OvisImagePipeline(
        transformer=parts.redraw(transformer),
        scheduler=parts.dynamic_shifting(),
        vae=parts.image_vae(),
        text_encoder=parts.qwen3(),
        tokenizer=tokenizers.qwen_tokenizer(),
    )


def longcat_image() -> LongCatImagePipeline:
    transformer = LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        **HEADS,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=list(AXES),
    )
    return LongCatImagePipeline(
        transformer=parts.redraw(transformer),
        scheduler=parts.dynamic_shifting(),
        # The pipeline takes 16 channels for granted.
        vae=parts.image_vae(16),
        text_encoder=parts.qwen_vl(),
        tokenizer=tokenizers.qwen_tokenizer(),
        # Only the rewriting of prompts uses it, and the published one needs torchvision.
        text_processor=tokenizers.qwen_tokenizer(),
    )


def hunyuan_image() -> HunyuanImagePipeline:
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        **HEADS,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=1.0,
        text_embed_dim=32,
        # With a second width the projection of quoted words alone would have millions of weights.
        text_embed_2_dim=None,
        rope_axes_dim=(8, 8),
    )
    return HunyuanImagePipeline(
        transformer=parts.redraw(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=parts.hunyuan_image_vae(),
        text_encoder=parts.qwen_vl(),
        tokenizer=tokenizers.qwen_tokenizer(),
        text_encoder_2=parts.t5(),
        tokenizer_2=ByT5Tokenizer(extra_ids=0),
        guider=AdaptiveProjectedMixGuidance(),
    )


# Of families whose pipeline knows no default of the transformer.
SMALL = {"height": 16, "width": 16}
SHORT = {"max_sequence_length": 32}
SANA = SHORT | {"height": 32, "width": 32, "use_resolution_binning": False, "complex_human_instruction": None}

PIPELINES: dict[str, Tiny] = {
    "sd3": Tiny(seeded(sd3), SHORT),
    "flux": Tiny(seeded(flux), SMALL | SHORT),
    "flux-schnell": Tiny(seeded(flux_schnell), SMALL | SHORT),
    "sana": Tiny(seeded(sana), SANA),
    "sana-dpm": Tiny(seeded(sana_dpm), SANA),
    "auraflow": Tiny(seeded(auraflow), SMALL | SHORT),
    "lumina2": Tiny(seeded(lumina2), {"max_sequence_length": 64, "system_prompt": ""}),
    "lumina-next": Tiny(seeded(lumina_next), SMALL | {"max_sequence_length": 64}),
    "qwen-image": Tiny(seeded(qwen_image), SMALL),
    "z-image": Tiny(seeded(z_image), SMALL | {"max_sequence_length": 64}),
    "cogview4": Tiny(seeded(cogview4), {}),
    "chroma": Tiny(seeded(chroma), SMALL | SHORT),
    "flux2": Tiny(seeded(flux2), SMALL | {"max_sequence_length": 64, "text_encoder_out_layers": [1, 2, 3]}),
    "flux2-klein": Tiny(seeded(flux2_klein), SMALL | {"max_sequence_length": 64, "text_encoder_out_layers": [1, 2]}),
    "bria": Tiny(seeded(bria), SMALL | SHORT),
    "ovis-image": Tiny(seeded(ovis_image), SMALL | SHORT),
    "longcat-image": Tiny(seeded(longcat_image), SMALL | {"enable_prompt_rewrite": False}),
    # Its guider holds the scale of the guidance, the call takes none.
    "hunyuan-image": Tiny(seeded(hunyuan_image), SMALL),
}
