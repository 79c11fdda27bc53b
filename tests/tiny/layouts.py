"""Tiny pipelines whose arguments follow the samples in other ways than along the first axis, or not at all."""

from __future__ import annotations

from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    IFPipeline,
    Kandinsky3Pipeline,
    Kandinsky3UNet,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LTXConditionPipeline,
    MotionAdapter,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.models.attention_processor import AttnAddedKVProcessor
from transformers import (
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.tiny.base import Tiny, seeded
from tests.tiny.tokenizers import clip_tokenizer, llama_tokenizer, qwen_tokenizer, t5_tokenizer
from tests.tiny.video import TEXT_WIDTH, clip, ltx, redraw, redrawn, t5


def autoencoder(**settings: object) -> AutoencoderKL:
    return AutoencoderKL(latent_channels=4, norm_num_groups=2, **settings)


def animatediff() -> AnimateDiffPipeline:
    """Every prompt has one row per frame."""
    blocks = (8, 8)
    unet = UNet2DConditionModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=blocks,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=2,
    )
    motion = MotionAdapter(
        block_out_channels=blocks,
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    )
    tokenizer = clip_tokenizer()
    pipeline = AnimateDiffPipeline(
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False),
        vae=autoencoder(block_out_channels=blocks, **_two_blocks()),
        motion_adapter=motion,
        text_encoder=clip(),
        tokenizer=tokenizer,
    )
    redraw(pipeline.unet)
    return pipeline


def _two_blocks() -> dict[str, tuple[str, str]]:
    return {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def bria_fibo() -> BriaFiboPipeline:
    """The embeddings of each layer of the text encoder, in a list."""
    tokenizer = t5_tokenizer()
    encoder = SmolLM3Config(
        # The pipeline has a token of its own, of the released tokenizer, for the empty prompt.
        vocab_size=128256,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    transformer = BriaFiboTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * TEXT_WIDTH,
        text_encoder_dim=TEXT_WIDTH,
        axes_dims_rope=[0, 4, 4],
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.5, 0.0, 0.5, 1.0],
        latents_std=[1.5, 2.0, 2.5, 3.0],
    )
    return BriaFiboPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=SmolLM3ForCausalLM(encoder),
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
    )


def hidream() -> HiDreamImagePipeline:
    """The embeddings of one of its text encoders are [layers, batch, tokens, width]."""
    llama = llama_tokenizer()
    llama.pad_token = llama.eos_token
    encoder = LlamaConfig(
        vocab_size=len(llama), hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[TEXT_WIDTH, TEXT_WIDTH],
        text_emb_dim=2 * TEXT_WIDTH,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=(0, 1),
    )
    clip_config = clip().config
    clip_config.max_position_embeddings = 128
    encoders = [CLIPTextModelWithProjection(clip_config) for _ in range(2)]
    return HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(block_out_channels=(8,) * 4, scaling_factor=0.3611, shift_factor=0.1159, **_four_blocks()),
        text_encoder=encoders[0],
        tokenizer=clip_tokenizer(),
        text_encoder_2=encoders[1],
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=LlamaForCausalLM(encoder),
        tokenizer_4=llama,
        transformer=transformer,
    )


def _four_blocks() -> dict[str, tuple[str, ...]]:
    return {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def kandinsky5() -> Kandinsky5T2VPipeline:
    """Channels of a condition, empty ones here, are joined to the sample; the sample changes in place."""
    tokenizer = clip_tokenizer()
    text = {
        "vocab_size": len(qwen_tokenizer()),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
    }
    vision = {
        "depth": 1,
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
    }
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=TEXT_WIDTH,
        time_dim=16,
        patch_size=(1, 2, 2),
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(2, 2, 4),
        visual_cond=True,
        attention_type="regular",
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return Kandinsky5T2VPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=encoder,
        tokenizer=qwen_tokenizer(),
        text_encoder_2=clip(),
        tokenizer_2=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def ltx_condition() -> LTXConditionPipeline:
    """Every token has a time of its own, with which the stock scheduler steps the other way."""
    return LTXConditionPipeline(**ltx().components | {"scheduler": FlowMatchEulerDiscreteScheduler()})


def deepfloyd_if() -> IFPipeline:
    """The scheduler gets the learned variance, too."""
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        in_channels=3,
        out_channels=6,
        # The norms have 32 groups.
        cross_attention_dim=32,
        encoder_hid_dim=TEXT_WIDTH,
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
    )
    unet.set_attn_processor(AttnAddedKVProcessor())
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        variance_type="learned_range",
    )
    return IFPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )


def kandinsky3() -> Kandinsky3Pipeline:
    """The mask of a prompt is boolean, that of no prompt an integer."""
    unet = Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=4,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(8, 16),
        cross_attention_dim=4,
        encoder_hid_dim=TEXT_WIDTH,
    )
    movq = VQModel(
        # The norms have 32 groups.
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        norm_num_groups=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    pipeline = Kandinsky3Pipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        unet=unet,
        scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True),
        movq=movq,
    )
    redraw(pipeline.unet)
    return pipeline


PIPELINES = {
    "animatediff": Tiny(seeded(animatediff), {"num_frames": 3, "height": 8, "width": 8}),
    "bria-fibo": Tiny(redrawn(bria_fibo), {"height": 32, "width": 32}),
    "deepfloyd-if": Tiny(seeded(deepfloyd_if), {}),
    "hidream": Tiny(redrawn(hidream), {"height": 32, "width": 32}),
    "kandinsky3": Tiny(seeded(kandinsky3), {"height": 16, "width": 16}),
    "kandinsky5": Tiny(redrawn(kandinsky5), {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 8}),
    "ltx-condition": Tiny(redrawn(ltx_condition), {"height": 32, "width": 32, "num_frames": 9}),
}
