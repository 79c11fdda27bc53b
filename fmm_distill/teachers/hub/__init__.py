"""Pipelines on the Hugging Face Hub: downloads, weight variants and error messages."""
