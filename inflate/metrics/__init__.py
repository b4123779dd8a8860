"""Measures of videos: error, flicker, sharpness, perceptual distance, motion, agreement with prompts, FVD."""
