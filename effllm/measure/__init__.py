"""Measuring models: accuracy on held-out text, bytes, memory, speed."""
