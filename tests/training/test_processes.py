"""Training in several real processes over gloo: what they see, that they stay equal, and how they end together."""

from __future__ import annotations

import logging
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import ProcessExitedException
from torch.optim.optimizer import register_optimizer_step_pre_hook

from inflate.data.clips import ClipDataset, Data, collate
from inflate.data.demo_clips import build
from inflate.errors import DataError, InflateError, TrainingError, text_of
from inflate.training import checkpoint
from inflate.training.decoder import Decoder, DecoderTask
from inflate.training.image_to_video import choose_trainable
from inflate.training.loop import fit
from inflate.training.player import Player
from inflate.training.processes import check_launch, check_same_norms, join_processes
from inflate.training.sharding import Sharding
from launch import ROOT, Collectives, free_port, launch, start
from tiny_svd import FRAMES, Clips, family, image_to_video, largest_difference
from toy import Layered, Points, Regression, send, settings, weights

# Python 3.12 warns of forks of processes with threads; ours start after the fork.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.usefixtures("on_cpu"),
]


def error_of(function: Callable[..., Any], *arguments: Any) -> str:
    """The kind and text of the user error that a function ends with; empty without."""
    try:
        function(*arguments)
    except InflateError as error:
        return f"{type(error).__name__}: {text_of(error)}"
    return ""


# --- what each process sees and does ----------------------------------------------------------------------------------


class Watched(Regression):
    """Keeps each step's noise, gradients as the optimiser gets them, and weights."""

    def __init__(self) -> None:
        super().__init__(torch.float64, dropout=0.3)
        self.noises: list[float] = []
        self.gradients: list[Tensor] = []
        self.course: list[list[float]] = []

    def loss(self, batch: Any, noise: Any, step: int) -> Any:
        self.noises += noise.normal("noise", 1).flatten().tolist()
        return super().loss(batch, noise, step)

    def record(self, optimizer: Any, *_: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]))
        self.course.append(weights(self))


def watch(output: Path) -> dict[str, Any]:
    task, lines = Watched(), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("inflate.training.processes")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    removable = register_optimizer_step_pre_hook(task.record)
    fit(task, Points(torch.float64), settings(output, steps=5, batch=2, accumulate=2, checkpoint_every=1, keep=0))
    removable.remove()
    kept = {name: getattr(task, name) for name in ("seen", "noises", "gradients", "course", "looked")}
    return {**kept, "weights": weights(task), "log": lines}


def test_processes_see_different_clips_and_noise_and_stay_equal_at_every_step(tmp_path: Path) -> None:
    first, second = launch(watch, tmp_path / "run")
    assert sorted(first["seen"] + second["seen"]) == list(range(5 * 8))
    assert not set(first["seen"]) & set(second["seen"])
    assert not set(first["noises"]) & set(second["noises"])
    assert len(first["gradients"]) == 5
    assert all(torch.equal(a, b) for a, b in zip(first["gradients"], second["gradients"], strict=True))
    assert first["course"] == second["course"]
    assert first["weights"] == second["weights"] != first["course"][-1]
    assert first["log"] == [
        "processes: 2 (cpu, gloo); forward passes per optimiser step: 4 = training.accumulate 2 x 2"
    ]
    assert second["log"] == []
    assert (first["looked"], second["looked"]) == (["evaluate", "preview", "evaluate", "preview", "export"], [])
    assert [p.name for p in checkpoint.numbered(tmp_path / "run")] == [f"checkpoint-{n}" for n in range(1, 6)]


# --- mixtures ---------------------------------------------------------------------------------------------------------


class Lengths:
    """Learns one number from clips of any length, and keeps the length, rate and names of every batch."""

    frozen: Sequence[nn.Module] = ()

    def __init__(self) -> None:
        self.network = nn.Linear(1, 1)
        self.players = [Player("map", self.network, self.loss)]
        self.seen: list[tuple[int, float, str]] = []

    def loss(self, batch: Any, noise: Any, step: int) -> Any:
        frames, names = batch["pixels"].shape[1], ", ".join(batch["name"])
        assert float(batch["pixels"].std(dim=(1, 2, 3, 4)).min()) > 0
        [rate] = {float(rate) for rate in batch["fps"]}
        self.seen.append((frames, rate, names))
        return self.players[0].network(batch["pixels"].mean(dim=(1, 2, 3, 4))[:, None]).square().squeeze(1), {}

    def evaluate(self) -> dict[str, float]:
        return {}

    def preview(self, folder: Path) -> None:
        (folder / "weight.txt").write_text(str(weights(self)))  # type: ignore[arg-type]

    def export(self, folder: Path) -> None:
        (folder / "weight.txt").write_text(str(weights(self)))  # type: ignore[arg-type]


