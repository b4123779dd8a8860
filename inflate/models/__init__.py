"""The backbones: the 2D model with temporal children, and the discriminators that judge it."""
