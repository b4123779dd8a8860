import json
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

from helpers import randomise, tiny_vae
from inflate.errors import ConfigError, TrainingError
from inflate.models.vae import VideoVAE, decode_clips, encode_clips, encoder_sha256
from inflate.training.decoder import (
    Decoder,
    DecoderTask,
    adaptive_weight,
    add_noise,
)
from inflate.training.loop import Training, fit
from inflate.training.noise import Noise

FRAMES, SIDE = 4, 16
SMALL = Decoder(adversarial_start=0, discriminator_channels=8, discriminator_layers=2, perceptual=0.1)


def clips(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def vae(video: bool = True):
    image = tiny_vae(use_quant_conv=False, use_post_quant_conv=False)
    return VideoVAE.from_2d(image) if video else image


def export(folder):
    (folder / "weights").touch()


def make(settings: Decoder = SMALL, video: bool = True, held_out: int = 1) -> DecoderTask:
    return DecoderTask(vae(video), settings, clips(held_out, seed=9), export)


def batch_of(numbers: list[int]) -> tuple[dict, Noise]:
    pixels = torch.cat([clips(1, seed=number) for number in numbers])
    return {"pixels": pixels, "number": torch.tensor(numbers)}, Noise(0, torch.tensor(numbers))


def act(task: DecoderTask, numbers: list[int], step: int = 0):
    """One turn of every player; their mean losses are back-propagated."""
    batch, noise = batch_of(numbers)
    batch["pixels"] = batch["pixels"].to(task.vae.dtype)
    logs = {}
    for player in task.players:
        others = [p for other in task.players if other is not player for p in other.network.parameters()]
        flags = [p.requires_grad for p in others]
        for parameter in others:
            parameter.requires_grad_(False)
        loss, logs[player.name] = player.loss(batch, noise, step)
        logs[player.name]["loss"] = loss.detach()
        loss.mean().backward()
        for parameter, flag in zip(others, flags, strict=True):
            parameter.requires_grad_(flag)
    return logs


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_only_the_temporal_layers_and_the_discriminator_get_gradients():
    task = make()
    act(task, [0, 1])
    found = gradients(task.vae)
    assert found
    assert all(".temporal." in name for name in found)
    assert all(p.grad is not None for p in task.critics["discriminator"].parameters())


def test_the_whole_decoder_can_be_trained_with_the_encoder_still_frozen():
    task = make(replace(SMALL, trainable="decoder"))
    before = encoder_sha256(task.vae)
    act(task, [0, 1])
    assert "decoder.conv_in.weight" in gradients(task.vae)
    assert not any(name.startswith("encoder.") for name in gradients(task.vae))
    assert encoder_sha256(task.vae) == before


@pytest.mark.parametrize("video", [True, False])
def test_the_frame_wise_control_decodes_frames_alone_and_leaves_temporal_layers_out(video):
    task = make(replace(SMALL, temporal=False, trainable="decoder"), video)
    act(task, [0, 1])
    assert all(".temporal." not in name for name in gradients(task.vae))
    latents = encode_clips(task.vae, clips(1))
    frames = torch.cat([task.vae.decode(z / task.vae.config.scaling_factor).sample for z in latents[0].split(1)])
    assert torch.allclose(decode_clips(task.vae, latents, temporal=False)[0], frames, atol=1e-5)


def test_latents_are_scaled_modes():
    model, pixels = vae(), clips()
    expected = model.encode(pixels[1]).latent_dist.mode() * model.config.scaling_factor
    latents = encode_clips(model, pixels)
    assert torch.allclose(latents[1], expected, atol=1e-6)
    assert not latents.requires_grad


def test_noise_has_a_level_per_clip_within_range_and_spares_a_share():
    settings = replace(SMALL, latent_noise=(0.2, 0.4), clean_share=0.5)
    numbers = torch.arange(200)
    noisy = add_noise(torch.zeros(200, 4, 4, 8, 8), Noise(0, numbers), settings)
    level = noisy.flatten(1).std(1)
    clean = level == 0
    assert 0.35 < clean.float().mean() < 0.65
    assert level[~clean].min() > 0.17
    assert level[~clean].max() < 0.43
    assert level[~clean].std() > 0.03
    assert not torch.equal(noisy[~clean][0, 0], noisy[~clean][0, 1])


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_weight():
    last = torch.nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    output = last @ x  # (2, 3, 5)
    first, second = output.square().flatten(1).sum(1), 10 * output.flatten(1).sum(1)
    expected = []
    for number in range(2):
        norms = [torch.autograd.grad(loss[number], last, retain_graph=True)[0].norm() for loss in (first, second)]
        expected.append((norms[0] / norms[1]).item())
    assert adaptive_weight(first, second, output, last, (0, 1e4)).tolist() == pytest.approx(expected, rel=1e-5)
    assert adaptive_weight(first, second, output, last, (0, 1e-3)).tolist() == pytest.approx([1e-3] * 2)
    assert adaptive_weight(first, 0 * second, output, last, (0.5, 100)).tolist() == [100, 100]
    assert last.grad is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_adaptive_weight_reaches_a_frozen_last_layer_and_leaves_no_gradient_there(checkpointing):
    task = make()
    if checkpointing:
        task.vae.enable_gradient_checkpointing()
        task.vae.train()
    logs = act(task, [0])["decoder"]
    last = task.vae.decoder.conv_out.weight
    assert 0 < logs["adaptive_weight"].item() < 1e4
    assert not last.requires_grad
    assert last.grad is None


def test_the_adversarial_gradient_at_the_last_layer_has_the_asked_share():
    task = make(replace(SMALL, trainable="decoder", adversarial=0.5))
    batch, noise = batch_of([0])
    weight = task.vae.decoder.conv_out.weight
    total = torch.autograd.grad(task.decoder.loss(batch, noise, 0)[0].sum(), weight)[0]
    task.settings = replace(task.settings, adversarial_start=1)
    alone = torch.autograd.grad(task.decoder.loss(batch, noise, 0)[0].sum(), weight)[0]
    assert ((total - alone).norm() / alone.norm()).item() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("trainable", ["temporal", "decoder"])
def test_training_in_little_memory_has_the_same_losses_and_gradients(trainable):
    found = []
    for rows in (None, 3):
        task = make(replace(SMALL, trainable=trainable))
        for network in (task.vae, *task.critics.values()):
            randomise(network.double())
        task.vae.stream(rows)
        logs = act(task, [0, 1])
        last = task.vae.decoder.conv_out.weight
        assert (last.grad is None) is not last.requires_grad
        grads = {f"{key}.{name}": value for key, network in {"vae": task.vae, **task.critics}.items()
                 for name, value in gradients(network).items()}  # fmt: skip
        found.append(({(key, name): value for key, log in logs.items() for name, value in log.items()}, grads))
    (plain_logs, plain), (logs, streamed) = found
    for before, after in ((plain_logs, logs), (plain, streamed)):
        assert before.keys() == after.keys()
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=1e-8, atol=1e-10, msg=str(name))


