"""Tensors on disk: found, read, digested, converted to the in-memory layout, copied; never a whole model at once."""
