"""Fréchet video distance with the protocol that its value depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from inflate.errors import DataError
from inflate.metrics.frechet import frechet_distance, kernel_distance


@dataclass(frozen=True)
class Protocol:
    """Everything beside the generated clips that an FVD depends on: two values are comparable where all is equal."""

    real: int
    """real clips"""
    generated: int
    """generated clips"""
    frames: int
    """frames of each clip that are looked at"""
    window: str
    """where in the clip they lie"""
    stride: int
    """every n-th frame"""
    fps: str
    """frames per second that the clips have or are resampled to, before the stride"""
    size: str
    """width x height given to the feature network"""
    resize: str
    """how clips come to that size, and how the network goes on"""
    crop: str
    """what is cut off"""
    real_codec: str
    """codecs and pixel formats of the files"""
    generated_codec: str
    real_sha256: str
    """of the real clips' files"""
    network_sha256: str
    """of the feature network's file"""
    dimensions: int
    """of its features"""
    seed: int
    """of whatever is drawn; the frames are not"""

    def __str__(self) -> str:
        stated = " ".join(f"{name}={value}" for name, value in asdict(self).items())
        return f"{stated} WARNING: {self.warning}" if self.warning else stated

    @classmethod
    def names(cls) -> list[str]:
        """The names of the fields."""
        return [field.name for field in fields(cls)]

    @property
    def warning(self) -> str:
        """Why a value of this protocol says little; empty where nothing speaks against it."""
        few = min(self.real, self.generated)
        if few > self.dimensions:
            return ""
        return f"{few} clips for {self.dimensions} dimensions: the covariance is not determined, and the value too high"


@dataclass(frozen=True)
class FVD:
    """Distances of two sets of clips under one protocol."""

    fvd: float
    kvd: float
    protocol: Protocol


def video_distance(real: Tensor, generated: Tensor, protocol: Protocol) -> FVD:
    """FVD and KVD of features (N, D) and (M, D); DataError where they cannot be compared, or are not the protocol's."""
    counted = (len(real), len(generated), real.shape[-1])
    if counted != (protocol.real, protocol.generated, protocol.dimensions):
        raise DataError(f"the protocol states other sets than the features of {counted[0]} and {counted[1]} clips")
    return FVD(frechet_distance(real, generated), kernel_distance(real, generated), protocol)


def refuse_another_protocol(mine: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> None:
    """Raise DataError, listing what differs, where two protocols (by name) are not the same.

    where: what the other one belongs to. What only one of them has differs.
    """
    differing = [name for name in dict.fromkeys([*mine, *theirs]) if mine.get(name) != theirs.get(name)]
    if differing:
        listed = ", ".join(f"{name} {mine.get(name)} here and {theirs.get(name)} there" for name in differing)
        raise DataError(f"{where}: was measured by another protocol ({listed}); measure both alike to compare them")