def test_the_discriminator_waits_and_may_lead():
    task = make(replace(SMALL, adversarial_start=7, discriminator_lead=3))
    assert [player.start for player in task.players] == [0, 4]
    batch, noise = batch_of([0])
    assert "adversarial" not in task.decoder.loss(batch, noise, 6)[1]
    assert "adversarial" in task.decoder.loss(batch, noise, 7)[1]


def test_the_discriminator_judges_the_decoders_own_reconstruction_of_the_batch():
    task = make()
    calls = []
    task.decoder.network.register_forward_hook(lambda *_: calls.append("decoded"))
    seen = []
    task.critics["discriminator"].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    act(task, [0, 1])
    on_fake, on_both = seen
    assert calls == ["decoded"]
    assert torch.equal(on_both[2:], on_fake)
    assert torch.equal(on_both[:2], batch_of([0, 1])[0]["pixels"])
    assert not on_both.requires_grad


def test_a_discriminator_that_acts_alone_decodes_anew():
    task = make()
    batch, noise = batch_of([0, 1])
    first = task.players[1].loss(batch, noise, 0)[0]
    task.players[0].loss(batch, noise, 0)
    assert torch.allclose(task.players[1].loss(batch, noise, 0)[0], first, atol=1e-6)


def test_no_discriminator_without_adversarial_weight_and_a_second_one_for_images():
    assert [p.name for p in make(replace(SMALL, adversarial=0)).players] == ["decoder"]
    task = make(replace(SMALL, image_adversarial=True))
    assert [p.name for p in task.players] == ["decoder", "discriminator", "image_discriminator"]
    act(task, [0])
    assert all(p.grad is not None for p in task.critics["image_discriminator"].parameters())


