"""Reading settings: what is accepted, what is refused, and where the message says the mistake is."""

from __future__ import annotations

import enum
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from inflate.config import check, dump, from_command_line, help_text, load, parse, renewed, report_errors
from inflate.errors import ConfigError, Interrupted, TrainingError


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Objective:
    """A frozen group."""

    P_mean: float = 0.0
    """mean of the log noise level"""
    P_std: float = 1.2


@dataclass
class Base:
    seed: int = 0
    """of everything"""


@dataclass
class Training(Base):
    lr: float = 1e-4
    """learning rate
    after the warm-up"""
    steps: int = 10
    precision: Literal["no", "bf16", "fp16"] = "no"
    resume: str | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    output: Path = Path("output")
    ema: bool = False
    milestones: list[int] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    colour: Colour = Colour.RED
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, not {self.steps}")
        if self.lr < 0:
            raise ConfigError("training.lr must not be negative")


@dataclass
class Data:
    path: str
    """folder of clips"""
    frames: int = 14


@dataclass
class Config:
    data: Data
    stage: Literal["decoder", "image_to_video"] = "decoder"
    objective: Objective = Objective(P_mean=0.7)
    training: Training = field(default_factory=Training)
    preview: Objective | None = None

    def __post_init__(self) -> None:
        if self.stage == "decoder" and self.data.frames == 13:
            raise ValueError("stage=decoder cannot take data.frames=13")


PATH = "data.path=clips"


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return str(file)


def refused(*sources: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(Config, sources)
    return str(caught.value)


def test_defaults_files_and_arguments_from_left_to_right(tmp_path: Path) -> None:
    first = write(tmp_path, "training:\n  lr: 1e-3\n  steps: 5\ndata:\n  path: a\n", "a.yaml")
    second = write(tmp_path, "training:\n  steps: 6\n", "b.yaml")
    config = load(Config, ["training.steps=1", second, "data.path=b", first, "training.lr=2e-3"])
    assert (config.training.steps, config.data.path, config.training.lr) == (5, "a", 2e-3)
    assert load(Config, [first, second]).training.steps == 6


def test_the_defaults_file_lies_below_every_source(tmp_path: Path) -> None:
    defaults = tmp_path / "recipe.yaml"
    defaults.write_text("data:\n  path: demo\ntraining:\n  steps: 3\n")
    config = load(Config, ["training.steps=4"], defaults)
    assert (config.data.path, config.training.steps) == ("demo", 4)


@pytest.mark.parametrize("flag", [["--config", "FILE"], ["--config=FILE"], ["FILE"]])
def test_config_is_an_alias_of_the_file_itself(tmp_path: Path, flag: list[str]) -> None:
    file = write(tmp_path, "training: {steps: 7}\n")
    assert load(Config, [PATH, *(part.replace("FILE", file) for part in flag)]).training.steps == 7


def test_a_partial_group_builds_over_the_recipes_instance_of_it() -> None:
    assert load(Config, [PATH, "objective.P_std=2"]).objective == Objective(P_mean=0.7, P_std=2.0)


def test_an_optional_group_is_switched_on_and_off(tmp_path: Path) -> None:
    assert load(Config, [PATH]).preview is None
    assert load(Config, [PATH, "preview.P_std=3"]).preview == Objective(P_std=3.0)
    assert load(Config, [PATH, "preview.P_std=3", "preview=null"]).preview is None
    assert load(Config, [PATH, "preview=null", "preview.P_std=3"]).preview == Objective(P_std=3.0)
    assert load(Config, [PATH, write(tmp_path, "preview: {}\n")]).preview == Objective()


@pytest.mark.parametrize(
    ("argument", "name", "expected"),
    [
        ("lr=1e-5", "lr", 1e-5),
        ("lr=1E5", "lr", 1e5),
        ("lr=3", "lr", 3.0),
        ("steps=12", "steps", 12),
        ("ema=true", "ema", True),
        ("precision=no", "precision", "no"),
        ("resume=1e-5", "resume", "1e-5"),
        ("resume=007", "resume", "007"),
        ("resume=latest", "resume", "latest"),
        ("resume=null", "resume", None),
        ("resume=", "resume", None),
        ("resume='null'", "resume", "null"),
        ("resume=*.mp4", "resume", "*.mp4"),
        ("resume=a: b # c", "resume", "a: b # c"),
        ("output=a=b/c.yaml", "output", Path("a=b/c.yaml")),
        ("betas=[0.5, 1]", "betas", (0.5, 1.0)),
        ("milestones=[1, 2]", "milestones", [1, 2]),
        ("weights={l1: 1}", "weights", {"l1": 1.0}),
        ("colour=BLUE", "colour", Colour.BLUE),
        ("limit=1e-2", "limit", 1e-2),
    ],
)
def test_values_become_the_fields_type(argument: str, name: str, expected: object) -> None:
    value = getattr(load(Config, [PATH, f"training.{argument}"]).training, name)
    assert value == expected
    assert type(value) is type(expected)


def test_text_in_a_file_stays_as_it_was_written(tmp_path: Path) -> None:
    file = write(tmp_path, "training: {precision: no, resume: 007, limit: 1e-5}\ndata: {path: 2024-01-01}\n")
    config = load(Config, [file])
    assert (config.training.precision, config.training.resume, config.data.path) == ("no", "007", "2024-01-01")
    assert config.training.limit == 1e-5


def test_an_unknown_setting_in_a_file_names_the_line_and_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path, "data:\n  path: x\ntraining:\n  steps: 1\n  lrr: 1\n")
    assert refused(file) == f"{file}:5: unknown setting training.lrr; did you mean training.lr?"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("trainig.lr=1", "argument trainig.lr=1: unknown setting trainig.lr; did you mean training.lr?"),
        ("lr=1", "argument lr=1: unknown setting lr; did you mean training.lr?"),
        ("model.frames=1", "argument model.frames=1: unknown setting model.frames; did you mean data.frames?"),
        ("training.lr.x=1", "argument training.lr.x=1: unknown setting training.lr.x; did you mean training.lr?"),
        ("zzz=1", "argument zzz=1: unknown setting zzz"),
    ],
)
def test_an_unknown_argument_names_itself_and_the_nearest(argument: str, message: str) -> None:
    assert refused(PATH, argument) == message


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("lr=fast", "a float, not 'fast'"),
        ("steps=1.5", "an int, not '1.5'"),
        ("steps=true", "an int, not 'true'"),
        ("ema=3", "true or false, not '3'"),
        ("precision=fp8", "one of no, bf16, fp16, not 'fp8'"),
        ("colour=GREEN", "one of RED, BLUE, not 'GREEN'"),
        ("betas=[1]", "a list [a float, a float], not '[1]'"),
        ("betas=[1", "a list [a float, a float], not '[1'"),
        ("milestones=[a]", "a list of an int, not '[a]'"),
        ("limit=x", "a float or null, not 'x'"),
        ("lr=null", "a float, not 'null'"),
        ("weights=1", "dict[str, float], not '1'"),
        ("lr=!!python/name:os.system x", "a float, not '!!python/name:os.system x'"),
    ],
)
def test_a_wrong_type_says_what_is_wanted(argument: str, wanted: str) -> None:
    name = argument.split("=")[0]
    assert refused(PATH, f"training.{argument}") == f"argument training.{argument}: training.{name} must be {wanted}"


