"""The family on a pocket-sized Stable Diffusion: conditioning, loading, and its export in diffusers' own pipeline."""

import copy
import json
import logging
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableVideoDiffusionPipeline
from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing
from huggingface_hub.utils import filter_repo_objects
from original_files import write_sgm, write_single_file
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from helpers import CROSS, randomise, tiny_unet, write_image_model
from inflate.errors import CheckpointError, ConfigError, DataError
from inflate.families import svd_files
from inflate.families.svd import SVD, Condition, MotionBuckets, euler_scheduler
from inflate.families.svd_encoders import Encoders
from inflate.families.svd_model import Model
from inflate.models.folders import PIPELINE_FILES
from inflate.models.image_encoders import resize_antialiased
from inflate.models.original_names import UNetLayout, unet_names, vae_names
from inflate.models.unet import TemporalSpec
from inflate.models.vae import encoder_sha256
from inflate.models.weights import weights_sha256
from inflate.objectives import EDM, schedule_sigmas
from inflate.sampling.svd import Sampling, condition_of, initial_noise, sample_latents

DIFFUSERS = TemporalSpec(cross_attention_resnet_eps=1e-6)
WIDTH = CROSS
Both = tuple[SVD, StableVideoDiffusionPipeline]


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_model(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def born(image_model: Path) -> SVD:
    torch.manual_seed(0)  # the new layers' weights are the same whatever ran before
    return SVD.from_image_model(image_model, spec=DIFFUSERS, frames=4)


@pytest.fixture(scope="module")
def family(born: SVD) -> SVD:
    """With temporal layers that do something, and every setting away from its default."""
    trained = copy.deepcopy(born)
    randomise(trained.unet)
    randomise(trained.vae, seed=1)
    trained.motion = MotionBuckets.fit([0.1, 0.2, 0.5])
    trained.fps, trained.objective = 8, replace(trained.objective, P_mean=0.5)
    return trained


@pytest.fixture(scope="module")
def exported(family: SVD, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "export"
    family.save_pretrained(folder)
    return folder


def picture(seed: int = 0, height: int = 32, width: int = 32) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


def same_weights(one: SVD, other: SVD) -> bool:
    for name in ("unet", "vae", "image_encoder"):
        ours, theirs = (getattr(each, name).state_dict() for each in (one, other))
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            return False
    return True


@pytest.fixture
def temporal(image_model: Path) -> SVD:
    """Trained temporal layers, in half precision, over the image model as it is."""
    made = SVD.from_image_model(image_model, frames=4)
    made.fps, made.motion = 8.0, MotionBuckets.fit([0.1, 0.2, 0.5])
    own = {**made.unet.created_parameters(), **dict(made.unet.conv_in.named_parameters())}
    for parameter in [*own.values(), *made.vae.temporal_parameters().values()]:
        parameter.data.copy_((parameter + 0.05 * torch.randn(parameter.shape)).half())
    return made


def test_temporal_layers_are_kept_alone_over_their_image_model(
    temporal: SVD, image_model: Path, tmp_path: Path
) -> None:
    temporal.save_temporal(tmp_path / "alone", str(image_model))
    files = [file.name for file in (tmp_path / "alone").iterdir()]
    assert list(filter_repo_objects(files, allow_patterns=list(PIPELINE_FILES))) == files, "downloaded from the Hub"
    loaded = SVD.load(tmp_path / "alone")
    assert same_weights(loaded, temporal)
    assert (loaded.objective, loaded.motion, loaded.frames, loaded.fps) == (
        temporal.objective, temporal.motion, 4, 8.0,
    )  # fmt: skip
    latents, encoders = torch.randn(1, 2, 4, 8, 8), Encoders.load(tmp_path / "alone")
    assert torch.equal(encoders.decode(latents), temporal.decode(latents))
    tensors = load_file(tmp_path / "alone" / "temporal.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"unet", "vae"}
    assert all(".temporal." in n or n.startswith(("unet.conv_in.", "unet.class_embedding.")) for n in tensors)
    name, _ = tensors.popitem()
    save_file(tensors, tmp_path / "alone" / "temporal.safetensors")
    with pytest.raises(CheckpointError, match=f"temporal layers: {name}"):
        SVD.load(tmp_path / "alone")


def test_temporal_layers_find_their_image_model_from_any_directory(
    temporal: SVD, image_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(image_model, tmp_path / "image")
    monkeypatch.chdir(tmp_path)
    temporal.save_temporal("alone", "image")
    monkeypatch.chdir("/")
    assert same_weights(SVD.load(tmp_path / "alone"), temporal)
    (tmp_path / "image").rename(tmp_path / "moved")
    for load in (SVD.load, Encoders.load):
        with pytest.raises(CheckpointError, match=r"image_model of .*inflate\.json is not there: .*does not exist"):
            load(tmp_path / "alone")


def test_temporal_layers_refuse_what_they_would_not_heed(
    temporal: SVD, image_model: Path, tmp_path: Path, exported: Path
) -> None:
    temporal.save_temporal(tmp_path / "alone", str(image_model))
    for path in (tmp_path / "alone", image_model, exported):
        with pytest.raises(CheckpointError, match="leave prediction out"):
            SVD.load(path, prediction="epsilon")
    for other in (exported, tmp_path / "alone"):
        with pytest.raises(CheckpointError, match="is no image model"):
            SVD.load(tmp_path / "alone", image_model=other)
    settings = tmp_path / "alone" / "inflate.json"
    told = json.loads(settings.read_text())
    settings.write_text(json.dumps({**told, "unet": {}}))
    with pytest.raises(CheckpointError, match=r"does not tell which temporal layers it is of .*unet\.temporal"):
        SVD.load(tmp_path / "alone")
    settings.write_text(json.dumps({**told, "family": "video_ldm"}))
    with pytest.raises(CheckpointError, match="is of family video_ldm, not svd"):
        Encoders.load(tmp_path / "alone")


def test_temporal_layers_that_half_precision_cannot_hold_are_refused(
    temporal: SVD, image_model: Path, tmp_path: Path
) -> None:
    name = next(iter(temporal.unet.temporal_parameters()))
    temporal.unet.get_parameter(name).data.view(-1)[0] = 1e5
    with pytest.raises(CheckpointError, match=f"half precision cannot hold unet.{name}"):
        temporal.save_temporal(tmp_path / "alone", str(image_model))
    assert not (tmp_path / "alone").exists()


def test_temporal_layers_go_over_another_image_model_only_where_it_is_named(
    temporal: SVD, image_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(image_model, tmp_path / "image")
    temporal.save_temporal(tmp_path / "alone", str(tmp_path / "image"))
    weights = tmp_path / "image" / "unet" / "diffusion_pytorch_model.safetensors"
    changed = {name: value + 0.01 for name, value in load_file(weights).items()}
    save_file(changed, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match="belongs over other weights"):
        SVD.load(tmp_path / "alone")
    over = SVD.load(tmp_path / "alone", image_model=tmp_path / "image").unet.state_dict()
    own = temporal.unet.created_parameters()
    assert all(torch.equal(over[name], own[name]) for name in own)
    assert all(torch.equal(over[name], value) for name, value in changed.items() if not name.startswith("conv_in."))
    with pytest.raises(CheckpointError, match="holds no temporal layers alone"):
        SVD.load(image_model, image_model=tmp_path / "image")
    for model in (None, image_model):
        with pytest.raises(CheckpointError, match="holds a UNet2DConditionModel alone; give the folder of the whole"):
            SVD.load(image_model / "unet", image_model=model)
    with pytest.raises(CheckpointError, match="has other image layers"):
        temporal.save_temporal(tmp_path / "more", str(tmp_path / "image"))
    assert not (tmp_path / "more").exists()


def test_a_recipes_image_model_is_trained_over_encoded_with_and_told(
    temporal: SVD, image_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    temporal.save_temporal(tmp_path / "alone", str(image_model))
    Model(str(tmp_path / "alone"), image_model=str(image_model)).load(frames=4)
    assert not caplog.records
    other = write_image_model(tmp_path / "other")
    vae = AutoencoderKL.from_pretrained(other / "vae")
    randomise(vae)
    vae.save_pretrained(other / "vae")
    model = Model(str(tmp_path / "alone"), image_model=str(other))
    assert encoder_sha256(model.load(frames=4).vae) == encoder_sha256(vae) != encoder_sha256(temporal.vae)
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'alone'}: the temporal layers go over {other}, which is another image model than their own"
    ]
    assert encoder_sha256(model.encoders().vae) == encoder_sha256(vae)
    for load in (Model.encoders, lambda settings: settings.load(frames=4)):
        with pytest.raises(CheckpointError, match="holds no temporal layers alone"):
            load(Model(str(image_model), image_model=str(other)))


def random_condition(batch: int = 4) -> Condition:
    generator = torch.Generator().manual_seed(0)
    normal = (torch.randn(shape, generator=generator) for shape in ((batch, 1, 8), (batch, 4, 2, 2), (batch, 3)))
    return Condition(*normal)


# ---- conditioning


def test_null_condition_keeps_the_ids_only() -> None:
    condition = random_condition()
    null = condition.null()
    assert not null.context.any()
    assert not null.image_latent.any()
    assert torch.equal(null.added_ids, condition.added_ids)


def test_drop_zeroes_by_the_draw() -> None:
    condition = random_condition()
    dropped = condition.drop(torch.tensor([0.05, 0.12, 0.17, 0.9]), both=0.1, context_only=0.05, image_only=0.05)
    assert dropped.context.flatten(1).any(dim=1).tolist() == [False, False, True, True]
    assert dropped.image_latent.flatten(1).any(dim=1).tolist() == [False, True, False, True]
    assert torch.equal(dropped.added_ids, condition.added_ids)
    assert torch.equal(dropped.context[2:], condition.context[2:])


@pytest.mark.parametrize("rates", [(0.5, 0.4, 0.2), (-0.1, 0.0, 0.0)])
def test_impossible_drop_rates_are_refused(rates: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="drop rates"):
        random_condition().drop(torch.zeros(4), *rates)


def test_condition_follows_the_published_recipe(family: SVD) -> None:
    image = torch.cat([pixels(picture(0)), pixels(picture(1))])
    noise, aug = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 0.5])
    condition = family.condition(image, torch.tensor([8.0, 25.0]), torch.tensor([3.0, 200.0]), aug, noise)
    torch.testing.assert_close(condition.added_ids, torch.tensor([[7.0, 3.0, 0.0], [24.0, 200.0, 0.5]]))
    mode = family.vae.encode(torch.stack([image[0], image[1] + 0.5 * noise[1]])).latent_dist.mode()
    torch.testing.assert_close(condition.image_latent, mode)
    torch.testing.assert_close(condition.context, family.embed(image))
    assert not condition.context.requires_grad


@pytest.mark.parametrize(("height", "width"), [(32, 32), (300, 230), (576, 1024), (1000, 40)])
def test_resize_equals_diffusers(height: int, width: int) -> None:
    image = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = _resize_with_antialiasing(image, (224, 224))
    torch.testing.assert_close(resize_antialiased(image, (224, 224)), expected, atol=5e-6, rtol=0)


def test_encoding_and_decoding_go_chunk_by_chunk(family: SVD) -> None:
    chunked = replace(family, decode_chunk=3)
    clip = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = chunked.encode(clip)
    assert latents.shape == (2, 4, 4, 8, 8)
    mode = family.vae.encode(clip[1, 2:3]).latent_dist.mode() * family.vae.config.scaling_factor
    torch.testing.assert_close(latents[1, 2:3], mode)
    unscaled = latents / family.vae.config.scaling_factor
    parts = [family.vae.decode(unscaled[:, :3]).sample, family.vae.decode(unscaled[:, 3:]).sample]
    torch.testing.assert_close(chunked.decode(latents), torch.cat(parts, dim=1))


def test_predict_takes_a_wrapped_network(family: SVD) -> None:
    condition = Condition(torch.randn(1, 1, WIDTH), torch.randn(1, 4, 8, 8), torch.tensor([[6.0, 127.0, 0.02]]))
    wrapped = copy.deepcopy(family.unet)
    randomise(wrapped, seed=5)
    inputs = torch.randn(1, 3, 4, 8, 8), torch.tensor([0.3])
    with torch.no_grad():
        own, other = family.predict(condition)(*inputs), family.predict(condition, wrapped)(*inputs)
        given = torch.cat([inputs[0], condition.image_latent[:, None].expand(-1, 3, -1, -1, -1)], dim=2)
        direct = family.unet(given, inputs[1], condition.context, added_time_ids=condition.added_ids).sample
    assert torch.equal(own, direct)
    assert not torch.allclose(own, other)


# ---- motion buckets


def test_motion_buckets_say_how_many_clips_move_less() -> None:
    buckets = MotionBuckets.fit(torch.arange(1000.0) ** 2)
    scores = torch.tensor([-1.0, 0.0, 499.5**2, 999.0**2, 1e9])
    assert buckets.bucket(scores).tolist() == [0.0, 0.0, pytest.approx(127.5, abs=0.51), 255.0, 255.0]


def test_motion_buckets_without_a_spread_are_the_middle() -> None:
    assert MotionBuckets().bucket(torch.tensor([3.0])).tolist() == [127.0]
    assert MotionBuckets.fit([2.0, 2.0]).bucket(torch.tensor([2.0])).tolist() == [127.0]


@pytest.mark.parametrize("scores", [[], [1.0, float("nan")]])
def test_motion_buckets_need_finite_scores(scores: list[float]) -> None:
    with pytest.raises(DataError, match="motion"):
        MotionBuckets.fit(scores)


# ---- inflation of an image model


def test_inflated_model_takes_over_the_noise_condition(born: SVD) -> None:
    assert born.objective == EDM(noise_condition="discrete", zero_terminal_snr=True)
    assert (born.frames, born.decode_chunk, born.unet.config.in_channels) == (4, 4, 8)


def test_sampling_range_ends_with_the_schedule(tmp_path: Path) -> None:
    folder = write_image_model(tmp_path, rescale_betas_zero_snr=False)
    family = SVD.from_image_model(folder)
    assert family.sigma_max == pytest.approx(float(schedule_sigmas(False)[-1]))
    with pytest.raises(ConfigError, match="sigma_max 700"):
        family.scheduler(sigma_max=700.0)


def test_noise_predicting_model_is_taken_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_image_model(tmp_path, prediction_type="epsilon", rescale_betas_zero_snr=False)
    with caplog.at_level(logging.WARNING, logger="inflate"):
        SVD.from_image_model(folder)
    assert "predicts noise" in caplog.text


def test_other_schedule_needs_an_objective(tmp_path: Path) -> None:
    folder = write_image_model(tmp_path, beta_schedule="linear")
    with pytest.raises(CheckpointError, match="pass an objective"):
        SVD.from_image_model(folder)
    assert SVD.from_image_model(folder, objective=EDM()).sigma_max == 700.0


def test_missing_image_encoder_names_the_remedy(image_model: Path, tmp_path: Path) -> None:
    for part in ("unet", "vae", "scheduler"):
        (tmp_path / part).symlink_to(image_model / part)
    with pytest.raises(CheckpointError, match="image_encoder"):
        SVD.from_image_model(tmp_path)
    assert SVD.from_image_model(tmp_path, image_encoder=image_model / "image_encoder").fps == 7


def test_the_image_half_of_a_whole_clip_model_is_taken(born: SVD, image_model: Path, tmp_path: Path) -> None:
    vision = born.image_encoder.config
    whole = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), projection_dim=vision.projection_dim))
    whole.vision_model.load_state_dict(born.image_encoder.vision_model.state_dict())
    whole.visual_projection.load_state_dict(born.image_encoder.visual_projection.state_dict())
    whole.save_pretrained(tmp_path)
    taken = SVD.from_image_model(image_model, image_encoder=tmp_path).image_encoder
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size)
    assert torch.allclose(taken(pixels).image_embeds, born.image_encoder(pixels).image_embeds, atol=1e-5)


