"""Derivatives of flow maps through stock diffusers networks: forward mode and central differences."""
