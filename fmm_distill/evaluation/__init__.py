"""What a student loses and gains, against what one would otherwise use.

In the order of the data: ``draws`` (noises), ``samplers``, ``features`` and ``reference``, ``generate``, ``metrics``,
``protocol`` and ``result``, ``measure`` (all of it), ``compare`` (two results), ``pictures``, ``gallery``, ``report``.
"""
