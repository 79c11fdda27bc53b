"""The any-step pipeline of a student of ``UNet2DModel``. Imports torch and diffusers alone: exports have a copy."""

import hashlib
import json
import math
from itertools import pairwise
from numbers import Integral
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from fmm_distill.export.remote.fresh_noise import FreshNoise, discrete_position

_IMPORT = "from fmm_distill.export.remote.fresh_noise import FreshNoise, discrete_position\n"


def _read_source() -> str:
    """Return this file with the code of the fresh noise in place of its import: exports have one file per pipeline."""
    source = Path(__file__).read_text(encoding="utf-8")
    if _IMPORT not in source:
        return source
    return source.replace(_IMPORT, f"\n{Path(__file__).with_name('fresh_noise.py').read_text(encoding='utf-8')}\n")


# Read at import: diffusers copies the code of all repositories into one folder, and a later copy may replace this one.
_SOURCE = _read_source()
# Equally named files of two repositories share one namespace in a process. The digest keeps two contents apart.
_MODULE = f"flow_map_pipeline_{hashlib.sha256(_SOURCE.encode()).hexdigest()[:12]}"


class FlowMapPipeline(DiffusionPipeline):
    """Generates images by any number of jumps of a two-time network, ``unet(sample, time, h=h)``.

    ``vqvae`` decodes latents. The network's configuration has the noise levels that it was trained on: a ``scheduler``
    of other ones is a ValueError.
    """

    model_cpu_offload_seq = "unet->vqvae"
    _optional_components = ["vqvae"]  # noqa: RUF012 diffusers adds lists to it
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 as in diffusers' own pipelines
    _interrupt = False
    # Attributes, since diffusers may replace the globals by those of an edited file.
    module_name, module_source = _MODULE, _SOURCE

    # No default of vqvae: diffusers would open it even where the caller passes None.
    def __init__(self, unet, scheduler, vqvae):
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
        stochasticity: float = 0.0,
    ):
        """Generate images.

        Args:
            batch_size: the number of images.
            num_inference_steps: the number of jumps.
            generator: one, or one per image.
            output_type: "pil", "np" or "pt" (floats in [0, 1]), or "latent".
            class_labels: one, or one per image; drawn at random if None, where the student has classes.
            timesteps: the starts of the jumps, decreasing integers; not for continuous noise levels.
            latents: the noise to start from, N(0, I).
            callback_on_step_end: called with the pipeline, the step, the timestep and ``{"latents": ...}``, which it
                returns; it may set ``_interrupt``.
            stochasticity: the strength of the fresh noise in each step, at least 0.
        """
        fresh = FreshNoise(stochasticity, generator)
        self._check_output(output_type)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        student = self._student()
        with student.lock:
            scheduler = student.student_scheduler(self.scheduler)
            levels = self._levels(scheduler, num_inference_steps, timesteps)
            x = self._noise(batch_size, generator, latents)
            labels = self._classes(class_labels, batch_size, generator)
            if self._kind() == "exploding":
                # The noise is N(0, I), and these levels start at sigma_max.
                x = x * levels[0][2]
            self._interrupt = False
            for i, (start, end) in enumerate(self.progress_bar(list(pairwise(levels)))):
                if self._interrupt:
                    continue
                preserved = fresh.preserved(start[1:3], end[1:3])
                x = self._jump(scheduler.config, x, (start, self._target(scheduler, end, preserved)), labels)
                x = fresh.add(x, end[2], preserved)
                if callback_on_step_end is not None:
                    x = callback_on_step_end(self, i, start[0], {"latents": x}).pop("latents", x)
        images = x if output_type == "latent" else self._finish(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """Pass the components on, whose classes diffusers does not expect."""
        return super().from_pipe(pipeline, **{"unet": pipeline.unet, "vqvae": pipeline.vqvae} | kwargs)

    def to_json_string(self) -> str:
        """Return the index, with the modules of pipeline and network."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = [self.module_name, type(self).__name__]
        index["unet"] = [self._student().module_name, index["unet"][1]]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Save the index and this file, which defines the class."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{self.module_name}.py").write_text(self.module_source, encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _student(self):
        """Return the two-time network, which may be wrapped, for example by torch.compile."""
        found = [module for module in self.unet.modules() if hasattr(type(module), "student_scheduler")]
        if not found:
            raise ValueError(
                f"{type(self.unet).__name__} is no student; expected the TwoTime class that the pipeline was exported "
                "with"
            )
        return found[0]

    def _check_output(self, output_type):
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}")
        if output_type != "latent" and self.vqvae is None and self._student().config.flow_map["latents"]:
            raise ValueError(
                f"output_type {output_type} needs the vqvae that this student's latents are decoded by, which the "
                'pipeline was opened without; open it with vqvae, or pass output_type="latent"'
            )

    def _noise(self, batch_size, generator, latents):
        config, device, dtype = self.unet.config, self._execution_device, self._student().dtype
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch_size, config.in_channels, height, width)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"expected {batch_size} generators, one per image, got {len(generator)}")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if latents.shape != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device, dtype)

    def _classes(self, labels, batch_size, generator):
        count = self.unet.config.num_class_embeds
        if count is None:
            if labels is not None:
                raise ValueError("this student is unconditional, it takes no class_labels")
            return {}
        if labels is None:
            generator = generator[0] if isinstance(generator, list) and generator else generator
            # A generator draws on its own device only.
            device = "cpu" if generator is None else generator.device
            labels = torch.randint(count, (batch_size,), generator=generator, device=device)
        labels = torch.as_tensor(labels)
        if labels.numel() not in (1, batch_size) or bool(((labels < 0) | (labels >= count)).any()):
            raise ValueError(
                f"class_labels must be one or {batch_size} of 0 to {count - 1}, got {labels.flatten().tolist()}"
            )
        return {"class_labels": labels.flatten().expand(batch_size).to(self._execution_device)}

    def _finish(self, x, output_type):
        if self.vqvae is not None:
            x = self.vqvae.decode((x / self.vqvae.config.scaling_factor).to(self.vqvae.dtype)).sample
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    def _kind(self):
        return self._student().config.flow_map["kind"]

    def _levels(self, scheduler, steps, timesteps=None):
        """Return the points of the grid, data last: the network's time, alpha, sigma, and the position of the jump."""
        config = scheduler.config
        total = config.num_train_timesteps
        if timesteps is not None:
            self._check_timesteps(timesteps, total)
        elif not isinstance(steps, Integral) or not 1 <= steps <= total:
            raise ValueError(f"num_inference_steps must be an integer from 1 to {total}, got {steps!r}")
        fractions = [1 - i / steps for i in range(steps)] + [0.0]
        if self._kind() == "exploding":
            return [self._exploding(config, fraction) for fraction in fractions[:-1]] + [(0.0, 1.0, 0.0, 0.0)]
        if self._kind() == "flow":
            if timesteps is not None:
                fractions = [timestep / total for timestep in timesteps] + [0.0]
            shifted = [(config.shift * s / (1 + (config.shift - 1) * s), s) for s in fractions]
            return [(t * total, 1 - t, t, s) for t, s in shifted]
        if timesteps is None:
            # The grid of the student's schedule, which rounds halves to even.
            remaining = torch.arange(steps, 0, -1, dtype=torch.float64) * total / steps
            timesteps = (remaining.round().long() - 1).tolist()
        products = [float(scheduler.alphas_cumprod[timestep]) for timestep in timesteps] + [1.0]
        points = [*timesteps, -1]
        return [(k, p**0.5, (1 - p) ** 0.5, k / total) for k, p in zip(points, products, strict=True)]

    def _check_timesteps(self, timesteps, total):
        if self._kind() == "exploding":
            raise ValueError("this student's times are continuous, it takes no timesteps")
        low, high = (0, total - 1) if self._kind() == "discrete" else (1, total)
        decreasing = all(before > after for before, after in pairwise(timesteps))
        integers = all(float(timestep).is_integer() for timestep in timesteps)
        if not len(timesteps) or not decreasing or not integers or timesteps[-1] < low or timesteps[0] > high:
            raise ValueError(
                f"timesteps must be integers that decrease, from at most {high} to at least {low}, got {timesteps}"
            )

    def _warp(self, config):
        """Return the function of an exploding level that has equal steps, and its inverse."""
        rho = getattr(config, "rho", None) if getattr(config, "sigma_schedule", None) == "karras" else None
        if rho is None:
            return math.log, math.exp
        return (lambda sigma: sigma ** (1 / rho)), (lambda value: value**rho)

    def _exploding(self, config, fraction):
        warp, back = self._warp(config)
        low, high = warp(config.sigma_min), warp(config.sigma_max)
        sigma = back(low + fraction * (high - low))
        # EDM networks are conditioned on log(sigma) / 4, score networks on sigma.
        time = math.log(sigma) / 4 if hasattr(config, "sigma_data") else sigma
        return time, 1.0, sigma, fraction

    def _target(self, scheduler, end, preserved):
        """Return the point with a fraction of the noise at the end of a step."""
        if preserved == 1:
            return end
        _, alpha, sigma, _ = end
        return None, alpha, preserved * sigma, self._position(scheduler, alpha, preserved * sigma)

    def _position(self, scheduler, alpha, sigma):
        """Return the position of a level in the variable that jumps are measured in."""
        config = scheduler.config
        if self._kind() == "discrete":
            total = config.num_train_timesteps
            # The points of the grid have the timestep's fraction, so that data are below 0 by one timestep.
            return discrete_position(scheduler.alphas_cumprod, (alpha, sigma), total) - 1 / total
        if self._kind() == "flow":
            t = sigma / (alpha + sigma)
            return t / (config.shift - (config.shift - 1) * t)
        warp, _ = self._warp(config)
        # Below the lowest level no length was learned.
        low, high, level = (warp(one) for one in (config.sigma_min, config.sigma_max, max(sigma, config.sigma_min)))
        return (level - low) / (high - low)

    def _jump(self, config, x, ends, labels):
        """Jump by the DDIM step (arXiv 2010.02502, eq. 12, sigma = 0) between two levels."""
        (time, alpha, sigma, position), end = ends
        prediction = "flow" if self._kind() == "flow" else getattr(config, "prediction_type", "score")
        spread = getattr(config, "sigma_data", None) if self._kind() == "exploding" else None
        scale = 1.0 if spread is None else (sigma**2 + spread**2) ** 0.5
        h = torch.full((len(x),), position - end[3], device=x.device)
        output = self.unet(x / scale, torch.full_like(h, time), h=h, **labels).sample[:, : x.shape[1]]
        eps, x_0 = self._read(prediction, output, x, (alpha, sigma, spread, scale))
        return end[1] * x_0 + end[2] * eps

    def _read(self, prediction, output, x, level):
        """Return the noise and the data that the network's output predicts."""
        alpha, sigma, spread, scale = level
        if spread is not None:
            # The EDM schedulers of diffusers have c_out of the opposite sign for v_prediction.
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


# diffusers executes this file again, in the same namespace, for every repository that it opens. Objects of the first
# execution are in use and may be pickled, so its classes, locks and caches are restored.
_first_run = globals().get("_first_run") or dict(globals())
if _first_run["_SOURCE"] == _SOURCE:
    globals().update(_first_run)
