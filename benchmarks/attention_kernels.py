"""Attention over frames, kernel by kernel, and a training step with weights channels last.

On paper: what a layer of Stable Video Diffusion's first level (25 frames of 72x128, 320 channels, bf16) holds and moves
both ways, with rows copied into the order (pixels, frames), as diffusers has them, and read in place. Then the seconds
of a layer, forward and backward, arm by arm in turns; on a GPU of every kernel that runs there. Then a step of the
pocket model, plain and with `training.channels_last`: copies into another order that PyTorch's dispatcher sees, and
seconds.

    python benchmarks/attention_kernels.py benchmarks/results/attention_kernels.json      minutes of a core, or of a GPU
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from inflate.families.svd import SVD
from inflate.layers.frame_attention import FrameAttention, attend_frames_by
from inflate.layers.frame_operator import by_triton
from inflate.training.attention import KERNELS, preferring
from inflate.training.layout import put_channels_last
from inflate.training.memory import Ledger, fused_attention
from record import command, record, write

SHAPE, HEADS = (1, 25, 72 * 128, 320), 5
SMALL = (1, 14, 24 * 24, 320)
COPIES = ("aten.clone", "aten.copy_", "aten._to_copy")


class Rows(nn.Module):
    """Diffusers' attention over rows (pixels, frames), in calls that CUDA's kernels can index."""

    def __init__(self, layer: FrameAttention) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)
        self.layer.__class__ = Attention

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.transpose(1, 2).contiguous().flatten(0, 1)
        output = torch.cat([self.layer(part) for part in rows.split(65_535)])
        return output.unflatten(0, (len(hidden), -1)).transpose(1, 2)


class Traffic(Ledger):
    """A ledger that also adds up what every operation but views reads and writes, and counts copies."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.moved = self.copies = self.copied = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if not func.is_view:
            self.moved += sum(size(each) for each in tree_leaves((args, kwargs, result)))
        if str(func).startswith(COPIES):
            self.copies += 1
            self.copied += size(result)
        return result


def size(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def on_paper(arm: str) -> dict[str, int]:
    """Bytes of a layer on paper."""
    with torch.device("meta"):
        layer: nn.Module = FrameAttention(SHAPE[-1], heads=HEADS, dim_head=SHAPE[-1] // HEADS)
        hidden = torch.empty(SHAPE, dtype=torch.bfloat16).requires_grad_()
    if arm == "triton":
        attend_frames_by(layer, by_triton)
    layer = (Rows(layer) if arm == "rows copied" else layer).to(torch.bfloat16)
    norm = nn.LayerNorm(SHAPE[-1], device="meta", dtype=torch.bfloat16)
    ledger = Traffic("meta")
    ledger.record([*layer.parameters(), *norm.parameters(), hidden])
    start = ledger.current
    with fused_attention(), ledger:
        output = hidden + layer(norm(hidden))
        held = ledger.current - start
        output.backward(torch.empty_like(output))
    return {"held": held, "moved": ledger.moved, "copies": ledger.copies, "copied": ledger.copied}


def arms(device: str) -> Iterator[tuple[str, nn.Module, Any]]:
    """A layer as each arm has it, and the context that it runs in."""
    torch.manual_seed(0)
    layer = FrameAttention(SHAPE[-1], heads=HEADS, dim_head=SHAPE[-1] // HEADS).to(device)
    yield "rows copied", Rows(layer), nullcontext
    yield "in place", layer, nullcontext
    if device == "cuda":
        for name in KERNELS:
            yield name, copy.deepcopy(layer), partial(preferring, name)
        ours = copy.deepcopy(layer)
        attend_frames_by(ours, by_triton)
        yield "triton", ours, nullcontext


def clock(device: str) -> float:
    """Seconds: of the processor, or of the wall once the GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(runs: dict[str, Callable[[], Tensor]], device: str, times: int) -> dict[str, dict[str, Any]]:
    """Median seconds of each run, all in turns after a first go, and its largest difference from the first run.

    Of a run that the first go refuses, as a kernel may on some GPU, it says why.
    """
    found, refused = first_go(runs)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(times):
        for name, taken in seconds.items():
            begun = clock(device)
            runs[name]()
            taken.append(clock(device) - begun)
    first = next(iter(found.values()))
    return refused | {
        name: {"seconds": median(taken), "difference": float((found[name] - first).abs().max() / first.abs().max())}
        for name, taken in seconds.items()
    }


def first_go(runs: dict[str, Callable[[], Tensor]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What each run gives, in float64, and of those that fail why."""
    found, refused = {}, {}
    for name, run in runs.items():
        try:
            found[name] = run().double()
        except RuntimeError as error:
            refused[name] = {"not run": str(error).splitlines()[0]}
    return found, refused


def layers_timed(device: str, times: int) -> dict[str, dict[str, Any]]:
    """A layer, forward and backward; the gradient of its input is compared."""
    shape, half = (SHAPE, torch.bfloat16) if device == "cuda" else (SMALL, torch.float32)
    given = torch.randn(shape, device=device, dtype=half)

    def runner(layer: nn.Module, context: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            hidden = given.clone().requires_grad_()
            with context():
                (hidden + layer(hidden)).backward(given)
            assert hidden.grad is not None
            return hidden.grad

        return run

    return timed({name: runner(layer.to(half), context) for name, layer, context in arms(device)}, device, times)


def steps(device: str, times: int) -> dict[str, dict[str, Any]]:
    """The pocket model's forward and backward pass in both orders of memory."""
    plain = SVD.load("pocket", frames=4).unet.to(device).train()
    for parameter in plain.parameters():  # a layer freshly inflated is zero
        parameter.data += 0.01
    last = copy.deepcopy(plain)
    put_channels_last(last)
    torch.manual_seed(0)
    sample = torch.randn(1, 4, plain.config.in_channels, 32, 32, device=device)
    context = torch.randn(1, 1, plain.config.cross_attention_dim, device=device)

    def runner(unet: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            unet.zero_grad()
            output = unet(sample, 1.0, context, added_time_ids=torch.ones(1, 3, device=device)).sample
            output.square().mean().backward()
            return output.detach()

        return run

    runs = {"plain": runner(plain), "channels last": runner(last)}
    found = timed(runs, device, times)
    for name, run in runs.items():
        with Traffic(device) as traffic:
            run()
        found[name] |= {"copies": traffic.copies, "copied": traffic.copied}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--times", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "on paper": {arm: on_paper(arm) for arm in ("rows copied", "in place", "triton")},
        "layer": layers_timed(device, arguments.times),
        "step": steps(device, arguments.times),
    }
    for part, rows in result.items():
        for arm, values in rows.items():
            told = (f"{name} {value if isinstance(value, str) else f'{value:.6g}'}" for name, value in values.items())
            print(f"{part:9s} {arm:13s}", "  ".join(told), flush=True)
    write(arguments.output, record(command("OUT.json"), result))


if __name__ == "__main__":
    main()
