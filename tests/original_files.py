"""Tiny models in the files of the original implementations; heads are 64 channels wide, as in the published ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from helpers import CROSS, randomise, tiny_unet, tiny_vae, write_image_model
from inflate.families import i2vgen_xl as i2vgen_xl_family
from inflate.families import i2vgen_xl_original, svd_keys
from inflate.families.dynamicrafter import Clips, DynamiCrafter, Told
from inflate.families.dynamicrafter_original import unet_tensors
from inflate.families.i2vgen_xl import I2VGenXL
from inflate.families.modelscope import to_vgen
from inflate.families.svd import SVD
from inflate.layers.hierarchy import Hierarchy
from inflate.layers.image_context import ImageContext
from inflate.models import schedule_buffers
from inflate.models.folders import SHIPPED
from inflate.models.open_clip import image_encoder_tensors
from inflate.models.original_names import UNetLayout
from inflate.models.original_video_names import with_fps
from inflate.models.single_file_writing import image_tensors, vae_tensors
from inflate.models.stable_diffusion import noise_for
from inflate.models.text_encoders import TextEncoders, load_tokenizer
from inflate.models.unet import MODELSCOPE, TemporalSpec, VideoUNet
from inflate.models.vae import VideoVAE
from inflate.objectives import DDPM
from inflate.surgery import inflate_unet, inflate_vae

DYNAMICRAFTER = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "dynamicrafter"
"""Recordings of the original implementation, which are not part of the repository."""
LEVELS: dict[str, Any] = {
    "block_out_channels": (64, 128), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 2, "norm_num_groups": 32,
}  # fmt: skip
IDLE = {"conditioner.embedders.0.open_clip.model.logit_scale": torch.ones(())}
"""Some of what the original's file keeps and nothing uses."""
VAE: dict[str, Any] = {"block_out_channels": (32, 32), "norm_num_groups": 32}
FIRST, OPEN, LAST = "conditioner.embedders.0.transformer.", "cond_stage_model.model.", "conditioner.embedders.1.model."
XL: dict[str, Any] = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "transformer_layers_per_block": (2, 2),
    "projection_class_embeddings_input_dim": 6 * 256 + 16, "cross_attention_dim": 128,
}  # fmt: skip
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LINEAR: dict[str, Any] = {"linear": True, "attention_head_dim": (1, 2)}


def original_names(unet: UNet2DConditionModel, vae: AutoencoderKL) -> dict[str, Tensor]:
    """The tensors of an image model under latent diffusion's names."""
    return {key: tensor.clone() for key, tensor in image_tensors(unet, vae).items()}


def write_single_file(file: Path, **settings: Any) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """Write a tiny Stable Diffusion 1 as communities share it; returns its networks."""
    unet, vae = tiny_unet(False, **LEVELS, attention_head_dim=8, **settings), tiny_vae(**VAE)
    save_file({**original_names(unet, vae), "cond_stage_model.transformer.x": torch.zeros(1)}, file)
    return unet, vae


def text_encoder(pooled: bool = False, act: str = "quick_gelu") -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text encoder of three layers with the pocket's vocabulary."""
    torch.manual_seed(5 + pooled)
    config = CLIPTextConfig(
        vocab_size=164, max_position_embeddings=20, eos_token_id=2, hidden_size=64, intermediate_size=96,
        num_hidden_layers=3, num_attention_heads=1, hidden_act=act, projection_dim=16,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if pooled else CLIPTextModel)(config).eval()


