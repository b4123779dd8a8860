"""The feature network of FVD: a small script saved here, called as I3D is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import busy
from networks import TinyI3D, save_script
from torch import Tensor, nn

from inflate.errors import CheckpointError
from inflate.files import sha256
from inflate.metrics.features import FeatureNetwork


class WithoutFlags(nn.Module):
    def forward(self, clip: Tensor) -> Tensor:
        return clip.mean((2, 3, 4))


def test_the_network_is_called_with_all_flags_on_clips_from_0_to_255(tmp_path: Path) -> None:
    network = TinyI3D()
    loaded = FeatureNetwork.load(save_script(network, tmp_path / "i3d.pt"))
    frames = busy(6, 20, 24)
    clip = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1  # (1, 3, F, H, W) in [-1, 1]
    small = nn.functional.interpolate(clip, size=(6, 8, 8), mode="trilinear")
    expected = network.last(nn.functional.silu(network.first(small))).mean((2, 3, 4))[0]
    assert loaded(frames).dtype == torch.float64
    assert loaded(frames).tolist() == pytest.approx(expected.double().tolist(), abs=1e-6)
    assert loaded.sha256 == sha256(tmp_path / "i3d.pt")


def test_what_is_no_such_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not a network")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "tensors.pt")
    save_script(WithoutFlags(), tmp_path / "plain.pt")
    for name, reason in {
        "absent.pt": "no file of TorchScript", "text.pt": "no file of TorchScript",
        "tensors.pt": "cannot be read as TorchScript", "plain.pt": r"takes \(clip\)",
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=f"{name} .*{reason}"):
            FeatureNetwork.load(tmp_path / name)


def test_frames_that_the_network_refuses_are_an_error_that_says_so(tmp_path: Path) -> None:
    loaded = FeatureNetwork.load(save_script(TinyI3D(), tmp_path / "i3d.pt"))
    with pytest.raises(CheckpointError, match="refuses 2 frames"):
        loaded(np.zeros((2, 20, 24, 4), np.uint8))
