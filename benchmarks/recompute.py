"""What each choice of recomputation costs: memory and FLOPs of one training step, on the meta device, without a GPU.

Stable Video Diffusion's UNet (SVD-XT) as a LoRA of rank 16 on all attention and in full, and one of I2VGen-XL's shape
as that LoRA; batch 1, weights and activations in bf16, what one context token gives no gradient frozen. `held` is kept
from the forward pass for the backward pass; `peak` is the highest use of the step without weights and inputs, and
includes gradients. Kernels' workspaces come on top.

    python benchmarks/recompute.py benchmarks/results/recompute.json      some minutes of a core
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import train_step
from torch import Tensor, nn
from train_step import FULL, Shape, Side, meta_batch, our_loss, our_unet, parse_shape

from inflate.models.unet import MODELSCOPE, VideoUNet
from inflate.training.economy import save_memory
from inflate.training.memory import Estimate, simulate
from inflate.training.memory_settings import Memory
from record import command, record, write

MEASURES = (
    Memory("nothing"), Memory("feed_forward", feed_forward_parts=8), Memory("all_but_attention", feed_forward_parts=8),
    Memory("units"), Memory("units", feed_forward_parts=8), Memory("nested", feed_forward_parts=8),
    Memory("units", feed_forward_parts=8, offload=True), Memory("nested", feed_forward_parts=8, offload=True),
)  # fmt: skip
RANK = 16
TOKENS = 77
"""Of a text."""


@dataclass(frozen=True)
class Case:
    """A model, what learns, and the clips' size."""

    model: str
    """svd or i2vgen"""
    train: str
    """lora or all"""
    shape: Shape


CASES = (
    Case("svd", "lora", (14, 320, 512)), Case("svd", "all", (14, 320, 512)),
    Case("svd", "lora", (25, 576, 1024)), Case("svd", "all", (25, 576, 1024)),
    Case("i2vgen", "lora", (16, 704, 1280)),
)  # fmt: skip


def i2vgen_unet() -> nn.Module:
    """Stable Diffusion 2.1's UNet with the temporal layers of VGen's models."""
    from diffusers import UNet2DConditionModel

    parent = UNet2DConditionModel(
        in_channels=4, block_out_channels=FULL.widths, layers_per_block=2, attention_head_dim=FULL.heads,
        cross_attention_dim=FULL.context, use_linear_projection=True,
    )  # fmt: skip
    return VideoUNet.from_2d(parent, MODELSCOPE)


def text_batch(shape: Shape) -> dict[str, Tensor]:
    """Inputs of a text-to-video step on the meta device."""
    frames, height, width = shape
    empty = partial(torch.empty, device="meta", dtype=torch.bfloat16)
    sample = empty(1, frames, 4, height // 8, width // 8)
    return {"sample": sample, "timestep": empty(1), "encoder_hidden_states": empty(1, TOKENS, FULL.context)}


def mean_square(unet: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss of the prediction alone."""
    loss: Tensor = unet(**batch).sample.float().square().mean()
    return loss


def cost(case: Case, memory: Memory) -> Estimate:
    """The cost of a step."""
    animates = case.model == "svd"
    with torch.device("meta"):
        unet: Any = our_unet(FULL) if animates else i2vgen_unet()
    unet.to(torch.bfloat16)
    train_step.choose_parameters(unet, case.train, RANK, torch.bfloat16, torch.bfloat16)
    if animates:
        train_step.freeze_inert(Side("inflate", unet, our_loss))
    save_memory(unet.train(), memory)
    if not animates:
        return simulate(unet, partial(text_batch, case.shape), mean_square)
    return simulate(
        unet,
        lambda: vars(meta_batch(FULL, case.shape, 1)),
        lambda unet, given: our_loss(unet, train_step.Batch(**given)),
    )


def named(memory: Memory) -> str:
    """A measure in words."""
    parts = [f"{memory.feed_forward_parts} parts"] if memory.feed_forward_parts > 1 else []
    return ", ".join([memory.recompute, *parts, *(["offload"] if memory.offload else [])])


def row(case: Case, memory: Memory) -> dict[str, Any]:
    """A measure's figures, which are printed, too."""
    start, found = time.perf_counter(), cost(case, memory)
    ratio = found.flops / found.forward_flops
    print(
        f"  {named(memory):30s} held {found.held / 1e9:6.2f}  peak {found.activation_peak / 1e9:6.2f} GB  "
        f"FLOPs / forward {ratio:.2f}  ({time.perf_counter() - start:.0f} s)",
        flush=True,
    )
    sizes = {"held": found.held, "activation_peak": found.activation_peak, "gradients": found.gradients}
    return {**asdict(case), **asdict(memory), **sizes, "forward_flops": found.forward_flops, "flops": found.flops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shapes", nargs="+", type=parse_shape, help="only these of the cases")
    arguments = parser.parse_args()
    train_step.quiet()
    torch.manual_seed(0)
    rows = []
    for case in CASES:
        if arguments.shapes and case.shape not in arguments.shapes:
            continue
        print(f"{case.model}, {case.train}, {'x'.join(map(str, case.shape))}", flush=True)
        rows += [row(case, memory) for memory in MEASURES]
        write(arguments.output, record(command("OUT.json"), {"rank": RANK, "cases": rows}))


if __name__ == "__main__":
    main()
