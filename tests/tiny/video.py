"""Tiny text-to-video and text-to-audio pipelines: diffusers' own classes with random weights and latents of 4x4."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import (
    AceStepConditionEncoder,
    AceStepPipeline,
    AceStepTransformer1DModel,
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKL,
    AutoencoderKLAllegro,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    AutoencoderOobleck,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LattePipeline,
    LatteTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SchedulerMixin,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny.base import Tiny, seeded
from tests.tiny.tokenizers import clip_tokenizer, hunyuan_video_tokenizer, qwen_tokenizer, t5_tokenizer

TEXT_WIDTH = 16
TEXT_LENGTH = 32


def redraw(network: torch.nn.Module) -> None:
    """Draws every weight anew: projections and modulations that start at zero would hide time and text."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:  # The scales of norms stay near one, Fourier frequencies keep their spread.
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def redrawn(make: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    """The same pipeline every time, its transformers drawn anew."""

    def build() -> DiffusionPipeline:
        pipeline = make()
        for name in ("transformer", "transformer_2"):
            if getattr(pipeline, name, None) is not None:
                redraw(getattr(pipeline, name))
        return pipeline

    return seeded(build)


def t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(**_t5_shape()))


def umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(**_t5_shape()))


def _t5_shape() -> dict[str, object]:
    size = {"d_model": TEXT_WIDTH, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 1}
    return {"vocab_size": len(t5_tokenizer()), "feed_forward_proj": "gated-gelu", **size}


def clip() -> CLIPTextModel:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def llama(vocab_size: int) -> LlamaModel:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=3,  # HunyuanVideo reads the third state from the end, which a layer has to come before.
        pad_token_id=3,
        initializer_range=0.3,
    )
    return LlamaModel(config)


def wan(scheduler: SchedulerMixin) -> WanPipeline:
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.5, 0.0, 0.5, 1.0],
        latents_std=[1.5, 2.0, 2.5, 3.0],
    )
    return WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=umt5(), vae=vae, scheduler=scheduler, transformer=transformer
    )


def wan_euler() -> WanPipeline:
    return wan(FlowMatchEulerDiscreteScheduler(shift=3.0))


def wan_ti2v() -> WanPipeline:
    pipeline = wan(UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0))
    pipeline.register_to_config(expand_timesteps=True)
    return pipeline


def wan_two() -> WanPipeline:
    """One network for the high noise levels and one for the low."""
    pipeline = wan_unipc()
    pipeline.register_modules(transformer_2=wan_unipc().transformer)
    pipeline.register_to_config(boundary_ratio=0.875)
    return pipeline


def wan_unipc() -> WanPipeline:
    return wan(UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0))


def ltx() -> LTXPipeline:
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=TEXT_WIDTH,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        patch_size=1,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return LTXPipeline(
        scheduler=scheduler, vae=vae, text_encoder=t5(), tokenizer=t5_tokenizer(), transformer=transformer
    )


def cogvideox(scheduler: type[SchedulerMixin], snr_shift_scale: float, rotary: bool) -> CogVideoXPipeline:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=TEXT_LENGTH,
        use_rotary_positional_embeddings=rotary,
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    schedule = scheduler(
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        snr_shift_scale=snr_shift_scale,
    )
    return CogVideoXPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5(), vae=vae, transformer=transformer, scheduler=schedule
    )


def cogvideox_2b() -> CogVideoXPipeline:
    return cogvideox(CogVideoXDDIMScheduler, snr_shift_scale=3.0, rotary=False)


def cogvideox_5b() -> CogVideoXPipeline:
    return cogvideox(CogVideoXDPMScheduler, snr_shift_scale=1.0, rotary=True)


def hunyuan_video() -> HunyuanVideoPipeline:
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        rope_axes_dim=(2, 4, 4),
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    tokenizer = hunyuan_video_tokenizer()
    return HunyuanVideoPipeline(
        text_encoder=llama(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip(),
        tokenizer_2=clip_tokenizer(),
    )


def mochi() -> MochiPipeline:
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=16,
        max_sequence_length=TEXT_LENGTH,
    )
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=transformer,
    )


def audio_vae() -> AutoencoderOobleck:
    return AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=4,
    )


