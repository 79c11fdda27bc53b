"""Velocity fields in closed form, with which losses and samplers are compared."""

from __future__ import annotations

from fmm_distill.teachers.closed_form.checkerboard import Checkerboard
from fmm_distill.teachers.closed_form.gaussian import Gaussian
from fmm_distill.teachers.closed_form.two_modes import TwoModes

__all__ = ["Checkerboard", "Gaussian", "TwoModes"]
