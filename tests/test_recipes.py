"""The recipe as a user starts it: in a process of its own, its files, its exit status."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from helpers import load_recipe
from inflate.config import load
from inflate.data import video
from inflate.data.demo_clips import build
from inflate.errors import ConfigError
from inflate.families.dynamicrafter import DynamiCrafter
from inflate.families.i2vgen_xl import Clips as FirstFrameClips
from inflate.families.i2vgen_xl import I2VGenXL
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.families.video_ldm import Clips, VideoLDM
from inflate.measures import SHARES
from inflate.training import caching, ladder, log

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
    told = ("metrics.json", "metrics.png", "README.md", "before_after.mp4", "before_after.png")
    for name in ("config.yaml", "environment.json", *told):
        assert (output / name).stat().st_size > 0, name
        assert name not in told or str(output / name) in first.stdout
    assert (output / "samples" / "step-000000" / "00.mp4").is_file()
    assert (output / "export" / "model_index.json").is_file()
    again = recipe(*settings)
    assert again.returncode == 1
    assert "training.resume=latest" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of two aspects, and images, three of each to train on and one of each held out."""
    root = tmp_path_factory.mktemp("mixed")
    for split, count in (("train", 3), ("held_out", 1)):
        for number in range(count):
            noise = np.random.default_rng(number).integers(0, 255, (8, 48, 64, 3), dtype=np.uint8)
            video.write(root / split / f"{number}-wide.mp4", noise[:, :32], 8)
            video.write(root / split / f"{number}-square.mp4", noise[:, :, :48], 8)
            Image.fromarray(noise[0, :32]).save(root / split / f"{number}-still.png")
    return root


@pytest.fixture
def _cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(log, "plot", lambda path, _: path.touch())
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def in_buckets(stage: str, clips: Path, output: Path, *arguments: str) -> dict[str, list[dict[str, float]]]:
    """Three samples per step, so that an epoch has one step of each bucket; the metrics of such a run, in here."""
    module = load_recipe(ROOT / "recipes" / "svd_finetune.py")
    cards = [str(ROOT / "recipes" / name) for name in (f"svd_demo_{stage}.yaml", "svd_demo_short.yaml")]
    quick = ("training.precision=no", "training.ema=0", "sampling.steps=1", "sampling.guidance_max=1")
    quiet = ("training.tracker=none", "training.progress=false", "training.log_every=1", "data.seconds_per_clip=null")
    common = (f"data.path={clips}", "data.captions=optional", f"training.output={output}", "training.batch=3")
    module.train(load(module.Config, [*cards, *common, *quick, *quiet, *arguments]))
    metrics: dict[str, list[dict[str, float]]] = json.loads((output / "metrics.json").read_text())
    assert all(math.isfinite(value) for rows in metrics.values() for row in rows for value in row.values())
    return metrics


@pytest.mark.slow
@pytest.mark.usefixtures("_cpu")
def test_clips_and_images_train_together_in_buckets(mixed: Path, tmp_path: Path) -> None:
    buckets = "data.buckets=[4x32x64,32x32@6,1x32x64]"
    metrics = in_buckets(
        "image_to_video", mixed, tmp_path / "run", buckets, "training.steps=3", "image_to_video.bands=1"
    )
    assert len(metrics["history"]) == 3
    assert metrics["held_out"][-1]["training-clip loss"] > 0
    assert {"held-out loss in 4x32x64", "held-out loss in 6x32x32", "held-out loss in 1x32x64"} <= set(
        metrics["held_out"][-1]
    )
    table = (tmp_path / "run" / "clips.txt").read_text()
    for bucket in ("4x32x64", "6x32x32", "1x32x64"):
        assert f"bucket {bucket}: 3 windows of 3 clips" in table
        assert f"bucket {bucket}: 1 window of 1 clip" in table.split("held out")[1]
    exported = json.loads((tmp_path / "run" / "export" / "inflate.json").read_text())
    assert [exported[name] for name in ("frames", "height", "width", "fps")] == [4, 32, 64, 8]


