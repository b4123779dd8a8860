import logging

import pytest
import torch
from networks import lpips_weights
from safetensors.torch import save_file

from helpers import tiny_vae
from inflate.errors import CheckpointError, ConfigError
from inflate.metrics.perceptual import LPIPS, VGG16, EncoderFeatures, framewise, perceptual_distance


@pytest.fixture(scope="module")
def weights():
    """Seeded tensors under the published names."""
    return lpips_weights()


@pytest.fixture(scope="module")
def lpips(weights):
    return LPIPS(*weights)


def images(count: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_convolutions_have_their_published_places(weights):
    places = sorted({int(key.split(".")[1]) for key in weights[0] if key.startswith("features")})
    assert places == [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]


def test_lpips_equals_its_definition(lpips, weights):
    x, y = images(seed=1), images(seed=2)
    backbone, heads = weights
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    features = [(image - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1) for image in (x, y)]
    expected, number = torch.zeros(2), 0
    for index, stage in enumerate(VGG16):
        for _ in stage:
            weight = backbone[f"features.{number}.weight"]
            features = [torch.nn.functional.conv2d(f, weight, padding=1).relu() for f in features]
            number += 2
        a, b = (f / f.square().sum(1, keepdim=True).sqrt().add(1e-10) for f in features)
        expected += ((a - b) ** 2 * heads[f"lin{index}.model.1.weight"]).sum(1).mean((1, 2))
        features = [torch.nn.functional.max_pool2d(f, 2) for f in features]
        number += 1
    assert torch.allclose(lpips(x, y), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["lpips", "encoder"])
def test_distance_is_0_to_itself_grows_with_damage_and_has_a_gradient(kind, lpips):
    distance = lpips if kind == "lpips" else EncoderFeatures(tiny_vae().requires_grad_(False))
    truth = images()
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(3))
    near, far = (truth + 0.05 * noise).requires_grad_(), truth + 0.4 * noise
    assert distance(truth, truth).abs().max().item() == 0
    assert (distance(near, truth) < distance(far, truth)).all()
    distance(near, truth).sum().backward()
    assert near.grad.isfinite().all()
    assert near.grad.abs().max() > 0


def test_black_images_have_a_finite_gradient(weights):
    dark = LPIPS({key: torch.zeros_like(value) for key, value in weights[0].items()}, weights[1])
    x = images().requires_grad_()
    dark(x, images(seed=1)).sum().backward()
    assert x.grad.isfinite().all()


def test_weights_come_from_files_of_both_kinds(lpips, weights, tmp_path):
    save_file(weights[0], tmp_path / "vgg.safetensors")
    torch.save(weights[1], tmp_path / "heads.pth")
    loaded = perceptual_distance(tmp_path / "vgg.safetensors", tmp_path / "heads.pth", tiny_vae())
    assert torch.equal(loaded(images(), images(seed=1)), lpips(images(), images(seed=1)))


def test_wrong_tensors_are_named(weights):
    backbone, heads = weights
    with pytest.raises(CheckpointError, match=r"backbone: missing \['features.28.bias'\]"):
        LPIPS({key: value for key, value in backbone.items() if key != "features.28.bias"}, heads)
    with pytest.raises(CheckpointError, match="of another shape .*lin0"):
        LPIPS(backbone, heads | {"lin0.model.1.weight": torch.zeros(1, 3, 1, 1)})


def test_unreadable_files_are_named(tmp_path):
    for name in ("vgg.pth", "vgg.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(CheckpointError, match=name):
            LPIPS.from_files(tmp_path / name, tmp_path / name)
    with pytest.raises(CheckpointError, match="absent"):
        LPIPS.from_files(tmp_path / "absent.pth", tmp_path / "absent.pth")


def test_one_file_of_two_is_an_error_and_none_is_logged(tmp_path, caplog):
    with pytest.raises(ConfigError, match="lpips_heads is not set"):
        perceptual_distance(tmp_path / "vgg.pth", None, tiny_vae())
    with caplog.at_level(logging.WARNING):
        assert isinstance(perceptual_distance(None, None, tiny_vae()), EncoderFeatures)
    assert "VAE's own encoder" in caplog.text


def test_encoder_features_neither_own_nor_move_the_encoder():
    assert list(EncoderFeatures(tiny_vae()).parameters()) == []


def test_one_image_at_a_time_gives_the_same_distances_and_gradients():
    distance = EncoderFeatures(tiny_vae().double().requires_grad_(False))
    truth, weights = images(3, seed=1).double(), torch.tensor([1.0, 2.0, -3.0])
    found = []
    for measure in (distance, lambda *pair: framewise(distance, *pair)):
        output = images(3, seed=2).double().requires_grad_()
        values = measure(output, truth)
        (values * weights).sum().backward(retain_graph=True)
        (values * weights).sum().backward()
        found.append((values.detach(), output.grad))
    for whole, single in zip(*found, strict=True):
        torch.testing.assert_close(single, whole, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(framewise(distance, images(3, seed=2).double(), truth), found[0][0])
