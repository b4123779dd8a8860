"""Layers that a 2D model gains: the clip state they share, and what mixes frames."""
