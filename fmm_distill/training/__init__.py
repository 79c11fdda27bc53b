"""Training: the loop, its objective, its averages and its checkpoints."""
