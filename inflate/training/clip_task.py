"""What all tasks share that train a video UNet on clips: the clips' latents, the export, and where networks are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inflate.training.adapting import Adapting
from inflate.training.economy import as_loaded
from inflate.training.player import Batch, Player


class ClipTask:
    """Trains `family.unet` or, beside it, an adapter."""

    family: Any
    adapter: Adapting | None
    players: Sequence[Player]

    def clean(self, batch: Batch, device: torch.device) -> Tensor:
        """The clips' scaled latents (B, F, C, h, w)."""
        if "latents" in batch:
            latents: Tensor = batch["latents"].to(device, self.family.vae.dtype)
            return latents
        encoded: Tensor = self.family.encode(batch["pixels"].to(device))
        return encoded

    def export(self, folder: Path) -> None:
        """Write the adapter or, without one, the whole model as a folder that its family loads."""
        if self.adapter is None:
            with as_loaded(self.family.unet):
                self.family.save_pretrained(folder)
        else:
            self.adapter.export(self.family.unet, folder)

    def _idle(self) -> list[nn.Module]:
        """What may leave the device while encoders and the decoder work: the UNet of a run of one process.

        Of several, it stays: PyTorch forgets the hooks by which they exchange gradients where a weight changes its
        device.
        """
        return [] if torch.distributed.is_initialized() else [self.family.unet]

    def _device(self) -> torch.device:
        return next(self.players[0].network.parameters()).device
