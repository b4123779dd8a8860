"""`VideoUNet`: a diffusers `UNet2DConditionModel` whose layers own a temporal child.

Its state dict is the 2D one, key for key, plus the keys listed in `inflate.layers.temporal` and `.branches` and, where
the spec asks for added ids, `class_embedding.*`. Whatever works on the 2D model (LoRA, ControlNet residuals, attention
processors) works on it.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from transformers.utils.logging import EmptyTqdm, set_tqdm_hook

from inflate.errors import CheckpointError, ConfigError, InflateError, SurgeryError
from inflate.layers.branches import FrameTransformer, NormOver, TemporalConvs, VideoConvIn, inflate_conv_in
from inflate.layers.clip import Clip, ClipState
from inflate.layers.convolution import convolutions_within
from inflate.layers.freeu import FreeU
from inflate.layers.hierarchy import FirstFrame, Hierarchy, Part, Told, weigh_image
from inflate.layers.image_context import (
    DualAttention,
    ImageContext,
    OtherLengths,
    QueryLayer,
    QueryTransformer,
    attend_to_image,
    cross_attentions,
)
from inflate.layers.recompute import recomputes, set_recompute
from inflate.layers.temporal import (
    SpatialBlock,
    TemporalResnet,
    TransformerTime,
    VideoBlock,
    VideoResnet,
    VideoTransformer,
    VideoUpsample,
    inflate_resnet,
    inflate_transformer,
    inflate_upsample,
    like,
)
from inflate.layers.up_blocks import VideoCrossAttnUpBlock, inflate_up_block

BLOCKS = (CrossAttnDownBlock2D, CrossAttnUpBlock2D, DownBlock2D, UNetMidBlock2D, UNetMidBlock2DCrossAttn, UpBlock2D)
"""The blocks of Stable Diffusion 1, 2 and XL: what inflation knows how to extend."""

EPSILON_BLOCKS = (CrossAttnDownBlock2D, CrossAttnUpBlock2D, UpBlock2D)
"""The blocks whose counterparts in diffusers' video UNet have an epsilon of 1e-6 built in."""

MIDDLE_BLOCKS = (UNetMidBlock2D, UNetMidBlock2DCrossAttn)

INPUT_HEADS = 8
"""Heads of the transformer after the input convolution, in every published model."""

SAVED_BEFORE = {"each_up_to": 1_000_000}
"""Values, other than today's defaults, that models had which were saved before their config named the setting."""

OF_IMAGE = re.compile(r"^query_transformer\.|^first_frame\.|\.attn2\.image\.")
"""What makes and reads an image's tokens, by our names."""