def test_losses_do_not_depend_on_how_clips_fall_into_batches():
    task = make(replace(SMALL, image_adversarial=True))
    randomise(task.vae.decoder)
    together = act(task, [3, 4])
    apart = [act(task, [number]) for number in (3, 4)]
    for player in together:
        for name, values in together[player].items():
            assert values.tolist() == pytest.approx([one[player][name].item() for one in apart], rel=1e-4), name


def test_training_lowers_the_held_out_flicker_of_noisy_latents():
    settings = replace(SMALL, adversarial=0, perceptual=0, latent_noise=(0.3, 0.3), clean_share=0, held_out_noise=0.3)
    still = clips(1, seed=9)[:, :1].repeat(1, FRAMES, 1, 1, 1)
    task = DecoderTask(vae(), settings, still, export)
    optimizer = torch.optim.Adam(task.vae.temporal_parameters().values(), lr=3e-3)
    before = task.evaluate()
    for number in range(15):
        task.decoder.loss({"pixels": still}, Noise(0, torch.tensor([number])), 0)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = task.evaluate()
    assert after["noisy/flicker"] < 0.8 * before["noisy/flicker"]
    assert after["noisy/psnr"] >= before["noisy/psnr"]


def test_channels_last_pixels_can_be_trained_on():
    task = make()
    batch, noise = batch_of([0])
    batch["pixels"] = batch["pixels"].movedim(2, -1).contiguous().movedim(-1, 2)
    task.decoder.loss(batch, noise, 0)[0].sum().backward()
    assert gradients(task.vae)


