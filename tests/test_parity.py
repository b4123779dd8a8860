"""Runs the recorded cases in process, and checks that the runner cannot pass by running nothing."""

import json
import shutil
from pathlib import Path

import parity
import pytest
import torch
from diffusers import UNet2DConditionModel
from parity_cases import Case
from safetensors.torch import load_file, save_file

from helpers import randomise
from inflate.families import svd_keys
from inflate.models import exchange, original_names
from inflate.models.unet import TemporalSpec
from inflate.surgery import inflate_unet

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "svd"
FOLDERS = [FIXTURES.parent / name for name in ("svd", "dynamicrafter", "i2vgenxl")]
recorded = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no recordings in {FIXTURES}")


def recordings() -> list[tuple[Path, str]]:
    """Every recording; without recordings one that is none, for pytest to skip."""
    if not FIXTURES.is_dir():
        return [(FIXTURES, "none")]
    return [(folder, stem) for folder in FOLDERS for stem in parity.stems(folder)]


@recorded
@pytest.mark.parametrize(("folder", "stem"), recordings(), ids=lambda value: getattr(value, "name", value))
def test_recordings(folder: Path, stem: str) -> None:
    results = list(parity.cases_of(folder, stem))
    assert results
    assert [case for case in results if not case.passed] == []


@recorded
def test_models_that_are_not_built_fail_unless_others_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(FOLDERS[2] / "state_keys_modelscope_i2v.json", tmp_path)
    (tmp_path / "mystery_a.json").write_text("{}")
    assert parity.main([str(tmp_path), "state_keys_modelscope_i2v"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 cases"
    assert parity.main([str(tmp_path), "state_keys_modelscope_i2v", "mystery"]) == 1
    assert "mystery_a: unknown file inf 0  FAILED" in capsys.readouterr().out


def test_empty_folder_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == "0 cases\n"


def test_folders_within_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny_b").mkdir()
    assert parity.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == ["tiny_b/: unknown file inf 0  FAILED", "1 cases"]
    (tmp_path / "tiny_b" / "odd_io.safetensors").write_text("")
    (tmp_path / "tiny_b" / "README.md").write_text("")
    assert parity.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == ["tiny_b/odd: unknown file inf 0  FAILED", "1 cases"]


@pytest.mark.parametrize("name", ["notes.txt", "mystery.json", "unet_z.safetensors", "unet_z.json"])
def test_unknown_or_incomplete_file_fails(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text("{}")
    assert parity.main([str(tmp_path)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "1 cases"
    assert out[0].endswith("FAILED")
    assert name.split(".")[0] in out[0]


@recorded
def test_another_epsilon_fails_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in FIXTURES.glob("unet_c*"):
        shutil.copy(file, tmp_path)
    build = exchange.build_unet

    def other(config: dict[str, object], spec: TemporalSpec) -> object:
        return build(config, TemporalSpec(added_id_dim=spec.added_id_dim, cross_attention_resnet_eps=1e-6))

    monkeypatch.setattr(exchange, "build_unet", other)
    results = list(parity.cases(tmp_path))
    assert any("io64" in case.name and not case.passed for case in results)


SIBLING = {
    "in_channels": 8,
    "model_channels": 32,
    "attention_resolutions": [2, 4],
    "num_res_blocks": 1,
    "channel_mult": [1, 2, 2],
    "num_heads": 4,
    "transformer_depth": 2,
    "context_dim": 12,
    "adm_in_channels": 24,
    "out_channels": 4,
}


def write_sibling(folder: Path) -> None:
    """A recording of our own UNet, of another shape than the published ones', under the original's names."""
    image = {
        "in_channels": 8,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "transformer_layers_per_block": 2,
        "use_linear_projection": True,
    }
    torch.manual_seed(0)
    unet = inflate_unet(UNet2DConditionModel(**image), TemporalSpec(added_id_dim=8))[0].eval()
    randomise(unet)
    names = svd_keys.unet_to_sgm(unet.state_dict(), original_names.UNetLayout.of(unet.config))
    save_file({names[key]: value for key, value in unet.state_dict().items()}, folder / "unet_b.safetensors")
    inputs = {
        "x": torch.randn(1, 2, 8, 8, 8),
        "c_noise": torch.tensor([0.4]),
        "context": torch.randn(1, 2, 12),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
        "image_only_indicator": torch.tensor([[0.0, 1.0]]),
    }
    with torch.no_grad():
        output = unet(*list(inputs.values())[:4], image_only=inputs["image_only_indicator"].bool()).sample
    recorded = {f"new.{name}": tensor for name, tensor in {**inputs, "out": output}.items()}
    save_file(recorded, folder / "unet_b_io.safetensors")
    (folder / "unet_b.json").write_text(json.dumps({"config": SIBLING, "calls": [{"name": "new"}]}))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sibling")
    write_sibling(folder)
    return folder


@pytest.fixture
def sibling(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "sibling"))


def test_recordings_of_other_sizes_run_as_they_are(sibling: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(sibling)]) == 0
    name, difference, tolerance = capsys.readouterr().out.splitlines()[0].split()
    assert (name, tolerance) == ("unet_b.new", "2e-05")
    recorded = load_file(sibling / "unet_b_io.safetensors")
    assert float(difference) < 1e-5 < recorded["new.out"].std()
    recorded["new.out"][0, 1, 2, 3, 4] += 1e-3
    save_file(recorded, sibling / "unet_b_io.safetensors")
    assert parity.main([str(sibling)]) == 1


@pytest.mark.parametrize("change", [{"channel_mult": [1, 2, 4]}, {"merge_strategy": "fixed"}, {"transformer_depth": 1}])
def test_configuration_that_the_weights_deny_fails(change: dict[str, object], sibling: Path) -> None:
    (sibling / "unet_b.json").write_text(json.dumps({"config": {**SIBLING, **change}, "calls": [{"name": "new"}]}))
    assert [case.passed for case in parity.cases(sibling)] == [False]


def test_name_of_no_recording_fails(sibling: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(sibling), "unet_b"]) == 0
    assert parity.main([str(sibling), "unet_b", "unet_q"]) == 1
    assert "unet_q: no such recording inf 0  FAILED" in capsys.readouterr().out


def test_call_that_is_not_recorded_fails(sibling: Path) -> None:
    calls = [{"name": "new"}, {"name": "missing"}]
    (sibling / "unet_b.json").write_text(json.dumps({"config": SIBLING, "calls": calls}))
    assert [case.passed for case in parity.cases(sibling)] == [False]


def test_not_a_number_fails() -> None:
    assert not Case("x", float("nan"), 1.0).passed
