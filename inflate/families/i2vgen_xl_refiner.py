"""The refinement stage of I2VGen-XL (Zhang et al., 2311.04145, section 3.2): a clip drawn anew, larger and sharper.

The refiner is a text-to-video model of large clips that was trained on the lower noise levels alone. It never sees what
it refines: a clip is enlarged, noised up to the highest of those levels, and drawn from there by its prompt (SDEdit).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from inflate.errors import CheckpointError, ConfigError
from inflate.models import exchange, folders
from inflate.models.exports import ExportedEncoders, ExportedModel
from inflate.models.text_encoders import TextCondition
from inflate.models.trained_clips import TrainedClips
from inflate.models.unet import VideoUNet
from inflate.objectives import TRAIN_TIMESTEPS, Predict

FAMILY = "i2vgen_xl_refiner"


@dataclass(frozen=True)
class Clips(TrainedClips):
    """What the clips of training were; their frames per second are those of the files that are written."""

    family: ClassVar[str] = FAMILY

    frames: int = 32
    """length"""
    levels: int = 600
    """how many noise levels, the lower ones, the model was trained on"""
    negative: str = ""
    """prompt that stood for none in training, and that guidance leads away from"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.levels <= TRAIN_TIMESTEPS:
            raise ConfigError(f"clips.levels={self.levels}: noise levels are 1 to {TRAIN_TIMESTEPS}")


class Encoders(ExportedEncoders):
    """The frozen networks without a UNet."""

    clips = Clips


@dataclass
class Refiner(ExportedModel):
    """A model that refines clips by prompts: its networks, its noise schedule, and what its clips were."""

    encoders = Encoders

    clips: Clips

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unet.config.addition_embed_type is not None or self.unet.hierarchy or self.unet.image_context:
            raise CheckpointError(
                "a refiner is told texts alone, but this UNet more: use that of a text-to-video model"
            )
        channels = self.vae.config.latent_channels
        if self.unet.config.in_channels != channels:
            raise CheckpointError(f"the UNet takes {self.unet.config.in_channels} channels but the VAE has {channels}")
        if self.unet.spec.added_ids:
            raise CheckpointError("a refiner is not told the frame rate, but this UNet is: inflate it with added_ids=0")

    def predict(self, condition: TextCondition, unet: nn.Module | None = None, image_only: bool = False) -> Predict:
        """The network as objectives and samplers call it, for a condition.

        `unet` is its wrapped form (DDP, EMA) where there is one. `image_only` takes all frames for images: every
        temporal layer is bypassed, as it is for a clip of one frame.
        """
        called = self.unet if unet is None else unet

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            marks = self.unet.all_images(noisy) if image_only or noisy.shape[1] == 1 else None
            output: Tensor = called(noisy, timestep, condition.context.to(noisy), image_only=marks).sample
            return output  # (B, F, C, h, w)

        return predict


def text_only(unet: VideoUNet, fps: float) -> VideoUNet:
    """A UNet that is told texts alone, made of one that may be told first frames and the frame rate; it takes over the
    tensors.

    It is the other's equal where that is told the rate `fps`, and nothing of a first frame.
    """
    config, hierarchy = folders.plain(unet.config), unet.hierarchy
    channels = unet.config.in_channels - (hierarchy.channels if hierarchy and hierarchy.detail_encoder else 0)
    told = {"hierarchy": None, "class_embed_type": None, "projection_class_embeddings_input_dim": None}
    made = exchange.build_unet({**config, **told, "in_channels": channels}, replace(unet.spec, added_ids=0))
    own = exchange.detached(unet)
    tensors = {name: own[name] for name in exchange.shapes(made)}
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :channels].clone()
    if unet.spec.added_ids:
        bias = tensors["time_embedding.linear_2.bias"]
        tensors["time_embedding.linear_2.bias"] = bias + unet.embedded_ids(bias.new_tensor([[fps]]))[0]
    exchange.adopt(made, tensors)
    return made
