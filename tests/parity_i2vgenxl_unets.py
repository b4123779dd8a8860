"""I2VGen-XL's UNets compared with recordings of VGen's: outputs, what is between, losses and gradients, and names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import I2VGenXLUNet
from parity_cases import (
    DOUBLE,
    EXACT,
    LOSS,
    RECORDED,
    RECORDED64,
    SINGLE,
    WEIGHTS,
    Case,
    Tensors,
    astray,
    compare_settings,
    difference,
    disagreements,
    first_of,
    read_json,
    relative,
    stand_in,
    weights_of,
)
from parity_i2vgenxl import BASE, REFINEMENT
from safetensors.torch import load_file
from torch import Tensor, nn

from inflate.families import modelscope
from inflate.layers.freeu import PUBLISHED
from inflate.layers.hierarchy import Hierarchy, with_places
from inflate.models import exchange
from inflate.models.original_video_names import VGEN, layout_of
from inflate.models.unet import VideoUNet

DIFFUSERS = 1e-5
PLAIN = "_nofreeu"
"""Ends the names of the refinement's calls without FreeU."""
TRAINING, SAMPLING = "train", ("sample", "sdedit")
OBJECTIVES = {"cosine": BASE, "logsnr_cosine_interp": REFINEMENT}
"""By VGen's names of the noise schedules."""


