"""What is trained: low-rank updates and parameters in full, saved, loaded, merged. Knows PEFT."""
