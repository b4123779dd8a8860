"""What captions tell the network: encoded in the step, or read from a cache."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from inflate.models.stable_diffusion import Encoding
from inflate.models.text_encoders import TextCondition
from inflate.training.player import Batch


def text_of(family: Encoding, batch: Batch, device: torch.device) -> TextCondition:
    """What the captions of a batch tell, of a cache where the batch has it, on the device."""
    if "caption_states" not in batch:
        return family.embed(batch["caption"])
    place, pooled = (device, family.vae.dtype), batch.get("caption_pooled")
    return TextCondition(batch["caption_states"].to(*place), None if pooled is None else pooled.to(*place))


def encoded_text(family: Encoding, batch: Batch) -> Batch:
    """What is encoded of a batch's captions, by the names that a cache has for it, on the CPU."""
    if "caption_states" in batch:
        return {}
    text = family.embed(batch["caption"])
    pooled = {} if text.pooled is None else {"caption_pooled": text.pooled.cpu()}
    return {"caption_states": text.context.cpu(), **pooled}


def without_text(condition: TextCondition, dropped: Tensor, nothing: TextCondition) -> TextCondition:
    """The condition, with another prompt's (1, L, D) in place of the dropped (B,) clips' own."""
    context = torch.where(dropped[:, None, None], nothing.context.to(condition.context), condition.context)  # (B, L, D)
    if condition.pooled is None or nothing.pooled is None:
        return replace(condition, context=context)
    pooled = torch.where(dropped[:, None], nothing.pooled.to(condition.pooled), condition.pooled)  # (B, P)
    return replace(condition, context=context, pooled=pooled)
