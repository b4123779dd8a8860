"""What `inflate doctor` checks of this machine.

Each check imports what it examines, so that a broken package fails its own line and no other.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from inflate.errors import InflateError
from inflate.findings import Checks, Finding, failed, quieten, warning

if TYPE_CHECKING:
    from inflate.families.svd import SVD

DISTRIBUTION = "inflate-video"
NAMED = ("torch", "diffusers", "transformers", "accelerate", "peft", "datasets")
"""Packages whose versions are told even where all is well."""

LAUNCH = "accelerate launch --multi_gpu --num_processes N -m inflate.doctor"
"""The checks of several processes."""

MACHINE = (InflateError, ImportError, OSError, RuntimeError, subprocess.SubprocessError)
"""What a check raises for reasons of the machine; torch's and CUDA's errors are RuntimeErrors."""
BROKEN = (ImportError, OSError, RuntimeError, AttributeError, ValueError)
"""What importing or calling an extension raises that was built for other versions."""

GIB = 2**30
SVD_PARAMETERS = 1_524_623_082
"""Of Stable Video Diffusion's UNet."""
CHECKPOINT = SVD_PARAMETERS * 16
"""Bytes of a checkpoint of all its weights in float32, with AdamW's two averages and the run's own."""
SHARED = GIB
"""Bytes: two readers with two batches ahead each, of a clip of 25x576x1024 in float32 (170 MiB), and some room."""
PROBE = 16 * 2**20
"""Bytes written to try out a folder."""


def checks(output: Path) -> Checks:
    """All checks by name, in the order in which one rests on another; `output` is where runs would be written."""
    return {
        "packages": packages,
        "CUDA": cuda,
        "GPUs": gpus,
        "torchvision": torchvision,
        "xformers": partial(optional, "xformers", attend_with_xformers),
        "bitsandbytes": partial(optional, "bitsandbytes", quantise_with_bitsandbytes),
        "video": video,
        "output": partial(output_folder, output),
        "shared memory": shared_memory,
        "threads": threads,
        "pocket model": pocket_model,
        "training": training,
    }


# --- packages ---------------------------------------------------------------------------------------------------------


def packages() -> Finding:
    """Python and the packages against what the distribution asks for; extras only where they are installed."""
    try:
        asked = [Requirement(text) for text in requires(DISTRIBUTION) or []]
        python, extras = metadata(DISTRIBUTION)["Requires-Python"], metadata(DISTRIBUTION).get_all("Provides-Extra")
    except PackageNotFoundError:
        return warning(f"{DISTRIBUTION} is imported from its sources, its requirements are unknown", "pip install -e .")
    own = [Requirement(f"python{python}"), *(one for one in asked if applies(one, ""))]
    wrong = [fault for one in own if (fault := unmet(one))]
    if wrong:
        return failed("; ".join(wrong), "pip install -U with the named versions, or pip install -e . again")
    optional = [one for one in asked if any(applies(one, extra) for extra in extras or [] if extra != "dev")]
    odd = [fault for one in optional if installed(one.name) and (fault := unmet(one))]
    if odd:
        return warning("; ".join(odd), "pip install -U with the named versions, or uninstall them: they are optional")
    shown = ", ".join(f"{name} {installed(name)}" for name in ("python", *NAMED))
    return Finding(f"{len(own)} as asked for; {shown}")


def applies(requirement: Requirement, extra: str) -> bool:
    """Whether a requirement counts on this system, for an extra or (empty) for everyone."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def unmet(requirement: Requirement) -> str:
    """In words, how what is installed fails a requirement; empty where it meets it."""
    found = installed(requirement.name)
    if found is None:
        return f"{requirement.name}{requirement.specifier} is missing"
    if requirement.specifier.contains(found, prereleases=True):
        return ""
    return f"{requirement.name} is {found}, not {requirement.specifier}"


def installed(name: str) -> str | None:
    """The version of a package, or of Python itself; None where it is not installed."""
    import platform

    try:
        return platform.python_version() if name == "python" else version(name)
    except PackageNotFoundError:
        return None


def torchvision() -> Finding:
    """That torchvision is either whole or absent: diffusers and transformers import it where they find it."""
    if find_spec("torchvision") is None:
        return Finding("not installed, not needed")
    try:
        import_module("torchvision")
    except BROKEN as error:
        remedy = "pip uninstall torchvision: it is not needed, and a broken one breaks what imports it"
        return failed(f"cannot be imported: {type(error).__name__}: {error}", remedy)
    return Finding(f"{installed('torchvision')}, can be imported")


def optional(name: str, use: Callable[[Any, str], None]) -> Finding:
    """That an optional package is absent, or does its work on this device; without a GPU it may fail to."""
    import torch

    if find_spec(name) is None:
        return Finding("not installed, optional")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        use(import_module(name), device)
    except BROKEN as error:
        verdict = failed if device == "cuda" else warning
        remedy = f"install the {name} that is built for torch {torch.__version__}, or uninstall it"
        return verdict(f"does not work on {device}: {type(error).__name__}: {error}", remedy)
    return Finding(f"{installed(name)}, works on {device}")


def attend_with_xformers(xformers: Any, device: str) -> None:
    """One attention by xformers' own operators: it can be imported where they were built for another torch."""
    import torch

    one = torch.ones(1, 16, 1, 32, device=device, dtype=torch.float16 if device == "cuda" else torch.float32)
    import_module("xformers.ops").memory_efficient_attention(one, one, one)