def test_a_wrong_type_in_a_file_names_the_line(tmp_path: Path) -> None:
    file = write(tmp_path, "# a comment\ntraining:\n  lr: [1,\n    2]\n")
    assert refused(file) == f"{file}:3: training.lr must be a float, not a sequence"


def test_one_value_for_a_group_is_refused(tmp_path: Path) -> None:
    assert "data is a group of settings (path, frames), not one value" in refused("data=clips")
    file = write(tmp_path, "data:\ntraining: {steps: 1}\n")
    assert refused(file).startswith(f"{file}:1: data is a group of settings")


def test_every_missing_setting_is_named() -> None:
    assert refused() == "data.path is not set: give data.path=... (text)"
    assert refused("data.path=???") == "data.path is not set: give data.path=... (text)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [\n", ":2: not valid YAML"),
        ("a: b: c\n", ":1: not valid YAML"),
        ("- 1\n", ": expected lines of `setting: value`"),
        ("training:\n  lr: 1\n  lr: 2\n", ":3: training.lr is set twice"),
        ("training:\n  lr: &a 1\n  steps: *b\n", ":3: not valid YAML"),
        ("training:\n  resume: ${oc.env:HOME}\n", ":2: training.resume holds '${'"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    assert refused(file).startswith(file + message)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, "", "temporal.yaml")
    near = str(tmp_path / "temporl.yaml")
    assert refused(near) == f"{near}: no such file; did you mean {tmp_path / 'temporal.yaml'}?"
    assert refused("training") == "training: no such file; settings are written key=value"
    assert "cannot be read as a YAML file" in refused(str(tmp_path))
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as a YAML file" in refused(str(binary))
    assert "--lr=1: settings are written key=value" in refused("--lr=1")
    assert "--config: name a YAML file" in refused("--config")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    file = write(tmp_path, "# nothing\n")
    assert load(Config, [PATH, file]) == load(Config, [PATH])


def test_checks_across_fields_are_config_errors() -> None:
    assert refused(PATH, "training.steps=-1") == "training: steps must not be negative, not -1"
    assert refused(PATH, "training.lr=-1") == "training.lr must not be negative"
    assert refused(PATH, "data.frames=13") == "stage=decoder cannot take data.frames=13"


def test_check_needs_no_complete_settings(tmp_path: Path) -> None:
    check(Config, [write(tmp_path, "training: {steps: 2}\n")])
    with pytest.raises(ConfigError, match="unknown setting training.step;"):
        check(Config, ["training.step=2"])


