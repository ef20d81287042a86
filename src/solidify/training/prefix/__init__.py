"""Frozen layers at the beginning of a model are computed once for each batch."""