def open_clip_tensors(encoder: CLIPTextModel | CLIPTextModelWithProjection, prefix: str) -> dict[str, Tensor]:
    """The tensors of a text encoder under OpenCLIP's names."""
    renamed = {
        "embeddings.position_embedding.weight": "positional_embedding", "embeddings.token_embedding": "token_embedding",
        "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks", "layer_norm": "ln_",
        "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj", "text_projection.weight": "text_projection",
    }  # fmt: skip
    found: dict[str, Tensor] = {}
    for key, tensor in encoder.state_dict().items():
        name = key.removeprefix("text_model.")
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        found[f"{prefix}{name}"] = tensor.T.contiguous() if name == "text_projection" else tensor
    for query in [name for name in found if ".q_proj." in name]:
        parts = [found.pop(query.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        found[query.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return found


def clip_tensors(encoder: CLIPTextModel, prefix: str) -> dict[str, Tensor]:
    """The tensors of a text encoder as single files have those under transformers' names."""
    named = {f"{prefix}text_model.{key.removeprefix('text_model.')}": one for key, one in encoder.state_dict().items()}
    return {**named, f"{prefix}text_model.embeddings.position_ids": torch.arange(20)[None]}


def tensors_of(generation: str) -> tuple[Any, dict[str, Tensor], tuple[Any, ...]]:
    """The UNet, all tensors of a file, and its text encoders."""
    vae = tiny_vae(**VAE)
    if generation == "Stable Diffusion XL":
        unet = tiny_unet(**LINEAR, **LEVELS, **XL)
        encoders = text_encoder(), text_encoder(True, "gelu")
        text = clip_tensors(encoders[0], FIRST) | open_clip_tensors(encoders[1], LAST)
        return unet, {**original_names(unet, vae), **text, f"{LAST}logit_scale": torch.ones(())}, encoders
    if generation == "Stable Diffusion 2":
        unet, encoder = tiny_unet(**LINEAR, **LEVELS, cross_attention_dim=64), text_encoder(True, "gelu")
        whole = {**open_clip_tensors(encoder, OPEN), f"{OPEN}logit_scale": torch.ones(())}
        return unet, {**original_names(unet, vae), **whole}, (encoder,)
    unet, encoder = tiny_unet(False, **LEVELS, attention_head_dim=8, cross_attention_dim=64), text_encoder()
    text = clip_tensors(encoder, "cond_stage_model.transformer.")
    return unet, {**original_names(unet, vae), **text}, (encoder,)


def write_whole_file(file: Path, generation: str) -> tuple[Any, tuple[Any, ...]]:
    """Write a tiny Stable Diffusion with its text encoders; returns its UNet and those."""
    unet, tensors, encoders = tensors_of(generation)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file)
    return unet, encoders


def write_sgm(unet: VideoUNet, vae: VideoVAE, file: Path) -> None:
    """Write a Stable Video Diffusion under the original's names."""
    ours = {"unet": unet.state_dict(), "vae": vae.state_dict()}
    layout = UNetLayout.of(unet.config)
    names = {
        "unet": {
            key: f"model.diffusion_model.{name}" for key, name in svd_keys.unet_to_sgm(ours["unet"], layout).items()
        },
        "vae": {key: f"first_stage_model.{name}" for key, name in svd_keys.vae_to_sgm(ours["vae"], 2).items()},
    }
    renamed = {names[part][key]: tensor.clone() for part in ours for key, tensor in ours[part].items()}
    save_file({**renamed, **IDLE}, file)


def write_svd_file(folder: Path) -> tuple[Path, Path, VideoUNet, VideoVAE]:
    """Write a tiny Stable Video Diffusion in the original's file and an image encoder; returns its networks, too."""
    parent = tiny_unet(True, **LEVELS, attention_head_dim=(1, 2))
    unet, _ = inflate_unet(parent, TemporalSpec(added_id_dim=8), in_channels=8)
    vae, _ = inflate_vae(tiny_vae(**VAE, layers_per_block=2, use_post_quant_conv=False))
    for network in (unet, vae):
        randomise(network)
    write_sgm(unet, vae, folder / "svd.safetensors")
    write_image_model(folder / "image")
    return folder / "svd.safetensors", folder / "image" / "image_encoder", unet, vae


def wide_encoder(projection: int = CROSS) -> CLIPVisionModelWithProjection:
    """An image encoder of one small layer, but as wide as the one that Stable Video Diffusion has."""
    settings = {"hidden_size": 1280, "intermediate_size": 16, "num_hidden_layers": 1, "projection_dim": projection}
    shape = {"image_size": 224, "patch_size": 28, "num_attention_heads": 16, "hidden_act": "gelu"}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings, **shape)).eval()
    randomise(encoder)
    return encoder


def published_like(**vae: Any) -> SVD:
    """A tiny Stable Video Diffusion that a file of the original can hold, with a quant convolution."""
    parent = tiny_unet(True, **LEVELS, attention_head_dim=(1, 2), cross_attention_dim=CROSS)
    unet, _ = inflate_unet(parent, TemporalSpec(added_id_dim=8), in_channels=8)
    quant = {"use_quant_conv": True, "use_post_quant_conv": False, **vae}
    video_vae, _ = inflate_vae(tiny_vae(**VAE, layers_per_block=2, **quant))
    for network in (unet, video_vae):
        randomise(network)
    return SVD(unet, video_vae, wide_encoder())


