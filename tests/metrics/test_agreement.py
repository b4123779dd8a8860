"""Prompt agreement by a tiny random CLIP model, in both layouts, against transformers' own forward pass."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import busy
from networks import CLIP_SIDE, write_clip
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from inflate.errors import CheckpointError, DataError
from inflate.metrics.agreement import ClipModel, agreement, consistency

PROMPT = "a red disc over blue stripes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


@pytest.fixture
def pair(tmp_path: Path, folder: Path) -> Path:
    """The same towers in diffusers' layout."""
    whole = write_clip(tmp_path / "whole")
    configs = whole.config.text_config, whole.config.vision_config
    for config in configs:
        config.projection_dim = whole.config.projection_dim
    kinds = {"text_encoder": CLIPTextModelWithProjection, "image_encoder": CLIPVisionModelWithProjection}
    for (name, kind), config in zip(kinds.items(), configs, strict=True):
        tower = kind(config)
        tensors = whole.state_dict()
        theirs = {key: tensors.get(key, tensors.get(f"text_model.{key}")) for key in tower.state_dict()}
        tower.load_state_dict(theirs)
        tower.save_pretrained(tmp_path / "pair" / name)
    shutil.copytree(
        folder, tmp_path / "pair" / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    return tmp_path / "pair"


def by_hand(frames: np.ndarray) -> np.ndarray:
    """The shorter side to CLIP's by bicubic resampling, the middle square, CLIP's mean and deviation (F, 3, h, w)."""
    shown = []
    for frame in frames:
        scale = CLIP_SIDE / min(frame.shape[:2])
        height, width = (int(side * scale) for side in frame.shape[:2])
        small = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
        top, left = (height - CLIP_SIDE) // 2, (width - CLIP_SIDE) // 2
        shown.append(small[top : top + CLIP_SIDE, left : left + CLIP_SIDE] / 255)
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return ((np.stack(shown) - mean) / deviation).transpose(0, 3, 1, 2).astype(np.float32)


def test_agreement_is_what_the_whole_model_says(folder: Path) -> None:
    model, frames = write_clip(folder), busy(5, 48, 80)
    clip = ClipModel.load(folder)
    tokens = clip.tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, pixel_values=torch.from_numpy(by_hand(frames))).logits_per_image[:, 0]
    expected = (logits / model.logit_scale.exp()).tolist()
    assert agreement(clip.frames(frames), clip.prompt(PROMPT)).tolist() == pytest.approx(expected, abs=1e-5)


def test_both_layouts_give_the_same(folder: Path, pair: Path) -> None:
    whole, towers, frames = ClipModel.load(folder), ClipModel.load(pair), busy(3, 40, 40)
    assert torch.allclose(whole.frames(frames), towers.frames(frames), atol=1e-6)
    assert torch.allclose(whole.prompt(PROMPT), towers.prompt(PROMPT), atol=1e-6)


def test_the_processor_of_the_folder_is_used(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "clip")
    side = {"height": CLIP_SIDE, "width": CLIP_SIDE}
    other = CLIPImageProcessorPil(size={"shortest_edge": CLIP_SIDE}, crop_size=side, image_mean=[0.0] * 3)
    other.save_pretrained(tmp_path / "clip")
    frames = busy(2, 40, 40)
    assert not torch.allclose(ClipModel.load(folder).frames(frames), ClipModel.load(tmp_path / "clip").frames(frames))


def test_frames_that_stay_agree_wholly_and_others_as_their_cosines() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    assert consistency(vectors[[0, 0, 0]]) == pytest.approx(1)
    assert consistency(vectors) == pytest.approx((0.6 + 0.8) / 2)
    with pytest.raises(DataError, match="two or more"):
        consistency(vectors[:1])


def test_a_long_prompt_is_cut_and_told(folder: Path) -> None:
    clip = ClipModel.load(folder)
    assert not clip.is_cut(PROMPT)
    assert clip.is_cut(PROMPT * 5)
    assert clip.prompt(PROMPT * 5).isfinite().all()


def test_what_is_missing_is_named(folder: Path, pair: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no CLIP model"):
        ClipModel.load(tmp_path)
    shutil.copytree(folder, tmp_path / "dumb", ignore=shutil.ignore_patterns("tokenizer*", "vocab*"))
    with pytest.raises(CheckpointError, match="dumb holds no tokenizer"):
        ClipModel.load(tmp_path / "dumb")
    shutil.rmtree(pair / "text_encoder")
    write_clip(tmp_path / "other")
    with pytest.raises(CheckpointError, match="holds no CLIP model"):
        ClipModel.load(pair)


def test_weights_that_are_not_whole_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "torn")
    file = tmp_path / "torn" / "model.safetensors"
    tensors = load_file(file)
    del tensors["text_projection.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="missing: text_projection.weight"):
        ClipModel.load(tmp_path / "torn")
    file.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="torn"):
        ClipModel.load(tmp_path / "torn")
