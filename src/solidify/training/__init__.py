"""Making it learn: data, trainers, checkpoints."""
