"""Train a small unconditional teacher with plain diffusers, to try the tool on images of your own.

    pip install fmm-distill[data]
    python examples/train_teacher.py --data <hub id, parquet or image folder> --size 32 --output teacher

An epsilon-predicting DDPM on the linear schedule, as most on the Hub are.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from fmm_distill.data import load_images
from fmm_distill.settings import DataSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 128])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop earlier after so many")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = load_images(DataSettings(source=arguments.data), (3, arguments.size, arguments.size))
    levels = len(arguments.channels)
    network = UNet2DModel(
        sample_size=arguments.size,
        block_out_channels=tuple(arguments.channels),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        norm_num_groups=8,
        attention_head_dim=16,
    ).to(device)
    average = copy.deepcopy(network)
    scheduler = DDPMScheduler()
    optimiser = torch.optim.AdamW(network.parameters(), lr=arguments.lr)
    started = time.monotonic()
    for step in range(arguments.steps):
        x_0 = images.take(torch.randint(len(images), (arguments.batch,)))[0].to(device)
        noise = torch.randn_like(x_0)
        timestep = torch.randint(1000, (arguments.batch,), device=device)
        loss = F.mse_loss(network(scheduler.add_noise(x_0, noise, timestep), timestep).sample, noise)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), network.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        if step % 200 == 0:
            print(f"step {step:6d}  loss {loss.item():.4f}", flush=True)
        if time.monotonic() - started > arguments.minutes * 60:
            break
    print(f"{step + 1} steps, {sum(p.numel() for p in network.parameters()):,} parameters")
    DDPMPipeline(unet=average.eval(), scheduler=scheduler).save_pretrained(arguments.output, safe_serialization=True)


if __name__ == "__main__":
    main()