def stable_audio() -> StableAudioPipeline:
    transformer = StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=TEXT_WIDTH,
        cross_attention_input_dim=TEXT_WIDTH,
        global_states_input_dim=2 * TEXT_WIDTH,
        time_proj_dim=16,
    )
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = TEXT_LENGTH  # The pipeline pads to it and has no argument for it.
    # The released repository's CosineDPMSolverMultistepScheduler wants torchsde: these are its levels of noise and its
    # way of scaling, the network is only told the level's logarithm and not its arc tangent.
    scheduler = EDMDPMSolverMultistepScheduler(
        sigma_min=0.3, sigma_max=500, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
    )
    return StableAudioPipeline(
        vae=audio_vae(),
        text_encoder=t5(),
        projection_model=StableAudioProjectionModel(TEXT_WIDTH, TEXT_WIDTH, min_value=0, max_value=8),
        tokenizer=tokenizer,
        transformer=transformer,
        scheduler=scheduler,
    )


def image_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )


def allegro() -> AllegroPipeline:
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=4,
        sample_height=4,
        sample_frames=2,
        caption_channels=TEXT_WIDTH,
    )
    vae = AutoencoderKLAllegro(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2)
    return AllegroPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae,
        transformer=transformer,
        scheduler=EulerAncestralDiscreteScheduler(),
    )


def latte() -> LattePipeline:
    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,  # The second half is a variance, which the pipeline drops.
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=4,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT_WIDTH,
        video_length=2,
    )
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    return LattePipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5(), vae=image_vae(), transformer=transformer, scheduler=scheduler
    )


def ace_step() -> AceStepPipeline:
    width = {"hidden_size": TEXT_WIDTH, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    tokenizer = qwen_tokenizer()
    # The prompt is a small part of a long template and needs large weights to be felt.
    qwen = Qwen3Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, initializer_range=0.5, pad_token_id=None, **width, **heads
    )
    return AceStepPipeline(
        vae=audio_vae(),
        text_encoder=Qwen3Model(qwen),
        tokenizer=tokenizer,
        transformer=AceStepTransformer1DModel(
            num_hidden_layers=2, in_channels=12, audio_acoustic_hidden_dim=4, **width, **heads
        ),
        condition_encoder=AceStepConditionEncoder(
            text_hidden_dim=TEXT_WIDTH,
            timbre_hidden_dim=4,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
            **width,
            **heads,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
    )


def _video(make: Callable[[], DiffusionPipeline], **call: object) -> Tiny:
    return Tiny(redrawn(make), {"height": 32, "width": 32, **call})


PIPELINES: dict[str, Tiny] = {
    "wan": _video(wan_euler, num_frames=5, max_sequence_length=TEXT_LENGTH),
    "wan-unipc": _video(wan_unipc, num_frames=5, max_sequence_length=TEXT_LENGTH),
    # Wan 2.2 TI2V 5B: the network is told a time for every token.
    "wan-ti2v": _video(wan_ti2v, num_frames=5, max_sequence_length=TEXT_LENGTH),
    # Wan 2.2 A14B.
    "wan-two": _video(wan_two, num_frames=5, max_sequence_length=TEXT_LENGTH),
    "ltx": _video(ltx, num_frames=9, max_sequence_length=TEXT_LENGTH),
    "cogvideox": _video(cogvideox_2b, num_frames=5, max_sequence_length=TEXT_LENGTH),
    "cogvideox-dpm": _video(cogvideox_5b, num_frames=5, max_sequence_length=TEXT_LENGTH),
    "hunyuan-video": _video(hunyuan_video, num_frames=5, max_sequence_length=64),
    "mochi": _video(mochi, num_frames=7, max_sequence_length=TEXT_LENGTH),
    "stable-audio": Tiny(redrawn(stable_audio), {}),
    "allegro": _video(allegro, num_frames=8, max_sequence_length=TEXT_LENGTH),
    "latte": _video(latte, video_length=2),
    # One text of lyrics is not repeated for several prompts; too many are no harm.
    "ace-step": Tiny(redrawn(ace_step), {"audio_duration": 4.0, "lyrics": [""] * 8}),
}
