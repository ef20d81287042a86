"""How a whole model behaves: properties that a change must keep, and the probes that measure them.

The files depend on torch, transformers and one another alone: a process that has no solidify runs them by their path.
"""
