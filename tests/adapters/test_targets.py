"""Which layers patterns name, and which of them would learn nothing."""

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_adapter import settings, video_unet

from helpers import tiny_unet, tiny_unet_sd1, tiny_unet_sdxl
from inflate.adapters import targets
from inflate.errors import ConfigError
from inflate.models.unet import MODELSCOPE, VIDEO_LDM, VideoUNet
from inflate.surgery import inflate_unet


@pytest.fixture(scope="module")
def unet() -> VideoUNet:
    return video_unet()


@pytest.fixture(scope="module")
def newborn() -> VideoUNet:
    return video_unet(trained=False)


def named(unet: VideoUNet, *patterns: str, **changes: object) -> list[str]:
    return targets.resolve(unet, settings(targets=[*patterns], **changes))


def test_an_image_models_names_do_not_reach_temporal_layers(unet: VideoUNet) -> None:
    spatial, temporal = named(unet, "attn1.to_q"), named(unet, "temporal.attn1.to_q")
    assert len(spatial) == len(temporal) == 4
    assert not any(".temporal." in name for name in spatial)
    assert all(".temporal." in name for name in temporal)
    assert named(unet, "*", "temporal.*") == [*targets.adaptable(unet)]


def test_what_is_excluded_is_left_out_on_both_sides(unet: VideoUNet) -> None:
    kept = named(unet, "to_q", "temporal.*.to_q", exclude=["attn2.to_q"])
    assert len(kept) == 8
    assert all("attn1.to_q" in name for name in kept)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("attn1.to_qq", "attn1.to_qq names no layer; the nearest are .*attn1.to_q"),
        ("temporal.norm1", r"temporal.norm1 names no layer that an adapter can sit on \(.*is a LayerNorm"),
        ("attn1", "is a Attention"),
    ],
)
def test_a_pattern_that_names_no_layer_is_refused(unet: VideoUNet, pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        named(unet, "temporal.attn1.to_q", pattern)
    with pytest.raises(ConfigError, match=f"adapter.exclude: {pattern}"):
        named(unet, "temporal.attn1.to_q", exclude=[pattern])


def test_a_pattern_of_temporal_layers_alone_says_so(unet: VideoUNet) -> None:
    with pytest.raises(ConfigError, match=r"ff_in.net.2 names no layer of the image model; .*say temporal.ff_in.net.2"):
        named(unet, "attn1.to_q", "ff_in.net.2")
    assert len(named(unet, "attn1.to_q", "temporal.ff_in.net.2")) == 8


def test_nothing_left_is_refused(unet: VideoUNet) -> None:
    with pytest.raises(ConfigError, match="no layer is left"):
        named(unet, "attn1.to_q", exclude=["attn1.*"])


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_convolutions_over_time_are_for_loras_alone(unet: VideoUNet, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"resnets.0.temporal.conv1 and .*set kind to lora, dora or rslora"):
        targets.resolve(unet, settings(kind, targets=["temporal.*"]))


def test_a_convolution_that_owns_a_temporal_layer_is_no_target() -> None:
    inflated, _ = inflate_unet(tiny_unet(True), MODELSCOPE)
    assert "conv_in" not in targets.adaptable(inflated)
    assert "conv_in.temporal.proj_in" in targets.adaptable(inflated)


# --- what learns ------------------------------------------------------------------------------------------------------


def refusal(unet: VideoUNet, *patterns: str, tokens: int = 1, image_only: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        targets.refuse_inert(unet, named(unet, *patterns), tokens, image_only)
    return str(caught.value)


def test_queries_and_keys_beside_one_token_are_refused_by_name(unet: VideoUNet) -> None:
    told = refusal(unet, "attn*.to_q", "temporal.attn2.to_k")
    assert "transformer_blocks.0.attn2.to_q and 7 more" in told
    assert "a softmax over one context token is 1" in told
    assert "adapter.exclude=[attn2.to_q, attn2.to_k]" in told
    targets.refuse_inert(unet, named(unet, "attn*.to_q", "temporal.attn2.to_k"), 2)


def test_layers_before_a_projection_that_is_still_zero_are_refused(newborn: VideoUNet) -> None:
    for pattern in ("temporal.attn1.to_q", "temporal.conv1", "temporal.ff.net.0.proj", "temporal.position.linear_1"):
        assert "what follows it is still zero" in refusal(newborn, pattern)
    projections = ("temporal.attn1.to_out.0", "temporal.conv2", "temporal.ff.net.2", "temporal.position.linear_2")
    targets.refuse_inert(newborn, named(newborn, *projections, "attn1.to_q", "conv_in"), 1)


def test_temporal_layers_learn_nothing_from_single_images(unet: VideoUNet) -> None:
    assert "trained as single images" in refusal(unet, "attn1.to_q", "temporal.attn1.to_q", image_only=True)
    targets.refuse_inert(unet, named(unet, "attn1.to_q"), 1, image_only=True)


def test_a_dora_does_not_divide_by_nothing(unet: VideoUNet, newborn: VideoUNet) -> None:
    wanted = settings("dora", targets=["temporal.attn1.to_out.0"])
    with pytest.raises(ConfigError, match=r"some of .*temporal.attn1.to_out.0 and 3 more are zero"):
        targets.refuse_zero_rows(newborn, targets.resolve(newborn, wanted), wanted)
    targets.refuse_zero_rows(unet, targets.resolve(unet, wanted), wanted)
    wanted.kind = "lora"
    targets.refuse_zero_rows(newborn, targets.resolve(newborn, wanted), wanted)


def test_looking_changes_nothing(unet: VideoUNet) -> None:
    unet.requires_grad_(True)
    unet.conv_out.requires_grad_(False)
    before = {name: (value.clone(), value.requires_grad) for name, value in unet.named_parameters()}
    unet.enable_gradient_checkpointing()
    targets.refuse_inert(unet, named(unet, "temporal.attn1.to_q"), 1)
    unet.disable_gradient_checkpointing()
    for name, value in unet.named_parameters():
        assert torch.equal(value, before[name][0])
        assert value.requires_grad == before[name][1]
        assert value.grad is None
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize("parent", [tiny_unet_sd1, tiny_unet_sdxl])
def test_text_to_video_takes_part_too(parent: Callable[[], UNet2DConditionModel]) -> None:
    inflated, _ = inflate_unet(parent(), VIDEO_LDM)
    layers = named(inflated, "attn2.to_q")
    targets.refuse_inert(inflated, layers, 77)
    assert all(targets.gradients(inflated, layers, targets.inputs(inflated, 77)).values())
