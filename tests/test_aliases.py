"""diffusers' flags: what they set, in which forms, and what is said where there is no equivalent."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from helpers import load_recipe
from inflate.aliases import BARE, VALUES, WITHOUT, table, translate
from inflate.config import from_command_line, load, names
from inflate.errors import ConfigError

RECIPE = Path(__file__).parents[1] / "recipes" / "svd_finetune.py"
NAMES = [
    "training.lr",
    "training.ema",
    "training.schedule",
    "data.height",
    "data.width",
    "memory.recompute",
    "training.optimizer",
]


def meant(*arguments: str) -> list[str]:
    return [text for _, sources in translate(arguments, NAMES) for text in sources]


def refused(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        meant(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("flag", [["--learning_rate", "1e-4"], ["--learning_rate=1e-4"]])
def test_a_flag_takes_its_value_in_either_form(flag: list[str]) -> None:
    assert meant("a.yaml", *flag, "training.ema=0") == ["a.yaml", "training.lr=1e-4", "training.ema=0"]


def test_a_value_may_be_negative_or_hold_an_equals_sign() -> None:
    assert meant("--learning_rate", "-1") == ["training.lr=-1"]
    assert meant("--learning_rate=a=b") == ["training.lr=a=b"]


def test_a_bare_flag_takes_no_value() -> None:
    assert meant("--use_ema", "a.yaml") == ["training.ema=0.9999", "a.yaml"]
    assert meant("--use_8bit_adam") == ["training.optimizer=adamw8bit"]
    assert refused("--use_ema=0.99") == "--use_ema=0.99: --use_ema takes no value; write training.ema=0.99"


def test_one_flag_may_set_several_settings() -> None:
    assert meant("--resolution", "256") == ["data.height=256", "data.width=256"]


def test_a_value_that_is_called_differently_here() -> None:
    assert meant("--lr_scheduler", "constant_with_warmup") == ["training.schedule=constant"]
    assert meant("--lr_scheduler=cosine") == ["training.schedule=cosine"]


def test_the_group_is_the_one_that_the_recipe_has() -> None:
    assert meant("--gradient_checkpointing") == ["memory.recompute=units"]
    two = [*NAMES, "adapter.rank", "critic.rank"]
    with pytest.raises(ConfigError, match=r"could be adapter\.rank or critic\.rank"):
        list(translate(["--rank=4"], two))


def test_a_flag_without_an_equivalent_says_so() -> None:
    assert refused("--num_frames", "8") == (
        "--num_frames: has no equivalent in this recipe, which has no setting data.frames"
    )
    for flag in WITHOUT:
        assert refused(flag, "1").startswith(f"{flag}: has no equivalent: ")


def test_an_unknown_flag_names_the_nearest() -> None:
    assert refused("--learning-rate=1") == (
        "--learning-rate=1: settings are written key=value, without dashes (--help lists them); "
        "did you mean --learning_rate?"
    )
    assert "did you mean" not in refused("-x")


@pytest.mark.parametrize("rest", [[], ["--use_ema"]])
def test_a_flag_without_its_value_is_refused(rest: list[str]) -> None:
    assert refused("--learning_rate", *rest) == "--learning_rate: give its value after it"


def test_the_table_lists_what_the_recipe_has() -> None:
    lines = table(NAMES).splitlines()
    assert [line.split()[0] for line in lines] == [
        "--height", "--width", "--resolution", "--learning_rate", "--lr_scheduler", "--use_ema",
        "--gradient_checkpointing", "--use_8bit_adam",
    ]  # fmt: skip
    assert lines[2].split() == ["--resolution", "VALUE", "data.height=VALUE", "data.width=VALUE"]


def test_every_flag_of_the_table_sets_what_the_recipe_reads() -> None:
    schema = load_recipe(RECIPE).Config
    values = {"--mixed_precision": "bf16", "--lr_scheduler": "cosine", "--noise_aug_strength": "0.1"}
    given = [line.split()[0] for line in table(names(schema)).splitlines()]
    assert {*VALUES, *BARE} - {*given} <= {"--rank", "--lora_alpha"}
    config = load(schema, [flag if flag in BARE else f"{flag}={values.get(flag, '3')}" for flag in given])
    assert (config.training.lr, config.training.steps, config.data.width, config.model.path) == (3.0, 3, 3, "3")
    assert (config.training.precision, config.training.schedule) == ("bf16", "cosine")
    assert (config.training.ema, config.memory.recompute) == (0.9999, "units")


@dataclass
class Training:
    lr: float = 1.0
    steps: int = 1


@dataclass
class Config:
    training: Training = field(default_factory=Training)


def test_the_command_line_says_what_a_flag_has_set(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.yaml").write_text("training: {steps: 4}\n")
    arguments = ["--learning_rate", "1e-4", "--max_train_steps=5", "training.steps=6", "--config", f"{tmp_path}/a.yaml"]
    assert from_command_line(Config, None, arguments) == Config(Training(1e-4, 4))
    told = "--learning_rate 1e-4: training.lr=1e-4\n--max_train_steps=5: training.steps=5\n"
    assert capsys.readouterr() == ("", told)
    monkeypatch.setenv("RANK", "1")
    from_command_line(Config, None, arguments)
    assert capsys.readouterr().err == ""


def test_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        from_command_line(Config, None, ["--help"])
    assert "--learning_rate VALUE" in capsys.readouterr().out
