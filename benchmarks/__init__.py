"""Measurements of the package and of its methods; not installed with it."""

import os

# Before torch is imported, as the command line does: waiting threads sleep instead of stealing a busy machine's cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
