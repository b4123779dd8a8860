"""Merged weights give what the adapter beside them gives, and give it back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_adapter import output, trained, video_unet

from inflate.adapters import attach, bases, file, merge, verify
from inflate.adapters.settings import KINDS, Weighted
from inflate.errors import CheckpointError


def kept(path: Path, adapter: file.Adapter) -> Weighted:
    file.write(path, adapter)
    return Weighted(path)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged(kind: str, tmp_path: Path) -> None:
    made, unet = trained(kind), video_unet()
    adapter = made.adapter
    merge.merge_files(unet, [kept(tmp_path / "a.safetensors", adapter)])
    assert float((output(unet) - made.output).abs().max()) <= merge.TOLERANCE
    assert not attach.carries(unet)
    assert unet.state_dict().keys() == video_unet().state_dict().keys()
    assert bases.sha256(unet) != adapter.about["base"]["sha256"]


@pytest.mark.parametrize(("kind", "weight"), [("lora", 1.0), ("rslora", 0.5), ("lokr", -2.0), ("loha", 1.0)])
def test_what_was_merged_is_taken_out_again(kind: str, weight: float, tmp_path: Path) -> None:
    unet, adapter = video_unet(), trained(kind).adapter
    merge.merge_files(unet, [replace(kept(tmp_path / "a.safetensors", adapter), weight=weight)])
    assert merge.unmerge(unet, adapter, weight) <= merge.TOLERANCE
    torch.testing.assert_close(unet.state_dict(), video_unet().state_dict(), atol=1e-6, rtol=0)


def test_what_was_not_merged_is_not_taken_out() -> None:
    unet, before = video_unet(), video_unet().state_dict()
    with pytest.raises(CheckpointError, match="does not hold the adapter merged in weight 1"):
        merge.unmerge(unet, trained().adapter)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    with pytest.raises(CheckpointError, match="is a DoRA"):
        merge.unmerge(unet, trained("dora").adapter)


def test_a_weak_adapter_that_was_not_merged_is_told_from_rounding() -> None:
    adapter = trained().adapter
    weak = replace(adapter, tensors={n: 1e-3 * t for n, t in adapter.tensors.items()})
    unet = video_unet()
    attach.load(unet, weak)
    about = {**weak.about, "reference": verify.reference(unet), "verified": {"effect": 1e-5}}
    with pytest.raises(CheckpointError, match="does not hold"):
        merge.unmerge(video_unet(), replace(weak, about=about))


def test_adapters_of_any_kinds_add_up_in_their_weights(tmp_path: Path) -> None:
    adapters = {kind: trained(kind).adapter for kind in ("lora", "dora", "loha")}
    files = {kind: kept(tmp_path / f"{kind}.safetensors", each) for kind, each in adapters.items()}
    weights = {"lora": 0.5, "dora": -1.0, "loha": 2.0}
    wanted = [replace(files[kind], weight=weight) for kind, weight in weights.items()]
    together, reversed_ = video_unet(), video_unet()
    merge.merge_files(together, wanted)
    merge.merge_files(reversed_, wanted[::-1])
    torch.testing.assert_close(together.state_dict(), reversed_.state_dict())
    name, plain = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight", video_unet()
    alone = [merge.change(plain, adapters[kind])[name] * weight for kind, weight in weights.items()]
    torch.testing.assert_close(together.get_parameter(name), plain.get_parameter(name) + sum(alone))


def test_merged_for_a_while_the_weights_are_then_what_they_were(tmp_path: Path) -> None:
    wanted = [
        kept(tmp_path / "a.safetensors", trained().adapter),
        kept(tmp_path / "b.safetensors", trained("dora").adapter),
    ]
    unet, before, apart = video_unet(), video_unet().state_dict(), video_unet()
    merge.merge_files(apart, wanted)
    with merge.merged(unet, wanted):
        assert torch.equal(output(unet), output(apart))
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_weight_zero_is_the_base(tmp_path: Path) -> None:
    unet = video_unet()
    merge.merge_files(unet, [replace(kept(tmp_path / "a.safetensors", trained("dora").adapter), weight=0.0)])
    assert torch.equal(output(unet), output(video_unet()))


def test_another_base_is_refused_unless_told_and_nothing_is_changed(tmp_path: Path) -> None:
    first, second = trained().adapter, trained("loha").adapter
    stranger = replace(second, about={**second.about, "base": {"name": "other", "sha256": "0" * 64}})
    files = [kept(tmp_path / "a.safetensors", first), kept(tmp_path / "b.safetensors", stranger)]
    unet, before = video_unet(), video_unet().state_dict()
    with pytest.raises(CheckpointError, match=r"b.safetensors was made on other \(000000000000\).*--any-base"):
        merge.merge_files(unet, files)
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    merge.merge_files(unet, files, any_base=True)
    assert float((output(unet) - output(video_unet())).abs().max()) > 1e-3
    nameless = kept(tmp_path / "c.safetensors", replace(first, about={}))
    with pytest.raises(CheckpointError, match="does not say which model it was made on"):
        merge.merge_files(video_unet(), [nameless])


def test_a_newborn_base_is_known_again_whatever_was_drawn() -> None:
    one, other = video_unet(trained=False), video_unet(trained=False)
    name = "mid_block.resnets.0.temporal.conv1.weight"
    with torch.no_grad():
        other.get_parameter(name).normal_()
    assert bases.is_newborn(one)
    assert bases.sha256(one) == bases.sha256(other)
    with torch.no_grad():
        other.get_parameter("mid_block.resnets.0.temporal.conv2.weight").normal_()
    assert not bases.is_newborn(other)
    assert bases.sha256(one) != bases.sha256(other)
    with torch.no_grad():
        one.class_embedding.linear_2.bias.fill_(1.0)
    assert not bases.is_newborn(one)