def write_tokenizer(folder: Path) -> Path:
    """Write the pocket's vocabulary, which pads as OpenCLIP does."""
    tokenizer = load_tokenizer(SHIPPED["pocket"] / "tokenizer")
    tokenizer.model_max_length = 20
    tokenizer.add_special_tokens({"pad_token": tokenizer.convert_ids_to_tokens(0)})
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def published_dynamicrafter() -> dict[str, list[int]]:
    """The names and shapes in the published checkpoint of 512 pixels; skips the test where they are not here."""
    file = DYNAMICRAFTER / "state_keys_full_ckpt_512.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here: the names of the published checkpoint are not part of the repository")
    names: dict[str, list[int]] = json.loads(file.read_text())
    return names


def parts(folder: Path, spec: TemporalSpec, **settings: Any) -> dict[str, Any]:
    """A tiny VideoCrafter or ModelScope, whose tokenizer is written to a folder; `settings` are the UNet's."""
    tiny = {**LINEAR, **LEVELS, "cross_attention_dim": 64, **settings}
    unet, _ = inflate_unet(tiny_unet(**tiny), spec)
    randomise(unet)
    text = TextEncoders((text_encoder(act="gelu"),), (load_tokenizer(write_tokenizer(folder) / "tokenizer"),))
    noise = DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    return {"unet": unet, "vae": tiny_vae(**VAE), "text": text, "noise": noise}


def write_videocrafter(folder: Path, told: bool = True) -> tuple[Path, VideoUNet]:
    """Write a tiny VideoCrafter, whose clean latents were rescaled, and its tokenizer; returns its UNet, too."""
    found = parts(folder, with_fps(64) if told else MODELSCOPE)
    text = open_clip_tensors(found["text"].networks[0], OPEN)
    schedule = schedule_buffers.buffers(DDPM("epsilon", base_scale=0.7))
    tensors = {**unet_tensors(found["unet"]), **vae_tensors(found["vae"]), **text, **schedule}
    torch.save({"state_dict": tensors}, folder / "videocrafter.ckpt")
    return folder / "videocrafter.ckpt", found["unet"]


def dynamicrafter(folder: Path, told: Told = "fps", base_scale: float = 1.0, **context: Any) -> DynamiCrafter:
    """A tiny DynamiCrafter that the original's file can hold; `context` is how it attends to an image."""
    found = parts(folder, with_fps(64), in_channels=8)
    if told == "fps":
        zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        found["noise"] = DDIMScheduler.from_config(found["noise"].config, **zero)
    found["unet"].add_image_context(ImageContext(**{"width": 32, "depth": 2, "heads": 2, "frames": 3, **context}))
    randomise(found["unet"], seed=1)
    clips = Clips(frames=3, height=16, width=16, told=told, number=5.0)
    return DynamiCrafter(**found, clips=clips, image_encoder=wide_encoder(), base_scale=base_scale)


HIERARCHY = Hierarchy(embedding=64)
"""What VGen's I2VGen-XL is told, of an image encoder that is as wide as the tiny text encoder."""
CLIP_ALONE = replace(HIERARCHY, detail_encoder=False, global_encoder=False)
"""What ModelScope's image-to-video is told."""


def i2vgen_xl(folder: Path, hierarchy: Hierarchy = HIERARCHY) -> I2VGenXL:
    """A tiny I2VGen-XL that VGen's file can hold, whose tokenizer is written to a folder."""
    found = {**parts(folder, with_fps(64)), "noise": noise_for(i2vgen_xl_original.VGEN.objective)}
    found["unet"].add_hierarchy(hierarchy)
    randomise(found["unet"], seed=1)
    clips = i2vgen_xl_family.Clips(3, 8.0, 16, 16)
    return I2VGenXL(**found, clips=clips, image_encoder=wide_encoder(hierarchy.embedding))


def write_vgen(unet: VideoUNet, file: Path) -> Path:
    """Write a UNet as VGen's trainer does."""
    torch.save({"state_dict": to_vgen(unet), "step": 854_500}, file)
    return file


def write_open_clip(encoder: CLIPVisionModelWithProjection, file: Path) -> Path:
    """Write OpenCLIP's file, of an image encoder and of some of a text encoder."""
    visual = {f"visual.{key}": tensor for key, tensor in image_encoder_tensors(encoder).items()}
    torch.save({"positional_embedding": torch.zeros(20, 64), "logit_scale": torch.ones(()), **visual}, file)
    return file


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether tensors have the same names and, to the bit, the same values."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
