"""One Stable Video Diffusion training step: inflate beside the common public way on plain diffusers.

The common way, as public trainers do it: diffusers' UNetSpatioTemporalConditionModel, fp32 weights under autocast
(LoRA: frozen half-precision base, fp32 adapters), frozen VAE and CLIP run in every step, AdamW, gradient norm clipped
to 1, the loss weighted around the denoised latents. Weights are random, nothing is downloaded. Both sides get the same
weights, clips, noise, frozen encoders and threads; the first thing printed is that their losses are equal.

    python benchmarks/train_step.py --tiny        one CPU run, under a minute
    python benchmarks/train_step.py --full        one CUDA GPU: 14x320x512 and 25x576x1024
    python benchmarks/train_step.py --arms        what each measure alone and all defaults gain in a LoRA step, on a CPU
    python benchmarks/train_step.py --simulate    memory and FLOPs of the real sizes on the meta device, no GPU
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from record import record, write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that is not installed will do

RESULTS = ROOT / "benchmarks" / "results"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Shape = tuple[int, int, int]  # frames, height, width in pixels
POLICIES = {
    "none": "no gradient checkpointing on either side",
    "unit": "every residual block and every transformer, temporal layers included, on both sides",
    "own": "each library's own enable_gradient_checkpointing()",
}


@dataclass(frozen=True)
class Size:
    """The widths of one model: UNet levels, attention heads, layers, context and id widths; VAE and CLIP settings."""

    widths: tuple[int, ...]
    heads: tuple[int, ...]
    attends: tuple[bool, ...]
    layers: int
    context: int
    id_width: int
    vae: dict[str, Any]
    clip: dict[str, Any]


FULL = Size(
    widths=(320, 640, 1280, 1280),
    heads=(5, 10, 20, 20),
    attends=(True, True, True, False),
    layers=2,
    context=1024,
    id_width=256,
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    clip={"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    | {"image_size": 224, "patch_size": 14},
)
TINY = Size(
    widths=(32, 64),
    heads=(2, 4),
    attends=(True, False),
    layers=1,
    context=32,
    id_width=32,
    vae={"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    clip={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"image_size": 32, "patch_size": 8},
)
MIDDLE = Size(
    widths=(64, 128, 256),
    heads=(1, 2, 4),
    attends=(True, True, False),
    layers=1,
    context=32,
    id_width=32,
    vae={"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1},
    clip=TINY.clip,
)
"""A small model of which encoding a clip costs about as much, beside a forward pass, as of the real one."""
SIZES = {"full": FULL, "tiny": TINY, "middle": MIDDLE}
ENCODING_SHARE = 0.853
"""FLOPs of encoding 25x576x1024, its condition frame and embedding included, over those of a forward pass of SVD-XT:
65.2 + 2.6 + 0.3 to 80.0; `encoding_share(FULL, (25, 576, 1024))` counts it."""


@dataclass(frozen=True)
class Batch:
    """What both sides start from; latents are float32, (batch, frames, 4, height / 8, width / 8)."""

    clean: Tensor
    noise: Tensor
    image: Tensor  # the conditioning frame's latent, unscaled, repeated over the frames
    normal: Tensor  # (batch,) the draw behind sigma
    context: Tensor  # (batch, 1, width)
    added_ids: Tensor  # (batch, 3)


@dataclass
class Side:
    """One of the two implementations, ready to step."""

    name: str
    unet: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]


# ---- the two models


def public_unet(size: Size) -> nn.Module:
    from diffusers import UNetSpatioTemporalConditionModel

    down = tuple(f"{'CrossAttnDown' if yes else 'Down'}BlockSpatioTemporal" for yes in size.attends)
    up = tuple(f"{'CrossAttnUp' if yes else 'Up'}BlockSpatioTemporal" for yes in reversed(size.attends))
    return UNetSpatioTemporalConditionModel(
        block_out_channels=size.widths,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=size.layers,
        num_attention_heads=size.heads,
        cross_attention_dim=size.context,
        addition_time_embed_dim=size.id_width,
        projection_class_embeddings_input_dim=3 * size.id_width,
    )


def our_unet(size: Size) -> nn.Module:
    from diffusers import UNet2DConditionModel

    from inflate.models.unet import TemporalSpec, VideoUNet

    parent = UNet2DConditionModel(
        in_channels=8,
        block_out_channels=size.widths,
        down_block_types=tuple(f"{'CrossAttnDown' if yes else 'Down'}Block2D" for yes in size.attends),
        up_block_types=tuple(f"{'CrossAttnUp' if yes else 'Up'}Block2D" for yes in reversed(size.attends)),
        layers_per_block=size.layers,
        attention_head_dim=size.heads,
        cross_attention_dim=size.context,
        use_linear_projection=True,
    )
    return VideoUNet.from_2d(parent, TemporalSpec(added_id_dim=size.id_width, cross_attention_resnet_eps=1e-6))


def copy_weights(public: nn.Module, ours: nn.Module) -> None:
    """Load the public model's weights, adapters too, into ours by the key map; every key must find its place."""
    from inflate.families.svd_keys import unet_to_diffusers
    from inflate.models.exchange import convert, inverse

    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    names = inverse(unet_to_diffusers(shapes))
    ours.load_state_dict(convert(public.state_dict(), names, shapes, "the diffusers model"), strict=True)


