"""What the backward pass computes again instead of keeping it.

A unit is a layer that can be recomputed as a whole: it keeps its inputs alone. Every residual block, every transformer
with its temporal layers, and what enlarges or opens a network is one. Within a transformer lie sub-blocks, of which a
nested recomputation keeps the inputs, too, and feed-forwards, which know how to be recomputed in parts.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (2016); Korthikanti et al., Reducing Activation
Recomputation in Large Transformer Models (2022), which keeps what is dear to compute and small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from inflate.layers.frame_operator import attend_frames
from inflate.layers.offload import Offload
from inflate.layers.policy import WHOLE, Policy

Recompute = Callable[..., Any]
"""A checkpoint function: called with a function and its tensors, it keeps only the tensors."""
Compiled = Callable[..., Any]
"""What a unit's own function was compiled to; it takes the same tensors."""

ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_flash_attention_for_cpu",
)
KEPT = frozenset([attend_frames._opoverload, *(getattr(torch.ops.aten, name).default for name in ATTENTION)])
"""Operations whose outputs `all_but_attention` keeps: the fused attentions, dear to compute and small to keep; our own
over frames among them."""

DEAR = 10_000
"""FLOPs of a convolution for each value it gives, from which on `all_but_attention` keeps that, too: below, a gigabyte
saves less than attention's does."""


def run(module: nn.Module, function: Callable[..., Any], *tensors: Any) -> Any:
    """Call `function(*tensors)`; with recomputation on, keep only the tensors and call again in the backward pass.

    Of a unit that is compiled, what it was compiled to is called in place of `function`, where gradients are wanted:
    looking at a model between steps, in other sizes, would compile it again. Where nothing learns, neither in the
    module nor before it, nothing is kept and there is nothing to recompute. The recomputation sees the clip state of
    its own forward pass: by then the model may have been called with another clip, whose frame count or image mask
    would give wrong gradients without a word.
    """
    if not torch.is_grad_enabled():
        return function(*tensors)
    function = getattr(module, "compiled", None) or function
    recompute: Any = module.recompute
    if recompute is None or not learns(module, *tensors):
        return function(*tensors)
    clip: Any = getattr(module, "clip", None)
    if clip is None:
        return recompute(function, *tensors)
    state = clip.state

    def again(*tensors: Any) -> Any:
        with clip.during(state):
            return function(*tensors)

    return recompute(again, *tensors)


def learns(module: nn.Module, *inputs: Any) -> bool:
    """Whether a graph grows from a call: by an input that needs a gradient, or a parameter that learns."""
    if not torch.is_grad_enabled():
        return False
    given = any(isinstance(each, Tensor) and each.requires_grad for each in tree_leaves(inputs))
    return given or any(parameter.requires_grad for parameter in module.parameters())


class InnerNorm(nn.LayerNorm):
    """The norm before an `InParts` feed-forward, which applies it itself: here the tokens pass as they are."""

    def forward(self, input: Tensor) -> Tensor:
        """Tokens (...,C), unchanged."""
        return input

    def normed(self, tokens: Tensor) -> Tensor:
        """Tokens (...,C), normalised."""
        return super().forward(tokens)


class InParts(FeedForward):
    """A feed-forward and the norm before it, which may be computed in parts, each again in the backward pass.

    The parts are of the tokens. Wide intermediate results are then there for one part at a time: only the input is
    kept, as what is added to the feed-forward's output keeps it anyway.
    """

    norm: InnerNorm
    parts: int = 0
    """0: all tokens at once, and everything is kept."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens (...,C) to (...,C)."""
        if not self.parts:
            return self._normed(hidden_states)
        rows = hidden_states.flatten(0, -2)  # (N, C)
        call = partial(checkpoint, self._normed, use_reentrant=False) if learns(self, rows) else self._normed
        made = [call(part) for part in rows.tensor_split(min(self.parts, len(rows)))]
        return torch.cat(made).unflatten(0, hidden_states.shape[:-1])  # (..., C)

    def _normed(self, tokens: Tensor) -> Tensor:
        output: Tensor = super().forward(self.norm.normed(tokens))
        return output


