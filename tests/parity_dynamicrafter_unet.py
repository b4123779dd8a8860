"""DynamiCrafter's networks compared with recordings of the original's: the UNet, its blocks, its query transformer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from parity_cases import (
    DOUBLE,
    RECORDED,
    RECORDED64,
    WEIGHTS,
    Case,
    compare_settings,
    difference,
    read_json,
    same_calls,
    weights_of,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from inflate.families import dynamicrafter_keys as keys
from inflate.families import dynamicrafter_original as original
from inflate.models.original_video_names import layout_of
from inflate.models.unet import VideoUNet

SINGLE = 5e-5
TEXT, QUERIES = 77, 16
"""Tokens of a prompt, and of an image for each frame, in every model."""


def load_unet(folder: Path, name: str, gate: bool = True) -> VideoUNet:
    """Our UNet with recorded weights, its query transformer included, with or without the gate that they hold."""
    described = read_json(folder / f"unet_{name}.json")
    parts = {keys.UNET: f"unet_{name}", keys.IMAGE_PROJ: f"resampler_{name}"}
    tensors = {
        f"{prefix}{key}": tensor
        for prefix, stem in parts.items()
        for key, tensor in weights_of(folder / f"{stem}{WEIGHTS}").items()
        if gate or not key.endswith(".alpha")
    }
    unet = original.unet_of(keys.plain(tensors), name, described["resampler"]["config"]["dim_head"])
    _compare(unet, described)
    return unet.requires_grad_(False)


_AS_RELEASED = {
    "use_linear": True,
    "temporal_conv": True,
    "temporal_attention": True,
    "temporal_selfatt_only": True,
    "use_relative_position": False,
    "use_causal_attention": False,
    "addition_attention": True,
    "image_cross_attention": True,
}


def _compare(unet: VideoUNet, described: dict[str, Any]) -> None:
    """What was read off the tensors must be what the configuration says."""
    config, image = described["unet_config"], described["resampler"]["config"]
    levels = [2**level in config["attention_resolutions"] for level in range(len(config["channel_mult"]))]
    widths = [config["model_channels"] * factor for factor in config["channel_mult"]]
    expected = {
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": config["num_res_blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in levels],
        "attention_head_dim": [width // config["num_head_channels"] for width in widths],
        "transformer_layers_per_block": [config["transformer_depth"]] * len(levels),
        "cross_attention_dim": config["context_dim"],
    }
    compare_settings({name: unet.config[name] for name in expected}, expected)
    compare_settings({name: config.get(name, value) for name, value in _AS_RELEASED.items()}, _AS_RELEASED)
    assert unet.image_context is not None
    read = {**unet.image_context.to_dict(), "told": unet.spec.added_ids == 1}
    names = {"embedding_dim": "embedding", "dim": "width", "dim_head": "head_width", "num_queries": "queries",
             "video_length": "frames"}  # fmt: skip
    learned = {names.get(name, name): value for name, value in image.items() if name not in ("output_dim", "ff_mult")}
    compare_settings(read, {**learned, "told": config["fs_condition"]})


def unet_cases(folder: Path, stem: str) -> Iterator[Case]:
    """Every recorded call, with and without the gate."""
    name, described = stem.removeprefix("unet_"), read_json(folder / f"{stem}.json")
    recorded = load_file(folder / f"{stem}{RECORDED}")
    outputs = {key: tensor for key, tensor in recorded.items() if re.search(r"\.out(_noalpha)?$", key)}
    same_calls(outputs, described["cases"])
    unets = {gate: load_unet(folder, name, gate) for gate in (True, False)}

    def call(key: str, dtype: torch.dtype) -> Tensor:
        unet = unets[key.endswith(".out")]
        nn.Module.to(unet, dtype)
        return call_unet(unet, described, recorded, key.rsplit(".", 1)[0])

    yield from _precise_cases(folder, stem, outputs, call)


def _precise_cases(
    folder: Path, stem: str, outputs: dict[str, Tensor], call: Callable[[str, torch.dtype], Tensor]
) -> Iterator[Case]:
    """Ours in float64 against what is recorded in float32 and in float64; and ours in float32 against the latter.

    So each case holds the rounding of one computation, where two in float32 would add up theirs. SafetensorError or
    OSError where the recording in float64 is damaged or missing.
    """
    exact = {key: call(key, torch.float64) for key in outputs}
    for key, output in outputs.items():
        yield Case(f"{stem}.{key}", difference(exact[key], output), SINGLE)
    precise = load_file(folder / f"{stem}{RECORDED64}")
    for key in {**outputs, **precise}:
        yield Case(f"{stem}_io64.{key}", difference(exact[key], precise[key]), DOUBLE)
        yield Case(f"{stem}_io64.{key}.float32", difference(call(key, torch.float32), precise[key]), SINGLE)


@torch.no_grad()
def call_unet(unet: VideoUNet, described: dict[str, Any], recorded: dict[str, Tensor], call: str) -> Tensor:
    """Our output (B, C, F, h, w) of a recorded call; a frame rate that is not given is the configuration's."""
    given = {key.removeprefix(f"{call}."): tensor for key, tensor in recorded.items() if key.startswith(f"{call}.")}
    sample, context = (given[name].to(unet.dtype) for name in ("x", "context"))
    sample = sample.transpose(1, 2)  # (B, F, C, h, w)
    usual = torch.full((len(sample),), described["unet_config"]["default_fs"])
    ids = given.get("fs", usual)[:, None].to(unet.dtype) if unet.spec.added_ids else None
    tokens = _tokens(context[:, TEXT:], sample.shape[1])
    output: Tensor = unet(sample, given["timesteps"], context[:, :TEXT], ids, **tokens).sample
    return output.transpose(1, 2)


