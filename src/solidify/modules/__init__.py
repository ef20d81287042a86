"""Ready-made replacements. Each file is self-contained: it is copied into artifacts as it stands."""
