"""The parts of a small stock inpainting pipeline: autoencoder, text encoder of the empty prompt, network, scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

if TYPE_CHECKING:
    from experiments.inpainting.budget import Budget

__all__ = ["FACTOR", "LATENT_CHANNELS", "new_autoencoder", "new_network", "new_scheduler", "pipeline_of"]

# Pixels per latent, in each direction.
FACTOR = 2
LATENT_CHANNELS = 4
# Of the text encoder, and its number of tokens: only the empty prompt is used.
TEXT_WIDTH, TOKENS = 8, 4


def new_autoencoder(budget: Budget) -> AutoencoderKL:
    """Return an untrained autoencoder with latents of half the image's size."""
    return AutoencoderKL(
        block_out_channels=budget.autoencoder_channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=budget.size,
        mid_block_add_attention=False,
    )


def new_network(budget: Budget) -> UNet2DConditionModel:
    """Return an untrained network of latents, masks and latents of masked images, with attention at the lower level."""
    return UNet2DConditionModel(
        sample_size=budget.size // FACTOR,
        in_channels=2 * LATENT_CHANNELS + 1,
        out_channels=LATENT_CHANNELS,
        block_out_channels=budget.channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=min(4, budget.channels[1] // 8),
        cross_attention_dim=TEXT_WIDTH,
    )


def new_scheduler() -> PNDMScheduler:
    """Return the scheduler of Stable Diffusion, with its schedule and its prediction, epsilon."""
    return PNDMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        steps_offset=1,
        skip_prk_steps=True,
        set_alpha_to_one=False,
    )


def pipeline_of(autoencoder: AutoencoderKL, network: UNet2DConditionModel) -> StableDiffusionInpaintPipeline:
    """Return the stock pipeline, with an untrained text encoder."""
    tokenizer = _tokenizer()
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return StableDiffusionInpaintPipeline(
        vae=autoencoder.eval(),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        unet=network.eval(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer with a token per byte."""
    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>", model_max_length=TOKENS)
