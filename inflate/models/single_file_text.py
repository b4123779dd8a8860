"""The text encoders of Stable Diffusion in a single file: read like its other networks, every tensor accounted for.

That of Stable Diffusion 1 and the first of XL are there under transformers' names; that of 2 and the second of XL under
OpenCLIP's, with queries, keys and values in one tensor. The tokenizers' vocabulary is not in such a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from inflate.errors import CheckpointError
from inflate.models import folders
from inflate.models.exchange import Read, adopt, convert, detached, in_float32, listing, read_saved, shapes
from inflate.models.open_clip import fused
from inflate.models.original_names import count_of, size_of, substituted
from inflate.models.single_file import Generation, generation_of
from inflate.models.text_encoders import TextEncoders, load_tokenizer


@dataclass(frozen=True)
class Place:
    """Where a text encoder is in a file."""

    prefix: str
    open_clip: bool = False
    """under OpenCLIP's names, not transformers'"""
    pooled: bool = False
    """whether its projected pooled state is a condition"""


PLACES: dict[Generation, tuple[Place, ...]] = {
    "Stable Diffusion 1": (Place("cond_stage_model.transformer."),),
    "Stable Diffusion 2": (Place("cond_stage_model.model.", open_clip=True),),
    "Stable Diffusion XL": (
        Place("conditioner.embedders.0.transformer."),
        Place("conditioner.embedders.1.model.", open_clip=True, pooled=True),
    ),
}
TEXT = ("cond_stage_model.", "conditioner.")
OPEN_CLIP = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding": "embeddings.token_embedding",
    "ln_final": "final_layer_norm",
    "text_projection": "text_projection.weight",
    "transformer.resblocks": "encoder.layers",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "c_fc": "fc1",
    "c_proj": "fc2",
}
"""Whole words of OpenCLIP's names, and transformers'."""
UNUSED = ("embeddings.position_ids", "logit_scale")
"""A counter, and the scale of the loss by which the encoder was trained."""
HEAD = 64
"""Channels of an attention head, in every published text encoder."""
TOKENIZER_FILES = ("*.json", "*.txt", "tokenizer/*")
ENCODER_FILES = (*TOKENIZER_FILES, "text_encoder/*")


def load_text_encoders(file: Path, tokenizer: str | Path | None, read: Read = read_saved) -> TextEncoders:
    """The text encoders of a single file, in float32, with tokenizers of the vocabulary in the folder `tokenizer`.

    CheckpointError where that is not given or of another size, or, listing tensors, where the file is not whole.
    """
    vocabulary, tensors = tokenizer_folder(file, tokenizer), read(file)
    places = PLACES[generation_of(tensors, file)]
    inside = tuple(place.prefix for place in places)
    surplus = [key for key in tensors if key.startswith(TEXT) and not key.startswith(inside)]
    if surplus:
        raise CheckpointError(f"{file} holds tensors of no known text encoder: {listing(surplus)}; nothing was loaded")
    networks = tuple(encoder_of(tensors, place, file) for place in places)
    pairs = zip(places, networks, strict=True)
    tokenizers = tuple(_tokenizer(vocabulary, place, network.config) for place, network in pairs)
    return TextEncoders(networks, tokenizers, zeros_for_empty=len(places) > 1)


def tokenizer_folder(file: Path, tokenizer: str | Path | None) -> Path:
    """The folder of the tokenizer that goes with a single file; CheckpointError where none is named."""
    if tokenizer is None:
        raise CheckpointError(
            f"{file} holds no tokenizer: name the folder of one, or of any Stable Diffusion in diffusers' layout, or "
            "its name on the Hub (openai/clip-vit-large-patch14), as model.tokenizer or by --tokenizer"
        )
    folder = folders.resolve(tokenizer, TOKENIZER_FILES)
    return folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder


def _tokenizer(folder: Path, place: Place, config: Any) -> CLIPTokenizer:
    """A tokenizer that pads as the encoder was trained: OpenCLIP's with token 0, the other with the end.

    As in diffusers' folders of the same models, what pads is then always read as that token (of CLIP's, "!").
    """
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) != config.vocab_size:
        raise CheckpointError(
            f"{folder} has {len(tokenizer)} tokens but the text encoder {place.prefix}* has {config.vocab_size}: name "
            "the tokenizer of the same Stable Diffusion"
        )
    tokenizer.model_max_length = config.max_position_embeddings
    padding = tokenizer.convert_ids_to_tokens(0) if place.open_clip else tokenizer.eos_token
    tokenizer.add_special_tokens({"pad_token": padding})
    return tokenizer


def encoder_of(tensors: Mapping[str, Tensor], place: Place, file: Path) -> Any:
    named = {key.removeprefix(place.prefix): one for key, one in tensors.items() if key.startswith(place.prefix)}
    ours = _from_open_clip(named) if place.open_clip else {key.removeprefix("text_model."): named[key] for key in named}
    kept = {key: tensor for key, tensor in ours.items() if key not in UNUSED}
    if place.open_clip and not place.pooled:
        kept = _without_last(kept)
    kind = CLIPTextModelWithProjection if place.pooled else CLIPTextModel
    with torch.device("meta"):
        model = kind(_config(kept, place))
    wanted = shapes(model)
    names = {key.removeprefix("text_model."): key for key in wanted}
    adopt(model, in_float32(convert(kept, names, wanted, f"{file} ({place.prefix}*, in transformers' names)")))
    _count_positions(model)
    return model


def _from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's tensors under transformers' names, with queries, keys and values apart."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = _respelt(name, OPEN_CLIP)
        fused = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", key)
        if fused:
            parts = zip("qkv", tensor.tensor_split(3), strict=True)
            found |= {f"{fused[1]}.{part}_proj.{fused[2]}": one.clone() for part, one in parts}
        else:
            found[key] = tensor.T.contiguous() if name == "text_projection" else tensor
    return found


def open_clip_tensors(encoder: CLIPTextModel) -> dict[str, Tensor]:
    """A text encoder's tensors under OpenCLIP's names, with queries, keys and values in one."""
    own = {key.removeprefix("text_model."): tensor for key, tensor in detached(encoder).items()}
    back = {ours: theirs for theirs, ours in OPEN_CLIP.items()}
    return {_respelt(key, back): tensor for key, tensor in fused(own).items()}


def differing(encoder: CLIPTextModel) -> list[str]:
    """The settings of a text encoder that its tensors under OpenCLIP's names would not tell, with their values."""
    tensors = {key.removeprefix("text_model."): tensor for key, tensor in detached(encoder).items()}
    own, read = encoder.config, _config(tensors, PLACES["Stable Diffusion 2"][0])
    names = ("hidden_act", "num_attention_heads", "layer_norm_eps")
    return [f"text encoder {name} {getattr(own, name)}" for name in names if getattr(own, name) != getattr(read, name)]


