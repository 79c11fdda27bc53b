"""``DiTTransformer2DModel`` teachers: latents of an autoencoder or pixels, conditioned on a class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmm_distill.core.parametrization import Parametrization
from fmm_distill.core.schedules import VarianceExploding
from fmm_distill.errors import UserError
from fmm_distill.teachers.base import Teacher
from fmm_distill.teachers.codec import LatentCodec, Pixels
from fmm_distill.teachers.components import open_network, open_scheduler
from fmm_distill.teachers.conditions import Classes
from fmm_distill.teachers.first_call import check_first_call, check_latents, image_size
from fmm_distill.teachers.pipeline import StockPipeline
from fmm_distill.teachers.scheduler import read_scheduler

if TYPE_CHECKING:
    from fmm_distill.teachers.codec import Codec
    from fmm_distill.teachers.index import PipelineIndex

__all__ = ["load_dit"]

_CONFIG = "transformer/config.json"


def load_dit(index: PipelineIndex) -> Teacher:
    """Open a teacher that ``DiTPipeline`` has saved (Peebles and Xie 2022, arXiv 2212.09748).

    Without an autoencoder (``"vae": [null, null]`` in model_index.json) its samples are pixels. No stock pipeline runs
    it then, so its students are exported as weights. The label after the last class means no class. The channels of the
    learned variance are left out.

    Raises:
        UserError: on a scheduler or a size that the pipeline does not support.
    """
    spec = read_scheduler(open_scheduler(index), index.source)
    if spec.inverted or isinstance(spec.schedule, VarianceExploding):
        raise UserError(
            f"{index.source}: expected a discrete or a flow scheduler, since DiTPipeline starts from N(0, I), got "
            f"{spec.config['_class_name']}; try DDIMScheduler if it has the same noise levels"
        )
    # 32 is the default of DiTTransformer2DModel, which its oldest configurations rely on.
    height, width = image_size(index.config("transformer").get("sample_size", 32), index.source, _CONFIG)
    if height != width:
        raise UserError(f"{index.source}: {_CONFIG} has sample_size [{height}, {width}]; expected one number: a square")
    network = open_network(index, "transformer")
    config = network.config
    count = config.num_embeds_ada_norm
    codec: Codec = Pixels()
    pipeline = None
    if "vae" in index.components:
        autoencoder = open_network(index, "vae")
        check_latents(network, autoencoder, index.source)
        codec = LatentCodec(autoencoder)
        pipeline = StockPipeline(index.folder, "transformer", condition="class_labels", guidance="guidance_scale")
    teacher = Teacher(
        network=network,
        parametrization=Parametrization(spec.schedule, spec.prediction, sigma_data=spec.sigma_data),
        event_shape=(config.in_channels, height, width),
        source=index.source,
        adapter=f"DiTTransformer2DModel, {'pixels' if pipeline is None else 'latents'}, class-conditional",
        scheduler_config=spec.config,
        pipeline=pipeline,
        conditions=Classes(tuple(str(label) for label in range(count)), null_label=count),
        codec=codec,
        revision=index.revision,
        license=index.license,
    )
    check_first_call(teacher)
    return teacher
