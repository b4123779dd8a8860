"""An adapter made again from its file alone; what cannot be made again is told before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from test_cli import inflate, refused
from tiny_i2vgen_xl import refiner

from helpers import load_recipe, randomise, write_image_model
from inflate.adapters import card, file, verify
from inflate.config import load
from inflate.data.demo_clips import build
from inflate.errors import CheckpointError
from inflate.families.svd import SVD
from inflate.training import log
from inflate.training.reproduction import Reproduction

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Trained:
    """An adapter's file, and what its run was told."""

    file: Path
    base: Path
    clips: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root, module = tmp_path_factory.mktemp("trained"), load_recipe(ROOT / "recipes" / "svd_finetune.py")
    model = SVD.load(write_image_model(root / "image"))
    randomise(model.unet)
    model.save_pretrained(root / "base")
    clips = build(root / "clips", clips=3, held_out=1, size=16, frames=3)
    cards = [ROOT / "recipes" / "svd_demo_image_to_video.yaml", ROOT / "adapters" / "camera_lora.yaml"]
    told = {
        "data.path": clips, "data.height": 16, "data.width": 16, "data.frames": 2, "data.seconds_per_clip": "null",
        "model.path": root / "base", "training.output": root / "run", "training.steps": 2, "training.workers": 0,
        "training.progress": "false", "adapter.rank": 2, "adapter.dropout": 0.1, "adapter.licence": "cc-by-4.0",
        "adapter.trigger": "pan", "sampling.steps": 1, "image_to_video.held_out_clips": 1,
        "image_to_video.train_clips": 1, "image_to_video.preview_clips": 1, "training.max_seconds": 1000,
        "training.precision": "no",
    }  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "plot", lambda path, _: path.touch())
        module.train(load(module.Config, [*map(str, cards), *(f"{name}={value}" for name, value in told.items())]))
    AcceleratorState._reset_state(reset_partial_state=True)
    return Trained(root / "run" / "export" / file.NAME, root / "base", clips)


def other(trained: Trained, path: Path, **about: Any) -> Path:
    adapter = file.read(trained.file)
    file.write(path, replace(adapter, about={**adapter.about, **about}))
    return path


