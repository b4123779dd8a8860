"""Samplers: from a condition and noise to a clip."""