def quantise_with_bitsandbytes(bitsandbytes: Any, device: str) -> None:
    """Eight bits and back, as its optimisers keep their state."""
    import torch

    values = torch.linspace(-1, 1, 512, device=device)
    back = bitsandbytes.functional.dequantize_blockwise(*bitsandbytes.functional.quantize_blockwise(values))
    if not torch.allclose(back, values, atol=0.05):
        raise RuntimeError("what it quantises comes back as something else")


# --- the machine ------------------------------------------------------------------------------------------------------


def cuda() -> Finding:
    """That torch is built for what the machine has."""
    import torch

    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return judge_cuda(torch.__version__, torch.version.cuda or torch.version.hip, usable, cards())


def cards() -> list[str]:
    """The graphics cards that NVIDIA's driver lists, whatever torch sees."""
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=60)
    return listed.stdout.splitlines() if listed.returncode == 0 else []


def judge_cuda(torch: str, built: str | None, usable: int, cards: Sequence[str]) -> Finding:
    """What torch's version, the CUDA it was built for, the GPUs that it can use and the cards there mean together."""
    if built and usable:
        return Finding(f"torch {torch}, built for {built}, uses {usable} of {max(usable, len(cards))} GPUs")
    if built and cards:
        remedy = "a newer driver, or a torch for an older CUDA; CUDA_VISIBLE_DEVICES must name a card or be unset"
        return failed(f"torch {torch}, built for {built}, cannot use {cards[0]}", remedy)
    if cards:
        remedy = "install torch anew, without constraints-cpu.txt"
        return failed(f"torch {torch} is built for CPUs, but there is {cards[0]}", remedy)
    if built:
        return warning(f"torch {torch} is built for {built}, but there is no GPU", "training will use the CPU")
    return Finding(f"no GPU, and torch {torch} is built for CPUs")


def gpus() -> Finding:
    """Name, memory and bfloat16 of each GPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return Finding("none")
    shown, lacking = [], []
    for number in range(count):
        with torch.cuda.device(number):
            free, whole = torch.cuda.mem_get_info()
            able = torch.cuda.is_bf16_supported(including_emulation=False)
        lacking += [] if able else [number]
        memory = f"{free / GIB:.1f} of {whole / GIB:.1f} GiB free"
        shown.append(f"{number}: {torch.cuda.get_device_name(number)}, {memory}, {'' if able else 'no '}bfloat16")
    if lacking:
        return warning("; ".join(shown), "without bfloat16 train with training.precision=fp16 or no")
    return Finding("; ".join(shown))


def video() -> Finding:
    """That clips are written and read, in H.264."""
    import av
    import numpy as np

    from inflate.data.demo import draw_scene, render
    from inflate.data.video import read, write

    frames = render(draw_scene(np.random.default_rng(0)), np.linspace(0, 1, 8))  # (8, 64, 64, 3)
    with TemporaryDirectory() as name:
        back = read(write(Path(name) / "clip.mp4", frames, 8))
    error = float(np.abs(back.astype(float) - frames).mean()) if back.shape == frames.shape else np.inf
    found = f"PyAV {av.__version__} writes and reads H.264: {len(back)} of {len(frames)} frames, mean error {error:.1f}"
    return Finding(f"{found} of 255") if error < 10 else failed(found, "pip install -U --force-reinstall av")


def output_folder(output: Path) -> Finding:
    """That a file can be written, flushed and renamed where runs are to go, and that there is room for checkpoints."""
    from inflate.files import new_file

    folder = nearest(output)
    begun = time.monotonic()
    with TemporaryDirectory(prefix=".doctor-", dir=folder) as name, new_file(Path(name) / "probe") as aside:
        aside.write_bytes(os.urandom(PROBE))
    speed, free = PROBE / 2**20 / (time.monotonic() - begun), shutil.disk_usage(folder).free
    found = f"{folder} takes {speed:.0f} MiB/s, {free / GIB:.0f} GiB are free"
    if free >= 3 * CHECKPOINT:
        return Finding(found)
    wanted = f"a checkpoint of Stable Video Diffusion's UNet takes up to {CHECKPOINT / GIB:.0f} GiB"
    return warning(found, f"{wanted}, and training.keep=2 needs room for three: name another --output")


def nearest(path: Path) -> Path:
    """The path itself, or its nearest parent that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def shared_memory(place: Path = Path("/dev/shm"), least: int = SHARED) -> Finding:
    """That the processes that read clips can hand over a few batches."""
    if not place.is_dir():
        return Finding(f"no {place} on this system")
    usage = shutil.disk_usage(place)
    found = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB of {place} are free"
    if usage.free >= least:
        return Finding(found)
    return warning(found, "readers of clips may die of it: docker run --shm-size 8g, or training.workers=0")


