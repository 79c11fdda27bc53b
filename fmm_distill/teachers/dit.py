"""``DiTTransformer2DModel`` teachers: latents of an autoencoder, told a class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import VarianceExploding
from fmm_distill.errors import UserError
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.codec import LatentCodec
from fmm_distill.teachers.components import open_network, open_scheduler
from fmm_distill.teachers.conditions import Classes
from fmm_distill.teachers.first_call import check_first_call, check_latents, image_size
from fmm_distill.teachers.scheduler import read_scheduler

if TYPE_CHECKING:
    from fmm_distill.teachers.components import PipelineIndex

__all__ = ["load_dit"]

_CONFIG = "transformer/config.json"


def load_dit(found: PipelineIndex) -> Teacher:
    """The teacher in a folder as ``DiTPipeline`` saves it (Peebles and Xie 2022, arXiv 2212.09748).

    The label after the last class stands for none. The channels of the learned variance are left out.
    """
    levels = read_scheduler(open_scheduler(found), found.source)
    if levels.inverted or isinstance(levels.schedule, VarianceExploding):
        raise UserError(
            f"{found.source}: DiTPipeline starts from N(0, I) at the first of falling levels, which "
            f"{levels.config['_class_name']} with these settings does not; expected a discrete or a flow scheduler"
        )
    height, width = image_size(found.config("transformer").get("sample_size", 32), found.source, _CONFIG)
    if height != width:
        raise UserError(f"{found.source}: {_CONFIG} has sample_size [{height}, {width}]; expected a square: one number")
    network = open_network(found, "transformer")
    config = network.config
    count = config.num_embeds_ada_norm
    autoencoder = open_network(found, "vae")
    check_latents(network, autoencoder, found.source)
    teacher = Teacher(
        network=network,
        parametrization=Parametrization(levels.schedule, levels.prediction, sigma_data=levels.sigma_data),
        event_shape=(config.in_channels, height, width),
        source=found.source,
        adapter="DiTTransformer2DModel, latents, class-conditional",
        scheduler_config=levels.config,
        component="transformer",
        folder=found.folder,
        conditions=Classes(tuple(str(label) for label in range(count)), null_label=count),
        codec=LatentCodec(autoencoder),
        revision=found.revision,
        license=found.license,
    )
    check_first_call(teacher)
    return teacher