def divide(feed_forward: nn.Module, norm: nn.Module) -> None:
    """Let a feed-forward apply the norm before it, and be computed in parts: in place, of plain ones of diffusers."""
    if type(feed_forward) is FeedForward and type(norm) is nn.LayerNorm:
        feed_forward.__class__, norm.__class__ = InParts, InnerNorm
        # Set past nn.Module, which would register the norm a second time and rename it in the state dict.
        object.__setattr__(feed_forward, "norm", norm)


def units(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that are recomputed as a whole, by name."""
    return {name: each for name, each in model.named_modules() if _is_recomputed(each) and not _is_inner(each)}


def set_recompute(model: nn.Module, recompute: Recompute | None) -> None:
    """Give every unit of `model` its checkpoint function, or take it away; sub-blocks have none of their own then."""
    for unit in units(model).values():
        _set(unit, recompute)
        for inner in sub_blocks(unit):
            _set(inner, None)


def recompute_by(
    model: nn.Module, policies: Mapping[str, Policy], parts: int = 1, offload: Offload | None = None
) -> None:
    """Let each unit, by name, be recomputed by its policy, with its feed-forwards in that many parts.

    With `offload`, what recomputed units keep of their inputs rests elsewhere.
    """
    for name, unit in units(model).items():
        policy = policies[name]
        function = _function(policy)
        _set(unit, offload.around(function) if function and offload else function)
        for inner in sub_blocks(unit):
            _set(inner, _function("units") if policy == "nested" else None)
        for feed_forward in feed_forwards(unit):
            feed_forward.parts = parts if parts > 1 or policy == "feed_forward" else 0


def recomputes(model: nn.Module) -> bool:
    """Whether any unit of `model` is checkpointed."""
    return any(getattr(unit, "recompute", None) is not None for unit in units(model).values())


def sub_blocks(unit: nn.Module) -> Iterator[nn.Module]:
    """The parts of a unit that a nested recomputation recomputes one by one."""
    return (module for module in unit.modules() if _is_recomputed(module) and _is_inner(module))


def feed_forwards(unit: nn.Module) -> Iterator[InParts]:
    """The feed-forwards of a unit."""
    return (module for module in unit.modules() if isinstance(module, InParts))


@contextmanager
def in_parts(model: nn.Module, parts: int) -> Iterator[None]:
    """A model whose feed-forwards run in so many parts meanwhile, if more than before: the same in less memory."""
    before = [(each, each.parts) for each in feed_forwards(model)]
    for each, own in before:
        each.parts = max(own, parts)
    try:
        yield
    finally:
        for each, own in before:
            each.parts = own


def _is_recomputed(module: nn.Module) -> bool:
    return hasattr(module, "recompute")


def _is_inner(module: nn.Module) -> bool:
    return getattr(module, "inner", False)


def _set(module: nn.Module, recompute: Recompute | None) -> None:
    # A layer without one is as it was born, down to its attributes: whatever was compiled for it still is.
    module.__dict__.pop("recompute", None)
    if recompute is not None:
        module.__dict__["recompute"] = recompute


def _function(policy: Policy) -> Recompute | None:
    if policy not in WHOLE:
        return None
    if policy == "all_but_attention":
        return partial(checkpoint, use_reentrant=False, context_fn=_keeping)
    return partial(checkpoint, use_reentrant=False)


def _keeping() -> Any:
    return create_selective_checkpoint_contexts(_kept)


def _kept(_: Any, operation: Any, *given: Any, **__: Any) -> CheckpointPolicy:
    dear = operation is torch.ops.aten.convolution.default and 2 * given[1][0].numel() >= DEAR
    return CheckpointPolicy.MUST_SAVE if dear or operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
