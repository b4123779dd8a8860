"""What `inflate evaluate` does: measure a folder of generated videos, alone, against real ones, and by prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from inflate.data.motion import motion_score
from inflate.data.sources import Clip
from inflate.errors import ConfigError, DataError
from inflate.metrics import folders
from inflate.metrics.agreement import ClipModel, agreement, consistency
from inflate.metrics.features import RESIZE, FeatureNetwork
from inflate.metrics.flow import Name, motions
from inflate.metrics.folders import Cut, Found, Pixels, Reader
from inflate.metrics.fvd import Protocol, refuse_another_protocol, video_distance
from inflate.metrics.perceptual import LPIPS
from inflate.metrics.report import Evaluation, means_of, read_earlier
from inflate.metrics.video import flicker, flicker_error, psnr, ssim
from inflate.models.weights import weights_sha256

Watch = Callable[[str], Callable[[int, int], None]]
"""Given a name, returns what is called with (clips done, clips in all)."""
ASKED = "motion"
"""Column of the metadata that may name the direction which a clip should show: left, right, up, down, in, out, ..."""


@dataclass(frozen=True)
class Settings:
    """What to measure, and by which files."""

    generated: Path
    """folder, or metadata table, of the videos to measure"""
    real: Path | None = None
    """of those to compare with"""
    prompts: Path | None = None
    """folder or metadata table with a caption for each generated video, by name; None: the generated videos' own"""
    clip: Path | None = None
    """folder of a CLIP model"""
    fvd_network: Path | None = None
    """TorchScript file"""
    vgg: Path | None = None
    """VGG16's tensors"""
    lpips_heads: Path | None = None
    """the tensors of LPIPS's linear heads"""
    unpaired: bool = False
    """whether the real videos are other ones than the generated, which are then not compared one by one"""
    cut: Cut = field(default_factory=Cut)
    seed: int = 0
    """of the bootstrap"""
    against: Path | None = None
    """JSON of an earlier evaluation by the same protocol, to set beside this one"""

    def __post_init__(self) -> None:
        if (self.vgg is None) is not (self.lpips_heads is None):
            raise ConfigError("LPIPS needs both --vgg and --lpips-heads; give both or none")
        for option, value in {
            "--fvd-network": self.fvd_network,
            "--vgg": self.vgg,
            "--unpaired": self.unpaired,
        }.items():
            if value and self.real is None:
                raise ConfigError(f"{option} compares with real videos: name their folder with --real")
        if self.vgg is not None and self.unpaired:
            raise ConfigError("--vgg and --lpips-heads compare pairs of videos: leave them out, or --unpaired")


@dataclass(frozen=True)
class Networks:
    """The networks that the settings name."""

    clip: ClipModel | None
    lpips: LPIPS | None
    fvd: FeatureNetwork | None

    @classmethod
    def load(cls, settings: Settings, device: torch.device) -> Networks:
        """Read them; CheckpointError naming the file at fault."""
        lpips = None
        if settings.vgg and settings.lpips_heads:
            lpips = LPIPS.from_files(settings.vgg, settings.lpips_heads).to(device)
        return cls(
            ClipModel.load(settings.clip, device) if settings.clip else None,
            lpips,
            FeatureNetwork.load(settings.fvd_network, device) if settings.fvd_network else None,
        )


