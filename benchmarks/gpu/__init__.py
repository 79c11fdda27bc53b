"""Measurements on a GPU that is available for minutes."""
