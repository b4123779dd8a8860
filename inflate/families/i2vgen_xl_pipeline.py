"""I2VGen-XL in the folder of diffusers' pipeline, whose UNet is diffusers' own class.

The pipeline leaves out its text encoder's last layer (`clip_skip` 1), which ours lacks. One that changes nothing stands
there in a folder that we write, so that the pipeline computes the same whether it leaves it out or not: with
`clip_skip=None` it does not. To leave it out fails in diffusers 0.42 beside transformers from 5.6 on: the pipeline
looks for an attribute that their text encoder has no longer.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from diffusers import I2VGenXLUNet, __version__
from transformers import CLIPImageProcessorPil

from inflate.errors import CheckpointError
from inflate.families.i2vgen_xl import Clips, I2VGenXL
from inflate.families.i2vgen_xl_original import VGEN
from inflate.files import new_folder
from inflate.models import folders
from inflate.models.image_encoders import image_statistics, load_image_encoder
from inflate.models.stable_diffusion import load_noise, load_vae
from inflate.models.text_encoders import TextEncoders, with_idle_layer, without_last_layer
from inflate.models.unet import VideoUNet
from inflate.models.vae import VideoVAE

INDEX = {
    "_class_name": "I2VGenXLPipeline",
    "_diffusers_version": __version__,
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "I2VGenXLUNet"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def load(folder: Path, unet: VideoUNet) -> I2VGenXL:
    """The model of a pipeline's folder and its UNet, which is read elsewhere.

    The steps of its noise schedule are those of VGen, also where the folder's end in another place. CheckpointError,
    listing the tensors, where a part is missing or not whole.
    """
    vae, text, noise = load_vae(folder / "vae"), TextEncoders.load(folder), load_noise(folder / "scheduler")
    if len(text.networks) != 1:
        raise CheckpointError(f"{folder} has two text encoders; the pipeline of I2VGen-XL has one")
    shorter = TextEncoders((without_last_layer(text.networks[0]),), text.tokenizers)
    encoder = load_image_encoder(folder / "image_encoder")
    statistics = image_statistics(folder / "feature_extractor")
    return I2VGenXL(unet, vae, shorter, noise, _clips(folder / folders.SETTINGS_FILE), encoder, **statistics)


def _clips(file: Path) -> Clips:
    """What the clips were: as a folder of ours tells, else as of VGen's model."""
    if not file.is_file():
        return VGEN.clips
    try:
        return Clips(**folders.read_json(file)["clips"])
    except (TypeError, LookupError) as error:
        raise CheckpointError(f"{file} is not whole: {error}; write the folder again") from error


def padding_of(folder: Path) -> int | None:
    """The token that a pipeline's tokenizer pads prompts with, where it is not the one that OpenCLIP, and so VGen, does
    (0)."""
    padding = TextEncoders.load(folder).tokenizers[0].pad_token_id
    return padding or None


def save(family: I2VGenXL, unet: I2VGenXLUNet, folder: Path) -> None:
    """Writes a pipeline's folder, atomic, with the model's UNet as diffusers' class.

    CheckpointError, with nothing written, where the pipeline has no place for a part.
    """
    found = {
        "a decoder with temporal layers": isinstance(family.vae, VideoVAE),
        "a second text encoder": len(family.text.networks) != 1,
        "rescaled latents (base_scale)": family.base_scale != 1.0,
    }
    if any(found.values()):
        parts = ", ".join(part for part, is_there in found.items() if is_there)
        raise CheckpointError(f"diffusers' I2VGenXLPipeline has no place for: {parts}")
    size = family.image_encoder.config.image_size
    side = {"height": size, "width": size}
    statistics = {"image_mean": list(family.image_mean), "image_std": list(family.image_std)}
    with new_folder(folder) as aside:
        unet.save_pretrained(aside / "unet")
        family.vae.save_pretrained(aside / "vae")
        family.noise.save_pretrained(aside / "scheduler")
        family.image_encoder.save_pretrained(aside / "image_encoder")
        CLIPImageProcessorPil(crop_size=side, **statistics).save_pretrained(aside / "feature_extractor")
        longer = with_idle_layer(family.text.networks[0])
        TextEncoders((longer,), family.text.tokenizers).save_pretrained(aside)
        (aside / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
        (aside / folders.SETTINGS_FILE).write_text(json.dumps({"clips": asdict(family.clips)}, indent=2) + "\n")
