"""The cases of the comparison: maps, second stages on a map, and FastGen's DMD2; and the sizes of the experiment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from experiments.matching.peer import DMD2Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BUDGETS", "CASES", "MAP", "MAP_PART", "Budget", "Case", "map_changes", "matching_changes"]

MAP, MAP_PART = "map", "map, 70 %"


@dataclass(frozen=True)
class Budget:
    """Sizes of the comparison.

    Attributes:
        map_steps: steps of the map alone; its CPU seconds are those of all other cases, the part of their map included.
        map_fraction: of the map's steps, for the students that a second stage starts from.
        samples: of a row's Fréchet distance and recall.
        critic_warmup: updates of the critic before the first step of a second stage.
        cost_steps: steps whose operations are counted.
    """

    map_steps: int = 440
    map_fraction: float = 0.7
    batch: int = 64
    learning_rate: float = 5e-4
    ema: float = 0.98
    samples: int = 2500
    endpoint_samples: int = 512
    solver_steps: int = 32
    measure_batch: int = 250
    calls: tuple[int, ...] = (1, 2, 4, 8, 16)
    critic_warmup: int = 80
    cost_steps: int = 8


BUDGETS = {
    "cpu": Budget(),
    "toy": Budget(
        map_steps=4,
        map_fraction=0.5,
        batch=8,
        samples=32,
        endpoint_samples=8,
        solver_steps=2,
        measure_batch=32,
        calls=(1, 2),
        critic_warmup=1,
        cost_steps=1,
    ),
}


@dataclass(frozen=True)
class Case:
    """A way to spend the seconds.

    Attributes:
        kind: a map, a second stage on the map of ``map_fraction``, or DMD2 by FastGen's code.
        matching: settings of a second stage, in addition to the common ones.
        peer: settings of DMD2.
        from_map: DMD2 starts from the map of ``map_fraction`` and has the rest of the seconds; else from the teacher.
    """

    kind: Literal["map", "matching", "dmd2"]
    matching: tuple[str, ...] = ()
    peer: DMD2Settings = field(default_factory=DMD2Settings)
    from_map: bool = False


# Common to all second stages, chosen on seed 0 with 2000 samples.
MATCHING = (
    # The map's changes have set the group to null.
    "matching={steps: 100000}",
    # The number of steps is not known before.
    "matching.lr_schedule=constant",
    "matching.fraction=0.75",
    # The gradients of the map's relative losses are several times larger, and AdamW divides by the sum.
    "matching.weight=20",
    "matching.optimizer.lr=0.0002",
    "matching.optimizer.betas=[0.9, 0.99]",
    # At 1e-4 the critic lags and the student drifts away; without its average single batches would lead the student.
    "matching.critic.optimizer.lr=0.0005",
    "matching.critic.optimizer.betas=[0.9, 0.999]",
    "matching.critic.ema=0.9",
    "matching.critic.updates=2",
)

# The noisiest fifth has no signal that the critic learns in so few updates.
LOSS = "matching.loss={{name: {}, times: [0.02, 0.8]}}"

CASES: dict[str, Case] = {
    MAP: Case("map"),
    MAP_PART: Case("map"),
    "map + kl": Case("matching", (LOSS.format("distribution_matching"),)),
    "map + flow_generator_matching": Case("matching", (LOSS.format("flow_generator_matching"),)),
    "map + score_implicit_matching": Case("matching", (LOSS.format("score_implicit_matching"),)),
    "FastGen DMD2": Case("dmd2"),
    "FastGen DMD2, 4 steps": Case("dmd2", peer=DMD2Settings(student_sample_steps=4)),
    "FastGen DMD2, from the map": Case("dmd2", from_map=True),
    # FastGen's rate is for 100,000 iterations with 2048 images each.
    "FastGen DMD2, rate 5e-4": Case("dmd2", peer=DMD2Settings(lr=5e-4)),
    "FastGen DMD2, rate 5e-4, from the map": Case("dmd2", peer=DMD2Settings(lr=5e-4), from_map=True),
}


def map_changes(budget: Budget, steps: int, seed: int) -> list[str]:
    """Return the changes of the recipe ``cifar10-fast`` for a map of this many steps."""
    return [
        # The teacher predicts v: all of its timesteps are accurate.
        "timesteps=null",
        "matching=null",
        "training.precision=fp32",
        "loss.derivative=auto",
        f"training.steps={steps}",
        f"training.batch_size={budget.batch}",
        f"training.warmup_steps={min(20, steps // 4)}",
        f"training.ema={budget.ema}",
        f"training.seed={seed}",
        f"training.checkpoint_every={max(steps, 1)}",
        "training.checkpoints_total_limit=1",
        f"optimizer.lr={budget.learning_rate}",
    ]


def matching_changes(
    budget: Budget, case: Case, map_folder: str, seed: int, common: Sequence[str] = MATCHING
) -> list[str]:
    """Return the changes of the same recipe for a second stage on the map in a run folder."""
    changes = [*map_changes(budget, 0, seed), "training.warmup_steps=0", f"student.init={map_folder}"]
    # The end of the stage is not known before. A checkpoint per step would take a part of its seconds.
    changes += ["training.checkpoint_every=100000", *common]
    return [*changes, f"matching.critic.warmup_steps={budget.critic_warmup}", *case.matching]
