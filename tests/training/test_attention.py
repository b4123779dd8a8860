"""On a CPU there is one kernel: what is tested is the refusals, the order of preference, and the choice on paper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import SlicedAttnProcessor, XFormersAttnProcessor
from torch import nn
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from inflate.config import load
from inflate.errors import ConfigError
from inflate.layers.frame_attention import FrameAttention
from inflate.layers.frame_operator import by_triton
from inflate.layers.temporal import ContextAttention
from inflate.training.attention import KERNELS, check_attention, choose_attention, preferring
from inflate.training.cost import Cost, on_paper
from inflate.training.loop import fit
from inflate.training.paper import Paper
from inflate.training.settings import Training
from tiny_svd import family, image_to_video
from toy import Points, Regression

CPU = torch.device("cpu")
CHOICES = ["flash", "efficient", "cudnn", "xformers", "triton"]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_kernel_of_gpus_is_refused_on_a_cpu_before_anything_is_written(choice: str, tmp_path: Path) -> None:
    settings = Training(output=tmp_path / "run", attention=choice, tracker="none")
    with pytest.raises(ConfigError, match=f"attention={choice} needs a CUDA GPU.*: set training.attention=sdpa"):
        fit(Regression(), Points(), settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["xformers", "triton"])
def test_a_package_that_is_not_there_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inflate.training.attention.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{package} is not installed \(.*\); install it, or set"):
        check_attention(Training(attention=package), torch.device("cuda"))


def test_an_unknown_one_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="attention"):
        load(Training, ["attention=flash3"])


def test_the_preferred_kernel_comes_first_and_the_rest_can_stand_in() -> None:
    before = _cur_sdpa_kernel_backends(with_priority=True)
    for choice, (first, _) in KERNELS.items():
        with preferring(choice):
            order = _cur_sdpa_kernel_backends(with_priority=True)
        assert order[0] == first
        assert order[-1] == SDPBackend.MATH
        assert set(order) == {backend for backend, _ in KERNELS.values()} | {SDPBackend.MATH}
    with preferring("sdpa"):
        assert _cur_sdpa_kernel_backends(with_priority=True) == before
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


def test_triton_is_chosen_for_attention_over_frames_and_refused_where_it_cannot_be() -> None:
    network = family().unet
    choose_attention([network], Training(attention="triton"), CPU)
    layers = [module for module in network.modules() if isinstance(module, FrameAttention)]
    assert layers
    assert {layer.attend for layer in layers} == {by_triton}
    with pytest.raises(ConfigError, match="no attention over frames; set training.attention=sdpa"):
        choose_attention([nn.Linear(2, 2)], Training(attention="triton"), CPU)
    with pytest.raises(ConfigError, match="heads of 160 channels are wider than the 128"):
        choose_attention([FrameAttention(160, heads=1, dim_head=160)], Training(attention="triton"), CPU)


def planned(choice: str) -> Cost:
    """The cost on paper of a step of the tiny model whose attention is computed so."""
    paper, task = Paper(), image_to_video()
    for network in task.family.parts.values():
        paper.adopt(network)
    batch = dict(task.held_out[0])
    return on_paper(task, Training(attention=choice, tracker="none"), batch, paper, looking=False)


def test_a_step_is_planned_without_a_gpu_and_without_the_package() -> None:
    plain, other, ours = map(planned, ("sdpa", "xformers", "triton"))
    assert plain.flops == other.flops == ours.flops
    assert plain.peaks == other.peaks
    assert ours.peaks["forward"] < plain.peaks["forward"]  # it keeps no output for its backward pass


@pytest.mark.parametrize("processor", [XFormersAttnProcessor(), SlicedAttnProcessor(1)])
def test_constant_attention_stays_constant_under_another_processor(processor: object) -> None:
    layer = ContextAttention(16, cross_attention_dim=12, heads=2, dim_head=8).requires_grad_(False)
    object.__setattr__(layer, "query_norm", nn.LayerNorm(16).requires_grad_(False))
    context = torch.randn(3, 1, 12)
    expected = layer(torch.randn(3, 6, 16), context)
    layer.set_processor(processor)
    assert expected.shape == (3, 1, 16)
    assert torch.equal(layer(torch.randn(3, 6, 16), context), expected)
