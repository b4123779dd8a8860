"""Grids of runs: which ones they are, that they are skipped, resumed, told and recorded."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from inflate import cli, runs, sweep
from inflate.errors import CheckpointError, ConfigError

RECIPE = """
import json, sys
from dataclasses import dataclass, field
from pathlib import Path
from inflate import config as configuration

@dataclass
class Training:
    output: Path = Path("output")
    resume: str | None = None
    lr: float = 1.0
    steps: int = 2
    bounds: tuple[float, float] = (0.0, 1.0)

@dataclass
class Config:
    note: str = ""
    lr: int = 0
    training: Training = field(default_factory=Training)

if __name__ == "__main__":
    config = configuration.from_command_line(Config)
    folder = config.training.output
    folder.mkdir(parents=True, exist_ok=True)
    starts = len(list(folder.glob("start-*")))
    (folder / f"start-{starts}").write_text(str(config.training.resume))
    (folder / "config.yaml").write_text(configuration.dump(config))
    print("a word on standard output")
    if config.training.lr == 2 and not starts:
        sys.exit(3)
    rows = [{"step": 0, "loss": 9.0}, {"step": config.training.steps, "loss": config.training.lr}]
    (folder / "metrics.json").write_text(json.dumps({"history": [], "held_out": rows}))
    ended = {"reason": "finished", "step": config.training.steps}
    (folder / "environment.json").write_text(json.dumps({"ended": ended}))
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that trains nothing, where the test runs; it is started without accelerate's launcher."""
    monkeypatch.setattr(sweep, "LAUNCH", (sys.executable,))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.py").write_text(RECIPE)
    return Path("recipe.py")


def inflate(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["sweep", *map(str, arguments)])


def refused(*arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        sweep.plan(Path(str(arguments[0])), [str(argument) for argument in arguments[1:]])
    return str(caught.value)


def started(folder: Path) -> list[str]:
    """What each start of a run was told to resume."""
    return [file.read_text() for file in sorted(folder.glob("start-*"))]


# --- the grid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a.b=1,2", ["a.b=1", "a.b=2"]),
        ("a=1e-5, 1e-4", ["a=1e-5", "a=1e-4"]),
        ("a=[0.0,0.3]", ["a=[0.0,0.3]"]),
        ("a=[0.0,0.3],[[1,2],3]", ["a=[0.0,0.3]", "a=[[1,2],3]"]),
        ("a={b: 1, c: 2},null", ["a={b: 1, c: 2}", "a=null"]),
        ("a='x,y'", ["a='x,y'"]),
        ("a='it''s, so',\"p\\\",q\",r", ["a='it''s, so'", 'a="p\\",q"', "a=r"]),
        ("a=[',]',2],it's,so", ["a=[',]',2]", "a=it's", "a=so"]),
        ("a=", ["a="]),
        ("a,b.yaml", ["a,b.yaml"]),
        ("out/lr=1,2/config.yaml", ["out/lr=1,2/config.yaml"]),
    ],
)
def test_commas_separate_values_outside_brackets_and_quotes(source: str, expected: list[str]) -> None:
    assert sweep.split(source) == expected


def test_the_grid_is_every_combination_in_order(recipe: Path) -> None:
    Path("base.yaml").write_text("training: {steps: 7, output: out, resume: latest}\n")
    flags = ["--config", "base.yaml", "--learning_rate", "1e-5,2", "training.bounds=[0,1],[0,2]", "note=a"]
    grid = sweep.plan(recipe, flags)
    assert [planned.varied for planned in grid] == [
        {"training.lr": lr, "training.bounds": bounds} for lr in ("1e-5", "2") for bounds in ("[0,1]", "[0,2]")
    ]
    assert [planned.name for planned in grid[:2]] == ["lr=1e-5__bounds=_0_1_", "lr=1e-5__bounds=_0_2_"]
    last = grid[-1]
    assert last.folder == Path("out/lr=2__bounds=_0_2_")
    assert last.arguments == [
        "base.yaml", "training.lr=2", "training.bounds=[0,2]", "note=a", f"training.output={last.folder}",
        "training.resume=latest",
    ]  # fmt: skip
    assert (last.settings["training.lr"], last.settings["training.bounds"]) == (2.0, [0.0, 2.0])
    assert (last.settings["training.steps"], last.settings["training.output"]) == (7, str(last.folder))


