"""Pretrain the pocket Stable Diffusion on frames of the demo world, from random weights, on a CPU.

    python recipes/pocket_pretrain.py stage=vae training.output=OUT/vae
    python recipes/pocket_pretrain.py stage=image vae=OUT/vae/export training.output=OUT/image

The last export is the model that the package ships as `pocket`: real diffusers and transformers classes, all small.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from inflate import config as configuration
from inflate.data.demo import COLOURS, HEADINGS, SPEEDS, TEXTURES, Look, draw_scene, render
from inflate.errors import ConfigError, report_errors
from inflate.metrics.video import psnr
from inflate.models.image_encoders import CLIP_MEAN, CLIP_STD
from inflate.training.loop import Batch, Noise, Player, fit
from inflate.training.settings import Training

SCALING, WIDTH, TOKENS, SIDE = 0.18215, 64, 20, 64
WORDS = (
    "a large small dart disc box flying over plain , the camera follows zooms in out".split()
    + [*COLOURS, *TEXTURES, *HEADINGS, *SPEEDS]
)  # fmt: skip
KINDS = ("text", "image", "nothing")


@dataclass
class Config:
    """Settings of the pretraining."""

    stage: Literal["vae", "image"] = "vae"
    """vae: the autoencoder; image: the UNet with its text and image encoders"""
    vae: Path | None = None
    """the first stage's export, for the second"""
    start: Path | None = None
    """an export of the second stage to go on from, with a new optimiser and schedule"""
    frames: int = 30000
    """frames rendered to train on"""
    held_out: int = 256
    """frames rendered to measure on"""
    look: Look = "vivid"
    """how the frames are painted: another than vivid makes another image model for the same temporal layers"""
    text_share: float = 0.57
    """share of samples whose context is the caption"""
    image_share: float = 0.33
    """share of samples whose context is the frame's own image embedding; the rest has the empty caption"""
    timestep_power: float = 1.0
    """timesteps are 1000 * u ** power, u uniform: below 1, more of them are noisy, where it is decided what is drawn"""
    training: Training = field(
        default_factory=lambda: Training(
            steps=9000,
            batch=24,
            lr=1e-3,
            warmup=300,
            schedule="cosine",
            ema=0.999,
            precision="bf16",
            workers=0,
            log_every=100,
            evaluate_every=1000,
            preview_every=1000,
            checkpoint_every=500,
        )  # fmt: skip
    )


class Frames:
    """Rendered frames with their captions; sample number -> index of a frame, drawn from (seed, number)."""

    def __init__(self, seed: int, count: int, look: Look = "vivid") -> None:
        rng = np.random.default_rng(seed)
        scenes = [draw_scene(rng) for _ in range(count)]
        frames = np.stack([render(scene, [rng.uniform(0, 2)], SIDE, look)[0] for scene in scenes])
        self.seed, self.captions = seed, [scene.caption for scene in scenes]
        self.frames = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()  # (N, 3, H, W)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, number: int) -> dict[str, int]:
        index = int(np.random.default_rng([self.seed, number]).integers(len(self)))
        return {"index": index, "number": number}

    def pixels(self, index: Any) -> Tensor:
        """Frames (B, 3, H, W) in [-1, 1]."""
        return self.frames[index].float() / 127.5 - 1

    def parts(self, size: int = 100) -> Iterator[Tensor]:
        """Ranges that cover all frames."""
        return iter(torch.arange(len(self)).split(size))


# --- the autoencoder --------------------------------------------------------------------------------------------------


def build_vae() -> AutoencoderKL:
    """Factor 4, without quant and post-quant convolutions, so that diffusers' temporal decoder can hold it exactly."""
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 64), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=32,
        use_quant_conv=False, use_post_quant_conv=False, sample_size=SIDE, scaling_factor=SCALING,
    )  # fmt: skip
    with torch.no_grad():  # a posterior born as unit noise over a tiny mean learns nothing for minutes
        vae.encoder.conv_out.bias[4:] = -8
        vae.encoder.conv_out.weight[4:] *= 0.1
    return vae


