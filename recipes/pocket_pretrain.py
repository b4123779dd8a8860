"""Pretrain the pocket Stable Diffusion on frames of the demo world, from random weights, on a CPU.

python recipes/pocket_pretrain.py vae   OUT
python recipes/pocket_pretrain.py image OUT
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from inflate.data.demo import COLOURS, HEADINGS, SPEEDS, TEXTURES, draw_scene, render

SCALING = 0.18215


def draw_frames(seed: int, count: int) -> tuple[torch.Tensor, list[str]]:
    rng = np.random.default_rng(seed)
    frames, captions = [], []
    for _ in range(count):
        scene = draw_scene(rng)
        frames.append(render(scene, [rng.uniform(0, 2)])[0])
        captions.append(scene.caption)
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous(), captions


def pixels(frames: torch.Tensor) -> torch.Tensor:
    return frames.float() / 127.5 - 1


def cosine(step: int, steps: int, warmup: int = 100) -> float:
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def build_vae() -> AutoencoderKL:
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32, 64), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=32,
        use_quant_conv=False, use_post_quant_conv=False, sample_size=64, scaling_factor=SCALING,
    )  # fmt: skip
    with torch.no_grad():  # a posterior born as unit noise over a tiny mean learns nothing for minutes
        vae.encoder.conv_out.bias[4:] = -8
        vae.encoder.conv_out.weight[4:] *= 0.1
    return vae


def train_vae(out: Path, steps: int = 5000, lr: float = 1.5e-3, start_from: Path | None = None) -> None:
    torch.manual_seed(0)
    frames, _ = draw_frames(1, 16000)
    held, _ = draw_frames(2, 64)
    held = pixels(held)
    vae = AutoencoderKL.from_pretrained(start_from) if start_from else build_vae()
    ema = EMAModel(vae.parameters(), decay=0.999)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=1e-4)
    rng = np.random.default_rng(3)
    log, start = [], time.time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * cosine(step, steps)
        if not start_from and step < 0.1 * steps:  # crops first: cheap and varied; but norms with one channel a group see the frame's size
            x, y = rng.integers(0, 33, size=2)
            batch = frames[rng.integers(0, len(frames), size=16), :, y : y + 32, x : x + 32]
        else:
            batch = frames[rng.integers(0, len(frames), size=6)]
        clean = pixels(batch)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(clean).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - clean
        mean = posterior.mean.float().mean((0, 2, 3))
        loss = (
            error.abs().mean()
            + 0.5 * error.square().mean()
            + 1e-6 * posterior.kl().mean()
            + 1e-3 * mean.square().mean()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(vae.parameters())
        if step % 250 == 249 or step == steps - 1:
            ema.store(vae.parameters())
            ema.copy_to(vae.parameters())
            with torch.no_grad():
                rec = vae.decode(vae.encode(held).latent_dist.mode()).sample.clamp(-1, 1)
            psnr = -10 * math.log10(float((rec - held).div(2).square().mean()))
            log.append(
                {"step": step + 1, "loss": float(loss.detach()), "psnr": psnr, "seconds": round(time.time() - start)}
            )
            print(json.dumps(log[-1]), flush=True)
            if step % 1000 == 999:
                vae.save_pretrained(out / "vae-raw")
            if step != steps - 1:
                ema.restore(vae.parameters())
    normalise(vae, pixels(frames[:1000]))
    with torch.no_grad():
        again = vae.decode(vae.encode(held).latent_dist.mode()).sample.clamp(-1, 1)
    print("change by normalising", float((again - rec).abs().max()))
    vae.save_pretrained(out / "vae")
    (out / "vae.json").write_text(json.dumps(log, indent=1))


@torch.no_grad()
def normalise(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Give every latent channel a standard deviation of 1 / scaling_factor, exactly: a per-channel factor moves through zero padding."""
    modes = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in images.split(50)])
    factor = 1 / SCALING / modes.std((0, 2, 3))
    vae.encoder.conv_out.weight[:4] *= factor[:, None, None, None]
    vae.encoder.conv_out.bias[:4] *= factor
    vae.encoder.conv_out.bias[4:] += 2 * factor.log()
    vae.decoder.conv_in.weight /= factor[None, :, None, None]


WIDTH, TOKENS = 64, 20
WORDS = (
    "a large small dart disc box flying over plain , the camera follows zooms in out".split()
    + list(COLOURS) + list(TEXTURES) + list(HEADINGS) + list(SPEEDS)
)  # fmt: skip


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


def build_text_encoder(vocabulary: int) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=TOKENS, projection_dim=WIDTH, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    ))  # fmt: skip


def build_image_encoder() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2, num_attention_heads=4, image_size=224, patch_size=28,
        projection_dim=WIDTH,
    ))  # fmt: skip


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(64, 96, 96), layers_per_block=1, norm_num_groups=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=(2, 3, 3), use_linear_projection=True,
    )  # fmt: skip


MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def train_image(out: Path, steps: int = 12000, batch: int = 24, lr: float = 1e-3) -> None:
    """Text-to-image, v-prediction with zero terminal SNR; a third of the contexts is the frame's own image embedding."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(out / "vae").requires_grad_(False)
    tokenizer = build_tokenizer()
    text_encoder, image_encoder, unet = build_text_encoder(len(tokenizer)), build_image_encoder(), build_unet()
    networks = torch.nn.ModuleList([text_encoder, image_encoder, unet])
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip
    alphas = scheduler.alphas_cumprod

    frames, captions = draw_frames(4, 30000)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latents = torch.cat([vae.encode(pixels(c)).latent_dist.mode().float() * SCALING for c in frames.split(100)])
    tokens = tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    empty = tokenizer("", padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    held, train = slice(0, 256), np.arange(256, len(frames))
    ema = EMAModel(networks.parameters(), decay=0.999)
    optimizer = torch.optim.AdamW(networks.parameters(), lr=lr, weight_decay=1e-2)
    rng, log, start = np.random.default_rng(5), [], time.time()
    noise_held, t_held = torch.randn(256, 4, 16, 16), torch.arange(256) * 999 // 255

    def loss_of(index: np.ndarray | slice, noise: torch.Tensor, t: torch.Tensor, kinds: np.ndarray) -> torch.Tensor:
        """kinds per sample: 0 text, 1 image, 2 nothing; -> v-MSE per sample."""
        clean, a = latents[index], alphas[t][:, None, None, None]
        noisy, target = a.sqrt() * clean + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * clean
        ids = torch.where(torch.from_numpy(kinds == 2)[:, None], empty, tokens[index])
        context = text_encoder(ids).last_hidden_state
        chosen = torch.from_numpy(np.flatnonzero(kinds == 1))
        if len(chosen):  # one image token stands in for all text tokens: equal keys make equal attention
            large = F.interpolate(pixels(frames[index][chosen]), (224, 224), mode="bicubic", align_corners=True)
            image = image_encoder(((large + 1) / 2 - MEAN) / STD).image_embeds.to(context.dtype)
            context = context.index_copy(0, chosen, image[:, None].expand(-1, TOKENS, -1))
        return (unet(noisy, t, context).sample.float() - target).square().mean((1, 2, 3))

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * cosine(step, steps, 300)
        index = rng.choice(train, size=batch)
        kinds = rng.choice(3, size=batch, p=[0.57, 0.33, 0.10])
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(index, torch.randn(batch, 4, 16, 16), torch.randint(0, 1000, (batch,)), kinds).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(networks.parameters())
        if step % 500 == 499 or step == steps - 1:
            ema.store(networks.parameters())
            ema.copy_to(networks.parameters())
            with torch.no_grad():
                losses = {
                    name: torch.cat(
                        [
                            loss_of(np.arange(i, i + 64), noise_held[i : i + 64], t_held[i : i + 64], np.full(64, k))
                            for i in range(0, 256, 64)
                        ]
                    )
                    for name, k in (("text", 0), ("image", 1), ("nothing", 2))
                }
            row = {"step": step + 1, "loss": float(loss.detach()), "seconds": round(time.time() - start)}
            row |= {name: round(float(value.mean()), 4) for name, value in losses.items()}
            row |= {"text bands": [round(float(b.mean()), 4) for b in losses["text"].split(64)]}
            log.append(row)
            print(json.dumps(row), flush=True)
            pipeline = StableDiffusionPipeline(
                vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
                feature_extractor=None, requires_safety_checker=False,
            )  # fmt: skip
            pipeline.set_progress_bar_config(disable=True)
            if step % 1500 == 1499 or step == steps - 1:
                draw_samples(pipeline, captions[:24], out / f"samples-{step + 1:06d}.png")
                pipeline.save_pretrained(out / "model")
                image_encoder.save_pretrained(out / "model" / "image_encoder")
            if step != steps - 1:
                ema.restore(networks.parameters())
    (out / "image.json").write_text(json.dumps(log, indent=1))


def ship(out: Path, target: Path) -> None:
    """Write the pretrained model into `target` as a diffusers folder with float16 weights, with its training log."""
    pipeline = StableDiffusionPipeline.from_pretrained(out / "model", safety_checker=None, feature_extractor=None)
    image_encoder = CLIPVisionModelWithProjection.from_pretrained(out / "model" / "image_encoder")
    pipeline.to(dtype=torch.float16).save_pretrained(target)
    image_encoder.half().save_pretrained(target / "image_encoder")
    CLIPImageProcessor(image_mean=MEAN.flatten().tolist(), image_std=STD.flatten().tolist()).save_pretrained(
        target / "feature_extractor"
    )
    for path in target.rglob("*config.json"):  # without traces of where it was trained, and of which stand-in saved it
        settings = json.loads(path.read_text())
        settings.pop("_name_or_path", None)
        if "image_processor_type" in settings:
            settings["image_processor_type"] = "CLIPImageProcessor"
        path.write_text(json.dumps(settings, indent=2) + "\n")
    index = json.loads((target / "model_index.json").read_text())
    index.pop("_name_or_path", None)
    (target / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    logs = {stage: json.loads((out / f"{stage}.json").read_text()) for stage in ("vae", "image")}
    (target / "training_log.json").write_text(json.dumps(logs, indent=1) + "\n")


@torch.no_grad()
def draw_samples(pipeline: StableDiffusionPipeline, captions: list[str], path: Path) -> None:
    images = pipeline(
        captions, num_inference_steps=25, guidance_scale=3.0, height=64, width=64, output_type="np",
        generator=[torch.Generator().manual_seed(i) for i in range(len(captions))],
    ).images  # fmt: skip
    rows = [np.concatenate(list(images[i : i + 6]), axis=1) for i in range(0, len(images), 6)]
    grid = (np.concatenate(rows) * 255).astype(np.uint8)
    Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), Image.Resampling.NEAREST).save(path)
    path.with_suffix(".txt").write_text("\n".join(captions))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vae", "image", "ship"])
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--target", type=Path, help="where `ship` writes the model")
    parser.add_argument("--start-from", type=Path, help="weights to go on from; the optimiser and its schedule start anew")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    stage, out = given.pop("stage"), given.pop("output")
    out.mkdir(parents=True, exist_ok=True)
    {"vae": train_vae, "image": train_image, "ship": ship}[stage](out, **given)
