"""Data: images, tables, prompts, latents and trajectories, and where jumps start."""