class Autoencode(nn.Module):
    """Frames to frames through a sampled latent; also the latent's mean and divergence."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, clean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.vae.encode(clean).latent_dist
        latent = posterior.mean + posterior.std * noise  # (B, 4, H/4, W/4)
        return self.vae.decode(latent).sample.float(), posterior.mean.float(), posterior.kl().float()


class AutoencoderTask:
    """Trains the autoencoder on pixels; its export has latent channels of equal deviation."""

    frozen: tuple[nn.Module, ...] = ()

    def __init__(self, data: Frames, held_out: Frames) -> None:
        torch.manual_seed(0)
        self.vae, self.data, self.held_out = build_vae(), data, held_out
        self.players = [Player("vae", Autoencode(self.vae), self.loss)]

    def loss(self, batch: Batch, noise: Noise, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        clean = self.data.pixels(batch["index"])
        decoded, mean, divergence = self.players[0].network(clean, noise.normal("latent", 4, SIDE // 4, SIDE // 4))
        error = (decoded - clean).flatten(1)
        centre = mean.mean((2, 3)).square().mean(1)  # keeps channels near mean 0, which scaling cannot mend
        return error.abs().mean(1) + 0.5 * error.square().mean(1) + 1e-6 * divergence + 1e-3 * centre, {}

    def reconstruct(self, clean: Tensor) -> Tensor:
        return self.vae.decode(self.vae.encode(clean).latent_dist.mode()).sample.float()

    def evaluate(self) -> dict[str, float]:
        clean = self.held_out.pixels(slice(0, 64))
        decoded = self.reconstruct(clean).clamp(-1, 1)
        return {"psnr": float(psnr(decoded[:, None] / 2 + 0.5, clean[:, None] / 2 + 0.5).mean())}

    def preview(self, folder: Path) -> None:
        clean = self.held_out.pixels(slice(0, 12))
        draw_grid(torch.stack([clean, self.reconstruct(clean)], 1).flatten(0, 1), 6, folder / "reconstructions.png")

    def export(self, folder: Path) -> None:
        vae = copy.deepcopy(self.vae)
        normalise(vae, self.data.pixels(slice(0, 1000)))
        vae.save_pretrained(folder)


@torch.no_grad()
def normalise(vae: AutoencoderKL, images: Tensor) -> None:
    """Give each latent channel the deviation 1 / scaling_factor, exactly: a factor passes through zero padding."""
    modes = torch.cat([vae.encode(part).latent_dist.mode() for part in images.split(50)])
    factor = 1 / SCALING / modes.std((0, 2, 3))
    vae.encoder.conv_out.weight[:4] *= factor[:, None, None, None]
    vae.encoder.conv_out.bias[:4] *= factor
    vae.encoder.conv_out.bias[4:] += 2 * factor.log()
    vae.decoder.conv_in.weight /= factor[None, :, None, None]


# --- the image model --------------------------------------------------------------------------------------------------


def build_tokenizer() -> CLIPTokenizer:
    """One token per word of the demo captions; any other word is spelt in letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [","]
    vocabulary = dict.fromkeys(letters + [f"{letter}</w>" for letter in letters])
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:  # what the words before this one make of it
            while pair in pairwise(pieces):
                at = list(pairwise(pieces)).index(pair)
                pieces[at : at + 2] = ["".join(pair)]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocabulary[pieces[0]] = None
    vocabulary |= dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer({token: i for i, token in enumerate(vocabulary)}, merges, model_max_length=TOKENS)


def build_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal signal: then the video model can be told of any noise level."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )  # fmt: skip


