"""Sizes of the inpainting experiment: for about 20 minutes of one CPU core, and for tests."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BUDGETS", "Budget"]


@dataclass(frozen=True)
class Budget:
    """Sizes and durations of all stages.

    Attributes:
        size: height and width of the images, which are resized; the latents have half of it.
        autoencoder_channels: of the two levels of the autoencoder.
        autoencoder_seconds: CPU seconds of its training, to the end of its learning rate.
        channels: of the two levels of the teacher's network.
        teacher_seconds: CPU seconds of the teacher's training, to the end of its learning rate.
        maximum_steps: of autoencoder and teacher, if they are reached earlier.
        conditions: rows of the table that the student learns.
        test_conditions: rows of the table that samplers are measured at, from images of the test split.
        steps: of a student.
        samples: of an evaluation; the first of them have an endpoint.
        solver_steps: of the teacher's ODE, for the endpoint error.
        calls: the numbers of network calls that every sampler is measured at.
        pictured: conditions of the picture.
    """

    size: int = 16
    autoencoder_channels: tuple[int, int] = (16, 32)
    autoencoder_seconds: float = 120.0
    autoencoder_batch: int = 32
    autoencoder_rate: float = 2e-3
    channels: tuple[int, int] = (32, 64)
    teacher_seconds: float = 360.0
    teacher_batch: int = 64
    teacher_rate: float = 1e-3
    maximum_steps: int = 1_000_000
    ema: float = 0.999
    conditions: int = 1024
    test_conditions: int = 256
    steps: int = 1600
    batch: int = 32
    learning_rate: float = 5e-4
    student_ema: float = 0.99
    samples: int = 256
    solver_steps: int = 32
    measure_batch: int = 128
    calls: tuple[int, ...] = (1, 2, 4, 8)
    pictured: int = 8


BUDGETS = {
    "cpu": Budget(),
    "toy": Budget(
        autoencoder_channels=(8, 8),
        autoencoder_batch=8,
        channels=(8, 8),
        teacher_batch=8,
        maximum_steps=3,
        ema=0.9,
        conditions=8,
        test_conditions=4,
        steps=2,
        batch=4,
        student_ema=0.5,
        samples=4,
        solver_steps=2,
        measure_batch=4,
        calls=(1, 2),
        pictured=2,
    ),
}
