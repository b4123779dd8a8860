"""Temporal layers alone: what a video model has beyond its image model, kept beside that model's name and hash.

A folder of them holds `temporal.safetensors`, in half precision, and `inflate.json`. They go over the image model that
they were trained on or, where another is named, over another of the same shape, such as a fine-tuned one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from inflate.errors import CheckpointError
from inflate.models import exchange, folders
from inflate.models.unet import TemporalSpec, VideoUNet
from inflate.models.vae import VideoVAE
from inflate.models.weights import tensors_sha256

log = logging.getLogger(__name__)

BESIDE = ("attention_head_dim", "num_attention_heads", "norm_num_groups", "norm_eps")
"""Settings of an image model's UNet that its temporal layers share, and that no shape of a tensor tells."""
Networks = Mapping[str, nn.Module]
"""All networks of a family, by the names of their parts."""


def are_in(folder: Path) -> bool:
    """Whether a folder holds temporal layers alone."""
    return (folder / folders.TEMPORAL_FILE).is_file()


def refuse_others(place: Path) -> None:
    """CheckpointError unless a folder holds temporal layers alone, which an image model is named for."""
    if not are_in(place):
        folders.refuse_network(place)
        raise CheckpointError(
            f"{place} holds no temporal layers alone, which is what goes over an image model: make them of an export "
            "by inflate convert EXPORT OUT --to temporal-layers --image-model MODEL"
        )


def entry(file: Path, family: str, name: str) -> Any:
    """An entry of an export's settings file; CheckpointError where it is missing, or the file is another family's."""
    settings = folders.read_json(file)
    if settings.get("family") != family:
        drawing = (
            "`inflate sample` draws with svd, dynamicrafter and i2vgen_xl, `inflate generate` with video_ldm, "
            "`inflate refine` with i2vgen_xl_refiner"
        )
        remedy = f"give an export of {family} ({drawing})"
        raise CheckpointError(f"{file} is of family {settings.get('family')}, not {family}; {remedy}")
    if name not in settings:
        raise CheckpointError(f"{file} is not whole: {name} is missing; export the model again")
    return settings[name]


def spec_of(file: Path) -> TemporalSpec:
    """Which temporal layers a settings file is of; CheckpointError where it does not tell."""
    settings = folders.read_json(file)
    told = settings.get("spec") or (settings.get("unet") or {}).get("temporal")
    if not isinstance(told, dict):
        raise CheckpointError(
            f"{file} does not tell which temporal layers it is of (spec of text-to-video, unet.temporal of "
            "image-to-video); copy or export them again"
        )
    return TemporalSpec.from_dict(told)


def image_model_of(file: Path, family: str) -> str:
    """The image model that a settings file names; CheckpointError as of `entry`, and where it is not there."""
    name = str(entry(file, family, "image_model"))
    try:
        folders.check_place(name)
    except CheckpointError as error:
        raise CheckpointError(
            f"the image_model of {file} is not there: {error}; mend that entry, or name another by --image-model"
        ) from error
    return name


def source(file: Path, name: str, given: str | Path | None) -> Any:
    """What an image model is read with beside its path: what is given or, where nothing is, a settings file tells."""
    return folders.read_json(file).get(name) if given is None else given


def sources(prediction: str | None, **places: str | Path | None) -> dict[str, str]:
    """The entries of a settings file that `source` reads, of those that are given."""
    given = {name: lasting(place) for name, place in places.items() if place is not None}
    return given if prediction is None else {**given, "prediction": prediction}


def lasting(path: str | Path) -> str:
    """The name of a model in any working directory: a path of this machine as a whole one."""
    place = Path(path).expanduser()
    return str(place.absolute()) if str(path) not in folders.SHIPPED and place.exists() else str(path)


def save(folder: Path, trained: Networks, born: Networks, image_model: str, settings: Mapping[str, Any]) -> None:
    """Writes the temporal layers of `trained`; `born` are the same networks, freshly inflated from `image_model`.

    CheckpointError, with nothing written, where the two differ in an image layer or in which layers are temporal, half
    precision cannot hold a tensor, or the folder holds other files.
    """
    changed = differing(trained, born)
    if changed:
        raise CheckpointError(
            f"{image_model} has other image layers ({len(changed)} tensors, such as {min(changed)}): temporal layers "
            "are kept alone over the image model that they were trained on; keep the whole export instead"
        )
    tensors = _halved(_own(trained))
    beside = {"beside": layers_beside(born["unet"])}
    told = {**settings, **beside, "image_model": lasting(image_model), "image_sha256": _image_sha256(born)}
    folders.write(folder, lambda aside: _write(aside, tensors, told))


