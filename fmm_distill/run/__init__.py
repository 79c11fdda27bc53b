"""The work of a command: a run from its plan to its export, and a run opened again."""
