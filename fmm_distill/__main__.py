"""``python -m fmm_distill`` and ``accelerate launch -m fmm_distill``."""

from __future__ import annotations

from fmm_distill.cli import main

if __name__ == "__main__":
    main()
