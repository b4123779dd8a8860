"""The look of the clips, held by an adapter below the temporal layers (AnimateDiff, 2307.04725, section 4.1).

An adapter that the image layers learnt on the clips' single frames is merged into them, frozen, while the temporal
layers learn on top of it: they need not learn watermarks or compression. What is drawn and exported is without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from inflate.adapters import bases, file, merge
from inflate.adapters.merge import Change
from inflate.adapters.settings import Weighted
from inflate.errors import ConfigError
from inflate.files import sha256
from inflate.models.exchange import listing
from inflate.models.unet import VideoUNet


@dataclass(frozen=True)
class Domain:
    """An adapter merged into the image layers of a UNet for a run."""

    unet: VideoUNet
    wanted: Weighted
    digest: str
    """SHA-256 of its file"""
    own: Change
    """the weights that it changed, as they were"""

    @classmethod
    def below(cls, unet: VideoUNet, text: str | None) -> Domain | None:
        """Merge the adapter FILE or FILE:WEIGHT into a UNet; None of none.

        CheckpointError as of `merge_files`, ConfigError for an adapter that sits on temporal layers.
        """
        if text is None:
            return None
        wanted = Weighted.parse(text)
        adapter = file.read(wanted.path)
        temporal = [name for name in adapter.rank if ".temporal." in name]
        if temporal:
            raise ConfigError(
                f"text_to_video.domain_adapter={text} sits on temporal layers, which learn themselves: "
                f"{listing(temporal)}; name one of image layers alone, such as adapters/spatial_lora.yaml makes"
            )
        bases.refuse_another(unet, adapter, wanted.path, remedy="train one on this model by stage=spatial")
        return cls(unet, wanted, sha256(wanted.path), merge.merge_keeping(unet, [wanted], any_base=True))

    @property
    def name(self) -> str:
        """What a run and an export say of it."""
        return f"{self.wanted.path}:{self.wanted.weight:g} (SHA-256 {self.digest})"

    @property
    def fingerprint(self) -> dict[str, str]:
        """What a run that goes on must find unchanged."""
        return {"domain adapter": f"SHA-256 {self.digest}, weight {self.wanted.weight}"}

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """The UNet without the adapter meanwhile: its image layers are, to the bit, those of the image model."""
        with merge.exchanged(self.unet, self.own):
            yield
