"""Tiny text-to-audio pipelines whose sounds have one channel: diffusers' own classes with random weights."""

from __future__ import annotations

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    DDIMScheduler,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
)
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny.base import Tiny, seeded
from tests.tiny.tokenizers import roberta_tokenizer, t5_tokenizer

WIDTH = 16


@torch.no_grad()
def _redraw(module: torch.nn.Module) -> None:
    """Draws every matrix anew: many classes start close to zero, which hides what goes in."""
    for weight in module.parameters():
        if weight.ndim > 1:
            weight.normal_(0, weight[0].numel() ** -0.5)


def _vocoder() -> SpeechT5HifiGan:
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8,
            upsample_initial_channel=8,
            upsample_rates=[2],
            upsample_kernel_sizes=[4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1]],
            normalize_before=False,
        )
    )
    _redraw(vocoder)
    return vocoder


def _clap() -> ClapModel:
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 300,
        "projection_dim": WIDTH,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    # Its tower of sounds only ranks several waveforms of one prompt.
    audio = {
        "spec_size": 8,
        "window_size": 4,
        "num_mel_bins": 8,
        "depths": [1, 1],
        "num_attention_heads": [1, 1],
        "hidden_size": 192,
        "patch_size": 2,
        "patch_stride": 2,
        "projection_dim": WIDTH,
    }
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=WIDTH))


def audioldm2() -> AudioLDM2Pipeline:
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        # Of the samples themselves, the texts that GPT-2 continues, and those of T5.
        cross_attention_dim=((None, 8, WIDTH),) * 2,
        attention_head_dim=4,
    )
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    heard = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=1, n_layer=1, vocab_size=16, n_positions=99))
    heard.config.max_new_tokens = 4
    t5 = T5EncoderModel(T5Config(vocab_size=128, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2))
    levels = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return AudioLDM2Pipeline(
        vae=vae,
        text_encoder=_clap(),
        text_encoder_2=t5,
        projection_model=AudioLDM2ProjectionModel(WIDTH, WIDTH, 8),
        language_model=heard,
        tokenizer=roberta_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        feature_extractor=ClapFeatureExtractor(),
        unet=unet,
        scheduler=levels,
        vocoder=_vocoder(),
    )


def longcat_audio_dit() -> LongCatAudioDiTPipeline:
    """Without a scheduler of its own: the pipeline makes one, and saves none."""
    transformer = LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=WIDTH, latent_dim=4, text_conv=False
    )
    _redraw(transformer)
    vae = LongCatAudioDiTVae(
        in_channels=1,
        channels=8,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=4,
        encoder_latent_dim=8,
        downsampling_ratio=2,
        sample_rate=16,
    )
    umt5 = UMT5EncoderModel(UMT5Config(vocab_size=128, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2))
    return LongCatAudioDiTPipeline(vae=vae, text_encoder=umt5, tokenizer=t5_tokenizer(), transformer=transformer)


PIPELINES: dict[str, Tiny] = {
    "audioldm2": Tiny(seeded(audioldm2), {}),
    "longcat-audio-dit": Tiny(seeded(longcat_audio_dit), {"audio_duration_s": 1.0}),
}
