"""ModelScope's image-to-video compared with recordings of VGen: UNet, losses, sampling, key lists."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from parity_cases import (
    EXACT,
    LOSS,
    RECORDED,
    SAMPLE,
    SINGLE,
    WEIGHTS,
    Case,
    Tensors,
    astray,
    compare_settings,
    difference,
    read_json,
    weights_of,
)
from safetensors.torch import load_file
from torch import Tensor

from inflate.families import modelscope
from inflate.models.unet import VideoUNet


def load_modelscope(folder: Path, stem: str) -> VideoUNet:
    """Our UNet and image tokens with the recorded weights, whose shapes must be what the configuration says."""
    config = read_json(folder / f"{stem}.json")["config"]
    model = modelscope.from_vgen(weights_of(folder / f"{stem}{WEIGHTS}"), stem)
    told = model.hierarchy
    if told is None or told.takes_latents:
        raise ValueError("the weights are not those of a model that is told its first frame by CLIP's tokens alone")
    attention = [1 / 2**level in config["attn_scales"] for level in range(len(config["dim_mult"]))]
    stored = model.config
    read = {
        "dim": stored["block_out_channels"][0],
        "dim_mult": [width // config["dim"] for width in stored["block_out_channels"]],
        "num_res_blocks": stored["layers_per_block"],
        "attn_scales": ["CrossAttn" in name for name in stored["down_block_types"]],
        "head_dim": stored["block_out_channels"][0] // stored["attention_head_dim"][0],
        "context_dim": stored["cross_attention_dim"],
        "y_dim": told.embedding,
        "num_tokens": told.clip_tokens,
        "in_dim": stored["in_channels"],
        "out_dim": stored["out_channels"],
        "temporal_attention": True,
    }
    compare_settings(read, {name: {**config, "attn_scales": attention}[name] for name in read})
    return model.requires_grad_(False)


def modelscope_cases(folder: Path, stem: str) -> Iterator[Case]:
    """The recorded forward calls, the training losses, and the end of the sampling."""
    recorded, described = load_file(folder / f"{stem}{RECORDED}"), read_json(folder / f"{stem}.json")
    model = load_modelscope(folder, stem)
    known = {"full": _forward_case, "zero_image": _forward_case, "train": _loss_case, "sample": _sample_case}
    for call in sorted({key.split(".")[0] for key in recorded}):
        yield Case(f"{stem}.{call}", *known[call](model, recorded, call, described["diffusion"]))


def _forward_case(
    model: VideoUNet, recorded: dict[str, Tensor], call: str, diffusion: dict[str, Any]
) -> tuple[float, float]:
    inputs = {name: recorded.get(f"{call}.{name}", recorded[f"full.{name}"]) for name in ("x", "t", "y", "fps")}
    return difference(_call_modelscope(model, **inputs), recorded[f"{call}.out"]), SINGLE


def _loss_case(
    model: VideoUNet, recorded: dict[str, Tensor], call: str, diffusion: dict[str, Any]
) -> tuple[float, float]:
    clean, noise, step = (recorded[f"{call}.{name}"] for name in ("x0", "noise", "t"))
    noised = _schedule(diffusion).add_noise(clean, noise, step)
    output = _call_modelscope(model, noised, step, recorded["full.y"], recorded["full.fps"])
    loss = (output - _schedule(diffusion).get_velocity(clean, noise, step)).square().flatten(1).mean(1)
    return difference(loss, recorded[f"{call}.loss_per_sample"]), LOSS


def _sample_case(
    model: VideoUNet, recorded: dict[str, Tensor], call: str, diffusion: dict[str, Any]
) -> tuple[float, float]:
    """Four DDIM steps with guidance 3 against an image embedding of zeros, as the recording's notes say."""
    scheduler = _schedule(diffusion)
    scheduler.set_timesteps(4)
    sample, image, fps = recorded[f"{call}.noise"], recorded["full.y"][:1], recorded["full.fps"][:1]
    for step in scheduler.timesteps:
        given, nothing = (_call_modelscope(model, sample, step[None], y, fps) for y in (image, torch.zeros_like(image)))
        sample = scheduler.step(nothing + 3.0 * (given - nothing), step, sample).prev_sample
    return difference(sample, recorded[f"{call}.final"]), SAMPLE


def _schedule(diffusion: dict[str, Any]) -> DDIMScheduler:
    settings = diffusion["schedule_param"]
    if (diffusion["schedule"], diffusion["mean_type"]) != ("linear_sd", "v"):
        raise ValueError(f"schedule {diffusion['schedule']} of {diffusion['mean_type']} is not this model's")
    return DDIMScheduler(
        num_train_timesteps=settings["num_timesteps"],
        beta_start=settings["init_beta"],
        beta_end=settings["last_beta"],
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@torch.no_grad()
def _call_modelscope(model: VideoUNet, x: Tensor, t: Tensor, y: Tensor, fps: Tensor) -> Tensor:
    nothing = y.new_zeros(len(y), 0, model.config.cross_attention_dim)  # no text
    output = model(x.transpose(1, 2), t, nothing, added_time_ids=fps[:, None], image_embeddings=y)
    return output.sample.transpose(1, 2)  # (B, C, F, h, w)


def vgen_key_cases(folder: Path, stem: str) -> Iterator[Case]:
    """The tensors of VGen's and ModelScope's UNets of the published size go to their places in ours and back."""

    def pass_through(tensors: Tensors) -> Tensors:
        return modelscope.to_vgen(modelscope.from_vgen(tensors, stem))

    yield Case(stem, astray(read_json(folder / f"{stem}.json"), pass_through), EXACT)
