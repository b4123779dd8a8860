"""The README.md beside an adapter's file, made of what the file says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from inflate.adapters import file
from inflate.adapters.file import Adapter
from inflate.tables import aligned

COMMANDS = {
    "svd": "inflate sample {base} photo.png --adapter {name} -o out.mp4",
    "video_ldm": 'inflate generate {base} "a prompt" --adapter {name} -o out.mp4',
    "dynamicrafter": 'inflate sample {base} photo.png --prompt "a prompt" --adapter {name} -o out.mp4',
    "i2vgen_xl": 'inflate sample {base} photo.png --prompt "a prompt" --adapter {name} -o out.mp4',
    "i2vgen_xl_refiner": 'inflate refine clip.mp4 --model {base} --prompt "a prompt" --adapter {name} -o out.mp4',
}
CLASSES = {
    "svd": ("inflate.families.svd", "SVD"),
    "video_ldm": ("inflate.families.video_ldm", "VideoLDM"),
    "dynamicrafter": ("inflate.families.dynamicrafter", "DynamiCrafter"),
    "i2vgen_xl": ("inflate.families.i2vgen_xl", "I2VGenXL"),
    "i2vgen_xl_refiner": ("inflate.families.i2vgen_xl_refiner", "Refiner"),
}
TAGS = {
    "svd": "image-to-video", "video_ldm": "text-to-video", "dynamicrafter": "image-to-video",
    "i2vgen_xl": "image-to-video", "i2vgen_xl_refiner": "video-to-video",
}  # fmt: skip


NAME = "README.md"
SAMPLES = "samples.png"
"""The sheet of samples beside a card."""


def text(adapter: Adapter, samples: bool = False) -> str:
    """The card, which shows the samples that lie beside it; every number in it stands in the file."""
    about = adapter.about
    family, base = about["family"], adapter.base
    head = ["---", "library_name: diffusers", f"tags: [{adapter.kind}, {TAGS[family]}, inflate]"]
    head += [f"license: {about['licence']}"] if about.get("licence") else []
    sections = [
        "\n".join([*head, "---"]),
        f"# {adapter.kind} adapter of {base}",
        "\n".join(f"- {name}: {value}" for name, value in facts(adapter).items()),
        f"![Samples before training and after it, or without the adapter and with it]({SAMPLES})" if samples else "",
        "## Use\n\n" + use(about),
        _measured(about.get("held_out") or []),
        f"## Settings\n\n```yaml\n{about['config'].strip()}\n```" if about.get("config") else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def facts(adapter: Adapter) -> dict[str, str]:
    """What a file says of itself, in words."""
    about, verified = adapter.about, adapter.about.get("verified")
    base = about.get("base") or {}
    every = {
        "kind": adapter.kind,
        "layers": f"{len(adapter.rank)} ({adapter.parameters:,} parameters)",
        "rank": _span(adapter.rank.values()),
        "alpha": _span(adapter.alpha.values()),
        "targets": ", ".join(about.get("targets") or []),
        "family": str(about.get("family") or ""),
        "base": f"{adapter.base} (SHA-256 {base['sha256']})" if base else "not told",
        "trained over": _stored(base.get("stored")),
        "data": str(about.get("data") or ""),
        "made": _made(about.get("made")),
        "trigger": str(about.get("trigger") or ""),
        "hardware": str(about.get("hardware") or ""),
        **_cost(about.get("run")),
        "licence": str(about.get("licence") or "not told"),
        "verified": _proof(verified, base.get("stored"))
        if verified
        else "not yet: `inflate adapter verify` loads it on its base",
    }
    return {name: _plain(value) for name, value in every.items() if value}


def table(adapter: Adapter) -> str:
    """The facts and the held-out curve as aligned lines."""
    rows = aligned([*facts(adapter).items()])
    return "\n".join([*rows, *_curve(adapter.about.get("held_out") or [])])


def use(about: Mapping[str, Any]) -> str:
    """How to load an adapter that says so much of itself, in a shell and in Python."""
    family, base, other = about["family"], about["base"]["name"], about["base"].get("image_model")
    module, kind = CLASSES[family]
    command = COMMANDS[family].format(base=base, name=file.NAME) + (f" --image-model {other}" if other else "")
    over = f', image_model="{other}"' if other else ""
    return (
        f"```bash\n{command}\n```\n\n"
        f"```python\nfrom inflate.adapters import attach, file\nfrom {module} import {kind}\n\n"
        f'family = {kind}.load("{base}"{over})\nattach.load(family.unet, file.read("{file.NAME}"))\n```'
    )


def _stored(kind: str | None) -> str:
    """How the base's weights were kept in training, where they were rounded."""
    if kind is None:
        return ""
    return f"the base with weights in {kind}, over which it was measured below; elsewhere over the base itself"


def _cost(run: Mapping[str, float] | None) -> dict[str, str]:
    """What the training of an adapter took."""
    if run is None:
        return {}
    processes = "1 process" if run["processes"] == 1 else f"{run['processes']} processes"
    threads = "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"
    return {
        "training": f"{run['steps']:,} steps in {run['seconds'] / 60:,.1f} minutes, {processes} of {threads}",
        "peak memory": f"{run['peak_memory'] / 2**30:.2f} GiB",
    }


def _made(made: Any) -> str:
    """How an adapter was calculated, where it was: by resize, of a.safetensors, rank 4."""
    told = made if isinstance(made, dict) else {}
    return ", ".join(
        f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in told.items() if value is not None
    )


def _proof(verified: Mapping[str, Any], stored: str | None) -> str:
    trained = "trained adapter's output over it" if stored else "trained model's output"
    versions = ", ".join(f"{name} {version}" for name, version in verified["versions"].items())
    return (
        f"a new process that loaded the file on its base came within {verified['max_abs_diff']:.1e} of the "
        f"{trained}, which is up to {verified['effect']:.1e} from the base's ({versions})"
    )


def _measured(held_out: Sequence[Mapping[str, float | None]]) -> str:
    lines = _curve(held_out)
    return "\n".join(["## Measured", "", "```", *lines, "```"]) if lines else ""


def _curve(held_out: Sequence[Mapping[str, float | None]]) -> list[str]:
    """The held-out measurements, a row for each look."""
    if not held_out:
        return []
    names = [name for name in held_out[0] if all(name in row for row in held_out)]
    rows = [["-" if row[name] is None else f"{row[name]:.4g}" for name in names] for row in held_out]
    return aligned([[_plain(name) for name in names], *rows])


def _plain(text: str) -> str:
    """A text of a stranger's without what a terminal or a card would take for a command."""
    return "".join(each if each.isprintable() else " " for each in text)


def _span(values: Any) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
