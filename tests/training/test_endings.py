"""However a run ends: what is saved, that going on from it is exact, and what is said."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inflate.errors import DataError, DiskError, InflateError, Interrupted, NotFiniteError, text_of
from inflate.training import checkpoint, endings, log
from inflate.training.checkpoint import numbered
from inflate.training.loop import fit
from inflate.training.player import Trainee
from toy import Adversarial, Points, Regression, settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.usefixtures("on_cpu"),
]
SHAPE: dict[str, Any] = {"steps": 6, "batch": 2, "ema": 0.5, "schedule": "cosine", "checkpoint_every": 2, "keep": 0}


def names(output: Path) -> list[str]:
    return [path.name for path in numbered(output)]


def ended(error: type[BaseException], *arguments: Any, **settings: Any) -> str:
    """The text and the notes of the error that a run ends with."""
    with pytest.raises(error) as caught:
        fit(*arguments, **settings)
    return text_of(caught.value)


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, buffers, averages, optimiser states."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {f"{path.name} {name}": tensor for name, tensor in load_file(path).items()}
    for path in sorted(folder.glob("*.pt")):
        for key, values in torch.load(path, weights_only=True).items():
            found |= {f"{path.name} {key} {name}": tensor for name, tensor in values.items()}
    return found


def assert_goes_on_exactly(output: Path, whole: Path, kind: type[Regression] = Adversarial) -> None:
    """The run, resumed, ends as an undisturbed one, bit for bit."""
    fit(kind(), Points(), settings(whole, **SHAPE))
    fit(kind(), Points(), settings(output, **SHAPE, resume="latest"))
    one, other = everything(whole / "checkpoint-6"), everything(output / "checkpoint-6")
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# --- an error within a step -------------------------------------------------------------------------------------------


class Unreadable(Points):
    """The sample of a number, in the fourth step, cannot be read."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number == 7:
            raise DataError("b.mp4: no such file")
        return super().__getitem__(number)


def broken(error: BaseException, step: int = 3) -> Adversarial:
    """A task whose critic fails in a step, when the forward passes before have moved its buffers."""
    task = Adversarial()

    def loss(batch: Any, noise: Any, now: int) -> Any:
        found = task.critic_loss(batch, noise, now)
        if now == step:
            raise error
        return found

    task.players[1].loss = loss
    return task


def test_a_clip_that_vanishes_loses_no_step(tmp_path: Path) -> None:
    text = ended(DataError, Adversarial(), Unreadable(), settings(tmp_path / "run", **SHAPE))
    assert text.splitlines() == [
        "b.mp4: no such file",
        f"  the last whole checkpoint is {tmp_path}/run/checkpoint-3: training.resume=latest goes on from it",
        "  a run goes on with the clips that it began with: put them back first",
    ]
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"]
    assert len(log_rows(tmp_path / "run")) == 3
    assert_goes_on_exactly(tmp_path / "run", tmp_path / "whole")


