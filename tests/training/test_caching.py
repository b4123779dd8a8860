"""`inflate data cache` and `data show`, in one process and in two, on the pocket model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate.state import AcceleratorState
from original_files import write_whole_file

from inflate.data import video
from inflate.data.clips import ClipDataset
from inflate.data.demo_clips import build
from inflate.data.settings import Data
from inflate.data.store import Store
from inflate.errors import ConfigError, DataError, InflateError
from inflate.training.caching import Caching, Model, cache_clips, show_cached
from inflate.training.encoding import FirstFrameClipEncoder, ImageTextClipEncoder
from inflate.training.image_text_to_video import ImageTextToVideo
from inflate.training.memory_settings import Memory
from launch import launch

# Python 3.12 warns of forks of processes with threads; ours start after the fork.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("demo") / "clips", clips=5, held_out=1)


def settings(clips: Path, cache: Path | None, **changes: Any) -> Caching:
    size = {"frames": 4, "height": 64, "width": 64, "split": "train", "window": "centre", "seconds_per_clip": None}
    return Caching(Data(**({"path": str(clips), "cache": cache and str(cache)} | size | changes)))


def cached(clips: Path, cache: Path, verify: bool = False, prune: bool = False, **changes: Any) -> list[str]:
    """What is said, the folder's size left out."""
    said: list[str] = []
    cache_clips(settings(clips, cache, **changes), verify, prune, lambda _: lambda done, whole: None, said.append)
    return [line for line in said if "MiB" not in line]


def test_two_processes_write_what_one_does(clips: Path, tmp_path: Path) -> None:
    told = launch(cached, clips, tmp_path / "two")
    assert told == [["5 clips: 5 encoded (20 frames), 0 were there"], []]
    cached(clips, tmp_path / "one")
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    assert len(two.entries) == len(one.entries) == 15
    assert len(list((tmp_path / "two").glob("*.parquet"))) == 2
    for key, entry in one.entries.items():
        assert two.entries[key].checks.keys() == entry.checks.keys()
        for name, checks in entry.checks.items():
            ours, theirs = (store.rows(key, name, range(len(checks))) for store in (one, two))
            assert torch.allclose(ours.double(), theirs.double(), atol=1e-6)
    assert launch(cached, clips, tmp_path / "two")[0] == ["5 clips: 0 encoded (0 frames), 5 were there"]


def refused(clips: Path, cache: Path) -> str:
    (clips / "train" / "0003.mp4").write_bytes(b"")
    try:
        cached(clips, cache, max_dropped=0.0)
    except InflateError as error:
        return str(error)
    return ""


def test_too_many_unusable_clips_of_all_end_every_process_alike(tmp_path: Path) -> None:
    first, second = launch(refused, build(tmp_path / "clips", clips=4, held_out=1), tmp_path / "cache")
    assert first == second
    assert "1 of 4 clips are unusable" in first
    assert "0003.mp4: the file is empty (0 bytes)" in first


def test_damage_is_found_and_mended_and_what_is_not_needed_goes(clips: Path, tmp_path: Path) -> None:
    cached(clips, tmp_path)
    shard = next(tmp_path.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-500] ^= 1
    shard.write_bytes(bytes(content))
    said = cached(clips, tmp_path, verify=True)
    assert f"{shard}: damaged: row " in said[0]
    assert said[1:] == [
        "verified 15 entries: 1 damaged, which are encoded anew", "5 clips: 1 encoded (4 frames), 4 were there"
    ]  # fmt: skip
    said = cached(clips, tmp_path, window="head")
    assert said == [
        "5 clips: 5 encoded (20 frames), 0 were there",
        "5 entries are of other files or settings, such as another stage's; "
        "--prune removes them all, also those that another run reads",
    ]  # fmt: skip
    said = cached(clips, tmp_path, window="head", prune=True)
    assert said == ["removed 5 entries that these settings do not need", "5 clips: 0 encoded (0 frames), 5 were there"]
    assert len(Store(tmp_path).entries) == 15


def test_what_is_cached_can_be_looked_at(clips: Path, tmp_path: Path) -> None:
    cached(clips, tmp_path / "cache", cache_draws=2)
    said: list[str] = []
    show_cached(settings(clips, tmp_path / "cache", cache_draws=2), tmp_path / "shown", 2, said.append)
    assert [path.name for path in sorted((tmp_path / "shown").iterdir())] == [
        "00000.mp4", "00000.png", "00004.mp4", "00004.png"
    ]  # fmt: skip
    head, first, last, place = said
    assert head.split()[:5] == ["file", "clip", "frames", "fps", "motion"]
    assert first.split()[:4] == ["00000", "0000.mp4", "4", "8"]
    assert float(last.split()[-2]) > 25, "PSNR in dB of a decoder on its own world"
    assert place == f"wrote {tmp_path / 'shown'}"
    frames = video.read(tmp_path / "shown" / "00004.mp4")
    truth = ClipDataset(settings(clips, None).data, shuffle=False)[4]["pixels"]
    shown = torch.from_numpy(frames[:, :, :64]).permute(0, 3, 1, 2) / 127.5 - 1
    assert float((shown - truth).abs().mean()) < 0.05, "the file's own frames are at the left"


