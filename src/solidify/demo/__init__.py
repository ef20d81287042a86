"""The demonstration: it runs the main job on the built-in model and tells what came of it."""