@pytest.mark.slow
@pytest.mark.usefixtures("_cpu")
def test_a_run_from_a_cache_is_the_run_from_the_files(mixed: Path, tmp_path: Path) -> None:
    arguments = ["data.buckets=[4x32x64,32x32@6,1x32x64]", "training.steps=3", "image_to_video.bands=1"]
    plain = in_buckets("image_to_video", mixed, tmp_path / "plain", *arguments)
    cache = f"data.cache={tmp_path / 'cache'}"
    card = str(ROOT / "recipes" / "svd_demo_image_to_video.yaml")
    sources = [card, f"data.path={mixed}", "data.captions=optional", "data.seconds_per_clip=null", arguments[0], cache]
    caching.cache_clips(load(caching.Caching, sources, partial=True), False, False, lambda _: lambda *_: None, print)
    cached = in_buckets("image_to_video", mixed, tmp_path / "cached", *arguments, cache)
    for ours, theirs in zip(cached["history"], plain["history"], strict=True):
        assert ours["loss/unet"] == pytest.approx(theirs["loss/unet"], rel=1e-5)
    assert cached["held_out"][-1] == pytest.approx(plain["held_out"][-1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("_cpu")
def test_a_decoder_trains_in_buckets_and_is_measured_in_the_first(mixed: Path, tmp_path: Path) -> None:
    buckets = ("data.buckets=[4x32x64,32x32@6]", "data.max_dropped=0.5", "decoder.discriminator_channels=8")
    metrics = in_buckets("decoder", mixed, tmp_path / "run", *buckets, "training.steps=4")
    assert [row["step"] for row in metrics["history"]] == [1, 2, 3, 4]
    assert metrics["held_out"][-1]["training-clip noisy/psnr"] > 0
    table = (tmp_path / "run" / "clips.txt").read_text()
    assert "0-still.png 1 image 64x32 - dropped: an image, and no bucket has one frame" in " ".join(table.split())
    exported = json.loads((tmp_path / "run" / "export" / "inflate.json").read_text())
    assert exported["decode_chunk"] == 4


def measured(output: Path) -> dict[str, Any]:
    """What a run measured, without how long it took."""
    metrics = json.loads((output / "metrics.json").read_text())
    for row in metrics["history"]:
        for name in ("clips_per_second", *SHARES):
            del row[name]
    return metrics


@pytest.mark.slow
@pytest.mark.usefixtures("_cpu")
def test_a_saved_config_runs_the_run_again(clips: Path, tmp_path: Path) -> None:
    svd = load_recipe(ROOT / "recipes" / "svd_finetune.py")
    settings = [
        str(ROOT / "recipes" / "svd_demo_image_to_video.yaml"), str(ROOT / "recipes" / "svd_demo_short.yaml"),
        f"data.path={clips}", "data.frames=3", "data.height=32", "data.width=32", "image_to_video.held_out_clips=1",
        "sampling.steps=2", "training.steps=3", "training.batch=1", "training.log_every=1", "training.tracker=none",
        "training.progress=false", "data.seconds_per_clip=null",
    ]  # fmt: skip
    first, again = tmp_path / "first", tmp_path / "again"
    torch.manual_seed(1)  # whatever happened before
    svd.train(load(svd.Config, [*settings, f"training.output={first}"]))
    torch.manual_seed(2)
    svd.train(load(svd.Config, [str(first / "config.yaml"), f"training.output={again}"]))
    assert len(measured(first)["history"]) == 3
    assert measured(first) == measured(again)
    weights = Path("export/unet/diffusion_pytorch_model.safetensors")
    assert (first / weights).read_bytes() == (again / weights).read_bytes()
    records = [json.loads((output / "environment.json").read_text()) for output in (first, again)]
    assert records[0]["data"] == records[1]["data"]
    assert records[0]["data"]["samples"] == 4
    assert records[0]["data"]["digest"].startswith("sha256:")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainng.lr=1"], "did you mean training.lr"),
        (["stage=decoder", "data.path=nowhere"], "nowhere"),
        (["stage=decoder", "data.path=nowhere", "training.lr=fast"], "training.lr"),
        (["stage=decoder", "data.path=nowhere", "model.path=no_model"], "shipped: pocket, pocket-t2v"),
        (["stage=decoder", "data.path=nowhere", "model.path=no.safetensors"], "no.safetensors does not exist"),
        (
            ["stage=decoder", "data.cache=c", "data.cache_draws=2"],
            "data.cache_draws: stage=decoder has no noised condition frame",
        ),
        (["stage=decoder", "data.buckets=[4x32x64,1x32x64]"], "bucket 1x32x64 has one frame; stage=decoder needs two"),
        (["stage=decoder", "training.precision=pure_bf16"], "leave the encoder as it is; use bf16"),
        (["stage=image_to_video", "data.buckets=[1x32x64]"], "no bucket has two frames or more, only 1x32x64"),
    ],
)
def test_a_mistake_is_told_plainly_with_status_1(arguments: list[str], message: str) -> None:
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


