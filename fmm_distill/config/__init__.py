"""Recipes: every setting of a run as one typed object."""
