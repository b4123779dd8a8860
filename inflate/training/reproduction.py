"""A trained adapter made again from what its file tells, and compared with it bit by bit.

The file's settings are those of its run, resolved; its base and its clips are known by hashes. What they are is checked
before anything is trained; what may change the last bits (versions, hardware) is told.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from inflate import config as configuration
from inflate import shelves
from inflate.adapters import bases, file, verify
from inflate.adapters.file import Adapter
from inflate.data.clips import ClipDataset
from inflate.data.settings import Data
from inflate.errors import CheckpointError, ConfigError, DataError, TrainingError
from inflate.families import i2vgen_xl, i2vgen_xl_model, i2vgen_xl_refiner, svd, svd_model, video_ldm
from inflate.models.exchange import listing
from inflate.training.record import device_name
from inflate.training.settings import Training

RECIPES = {
    svd.FAMILY: "svd_finetune.py", video_ldm.FAMILY: "video_ldm_finetune.py",
    i2vgen_xl.FAMILY: "i2vgen_xl_finetune.py", i2vgen_xl_refiner.FAMILY: "i2vgen_xl_finetune.py",
}  # fmt: skip
FINISHED = "finished"
"""How a run ends that came to its last step."""
STDERR = 2
"""Where the run's own words go, so that standard output holds the outcome alone."""


@dataclass
class Settings:
    """What of a run's settings is checked here."""

    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)


@dataclass
class ImageToVideoSettings(Settings):
    """Likewise, and the base."""

    model: svd_model.Model = field(default_factory=svd_model.Model)


@dataclass
class TextToVideoSettings(Settings):
    """Likewise, and the base."""

    model: video_ldm.Model = field(default_factory=video_ldm.Model)


@dataclass
class StagedSettings(Settings):
    """Likewise, and the base, of either stage."""

    model: i2vgen_xl_model.Model = field(default_factory=i2vgen_xl_model.Model)


SETTINGS: dict[str, type[Settings]] = {
    svd.FAMILY: ImageToVideoSettings, video_ldm.FAMILY: TextToVideoSettings,
    i2vgen_xl.FAMILY: StagedSettings, i2vgen_xl_refiner.FAMILY: StagedSettings,
}  # fmt: skip


