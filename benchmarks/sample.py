"""Sampling Stable Video Diffusion here and by diffusers' pipeline: the same clip, in what time and in what memory.

Time is measured with the pocket model and the pipeline that loads its export, from the same picture, noise and
settings, decoding and both encoders included: processor time on one thread, run by run in turn, the first place
changing hands. The figure is the median of the paired ratios (ours / theirs, below 1 is faster), with quartiles. The
clips must be equal to 1e-3 or the script stops.

Memory is that of SVD-XT at its native size in bfloat16, worked out on paper (`inflate.training.sampling_cost`): live
tensors, weights included, without kernels' workspaces and CUDA's own share. diffusers' two arms are its default, with
every network on the device, and `enable_model_cpu_offload`, under which each network is there while it works.

    python benchmarks/sample.py benchmarks/results/sample.json      some minutes of a core
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline, UNetSpatioTemporalConditionModel
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from inflate.data.buckets import Bucket
from inflate.families import svd_outline
from inflate.families.svd import SVD
from inflate.models import folders
from inflate.models.precision import cast
from inflate.models.unet import EPSILON_BLOCKS, set_epsilon
from inflate.models.visits import visiting
from inflate.sampling.svd import Sampling, sample
from inflate.training.memory import Ledger, tensors_of
from inflate.training.paper import DEVICE, Paper
from inflate.training.sampling_cost import PARTS, on_paper
from record import command, record, write

XT, NATIVE = "stabilityai/stable-video-diffusion-img2vid-xt", Bucket(25, 576, 1024)
STEPS, SIDE, SEED = 4, 64, 3
EQUAL = 1e-3
GB = 1e9


# --- time -------------------------------------------------------------------------------------------------------------


def pair(folder: Path) -> tuple[SVD, StableVideoDiffusionPipeline]:
    """The pocket model, with diffusers' epsilon of the norms, and the pipeline of its export."""
    ours = SVD.load("pocket-svd")
    for block in (*ours.unet.down_blocks, *ours.unet.up_blocks):
        if isinstance(block, EPSILON_BLOCKS):
            set_epsilon(block, 1e-6)
    ours.save_pretrained(folder)
    pipeline = StableVideoDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return ours, pipeline


def runs(ours: SVD, pipeline: StableVideoDiffusionPipeline) -> dict[str, Callable[[], Tensor]]:
    """What draws the clip (1, F, 3, H, W) in [0, 1], by name."""
    draw = torch.Generator().manual_seed(SEED)
    picture = (torch.rand(SIDE, SIDE, 3, generator=draw) * 255).byte()
    image = Image.fromarray(picture.numpy())
    pixels = picture.permute(2, 0, 1)[None] / 127.5 - 1
    settings = Sampling(steps=STEPS, fps=8, motion_bucket=90, noise_aug=0.05, seed=SEED)

    def theirs() -> Tensor:
        drawn = pipeline(
            image, height=SIDE, width=SIDE, num_frames=ours.frames, num_inference_steps=STEPS, fps=8,
            motion_bucket_id=90, noise_aug_strength=0.05, decode_chunk_size=ours.decode_chunk,
            generator=torch.Generator().manual_seed(SEED), output_type="pt",
        )  # fmt: skip
        return torch.stack([*drawn.frames])

    def own(little: bool) -> Tensor:
        return (sample(ours, pixels, replace(settings, little_memory=little)) / 2 + 0.5).clamp(0, 1)

    return {"diffusers": theirs, "at once": lambda: own(False), "little memory": lambda: own(True)}


