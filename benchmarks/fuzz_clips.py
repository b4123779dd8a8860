"""Check damaged clips: 500 files that are broken in every way, none of which may crash or hang the run.

    python benchmarks/fuzz_clips.py OUT.json [--count 500] [--seconds 20]

Sound clips in six kinds of file, and stills in three, are damaged by a seeded generator: bytes flipped, runs of bytes
overwritten, ends cut off, contents moved under another extension, files of 0 bytes, headers that claim 8K or days.
Every file goes through the start-up check of a run. Reported, per kind of damage: how many files were refused, with the
kinds of reasons, how many still read (damage that hits nothing, or that no decoder can notice), the slowest, and how
often a helper process had to be replaced. The script fails if a file is not accounted for.

It also measures what the helper processes cost: the same check of the demo clips with and without them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image

from inflate.data.demo_clips import build
from inflate.data.isolation import Helpers
from inflate.data.preflight import preflight, scan
from inflate.data.settings import Data
from inflate.data.sources import find_clips
from inflate.errors import DataError

Pixels = npt.NDArray[np.uint8]
Damage = Callable[[bytearray, np.random.Generator], bytearray]
CODECS = {
    ".mp4": "libx264", ".mov": "mpeg4", ".mkv": "libx264", ".webm": "libvpx-vp9", ".avi": "mpeg4", ".ts": "mpeg2video"
}  # fmt: skip
"""The sound clips. Never libx265: encoding with it corrupts the memory of this process."""
STILLS = (".png", ".jpg", ".webp")
FRAMES, SIDE = 16, 64


@dataclass(frozen=True)
class Outcome:
    """What became of one file: the reason it was refused, or none, and how long that took."""

    name: str
    damage: str
    reason: str | None
    seconds: float


# --- sound files ------------------------------------------------------------------------------------------------------


def moving(seed: int) -> Pixels:
    """Frames with motion and noise, so that damage meets picture data."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 60, (FRAMES, SIDE, SIDE, 3), dtype=np.uint8)
    for number in range(FRAMES):
        frames[number, 8:40, 2 * number : 2 * number + 24] += 150
    return frames


def encode(path: Path, codec: str) -> bytes:
    """The bytes of a sound clip."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(8 if codec != "mpeg2video" else 25))
        stream.height, stream.width, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in moving(0):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


def sound_files(folder: Path) -> dict[str, bytes]:
    """Sound files by extension."""
    files = {kind: encode(folder / f"sound{kind}", codec) for kind, codec in CODECS.items()}
    for kind in STILLS:
        Image.fromarray(moving(1)[0]).save(folder / f"sound{kind}")
        files[kind] = (folder / f"sound{kind}").read_bytes()
    return files


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(data: bytearray, rng: np.random.Generator, count: int) -> bytearray:
    """Other bytes at random places."""
    for place in rng.integers(0, len(data), count):
        data[place] ^= int(rng.integers(1, 256))
    return data


def flip_header(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Other bytes among the first and the last 300, where containers keep their headers and indices."""
    for place in rng.integers(0, min(300, len(data)), 12):
        data[place if rng.random() < 0.5 else len(data) - 1 - place] ^= int(rng.integers(1, 256))
    return data


