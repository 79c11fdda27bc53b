"""The checkerboard: every loss against a closed-form truth in the plane."""
