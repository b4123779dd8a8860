"""I2VGen-XL as its authors' code bases keep it: a UNet's file, beside files of Stable Diffusion 2.1 and of OpenCLIP.

What no tensor of a UNet tells, its noise schedule and its clips, is that of the published models, which differ in what
they are told of the first frame. A file of ours tells it in its header.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import AutoencoderKL, UNet2DConditionModel, UNet3DConditionModel
from transformers import CLIPVisionModelWithProjection

from inflate.errors import CheckpointError, ConfigError
from inflate.families import i2vgen_xl_refiner
from inflate.families.i2vgen_xl import NEGATIVE, Clips, I2VGenXL
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.models import exchange, folders, open_clip, single_file
from inflate.models.image_encoders import encoder_folder, image_statistics, load_image_encoder
from inflate.models.single_file_text import load_text_encoders
from inflate.models.stable_diffusion import load_vae, noise_for
from inflate.models.text_encoders import TextEncoders
from inflate.models.unet import VideoUNet
from inflate.objectives import DDPM

_TEXT_MODEL = ("vae/*", "text_encoder/*", "tokenizer/*", "unet/config.json")
"""Files to download of an image model."""
VISUAL = "visual."
"""What begins the names of the image encoder's tensors in a file of OpenCLIP."""


class Trained(NamedTuple):
    """What a model was trained with, and its clips."""

    objective: DDPM
    clips: Clips


class TrainedRefiner(NamedTuple):
    """What a model of refinement was trained with, and its clips."""

    objective: DDPM
    clips: i2vgen_xl_refiner.Clips


VGEN = Trained(
    DDPM("v_prediction", zero_terminal_snr=True, schedule="cosine"), Clips(16, 16.0, 704, 1280, negative=NEGATIVE)
)
"""VGen's i2vgen_xl, in whose training a negative prompt stood for none."""
MODELSCOPE = Trained(DDPM("v_prediction"), Clips(32, 8.0, 256, 448, prompts=False))
"""ModelScope's Image-to-Video, whose UNet is told CLIP's tokens alone."""
REFINER = TrainedRefiner(DDPM("v_prediction", schedule="shifted_cosine"), i2vgen_xl_refiner.Clips(32, 8.0, 720, 1280))
"""VGen's sr600 and ModelScope's Video-to-Video."""


@dataclass(frozen=True)
class Beside:
    """Where the networks beside a UNet are, which its file lacks."""

    image_model: str | None = None
    """the Stable Diffusion 2.1 of the autoencoder and the text encoder: its folder, or a single file"""
    tokenizer: str | None = None
    """folder of the tokenizer, which a single file lacks"""
    image_encoder: str | None = None
    """folder of the CLIP image encoder, or OpenCLIP's file of both of CLIP's encoders"""

    def text_model(self) -> tuple[AutoencoderKL, TextEncoders]:
        """The autoencoder and the text encoder; ConfigError where the image model is not named."""
        if self.image_model is None:
            raise ConfigError(
                "a UNet's file holds no autoencoder and no text encoder: name the Stable Diffusion that they are of, "
                "2.1 (a folder, its name on the Hub, or a file such as v2-1_512-ema-pruned.ckpt), as --image-model"
            )
        file = Path(self.image_model).expanduser()
        if file.is_file():
            tensors = exchange.read_saved(file)
            text = load_text_encoders(file, self.tokenizer, lambda _: tensors)
            return single_file.load_vae(file, lambda _: tensors), text
        if self.tokenizer is not None:
            raise ConfigError(f"{self.image_model} is a folder, which holds its tokenizer: leave --tokenizer out")
        folder = folders.resolve(self.image_model, _TEXT_MODEL)
        # A pipeline of I2VGen-XL has a longer text encoder, of which it leaves the last layer out.
        folders.unet_kind(folder / "unet", UNet2DConditionModel, UNet3DConditionModel, VideoUNet)
        return load_vae(folder / "vae"), TextEncoders.load(folder)

    def vision(self) -> tuple[CLIPVisionModelWithProjection, dict[str, Any]]:
        """The image encoder and the statistics of its inputs; ConfigError where it is not named."""
        if self.image_encoder is None:
            raise ConfigError(
                "a UNet's file holds no image encoder: name the folder of CLIP ViT-H/14 (or its name on the Hub, "
                "laion/CLIP-ViT-H-14-laion2B-s32B-b79K), or OpenCLIP's file of it (open_clip_pytorch_model.bin), as "
                "--image-encoder"
            )
        file = Path(self.image_encoder).expanduser()
        if file.is_file():
            return _of_open_clip(file), {}
        folder = encoder_folder(self.image_encoder)
        return load_image_encoder(folder), image_statistics(folder, folder.parent / "feature_extractor")


def _of_open_clip(file: Path) -> CLIPVisionModelWithProjection:
    saved = exchange.read_saved(file)
    own = {key.removeprefix(VISUAL): tensor for key, tensor in saved.items() if key.startswith(VISUAL)}
    if not own:
        raise CheckpointError(
            f"{file} holds no image encoder ({VISUAL}*): give OpenCLIP's file of ViT-H/14 "
            "(open_clip_pytorch_model.bin), or the folder of a CLIP image encoder"
        )
    return open_clip.load_image_encoder(exchange.in_float32(own), str(file))


def trained(unet: VideoUNet, told: Mapping[str, Any], origin: Path) -> Trained:
    """What a UNet was trained with: as a file of ours tells, else as the published model that it is like.

    CheckpointError for a header that is damaged.
    """
    if "clips" in told:
        with _header(origin):
            return Trained(DDPM(**told["objective"]), Clips(**told["clips"]))
    own = unet.hierarchy
    return VGEN if own is not None and own.takes_latents else MODELSCOPE


def trained_refiner(told: Mapping[str, Any], origin: Path) -> TrainedRefiner:
    """What a UNet of refinement was trained with, likewise."""
    if "clips" not in told:
        return REFINER
    with _header(origin):
        return TrainedRefiner(DDPM(**told["objective"]), i2vgen_xl_refiner.Clips(**told["clips"]))


@contextmanager
def _header(origin: Path) -> Iterator[None]:
    try:
        yield
    except (TypeError, LookupError) as error:
        raise CheckpointError(f"{origin} has a damaged header: {error}; write it again") from error


def base(unet: VideoUNet, about: Trained, beside: Beside) -> I2VGenXL:
    """The model of a UNet and of networks elsewhere; CheckpointError where they do not fit together."""
    encoder, statistics = beside.vision()
    vae, text = beside.text_model()
    noise, base_scale = noise_for(about.objective), about.objective.base_scale
    return I2VGenXL(unet, vae, text, noise, about.clips, encoder, **statistics, base_scale=base_scale)


def refiner(unet: VideoUNet, about: TrainedRefiner, beside: Beside) -> Refiner:
    """The refinement model of a UNet, likewise."""
    vae, text = beside.text_model()
    return Refiner(unet, vae, text, noise_for(about.objective), about.clips)


def told_of(family: I2VGenXL | Refiner) -> dict[str, Any]:
    """What stands in the header of a UNet's file, for `trained` and `trained_refiner`."""
    return {"objective": asdict(family.objective), "clips": asdict(family.clips)}
