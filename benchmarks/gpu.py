"""The headline figures of one CUDA GPU, in at most eight minutes: training steps, their memory, decoding, sampling.

Random weights, nothing is downloaded. Every part has a share of the time: it measures what fits in, and what does not
is listed as not run, as is what does not fit in memory. The other side is diffusers, as in train_step.py.

    python benchmarks/gpu.py                  writes benchmarks/results/gpu-NAME.json, NAME being the card's
    python benchmarks/gpu.py --tiny OUT.json  the same on a CPU, narrow and small, in seconds
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import train_step
from torch import Tensor, nn
from train_step import Arm, Shape, Side, Size

from record import record, write

MINUTES = 8
STEPS = 5
GIGA = 1e9
Result = dict[str, Any]
TRAINED: dict[str, tuple[bool, tuple[str, ...]]] = {
    "diffusers": (False, ()),
    "diffusers, its checkpointing": (False, ("units recomputed",)),
    "inflate, equal work": (True, ()),
    "inflate, defaults": (True, train_step.DEFAULTS),
    "inflate, defaults, units recomputed": (True, (*train_step.DEFAULTS, "units recomputed")),
    "inflate, defaults, compiled": (True, (*train_step.DEFAULTS, "compiled blocks")),
}
"""LoRA steps by name: whether they are ours, and by which measures of train_step.py."""


class Machine:
    """The device, the sizes and the time that is left."""

    def __init__(self, tiny: bool, minutes: float) -> None:
        self.device = torch.device("cpu" if tiny else "cuda")
        self.size: Size = train_step.TINY if tiny else train_step.FULL
        self.shapes: list[Shape] = [(2, 64, 64)] if tiny else [(14, 320, 512), (25, 576, 1024)]
        self.end = time.monotonic() + 60 * minutes
        self.half = torch.bfloat16

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def timed(self, work: Callable[[], Any], seconds: float) -> Result:
        """Median seconds and peak of the memory in GB, beyond what was there, of a few calls after one to warm up."""
        work()
        self._wait()
        cuda = self.device.type == "cuda"
        before = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        spans: list[float] = []
        while not spans or (len(spans) < STEPS and sum(spans) + spans[-1] < min(seconds, self.left)):
            start = time.perf_counter()
            work()
            self._wait()
            spans.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() - before if cuda else 0
        return {"seconds": statistics.median(spans), "calls": len(spans), "peak_gb": peak / GIGA}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


# ---- the parts


def training(machine: Machine, shape: Shape, seconds: float) -> Result:
    """LoRA steps of rank 16 on all attention, in bf16, each way on its own so that nothing else takes memory."""
    found: Result = {}
    for name, (ours, measures) in TRAINED.items():
        if "compiled blocks" in measures and machine.device.type == "cpu":
            continue
        found[name] = tried(partial(_training, machine, shape, ours, measures, seconds / len(TRAINED)), machine)
    return found


def _training(machine: Machine, shape: Shape, ours: bool, measures: tuple[str, ...], seconds: float) -> Result:
    side = _side(machine, ours)
    train_step.choose_parameters(side.unet, "lora", 16, machine.half, torch.float32)
    arm = Arm(side)
    side.unet.train()
    for measure in measures:
        train_step.MEASURES[measure](arm)
    encoders = train_step.frozen(machine.size, machine.device, machine.half, 5)
    pixels = _noise(machine, 1, shape[0], 3, *shape[1:]).float()
    encoded = encoders.encoded(pixels, 0)

    def batch(pixels: Tensor, seed: int) -> train_step.Batch:
        return encoders.noised(encoded if arm.cached else encoders.encoded(pixels, seed), seed)

    stepper = train_step.Stepper(side, batch, machine.half if arm.autocast else torch.float32)
    losses: list[Tensor] = []
    result = machine.timed(lambda: losses.append(stepper.step(pixels, len(losses))[0]), seconds)
    return result | {"first losses": [float(loss) for loss in losses[:2]]}


def predicted(machine: Machine, shape: Shape, seconds: float) -> Result:
    """The simulated peaks of the same steps, to lay beside the measured ones: gradients included, weights not."""
    found: Result = {}
    for name, recompute in (("inflate, defaults", "none"), ("inflate, defaults, units recomputed", "own")):
        args = train_step.parser().parse_args(["--simulate", "--inert", "freeze"])
        with torch.device("meta"):
            side = Side("inflate", train_step.our_unet(machine.size), train_step.our_loss)
        batch = partial(train_step.meta_batch, machine.size, shape, 1)
        estimate = train_step.simulate_side(side, batch, args, "lora", recompute, fused=True)
        ratio = estimate.flops / estimate.forward_flops
        found[name] = {"peak_gb": estimate.activation_peak / GIGA, "flops / forward": ratio}
    return found


def decoding(machine: Machine, shape: Shape, seconds: float) -> Result:
    """All frames of a clip decoded at once, by equal architectures."""
    from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder

    from inflate.surgery import inflate_vae

    levels, frames = len(machine.size.vae["block_out_channels"]), shape[0]
    down, up = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
    latents = _noise(machine, frames, 4, shape[1] // 8, shape[2] // 8)

    def theirs() -> Result:
        vae = AutoencoderKLTemporalDecoder(down_block_types=down, **machine.size.vae)
        vae.to(machine.device, machine.half).eval()
        return machine.timed(lambda: vae.decode(latents, num_frames=frames), seconds / 2)

    def ours() -> Result:
        parent = AutoencoderKL(down_block_types=down, up_block_types=up, latent_channels=4, **machine.size.vae)
        vae = inflate_vae(parent)[0].to(machine.device, machine.half).eval()
        return machine.timed(lambda: vae.decode(latents.unsqueeze(0)), seconds / 2)

    with torch.no_grad():
        return {name: tried(work, machine) for name, work in (("diffusers", theirs), ("inflate", ours))}


def sampling(machine: Machine, shape: Shape, seconds: float) -> Result:
    """One call of the UNet with guidance, conditional and unconditional in a batch; a sample takes 25 of them."""
    frames, height, width = shape
    context = _noise(machine, 2, 1, machine.size.context)
    sample, ids = _noise(machine, 2, frames, 8, height // 8, width // 8), _noise(machine, 2, 3).abs()

    def once(ours: bool) -> Result:
        unet = _side(machine, ours).unet.to(machine.half).eval()
        return machine.timed(lambda: unet(sample, 0.5, context, ids), seconds / 2)

    with torch.no_grad():
        return {n: tried(partial(once, ours), machine) for n, ours in (("diffusers", False), ("inflate", True))}


PARTS: dict[str, tuple[float, Callable[[Machine, Shape, float], Result]]] = {
    "LoRA steps": (0.6, training),
    "LoRA steps, predicted": (0.1, predicted),
    "sampling": (0.15, sampling),
    "decoding": (0.15, decoding),
}
"""What is measured, each with its share of the time."""


# ---- what they have in common


def _side(machine: Machine, ours: bool) -> Side:
    torch.manual_seed(0)
    make = train_step.our_unet if ours else train_step.public_unet
    with machine.device:
        unet: nn.Module = make(machine.size).to(machine.device)
    loss = train_step.our_loss if ours else train_step.public_loss
    return Side("inflate" if ours else "diffusers", unet, loss)


def _noise(machine: Machine, *shape: int) -> Tensor:
    return torch.randn(shape, device=machine.device).to(machine.half)


def tried(work: Callable[[], Result], machine: Machine) -> Result:
    """What a measurement gives, or why it gives nothing: there is no time left, or not the memory."""
    if machine.left <= 0:
        return {"not run": "no time was left"}
    try:
        return work()
    except torch.cuda.OutOfMemoryError as error:
        return {"not run": f"out of memory: {str(error).splitlines()[0]}"}
    finally:
        gc.collect()
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()


def run(machine: Machine) -> Result:
    """All parts at all sizes, the small one first."""
    found: Result = {}
    total = machine.left
    for shape in machine.shapes:
        for name, (share, part) in PARTS.items():
            place = f"{name}, {'x'.join(map(str, shape))}"
            seconds = total * share / len(machine.shapes)
            found[place] = part(machine, shape, seconds) if machine.left > 0 else {"not run": "no time was left"}
            print(place, flush=True)
            for way, figures in found[place].items():
                print(f"  {way}: {figures}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--tiny", action="store_true", help="narrow models and small clips on the CPU")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for everything")
    args = parser.parse_args(arguments)
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device in sight: use --tiny")
    train_step.quiet()
    name = "tiny" if args.tiny else torch.cuda.get_device_name().lower().replace(" ", "-")
    output = args.output or train_step.RESULTS / f"gpu-{name}.json"
    found = run(Machine(args.tiny, args.minutes))
    write(output, record(f"python benchmarks/gpu.py{' --tiny' if args.tiny else ''}", {"parts": found}))
    print(f"written: {output}")


if __name__ == "__main__":
    main()
