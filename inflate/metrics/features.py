"""The network whose features FVD compares, from a TorchScript file.

Published numbers rest on `i3d_torchscript.pt`, I3D trained on Kinetics-400 as StyleGAN-V ships it, called as
`network(clips, rescale=True, resize=True, return_features=True)` on clips (N, 3, F, H, W) with values 0 to 255: it
squashes the frames to 224 x 224 itself and returns the 400 logits. Any other network whose script takes these arguments
will do, and the protocol names its hash. Loading the file makes the code in it executable, so take one from a source
that you trust.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from inflate.errors import CheckpointError
from inflate.files import sha256

FLAGS = ("rescale", "resize", "return_features")
RESIZE = "by the network"
"""How the protocol calls what the flag `resize` does."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A scripted network of videos, and the hash of its file."""

    script: nn.Module
    sha256: str

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> FeatureNetwork:
        """Read a TorchScript file, whose code can then run; CheckpointError where it is none or takes no FLAGS."""
        if not path.is_file() or not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is no file of TorchScript; give one such as i3d_torchscript.pt")
        try:
            script = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(
                f"{path} cannot be read as TorchScript ({reason}); give one such as i3d_torchscript.pt"
            ) from error
        taken = [argument.name for argument in script.forward.schema.arguments[1:]]
        if not set(FLAGS) < set(taken):
            raise CheckpointError(f"{path} takes ({', '.join(taken)}); FVD calls it with clips and {', '.join(FLAGS)}")
        return cls(script, sha256(path))

    @torch.no_grad()
    def __call__(self, frames: npt.NDArray[np.uint8]) -> Tensor:
        """The features (D,), float64 on the CPU, of a clip's frames (F, H, W, 3); CheckpointError where it cannot."""
        device = next((tensor.device for tensor in self.script.parameters()), torch.device("cpu"))
        clip = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].to(device, torch.float32)  # (1, 3, F, H, W)
        try:
            found: Tensor = self.script(clip, **dict.fromkeys(FLAGS, True))
        except (RuntimeError, torch.jit.Error) as error:
            reason = str(error).strip().splitlines()[-1]
            raise CheckpointError(
                f"the feature network refuses {len(frames)} frames of {frames.shape[1:3]}: {reason}"
            ) from error
        return found.flatten().double().cpu()  # (D,)
