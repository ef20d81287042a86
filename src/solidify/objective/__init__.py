"""What is minimised: terms that see inside the model, and the scaling that keeps each one's gradient its own."""