@pytest.mark.slow
@pytest.mark.timeout(300)  # two new processes, one after the other, each with its imports
def test_an_adapter_is_made_again_to_the_bit(trained: Trained, tmp_path: Path) -> None:
    again = trained.clips.rename(tmp_path / "moved")
    try:
        result = inflate("adapter", "repro", trained.file, tmp_path / "out", "--data", again)
    finally:
        again.rename(trained.clips)
    assert result.exit_code == 0, result.output
    count = len(file.read(trained.file).tensors)
    made = tmp_path / "out" / "export" / file.NAME
    assert result.stdout == f"all {count} tensors of {made} equal those of {trained.file}, to the bit\n"
    assert file.read(made).about["data"] == file.read(trained.file).about["data"]
    assert any(bool(tensor.any()) for name, tensor in file.read(made).tensors.items() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.timeout(300)  # three new processes, one after the other, each with its imports
@pytest.mark.usefixtures("on_cpu")
def test_an_adapter_of_a_refiner_is_made_again_to_the_bit(tmp_path: Path) -> None:
    refiner(tmp_path / "parent").save_pretrained(tmp_path / "base")
    clips = build(tmp_path / "clips", clips=3, held_out=1, size=16, frames=3)
    told = {
        "data.path": clips, "data.height": 16, "data.width": 16, "data.frames": 2, "data.seconds_per_clip": "null",
        "model.path": tmp_path / "base", "training.output": tmp_path / "run", "training.steps": 2,
        "training.warmup": 0, "training.batch": 1, "training.precision": "no", "training.progress": "false",
        "adapter.kind": "lora", "adapter.rank": 2, "adapter.targets": "[attn2.to_v]", "refining.steps": 1,
        "i2vgen_xl.held_out_clips": 1, "i2vgen_xl.train_clips": 0, "i2vgen_xl.preview_clips": 1,
        "training.tracker": "none",
    }  # fmt: skip
    module, card = load_recipe(ROOT / "recipes" / "i2vgen_xl_finetune.py"), "i2vgen_xl_pocket_refine.yaml"
    sources = [str(ROOT / "recipes" / card), *(f"{name}={value}" for name, value in told.items())]
    module.train(load(module.Config, sources))
    made = file.read(tmp_path / "run" / "export" / file.NAME)
    assert made.about["verified"]["max_abs_diff"] <= verify.TOLERANCE
    assert made.about["verified"]["effect"] > 0
    result = inflate("adapter", "repro", tmp_path / "run" / "export" / file.NAME, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"all {len(made.tensors)} tensors of {tmp_path / 'out'}")


def test_the_card_tells_what_the_run_took_and_shows_samples(trained: Trained) -> None:
    adapter, text = file.read(trained.file), trained.file.with_name(card.NAME).read_text()
    run = adapter.about["run"]
    assert (run["steps"], run["stopped"], run["processes"]) == (2, "finished", 1)
    assert run["threads"] == torch.get_num_threads()
    assert 2**26 < run["peak_memory"] < 2**36
    assert 0 <= run["seconds"] < 3600
    for line in (
        "license: cc-by-4.0",
        "- trigger: pan",
        "- training: 2 steps in ",
        f"- peak memory: {run['peak_memory'] / 2**30:.2f} GiB",
        "- hardware: ",
    ):
        assert line in text
    assert f"]({card.SAMPLES})" in text
    assert trained.file.with_name(card.SAMPLES).read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_made_again_is_refused_before_it_is_trained(trained: Trained, tmp_path: Path) -> None:
    out, run = tmp_path / "out", file.read(trained.file).about["run"]
    files = {
        "does not tell how it was trained": other(trained, tmp_path / "a.safetensors", config=None),
        "was trained by 2 processes": other(trained, tmp_path / "b.safetensors", run={**run, "processes": 2}),
        "is not the model that": other(
            trained, tmp_path / "c.safetensors", base={"name": str(trained.base), "sha256": "0" * 64}
        ),
        "holds other clips than": other(trained, tmp_path / "d.safetensors", data="sha256:0"),
        "belongs on owner/name, which is not on this disk": other(
            trained, tmp_path / "e.safetensors", base={"name": "owner/name", "sha256": "0" * 64}
        ),
    }
    config = file.read(trained.file).about["config"].replace("source: folder", "source: huggingface")
    files["which no file may download unasked"] = other(
        trained, tmp_path / "f.safetensors", config=config.replace(str(trained.clips), "owner/clips")
    )
    encoder = file.read(trained.file).about["config"].replace("image_encoder: null", "image_encoder: owner/encoder")
    files["model.image_encoder=owner/encoder, which no file may download unasked"] = other(
        trained, tmp_path / "g.safetensors", config=encoder
    )
    for message, path in files.items():
        assert message in refused("adapter", "repro", path, out)
    assert "no such folder" in refused("adapter", "repro", trained.file, out, "--data", tmp_path / "none")
    assert not out.exists()
    assert "exists already" in refused("adapter", "repro", trained.file, tmp_path)


def test_other_versions_are_told_and_other_weights_named(trained: Trained, tmp_path: Path) -> None:
    adapter = file.read(trained.file)
    verified = {**adapter.about["verified"], "versions": {**adapter.about["verified"]["versions"], "torch": "1.0"}}
    path = other(trained, tmp_path / "a.safetensors", verified=verified, hardware="abacus")
    wanted = Reproduction.of(path, tmp_path / "out")
    told = wanted.differences()
    assert [line.split(" and ")[0] for line in told] == ["torch was 1.0", "hardware was abacus"]
    name = next(iter(adapter.tensors))
    moved = {**adapter.tensors, name: adapter.tensors[name] + 1e-3}
    file.write(tmp_path / "b.safetensors", replace(adapter, tensors=moved))
    with pytest.raises(CheckpointError, match=rf"1 of {len(moved)} tensors of .* differ .* by up to 1.0e-03: {name}"):
        wanted.compare(tmp_path / "b.safetensors")


def test_a_run_that_ended_early_is_repeated_to_its_step(trained: Trained, tmp_path: Path) -> None:
    about = file.read(trained.file).about
    run = {**about["run"], "stopped": "max_seconds", "steps": 1}
    wanted = Reproduction.of(other(trained, tmp_path / "a.safetensors", run=run), tmp_path / "out")
    assert wanted.settings().training.steps == 1
    config = about["config"].replace("schedule: constant", "schedule: cosine")
    with pytest.raises(CheckpointError, match="max_seconds ended at step 1"):
        Reproduction.of(other(trained, tmp_path / "b.safetensors", run=run, config=config), tmp_path / "out")
