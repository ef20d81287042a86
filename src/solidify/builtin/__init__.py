"""What is built in, so that everything can be tried offline: a tiny OLMoE, and the text it was trained on."""