def test_names_of_runs() -> None:
    assert sweep.name_of({"a.lr": "1", "b.lr": "2"}) == "a.lr=1__b.lr=2"
    assert sweep.name_of({"data.path": "my clips/a"}) == "path=my_clips_a"
    first, second = (sweep.name_of({"data.path": "x" * 300 + end}) for end in "ab")
    assert first != second
    assert len(first) < 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.steps=1"], "nothing varies"),
        ([], "nothing varies"),
        (["training.lr=1,2", "trainng.steps=1"], "did you mean training.steps"),
        (["training.lr=1,2", "training.steps=1,many"], "training.steps must be an int, not 'many'"),
        (["training.lr=1,"], "a value is missing beside a comma"),
        (["training.output=a,b"], "training.output and training.resume cannot vary"),
        (["training.lr=1,2", "training.resume=out/checkpoint-3"], "a sweep resumes each"),
        (["training.lr=1,1"], "training.lr=1 and training.lr=1 are one and the same run"),
        (["training.lr=1,1.0"], "training.lr=1 and training.lr=1.0 are one and the same run"),
        (["training.lr=1,2", "training.lr=3"], "are one and the same run"),
        (["note=a b,a/b"], "note=a b and note=a/b are one and the same run"),
        (["a.yaml", "training.lr=1,2"], "a.yaml: no such file"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_starts(
    recipe: Path, arguments: list[str], message: str
) -> None:
    assert message in refused(recipe, *arguments)
    assert [path.name for path in Path().iterdir() if path.is_dir() and path.name != "__pycache__"] == []


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    assert "no such recipe" in refused(tmp_path / "nowhere.py", "a=1,2")
    (tmp_path / "note.txt").write_text("")
    assert "not a Python script" in refused(tmp_path / "note.txt", "a=1,2")
    (tmp_path / "other.py").write_text("class Config: pass\n")
    assert "it has no dataclass Config with training.output" in refused(tmp_path / "other.py", "a=1,2")


# --- the runs ---------------------------------------------------------------------------------------------------------


def test_a_failure_is_told_and_the_others_go_on_and_the_same_command_mends_it(recipe: Path) -> None:
    command = [recipe, "training.output=out", "training.lr=1,2,3"]
    first = inflate(*command)
    assert first.exit_code == 1
    assert first.stdout.splitlines() == [
        "training.lr  loss  exit status",
        "1            1     0",
        "2            -     3",
        "3            3     0",
    ]
    assert "out/lr=2: failed with exit status 3" in first.stderr
    assert "error: 1 of 3 runs failed (lr=2)" in first.stderr
    record = json.loads(Path("out/sweep.json").read_text())["runs"]
    assert [(name, row["exit_status"]) for name, row in record.items()] == [("lr=1", 0), ("lr=2", 3), ("lr=3", 0)]
    assert record["lr=3"]["settings"] == {"training.lr": "3"}
    assert record["lr=3"]["held_out"] == {"loss": {"first": 9.0, "last": 3.0}}

    second = inflate(*command)
    assert second.exit_code == 0, second.stderr
    assert second.stdout.splitlines()[1:] == [
        "1            1     0 (before)",
        "2            2     0",
        "3            3     0 (before)",
    ]
    assert [started(Path(f"out/lr={lr}")) for lr in (1, 2, 3)] == [["latest"], ["latest", "latest"], ["latest"]]


def finish(planned: sweep.Planned, **changes: Any) -> None:
    """Leave what a finished run leaves."""
    planned.folder.mkdir(parents=True)
    settings: dict[str, Any] = {"training": {}}
    for name, value in (planned.settings | changes).items():
        group, _, last = name.rpartition(".")
        (settings[group] if group else settings)[last] = value
    (planned.folder / "config.yaml").write_text(json.dumps(settings))
    (planned.folder / "metrics.json").write_text('{"history": [], "held_out": []}')
    (planned.folder / "environment.json").write_text('{"ended": {"reason": "finished", "step": 2}}')


def test_only_a_run_of_just_these_settings_counts_as_finished(recipe: Path) -> None:
    planned = sweep.plan(recipe, ["training.lr=1,2"])[0]
    assert not sweep.is_finished(planned)
    finish(planned)
    assert sweep.is_finished(planned)
    sweep.check_folder(planned)
    longer = sweep.plan(recipe, ["training.lr=1,2", "training.steps=5"])[0]
    sweep.check_folder(longer)
    assert not sweep.is_finished(longer)
    (planned.folder / "environment.json").write_text('{"ended": null}')
    assert not sweep.is_finished(planned)


def test_a_folder_with_a_run_of_other_settings_is_refused_before_anything_starts(recipe: Path) -> None:
    arguments = ["training.lr=1,2", "note=new"]
    finish(sweep.plan(recipe, arguments)[1], note="old")
    result = inflate(recipe, *arguments)
    assert result.exit_code == 1
    assert 'output/lr=2 holds a run of other settings: note was "old", is "new"' in result.stderr
    assert not Path("output/lr=1").exists()


def test_rows_of_an_earlier_sweep_stay_in_the_record(recipe: Path) -> None:
    grid = sweep.plan(recipe, ["training.lr=1,2"])
    for planned in grid:
        finish(planned)
    Path("output/sweep.json").write_text('{"runs": {"lr=7": {"exit_status": 0}}}')
    told: list[str] = []
    outcomes, stopped = sweep.run(recipe, grid, told.append)
    assert ([outcome.skipped for outcome in outcomes], stopped) == ([True, True], 0)
    assert told == ["run 1 of 2: output/lr=1", "finished before", "run 2 of 2: output/lr=2", "finished before"]
    assert list(sweep.read_record(Path("output/sweep.json"))) == ["lr=7", "lr=1", "lr=2"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"runs": [1]}', '{"runs": {"a": 3}}'])
def test_a_record_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"sweep\.json: not the record of a sweep .* move it away"):
        sweep.read_record(tmp_path / "sweep.json")


