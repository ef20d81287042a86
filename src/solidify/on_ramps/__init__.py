"""Models that were not made here: patched by hand, or of plain torch."""