def test_another_pipelines_image_encoder_is_taken(image_model: Path) -> None:
    assert SVD.from_image_model(image_model, image_encoder=image_model).image_encoder.config.projection_dim == WIDTH


def test_image_model_without_a_tensor_is_refused(tmp_path: Path) -> None:
    folder = write_image_model(tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["stray"] = tensors.pop("conv_out.bias")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"conv_out\.bias.*stray"):
        SVD.from_image_model(folder)


@pytest.mark.parametrize("path", ["nowhere", "./a/b", "/no/such/folder"])
def test_missing_folder_is_named(path: str) -> None:
    with pytest.raises(CheckpointError, match=f"{path} does not exist"):
        SVD.from_pretrained(path)


def test_image_encoder_of_another_width_is_refused(family: SVD) -> None:
    encoder = copy.deepcopy(family.image_encoder)
    encoder.config.projection_dim = 48
    with pytest.raises(CheckpointError, match=r"48 dimensions.*32"):
        replace(family, image_encoder=encoder)


# ---- export


def test_export_comes_back_as_it_was(family: SVD, exported: Path) -> None:
    loaded = SVD.from_pretrained(exported)
    assert same_weights(loaded, family)
    networks = {"unet", "vae", "image_encoder"}
    names = {each.name for each in fields(SVD)} - networks
    assert {name: getattr(loaded, name) for name in names} == {name: getattr(family, name) for name in names}
    assert loaded.unet.spec == family.unet.spec