def test_stages_below_a_runs_folder_are_measured_by_their_names(tmp_path: Path) -> None:
    for stage, loss in (("first", 1.0), ("second", 2.0)):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "config.yaml").write_text("")
        rows = {"history": [], "held_out": [{"step": 0, "loss": loss}]}
        (tmp_path / stage / "metrics.json").write_text(json.dumps(rows))
    assert sweep.measures(tmp_path) == {"first/loss": (1.0, 1.0), "second/loss": (2.0, 2.0)}


# --- one process ------------------------------------------------------------------------------------------------------

LAUNCHER = """
import subprocess, sys
sys.exit(10 + subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]]).wait())
"""
TRAINING = """
import os, signal, sys, time
from pathlib import Path
def stop(*_):
    Path(sys.argv[1]).write_text("saved")
    sys.exit(5)
signal.signal(signal.SIGINT, stop)
os.kill(int(os.environ["SWEEP"]), int(os.environ["SENT"]))
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_training_and_not_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("SWEEP", str(os.getpid()))
    monkeypatch.setenv("SENT", str(int(number)))
    before = signal.getsignal(number)
    saved = tmp_path / "saved"
    assert sweep.launch([sys.executable, "-c", LAUNCHER, TRAINING, str(saved)]) == (15, number)
    assert saved.read_text() == "saved"
    assert signal.getsignal(number) is before


def test_a_signal_ends_the_sweep(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "launch", lambda command: (1, int(signal.SIGINT)))
    result = inflate(recipe, "training.lr=1,2")
    assert result.exit_code == 128 + signal.SIGINT
    assert [line.split()[-1] for line in result.stdout.splitlines()] == ["status", "1", "started"]
    assert sweep.read_record(Path("output/sweep.json"))["lr=2"]["exit_status"] is None


def test_a_process_that_a_signal_kills_has_its_status() -> None:
    assert sweep.launch([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == (137, 0)


TRAINED = """
from dataclasses import dataclass, field
from inflate import config as configuration
from inflate.errors import report_errors
from inflate.training.loop import fit
from inflate.training.settings import Training
from toy import Points, Regression

@dataclass
class Config:
    training: Training = field(default_factory=Training)

def train(config):
    return fit(Regression(), Points(), config.training, config=configuration.dump(config))

if __name__ == "__main__":
    with report_errors():
        train(configuration.from_command_line(Config))
"""


@pytest.mark.slow
def test_real_runs_are_launched_resumed_and_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{tests}:{tests.parent}")
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(TRAINED)
    quiet = ["training.tracker=none", "training.progress=false", "training.workers=0", "training.log_every=1"]
    command = [recipe, *quiet, "training.steps=4", "--learning_rate", "1e-3,1e-2"]
    whole, half = sweep.plan(recipe, [str(word) for word in command[1:]])
    script = sweep.load_script(recipe)
    script.train(script.configuration.load(script.Config, whole.arguments))
    script.train(script.configuration.load(script.Config, [*half.arguments, "training.steps=2"]))
    result = inflate(*command)
    assert result.exit_code == 0, result.stderr
    assert [line.split()[2:] for line in result.stdout.splitlines()[1:]] == [["0", "(before)"], ["0"]]
    run = runs.read(half.folder)
    assert (run.step, run.finished, [row["step"] for row in run.history]) == (4, True, [1, 2, 3, 4])
