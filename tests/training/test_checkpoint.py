"""Checkpoints: whole or absent, verified, strict."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inflate.errors import CheckpointError
from inflate.files import sha256
from inflate.training import checkpoint
from inflate.training.checkpoint import MANIFEST, Contents, State, contents, latest, load, numbered, save, verify
from inflate.training.loop import fit
from inflate.training.player import Trainee
from inflate.training.settings import Training
from toy import Adversarial, Points, Regression, settings, weights

pytestmark = pytest.mark.usefixtures("on_cpu")


def trainees(task: Regression) -> list[Trainee]:
    return [Trainee(player, Training()) for player in task.players]


def saved(task: Regression) -> list[Contents]:
    return [contents(one) for one in trainees(task)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints at steps 1, 2 and 3."""
    fit(Adversarial(), Points(), settings(tmp_path / "run", steps=3, checkpoint_every=1, keep=0, ema=0.5))
    return tmp_path / "run"


def test_a_checkpoint_holds_weights_buffers_average_and_optimiser(run: Path) -> None:
    folder = latest(run)
    assert folder == run / "checkpoint-3"
    names = sorted(p.name for p in folder.iterdir())
    players = [f"{player}.{part}" for player in ("critic", "map") for part in ("average.safetensors", "optimizer.pt")]
    assert names == sorted([*players, "critic.safetensors", "map.safetensors", "manifest.json", "state.json"])
    kept = load_file(folder / "critic.safetensors")
    assert {"0.weight_orig", "0.weight_u", "0.weight_v", "0.bias"} <= kept.keys()
    assert json.loads((folder / "state.json").read_text())["step"] == 3


def test_files_and_other_folders_with_such_names_are_ignored(run: Path) -> None:
    (run / "checkpoint-100.safetensors").write_bytes(b"x")
    (run / "checkpoint-200").write_bytes(b"x")
    for name in ("checkpoint-300.old", ".checkpoint-400.partial", "checkpoint-", "my-checkpoint-500"):
        (run / name).mkdir()
    assert [path.name for path in numbered(run)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert latest(run) == run / "checkpoint-3"


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert [path.name for path in numbered(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


@pytest.mark.parametrize("fault", ["no manifest", "half a manifest", "cut short", "missing", "changed"])
def test_a_partly_written_checkpoint_is_never_chosen(run: Path, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    folder, file = run / "checkpoint-3", run / "checkpoint-3/map.safetensors"
    match fault:
        case "no manifest":
            (folder / MANIFEST).unlink()
        case "half a manifest":
            (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])
        case "cut short":
            file.write_bytes(file.read_bytes()[:-10])
        case "missing":
            file.unlink()
        case "changed":
            file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with caplog.at_level(logging.WARNING):
        assert latest(run) == run / "checkpoint-2"
    assert "checkpoint-3" in caplog.text
    with pytest.raises(CheckpointError, match="checkpoint-3 is"):
        fit(Adversarial(), Points(), settings(run, steps=4, ema=0.5, resume=str(folder)))


def test_if_every_checkpoint_is_damaged_the_run_does_not_start_over(run: Path) -> None:
    for folder in numbered(run):
        (folder / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"checkpoint-3 is damaged: state\.json"):
        fit(Adversarial(), Points(), settings(run, steps=4, ema=0.5, resume="latest"))


def test_a_checkpoint_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        fit(Regression(), Points(), settings(tmp_path / "run", resume=str(tmp_path / "nowhere")))


def test_a_failure_while_writing_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = saved(Regression())
    save(tmp_path, State(step=1), task)

    def full_disk(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 cannot be written: no space left; free space"):
        save(tmp_path, State(step=2), task)
    assert latest(tmp_path) == tmp_path / "checkpoint-1"
    monkeypatch.undo()
    save(tmp_path, State(step=2), task)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize(
    ("keep", "damaged", "left"),
    [
        (1, [], ["checkpoint-3"]),
        (2, [], ["checkpoint-2", "checkpoint-3"]),
        (2, [2], ["checkpoint-1", "checkpoint-3"]),
        (2, [1, 2], ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-9", "checkpoint-10"]),
    ],
)
def test_the_newest_whole_checkpoints_stay(tmp_path: Path, keep: int, damaged: list[int], left: list[str]) -> None:
    """Later ones than the one just written are damaged, or the run would have gone on from them."""
    for step in (1, 2, 9, 10):
        folder = save(tmp_path, State(step=step), saved(Regression()))
        if step in (*damaged, 9, 10):
            (folder / "map.safetensors").write_bytes(b"")
    folder = save(tmp_path, State(step=3), saved(Regression()), keep)
    verify(folder)
    assert [path.name for path in numbered(tmp_path)] == left


def test_what_a_process_wrote_or_verified_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, State(step=1), saved(Regression()))
    read: list[Path] = []
    monkeypatch.setattr(checkpoint, "verify", read.append)
    known: set[Path] = set()
    for step in (2, 3, 4):
        save(tmp_path, State(step=step), saved(Regression()), 2, known)
    assert read == [tmp_path / "checkpoint-1"]


def reseal(folder: Path) -> None:
    files = {path.name: sha256(path) for path in folder.iterdir() if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(files))
    verify(folder)


def test_keys_and_shapes_must_match_and_nothing_changes_if_not(tmp_path: Path) -> None:
    folder = save(tmp_path, State(step=1), saved(Regression()))
    tensors = load_file(folder / "map.safetensors")
    tensors["3.extra"] = tensors.pop("3.bias")
    tensors["0.weight"] = torch.zeros(8, 5)
    save_file(tensors, folder / "map.safetensors")
    task = Regression()
    before = weights(task)
    message = r"0\.weight is \(8, 5\), not \(8, 4\); missing 3\.bias; surplus 3\.extra"
    with pytest.raises(CheckpointError, match=message):
        load(folder, trainees(task))
    assert weights(task) == before


def test_the_second_player_is_checked_before_the_first_is_changed(tmp_path: Path) -> None:
    folder = save(tmp_path, State(step=1), saved(Adversarial()))
    (folder / "critic.optimizer.pt").unlink()
    task = Adversarial()
    with torch.no_grad():
        task.network[0].weight.zero_()
    before = weights(task)
    with pytest.raises(CheckpointError, match=r"critic\.optimizer\.pt cannot be read"):
        load(folder, trainees(task))
    assert weights(task) == before


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_a_pickled_payload_is_refused_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path, State(step=1), saved(Regression()))
    torch.save(Payload(), folder / "map.optimizer.pt", pickle_module=pickle)
    reseal(folder)
    with pytest.raises(CheckpointError, match=r"map\.optimizer\.pt cannot be read"):
        load(folder, trainees(Regression()))
    assert capsys.readouterr().out == ""