def test_export_names_the_feature_extractor_for_every_release(exported: Path) -> None:
    index = json.loads((exported / "model_index.json").read_text())
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]


@pytest.fixture(scope="module", params=["discrete", "edm"])
def both(request: pytest.FixtureRequest, family: SVD, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Our family in diffusers' epsilon mode with either noise condition, and diffusers' pipeline of its export."""
    ours = replace(family, objective=EDM(noise_condition=request.param, zero_terminal_snr=request.param == "discrete"))
    folder = tmp_path_factory.mktemp("both") / "export"
    ours.save_pretrained(folder)
    pipeline = StableVideoDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return ours, pipeline


def test_export_samples_equal_in_diffusers_pipeline(both: Both) -> None:
    ours, pipeline = both
    image, settings = picture(), Sampling(steps=3, fps=8, motion_bucket=90, noise_aug=0.05, seed=11)
    generator = torch.Generator().manual_seed(11)
    condition = condition_of(ours, pixels(image), settings, generator)
    latents = sample_latents(ours, condition, initial_noise(ours, pixels(image), settings, generator), settings)
    theirs = pipeline(
        image,
        height=32,
        width=32,
        num_inference_steps=3,
        fps=8,
        motion_bucket_id=90,
        noise_aug_strength=0.05,
        generator=torch.Generator().manual_seed(11),
        output_type="latent",
    ).frames
    assert latents.std() > 0.1
    torch.testing.assert_close(latents, theirs, atol=2e-5, rtol=0)
    with torch.no_grad():
        decoded = pipeline.decode_latents(theirs, 4, 4).transpose(1, 2)
        torch.testing.assert_close(ours.decode(latents), decoded, atol=2e-5, rtol=0)


def test_embedding_equals_diffusers_pipeline(both: Both) -> None:
    ours, pipeline = both
    image = picture(4, 48, 80)
    with torch.no_grad():
        embedding, theirs = ours.embed(pixels(image)), pipeline._encode_image(image, "cpu", 1, False)
    torch.testing.assert_close(embedding, theirs, atol=1e-5, rtol=0)


def test_scheduler_and_objective_agree_on_the_noise_input(both: Both) -> None:
    ours, pipeline = both
    pipeline.scheduler.set_timesteps(25)
    told = ours.objective.noise_input(pipeline.scheduler.sigmas[:-1])
    torch.testing.assert_close(told, pipeline.scheduler.timesteps, rtol=0, atol=5e-4)  # its schedule is rounded


def test_gap_is_rounding_in_diffusers_mode_and_epsilon_in_the_original(family: SVD) -> None:
    rounding = family.export_gap()
    assert rounding.unet < 1e-5
    assert rounding.decoder < 1e-5
    original = replace(family, unet=copy.deepcopy(family.unet))
    for module in original.unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-3
    assert original.export_gap().unet > 10 * rounding.unet


def test_post_quant_convolution_is_kept_and_its_gap_stated(tmp_path: Path) -> None:
    folder = write_image_model(tmp_path / "image", linear=False, quant=True)
    family = SVD.from_image_model(folder, spec=DIFFUSERS, frames=2)
    randomise(family.unet)
    randomise(family.vae, scale=0.2)
    gap = family.save_pretrained(tmp_path / "export")
    assert gap.decoder > 1e-3
    assert json.loads((tmp_path / "export" / "inflate.json").read_text())["export_gap"]["decoder"] == gap.decoder
    assert same_weights(SVD.from_pretrained(tmp_path / "export"), family)


def test_folded_post_quant_convolution_is_exact_without_bias(tmp_path: Path) -> None:
    family = SVD.from_image_model(write_image_model(tmp_path, quant=True))
    randomise(family.vae, scale=0.2)
    torch.nn.init.zeros_(family.vae.post_quant_conv.bias)
    assert family.export_gap().decoder < 1e-4


def test_export_of_a_plain_diffusers_folder_is_read_alike(family: SVD, exported: Path, tmp_path: Path) -> None:
    for entry in exported.iterdir():
        if entry.name != "inflate.json":
            (tmp_path / entry.name).symlink_to(entry)
    plain = SVD.from_pretrained(tmp_path)
    assert plain.objective == EDM()
    assert plain.unet.spec.cross_attention_resnet_eps == 1e-6
    assert plain.vae.config.use_quant_conv
    condition = Condition(torch.randn(1, 1, WIDTH), torch.randn(1, 4, 8, 8), torch.tensor([[6.0, 127.0, 0.02]]))
    inputs = torch.randn(1, 3, 4, 8, 8), torch.tensor([0.3])
    with torch.no_grad():
        outputs = [each.predict(condition)(*inputs) for each in (plain, family)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


def test_export_without_a_tensor_is_refused(exported: Path, tmp_path: Path) -> None:
    for entry in exported.iterdir():
        if entry.name != "unet":
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text((exported / "unet" / "config.json").read_text())
    tensors = load_file(exported / "unet" / "diffusion_pytorch_model.safetensors")
    del tensors["add_embedding.linear_1.bias"]
    save_file(tensors, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing \(add_embedding.linear_1.bias\)"):
        SVD.from_pretrained(tmp_path)


def test_damaged_weights_are_named(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "inflate.json").symlink_to(exported / "inflate.json")
    whole = (exported / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors cannot be read"):
        SVD.from_pretrained(tmp_path)


def test_export_replaces_an_export_but_nothing_else(family: SVD, exported: Path, tmp_path: Path) -> None:
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("dear")
    with pytest.raises(CheckpointError, match="holds other files"):
        family.save_pretrained(other)
    assert [entry.name for entry in other.iterdir()] == ["thesis.txt"]
    before = (exported / "inflate.json").read_text()
    family.save_pretrained(exported)
    assert (exported / "inflate.json").read_text() == before
    assert [entry.name for entry in exported.parent.iterdir()] == ["export"]


def test_failed_export_leaves_the_old_one(family: SVD, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(StableVideoDiffusionPipeline, "save_pretrained", full)
    with pytest.raises(CheckpointError, match="no space left"):
        family.save_pretrained(exported)
    assert [entry.name for entry in exported.parent.iterdir()] == ["export"]
    assert (exported / "inflate.json").is_file()


def test_unet_of_another_class_is_named(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet3DConditionModel"}')
    for load in (svd_files.is_image_model, SVD.load, SVD.from_pretrained):
        with pytest.raises(CheckpointError, match="UNet3DConditionModel"):
            load(tmp_path)


def test_own_settings_without_the_temporal_specification_are_refused(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "unet").symlink_to(exported / "unet")
    settings = json.loads((exported / "inflate.json").read_text())
    del settings["unet"]["temporal"]
    (tmp_path / "inflate.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"inflate\.json lacks unet\.temporal"):
        SVD.from_pretrained(tmp_path)


def test_models_that_diffusers_cannot_hold_are_refused(family: SVD, tmp_path: Path) -> None:
    narrow = copy.deepcopy(family)
    narrow.vae.register_to_config(layers_per_block=1)
    narrow.unet.register_to_config(norm_num_groups=16)
    with pytest.raises(CheckpointError, match=r"unet norm_num_groups 16; vae layers_per_block 1"):
        narrow.save_pretrained(tmp_path / "export")
    assert not (tmp_path / "export").exists()


# ---- the original's single file


@pytest.fixture
def sgm_file(family: SVD, tmp_path: Path) -> Path:
    write_sgm(family.unet, family.vae, tmp_path / "svd.safetensors")
    return tmp_path / "svd.safetensors"


def test_single_file_of_the_original_is_loaded(family: SVD, sgm_file: Path, image_model: Path) -> None:
    loaded = SVD.from_sgm(sgm_file, image_model / "image_encoder", head_channels=16)
    assert loaded.unet.spec.cross_attention_resnet_eps == 1e-5
    assert loaded.objective.noise_condition == "edm"
    ours, theirs = family.unet.state_dict(), loaded.unet.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    latent = torch.randn(1, 2, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(loaded.decode(latent), family.decode(latent))


def test_single_file_with_an_unknown_part_is_refused(sgm_file: Path, image_model: Path) -> None:
    save_file({**load_file(sgm_file), "model_ema.decay": torch.zeros(1)}, sgm_file)
    with pytest.raises(CheckpointError, match=r"no known part: model_ema\.decay"):
        SVD.from_sgm(sgm_file, image_model / "image_encoder")


def test_scheduler_refuses_an_empty_range() -> None:
    with pytest.raises(ConfigError, match="sigma_min"):
        euler_scheduler(EDM(), sigma_min=5.0, sigma_max=1.0)


def test_meta_models_take_over_without_a_copy(family: SVD) -> None:
    twin = svd_files.diffusers_unet(family.unet, 4)
    assert twin.conv_in.weight.data_ptr() == family.unet.conv_in.weight.data_ptr()


def test_an_image_encoder_that_would_not_be_used_is_refused(exported: Path) -> None:
    with pytest.raises(CheckpointError, match="leave image_encoder out"):
        SVD.load(exported, image_encoder=exported / "image_encoder")


def test_encoders_alone_are_those_of_the_whole_model(
    family: SVD, image_model: Path, exported: Path, sgm_file: Path, tmp_path: Path
) -> None:
    (image_model / "image_encoder" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    sources: list[tuple[Path, Path | None]] = [
        (image_model, None), (exported, None), (sgm_file, image_model / "image_encoder")
    ]  # fmt: skip
    for path, inside in sources:
        whole = SVD.from_sgm(sgm_file, inside, head_channels=16) if inside else SVD.load(path)
        alone = Encoders.load(path, inside)
        assert (alone.image_mean, alone.image_std) == (whole.image_mean, whole.image_std)
        assert encoder_sha256(alone.vae) == encoder_sha256(whole.vae)
        assert weights_sha256(alone.image_encoder) == weights_sha256(whole.image_encoder)
    (image_model / "image_encoder" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="leave image_encoder out"):
        Encoders.load(exported, exported / "image_encoder")
    with pytest.raises(CheckpointError, match="give its folder as image_encoder"):
        Encoders.load(sgm_file)


# ---- an image model in a single file


def test_temporal_layers_over_a_single_file_know_its_image_encoder(tmp_path: Path, image_model: Path) -> None:
    write_single_file(tmp_path / "sd.safetensors", cross_attention_dim=CROSS)
    inside = image_model / "image_encoder"
    family = SVD.load(tmp_path / "sd.safetensors", inside, frames=3)
    for parameter in [*family.unet.created_parameters().values(), *family.unet.conv_in.parameters()]:
        parameter.data.copy_(parameter.half())
    for parameter in family.vae.temporal_parameters().values():
        parameter.data.copy_((parameter + 0.05 * torch.randn(parameter.shape)).half())
    with pytest.raises(CheckpointError, match="holds no image encoder: give its folder"):
        family.save_temporal(tmp_path / "alone", str(tmp_path / "sd.safetensors"))
    family.save_temporal(tmp_path / "alone", str(tmp_path / "sd.safetensors"), str(inside))
    assert same_weights(SVD.load(tmp_path / "alone"), family)
    assert same_weights(SVD.load(tmp_path / "alone", image_model=tmp_path / "sd.safetensors"), family)
    latents = torch.randn(1, 2, 4, 4, 4)
    assert torch.equal(Encoders.load(tmp_path / "alone").decode(latents), family.decode(latents))


@pytest.mark.parametrize("linear", [False, True])
def test_a_community_checkpoint_becomes_the_model_that_its_folder_becomes(linear: bool, tmp_path: Path) -> None:
    folder = write_image_model(tmp_path / "folder", linear=linear, quant=True, prediction_type="epsilon")
    shape: dict[str, Any] = {"attention_head_dim": (1, 2) if linear else 8, "block_out_channels": (64, 128)}
    unet = tiny_unet(linear=linear, norm_num_groups=32, transformer_layers_per_block=(2, 2), **shape)
    unet.save_pretrained(folder / "unet")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    names = unet_names(unet.state_dict(), UNetLayout.of(unet.config))
    tensors = {f"model.diffusion_model.{names[key]}": tensor for key, tensor in unet.state_dict().items()}
    names = vae_names(vae.state_dict(), 2)
    tensors |= {f"first_stage_model.{names[key]}": tensor for key, tensor in vae.state_dict().items()}
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "model.safetensors")
    inside = folder / "image_encoder"
    torch.manual_seed(0)
    ours = SVD.load(tmp_path / "model.safetensors", inside, frames=3, prediction="epsilon")
    torch.manual_seed(0)
    theirs = SVD.load(folder, frames=3)
    assert ours.objective == replace(theirs.objective, zero_terminal_snr=False)
    for one, other in ((ours.unet, theirs.unet), (ours.vae, theirs.vae)):
        assert one.state_dict().keys() == other.state_dict().keys()
        assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in one.state_dict().items())
    inputs = torch.randn(1, 2, 8, 8, 8), torch.ones(1), torch.randn(1, 1, CROSS)
    with torch.no_grad():
        same, wanted = (one.unet(*inputs, added_time_ids=torch.ones(1, 3)).sample for one in (ours, theirs))
    torch.testing.assert_close(same, wanted, atol=1e-5, rtol=0)
    alone = Encoders.load(tmp_path / "model.safetensors", inside)
    assert encoder_sha256(alone.vae) == encoder_sha256(theirs.vae)


def test_an_image_encoder_of_another_width_names_the_one_that_fits(family: SVD) -> None:
    unet = copy.deepcopy(family.unet)
    unet.register_to_config(cross_attention_dim=768)
    with pytest.raises(CheckpointError, match=r"context has 768: that of Stable Diffusion 1 is openai/clip-vit-large"):
        SVD(unet, family.vae, family.image_encoder)
