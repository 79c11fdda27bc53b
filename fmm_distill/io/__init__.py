"""Files and streams: atomic writes, checked reads, locks."""
