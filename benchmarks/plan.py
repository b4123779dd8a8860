"""Predicted against measured memory: training steps of the pocket model on paper and on this CPU.

Each case is simulated without memory (`inflate.training.paper`) and then run, once, under PyTorch's profiler, whose
events of the allocator give the true peak. The ledger's own count of the real step's tensors stands between: what it
lacks of the profiler's is what kernels take for themselves.

    python benchmarks/plan.py benchmarks/results/plan.json      some minutes of a core
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from inflate.adapters.settings import AdapterSettings
from inflate.data.clips import collate
from inflate.families.svd import FAMILY, SVD
from inflate.training.adapting import Adapting
from inflate.training.bfloat16 import Narrow
from inflate.training.cost import Cost, Watched, measure, on_paper
from inflate.training.decoder import Decoder, DecoderTask
from inflate.training.economy import save_coding, save_memory
from inflate.training.image_to_video import ImageToVideo, ImageToVideoTask, Preview
from inflate.training.memory import bytes_of
from inflate.training.memory_settings import Memory
from inflate.training.paper import Paper
from inflate.training.settings import Training
from record import command, record, write

FRAMES, SIDE = 4, 64
TARGETS = ["temporal.attn1.to_*"]


@dataclass(frozen=True)
class Case:
    """One setting of a training step."""

    trains: str = "all"
    """all, temporal, adapter, or decoder (the VAE's, against its discriminator)"""
    training: dict[str, Any] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)


RECOMPUTED = Memory(recompute="units")
PURE = {"precision": "pure_bf16"}
LEAN = PURE | {"optimizer": "adamw8bit", "step_in_backward": True, "gradient_clip": 0.0}
CASES = (
    Case(), Case(memory=RECOMPUTED), Case(training={"precision": "bf16"}),
    Case(training={"precision": "bf16"}, memory=RECOMPUTED), Case(training={"batch": 2}), Case(training={"ema": 0.9}),
    Case(training={"accumulate": 4, "precision": "bf16"}), Case("temporal"), Case("temporal", memory=RECOMPUTED),
    Case("temporal", {"precision": "bf16", "batch": 2, "ema": 0.9}),
    Case("adapter"), Case("adapter", memory=RECOMPUTED), Case("adapter", {"precision": "bf16"}),
    Case("adapter", {"batch": 2, "accumulate": 2}, memory=RECOMPUTED),
    Case("decoder"), Case("decoder", memory=Memory(decode_rows=8)),
    Case("decoder", {"precision": "bf16"}, memory=Memory(decode_rows=8)),
    Case("adapter", memory=Memory(base="nf4")), Case("adapter", {"precision": "bf16"}, Memory("units", base="nf4")),
    Case("adapter", {"precision": "bf16"}, Memory(base="bf16")), Case("temporal", memory=Memory(base="int8")),
    Case(training=PURE), Case(training=LEAN), Case("temporal", LEAN), Case("adapter", PURE),
    Case(training={"optimizer": "adamw8bit", "ema": 0.9}),
    Case(training={"channels_last": True}),
    Case("adapter", {"batch": 2}, memory=Memory(encode_frames=1)),
    Case("adapter", {"precision": "bf16"}, memory=Memory("nested", {"down_blocks.*": "all_but_attention"}, 4)),
    Case(memory=Memory("feed_forward")), Case("temporal", LEAN, RECOMPUTED),
)  # fmt: skip


def item(number: int) -> dict[str, Any]:
    """A clip of noise."""
    pixels = torch.rand(FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(number)) * 2 - 1
    told = {"fps": torch.tensor(8.0), "motion": torch.tensor(0.2), "number": torch.tensor(number)}
    return {"pixels": pixels, **told, "caption": "", "name": str(number)}