def test_a_dump_is_a_source_of_the_same_settings(tmp_path: Path) -> None:
    arguments = ["data.path=no", "training.resume='1e-5'", "training.lr=1e-9", "training.output=007", "preview.P_std=3"]
    lists = ["training.milestones=[1]", "training.weights={l1: 2}", "training.colour=BLUE", "training.precision=no"]
    config = load(Config, arguments + lists)
    assert config.training.weights == {"l1": 2.0}
    text = dump(config)
    assert load(Config, [write(tmp_path, text)]) == config
    assert dump(load(Config, [write(tmp_path, text)])) == text


def test_loading_leaves_the_defaults_alone() -> None:
    load(Config, [PATH, "training.milestones=[1]", "objective.P_mean=9", "training.weights={a: 1}"])
    again = load(Config, [PATH])
    assert (again.training.milestones, again.training.weights, again.objective.P_mean) == ([], {}, 0.7)


def test_help_is_the_defaults_with_each_fields_docstring() -> None:
    text = help_text(Config)
    assert "  path: ???  # required, text; folder of clips" in text
    assert "stage: decoder  # one of decoder, image_to_video" in text
    assert "  lr: 0.0001  # learning rate after the warm-up" in text
    assert "  seed: 0  # of everything" in text
    assert "  P_mean: 0.7  # mean of the log noise level" in text
    assert "  precision: 'no'" in text


def test_help_is_itself_a_source(tmp_path: Path) -> None:
    file = write(tmp_path, help_text(Config))
    assert load(Config, [file, PATH]) == load(Config, [PATH])


def test_the_command_line_prints_help_with_the_recipes_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = Path(write(tmp_path, "data: {path: demo}\n"))
    with pytest.raises(SystemExit) as caught:
        from_command_line(Config, defaults, ["--help"])
    assert caught.value.code == 0
    assert "  path: demo  # folder of clips" in capsys.readouterr().out


def test_the_command_line_reports_an_error_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        from_command_line(Config, None, ["data.pth=x"])
    output = capsys.readouterr()
    assert caught.value.code == 1
    assert output.out == ""
    assert output.err == "error: argument data.pth=x: unknown setting data.pth; did you mean data.path?\n"


def noted(error: BaseException) -> BaseException:
    error.add_note("a note")
    return error


@pytest.mark.parametrize(
    ("raised", "status", "told"),
    [
        (TrainingError("a"), 1, "error: a\n"),
        (noted(TrainingError("two clips:\nb.mp4\n  c.mp4\n")), 1, "error: two clips:\n  b.mp4\n  c.mp4\n  a note\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (noted(Interrupted(signal.SIGTERM)), 143, "SIGTERM again: stopped at once\n  a note\n"),
    ],
)
def test_report_errors_tells_every_line_and_ends_with_a_status(
    raised: BaseException, status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @report_errors()
    def fail() -> None:
        raise raised

    with pytest.raises(SystemExit) as caught:
        fail()
    assert caught.value.code == status
    assert capsys.readouterr().err == told


def test_a_part_of_the_settings_is_read_from_whole_files(tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text("seed: 3\nstage: demo\nmodel: {path: x}\nstages.two: 1\n")
    assert load(Base, [str(file), "seed=4"], partial=True) == Base(seed=4)
    with pytest.raises(ConfigError, match="unknown setting stage"):
        load(Base, [str(file)])
    with pytest.raises(ConfigError, match="argument sed=4: unknown setting sed; did you mean seed"):
        load(Base, ["sed=4"], partial=True)
    with pytest.raises(ConfigError, match=r"argument training\.steps=4: training is not read here.*leave it out"):
        load(Base, ["training.steps=4"], partial=True)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("daat.frames=4", r"unknown setting daat\.frames; did you mean data\.frames"),
        ("modle.frames=4", r"unknown setting modle\.frames; did you mean model\.frames"),
        ("text_model.frames=4", "text_model is not read here"),
        ("el.frames=4", "el is not read here"),
    ],
)
def test_a_misspelt_group_is_told_from_another_that_is_not_read(argument: str, told: str) -> None:
    @dataclass
    class Part:
        data: Data
        model: Data
        image_text_model: Data

    with pytest.raises(ConfigError, match=told):
        load(Part, [argument], partial=True)


def test_report_errors_lets_bugs_through() -> None:
    with pytest.raises(ZeroDivisionError), report_errors():
        raise ZeroDivisionError


def test_the_reader_imports_neither_torch_nor_diffusers() -> None:
    script = (
        "import sys, inflate.config; print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_settings_of_an_earlier_version_have_todays_names() -> None:
    text = "image_to_video: {gradient_checkpointing: true, bands: 4}\ntraining: {lr: 1e-4}\n"
    found = parse(renewed(text, "file"), "file")
    assert found == {"image_to_video.bands": 4, "training.lr": 1e-4, "memory.recompute": "units"}