def threads() -> Finding:
    """That torch's threads fit the processors that this process may use."""
    import torch

    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return judge_threads(own, torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS"), torch.cuda.is_available())


def judge_threads(processors: int, used: int, asked: str | None, gpu: bool) -> Finding:
    """What the processors, torch's threads and OMP_NUM_THREADS mean together; with a GPU few threads do no harm."""
    found = f"{used} threads on {processors} processors, OMP_NUM_THREADS is {asked or 'unset'}"
    if used > processors:
        return warning(found, f"threads that wait for each other are slow: OMP_NUM_THREADS={processors}")
    if used < processors and not gpu:
        return warning(found, f"one process alone trains faster with OMP_NUM_THREADS={processors}")
    return Finding(found)


# --- the pocket model -------------------------------------------------------------------------------------------------


def pocket_model() -> Finding:
    """That the pocket model inflates to what equals its parent."""
    quieten()
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from inflate.families.svd import SVD
    from inflate.models import folders
    from inflate.surgery import IDENTITY, verify_identity

    folder = folders.resolve("pocket")
    family = SVD.load("pocket", frames=2)
    unet = verify_identity(family.unet, folders.load_parent(UNet2DConditionModel, folder / "unet"))
    decoder = verify_identity(family.vae, folders.load_parent(AutoencoderKL, folder / "vae"))
    found = f"inflated, differs from its parent by {unet:.1e} (UNet) and {decoder:.1e} (decoder)"
    equal = unet <= IDENTITY and decoder <= IDENTITY  # neither is, where it is not a number
    return Finding(found) if equal else failed(found, f"{IDENTITY:g} is allowed; install torch and diffusers again")


def training() -> Finding:
    """That a whole run of one step works on this device, and that its export loads again as the same model."""
    quieten()
    import json

    from inflate.data.clips import collate
    from inflate.families.svd import SVD
    from inflate.surgery import IDENTITY
    from inflate.training.loop import fit
    from inflate.training.rehearsal import NoiseClips, pocket_task, settings

    begun = time.monotonic()
    with TemporaryDirectory() as name:
        short = settings(Path(name) / "run", steps=1)
        task = pocket_task(short)
        result = fit(task, NoiseClips(), short, collate)
        if result.export is None:  # a signal, which `fit` takes for itself
            raise KeyboardInterrupt
        (entry,) = json.loads((short.output / "metrics.json").read_text(encoding="utf-8"))["history"]
        apart = difference(task.family, SVD.load(result.export))
    seconds, loss, norm = time.monotonic() - begun, entry["loss/unet"], entry["gradient_norm/unet"]
    found = f"a run of one step on {task.family.device} took {seconds:.0f} s: loss {loss:.4g}, gradient norm {norm:.4g}"
    found += f"; its export loads again and differs by {apart:.1e}"
    return Finding(found) if apart <= IDENTITY else failed(found, f"{IDENTITY:g} is allowed; try another torch")


def difference(one: SVD, other: SVD) -> float:
    """The largest difference between what two models of one kind predict and decode, on the first one's device."""
    import torch

    other.to(one.device)
    generator = torch.Generator().manual_seed(0)
    clip = (torch.rand(1, 2, 3, 64, 64, generator=generator) * 2 - 1).to(one.device)  # (B, F, 3, H, W)
    ids = torch.ones(1, device=one.device)
    with torch.no_grad():
        outputs = []
        for family in (one, other):
            latents = family.encode(clip)  # (B, F, C, h, w)
            condition = family.condition(clip[:, 0], ids, ids, ids, torch.zeros_like(clip[:, 0]))
            predicted = family.predict(condition)(latents, ids)
            outputs.append((predicted, family.decode(latents)))
    gaps = [(ours - theirs).abs().max() for ours, theirs in zip(*outputs, strict=True)]
    return float(torch.stack(gaps).max())  # unlike Python's, this one keeps what is not a number
