"""The embedded base model, its text, and the demonstration that runs the main job on them."""
