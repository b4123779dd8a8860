"""Image-to-video training on a tiny model: what a step computes, what is measured and what is shown."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import randomise, write_image_model
from inflate.data import video
from inflate.errors import ConfigError, DataError
from inflate.families.svd import SVD, MotionBuckets
from inflate.models.moments import LatentMoments
from inflate.training.held_out import join
from inflate.training.image_to_video import ImageToVideo, ImageToVideoTask, Preview, choose_trainable
from inflate.training.leakage import ConditionNoise
from inflate.training.loop import fit
from inflate.training.noise import Noise
from inflate.training.previews import compare_previews
from inflate.training.settings import Training

FRAMES, SIDE = 5, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_model(tmp_path_factory.mktemp("image"))


@pytest.fixture
def family(folder: Path) -> SVD:
    made = SVD.load(folder, frames=FRAMES)
    randomise(made.unet)
    made.motion = MotionBuckets.fit([0.1, 0.2, 0.3])
    return made


def item(number: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    start, end = torch.rand(2, 3, SIDE, SIDE, generator=generator)
    ramp = torch.linspace(0, 1, FRAMES)[:, None, None, None]
    return {
        "pixels": 2 * (start * (1 - ramp) + end * ramp) - 1, "fps": torch.tensor(8.0), "motion": torch.tensor(0.2),
        "caption": "", "number": torch.tensor(number), "name": str(number),
    }  # fmt: skip


def batch(*numbers: int) -> dict[str, Any]:
    items = [item(number) for number in numbers]
    tensors = {key: torch.stack([i[key] for i in items]) for key in ("pixels", "fps", "motion", "number")}
    return {**tensors, "caption": [i["caption"] for i in items], "name": [i["name"] for i in items]}


class Clips:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {key: value for key, value in item(number).items() if key not in ("caption", "name")}


def make(family: SVD, **settings: Any) -> ImageToVideoTask:
    small = ImageToVideo(held_out_clips=2, bands=2, preview_clips=1, **settings)
    return ImageToVideoTask(family, small, [batch(100), batch(101)], Preview(steps=2), lr=1e-3, seed=3)


def test_the_loss_is_the_objective_on_the_drawn_levels(family: SVD) -> None:
    task = make(family, drop_both=0.0, drop_embedding=0.0, drop_image=0.0, P_mean=-0.4, P_std=0.7)
    data = batch(0, 1)
    noise = Noise(3, data["number"])
    loss, _ = task.loss(data, noise, 0)
    sigma = torch.exp(-0.4 + 0.7 * noise.normal("sigma"))
    clean = family.encode(data["pixels"])
    condition = task.condition(data, noise)
    noisy = clean + sigma[:, None, None, None, None] * noise.normal("noise", *clean.shape[1:])
    denoised = family.objective.denoise(family.predict(condition), noisy, sigma)
    weighted = ((denoised - clean).square().mean((1, 2, 3, 4)) * (1 + sigma**2) / sigma**2).detach()
    torch.testing.assert_close(loss.detach(), weighted, atol=1e-5, rtol=1e-4)


def test_the_loss_of_each_band_is_of_the_samples_that_drew_it(family: SVD) -> None:
    task = make(family, P_mean=0.0, P_std=1.0)
    data = batch(*range(6))
    noise = Noise(3, data["number"])
    with torch.no_grad():
        loss, logs = task.loss(data, noise, 0)
    assert list(logs) == ["loss at sigma below 1", "loss at sigma above 1"]
    below, above = logs.values()
    assert torch.equal(below.values, loss)
    assert below.chosen.tolist() == (noise.normal("sigma") < 0).tolist()
    assert torch.equal(above.chosen, ~below.chosen)
    assert 0 < int(above.chosen.sum()) < 6


@pytest.mark.parametrize("P_mean", [0.7, 4.5])
def test_bands_are_equally_likely_and_cover_every_noise_level(family: SVD, P_mean: float) -> None:
    settings = ImageToVideo(bands=5, preview_clips=1, P_mean=P_mean)
    task = ImageToVideoTask(family, settings, [batch(100)], Preview(steps=2), lr=1e-3, seed=3)
    limits = [*task.bands.values()]
    assert all(low <= middle < high for (low, high), middle in zip(limits[:3], task.levels(), strict=False))
    draws = task.family.objective.sigma(torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    shares = [float(((low <= draws) & (draws < high)).float().mean()) for low, high in limits]
    assert sum(shares) == pytest.approx(1)
    assert shares[:3] == pytest.approx([0.2] * 3, abs=0.02)


def test_a_single_band_is_not_told_beside_the_loss(family: SVD) -> None:
    task = ImageToVideoTask(family, ImageToVideo(bands=1), [batch(100)], Preview(), lr=1e-3, seed=3)
    assert task.bands == {}
    assert len(task.levels()) == 1


def test_training_clips_are_measured_as_held_out_ones_are(family: SVD) -> None:
    clips = [batch(100), batch(101)]
    shape = {"held_out_clips": 2, "bands": 2, "preview_clips": 1}
    for count, others in ((8, clips), (1, [clips[0], batch(5)])):
        task = ImageToVideoTask(
            family, ImageToVideo(train_clips=count, **shape), clips, Preview(), lr=1e-3, seed=3, training=others
        )
        values = task.evaluate()
        if count == 8:
            assert values["training-clip loss"] == values["held-out loss"]
    alone = ImageToVideoTask(family, ImageToVideo(**shape), clips[:1], Preview(), lr=1e-3, seed=3).evaluate()
    assert values["training-clip loss"] == pytest.approx(alone["held-out loss"], rel=1e-5)
    assert "training-clip loss" not in alone


def test_a_sample_draws_the_same_alone_and_in_a_batch(family: SVD) -> None:
    task = make(family)
    both, _ = task.loss(batch(4, 7), Noise(3, torch.tensor([4, 7])), 0)
    alone, _ = task.loss(batch(7), Noise(3, torch.tensor([7])), 0)
    torch.testing.assert_close(both[1:], alone, atol=1e-6, rtol=1e-5)


def test_the_condition_says_fps_minus_one_the_bucket_and_the_noise(family: SVD) -> None:
    task, data = make(family), batch(0)
    noise = Noise(3, data["number"])
    aug = torch.exp(-3.0 + 0.5 * noise.normal("aug"))
    expected = torch.tensor([[7.0, 128.0, float(aug)]])
    torch.testing.assert_close(task.condition(data, noise).added_ids, expected)


@pytest.mark.parametrize("rate", ["drop_both", "drop_embedding", "drop_image"])
def test_dropping_everything_changes_the_loss(family: SVD, rate: str) -> None:
    none = {"drop_both": 0.0, "drop_embedding": 0.0, "drop_image": 0.0}
    losses = [
        make(family, **{**none, rate: share}).loss(batch(0), Noise(3, torch.tensor([0])), 0)[0] for share in (0.0, 1.0)
    ]
    assert not torch.allclose(*losses)


def seen(task: ImageToVideoTask, data: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The image latents (B, C, h, w) that the network is given in a step, and what it is told."""
    given: list[torch.Tensor] = []

    def note(_: Any, inputs: Any, named: Any) -> None:
        given.extend([inputs[0][:, 0, 4:], named["added_time_ids"]])

    handle = task.family.unet.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        task.loss(data, Noise(3, data["number"]), 0)
    handle.remove()
    return given[0], given[1]


