"""What each process of a full fine-tune of Stable Video Diffusion's UNet holds, by how the launcher spreads weights.

Random weights, random latents, bf16 autocast, activations recomputed, AdamW; nothing is downloaded. Every process
tells, in bytes of its GPU: what it holds between steps, and the peak of a step. A run ends with a checkpoint, of which
about 18 GB lie on the main process's CPU and in a temporary folder meanwhile.

    accelerate launch --quiet --config_file recipes/accelerate/fsdp2.yaml --num_processes 2 \
        benchmarks/sharded_memory.py --output benchmarks/results/sharded_memory_fsdp2.json
    ACCELERATE_USE_CPU=true accelerate launch ... --tiny    the same on CPUs, where only elements are counted
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that is not installed will do

from train_step import FULL, TINY, Shape, our_unet, parse_shape  # noqa: E402

from inflate.objectives import EDM  # noqa: E402
from inflate.training.image_to_video import choose_trainable  # noqa: E402
from inflate.training.loop import fit  # noqa: E402
from inflate.training.noise import Noise  # noqa: E402
from inflate.training.player import Player  # noqa: E402
from inflate.training.processes import join_processes  # noqa: E402
from inflate.training.settings import Training  # noqa: E402
from inflate.training.sharding import own, spread  # noqa: E402
from record import command, record, write  # noqa: E402

STEPS = 5


class Clips:
    """Numbers alone: the latents are drawn from them."""

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, number: int) -> dict[str, int]:
        return {"number": number}


class Measured:
    """The UNet as a task; `seen`: what this process held when the last step began, and its peak since the first."""

    def __init__(self, tiny: bool, shape: Shape) -> None:
        self.size, self.shape = TINY if tiny else FULL, shape
        unet = our_unet(self.size)
        unet.enable_gradient_checkpointing()
        choose_trainable(unet, "all")
        self.players = [Player("unet", unet, self.loss)]
        self.frozen: list[Any] = []
        self.objective = EDM(P_mean=0.7, P_std=1.6)
        self.seen: dict[str, float] = {}
        self.begun = 0.0

    def loss(self, batch: dict[str, Any], noise: Noise, step: int) -> Any:
        self.look(step)
        frames, height, width = self.shape
        latents = (frames, 4, height // 8, width // 8)
        clean, added, image = (noise.normal(name, *latents) for name in ("clean", "noise", "image"))  # (1, F, 4, h, w)
        context, ids = noise.normal("context", 1, self.size.context), noise.normal("ids", 3)

        def predict(sample: Tensor, timestep: Tensor) -> Tensor:
            sample = torch.cat([sample, image], dim=2)  # (1, F, 8, h, w)
            return self.players[0].network(sample, timestep, context, ids).sample

        return self.objective.loss(predict, clean, self.objective.sigma(noise.normal("sigma")), added), {}

    def look(self, step: int) -> None:
        """After a step that warms up, forget its peak; at the last one, note what was seen since."""
        gpu = torch.cuda.is_available()
        if step == 1:
            self.begun = time.monotonic()
            torch.cuda.reset_peak_memory_stats() if gpu else None
        if step == STEPS - 1:
            network = self.players[0].network
            shares = spread(network)
            elements = sum(own(p).numel() for p in shares.values()) or sum(p.numel() for p in network.parameters())
            self.seen = {
                "elements of weights": elements,
                "bytes between steps": torch.cuda.memory_allocated() if gpu else 0,
                "bytes at the peak": torch.cuda.max_memory_allocated() if gpu else 0,
                "seconds per step": (time.monotonic() - self.begun) / (STEPS - 2),
            }

    def evaluate(self) -> dict[str, float]:
        return {}

    def preview(self, folder: Path) -> None:
        """Nothing is shown."""

    def export(self, folder: Path) -> None:
        """Nothing is exported."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--shape", type=parse_shape, help="FRAMESxHEIGHTxWIDTH (default 14x320x512, tiny 4x64x64)")
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    args = parser.parse_args()
    state = join_processes()
    task = Measured(args.tiny, args.shape or ((4, 64, 64) if args.tiny else (14, 320, 512)))
    with TemporaryDirectory() as own_folder:
        [folder] = broadcast_object_list([own_folder])
        run = Training(Path(folder) / "run", steps=STEPS, precision="bf16", workers=0, tracker="none", progress=False)
        fit(task, Clips(), run)
        seen = gather_object([task.seen])
    if state.is_main_process:
        write(args.output, record(command(), {"sharding": str(state.sharding or "whole weights"), "processes": seen}))
        for process, values in enumerate(seen):
            print(f"process {process}: " + ", ".join(f"{value:.4g} {name}" for name, value in values.items()))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
