"""The proof of a file: what is compared, with what, and what counts as a difference."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_adapter import adapted, train, trained, video_unet

from inflate.adapters import attach, file, verify
from inflate.errors import CheckpointError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file.write(tmp_path / "a.safetensors", trained().adapter)
    return tmp_path / "a.safetensors"


def test_a_whole_file_gives_what_was_trained_and_not_the_base(path: Path) -> None:
    unet = video_unet()
    found = verify.check(path, unet)
    assert found.max_abs_diff <= verify.TOLERANCE
    assert found.effect > 1e-3
    assert found.versions["torch"] == torch.__version__
    assert not attach.carries(unet)


def test_one_changed_number_is_a_difference(path: Path) -> None:
    adapter = file.read(path)
    name = next(name for name in adapter.tensors if "lora_B" in name)
    adapter.tensors[name].view(-1)[0] += 0.5
    file.write(path, adapter, overwrite=True)
    found = verify.check(path, video_unet())
    with pytest.raises(CheckpointError, match="not to be relied on"):
        verify.refuse_difference(path, found.max_abs_diff)
    for strange in (float("nan"), float("inf")):
        with pytest.raises(CheckpointError):
            verify.refuse_difference(path, strange)


def test_another_base_is_refused_and_told_differs(path: Path) -> None:
    unet = video_unet()
    with torch.no_grad():
        unet.conv_in.bias[0] += 1
    with pytest.raises(CheckpointError, match=r"was made on tiny .*--any-base"):
        verify.check(path, unet)
    assert verify.check(path, unet, any_base=True).max_abs_diff > verify.TOLERANCE


@pytest.mark.parametrize(
    "kept",
    [{}, {"reference": {"shape": [1], "output": "!"}}, {"reference": {"shape": [-1, 7], "output": "AAAAAA=="}}],
)
def test_a_file_without_an_output_cannot_be_proved(path: Path, kept: dict[str, Any]) -> None:
    adapter = file.read(path)
    file.write(path, replace(adapter, about={"base": adapter.about["base"], **kept}), overwrite=True)
    with pytest.raises(CheckpointError, match="keeps no output of the trained model"):
        verify.check(path, video_unet())


def test_an_output_of_another_shape_is_a_difference(path: Path) -> None:
    adapter = file.read(path)
    short = {"shape": [2], "output": base64.b64encode(torch.zeros(2).numpy().tobytes()).decode()}
    file.write(path, replace(adapter, about={**adapter.about, "reference": short}), overwrite=True)
    assert verify.check(path, video_unet()).max_abs_diff == float("inf")


def test_the_output_is_in_float32_and_the_model_is_put_back() -> None:
    unet = video_unet().double()
    memory, buffers = unet.conv_in.weight.data_ptr(), unet.training
    made = verify.output(unet)
    assert made.dtype == torch.float32
    assert unet.conv_in.weight.dtype == torch.float64
    assert unet.conv_in.weight.data_ptr() == memory
    assert unet.training == buffers
    torch.testing.assert_close(made, verify.output(video_unet()))


def test_training_goes_on_after_a_look() -> None:
    unet = adapted()
    unet.train()
    verify.reference(unet)
    assert unet.training
    train(unet, 1)


def test_a_process_that_fails_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        verify.main([str(tmp_path / "a.safetensors"), "no-family", "{}"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: adapters of family no-family are not known")