def sides(size: Size, device: torch.device) -> tuple[Side, Side]:
    """The public side and ours, with equal weights in evaluation mode."""
    torch.manual_seed(0)
    with device:
        public, ours = public_unet(size), our_unet(size)
    public.to(device)  # its mixing factors are made on the CPU whatever the default device
    if device.type != "meta":
        copy_weights(public, ours)
    return Side("diffusers", public, public_loss), Side("inflate", ours, our_loss)


# ---- the two losses


def public_loss(unet: nn.Module, batch: Batch) -> Tensor:
    """The usual form: weight times squared error of the denoised latents (EDM, sigma_data 1)."""
    sigma = torch.exp(0.7 + 1.6 * batch.normal).view(-1, 1, 1, 1, 1)
    noisy = batch.clean + sigma * batch.noise
    sample = torch.cat([noisy / (sigma**2 + 1).sqrt(), batch.image], dim=2)
    timestep = 0.25 * sigma.flatten().log()
    output = unet(*_as_input(unet, sample, timestep, batch), return_dict=False)[0].float()
    denoised = noisy / (sigma**2 + 1) - output * sigma / (sigma**2 + 1).sqrt()
    return ((sigma**2 + 1) / sigma**2 * (denoised - batch.clean) ** 2).mean()


def our_loss(unet: nn.Module, batch: Batch) -> Tensor:
    from inflate.objectives import EDM

    def predict(sample: Tensor, timestep: Tensor) -> Tensor:
        sample = torch.cat([sample, batch.image], dim=2)
        return unet(*_as_input(unet, sample, timestep, batch)).sample

    objective = EDM(P_mean=0.7, P_std=1.6)
    return objective.loss(predict, batch.clean, objective.sigma(batch.normal), batch.noise).mean()


