"""The command line: its answers, its files, and one line with status 1 for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from helpers import CROSS, tiny_unet_sd2, tiny_vae
from inflate import __version__, cli, shelves
from inflate.data import video


def inflate(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    result = inflate(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion folder with an image encoder."""
    from diffusers import DDIMScheduler
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("image_model")
    tiny_unet_sd2().save_pretrained(folder / "unet")
    tiny_vae().save_pretrained(folder / "vae")
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    ).save_pretrained(folder / "scheduler")
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=CROSS,
    )
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    return folder


def test_what_transformers_says_of_itself_is_left_out_and_its_warnings_are_not() -> None:
    script = (
        "from inflate.families.svd import SVD; SVD.load('pocket', frames=2)\n"
        "from transformers.utils.import_utils import logger; logger.warning('this matters')"
    )
    told = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=told)
    assert "this matters" in done.stderr
    assert "torchvision" not in done.stderr
    assert "Loading weights" not in done.stderr


def test_version() -> None:
    assert inflate("--version").stdout == f"inflate {__version__}\n"


def test_help_lists_the_commands() -> None:
    text = inflate("--help").output
    assert all(command in text for command in ("init", "verify", "sample", "generate", "evaluate"))


def test_a_wrong_option_ends_with_status_2() -> None:
    assert inflate("sample", "--stepps", "3").exit_code == 2


def test_init_copies_the_shelves(tmp_path: Path) -> None:
    result = inflate("init", tmp_path / "new" / "project")
    assert result.exit_code == 0, result.output
    project = tmp_path / "new" / "project"
    for shelf in shelves.SHELVES:
        copied = {file.relative_to(project) for file in (project / shelf).rglob("*") if file.is_file()}
        assert copied
        assert all((shelves.find() / name).read_bytes() == (project / name).read_bytes() for name in copied)
    assert (project / "recipes" / "svd_finetune.py").is_file()
    assert not list(project.rglob("__init__.py"))


def test_init_refuses_what_exists_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "datasets").mkdir()
    assert "datasets exists already" in refused("init", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["datasets"]


def test_init_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("init", tmp_path / "file")


def test_shelves_that_were_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shelves, "_candidates", lambda: [tmp_path])
    assert "were not installed" in refused("init", tmp_path / "project")


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Two sound clips and a torn one to train on, a sound one held out, and an image."""
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), dtype=np.uint8)
    for name in ("train/a", "train/b", "train/torn", "test/c"):
        video.write(tmp_path / "clips" / f"{name}.mp4", frames, 8)
    torn = tmp_path / "clips" / "train" / "torn.mp4"
    torn.write_bytes(torn.read_bytes()[:2000])
    Image.fromarray(frames[0]).save(tmp_path / "clips" / "train" / "still.png")
    return tmp_path / "clips"


def test_data_check_lists_every_window_and_every_drop(clips: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("training: {steps: 3}\ndata: {split: train, held_out: test, captions: optional}\n")
    buckets = ("data.buckets=[4x32x48,48x32@1]", "data.window=chunk", "data.seconds_per_clip=null")
    common = (recipe, f"data.path={clips}", *buckets)
    result = inflate("data", "check", *common, "data.max_dropped=0.3")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "train"
    assert lines[2:4] == [
        "a.mp4 9 8 48x32 4x32x48 used: frames 0-3 at 8 fps",
        "a.mp4 9 8 48x32 4x32x48 used: frames 4-7 at 8 fps; 1 left over",
    ]
    assert "still.png 1 image 48x32 1x32x48 used: the image" in lines
    assert any(line.startswith("torn.mp4 - - - - dropped: ") for line in lines)
    assert "bucket 4x32x48: 4 windows of 2 clips" in lines
    assert lines[lines.index("test (held out)") + 2] == "c.mp4 9 8 48x32 4x32x48 used: frames 2-5 at 8 fps"
    stopped = inflate("data", "check", *common, "data.max_dropped=0.2")
    assert stopped.exit_code == 1
    assert stopped.stdout == result.stdout
    assert "1 of 4 clips are unusable" in stopped.stderr


def test_data_check_names_a_wrong_setting(clips: Path) -> None:
    assert "did you mean data.window" in refused("data", "check", f"data.path={clips}", "data.windw=head")
    assert "entry 1 of 1, '4by4'" in refused("data", "check", "data.buckets=[4by4]")


def test_verify_reports_and_finds_no_difference(image_model: Path) -> None:
    result = inflate("verify", image_model)
    assert result.exit_code == 0, result.output
    assert "UNet: largest difference from the image model 0.0e+00" in result.stdout
    assert "decoder: largest difference from the image model 0.0e+00" in result.stdout
    assert "created" in result.stdout


def test_verify_ends_with_status_1_on_a_difference(image_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflate.surgery.verify_identity", lambda *_: float("nan"))
    result = inflate("verify", image_model)
    assert result.exit_code == 1
    assert "differs from its parent" in result.stderr


def test_verify_needs_an_image_model(tmp_path: Path) -> None:
    assert "missing" in refused("verify", tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNetSpatioTemporalConditionModel"}')
    assert "is a video model already" in refused("verify", tmp_path)
    assert "does not exist" in refused("verify", "./nowhere")


def test_evaluate_prints_a_table_and_writes_everything(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 48, 3), dtype=np.uint8)
    for name in ("real/a", "real/b", "made/a", "made/b"):
        video.write(tmp_path / f"{name}.mp4", frames, 8)
    output = tmp_path / "evaluation.json"
    command = ("evaluate", tmp_path / "made", "--real", tmp_path / "real", "-o", output, "--frames", 4)
    result = inflate(*command)
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "measure mean 95 % interval clips better"
    assert "psnr 100 100 to 100 2 higher" in lines
    assert lines[-1] == f"wrote {output}"
    assert json.loads(output.read_text())["protocol"]["frames"] == 4
    assert "--overwrite" in refused(*command)
    beside = inflate(*command, "--overwrite", "--against", output)
    assert "psnr 100 100 to 100 2 100 higher" in " ".join(beside.stdout.split())
    assert "no such folder" in refused("evaluate", tmp_path / "absent")