def load_unet(folder: Path, stem: str) -> VideoUNet:
    """Our UNet with the recorded weights, whose shapes must be what the configuration says."""
    config = read_json(folder / f"{stem}.json")["config"]
    tensors = weights_of(folder / f"{stem}{WEIGHTS}")
    unet = modelscope.from_vgen(tensors, stem, refinement="num_tokens" not in config)
    widths = [config["dim"] * factor for factor in config["dim_mult"]]
    attention = [1 / 2**level in config["attn_scales"] for level in range(len(widths))]
    expected = {
        "block_out_channels": widths,
        "layers_per_block": config["num_res_blocks"],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "attention_head_dim": [width // config["head_dim"] for width in widths],
        "cross_attention_dim": config["context_dim"],
        "in_channels": config["in_dim"] + config.get("concat_dim", 0),
        "out_channels": config["out_dim"],
    }
    compare_settings({name: unet.config[name] for name in expected}, expected)
    if unet.hierarchy is not None:
        told = Hierarchy(config["concat_dim"], config["y_dim"], config["num_tokens"])
        compare_settings(unet.hierarchy.to_dict(), told.to_dict())
    return unet


def unet_cases(folder: Path, stem: str) -> Iterator[Case]:
    """Every recorded call of a UNet, what diffusers' class makes of it, what is between, losses, and samplers' traces.

    ValueError for a call of no known kind.
    """
    recorded, described = load_file(folder / f"{stem}{RECORDED}"), read_json(folder / f"{stem}.json")
    calls = [name for name, call in described["cases"].items() if "args" in call]
    found, wanted = {key.split(".")[0] for key in recorded}, {*calls, TRAINING}
    if found - {*SAMPLING} != wanted:
        raise ValueError(f"calls {sorted(found)} are recorded, {sorted(wanted)} are described or needed")
    unet = load_unet(folder, stem)
    yield from _call_cases(folder, stem, unet, recorded, calls)
    if unet.hierarchy is not None:
        yield from _diffusers_cases(stem, unet, recorded, calls)
        yield from _between_cases(stem, unet, recorded)
    yield from _training_cases(stem, unet, recorded, described)


def _call_cases(folder: Path, stem: str, unet: VideoUNet, recorded: Tensors, calls: list[str]) -> Iterator[Case]:
    """Ours against what is recorded, in float32 and, where that is there, in float64."""
    for call in calls:
        yield Case(f"{stem}.{call}", difference(_output(unet, recorded, call), recorded[f"{call}.out"]), SINGLE)
    file = folder / f"{stem}{RECORDED64}"
    if file.is_file():
        precise = load_file(file)
        nn.Module.to(unet, torch.float64)
        for call in {**dict.fromkeys(calls), **{key.removesuffix(".out"): None for key in precise}}:
            ours = _output(unet, recorded, call)
            yield Case(f"{stem}_io64.{call}", difference(ours, precise[f"{call}.out"]), DOUBLE)
        nn.Module.to(unet, torch.float32)


@torch.no_grad()
def _output(unet: VideoUNet, recorded: Tensors, call: str) -> Tensor:
    """Our output (B, C, F, h, w) of a recorded call; FreeU is the refinement's own."""
    given = arguments_of(recorded, call, unet.dtype)
    freed = unet.hierarchy is None and not call.endswith(PLAIN)
    unet.set_freeu(PUBLISHED if freed else ())
    return called(unet, given["x"], given)


def arguments_of(recorded: Tensors, call: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The arguments of a call; what is no whole number in that precision."""
    found = {key.removeprefix(f"{call}."): each for key, each in recorded.items() if key.startswith(f"{call}.")}
    return {key: each.to(dtype) if each.is_floating_point() else each for key, each in found.items()}


def called(unet: Any, noisy: Tensor, given: Tensors) -> Tensor:
    """What a UNet of ours makes of clips (B, C, F, h, w) and of the other arguments of a call, likewise."""
    beside = _first_frame(given) if unet.hierarchy is not None else {}
    ids = given["fps"][:, None].to(noisy) if unet.spec.added_ids else None
    output: Tensor = unet(noisy.transpose(1, 2), given["t"], _text(given), ids, **beside).sample
    return output.transpose(1, 2)


def _text(given: Tensors) -> Tensor:
    """The tokens of the prompts; where there are none, the first of those that stand for nothing."""
    if "y" in given:
        return given["y"]
    return given["zero_y"][:, :1].expand(len(given["x"]), -1, -1)


def _first_frame(given: Tensors) -> dict[str, Tensor]:
    latents = given["local_image"]
    first = latents if latents.ndim == 4 else latents[:, :, 0]  # (B, C, h, w)
    embeddings = {"image_embeddings": given["image"]} if "image" in given else {}
    return {"image_latents": first, **embeddings}


@torch.no_grad()
def _diffusers_cases(stem: str, unet: VideoUNet, recorded: Tensors, calls: list[str]) -> Iterator[Case]:
    """What diffusers' class makes, with the weights that we write for it, of every call that it takes."""
    theirs = modelscope.to_i2vgen(unet)
    for call in calls:
        given = arguments_of(recorded, call, unet.dtype)
        if "image" in given:
            yield Case(f"{stem}.{call}.diffusers", difference(called_diffusers(theirs, given), given["out"]), DIFFUSERS)


def called_diffusers(unet: I2VGenXLUNet, given: dict[str, Tensor]) -> Tensor:
    """The output (B, C, F, h, w) of diffusers' class, which has the places of frames made by its pipeline."""
    first = _first_frame(given)
    latents = with_places(first["image_latents"], given["x"].shape[2]).transpose(1, 2)
    beside = {"fps": given["fps"], "image_latents": latents, "image_embeddings": first["image_embeddings"]}
    output: Tensor = unet(given["x"], given["t"], encoder_hidden_states=_text(given), **beside).sample
    return output


def _between_cases(stem: str, unet: VideoUNet, recorded: Tensors) -> Iterator[Case]:
    """What is between in the call `full`, in units of the largest value, where that is above 1."""
    prefix = "full.inter."
    wanted = {key.removeprefix(prefix): each for key, each in recorded.items() if key.startswith(prefix)}
    nn.Module.to(unet, torch.float64)
    found = _between(unet, recorded)
    nn.Module.to(unet, torch.float32)
    for name in {**wanted, **found}:
        theirs = wanted[name].double()
        largest = theirs.abs().max().clamp(min=1)
        yield Case(f"{stem}.{prefix}{name}", difference(found[name] / largest, theirs / largest), SINGLE)


def _between(unet: VideoUNet, recorded: Tensors) -> dict[str, Tensor]:
    """By the recording's names, in its shapes."""
    kept: dict[str, Tensor] = {}
    encoders = unet.first_frame
    assert encoders is not None
    assert encoders.detail is not None
    transformer = exchange.transformers(unet)[0]
    after = {
        "local_image_concat_out": encoders.detail.convolutions,
        "local_temporal_encoder_out": encoders.detail.frames,
        "time_embed_out": unet.time_embedding,
        "fps_embedding_out": unet.class_embedding,
        "local_image_embedding_out": encoders.whole,
        "context_embedding_out": encoders.tokens,
    }

    def keep(name: str) -> Callable[..., None]:
        return lambda _, __, output: kept.update({name: output})

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept["conv_in_input"] = inputs[0]

    def context(_: nn.Module, __: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        kept["spatial_context_per_frame"] = named["encoder_hidden_states"]

    handles = [module.register_forward_hook(keep(name)) for name, module in after.items()]
    handles += [unet.conv_in.register_forward_pre_hook(before)]
    handles += [transformer.register_forward_pre_hook(context, with_kwargs=True)]
    _output(unet, recorded, "full")
    for handle in handles:
        handle.remove()
    return _as_recorded(kept, recorded["full.x"].shape[2])


def _as_recorded(kept: dict[str, Tensor], frames: int) -> dict[str, Tensor]:
    """What was kept in the recording's shapes: embeddings once for a clip, tokens unfolded, the detail doubled."""
    whole, noisy = kept["local_image_embedding_out"], kept["conv_in_input"]
    side, detail = int(whole.shape[1] ** 0.5), kept["local_image_concat_out"].shape[1]
    return {
        **kept,
        **{name: kept[name][::frames] for name in ("time_embed_out", "fps_embedding_out")},
        "local_image_embedding_out": whole.transpose(1, 2).unflatten(2, (side, side)),
        "context_embedding_out": kept["context_embedding_out"].flatten(1)[:, None],
        "conv_in_input": torch.cat([noisy[:, :-detail], 2 * noisy[:, -detail:]], dim=1),
    }


def _training_cases(stem: str, unet: VideoUNet, recorded: Tensors, described: dict[str, Any]) -> Iterator[Case]:
    """The noised clips, the losses, and the gradients of their mean."""
    name = f"{stem}.{TRAINING}"
    schedule = described.get("schedules", {}).get("sampling", described.get("diffusion"))["schedule"]
    nn.Module.to(unet, torch.float64)
    unet.set_freeu(())
    given = arguments_of(recorded, TRAINING, torch.float64)
    objective, clean, noise = OBJECTIVES[schedule], given["x0"], given["noise"]
    noisy = objective.noisy(clean.transpose(1, 2), given["t"], noise.transpose(1, 2)).transpose(1, 2)
    yield Case(f"{name}.xt", difference(noisy, given["xt"]), SINGLE)
    target = objective.target(clean.transpose(1, 2), given["t"], noise.transpose(1, 2)).transpose(1, 2)
    if "target" in given:
        yield Case(f"{name}.target", difference(target, given["target"]), SINGLE)
    losses = (called(unet, noisy, given) - target).square().flatten(1).mean(1)
    yield Case(f"{name}.loss", relative(losses.detach(), given["loss_per_sample"]), LOSS)
    losses.mean().backward()
    yield from _gradient_cases(name, unet, given, described["cases"][TRAINING])


def _gradient_cases(name: str, unet: VideoUNet, given: dict[str, Tensor], described: dict[str, Any]) -> Iterator[Case]:
    """Gradients, in units of their largest value where that is above 1, and the norms of all of them."""
    found = _gradients(unet)
    for key, theirs in given.items():
        if key.startswith("grad."):
            ours, largest = found[key.removeprefix("grad.")], theirs.abs().max().clamp(min=1)
            yield Case(f"{name}.{key}", difference(ours / largest, theirs / largest), SINGLE)
    norms = described.get("grad_norms")
    if norms is not None:
        yield Case(f"{name}.no_grad_params", float(len(norms.keys() ^ found.keys())), EXACT)
        ours, theirs = (torch.tensor([float(each[key].norm() if each is found else each[key]) for key in norms])
                        for each in (found, norms))  # fmt: skip
        yield Case(f"{name}.grad_norms", relative(ours, theirs), SINGLE)


def _gradients(unet: VideoUNet) -> dict[str, Tensor]:
    """By VGen's names, in its shapes. Its weights of the detail are half of ours, and so their gradient is double."""
    own = {key: each.grad for key, each in unet.named_parameters() if each.grad is not None}
    if unet.hierarchy is not None:
        own["conv_in.weight"][:, -unet.hierarchy.channels :] *= 2
    names = VGEN.names(own, layout_of(unet.config))
    shapes = VGEN.shapes({key: each.shape for key, each in own.items()}, names)
    return exchange.convert(own, names, shapes, "gradients")


def diffusers_key_cases(folder: Path, stem: str) -> Iterator[Case]:
    """The tensors of diffusers' class of the published size go to their places in ours and back."""
    listed = read_json(folder / f"{stem}.json")

    def pass_through(tensors: Tensors) -> Tensors:
        return modelscope.to_i2vgen(_of_diffusers(tensors, stem)).state_dict()

    yield Case(stem, astray(listed, pass_through), EXACT)


def _of_diffusers(tensors: Tensors, origin: str) -> VideoUNet:
    """Our UNet of the published size, whose shape diffusers' defaults are."""
    with torch.device("meta"):
        theirs = I2VGenXLUNet()
    config = modelscope.our_config(theirs.config, first_frame=True)
    return modelscope.from_diffusers(tensors, *config, origin)


def key_map_cases(folder: Path, stem: str) -> Iterator[Case]:
    """VGen's tensors go to the recorded places in diffusers' class, the detail's weights doubled."""
    theirs = read_json(folder / f"{stem}.json")["map"]
    listed = read_json(folder / "state_keys_vgen.json")
    numbers = {key: number for number, key in enumerate(theirs, start=1)}
    unet = modelscope.from_vgen({key: stand_in(listed[key], number) for key, number in numbers.items()}, stem)
    made = modelscope.to_i2vgen(unet).state_dict()
    found = {key: first_of(each) for key, each in made.items()}
    wanted = {
        key: numbers[name] for name, keys in theirs.items() for key in ([keys] if isinstance(keys, str) else keys)
    }
    yield Case(stem, disagreements(found, wanted), EXACT)
    last = made["conv_in.weight"][:, -1]
    yield Case(f"{stem}.doubled", difference(last, torch.full_like(last, 2 * found["conv_in.weight"])), EXACT)
