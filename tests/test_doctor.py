"""The checks of a cluster on two real processes: a sound one passes, and each way of being broken is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from torch.multiprocessing import ProcessExitedException

from inflate.doctor import Rehearsal, judge_shares, limited, main, named, rehearse, twins
from inflate.errors import InflateError
from inflate.findings import all_pass
from inflate.training.noise import Noise
from inflate.training.player import Batch
from inflate.training.processes import join_processes
from inflate.training.rehearsal import batches
from inflate.training.sharding import Sharding
from launch import FSDP2, launch, start

# Python 3.12 warns of forks of processes with threads; ours start after the fork.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

ROOT = Path(__file__).parents[1]
Lines = dict[str, str]


@pytest.fixture(autouse=True, scope="module")
def _apart() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def second() -> bool:
    return join_processes().process_index == 1


# --- ways of being broken: each in the second process only, unless it says so -----------------------------------------


def reads_the_firsts_numbers(sound: Rehearsal) -> Rehearsal:
    return replace(sound, batches=batches(sound.settings, 2, 0))


def draws_the_firsts_noise(sound: Rehearsal) -> Rehearsal:
    def draw(batch: Batch) -> Noise:
        return Noise(sound.settings.seed, batch["number"] - len(batch["number"]) * second(), "cpu")

    return replace(sound, draw=draw)


def fails_to_draw(sound: Rehearsal) -> Rehearsal:
    def draw(batch: Batch) -> Noise:
        if second():
            raise OSError("the card has fallen off the bus")
        return sound.draw(batch)

    return replace(sound, draw=draw)


def calls_the_bare_network(sound: Rehearsal) -> Rehearsal:
    (player,) = sound.task.players
    bare, loss = player.network, player.loss

    def past_the_wrapper(*arguments: Any) -> Any:
        player.network = bare
        return loss(*arguments)

    if second():
        player.loss = past_the_wrapper
    return sound


def never_exchanges(sound: Rehearsal) -> Rehearsal:
    """In both processes: one that exchanges gradients would wait for the other."""
    (player,) = sound.task.players
    bare, loss = player.network, player.loss

    def without_exchange(*arguments: Any) -> Any:
        if player.network is bare:
            return loss(*arguments)
        with player.network.no_sync():
            return loss(*arguments)

    player.loss = without_exchange
    return sound


def begins_with_other_weights(sound: Rehearsal) -> Rehearsal:
    if second():
        next(iter(sound.trainees[0].parameters.values())).data.add_(1e-3)
    return sound


def writes_to_another_folder(sound: Rehearsal) -> Rehearsal:
    output = sound.settings.output / "elsewhere" if second() else sound.settings.output
    return replace(sound, settings=replace(sound.settings, output=output))


def is_another_installation(sound: Rehearsal) -> Rehearsal:
    """Launched otherwise, and with another file of a network that is not trained. The last way: it stays so."""
    if second():
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
        next(sound.task.frozen[0].parameters()).data.add_(1e-3)
    return sound


WAYS: list[Callable[[Rehearsal], Rehearsal]] = [
    reads_the_firsts_numbers, draws_the_firsts_noise, fails_to_draw, calls_the_bare_network, never_exchanges,
    begins_with_other_weights, writes_to_another_folder, is_another_installation,
]  # fmt: skip


def examined(output: Path, change: Callable[[Rehearsal], Rehearsal], without: str = "") -> Lines:
    """The line of each check, and under `passed` whether none failed."""
    lines: list[str] = []
    with rehearse(output) as sound:
        checks = {name: check for name, check in change(sound).checks().items() if name != without}
        passed = all_pass(checks, (InflateError,), lines.append)
    return {**dict(zip(checks, lines, strict=True)), "passed": str(passed)}


def examined_in_every_way(output: Path) -> dict[str, Lines]:
    found = {"sound": examined(output, lambda sound: sound)}
    found |= {way.__name__: examined(output, way, "bandwidth") for way in WAYS}
    os.environ.update(FSDP2 | {"ACCELERATE_MIXED_PRECISION": "no"})
    return {**found, "spread": examined(output, lambda sound: sound, "bandwidth")}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lines]:
    """What the main process tells of each way; the other has come to the same verdicts, and no trace is left."""
    output = tmp_path_factory.mktemp("output")
    first, other = launch(examined_in_every_way, output)
    assert list(output.iterdir()) == []
    assert first.keys() == other.keys()
    for way, lines in first.items():
        assert verdicts(lines) == verdicts(other[way]), way
    return dict(first)


def verdicts(lines: Lines) -> dict[str, str]:
    return {name: line.split()[0] for name, line in lines.items()}


def test_sound_processes_pass(told: dict[str, Lines]) -> None:
    lines = told["sound"]
    assert set(verdicts(lines).values()) == {"ok", "True"}
    assert "2 see each other by gloo: 2 x " in lines["processes"]
    assert "32 in 8 steps" in lines["sample numbers"]
    assert "equal bit for bit" in lines["gradients"]
    assert "64 MiB are summed in" in lines["bandwidth"]
    assert "6.1 GB in float32, would take" in lines["bandwidth"]
    assert "with equal weights" in lines["checkpoint"]
    assert lines["weights"].endswith("before the first step; whole weights in every process")


def test_processes_that_share_the_weights_pass_and_tell_how_much_each_holds(told: dict[str, Lines]) -> None:
    lines = told["spread"]
    assert set(verdicts(lines).values()) == {"ok", "True"}
    assert lines["weights"].endswith("; sharded weights, gathered per layer, 50% in each")


def test_weights_that_stay_whole_though_sharding_was_asked_for_are_told() -> None:
    """As accelerate leaves them on CPUs, without a word."""
    line = judge_shares([10, 10], 10, Sharding(True)).line("weights")
    assert line.startswith(
        "FAILED   weights: sharded weights, gathered per layer were asked for, but there are 2 copies"
    )
    assert judge_shares([5, 5, 5, 5], 10, Sharding(True, replicas=2)).verdict == "ok"


@pytest.mark.parametrize(
    ("way", "failures"),
    [
        (
            reads_the_firsts_numbers,
            {
                "sample numbers": "the sample numbers of process 1 are those of process 0",
                "noise": "the noise draws of process 1 are those of process 0",
                "gradients": "the gradients of process 1 are those of process 0",
            },
        ),
        (draws_the_firsts_noise, {"noise": "the noise draws of process 1 are those of process 0"}),
        (
            fails_to_draw,
            {
                "noise": "process 1: OSError: the card has fallen off the bus",
                "gradients": "process 1: OSError: the card has fallen off the bus",
            },
        ),
        (calls_the_bare_network, {"gradients": "process 1 bypassed the wrapper that exchanges gradients"}),
        (never_exchanges, {"gradients": "process 1 got other gradients than process 0"}),
        (begins_with_other_weights, {"weights": "process 1 built other weights than process 0"}),
        (
            writes_to_another_folder,
            {
                "output folder": "process 1 cannot see what process 0 writes",
                "checkpoint": "is checkpoint-0 for process 0, but None for process 1",
            },
        ),
        (
            is_another_installation,
            {
                "versions and settings": "ACCELERATE_MIXED_PRECISION is no for process 0, but bf16 for process 1",
                "weights": "process 1 built other weights than process 0",
            },
        ),
    ],
)
def test_a_broken_process_is_named(
    way: Callable[[Rehearsal], Rehearsal], failures: dict[str, str], told: dict[str, Lines]
) -> None:
    lines = told[way.__name__]
    assert lines["passed"] == "False"
    assert [name for name, verdict in verdicts(lines).items() if verdict == "FAILED"] == list(failures)
    for name, text in failures.items():
        assert text in lines[name]


def summed(output: Path) -> str:
    """Of a gradient that is summed over the processes instead of averaged."""
    alone = torch.arange(9.0) + second()
    with rehearse(output) as sound:
        return sound.judge_gradients(sound.accelerator.reduce(alone, reduction="sum"), alone).line("gradients")


def test_gradients_must_be_the_mean(tmp_path: Path) -> None:
    for line in launch(summed, tmp_path):
        assert line.startswith("FAILED   gradients: processes 0, 1 did not get the mean over the processes")


def ends(output: Path, statuses: Path, broken: bool) -> None:
    """Leave the status that the command ends with in a file named by the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    rank, status = torch.distributed.get_rank(), 0
    if broken and rank == 1:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    try:
        main(output)
    except SystemExit as end:
        status = int(str(end.code))
    (statuses / str(rank)).write_text(str(status))


