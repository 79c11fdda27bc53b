"""Measurements of time and memory; not installed with the package."""

import os

# OpenMP reads this when torch is imported. Waiting threads then sleep and leave the cores to other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
