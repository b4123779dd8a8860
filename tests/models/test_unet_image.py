"""A UNet that attends to an image: birth, what its frames see, what is saved, recomputed, adapted and stored."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from helpers import CROSS, randomise, tiny_unet_sd1, tiny_unet_sd2, unet_inputs
from inflate.errors import InflateError, SurgeryError
from inflate.layers import quantised
from inflate.layers.image_context import ImageContext
from inflate.layers.quantised import Kind
from inflate.layers.recompute import recompute_by, set_recompute, units
from inflate.models.unet import ANIMATEDIFF_V2, DYNAMICRAFTER, MODELSCOPE, VIDEO_LDM, TemporalSpec, VideoUNet

CONTEXT = ImageContext(embedding=6, width=8, depth=1, heads=2, head_width=4, queries=2, frames=3)
GATED = ImageContext(**{**CONTEXT.to_dict(), "gate": True})
PATCHES = 5
keep = partial(checkpoint, use_reentrant=False)


def born(spec: TemporalSpec = MODELSCOPE, context: ImageContext = CONTEXT, build: Any = tiny_unet_sd2) -> VideoUNet:
    """A text-to-video model all of whose layers do something, which attends to an image from now on."""
    unet = VideoUNet.from_2d(build(), spec)
    randomise(unet)
    unet.add_image_context(context)
    return unet


def trained(*settings: Any, scale: float = 0.2, **others: Any) -> VideoUNet:
    unet = born(*settings, **others)
    randomise(unet, seed=1, scale=scale)
    return unet


def features(batch: int = 2, seed: int = 7) -> Tensor:
    return torch.randn(batch, PATCHES, CONTEXT.embedding, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def drawn(unet: VideoUNet, **given: Any) -> Tensor:
    inputs = {name: each.to(unet.dtype) for name, each in unet_inputs(channels=unet.config.in_channels).items()}
    return unet(**inputs, **given).sample


# --- birth ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [CONTEXT, GATED], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("spec", "build"),
    [(MODELSCOPE, tiny_unet_sd2), (VIDEO_LDM, tiny_unet_sd1), (ANIMATEDIFF_V2, tiny_unet_sd2)],
    ids=["modelscope", "video_ldm", "animatediff"],
)
def test_it_is_born_as_the_text_model(spec: TemporalSpec, build: Any, context: ImageContext) -> None:
    unet = born(spec, context, build).double()
    expected = drawn(unet)
    assert float((drawn(unet, image_features=features().double()) - expected).abs().max()) < 1e-13
    randomise(unet.query_transformer)
    assert float((drawn(unet, image_features=features().double()) - expected).abs().max()) < 1e-13


def test_what_is_new_is_of_the_image() -> None:
    parent = VideoUNet.from_2d(tiny_unet_sd2(), MODELSCOPE)
    before = parent.state_dict().keys()
    assert not parent.image_parameters()
    assert parent.image_context is None
    unet = born(context=GATED)
    assert unet.image_context == GATED
    assert unet.state_dict().keys() - before == unet.image_parameters().keys()
    assert before <= unet.state_dict().keys()
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.image"
    assert {f"{block}.to_k.weight", f"{block}.to_v.weight", f"{block}.gate"} <= unet.image_parameters().keys()
    assert "query_transformer.layers.0.attention.to_kv.weight" in unet.image_parameters()
    assert not unet.image_parameters().keys() & unet.temporal_parameters().keys()
    assert unet.created_parameters() == {**unet.temporal_parameters(), **unet.image_parameters()}
    assert not any(".image." in name for name in born().image_parameters() if name.endswith("gate"))


def test_the_detail_latent_and_the_frame_rate_are_born_without_effect() -> None:
    unet = trained().double()
    inputs = {name: each.double() for name, each in unet_inputs().items()}
    given = {**inputs, "image_features": features().double()}
    with torch.no_grad():
        expected = unet(**given).sample
        unet.widen(8)
        unet.add_ids(1, 32)
        wide = torch.cat([given.pop("sample"), torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)], 2)
        found = unet(wide, added_time_ids=torch.tensor([[8.0], [3.0]]), **given).sample
    assert torch.equal(found, expected)
    assert unet.config.in_channels == 8
    assert unet.spec == DYNAMICRAFTER.__class__(**{**DYNAMICRAFTER.to_dict(), "added_id_dim": 32})
    assert {name for name in unet.created_parameters() if name.startswith("class_embedding.")}
    randomise(unet.class_embedding)
    with torch.no_grad():
        one, other = (unet(wide, added_time_ids=torch.full((2, 1), rate), **given).sample for rate in (8.0, 3.0))
    assert (one - other).abs().max() > 1e-4


# --- what it sees -----------------------------------------------------------------------------------------------------


def test_tokens_made_once_are_those_of_the_features() -> None:
    unet = trained(context=GATED)
    tokens = unet.image_tokens_of(features(), 3)
    assert tokens.shape == (2, 3, 2, CROSS)
    expected = drawn(unet, image_features=features())
    assert torch.equal(drawn(unet, image_tokens=tokens), expected)
    assert (drawn(unet) - expected).abs().max() > 1e-2


def test_each_frame_sees_its_own_tokens_and_shared_ones_are_everyones() -> None:
    unet = trained()
    images = torch.ones(2, 3, dtype=torch.bool)
    tokens = unet.image_tokens_of(features(), 3).detach()
    expected = drawn(unet, image_tokens=tokens, image_only=images)
    tokens[0, 1] += 1.0
    change = (drawn(unet, image_tokens=tokens, image_only=images) - expected).abs().amax((2, 3, 4))
    assert change[0, 1] > 1e-3
    change[0, 1] = 0
    assert float(change.max()) < 1e-6
    shared = tokens[:, 0]
    repeated = drawn(unet, image_tokens=shared[:, None].expand(-1, 3, -1, -1))
    assert torch.equal(drawn(unet, image_tokens=shared), repeated)


def test_a_temporal_layer_attends_to_the_text_alone() -> None:
    """Keys that know the text must not be given the image, whose values still are zero."""
    unet = born(VIDEO_LDM, build=tiny_unet_sd2).double()
    tokens = torch.full((2, 3, 4, CROSS), 3.0, dtype=torch.float64)
    assert float((drawn(unet, image_tokens=tokens) - drawn(unet)).abs().max()) < 1e-13


def test_text_of_one_token_and_an_image_go_together() -> None:
    unet = trained(VIDEO_LDM)
    inputs = unet_inputs(tokens=1)
    for parameter in unet.inert_parameters().values():
        parameter.requires_grad_(False)
    with torch.no_grad():
        expected = unet(**inputs, image_features=features()).sample
    torch.testing.assert_close(unet(**inputs, image_features=features()).sample.detach(), expected, atol=1e-5, rtol=0)
    assert (unet(**inputs).sample.detach() - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_features": features(), "image_tokens": torch.zeros(2, 3, 2, CROSS)}, "are both given"),
        (
            {"image_features": torch.zeros(2, PATCHES, 7)},
            r"image features must be \(batch, patches, 6\), got \(2, 5, 7\)",
        ),
        (
            {"image_features": features(1)},
            r"image_tokens must be \(2, tokens, width\) or \(2, 3\) \+ .* \(1, 3, 2, 32\)",
        ),
        ({"image_tokens": torch.zeros(2, 4, 2, CROSS)}, r"image_tokens must be \(2, tokens, width\)"),
    ],
)
def test_wrong_images_are_named(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InflateError, match=message):
        drawn(trained(), **given)


def test_a_model_without_an_image_context_says_so() -> None:
    unet = VideoUNet.from_2d(tiny_unet_sd2(), MODELSCOPE)
    for given in ({"image_features": features()}, {"image_tokens": torch.zeros(2, 3, 2, CROSS)}):
        with pytest.raises(InflateError, match="this UNet attends to no image"):
            drawn(unet, **given)


def test_what_cannot_be_added_is_named() -> None:
    unet = born(DYNAMICRAFTER)
    with pytest.raises(SurgeryError, match="this UNet attends to an image already"):
        unet.add_image_context(CONTEXT)
    with pytest.raises(SurgeryError, match="this UNet embeds ids, labels or sizes"):
        unet.add_ids(1, 32)
    blind = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = VideoUNet.from_2d(tiny_unet_sd2(**blind, mid_block_type="UNetMidBlock2D"), TemporalSpec(added_ids=0))
    with pytest.raises(SurgeryError, match="this UNet has no cross-attention"):
        unet.add_image_context(CONTEXT)


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    unet = trained(VIDEO_LDM, GATED)
    unet.set_query_transformer(unet.query_transformer.with_groups(5))
    unet.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["image_context"]
    assert saved == {**GATED.to_dict(), "frames": 5, "counted": GATED.frames}
    again = VideoUNet.from_pretrained(tmp_path)
    assert again.image_context == unet.image_context
    assert again.state_dict().keys() == unet.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in unet.state_dict().items())
    assert torch.equal(drawn(again, image_features=features()), drawn(unet, image_features=features()))


def test_more_groups_of_queries_leave_the_output(tmp_path: Path) -> None:
    unet = trained(context=ImageContext(**{**CONTEXT.to_dict(), "frames": 1, "counted": 3}))
    expected = drawn(unet, image_features=features())
    unet.set_query_transformer(unet.query_transformer.with_groups(3))
    assert torch.equal(drawn(unet, image_features=features()), expected)
    assert unet.image_context == CONTEXT
    assert "query_transformer.latents" in unet.image_parameters()


# --- training ---------------------------------------------------------------------------------------------------------


def gradients(unet: VideoUNet, meanwhile: bool) -> dict[str, Tensor]:
    """Of a loss whose backward pass comes after another forward pass, of a text alone and of another length."""
    unet.zero_grad()
    inputs = {name: each.double() for name, each in unet_inputs(batch=1).items()}
    tokens = unet.image_tokens_of(features(1).double(), 3)
    tokens.retain_grad()
    torch.manual_seed(0)  # of dropout
    loss = unet(**inputs, image_tokens=tokens).sample.square().sum()
    if meanwhile:
        other = {name: each.double() for name, each in unet_inputs(batch=2, frames=2, tokens=3, seed=1).items()}
        loss = loss + 0 * unet(**other).sample.sum()
        loss = loss + 0 * unet(**other, image_features=features(seed=2).double()).sample.sum()
    loss.backward()
    own = {name: value.grad.clone() for name, value in unet.named_parameters() if value.grad is not None}
    assert tokens.grad is not None
    return {**own, "tokens": tokens.grad}


@pytest.mark.parametrize("spec", [MODELSCOPE, VIDEO_LDM], ids=["modelscope", "video_ldm"])
def test_recomputation_sees_the_image_of_its_own_forward_pass(spec: TemporalSpec) -> None:
    unet = trained(TemporalSpec(**{**spec.to_dict(), "dropout": 0.0}), GATED).double().train()
    plain = gradients(unet, meanwhile=False)
    assert plain.keys() == {*dict(unet.named_parameters()), "tokens"}
    assert plain["tokens"].abs().max() > 1e-3
    for way in (
        partial(set_recompute, unet, keep),
        partial(recompute_by, unet, dict.fromkeys(units(unet), "nested"), 2),
    ):
        way()
        found = gradients(unet, meanwhile=True)
        assert found.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-8, msg=name)


def test_a_lora_reaches_the_image_layers() -> None:
    unet = trained()
    expected = drawn(unet, image_features=features())
    unet.add_adapter(LoraConfig(r=2, target_modules=r".*\.attn2\.image\.to_[kv]|query_transformer\..*\.to_(q|kv)"))
    torch.testing.assert_close(drawn(unet, image_features=features()), expected, atol=2e-5, rtol=0)
    unet(**unet_inputs(), image_features=features()).sample.square().sum().backward()
    learning = {name: value for name, value in unet.named_parameters() if value.requires_grad}
    assert all("lora_" in name for name in learning)
    assert any(name.startswith("query_transformer.layers.0.attention.to_kv.") for name in learning)
    reached = [value for name, value in learning.items() if "lora_B" in name]
    assert len(reached) == 2 * 4 + 2  # keys and values of four blocks; two of the query transformer
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in reached)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_frozen_image_layers_are_stored_in_fewer_bits(kind: Kind) -> None:
    unet = trained(scale=0.05).requires_grad_(False)
    expected, named = drawn(unet, image_features=features()), unet.state_dict().keys()
    stored = quantised.store(unet, kind)
    assert not any(name.endswith((".to_v.weight", ".to_kv.weight")) for name in unet.image_parameters())
    assert {"mid_block.attentions.0.transformer_blocks.0.attn2.image.to_k", "query_transformer.proj_out"} <= {*stored}
    found = drawn(unet, image_features=features())
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.5
    with quantised.as_loaded(unet):
        assert unet.state_dict().keys() == named
        assert torch.equal(drawn(unet, image_features=features()), expected)