def differing(trained: Networks, born: Networks) -> list[str]:
    """The image layers, to the bit, in which two models differ, and the temporal layers that only one of them has."""
    own, theirs = _own(trained), _own(born)
    before, after = _others(born, theirs), _others(trained, own)
    changed = [name for name in before.keys() | after.keys() if not _equal(before.get(name), after.get(name))]
    return [*changed, *(own.keys() ^ theirs.keys())]


def load(folder: Path, born: Networks, image_model: str | Path | None = None) -> None:
    """Gives freshly inflated networks the temporal layers of a folder; nothing is changed where they do not fit.

    CheckpointError, listing the tensors; also for other image layers than they were trained on, unless these are of an
    `image_model` that was asked for, which the log then says.
    """
    settings = folders.read_json(folder / folders.SETTINGS_FILE)
    is_other = settings.get("image_sha256") != _image_sha256(born)
    if is_other and image_model is None:
        raise CheckpointError(
            f"{folder} belongs over other weights than {settings.get('image_model')} holds now; restore those, or name "
            "the image model that it is to go over as image_model (--image-model)"
        )
    refuse_other_layers(settings.get("beside", {}), born["unet"], folder)
    adopt(born, read(folder), folder)
    if is_other:
        say_other(folder, image_model)


def say_other(origin: object, image_model: object) -> None:
    """Log that temporal layers were asked to go over another image model than they were trained on."""
    log.warning("%s: the temporal layers go over %s, which is another image model than their own", origin, image_model)


def layers_beside(unet: nn.Module) -> dict[str, Any]:
    """What temporal layers have from the image model beside the shapes of tensors: heads, groups of norms."""
    config: Any = unet.config
    found: dict[str, Any] = json.loads(json.dumps({name: config[name] for name in BESIDE}))  # tuples as a file has them
    return found


def refuse_other_layers(beside: Mapping[str, Any], unet: nn.Module, origin: object) -> None:
    """CheckpointError where an image model's layers differ in what no tensor's shape tells."""
    found = layers_beside(unet)
    wrong = [f"{name} {found[name]} instead of {value}" for name, value in beside.items() if found[name] != value]
    if wrong:
        raise CheckpointError(
            f"{origin} was trained beside other layers than this image model's: {', '.join(wrong)}; they would compute "
            "something else"
        )


def read(folder: Path, part: str = "") -> dict[str, Tensor]:
    """The tensors of a folder, or of one part; CheckpointError where they cannot be read."""
    tensors = exchange.read_tensors(folder / folders.TEMPORAL_FILE)
    return {name: value for name, value in tensors.items() if name.startswith(part)}


def adopt(born: Networks, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copies tensors into freshly inflated networks; CheckpointError, listing them, where one is missing or left."""
    wanted = _own(born)
    differing = {(name, value.shape) for name, value in tensors.items()} ^ {(n, p.shape) for n, p in wanted.items()}
    if differing:
        names = exchange.listing(sorted({name for name, _ in differing}))
        raise CheckpointError(f"{folder / folders.TEMPORAL_FILE} does not hold this model's temporal layers: {names}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def _halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    halves = {name: value.detach().half().cpu().contiguous() for name, value in tensors.items()}
    wrong = [name for name, value in halves.items() if not value.isfinite().all()]
    if wrong:
        raise CheckpointError(
            f"half precision cannot hold {exchange.listing(wrong)}: temporal layers are kept alone in it; keep the "
            "whole export instead"
        )
    return halves


def _own(networks: Networks) -> dict[str, Tensor]:
    """The parameters that inflation created or widened, by part and name."""
    return {f"{part}.{name}": value for part, network in networks.items() for name, value in _made(network).items()}


def _made(network: nn.Module) -> dict[str, nn.Parameter]:
    if isinstance(network, VideoVAE):
        return network.temporal_parameters()
    if not isinstance(network, VideoUNet):
        return {}
    same = network.config.in_channels == network.config.out_channels
    widened = {} if same else {f"conv_in.{name}": value for name, value in network.conv_in.named_parameters()}
    return {**widened, **network.created_parameters()}


def _others(networks: Networks, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {
        f"{part}.{name}": value for part, network in networks.items() for name, value in network.state_dict().items()
    }
    return {name: value for name, value in tensors.items() if name not in own}


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one.cpu(), other.cpu())


def _image_sha256(networks: Networks) -> str:
    tensors = _others(networks, _own(networks))
    return tensors_sha256((name, tensors[name]) for name in sorted(tensors))


def _write(folder: Path, tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> None:
    save_file(tensors, folder / folders.TEMPORAL_FILE)
    (folder / folders.SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
