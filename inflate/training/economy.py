"""Applies a run's measures that save memory to the networks that it trains."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

from diffusers import AutoencoderKL
from torch import nn

from inflate.adapters.bases import on_cpu
from inflate.errors import ConfigError
from inflate.layers import quantised
from inflate.layers.offload import Offload
from inflate.layers.policy import Policy
from inflate.layers.quantised import Kind
from inflate.layers.recompute import feed_forwards, recompute_by, units
from inflate.models.unet import VideoUNet
from inflate.models.vae import VideoVAE, decode_in_half, encode_at_most
from inflate.training.memory import bytes_of
from inflate.training.memory_settings import Memory

logger = logging.getLogger(__name__)

LEAST = 0.1
"""Share of the weights that has to stay as it is for a base to be worth storing: a few layers never learn."""


def save_memory(network: VideoUNet | VideoVAE, settings: Memory) -> None:
    """Let a network, whose trained parameters are chosen already, run as the settings say.

    Raises ConfigError for a pattern that fits no unit, for what only transformers have where there are none, and for a
    base in fewer bits where every layer learns.
    """
    policies = policies_of(units(network), settings)
    _check_transformers(network, policies.values(), settings)
    if settings.base != "as_loaded":
        _store(network, settings.base)
    recompute_by(network, policies, settings.feed_forward_parts, Offload() if settings.offload else None)


def save_coding(vae: AutoencoderKL, settings: Memory) -> None:
    """Let a VAE, trained or not, encode and decode as the settings say; an image model's decodes image by image."""
    encode_at_most(vae, settings.encode_frames)
    decode_in_half(vae, settings.decode_bf16)
    if settings.decode_rows and isinstance(vae, VideoVAE):
        vae.stream(settings.decode_rows)
    elif settings.decode_rows:
        vae.enable_slicing()


def _store(network: VideoUNet | VideoVAE, kind: Kind) -> None:
    before = bytes_of(network.parameters())
    frozen = bytes_of(layer.get_parameter("weight") for layer in quantised.storable(network).values())
    if frozen < LEAST * before:
        raise ConfigError(
            f"memory.base={kind} is for weights that stay as they are, and every layer learns: train an adapter "
            "(adapters/temporal_lora.yaml) or the temporal layers alone, or set memory.base=as_loaded"
        )
    layers = quantised.store(network, kind)
    after = bytes_of([*network.parameters(), *network.buffers()])
    logger.info(
        "memory.base=%s: the weights of %d layers that do not learn are kept so; all take %.3f GB, not %.3f. What is "
        "measured and previewed is computed by these, what is exported by the weights as loaded",
        kind, len(layers), after / 1e9, before / 1e9,
    )  # fmt: skip


@contextmanager
def as_loaded(unet: VideoUNet) -> Iterator[None]:
    """A UNet with its stored weights as they were loaded, meanwhile; it is then on the CPU, where those are."""
    if quantised.kind_of(unet) is None:
        yield
        return
    with quantised.as_loaded(unet), on_cpu(unet):
        yield


def policies_of(names: Iterable[str], settings: Memory) -> dict[str, Policy]:
    """The policy of each unit, by its name; ConfigError for a pattern that fits none."""
    policies: dict[str, Policy] = dict.fromkeys(names, settings.recompute)
    for pattern, policy in settings.recompute_in.items():
        fitting = [name for name in policies if any(fnmatchcase(block, pattern) for block in _around(name))]
        if not fitting:
            raise ConfigError(f"memory.recompute_in: {pattern} fits no block{_nearest(pattern, policies)}")
        policies |= dict.fromkeys(fitting, policy)  # type: ignore[arg-type]  # checked by the settings
    return policies


def _around(name: str) -> Iterator[str]:
    """A unit's name, and those of the blocks around it: up_blocks.3 of up_blocks.3.resnets.0."""
    words = name.split(".")
    return (".".join(words[: length + 1]) for length in range(len(words)))


def _nearest(pattern: str, names: Iterable[str]) -> str:
    blocks = {block for name in names for block in _around(name)}
    near = difflib.get_close_matches(pattern, sorted(blocks), 3, 0.5)
    outer = sorted(block for block in blocks if block.count(".") <= 1)
    return f"; the nearest are {', '.join(near)}" if near else f"; there are {', '.join(outer)}"


def _check_transformers(network: nn.Module, policies: Iterable[Policy], settings: Memory) -> None:
    if any(feed_forwards(network)):
        return
    asked = [f"memory.recompute={policy}" for policy in {*policies} - {"nothing", "units"}]
    asked += [f"memory.feed_forward_parts={settings.feed_forward_parts}"] if settings.feed_forward_parts > 1 else []
    if asked:
        raise ConfigError(
            f"{sorted(asked)[0]} is for networks with transformers, of which a {type(network).__name__} has none: set "
            "memory.recompute=units"
        )
