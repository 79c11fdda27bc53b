"""Train a small unconditional teacher on your own images with diffusers and accelerate.

    pip install fmm-distill[data]
    python examples/train_teacher.py --data <hub id, parquet or image folder> --size 32 --output teacher
    accelerate launch examples/train_teacher.py --data <...> --output teacher        # on several GPUs

``--minutes`` limits the duration, and the learning rate decays to zero within it. The same command resumes a run.
The network predicts v unless ``--objective`` is another one: with the linear schedule an epsilon prediction
multiplies its errors by up to 157 near noise, and the ODE of a network trained briefly leaves the range of images.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import nn

from fmm_distill.config.settings import DataSettings
from fmm_distill.data.samples import load_images
from fmm_distill.io.files import write_text
from fmm_distill.training import checkpoint

TIMESTEPS = 1000


def layout(device: torch.device) -> torch.memory_format:
    """Return the faster memory format: channels last on GPUs, contiguous on CPU."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", required=True, help="Hub id, parquet file or folder, folder of images")
    parser.add_argument("--size", type=int, default=32, help="height and width; other images are resized and cropped")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--objective", choices=["v_prediction", "epsilon", "flow"], default="v_prediction")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 192], help="channels of each level")
    parser.add_argument("--layers", type=int, default=1, help="residual blocks per level")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end after this time, if earlier")
    parser.add_argument("--batch", type=int, default=128, help="images per step, over all processes")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak, after a warm-up of 200 steps")
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="precision of autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--checkpoint-every", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def new_network(size: int, channels: list[int], layers: int) -> UNet2DModel:
    """Return a network with attention at the lowest resolution, where it is cheap."""
    levels = len(channels)
    return UNet2DModel(
        sample_size=size,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        norm_num_groups=min(16, *channels),
        attention_head_dim=min(32, *channels),
    )