def test_noise_on_the_conditioning_latent_follows_the_noise_level_and_is_not_told(family: SVD) -> None:
    never = {"drop_both": 0.0, "drop_embedding": 0.0, "drop_image": 0.0}
    data, chosen = batch(*range(4)), ConditionNoise(maximum=2.7)
    (plain, told), (noised, told_noised) = (
        seen(make(family, condition_noise=one, **never), data) for one in (ConditionNoise(), chosen)
    )
    assert torch.equal(told, told_noised)
    noise = Noise(3, data["number"])
    sigma = family.objective.sigma(noise.normal("sigma"))
    level = chosen.level(family.objective.time(sigma), noise.normal("condition level"))[:, None, None, None]
    drawn = noise.normal("condition noise", *plain.shape[1:])
    torch.testing.assert_close(noised, plain + level * drawn / family.vae.config.scaling_factor)


def test_what_is_withheld_or_measured_has_no_noise_on_its_latent(family: SVD) -> None:
    noisy = make(family, condition_noise=ConditionNoise(maximum=2.7), drop_both=0.0, drop_embedding=0.0, drop_image=1.0)
    assert not seen(noisy, batch(0, 1))[0].any()
    assert not seen(noisy, sized(0, 1, SIDE))[0].any()
    assert noisy.evaluate() == make(family).evaluate()


