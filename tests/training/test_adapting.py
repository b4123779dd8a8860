"""Training an adapter: the run, its resumption, several processes, and what it leaves."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_video_ldm import PROMPT, write_text_model
from torch import Tensor

from helpers import load_recipe, randomise, write_image_model
from inflate.adapters import attach, bases, card, file, targets, verify
from inflate.adapters.settings import AdapterSettings
from inflate.config import load
from inflate.errors import CheckpointError, ConfigError
from inflate.families import svd, video_ldm
from inflate.families.svd import SVD
from inflate.families.svd_model import Model
from inflate.families.video_ldm import VideoLDM
from inflate.training import adapting
from inflate.training.adapting import Adapting
from inflate.training.denoising import Given
from inflate.training.economy import save_memory
from inflate.training.image_to_video import ImageToVideo, ImageToVideoTask, Preview
from inflate.training.loop import fit
from inflate.training.memory_settings import Memory
from inflate.training.noise import Noise
from inflate.training.settings import Training
from inflate.training.text_to_video import Preview as TextPreview
from inflate.training.text_to_video import Stage, TextToVideo, TextToVideoTask
from launch import launch
from tiny_svd import Clips, family, largest_difference

ROOT = Path(__file__).parents[2]
WANTED = AdapterSettings("lora", rank=2, targets=["temporal.attn1.to_*", "temporal.conv1", "attn1.to_q"], dropout=0.1)


def task(model: SVD, path: str = "tiny", settings: AdapterSettings = WANTED) -> ImageToVideoTask:
    """A task on one held-out clip, as cheap as can be."""
    held_out = {name: value[None].float() for name, value in Clips()[100].items()} | {"number": torch.tensor([100])}
    small = ImageToVideo(held_out_clips=1, bands=1, preview_clips=1)
    adapter = Adapting.on(model.unet, settings, svd.FAMILY, path, seed=3)
    made = ImageToVideoTask(model, small, [held_out], Preview(steps=1), lr=1e-2, seed=3, adapter=adapter)
    made.preview = lambda folder: None  # type: ignore[method-assign]
    return made


class Floats(Clips):
    """The clips in float32, as all models are loaded."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        item = super().__getitem__(number)
        return item | {"pixels": item["pixels"].float()}


def training(output: Path, steps: int = 2, **changes: Any) -> Training:
    quiet = {"workers": 0, "tracker": "none", "progress": False, "checkpoint_every": 1, "ema": 0.5}
    return Training(output, steps=steps, **quiet | changes)


def tensors(folder: Path) -> dict[str, Tensor]:
    return file.read(folder / "export" / file.NAME).tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model that diffusers' classes can hold."""
    root = tmp_path_factory.mktemp("base")
    model = SVD.load(write_image_model(root / "image"))
    randomise(model.unet)
    model.save_pretrained(root / "base")
    return root / "base"


@pytest.mark.usefixtures("on_cpu")
def test_a_run_leaves_a_file_that_a_new_process_proves(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = SVD.load(base), tmp_path / "run"
    before = {name: value.clone() for name, value in model.unet.state_dict().items()}
    result = fit(task(model, str(base)), Floats(), training(output), config="stage: image_to_video")
    assert [path.name for path in (output / "export").iterdir()] == [file.NAME]
    assert file.read(output / "export" / file.NAME).about["verified"] is None
    kept = attach.layers(model.unet)
    assert all(torch.equal(layer.get_base_layer().weight, before[f"{name}.weight"]) for name, layer in kept)

    facts, use = adapting.told(output, result, Model(str(base)), "stage: image_to_video")
    adapter = file.read(output / "export" / file.NAME)
    about = adapter.about
    assert facts["base"] == f"{base} (SHA-256 {about['base']['sha256']})"
    assert about["verified"]["max_abs_diff"] <= verify.TOLERANCE
    assert about["verified"]["effect"] > 1e-4
    assert about["base"] == {"name": str(base), "sha256": bases.sha256(SVD.load(base).unet)}
    assert about["held_out"] == result.held_out
    assert [row["step"] for row in about["held_out"]] == [0, 2]

    card = (output / "export" / "README.md").read_text()
    assert use in card
    assert f"inflate sample {base} photo.png --adapter {file.NAME} -o out.mp4" in card
    monkeypatch.chdir(output / "export")
    found: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], found)
    expected = verify.output(model.unet)  # the last weights, not the averaged ones
    assert attach.carries(found["family"].unet)
    assert 0 < float((verify.output(found["family"].unet) - expected).abs().max()) < 1


