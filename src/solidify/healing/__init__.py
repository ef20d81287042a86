"""A changed model comes back: each new module learns from what it replaced, then the whole model from its base."""
