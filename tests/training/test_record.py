"""What a run says about where it came from and how it ended."""

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from inflate import __version__
from inflate.errors import TrainingError
from inflate.training import record
from inflate.training.loop import fit
from toy import CLIPS, Points, Regression, send, settings

pytestmark = pytest.mark.usefixtures("on_cpu")


def read(output: Path) -> dict[str, Any]:
    return json.loads((output / "environment.json").read_text())


def git(folder: Path, *words: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *names, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_run_records_its_surroundings_and_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["recipes/nowhere.py", "a b=1"])
    fit(Regression(), Points(), settings(tmp_path / "run", steps=2))
    found = read(tmp_path / "run")
    assert (found["command"], found["directory"]) == ("recipes/nowhere.py 'a b=1'", str(Path.cwd()))
    assert found["versions"].keys() == {"python", "inflate", "cuda", *record.PACKAGES}
    assert found["versions"]["inflate"] == __version__
    assert all(found["versions"][name][0].isdigit() for name in record.PACKAGES)
    assert (found["processes"], len(found["devices"]), found["git"]) == (1, 1, None)
    assert found["devices"][0].endswith("CPU")
    assert found["data"] == {"samples": CLIPS, "digest": None}
    assert (found["step"], found["earlier"]) == (0, [])
    assert (found["ended"]["reason"], found["ended"]["step"]) == ("finished", 2)
    assert found["started"] <= found["ended"]["at"]


def test_a_dataset_with_a_digest_is_recorded_by_it(tmp_path: Path) -> None:
    class Known(Points):
        def digest(self) -> str:
            return "sha256:12"

    fit(Regression(), Known(), settings(tmp_path / "run", steps=1))
    assert read(tmp_path / "run")["data"] == {"samples": CLIPS, "digest": "sha256:12"}


def test_a_resumed_run_keeps_the_records_of_its_earlier_starts(tmp_path: Path) -> None:
    task = Regression()
    task.hook = send(2, signal.SIGTERM)
    fit(task, Points(), settings(tmp_path / "run", steps=6))
    assert read(tmp_path / "run")["ended"]["reason"] == "SIGTERM"
    for steps in (6, 8):
        fit(Regression(), Points(), settings(tmp_path / "run", steps=steps, resume="latest"))
    every = record.starts(tmp_path / "run" / "environment.json")
    assert [(start["step"], start["ended"]["step"]) for start in every] == [(0, 3), (3, 6), (6, 8)]
    assert [start["ended"]["reason"] for start in every] == ["SIGTERM", "finished", "finished"]


def test_a_run_that_fails_has_no_end(tmp_path: Path) -> None:
    data = Points()
    data.points[:] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        fit(Regression(), data, settings(tmp_path / "run", steps=2))
    assert read(tmp_path / "run")["ended"] is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"earlier": 3}'])
def test_a_record_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    fit(Regression(), Points(), settings(tmp_path / "run", steps=1))
    (tmp_path / "run" / "environment.json").write_text(text)
    with pytest.raises(TrainingError, match=r"environment\.json: not a run's record .* move it away"):
        fit(Regression(), Points(), settings(tmp_path / "run", steps=1, resume="latest"))


def test_the_state_of_a_repository(tmp_path: Path) -> None:
    recipe = tmp_path / "recipes" / "train.py"
    recipe.parent.mkdir()
    recipe.write_text("a")
    assert record.git_state(recipe) is None
    git(tmp_path, "init")
    assert record.git_state(recipe) is None, "no commit yet"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "a")
    revision = git(tmp_path, "rev-parse", "HEAD").strip()
    assert record.git_state(recipe) == {"revision": revision, "dirty": False}
    (tmp_path / "clips").write_text("untracked")
    assert record.git_state(recipe) == {"revision": revision, "dirty": False}
    (recipe.parent / "other.py").write_text("untracked")
    assert record.git_state(recipe.parent / "other.py") == {"revision": revision, "dirty": True}
    recipe.write_text("b")
    assert record.git_state(recipe) == {"revision": revision, "dirty": True}
    assert record.git_state(tmp_path / "gone.py") is None


def test_without_git_there_is_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.git_state(tmp_path / "train.py") is None


def test_what_changes_between_starts_is_kept(tmp_path: Path) -> None:
    config = "training: {lr: 0.01}\n"
    fit(Regression(), Points(), settings(tmp_path / "run", steps=2), config=config)
    fit(Regression(), Points(), settings(tmp_path / "run", steps=4, lr=2e-2, resume="latest"), config=config)
    found = read(tmp_path / "run")
    assert "training.lr was 0.01, is 0.02 from step 2 on" in found["changed"]
    assert found["earlier"][0]["changed"] == []
