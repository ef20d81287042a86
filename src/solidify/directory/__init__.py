"""Whose files stand in a directory: digests, signatures, trust, and what may be written over."""
