"""Checkpoints: whole or absent, verified, strict."""

import json
import logging
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch.multiprocessing import ProcessExitedException

from inflate.errors import CheckpointError, TrainingError, text_of
from inflate.files import sha256
from inflate.training import checkpoint
from inflate.training.checkpoint import MANIFEST, Contents, State, contents, latest, load, numbered, save, verify
from inflate.training.loop import fit
from inflate.training.player import Trainee
from inflate.training.processes import join_processes
from inflate.training.settings import Training
from launch import FSDP2, launch
from toy import Adversarial, Layered, Points, Regression, settings, weights

# Python 3.12 warns of forks of processes with threads; ours start after the fork.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.usefixtures("on_cpu"),
]


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


# --- a process that is killed in mid-save -----------------------------------------------------------------------------


def learn(output: Path, **changes: Any) -> list[float]:
    """The weights after two steps with a checkpoint after each."""
    task = Layered()
    fit(task, Points(torch.float64), settings(output, **{"steps": 2, "checkpoint_every": 1, "ema": 0.9} | changes))
    return weights(task)


def on_touch(number: int, act: Callable[[], None]) -> None:
    """Act when this process touches what is being written of checkpoint-2 for the so-many-th time."""
    touches: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.split(".")[0] in ("open", "os", "shutil") and ".checkpoint-2." in str(arguments[0]):
            touches.append(event)
            if len(touches) == number:
                act()

    sys.addaudithook(hook)


def on_gathering(number: int, act: Callable[[], None]) -> None:
    """Act when the so-many-th tensor of a checkpoint is gathered."""
    whole, seen = checkpoint.whole, []

    def counted(*arguments: Any, **named: Any) -> Any:
        seen.append(arguments)
        if len(seen) == number:
            act()
        return whole(*arguments, **named)

    checkpoint.whole = counted


def killed(run: Path, environment: dict[str, str], in_shares: bool, victim: int, when: Any, number: int) -> None:
    """The victim is killed at a moment of its own save, or of the main process's where that alone writes."""
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which may come between the end and the report
    rank = join_processes().process_index
    pids = gather_object([os.getpid()])
    if rank == (victim if in_shares or when is on_gathering else 0):
        when(number, lambda: os.kill(pids[victim], signal.SIGKILL))
    with pytest.raises(TrainingError) as caught:
        learn(run, sharded_checkpoints=in_shares)
    (run.parent / "said").write_text(text_of(caught.value))


WHOLE_WEIGHTS: dict[str, str] = {}
MOMENTS = [
    # environment, in shares, victim, moment; whether the second checkpoint comes about
    (WHOLE_WEIGHTS, False, 0, on_touch, 11, False),  # the manifest is about to be written
    (WHOLE_WEIGHTS, False, 1, on_touch, 2, True),
    (FSDP2, False, 1, on_touch, 3, True),  # all is gathered before anything is written
    (FSDP2, False, 0, on_gathering, 20, False),  # of 16 tensors per checkpoint
    (FSDP2, False, 1, on_gathering, 20, False),
    (FSDP2, True, 1, on_touch, 1, False),  # it has not begun its own share
    (FSDP2, True, 1, on_touch, 5, False),  # its share is half on the disk
    (FSDP2, True, 0, on_touch, 12, False),  # all shares are on the disk
]


@pytest.mark.parametrize(("environment", "in_shares", "victim", "when", "number", "comes"), MOMENTS)
def test_a_process_killed_in_mid_save_leaves_a_checkpoint_that_one_process_goes_on_with(
    environment: dict[str, str], in_shares: bool, victim: int, when: Any, number: int, comes: bool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        launch(killed, run, environment, in_shares, victim, when, number)
    said = (tmp_path / "said").read_text()
    assert said.startswith("another process has ended")
    assert f"the last whole checkpoint is {run}/checkpoint-{1 + comes}:" in said or victim == 0
    assert latest(run) == run / f"checkpoint-{1 + comes}"
    resumed = learn(run, steps=3, accumulate=2, resume="latest")
    expected = learn(tmp_path / "undisturbed", steps=3, accumulate=2)
    assert resumed == pytest.approx(expected, abs=1e-9, rel=0)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
