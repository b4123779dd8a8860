"""Folders of videos are measured whole, and what does not fit together is named with its remedy."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import TinyI3D, save_script, write_clip, write_lpips
from PIL import Image

from inflate.data import video
from inflate.data.demo import draw_scene, render
from inflate.errors import ConfigError, DataError, InflateError
from inflate.metrics.agreement import ClipModel, agreement
from inflate.metrics.evaluate import Evaluation, Settings, evaluate
from inflate.metrics.features import FeatureNetwork
from inflate.metrics.folders import Cut, parse_size
from inflate.metrics.frechet import frechet_distance
from inflate.metrics.perceptual import LPIPS
from inflate.metrics.report import interval, read_earlier

COUNT, FRAMES, SIDE, FPS = 4, 6, 32, 8


def measured(settings: Settings) -> Evaluation:
    return evaluate(settings, lambda name: lambda done, whole: None, torch.device("cpu"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of the demo world with captions and the motion's name."""
    folder, rng = tmp_path_factory.mktemp("real"), np.random.default_rng(5)
    rows = []
    for number in range(COUNT):
        scene = draw_scene(rng)
        video.write(folder / f"{number}.mp4", render(scene, np.arange(FRAMES) / FPS, SIDE), FPS)
        rows.append({"file_name": f"{number}.mp4", "caption": scene.caption, "motion": scene.motion})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def noisy(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same clips, worsened, without captions."""
    folder, rng = tmp_path_factory.mktemp("generated"), np.random.default_rng(0)
    for file in sorted(real.glob("*.mp4")):
        frames = video.read(file)
        video.write(folder / file.name, np.clip(frames + rng.normal(0, 9, frames.shape), 0, 255).astype(np.uint8), FPS)
    return folder


@pytest.fixture
def generated(noisy: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(noisy, tmp_path / "generated"))


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    save_script(TinyI3D(), folder / "i3d.pt")
    write_clip(folder / "clip")
    write_lpips(folder / "vgg.safetensors", folder / "heads.safetensors")
    return folder


@pytest.fixture(scope="module")
def everything(noisy: Path, real: Path, networks: Path) -> Evaluation:
    files = [networks / name for name in ("clip", "i3d.pt", "vgg.safetensors", "heads.safetensors")]
    return measured(Settings(noisy, real, real, *files))


def test_each_clip_has_every_measure_by_its_definition(
    everything: Evaluation, noisy: Path, real: Path, networks: Path
) -> None:
    clip = ClipModel.load(networks / "clip")
    lpips = LPIPS.from_files(networks / "vgg.safetensors", networks / "heads.safetensors")
    assert list(everything.clips) == [str(n) for n in range(COUNT)]
    for name, row in everything.clips.items():
        x, y = (video.read(folder / f"{name}.mp4").astype(np.float64) / 255 for folder in (noisy, real))
        assert row["psnr"] == pytest.approx(-10 * np.log10(np.square(x - y).mean()), abs=1e-4)
        assert row["frame change"] == pytest.approx(np.abs(np.diff(x, axis=0)).mean(), abs=1e-6)
        assert row["flicker error"] == pytest.approx(np.abs(np.diff(x - y, axis=0)).mean(), abs=1e-6)
        shown = clip.frames(video.read(noisy / f"{name}.mp4"))
        assert row["prompt agreement"] == pytest.approx(agreement(shown, clip.prompt(row["prompt"])).mean().item())
        pair = [torch.tensor(z, dtype=torch.float32).permute(0, 3, 1, 2) * 2 - 1 for z in (x, y)]
        assert row["lpips"] == pytest.approx(lpips(*pair).mean().item(), rel=1e-4)
        assert {"motion", "moves", "scene", "object", "ssim", "frame consistency", "direction as asked"} <= row.keys()


def test_the_means_have_intervals_and_directions(everything: Evaluation) -> None:
    values = np.array([row["psnr"] for row in everything.clips.values()])
    low, high = interval(values, seed=0)
    expected = {"mean": values.mean(), "low": low, "high": high, "clips": COUNT, "better": "higher"}
    assert everything.means["psnr"] == pytest.approx(expected)
    assert low < values.mean() < high
    assert everything.means["motion"]["better"] == "nearer real"
    assert everything.means["real/motion"]["better"] == ""


def test_the_distance_of_the_sets_carries_its_protocol(
    everything: Evaluation, noisy: Path, real: Path, networks: Path
) -> None:
    network = FeatureNetwork.load(networks / "i3d.pt")
    sets = [torch.stack([network(video.read(f)) for f in sorted(x.glob("*.mp4"))]) for x in (real, noisy)]
    assert everything.sets["fvd"] == pytest.approx(frechet_distance(*sets))
    for part in (
        "real=4 generated=4 frames=6", "stride=1 fps=8 size=32x32 resize=none, then by the network crop=none",
        "real_codec=h264/yuv420p", f"network_sha256={network.sha256}", "seed=0", "WARNING: 4 clips for 6 dimensions",
    ):  # fmt: skip
        assert part in everything.sets["protocol"]
    assert everything.sets["protocol"] in everything.table()


def test_a_folder_against_itself_is_without_fault(real: Path, networks: Path) -> None:
    found = measured(Settings(real, real, fvd_network=networks / "i3d.pt"))
    means = {name: row["mean"] for name, row in found.means.items()}
    assert (means["psnr"], means["flicker error"], means["direction as real"]) == (100, 0, 1)
    assert means["ssim"] == pytest.approx(1)
    assert means["direction as asked"] == means["real/direction as asked"]
    assert abs(found.sets["fvd"]) < 1e-6


def test_the_json_holds_everything_and_is_set_beside_a_later_one(
    everything: Evaluation, noisy: Path, real: Path, networks: Path, tmp_path: Path
) -> None:
    everything.write(tmp_path / "old.json")
    held = read_earlier(tmp_path / "old.json")
    assert held["protocol"] == everything.protocol
    assert held["clips"] == everything.clips
    assert held["versions"]["torch"] == torch.__version__
    assert "before" in everything.table(held).splitlines()[0]
    with pytest.raises(DataError, match=r"old.json: .*network_sha256  here and [0-9a-f]{64} there"):
        measured(Settings(noisy, real, against=tmp_path / "old.json"))
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(InflateError, match="other.json"):
        read_earlier(tmp_path / "other.json")


def test_sets_of_other_names_need_unpaired(generated: Path, real: Path, networks: Path) -> None:
    (generated / "0.mp4").rename(generated / "new.mp4")
    with pytest.raises(DataError, match=r"generated: new\n.*: 0\n.*--unpaired"):
        measured(Settings(generated, real))
    found = measured(Settings(generated, real, fvd_network=networks / "i3d.pt", unpaired=True))
    assert "psnr" not in found.means
    assert found.sets["fvd"] > 0


def test_clips_that_differ_are_named_with_a_remedy_that_works(generated: Path, real: Path) -> None:
    frames = video.read(generated / "0.mp4")
    changed = {
        "size": (frames.repeat(2, 1).repeat(2, 2), FPS, "name one size for all with --size 32x32", Cut(size=(32, 32))),
        "length": (frames[:5], FPS, "measure as many of each with --frames 5", Cut(frames=5)),
        "rate": (frames.repeat(2, 0), 2 * FPS, "16; resample with --fps 8", Cut(frames=6, fps=8)),
    }
    for other, fps, remedy, cut in changed.values():
        video.write(generated / "0.mp4", other, fps)
        with pytest.raises(DataError, match=rf"\b0.mp4 .*{remedy}"):
            measured(Settings(generated, real, cut=replace(cut, size=None, frames=None, fps=None)))
        found = measured(Settings(generated, real, cut=cut))
        assert found.clips["0"]["psnr"] > 20
        assert found.protocol["crop"] == ("centre" if cut.size else "none")


def test_clips_too_short_for_the_frames_asked_are_listed(generated: Path) -> None:
    with pytest.raises(DataError, match=r"0.mp4: too short(.|\n)*3.mp4: too short(.|\n)*--frames"):
        measured(Settings(generated, cut=Cut(frames=9)))
    with pytest.raises(DataError, match="say with --frames"):
        measured(Settings(generated, cut=Cut(stride=2)))


def test_unreadable_clips_are_all_named(generated: Path) -> None:
    for name in ("1", "3"):
        (generated / f"{name}.mp4").write_bytes((generated / f"{name}.mp4").read_bytes()[:900])
    with pytest.raises(DataError, match=r"1.mp4: (.|\n)*3.mp4: (.|\n)*mend or remove"):
        measured(Settings(generated))


def test_stills_are_left_out_and_told(generated: Path) -> None:
    Image.new("RGB", (32, 32)).save(generated / "0.png")
    found = measured(Settings(generated))
    assert len(found.clips) == COUNT
    assert "1 stills are no videos" in found.notes[0]
    for file in generated.glob("*.mp4"):
        file.unlink()
    with pytest.raises(DataError, match="holds no video, only 1 stills"):
        measured(Settings(generated))


def test_prompts_are_needed_by_clip_and_cut_ones_are_told(generated: Path, real: Path, networks: Path) -> None:
    clip = networks / "clip"
    with pytest.raises(DataError, match=r"0: has no caption(.|\n)*--prompts"):
        measured(Settings(generated, clip=clip))
    (generated / "4.mp4").write_bytes((generated / "3.mp4").read_bytes())
    with pytest.raises(DataError, match="4: is not in"):
        measured(Settings(generated, prompts=real, clip=clip))
    for number in range(COUNT + 1):
        (generated / f"{number}.txt").write_text("a disc " * (20 if number == 2 else 1))
    assert "first 20 tokens of a prompt; 1 are longer (2...)" in measured(Settings(generated, clip=clip)).notes[0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"vgg": Path("v")}, "both --vgg and --lpips-heads"),
        ({"fvd_network": Path("i3d.pt")}, "--fvd-network compares with real videos"),
        ({"unpaired": True}, "--unpaired compares with real videos"),
        ({"real": Path("r"), "unpaired": True, "vgg": Path("v"), "lpips_heads": Path("h")}, "compare pairs"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Settings(Path("generated"), **options)


def test_a_size_is_width_by_height() -> None:
    assert parse_size("64x48") == (48, 64)
    for wrong in ("64", "64x", "0x4", "axb"):
        with pytest.raises(ConfigError, match=f"--size {wrong}"):
            parse_size(wrong)
    with pytest.raises(ConfigError, match="--frames 1"):
        Cut(frames=1)


def test_a_distance_of_single_videos_is_refused(generated: Path, real: Path, networks: Path) -> None:
    for name in ("1", "2", "3"):
        (generated / f"{name}.mp4").unlink()
    with pytest.raises(DataError, match="two videos or more"):
        measured(Settings(generated, real, fvd_network=networks / "i3d.pt", unpaired=True))


def test_small_frames_are_refused_before_they_are_measured(generated: Path, real: Path) -> None:
    with pytest.raises(DataError, match="10x10 are too small"):
        measured(Settings(generated, real, cut=Cut(size=(10, 10))))


def test_the_interval_of_the_mean_is_near_the_normal_one() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400)
    low, high = interval(values, seed=0)
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.03)
    assert interval(values, seed=0) == (low, high)
    assert interval(values[:1], seed=0) == (None, None)