@dataclass(frozen=True)
class TemporalSpec:
    """Which temporal layers a 2D UNet gains; stored in the model's config under `temporal`.

    The defaults are Stable Video Diffusion's. Raises `ConfigError` for two layers in one place.
    """

    resnet: bool = True
    """A temporal residual block after each 2D one, mixed by a learned share."""
    block: bool = True
    """A temporal transformer block after each 2D one; frame positions and mix are per transformer."""
    each_up_to: int = 2
    """Transformers of more 2D blocks than this (Stable Diffusion XL has up to 10) get one temporal block, after their
    last, instead of one after each: 0.57 instead of 3.51 thousand million parameters."""
    conv: bool = False
    """Four convolutions over time after each 2D residual block."""
    transformer: bool = False
    """A transformer over frames, of the same heads, after each 2D transformer."""
    input: bool = False
    """A transformer over frames after the first convolution: 8 heads as wide as the first 2D transformer's."""
    motion: bool = False
    """A motion module, which is a transformer over frames that knows their positions, after each pair of residual block
    and transformer, and where a level has no transformer after each residual block."""
    motion_middle: bool = True
    """A motion module in the middle block, too."""
    motion_heads: int = 8
    """Attention heads of a motion module."""
    motion_frames: int = 32
    """Most frames that a motion module has positions for."""
    motion_norm: NormOver = "frame"
    """What the group norm of a motion module averages over: frame, as AnimateDiff was trained, or clip, as diffusers
    runs it."""
    dropout: float = 0.0
    """Dropout between the four convolutions."""
    added_ids: int = 3
    """Number of scalar conditions added to the time embedding (0 = none)."""
    added_id_dim: int = 256
    """Width of the sinusoidal embedding of each added id."""
    cross_attention_resnet_eps: float = 1e-5
    """Group norm epsilon of the residual blocks of all up and cross-attention blocks: 1e-5 as Stable Video Diffusion
    was trained, 1e-6 as diffusers runs it."""

    def __post_init__(self) -> None:
        if self.motion_norm not in get_args(NormOver):
            raise ConfigError(f"temporal: motion_norm={self.motion_norm} is neither {' nor '.join(get_args(NormOver))}")
        places = {
            "residual blocks": ("resnet", "conv", "motion"),
            "transformers": ("block", "transformer", "motion"),
        }
        for place, slots in places.items():
            asked = [slot for slot in slots if getattr(self, slot)]
            if len(asked) > 1:
                raise ConfigError(f"temporal: {' and '.join(asked)} would share the place at the {place}: set one true")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> TemporalSpec:
        """The spec of `to_dict`'s settings, an earlier version's too; raises `ConfigError` for an unknown one."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ConfigError(f"temporal: unknown setting {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**{**SAVED_BEFORE, **settings})


VIDEO_LDM = TemporalSpec(added_ids=0)
"""Text-to-video by residual blocks and transformer blocks with learned mixes (Align your Latents, 2023)."""
MODELSCOPE = TemporalSpec(resnet=False, block=False, conv=True, transformer=True, input=True, dropout=0.1, added_ids=0)
"""ModelScope, ZeroScope and the models of VGen."""
DYNAMICRAFTER = replace(MODELSCOPE, added_ids=1, added_id_dim=320)
"""DynamiCrafter and VideoCrafter: ModelScope's, told the frame rate."""
ANIMATEDIFF_V1 = TemporalSpec(
    resnet=False, block=False, motion=True, motion_middle=False, motion_frames=24, added_ids=0
)
"""AnimateDiff, motion modules of version 1.

Its authors ran the 2D residual blocks of that version with group norms over the clip. Here, as in diffusers, they stay
per frame, and the model is its parent's equal at birth.
"""
ANIMATEDIFF_V2 = replace(ANIMATEDIFF_V1, motion_middle=True, motion_frames=32)
"""AnimateDiff, motion modules of version 2; those of version 3 are as these, with motion_middle=False."""