MIXTURE = ["8x64x64@8fps:5", "4x64x64@4fps:1", "2x64x64@8fps:1", "1x64x64:1"]


def learnt_of_a_mixture(clips: Path, output: Path, **run: Any) -> list[tuple[int, float, str]]:
    """What each forward pass of this process saw, and the weights that came of it at the end."""
    data = Data(str(clips), split="train", buckets=MIXTURE, seconds_per_clip=None)
    task, shape = Lengths(), {"steps": 24, "batch": 2, "accumulate": 2}
    fit(task, ClipDataset(data, seed=5), settings(output, **(shape | run)), collate)
    return [*task.seen, (0, 0.0, str(weights(task)))]  # type: ignore[arg-type]


def test_all_processes_and_passes_draw_the_same_bucket_of_a_mixture_and_do_so_again(tmp_path: Path) -> None:
    clips = build(tmp_path / "clips", clips=5, held_out=1)
    first, second = launch(learnt_of_a_mixture, clips, tmp_path / "run")
    sizes = [(frames, rate) for frames, rate, _ in first[:-1]]
    assert sizes == [(frames, rate) for frames, rate, _ in second[:-1]]
    assert sizes[::2] == sizes[1::2], "the accumulated passes of a step"
    assert Counter(sizes[::2]) == {(8, 8.0): 15, (4, 4.0): 3, (2, 8.0): 3, (1, 1.0): 3}
    assert first[-1] == second[-1], "the weights"
    assert [names for *_, names in first] != [names for *_, names in second]
    parts = [learnt_of_a_mixture(clips, tmp_path / "parts", batch=4, steps=steps, **run) for steps, run in RESUMED]
    alone = [seen for part in parts for seen in part[:-1]]
    assert [seen[:2] for seen in alone] == sizes, "in one process, in readers, resumed within a round and a pass"
    assert [set(names.split(", ")) for *_, names in alone] == [
        {*one.split(", "), *other.split(", ")} for (*_, one), (*_, other) in zip(first[:-1], second[:-1], strict=True)
    ]


RESUMED: list[tuple[int, dict[str, Any]]] = [
    (5, {}),
    (11, {"resume": "latest", "workers": 1}),
    (24, {"resume": "latest"}),
]


# --- the same trajectory on any number of processes -------------------------------------------------------------------


def decoder() -> DecoderTask:
    small = Decoder(
        trainable="decoder", adversarial_start=3, discriminator_lead=2, discriminator_channels=8,
        discriminator_layers=2, image_adversarial=True, perceptual=0.1,
    )  # fmt: skip
    task = DecoderTask(family().vae, small, Clips()[100]["pixels"][None], lambda folder: None)
    for critic in task.critics.values():
        critic.double()
    return task


def trained(make: Callable[[], Any], output: Path, batch: int, accumulate: int, steps: int = 20) -> dict[str, Tensor]:
    """The weights of all players after some steps; nothing is evaluated, previewed or exported."""
    task = make()
    task.evaluate, task.preview, task.export = dict, lambda folder: None, lambda folder: None
    fit(task, Clips(), settings(output, steps=steps, batch=batch, accumulate=accumulate, lr=1e-3, ema=0.9))
    named = {f"{player.name}.{name}": p for player in task.players for name, p in player.network.named_parameters()}
    return {name: parameter.detach() for name, parameter in named.items() if parameter.requires_grad}


