"""Evaluate a student: its quality and speed next to its teacher's own sampler and to fast solvers.

In the order of the data: ``draws`` (noises and conditions), ``solvers`` and ``stock`` (what samplers run),
``samplers``, ``features`` and ``reference``, ``generate``, ``metrics``, ``protocol``, ``result``, ``evaluator`` (all of
these); ``compare`` (two results), ``pictures``, ``gallery`` and ``html_report``; ``monitor`` evaluates during training.
"""
