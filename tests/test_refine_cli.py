"""`inflate refine`, and `inflate sample` with I2VGen-XL and its refinement: files, options, mistakes."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from click.testing import Result
from clip_files import Pixels, busy, cut, numbered
from PIL import Image
from test_cli import image_model, inflate, refused
from tiny_i2vgen_xl import base, refiner
from tiny_video_ldm import FRAMES, SIDE

from inflate import refine_cli, refining
from inflate.adapters.settings import Weighted
from inflate.data import video
from inflate.data.video import Probe
from inflate.errors import ConfigError
from inflate.families.i2vgen_xl import I2VGenXL
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.refining import Refining
from inflate.sampling.refinement import PUBLISHED, Refinement

__all__ = ["image_model"]
LARGE = 2 * SIDE


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of both stages, of which the second's clips are twice as large."""
    folder = tmp_path_factory.mktemp("models")
    base(folder / "a").save_pretrained(folder / "base")
    refiner(folder / "b").save_pretrained(folder / "refiner")
    return folder / "base", folder / "refiner"


@pytest.fixture
def stage(models: tuple[Path, Path]) -> Path:
    return models[0]


@pytest.fixture
def second(models: tuple[Path, Path]) -> Path:
    return models[1]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Five frames of 24x16."""
    return video.write(tmp_path / "clip.mp4", busy(5, 16, 24), 6)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)
    return path


def done(*arguments: object) -> Result:
    result = inflate(*arguments)
    assert result.exit_code == 0, result.output
    return result


def frames(*arguments: object) -> Pixels:
    """The frames that a command writes to its `-o`, in two steps."""
    done(*arguments, "--steps", 2)
    return video.read(arguments[arguments.index("-o") + 1])  # type: ignore[arg-type]


# --- inflate refine ---------------------------------------------------------------------------------------------------


def test_a_video_is_refined_at_its_rate_and_in_its_shape(second: Path, clip: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.mp4"
    result = done("refine", clip, "--model", second, "--prompt", "a red elephant", "-o", output, "--steps", 2)
    assert result.stdout == f"wrote {output}\nwrote {output.with_suffix('.png')}\n"
    assert "does not know: elephant\n" in result.stderr
    found = video.probe(output)
    assert (found.frames, found.fps) == (5, 6)
    assert (found.height, found.width) == (26, 40)  # 3 to 2, of about the area of 32x32
    with Image.open(output.with_suffix(".png")) as sheet:
        assert sheet.height >= 2 * 26
    assert not [file for file in output.parent.iterdir() if file.name.startswith(".")]


def test_the_whole_command_line_arrives(
    second: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def write(self: Refining, *given: Any) -> None:
        seen.append((self.settings, *given[2:]))

    monkeypatch.setattr(Refining, "write", write)
    options = {
        "strength": 0.5, "steps": 3, "guidance": 4.0, "rescale": 0.1, "eta": 0.3, "negative": "grey",
        "suffix": ", sharp", "window": 3, "overlap": 2, "start": "inversion",
        "keep_colours": 3,
    }  # fmt: skip
    named = {"window": "frames-at-once", "negative": "negative-prompt", "keep_colours": "keep-colours"}
    words = [word for name, value in options.items() for word in (f"--{named.get(name, name)}", value)]
    flags = ("--no-freeu", "--double-frames", "--little-memory", "--height", 30, "--width", 40, "--seed", 7)
    done("refine", clip, "--model", second, "--prompt", "a disc", "-o", tmp_path / "out.mp4", *words, *flags)
    flagged = {"freeu": False, "double_frames": True, "little_memory": True}
    expected = replace(PUBLISHED["inversion"], **options, **flagged)
    assert seen == [(expected, "a disc", 7, (30, 40), tmp_path / "out.mp4")]


def test_what_is_not_given_is_as_published(second: Path) -> None:
    assert Refining.load(str(second), {}).settings == Refinement()
    assert Refining.load(str(second), {"start": "inversion"}).settings == PUBLISHED["inversion"]


def test_help_tells_the_published_settings() -> None:
    hints = inspect.get_annotations(refine_cli.refine.__wrapped__)  # type: ignore[attr-defined]
    told = {name: hint.__metadata__[0].help for name, hint in hints.items() if hasattr(hint, "__metadata__")}
    for name in ("strength", "steps", "guidance", "rescale", "eta"):
        assert f"[default: {getattr(Refinement(), name):g}" in told[name]
    for name in ("guidance", "rescale"):
        assert f"of an inversion {getattr(PUBLISHED['inversion'], name):g}]" in told[name]
    for name in ("start", "strength"):
        assert f" {PUBLISHED['inversion'].levels} " in told[name]


def test_options_change_the_video(second: Path, clip: Path, tmp_path: Path) -> None:
    common = ("refine", clip, "--model", second, "-o", tmp_path / "out.mp4", "--overwrite")
    plain = frames(*common)
    assert (plain == frames(*common)).all()
    for options in (
        ("--prompt", "a disc"),
        ("--seed", 1),
        ("--start", "inversion"),
        ("--frames-at-once", 2),
        ("--keep-colours", 1),
    ):
        changed = frames(*common, *options)
        assert changed.shape == plain.shape
        assert (plain != changed).any(), options
    assert frames(*common, "--height", 22, "--width", 30).shape[1:3] == (22, 30)


def test_without_strength_a_video_is_enlarged_alone(second: Path, clip: Path, tmp_path: Path) -> None:
    flat = video.write(tmp_path / "flat.mp4", numbered(5, 16, 24), 6)
    found = frames("refine", flat, "--model", second, "-o", tmp_path / "out.mp4", "--strength", 0)
    loaded = Refining.load(str(second), {"strength": 0.0})
    expected = np.concatenate([*loaded.draw([video.read(flat)], "", 0, (26, 40))])
    assert (found == video.read(video.write(tmp_path / "expected.mp4", expected, 6))).all()


@pytest.mark.parametrize("levels", [0, 2])
def test_parts_of_a_video_are_the_whole(second: Path, clip: Path, levels: int) -> None:
    given = {"steps": 1, "window": 4, "keep_colours": levels}
    loaded, whole = Refining.load(str(second), given), video.read(clip)
    drawn = [
        np.concatenate([*loaded.draw(parts, "a disc", 3, (20, 32))]) for parts in ([whole], [whole[:1], whole[1:]])
    ]
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1


def test_the_sheet_shows_frames_before_and_after(second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Pixels] = []
    monkeypatch.setattr(video, "contact_sheet", lambda path, shown, *_: (rows.extend(shown), path.touch()))
    monkeypatch.setattr(refining, "TOGETHER", 3)
    long = video.write(tmp_path / "long.mp4", numbered(20, 16, 16), 10)
    done("refine", long, "--model", second, "-o", tmp_path / "out.mp4", "--strength", 0)
    assert [row.shape for row in rows] == [(8, LARGE, LARGE, 3)] * 2
    brightness = rows[0].mean((1, 2, 3))
    numbers = np.linspace(0, 19, 8).round()
    np.testing.assert_allclose(brightness, 16 + 8 * numbers, atol=3)


def test_what_a_video_loses_is_said(second: Path, clip: Path, tmp_path: Path) -> None:
    spoken = tmp_path / "spoken.mp4"
    add_sound(clip, spoken)
    result = done("refine", spoken, "--model", second, "-o", tmp_path / "a.mp4", "--strength", 0)
    assert f"note: {spoken} has sound, which is not kept\n" in result.stderr
    assert not video.has_sound(tmp_path / "a.mp4")
    result = done("refine", clip, "--model", second, "-o", tmp_path / "b.mp4", "--strength", 0)
    assert "note" not in result.stderr
    uneven = replace(video.probe(clip), variable=True)
    assert refine_cli._notes(clip, uneven, (16, 16)) == [
        f"{clip} is 24x16 and becomes smaller, 16x16; --height and --width set another size",
        f"{clip} has another shape than 16x16: 33% of it are cut off",
        f"{clip} has no constant frame rate: its frames are shown evenly, 6 a second",
    ]


def test_colours_of_high_range_are_told_of(clip: Path, tmp_path: Path) -> None:
    for transfer, told in ((1, []), (16, ["high dynamic range"]), (18, ["high dynamic range"])):
        file = tmp_path / f"{transfer}.mp4"
        with av.open(str(file), "w") as container:
            stream = container.add_stream("libx264", rate=6)
            stream.height, stream.width, stream.pix_fmt = 16, 24, "yuv420p"
            stream.codec_context.color_trc = transfer
            for pixels in video.read(clip):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        found = refine_cli._notes(file, video.probe(file), (16, 24))
        assert [each in note for each, note in zip(told, found, strict=True)] == [True] * len(told)


def add_sound(source: Path, target: Path) -> None:
    """The frames of a video, and a second of silence."""
    with av.open(str(target), "w") as container:
        picture, sound = container.add_stream("libx264", rate=6), container.add_stream("aac", rate=8000)
        picture.height, picture.width = 16, 24
        for pixels in video.read(source):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux([*sound.encode(silence), *sound.encode(), *picture.encode()])


def test_an_interrupted_refinement_leaves_nothing(
    second: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Refining.draw

    def interrupted(self: Refining, *given: Any) -> Any:
        for number, part in enumerate(whole(self, *given)):
            yield part[:1]
            if not number:
                raise KeyboardInterrupt

    monkeypatch.setattr(Refining, "draw", interrupted)
    (tmp_path / "out.mp4").write_bytes(b"old")
    common = ("refine", clip, "--model", second, "--strength", 0, "-o", tmp_path / "out.mp4")
    assert inflate(*common, "--overwrite").exit_code == 130
    assert (tmp_path / "out.mp4").read_bytes() == b"old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip.mp4", "out.mp4"]


def test_files_that_are_no_videos_are_named_before_a_model_is_loaded(clip: Path, picture: Path, tmp_path: Path) -> None:
    common = ("--model", "./nowhere", "-o", tmp_path / "out.mp4")
    said = refused("refine", picture, *common)
    assert f"{picture} is an image, and videos are refined: animate it by inflate sample MODEL {picture}" in said
    assert "missing.mp4: no such file" in refused("refine", tmp_path / "missing.mp4", *common)
    (tmp_path / "empty.mp4").touch()
    assert "empty.mp4: the file is empty" in refused("refine", tmp_path / "empty.mp4", *common)
    (tmp_path / "text.mp4").write_text("words")
    assert "text.mp4: not a readable video" in refused("refine", tmp_path / "text.mp4", *common)
    short = cut(video.write(tmp_path / "short.mp4", busy(20), 8), 0.6)
    assert "short.mp4: " in refused("refine", short, *common)
    assert "./nowhere does not exist" in refused("refine", clip, *common)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--height", 16), "--height and --width: give both or neither"),
        (("--height", 20, "--width", 77), "--width is 77: the sides of a video are even; give 78"),
        (("--guidance", 1, "--negative", "x"), "--negative cannot act without guidance"),
        (("--guidance", "nan"), "--guidance is nan"),
        (("--height", 2, "--width", 32), "height 2 and width 32: this model needs at least 4 of each"),
        (("--frames-at-once", 2, "--overlap", 2), "overlap is 2: it must be 0 to 1"),
    ],
)
def test_what_cannot_be_refined_is_refused(
    options: tuple[object, ...], message: str, second: Path, clip: Path, tmp_path: Path
) -> None:
    assert message in refused("refine", clip, "--model", second, "-o", tmp_path / "out.mp4", *options)
    assert not (tmp_path / "out.mp4").exists()


def test_a_shape_that_leaves_a_side_too_small_is_told_of(second: Path) -> None:
    loaded = Refining.load(str(second), {})
    flat = Probe(5, 8.0, 4000, 2, 0, (), None, variable=False)
    with pytest.raises(ConfigError, match=r"flat.mp4 is 4000x2: .*needs at least 4 of each; give --height and --width"):
        refine_cli._checked(loaded, None, Path("flat.mp4"), flat)


def test_models_of_other_kinds_are_sent_to_their_commands(
    stage: Path, second: Path, clip: Path, picture: Path, tmp_path: Path
) -> None:
    out = ("-o", tmp_path / "out.mp4")
    said = refused("refine", clip, "--model", stage, *out)
    assert f"{stage} is of i2vgen_xl and refines no clips, as i2vgen_xl_refiner does; inflate sample draws" in said
    assert "inflate generate draws with it" in refused("refine", clip, "--model", "pocket-t2v", *out)
    assert "pocket says no family" in refused("refine", clip, "--model", "pocket", *out)
    for command in (("sample", second, picture), ("generate", second, "a disc")):
        said = refused(*command, *out)
        assert f"{second} is of i2vgen_xl_refiner, which refines clips that there are: inflate refine VIDEO" in said
    assert "inflate sample" in refused("generate", stage, "a disc", *out)
    assert "refines no clips" in refused("sample", stage, picture, *out, "--refine", stage)


# --- inflate sample ---------------------------------------------------------------------------------------------------


def test_i2vgen_xl_animates_an_image_by_a_prompt(stage: Path, picture: Path, tmp_path: Path) -> None:
    common = ("sample", stage, picture, "-o", tmp_path / "out.mp4", "--overwrite", "--prompt", "a red disc")
    plain = frames(*common)
    assert plain.shape == (FRAMES, SIDE, SIDE, 3)
    assert video.probe(tmp_path / "out.mp4").fps == 8
    for options in (
        ("--negative-prompt", "a blue box"), ("--eta", 1), ("--guidance", 2), ("--rescale", 0.9), ("--start", 500),
        ("--fps", 24), ("--seed", 1),
    ):  # fmt: skip
        assert (plain != frames(*common, *options)).any(), options
    assert "--start is 0.5: it must be a whole number" in refused(*common, "--start", 0.5)
    assert "no prompt" not in done(*common, "--steps", 1).stderr
    said = done(*common[:-2], "--negative", "a box", "--steps", 1).stderr
    assert "note: no prompt: the model is told the empty one\n" in said
    for option in ("--stride", "--image-guidance"):
        assert f"{option} is an option of dynamicrafter, and {stage} is of i2vgen_xl" in refused(*common, option, 1)


def test_prompts_have_a_row_each_and_longer_clips_a_note(stage: Path, picture: Path, tmp_path: Path) -> None:
    prompts = ("--prompt", "a red disc", "--prompt", "a elephant", "--grid", 2, "--steps", 1)
    result = done("sample", stage, picture, "-o", tmp_path / "out.mp4", *prompts, "--frames", 4)
    assert video.read(tmp_path / "out.mp4").shape == (4, 2 * SIDE, 2 * SIDE, 3)
    assert "does not know: elephant\n" in result.stderr
    assert f"note: {stage} was trained on clips of 3 frames, and tells each its place" in result.stderr


def test_a_story_of_prompts_goes_on_from_the_last_frame(stage: Path, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "story.yaml").write_text("- {image: picture.png, prompt: a disc}\n- {previous: true, prompt: a box}")
    done("sample", stage, "--story", tmp_path / "story.yaml", "-o", tmp_path / "out.mp4", "--steps", 1)
    assert video.probe(tmp_path / "out.mp4").frames == 2 * FRAMES - 1


def test_a_model_without_prompts_refuses_them(
    stage: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = I2VGenXL.load(stage)
    loaded.clips = replace(loaded.clips, prompts=False)
    monkeypatch.setattr(I2VGenXL, "load", lambda _: loaded)
    common = ("sample", stage, picture, "-o", tmp_path / "out.mp4")
    assert "is told images alone: leave the prompts out" in refused(*common, "--prompt", "a disc")
    assert frames(*common).shape == (FRAMES, SIDE, SIDE, 3)


def test_clips_are_drawn_and_refined_at_one_go(stage: Path, second: Path, picture: Path, tmp_path: Path) -> None:
    output, plain = tmp_path / "out.mp4", tmp_path / "out-base.mp4"
    prompts = ("--prompt", "a red disc", "--grid", 2, "--steps", 1)
    result = done("sample", stage, picture, "-o", output, *prompts, "--refine", second, "--strength", 0.1)
    files = [file for each in (plain, output) for file in (each, each.with_suffix(".png"))]
    assert result.stdout == "".join(f"wrote {file}\n" for file in files)
    assert video.read(plain).shape == (FRAMES, SIDE, 2 * SIDE, 3)
    assert list(dict.fromkeys(re.findall(r"(\w+): 100%", result.stderr))) == ["sampling", "refining"]
    refined = video.read(output)
    assert refined.shape == (FRAMES, LARGE, 2 * LARGE, 3)
    again = inflate("sample", stage, picture, "-o", output, *prompts, "--refine", second)
    assert "out.mp4 exists already" in again.stderr
    output.unlink()
    assert "out-base.mp4 exists already" in refused("sample", stage, picture, "-o", output, "--refine", second)


def test_each_clip_of_a_grid_is_refined_by_its_prompt_and_seed(
    stage: Path, second: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    whole = Refining.draw

    def watched(self: Refining, parts: Any, *given: Any) -> Any:
        seen.append((*given, self.settings))
        return whole(self, parts, *given)

    monkeypatch.setattr(Refining, "draw", watched)
    size = ("--refine-height", 20, "--refine-width", 24, "--strength", 0, "--at-once")
    how = ("--refine-start", "inversion", "--refine-steps", 3, "--refine-guidance", 2)
    prompts = ("--prompt", "a disc", "--prompt", "a box", "--grid", 2, "--seed", 5, "--steps", 1)
    done("sample", stage, picture, "-o", tmp_path / "out.mp4", *prompts, "--refine", second, *size, *how)
    wanted = replace(PUBLISHED["inversion"], strength=0.0, steps=3, guidance=2.0, little_memory=False)
    assert seen == [(prompt, seed, (20, 24), wanted) for prompt in ("a disc", "a box") for seed in (5, 6)]
    assert video.read(tmp_path / "out.mp4").shape == (FRAMES, 40, 48, 3)


def test_options_of_a_refinement_belong_to_one(stage: Path, second: Path, picture: Path, tmp_path: Path) -> None:
    common = ("sample", stage, picture, "-o", tmp_path / "out.mp4")
    assert "--strength is of a refinement: name its model by --refine" in refused(*common, "--strength", 0.5)
    assert "--refine-height and --refine-width: give both" in refused(*common, "--refine-height", 20)
    assert "--refine-height is 21: the sides" in refused(*common, "--refine-height", 21, "--refine-width", 20)
    for idle in (("--refine-start", "noise"), ("--refine-steps", 3), ("--refine-guidance", 2)):
        assert f"{idle[0]} is of a refinement: name its model by --refine" in refused(*common, *idle)
    said = refused(*common, "--refine", second, "--refine-guidance", "nan")
    assert "--refine-guidance is nan: it must be a finite number" in said
    (tmp_path / "story.yaml").write_text("- {image: picture.png}\n- {previous: true}")
    story = ("sample", stage, "--story", tmp_path / "story.yaml", "-o", tmp_path / "out.mp4")
    assert "--refine is not for a story: draw it, then refine the video" in refused(*story, "--refine", second)


def test_one_model_is_gone_before_the_other_is_loaded(
    stage: Path, second: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    loaded: list[Any] = []
    first, then = I2VGenXL.load, Refiner.load

    def load_first(path: Any) -> I2VGenXL:
        made = first(path)
        loaded.append(weakref.ref(made.unet))
        return made

    def load_second(path: Any) -> Refiner:
        gc.collect()
        assert [one() for one in loaded] == [None]
        return then(path)

    monkeypatch.setattr(I2VGenXL, "load", load_first)
    monkeypatch.setattr(Refiner, "load", load_second)
    out = ("-o", tmp_path / "out.mp4", "--steps", 1)
    done("sample", stage, picture, *out, "--refine", second, "--strength", 0)
    assert len(loaded) == 1


def test_both_stages_are_cast_and_the_first_alone_adapted(
    stage: Path, second: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from inflate import sample_cli

    adapted: list[tuple[type, list[Weighted], str | None]] = []

    def adapt(family: Any, wanted: list[Weighted], any_base: bool, dtype: str | None) -> None:
        adapted.append((type(family), wanted, dtype))

    monkeypatch.setattr(sample_cli, "adapt", adapt)
    look = tmp_path / "look.safetensors"
    look.touch()
    out = ("-o", tmp_path / "out.mp4", "--steps", 1, "--adapter", look, "--dtype", "bfloat16")
    done("sample", stage, picture, *out, "--refine", second, "--strength", 0)
    assert adapted == [(I2VGenXL, [Weighted.parse(str(look))], "bfloat16"), (Refiner, [], "bfloat16")]


def test_a_negative_prompt_is_of_both_stages(
    stage: Path, second: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    load = Refining.load

    def watched(path: str, given: Any) -> Refining:
        asked.append(given)
        return load(path, given)

    monkeypatch.setattr(Refining, "load", watched)
    options = ("--negative-prompt", "a box", "--steps", 1, "--strength", 0)
    done("sample", stage, picture, "-o", tmp_path / "out.mp4", "--refine", second, *options)
    assert asked == [{"strength": 0.0, "negative": "a box"}]


def test_prompts_go_to_the_refinement_alone_where_the_base_is_told_none(
    stage: Path, image_model: Path, second: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "silent"
    loaded = I2VGenXL.load(stage)
    loaded.clips = replace(loaded.clips, prompts=False)
    loaded.save_pretrained(silent)
    told: list[str] = []
    whole = Refining.draw
    monkeypatch.setattr(
        Refining, "draw", lambda self, parts, *given: (told.append(given[0]), whole(self, parts, *given))[1]
    )
    options = ("--prompt", "a disc", "--negative", "a box", "--frames", 2, "--steps", 1, "--strength", 0)
    for number, (first, size) in enumerate(((silent, ()), (image_model, ("--height", 16, "--width", 32)))):
        out = ("-o", tmp_path / f"{number}.mp4")
        done("sample", first, picture, *out, *options, *size, "--refine", second)
    assert told == ["a disc", "a disc"]
    assert "leave" in refused("sample", silent, picture, "-o", tmp_path / "x.mp4", "--prompt", "a disc")


def test_noise_of_levels_that_were_not_trained_is_told_of(second: Path) -> None:
    assert Refining.load(str(second), {"start": "inversion", "strength": 0.5}).notes([]) == []
    assert Refining.load(str(second), {}).notes([]) == []
    (told,) = Refining.load(str(second), {"start": "inversion"}).notes([])
    assert told == f"{second} was trained on 600 noise levels, and 700 are drawn anew: --strength 0.857 keeps to them"


def test_clips_of_another_family_are_refined_without_a_prompt(
    image_model: Path, second: Path, picture: Path, tmp_path: Path
) -> None:
    size = ("--frames", 2, "--steps", 1, "--height", 16, "--width", 32)
    out = ("-o", tmp_path / "out.mp4")
    assert (
        "no prompt"
        not in done("sample", image_model, picture, *out, *size, "--refine", second, "--strength", 0.01).stderr
    )
    assert video.read(tmp_path / "out.mp4").shape == (2, 22, 46, 3)