class ImageModel(nn.Module):
    """The UNet with the two encoders that can give its context; predicts v."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        sizes: dict[str, Any] = {
            "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
            "projection_dim": WIDTH,
        }  # fmt: skip
        ends = {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
        words = {"vocab_size": vocabulary, "max_position_embeddings": TOKENS, **ends}
        self.text_encoder = CLIPTextModel(CLIPTextConfig(**sizes, **words))
        self.image_encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=224, patch_size=28))
        self.unet = UNet2DConditionModel(
            sample_size=SIDE // 4, in_channels=4, out_channels=4, block_out_channels=(64, 96, 96), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), norm_num_groups=32,
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=WIDTH,
            attention_head_dim=(2, 3, 3), use_linear_projection=True,
        )  # fmt: skip

    def go_on_from(self, folder: Path) -> None:
        """Take the weights of an earlier export."""
        for name in ("text_encoder", "image_encoder", "unet"):
            part = getattr(self, name)
            part.load_state_dict(type(part).from_pretrained(folder / name).state_dict())

    def forward(self, noisy: Tensor, timestep: Tensor, tokens: Tensor, images: Tensor, shown: Tensor) -> Tensor:
        """v (B, 4, h, w); where `shown` (B,) is set, the next of `images` (M, 3, H, W) replaces the words."""
        context = self.text_encoder(tokens).last_hidden_state  # (B, L, D)
        if len(images):  # one image token in place of all words: equal keys make equal attention
            embeds = self.image_encoder(preprocess(images)).image_embeds.to(context.dtype)  # (M, D)
            context = context.index_copy(0, shown.nonzero()[:, 0], embeds[:, None].expand(-1, TOKENS, -1))
        return self.unet(noisy, timestep, context).sample.float()


def preprocess(images: Tensor) -> Tensor:
    """Frames in [-1, 1] as the image encoder sees them; enlarging needs no blur against aliasing."""
    large = F.interpolate(images, (224, 224), mode="bicubic", align_corners=True)
    return ((large + 1) / 2 - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


class ImageTask:
    """Trains the UNet and both encoders on latents of the frozen autoencoder."""

    def __init__(self, vae: AutoencoderKL, data: Frames, held_out: Frames, config: Config) -> None:
        torch.manual_seed(0)
        self.vae, self.data, self.held_out, self.config = vae, data, held_out, config
        self.frozen = (vae.requires_grad_(False).eval(),)
        self.tokenizer, self.scheduler = build_tokenizer(), build_scheduler()
        self.model = ImageModel(len(self.tokenizer))
        self.players = [Player("image", self.model, self.loss)]
        self.latents = {frames: self.encode(frames) for frames in (data, held_out)}
        self.tokens = {frames: self.tokenise(frames.captions) for frames in (data, held_out)}
        self.empty = self.tokenise([""])

    @torch.no_grad()
    def encode(self, frames: Frames) -> Tensor:
        """Scaled latents of all frames, the posterior's mode."""
        return SCALING * torch.cat([self.vae.encode(frames.pixels(p)).latent_dist.mode() for p in frames.parts()])

    def tokenise(self, captions: list[str]) -> Tensor:
        padded = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(captions, **padded).input_ids

    def loss(self, batch: Batch, noise: Noise, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        draw = noise.uniform("kind")
        shares = torch.tensor([self.config.text_share, self.config.text_share + self.config.image_share])
        timestep = (1000 * noise.uniform("timestep") ** self.config.timestep_power).long().clamp(max=999)
        gaussian = noise.normal("noise", 4, SIDE // 4, SIDE // 4)
        return self.error(self.data, batch["index"], gaussian, timestep, torch.bucketize(draw, shares)), {}

    def error(self, frames: Frames, index: Tensor, noise: Tensor, timestep: Tensor, kind: Tensor) -> Tensor:
        """Squared error of v per sample (B,); kind is an index of KINDS per sample."""
        clean, alpha = self.latents[frames][index], self.scheduler.alphas_cumprod[timestep][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        tokens = torch.where((kind == 2)[:, None], self.empty, self.tokens[frames][index])
        images = frames.pixels(index[kind == 1])
        predicted = self.players[0].network(noisy, timestep, tokens, images, kind == 1)
        return (predicted - v).square().mean((1, 2, 3))

    def evaluate(self) -> dict[str, float]:
        count = len(self.held_out)
        noise = torch.randn(count, 4, SIDE // 4, SIDE // 4, generator=torch.Generator().manual_seed(1))
        timestep = torch.arange(count) * 999 // (count - 1)
        losses = {}
        for number, name in enumerate(KINDS):
            kind = torch.full((count,), number)
            parts = [self.error(self.held_out, p, noise[p], timestep[p], kind[p]) for p in self.held_out.parts(64)]
            losses[f"loss, {name}"] = float(torch.cat(parts).mean())
        return losses

    def preview(self, folder: Path) -> None:
        captions = self.held_out.captions[:24]
        generators = [torch.Generator().manual_seed(i) for i in range(len(captions))]
        pipeline = self.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            captions, num_inference_steps=25, guidance_scale=3.0, height=SIDE, width=SIDE, output_type="pt",
            generator=generators,
        ).images  # fmt: skip
        draw_grid(images * 2 - 1, 6, folder / "samples.png")
        (folder / "captions.txt").write_text("\n".join(captions) + "\n")

    def pipeline(self, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
        """The model as diffusers' pipeline, in copies where the type is another."""
        parts = {"vae": self.vae, "text_encoder": self.model.text_encoder, "unet": self.model.unet}
        if dtype != torch.float32:
            parts = {name: copy.deepcopy(part).to(dtype) for name, part in parts.items()}
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(tokenizer=self.tokenizer, scheduler=self.scheduler, **parts, **nothing)

    def export(self, folder: Path) -> None:
        self.pipeline(torch.float16).save_pretrained(folder)
        copy.deepcopy(self.model.image_encoder).half().save_pretrained(folder / "image_encoder")
        CLIPImageProcessor(image_mean=CLIP_MEAN, image_std=CLIP_STD).save_pretrained(folder / "feature_extractor")
        for path in folder.rglob("*.json"):
            clean_settings(path)


def clean_settings(path: Path) -> None:
    """Remove where a part was loaded from, and the stand-in that transformers names without torchvision."""
    settings = json.loads(path.read_text())
    settings.pop("_name_or_path", None)
    if "image_processor_type" in settings:
        settings["image_processor_type"] = "CLIPImageProcessor"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def draw_grid(images: Tensor, columns: int, path: Path) -> None:
    """Write images (N, 3, H, W) in [-1, 1] as a PNG at twice their size."""
    rows = [torch.cat(list(part), dim=2) for part in images.split(columns)]
    grid = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(grid.repeat(2, axis=0).repeat(2, axis=1)).save(path)


def main(config: Config) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"  # the frames and latents stay where they are rendered
    data, held_out = Frames(1, config.frames, config.look), Frames(2, config.held_out, config.look)
    if config.stage == "vae":
        task: AutoencoderTask | ImageTask = AutoencoderTask(data, held_out)
    elif config.vae is None:
        raise ConfigError("vae is not set: give the folder that stage=vae exported, vae=OUT/vae/export")
    else:
        task = ImageTask(AutoencoderKL.from_pretrained(config.vae), data, held_out, config)
        if config.start:
            task.model.go_on_from(config.start)
    result = fit(task, data, config.training, config=configuration.dump(config))
    if result.export is None:
        sys.exit(130)
    print(f"wrote {result.export}")


if __name__ == "__main__":
    with report_errors():
        main(configuration.from_command_line(Config))
