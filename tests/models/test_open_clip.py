"""An image encoder under OpenCLIP's names computes what the original computes, and comes back bit for bit."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from original_files import equal, wide_encoder
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from inflate.errors import CheckpointError
from inflate.models import open_clip

Tensors = dict[str, Tensor]


class Block(nn.Module):
    """A layer of CLIP (Radford et al., 2103.00020) out of PyTorch's own attention, as OpenCLIP has it."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = {"c_fc": nn.Linear(width, hidden), "gelu": nn.GELU(), "c_proj": nn.Linear(hidden, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Visual(nn.Module):
    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        width, hidden = len(tensors["class_embedding"]), len(tensors["transformer.resblocks.0.mlp.c_fc.bias"])
        patch = tensors["conv1.weight"].shape[-1]
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        for name in ("class_embedding", "positional_embedding", "proj"):
            setattr(self, name, nn.Parameter(torch.zeros_like(tensors[name])))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([Block(width, hidden, heads=16)])
        self.load_state_dict(tensors)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).flatten(2).mT  # (B, N, W)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer.resblocks[0](self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj  # (B, D)


@pytest.fixture(scope="module")
def encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    return wide_encoder()


@pytest.fixture
def tensors(encoder: CLIPVisionModelWithProjection) -> Tensors:
    return open_clip.image_encoder_tensors(encoder)


@torch.no_grad()
def test_both_namings_compute_the_same(encoder: CLIPVisionModelWithProjection, tensors: Tensors) -> None:
    image = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = encoder(image).image_embeds
    assert expected.std() > 0.1
    torch.testing.assert_close(Visual(tensors).eval()(image), expected, atol=2e-5, rtol=1e-4)
    loaded = open_clip.load_image_encoder(tensors, "the file")
    assert torch.equal(loaded(image).image_embeds, expected)


def test_an_encoder_comes_back_bit_for_bit(encoder: CLIPVisionModelWithProjection, tensors: Tensors) -> None:
    loaded = open_clip.load_image_encoder(tensors, "the file")
    assert equal(loaded.state_dict(), encoder.state_dict())
    assert equal(open_clip.image_encoder_tensors(loaded), tensors)
    assert open_clip.differing(loaded) == []


def test_the_published_encoder_has_392_tensors() -> None:
    shape = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    with torch.device("meta"):
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape, patch_size=14, projection_dim=1024))
    tensors = open_clip.image_encoder_tensors(encoder)
    assert (len(tensors), sum(map(torch.numel, tensors.values()))) == (392, 632_076_800)
    assert tensors["transformer.resblocks.31.attn.in_proj_weight"].shape == (3840, 1280)
    assert tensors["proj"].shape == (1280, 1024)
    assert open_clip.differing(encoder) == ["image encoder hidden_act quick_gelu"]


def test_tensors_that_do_not_fit_are_listed(tensors: Tensors) -> None:
    odd = {**tensors, "ln_mid.bias": tensors["ln_pre.bias"]}
    del odd["transformer.resblocks.0.attn.in_proj_bias"]
    message = r"1 missing \(transformer\.resblocks\.0\.attn\.in_proj_bias\); 1 left over \(ln_mid\.bias\)"
    with pytest.raises(CheckpointError, match=message):
        open_clip.load_image_encoder(odd, "the file")


def test_an_encoder_under_transformers_names_is_read(encoder: CLIPVisionModelWithProjection) -> None:
    tensors = encoder.state_dict()
    assert equal(open_clip.load_image_encoder(tensors, "the file").state_dict(), tensors)
    attention = "vision_model.encoder.layers.0.self_attn"
    for part in "qkv":
        with pytest.raises(CheckpointError, match=rf"self_attn\.{part}_proj\.bias is missing"):
            open_clip.load_image_encoder(_without(tensors, f"{attention}.{part}_proj.bias"), "the file")
    surplus = {attention.replace("0", "1") + ".k_proj.bias": torch.zeros(1280)}
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.bias is missing"):
        open_clip.load_image_encoder({**tensors, **surplus}, "the file")


def test_an_encoder_under_unknown_names_is_refused_with_the_remedy() -> None:
    with pytest.raises(CheckpointError, match=r"class_embedding, .* missing; give the encoder's folder"):
        open_clip.load_image_encoder({"trunk.norm.weight": torch.zeros(1)}, "the file")


def _without(tensors: Tensors, key: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != key}


def test_a_width_of_no_known_encoder_is_refused(tensors: Tensors) -> None:
    with pytest.raises(CheckpointError, match="768 channels wide, whose tensors do not tell its number of heads"):
        open_clip.load_image_encoder({**tensors, "class_embedding": torch.zeros(768)}, "the file")
    narrow = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert open_clip.differing(CLIPVisionModelWithProjection(narrow)) == ["image encoder hidden_size 16"]
