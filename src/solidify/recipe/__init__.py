"""From YAML to stages."""
