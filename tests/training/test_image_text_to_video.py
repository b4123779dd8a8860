"""DynamiCrafter's training on a tiny model: what a step computes, what a stage trains, what is measured and shown."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny_dynamicrafter import CONTEXT, CachedClips, image_encoder, made, strided
from tiny_video_ldm import FRAMES, PROMPT, parents, write_text_model

from inflate.adapters import file, verify
from inflate.adapters.settings import AdapterSettings
from inflate.data import video
from inflate.data.buckets import Bucket
from inflate.errors import CheckpointError, ConfigError, DataError
from inflate.families.dynamicrafter import FAMILY, Clips, DynamiCrafter
from inflate.families.dynamicrafter_model import Model
from inflate.families.video_ldm import VideoLDM
from inflate.models import image_stream
from inflate.models.unet import MODELSCOPE, VideoUNet
from inflate.training.adapting import Adapting
from inflate.training.denoising import Given
from inflate.training.held_out import join
from inflate.training.image_text_to_video import ImageTextToVideo, ImageTextToVideoTask, Preview
from inflate.training.loop import fit
from inflate.training.noise import Noise
from inflate.training.settings import Training
from inflate.training.stages import Queries, Stage, begin, check_stage, encoders, named


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("image"), prediction_type="v_prediction")


@pytest.fixture
def family(folder: Path) -> DynamiCrafter:
    return made(folder)


def make(
    family: DynamiCrafter,
    stage: Stage = "joint",
    cached: bool = False,
    adapter: Adapting | None = None,
    **settings: Any,
) -> ImageTextToVideoTask:
    kept = {f"drop_{part}": 0.0 for part in ("text", "image", "both")}
    small = ImageTextToVideo(**{"held_out_clips": 2, "bands": 2, "preview_clips": 2, **kept, **settings})
    held_out = [strided(number, 1 if stage == "context" else FRAMES) for number in (100, 101)]
    given = Given(held_out, lr=1e-3, seed=3, cached=cached, adapter=adapter)
    return ImageTextToVideoTask(family, stage, small, Preview(steps=1), given)


def training(output: Path, steps: int = 2, **changes: Any) -> Training:
    quiet = {"workers": 0, "tracker": "none", "progress": False, "batch": 2, "lr": 1e-2}
    return Training(output, steps=steps, **quiet | changes)


def expected(task: ImageTextToVideoTask, data: dict[str, Any], noise: Noise, detail: torch.Tensor, **given: Any) -> Any:
    """The loss of a batch of two by the objective alone, of a condition that is put together by hand."""
    family = task.family
    clean, timestep = family.encode(data["pixels"]), (1000 * noise.uniform("timestep")).long()
    condition = family.condition(family.embed([PROMPT] * 2), given["image"], given["number"], clean[:, 0], FRAMES)
    predict = family.predict(replace(condition, detail=detail, text=given.get("text", condition.text)))
    return family.objective.loss(predict, clean, timestep, noise.normal("noise", *clean.shape[1:])).mean(1)


def test_the_loss_is_the_objective_with_a_frame_of_its_own_for_each_clip(family: DynamiCrafter) -> None:
    task, data = make(family), join([strided(0), strided(2)])
    noise = Noise(3, data["number"])
    places = (noise.uniform("condition frame") * FRAMES).long().tolist()
    assert len(set(places)) == 2
    clean = family.encode(data["pixels"])
    image = family.embed_image(torch.stack([data["pixels"][n, place] for n, place in enumerate(places)]))
    detail = torch.stack([clean[n, place].expand(FRAMES, -1, -1, -1) for n, place in enumerate(places)])
    loss, logs = task.loss(data, noise, 0)
    wanted = expected(task, data, noise, detail, image=image, number=torch.tensor([8.0, 8.0]))
    torch.testing.assert_close(loss, wanted)
    assert list(logs) == ["loss at timestep 0-499", "loss at timestep 500-999"]


def test_interpolation_shows_both_ends_and_zeros_between(family: DynamiCrafter) -> None:
    family.clips = replace(family.clips, told="stride")
    task, data = make(family, interpolation=True, condition_frame="first"), join([strided(0), strided(1)])
    noise, clean = Noise(3, data["number"]), family.encode(data["pixels"])
    detail = torch.zeros_like(clean)
    detail[:, 0], detail[:, -1] = clean[:, 0], clean[:, -1]
    image = family.embed_image(data["pixels"][:, 0])
    wanted = expected(task, data, noise, detail, image=image, number=torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(task.loss(data, noise, 0)[0], wanted)


def test_text_and_image_are_dropped_by_one_draw_and_the_latent_stays(family: DynamiCrafter) -> None:
    task = make(family, drop_text=1 / 3, drop_image=1 / 3, drop_both=1 / 3, condition_frame="first")
    numbers = [7, next(n for n in range(50) if Noise(3, torch.tensor([n])).uniform("drop") > 0.7)]
    data = join([strided(number) for number in numbers])
    noise, clean = Noise(3, data["number"]), family.encode(data["pixels"])
    without_text, without_image = noise.uniform("drop") < 2 / 3, noise.uniform("drop") >= 1 / 3
    assert without_image[1]
    assert not without_text[1]
    image, text = family.embed_image(data["pixels"][:, 0]), family.embed([PROMPT] * 2).context
    image = torch.where(without_image[:, None, None], family.null_image(), image)
    text = torch.where(without_text[:, None, None], family.embed([""]).context, text)
    detail = clean[:, :1].expand_as(clean)
    wanted = expected(task, data, noise, detail, image=image, text=text, number=torch.tensor([8.0, 8.0]))
    torch.testing.assert_close(task.loss(data, noise, 0)[0], wanted)


@pytest.mark.parametrize("first", [False, True])
def test_what_is_cached_gives_the_loss_of_what_is_encoded(family: DynamiCrafter, first: bool) -> None:
    task = make(family, drop_text=0.2, drop_image=0.2, drop_both=0.2, condition_frame="first" if first else "random")
    cached, whole = CachedClips(family, every_frame=not first), join([strided(0), strided(1)])
    stacked = {name: torch.stack([cached[n][name] for n in (0, 1)]) for name in cached[0]}
    noise = Noise(3, whole["number"])
    torch.testing.assert_close(task.loss(stacked, noise, 0)[0], task.loss(whole, noise, 0)[0])


STAGES: list[tuple[Stage, set[str]]] = [
    ("context", {"image"}), ("adapt", {"image", "2D"}), ("joint", {"image", "2D", "ids"}),
    ("finetune", {"image", "2D", "ids", "temporal"}),
]  # fmt: skip


def kind_of(name: str) -> str:
    """What a parameter belongs to."""
    if name.startswith("query_transformer.") or ".attn2.image." in name:
        return "image"
    return "ids" if name.startswith("class_embedding") else "temporal" if ".temporal." in name else "2D"


@pytest.mark.parametrize(("stage", "learns"), STAGES)
def test_each_stage_trains_its_own_layers(folder: Path, stage: Stage, learns: set[str]) -> None:
    family = made(folder, detail=stage in ("joint", "finetune"))
    task, data = make(family, stage), strided(0, 1 if stage == "context" else FRAMES)
    task.loss(data, Noise(3, data["number"]), 0)[0].sum().backward()
    reached = {name for name, value in family.unet.named_parameters() if value.grad is not None}
    assert {kind_of(name) for name in reached} == learns
    assert reached == {name for name, value in family.unet.named_parameters() if value.requires_grad}


def test_the_image_stream_goes_from_one_stage_into_the_next(folder: Path, tmp_path: Path) -> None:
    born = made(folder, detail=False, context=replace(CONTEXT, frames=1, counted=FRAMES))
    make(born, "context").export(tmp_path)
    text, encoder = VideoLDM.load(folder), born.image_encoder
    image_stream.load(text.unet, encoder, tmp_path, FRAMES)
    assert text.unet.image_context == replace(CONTEXT, frames=FRAMES)
    features = torch.randn(2, 5, 8)
    tokens = text.unet.image_tokens_of(features, FRAMES)
    torch.testing.assert_close(tokens, born.unet.image_tokens_of(features, FRAMES))
    alone = born.unet.image_tokens_of(features, 1)  # as stage context made them, of single images
    torch.testing.assert_close(tokens, alone.expand_as(tokens))
    pairs = [
        (value, born.unet.get_parameter(name))
        for name, value in text.unet.image_parameters().items()
        if ".image." in name
    ]
    assert pairs
    assert all(torch.equal(*pair) for pair in pairs)


def test_the_stages_begin_with_a_text_to_video_model_of_another_kind(folder: Path, tmp_path: Path) -> None:
    """With convolutions over time and a transformer after the first one, as VideoCrafter has them."""
    text = VideoLDM.load(folder)
    text.unet = VideoUNet.from_2d(parents(folder)[0], MODELSCOPE)
    text.save_pretrained(tmp_path / "text")
    image_encoder().save_pretrained(tmp_path / "vision")
    start, queries = Model(str(tmp_path / "text"), image_encoder=str(tmp_path / "vision")), Queries(8, 1, 2, 4, 2)
    (tmp_path / "stream").mkdir()
    make(begin("context", start, queries, 1), "context").export(tmp_path / "stream")
    adapted = begin("adapt", replace(start, image_stream=str(tmp_path / "stream")), queries, FRAMES)
    make(adapted, "adapt").export(tmp_path / "adapted")
    joint = begin("joint", Model(str(tmp_path / "adapted")), queries, FRAMES)
    assert joint.unet.spec == replace(MODELSCOPE, added_ids=1, added_id_dim=32)
    data = strided(0)
    losses = [make(one, "joint").loss(data, Noise(3, data["number"]), 0)[0] for one in (adapted, joint)]
    torch.testing.assert_close(*losses)  # the new input is born without effect


def test_a_stage_left_out_or_done_again_is_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = made(folder, detail=False)
    model.save_pretrained(tmp_path / "adapted")
    begin("finetune", Model(str(tmp_path / "adapted")), Queries(), FRAMES)
    assert "adapted is shown no latent of its image, which stage=joint adds" in caplog.text
    joint = begin("joint", Model(str(tmp_path / "adapted")), Queries(), FRAMES)
    assert "has been through" not in caplog.text
    joint.save_pretrained(tmp_path / "joint")
    caplog.clear()
    begin("finetune", Model(str(tmp_path / "joint")), Queries(), FRAMES)
    assert caplog.text == ""
    begin("joint", Model(str(tmp_path / "joint")), Queries(), FRAMES)
    assert "joint has been through stage=joint" in caplog.text


def test_a_stream_in_place_of_a_model_is_named_with_the_stage(folder: Path, tmp_path: Path) -> None:
    make(made(folder, detail=False, context=replace(CONTEXT, frames=1)), "context").export(tmp_path)
    start = Model(str(tmp_path))
    for stage in get_args(Stage):
        told = f"is an image stream alone, the export of stage=context, and no model that stage={stage} begins with"
        with pytest.raises(CheckpointError, match=rf"{told}: .*model\.image_stream={tmp_path}"):
            begin(stage, start, Queries(), 1)
        with pytest.raises(CheckpointError, match=told):
            encoders(stage, start)
    with pytest.raises(CheckpointError, match=r"image_stream=run/export does not exist; .* of stage=context"):
        _ = Model("pocket-t2v", image_stream="run/export").places


def test_a_stream_that_does_not_belong_is_refused_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    make(made(folder, detail=False, context=replace(CONTEXT, frames=1)), "context").export(tmp_path)
    text = VideoLDM.load(folder)
    with pytest.raises(CheckpointError, match=r"features of another image encoder.*model\.image_encoder"):
        image_stream.load(text.unet, image_encoder(seed=4), tmp_path, FRAMES)
    narrow = VideoLDM.load("pocket")
    with pytest.raises(CheckpointError, match="does not fit the model"):
        image_stream.load(narrow.unet, image_encoder(), tmp_path, FRAMES)
    with pytest.raises(CheckpointError, match=r"holds no image stream.*stage=context"):
        image_stream.load(text.unet, image_encoder(), tmp_path / "missing", FRAMES)
    assert text.unet.image_context is None
    assert narrow.unet.image_context is None


def test_images_pass_by_the_temporal_layers(folder: Path) -> None:
    family = made(folder, detail=False)
    task, image = make(family, "context"), strided(0, frames=1)
    losses = []
    for learns in (False, True):  # by leaving them out, and by marks where they learn
        for value in family.unet.temporal_parameters().values():
            value.data.add_(1.0).requires_grad_(learns)
        losses.append(task.loss(image, Noise(3, image["number"]), 0)[0])
    assert torch.equal(*losses)


def test_what_each_part_of_the_model_is_worth_is_told(folder: Path) -> None:
    told = make(made(folder)).evaluate()
    parts = [name.split(", ")[1] for name in told if "," in name]
    assert parts == ["temporal layers bypassed", "without text", "without image tokens", "without image latent"]
    assert len({told[f"held-out loss, {part}"] for part in parts} | {told["held-out loss"]}) == 5
    assert make(made(folder)).evaluate() == told
    alone = make(made(folder, detail=False), "context").evaluate()
    assert [name for name in alone if "," in name] == [
        "held-out loss, without text", "held-out loss, without image tokens"
    ]  # fmt: skip
    assert "held-out loss, without image latent" not in make(made(folder, detail=False), "adapt").evaluate()


def test_a_run_shows_and_exports_what_it_trained(family: DynamiCrafter, tmp_path: Path) -> None:
    task = make(family, cached=True, interpolation=True, condition_frame="first")
    family.clips = task.settings.clips(family.clips, Bucket(FRAMES, 16, 16), task.held_out[0])
    result = fit(task, CachedClips(family, every_frame=False), training(tmp_path / "run"))
    shown = tmp_path / "run" / "samples" / "step-000002"
    assert (shown / "prompts.txt").read_text() == f"00 {PROMPT}\n01 {PROMPT}\n"
    assert video.probe(shown / "01.mp4").frames == FRAMES
    assert (shown / "sheet.png").stat().st_size > 0
    assert '"last frame ssim, sample"' in (shown / "scores.json").read_text()
    assert result.export is not None
    loaded = Model(str(result.export)).load()
    assert loaded.clips == Clips(FRAMES, 8.0, 16, 16, "fps", 8.0, interpolation=True)
    trained = family.unet.state_dict()
    assert all(torch.equal(value, trained[name].cpu()) for name, value in loaded.unet.state_dict().items())


def quick(family: DynamiCrafter, stage: Stage = "joint", **settings: Any) -> ImageTextToVideoTask:
    """A task that looks at one clip, and draws none."""
    task = make(family, stage, cached=True, held_out_clips=1, bands=1, **settings)
    task.preview = lambda folder: None  # type: ignore[method-assign]
    return task


def test_a_resumed_run_is_the_run_in_one_go(folder: Path, tmp_path: Path) -> None:
    trained = []
    for place, steps, resume in (("whole", 2, None), ("halves", 1, None), ("halves", 2, "latest")):
        family = made(folder)
        settings = training(tmp_path / place, steps, ema=0.5, checkpoint_every=1, resume=resume)
        fit(quick(family, drop_text=0.2, drop_image=0.2, drop_both=0.2), CachedClips(family), settings)
        trained.append(family.unet.state_dict())
    whole, half, again = trained
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert not torch.equal(half["conv_in.weight"], again["conv_in.weight"])


def test_a_lora_is_proved_by_loading_it_on_its_base(folder: Path, tmp_path: Path) -> None:
    made(folder).save_pretrained(tmp_path / "base")
    family = DynamiCrafter.load(tmp_path / "base")
    targets = ["attn2*.to_v", "temporal.attn1.to_q", "query_transformer.proj_in"]
    wanted = AdapterSettings("lora", rank=2, targets=targets)
    adapter = Adapting.on(family.unet, wanted, FAMILY, str(tmp_path / "base"), seed=3)
    fit(quick(family, "finetune", adapter=adapter), CachedClips(family), training(tmp_path / "run"))
    path = tmp_path / "run" / "export" / file.NAME
    learned = file.read(path).tensors
    assert {kind_of(name.removeprefix("unet.")) for name in learned} == {"image", "2D", "temporal"}
    found = verify.check(path, DynamiCrafter.load(tmp_path / "base").unet)
    assert found.max_abs_diff <= verify.TOLERANCE
    assert found.effect > 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {"drop_text": 0.8, "drop_image": 0.3},
        {"timestep_power": 0.0},
        {"bands": 0},
        {"train_clips": -1},
        {"interpolation": True},
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="image_text_to_video"):
        ImageTextToVideo(**{**asdict(ImageTextToVideo()), **changes})


def test_a_run_needs_held_out_clips(family: DynamiCrafter) -> None:
    with pytest.raises(DataError, match="held-out"):
        ImageTextToVideoTask(family, "joint", ImageTextToVideo(), Preview(), Given([], lr=1e-3, seed=3))


CLIPS, IMAGES = Bucket(FRAMES, 16, 16), Bucket(1, 16, 16)


@pytest.mark.parametrize(
    ("stage", "model", "interpolation", "sizes", "message"),
    [
        ("adapt", Model(), False, [CLIPS], "stage=adapt lacks it"),
        ("context", Model(image_stream="export"), False, [IMAGES], "stage=context takes none"),
        ("joint", Model(image_encoder="pocket"), False, [CLIPS], r"model\.image_encoder: stage=joint begins with a"),
        ("adapt", Model(image_stream="export"), True, [CLIPS], "stage=adapt shows the model no latents"),
        ("context", Model(), False, [CLIPS], r"set data\.frames=1"),
        ("finetune", Model(), False, [CLIPS, IMAGES], "leave out the buckets of one frame"),
    ],
)
def test_settings_of_another_stage_are_refused(
    stage: Stage, model: Model, interpolation: bool, sizes: list[Bucket], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_stage(stage, model, interpolation, sizes)


def test_a_stage_is_told_from_another_recipes_by_its_model(family: DynamiCrafter, tmp_path: Path) -> None:
    family.save_pretrained(tmp_path / "export")
    assert named("joint", str(tmp_path / "export")) == "joint"
    assert named("joint", "pocket-t2v") is None
    assert named("adapt", "pocket-t2v") == "adapt"
    assert named("temporal", "pocket") is None