def aligned(clips: Path, output: Path, *arguments: str) -> Path:
    """The run of a step of text-to-video on the pocket model."""
    module = load_recipe(ROOT / "recipes" / "video_ldm_finetune.py")
    small = ("training.steps=1", "training.batch=2", "training.precision=no", "training.warmup=0", "sampling.steps=1")
    few = ("text_to_video.held_out_clips=1", "text_to_video.train_clips=1", "text_to_video.preview_clips=1")
    quiet = ("training.tracker=none", "training.progress=false", "data.seconds_per_clip=null")
    card, places = str(ROOT / "recipes" / "video_ldm_pocket.yaml"), (f"data.path={clips}", f"training.output={output}")
    sources = [card, *small, *few, *quiet, *places, *arguments]
    module.main(load(module.Config, sources), sources)
    return output


@pytest.mark.slow
@pytest.mark.usefixtures("_cpu")
def test_text_to_video_trains_from_a_cache(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, card = f"data.cache={tmp_path / 'cache'}", str(ROOT / "recipes" / "video_ldm_pocket.yaml")
    sources = [card, f"data.path={clips}", "data.seconds_per_clip=null", "data.window=centre", cache]
    caching.cache_clips(load(caching.Caching, sources, partial=True), False, False, lambda _: lambda *_: None, print)
    output = aligned(clips, tmp_path / "run", cache, "data.window=centre")
    assert f"card: {output / 'README.md'}" in capsys.readouterr().out
    assert 'inflate generate export "a prompt" -o out.mp4' in (output / "README.md").read_text()
    assert VideoLDM.load(output / "export").clips == Clips(8, 8.0, 64, 64)
    losses = json.loads((output / "metrics.json").read_text())
    assert losses["held_out"][0]["held-out loss"] == losses["held_out"][0]["held-out loss, temporal layers bypassed"]


def test_images_are_refused_where_only_temporal_layers_learn(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bucket 1x64x64 has one frame.*stage=joint"):
        aligned(clips, tmp_path / "run", "data.buckets=[8x64x64,1x64x64]")


@pytest.mark.slow
@pytest.mark.usefixtures("_cpu")
def test_a_run_that_is_to_fit_a_card_keeps_to_what_was_predicted(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "MEASURES", ())
    few = ("text_to_video.train_clips=0", "text_to_video.bands=1")
    output = aligned(clips, tmp_path / "run", "training.fit=0.5GB", "training.steps=2", *few)
    memory = json.loads((output / "environment.json").read_text())["memory"]
    assert memory["predicted"].keys() <= memory["measured"].keys()
    ahead, real = memory["predicted"], memory["measured"]
    for phase in ("encode", "forward", "backward", "update"):
        assert real[phase] == pytest.approx(ahead[phase], rel=0.02), phase
    for phase in (
        "evaluate",
        "preview",
    ):  # predicted as after a resumption: clips to encode beside the optimiser's state
        assert 0.7 * ahead[phase] < real[phase] < 1.02 * ahead[phase], phase
    assert re.search(r"memory at most, GB +predicted +measured +difference\n +encode ", capsys.readouterr().out)


def test_a_run_that_fits_no_card_says_what_is_smaller(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "MEASURES", ())
    with pytest.raises(ConfigError, match=r"training\.fit=0\.01GB: nothing fits 0\.01GB: with .*smaller are data"):
        aligned(clips, tmp_path / "run", "training.fit=0.01GB")
    with pytest.raises(ConfigError, match=r"training\.fit=huge: write its memory"):
        aligned(clips, tmp_path / "other", "training.fit=huge")


def animated(stage: str, clips: Path, output: Path, *arguments: str) -> Path:
    """The export of a step of a stage of DynamiCrafter on the pocket models."""
    module = load_recipe(ROOT / "recipes" / "dynamicrafter_finetune.py")
    small = ("training.steps=1", "training.batch=2", "training.precision=no", "training.warmup=0", "sampling.steps=1")
    few = [f"image_text_to_video.{name}=1" for name in ("held_out_clips", "train_clips", "preview_clips", "bands")]
    quiet = ("training.tracker=none", "training.progress=false", "data.seconds_per_clip=null")
    card = str(ROOT / "recipes" / f"dynamicrafter_pocket_{stage}.yaml")
    sources = [card, *small, *few, *quiet, f"data.path={clips}", f"training.output={output / stage}", *arguments]
    module.main(load(module.Config, sources), sources)
    return output / stage / "export"


@pytest.mark.slow
@pytest.mark.usefixtures("_cpu")
def test_the_pocket_learns_to_animate_in_three_stages(clips: Path, tmp_path: Path) -> None:
    stream = animated("context", clips, tmp_path)
    assert {file.name for file in stream.iterdir()} == {"image_stream.safetensors", "inflate.json"}
    assert "model.image_stream=export" in (tmp_path / "context" / "README.md").read_text()
    adapted = animated("adapt", clips, tmp_path, f"model.image_stream={stream}")
    assert not DynamiCrafter.load(adapted).takes_detail
    drawn = animated("joint", clips, tmp_path, f"model.path={adapted}")
    family = DynamiCrafter.load(drawn)
    assert family.takes_detail
    assert (family.clips.frames, family.clips.usual, family.size) == (8, 8.0, (64, 64))
    assert "other_lengths=interpolate" in (tmp_path / "joint" / "README.md").read_text()
    scores = json.loads((tmp_path / "joint" / "samples" / "step-000001" / "scores.json").read_text())
    assert scores["frame 0 ssim, sample"] < scores["frame 0 ssim, autoencoder"]


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("joint", [str(ROOT / "adapters" / "full_lora.yaml")], "stage=joint says what of the model learns"),
        ("adapt", ["data.cache=c", "data.cache_draws=2"], "stage=adapt has no noised condition frame"),
        ("context", ["data.frames=2"], r"set data\.frames=1"),
        ("finetune", ["data.stride=3", "data.stride_to=2"], r"data\.stride_to: strides are drawn from data\.stride"),
    ],
)
def test_what_a_stage_of_animation_has_not_is_refused(
    stage: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        animated(stage, tmp_path, tmp_path / "run", *arguments)


def i2vgen_xl(stage: str, clips: Path, output: Path, *arguments: str) -> Path:
    """The export of a step of a stage of I2VGen-XL on the pocket models."""
    module = load_recipe(ROOT / "recipes" / "i2vgen_xl_finetune.py")
    small = ("training.steps=1", "training.batch=2", "training.precision=no", "training.warmup=0", "sampling.steps=1")
    few = [f"i2vgen_xl.{name}=1" for name in ("held_out_clips", "train_clips", "preview_clips", "bands")]
    quiet = ("training.tracker=none", "training.progress=false", "data.seconds_per_clip=null", "refining.steps=1")
    card = str(ROOT / "recipes" / f"i2vgen_xl_pocket_{stage}.yaml")
    short = ("data.frames=3", "data.height=64", "data.width=64")
    places = (f"data.path={clips}", f"training.output={output / stage}")
    sources = [card, *small, *few, *quiet, *short, *places, *arguments]
    module.main(load(module.Config, sources), sources)
    return output / stage / "export"


@pytest.mark.slow
@pytest.mark.usefixtures("_cpu")
def test_the_pocket_learns_both_stages_of_i2vgen_xl(clips: Path, tmp_path: Path) -> None:
    cache, card = f"data.cache={tmp_path / 'cache'}", str(ROOT / "recipes" / "i2vgen_xl_pocket_base.yaml")
    window = ("data.frames=3", "data.window=centre", cache)
    sources = [card, f"data.path={clips}", "data.seconds_per_clip=null", *window]
    caching.cache_clips(load(caching.Caching, sources, partial=True), False, False, lambda _: lambda *_: None, print)
    told = ("i2vgen_xl.fade_in=0", "i2vgen_xl.negative=a box", "hierarchy.clip_tokens=2")
    base = I2VGenXL.load(i2vgen_xl("base", clips, tmp_path, *window[1:], *told))
    assert base.hierarchy.clip_tokens == 2
    assert base.clips == FirstFrameClips(3, 8.0, 64, 64, negative="a box")
    table = (tmp_path / "base" / "README.md").read_text()
    assert all(f"held-out loss, without {part}" in table for part in ("text", "detail", "global", "clip"))
    refined = i2vgen_xl("refine", clips, tmp_path, f"model.path={tmp_path / 'base' / 'export'}", "i2vgen_xl.levels=400")
    family = Refiner.load(refined)
    assert (family.clips.levels, family.clips.frames, family.size) == (400, 3, (64, 64))
    scores = json.loads((tmp_path / "refine" / "samples" / "step-000001" / "scores.json").read_text())
    assert 0 < scores["sharpness, enlarged"] < 1
    assert '--prompt "a prompt" --steps 1 --guidance 3 -o out.mp4' in table
    told = (
        "--start inversion --strength 0.1429 --steps 1 --guidance 1 --suffix '' --no-freeu --keep-colours 2 -o out.mp4"
    )
    assert told in (tmp_path / "refine" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("_cpu")
def test_an_adapter_on_a_base_of_i2vgen_xl_is_verified(clips: Path, tmp_path: Path) -> None:
    base = i2vgen_xl("base", clips, tmp_path, "i2vgen_xl.fade_in=0")
    few = ("adapter.kind=lora", "adapter.rank=2", "adapter.targets=[attn2.to_v]")
    trained = (f"model.path={base}", "model.image_encoder=null", "i2vgen_xl.fade_in=0", "i2vgen_xl.gamma=null")
    export = i2vgen_xl("base", clips, tmp_path / "lora", *trained, *few)
    card = (export / "README.md").read_text()
    assert "inflate sample" in card
    assert "came within" in card
    with pytest.raises(ConfigError, match="no model of stage=refine yet"):
        i2vgen_xl("refine", clips, tmp_path / "other", f"model.path={base}", *few)


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("base", ["i2vgen_xl.levels=600"], r"i2vgen_xl\.levels is for stage=refine"),
        ("refine", ["i2vgen_xl.fade_in=5"], r"i2vgen_xl\.fade_in is for stage=base"),
        ("base", [], r"i2vgen_xl\.fade_in=300: a run of training\.steps=1 would end"),
        ("refine", ["data.cache=c", "data.cache_draws=2"], "stage=refine has no noised condition frame"),
    ],
)
def test_what_a_stage_of_i2vgen_xl_has_not_is_refused(
    stage: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        i2vgen_xl(stage, tmp_path, tmp_path / "run", *arguments)