def evaluate(settings: Settings, watch: Watch, device: torch.device) -> Evaluation:
    """Check everything, then measure the clips one at a time; InflateError naming the file or option at fault."""
    generated = folders.find(settings.generated, watch("checking the generated videos"))
    real = folders.find(settings.real, watch("checking the real videos")) if settings.real else None
    paired = real is not None and not settings.unpaired
    if real and paired:
        folders.refuse_unpaired(generated, real)
    sets = [generated, *([real] if real else [])]
    reader = folders.reader(sets, settings.cut)
    _check_size(settings, reader, paired)
    if settings.fvd_network and min(len(found.clips) for found in sets) < 2:
        raise DataError(
            "an FVD is of sets: it needs two videos or more in each folder, and says much only of thousands"
        )
    asked = _asked(settings, generated)
    networks = Networks.load(settings, device)
    protocol = _protocol(settings, generated, real, reader, networks)
    if settings.against:
        refuse_another_protocol(protocol, read_earlier(settings.against)["protocol"], str(settings.against))
    measure = _Measure(reader, networks, device)
    truth = measure.real(real, watch("measuring the real videos")) if real else {}
    partners = real if paired else None
    clips = measure.generated(generated, asked, partners, truth, watch("measuring the generated videos"))
    return Evaluation(
        protocol,
        means_of("", clips, settings.seed) | means_of("real/", truth, settings.seed),
        _distances(measure.features, protocol) if networks.fvd else {},
        clips,
        truth,
        _notes(generated, real, asked, networks),
    )


class _Measure:
    """Measures clips one at a time, and keeps the features that distances of sets are taken of."""

    def __init__(self, reader: Reader, networks: Networks, device: torch.device) -> None:
        self.reader, self.networks, self.device = reader, networks, device
        self.features: dict[str, list[Tensor]] = {"generated": [], "real": []}

    def real(self, found: Found, progress: folders.Progress) -> dict[str, dict[str, Any]]:
        """The measures of real clips by name."""
        rows = {}
        for number, name in enumerate(found.clips, 1):
            row = self._alone(self.reader.read(found, name), "real")
            rows[name] = row | _directions(row, found.clips[name])
            progress(number, len(found.clips))
        return rows

    def generated(
        self,
        found: Found,
        asked: Mapping[str, Clip],
        partners: Found | None,
        truth: Mapping[str, Mapping[str, Any]],
        progress: folders.Progress,
    ) -> dict[str, dict[str, Any]]:
        """The measures of generated clips by name, each beside its partner, whose measures are in `truth`."""
        rows = {}
        for number, name in enumerate(found.clips, 1):
            frames = self.reader.read(found, name)
            row = self._alone(frames, "generated") | {"prompt": asked[name].caption}
            row |= self._prompted(frames, asked[name].caption) | _directions(row, asked[name])
            if partners is not None:
                row |= self._beside(frames, self.reader.read(partners, name))
                row["direction as real"] = float(row["moves"] == truth[name]["moves"])
            rows[name] = row
            progress(number, len(found.clips))
        return rows

    def _alone(self, frames: Pixels, kind: str) -> dict[str, Any]:
        if self.networks.fvd:
            self.features[kind].append(self.networks.fvd(frames))
        rate, found = self.reader.rate, motions(frames, self.reader.rate)
        return {
            "frame change": flicker(self._clip(frames)).item(),
            "motion": motion_score(frames, rate),
            "moves": found.name,
            "scene": found.scene and asdict(found.scene),
            "object": found.object and asdict(found.object),
        }

    def _prompted(self, frames: Pixels, prompt: str) -> dict[str, Any]:
        clip = self.networks.clip
        if clip is None:
            return {}
        embedded = clip.frames(frames)
        agreed = agreement(embedded, clip.prompt(prompt))
        return {"prompt agreement": agreed.mean().item(), "frame consistency": consistency(embedded)}

    def _beside(self, frames: Pixels, truth: Pixels) -> dict[str, Any]:
        output, target = self._clip(frames), self._clip(truth)
        measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "psnr": psnr, "ssim": ssim, "flicker error": flicker_error,
        }  # fmt: skip
        row = {name: measure(output, target).item() for name, measure in measures.items()}
        if self.networks.lpips:
            row["lpips"] = _by_frame(self.networks.lpips, output[0], target[0])
        return row

    def _clip(self, frames: Pixels) -> Tensor:
        """(1, F, 3, H, W) in [0, 1]."""
        return torch.from_numpy(frames).to(self.device).permute(0, 3, 1, 2)[None].float() / 255


def _directions(row: Mapping[str, Any], asked: Clip) -> dict[str, float]:
    """Whether a clip moves as the metadata say it should, where they do."""
    wanted = asked.extra.get(ASKED)
    return {"direction as asked": float(row["moves"] == wanted)} if wanted in get_args(Name) else {}