def overwrite(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A run of noise."""
    start, length = int(rng.integers(0, len(data))), int(rng.integers(16, max(17, len(data) // 3)))
    data[start : start + length] = rng.bytes(len(data[start : start + length]))
    return data


def truncate(data: bytearray, rng: np.random.Generator) -> bytearray:
    """The first part only."""
    return data[: int(rng.integers(1, len(data)))]


def repeat(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A part of the file twice."""
    first, last = sorted(int(place) for place in rng.integers(0, len(data), 2))
    return data[:last] + data[first:]


def empty(data: bytearray, rng: np.random.Generator) -> bytearray:
    return bytearray()


def claim_size(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A header that claims 8K, or the largest number, wherever the true side stands in 16 or 32 bits."""
    claim = int(rng.choice([7680, 16384, 65535]))
    for width, kind in ((4, ">u4"), (2, ">u2"), (4, "<u4"), (2, "<u2")):
        true, wrong = np.array(SIDE, kind).tobytes(), np.array(claim, kind).tobytes()
        places = [match.start() for match in re.finditer(re.escape(true), bytes(data[:2000] + data[-2000:]))][:8]
        for place in places:
            place = place if place < 2000 else len(data) - 4000 + place
            if 0 <= place <= len(data) - width and rng.random() < 0.7:
                data[place : place + width] = wrong
    return data


def claim_duration(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A header that claims days: huge durations, time scales of 1, absurd counts of frames."""
    for atom in (b"mvhd", b"mdhd", b"tkhd", b"stts", b"stsz", b"strh", b"avih", b"\x44\x89", b"\x2a\xd7\xb1"):
        at = data.find(atom)
        if at >= 0:
            place = at + len(atom) + int(rng.integers(0, 28))
            data[place : place + 4] = int(rng.choice([2**31 - 1, 2**32 - 1, 1, 10**9])).to_bytes(4, "big")
    return data


DAMAGES: dict[str, Damage] = {
    "1 byte flipped": partial(flip, count=1), "20 bytes flipped": partial(flip, count=20),
    "header flipped": flip_header, "overwritten": overwrite, "truncated": truncate, "part repeated": repeat,
    "claims 8K": claim_size, "claims days": claim_duration, "0 bytes": empty,
}  # fmt: skip
WRONG = "another container's extension"


def make_files(folder: Path, count: int, seed: int) -> dict[str, str]:
    """Write the damaged files; their damage by name."""
    with tempfile.TemporaryDirectory() as aside:
        sound = sound_files(Path(aside))
    kinds, damages, made = list(sound), [*DAMAGES, WRONG], {}
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        kind, damage = kinds[number % len(kinds)], damages[number // len(kinds) % len(damages)]
        data = bytearray(sound[kind])
        if damage == WRONG:
            kind = str(rng.choice([other for other in kinds if other != kind]))
        else:
            data = DAMAGES[damage](data, rng)
        name = f"{number:03d}{kind}"
        (folder / name).write_bytes(data)
        made[name] = damage
    return made


# --- the check --------------------------------------------------------------------------------------------------------


def check(folder: Path, made: dict[str, str], settings: Data) -> list[Outcome]:
    """Every file's outcome, one at a time."""
    outcomes = []
    with Helpers(settings.seconds_per_clip, count=1) as helpers:
        helpers.call(next(iter(made)), len)  # starts the helper: its imports count for no file
        for name, damage in made.items():
            begun, reason = time.monotonic(), None
            try:
                helpers.call(folder / name, scan, settings, 2**26)
            except DataError as error:
                reason = str(error).removeprefix(f"{folder / name}: ")
            outcomes.append(Outcome(name, damage, reason, time.monotonic() - begun))
    return outcomes


def ended_helper(one: Outcome) -> bool:
    """Whether a helper process had to be replaced after the file."""
    return one.reason is not None and one.reason.startswith(("crashes the decoder", "not decoded within"))


def kind_of(reason: str) -> str:
    """A reason without its numbers and the system's words."""
    return re.sub(r"\d[\d.]*", "N", reason.split("(")[0]).strip()


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts per kind of damage, and the reasons."""
    table = {}
    for damage in [*DAMAGES, WRONG]:
        mine = [one for one in outcomes if one.damage == damage]
        refused = [one for one in mine if one.reason]
        table[damage] = {
            "files": len(mine), "refused": len(refused), "read": len(mine) - len(refused),
            "slowest_seconds": round(max((one.seconds for one in mine), default=0.0), 2),
        }  # fmt: skip
    return {"by damage": table, "reasons": dict(Counter(kind_of(one.reason) for one in outcomes if one.reason))}


def cost(clips: int) -> dict[str, float]:
    """Processor seconds, of all processes, of the start-up check of the demo clips, with and without helpers."""
    with tempfile.TemporaryDirectory() as folder:
        root = build(Path(folder) / "demo", clips=clips, held_out=1)
        found = {}
        for name, limit in (("without helpers", None), ("with helpers", 120.0)):
            settings = Data(str(root), split="train", frames=8, height=64, width=64, seconds_per_clip=limit)
            begun, waited = sum(os.times()[:4]), time.monotonic()
            preflight(find_clips(settings), settings)
            found[f"{name}, processor seconds"] = round(sum(os.times()[:4]) - begun, 2)
            found[f"{name}, seconds"] = round(time.monotonic() - waited, 2)
    return {"clips": clips, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--demo", type=int, default=600, help="demo clips to measure the cost of helpers on")
    arguments = parser.parse_args()
    settings = Data(
        buckets=[f"8x{SIDE}x{SIDE}", f"1x{SIDE}x{SIDE}"], seconds_per_clip=arguments.seconds, captions="optional"
    )
    with tempfile.TemporaryDirectory() as folder:
        made = make_files(Path(folder), arguments.count, arguments.seed)
        outcomes = check(Path(folder), made, settings)
    assert [one.name for one in outcomes] == list(made), "a file is not accounted for"
    result = {
        "command": "python benchmarks/fuzz_clips.py " + " ".join(["OUT.json", *sys.argv[2:]]),
        "versions": {"python": platform.python_version(), "av": av.__version__},
        "files": len(outcomes), "refused": sum(one.reason is not None for one in outcomes),
        "helpers replaced": [f"{one.name}, {one.damage}: {one.reason}" for one in outcomes if ended_helper(one)],
        **summary(outcomes), "start-up check of demo clips": cost(arguments.demo),
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
