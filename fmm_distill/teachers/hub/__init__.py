"""Pipelines of the Hub: what is fetched, and what its answers mean."""
