"""Layers that turn conditions into what a UNet attends to."""

from __future__ import annotations

from torch import Tensor, nn


class ImageTokens(nn.Sequential):
    """Context tokens of an image embedding: two linear layers with SiLU between, as in ModelScope's image-to-video."""

    def __init__(self, embedding: int, hidden: int, tokens: int, width: int) -> None:
        super().__init__(nn.Linear(embedding, hidden), nn.SiLU(), nn.Linear(hidden, tokens * width))
        self.width = width

    def forward(self, input: Tensor) -> Tensor:
        """Embeddings (B,1,E) of images to tokens (B,T,C)."""
        output: Tensor = super().forward(input)  # (B, 1, T*C)
        return output.reshape(len(output), -1, self.width)  # (B, T, C)