def _respelt(name: str, words: Mapping[str, str]) -> str:
    return substituted(name, ((rf"(?<![^.]){re.escape(word)}(?![^.])", other) for word, other in words.items()))


def _without_last(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that Stable Diffusion 2 uses: of a whole encoder, told by its projection, all but the last layer."""
    if "text_projection.weight" not in tensors:
        return tensors
    last = count_of(tensors, r"encoder\.layers\.(\d+)\.") - 1
    return {key: one for key, one in tensors.items() if not key.startswith((f"encoder.layers.{last}.", "text_proj"))}


def _config(tensors: Mapping[str, Tensor], place: Place) -> CLIPTextConfig:
    words = "embeddings.token_embedding.weight"
    width = size_of(tensors, words, 1)
    return CLIPTextConfig(
        vocab_size=size_of(tensors, words, 0),
        hidden_size=width,
        intermediate_size=size_of(tensors, "encoder.layers.0.mlp.fc1.weight", 0),
        num_hidden_layers=count_of(tensors, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=width // HEAD,
        max_position_embeddings=size_of(tensors, "embeddings.position_embedding.weight", 0),
        hidden_act="gelu" if place.open_clip else "quick_gelu",
        projection_dim=size_of(tensors, "text_projection.weight", 0) if place.pooled else width,
        bos_token_id=0,
        eos_token_id=2,  # as published: transformers then takes the highest token, which ends the prompt
        pad_token_id=1,
    )


def _count_positions(model: Any) -> None:
    """Make the counter of positions, which no file holds, in place of the one without memory."""
    for module in model.modules():
        if isinstance(module, CLIPTextEmbeddings):
            module.position_ids = torch.arange(module.position_embedding.num_embeddings)[None]  # (1, L)
