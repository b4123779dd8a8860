"""Training from a cache: the losses of the files, and which networks a step needs."""

from __future__ import annotations

import math
import operator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import randomise, write_image_model
from inflate.data import video
from inflate.data.cache import ClipCache, fill
from inflate.data.clips import ClipDataset, Frames, collate
from inflate.data.preflight import preflight
from inflate.data.settings import Data
from inflate.data.sources import find_clips
from inflate.families.svd import SVD, MotionBuckets
from inflate.training.decoder import Decoder, DecoderTask
from inflate.training.encoding import ClipEncoder, clip_encoder
from inflate.training.image_to_video import ImageToVideo, ImageToVideoTask, Preview
from inflate.training.noise import Noise

FRAMES, SIDE = 4, 16
CONDITIONING = ImageToVideo(held_out_clips=1, bands=2, preview_clips=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_model(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of noise that drifts, 8 to 10 frames."""
    path = tmp_path_factory.mktemp("clips")
    for number in range(3):
        wide = np.random.default_rng(number).integers(0, 255, (SIDE, 3 * SIDE, 3), dtype=np.uint8)
        frames = np.stack([np.roll(wide, frame, axis=1)[:, :SIDE] for frame in range(8 + number)])
        video.write(path / f"{number}.mp4", frames, 8)
    return path


@pytest.fixture
def family(folder: Path) -> SVD:
    made = SVD.load(folder, frames=FRAMES)
    randomise(made.unet)
    made.motion = MotionBuckets.fit([0.1, 0.2, 0.3])
    return made


def data(clips: Path, **changes: Any) -> Data:
    size = {"frames": FRAMES, "height": SIDE, "width": SIDE, "captions": "optional", "seconds_per_clip": None}
    return Data(**({"path": str(clips)} | size | changes))


def encoded(settings: Data, encoder: ClipEncoder, frames: Frames) -> ClipDataset:
    assert settings.cache is not None
    cache = ClipCache(settings.cache)
    checked, _ = preflight(find_clips(settings), settings, None, cache.probe, cache.note)
    fill(cache, checked.used, settings, encoder)
    dataset = ClipDataset(settings, seed=5)
    dataset.read_encoded(encoder, frames)
    return dataset


def task(family: SVD, dataset: ClipDataset, frames: Frames = "all") -> ImageToVideoTask:
    made = ImageToVideoTask(family, CONDITIONING, [collate([dataset[0]])], Preview(steps=1), 1e-3, 3, frames=frames)
    made.family.unet.eval()
    return made


def losses(made: ImageToVideoTask, dataset: ClipDataset, numbers: range = range(8)) -> list[float]:
    found: list[float] = []
    for number in numbers:
        batch = collate([dataset[number], dataset[number + 1]])
        with torch.no_grad():
            found += made.loss(batch, Noise(7, batch["number"]), 0)[0].tolist()
    return found


def test_losses_of_a_cache_are_those_of_the_files_on_the_same_draws(family: SVD, clips: Path, tmp_path: Path) -> None:
    plain = ClipDataset(data(clips), seed=5)
    expected = losses(task(family, plain), plain)
    settings = data(clips, cache=str(tmp_path))
    cached = encoded(settings, clip_encoder(family, settings, CONDITIONING), "first")
    made = task(family, plain, "first")
    assert losses(made, cached) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert "pixels" not in cached[0]
    assert len(set(expected)) == 9, "each sample is in two batches, but the first and the last"


def test_draws_are_noised_first_frames_at_the_settings_levels(family: SVD, clips: Path, tmp_path: Path) -> None:
    settings = data(clips, cache=str(tmp_path), cache_draws=64)
    encoder = clip_encoder(family, settings, CONDITIONING)
    cached = encoded(settings, encoder, "none")
    item = dict(cached[0])
    logs = item["augs"].log()
    assert abs(float(logs.mean()) - CONDITIONING.noise_aug_mean) < 0.2
    assert abs(float(logs.std()) - CONDITIONING.noise_aug_std) < 0.15
    first = ClipDataset(data(clips), seed=5)[0]["pixels"][0]
    clean = family.image_latent(first[None], torch.zeros(1), torch.zeros(1, *first.shape))[0]
    distance = (item["image_latents"] - clean).flatten(1).norm(dim=1)
    assert torch.corrcoef(torch.stack([distance, item["augs"]]))[0, 1] > 0.9, "more noise leads further away"


def test_with_draws_each_sample_takes_one_and_no_encoder_runs(family: SVD, clips: Path, tmp_path: Path) -> None:
    settings = data(clips, cache=str(tmp_path), cache_draws=3)
    cached = encoded(settings, clip_encoder(family, settings, CONDITIONING), "none")
    made = task(family, ClipDataset(data(clips)), "none")
    assert made.frozen == []
    family.vae.forward = family.vae.encode = family.image_encoder.forward = None  # type: ignore[assignment]
    assert all(map(math.isfinite, losses(made, cached)))
    taken = set()
    for number in range(24):
        batch = collate([cached[number]])
        condition = made.condition(batch, Noise(7, batch["number"]))
        place = batch["augs"][0].tolist().index(float(condition.added_ids[0, 2]))
        assert torch.equal(condition.image_latent[0], batch["image_latents"][0, place])
        taken.add(place)
    assert taken == {0, 1, 2}


@pytest.mark.parametrize(
    ("change", "others"),
    [
        ("vae.encoder.conv_in.weight", 0),
        ("image_encoder.visual_projection.weight", 0),
        ("vae.decoder.conv_in.weight", 3),
    ],
)
def test_a_changed_encoder_invalidates_what_it_made(
    change: str, others: int, family: SVD, clips: Path, tmp_path: Path
) -> None:
    settings = data(clips, cache=str(tmp_path))
    encoded(settings, clip_encoder(family, settings, CONDITIONING), "first")
    network, name = change.split(".", 1)
    with torch.no_grad():
        getattr(family, network).get_parameter(name).view(-1)[0] += 1e-3
    cache = ClipCache(settings.cache or "")
    checked, _ = preflight(find_clips(settings), settings, None, cache.probe)
    done = fill(cache, checked.used, settings, clip_encoder(family, settings, CONDITIONING))
    assert (done.found, done.made) == (others, 3 - others)


def test_an_encoder_of_the_same_weights_and_another_activation_is_another(family: SVD) -> None:
    """OpenCLIP's weights are published as gelu, OpenAI's as quick_gelu: one setting tells them apart."""
    one, image = clip_encoder(family, Data(), CONDITIONING).identity, torch.full((1, 3, SIDE, SIDE), 0.3)
    embedded, config = family.embed(image), family.image_encoder.config
    other = type(family.image_encoder)(type(config)(**{**config.to_dict(), "hidden_act": "gelu"})).eval()
    other.load_state_dict(family.image_encoder.state_dict())
    family.image_encoder = other
    assert not torch.allclose(family.embed(image), embedded)
    assert clip_encoder(family, Data(), CONDITIONING).identity != one


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_is_kept_and_another_one_is_another_entry(
    precision: str, family: SVD, clips: Path, tmp_path: Path
) -> None:
    settings = data(clips, cache=str(tmp_path), cache_dtype=precision)
    cached = encoded(settings, clip_encoder(family, settings, CONDITIONING), "first")
    assert cached[0]["latents"].dtype == getattr(torch, precision)
    assert all(map(math.isfinite, losses(task(family, ClipDataset(data(clips)), "first"), cached)))
    plain = clip_encoder(family, data(clips, cache=str(tmp_path), cache_dtype="float16"), CONDITIONING)
    assert plain.identity != clip_encoder(family, settings, CONDITIONING).identity


def test_held_out_clips_are_encoded_once_and_each_encoder_leaves_before_the_next(
    family: SVD, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ClipDataset(data(clips), seed=5)
    expected, made = task(family, plain).evaluate(), task(family, plain, "first")
    assert made.frozen == [family.vae]
    assert made.visiting == [family.image_encoder]
    assert not any(p.requires_grad for p in family.image_encoder.parameters())
    order: list[str] = []
    for name in ("vae.encoder", "image_encoder", "unet"):
        network = operator.attrgetter(name)(family)
        network.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    assert made.evaluate() == made.evaluate() == expected
    assert order == ["vae.encoder"] * 2 + ["image_encoder"] + ["unet"] * 8


def test_a_decoder_learns_from_cached_latents(family: SVD, clips: Path, tmp_path: Path) -> None:
    settings = data(clips, cache=str(tmp_path))
    cached = encoded(settings, clip_encoder(family, settings, CONDITIONING), "all")
    plain = ClipDataset(data(clips), seed=5)
    small = Decoder(adversarial_start=100, discriminator_channels=8, discriminator_layers=2, perceptual=0)
    made = DecoderTask(family.vae, small, plain[0]["pixels"][None], lambda folder: None)
    for number in range(4):
        ours, theirs = collate([cached[number]]), collate([plain[number]])
        noise = Noise(7, ours["number"])
        with torch.no_grad():
            loss = [made._decoder_loss(batch, noise, 0)[0] for batch in (ours, theirs)]
        assert torch.allclose(*loss, rtol=1e-6, atol=1e-6)
