"""Training of I2VGen-XL's base stage on a tiny model: what a step computes, what is measured, shown and exported."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_i2vgen_xl import FRAMES, HIERARCHY, base
from tiny_video_ldm import PROMPT, clip

from inflate.adapters import file, verify
from inflate.adapters.settings import AdapterSettings
from inflate.data import video
from inflate.data.buckets import Bucket
from inflate.errors import ConfigError
from inflate.families.i2vgen_xl import FAMILY, Clips, I2VGenXL
from inflate.layers.hierarchy import Hierarchy
from inflate.training.adapting import Adapting
from inflate.training.denoising import Given
from inflate.training.encoding import FirstFrameClipEncoder
from inflate.training.held_out import join
from inflate.training.i2vgen_xl import I2VGenXLSettings, I2VGenXLTask, Preview, spatial_rates
from inflate.training.loop import fit
from inflate.training.noise import Noise
from inflate.training.settings import Training

NEGATIVE = "a box"
"""A prompt that the tiny tokenizer knows."""


@pytest.fixture
def family(tmp_path: Path) -> I2VGenXL:
    return base(tmp_path / "parent")


def made(folder: Path, **clips: Any) -> I2VGenXL:
    """The same model each time."""
    torch.manual_seed(5)
    family = base(folder)
    family.clips = replace(family.clips, **clips)
    return family


def make(
    family: I2VGenXL, cached: bool = False, adapter: Adapting | None = None, gamma: float = 1.0, **settings: Any
) -> I2VGenXLTask:
    kept = {f"drop_{part}": 0.0 for part in ("text", "image", "both")}
    small = I2VGenXLSettings(**{"held_out_clips": 2, "bands": 2, "preview_clips": 2, **kept, **settings})
    held_out = [clip(number) for number in (100, 101)]
    given = Given(held_out, lr=1e-3, seed=3, cached=cached, adapter=adapter)
    return I2VGenXLTask(family, small, Preview(steps=1, spacing="trailing"), given, gamma)


def training(output: Path, steps: int = 2, **changes: Any) -> Training:
    quiet = {"workers": 0, "tracker": "none", "progress": False, "batch": 2, "lr": 1e-2}
    return Training(output, steps=steps, **quiet | changes)


def told(family: I2VGenXL, data: dict[str, Any]) -> Any:
    """The condition on a batch of two, put together by hand: on frame 0 and no other."""
    first = data["pixels"][:, 0]
    latents, embedding = family.encode(first[:, None])[:, 0], family.embed_image(first)
    return family.condition(family.embed([PROMPT] * 2), latents, embedding, torch.tensor([8.0, 8.0]))


def expected(family: I2VGenXL, data: dict[str, Any], noise: Noise, condition: Any, offset: float = 0.1) -> torch.Tensor:
    """The loss of a batch of two by the objective alone."""
    clean, timestep = family.encode(data["pixels"]), (1000 * noise.uniform("timestep")).long()
    drawn = noise.normal("noise", *clean.shape[1:])
    drawn = drawn + offset * noise.normal("noise offset", *clean.shape[1:3], 1, 1)
    return family.objective.loss(family.predict(condition), clean, timestep, drawn).mean(1)


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_the_loss_is_the_objective_with_the_offset_in_input_and_target(family: I2VGenXL, offset: float) -> None:
    task, data = make(family, offset_noise=offset), join([clip(0), clip(1)])
    noise = Noise(3, data["number"])
    loss, logs = task.loss(data, noise, 0)
    torch.testing.assert_close(loss, expected(family, data, noise, told(family, data), offset))
    assert list(logs) == ["loss at timestep 0-499", "loss at timestep 500-999"]


def test_text_and_embedding_are_dropped_by_one_draw_and_the_latent_stays(family: I2VGenXL) -> None:
    """A dropped text is the negative prompt, a dropped embedding zeros."""
    family.clips = replace(family.clips, negative=NEGATIVE)
    task, data = make(family, drop_text=1 / 3, drop_image=1 / 3, drop_both=1 / 3), join([clip(n) for n in range(2)])
    numbers = [next(n for n in range(99) if low < Noise(3, torch.tensor([n])).uniform("drop") < low + 1 / 3)
               for low in (0.0, 2 / 3)]  # fmt: skip
    data = join([clip(number) for number in numbers])
    noise, condition = Noise(3, data["number"]), told(family, data)
    condition.text[0] = family.embed([NEGATIVE]).context[0]
    condition.embedding[1] = 0.0
    torch.testing.assert_close(task.loss(data, noise, 0)[0], expected(family, data, noise, condition))


def test_without_text_none_is_passed_and_no_caption_is_read(family: I2VGenXL) -> None:
    family.clips = replace(family.clips, prompts=False)
    task, data = make(family), join([clip(0), clip(1)])
    noise, condition = Noise(3, data["number"]), told(family, data)
    shorter = replace(condition, text=condition.text[:, :0])
    torch.testing.assert_close(task.loss(data, noise, 0)[0], expected(family, data, noise, shorter))
    task.loss(data | {"caption": ["something else"] * 2}, noise, 0)[0]
    assert "text" not in task.parts
    assert "caption_states" not in task.measured[0][0]


def test_what_is_cached_gives_the_loss_of_what_is_encoded(family: I2VGenXL) -> None:
    task, cached, whole = make(family), CachedClips(family), join([clip(0), clip(1)])
    stacked = {name: torch.stack([cached[n][name] for n in (0, 1)]) for name in cached[0]}
    noise = Noise(3, whole["number"])
    torch.testing.assert_close(task.loss(stacked, noise, 0)[0], task.loss(whole, noise, 0)[0])


class CachedClips:
    """Four clips as a cache gives them."""

    def __init__(self, family: I2VGenXL) -> None:
        encoder = FirstFrameClipEncoder(family, "float32")
        text = {name: rows[0] for name, rows in encoder.captions([PROMPT]).items()}
        self.items = [self._item(encoder, clip(n)["pixels"][0]) | text for n in range(4)]

    @staticmethod
    def _item(encoder: FirstFrameClipEncoder, pixels: torch.Tensor) -> dict[str, Any]:
        starts = {name: rows[0] for name, rows in encoder.starts(pixels[:1], [""]).items()}
        return {"latents": encoder.latents(pixels), **starts, "fps": torch.tensor(8.0)}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.items[number % 4], "number": torch.tensor(number)}


def test_first_frames_fade_in_by_the_step(family: I2VGenXL) -> None:
    task, data = make(family, fade_in=4), join([clip(0), clip(1)])
    noise, condition = Noise(3, data["number"]), told(family, data)
    for step, share in ((0, 0.25), (2, 0.75), (3, 1.0), (9, 1.0)):
        wanted = expected(family, data, noise, replace(condition, image_share=share))
        torch.testing.assert_close(task.loss(data, noise, step)[0], wanted)
    assert task.evaluate() == make(family).evaluate()  # as in sampling, whatever the step


def test_the_image_models_layers_alone_learn_at_gamma(family: I2VGenXL) -> None:
    task = make(family, gamma=0.2)
    rates, unet = task.players[0].rates, family.unet
    assert set(rates.values()) == {0.2}
    others = unet.state_dict().keys() - rates.keys()
    assert all(
        any(part in name for part in (".temporal.", "first_frame.", "class_embedding.", "time_embedding."))
        for name in others
    )
    assert not [name for name in rates if ".temporal." in name or "first_frame" in name or "embedding" in name]
    assert {"conv_in.weight", "conv_out.bias"} <= rates.keys()
    assert spatial_rates(unet, 1.0) == {}


def test_everything_learns_and_every_part_gets_a_gradient(family: I2VGenXL) -> None:
    task, data = make(family, drop_text=0.2, drop_image=0.2, drop_both=0.2, fade_in=5), join([clip(0), clip(1)])
    task.loss(data, Noise(3, data["number"]), 0)[0].sum().backward()
    assert [name for name, value in family.unet.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("frames", [1, FRAMES])
def test_what_reads_texts_alone_does_not_learn_where_there_are_none(family: I2VGenXL, frames: int) -> None:
    """Several processes would wait for its gradients."""
    family.clips = replace(family.clips, prompts=False)
    task, data = make(family, drop_image=0.2, fade_in=5), join([clip(0, frames=frames), clip(1, frames=frames)])
    frozen = {name for name, value in family.unet.named_parameters() if not value.requires_grad}
    assert frozen == set(family.unet.textless_parameters())
    assert all(".temporal.norm2" in name or ".temporal.attn2" in name for name in frozen)
    task.loss(data, Noise(3, data["number"]), 0)[0].sum().backward()
    assert frozen == {name for name, value in family.unet.named_parameters() if value.grad is None}


def test_an_adapter_that_would_read_texts_alone_is_refused_where_there_are_none(family: I2VGenXL) -> None:
    wanted = AdapterSettings("lora", rank=2, targets=["attn2.to_v", "temporal.attn2.to_v"])
    with pytest.raises(ConfigError, match=r"would learn nothing on .*temporal\.attn2\.to_v"):
        Adapting.on(family.unet, wanted, FAMILY, "base", 3, text=False)
    assert Adapting.on(family.unet, wanted, FAMILY, "base", 3) is not None


def test_an_image_passes_by_the_temporal_layers(family: I2VGenXL) -> None:
    task, image = make(family), clip(0, frames=1)
    losses = []
    for learns in (False, True):  # by leaving them out, and by marks where they learn
        for value in family.unet.temporal_parameters().values():
            value.data.add_(1.0)
            value.requires_grad_(learns)
        losses.append(task.loss(image, Noise(3, image["number"]), 0)[0])
    torch.testing.assert_close(*losses)


def test_what_each_part_of_the_model_is_worth_is_told(family: I2VGenXL) -> None:
    told = make(family).evaluate()
    parts = [name.split(", ")[1] for name in told if "," in name]
    assert parts == ["temporal layers bypassed", *(f"without {part}" for part in ("text", "detail", "global", "clip"))]
    assert len({told[f"held-out loss, {part}"] for part in parts} | {told["held-out loss"]}) == 6
    assert make(family).evaluate() == told


@pytest.mark.parametrize(
    ("hierarchy", "parts"),
    [
        (replace(HIERARCHY, global_encoder=False), ("detail",)),  # attention would have no token without CLIP's
        (HIERARCHY, ("detail", "global", "clip")),
    ],
)
def test_parts_without_which_nothing_is_attended_to_are_not_left_out(
    tmp_path: Path, hierarchy: Hierarchy, parts: tuple[str, ...]
) -> None:
    family = base(tmp_path / "parent", hierarchy)
    family.clips = replace(family.clips, prompts=False)
    assert make(family).parts == parts


def test_a_run_shows_and_exports_what_it_trained(family: I2VGenXL, tmp_path: Path) -> None:
    settings = I2VGenXLSettings(negative=NEGATIVE)
    family.clips = settings.clips(family.clips, Bucket(FRAMES, 16, 16), 8.0)
    result = fit(make(family, cached=True), CachedClips(family), training(tmp_path / "run"))
    shown = tmp_path / "run" / "samples" / "step-000002"
    assert (shown / "prompts.txt").read_text() == f"00 {PROMPT}\n01 {PROMPT}\n"
    assert video.probe(shown / "01.mp4").frames == FRAMES
    assert (shown / "sheet.png").stat().st_size > 0
    assert '"frame 0 ssim, sample"' in (shown / "scores.json").read_text()
    assert result.export is not None
    loaded = I2VGenXL.load(result.export)
    assert loaded.clips == Clips(FRAMES, 8.0, 16, 16, prompts=True, negative=NEGATIVE)
    trained = family.unet.state_dict()
    assert all(torch.equal(value, trained[name].cpu()) for name, value in loaded.unet.state_dict().items())


def quick(family: I2VGenXL, **settings: Any) -> I2VGenXLTask:
    """A task that looks at one clip, and draws none."""
    task = make(family, cached=True, held_out_clips=1, bands=1, **settings)
    task.preview = lambda folder: None  # type: ignore[method-assign]
    return task


@pytest.mark.usefixtures("on_cpu")
def test_the_loss_falls(tmp_path: Path) -> None:
    family = base(tmp_path / "parent", born=True)
    result = fit(quick(family), CachedClips(family), training(tmp_path / "run", 12, lr=3e-3))
    first, last = (row["held-out loss"] for row in (result.held_out[0], result.held_out[-1]))
    assert last < 0.97 * first


@pytest.mark.usefixtures("on_cpu")
def test_a_lora_is_proved_by_loading_it_on_its_base(tmp_path: Path) -> None:
    base(tmp_path / "parent").save_pretrained(tmp_path / "base")
    family = I2VGenXL.load(tmp_path / "base")
    targets = ["attn2*.to_v", "temporal.attn1.to_q", "first_frame.tokens.0"]
    wanted = AdapterSettings("lora", rank=2, targets=targets)
    adapter = Adapting.on(family.unet, wanted, FAMILY, str(tmp_path / "base"), seed=3)
    fit(quick(family, adapter=adapter), CachedClips(family), training(tmp_path / "run"))
    path = tmp_path / "run" / "export" / file.NAME
    learned = file.read(path).tensors
    assert all(any(part in name for name in learned) for part in ("attn2", ".temporal.", "first_frame"))
    found = verify.check(path, I2VGenXL.load(tmp_path / "base").unet)
    assert found.max_abs_diff <= verify.TOLERANCE
    assert found.effect > 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma": 0.0},
        {"offset_noise": -0.1},
        {"fade_in": -1},
        {"levels": 1001},
        {"padded_rows": 0},
        {"timestep_power": 0.0},
        {"bands": 0},
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="i2vgen_xl"):
        I2VGenXLSettings(**{**asdict(I2VGenXLSettings()), **changes})


@pytest.mark.parametrize(
    "changes", [{"text": False}, {"negative": NEGATIVE}, {"schedule": "cosine"}, {"gamma": 0.2}, {"fade_in": 5}]
)
def test_an_adapter_keeps_to_the_ways_of_its_base(changes: dict[str, Any]) -> None:
    usual = asdict(I2VGenXLSettings())
    wanted = {f"i2vgen_xl.{name}": usual[name] for name in changes}
    assert I2VGenXLSettings(**changes).unlike_base(Clips()) == wanted
    assert not I2VGenXLSettings(text=True, negative="").unlike_base(Clips())