@dataclass(frozen=True)
class Reproduction:
    """A run that is to be made again."""

    path: Path
    adapter: Adapter
    config: str
    """its settings, as YAML"""
    changes: list[str]
    """key=value of what is different here: where the base, the clips and the output lie"""

    @classmethod
    def of(cls, path: Path, output: Path, data: str | None = None, base: str | None = None) -> Reproduction:
        """Of an adapter's file, whose clips and base may lie elsewhere here.

        CheckpointError for a file that does not tell enough, or tells of a run that cannot be had again.
        """
        adapter = file.read(path)
        config, run = adapter.about.get("config"), adapter.about.get("run")
        if config is None or run is None or adapter.about.get("family") not in RECIPES:
            raise CheckpointError(
                f"{path} does not tell how it was trained, as files do that a run has exported and nothing has changed "
                "since: it cannot be made again"
            )
        if run["processes"] > 1:
            raise CheckpointError(
                f"{path} was trained by {run['processes']} processes: only a single one's is repeated"
            )
        model = bases.settings_of(adapter, path, base)
        places = [f"model.{name}={place or 'null'}" for name, place in model.items()] + [f"training.output={output}"]
        places += [f"data.path={data}"] if data else []
        fixed = ["training.resume=null", "training.max_seconds=null", "training.tracker=none"]
        return cls(path, adapter, config, [*places, *fixed, *_length(path, config, run)])

    def settings(self) -> Settings:
        """What the file tells of the run, with the changes; ConfigError."""
        schema = SETTINGS[self.adapter.about["family"]]
        with tempfile.TemporaryDirectory() as folder:
            return configuration.load(schema, [self.write(Path(folder)), *self.changes], partial=True)

    def write(self, folder: Path) -> str:
        """Write the settings into a folder; the file's path."""
        place = folder / "config.yaml"
        place.write_text(configuration.renewed(self.config, str(self.path)), encoding="utf-8")
        return str(place)

    def check(self) -> None:
        """CheckpointError or DataError where the base or the clips are others than the run's."""
        settings = self.settings()
        told, model = self.adapter.about.get("base") or {}, asdict(settings)["model"]
        for name in ("image_encoder", "tokenizer"):
            if (place := model.get(name)) and not bases.is_here(place):
                raise CheckpointError(
                    f"{self.path} was trained with model.{name}={place}, which no file may download unasked: download "
                    f"it to the folder {place}"
                )
        family = bases.load(self.adapter.about["family"], model)
        if bases.sha256(family.unet) != told.get("sha256"):
            raise CheckpointError(
                f"{model['path']} is not the model that {self.path} was trained on ({self.adapter.base}, SHA-256 "
                f"{str(told.get('sha256'))[:12]}): name that one by --base"
            )
        data = settings.data
        if (
            data.source == "huggingface"
            and not Path(data.path).is_dir()
            and f"data.path={data.path}" not in self.changes
        ):
            raise CheckpointError(
                f"{self.path} was trained on {data.path}, which no file may download unasked: name it by --data"
            )
        clips = ClipDataset(data, seed=settings.training.seed)
        if clips.digest() != self.adapter.about.get("data"):
            raise DataError(
                f"{data.path} holds other clips than {self.path} was trained on, or others of them are used: "
                "name those by --data, unchanged"
            )

    def differences(self) -> list[str]:
        """What is other here than where the adapter was trained, and may change its last bits."""
        about = self.adapter.about
        then = {**(about.get("verified") or {}).get("versions", {}), "hardware": about.get("hardware")}
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        now = {**verify.versions(), "hardware": device_name(device)}
        return [f"{name} was {then[name]} and is {now.get(name)} here" for name in then if then[name] != now.get(name)]

    def run(self) -> None:
        """Train it again, in a process of its own with as many threads; TrainingError where that fails."""
        recipe = shelves.find() / "recipes" / RECIPES[self.adapter.about["family"]]
        threads = str(self.adapter.about["run"]["threads"])
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": verify.python_path()}
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(recipe), self.write(Path(folder)), *self.changes]
            ended = subprocess.run(command, stdout=STDERR, env=environment, check=False)
        if ended.returncode:
            raise TrainingError(f"{self.path}: training it again failed; the reason stands above")

    def compare(self, again: Path) -> int:
        """How many tensors the file has, all of them equal to the bit to those of another.

        CheckpointError naming those that differ, and by how much.
        """
        ours, theirs = self.adapter.tensors, file.read(again).tensors
        strange = sorted(ours.keys() ^ theirs.keys())
        if strange:
            raise CheckpointError(f"{again} has other tensors than {self.path}: {listing(strange)}")
        apart = {name: float((value - theirs[name]).abs().max()) for name, value in ours.items()}
        differing = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
        if differing:
            raise CheckpointError(
                f"{len(differing)} of {len(ours)} tensors of {again} differ from {self.path}'s, by up to "
                f"{max(apart.values()):.1e}: {listing(differing)}"
            )
        return len(ours)


def _length(path: Path, config: str, run: Mapping[str, Any]) -> list[str]:
    """The steps that a run came to, where it ended before its last; CheckpointError where its rate hung on the last."""
    if run.get("stopped") == FINISHED:
        return []
    if configuration.parse(config, str(path)).get("training.schedule") not in (None, "constant"):
        raise CheckpointError(
            f"{path} is of a run that {run.get('stopped')} ended at step {run['steps']}: not repeated"
        )
    return [f"training.steps={run['steps']}"]


def refuse_output(output: Path) -> None:
    """ConfigError for a folder of the new run that is there already."""
    if output.exists():
        raise ConfigError(f"{output} exists already; choose another name")
