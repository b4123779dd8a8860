"""Which layers an adapter sits on, and whether it would learn anything there."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from inflate.adapters.settings import AdapterSettings
from inflate.errors import ConfigError
from inflate.models.exchange import listing
from inflate.models.unet import VideoUNet
from inflate.surgery import added_conditions, context_width, evaluating

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, nn.Conv3d)
FLAT = ("lokr", "loha")
"""Kinds that PEFT does not put on convolutions over time."""
ZERO = "what follows it is still zero, as in a model freshly inflated"
SINGLE = "a softmax over one context token is 1, whatever its query and key"
UNUSED = "nothing that is trained passes through it"


def adaptable(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers that an adapter can sit on: linear ones and convolutions, by name.

    One that owns another layer, as ModelScope's first convolution does, is none: the adapter would act after both, and
    could not be merged.
    """
    return {n: each for n, each in unet.named_modules() if isinstance(each, LAYERS) and not [*each.children()]}


def resolve(unet: nn.Module, settings: AdapterSettings) -> list[str]:
    """The layers that the patterns name, in the model's order.

    ConfigError for a pattern that names none, with the nearest name, and for layers that the kind cannot sit on.
    """
    layers = adaptable(unet)
    for setting, patterns, fits in (("targets", settings.targets, means), ("exclude", settings.exclude, matches)):
        for pattern in patterns:
            if not any(fits(name, pattern) for name in layers):
                raise ConfigError(f"adapter.{setting}: {pattern} names no layer{_hint(unet, layers, pattern)}")
    wanted = [name for name in layers if any(means(name, pattern) for pattern in settings.targets)]
    chosen = [name for name in wanted if not any(matches(name, pattern) for pattern in settings.exclude)]
    if not chosen:
        raise ConfigError("adapter.targets: no layer is left; name temporal layers as temporal..., or exclude less")
    over_time = [name for name in chosen if isinstance(layers[name], nn.Conv3d)]
    if over_time and settings.kind in FLAT:
        raise ConfigError(
            f"adapter.kind={settings.kind} cannot sit on convolutions over time: {listing(over_time, 1)}; exclude them "
            "by adapter.exclude=[temporal.conv*], or set kind to lora, dora or rslora"
        )
    return chosen


