"""What the formats of all families share: tensors read, renamed and handed over, each of them accounted for.

`convert` applies a map of names: a missing, a surplus or a misshapen tensor is an error that lists the keys, and then
nothing has been changed. Models are built without memory and take the tensors over.
"""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from inflate.errors import CheckpointError
from inflate.files import new_file
from inflate.models.folders import HALF_WEIGHTS_NAME, SAFETENSORS, plain, read_json
from inflate.models.unet import TemporalSpec, VideoUNet

HEADER = "inflate"
"""What a file of ours has in its header: an object in JSON, of what no tensor tells."""
_STATES = ("state_dict", "module")
"""Where trainers keep the weights in what they pickle: Lightning and DeepSpeed."""
_NO_TENSORS = (pickle.UnpicklingError, struct.error, LookupError, ValueError, TypeError, AttributeError)
"""What reading a pickle raises that is no pickle of tensors."""
Names = dict[str, str]
Read = Callable[[Path], dict[str, Tensor]]
"""How the tensors of a file are read: `read_tensors`, `read_saved`, or `read_headers` where values do not matter."""


def inverse(names: Names) -> Names:
    """The map back; CheckpointError where two keys meet in one name."""
    back = {target: source for source, target in names.items()}
    if len(back) != len(names):
        twice = [source for source, target in names.items() if back[target] != source]
        raise CheckpointError(f"these keys share a name with another: {listing(twice)}")
    return back


def convert(
    tensors: Mapping[str, Tensor], names: Names, shapes: Mapping[str, torch.Size], origin: str
) -> dict[str, Tensor]:
    """Renames every tensor by `names` and fits those of another shape as `fit` does, without copying.

    `shapes` are those of the target model and `origin` names the source in messages. Raises CheckpointError, listing
    the keys, where a tensor is missing, left over or of another shape.
    """
    sources = inverse(names)
    missing = [sources.get(target, target) for target in shapes if sources.get(target) not in tensors]
    surplus = [key for key in tensors if names.get(key) not in shapes]
    if missing or surplus:
        raise CheckpointError(f"{origin} does not fit the model: {_difference(missing, surplus)}; nothing was loaded")
    fitted = {target: fit(tensors[sources[target]], shape) for target, shape in shapes.items()}
    wrong = [
        f"{sources[target]} {tuple(tensors[sources[target]].shape)} instead of {tuple(shapes[target])}"
        for target, tensor in fitted.items()
        if tensor is None
    ]
    if wrong:
        raise CheckpointError(f"{origin} has tensors of another shape: {listing(wrong)}; nothing was loaded")
    return {target: tensor for target, tensor in fitted.items() if tensor is not None}


