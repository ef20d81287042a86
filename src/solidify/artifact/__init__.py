"""The model on disk: a self-contained directory, written, verified and loaded."""
