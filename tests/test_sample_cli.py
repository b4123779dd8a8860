"""The commands that draw clips: their options by family, their files, and one line with status 1 for each mistake."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from original_files import dynamicrafter as original
from original_files import write_single_file, write_whole_file
from PIL import Image
from test_cli import image_model, inflate, refused
from tiny_dynamicrafter import FRAMES, SIDE, family

from helpers import CROSS, randomise
from inflate import animation, sample_cli, shooting
from inflate.adapters import attach, bases, targets
from inflate.adapters import file as adapters
from inflate.adapters.settings import AdapterSettings
from inflate.data import video
from inflate.data.pixels import tiled
from inflate.errors import ConfigError, DataError
from inflate.families import dynamicrafter_original
from inflate.families.dynamicrafter import Clips, DynamiCrafter
from inflate.sampling import dynamicrafter as dynamicrafter_sampling
from inflate.sampling import i2vgen_xl as i2vgen_xl_sampling
from inflate.sampling import svd as svd_sampling
from inflate.sampling.text_to_video import Sampling

__all__ = ["image_model"]
SMALL = ("--frames", 3, "--steps", 1, "--height", 16, "--width", 32)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


def test_sample_writes_a_video_and_a_contact_sheet(image_model: Path, picture: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.mp4"
    options = ("--frames", 3, "--steps", 2, "--fps", 8, "--height", 16, "--width", 32)
    result = inflate("sample", image_model, picture, "-o", output, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {output}\nwrote {output.with_suffix('.png')}\n"
    assert "freshly inflated" in result.stderr
    found = video.probe(output)
    assert (found.frames, found.fps, found.height, found.width) == (3, 8, 16, 32)
    with Image.open(output.with_suffix(".png")) as sheet:
        assert sheet.width >= 3 * 32


def test_sample_takes_a_single_file_with_an_image_encoder(
    image_model: Path, picture: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_single_file(tmp_path / "sd.safetensors", cross_attention_dim=CROSS)
    shape = ("--steps", "1", "--frames", "2", "--height", "16", "--width", "16")
    arguments = ("sample", tmp_path / "sd.safetensors", picture, "-o", tmp_path / "out.mp4", *shape)
    assert "give its folder as image_encoder" in inflate(*arguments).stderr
    given = ("--image-encoder", image_model / "image_encoder", "--prediction", "v_prediction")
    result = inflate(*arguments, *given)
    assert result.exit_code == 0, result.output
    assert "predicts noise, not v" not in caplog.text
    assert video.probe(tmp_path / "out.mp4").frames == 2


def test_the_clips_size_follows_the_image_at_the_models_area() -> None:
    assert animation.fitting(1080, 1920, 768 * 768, 64) == (576, 1024)
    assert animation.fitting(500, 500, 768 * 768, 64) == (768, 768)
    assert animation.fitting(1080, 1920, 320 * 576, 64) == (320, 576)


def test_the_options_of_generate_default_to_the_samplers() -> None:
    options = {name: option.default for name, option in inspect.signature(sample_cli.generate).parameters.items()}
    assert {field.name: options[field.name] for field in fields(Sampling)} == {
        f.name: f.default for f in fields(Sampling)
    }


def helps() -> dict[str, str]:
    """What --help says of each option of `inflate sample`."""
    hints = inspect.get_annotations(sample_cli.sample.__wrapped__)  # type: ignore[attr-defined]
    return {name: hint.__metadata__[0].help or "" for name, hint in hints.items() if hasattr(hint, "__metadata__")}


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (svd_sampling.Sampling, "SVD"),
        (dynamicrafter_sampling.Sampling, "DynamiCrafter"),
        (i2vgen_xl_sampling.Sampling, "I2VGen-XL"),
    ],
)
def test_help_tells_the_samplers_defaults(sampling: type[Any], name: str) -> None:
    told = helps()
    shared = [field for field in fields(sampling) if field.name in told and isinstance(field.default, int | float)]
    for field in shared:
        if field.name not in ("fps", "seed"):  # which are the model's, and the command's
            assert re.search(rf"\b(?:default: |{name} ){field.default:g}\b", told[field.name]), field.name
    assert len(shared) >= 3


def test_help_shows_what_stands_in_brackets() -> None:
    assert "[default: SVD 25, DynamiCrafter 50, I2VGen-XL 50]" in " ".join(
        inflate("sample", "--help").output.replace("│", "").split()
    )


def test_every_option_is_of_all_families_or_of_some() -> None:
    of_some = frozenset[str]().union(*(kind.OPTIONS for kind in animation.KINDS.values()))
    assert of_some <= helps().keys()


def test_generate_draws_a_prompt_with_the_pocket_model(tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    options = ("--steps", 1, "--frames", 2, "--grid", 3, "--fps", 4, "--sampler", "euler")
    prompt = ("a red elephant over blue", "--negative", "a Disc, 2 boats")
    result = inflate("generate", "pocket", *prompt, "-o", output, *options)
    assert result.exit_code == 0, result.output
    assert "note: the model's text encoder does not know: elephant, 2, boats\n" in result.stderr
    assert "freshly inflated" in result.output
    probe = video.probe(output)
    assert (probe.frames, probe.height, probe.width, probe.fps) == (2, 128, 128, 4)
    assert output.with_suffix(".png").is_file()


def test_generate_takes_a_single_file_with_a_tokenizer(tmp_path: Path) -> None:
    write_whole_file(tmp_path / "xl.safetensors", "Stable Diffusion XL")
    shape = ("--steps", "1", "--frames", "2", "--height", "16", "--width", "16")
    arguments = ("generate", tmp_path / "xl.safetensors", "a disc", "-o", tmp_path / "out.mp4", *shape)
    assert "name the folder of one" in inflate(*arguments).stderr
    result = inflate(*arguments, "--tokenizer", "pocket")
    assert "is an image model" in result.stderr
    assert video.probe(tmp_path / "out.mp4").frames == 2


def test_generate_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    arguments = ("generate", "./nowhere", "a disc", "-o", tmp_path / "out.mp4")
    assert "must be ddim or euler" in refused(*arguments, "--sampler", "heun")
    assert "./nowhere does not exist" in refused(*arguments)


def test_sample_checks_its_output_first(picture: Path, tmp_path: Path) -> None:
    arguments = ("sample", "./nowhere", picture, "-o")
    (tmp_path / "old.mp4").write_bytes(b"old")
    assert "old.mp4 exists already; choose another name or add --overwrite" in refused(*arguments, tmp_path / "old.mp4")
    assert (tmp_path / "old.mp4").read_bytes() == b"old"
    (tmp_path / "sheet.png").write_bytes(b"old")
    assert "sheet.png exists already" in refused(*arguments, tmp_path / "sheet.mp4")
    assert "ends in .mp4" in refused(*arguments, tmp_path / "out.gif")
    assert "not a folder that you may write to" in refused(*arguments, picture / "out.mp4")
    assert "./nowhere does not exist" in refused(*arguments, tmp_path / "old.mp4", "--overwrite")


def test_sample_never_writes_over_what_it_reads(picture: Path, tmp_path: Path) -> None:
    photo, end = tmp_path / "photo.png", tmp_path / "end.png"
    for file in (photo, end):
        shutil.copy(picture, file)
    before = photo.read_bytes()
    arguments = ("sample", "./nowhere", photo, "--end-image", end, "--overwrite", "-o")
    for name in ("photo", "end"):
        told = refused(*arguments, tmp_path / f"{name}.mp4")
        assert f"{name}.png is read, and a file of that name goes with" in told
    assert photo.read_bytes() == end.read_bytes() == before


def test_the_folder_of_a_run_is_no_model(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "metrics.json").write_text("{}")
    told = refused("sample", tmp_path / "run", picture, "--prompt", "a disc", "-o", tmp_path / "out.mp4")
    assert "is the folder of a run; its model is" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fps", 0), "--fps is 0: it must be above 0"),
        (("--play-fps", 0), "--play-fps is 0: it must be above 0"),
        (("--play-fps", "inf"), "--play-fps is inf: it must be a finite number"),
        (("--start", "nan"), "--start is nan: it must be a finite number"),
        (("--guidance", "nan"), "--guidance is nan: it must be a finite number"),
        (("--guidance", 1, "--negative", "x"), "--negative cannot act without guidance, which --guidance 1 turns off"),
        (("--guidance", 1, "--negative", "x", "--rescale", 0.5), "--negative and --rescale cannot act"),
        (("--guidance", 1, "--negative", "x", "--image-guidance", 2), "./nowhere does not exist"),
        (("--frames", 2, "--loop"), "--loop needs --frames of 3 or more, not 2"),
        (("--frames", 1, "--end-image", "x.png"), "--end-image needs --frames of 2 or more, not 1"),
        (("--frames", 1, "--story", "x.yaml"), "--story needs --frames of 2 or more, not 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_loading(
    options: tuple[object, ...], message: str, picture: Path, tmp_path: Path
) -> None:
    assert message in refused("sample", "./nowhere", picture, "-o", tmp_path / "out.mp4", *options)


def test_generate_refuses_numbers_as_sample_does(tmp_path: Path) -> None:
    common = ("generate", "./nowhere", "a disc", "-o", tmp_path / "out.mp4")
    assert "--fps is 0: it must be above 0" in refused(*common, "--fps", 0)
    assert "--guidance is nan: it must be a finite number" in refused(*common, "--guidance", "nan")
    assert "--negative cannot act without guidance" in refused(*common, "--guidance", 1, "--negative", "x")


def test_a_seed_leaves_room_for_those_after_it(picture: Path, tmp_path: Path) -> None:
    for command in ("sample", "generate"):
        result = inflate(command, "./nowhere", picture, "-o", tmp_path / "out.mp4", "--seed", 2**63)
        assert result.exit_code == 2
        assert str(2**63 - 1) in result.stderr


@pytest.mark.parametrize(("option", "wanted"), [("--at-once", False), ("--little-memory", True)])
def test_how_to_draw_arrives(
    option: str, wanted: bool, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: list[dict[str, Any]] = []

    def kind_of(_: str, given: dict[str, Any]) -> None:
        arrived.append(given)
        raise ConfigError("that is enough")

    monkeypatch.setattr(animation, "kind_of", kind_of)
    refused("sample", "pocket-svd", picture, "-o", tmp_path / "out.mp4", option)
    assert arrived == [{"little_memory": wanted}]


def test_a_single_file_of_dynamicrafter_is_to_be_converted(picture: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    dynamicrafter_original.write(original(tmp_path), file)
    said = refused("sample", file, picture, "-o", tmp_path / "out.mp4")
    assert f"convert it first: inflate convert {file} OUT --tokenizer FOLDER" in said


def test_sample_names_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG")
    assert "broken.png: cannot be read as an image" in refused("sample", "pocket", broken, "-o", tmp_path / "out.mp4")
    missing = tmp_path / "missing.png"
    assert "missing.png" in refused("sample", "pocket", missing, "-o", tmp_path / "out.mp4")


def test_sample_takes_height_and_width_together(picture: Path, tmp_path: Path) -> None:
    arguments = ("sample", "pocket", picture, "-o", tmp_path / "out.mp4")
    assert "give both or neither" in refused(*arguments, "--height", 16)


def test_a_grid_holds_a_clip_of_each_seed(image_model: Path, picture: Path, tmp_path: Path) -> None:
    result = inflate("sample", image_model, picture, "-o", tmp_path / "grid.mp4", *SMALL, "--grid", 3, "--seed", 4)
    assert result.exit_code == 0, result.output
    grid = video.read(tmp_path / "grid.mp4")
    assert grid.shape == (3, 2 * 16, 2 * 32, 3)
    cells = [grid[:, :16, :32], grid[:, :16, 32:], grid[:, 16:, :32]]
    assert len({cell.tobytes() for cell in cells}) == 3
    inflate("sample", image_model, picture, "-o", tmp_path / "alone.mp4", *SMALL, "--seed", 5)
    alone = video.read(tmp_path / "alone.mp4")
    assert np.abs(alone.astype(int) - cells[1]).mean() < 8  # the codec's
    assert np.abs(alone.astype(int) - cells[0]).mean() > 8


def test_a_grid_of_several_prompts_has_a_row_for_each() -> None:
    clips = [np.full((1, 2, 3, 3), number, np.uint8) for number in range(6)]
    assert tiled(clips, 3)[0, ::2, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tiled(clips[:2], 1)[0, ::2, ::3, 0].tolist() == [[0], [1]]


def test_an_image_of_another_shape_is_cut_and_that_is_said(image_model: Path, tmp_path: Path) -> None:
    pixels = np.full((64, 16, 3), 200, np.uint8)
    pixels[:16], pixels[48:] = (0, 0, 255), (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "narrow.png")
    result = inflate("sample", image_model, tmp_path / "narrow.png", "-o", tmp_path / "out.mp4", *SMALL)
    shown = "32x16 about its centre are shown, 88% of it are cut off; --height and --width set another size"
    assert f"narrow.png is 16x64: {shown}\n" in result.stderr
    (tall,) = shooting.Shooting.at((16, 32), [], {tmp_path / "narrow.png": (64, 16)}, str).images.values()
    assert tall.shape == (16, 32, 3)
    assert (tall == 200).all()  # no bars, and nothing of the ends


def test_a_start_is_the_highest_noise_level_of_svd(image_model: Path) -> None:
    assert animation.SVDAnimator.load(str(image_model), {"start": 20.0}).settings.sigma_max == 20


def test_an_option_of_another_family_is_refused(image_model: Path, picture: Path, tmp_path: Path) -> None:
    common = ("sample", image_model, picture, "-o", tmp_path / "out.mp4")
    for option in ("--prompt", "--negative", "--eta", "--guidance", "--rescale"):
        said = refused(*common, option, 1)
        assert f"{option} is an option of dynamicrafter and i2vgen_xl, and {image_model} is of svd: leave it" in said
    for option in ("--stride", "--image-guidance"):
        said = refused(*common, option, 1)
        assert f"{option} is an option of dynamicrafter, and {image_model} is of svd: leave it out" in said
    assert "--loop is an option of dynamicrafter" in refused(*common, "--loop")
    assert "--end-image is an option of dynamicrafter" in refused(*common, "--end-image", picture)


def test_a_model_of_prompts_alone_is_told_of(picture: Path, tmp_path: Path) -> None:
    said = refused("sample", "pocket-t2v", picture, "-o", tmp_path / "out.mp4")
    assert 'inflate generate pocket-t2v "a prompt" -o out.mp4' in said
    said = refused("generate", "pocket-svd", "a disc", "-o", tmp_path / "out.mp4")
    assert "inflate sample pocket-svd IMAGE -o out.mp4" in said
    (tmp_path / "stream").mkdir()
    (tmp_path / "stream" / "image_stream.safetensors").touch()
    assert "is an image stream alone" in refused("sample", tmp_path / "stream", picture, "-o", tmp_path / "out.mp4")


STORY = """
- {image: picture.png}
- {previous: true, frames: 4, seed: 9}
- {image: picture.png, frames: 2}
"""


@pytest.fixture
def story(picture: Path) -> Path:
    """Three shots beside the picture."""
    (picture.parent / "story.yaml").write_text(STORY)
    return picture.parent / "story.yaml"


def test_a_story_is_one_video_with_a_sheet_and_a_page(image_model: Path, story: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    result = inflate("sample", image_model, "--story", story, "-o", output, *SMALL, "--fps", 4)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {output}\nwrote {tmp_path / 'out.png'}\nwrote {tmp_path / 'out.html'}\n"
    assert [line for line in result.stderr.splitlines() if line.startswith("shot")] == [
        "shot 1 of 3: picture.png", "shot 2 of 3: previous", "shot 3 of 3: picture.png",
    ]  # fmt: skip
    frames = video.read(output)
    assert frames.shape == (3 + (4 - 1) + 2, 16, 32, 3)
    inflate("sample", image_model, story.parent / "picture.png", "-o", tmp_path / "one.mp4", *SMALL, "--fps", 4)
    assert np.abs(video.read(tmp_path / "one.mp4").astype(int) - frames[:3]).mean() < 4  # the codec's
    page = (tmp_path / "out.html").read_text()
    assert "<td>0.00 to 0.75</td><td>0 to 2</td>" in page
    assert "<td>0.75 to 1.50</td><td>3 to 5</td><td>the shot before</td>" in page
    assert "<td>1.50 to 2.00</td><td>6 to 7</td>" in page


def test_a_story_refuses_what_is_of_a_single_shot(image_model: Path, story: Path, tmp_path: Path) -> None:
    common = ("sample", image_model, "--story", story, "-o", tmp_path / "out.mp4")
    assert "--prompt is not for a story" in refused(*common, "--prompt", "x")
    assert "--loop is not for a story" in refused(*common, "--loop")
    assert "--grid is not for a story" in refused(*common, "--grid", 2)
    said = refused("sample", image_model, tmp_path / "picture.png", *common[2:])
    assert "IMAGE is not for a story" in said
    (tmp_path / "out.html").write_text("")
    assert "out.html exists already" in refused(*common)
    assert "name IMAGE, the first frame, or a story" in refused("sample", image_model, "-o", tmp_path / "no.mp4")


def test_a_storys_mistakes_are_named_with_the_shot(image_model: Path, story: Path, tmp_path: Path) -> None:
    common = ("sample", image_model, "--story", story, "-o", tmp_path / "out.mp4")
    story.write_text("- {image: picture.png}\n- {image: nowhere.png}")
    assert f"shot 2 of {story}: image: {tmp_path / 'nowhere.png'}: no such file" in refused(*common)
    story.write_text("- {image: picture.png}\n- {image: picture.png, prompt: a storm}")
    assert f"shot 2 of {story}: prompt: {image_model} takes none: leave it out" in refused(*common)


def test_files_of_a_story_appear_together(
    image_model: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: Any) -> Path:
        raise DataError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(video, "contact_sheet", full)
    result = inflate("sample", image_model, "--story", story, "-o", tmp_path / "out.mp4", *SMALL)
    assert result.exit_code == 1
    assert "No space left" in result.stderr
    assert not [file for file in tmp_path.iterdir() if "out" in file.name]


def test_an_interrupted_story_keeps_the_shots_that_are_whole(
    image_model: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shooting.Shooting.in_turn

    def interrupted(self: shooting.Shooting, *rest: Any) -> Iterator[Any]:
        for number, clip in enumerate(whole(self, *rest)):
            if number == shots:
                raise KeyboardInterrupt
            yield clip

    monkeypatch.setattr(shooting.Shooting, "in_turn", interrupted)
    shots = 2
    result = inflate("sample", image_model, "--story", story, "-o", tmp_path / "out.mp4", *SMALL)
    assert result.exit_code == 130
    assert result.stderr.endswith(f"interrupted after 2 of 3 shots, which {tmp_path / 'out.mp4'} shows\n")
    assert video.probe(tmp_path / "out.mp4").frames == 6
    assert "<th>3</th>" not in (tmp_path / "out.html").read_text()
    shots = 0
    result = inflate("sample", image_model, "--story", story, "-o", tmp_path / "none.mp4", *SMALL)
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted after 0 of 3 shots\n")
    assert not [file for file in tmp_path.iterdir() if "none" in file.name]


def write_dynamicrafter(folder: Path, detail: bool = True, **clips: Any) -> Path:
    """An export whose `clips` were such ones."""
    made = family(folder / "parent", detail, Clips(**{"frames": FRAMES, "height": SIDE, "width": SIDE} | clips))
    made.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DynamiCrafter that is told frames per second, and was trained between two frames."""
    return write_dynamicrafter(tmp_path_factory.mktemp("prompted"), interpolation=True)


