"""The comparison of I2VGen-XL's UNets cannot pass by comparing nothing, or the wrong thing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import parity
import pytest
import torch
from parity_cases import RECORDED, Case
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "i2vgenxl"
pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no recordings in {FIXTURES}")


def copied(folder: Path, stem: str) -> Path:
    for file in FIXTURES.glob(f"{stem}*"):
        shutil.copyfile(file, folder / file.name)
    return folder


def failed(folder: Path, stem: str) -> list[Case]:
    return [case for case in parity.cases_of(folder, stem) if not case.passed]


def test_an_unknown_call_and_a_configuration_that_does_not_fit_fail(tmp_path: Path) -> None:
    io, described = copied(tmp_path, "refine_c") / f"refine_c{RECORDED}", tmp_path / "refine_c.json"
    recorded, config = load_file(io), json.loads(described.read_text())
    save_file({**recorded, "odd.x": torch.zeros(1)}, io)
    assert "odd" in failed(tmp_path, "refine_c")[0].name
    save_file({key: each for key, each in recorded.items() if not key.startswith("full.")}, io)
    assert "full" in failed(tmp_path, "refine_c")[0].name
    save_file(recorded, io)
    described.write_text(json.dumps({**config, "config": {**config["config"], "in_dim": 5}}))
    assert "in_channels 4 instead of 5" in failed(tmp_path, "refine_c")[0].name


def test_a_tensor_that_goes_astray_fails(tmp_path: Path) -> None:
    copied(tmp_path, "state_")
    file = tmp_path / "state_map_vgen_to_diffusers.json"
    told = json.loads(file.read_text())
    first, second = "context_embedding.0.bias", "context_embedding.2.bias"
    told["map"] |= {first: told["map"][second], second: told["map"][first]}
    file.write_text(json.dumps(told))
    assert [case.difference for case in failed(tmp_path, "state_map_vgen_to_diffusers")] == [2.0]