def difference(drawn: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """The largest difference of our clips from diffusers', of values in [0, 1]; ends the script where it is large."""
    clips = {name: draw() for name, draw in drawn.items()}
    found = {name: float((clip - clips["diffusers"]).abs().max()) for name, clip in clips.items()}
    if max(found.values()) > EQUAL:
        raise SystemExit(f"the clips differ: {found}")
    return found


def timed(drawn: dict[str, Callable[[], Tensor]], pairs: int) -> dict[str, Any]:
    """Processor time of each, and the quartiles of its paired ratios to diffusers'."""
    seconds: dict[str, list[float]] = {name: [] for name in drawn}
    for number in range(pairs):
        for name in list(drawn) if number % 2 else list(reversed(drawn)):
            start = time.process_time()
            drawn[name]()
            seconds[name].append(time.process_time() - start)
    table = {name: torch.tensor(values, dtype=torch.float64) for name, values in seconds.items()}
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return {
        name: {"seconds": float(values.median()), "ratio": (values / table["diffusers"]).quantile(quarters).tolist()}
        for name, values in table.items()
    }


# --- memory -----------------------------------------------------------------------------------------------------------


def theirs_on_paper(offload: bool) -> dict[str, int]:
    """Peaks by part of diffusers' networks as its pipeline calls them, guidance's two passes together."""
    outlines = folders.outline(XT)
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel.from_config(
            UNetSpatioTemporalConditionModel.load_config(outlines / "unet")
        )
        vae = AutoencoderKLTemporalDecoder.from_config(AutoencoderKLTemporalDecoder.load_config(outlines / "vae"))
    vision = svd_outline.outline(XT).image_encoder
    cast((unet, vae, vision), "bfloat16")
    paper, ledger = Paper(), Ledger(DEVICE.type, workspaces=True)
    with paper.active(), torch.no_grad(), ledger, visiting([] if offload else [unet, vae, vision], DEVICE):
        for part, network, work in theirs(paper, unet, vae, vision):
            ledger.begin(part)
            with visiting([network], DEVICE):
                ledger.record(tensors_of(network))
                work()
            ledger.begin("other")
    return {part: ledger.peaks[part] for part in PARTS}


def theirs(
    paper: Paper, unet: nn.Module, vae: Any, vision: nn.Module
) -> list[tuple[str, nn.Module, Callable[[], Any]]]:
    """What the pipeline does with each network, by part."""
    frames, height, width = NATIVE.frames, NATIVE.height // 8, NATIVE.width // 8

    def made(*shape: int) -> Tensor:
        return torch.empty_like(paper.empty(*shape, dtype=torch.bfloat16))

    def denoise() -> Any:
        noisy = made(2, frames, 8, height, width)  # (2, F, 2C, h, w)
        return unet(noisy, torch.zeros(2), encoder_hidden_states=made(2, 1, 1024), added_time_ids=made(2, 3)).sample

    return [
        ("embed", vision, lambda: vision(made(1, 3, 224, 224)).image_embeds),
        ("encode", vae, lambda: vae.encode(made(1, 3, NATIVE.height, NATIVE.width)).latent_dist.mode()),
        ("denoise", unet, denoise),
        ("decode", vae, lambda: vae.decode(made(frames, 4, height, width), num_frames=frames).sample.float()),
    ]


def ours_on_paper(little: bool) -> dict[str, int]:
    """Peaks by part of our sampler."""
    family = svd_outline.outline(XT)
    cast(family.parts.values(), "bfloat16")
    return on_paper(family, NATIVE, Sampling(little_memory=little))


def memory() -> dict[str, dict[str, int]]:
    """Peaks by part of each arm, in bytes."""
    return {
        "diffusers": theirs_on_paper(offload=False), "diffusers, model offload": theirs_on_paper(offload=True),
        "at once": ours_on_paper(little=False), "little memory": ours_on_paper(little=True),
    }  # fmt: skip


# --- what is shown ----------------------------------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> str:
    """Both tables as text."""
    lines = [f"{'processor time':26s} {'seconds':>8s} {'ratio':>7s}  quartiles"]
    for name, row in result["time"].items():
        low, middle, high = row["ratio"]
        lines.append(f"{name:26s} {row['seconds']:8.2f} {middle:7.3f}  {low:.3f} to {high:.3f}")
    lines.append(f"\n{'GB on paper':26s} " + " ".join(f"{part:>8s}" for part in (*PARTS, "in all")))
    for name, peaks in result["memory"].items():
        sizes = [*(peaks[part] for part in PARTS), max(peaks.values())]
        lines.append(f"{name:26s} " + " ".join(f"{size / GB:8.2f}" for size in sizes))
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Memory by part of each arm, and paired ratios of time."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    for number, (name, peaks) in enumerate(result["memory"].items()):
        places = [place + 0.2 * number for place in range(len(PARTS))]
        left.bar(places, [peaks[part] / GB for part in PARTS], 0.2, label=name)
    left.set_xticks([place + 0.3 for place in range(len(PARTS))], PARTS)
    left.set_ylabel("GB on paper (lower is better)")
    left.set_title("SVD-XT, 25x576x1024, bfloat16")
    left.legend()
    rows = result["time"]
    right.bar(list(rows), [row["ratio"][1] for row in rows.values()], color="0.6")
    right.axhline(1, color="black", linewidth=0.8)
    right.set_title("processor time / diffusers' (lower is better)")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        drawn = runs(*pair(Path(folder) / "export"))
        result: dict[str, Any] = {"pairs": arguments.pairs, "steps": STEPS, "differs by": difference(drawn)}
        result["time"] = timed(drawn, arguments.pairs)
    result["memory"] = memory()
    print(tables(result))
    write(arguments.output, record(command("OUT.json"), result))
    plot(result, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