def _tokens(image: Tensor, frames: int) -> dict[str, Tensor]:
    """The image's part of a recorded context: of each frame where their number tells so, else shared, or none."""
    if image.shape[1] == QUERIES * frames:
        return {"image_tokens": image.unflatten(1, (frames, QUERIES))}
    return {"image_tokens": image} if image.shape[1] else {}


def block_cases(folder: Path, stem: str) -> Iterator[Case]:
    """The output of each block in the call `main`, (B*F, C, h, w), and of both embeddings, (B, C).

    Differences are in units of the largest value, where that is above 1.
    """
    name = stem.removeprefix("unet_").removesuffix("_intermediates")
    recorded, inputs = (load_file(folder / f"{each}") for each in (f"{stem}{WEIGHTS}", f"unet_{name}{RECORDED}"))
    unet = load_unet(folder, name)
    nn.Module.to(unet, torch.float64)
    found: dict[str, Tensor] = {}
    handles = list(_hooks(unet, found))
    call_unet(unet, read_json(folder / f"unet_{name}.json"), inputs, "main")
    for handle in handles:
        handle.remove()
    frames = inputs["main.x"].shape[2]
    for key in {**recorded, **found}:
        ours = found[key][::frames] if key in ("time_embed", "fps_embedding") else found[key]
        largest = float(recorded[key].abs().max().clamp(min=1))
        yield Case(f"{stem}.{key}", difference(ours, recorded[key]) / largest, SINGLE)


def _hooks(unet: VideoUNet, found: dict[str, Tensor]) -> Iterator[Any]:
    """Keep the output of every block, by its original name; the first is that before the transformer over frames."""

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found["input_blocks.0"] = inputs[0]

    yield unet.conv_in.temporal.register_forward_pre_hook(before)
    for place, name in _blocks(unet).items():
        yield unet.get_submodule(place).register_forward_hook(keep(name))


def _blocks(unet: VideoUNet) -> dict[str, str]:
    """Where each original block ends in our UNet, and its name."""
    layout, last = layout_of(unet.config), {}
    for key in unet.state_dict():
        placed = layout.place(key)
        if placed is not None and not placed[0].startswith("middle_block"):
            layer, number = placed[0].rsplit(".", 1)
            place = ".".join(key.split(".")[:4])  # such as down_blocks.0.attentions.1
            last[layer] = max(last.get(layer, (-1, "")), (int(number), place))
    blocks = {place: layer for layer, (_, place) in last.items()}
    around = {"conv_in.temporal": "init_attn", "mid_block": "middle_block", "time_embedding": "time_embed"}
    told = {"class_embedding": "fps_embedding"} if unet.spec.added_ids else {}
    return {**blocks, **around, **told}


def query_cases(folder: Path, stem: str) -> Iterator[Case]:
    """The tokens of recorded features."""
    unet = load_unet(folder, stem.removeprefix("resampler_"))
    recorded = load_file(folder / f"{stem}{RECORDED}")

    def call(_: str, dtype: torch.dtype) -> Tensor:
        nn.Module.to(unet, dtype)
        return tokens_of(unet, recorded["x"].to(dtype))

    yield from _precise_cases(folder, stem, {"out": recorded["out"]}, call)


@torch.no_grad()
def tokens_of(unet: VideoUNet, features: Tensor) -> Tensor:
    """The tokens of all frames, one behind the other, (B, F*T, D), of features (B, P, E)."""
    assert unet.image_context is not None
    return unet.image_tokens_of(features, unet.image_context.frames).flatten(1, 2)
