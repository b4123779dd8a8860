"""Measures of a video against the truth: error, flicker, sharpness, perceptual distance and direction of motion."""
