"""Noise schedules on the time axis, one class per file.

A schedule maps a teacher's noise levels to t, returns the time input of its network, and measures the length of jumps.
"""

from __future__ import annotations

from fmm_distill.core.schedules.angular import Angular
from fmm_distill.core.schedules.base import Schedule
from fmm_distill.core.schedules.discrete import VariancePreserving
from fmm_distill.core.schedules.edm import VarianceExploding
from fmm_distill.core.schedules.flow import FlowMatching

__all__ = ["Angular", "FlowMatching", "Schedule", "VarianceExploding", "VariancePreserving"]
