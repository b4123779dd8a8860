"""The recipe as a user starts it: in a process of its own, its files, its exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from inflate.data.demo_clips import build

ROOT = Path(__file__).parents[1]


def recipe(*arguments: object, name: str = "svd_finetune.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes" / name), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110, check=False)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("demo") / "clips", clips=4, held_out=2)


@pytest.mark.slow
def test_a_stage_leaves_everything_and_resumes(clips: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = [
        ROOT / "recipes" / "svd_demo_image_to_video.yaml", ROOT / "recipes" / "svd_demo_short.yaml",
        f"data.path={clips}", "image_to_video.held_out_clips=1", "sampling.steps=2", f"training.output={output}",
    ]  # fmt: skip
    first = recipe(*settings, "training.steps=2", "training.checkpoint_every=1")
    assert first.returncode == 0, first.stderr
    for name in ("config.yaml", "metrics.json", "metrics.png", "README.md", "before_after.mp4", "before_after.png"):
        assert (output / name).stat().st_size > 0, name
        assert name == "config.yaml" or str(output / name) in first.stdout
    assert (output / "samples" / "step-000000" / "00.mp4").is_file()
    assert (output / "export" / "model_index.json").is_file()
    again = recipe(*settings)
    assert again.returncode == 1
    assert "training.resume=latest" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainng.lr=1"], "did you mean training.lr"),
        (["stage=decoder", "data.path=nowhere"], "nowhere"),
        (["stage=decoder", "data.path=nowhere", "training.lr=fast"], "training.lr"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(arguments: list[str], message: str) -> None:
    result = recipe(*arguments)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr


def test_help_lists_every_setting_with_its_meaning() -> None:
    result = recipe("--help")
    assert result.returncode == 0
    assert "noise_aug_mean" in result.stdout
