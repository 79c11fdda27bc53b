"""Noise schedules on the time axis, one class per file.

Each one places a teacher's own noise levels in t, gives the network's time input, and measures the length of a jump.
"""

from __future__ import annotations

from fmm_distill.core.schedules.angular import Angular
from fmm_distill.core.schedules.base import Schedule
from fmm_distill.core.schedules.discrete import VariancePreserving
from fmm_distill.core.schedules.edm import VarianceExploding
from fmm_distill.core.schedules.flow import FlowMatching

__all__ = ["Angular", "FlowMatching", "Schedule", "VarianceExploding", "VariancePreserving"]
