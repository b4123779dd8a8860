"""What exports remember of clips: read by its family alone, whole, and of a length and a rate."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from inflate.errors import CheckpointError, ConfigError
from inflate.families import dynamicrafter, i2vgen_xl, i2vgen_xl_refiner, video_ldm
from inflate.models.trained_clips import TrainedClips

KINDS = (dynamicrafter.Clips, i2vgen_xl.Clips, i2vgen_xl_refiner.Clips, video_ldm.Clips)


def written(folder: Path, family: str, clips: dict[str, Any]) -> Path:
    file = folder / "inflate.json"
    file.write_text(json.dumps({"family": family, "clips": clips}))
    return file


@pytest.mark.parametrize("kind", KINDS)
def test_clips_are_read_as_they_were_written(kind: type[TrainedClips], tmp_path: Path) -> None:
    clips = kind(frames=3, fps=12.5, height=16, width=24)
    assert kind.read(written(tmp_path, kind.family, asdict(clips))) == clips


@pytest.mark.parametrize("kind", KINDS)
def test_clips_of_another_family_or_that_are_not_whole_are_refused(kind: type[TrainedClips], tmp_path: Path) -> None:
    clips = asdict(kind())
    with pytest.raises(CheckpointError, match=f"is of family svd, not {kind.family};"):
        kind.read(written(tmp_path, "svd", clips))
    with pytest.raises(CheckpointError, match="is not whole: .*'odd'.*; export the model again"):
        kind.read(written(tmp_path, kind.family, {**clips, "odd": 1}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [{"frames": 0}, {"fps": 0.0}, {"fps": float("inf")}])
def test_clips_without_a_length_or_a_rate_are_refused(kind: type[TrainedClips], wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        kind(**wrong)