@pytest.mark.usefixtures("on_cpu")
def test_an_adapter_trained_over_nf4_is_proved_over_the_base_that_it_names(base: Path, tmp_path: Path) -> None:
    model, output = SVD.load(base), tmp_path / "run"
    made = task(model, str(base))
    save_memory(model.unet, Memory(base="nf4"))
    result = fit(made, Floats(), training(output, ema=0.0))
    path, fresh = output / "export" / file.NAME, SVD.load(base).unet
    about = file.read(path).about
    assert about["base"] == {"name": str(base), "sha256": bases.sha256(fresh), "stored": "nf4"}
    assert "weights in nf4" in card.facts(file.read(path))["trained over"]
    assert verify.check(path, fresh).max_abs_diff <= verify.TOLERANCE
    assert float((verify.output(model.unet) - verify.output(fresh)).abs().max()) > 100 * verify.TOLERANCE
    plain = task(SVD.load(base), str(base)).evaluate()["held-out loss"]
    assert result.held_out[0]["held-out loss"] != plain  # what is measured is computed by the stored weights


def test_a_run_without_an_adapter_trains_the_model() -> None:
    unet = family().unet
    learning = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    assert Adapting.on(unet, AdapterSettings(), svd.FAMILY, "tiny", seed=3) is None
    assert [name for name, parameter in unet.named_parameters() if parameter.requires_grad] == learning


def run(output: Path, steps: int, **changes: Any) -> dict[str, Tensor]:
    fit(task(family()), Clips(), training(output, steps, **changes))
    return tensors(output)


@pytest.mark.usefixtures("on_cpu")
def test_a_resumed_run_is_the_run(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 1)
    resumed = run(tmp_path / "parts", 3, resume="latest")
    assert largest_difference(whole, resumed) == 0
    assert whole["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight"].any()


@pytest.mark.usefixtures("on_cpu")
def test_another_rank_is_not_gone_on_with(tmp_path: Path) -> None:
    run(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"lora_A.default.weight is \(2, 8\), not \(4, 8\)"):
        fit(task(family(), settings=replace(WANTED, rank=4)), Clips(), training(tmp_path, 2, resume="latest"))


def together(output: Path, **changes: Any) -> dict[str, Tensor]:
    made = task(family(), settings=replace(WANTED, dropout=0.0))
    fit(made, Clips(), training(output, ema=0.0, **changes))
    return {name: value.clone() for name, value in attach.tensors(made.family.unet).items()}


