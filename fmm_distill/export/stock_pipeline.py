"""The exporter of teachers with a stock pipeline: copies of it with the student in the place of the network."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any, cast

import torch

from fmm_distill.core.schedules import VarianceExploding
from fmm_distill.core.staged import parts_of, stages_of
from fmm_distill.errors import UserError, named
from fmm_distill.export.grids import StockGrids
from fmm_distill.export.local_paths import strip
from fmm_distill.export.pipeline_files import copy_parts, parts_bytes
from fmm_distill.export.remote import stock_pipeline as remote
from fmm_distill.export.remote.scheduler import FlowMapScheduler
from fmm_distill.export.schedulers import make_scheduler, settings_of, why_levels_do_not_fold
from fmm_distill.student.fold import fold
from fmm_distill.student.scaled_adapters import stock_network
from fmm_distill.student.strength import strength_of
from fmm_distill.teachers.codec import PipelineCodec
from fmm_distill.teachers.components import open_pipeline
from fmm_distill.teachers.conditions import Embeddings
from fmm_distill.teachers.prompted.call import RecordedCall
from fmm_distill.teachers.prompted.probe import STEPS
from fmm_distill.teachers.recording import record, tensor_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor, nn

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.schedules import FlowMatching
    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher
    from fmm_distill.teachers.pipeline import StockPipeline
    from fmm_distill.teachers.recording import Recording

__all__ = ["StockPipelineExporter"]


class StockPipelineExporter:
    """Exports students into copies of their teacher's pipeline; see ``Exporter`` for the attributes.

    The any-step pipeline is of a class made from the stock one, whose code travels with it. The pipelines of a fixed
    number of steps are stock pipelines. Components that don't differ are written once, and linked.
    """

    not_any_step: str | None = None

    def __init__(self, teacher: Teacher, pipeline: StockPipeline) -> None:
        self.teacher, self.pipeline = teacher, pipeline
        self.component = pipeline.component
        call = teacher.parametrization.call
        # How the pipeline calls its network, where that was found by running it.
        self.network_call = call if isinstance(call, RecordedCall) else None
        self.not_fixed = self._why_not_fixed()
        self._grids = StockGrids(self._run_to_network)
        self._opened: Any = None

    def _why_not_fixed(self) -> str | None:
        """The reason why no stock scheduler makes the jumps in this pipeline; None: one does."""
        schedule, spread = self.teacher.schedule, self.teacher.parametrization.sigma_data
        # EDMEulerScheduler preconditions the network, and calls it at the logarithm of sigma.
        if isinstance(schedule, VarianceExploding) and schedule.network_input == "log" and spread is not None:
            return None
        return why_levels_do_not_fold(schedule) or self._missing_member()

    def _missing_member(self) -> str | None:
        """The reason why the pipeline fails with the stock scheduler of flow models, where it is made for another.

        Solvers that have all members round the timesteps that the network is conditioned on: their steps are no exact
        jumps.
        """
        code = self.pipeline.code
        if self.teacher.schedule.kind != "flow" or "FlowMatchEulerDiscreteScheduler" in code:
            return None
        for name in ("init_noise_sigma", "scale_model_input"):
            if f"self.scheduler.{name}" in code and f'hasattr(self.scheduler, "{name}")' not in code:
                return f"its pipeline needs a scheduler with {name}, which the stock scheduler of flow models lacks"
        return None

    def settings(self, scheduler: Any) -> dict[str, Any]:  # noqa: ANN401 a diffusers class
        """Return the ``flow_map`` entry of the network's configuration: what the any-step pipeline measures h by.

        Args:
            scheduler: the scheduler that the student is exported with.
        """
        teacher, call = self.teacher, self.network_call
        inverted = bool(teacher.scheduler_config.get("invert_sigmas"))
        return {
            "slope": 1.0 if call is None else call.slope,
            "offset": 0.0 if call is None else call.offset,
            "flip": cast("FlowMatching", teacher.schedule).time_scale if inverted else None,
            "call": self.pipeline.call | self.pipeline.unguided(),
            "guidance": self.pipeline.guidance,
            "task": self.pipeline.task_settings,
            "scheduler": settings_of(scheduler),
            "scale": None if teacher.guidance is None else teacher.guidance.scale,
        } | teacher.schedule.to_config()

    def any_step(self, student: Student, folder: Path, *, linked: bool = False) -> None:
        """Write the teacher's pipeline with the two-time network in it, of a class made from the stock one."""
        index = copy_parts(self.pipeline, folder, linked=linked)
        # Before the pipelines of fixed steps link to these files.
        strip(folder)
        scheduler, network = make_scheduler(self.teacher, student.prediction), student.network
        parts = [cast("Any", part) for part in stages_of(network)]
        for part in parts:
            part.register_to_config(flow_map=self.settings(scheduler))
        remote.write_code(folder)
        index["_class_name"] = [remote.MODULE, f"FlowMap{index['_class_name']}"]
        self._write(folder, index, network, scheduler, parts[0].module_name)

    def fixed(self, student: Student, steps: int, folder: Path) -> None:
        """Write the teacher's pipeline with the folded network in it."""
        target = folder / f"steps-{steps}"
        target.mkdir()
        index = copy_parts(self.pipeline, target, folder)
        scheduler, times = self._fixed(student, steps)
        self._write(target, index, fold(student, self.teacher, times), scheduler, "diffusers")

    def _write(self, folder: Path, index: dict[str, Any], network: nn.Module, scheduler: Any, library: str) -> None:  # noqa: ANN401
        for name, part in parts_of(network, self.component).items():
            part.save_pretrained(folder / name, safe_serialization=True)
            index[name] = [library, type(part).__name__]
        scheduler.save_pretrained(folder / "scheduler")
        # An older repository may name classes that have other names now.
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """Return the schedule's own grid; of a flow model, the one that the pipeline sets."""
        if self.teacher.schedule.kind != "flow":
            return self.teacher.schedule.grid(steps)
        return self._times(self._flow_map_scheduler(), steps)

    def fixed_grid(self, student: Student, steps: int) -> Float[Tensor, " points"]:
        """Return the times that the pipeline of ``steps`` steps takes."""
        return self._fixed(student, steps)[1]

    def _fixed(self, student: Student, steps: int) -> tuple[Any, Tensor]:
        """The scheduler of the pipeline of ``steps`` steps, and the times between which it jumps."""
        if self.teacher.schedule.kind != "flow":
            equal_steps = steps if self.teacher.schedule.kind == "exploding" else None
            scheduler = make_scheduler(self.teacher, student.prediction, equal_steps)
            return scheduler, self.teacher.schedule.grid(steps)
        scheduler = make_scheduler(self.teacher, student.prediction)
        schedule, times = cast("FlowMatching", self.teacher.schedule), self._times(scheduler, steps)
        last = float(schedule.warp(times[-2:-1]))
        # A pipeline whose network is called at the time before the shift passes timesteps of its own, which don't
        # stretch.
        if steps > 1 and last < 0.5 / steps and not schedule.uses_unshifted_time:
            # The stock grid ends in an almost empty step.
            scheduler = make_scheduler(self.teacher, student.prediction, steps)
            times = self._times(scheduler, steps)
        return scheduler, times

    def has_equal_jumps(self, student: Student) -> bool:
        """Return whether the pipeline makes equal jumps of any number of steps with the scheduler of ``any_step``."""
        if self.teacher.schedule.kind != "flow":
            # The stock grid of exploding levels has equal jumps with a sigma_min for one number of steps.
            return self.teacher.schedule.kind != "exploding"
        scheduler = make_scheduler(self.teacher, student.prediction)
        # Two numbers: a pipeline may shift by a number that depends on them. Odd ones, which no table is made for.
        return all(strength_of(student, self._times(scheduler, n)).is_exact for n in (3, 5))

    def _times(self, scheduler: Any, steps: int) -> Tensor:  # noqa: ANN401 a diffusers class
        sigmas = self._grids.sigmas(scheduler, steps)
        return 1 - sigmas if scheduler.config.get("invert_sigmas") else sigmas

    def _flow_map_scheduler(self) -> Any:  # noqa: ANN401 a diffusers class
        stock = make_scheduler(self.teacher, self.teacher.prediction)
        return FlowMapScheduler.from_stock(stock, self.settings(stock))

    def _run_to_network(self, scheduler: Any, steps: int) -> Recording:  # noqa: ANN401 a diffusers class
        """Run the pipeline with a scheduler up to the first call of the network.

        Raises:
            UserError: if the pipeline does not run, with the number of steps where it is the cause.
        """
        try:
            return self._first_call(scheduler, steps)
        except UserError as error:
            # Of this scheduler a copy: the run changes it.
            if steps == STEPS or not self._runs(copy.copy(scheduler), STEPS):
                raise
            cause = str(error) if error.__cause__ is None else named(error.__cause__)
            raise UserError(
                f"export.steps: {self.pipeline.class_name} does not run with {steps} step{'s' if steps > 1 else ''} "
                f"({cause}); try export.steps without {steps}"
            ) from error

    def _runs(self, scheduler: Any, steps: int) -> bool:  # noqa: ANN401 a diffusers class
        try:
            self._first_call(scheduler, steps)
        except UserError:
            return False
        return True

    def _first_call(self, scheduler: Any, steps: int) -> Recording:  # noqa: ANN401 a diffusers class
        call = self.verification_call(1) | {"num_inference_steps": steps}
        call["generator"] = torch.Generator().manual_seed(0)
        return record(self._open(scheduler), self.component, call, first_only=True)

    def check_runs(self, steps: Sequence[int]) -> None:
        """Check that the stock pipeline runs with each of these numbers of steps, up to its network.

        Raises:
            UserError: with the first number with which it does not.
        """
        for n in steps:
            if self.teacher.schedule.kind == "flow":
                self._times(self._flow_map_scheduler(), n)
            else:
                self._run_to_network(make_scheduler(self.teacher, self.teacher.prediction), n)

    def _open(self, scheduler: Any) -> Any:  # noqa: ANN401 a diffusers class
        """The teacher's pipeline on the CPU with another scheduler; its encoders are opened once."""
        codec = self.teacher.codec
        parts = parts_of(stock_network(self.teacher), self.component) | {"scheduler": scheduler}
        if isinstance(codec, PipelineCodec):
            opened = codec.opened().to("cpu")
        else:
            if self._opened is None:
                self._opened = open_pipeline(self.pipeline.folder, **parts)
            opened = self._opened
        # A shallow copy: its encoders are those of the open pipeline, its network and scheduler its own.
        pipeline = copy.copy(opened)
        for name, part in parts.items():
            setattr(pipeline, name, part)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def verification_call(self, count: int) -> dict[str, Any]:
        """Return the keywords for ``count`` samples, of the teacher's first conditions if it has any."""
        if self.teacher.conditions is None:
            return {"batch_size": count}
        conditions = self.teacher.conditions
        some = [i % len(conditions.names) for i in range(count)]
        if not isinstance(conditions, Embeddings):
            labels = [int(conditions.names[i]) for i in some]
            return {"class_labels": labels, "output_type": "np"} | self.pipeline.unguided()
        # A pipeline of pixels has no latents to return.
        latents = any(name.startswith(("vae", "vq", "movq")) for name in self.pipeline.index)
        own = self.pipeline.call | self.pipeline.unguided()
        prompt = self.pipeline.condition == "prompt"
        given = conditions.given.some(some).keywords(one=self.pipeline.one_prompt, prompt=prompt)
        return own | given | {"output_type": "latent" if latents else "np"}

    def any_step_call(self, call: dict[str, Any]) -> dict[str, Any]:
        """Return the call without a scale for a student of a range of scales: its default is the teacher's."""
        ranged = self.teacher.guidance is not None and self.teacher.guidance.range is not None
        return {key: value for key, value in call.items() if not ranged or key != self.pipeline.guidance}

    def start(
        self, call: dict[str, Any], count: int, seed: int
    ) -> tuple[Float[Tensor, "batch *event"], Conditioning | None]:
        """Return the noise that the pipeline draws, and what it passes to its network for the prompts of the call.

        The embeddings may be padded otherwise than among all prompts of a run.
        """
        # Some pipelines need more of a scheduler than the stock one of flow models has.
        flow = self.teacher.schedule.kind == "flow"
        scheduler = self._flow_map_scheduler() if flow else make_scheduler(self.teacher, self.teacher.prediction)
        pipeline, component = self._open(scheduler), self.component
        given = copy.deepcopy(call) | {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(seed)}
        with torch.random.fork_rng(devices=[]):
            # Some pipelines draw the latents of an image without their generator.
            torch.manual_seed(seed)
            seen = record(pipeline, component, given, first_only=True)
        arguments, cond = seen.calls[0].arguments, self.teacher.first_conditions(count)
        if self.network_call is None:
            x = tensor_of(next(iter(arguments.values())))
        else:
            x, cond = self.network_call.sample_of(arguments), self.network_call.conditions_of(arguments, count)
            cond = cond if self.teacher.guidance is None else self.teacher.guidance.at(cond)
        return x[:count] / self._gain_of_start(), cond

    def _gain_of_start(self) -> float:
        """The size of the network's first input; of exploding levels that of the scheduler, preconditioned."""
        spread = self.teacher.parametrization.sigma_data
        if self.teacher.schedule.kind != "exploding":
            return 1.0
        # The scheduler starts at the root of sigma_max^2 + 1 times N(0, I).
        high = cast("VarianceExploding", self.teacher.schedule).sigma_max ** 2
        return ((high + 1) / (1 if spread is None else high + spread**2)) ** 0.5

    def shared_bytes(self) -> int:
        """Return the size of the components other than network and scheduler."""
        return parts_bytes(self.pipeline)

    def own_modules(self, student: Student) -> Sequence[nn.Module]:
        """Return the network."""
        return [student.network]