def _as_input(unet: nn.Module, sample: Tensor, timestep: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    """Positional arguments of either UNet; outside autocast a half-precision network needs half-precision input."""
    if sample.device.type != "meta" and torch.is_autocast_enabled(sample.device.type):
        return sample, timestep, batch.context, batch.added_ids
    dtype = unet.conv_in.weight.dtype
    return sample.to(dtype), timestep, batch.context.to(dtype), batch.added_ids.to(dtype)


# ---- what both share: frozen encoders, choice of parameters, checkpointing


@dataclass(frozen=True)
class Encoded:
    """What the frozen encoders make of clips; as in Batch, but the condition is of one frame."""

    clean: Tensor
    image: Tensor
    context: Tensor
    added_ids: Tensor


@dataclass
class Frozen:
    """The frozen VAE encoder and image encoder, run in every step of either side."""

    vae: nn.Module
    clip: nn.Module
    chunk: int  # frames per VAE call, 0 for all at once

    def __call__(self, pixels: Tensor, seed: int) -> Batch:
        """`pixels` (batch, frames, 3, height, width) in [-1, 1]; every draw is a function of `seed`."""
        return self.noised(self.encoded(pixels, seed), seed)

    @staticmethod
    def noised(encoded: "Encoded", seed: int) -> Batch:
        """The batch of what is encoded, or was read from a cache."""
        clean = encoded.clean
        normal = partial(torch.randn, generator=torch.Generator(clean.device).manual_seed(~seed), device=clean.device)
        image = encoded.image.expand_as(clean)
        return Batch(clean, normal(*clean.shape), image, normal(len(clean)), encoded.context, encoded.added_ids)

    @torch.no_grad()
    def encoded(self, pixels: Tensor, seed: int) -> "Encoded":
        """What a cache keeps of clips, one of several draws of the noise on their first frames included."""
        count = len(pixels)
        draw = torch.Generator(pixels.device).manual_seed(seed)
        normal = partial(torch.randn, generator=draw, device=pixels.device)
        clean = self.encode(pixels) * self.vae.config.scaling_factor
        augmentation = torch.exp(-3.0 + 0.5 * normal(count))
        first = pixels[:, :1]
        image = self.encode(first + augmentation.view(-1, 1, 1, 1, 1) * normal(*first.shape))
        side = self.clip.config.image_size
        small = functional.interpolate(first[:, 0], size=(side, side), mode="bicubic", antialias=True)
        context = self.clip(small.to(self.clip.dtype)).image_embeds.float().unsqueeze(1)
        rates = torch.tensor([[6.0, 127.0]], device=pixels.device).expand(count, -1)
        added_ids = torch.cat([rates, augmentation.unsqueeze(1)], dim=1)
        return Encoded(clean, image, context, added_ids)

    def encode(self, pixels: Tensor) -> Tensor:
        """(batch, frames, 3, height, width) to unscaled float32 latents, the posterior's mode."""
        flat = pixels.flatten(0, 1).to(self.vae.dtype)
        parts = flat.split(self.chunk or len(flat))
        latents = torch.cat([self.vae.encode(part).latent_dist.mode() for part in parts])
        return latents.unflatten(0, pixels.shape[:2]).float()


def frozen(size: Size, device: torch.device, half: torch.dtype, chunk: int) -> Frozen:
    from diffusers import AutoencoderKLTemporalDecoder
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    levels = len(size.vae["block_out_channels"])
    with device:
        vae = AutoencoderKLTemporalDecoder(down_block_types=("DownEncoderBlock2D",) * levels, **size.vae)
        settings = CLIPVisionConfig(projection_dim=size.context, hidden_act="gelu", **size.clip)
        clip = CLIPVisionModelWithProjection(settings)
    del vae.decoder  # training does not decode
    return Frozen(*(model.to(half).requires_grad_(False).eval() for model in (vae, clip)), chunk)


def choose_parameters(
    unet: nn.Module, train: str, rank: int, base: torch.dtype, adapter: torch.dtype, fused: bool = False, part: str = ""
) -> None:
    """`all`: every parameter in its dtype. `lora`: a frozen base in `base`, adapters in `adapter` on all attention
    layers, or those with `part` in their names, with PEFT's own forward or the fused one.
    """
    if train == "all":
        return
    from peft import LoraConfig, inject_adapter_in_model

    unet.requires_grad_(False)
    unet.to(base)
    names = [name for name, _ in unet.named_modules() if name.endswith(ATTENTION) and part in name]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), unet)
    for parameter in trained(unet):
        parameter.data = parameter.data.to(adapter)
    if fused:
        from inflate.adapters.fused import fuse

        for module in unet.modules():
            fuse(module)


def freeze_inert(side: Side) -> None:
    """On our side, freeze what a one-token context gives no gradient, which lets the model leave it out."""
    if side.name == "inflate":
        for parameter in side.unet.inert_parameters().values():
            parameter.requires_grad_(False)