def whole_and_spread(folder: Path) -> list[dict[str, Tensor]]:
    """What two processes do one after the other, for starting them takes longest."""
    whole = together(folder / "whole")
    os.environ.update({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    return [whole, together(folder / "spread")]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_processes_train_one_adapter_beside_whole_or_spread_weights(tmp_path: Path) -> None:
    alone = together(tmp_path / "alone", accumulate=2)
    for found in launch(whole_and_spread, tmp_path):
        assert [largest_difference(alone, each) <= 1e-9 for each in found] == [True, True]
    assert largest_difference(tensors(tmp_path / "whole"), tensors(tmp_path / "spread")) <= 1e-9


def text_task(model: VideoLDM, stage: Stage, *layers: str) -> TextToVideoTask:
    generator = torch.Generator().manual_seed(1)
    clip = {
        "pixels": torch.rand(1, 3, 3, 16, 16, generator=generator) * 2 - 1, "caption": [PROMPT],
        "fps": torch.tensor([8.0]), "number": torch.tensor([0]),
    }  # fmt: skip
    small = TextToVideo(held_out_clips=1, bands=1, preview_clips=1, drop_caption=0.0)
    settings = replace(WANTED, targets=[*layers])
    adapter = Adapting.on(model.unet, settings, video_ldm.FAMILY, "tiny", 3, image_only=stage == "spatial")
    given = Given([clip], lr=1e-2, seed=3, adapter=adapter)
    return TextToVideoTask(model, stage, small, TextPreview(steps=1), given)


def test_text_to_video_trains_what_the_adapter_names(tmp_path: Path) -> None:
    folder = write_text_model(tmp_path / "image", prediction_type="v_prediction")
    with pytest.raises(ConfigError, match="trained as single images, which pass by"):
        text_task(VideoLDM.load(folder), "spatial", "temporal.attn1.to_out.0")
    with pytest.raises(ConfigError, match="what follows it is still zero"):
        text_task(VideoLDM.load(folder), "temporal", "temporal.attn1.to_q")
    with pytest.raises(ConfigError, match="layers are drawn at random at each inflation"):
        text_task(VideoLDM.load(folder), "joint", "attn2.to_q", "temporal.attn1.to_out.0")
    grown = VideoLDM.load(folder)
    randomise(grown.unet)
    text_task(grown, "joint", "attn2.to_q", "temporal.attn1.to_out.0")
    made = text_task(VideoLDM.load(folder), "joint", "attn2.to_q")
    loss = made.players[0].loss
    torch.manual_seed(0)
    losses, _ = loss(made.held_out[0], Noise(3, torch.tensor([0])), 0)
    losses.mean().backward()
    learning = {name: value for name, value in made.family.unet.named_parameters() if value.requires_grad}
    assert all(value.grad is not None and f".{attach.SLOT}." in name for name, value in learning.items())
    (tmp_path / "export").mkdir()
    made.export(tmp_path / "export")
    # Freshly inflated again, other temporal layers are drawn: it is the same base all the same.
    found = verify.check(tmp_path / "export" / file.NAME, VideoLDM.load(folder).unet)
    assert found.max_abs_diff <= verify.TOLERANCE


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("svd", ["stage=decoder"], "stage=decoder says what of the model learns"),
        ("svd", ["stage=image_to_video", "image_to_video.trainable=temporal"], "image_to_video.trainable=temporal"),
        ("svd", ["adapter.targets=[]", "stage=image_to_video"], "needs adapter.targets"),
        (
            "svd",
            ["adapter.kind=none", "adapter.targets=[]", "stage=decoder", "memory.base=nf4"],
            "memory.base=nf4 is for",
        ),
        ("video_ldm", ["adapter.kind=lorra"], "adapter.kind must be one of none, lora"),
    ],
)
def test_a_recipes_mistake_is_told(recipe: str, arguments: list[str], message: str) -> None:
    module = load_recipe(ROOT / "recipes" / f"{recipe}_finetune.py")
    with pytest.raises(ConfigError, match=message):
        load(module.Config, [str(ROOT / "adapters" / "camera_lora.yaml"), *arguments])


@pytest.mark.parametrize("card", ["temporal_lora", "spatial_lora", "camera_lora", "attention_lora", "full_lora"])
def test_every_card_learns_on_a_trained_model(card: str) -> None:
    module = load_recipe(ROOT / "recipes" / "svd_finetune.py")
    settings = load(module.Config, [str(ROOT / "adapters" / f"{card}.yaml"), "stage=image_to_video"]).adapter
    unet = family().unet
    names = targets.resolve(unet, settings)
    targets.refuse_inert(unet, names, 1)
    temporal = [".temporal." in name for name in names]
    assert {"temporal_lora": all, "camera_lora": all}.get(card, any)(temporal) == (card != "spatial_lora")


def test_a_gpus_peak_is_that_of_the_highest_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its allocator counts from the last phase on, so it is not asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert adapting._peak_memory({"encode": 3, "backward": 7, "update": 2}) == 7
