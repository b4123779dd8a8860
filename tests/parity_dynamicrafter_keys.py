"""DynamiCrafter's names: a constant in each tensor of the published size goes to its place in our networks and back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from parity_cases import EXACT, Case, Shapes, Tensors, astray, first_of, read_json, stand_in
from torch import Tensor, nn

from inflate.families import dynamicrafter_keys as keys
from inflate.families import dynamicrafter_original as original
from inflate.families.dynamicrafter import DynamiCrafter
from inflate.families.dynamicrafter_original import Original
from inflate.layers.image_context import ImageContext, QueryTransformer
from inflate.models import exchange, original_names, schedule_buffers
from inflate.models.single_file_text import PLACES, encoder_of
from inflate.models.single_file_writing import vae_tensors
from inflate.models.text_encoders import TextEncoders
from inflate.objectives import DDPM


def unet_key_cases(folder: Path, stem: str) -> Iterator[Case]:
    """The UNet's tensors, beside those of a query transformer of the published size."""
    listed = keys.plain(read_json(folder / f"{stem}.json"))
    with torch.device("meta"):
        queries = QueryTransformer(ImageContext(), listed["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1])
    names = keys.query_names(exchange.shapes(queries))
    beside = {f"{keys.IMAGE_PROJ}{names[key]}": stand_in(list(each)) for key, each in exchange.shapes(queries).items()}

    def pass_through(tensors: Tensors) -> Tensors:
        unet = original.unet_of({**_within(keys.UNET, tensors), **beside}, stem)
        return keys.part(original.unet_tensors(unet), keys.UNET)

    yield Case(stem, astray(listed, pass_through), EXACT)


def query_key_cases(folder: Path, stem: str) -> Iterator[Case]:
    """The query transformer's tensors."""

    def pass_through(tensors: Tensors) -> Tensors:
        context = keys.image_context(_within(keys.IMAGE_PROJ, tensors), original.HEAD_WIDTH)
        assert context is not None
        with torch.device("meta"):
            queries = QueryTransformer(context, len(tensors["proj_out.bias"]))
        names = keys.query_names(exchange.shapes(queries))
        _adopt(queries, names, tensors, stem)
        return {names[key]: tensor for key, tensor in exchange.detached(queries).items()}

    yield Case(stem, astray(read_json(folder / f"{stem}.json"), pass_through), EXACT)


def vae_key_cases(folder: Path, stem: str) -> Iterator[Case]:
    """The autoencoder's tensors."""

    def pass_through(tensors: Tensors) -> Tensors:
        config = original_names.vae_config(tensors)
        with torch.device("meta"):
            vae = AutoencoderKL(**config)
        names = original_names.vae_names(exchange.shapes(vae), len(config["block_out_channels"]))
        _adopt(vae, names, tensors, stem)
        return keys.part(vae_tensors(vae), keys.FIRST_STAGE)

    yield Case(stem, astray(read_json(folder / f"{stem}.json"), pass_through), EXACT)


def _adopt(model: nn.Module, names: exchange.Names, tensors: Tensors, origin: str) -> None:
    shapes = exchange.shapes(model)
    exchange.adopt(model, exchange.convert(tensors, exchange.inverse(names), shapes, origin))


def checkpoint_key_cases(folder: Path, stem: str) -> Iterator[Case]:
    """All tensors of a checkpoint, networks and saved schedule; those that nothing uses come back as zeros."""
    listed = keys.plain(read_json(folder / f"{stem}.json"))
    scaled = schedule_buffers.SCALES in listed
    schedule = schedule_buffers.buffers(DDPM("v_prediction", True, 0.7) if scaled else DDPM("epsilon"))

    def pass_through(tensors: Tensors) -> Tensors:
        saved = {key: schedule.get(key, tensor) for key, tensor in tensors.items()}
        made = original.tensors_of(_family(Original.read(Path(stem), lambda _: saved)))
        own = {key: tensors[key] for key in made if key in schedule and torch.equal(made[key], saved[key])}
        idle = {key: tensors[key] for key, each in made.items() if _is_idle(key, listed) and not first_of(each)}
        return {**made, **own, **idle}

    yield Case(stem, astray(listed, pass_through), EXACT)


def _family(file: Original) -> DynamiCrafter:
    """The model of a whole checkpoint, without a tokenizer."""
    text = TextEncoders((encoder_of(file.tensors, PLACES["Stable Diffusion 2"][0], file.origin),), ())
    parts = file.load_unet(), file.load_vae(), text, file.noise, file.clips, file.load_image_encoder()
    return DynamiCrafter(*parts, base_scale=file.objective.base_scale)


def _is_idle(key: str, listed: Shapes) -> bool:
    """Whether nothing uses a tensor: the text encoder's last block and projection, and its twin beside the image's."""
    blocks = [int(found[1]) for each in listed if (found := re.match(r"cond_stage.*\.resblocks\.(\d+)\.", each))]
    last = rf"cond_stage_model\.model\.(transformer\.resblocks\.{max(blocks)}\.|text_projection|logit_scale)"
    return re.match(rf"{last}|embedder\.model\.(?!visual\.)", key) is not None


def _within(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    return {f"{prefix}{key}": tensor for key, tensor in tensors.items()}
