"""The text encoders of Stable Diffusion, one of 1 and 2, two of XL, with their tokenizers: what they make of prompts.

Of one encoder the context is its last states. Of two it is the states before each one's last layer, side by side, and
the second's projected pooled state is a condition of its own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.models.clip.modeling_clip import CLIPEncoder

from inflate.errors import CheckpointError
from inflate.models import folders
from inflate.models.unet import load_strictly

SUFFIXES = ("", "_2")
"""Of the names of the first and of the second encoder's and tokenizer's folders."""
ZEROS = "force_zeros_for_empty_prompt"
"""Names, in model_index.json and in an export's settings, whether the empty prompt's states are zeros."""
COUNTERS = ("text_model.embeddings.position_ids", "embeddings.position_ids")
"""What older text encoders' files hold beside weights."""

ALPHABET = frozenset(ByteLevel.alphabet())
"""A character for each byte, of which a vocabulary that has them all can spell any word."""
WORD = re.compile(r"[^\W\d_]+|\d")
"""Letters together and digits apart, as CLIP's tokenizer splits a text."""


@dataclass(frozen=True)
class TextCondition:
    """What an image model's UNet is told of clips beside their noise."""

    context: Tensor
    """states (B, L, D) that cross-attention reads"""
    pooled: Tensor | None = None
    """one vector (B, P) of each prompt, of models that add it to the time embedding"""
    origin: Tensor | None = None
    """where the pixels come from (B, 4), for the same models: height and width of the source, and, once scaled to cover
    the clip's size, the top and left of what is cut out of it; none: the clip is its source"""
    fps: Tensor | None = None
    """frames per second (B,), of models that are told them; none: those of the model's own clips"""


@dataclass(frozen=True)
class TextEncoders:
    """One or two frozen text encoders, each with its tokenizer."""

    networks: tuple[CLIPTextModel | CLIPTextModelWithProjection, ...]
    tokenizers: tuple[CLIPTokenizer, ...]
    zeros_for_empty: bool = False
    """whether zeros stand for the empty prompt, instead of what is encoded of it"""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Those of a pipeline's folder in diffusers' layout; CheckpointError where one is missing or not whole."""
        kinds = (CLIPTextModel, CLIPTextModelWithProjection)[: 1 + (folder / "text_encoder_2").is_dir()]
        suffixes = SUFFIXES[: len(kinds)]
        places = [folder / f"text_encoder{one}" for one in suffixes]
        networks = tuple(load_encoder(place, kind) for place, kind in zip(places, kinds, strict=True))
        tokenizers = tuple(load_tokenizer(folder / f"tokenizer{one}") for one in suffixes)
        return cls(networks, tokenizers, len(kinds) > 1 and empty_is_zeros(folder))

    def save_pretrained(self, folder: Path) -> None:
        """Write each into its own sub-folder, as `load` reads them, but for what the empty prompt's states are."""
        for one, network, tokenizer in zip(SUFFIXES, self.networks, self.tokenizers, strict=False):
            network.save_pretrained(folder / f"text_encoder{one}")
            tokenizer.save_pretrained(folder / f"tokenizer{one}")

    @property
    def width(self) -> int:
        """The context's width."""
        return sum(network.config.hidden_size for network in self.networks)

    @property
    def pooled_width(self) -> int:
        """The pooled vector's width; 0 where there is none."""
        return self.networks[1].config.projection_dim if len(self.networks) > 1 else 0

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> TextCondition:
        """What the UNet is told of prompts, each padded or cut to the tokenizer's length.

        The empty prompt is the null condition of guidance: its states, or zeros where the model was trained so.
        """
        outputs = [self._encoded(*one, prompts) for one in zip(self.tokenizers, self.networks, strict=True)]
        if len(outputs) == 1:
            return TextCondition(outputs[0].last_hidden_state)  # (B, L, D)
        context = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)  # (B, L, D)
        pooled: Tensor = outputs[1].text_embeds  # (B, P)
        if self.zeros_for_empty:
            said = context.new_tensor([bool(prompt) for prompt in prompts])[:, None]  # (B, 1)
            context, pooled = context * said[:, None], pooled * said
        return TextCondition(context, pooled)

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that a tokenizer has no token of and cannot spell: none of CLIP's own vocabulary."""
        vocabularies = [tokenizer.get_vocab().keys() for tokenizer in self.tokenizers]
        closed = [words for words in vocabularies if not words >= ALPHABET]
        found = dict.fromkeys(WORD.findall(prompt.lower()))
        return [word for word in found if any(f"{word}</w>" not in words for words in closed)]

    @staticmethod
    def _encoded(tokenizer: CLIPTokenizer, network: Any, prompts: Sequence[str]) -> Any:
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        return network(tokens.to(network.device), output_hidden_states=True)


def load_encoder(folder: Path, kind: type[Any]) -> Any:
    """A CLIP text encoder, in float32, of a class; CheckpointError where it is missing or not whole."""
    folders.read_json(folder / "config.json")
    try:
        return load_strictly(kind.from_pretrained, folder, {"dtype": torch.float32}, COUNTERS)
    except SafetensorError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}; download or copy it again") from error


def with_idle_layer(encoder: Any) -> Any:
    """A copy of a CLIP text encoder with one more layer, of zeros, which changes nothing."""
    longer = copy.deepcopy(encoder)
    layers = _layers(longer)
    layers.append(copy.deepcopy(layers[-1]))
    with torch.no_grad():
        for parameter in layers[-1].parameters():
            parameter.zero_()
    longer.config.num_hidden_layers += 1
    return longer


def without_last_layer(encoder: Any) -> Any:
    """A copy of a CLIP text encoder whose last states are those before its last layer, normalised."""
    shorter = copy.deepcopy(encoder)
    del _layers(shorter)[-1]
    shorter.config.num_hidden_layers -= 1
    return shorter


def _layers(encoder: nn.Module) -> nn.ModuleList:
    return next(module.layers for module in encoder.modules() if isinstance(module, CLIPEncoder))


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in a folder; CheckpointError where there is none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing: text-to-video needs the image model's tokenizer")
    try:
        return CLIPTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def empty_is_zeros(folder: Path) -> bool:
    """Whether an export's settings or a pipeline's index say that zeros stand for the empty prompt; unsaid, they do."""
    files = [folder / name for name in (folders.SETTINGS_FILE, "model_index.json")]
    said = [folders.read_json(file).get(ZEROS) for file in files if file.is_file()]
    return next((bool(one) for one in said if one is not None), True)
