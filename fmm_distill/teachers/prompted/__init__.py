"""Teachers of prompts: how a stock pipeline calls its network, found by watching it."""
