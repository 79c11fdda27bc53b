"""Derivatives of stock networks: forward mode and central differences."""
