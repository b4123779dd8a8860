"""Tiny networks that measures are tested with, in the files that the published ones come in."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from inflate.metrics.perceptual import VGG16
from inflate.models.folders import SHIPPED

CLIP_SIDE = 32
"""Pixels of the tiny CLIP's images."""
_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class TinyI3D(nn.Module):
    """A network of clips that is called as the published I3D script is; six features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv3d(3, 8, 3), nn.Conv3d(8, 6, 3)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if rescale:
            x = x / 127.5 - 1
        if resize:
            x = nn.functional.interpolate(x, size=(x.shape[2], 8, 8), mode="trilinear")
        x = self.last(nn.functional.silu(self.first(x))).mean((2, 3, 4))
        return x if return_features else x.softmax(1)


def save_script(network: nn.Module, file: Path) -> Path:
    """Write a network as TorchScript."""
    torch.jit.save(torch.jit.script(network), str(file))
    return file


def write_clip(folder: Path, seed: int = 0) -> CLIPModel:
    """Write a random CLIP model with the pocket's tokenizer in transformers' layout; returns it."""
    torch.manual_seed(seed)
    words = {
        "vocab_size": 164,
        "max_position_embeddings": 20,
        "bos_token_id": 162,
        "eos_token_id": 163,
        "pad_token_id": 163,
    }
    sight = {"image_size": CLIP_SIDE, "patch_size": 8}
    config = CLIPConfig(text_config=_TOWER | words, vision_config=_TOWER | sight, projection_dim=8)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    CLIPTokenizer.from_pretrained(SHIPPED["pocket"] / "tokenizer").save_pretrained(folder)
    return model


def write_lpips(backbone: Path, heads: Path) -> None:
    """Write random weights of LPIPS under the published names."""
    tensors = lpips_weights()
    for file, named in zip((backbone, heads), tensors, strict=True):
        save_file(named, file)


def lpips_weights() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Seeded tensors of VGG16 and of LPIPS's heads under the published names."""
    generator = torch.Generator().manual_seed(0)
    backbone, channels, number = {}, 3, 0
    for stage in VGG16:
        for wider in stage:
            scale = (2 / (9 * channels)) ** 0.5
            backbone[f"features.{number}.weight"] = scale * torch.randn(wider, channels, 3, 3, generator=generator)
            backbone[f"features.{number}.bias"] = torch.zeros(wider)
            channels, number = wider, number + 2
        number += 1
    backbone["classifier.0.weight"] = torch.zeros(1)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, s[-1], 1, 1, generator=generator) for i, s in enumerate(VGG16)}
    return backbone, heads
