"""The network in memory: reading it, and replacing modules of it."""
