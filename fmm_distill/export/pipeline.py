"""A pipeline of any number of steps for a student flow map. Imports only torch and diffusers: it travels along."""

from itertools import pairwise

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class FlowMapPipeline(DiffusionPipeline):
    """Unconditional images from a two-time ``unet(sample, timestep, h)`` by any number of jumps.

    ``scheduler`` holds the teacher's noise levels and what the network predicts.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 4,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ):
        """Images of ``num_inference_steps`` jumps, as "pil", "np" or "pt" (floats in [0, 1])."""
        total = self.scheduler.config.num_train_timesteps
        if not 1 <= num_inference_steps <= total:
            raise ValueError(f"num_inference_steps must be 1 to {total}, got {num_inference_steps}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be pil, np or pt, got {output_type!r}")
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        x = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype)
        remaining = torch.arange(num_inference_steps, -1, -1, dtype=torch.float64) * total / num_inference_steps
        timesteps = (remaining.round().long() - 1).tolist()
        for timestep, r_timestep in self.progress_bar(list(pairwise(timesteps))):
            h = torch.full((batch_size,), (timestep - r_timestep) / total, device=x.device)
            output = self.unet(x, torch.full_like(h, timestep), h).sample
            x = self._jump(output, x, timestep, r_timestep)
        self.maybe_free_model_hooks()
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _jump(self, output, x, timestep, r_timestep):
        """The DDIM step (arXiv 2010.02502, eq. 12, sigma = 0) between two timesteps; -1 is data."""
        products = self.scheduler.alphas_cumprod
        start = float(products[timestep])
        end = float(products[r_timestep]) if r_timestep >= 0 else 1.0
        alpha, sigma = start**0.5, (1 - start) ** 0.5
        prediction = self.scheduler.config.prediction_type
        if prediction == "epsilon":
            eps, x_0 = output, (x - sigma * output) / alpha
        elif prediction == "sample":
            eps, x_0 = (x - alpha * output) / sigma, output
        else:
            eps, x_0 = sigma * x + alpha * output, alpha * x - sigma * output
        return end**0.5 * x_0 + (1 - end) ** 0.5 * eps