@pytest.fixture(scope="module")
def strided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DynamiCrafter that is told strides, and was not."""
    return write_dynamicrafter(tmp_path_factory.mktemp("strided"), told="stride", fps=5.0)


def write_adapter(model: Path, file: Path) -> Path:
    """A LoRA on a tiny DynamiCrafter, with random weights."""
    unet, wanted = DynamiCrafter.load(model).unet, AdapterSettings("lora", rank=1, targets=["attn1.to_v"])
    about = {"family": "dynamicrafter", "base": {"name": str(model), "sha256": bases.sha256(unet)}}
    attach.create(unet, wanted, targets.resolve(unet, wanted))
    randomise(unet)
    adapters.write(file, attach.carried(unet, wanted, about))
    return file


def drawn(*arguments: object) -> Result:
    result = inflate("sample", *arguments)
    assert result.exit_code == 0, result.output
    return result


def frames_of(*arguments: object) -> np.ndarray:
    """The frames of what `inflate sample MODEL IMAGE -o FILE ...` draws in two steps."""
    drawn(*arguments, "--steps", 2)
    return video.read(arguments[3])  # type: ignore[arg-type]


def test_every_option_of_dynamicrafter_acts(
    prompted: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = DynamiCrafter.load(prompted)
    monkeypatch.setattr(DynamiCrafter, "load", lambda _: loaded)

    def draw(*options: object) -> np.ndarray:
        return frames_of(prompted, picture, "-o", tmp_path / "out.mp4", "--overwrite", *options)

    plain = draw("--prompt", "a red disc")
    assert plain.shape == (3, 16, 16, 3)
    assert (plain == draw("--prompt", "a red disc")).all()
    for options in (
        ("--negative", "a blue box"), ("--eta", 0), ("--guidance", 2), ("--image-guidance", 2), ("--rescale", 0.9),
        ("--start", 500), ("--fps", 24), ("--seed", 1), ("--end-image", picture), ("--prompt", ""),
    ):  # fmt: skip
        changed = draw(*options) if "--prompt" in options else draw("--prompt", "a red disc", *options)
        assert (plain != changed).any(), options
    out = ("-o", tmp_path / "no.mp4")
    assert "--start is 0.5: it must be a whole number" in refused("sample", prompted, picture, *out, "--start", 0.5)


def test_prompts_have_a_row_each_and_seeds_a_column(prompted: Path, picture: Path, tmp_path: Path) -> None:
    prompts = ("--prompt", "a red disc", "--prompt", "a blue box", "--prompt", "a elephant")
    result = drawn(prompted, picture, "-o", tmp_path / "out.mp4", *prompts, "--grid", 2, "--steps", 2)
    assert "note: the model's text encoder does not know: elephant\n" in result.stderr
    grid = video.read(tmp_path / "out.mp4")
    assert grid.shape == (3, 3 * 16, 2 * 16, 3)
    alone = frames_of(prompted, picture, "-o", tmp_path / "one.mp4", *prompts[2:4], "--seed", 1)
    cells = [grid[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] for row in range(3) for column in (0, 1)]
    distances = [np.abs(alone.astype(int) - cell).mean() for cell in cells]
    assert distances.index(min(distances)) == 3


def test_a_loop_shows_its_first_frame_once(prompted: Path, picture: Path, tmp_path: Path) -> None:
    loop = frames_of(prompted, picture, "-o", tmp_path / "loop.mp4", "--loop")
    ends = frames_of(prompted, picture, "-o", tmp_path / "ends.mp4", "--end-image", picture)
    assert (len(loop), len(ends)) == (2, 3)
    assert np.abs(loop.astype(int) - ends[:2]).mean() < 2  # the codec's
    common = ("sample", prompted, picture, "-o", tmp_path / "out.mp4")
    assert "give one of them" in refused(*common, "--loop", "--end-image", picture)
    assert "--loop needs --frames of 3 or more" in refused(*common, "--loop", "--frames", 2)
    short = write_dynamicrafter(tmp_path, interpolation=True, frames=2)
    said = refused("sample", short, *common[2:], "--loop")  # a model's own length counts, too
    assert "--loop needs --frames of 3 or more, not 2" in said


def test_a_model_that_knows_no_last_frame_is_told_of(
    prompted: Path, strided: Path, picture: Path, tmp_path: Path
) -> None:
    note = f"note: {strided} was not trained to end on a given frame (clips.interpolation): it may miss it\n"
    ends = ("--end-image", picture, "--steps", 2)
    assert note in drawn(strided, picture, "-o", tmp_path / "a.mp4", *ends).stderr
    assert "was not trained" not in drawn(prompted, picture, "-o", tmp_path / "b.mp4", *ends).stderr
    blind = write_dynamicrafter(tmp_path, detail=False)
    assert "no last frame can be given to it" in refused("sample", blind, picture, "-o", tmp_path / "c.mp4", *ends)


def test_a_model_is_told_the_rate_or_the_stride(prompted: Path, strided: Path, picture: Path, tmp_path: Path) -> None:
    def fps(model: Path, **given: float) -> float:
        return animation.DynamiCrafterAnimator.load(str(model), given).fps

    assert [fps(prompted), fps(prompted, fps=12), fps(strided), fps(strided, stride=3)] == [8, 12, 5, 5]
    drawn(prompted, picture, "-o", tmp_path / "out.mp4", "--steps", 1, "--fps", 12, "--play-fps", 6)
    assert video.probe(tmp_path / "out.mp4").fps == 6
    common = ("-o", tmp_path / "no.mp4")
    assert "is told the stride of its clips: give --stride" in refused("sample", strided, picture, *common, "--fps", 8)
    assert "is told the fps of its clips: give --fps" in refused("sample", prompted, picture, *common, "--stride", 2)


def test_dynamicrafter_has_no_options_of_svd(prompted: Path, picture: Path, tmp_path: Path) -> None:
    common = ("sample", prompted, picture, "-o", tmp_path / "out.mp4")
    for option in ("--motion-bucket", "--noise-aug", "--guidance-min", "--guidance-max", "--image-model"):
        assert f"{option} is an option of svd, and {prompted} is of dynamicrafter" in refused(*common, option, 1)
    assert "inflate sample" in refused("generate", prompted, "a disc", "-o", tmp_path / "out.mp4")


def test_a_story_of_prompts_and_ends(prompted: Path, picture: Path, tmp_path: Path) -> None:
    Image.fromarray(np.full((24, 24, 3), 90, np.uint8)).save(tmp_path / "grey.png")
    (tmp_path / "story.json").write_text(
        '[{"image": "picture.png", "prompt": "a red disc", "end_image": "grey.png"},\n'
        ' {"image": "grey.png", "prompt": "a blue box", "frames": 4}, {"previous": true}]'
    )
    output = tmp_path / "out.mp4"
    result = drawn(prompted, "--story", tmp_path / "story.json", "-o", output, "--steps", 2)
    assert "shot 2 of 3: a blue box\n" in result.stderr
    assert video.probe(output).frames == 3 + (4 - 1) + (3 - 1)
    assert "<td>grey.png</td><td></td><td>a blue box</td><td>1</td>" in output.with_suffix(".html").read_text()


def test_compare_takes_prompts_of_images(prompted: Path, picture: Path, tmp_path: Path) -> None:
    adapter = write_adapter(prompted, tmp_path / "look.safetensors")
    common = (picture, "--adapter", adapter, "--steps", 1)
    prompts = ("--prompt", "a red disc", "--prompt", "a blue box")
    result = inflate("compare", prompted, *common, *prompts, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    clips = {path.name: path.read_bytes() for path in (tmp_path / "out" / "clips").iterdir()}
    assert len(clips) == len({*clips.values()}) == 4
    assert "<th>picture.png, a blue box, seed 0</th>" in (tmp_path / "out" / "index.html").read_text()
    assert "--prompt is for images" in refused(
        "compare", "pocket", "a disc", *common[1:], *prompts[:2], "-o", tmp_path / "no"
    )
