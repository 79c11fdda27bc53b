"""Modules that travel with an exported student. They import torch and diffusers alone."""
