"""Decoding clips in a small working set: its memory, how exact it is, and what it costs.

Stable Video Diffusion's decoder on whole clips, by strips of pixel rows (`VideoVAE.stream`), and as diffusers' pipeline
runs it, some frames at a time. Memory and FLOPs are of the real sizes in bf16 on the meta device, with random weights:
decoding; a training step of the temporal layers alone; and a whole step of `recipes/svd_decoder.yaml` under autocast,
perceptual distance, discriminator, optimiser, evaluation and all. Exactness is measured on a small decoder with random
weights; so is time, as the median of paired ratios of processor time.

    python benchmarks/decode.py benchmarks/results/decode.json      some minutes of a core; writes decode.png beside it
    python benchmarks/decode.py benchmarks/results/gpu-decode.json --gpu    decoding alone, measured on a GPU of 40 GB
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from matplotlib.figure import Figure
from torch import Tensor, nn

from inflate.families import svd_files, svd_outline
from inflate.models.vae import VideoVAE
from inflate.planning import Planner
from inflate.tables import aligned
from inflate.training.memory import Ledger, fused_attention, simulate
from record import command, record, write

ROOT = Path(__file__).resolve().parents[1]
SIZES = ((14, 576, 1024), (25, 576, 1024))
NAMED = {"x".join(map(str, size)): size for size in SIZES}
TRAINED = SIZES[0]
CHUNK = 8
"""Frames that diffusers' pipeline decodes together by default."""
GB = 1e9
Decode = Callable[[Tensor], Tensor]


def temporal_alone(vae: nn.Module) -> nn.Module:
    """The network with nothing but the temporal layers of its decoder trained."""
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(any(part in name for part in (".temporal", "time_mixer", "time_conv_out")))
    return vae


def in_chunks(vae: AutoencoderKLTemporalDecoder, latents: Tensor, frames: int) -> Tensor:
    """Latents (F, C, h, w) to pixels (F, 3, H, W) as diffusers' pipeline decodes them."""
    return torch.cat([vae.decode(part, num_frames=len(part)).sample for part in latents.split(frames)])


def ways(vae: VideoVAE, rows: int) -> dict[str, Decode]:
    """How latents (F, C, h, w) are decoded."""
    theirs = svd_files.diffusers_vae(vae)

    def ours(latents: Tensor, rows: int | None) -> Tensor:
        vae.stream(rows)
        return vae.decode(latents[None]).sample[0]  # (F, 3, H, W)

    return {
        "whole": lambda latents: ours(latents, None),
        f"{rows} rows": lambda latents: ours(latents, rows),
        f"diffusers, {CHUNK} frames": lambda latents: in_chunks(theirs, latents, CHUNK),
    }


# --- memory -----------------------------------------------------------------------------------------------------------


def published() -> VideoVAE:
    """Stable Video Diffusion's autoencoder in bf16, without memory."""
    vae: VideoVAE = svd_outline.outline("stabilityai/stable-video-diffusion-img2vid", None, TRAINED[0]).vae
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return vae