def trained(unet: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def set_policy(side: Side, policy: str) -> None:
    """Apply one of POLICIES; the temporal layers stay in training mode as in a real step."""
    side.unet.train()
    if policy == "none":
        return
    if policy == "own" or side.name == "inflate":
        side.unet.enable_gradient_checkpointing()
        return
    from diffusers.models.resnet import SpatioTemporalResBlock
    from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel

    for module in side.unet.modules():
        if isinstance(module, SpatioTemporalResBlock | TransformerSpatioTemporalModel):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


# ---- --tiny and --full: equal loss, then time


def compare_losses(pair: tuple[Side, Side], batch: Batch) -> float:
    """Print the two losses of one batch in fp32 and their difference, which is returned."""
    values = []
    for side in pair:
        side.unet.eval()
        with torch.no_grad():
            values.append(float(side.loss(side.unet, batch)))
    difference = abs(values[0] - values[1])
    theirs, ours = values
    print(f"  equal loss on equal noise: diffusers {theirs:.7f}  inflate {ours:.7f}  difference {difference:.1e}")
    if not difference <= 1e-4 * abs(values[0]):
        raise SystemExit("  the two sides compute different losses: timing them would mean nothing")
    return difference


class Stepper:
    """One side's optimiser and step, timed."""

    def __init__(self, side: Side, encoders: Callable[[Tensor, int], Batch], half: torch.dtype) -> None:
        self.side, self.encoders, self.half = side, encoders, half
        self.parameters = trained(side.unet)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=1e-2)

    def step(self, pixels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """One training step; the loss and the gradient norm."""
        batch = self.encoders(pixels, seed)
        with torch.autocast(pixels.device.type, dtype=self.half, enabled=self.half != torch.float32):
            loss = self.side.loss(self.side.unet, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def timed(self, pixels: Tensor, seed: int) -> dict[str, float]:
        """Seconds by the wall and by the processor, the loss, and the step's GPU memory in GB over what was there."""
        cuda = pixels.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated() if cuda else 0
        wall, processor = time.perf_counter(), time.process_time()
        loss, _ = self.step(pixels, seed)
        if cuda:
            torch.cuda.synchronize()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        peak = (torch.cuda.max_memory_allocated() - resident) / 1e9 if cuda else 0.0
        return {"wall": wall, "processor": processor, "peak_gb": peak, "loss": float(loss)}


def time_pairs(steppers: list[Stepper], pixels: Tensor, pairs: int) -> dict[str, Any]:
    """Step both sides alternately, the first place changing hands, and summarise the paired ratios (ours / theirs)."""
    rows: list[list[dict[str, float]]] = []
    for number in range(pairs):
        order = [0, 1] if number % 2 == 0 else [1, 0]
        timed = {place: steppers[place].timed(pixels, number) for place in order}
        rows.append([timed[0], timed[1]])
    clock = "wall" if pixels.device.type == "cuda" else "processor"
    ratios = sorted(ours[clock] / theirs[clock] for theirs, ours in rows)
    return {
        "clock": clock,
        "pairs": pairs,
        "diffusers_s": statistics.median(theirs[clock] for theirs, _ in rows),
        "inflate_s": statistics.median(ours[clock] for _, ours in rows),
        "diffusers_peak_gb": max(theirs["peak_gb"] for theirs, _ in rows),
        "inflate_peak_gb": max(ours["peak_gb"] for _, ours in rows),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }


def measure(args: argparse.Namespace, shape: Shape, train: str, policy: str) -> dict[str, Any]:
    """Build both sides, show their losses equal, time them; one case of the result file."""
    frames, height, width = shape
    device, half, size = torch.device(args.device), HALF[args.half], TINY if args.tiny else FULL
    pair, encoders = sides(size, device), frozen(size, device, half, args.encode_chunk)
    pixels = torch.rand(args.batch, frames, 3, height, width, device=device) * 2 - 1
    print(f"{train}, {frames}x{height}x{width}, policy {policy} ({POLICIES[policy]})", flush=True)
    difference = compare_losses(pair, encoders(pixels, 0))
    for side in pair:
        choose_parameters(side.unet, train, args.rank, half, torch.float32)
        if args.inert == "freeze":
            freeze_inert(side)
        set_policy(side, policy)
    if train == "lora":
        copy_weights(pair[0].unet, pair[1].unet)  # adapters are born random, in another order on each side
    steppers = [Stepper(side, encoders, half) for side in pair]
    first = [tuple(float(value) for value in stepper.step(pixels, 0)) for stepper in steppers]
    print(f"  first step, loss and gradient norm: diffusers {first[0]}  inflate {first[1]}", flush=True)
    result = time_pairs(steppers, pixels, args.pairs)
    print(describe(result), flush=True)
    case = {"train": train, "shape": list(shape), "policy": policy, "batch": args.batch, "half": args.half}
    counts = [sum(parameter.numel() for parameter in stepper.parameters) for stepper in steppers]
    return case | {"trained": counts, "loss_difference": difference, "first_step": first} | result


def describe(result: dict[str, Any]) -> str:
    low, high = result["ratio_quartiles"]
    theirs, ours = result["diffusers_peak_gb"], result["inflate_peak_gb"]
    return (
        f"  diffusers {result['diffusers_s']:.4f} s  inflate {result['inflate_s']:.4f} s ({result['clock']} clock)  "
        f"median of {result['pairs']} paired ratios {result['ratio']:.3f} (quartiles {low:.3f} to {high:.3f})"
        + (f"  step memory {theirs:.2f} and {ours:.2f} GB" if theirs else "")
    )


def measured_cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for shape in args.shapes:
        for train in args.train:
            for policy in args.policy:
                try:
                    yield measure(args, shape, train, policy)
                except torch.cuda.OutOfMemoryError as error:
                    print(f"  out of memory: {error}", flush=True)
                    yield {"train": train, "shape": list(shape), "policy": policy, "out_of_memory": True}
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.empty_cache()


# ---- --arms: what each measure gains


@dataclass
class Arm:
    """One way to take the same LoRA step."""

    side: Side
    cached: bool = False
    autocast: bool = True


def cache(arm: Arm) -> None:
    arm.cached = True


def leave_autocast(arm: Arm) -> None:
    arm.autocast = False


def fuse_lora(arm: Arm) -> None:
    from inflate.adapters.fused import fuse

    for module in arm.side.unet.modules():
        fuse(module)


def recompute(arm: Arm) -> None:
    arm.side.unet.enable_gradient_checkpointing()


def channels_last(arm: Arm) -> None:
    for module in arm.side.unet.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)


def compile_blocks(arm: Arm) -> None:
    from inflate.training.compiling import Compilation

    Compilation([arm.side.unet])


MEASURES: dict[str, Callable[[Arm], None]] = {
    "cached latents": cache,
    "fused LoRA": fuse_lora,
    "half precision without autocast": leave_autocast,
    "constant cross-attention": lambda arm: freeze_inert(arm.side),
    "units recomputed": recompute,
    "channels last": channels_last,
    "compiled blocks": compile_blocks,
}
"""What our side can do; each has an arm of its own."""
DEFAULTS = ("cached latents", "fused LoRA", "half precision without autocast", "constant cross-attention")
BASELINE, CHECKPOINTED = "diffusers", "diffusers, its checkpointing"


def ways(chosen: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The measures of each arm of ours, by its name; the first does the baseline's work."""
    chosen = tuple(chosen)
    defaults = tuple(name for name in DEFAULTS if name in chosen)
    compiled = {"defaults, compiled": (*defaults, "compiled blocks")} if "compiled blocks" in chosen else {}
    return {"equal work": (), **{name: (name,) for name in chosen}, "defaults": defaults, **compiled}


def make_arms(args: argparse.Namespace, size: Size, device: torch.device) -> dict[str, Arm]:
    """All arms, with equal weights, ready to step."""
    half, plain = HALF[args.half], args.half == "fp32"
    arms = {}
    wanted = {name: found for name, found in ways(args.measures).items() if name in (args.only or (name,))}
    for name, measures in {BASELINE: (), CHECKPOINTED: ("units recomputed",), **wanted}.items():
        pair = sides(size, device)
        for side in pair:
            choose_parameters(side.unet, "lora", args.rank, torch.float32 if plain else half, torch.float32)
            torch.manual_seed(1)
            for parameter in trained(side.unet):  # a LoRA is born without effect: nothing could be compared
                nn.init.normal_(parameter, std=0.02)
        copy_weights(pair[0].unet, pair[1].unet)
        arms[name] = Arm(pair[0 if name in (BASELINE, CHECKPOINTED) else 1])
        arms[name].side.unet.train()
        for measure in measures:
            MEASURES[measure](arms[name])
    return arms


def encoding_share(size: Size, shape: Shape) -> float:
    """FLOPs of encoding a clip over those of a forward pass of diffusers' UNet, counted on the meta device."""
    from inflate.training.memory import Ledger, fused_attention

    meta = torch.device("meta")
    encoders, batch = frozen(size, meta, torch.float32, 0), meta_batch(size, shape, 1)
    with meta:
        unet = public_unet(size).to(meta)
    counts = []
    with torch.no_grad(), fused_attention():
        for work in (
            lambda: encoders.encode(torch.empty(1, 1 + shape[0], 3, *shape[1:], device=meta)),
            lambda: encoders.clip(torch.empty(1, 3, *[encoders.clip.config.image_size] * 2, device=meta)),
            lambda: public_loss(unet, batch),
        ):
            with Ledger() as ledger:
                work()
            counts.append(ledger.flops)
    return (counts[0] + counts[1]) / counts[2]


def run_arms(args: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """Step all arms in turn, each round in another order, on equal clips and noise; one case of the result file."""
    frames, height, width = shape
    device, half, size = torch.device(args.device), HALF[args.half], SIZES[args.size]
    share = encoding_share(size, shape)
    print(f"FLOPs of encoding over a forward pass: {share:.3f}; SVD-XT: {ENCODING_SHARE:.3f}", flush=True)
    encoders = frozen(size, device, half, args.encode_chunk)
    torch.manual_seed(2)
    pixels = torch.rand(args.batch, frames, 3, height, width, device=device) * 2 - 1
    kept = [encoders.encoded(pixels, seed) for seed in range(args.pairs + 1)]

    def read(_: Tensor, seed: int) -> Batch:
        return encoders.noised(kept[seed], seed)

    arms = make_arms(args, size, device)
    steppers = {
        name: Stepper(arm.side, read if arm.cached else encoders, half if arm.autocast else torch.float32)
        for name, arm in arms.items()
    }
    losses = {name: [float(stepper.step(pixels, args.pairs)[0])] for name, stepper in steppers.items()}
    rows = []
    for number in range(args.pairs):
        order = sorted(steppers, key=lambda name: (list(steppers).index(name) + number) % len(steppers))
        rows.append({name: steppers[name].timed(pixels, number) for name in order})
        for name, timed in rows[-1].items():
            losses[name].append(timed.pop("loss"))
    found = {name: arm_figures(name, rows, losses, "wall" if device.type == "cuda" else "processor") for name in arms}
    print(table_of(found), flush=True)
    return {"shape": list(shape), "size": args.size, "half": args.half, "rounds": args.pairs} | {
        "encoding share": share, "encoding share of SVD-XT": ENCODING_SHARE, "arms": found,
    }  # fmt: skip


def arm_figures(
    name: str, rows: list[dict[str, dict[str, float]]], losses: dict[str, list[float]], clock: str
) -> dict[str, Any]:
    """Times as paired ratios (baseline / arm, above 1 is faster), and the largest relative difference of losses."""
    ratios = sorted(row[BASELINE][clock] / row[name][clock] for row in rows)
    checkpointed = sorted(row[CHECKPOINTED][clock] / row[name][clock] for row in rows)
    apart = [abs(ours / theirs - 1) for ours, theirs in zip(losses[name], losses[BASELINE], strict=True)]
    return {
        "seconds": statistics.median(row[name][clock] for row in rows),
        "times as fast": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "times as fast as diffusers with its checkpointing": statistics.median(checkpointed),
        "largest difference of losses": max(apart),
        "peak_gb": max(row[name]["peak_gb"] for row in rows),
    }


def table_of(found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, each in found.items():
        (low, high), beside = each["quartiles"], each["times as fast as diffusers with its checkpointing"]
        apart = each["largest difference of losses"]
        lines.append(f"| {name} | {each['times as fast']:.2f} ({low:.2f} to {high:.2f}) | {beside:.2f} | {apart:.0e} |")
    head = "| LoRA step | times as fast as diffusers (quartiles) | with its checkpointing | losses apart by |"
    return "\n".join([head, "|---|---|---|---|", *lines])


def plot_arms(case: dict[str, Any], path: Path) -> None:
    """Bars of how many times as fast each arm is, with quartiles."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(case["arms"])[::-1]
    values = [case["arms"][name]["times as fast"] for name in names]
    ends = [case["arms"][name]["quartiles"] for name in names]
    spans = [[max(v - low, 0) for v, (low, _) in zip(values, ends, strict=True)]]
    spans.append([max(high - v, 0) for v, (_, high) in zip(values, ends, strict=True)])
    figure, axes = pyplot.subplots(figsize=(7, 0.4 * len(names) + 1), layout="constrained")
    axes.barh(names, values, xerr=spans, color="tab:blue", ecolor="black")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel(f"times as fast as diffusers, {'x'.join(map(str, case['shape']))}, higher is better")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def arm_cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for shape in args.shapes:
        yield run_arms(args, shape)


# ---- --simulate: memory and FLOPs without a GPU


def meta_batch(size: Size, shape: Shape, count: int) -> Batch:
    """The step's inputs on the meta device."""
    frames, height, width = shape
    empty = partial(torch.empty, device="meta")
    latents = (count, frames, 4, height // 8, width // 8)
    ids = empty(count, 3)
    return Batch(empty(latents), empty(latents), empty(latents), empty(count), empty(count, 1, size.context), ids)


def simulate_side(
    side: Side, batch: Callable[[], Batch], args: argparse.Namespace, train: str, policy: str, fused: bool = False
) -> Any:
    """The Estimate of one side's step in pure bf16, or with a fused LoRA in float32; its network is on meta."""
    from inflate.training.memory import simulate

    side.unet.to(torch.bfloat16)
    choose_parameters(side.unet, train, args.rank, torch.bfloat16, torch.float32 if fused else torch.bfloat16, fused)
    if args.inert == "freeze":
        freeze_inert(side)
    set_policy(side, policy)
    return simulate(side.unet, lambda: vars(batch()), lambda unet, given: side.loss(unet, Batch(**given)))


def simulate_case(args: argparse.Namespace, shape: Shape, train: str, policy: str) -> list[dict[str, Any]]:
    """Both sides' simulated step; prints a line per side and the ratio of the activation peaks."""
    from inflate.training.memory import held_table

    size, rows = SIZES[args.size], []
    print(f"{train}, {'x'.join(map(str, shape))}, policy {policy} ({POLICIES[policy]}), bf16", flush=True)
    for side in sides(size, torch.device("meta")):
        start = time.perf_counter()
        estimate = simulate_side(side, partial(meta_batch, size, shape, args.batch), args, train, policy)
        figures = {key: value for key, value in asdict(estimate).items() if key != "holdings"}
        rows.append({"side": side.name, "train": train, "shape": list(shape), "policy": policy, **figures})
        print(
            f"  {side.name:10s} trained {estimate.trained / 1e6:.2f} M  held {estimate.held / 1e9:.2f} GB  "
            f"activation peak {estimate.activation_peak / 1e9:.2f} GB  "
            f"forward {estimate.forward_flops / 1e12:.2f} TFLOP  "
            f"step/forward {estimate.flops / estimate.forward_flops:.2f}  ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
        if args.table:
            print(held_table(estimate, args.table))
    ratio = rows[1]["activation_peak"] / rows[0]["activation_peak"]
    print(f"  activation peak, inflate / diffusers: {ratio:.3f}", flush=True)
    return rows


def simulated_cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for shape in args.shapes:
        for train in args.train:
            for policy in args.policy:
                yield from simulate_case(args, shape, train, policy)


# ---- the command


def quiet() -> None:
    """Leave out diffusers' remark on every change of dtype."""
    from diffusers.utils import logging

    logging.set_verbosity_error()


def parse_shape(text: str) -> Shape:
    """FRAMESxHEIGHTxWIDTH."""
    numbers = text.split("x")
    if len(numbers) != 3 or not all(number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text} is not FRAMESxHEIGHTxWIDTH, such as 25x576x1024")
    frames, height, width = (int(number) for number in numbers)
    return frames, height, width


def parser() -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = own.add_mutually_exclusive_group(required=True)
    for name in ("tiny", "full", "arms", "simulate"):
        mode.add_argument(f"--{name}", action="store_true")
    own.add_argument("--shapes", nargs="+", type=parse_shape, help="FRAMESxHEIGHTxWIDTH in pixels")
    own.add_argument("--train", nargs="+", choices=["all", "lora"], default=["all", "lora"])
    policies = "; ".join(f"{name}: {meaning}" for name, meaning in POLICIES.items())
    own.add_argument("--policy", nargs="+", choices=list(POLICIES), help=policies)
    inert = "queries, keys and norm of cross-attention, which one context token gives no gradient, on our side"
    own.add_argument("--inert", choices=["train", "freeze"], default="train", help=inert)
    own.add_argument("--only", nargs="+", help="arms of ours to run, by the names in the table")
    own.add_argument("--pairs", type=int, help="timed pairs of steps")
    own.add_argument("--rank", type=int, default=16, help="of the LoRA")
    own.add_argument("--batch", type=int, default=1)
    own.add_argument("--half", choices=list(HALF), help="autocast type of a timed run; fp32: none")
    own.add_argument("--encode-chunk", type=int, default=0, help="frames per VAE call; 0: all at once, the common way")
    own.add_argument("--threads", type=int, default=1, help="CPU threads of both sides")
    own.add_argument("--device", help="of a timed run: cpu for --tiny, cuda for --full")
    own.add_argument("--size", choices=list(SIZES), help="model of a simulated run (full) or of arms (middle)")
    own.add_argument(
        "--measures",
        nargs="+",
        choices=list(MEASURES),
        help="of arms; all that the device and the precision have a use for",
    )
    own.add_argument("--table", type=int, default=0, metavar="N", help="simulated run: list N groups of held tensors")
    own.add_argument("--output", type=Path, help="the result file; default in benchmarks/results")
    return own


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the mode."""
    name = "tiny" if args.tiny else "full" if args.full else "arms" if args.arms else "simulated"
    small = args.tiny or args.arms
    args.size = args.size or ("middle" if args.arms else "full")
    real = [(14, 320, 512), (25, 576, 1024)]
    args.shapes = args.shapes or ([(4, 64, 64)] if small else real)
    args.policy = args.policy or (["own"] if args.simulate else ["none", "unit"] if args.tiny else list(POLICIES))
    args.pairs = args.pairs or (15 if small else 8)
    args.half = args.half or ("fp32" if small else "bf16")
    args.device = args.device or ("cpu" if small else "cuda")
    missing = {"compiled blocks": args.device == "cpu", "half precision without autocast": args.half == "fp32"}
    args.measures = args.measures or [name for name in MEASURES if not missing.get(name)]
    args.output = args.output or RESULTS / f"train_step_{name}.json"
    return args


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = complete(parser().parse_args(arguments))
    if not args.simulate and args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device in sight: use --tiny, or --simulate for the real sizes")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # losses are compared in full fp32
    quiet()
    cases = list((simulated_cases if args.simulate else arm_cases if args.arms else measured_cases)(args))
    command = " ".join(["python benchmarks/train_step.py", *arguments])
    write(args.output, record(command, {"threads": args.threads, "cases": cases}))
    for case in cases if args.arms else ():
        plot_arms(case, args.output.with_suffix(".png"))
    print(f"written: {args.output}")


if __name__ == "__main__":
    main()
