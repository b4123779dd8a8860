"""What families of conditions share: several of them as one batch, and the draw of what is left out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from inflate.errors import ConfigError, InflateError


class Batched:
    """A dataclass whose tensors have the clips of a batch first."""

    @classmethod
    def cat(cls, conditions: Sequence[Self]) -> Self:
        """Several conditions as one batch; InflateError where one lacks what another has."""
        assert is_dataclass(cls)
        return cls(**{name.name: _joined([getattr(each, name.name) for each in conditions]) for name in fields(cls)})

    def split(self, size: int) -> list[Self]:
        """This one as several, of at most so many clips each."""
        assert is_dataclass(self)
        assert not isinstance(self, type)
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        given = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        parts = zip(*(value.split(size) for value in given.values()), strict=True)
        return [replace(self, **dict(zip(given, part, strict=True))) for part in parts]


def left_out(draw: Tensor, text: float, both: float, image: float) -> tuple[Tensor, Tensor]:
    """Which clips are without their text and which without their image, each (B, 1, 1), by their uniform draws (B,).

    The rates are probabilities of losing the text alone, both or the image alone; ConfigError where they exceed 1
    together or one is negative.
    """
    if min(text, both, image) < 0 or text + both + image > 1:
        raise ConfigError(f"drop rates {text}, {both} and {image} must be at least 0 and at most 1 in all")
    without_text = draw < text + both
    without_image = (draw >= text) & (draw < text + both + image)
    return without_text[:, None, None], without_image[:, None, None]


def _joined(values: Sequence[Any]) -> Any:
    given = [value for value in values if isinstance(value, Tensor)]
    if not given:
        if any(value != values[0] for value in values):
            raise InflateError("conditions of different parts cannot be one batch")
        return values[0]
    if len(given) < len(values):
        raise InflateError("conditions with and without an image cannot be one batch")
    return torch.cat(given)