class VideoUNet(UNet2DConditionModel):
    """A 2D UNet over the frames of clips, with temporal layers between its own.

    Made by `from_2d` from an image model or by `from_pretrained` from a folder that `save_pretrained` wrote.
    """

    _no_split_modules = [  # noqa: RUF012 -- diffusers reads a list
        *UNet2DConditionModel._no_split_modules,
        VideoCrossAttnUpBlock.__name__,
        SpatialBlock.__name__,
        VideoBlock.__name__,
        VideoResnet.__name__,
        VideoTransformer.__name__,
        VideoConvIn.__name__,
        VideoUpsample.__name__,
        Downsample2D.__name__,
        QueryLayer.__name__,
    ]
    _repeated_blocks = [VideoBlock.__name__]  # noqa: RUF012 -- diffusers reads a list

    query_transformer: QueryTransformer | None
    first_frame: FirstFrame | None

    def __init__(
        self,
        *args: Any,
        temporal: dict[str, Any] | None = None,
        image_context: dict[str, Any] | None = None,
        hierarchy: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        spec = TemporalSpec() if temporal is None else TemporalSpec.from_dict(temporal)
        check_blocks(self)
        check_input(self, spec)
        self._insert(spec)
        if image_context is not None:
            self.add_image_context(ImageContext.from_dict(image_context))
        if hierarchy is not None:
            self._encode_first_frames(Hierarchy.from_dict(hierarchy))

    @classmethod
    def from_2d(cls, unet: UNet2DConditionModel, spec: TemporalSpec, in_channels: int | None = None) -> VideoUNet:
        """A copy of `unet` with temporal layers, born equal to it; `unet` is left as it was.

        With `in_channels`, `conv_in` is widened by input channels whose weights are zero.
        Raises `SurgeryError` if the model cannot be inflated as asked.
        """
        check_unet(unet, spec, in_channels)
        video = copy.deepcopy(unet)
        video.__class__ = cls
        video.widen(in_channels or video.config.in_channels)
        video._embed_ids(spec)
        video._insert(spec)
        return video

    @property
    def spec(self) -> TemporalSpec:
        """Which temporal layers this model has."""
        return TemporalSpec.from_dict(dict(self.config.temporal))

    @property
    def image_context(self) -> ImageContext | None:
        """How this model attends to an image; None where it does not."""
        return None if self.query_transformer is None else self.query_transformer.context

    def add_image_context(self, context: ImageContext) -> None:
        """Let the model attend to an image beside the text, in place; born with no effect of the image.

        Raises `SurgeryError` where it does already, or where there is no cross-attention.
        """
        blocks = self._blocks_without_image("an image context")
        width = int(self.config.cross_attention_dim)
        self.set_query_transformer(QueryTransformer(context, width))
        for block in blocks:
            attend_to_image(block, self.clip, context.gate)

    @property
    def hierarchy(self) -> Hierarchy | None:
        """Which parts of first frames this model is told; None where it is told none."""
        return None if self.first_frame is None else self.first_frame.hierarchy

    def add_hierarchy(self, hierarchy: Hierarchy) -> None:
        """Let the model be told first frames, in place; born as it was where their tokens weigh nothing.

        `conv_in` is widened by input channels for the detail encoder, whose weights are zero. Raises `SurgeryError`
        where the model attends to an image already, or where there is no cross-attention.
        """
        self._encode_first_frames(hierarchy)
        if hierarchy.detail_encoder:
            self.widen(self.conv_in.in_channels + hierarchy.channels)

    def _encode_first_frames(self, hierarchy: Hierarchy) -> None:
        blocks = self._blocks_without_image("a hierarchy of first frames")
        width, hidden = int(self.config.cross_attention_dim), self.time_embedding.linear_1.out_features
        self.first_frame = like(FirstFrame(hierarchy, width, hidden), self.conv_in)
        for block in blocks:
            weigh_image(block, self.clip)
        register(self, hierarchy=hierarchy.to_dict())

    def _blocks_without_image(self, wanted: str) -> list[SpatialBlock]:
        """The blocks with cross-attention; SurgeryError where there are none, or they attend to an image already."""
        blocks = [block for _, block in cross_attentions(self)]
        if self.query_transformer is not None or self.first_frame is not None or not blocks:
            reason = "attends to an image already" if blocks else "has no cross-attention"
            raise SurgeryError(f"this UNet {reason}: {wanted} cannot be added")
        return blocks

    def set_query_transformer(self, query_transformer: QueryTransformer) -> None:
        """Put a query transformer in its place, for instance one with more groups of queries; stores its settings."""
        self.query_transformer = like(query_transformer, self.conv_in)
        register(self, image_context=query_transformer.context.to_dict())

    def set_other_lengths(self, policy: OtherLengths) -> None:
        """Choose what becomes of clips of another length than the query transformer was trained at, and store it."""
        if self.query_transformer is None:
            raise SurgeryError("this UNet attends to no image: it has no query transformer")
        self.query_transformer.context = replace(self.query_transformer.context, other_lengths=policy)
        register(self, image_context=self.query_transformer.context.to_dict())

    def image_tokens_of(self, features: Tensor, frames: int) -> Tensor:
        """The tokens (B,F,T,D), or shared by all frames (B,T,D), of image features (B,P,E): they are the same in every
        step of sampling. Raises `InflateError` where the model attends to no image."""
        if self.query_transformer is None:
            raise InflateError("this UNet attends to no image: leave image features out, or add an image context")
        tokens: Tensor = self.query_transformer(features, frames)
        return tokens

    def image_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that make and read image tokens, by name."""
        places = [f"{name}.image." for name, module in self.named_modules() if isinstance(module, DualAttention)]
        beginnings = ("query_transformer.", "first_frame.", *places)
        return {name: value for name, value in self.named_parameters() if name.startswith(beginnings)}

    def temporal_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the temporal layers, by name."""
        return {name: value for name, value in self.named_parameters() if ".temporal." in name}

    def created_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the 2D model lacks, by name: temporal ones, an image's and the embedding of added ids."""
        ids = self.class_embedding.named_parameters(prefix="class_embedding") if self.spec.added_ids else ()
        return {**dict(ids), **self.temporal_parameters(), **self.image_parameters()}

    def inert_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that get no gradient from a context of one token: queries, keys and norm of cross-attention.

        Freeze them when every context has one token: that makes the model skip them, and distributed training is not
        left waiting for their gradients.
        """
        parts = (".attn2.to_q.", ".attn2.to_k.", ".norm2.")
        # A transformer over frames has a second self-attention of that name, which learns.
        blocks = {n: value for n, value in self.named_parameters() if "transformer_blocks" in n.split(".temporal.")[0]}
        return {n: value for n, value in blocks.items() if any(part in n for part in parts)}

    def textless_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that get no gradient where no text is told: temporal blocks' attention to it, and its norm.

        Freeze them where texts never are: distributed training would be left waiting for their gradients.
        """
        parts = (".temporal.attn2.", ".temporal.norm2.")
        return {n: value for n, value in self.named_parameters() if any(part in n for part in parts)}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        added_time_ids: Tensor | None = None,
        image_only: Tensor | bool | None = None,
        return_dict: bool = True,
        image_features: Tensor | None = None,
        image_tokens: Tensor | None = None,
        image_latents: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        left_out: Collection[Part] = (),
        image_share: float = 1.0,
        **kwargs: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict for clips (B,F,C,h,w) at `timestep` (scalar, (B,) or (B,F)).

        Context is (B,L,D) or, per frame, (B,F,L,D); `added_time_ids` (B, added ids); `image_only` bool (B,F) marks
        frames that no temporal layer may change, True leaves those layers out (`all_images`). A model with an image
        context takes the image's features (B,P,E) or, made of them by `image_tokens_of`, its tokens (B,T,D) or
        (B,F,T,D); without either it attends to the text alone. A model with a hierarchy takes the latents (B,C,h,w) and
        CLIP's embeddings (B,1,E) of first frames, of which parts may be left out; text may then have no tokens.
        `image_share`, 0 to 1, is what their tokens weigh beside the text's, whose attention they share: they may so
        fade in while they learn; with 0 they are left out.
        Other arguments of the 2D UNet pass as they are, their batch being `B*F`. Raises `InflateError` where shapes
        disagree. Source: Stable Video Diffusion (2023), appendix D; DynamiCrafter (2023), section 3.2; I2VGen-XL
        (2023), section 3.2.
        """
        if sample.ndim != 5:
            raise InflateError(f"sample must be (batch, frames, channels, height, width), got {tuple(sample.shape)}")
        clips, bias = sample.shape[:2], _bias_of(image_share, sample)
        if self.first_frame is not None or image_latents is not None or image_embeddings is not None:
            detail, tokens = self._told(image_latents, image_embeddings, clips, left_out)
            sample = sample if detail is None else torch.cat([sample, detail.to(sample.dtype)], dim=2)
            image_tokens = tokens if image_share else None
        context, added = self._context(encoder_hidden_states, image_features, image_tokens, clips)
        output = self._folded(
            ClipState(clips[1], _frame_mask(image_only, clips), image_only is True, added, bias if added else None),
            sample.flatten(0, 1),  # (B*F, C, h, w)
            _per_frame(timestep, clips, sample.device),  # (B*F,)
            context,  # (B*F, L + T, D)
            class_labels=self._labels(added_time_ids, clips, sample.dtype),
            **kwargs,
        )
        output = output.unflatten(0, clips)  # (B, F, C', h, w)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)

    def all_images(self, sample: Tensor) -> Tensor | bool:
        """What tells `forward` that all frames of clips (B,F,C,h,w) are images: True, which leaves temporal layers out.

        Where those learn it is marks (B,F), by which they have a gradient, of zeros: several processes wait for it.
        """
        learns = torch.is_grad_enabled() and any(one.requires_grad for one in self.temporal_parameters().values())
        return sample.new_ones(sample.shape[:2], dtype=torch.bool) if learns else True

    @torch.no_grad()
    def embedded_ids(self, ids: Tensor) -> Tensor:
        """What added ids (B, added ids) of clips add to the time embedding, (B, D), of a model that is told some."""
        added: Tensor = self.class_embedding(self._labels(ids, torch.Size((len(ids), 1)), self.dtype))
        return added

    def _told(
        self,
        latents: Tensor | None,
        embeddings: Tensor | None,
        clips: torch.Size,
        left_out: Collection[Part],
    ) -> Told:
        """What the model is told of first frames, of as many clips."""
        if self.first_frame is None:
            raise InflateError("this UNet is told no first frames: leave out image_latents and image_embeddings")
        for name, given in (("image_latents", latents), ("image_embeddings", embeddings)):
            if given is not None and len(given) != clips[0]:
                raise InflateError(f"{name} must be of {clips[0]} clips, got {tuple(given.shape)}")
        told: Told = self.first_frame(latents, embeddings, clips[1], left_out)
        return told

    def _context(
        self, text: Tensor, features: Tensor | None, tokens: Tensor | None, clips: torch.Size
    ) -> tuple[Tensor, int]:
        """The context of all frames (B*F,L+T,D), text before the image's tokens, and how many of these there are."""
        context = _frame_context(text, clips, "encoder_hidden_states")  # (B*F, L, D)
        if features is not None and tokens is not None:
            raise InflateError("image_features and image_tokens are both given: the tokens are made of the features")
        if features is not None:
            tokens = self.image_tokens_of(features, clips[1])
        if tokens is None and context.shape[1] == 0:
            raise InflateError("neither the text nor an image has a token: the UNet has nothing to attend to")
        if tokens is None:
            return context, 0
        if self.query_transformer is None and self.first_frame is None:
            raise InflateError("this UNet attends to no image: leave image_tokens out")
        image = _frame_context(tokens, clips, "image_tokens")  # (B*F, T, D)
        return torch.cat([context, image.to(context.dtype)], dim=1), image.shape[1]

    def _folded(self, state: ClipState, *args: Any, class_labels: Tensor | None, **kwargs: Any) -> Tensor:
        """The 2D forward pass over the frames of all clips, while the temporal layers see `state`."""
        if class_labels is not None:
            kwargs["class_labels"] = class_labels
        with self.clip.during(state):
            output: Tensor = super().forward(*args, return_dict=False, **kwargs)[0]  # (B*F, C', h, w)
        return output

    def _labels(self, ids: Tensor | None, clips: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Sinusoids of the added ids, repeated for each frame: (B*F, ids * width)."""
        spec = self.spec
        if (ids is None) != (spec.added_ids == 0):
            raise InflateError(f"this model takes {spec.added_ids} added ids per clip: pass added_time_ids accordingly")
        if ids is None:
            return None
        if ids.shape != (clips[0], spec.added_ids):
            raise InflateError(f"added_time_ids must be {(clips[0], spec.added_ids)}, got {tuple(ids.shape)}")
        waves = get_timestep_embedding(
            ids.flatten(), spec.added_id_dim, flip_sin_to_cos=True, downscale_freq_shift=0
        )  # (B*ids, width)
        return waves.reshape(clips[0], -1).to(dtype).repeat_interleave(clips[1], 0)  # (B*F, ids*width)

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Any:
        """Load a folder that `save_pretrained` wrote; raises `CheckpointError` listing tensors missing or left over."""
        return load_strictly(super().from_pretrained, path, kwargs)

    @property
    def attn_processors(self) -> dict[str, Any]:
        """What computes each attention of the 2D model, by name.

        Loaders of image adapters take every one that is not called attn1 for cross-attention, and count them: temporal
        layers, which have a second self-attention of that name, are not listed.
        """
        return {name: each for name, each in super().attn_processors.items() if ".temporal." not in name}

    def set_attn_processor(self, processor: Any) -> None:
        """Set what computes every attention, or by a dict, those of the 2D model; `InflateError` for other names."""
        if not isinstance(processor, dict):
            super().set_attn_processor(processor)
            return
        wrong = processor.keys() ^ self.attn_processors.keys()
        if wrong:
            raise InflateError(f"processors must be given for each attention of the 2D model: see {min(wrong)}")
        for name, each in processor.items():
            self.get_submodule(name.removesuffix(".processor")).set_processor(each)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return recomputes(self)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = None) -> None:
        # diffusers' own switches stay off: its blocks leave the first middle resnet and all projections stored.
        set_recompute(self, gradient_checkpointing_func if enable else None)

    def _insert(self, spec: TemporalSpec) -> None:
        """Give every layer of the 2D UNet its temporal child, and store the spec in the config."""
        self.clip = Clip()
        self.query_transformer = self.first_frame = None
        if spec.input:
            inflate_conv_in(self.conv_in, self.clip, after_input(self))
        for block in self._blocks():
            if isinstance(block, EPSILON_BLOCKS):
                set_epsilon(block, spec.cross_attention_resnet_eps)
            motion = motion_sites(block, spec)
            for module in list(block.modules()):
                self._inflate(module, spec, module in motion)
            inflate_up_block(block)
        convolutions_within(self.conv_out)
        self._spare_rows()
        register(self, temporal=spec.to_dict())

    def _inflate(self, module: nn.Module, spec: TemporalSpec, motion: bool) -> None:
        if isinstance(module, ResnetBlock2D):
            inflate_resnet(module, self.clip, after_resnet(module, spec, motion))
        elif isinstance(module, Transformer2DModel):
            depth = len(module.transformer_blocks)
            blocks = (depth if depth <= spec.each_up_to else 1) if spec.block else 0
            inflate_transformer(module, self.clip, after_transformer(module, spec, motion), blocks)
        elif isinstance(module, Upsample2D):
            inflate_upsample(module, self.clip)
        elif isinstance(module, Downsample2D):
            convolutions_within(module)

    def _blocks(self) -> list[nn.Module]:
        middle = [] if self.mid_block is None else [self.mid_block]
        return [*self.down_blocks, *middle, *self.up_blocks]

    def add_ids(self, count: int, width: int) -> None:
        """Let the model be told numbers of each clip, in place; born without effect.

        Raises `SurgeryError` where it is told some already.
        """
        if self.class_embedding is not None or self.config.projection_class_embeddings_input_dim:
            raise SurgeryError("this UNet embeds ids, labels or sizes (SDXL) already: it cannot be told of others")
        spec = replace(self.spec, added_ids=count, added_id_dim=width)
        self._embed_ids(spec)
        register(self, temporal=spec.to_dict())

    def widen(self, in_channels: int) -> None:
        """Let `conv_in` take more channels; the new ones have zero weights."""
        old = self.conv_in
        if in_channels == old.in_channels:
            return
        extra = old.weight.new_zeros(old.out_channels, in_channels - old.in_channels, *old.kernel_size)
        old.weight = nn.Parameter(torch.cat([old.weight.detach(), extra], 1), old.weight.requires_grad)
        old.in_channels = in_channels
        register(self, in_channels=in_channels)

    def pad_rows(self, rows: int = 2) -> None:
        """Let every downsampling be given so many rows of zeros above and below, in place, and upsampling take all but
        one of each off again: with 2, as in the refinement of I2VGen-XL, latents of 720 pixels' height divide evenly.

        Stable Diffusion has 1. Heights that do not divide are rounded up on the way down and cut on the way up.
        """
        register(self, downsample_padding=[rows, 1])
        for module in self.modules():
            if isinstance(module, Downsample2D):
                module.padding = module.conv.padding = (rows, 1)
        self._spare_rows()

    def _spare_rows(self) -> None:
        """Let upsampling take off the rows that downsampling was given."""
        padding = self.config.downsample_padding
        for module in self.modules():
            if isinstance(module, VideoUpsample):
                module.spare_rows = 0 if isinstance(padding, int) else padding[0] - 1

    def set_freeu(self, layers: Sequence[FreeU]) -> None:
        """Let FreeU act in the first residual blocks of the way up, one for each of its factors; with none, nowhere.

        It is for sampling, and is not stored with the model.
        """
        blocks = [block for each in self.up_blocks for block in each.resnets]
        for place, block in enumerate(blocks):
            block.free = FreeU(*layers[place]) if place < len(layers) else None

    def _embed_ids(self, spec: TemporalSpec) -> None:
        """Add the embedding of the added ids, whose last layer is zero, as diffusers' class embedding."""
        if spec.added_ids == 0:
            return
        width = spec.added_ids * spec.added_id_dim
        embedding = TimestepEmbedding(width, self.time_embedding.linear_1.out_features)
        with torch.no_grad():
            embedding.linear_2.weight.zero_()
            embedding.linear_2.bias.zero_()
        self.class_embedding = embedding.to(self.device, self.dtype).train(self.training)
        register(self, class_embed_type="projection", projection_class_embeddings_input_dim=width)


def temporal_resnet(resnet: ResnetBlock2D, eps: float | None = None, reverse: bool = False) -> TemporalResnet:
    """A temporal residual block that fits behind a 2D one: its channels, groups, time embedding and epsilon."""
    time_channels = None if resnet.time_emb_proj is None else resnet.time_emb_proj.in_features
    channels, norm = resnet.conv2.out_channels, resnet.norm2
    return TemporalResnet(channels, norm.num_groups, norm.eps if eps is None else eps, time_channels, reverse)


def set_epsilon(block: nn.Module, eps: float) -> None:
    """Set the epsilon of the group norms of a block's residual blocks."""
    for module in block.modules():
        if isinstance(module, ResnetBlock2D):
            module.norm1.eps = module.norm2.eps = eps


def motion_sites(block: nn.Module, spec: TemporalSpec) -> set[nn.Module]:
    """The layers of a block that a motion module follows; a middle block ends in a residual block of no pair."""
    middle = isinstance(block, MIDDLE_BLOCKS)
    if not spec.motion or (middle and not spec.motion_middle):
        return set()
    layers = getattr(block, "attentions", None) or ()
    transformers = {layer for layer in layers if isinstance(layer, Transformer2DModel)}
    resnets: Any = block.resnets
    return transformers or set(resnets[:-1] if middle else resnets)


def after_resnet(resnet: ResnetBlock2D, spec: TemporalSpec, motion: bool) -> nn.Module | None:
    """The temporal layer that follows a 2D residual block, if any."""
    channels, groups = resnet.conv2.out_channels, resnet.norm2.num_groups
    if motion:
        return motion_module(channels, groups, spec)
    if spec.conv:
        return TemporalConvs(channels, groups, spec.dropout)
    return temporal_resnet(resnet) if spec.resnet else None


def after_transformer(transformer: Transformer2DModel, spec: TemporalSpec, motion: bool) -> nn.Module | None:
    """The temporal layer that follows a 2D transformer or is shared by its video blocks, if any."""
    channels, groups = transformer.in_channels, transformer.norm.num_groups
    if motion:
        return motion_module(channels, groups, spec)
    if spec.transformer:
        return FrameTransformer(channels, *_heads(transformer), groups)
    return TransformerTime(transformer.inner_dim) if spec.block else None


def after_input(unet: UNet2DConditionModel) -> FrameTransformer:
    """The transformer over frames that follows the first convolution."""
    _, width = _heads(next(module for module in unet.modules() if isinstance(module, Transformer2DModel)))
    return FrameTransformer(unet.conv_in.out_channels, INPUT_HEADS, width, unet.config.norm_num_groups)


def motion_module(channels: int, groups: int, spec: TemporalSpec) -> FrameTransformer:
    """The motion module of a layer of that many channels."""
    heads = spec.motion_heads
    if channels % heads:
        raise SurgeryError(f"motion_heads={heads} does not divide the {channels} channels of a layer")
    return FrameTransformer(channels, heads, channels // heads, groups, spec.motion_norm, spec.motion_frames)


def _heads(transformer: Transformer2DModel) -> tuple[int, int]:
    """Number and width of a 2D transformer's heads."""
    heads = transformer.config.num_attention_heads
    return heads, transformer.inner_dim // heads


def check_unet(unet: nn.Module, spec: TemporalSpec, in_channels: int | None) -> None:
    """Raise `SurgeryError` if `unet` cannot be inflated by `spec`; nothing is changed."""
    if isinstance(unet, VideoUNet):
        raise SurgeryError("this UNet is inflated already: inflate the 2D model, or load this one by from_pretrained")
    if not isinstance(unet, UNet2DConditionModel):
        raise SurgeryError(f"cannot inflate a {type(unet).__name__}: only diffusers' UNet2DConditionModel is supported")
    check_no_adapters(unet)
    check_blocks(unet)
    check_input(unet, spec)
    if spec.added_ids and (unet.class_embedding is not None or unet.config.projection_class_embeddings_input_dim):
        raise SurgeryError("the 2D UNet embeds labels or sizes (SDXL) itself: inflate it with added_ids=0")
    if spec.added_ids < 0 or (spec.added_ids and (spec.added_id_dim < 2 or spec.added_id_dim % 2)):
        raise SurgeryError(f"added_ids={spec.added_ids} of added_id_dim={spec.added_id_dim}: need an even width")
    if in_channels is not None and in_channels < unet.config.in_channels:
        raise SurgeryError(f"in_channels={in_channels} would cut the UNet's {unet.config.in_channels}: give more")


def check_no_adapters(model: nn.Module) -> None:
    """Raise `SurgeryError` if adapters are loaded: their layers would be inflated as if they were the model's."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise SurgeryError("adapters are loaded on the 2D model: unload or merge them first, load them afterwards")


def check_blocks(unet: UNet2DConditionModel) -> None:
    """Raise `SurgeryError` naming the blocks of a UNet that inflation does not know."""
    middle = [] if unet.mid_block is None else [unet.mid_block]
    blocks = [*unet.down_blocks, *middle, *unet.up_blocks]
    strange = sorted({type(block).__name__ for block in blocks if type(block) not in BLOCKS})
    parts = [part for block in blocks for part in getattr(block, "attentions", None) or [] if part is not None]
    strange += sorted({type(part).__name__ for part in parts if type(part) is not Transformer2DModel})
    inner = [block for part in parts for block in getattr(part, "transformer_blocks", ())]
    strange += sorted({type(block).__name__ for block in inner if type(block) is not BasicTransformerBlock})
    if strange:
        known = ", ".join(block.__name__ for block in BLOCKS)
        raise SurgeryError(f"cannot inflate layers of type {', '.join(strange)}; known are {known}")


def check_input(unet: UNet2DConditionModel, spec: TemporalSpec) -> None:
    """Raise `SurgeryError` where no 2D transformer tells how wide the heads after the input are to be."""
    if spec.input and not any(isinstance(module, Transformer2DModel) for module in unet.modules()):
        raise SurgeryError("input=true takes the width of its heads from the first 2D transformer, and there is none")


def register(model: Any, **settings: Any) -> None:
    """Store settings in a model's config, also against diffusers' list of settings that were left at their default."""
    defaults = [name for name in model.config.get("_use_default_values", []) if name not in settings]
    model.register_to_config(**settings, _use_default_values=defaults)


def load_strictly(load: Any, path: str | Path, settings: dict[str, Any], others: tuple[str, ...] = ()) -> Any:
    """Call a `from_pretrained`; raises `CheckpointError` if the folder and the model do not hold the same tensors.

    Tensors whose names begin with one of `others` belong to another model of the same folder.
    """
    wants_info = settings.pop("output_loading_info", False)
    try:
        with without_bars():
            model, info = load(path, output_loading_info=True, **settings)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    missing = sorted(info["missing_keys"])
    surplus = sorted(name for name in info["unexpected_keys"] if not name.startswith(others))
    if missing or surplus:
        found = [f"{kind}: {', '.join(keys)}" for kind, keys in (("missing", missing), ("surplus", surplus)) if keys]
        raise CheckpointError(f"{path} does not hold this model's tensors; {'; '.join(found)}")
    return (model, info) if wants_info else model


@contextmanager
def without_bars() -> Iterator[None]:
    """Without transformers' bars over the tensors that it reads and writes, which are full before one can look."""
    before = set_tqdm_hook(lambda _, iterated, __: EmptyTqdm(*iterated))
    try:
        yield
    finally:
        set_tqdm_hook(before)


def keep_signature(kind: type, parent: type, *added: str) -> None:
    """Give `kind.__init__` its parent's signature and the `added` settings: diffusers drops what it cannot see."""
    own = inspect.signature(parent.__dict__["__init__"])
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in added]
    kind.__dict__["__init__"].__signature__ = own.replace(parameters=[*own.parameters.values(), *more])


keep_signature(VideoUNet, UNet2DConditionModel, "temporal", "image_context", "hierarchy")


def _per_frame(timestep: Tensor | float | int, clips: torch.Size, device: torch.device) -> Tensor:
    """Time steps of all frames (B*F,) from a scalar, (B,) or (B,F)."""
    steps = torch.as_tensor(timestep, device=device)
    steps = steps.unsqueeze(-1) if steps.ndim == 1 else steps  # (B, 1)
    if steps.ndim not in (0, 2) or any(size not in (1, full) for size, full in zip(steps.shape, clips, strict=False)):
        raise InflateError(f"timestep must be a scalar, ({clips[0]},) or {tuple(clips)}, got {tuple(steps.shape)}")
    return steps.expand(clips).flatten()  # (B*F,)


def _frame_context(context: Tensor, clips: torch.Size, name: str) -> Tensor:
    """The context of all frames (B*F,L,D) from (B,L,D) or (B,F,L,D); `name` is the argument's."""
    if context.ndim == 4 and context.shape[:2] == clips:
        return context.flatten(0, 1)  # (B*F, L, D)
    if context.ndim == 3 and context.shape[0] == clips[0]:
        return context.repeat_interleave(clips[1], 0)  # (B*F, L, D)
    raise InflateError(
        f"{name} must be ({clips[0]}, tokens, width) or {(*clips,)} + (tokens, width), got {tuple(context.shape)}"
    )


def _bias_of(share: float, like: Tensor) -> Tensor | None:
    """Logarithm () of what tokens of an image weigh; None = as much as those of the text. InflateError for no share."""
    if not 0 <= share <= 1:
        raise InflateError(f"image_share is {share}: it must be 0 to 1")
    return None if share == 1 else torch.log(like.new_tensor(share))


def _frame_mask(image_only: Tensor | bool | None, clips: torch.Size) -> Tensor | None:
    """The image mask as bool (B,F)."""
    if not isinstance(image_only, Tensor):
        return None
    if image_only.shape != clips:
        raise InflateError(f"image_only must be {tuple(clips)}, got {tuple(image_only.shape)}")
    return image_only.bool()