def test_previews_start_where_they_are_told_to(family: SVD) -> None:
    task = make(family)
    task.sampling = Preview(steps=1, sigma_max=2.0)
    levels: list[float] = []
    family.unet.register_forward_pre_hook(lambda _, inputs: levels.append(float(inputs[1].flatten()[0])))
    task.animate(task.shown)
    assert family.objective.noise_input(torch.tensor([2.0])) == pytest.approx(levels[0], rel=1e-4)
    assert family.moments is not None


def test_what_is_trained(family: SVD) -> None:
    def trained() -> set[str]:
        return {name for name, parameter in family.unet.named_parameters() if parameter.requires_grad}

    everything = {name for name, _ in family.unet.named_parameters()}
    choose_trainable(family.unet, "all")
    assert everything - trained() == set(family.unet.inert_parameters())
    choose_trainable(family.unet, "temporal")
    assert {name for name in trained() if ".temporal." not in name} == {
        "conv_in.weight", "conv_in.bias", *(name for name in everything if name.startswith("class_embedding")),
    }  # fmt: skip


def test_held_out_losses_are_fixed_and_the_bypassed_ones_differ(family: SVD) -> None:
    task = make(family)
    first = task.evaluate()
    torch.manual_seed(99)
    assert task.evaluate() == first
    bands = [value for name, value in first.items() if "at sigma" in name]
    assert len(bands) == 2
    assert first["held-out loss"] == pytest.approx(sum(bands) / 2)
    assert first["held-out loss, temporal layers bypassed"] != pytest.approx(first["held-out loss"], rel=1e-3)


def test_as_many_clips_are_measured_together_as_a_step_has(family: SVD) -> None:
    clips, sizes = [batch(number) for number in range(100, 106)], list[int]()
    family.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    values = []
    for together in (2, 8):
        settings = ImageToVideo(bands=1, preview_clips=1)
        task = ImageToVideoTask(family, settings, clips, Preview(), lr=1e-3, seed=3, together=together)
        values.append(task.evaluate())
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert sizes == [2, 2, 2] * 2 + [4, 2] * 2


def test_a_freshly_inflated_model_loses_nothing_by_the_bypass(folder: Path) -> None:
    values = make(SVD.load(folder, frames=FRAMES)).evaluate()
    assert values["held-out loss, temporal layers bypassed"] == pytest.approx(values["held-out loss"], abs=1e-6)


def test_a_run_lowers_the_loss_shows_it_and_exports_what_it_trained(family: SVD, tmp_path: Path) -> None:
    task = make(family)
    settings = Training(
        output=tmp_path / "run", steps=8, batch=2, lr=2e-3, workers=0, log_every=4, tracker="none", progress=False
    )
    result = fit(task, Clips(), settings)
    assert result.held_out[-1]["held-out loss"] < result.held_out[0]["held-out loss"]
    last = tmp_path / "run" / "samples" / "step-000008"
    assert video.probe(last / "00.mp4").frames == FRAMES
    assert (last / "sheet.png").stat().st_size > 0
    scores = json.loads((last / "scores.json").read_text())
    assert scores["frame 0, autoencoder"] > 0
    again = SVD.from_pretrained(tmp_path / "run" / "export")
    assert again.moments == LatentMoments.of(family.encode(batch(number)["pixels"]) for number in (100, 101))
    for name, value in family.unet.state_dict().items():
        assert torch.equal(again.unet.state_dict()[name], value), name
    assert again.motion == family.motion


