"""Key map of DynamiCrafter: ours <-> the original's checkpoints, whose networks stand side by side in one file.

Our names are the hub: the map goes from our keys to the other naming and is inverted for loading. Our UNet holds the
query transformer, which stands beside it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from inflate.errors import CheckpointError
from inflate.layers.image_context import ImageContext
from inflate.models.exchange import Names, inverse
from inflate.models.original_names import UNetLayout, count_of, size_of, substituted
from inflate.models.original_video_names import LVDM

UNET, IMAGE_PROJ, FIRST_STAGE = "model.diffusion_model.", "image_proj_model.", "first_stage_model."
TEXT_ENCODER, IMAGE_ENCODER = "cond_stage_model.model.", "embedder.model.visual."
QUERY_TRANSFORMER = "query_transformer."
TWIN = "embedder.model."
IDLE = (
    *(
        f"{TWIN}{name}"
        for name in ("token_embedding.", "positional_embedding", "text_projection", "logit_scale", "ln_final.")
    ),
    "model_ema.",
    "logvar",
)
"""What the files keep and nothing uses: the rest of the text encoder that the image encoder was made with, and what
training left: averages beside the weights, and a table."""
PARTS = (UNET, IMAGE_PROJ, FIRST_STAGE, TEXT_ENCODER, IMAGE_ENCODER, *IDLE)
GATE = ".attn2.alpha"
"""The gate of a block's image tokens, of the model of 256 pixels alone."""
RELATIVE = ".relative_position_k."
"""A table of VideoCrafter's first version."""
QUERIES = 16
"""Tokens of a frame, in every published model."""
DEEPSPEED, STRIDE, FPS = "_forward_module.", ".framestride_embed.", ".fps_embedding."
"""What begins the names in DeepSpeed's checkpoints; the embedding of the frame stride of the model of 256 pixels, and
what the others call theirs."""
_QUERY = (
    (r"\.attention\.norm_image\.", ".0.norm1."),
    (r"\.attention\.norm_latents\.", ".0.norm2."),
    (r"\.attention\.", ".0."),
    (r"\.feed_forward\.norm\.", ".1.0."),
    (r"\.feed_forward\.linear_1\.", ".1.1."),
    (r"\.feed_forward\.linear_2\.", ".1.3."),
)
Value = TypeVar("Value")


def unet_names(keys: Iterable[str], layout: UNetLayout) -> Names:
    """Maps our UNet's keys, its query transformer's included, to whole names of the file."""
    every = list(keys)
    own = LVDM.names((key for key in every if not key.startswith(QUERY_TRANSFORMER)), layout)
    queries = query_names(key.removeprefix(QUERY_TRANSFORMER) for key in every if key not in own)
    return {
        **{key: f"{UNET}{name}" for key, name in own.items()},
        **{f"{QUERY_TRANSFORMER}{key}": f"{IMAGE_PROJ}{name}" for key, name in queries.items()},
    }


def query_names(keys: Iterable[str]) -> Names:
    """Maps the query transformer's keys to the original ones, both without the names of their places."""
    return {key: substituted(key, _QUERY) for key in keys}


def plain(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """A checkpoint by the names of today's files: without DeepSpeed's prefix, the stride's embedding named as fps's.

    CheckpointError where two tensors then share a name.
    """
    names = {key: key.removeprefix(DEEPSPEED).replace(STRIDE, FPS) for key in tensors}
    return {name: tensors[key] for name, key in inverse(names).items()}


def part(tensors: Mapping[str, Value], prefix: str) -> dict[str, Value]:
    """What begins with a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def attends_to_image(tensors: Iterable[str]) -> bool:
    """Whether a file's UNet attends to an image, as that of text-to-video does not."""
    return any(key.startswith(IMAGE_PROJ) or key.endswith(".to_k_ip.weight") for key in tensors)


def image_context(tensors: Mapping[str, Tensor], head_width: int) -> ImageContext | None:
    """How a UNet attends to an image by the tensors of a file; None where it does not, CheckpointError if untold.

    Heads of the query transformer are `head_width` channels wide, which no tensor tells.
    """
    if not attends_to_image(tensors):
        return None
    queries, width = (size_of(tensors, f"{IMAGE_PROJ}latents", dimension) for dimension in (1, 2))
    if queries % QUERIES:
        raise CheckpointError(f"{IMAGE_PROJ}latents holds {queries} queries, which are no groups of {QUERIES}")
    return ImageContext(
        embedding=size_of(tensors, f"{IMAGE_PROJ}proj_in.weight", 1),
        width=width,
        depth=count_of(tensors, rf"{IMAGE_PROJ}layers\.(\d+)\."),
        heads=size_of(tensors, f"{IMAGE_PROJ}layers.0.0.to_q.weight", 0) // head_width,
        head_width=head_width,
        queries=QUERIES,
        frames=queries // QUERIES,
        gate=any(key.endswith(GATE) for key in tensors),
    )
