"""A domain adapter below temporal training: in every loss, in no sample and in no export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_video_ldm import CachedClips, clip, parents, write_text_model
from torch import Tensor

from helpers import load_recipe
from inflate.adapters import attach, bases, file, targets
from inflate.adapters.settings import AdapterSettings
from inflate.config import load
from inflate.data.settings import Data
from inflate.errors import CheckpointError, ConfigError
from inflate.families.video_ldm import FAMILY, Clips, VideoLDM
from inflate.files import sha256
from inflate.training.denoising import Given
from inflate.training.inputs import check_inputs
from inflate.training.loop import Result, fit
from inflate.training.settings import Training
from inflate.training.text_to_video import Preview, TextToVideo, TextToVideoTask

RECIPE = Path(__file__).parents[2] / "recipes" / "video_ldm_finetune.py"


@pytest.fixture(scope="module")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def look(image_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora(tmp_path_factory.mktemp("look") / "look.safetensors", image_model, "attn*.to_*")


def lora(path: Path, image_model: Path, pattern: str) -> Path:
    """The file of a LoRA on an image model's layers of a pattern that does much."""
    unet, settings = VideoLDM.load(image_model).unet, AdapterSettings("lora", rank=2, targets=[pattern])
    base = {"name": str(image_model), "sha256": bases.sha256(unet)}
    attach.create(unet, settings, targets.resolve(unet, settings))
    generator = torch.Generator().manual_seed(1)
    for tensor in attach.tensors(unet).values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    file.write(path, attach.carried(unet, settings, {"family": FAMILY, "base": base}))
    return path


def repainted(image_model: Path) -> Path:
    """An image model, made another one."""
    unet, _ = parents(image_model)
    unet.conv_out.bias.data.add_(1)
    unet.save_pretrained(image_model / "unet")
    return image_model


def task(image_model: Path, adapter: str | None) -> TextToVideoTask:
    torch.manual_seed(0)  # inflation draws the temporal layers
    settings = TextToVideo(held_out_clips=1, bands=1, preview_clips=1, domain_adapter=adapter)
    given = Given([clip(100)], lr=1e-2, seed=3, training=[clip(0)], cached=True)
    return TextToVideoTask(VideoLDM.load(image_model), "temporal", settings, Preview(steps=1), given)


def run(output: Path, image_model: Path, adapter: str | None, steps: int = 3, resume: str | None = None) -> Result:
    made = task(image_model, adapter)
    quiet = {"workers": 0, "tracker": "none", "progress": False, "log_every": 1}
    settings = Training(output, steps=steps, batch=2, resume=resume, **quiet)
    return fit(made, CachedClips(made.family), settings)


def layers(folder: Path) -> dict[str, Tensor]:
    return VideoLDM.load(folder).unet.state_dict()


@pytest.mark.usefixtures("on_cpu")
def test_temporal_layers_learn_on_top_of_it_and_are_exported_without_it(
    image_model: Path, look: Path, tmp_path: Path
) -> None:
    plain, whole = run(tmp_path / "plain", image_model, None), run(tmp_path / "whole", image_model, f"{look}:0.5")
    assert [row["held-out loss"] for row in plain.held_out] != [row["held-out loss"] for row in whole.held_out]
    run(tmp_path / "parts", image_model, f"{look}:0.5", steps=1)
    with pytest.raises(CheckpointError, match=r"domain adapter was SHA-256 \w+, weight 0.5, is SHA-256 \w+, weight 1"):
        run(tmp_path / "parts", image_model, str(look), resume="latest")
    run(tmp_path / "parts", image_model, f"{look}:0.5", resume="latest")

    born, exported = layers(image_model), layers(tmp_path / "whole" / "export")
    resumed, without = layers(tmp_path / "parts" / "export"), layers(tmp_path / "plain" / "export")
    temporal = {name for name in born if ".temporal." in name}
    assert all(torch.equal(exported[name], born[name]) for name in born.keys() - temporal)
    assert all(torch.equal(exported[name], resumed[name]) for name in born)
    assert any(not torch.equal(exported[name], without[name]) for name in temporal)
    said = Clips.read(tmp_path / "whole" / "export" / "inflate.json").domain_adapter
    assert said == f"{look}:0.5 (SHA-256 {sha256(look)})"


def test_samples_are_drawn_without_it(image_model: Path, look: Path) -> None:
    plain, made = task(image_model, None), task(image_model, str(look))
    assert torch.equal(made.draw([0]), plain.draw([0]))
    assert made.evaluate() != plain.evaluate()  # and the adapter is back in its place


def test_what_cannot_lie_below_is_refused(image_model: Path, look: Path, tmp_path: Path) -> None:
    temporal = lora(tmp_path / "temporal.safetensors", image_model, "temporal.attn1.to_*")
    with pytest.raises(ConfigError, match="sits on temporal layers, which learn themselves"):
        task(image_model, str(temporal))
    with pytest.raises(CheckpointError, match=r"was made on .*train one on this model by stage=spatial"):
        task(repainted(write_text_model(tmp_path / "other")), str(look))
    with pytest.raises(ConfigError, match="half is no weight"):
        check_inputs(Training(tmp_path / "run"), Data(path="pictures"), adapter=f"{look}:half")


@pytest.mark.parametrize("other", ["stage=joint", "adapter.kind=lora"])
def test_it_is_for_temporal_layers_that_learn_themselves(look: Path, other: str) -> None:
    module = load_recipe(RECIPE)
    given = [f"text_to_video.domain_adapter={look}", "adapter.targets=[temporal.attn1.to_q]", other]
    with pytest.raises(ConfigError, match="stage=temporal and adapter.kind=none, not"):
        load(module.Config, given if other.startswith("adapter") else [given[0], other])
    with pytest.raises(ConfigError, match="memory.base=int8 stores them rounded"):
        load(module.Config, [given[0], "memory.base=int8"])