def latents_of(size: tuple[int, int, int]) -> Tensor:
    """Latents (F, 4, h, w) without memory."""
    frames, height, width = size
    return torch.empty(frames, 4, height // 8, width // 8, dtype=torch.bfloat16, device="meta")


def decoding(size: tuple[int, int, int], rows: int) -> list[dict[str, Any]]:
    """What decoding needs beside the weights."""
    found = []
    vae = published()
    for way, decode in ways(vae, rows).items():
        ledger, given = Ledger(workspaces=True), latents_of(size)
        ledger.record([*vae.parameters(), given])
        before = ledger.current
        with torch.no_grad(), fused_attention(), ledger:
            decode(given)
        found.append({"way": way, "GB": (ledger.peak - before) / GB, "TFLOP": ledger.flops / 1e12})
    return found


def training(rows: int) -> list[dict[str, Any]]:
    """What a training step of the temporal layers needs beside the weights, without losses or optimiser."""
    ours, theirs = published(), svd_files.diffusers_vae(published())

    def prepared(vae: Any, rows: int | None = None, recompute: bool = False) -> nn.Module:
        vae.enable_gradient_checkpointing() if recompute else vae.disable_gradient_checkpointing()
        if isinstance(vae, VideoVAE):
            vae.stream(rows)
        return temporal_alone(vae).train()

    def ours_loss(vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(latents[None]).sample.mean()

    def their_loss(vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(latents, num_frames=len(latents)).sample.mean()

    arms = {
        "whole": (ours, {}, ours_loss), "diffusers, recomputed": (theirs, {"recompute": True}, their_loss),
        "whole, recomputed": (ours, {"recompute": True}, ours_loss), f"{rows} rows": (ours, {"rows": rows}, ours_loss),
    }  # fmt: skip
    found = []
    for way, (vae, settings, loss) in arms.items():
        cost = simulate(prepared(vae, **settings), lambda: latents_of(TRAINED), loss)
        found.append({"way": way, "GB": cost.activation_peak / GB, "TFLOP": cost.flops / 1e12})
    return found


def stage(rows: int) -> list[dict[str, Any]]:
    """What a run of the recipe needs in all, cached, by phase."""
    frames, height, width = TRAINED
    sources = [str(ROOT / "recipes" / "svd_decoder.yaml"), "data.cache=cache", "training.accumulate=1"]
    sources += [f"data.frames={frames}", f"data.height={height}", f"data.width={width}"]
    planner = Planner(ROOT / "recipes" / "svd_finetune.py", sources)
    arms = {
        "as asked": {}, "recomputed": {"memory.recompute": "units"}, f"{rows} rows": {"memory.decode_rows": rows},
        f"{rows} rows, whole decoder": {"memory.decode_rows": rows, "decoder.trainable": "decoder"},
    }  # fmt: skip
    found = []
    for way, changes in arms.items():
        cost = planner.cost(changes)
        phases = {phase: peak / GB for phase, peak in cost.peaks.items()}
        found.append({"way": way, "GB": cost.peak / GB, "TFLOP": cost.flops / 1e12, "phases": phases})
    return found


@torch.no_grad()
def measured(size: tuple[int, int, int], rows: int) -> list[dict[str, Any]]:
    """What decoding needs on a GPU beside the weights, by its allocator, and how long the second time takes."""
    vae = published().to_empty(device="cuda")
    for parameter in vae.parameters():
        parameter.normal_(0, 0.02)
    found, latents = [], torch.randn_like(latents_of(size), device="cuda")
    for way, decode in ways(vae, rows).items():
        decode(latents)
        torch.cuda.reset_peak_memory_stats()
        before, begun = torch.cuda.memory_allocated(), torch.cuda.Event(enable_timing=True)
        ended = torch.cuda.Event(enable_timing=True)
        begun.record()
        decode(latents)
        ended.record()
        ended.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / GB
        found.append({"way": way, "GB": peak, "seconds": begun.elapsed_time(ended) / 1000})
    return found


# --- exactness and time -----------------------------------------------------------------------------------------------


def small(dtype: torch.dtype) -> VideoVAE:
    """A decoder of the published shape, an eighth as wide in most places, whose temporal layers take part."""
    torch.manual_seed(0)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    image = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), layers_per_block=2, latent_channels=4, use_post_quant_conv=False, **kinds
    )
    vae = VideoVAE.from_2d(image)
    for parameter in vae.parameters():
        parameter.data = (parameter.data + 0.02 * torch.randn_like(parameter)).to(dtype)
    return temporal_alone(vae)


def drawn(dtype: torch.dtype, frames: int, scale: int = 1) -> Tensor:
    """Random latents (F, 4, 6, 8), or of a multiple of that height and width."""
    return torch.randn(
        frames, 4, 6 * scale, 8 * scale, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)


def gradients(vae: VideoVAE, decode: Decode, latents: Tensor) -> Tensor:
    """Of the temporal layers, as one vector, for a loss that weights each pixel differently."""
    vae.zero_grad()
    pixels = decode(latents)
    (pixels * torch.linspace(-1, 1, pixels.numel(), dtype=pixels.dtype).view_as(pixels)).sum().backward()
    return torch.cat([value.grad.flatten() for value in vae.temporal_parameters().values() if value.grad is not None])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def exactness(rows: int, frames: int) -> list[dict[str, Any]]:
    """Differences from decoding whole clips, over the norm of what they give."""
    found = []
    for dtype in (torch.float64, torch.float32):
        vae, latents = small(dtype), drawn(dtype, frames)
        whole, *others = ways(vae, rows).items()
        with torch.no_grad():
            pixels = {way: decode(latents) for way, decode in (whole, *others)}
        truth = gradients(vae, whole[1], latents)
        for way, decode in others:
            exact = "diffusers" not in way  # of their class, the weights are others
            difference = relative(gradients(vae, decode, latents), truth) if exact else None
            row = {"way": way, "type": str(dtype).split(".")[-1], "pixels": relative(pixels[way], pixels["whole"])}
            found.append({**row, "gradients": difference})
    return found


def seconds(function: Callable[[], Any]) -> float:
    """Processor time."""
    begun = time.process_time()
    function()
    return time.process_time() - begun


def times(rows: int, frames: int, pairs: int) -> dict[str, Any]:
    """Processor time by strips to that of whole clips: median and quartiles of paired ratios."""
    vae, latents = small(torch.float32), drawn(torch.float32, frames, scale=2)
    whole, strips, _ = ways(vae, rows).values()
    quiet = torch.no_grad()
    work = {"decoding": lambda decode: quiet(decode)(latents), "training": lambda one: gradients(vae, one, latents)}
    found: dict[str, Any] = {"pairs": pairs}
    for name, function in work.items():
        ratios = []
        for number in range(pairs + 1):
            order = (strips, whole) if number % 2 else (whole, strips)
            taken = {id(decode): seconds(lambda: function(decode)) for decode in order}  # noqa: B023 -- called at once
            ratios.append(taken[id(strips)] / taken[id(whole)])
        low, median, high = statistics.quantiles(ratios[1:], n=4)
        found[name] = {"ratio": round(median, 3), "quartiles": [round(low, 3), round(high, 3)]}
    return found


# --- what is told -----------------------------------------------------------------------------------------------------


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Rows of one section."""
    names = [name for name in rows[0] if name != "phases"]
    lines = aligned([names, *([_shown(row[name]) for name in names] for row in rows)])
    return "\n".join([title, *lines, ""])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if value < 0.01 else f"{value:.2f}"
    return "-" if value is None else str(value)


def draw(path: Path, sections: dict[str, list[dict[str, Any]]]) -> None:
    """Memory by section and way."""
    figure = Figure(figsize=(3.6 * len(sections), 3.2), layout="constrained")
    for place, (title, rows) in enumerate(sections.items(), 1):
        axes = figure.add_subplot(1, len(sections), place)
        bars = axes.barh([row["way"] for row in rows], [row["GB"] for row in rows])
        axes.bar_label(bars, fmt="%.1f", padding=2)
        axes.set(title=title, xlabel="GB", xlim=(0, 1.2 * max(row["GB"] for row in rows)))
        axes.invert_yaxis()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, default=16, help="pixel rows of a strip")
    parser.add_argument("--frames", type=int, default=12, help="of the small clip")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--gpu", action="store_true", help="measure decoding there, and nothing else")
    arguments = parser.parse_args()
    result = on_gpu(arguments) if arguments.gpu else simulated(arguments)
    write(arguments.output, record(command("OUT.json"), result))
    draw(arguments.output.with_suffix(".png"), result["memory"])


def on_gpu(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decoding as a GPU does it."""
    memory = {f"decoding {name}": measured(size, arguments.rows) for name, size in NAMED.items()}
    for title, rows in memory.items():
        print(table(title, rows), flush=True)
    return {"rows": arguments.rows, "memory": memory}


def simulated(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is known without a GPU."""
    memory = {f"decoding {name}": decoding(size, arguments.rows) for name, size in NAMED.items()}
    memory[f"training {next(iter(NAMED))}"] = training(arguments.rows)
    exact = exactness(rows=5, frames=arguments.frames)
    for title, rows in {**memory, "relative differences": exact}.items():
        print(table(title, rows), flush=True)
    taken = times(24, arguments.frames, arguments.pairs)
    print("processor time to that of whole clips", taken, flush=True)
    memory[f"stage decoder {next(iter(NAMED))}"] = stage(arguments.rows)
    print(table("stage decoder", memory[f"stage decoder {next(iter(NAMED))}"]), flush=True)
    return {"rows": arguments.rows, "memory": memory, "relative differences": exact, "time": taken}


if __name__ == "__main__":
    main()
