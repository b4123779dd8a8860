from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from helpers import randomise, tiny_unet, unet_inputs
from inflate.adapters import algebra, attach, file
from inflate.adapters.file import Adapter
from inflate.cli import app
from inflate.errors import CheckpointError
from inflate.models.unet import VIDEO_LDM, VideoUNet
from inflate.surgery import inflate_unet

Q = "down_blocks.0.attentions.0.transformer_blocks.0.temporal.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"
TEMPORAL_CONV = "mid_block.resnets.0.temporal.conv1"
LAYERS = (Q, CONV, TEMPORAL_CONV)


@pytest.fixture(scope="module")
def unet() -> VideoUNet:
    video, _ = inflate_unet(tiny_unet(), VIDEO_LDM)
    randomise(video)
    return video


def adapter(unet: VideoUNet, rank: int, seed: int = 0, kind: str = "lora", layers: tuple[str, ...] = LAYERS) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        weight = unet.get_submodule(layer).weight
        ones = [1] * (weight.ndim - 2)
        tensors[f"unet.{layer}.lora_A.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator) / 10
        tensors[f"unet.{layer}.lora_B.weight"] = torch.randn(weight.shape[0], rank, *ones, generator=generator) / 10
    about = {
        "targets": ["x"],
        "licence": "mine",
        "config": "of the run",
        "reference": {},
        "base": {"name": "here", "sha256": "a"},
    }
    return Adapter(tensors, kind, dict.fromkeys(layers, rank), dict.fromkeys(layers, 3.0), about)


def output(unet: VideoUNet, *adapters: Adapter) -> Tensor:
    """What a UNet computes in float64 with the change of each adapter, which PEFT makes, in its weights."""
    model = nn.Module.double(copied(unet))
    for each in adapters:
        attach.load(model, each)
        for _, layer in attach.layers(model):
            layer.merge()
        attach.detach(model)
    inputs = {name: value.double() for name, value in unet_inputs(batch=1, frames=2).items()}
    with torch.no_grad():
        found: Tensor = model(**inputs).sample
    return found


def copied(unet: VideoUNet) -> VideoUNet:
    copy: VideoUNet = VideoUNet.from_config(unet.config).eval()
    copy.load_state_dict(unet.state_dict())
    return copy


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_sum_acts_as_its_parts_together(unet: VideoUNet, kind: str) -> None:
    one, other = adapter(unet, 2, kind=kind), adapter(unet, 3, 1, layers=LAYERS[:2])
    both = algebra.combined([one, other], [0.5, -2.0])
    assert both.rank == {Q: 5, CONV: 5, TEMPORAL_CONV: 2}
    expected = output(unet, algebra.scaled(one, 0.5), algebra.scaled(other, -2.0))
    assert (output(unet) - expected).abs().max() > 1e-2
    assert (output(unet, both) - expected).abs().max() < 1e-6
    assert both.about == {"targets": ["x"], "licence": "mine", "base": {"name": "here", "sha256": "a"}}


def test_targets_and_licences_of_a_sum_are_those_of_all(unet: VideoUNet) -> None:
    one, other = adapter(unet, 2), adapter(unet, 2)
    other = replace(other, about={**other.about, "targets": ["y"], "licence": "yours"})
    both = algebra.combined([one, other], [1, 1])
    assert (both.about["targets"], both.about["licence"]) == (["x", "y"], "mine and yours")


def test_adapters_of_any_base_are_combined_only_where_asked(unet: VideoUNet) -> None:
    one, other = adapter(unet, 2), replace(adapter(unet, 2), about={"base": {"name": "there", "sha256": "b"}})
    with pytest.raises(CheckpointError, match=r"made over different models \(here, there\): add --any-base"):
        algebra.combined([one, other], [1, 1])
    assert algebra.combined([one, other], [1, 1], any_base=True).rank == dict.fromkeys(LAYERS, 4)


def test_adapters_of_other_shapes_are_not_combined(unet: VideoUNet) -> None:
    one, other = adapter(unet, 2), adapter(unet, 2)
    other.tensors[f"unet.{Q}.lora_A.weight"] = torch.ones(2, 5)
    with pytest.raises(CheckpointError, match=f"layers of different shapes: {Q}"):
        algebra.combined([one, other], [1, 1])


def test_a_rank_that_holds_everything_loses_nothing(unet: VideoUNet) -> None:
    one = adapter(unet, 2)
    found = algebra.resized(algebra.combined([one, one], [1, 1]), 2)
    assert found.lost_in_all < 1e-6
    assert (output(unet, found.adapter) - output(unet, algebra.scaled(one, 2))).abs().max() < 1e-6
    more = algebra.resized(one, 4).adapter
    assert more.tensors[f"unet.{Q}.lora_A.weight"].shape == (4, 32)
    assert (output(unet, more) - output(unet, one)).abs().max() < 1e-6


def test_what_a_lower_rank_leaves_out_is_told(unet: VideoUNet) -> None:
    one = adapter(unet, 4, kind="rslora")
    found = algebra.resized(one, 1)
    whole, least = change(one, CONV), change(found.adapter, CONV)
    assert found.lost[CONV] == pytest.approx(float((whole - least).norm() / whole.norm()), rel=1e-5)
    values = torch.linalg.svdvals(whole)
    assert found.lost[CONV] == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-5)
    squares = {layer: change(one, layer).square().sum() for layer in LAYERS}
    lost = sum(float(found.lost[layer] ** 2 * squares[layer]) for layer in LAYERS) / float(sum(squares.values()))
    assert found.lost_in_all == pytest.approx(lost**0.5, rel=1e-5)


