import pytest
import torch

from inflate.errors import CheckpointError, ConfigError
from inflate.models.discriminator import ImageDiscriminator, VideoDiscriminator, load_published


def clips(batch: int = 2, frames: int = 8, side: int = 32) -> torch.Tensor:
    return torch.randn(batch, frames, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("stride", "frames"), [(1, 8), (2, 4), (4, 2)])
def test_video_logits_are_patches_of_frames_thinned_by_the_temporal_stride(stride, frames):
    logits = VideoDiscriminator(8, temporal_stride=stride)(clips())
    assert logits.shape == (2, frames, 4, 4)


def test_image_logits_are_patches_of_each_frame_alone():
    network, x = ImageDiscriminator(8), clips()
    logits = network(x)
    assert logits.shape[:2] == (2, 8)
    assert torch.allclose(logits[1:, 3:4], network(x[1:, 3:4]), atol=1e-6)


def test_video_logits_depend_on_the_order_of_frames():
    network, x = VideoDiscriminator(8, temporal_stride=1), clips()
    assert not torch.allclose(network(x.flip(1)).flip(1), network(x), atol=1e-4)


@pytest.mark.parametrize("norm", ["group", "spectral"])
@pytest.mark.parametrize("kind", [VideoDiscriminator, ImageDiscriminator])
def test_clips_of_a_batch_do_not_influence_each_other(kind, norm):
    network, x = kind(8, norm=norm).eval(), clips()
    assert torch.allclose(network(x)[:1], network(x[:1]), atol=1e-6)


@pytest.mark.parametrize("norm", ["group", "spectral"])
def test_every_parameter_gets_a_gradient(norm):
    network = VideoDiscriminator(8, norm=norm)
    network(clips()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_spectral_norm_bounds_the_largest_singular_value():
    network = VideoDiscriminator(8, norm="spectral").train()
    for _ in range(30):
        network(clips(1))
    weight = network.eval().layers[2].weight.flatten(1)
    assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=0.02)


def test_the_full_size_has_the_published_number_of_parameters():
    with torch.device("meta"):
        image = ImageDiscriminator(64, 3, "batch")
        video = VideoDiscriminator(64, 3, "batch", temporal_stride=4)
    assert sum(p.numel() for p in image.parameters()) == 2_765_633
    assert sum(p.numel() for p in video.parameters()) == 4_665_729


def test_published_tensors_are_placed_by_the_order_of_their_layers():
    source, target = (ImageDiscriminator(8, norm="batch").eval() for _ in range(2))
    published = {f"main.{key.removeprefix('layers.')}": value for key, value in source.state_dict().items()}
    spread = {
        k.replace(f"main.{n}.", f"main.{10 * n}."): v for k, v in published.items() for n in [int(k.split(".")[1])]
    }
    load_published(target, spread)
    assert torch.equal(target(clips()), source(clips()))


@pytest.mark.parametrize("change", ["missing", "surplus", "shape"])
def test_published_tensors_that_do_not_fit_are_listed_and_nothing_changes(change):
    network = ImageDiscriminator(8, norm="batch")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    tensors = {key: value + 1 for key, value in before.items()}
    if change == "missing":
        del tensors["layers.11.bias"]
    elif change == "surplus":
        tensors["other.bias"] = torch.zeros(1)
    else:
        tensors["layers.11.bias"] = torch.zeros(2)
    with pytest.raises(CheckpointError, match="other.bias" if change == "surplus" else "layers.11.bias"):
        load_published(network, tensors)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_impossible_sizes_are_refused():
    with pytest.raises(ConfigError, match="multiple of 8"):
        VideoDiscriminator(12)
    with pytest.raises(ConfigError, match="temporal stride"):
        VideoDiscriminator(8, temporal_stride=3)
    with pytest.raises(ConfigError, match="temporal stride"):
        VideoDiscriminator(8, layers=1, temporal_stride=2)
