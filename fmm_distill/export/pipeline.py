"""A pipeline of any number of steps for a student flow map. Imports only torch and diffusers: it travels along."""

import math
from itertools import pairwise

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor


class FlowMapPipeline(DiffusionPipeline):
    """Images from a two-time ``unet(sample, time, h=h)`` by any number of jumps, of a class where it has classes.

    ``scheduler`` holds the teacher's noise levels and what the network predicts; ``vqvae`` decodes latents.
    """

    model_cpu_offload_seq = "unet->vqvae"
    _optional_components = ("vqvae",)
    _callback_tensor_inputs = ("latents",)

    def __init__(self, unet, scheduler, vqvae=None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vqvae=vqvae)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 4,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        class_labels: int | list[int] | None = None,
        timesteps: list[int] | None = None,
        latents: torch.Tensor | None = None,
        callback_on_step_end=None,
    ):
        """Images of ``num_inference_steps`` jumps, as "pil", "np" or "pt" (floats in [0, 1]), or "latent".

        ``class_labels``: one, or one an image. ``timesteps``: where the jumps start, decreasing whole timesteps, on a
        discrete schedule. ``latents``: the noise to start from, N(0, I).
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        levels = self._levels(num_inference_steps, timesteps)
        device, dtype = self._execution_device, self.unet.dtype
        told = self._classes(class_labels, batch_size, device)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, self.unet.config.in_channels, height, width)
        x = randn_tensor(shape, generator=generator, device=device, dtype=dtype) if latents is None else latents
        if self._kind() == "exploding":
            x = x * levels[0][2]
        jumps = list(pairwise(levels))
        for i, (start, end) in enumerate(self.progress_bar(jumps)):
            x = self._jump(x, start, end, told)
            if callback_on_step_end is not None:
                x = callback_on_step_end(self, i, start[0], {"latents": x}).pop("latents", x)
        images = x if output_type == "latent" else self._finish(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _classes(self, labels, batch_size, device):
        count = self.unet.config.num_class_embeds
        if count is None:
            if labels is not None:
                raise ValueError("this student is unconditional, it takes no class_labels")
            return {}
        labels = torch.randint(count, (batch_size,)) if labels is None else torch.as_tensor(labels).expand(batch_size)
        return {"class_labels": labels.to(device)}

    def _finish(self, x, output_type):
        if self.vqvae is not None:
            x = self.vqvae.decode(x / self.vqvae.config.scaling_factor).sample
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    def _kind(self):
        """Of the schedule; a configuration may hold keys of other schedulers."""
        if hasattr(self.scheduler, "alphas_cumprod"):
            return "discrete"
        return "exploding" if hasattr(self.scheduler.config, "sigma_max") else "flow"

    def _levels(self, steps, timesteps=None):
        """Of every point of the grid: what the network is told, alpha, sigma, and its place; the last is data."""
        config = self.scheduler.config
        total = config.num_train_timesteps
        if not 1 <= steps <= total:
            raise ValueError(f"num_inference_steps must be 1 to {total}, got {steps}")
        shares = [1 - i / steps for i in range(steps)] + [0.0]
        if self._kind() == "exploding":
            if timesteps is not None:
                raise ValueError("this student's times are continuous, it takes no timesteps")
            return [self._exploding(config, share) for share in shares[:-1]] + [(0.0, 1.0, 0.0, 0.0)]
        if self._kind() == "flow":
            if timesteps is not None:
                shares = [timestep / total for timestep in timesteps] + [0.0]
            shifted = [(config.shift * s / (1 + (config.shift - 1) * s), s) for s in shares]
            return [(t * total, 1 - t, t, s) for t, s in shifted]
        if timesteps is None:
            remaining = torch.arange(steps, 0, -1, dtype=torch.float64) * total / steps
            timesteps = (remaining.round().long() - 1).tolist()
        products = [float(self.scheduler.alphas_cumprod[timestep]) for timestep in timesteps] + [1.0]
        places = [*timesteps, -1]
        return [(k, p**0.5, (1 - p) ** 0.5, k / total) for k, p in zip(places, products, strict=True)]

    def _exploding(self, config, share):
        rho = getattr(config, "rho", None) if getattr(config, "sigma_schedule", None) == "karras" else None
        low, high = config.sigma_min, config.sigma_max
        if rho is None:
            sigma = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        else:
            sigma = (low ** (1 / rho) + share * (high ** (1 / rho) - low ** (1 / rho))) ** rho
        told = math.log(sigma) / 4 if hasattr(config, "sigma_data") else sigma
        return told, 1.0, sigma, share

    def _jump(self, x, start, end, told):
        """The DDIM step (arXiv 2010.02502, eq. 12, sigma = 0) between two levels."""
        time, alpha, sigma, place = start
        spread = getattr(self.scheduler.config, "sigma_data", None) if self._kind() == "exploding" else None
        scale = 1.0 if spread is None else (sigma**2 + spread**2) ** 0.5
        h = torch.full((len(x),), place - end[3], device=x.device)
        output = self.unet(x / scale, torch.full_like(h, time), h=h, **told).sample[:, : x.shape[1]]
        eps, x_0 = self._read(output, x, alpha, sigma, spread, scale)
        return end[1] * x_0 + end[2] * eps

    def _read(self, output, x, alpha, sigma, spread, scale):
        """Noise and data in what the network says."""
        prediction = "flow" if self._kind() == "flow" else getattr(self.scheduler.config, "prediction_type", "score")
        if spread is not None:
            sign = -1 if prediction == "v_prediction" else 1
            x_0 = (spread / scale) ** 2 * x + sign * sigma * spread / scale * output
            return (x - x_0) / sigma, x_0
        if prediction == "sample":
            return (x - alpha * output) / sigma, output
        if prediction == "v_prediction":
            return sigma * x + alpha * output, alpha * x - sigma * output
        if prediction == "flow":
            return x + (1 - sigma) * output, x - sigma * output
        eps = output if prediction == "epsilon" else -sigma * output
        return eps, (x - sigma * eps) / alpha