class Dataset:
    """Five clips."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: int) -> dict:
        return {"pixels": clips(1, seed=number % 5)[0], "number": number}


@pytest.mark.slow
def test_a_run_trains_all_players_and_resumes_exactly(tmp_path):
    def run(name: str, steps: int, resume: str | None = None) -> dict[str, torch.Tensor]:
        task = make(replace(SMALL, image_adversarial=True, adversarial_start=1, previews=1))
        settings = Training(
            tmp_path / name, steps=steps, accumulate=2, lr=1e-3, ema=0.9, workers=0, log_every=1, resume=resume,
            tracker="none", progress=False,
        )  # fmt: skip
        result = fit(task, Dataset(), settings)
        assert result.held_out[-1]["noisy/psnr"] > 0
        assert (result.export / "decoder.json").exists()
        modules = {"vae": task.vae, **task.critics}
        return {f"{m}.{k}": v.clone() for m, module in modules.items() for k, v in module.state_dict().items()}

    birth = make(replace(SMALL, image_adversarial=True)).vae.state_dict()
    whole = run("whole", 4)
    run("halves", 2)
    halves = run("halves", 4, "latest")
    assert all(torch.equal(value, halves[name]) for name, value in whole.items())
    assert not torch.equal(whole["vae.decoder.conv_out.temporal.weight"], birth["decoder.conv_out.temporal.weight"])
    assert torch.equal(whole["vae.decoder.conv_out.weight"], birth["decoder.conv_out.weight"])


def test_evaluation_is_fixed_and_reports_the_parent_at_birth():
    task = make(held_out=2)
    first = task.evaluate()
    assert first == task.evaluate()
    names = {"psnr", "ssim", "flicker", "sharpness", "spectrum_distance"}
    assert set(first) == {
        f"{parent}{kind}/{n}" for parent in ("", "parent/") for kind in ("clean", "noisy") for n in names
    }
    for name in [name for name in first if not name.startswith("parent/")]:
        assert first[name] == pytest.approx(first[f"parent/{name}"], abs=1e-4), name
    randomise(task.vae.decoder)
    moved = task.evaluate()
    assert moved["clean/psnr"] != first["clean/psnr"]
    assert all(moved[name] == first[name] for name in first if name.startswith("parent/"))


def test_the_psnr_of_training_clips_is_measured_as_that_of_held_out_ones():
    shown = clips(3, seed=9)
    task = DecoderTask(vae(), replace(SMALL, train_clips=2), shown[:2], export, training=[*shown])
    values = task.evaluate()
    for kind in ("clean", "noisy"):
        assert values[f"training-clip {kind}/psnr"] == values[f"{kind}/psnr"]
    assert len(task.training.pixels) == 2
    none = DecoderTask(vae(), replace(SMALL, train_clips=0), shown[:2], export, training=[*shown]).evaluate()
    assert not any(name.startswith("training-clip") for name in none)


def test_a_changed_encoder_stops_evaluation_and_export(tmp_path):
    task = make()
    with torch.no_grad():
        task.vae.encoder.conv_in.bias[0] += 1e-3
    with pytest.raises(TrainingError, match="encoder has changed"):
        task.evaluate()
    with pytest.raises(TrainingError, match="encoder has changed"):
        task.export(tmp_path)
    assert not list(tmp_path.iterdir())


def test_export_records_what_the_decoder_rests_on(tmp_path):
    task = make()
    task.export(tmp_path)
    record = json.loads((tmp_path / "decoder.json").read_text(encoding="utf-8"))
    assert (tmp_path / "weights").exists()
    assert record["encoder_sha256_before"] == record["encoder_sha256_after"] == encoder_sha256(task.vae)
    assert record["decode_chunk"] == FRAMES
    assert record["trained_parameters"] == sum(p.numel() for p in task.vae.temporal_parameters().values())


def test_previews_are_a_playable_video_and_a_sheet(tmp_path):
    task = make(replace(SMALL, previews=1), held_out=2)
    task.preview(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder-00.mp4", "decoder-00.png"]
    with av.open(str(tmp_path / "decoder-00.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == FRAMES
    assert frames[0].shape == (SIDE, 3 * SIDE, 3)
    with Image.open(tmp_path / "decoder-00.png") as sheet:
        assert sheet.width >= FRAMES * SIDE
        assert sheet.height >= 3 * SIDE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temporal": False}, "decoder.trainable=decoder"),
        ({"l1": 0.0, "perceptual": 0.0}, "nothing asks"),
        ({"l1": -1.0}, "decoder.l1=-1.0"),
        ({"train_clips": -1}, "decoder.train_clips=-1"),
        ({"clean_share": 1.5}, "decoder.clean_share=1.5"),
        ({"latent_noise": (0.3, 0.1)}, "decoder.latent_noise"),
        ({"adaptive_bounds": (2.0, 1.0)}, "decoder.adaptive_bounds"),
        ({"discriminator_lead": 1}, "decoder.discriminator_lead=1"),
        ({"image_adversarial": True, "adversarial": 0.0}, "decoder.image_adversarial"),
        ({"vgg_weights": Path("vgg.safetensors"), "perceptual": 0.0}, "decoder.vgg_weights"),
    ],
)
def test_settings_that_contradict_are_named_before_anything_changes(change, message):
    model = vae()
    with pytest.raises(ConfigError, match=message):
        DecoderTask(model, replace(SMALL, **change), clips(), export)
    assert all(p.requires_grad for p in model.parameters())


def test_a_2d_vae_cannot_decode_temporally():
    with pytest.raises(ConfigError, match="decoder.temporal=false"):
        make(video=False)


def test_held_out_clips_need_two_frames():
    with pytest.raises(ConfigError, match="held-out"):
        DecoderTask(vae(), SMALL, clips()[:, :1], export)