@pytest.mark.parametrize("broken", [False, True])
def test_one_process_prints_and_all_end_with_one_status(
    broken: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    debug_launcher(ends, (tmp_path / "output", tmp_path, broken), 2)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys("01", str(int(broken)))
    verdicts = [line.split()[0] for line in capfd.readouterr().out.splitlines()]
    assert verdicts == ["ok", "FAILED" if broken else "ok", *["ok"] * 7]


def test_one_process_alone_is_told_what_to_launch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "warning  processes: one, alone: nothing to compare (for several: accelerate launch --multi_gpu"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_launch_that_splits_the_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(SystemExit, match="1"):
        main(tmp_path)
    assert "SLURM_STEP_NUM_TASKS=2 processes were started, but each sees only 1" in capsys.readouterr().err


MULTI_CPU = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
num_processes: 2
num_machines: 1
use_cpu: true
"""


@pytest.fixture(scope="module")
def fallen_back(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the doctor says where accelerate's launcher starts something else than it was asked for."""
    folder = tmp_path_factory.mktemp("launches")
    sharded = (ROOT / "recipes/accelerate/fsdp2.yaml").read_text()
    (folder / "fsdp.yaml").write_text(sharded.replace("use_cpu: false", "use_cpu: true"))
    (folder / "multi_cpu.yaml").write_text(MULTI_CPU)
    ways = {
        "cpu": ["--cpu", "--num_processes", "2"],
        "multi_cpu": ["--config_file", f"{folder}/multi_cpu.yaml"],
        "fsdp": ["--config_file", f"{folder}/fsdp.yaml", "--main_process_port", "0"],
    }
    command = ["-m", "inflate.doctor", "--output", str(folder / "output")]
    started = [start([*words, *command], folder / name) for name, words in ways.items()]
    for process in started:
        process.join()
        assert process.exitcode
    return {name: (folder / name).read_text() for name in ways}


@pytest.mark.parametrize(
    ("way", "processes", "says"),
    [
        ("cpu", 1, "asked for several processes, but started one"),
        ("multi_cpu", 1, "asked for several processes, but started one"),
        ("fsdp", 2, "WORLD_SIZE=2 processes were started, but each sees only 1"),
    ],
)
def test_a_launcher_that_falls_back_is_told(way: str, processes: int, says: str, fallen_back: dict[str, str]) -> None:
    errors = [line for line in fallen_back[way].splitlines() if line.startswith("error: ")]
    assert 1 <= len(errors) <= processes  # torch's launcher ends the second where the first is quicker
    assert all(says in line and "ACCELERATE_USE_CPU=true accelerate launch" in line for line in errors)


def waiting() -> None:
    with limited("gradients", 0.2):
        join_processes()
        if not second():
            torch.distributed.barrier()
            return
    torch.distributed.recv(torch.zeros(1), 0)


def test_a_process_that_waits_for_good_ends_with_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProcessExitedException, match="exit code 1"):
        launch(waiting)
    assert "FAILED gradients: process 0 on " in " ".join(capfd.readouterr().err.split())


def test_words() -> None:
    assert named([1]) == "process 1"
    assert named([1, 3]) == "processes 1, 3"
    assert twins([1, 2, 1, 2], int.__eq__) == "process 2 are those of process 0, process 3 are those of process 1"