def log_rows(output: Path) -> list[Any]:
    rows: list[Any] = json.loads((output / "metrics.json").read_text())["history"]
    return rows


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_bug_loses_no_step_and_keeps_its_traceback(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        fit(broken(error), Points(), settings(tmp_path / "run", **SHAPE))
    assert caught.value is error
    assert caught.traceback[-1].name == "loss"
    assert "checkpoint-3: training.resume=latest goes on" in text_of(error)
    assert_goes_on_exactly(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("place", ["first", "second", "average"])
def test_a_step_that_fails_among_its_updates_is_not_saved(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Trainee.update

    def failing(one: Trainee, step: int, norm: torch.Tensor) -> None:
        if step == 3 and place == "average":
            one.average = {name: average[..., :0] for name, average in one.average.items()}  # lerp_ fails
        elif step == 3 and one.player.name == {"first": "map", "second": "critic"}[place]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        update(one, step, norm)

    monkeypatch.setattr(Trainee, "update", failing)
    text = ended(RuntimeError, Adversarial(), Points(), settings(tmp_path / "run", **SHAPE))
    assert f"the last whole checkpoint is {tmp_path}/run/checkpoint-2:" in text
    assert names(tmp_path / "run") == ["checkpoint-2"]
    monkeypatch.undo()
    monkeypatch.setattr(log, "plot", lambda *_, **__: None)
    assert_goes_on_exactly(tmp_path / "run", tmp_path / "whole")


def test_a_value_that_is_not_finite_is_left_to_the_last_checkpoint(tmp_path: Path) -> None:
    data = Points()
    data.points[data.orders[0][6]] = torch.nan
    text = ended(NotFiniteError, Adversarial(), data, settings(tmp_path / "run", **SHAPE))
    assert "step 3: " in text
    assert f"the last whole checkpoint is {tmp_path}/run/checkpoint-2:" in text
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert len(log_rows(tmp_path / "run")) == 3


def test_an_error_before_the_first_step_leaves_nothing_and_says_so(tmp_path: Path) -> None:
    text = ended(ZeroDivisionError, broken(ZeroDivisionError(), 0), Points(), settings(tmp_path / "run", **SHAPE))
    assert text == f"there is no checkpoint in {tmp_path}/run"
    assert names(tmp_path / "run") == []


def test_an_error_while_looking_loses_no_step(tmp_path: Path) -> None:
    """Averaged weights are in place of the trained ones meanwhile."""

    class Failing(Adversarial):
        def evaluate(self) -> dict[str, float]:
            if "evaluate" in self.looked:
                raise ZeroDivisionError
            return super().evaluate()

    ended(ZeroDivisionError, Failing(), Points(), settings(tmp_path / "run", **SHAPE, evaluate_every=3))
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"]
    assert_goes_on_exactly(tmp_path / "run", tmp_path / "whole")


# --- signals ----------------------------------------------------------------------------------------------------------


def signals(step: int, *numbers: int) -> Callable[[int], None]:
    """A hook that raises signals in a step."""

    def hook(now: int) -> None:
        if now == step:
            for number in numbers:
                signal.raise_signal(number)

    return hook


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_gives_up_the_step_and_saves_the_one_before(
    tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    task = Adversarial()
    task.hook = signals(3, number, number)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as caught:
        fit(task, Points(), settings(tmp_path / "run", **SHAPE))
    assert caught.value.status == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert capfd.readouterr().err.strip() == f"{number.name}: stopping after this step; once more to stop at once"
    assert text_of(caught.value).splitlines() == [
        f"{number.name} again: stopped at once",
        f"  the last whole checkpoint is {tmp_path}/run/checkpoint-3: training.resume=latest goes on from it",
    ]
    assert_goes_on_exactly(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("look", "looked", "told"),
    [
        ("evaluate", ["evaluate"], "this measurement of held-out clips"),
        ("preview", ["evaluate", "preview"], "these previews"),
    ],
)
def test_a_signal_before_the_first_step_is_answered_after_what_is_looked_at(
    tmp_path: Path, look: str, looked: list[str], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    task = Adversarial()
    whole = getattr(task, look)

    def signalled(*given: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return whole(*given)

    setattr(task, look, signalled)
    result = fit(task, Points(), settings(tmp_path / "run", **SHAPE))
    assert (result.step, result.stopped, task.looked) == (0, "SIGTERM", looked)
    assert capfd.readouterr().err.strip() == f"SIGTERM: stopping after {told}; once more to stop at once"
    assert names(tmp_path / "run") == ["checkpoint-0"]
    assert_goes_on_exactly(tmp_path / "run", tmp_path / "whole")
    assert (tmp_path / "run" / "samples" / "step-000000" / "weight.txt").is_file()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_drops_still_ends_the_run(tmp_path: Path) -> None:
    class Finaliser:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    task = Regression()

    def hook(step: int) -> None:
        if step == 3:
            Finaliser()

    task.hook = hook
    text = ended(Interrupted, task, Points(), settings(tmp_path / "run", **SHAPE))
    assert f"{tmp_path}/run/checkpoint-4:" in text


@contextmanager
def signalled_while_writing(step: int, *numbers: int) -> Iterator[None]:
    """Signals that come while the weights of a checkpoint are being written."""

    def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if path.parent.name.startswith(f".checkpoint-{step}."):
            save_file({name: tensor[:0] for name, tensor in tensors.items()}, path)  # half of it
            while pending:
                signal.raise_signal(pending.pop())
        save_file(tensors, path)

    pending = list(numbers)
    checkpoint.save_file = write
    try:
        yield
    finally:
        checkpoint.save_file = save_file


def test_one_signal_during_a_write_stops_the_run_after_it(tmp_path: Path) -> None:
    with signalled_while_writing(2, signal.SIGTERM):
        result = fit(Adversarial(), Points(), settings(tmp_path / "run", **SHAPE))
    assert (result.step, result.stopped) == (2, "SIGTERM")
    assert_goes_on_exactly(tmp_path / "run", tmp_path / "whole")


def test_a_second_signal_during_a_write_waits_for_it_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with signalled_while_writing(2, signal.SIGINT, signal.SIGINT):
        text = ended(Interrupted, Adversarial(), Points(), settings(tmp_path / "run", **SHAPE))
    first, second = capfd.readouterr().err.strip().split("\n\n")
    assert first == "SIGINT: stopping after this step; once more to stop at once"
    assert second == "SIGINT: waiting, a checkpoint is being written; once more kills, and leaves what was whole"
    assert f"the last whole checkpoint is {tmp_path}/run/checkpoint-2:" in text
    assert_goes_on_exactly(tmp_path / "run", tmp_path / "whole")


def interrupted(output: Path, count: int) -> None:
    with signalled_while_writing(4, *[signal.SIGINT] * count):
        fit(Adversarial(), Points(), settings(output, **SHAPE))


def test_a_third_signal_during_a_write_kills_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=interrupted, args=(tmp_path / "run", 3))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGINT
    assert len([path for path in (tmp_path / "run").iterdir() if path.name.startswith(".checkpoint-4.")]) == 1
    assert checkpoint.latest(tmp_path / "run") == tmp_path / "run/checkpoint-2"
    assert_goes_on_exactly(tmp_path / "run", tmp_path / "whole")
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_a_signal_while_a_failure_is_saved_waits_for_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with signalled_while_writing(3, signal.SIGTERM):
        text = ended(DataError, Adversarial(), Unreadable(), settings(tmp_path / "run", **SHAPE))
    assert "SIGTERM: waiting, the last completed step is being saved" in capfd.readouterr().err
    assert f"the last whole checkpoint is {tmp_path}/run/checkpoint-3:" in text


# --- what the disk refuses --------------------------------------------------------------------------------------------


@contextmanager
def small_files() -> Iterator[Callable[[int], None]]:
    """No file may become larger than told: the system then refuses in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [500, 1500])
def test_a_refused_write_names_the_last_whole_checkpoint(tmp_path: Path, limit: int) -> None:
    """The limit is met by the weights, which safetensors writes, or by the optimiser's state, which torch writes."""
    output, task = tmp_path / "run", Regression()
    with small_files() as at_most:
        task.hook = lambda step: at_most(limit) if step == 3 else None
        text = ended(DiskError, task, Points(), settings(output, **SHAPE))
    assert text.startswith(f"{output}/checkpoint-4 cannot be written: ")
    assert "File too large" in text
    assert "; free space, or make it writable, or name another training.output\n" in text
    assert text.count(f"the last whole checkpoint is {output}/checkpoint-2:") == 1
    assert names(output) == ["checkpoint-2"]
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    assert_goes_on_exactly(output, tmp_path / "whole", Regression)


def test_where_the_saving_of_a_failed_run_fails_too_both_are_told(tmp_path: Path) -> None:
    task = broken(ZeroDivisionError("a bug"))
    with small_files() as at_most:
        task.hook = lambda step: at_most(1000) if step == 3 else None
        text = ended(ZeroDivisionError, task, Points(), settings(tmp_path / "run", **SHAPE))
    bug, failure, last, *_ = text.splitlines()
    assert bug == "a bug"
    assert failure.startswith(f"  {tmp_path}/run/checkpoint-3 cannot be written: ")
    assert last == f"  the last whole checkpoint is {tmp_path}/run/checkpoint-2: training.resume=latest goes on from it"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of half a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", place], check=False).returncode
    ):
        pytest.skip("mounting a small disk is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


def filled(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


@pytest.mark.parametrize(
    ("happens", "reason"), [(filled, "No space left on device"), (read_only, "Read-only file system")]
)
@pytest.mark.parametrize("what", ["checkpoint-4", "samples/step-000004"])
def test_a_disk_that_takes_no_more_names_the_last_whole_checkpoint(
    disk: Path, tmp_path: Path, happens: Callable[[Path], None], reason: str, what: str
) -> None:
    task, output = Regression(), disk / "run"
    task.hook = lambda step: happens(disk) if step == 3 else None
    preview = 4 if what.startswith("samples") else 0
    text = ended(DiskError, task, Points(), settings(output, **SHAPE, preview_every=preview))
    assert text.startswith(f"{output}/{what} cannot be written: ")
    assert reason in text
    assert f"the last whole checkpoint is {output}/checkpoint-2:" in text
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    (disk / "filler").unlink(missing_ok=True)
    assert_goes_on_exactly(output, tmp_path / "whole", Regression)


def test_metrics_that_the_disk_refuses_leave_the_checkpoint_before_them(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def saved(*arguments: Any) -> Path:
        folder = save(*arguments)
        filled(disk)
        return folder

    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", saved)
    text = ended(DiskError, Regression(), Points(), settings(disk / "run", **SHAPE))
    assert text.startswith(f"{disk}/run/metrics.json cannot be written: No space left on device")
    assert f"the last whole checkpoint is {disk}/run/checkpoint-2:" in text


def test_an_export_that_the_disk_refuses_leaves_the_final_checkpoint(disk: Path) -> None:
    class Large(Regression):
        def export(self, folder: Path) -> None:
            (folder / "map.bin").write_bytes(bytes(2**20))

    text = ended(DiskError, Large(), Points(), settings(disk / "run", **SHAPE))
    assert text.startswith(f"{disk}/run/export cannot be written: No space left on device")
    assert f"the last whole checkpoint is {disk}/run/checkpoint-6:" in text
    assert not (disk / "run/export").exists()
    assert fit(Regression(), Points(), settings(disk / "run", **SHAPE, resume="latest")).export


def test_a_resume_on_a_disk_that_cannot_be_written_names_the_checkpoint(disk: Path) -> None:
    fit(Regression(), Points(), settings(disk / "run", **(SHAPE | {"steps": 2})))
    read_only(disk)
    text = ended(DiskError, Regression(), Points(), settings(disk / "run", **SHAPE, resume="latest"))
    assert text.startswith(f"{disk}/run cannot be written: Read-only file system")
    assert f"the last whole checkpoint is {disk}/run/checkpoint-2:" in text


# --- room for checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "shape", "told"),
    [
        (0.9, {}, "a checkpoint takes about 1 GB, but 0.9 GB are free for training.output="),
        (2.5, {}, "3 checkpoints take about 3 GB (training.keep=2), but 2.5 GB are free"),
        (3.1, {}, ""),
        (1.1, {"checkpoint_every": 0}, ""),
        (2.5, {"checkpoint_every": 3}, ""),
        (3.5, {"keep": 0}, "6 checkpoints take about 6 GB (training.keep=0), but 3.5 GB are free"),
    ],
)
def test_room_for_the_checkpoints_is_looked_for_before_the_first_step(
    tmp_path: Path, free: float, shape: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    usage = type(shutil.disk_usage(tmp_path))(10**12, 0, int(free * 1e9))
    monkeypatch.setattr(endings.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(checkpoint, "size", lambda _: 10**9)
    run = settings(tmp_path, **{"steps": 6, "checkpoint_every": 1, **shape})
    with pytest.raises(DiskError) if free < 1 else nullcontext() as caught:
        endings.check_room(run, checkpoint.State(), [])
    said = str(caught.value) if caught else caplog.text
    assert told in said
    assert bool(told) == bool(said)


def test_the_size_of_a_checkpoint_is_known_beforehand(tmp_path: Path) -> None:
    task = Adversarial()
    trainees = [Trainee(player, settings(tmp_path, ema=0.9)) for player in task.players]
    fit(task, Points(), settings(tmp_path / "run", **SHAPE))
    for one in trainees:
        one.average = {name: p.detach() for name, p in one.parameters.items()}
    tensors = everything(tmp_path / "run/checkpoint-6")
    steps = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith(" step"))
    assert checkpoint.size(trainees) == sum(tensor.nbytes for tensor in tensors.values()) - steps


def test_a_disk_too_small_for_one_checkpoint_is_refused(disk: Path) -> None:
    class Wide(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.network = torch.nn.Linear(4, 40_000)
            self.players[0].network = self.network

    text = ended(DiskError, Wide(), Points(), settings(disk / "run", **SHAPE))
    assert text.startswith("a checkpoint takes about 0.0032 GB, but 0.000")
    assert issubclass(DiskError, InflateError)
