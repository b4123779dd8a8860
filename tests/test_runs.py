"""What `inflate runs` finds in the folders of runs, and how it tells it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from inflate import cli, runs
from inflate.measures import Overfitting

ENDED = {"reason": "finished", "step": 20, "at": "2026-01-01T00:00:00Z"}


def write_run(folder: Path, lr: float = 1e-5, loss: float = 0.5, ended: Any = ENDED, **environment: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"stage: decoder\ntraining:\n  output: {folder}\n  lr: {lr}\n  steps: 20\n  betas: [0.9, 0.999]\n"
    )
    metrics = {
        "history": [{"step": step, "loss/vae": 1 / step} for step in (5, 10, 15)],
        "held_out": [{"step": 0, "psnr": 20.0, "parent/psnr": 20.0}, {"step": 15, "psnr": 25.0, "loss": loss}],
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "environment.json").write_text(json.dumps({"ended": ended, "versions": {"torch": "2.9"}, **environment}))
    return folder


def inflate(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["runs", *map(str, arguments)])


def refused(*arguments: object) -> str:
    result = inflate(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_every_run_below_the_folders_is_listed(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a" / "x"), write_run(tmp_path / "b", ended=None)
    result = inflate(tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 0, result.output
    numbers = ["    psnr  20 -> 25  (higher is better)", "    loss  - -> 0.5  (lower is better)"]
    assert result.stdout.splitlines() == [
        f"{first}: decoder, 20 of 20 steps, finished", *numbers,
        f"{second}: decoder, 15 of 20 steps, cut off, or at work", *numbers,
    ]  # fmt: skip
    assert inflate("list", tmp_path).stdout == result.stdout


def test_the_folder_is_output_where_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "output: no such folder" in refused()
    write_run(Path("output") / "one")
    assert inflate().stdout.startswith("output/one: decoder")


@pytest.mark.parametrize(
    ("ended", "state", "finished"),
    [
        (ENDED, "finished", True),
        ({**ENDED, "reason": "max_seconds"}, "finished at its max_seconds", True),
        ({**ENDED, "reason": "SIGTERM"}, "cut off by SIGTERM", False),
        (None, "cut off, or at work", False),
    ],
)
def test_how_a_run_ended(tmp_path: Path, ended: Any, state: str, finished: bool) -> None:
    run = runs.read(write_run(tmp_path / "run", ended=ended))
    assert (run.state, run.finished) == (state, finished)


def test_a_run_without_a_record_or_measures_is_listed_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "environment.json").unlink()
    (folder / "metrics.json").write_text('{"history": [], "held_out": []}')
    assert inflate(folder).stdout == f"{folder}: decoder, 0 of 20 steps, end unknown (environment.json is missing)\n"
    assert not runs.read(folder).finished


def test_overfitting_is_told_below_the_numbers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    found = Overfitting("noisy/psnr", 5, 25, 24, 26, 27, "checkpoint-6")
    metrics = json.loads((folder / "metrics.json").read_text()) | {"overfitting": [asdict(found)]}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert inflate(folder).stdout.splitlines()[-1] == (
        "    overfitting: noisy/psnr was best at step 5 and went from 25 to 24, training-clip noisy/psnr from 26 to "
        "27; the nearest checkpoint is checkpoint-6"
    )


def test_a_run_without_metrics_is_mentioned(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    young = write_run(tmp_path / "b")
    (young / "metrics.json").unlink()
    result = inflate(tmp_path)
    assert str(young) not in result.stdout
    assert result.stderr == f"note: {young} has begun and written no metrics.json yet\n"


def test_compare_shows_what_differs_and_the_last_numbers(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a", git=None), write_run(tmp_path / "b", lr=0.001, loss=0.25, devices=["H200"])]
    result = inflate("compare", *folders)
    assert result.exit_code == 0, result.output
    assert result.stdout.split("\n\n") == [
        "setting      a      b\ntraining.lr  1e-05  0.001",
        'environment  a     b\ngit          null  -\ndevices      -     ["H200"]',
        "held out  a    b     better\nstep      15   15\npsnr      25   25    higher\nloss      0.5  0.25  lower\n",
    ]


def test_compare_says_where_no_setting_differs(tmp_path: Path) -> None:
    result = inflate("compare", write_run(tmp_path / "a"), write_run(tmp_path / "b"))
    assert result.stdout.startswith("the settings are the same\n\nheld out  a    b    better\n")


def test_plot_draws_all_runs(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    plot = tmp_path / "plot.png"
    result = inflate("plot", *folders, "-o", plot)
    assert (result.exit_code, result.stdout) == (0, f"wrote {plot}\n")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "exists already; choose another name or add --overwrite" in refused("plot", *folders, "-o", plot)
    assert inflate("plot", *folders, "-o", plot, "--overwrite").exit_code == 0
    assert "ends in .png or .svg or .pdf" in refused("plot", *folders, "-o", tmp_path / "plot.gif")


def test_folders_that_are_no_runs_are_named(tmp_path: Path) -> None:
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad")
    (tmp_path / "empty").mkdir()
    assert "empty: holds no run" in refused(tmp_path / "empty")
    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "name another run to compare it with" in refused("compare", good)
    assert "named twice" in refused("compare", good, good)
    (bad / "metrics.json").unlink()
    assert "bad: not a run: metrics.json missing" in refused("compare", good, bad)
    assert "bad: not a run: metrics.json missing" in refused("plot", good, bad, "-o", tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.json", "{", "metrics.json: cannot be read"),
        ("metrics.json", "[]", "metrics.json: cannot be read: it holds no JSON object"),
        ("metrics.json", '{"history": []}', "metrics.json: not a run's metrics"),
        ("metrics.json", '{"history": [{"loss": 1}], "held_out": []}', "metrics.json: not a run's metrics"),
        ("metrics.json", '{"history": [{"step": "a"}], "held_out": []}', "metrics.json: not a run's metrics"),
        ("metrics.json", '{"history": [], "held_out": [], "overfitting": [{}]}', "it says of overfitting is wrong"),
        ("environment.json", '{"ended": "yes"}', "environment.json: not a run's record"),
        ("config.yaml", "a: [", "config.yaml:1: not valid YAML"),
        ("config.yaml", "a: !!python/name:os.system x", "config.yaml:1: not valid YAML"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(text)
    assert message in refused(folder)