def test_frames_encoded_one_by_one_are_the_same_entries(clips: Path, tmp_path: Path) -> None:
    cached(clips, tmp_path)
    alone = replace(settings(clips, tmp_path), memory=Memory(encode_frames=1))
    said: list[str] = []
    cache_clips(alone, False, False, lambda _: lambda done, whole: None, said.append)
    assert said[0] == "5 clips: 0 encoded (0 frames), 5 were there"
    pixels = ClipDataset(settings(clips, None).data, shuffle=False)[0]["pixels"]
    made = [one.encoder(torch.device("cpu")).latents(pixels) for one in (alone, settings(clips, tmp_path))]
    torch.testing.assert_close(*made, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"memory\.encode_frames=-1: "):
        Memory(encode_frames=-1)


def test_text_to_video_caches_captions(clips: Path, tmp_path: Path) -> None:
    wanted = replace(settings(clips, tmp_path / "cache"), stage="temporal")
    cache_clips(wanted, False, False, lambda _: lambda done, whole: None, lambda _: None)
    dataset, encoder = ClipDataset(wanted.data, shuffle=False), wanted.encoder(torch.device("cpu"))
    dataset.read_encoded(encoder, "none")
    item = dict(dataset[3])
    assert {"latents", "caption_states"} <= item.keys()
    assert not {"pixels", "context"} & item.keys()
    assert torch.equal(item["origin"], ClipDataset(replace(wanted.data, cache=None), shuffle=False)[3]["origin"])
    assert torch.equal(item["caption_states"], encoder.captions([dataset[3]["caption"]])["caption_states"][0])
    said: list[str] = []
    show_cached(wanted, tmp_path / "shown", 1, said.append)
    assert said[1].split()[-3:-2] == ["none"]
    with pytest.raises(DataError, match="encoded for other windows, sizes, draws, weights or precision"):
        dataset.read_encoded(replace(wanted, stage="image_to_video").encoder(torch.device("cpu")), "none")


@pytest.mark.parametrize("frame", ["random", "first"])
def test_animation_by_text_caches_features_of_the_frames_that_may_be_the_image(
    clips: Path, tmp_path: Path, frame: Literal["random", "first"]
) -> None:
    model, conditioning = Model("pocket-t2v", image_encoder="pocket"), ImageTextToVideo(condition_frame=frame)
    wanted = replace(settings(clips, tmp_path, frames=2), stage="adapt", model=model, image_text_to_video=conditioning)
    cache_clips(wanted, False, False, lambda _: lambda done, whole: None, lambda _: None)
    dataset, encoder = ClipDataset(wanted.data, shuffle=False), wanted.encoder(torch.device("cpu"))
    dataset.read_encoded(encoder, "all")
    item = dict(dataset[3])
    assert isinstance(encoder, ImageTextClipEncoder)
    features = encoder.family.embed_image(item["pixels"])
    name, expected = ("frame_features", features) if frame == "random" else ("features", features[0])
    torch.testing.assert_close(item[name], expected)
    assert {"latents", "caption_states"} <= item.keys()
    assert len({"frame_features", "features"} & item.keys()) == 1


@pytest.mark.parametrize(("stage", "names"), [("base", {"features", "caption_states"}), ("refine", {"caption_states"})])
def test_the_stages_of_i2vgen_xl_cache_what_they_are_told(
    clips: Path, tmp_path: Path, stage: str, names: set[str]
) -> None:
    model = Model("pocket-t2v", image_encoder="pocket" if stage == "base" else None)
    wanted = replace(settings(clips, tmp_path, frames=2), stage=stage, model=model)
    cache_clips(wanted, False, False, lambda _: lambda done, whole: None, lambda _: None)
    dataset, encoder = ClipDataset(wanted.data, shuffle=False), wanted.encoder(torch.device("cpu"))
    dataset.read_encoded(encoder, "all")
    item = dict(dataset[3])
    assert {"features", "caption_states", "frame_features"} & item.keys() == names
    if stage == "base":
        assert isinstance(encoder, FirstFrameClipEncoder)
        torch.testing.assert_close(item["features"], encoder.family.embed_image(item["pixels"][:1])[0])
        other = replace(wanted, stage="adapt", image_text_to_video=ImageTextToVideo(condition_frame="first"))
        with pytest.raises(DataError, match="encoded for other windows"):  # their features are of another kind
            dataset.read_encoded(other.encoder(torch.device("cpu")), "none")


def test_both_encoders_of_a_single_file_are_cached(clips: Path, tmp_path: Path) -> None:
    write_whole_file(tmp_path / "xl.safetensors", "Stable Diffusion XL")
    model = Model(str(tmp_path / "xl.safetensors"), tokenizer="pocket")
    wanted = replace(settings(clips, tmp_path / "cache"), stage="temporal", model=model)
    cache_clips(wanted, False, False, lambda _: lambda done, whole: None, lambda _: None)
    dataset = ClipDataset(wanted.data, shuffle=False)
    dataset.read_encoded(encoder := wanted.encoder(torch.device("cpu")), "none")
    item, told = dict(dataset[2]), encoder.captions([dataset[2]["caption"]])
    assert set(told) == {"caption_states", "caption_pooled"}
    assert all(torch.equal(item[name], rows[0]) for name, rows in told.items())


def test_a_cache_needs_a_folder_that_can_be_written(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache: name the folder"):
        cache_clips(settings(clips, None), False, False, lambda _: lambda done, whole: None, print)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache=.*file cannot be written: .*; name another folder"):
        cached(clips, tmp_path / "file")