def prepared(case: Case, paper: Paper | None = None) -> tuple[Watched, Training, dict[str, Any]]:
    """The task, its settings and a batch; on paper where there is one."""
    family = SVD.load("pocket", frames=FRAMES)
    for network in family.parts.values() if paper else ():
        paper.adopt(network)
    training = Training(tracker="none", **case.training)
    batch = dict(collate([item(number) for number in range(training.batch)]))
    batch["pixels"] = paper.like(batch["pixels"]) if paper else batch["pixels"]
    save_coding(family.vae, case.memory)
    task = decoder_task(family, batch) if case.trains == "decoder" else image_to_video_task(case, family)
    return task, training, batch


def decoder_task(family: SVD, batch: dict[str, Any]) -> DecoderTask:
    """The VAE's decoder against its discriminator from the first step on."""
    settings = Decoder(adversarial_start=0, discriminator_channels=16, held_out_clips=1)
    return DecoderTask(family.vae, settings, batch["pixels"], family.save_pretrained)


def image_to_video_task(case: Case, family: SVD) -> ImageToVideoTask:
    """The UNet, or some of it."""
    settings = ImageToVideo(
        trainable="temporal" if case.trains == "temporal" else "all", held_out_clips=1, preview_clips=1,
    )  # fmt: skip
    adapter = None
    if case.trains == "adapter":
        wanted = AdapterSettings(kind="lora", rank=4, targets=TARGETS)
        family.unet.requires_grad_(False)
        for parameter in family.unet.parameters():  # a layer freshly inflated is zero, and would be refused
            parameter.data += 0.01
        adapter = Adapting.on(family.unet, wanted, FAMILY, "pocket-svd", 0)
    task = ImageToVideoTask(family, settings, [collate([item(0)])], Preview(steps=1), 1e-4, 0, adapter=adapter)
    save_memory(family.unet, case.memory)
    return task


def predicted(case: Case) -> Cost:
    """The cost of a case on paper."""
    paper = Paper(gpu=False)
    with paper.active():
        task, training, batch = prepared(case, paper)
    return on_paper(task, training, batch, paper, looking=False)


def profiled(case: Case) -> tuple[Cost, int]:
    """The real step's cost by the ledger, and its peak by the profiler."""
    task, training, batch = prepared(case)
    if training.precision == "pure_bf16":
        Narrow(task.players[0].network)  # not while the profiler looks: it would miss that the float32 weights go
    networks = [*task.frozen, *(player.network for player in task.players)]
    resident = bytes_of(tensor for one in networks for tensor in (*one.parameters(), *one.buffers()))
    resident += bytes_of(value for value in batch.values() if isinstance(value, torch.Tensor))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        cost = measure(task, training, batch)
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return cost, resident + peak


def compare(case: Case) -> dict[str, Any]:
    """Predicted, counted and profiled peaks of a case, in bytes."""
    ahead, (real, peak) = predicted(case), profiled(case)
    assert (ahead.gradients, ahead.optimizer) == (real.gradients, real.optimizer)
    return {
        **asdict(case), "phase": ahead.limit, "predicted": ahead.peak, "counted": real.peak, "profiled": peak,
        "error": ahead.peak / peak - 1,
    }  # fmt: skip


def changed(memory: Memory) -> dict[str, Any]:
    """The measures that a case takes."""
    return {name: value for name, value in asdict(memory).items() if value != asdict(Memory())[name]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of cases, from 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for number, case in enumerate(CASES):
        if arguments.only and number not in arguments.only:
            continue
        rows.append(compare(case))
        row = rows[-1]
        sizes = "  ".join(f"{name} {row[name] / 1e6:8.2f} MB" for name in ("predicted", "counted", "profiled"))
        settings = {**case.training, **changed(case.memory)}
        what = ", ".join([case.trains, *(f"{name} {value}" for name, value in settings.items())])
        print(f"{what:52s} {sizes}  error {row['error']:+.2%} ({row['phase']})", flush=True)
    wrong = [row for row in rows if abs(row["error"]) > 0.02]
    print(f"{len(rows) - len(wrong)} of {len(rows)} within 2 %")
    write(arguments.output, record(command("OUT.json"), {"cases": rows}))


if __name__ == "__main__":
    main()