def test_scores_of_perfect_and_static_samples(family: SVD) -> None:
    task, truth = make(family), join([batch(0), batch(1)])["pixels"]
    perfect = task.score(truth, truth)
    assert perfect["frame 0, sample"] == pytest.approx(100, abs=1)
    assert perfect["flicker error, sample"] == pytest.approx(0, abs=1e-6)
    static = task.score(truth, truth[:, :1].expand_as(truth))
    assert static["frames 1-3, sample"] == pytest.approx(static["frames 1-3, static copy"])


def sized(number: int, frames: int, side: int) -> dict[str, Any]:
    """A batch of one clip of another size."""
    clip = batch(number)
    return {**clip, "pixels": clip["pixels"][:, :frames, :, :side]}


def test_an_image_is_trained_without_its_latent_and_without_temporal_layers(family: SVD) -> None:
    task, image = make(family, drop_both=0.0, drop_embedding=0.0, drop_image=0.0), sized(0, 1, SIDE)
    noise = Noise(3, image["number"])
    condition = task.condition(image, noise)
    assert not condition.image_latent.any()
    assert condition.context.any()
    loss, _ = task.loss(image, noise, 0)
    loss.mean().backward()
    temporal = family.unet.temporal_parameters()
    assert all(p.grad is None or not p.grad.any() for p in temporal.values())
    assert any(p.grad is not None for p in temporal.values())  # zero, not absent: distributed training waits for them
    assert family.unet.conv_in.weight.grad.any()
    randomise(family.unet, seed=5)
    with torch.no_grad():
        before = task.loss(image, noise, 0)[0]
        for parameter in temporal.values():
            parameter.add_(1.0)
        assert torch.equal(task.loss(image, noise, 0)[0], before)


def test_held_out_clips_of_several_sizes_are_measured_and_shown(family: SVD, tmp_path: Path) -> None:
    clips = [batch(0), sized(1, 1, SIDE), sized(2, FRAMES - 1, 8), batch(3)]
    small = ImageToVideo(held_out_clips=4, bands=2, preview_clips=4)
    task = ImageToVideoTask(family, small, clips, Preview(steps=1), lr=1e-3, seed=3)
    values = task.evaluate()
    sizes = {name.removeprefix("held-out loss in "): value for name, value in values.items() if " in " in name}
    assert sizes.keys() == {"5x16x16", "1x16x16", "4x8x16"}
    shares = {"5x16x16": 2, "1x16x16": 1, "4x8x16": 1}
    assert values["held-out loss"] == pytest.approx(sum(n * sizes[size] for size, n in shares.items()) / 4)
    alone = ImageToVideoTask(family, small, clips[2:3], Preview(steps=1), lr=1e-3, seed=3).evaluate()
    assert alone["held-out loss"] == pytest.approx(sizes["4x8x16"], rel=1e-5)
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        task.preview(tmp_path / name)
    shown = sorted(path.name for path in (tmp_path / "after").iterdir())
    assert shown == ["00.mp4", "01.mp4", "02.mp4", "scores.json", "sheet-4x8x16.png", "sheet-5x16x16.png"]
    assert all(value == value for value in json.loads((tmp_path / "after" / "scores.json").read_text()).values())
    compare_previews(tmp_path / "before", tmp_path / "after", tmp_path / "both")
    assert video.probe(tmp_path / "both.mp4").width % (2 * SIDE) == 0  # 00 and 02, which have one size


def test_images_alone_are_refused_as_held_out_clips(family: SVD) -> None:
    with pytest.raises(DataError, match="two frames or more"):
        ImageToVideoTask(family, ImageToVideo(), [sized(0, 1, SIDE)], Preview(), lr=1e-3, seed=0)


def test_join() -> None:
    joined = join([batch(1), batch(2)])
    assert joined["number"].tolist() == [1, 2]
    assert joined["name"] == ["1", "2"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"drop_both": 0.9, "drop_image": 0.2},
        {"drop_image": -0.1},
        {"bands": 0},
        {"preview_clips": 0},
        {"train_clips": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be|shares"):
        replace(ImageToVideo(), **wrong)
