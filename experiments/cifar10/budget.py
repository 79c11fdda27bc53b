"""Sizes of the CIFAR-10 experiment: for minutes on a GPU, for hours on a CPU, and for tests."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BUDGETS", "Budget"]


@dataclass(frozen=True)
class Budget:
    """Sizes and durations of all stages.

    Attributes:
        size: height and width of the images, which are resized.
        precision: of the teacher's and the classifier's training, and of sampling.
        student_precision: of the students' training.
        channels: of the network's levels; 10.7 million parameters, 1.0 GFLOP per call on one image. Most parameters are
            at low resolution, where they cost little: (64, 128, 192) has 7.2 million and costs 2.4 GFLOP.
        teacher_fraction: of the minutes, for the teacher, compilation included.
        steps: of each student; 0: as many as fit, from the speed of each loss.
        parallel: students that train at the same time, each in its own process.
        peers: processes of other packages that train on the device at the same time.
        seeded: the number of the best students that are trained with a second seed.
        solver_steps: RK4 steps of the teacher's ODE, for the endpoint error.
        calls: the numbers of calls that each student is measured at; 32 more calls take as long as all of the others.
        reserve: seconds at the end, for the last measurements and the pictures.
        watched: seconds in which the speed of all losses is measured at the same time.
        startup: seconds in which processes start and end and the device is idle.
    """

    size: int = 32
    channels: tuple[int, ...] = (32, 64, 128, 256)
    precision: str = "bf16"
    student_precision: str = "bf16"
    teacher_fraction: float = 0.25
    teacher_batch: int = 512
    teacher_rate: float = 1e-3
    teacher_steps: int = 1_000_000
    classifier_width: int = 256
    classifier_epochs: int = 16
    steps: int = 0
    batch: int = 128
    learning_rate: float = 5e-4
    parallel: int = 8
    peers: int = 0
    seeded: int = 2
    samples: int = 10_000
    endpoint_samples: int = 512
    solver_steps: int = 32
    measure_batch: int = 1000
    calls: tuple[int, ...] = (1, 2, 4, 8, 16)
    watched: float = 8.0
    reserve: float = 25.0
    startup: float = 45.0


BUDGETS = {
    "gpu": Budget(),
    # Few channels at high resolution: 2.5 million parameters at 60 MFLOP per call on one image.
    "cpu": Budget(
        size=16,
        channels=(16, 32, 64, 128),
        student_precision="fp32",
        teacher_fraction=0.3,
        teacher_batch=128,
        teacher_steps=6000,
        classifier_width=128,
        classifier_epochs=10,
        steps=500,
        batch=64,
        parallel=2,
        calls=(1, 2, 4, 8, 16, 32),
        solver_steps=32,
        reserve=60.0,
    ),
    "toy": Budget(
        precision="fp32",
        student_precision="fp32",
        channels=(16, 16),
        teacher_batch=16,
        teacher_steps=20,
        classifier_width=16,
        classifier_epochs=1,
        steps=20,
        batch=8,
        parallel=2,
        seeded=1,
        samples=64,
        endpoint_samples=16,
        solver_steps=4,
        measure_batch=32,
        watched=1.0,
        reserve=1.0,
        startup=0.0,
    ),
}