@torch.no_grad()
def _by_frame(lpips: LPIPS, output: Tensor, target: Tensor) -> float:
    """Mean distance of frames (F, 3, H, W) in [0, 1], one pair at a time: VGG's features of a clip are gigabytes."""
    pairs = zip(output.split(1), target.split(1), strict=True)
    return float(np.mean([lpips(a * 2 - 1, b * 2 - 1).item() for a, b in pairs]))


def _check_size(settings: Settings, reader: Reader, paired: bool) -> None:
    """Raise DataError where frames are too small for what compares them."""
    least = 16 if settings.vgg else 11 if paired else 8
    width, height = reader.settings.width, reader.settings.height
    if min(width, height) < least:
        raise DataError(
            f"{settings.generated}: frames of {width}x{height} are too small to measure (SSIM needs 11 pixels "
            "a side, LPIPS 16); enlarge them with --size"
        )


def _asked(settings: Settings, generated: Found) -> dict[str, Clip]:
    """By generated clip, the one that tells its prompt; DataError listing those without a prompt that CLIP needs."""
    told = (
        {folders.key(clip.name): clip for clip in folders.listed(settings.prompts)}
        if settings.prompts
        else generated.clips
    )
    where = settings.prompts or settings.generated
    absent = [f"{name}: is not in {where}" for name in generated.clips if name not in told]
    folders.refuse(absent, "--prompts needs a caption for each generated video, by its name")
    if settings.clip:
        silent = [f"{name}: has no caption in {where}" for name in generated.clips if not told[name].caption]
        folders.refuse(silent, "write NAME.txt beside each video, or name a metadata table with --prompts")
    return {name: told[name] for name in generated.clips}


def _protocol(
    settings: Settings, generated: Found, real: Found | None, reader: Reader, networks: Networks
) -> dict[str, Any]:
    data, cut = reader.settings, settings.cut
    return {
        "real": len(real.clips) if real else 0,
        "generated": len(generated.clips),
        "frames": data.frames,
        "window": data.window,
        "stride": data.stride,
        "fps": f"{data.fps:g} resampled" if data.fps else f"{reader.rate * data.stride:.4g}",
        "size": f"{data.width}x{data.height}",
        "resize": "bicubic" if cut.size else "none",
        "crop": "centre" if cut.size else "none",
        "real_codec": real.codecs() if real else "",
        "generated_codec": generated.codecs(),
        "real_sha256": real.digest() if real else "",
        "seed": settings.seed,
        "paired": bool(real) and not settings.unpaired,
        "clip_sha256": networks.clip.sha256 if networks.clip else "",
        "lpips_sha256": weights_sha256(networks.lpips) if networks.lpips else "",
        "network_sha256": networks.fvd.sha256 if networks.fvd else "",
    }


def _distances(features: Mapping[str, list[Tensor]], stated: Mapping[str, Any]) -> dict[str, Any]:
    real, generated = torch.stack(features["real"]), torch.stack(features["generated"])
    known = {name: stated[name] for name in Protocol.names() if name in stated}
    known["resize"] = f"{stated['resize']}, then {RESIZE}"
    found = video_distance(real, generated, Protocol(**known, dimensions=real.shape[1]))
    return {"fvd": found.fvd, "kvd": found.kvd, "protocol": str(found.protocol)}


def _notes(generated: Found, real: Found | None, asked: Mapping[str, Clip], networks: Networks) -> list[str]:
    notes = [
        f"{found.folder}: {len(found.stills)} stills are no videos and not measured ({', '.join(found.stills[:3])}...)"
        for found in (generated, real) if found and found.stills
    ]  # fmt: skip
    clip = networks.clip
    long = [name for name, one in asked.items() if clip and clip.is_cut(one.caption)]
    if clip and long:
        notes.append(f"CLIP sees the first {clip.positions} tokens of a prompt; {len(long)} are longer ({long[0]}...)")
    return notes