class Denoising(nn.Module):
    """The mean squared error of a network's prediction.

    accelerate wraps this module, so that autocast and gradient synchronization cover the loss alone.
    """

    def __init__(self, network: UNet2DModel, objective: str) -> None:
        super().__init__()
        self.network, self.objective = network, objective
        # Without clipping, DDIM steps converge to the ODE that is distilled.
        kind = "epsilon" if objective == "flow" else objective
        self.scheduler = DDPMScheduler(num_train_timesteps=TIMESTEPS, prediction_type=kind, clip_sample=False)

    def forward(self, x_0: torch.Tensor, noise: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Return the loss of images in [-1, 1] with noises and times, as fractions in [0, 1)."""
        if self.objective == "flow":
            t = uniform[:, None, None, None]
            x_t, target, timestep = torch.lerp(x_0, noise, t), noise - x_0, uniform * TIMESTEPS
        else:
            timestep = (uniform * TIMESTEPS).long()
            x_t = self.scheduler.add_noise(x_0, noise, timestep)
            target = noise if self.objective == "epsilon" else self.scheduler.get_velocity(x_0, noise, timestep)
        return F.mse_loss(self.network(x_t, timestep).sample.float(), target)

    def stock_scheduler(self) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
        """Return the scheduler that samples from the network."""
        return FlowMatchEulerDiscreteScheduler() if self.objective == "flow" else self.scheduler


class Batches:
    """Batches of images, each mirrored with probability 1/2, and draws that depend on seed, step and process alone."""

    def __init__(self, pixels: torch.Tensor, size: int, seed: int, accelerator: Accelerator) -> None:
        self.pixels, self.size, self.seed = pixels.to(accelerator.device), size, seed
        self.process, self.generator = accelerator.process_index, torch.Generator(accelerator.device)

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return images in [-1, 1], noises, and times as fractions in [0, 1)."""
        device = self.pixels.device
        # One seed per step: a resumed run draws what an uninterrupted one draws.
        self.generator.manual_seed((self.seed * 1000 + self.process) * 10**8 + step)
        given = {"generator": self.generator, "device": device}
        index = torch.randint(len(self.pixels), (self.size,), **given)
        mirrored = torch.rand(self.size, 1, 1, 1, **given) < 0.5
        x_0 = self.pixels[index].float() / 127.5 - 1
        x_0 = torch.where(mirrored, x_0.flip(-1), x_0).contiguous(memory_format=layout(device))
        return x_0, torch.randn(x_0.shape, **given), torch.rand(self.size, **given)


class Training:
    """The state of a training: network, moving average, optimizer, step and seconds."""

    def __init__(self, options: argparse.Namespace, accelerator: Accelerator) -> None:
        torch.manual_seed(options.seed)
        self.options, self.accelerator = options, accelerator
        network = new_network(options.size, options.channels, options.layers)
        self.network = network.to(accelerator.device, memory_format=layout(accelerator.device))
        self.average = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=options.lr, betas=(0.9, 0.99), fused=accelerator.device.type == "cuda"
        )
        self.step, self.seconds = 0, 0.0
        self.objective = Denoising(self.network, options.objective)
        self._resume()
        if options.compile:
            # In place, so that the names of the weights do not change.
            self.network.compile()
        # The optimizer is not prepared: accelerate wraps it for gradient scaling, which bfloat16 does not need.
        self.wrapped = accelerator.prepare(self.objective)
        self._pairs = [list(module.parameters()) for module in (self.average, self.network)]

    def train(self, batches: Batches) -> None:
        """Train to the last step or to the end of the minutes."""
        options, began = self.options, time.monotonic() - self.seconds
        while self.step < options.steps and self.seconds < options.minutes * 60:
            progress = max(self.step / options.steps, self.seconds / 60 / options.minutes)
            rate = options.lr * min(1, (self.step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * progress))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self.wrapped(*batches.at(self.step))
            self.accelerator.backward(loss)
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            # The warm-up of the decay removes the random start from the average.
            decay = min(options.ema, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                torch._foreach_lerp_(*self._pairs, 1 - decay)
            self.step += 1
            if self.step % 100 == 0:
                # item() waits for the device, so the seconds are exact at these steps.
                self.accelerator.print(f"step {self.step:6d}  loss {loss.item():.4f}  {self.seconds:.0f} s", flush=True)
            self.seconds = self._together(time.monotonic() - began)
            if self.step % options.checkpoint_every == 0:
                self._save()
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.monotonic() - began

    def _together(self, seconds: float) -> float:
        """Return the mean over the processes, so that all of them stop at the same step."""
        if self.accelerator.num_processes == 1:
            return seconds
        return self.accelerator.reduce(torch.tensor(seconds, device=self.accelerator.device), "mean").item()

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        moments = self.optimizer.state_dict()["state"]
        tensors = {
            "network": dict(self.network.state_dict()),
            "average": dict(self.average.state_dict()),
            "optimizer": {f"{i}.{name}": value for i, state in moments.items() for name, value in state.items()},
        }
        saved = checkpoint.Checkpoint(self.step, tensors, {"seconds": self.seconds})
        checkpoint.save(self.options.output / "checkpoints", saved, 1)

    def _resume(self) -> None:
        found = checkpoint.newest_complete(self.options.output / "checkpoints")
        if found is None:
            return
        saved = found[1]
        self.network.load_state_dict(saved.tensors["network"])
        self.average.load_state_dict(saved.tensors["average"])
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in saved.tensors["optimizer"].items():
            index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step, self.seconds = saved.step, saved.state["seconds"]
        self.accelerator.print(f"resumed from step {self.step}")

    def save_pipeline(self) -> None:
        """Save the average as a stock pipeline, with the settings of the training in ``training.json``."""
        output, options = self.options.output, self.options
        pipeline = DDPMPipeline(unet=self.average.to("cpu"), scheduler=self.objective.stock_scheduler())
        about = {name: value for name, value in vars(options).items() if name not in ("output", "data")}
        about |= {"minutes": options.minutes if math.isfinite(options.minutes) else None}
        about |= {"trained_steps": self.step, "seconds": self.seconds, "images_seen": self.step * options.batch}
        about["parameters"] = sum(p.numel() for p in self.network.parameters())
        about["device"] = device_name(self.accelerator.device)
        write_text(output / "training.json", json.dumps(about, indent=2) + "\n")
        # diffusers writes model_index.json last, so its presence marks a finished training.
        pipeline.save_pretrained(output, safe_serialization=True)
        shutil.rmtree(output / "checkpoints", ignore_errors=True)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main() -> None:
    options = arguments()
    if (options.output / "model_index.json").is_file():
        print(f"{options.output} is finished")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=options.precision)
    if options.batch % accelerator.num_processes:
        raise SystemExit(f"--batch {options.batch} does not split over {accelerator.num_processes} processes")
    # All images are decoded at once, since they are moved to the device.
    images = load_images(
        DataSettings(source=options.data, fit="crop"), (3, options.size, options.size), in_memory=2**37
    )
    training = Training(options, accelerator)
    training.train(Batches(images.pixels, options.batch // accelerator.num_processes, options.seed, accelerator))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        training.save_pipeline()
    accelerator.print(f"{training.step} steps in {training.seconds:.0f} s")


if __name__ == "__main__":
    main()