@pytest.mark.parametrize("make", [image_to_video, decoder])
def test_accumulation_batches_and_processes_give_the_same_trajectory(make: Callable[[], Any], tmp_path: Path) -> None:
    start = {name: p.detach().clone() for player in make().players for name, p in player.network.named_parameters()}
    accumulated = trained(make, tmp_path / "accumulated", 1, 2)
    together = trained(make, tmp_path / "together", 2, 1)
    first, second = launch(trained, make, tmp_path / "processes", 1, 1)
    assert all(tensor.dtype == torch.float64 for tensor in accumulated.values())
    moved = [name for name, value in accumulated.items() if not torch.equal(value, start[name.split(".", 1)[1]])]
    assert len(moved) == len(accumulated)
    assert largest_difference(accumulated, together) < 1e-9
    assert largest_difference(accumulated, first) < 1e-9
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- a clip of one frame ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, FRAMES])
def test_images_leave_no_trained_parameter_of_the_unet_without_gradient(frames: int) -> None:
    unet = family().unet
    choose_trainable(unet, "all")
    marks = torch.ones(1, frames, dtype=torch.bool)
    sample = torch.randn(1, frames, 8, 4, 4, dtype=torch.float64)
    context, ids = torch.randn(1, 1, 8, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    unet(sample, torch.ones(1), context, added_time_ids=ids, image_only=marks).sample.sum().backward()
    assert [name for name, p in unet.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(not p.grad.any() for p in unet.temporal_parameters().values() if p.grad is not None)


def mixed(make: Callable[[], Any], output: Path, accumulate: int) -> dict[str, Tensor]:
    """Weights after training on images and clips in turn: on two processes, one sees nothing but images."""
    task = make()
    task.evaluate, task.preview, task.export = dict, lambda folder: None, lambda folder: None
    fit(task, Clips(image=2), settings(output, steps=4, accumulate=accumulate, lr=1e-3))
    return {name: p.detach() for player in task.players for name, p in player.network.named_parameters()}


@pytest.mark.parametrize("make", [image_to_video, decoder])
def test_images_beside_clips_neither_hang_the_processes_nor_change_the_result(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    alone = mixed(make, tmp_path / "alone", 2)
    first, second = launch(mixed, make, tmp_path / "processes", 1)
    assert largest_difference(alone, first) < 1e-9
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- checkpoints on another number of processes -----------------------------------------------------------------------


def learn(output: Path, accumulate: int, stop: int = -1, resume: str | None = None, batch: int = 1) -> list[float]:
    """The weights after 8 steps, or after a signal in the step `stop`, which reaches the last process only."""
    task = Regression(torch.float64)
    if join_processes().is_last_process:
        task.hook = send(stop, signal.SIGTERM)
    shape = {"steps": 8, "batch": batch, "accumulate": accumulate, "warmup": 2, "schedule": "cosine", "ema": 0.9}
    result = fit(task, Points(torch.float64), settings(output, resume=resume, **shape))
    assert result.step == (8 if stop < 0 else stop + 1)
    return weights(task)


@pytest.mark.parametrize("two_first", [True, False])
def test_a_run_goes_on_with_another_number_of_processes(two_first: bool, tmp_path: Path) -> None:
    whole, output = learn(tmp_path / "whole", 2), tmp_path / "parts"
    if two_first:
        launch(learn, output, 1, 3)
        resumed = learn(output, 2, -1, "latest")
    else:
        learn(output, 2, 3)
        resumed, other = launch(learn, output, 1, -1, "latest")
        assert resumed == other
    assert resumed == pytest.approx(whole, abs=1e-9, rel=0)


def test_fewer_clips_per_step_are_refused_with_the_remedy(tmp_path: Path) -> None:
    launch(learn, tmp_path / "run", 1, 1)
    message = error_of(learn, tmp_path / "run", 1, -1, "latest")
    assert message.startswith("CheckpointError")
    assert "training.batch x training.accumulate x processes was 2, is 1" in message
    assert "half the processes with twice the accumulation" in message
    assert len(learn(tmp_path / "run", 1, -1, "latest", batch=2)) == len(weights(Regression()))


# --- ending together --------------------------------------------------------------------------------------------------


def killed(output: Path, report: Path) -> None:
    task = Regression()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which may come between the end and the report
    if join_processes().is_last_process:
        task.hook = send(5, signal.SIGKILL)
    report.write_text(error_of(fit, task, Points(), settings(output, steps=100, checkpoint_every=2, keep=0)))


def test_when_a_process_is_killed_the_other_saves_the_last_step_and_says_so(tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        launch(killed, tmp_path / "run", tmp_path / "report")
    assert time.monotonic() - begun < 60
    message = (tmp_path / "report").read_text()
    assert message.startswith("TrainingError: another process has ended")
    assert f"the last whole checkpoint is {tmp_path}/run/checkpoint-5: training.resume=latest goes on" in message
    task = Regression()
    assert fit(task, Points(), settings(tmp_path / "run", steps=6, accumulate=2, resume="latest")).step == 6
    assert task.seen == [10, 11]


class Vanishing(Points):
    """The fourth sample cannot be read: that of the second process in the second step."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number == 3:
            raise DataError("b.mp4 is gone; put it back")
        return super().__getitem__(number)


def unreadable(output: Path) -> str:
    return error_of(fit, Regression(), Vanishing(), settings(output, steps=4))


def test_an_error_of_one_process_ends_the_other(tmp_path: Path) -> None:
    first, second = launch(unreadable, tmp_path / "run")
    assert second.splitlines() == [
        "DataError: b.mp4 is gone; put it back", "  process 0 names the checkpoint to go on from",
    ]  # fmt: skip
    assert first.startswith("TrainingError: another process has ended")
    assert f"the last whole checkpoint is {tmp_path}/run/checkpoint-1:" in first


def full_disk(output: Path) -> str:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    checkpoint.save_file = fail
    return error_of(fit, Regression(), Points(), settings(output, steps=4, checkpoint_every=1))


def test_a_checkpoint_that_cannot_be_written_ends_all_processes_with_its_message(tmp_path: Path) -> None:
    first, second = launch(full_disk, tmp_path / "run")
    assert first.splitlines() == [
        f"DiskError: {tmp_path}/run/checkpoint-1 cannot be written: no space left; free space, or make it writable, "
        "or name another training.output",
        f"  there is no checkpoint in {tmp_path}/run",
    ]
    assert second.startswith(f"TrainingError: process 0: {first.removeprefix('DiskError: ')}")


def refused(output: Path) -> str:
    return error_of(fit, Regression(), Points(), settings(output, steps=1))


def test_an_output_of_another_run_is_refused_by_all_processes(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    messages = launch(refused, tmp_path)
    assert all("is not empty; name another folder" in message for message in messages)


class Shorter(Points):
    def __len__(self) -> int:
        return 7 - join_processes().process_index


def disagreeing(output: Path) -> str:
    return error_of(fit, Regression(), Shorter(), settings(output, steps=1))


def test_processes_that_hold_other_clips_are_refused(tmp_path: Path) -> None:
    first, second = launch(disagreeing, tmp_path / "run")
    assert first.startswith("TrainingError: clips is 7 for process 0, but 6 for process 1")
    assert second.startswith("TrainingError: clips is 6 for process 1, but 7 for process 0")


# --- gradients that do not arrive -------------------------------------------------------------------------------------


class Unwrapped(Regression):
    """Calls the module inside the wrapper, which exchanges no gradients."""

    def loss(self, batch: Any, noise: Any, step: int) -> Any:
        self.players[0].network = self.network
        return super().loss(batch, noise, step)


class Partial(Regression):
    """Leaves a layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.ModuleDict({"used": self.network, "left": nn.Linear(4, 4)})
        self.network.forward = self.network["used"].forward
        self.players = [Player("map", self.network, self.loss)]


def wrong(kind: type[Regression], output: Path) -> list[Any]:
    task = kind()
    return [error_of(fit, task, Points(), settings(output, steps=20)), weights(task) == weights(kind())]


def test_gradients_that_are_not_exchanged_are_noticed_in_the_first_step(tmp_path: Path) -> None:
    for message, unchanged in launch(wrong, Unwrapped, tmp_path / "run"):
        assert "the gradients of player 'map' differ between the processes" in message
        assert "must call player.network(...)" in message
        assert unchanged


def test_a_parameter_that_gets_no_gradient_is_named(tmp_path: Path) -> None:
    for message, unchanged in launch(wrong, Partial, tmp_path / "run"):
        assert "player 'map': no gradient reached left.bias, left.weight" in message
        assert unchanged


def test_norms_may_differ_by_rounding_and_overflow_together() -> None:
    check_same_norms(["a", "b"], [[1.0, torch.inf], [1.0 + 1e-6, torch.inf]])
    with pytest.raises(TrainingError, match="player 'b' differ between the processes .norms 2, 2.1"):
        check_same_norms(["a", "b"], [[1.0, 2.0], [1.0, 2.1]])


# --- what they exchange -----------------------------------------------------------------------------------------------


def exchanged(folder: Path, passes: int) -> dict[str, int]:
    with Collectives() as collectives:
        fit(Regression(), Points(), settings(folder / str(passes), steps=1, accumulate=passes))
    return collectives.counts


def exchanged_in_turn(folder: Path) -> list[dict[str, int]]:
    return [exchanged(folder, passes) for passes in (1, 3)]


def test_passes_that_only_accumulate_exchange_nothing(tmp_path: Path) -> None:
    (once, thrice), _ = launch(exchanged_in_turn, tmp_path)
    assert once == thrice
    assert once["allreduce"] > 0


# --- how the processes were started -----------------------------------------------------------------------------------

MEETING = """
from inflate.training.processes import join_processes
from inflate.training.sharding import holding
state = join_processes()
state.wait_for_everyone()
print(state.process_index, "of", state.num_processes, "with", holding(state.sharding))
"""


def test_launchers_of_two_machines_bring_their_processes_together(tmp_path: Path) -> None:
    """Both on this machine, with one process each."""
    script = tmp_path / "meeting.py"
    script.write_text(MEETING)
    words = ["--config_file", f"{ROOT}/recipes/accelerate/two_machines_fsdp2.yaml", "--num_processes", "2"]
    words += ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
    started = [
        start([*words, "--machine_rank", rank, str(script)], tmp_path / rank, ACCELERATE_USE_CPU="true")
        for rank in ("0", "1")
    ]
    for process in started:
        process.join()
        assert process.exitcode == 0
    expected = "of 2 with sharded weights, gathered per layer within each of 2 groups"
    assert [f"{rank} {expected}" in (tmp_path / rank).read_text() for rank in ("0", "1")] == [True, True]


def differing(output: Path) -> str:
    if join_processes().process_index:
        join_processes().sharding = Sharding(per_layer=True)
    return error_of(fit, Layered(), Points(torch.float64), settings(output, steps=1))


def test_machines_that_were_launched_in_two_ways_are_refused(tmp_path: Path) -> None:
    first, second = launch(differing, tmp_path / "run")
    whole, sharded = "whole weights in every process", "sharded weights, gathered per layer"
    assert first.startswith(f"TrainingError: what the launcher asks for is {whole} for process 0, but {sharded} for")
    assert second.startswith(f"TrainingError: what the launcher asks for is {sharded} for process 1, but {whole} for")


ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
VAIN = {**ACCELERATE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "seen"),
    [
        ({}, 1),
        (ACCELERATE, 1),
        ({**ACCELERATE, **TORCHRUN, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, 2),
        ({**TORCHRUN, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, 8),
        ({**VAIN, "WORLD_SIZE": "1", "RANK": "0"}, 1),  # a cluster's own variables for one process
        ({"SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
    ],
)
def test_processes_that_see_each_other_are_welcome(environment: dict[str, str], seen: int) -> None:
    check_launch(environment, seen)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**TORCHRUN, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "WORLD_SIZE=2 processes were started"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4 processes were started"),
        ({"SLURM_STEP_NUM_TASKS": "3"}, "SLURM_STEP_NUM_TASKS=3 processes were started"),
        ({**VAIN, "ACCELERATE_USE_CPU": "True"}, "asked for several processes, but started one"),
    ],
)
def test_processes_that_believe_to_be_alone_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        check_launch(environment, 1)
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N" in str(caught.value)


def test_an_accumulation_of_the_launchers_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(TrainingError, match=r"STEPS=4 contradicts training\.accumulate=2"):
        fit(Regression(), Points(), settings(tmp_path / "run", steps=1, accumulate=2))


def test_a_launchers_precision_that_is_not_used_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    fit(Regression(), Points(), settings(tmp_path / "run", steps=1))
    assert "mixed_precision=bf16 is not used: training.precision decides" in caplog.text