def listing(keys: list[str], limit: int = 12) -> str:
    """The keys in a line, the rest of a long list as a count."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def _difference(missing: list[str], surplus: list[str]) -> str:
    parts = [f"{len(missing)} missing ({listing(missing)})"] if missing else []
    return "; ".join(parts + ([f"{len(surplus)} left over ({listing(surplus)})"] if surplus else []))


def fit(tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """A tensor in a shape that differs at most as a pointwise convolution from a linear layer, or as one number in a
    row from the number alone; None for others."""
    if tensor.shape == shape:
        return tensor
    longer, shorter = (tensor.shape, shape) if tensor.ndim > len(shape) else (shape, tensor.shape)
    endings = {0: ((1,),), 2: ((1,), (1, 1))}.get(len(shorter), ())
    return tensor.reshape(shape) if longer[len(shorter) :] in endings and longer[: len(shorter)] == shorter else None


def weight_files(folder: Path, index_name: str, *names: str) -> list[Path]:
    """The files of a model's weights: those that the index lists, or the first there is; CheckpointError for none."""
    index = folder / index_name
    if index.is_file():
        return [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise CheckpointError(f"{folder} holds no weights: {names[0]} is missing")
    return files[:1]


def read_saved(file: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file or a pickled state dict, as precise as saved.

    CheckpointError where it is missing, cut short, or pickles anything but tensors.
    """
    # A .safetensors file is mapped into memory: nothing of it is read before a value is asked for.
    try:
        return load_file(file) if file.suffix == SAFETENSORS else _unpickled(file)
    except _NO_TENSORS as error:
        raise CheckpointError(
            f"{file} cannot be read: it is damaged, or pickles more than tensors, which is never run; download it "
            f"again, or as a {SAFETENSORS} file"
        ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; download or copy it again") from error


def read_headers(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file as `read_saved` takes it, without memory (on the meta device)."""
    return {key: tensor.to("meta") for key, tensor in read_saved(file).items()}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a file as `read_saved` takes it, in float32."""
    return in_float32(read_saved(file))


def in_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as precise as models are loaded; those without memory stay as precise as saved."""
    return {key: tensor if tensor.is_meta else tensor.float() for key, tensor in tensors.items()}


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A .safetensors file whose names and header can be asked for; CheckpointError where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as found:
            yield found
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; download or copy it again") from error


def save_file_telling(tensors: dict[str, Tensor], file: Path, told: Mapping[str, Any]) -> None:
    """Writes a .safetensors file, atomic, with what no tensor tells in its header; OSError as the disk has it."""
    with new_file(file) as aside:
        save_file(tensors, aside, {HEADER: json.dumps(told)})


def told_by(file: Path) -> dict[str, Any]:
    """What the header of a file of ours tells; nothing of another's. CheckpointError where it cannot be read."""
    if file.suffix != SAFETENSORS:
        return {}
    with opened(file) as found:
        text = (found.metadata() or {}).get(HEADER, "{}")
    try:
        told: dict[str, Any] = dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file} has a damaged header: {error}; download or copy it again") from error
    return told


def read_weights(folder: Path, read: Read = read_tensors) -> dict[str, Tensor]:
    """Every tensor of a diffusers model folder; CheckpointError where a file is missing or cut short."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder, SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, HALF_WEIGHTS_NAME):
        tensors.update(read(file))
    return tensors


def _unpickled(file: Path) -> dict[str, Tensor]:
    # Mapped where its format allows, like a .safetensors file.
    read = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    held = next((read[name] for name in _STATES if name in read), read) if isinstance(read, dict) else read
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        names = f": {listing([str(name) for name in held])}" if isinstance(held, dict) else ""
        raise CheckpointError(f"{file} holds no state dict, which would be tensors by their names{names}")
    return held


def build_unet(config: Mapping[str, Any], spec: TemporalSpec) -> VideoUNet:
    """A VideoUNet without memory (on the meta device) from a 2D configuration."""
    width = spec.added_ids * spec.added_id_dim
    ids = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": width} if width else {}
    with torch.device("meta"):
        return VideoUNet.from_config({**config, **ids, "temporal": spec.to_dict()})


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of every tensor of a model."""
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def adopt(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a model without memory its tensors, without a copy."""
    model.load_state_dict(tensors, assign=True)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def with_defaults(kind: type[ConfigMixin], folder: Path) -> dict[str, Any]:
    """The configuration in a folder of a model of that class, with what the file leaves out."""
    read_json(folder / "config.json")
    with torch.device("meta"):
        return plain(kind.from_config(kind.load_config(folder)).config)


def detached(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model, which share its memory but not its gradients."""
    return {key: tensor.detach() for key, tensor in model.state_dict().items()}


BUILT_IN: dict[str, Any] = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_time_scale_shift": "default",
    "addition_embed_type": None,
    "encoder_hid_dim": None,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "time_embedding_type": "positional",
}
"""What every video UNet of diffusers has built in: a model that differs cannot be told to them."""


def differing(unet: VideoUNet, built_in: Mapping[str, Any]) -> list[str]:
    """The settings of a UNet that are not as a format has them built in, with their values."""
    return [f"unet {name} {unet.config[name]}" for name, value in built_in.items() if unet.config[name] != value]


def differing_spec(spec: TemporalSpec, built_in: TemporalSpec) -> list[str]:
    """The settings of a temporal specification that are not as a format has them built in, with their values."""
    own, theirs = spec.to_dict(), built_in.to_dict()
    different = [name for name in own if own[name] != theirs[name] and matters(name, spec, built_in)]
    return [f"temporal {name} {own[name]}" for name in different]


def matters(name: str, *specs: TemporalSpec) -> bool:
    """Whether the specs have the layers that a setting is about."""
    about = {"each_up_to": "block", "dropout": "conv", "added_id_dim": "added_ids"}
    layers = "motion" if name.startswith("motion_") else about.get(name)
    return layers is None or all(getattr(spec, layers) for spec in specs)


def transformers(unet: VideoUNet) -> list[Transformer2DModel]:
    """The 2D transformers of a UNet."""
    return [module for module in unet.modules() if isinstance(module, Transformer2DModel)]
