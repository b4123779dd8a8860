"""Measures that save memory change neither outputs nor gradients, and hold less, in the order in which they say so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig

from helpers import randomise, tiny_unet_sd1, tiny_unet_sd2, tiny_unet_sdxl, tiny_vae, unet_inputs
from inflate.errors import ConfigError
from inflate.layers.policy import POLICIES, WHOLE
from inflate.models.unet import ANIMATEDIFF_V2, MODELSCOPE, VIDEO_LDM, TemporalSpec, VideoUNet
from inflate.models.vae import VideoVAE, streams
from inflate.training.economy import save_decoding, save_memory
from inflate.training.memory import Estimate, simulate
from inflate.training.memory_settings import Memory

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MEASURES = (
    Memory("feed_forward"),
    Memory("all_but_attention", offload=True),
    Memory("nested", {"up_blocks.0": "all_but_attention", "*.resnets.*": "units"}, 3, offload=True),
)
"""Those that differ from units, which the tests of the models compare."""


def network(spec: TemporalSpec = VIDEO_LDM, build: Any = tiny_unet_sd2, lora: str | list[str] = "") -> VideoUNet:
    """An inflated UNet in float64, none of whose layers is zero."""
    unet = VideoUNet.from_2d(build(), spec)
    randomise(unet)
    if lora:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=2, target_modules=lora, init_lora_weights=False))
    return unet.double().train()


def clips() -> list[dict[str, Any]]:
    """Two calls, of which the second has other frames, an image among them, and one token of context."""
    images = torch.tensor([[True, False, False, True]])
    given = [unet_inputs(), {**unet_inputs(batch=1, frames=4, tokens=1, seed=1), "image_only": images}]
    return [{n: v.double() if v.is_floating_point() else v for n, v in call.items()} for call in given]


def outcome(unet: VideoUNet) -> dict[str, torch.Tensor]:
    """Outputs and gradients over two calls of which the first's backward pass comes after the second's forward pass."""
    torch.manual_seed(0)  # of dropout
    outputs = [unet(**call).sample for call in clips()]
    sum(output.square().sum() for output in outputs).backward()
    made = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    return made | {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("spec", "build", "lora"),
    [
        (VIDEO_LDM, tiny_unet_sd2, ""),
        (VIDEO_LDM, tiny_unet_sd1, ["to_q", "to_v", "to_out.0", "net.0.proj", "net.2"]),
        (MODELSCOPE, tiny_unet_sd2, ""),
        (MODELSCOPE, tiny_unet_sd2, ["to_k", "to_out.0", "net.2"]),
        (ANIMATEDIFF_V2, tiny_unet_sd1, ""),
        (ANIMATEDIFF_V2, tiny_unet_sd2, ["to_q", "net.0.proj"]),
    ],
)
def test_every_measure_leaves_outputs_and_gradients_equal(spec: TemporalSpec, build: Any, lora: list[str]) -> None:
    plain = network(spec, build, lora)
    saving = copy.deepcopy(plain)
    expected = outcome(plain)
    learning = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert expected.keys() == learning | {"output 0", "output 1"}
    for memory in MEASURES:
        save_memory(saving, memory)
        saving.zero_grad()
        found = outcome(saving)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-10, rtol=1e-8, msg=f"{memory}: {key}")


def on_meta(memory: Memory, lora: str | list[str] = "", build: Any = tiny_unet_sd2, frames: int = 8) -> Estimate:
    """The cost of a step with frames of 32 x 32 latents."""
    unet = VideoUNet.from_2d(build(), VIDEO_LDM)
    if lora:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=2, target_modules=lora))
    for parameter in unet.inert_parameters().values():
        parameter.requires_grad_(False)
    save_memory(unet.to("meta").train(), memory)
    given = {"sample": (1, frames, 4, 32, 32), "timestep": (1,), "encoder_hidden_states": (1, 1, 32)}
    return simulate(
        unet,
        lambda: {name: torch.empty(shape, device="meta") for name, shape in given.items()},
        lambda unet, batch: unet(**batch).sample.square().mean(),
    )


def test_each_policy_holds_less_than_the_one_before_and_takes_the_time_that_it_says() -> None:
    memories = [*(Memory(policy) for policy in POLICIES), Memory("units", {}, 8), Memory("units", {}, 8, offload=True)]
    costs = [on_meta(memory, ATTENTION) for memory in memories]
    nothing, feed_forward, attention, units, nested, parts, offload = costs
    assert nothing.held > 1.2 * feed_forward.held > 2 * attention.held > 2.2 * units.held
    assert nested.held == parts.held == units.held > 2 * offload.held
    assert nothing.flops < feed_forward.flops < attention.flops < units.flops < min(nested.flops, parts.flops)
    assert nothing.forward_flops == nested.forward_flops == parts.forward_flops
    peaks = [cost.activation_peak for cost in (nothing, units, parts, offload)]
    assert peaks == sorted(peaks, reverse=True)
    assert nested.activation_peak < units.activation_peak
    # No skip connection is held a second time, as the last channels of what a residual block keeps.
    assert not [one for one in units.holdings if one.operation == "aten.cat.default" and one.bytes > 1e5]


@pytest.mark.parametrize("policy", ["nothing", "all_but_attention", "nested"])
def test_below_the_first_trained_layer_nothing_is_kept_and_nothing_recomputed(policy: Any) -> None:
    memory = Memory(policy, offload=policy in WHOLE)
    late = "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0"
    early = "down_blocks.0.resnets.0.conv1"
    some, most = on_meta(memory, [late]), on_meta(memory, [late, early])
    kept = {one.module for one in some.holdings if one.bytes > 4096 and one.operation != "given"}
    assert kept
    assert not [name for name in kept if name.startswith(("down_blocks", "mid_block", "up_blocks.0", "conv_in"))], kept
    assert some.flops - some.forward_flops < 0.35 * (most.flops - most.forward_flops)


def test_patterns_choose_blocks_and_the_last_that_fits_wins() -> None:
    unet = network()
    save_memory(unet, Memory("nothing", {"up_blocks.*": "units", "up_blocks.1": "nested", "*.resnets.1": "nothing"}))
    assert unet.down_blocks[0].resnets[0].recompute is None
    assert unet.up_blocks[0].resnets[0].recompute is not None
    assert unet.up_blocks[1].resnets[1].recompute is None
    inner = unet.up_blocks[1].attentions[0].transformer_blocks[0]
    assert inner.recompute is not None
    assert inner.temporal.recompute is not None
    unet.enable_gradient_checkpointing()
    assert unet.down_blocks[0].resnets[0].recompute is not None
    assert inner.recompute is None


@pytest.mark.parametrize("pattern", ["up_block.1", "up_blocks.7", "down_blocks.0.resnet.0"])
def test_a_pattern_that_fits_no_block_is_refused_with_the_nearest(pattern: str) -> None:
    nearest = {"up_block.1": "up_blocks.1", "up_blocks.7": "up_blocks.1"}.get(pattern, "down_blocks.0.resnets.0")
    with pytest.raises(ConfigError, match=f"recompute_in: {pattern} fits no block; the nearest are.*{nearest}"):
        save_memory(network(), Memory(recompute_in={pattern: "units"}))


def test_what_only_transformers_have_is_refused_for_a_decoder() -> None:
    vae = VideoVAE.from_2d(tiny_vae())
    save_memory(vae, Memory("units", offload=True))
    assert vae.is_gradient_checkpointing
    for memory in (Memory("nested"), Memory("feed_forward"), Memory(recompute_in={"decoder": "all_but_attention"})):
        with pytest.raises(ConfigError, match=r"a VideoVAE has none: set memory.recompute=units"):
            save_memory(vae, memory)
    with pytest.raises(ConfigError, match="feed_forward_parts=2 is for networks with transformers"):
        save_memory(vae, Memory(feed_forward_parts=2))


def test_a_transformer_of_ten_blocks_is_recomputed_block_by_block() -> None:
    unet = VideoUNet.from_2d(tiny_unet_sdxl(), VIDEO_LDM)
    save_memory(unet, Memory("nested"))
    inner = [module for module in unet.modules() if type(module).__name__ in ("SpatialBlock", "VideoBlock")]
    assert len(inner) > 6
    assert all(module.recompute is not None for module in inner)


def test_clips_are_decoded_in_parts_where_that_is_asked_for() -> None:
    image = tiny_vae()
    video = VideoVAE.from_2d(image)
    for rows in (0, 4):
        for vae in (image, video):
            save_decoding(vae, Memory(decode_rows=rows))
        assert streams(video) is streams(image) is (rows > 0)
    with pytest.raises(ConfigError, match=r"memory.decode_rows=-1: must be 1 or more, or 0"):
        Memory(decode_rows=-1)