def change(adapter: Adapter, layer: str) -> Tensor:
    """A layer's change as a matrix, by PEFT's definition."""
    down, up = (adapter.tensors[f"unet.{layer}.lora_{side}.weight"].flatten(1).double() for side in "AB")
    rank = adapter.rank[layer]
    return up @ down * adapter.alpha[layer] / (rank**0.5 if adapter.kind == "rslora" else rank)


@pytest.mark.parametrize("kind", ["dora", "lokr", "loha"])
def test_other_kinds_are_refused_with_the_reason(unet: VideoUNet, kind: str) -> None:
    other = replace(adapter(unet, 2), kind=kind)
    with pytest.raises(CheckpointError, match=f"this adapter is a {kind}: .*merge it into the base"):
        algebra.resized(other, 1)
    with pytest.raises(CheckpointError, match=f"this adapter is a {kind}"):
        algebra.combined([other], [1])


def test_a_dora_is_not_scaled(unet: VideoUNet) -> None:
    with pytest.raises(CheckpointError, match="cannot be scaled: a DoRA's change depends on the base"):
        algebra.scaled(replace(adapter(unet, 2), kind="dora"), 2)


def test_what_was_learnt_is_extracted(unet: VideoUNet) -> None:
    learnt = adapter(unet, 2)
    tuned = copied(unet)
    with torch.no_grad():
        for layer in LAYERS:
            weight = tuned.get_submodule(layer).weight
            weight += change(learnt, layer).reshape(weight.shape)
    found = algebra.extracted(unet.state_dict(), tuned.state_dict(), 2)
    assert found.adapter.rank == dict.fromkeys(LAYERS, 2)
    assert found.lost_in_all < 1e-5
    assert (output(unet, found.adapter) - output(tuned)).abs().max() < 1e-5
    assert 0.3 < algebra.extracted(unet.state_dict(), tuned.state_dict(), 1).lost_in_all < 0.8


def test_changes_that_no_lora_makes_are_refused_unless_left(unet: VideoUNet) -> None:
    base = unet.state_dict()
    mix, norm = f"{TEMPORAL_CONV.removesuffix('conv1')}mix", "conv_norm_out.weight"
    tuned = {name: value + 1 if name in (mix, norm, f"{Q}.weight") else value for name, value in base.items()}
    with pytest.raises(CheckpointError, match=f"2 tensors changed .*{mix}.*--leave-rest"):
        algebra.extracted(base, tuned, 2)
    found = algebra.extracted(base, tuned, 1, leave_rest=True)
    assert found.adapter.rank == {Q: 1}
    assert sorted(found.adapter.about["left"]) == sorted([mix, norm])


def test_equal_and_differing_models_are_refused(unet: VideoUNet) -> None:
    base = unet.state_dict()
    with pytest.raises(CheckpointError, match="the same weights"):
        algebra.extracted(base, base, 2)
    with pytest.raises(CheckpointError, match="not of the same layers: conv_in.bias"):
        algebra.extracted(base, {name: value for name, value in base.items() if name != "conv_in.bias"}, 2)


# --- the commands -----------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["adapter", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_files_are_combined_scaled_and_resized(unet: VideoUNet, tmp_path: Path) -> None:
    one, other, both = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "ab.safetensors"
    file.write(one, adapter(unet, 2))
    file.write(other, adapter(unet, 3, 1))
    run("combine", f"{one}:0.5", other, "-o", both)
    assert file.read(both).about["made"]["of"] == [
        {"file": "a.safetensors", "weight": 0.5},
        {"file": "b.safetensors", "weight": 1.0},
    ]
    assert "of the change's length is left out" in run("resize", both, "-o", tmp_path / "c.safetensors", "--rank", "2")
    small = file.read(tmp_path / "c.safetensors")
    assert 0 < small.about["made"]["lost"] < 1
    assert small.rank == dict.fromkeys(LAYERS, 2)
    run("combine", one, other, "-o", both, "--rank", "2", "--overwrite")
    assert file.read(both).rank == small.rank
    run("scale", f"{one}:0.5", "-o", tmp_path / "d.safetensors")
    half = file.read(tmp_path / "d.safetensors")
    assert half.alpha == dict.fromkeys(LAYERS, 1.5)
    assert all(torch.equal(half.tensors[name], value) for name, value in adapter(unet, 2).tensors.items())


@pytest.mark.parametrize("video", [True, False])
def test_an_adapter_is_extracted_from_two_models(unet: VideoUNet, video: bool, tmp_path: Path) -> None:
    base = copied(unet) if video else tiny_unet()
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        base.get_submodule(CONV).weight[0] += 1
    base.save_pretrained(tmp_path / "tuned")
    target = tmp_path / "a.safetensors"
    assert "note: 0.00% of the change" in run("extract", tmp_path / "base", tmp_path / "tuned", "-o", target)
    found = file.read(target)
    assert found.rank == {CONV: 16}
    assert found.about["made"]["by"] == "extract"
    assert ("base" in found.about) == video