def refuse_zero_rows(unet: nn.Module, names: Sequence[str], settings: AdapterSettings) -> None:
    """ConfigError for a DoRA on weights of no length, by which it would divide."""
    weights = {name: unet.get_parameter(f"{name}.weight") for name in names if settings.kind == "dora"}
    zero = [name for name, weight in weights.items() if not bool(weight.flatten(1).any(1).all())]
    if zero:
        raise ConfigError(
            f"adapter.kind=dora divides by the lengths of weights, and some of {listing(zero, 1)} are zero, as in a "
            "model freshly inflated; set kind to lora, or name other layers"
        )


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is a name or its end, after a dot; `*` stands for anything."""
    return fnmatchcase(f".{name}", f"*.{pattern}")


def means(name: str, pattern: str) -> bool:
    """Whether a pattern asks for a layer: for temporal ones it says so."""
    return matches(name, pattern) and (".temporal." not in name or "temporal" in pattern)


def _hint(unet: nn.Module, layers: dict[str, nn.Module], pattern: str) -> str:
    if any(matches(name, pattern) for name in layers):
        return f" of the image model; for those between frames, say temporal.{pattern}"
    other = [name for name, _ in unet.named_modules() if name and name not in layers and matches(name, pattern)]
    if other:
        kind = type(unet.get_submodule(other[0])).__name__
        return f" that an adapter can sit on ({other[0]} is a {kind}); those are linear layers and convolutions"
    depth = pattern.count(".") + 1
    ends = {".".join(name.split(".")[-depth:]) for name in layers}
    near = difflib.get_close_matches(pattern, sorted(ends), 3, 0.5)
    return f"; the nearest are {', '.join(near)}" if near else ""


# --- whether a gradient arrives ---------------------------------------------------------------------------------------


def refuse_inert(unet: VideoUNet, names: Sequence[str], tokens: int, image_only: bool = False) -> None:
    """ConfigError naming the layers whose adapter would get no gradient, and why: found by one small backward pass.

    `tokens` is the length of contexts in training, `image_only` whether all its frames are images. The model's own
    weights are frozen meanwhile, as beside an adapter.
    """
    arriving = gradients(unet, names, inputs(unet, tokens, image_only))
    reasons: dict[str, list[str]] = {}
    for name in names:
        if not arriving[name]:
            reasons.setdefault(_reason(name, arriving[name], tokens, image_only), []).append(name)
    if reasons:
        told = "; ".join(f"{listing(found, 1)}: {reason}" for reason, found in reasons.items())
        raise ConfigError(f"adapter.targets: an adapter would learn nothing on {told}; {_remedy(reasons)}")


def gradients(unet: VideoUNet, names: Sequence[str], given: dict[str, Any]) -> dict[str, bool | None]:
    """Whether a gradient reaches what each layer gives: no, or None where the layer is not called at all."""
    added: dict[str, list[Tensor]] = {name: [] for name in names}
    learning = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(evaluating(unet))
        for name in names:
            hook = unet.get_submodule(name).register_forward_hook(_adding(added[name]))
            stack.callback(hook.remove)
        stack.callback(lambda: [parameter.requires_grad_(True) for parameter in learning])
        unet.requires_grad_(False)
        output = unet(**given).sample
        if output.requires_grad:
            output.backward(normal(output.shape, 1).to(output))
    reached = {name: [one.grad is not None and bool(one.grad.any()) for one in ones] for name, ones in added.items()}
    return {name: any(found) if found else None for name, found in reached.items()}


def _adding(added: list[Tensor]) -> Callable[..., Tensor]:
    """A hook that adds to a layer's output a zero by which the gradient there is seen."""

    def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        added.append(torch.zeros_like(output, requires_grad=True))
        return output + added[-1]

    return hook


def inputs(unet: VideoUNet, tokens: int, image_only: bool = False, seed: int = 0) -> dict[str, Any]:
    """Two frames of noise, as small as the model takes them, with whatever it is told beside: the same everywhere."""
    side = 2 ** len(unet.config.block_out_channels)
    like = next(unet.parameters())
    first, channels = unet.hierarchy, unet.config.in_channels
    if first is not None and first.detail_encoder:
        channels -= first.channels
    given: dict[str, Any] = {
        "sample": normal((1, 2, channels, side, side), seed).to(like),
        "timestep": torch.ones(1).to(like),
        "encoder_hidden_states": normal((1, tokens, context_width(unet)), seed + 1).to(like),
        "added_cond_kwargs": added_conditions(unet, 2, lambda *shape: normal(shape, seed + 3).to(like)),
    }
    if unet.image_context is not None:
        given["image_features"] = normal((1, tokens, unet.image_context.embedding), seed + 4).to(like)
    if first is not None and first.takes_latents:
        given["image_latents"] = normal((1, first.channels, side, side), seed + 4).to(like)
    if first is not None and first.clip_tokens:
        given["image_embeddings"] = normal((1, 1, first.embedding), seed + 5).to(like)
    if unet.spec.added_ids:
        given["added_time_ids"] = normal((1, unet.spec.added_ids), seed + 2).abs().to(like)
    if image_only:
        given["image_only"] = torch.ones(1, 2, dtype=torch.bool, device=like.device)
    return given


def normal(shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def _reason(name: str, arriving: bool | None, tokens: int, image_only: bool) -> str:
    if tokens == 1 and ".attn2." in name and arriving is None:
        return SINGLE
    if image_only and ".temporal." in name:
        return "the frames are trained as single images, which pass by the temporal layers"
    return UNUSED if arriving is None else ZERO


def _remedy(reasons: dict[str, list[str]]) -> str:
    remedies = {
        SINGLE: "leave these out by adapter.exclude=[attn2.to_q, attn2.to_k]",
        ZERO: "start from a model whose temporal layers are trained, or train them first (adapters/temporal.yaml)",
    }
    return "; ".join(dict.fromkeys(remedies.get(reason, "name other layers") for reason in reasons))
