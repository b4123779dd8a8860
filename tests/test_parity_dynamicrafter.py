"""Recordings of DynamiCrafter of other kinds than those that are here, and such as are wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import parity
import parity_dynamicrafter_steps as steps
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inflate.objectives import DDPM, schedule_signal

TINY = Path(__file__).parents[2] / "shared" / "fixtures" / "dynamicrafter" / "tiny_a"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    if not TINY.is_dir():
        pytest.skip(f"{TINY} is not here: recordings of the original are not part of the repository")
    return Path(shutil.copytree(TINY, tmp_path / "tiny"))


def change(file: Path, **entries: Any) -> None:
    """Write a recording with other entries in place of its own, and without those that are None."""
    found = {**(json.loads(file.read_text()) if file.suffix == ".json" else load_file(file)), **entries}
    kept = {key: value for key, value in found.items() if value is not None}
    if file.suffix == ".json":
        file.write_text(json.dumps(kept))
    else:
        save_file({key: value.contiguous() for key, value in kept.items()}, file)


def failed(folder: Path, *names: str) -> list[str]:
    return [case.name for case in parity.cases(folder, names) if not case.passed]


def test_a_model_without_gate_that_is_not_told_the_rate(copied: Path) -> None:
    weights, recording = copied / "unet_tiny.safetensors", copied / "unet_tiny_io.safetensors"
    precise = copied / "unet_tiny_io64.safetensors"
    change(weights, **dict.fromkeys(key for key in load_file(weights) if key.endswith(".alpha")))
    others = dict.fromkeys(key for key in load_file(recording) if not key.startswith("default_fs."))
    plain = load_file(recording)["default_fs.out_noalpha"]
    change(recording, **others, **{"default_fs.out": plain, "default_fs.out_noalpha": None})
    doubles = load_file(precise)
    change(precise, **{**dict.fromkeys(doubles), "default_fs.out": doubles["default_fs.out_noalpha"]})
    change(copied / "unet_tiny.json", cases={"default_fs": ""})
    change(copied / "train_sampler_tiny.json", training=None, sampling=None)
    for name in ("unet_tiny_intermediates", "train_tiny_io", "sampler_tiny_io"):
        (copied / f"{name}.safetensors").unlink()
    found = list(parity.cases(copied))
    assert [case for case in found if not case.passed] == []
    calls = ["_io64.default_fs.out", "_io64.default_fs.out.float32", ".default_fs.out"]
    assert {case.name for case in found if case.name.startswith("unet")} == {f"unet_tiny{call}" for call in calls}


@pytest.mark.parametrize("name", ["unet_tiny", "resampler_tiny"])
def test_a_recording_without_its_float64_fails(copied: Path, name: str) -> None:
    (copied / f"{name}_io64.safetensors").unlink()
    [missing] = failed(copied, name)
    assert f"{name}_io64.safetensors" in missing


@pytest.mark.parametrize("name", ["unet_tiny.json", "resampler_tiny.safetensors"])
def test_a_damaged_recording_fails_by_name(copied: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / name).write_bytes((copied / name).read_bytes()[:100])
    assert parity.main([str(copied), "unet_tiny", "resampler"]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["resampler_tiny", "unet_tiny", "unet_tiny_intermediates"]
    assert all(line.endswith("inf 0  FAILED") for line in lines)
    assert last == "3 cases"


def test_a_described_recording_that_is_missing_fails(copied: Path) -> None:
    (copied / "train_tiny_io.safetensors").unlink()
    assert failed(copied, "train") == ["train_sampler_tiny.training"]


@pytest.mark.parametrize(
    ("file", "key", "expected"),
    [
        ("train_tiny_io", "grad_norm", "train_tiny.grad_norm"),
        ("train_tiny_io", "grad_mean", "train_tiny.grad_mean"),
        ("resampler_tiny_io64", "out", "resampler_tiny_io64.out"),
        ("unet_tiny_intermediates", "middle_block", "unet_tiny_intermediates.middle_block"),
    ],
)
def test_a_small_change_fails(copied: Path, file: str, key: str, expected: str) -> None:
    recorded = load_file(copied / f"{file}.safetensors")[key]
    recorded.view(-1)[3] += 0.01
    change(copied / f"{file}.safetensors", **{key: recorded})
    assert expected in failed(copied, expected.split(".")[0].removesuffix("_io64"))


def test_what_is_not_known_fails(copied: Path) -> None:
    change(copied / "train_tiny_io.safetensors", odd=torch.zeros(1))
    assert failed(copied, "train_tiny") == ["train_tiny.unknown"]
    config = json.loads((copied / "unet_tiny.json").read_text())["unet_config"]
    change(copied / "unet_tiny.json", unet_config={**config, "use_causal_attention": True})
    [name] = failed(copied, "resampler")
    assert "the tensors deny what the configuration says: use_causal_attention True instead of False" in name


@pytest.mark.parametrize(
    ("words", "scale", "expected"),
    [
        ("v-prediction, zero-SNR betas, base_scale=0.7 turning_step=400", 0.7, DDPM("v_prediction", True, 0.7)),
        ("v-prediction, no zero-SNR", 1.0, DDPM("v_prediction")),
        ("eps-prediction, plain betas, no dynamic rescale", None, DDPM()),
    ],
)
def test_the_objective_is_read_off_its_words(words: str, scale: float | None, expected: DDPM) -> None:
    assert steps.objective_of({"schedule": words, "base_scale": scale}) == expected


@pytest.mark.parametrize("words", ["x0-prediction", "v-prediction turning_step=300"])
def test_an_objective_that_is_not_known_fails(words: str) -> None:
    with pytest.raises(ValueError, match="a schedule that is not known"):
        steps.objective_of({"schedule": words})


def network(noisy: Tensor, timestep: Tensor) -> Tensor:
    return torch.tanh(noisy) * (1.0 + timestep[0] / 1000.0)


@pytest.mark.parametrize("more", [0, 1])
def test_steps_of_the_noise_spaced_uniformly_by_the_usual_formula(more: int) -> None:
    """With `more`, the original takes one step more than it was asked for."""
    signal, eta, start = schedule_signal(False), 0.5, torch.randn(1, 2, 4, 3, 3, dtype=torch.float64)
    timesteps = [751, 501, 251, 1]
    noise = torch.randn(4, *start.shape, dtype=torch.float64)
    found: dict[str, list[Tensor]] = {"x_prev": [], "pred_x0": []}
    latents = start
    for index, (now, then) in enumerate(zip(timesteps, [*timesteps[1:], 0], strict=True)):
        predicted = network(latents, torch.tensor([now]))
        clean = (latents - (1 - signal[now]).sqrt() * predicted) / signal[now].sqrt()
        sigma = eta * ((1 - signal[then]) / (1 - signal[now]) * (1 - signal[now] / signal[then])).sqrt()
        direction = (1 - signal[then] - sigma**2).sqrt()
        latents = signal[then].sqrt() * clean + direction * predicted + sigma * noise[index]
        found["pred_x0"].append(clean)
        found["x_prev"].append(latents)
    recorded = {**{key: torch.stack(each) for key, each in found.items()}, "noise": noise, "out": latents}
    asked = {"steps": 4 - more, "timesteps_descending": timesteps, "eta": eta, "spacing": "uniform"}
    results = list(steps.step_cases("case", asked, DDPM(), network, start, recorded))
    assert len(results) == 10 - more
    assert max(case.difference for case in results) < 1e-10
