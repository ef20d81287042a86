"""Making it learn: data, adapters, objective, trainer."""
