"""The training loop on a toy task: exact resume, invariance to batch layout, players, stops and refusals."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from inflate.errors import CheckpointError, ConfigError, DataError, DiskError, TrainingError
from inflate.measures import SHARES
from inflate.training import loop
from inflate.training.checkpoint import numbered
from inflate.training.loop import Numbers, Result, fit
from inflate.training.player import Player
from inflate.training.settings import Training, rate
from toy import CLIPS, Adversarial, Points, Regression, send, settings, weights

pytestmark = pytest.mark.usefixtures("on_cpu")


def exported(result: Result) -> dict[str, torch.Tensor]:
    assert result.export is not None
    state: dict[str, torch.Tensor] = torch.load(result.export / "map.pt", weights_only=True)
    return state


def step_and_time_free(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in ("clips_per_second", *SHARES)} for row in rows]


def test_measuring_and_saving_do_not_count_as_training_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(_: Regression) -> dict[str, float]:
        time.sleep(0.3)
        return {"error": 0.0}

    monkeypatch.setattr(Regression, "evaluate", slow)
    fit(Regression(), Points(), settings(tmp_path / "run", steps=4, log_every=1, evaluate_every=1))
    rows = json.loads((tmp_path / "run" / "metrics.json").read_text())["history"]
    assert min(row["clips_per_second"] for row in rows) > settings(tmp_path).batch / 0.3


class Vanishing(Points):
    """A sample that cannot be read."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number == self.number:
            raise DataError("b.mp4 is gone; put it back")
        return super().__getitem__(number)


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_everything_that_is_promised(tmp_path: Path) -> None:
    output, task = tmp_path / "run", Regression()
    result = fit(
        task,
        Points(),
        settings(output, steps=60, batch=4, checkpoint_every=20, preview_every=30, evaluate_every=30, keep=2),
        config="a: 1\n",
    )
    assert (result.step, result.stopped) == (60, "finished")
    losses = [row["loss/map"] for row in json.loads((output / "metrics.json").read_text())["history"]]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert [row["step"] for row in result.held_out] == [0, 30, 60]
    assert sorted(p.name for p in (output / "samples").iterdir()) == ["step-000000", "step-000030", "step-000060"]
    assert [p.name for p in numbered(output)] == ["checkpoint-40", "checkpoint-60"]
    assert (output / "config.yaml").read_text() == "a: 1\n"
    assert torch.equal(exported(result)["0.weight"], task.network[0].weight)
    assert not [p for p in output.rglob(".*")]


def test_the_history_holds_rates_norms_logs_and_speed(tmp_path: Path) -> None:
    fit(Regression(), Points(), settings(tmp_path / "run", steps=4, log_every=2, warmup=4, lr=0.1))
    history = json.loads((tmp_path / "run/metrics.json").read_text())["history"]
    assert [row["step"] for row in history] == [2, 4]
    assert [row["lr/map"] for row in history] == [pytest.approx(0.05), pytest.approx(0.1)]
    assert all(row[name] > 0 for row in history for name in ("gradient_norm/map", "largest/map", "clips_per_second"))
    assert all(0 <= row["data_wait"] <= 1 for row in history)


def test_log_entries_are_means_since_the_last_one(tmp_path: Path) -> None:
    rows = []
    for every in (1, 4):
        fit(Regression(), Points(), settings(tmp_path / str(every), steps=4, log_every=every))
        rows.append(json.loads((tmp_path / f"{every}/metrics.json").read_text())["history"])
    mean = sum(row["loss/map"] for row in rows[0]) / 4
    assert rows[1][0]["loss/map"] == pytest.approx(mean, rel=1e-6)


def test_tensorboard_gets_the_losses(tmp_path: Path) -> None:
    fit(Regression(), Points(), settings(tmp_path / "run", steps=2, tracker="tensorboard"))
    files = list((tmp_path / "run/logs").rglob("events.out.tfevents*"))
    assert any(b"loss/map" in file.read_bytes() for file in files)
    assert any(b"held_out/error" in file.read_bytes() for file in files)


def test_evaluation_leaves_training_as_it_was(tmp_path: Path) -> None:
    plain, watched = Regression(dropout=0.3), Regression(dropout=0.3)
    fit(plain, Points(), settings(tmp_path / "a", steps=6, ema=0.9))
    fit(watched, Points(), settings(tmp_path / "b", steps=6, ema=0.9, evaluate_every=1, preview_every=2))
    assert watched.looked.count("evaluate") == 7
    assert weights(plain) == weights(watched)


# --- exact resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [Regression, Adversarial])
def test_n_plus_n_steps_equal_2n_bit_for_bit(tmp_path: Path, kind: type[Regression], workers: int) -> None:
    common: dict[str, Any] = {
        "batch": 2,
        "accumulate": 2,
        "ema": 0.9,
        "warmup": 3,
    }  # 5 steps take 20 samples: mid-epoch
    whole, first, second = kind(), kind(), kind()
    straight = fit(whole, Points(), settings(tmp_path / "whole", steps=10, **common))
    fit(first, Points(), settings(tmp_path / "parts", steps=5, workers=workers, **common))
    with torch.no_grad():
        for parameter in second.network.parameters():
            parameter.zero_()  # all must come from the checkpoint
    resumed = fit(second, Points(), settings(tmp_path / "parts", steps=10, workers=workers, resume="latest", **common))
    assert weights(whole) == weights(second)
    assert first.seen + second.seen == whole.seen
    pairs = zip(exported(straight).items(), exported(resumed).items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)  # the averaged weights
    histories = [json.loads((tmp_path / run / "metrics.json").read_text())["history"] for run in ("whole", "parts")]
    assert step_and_time_free(histories[0]) == step_and_time_free(histories[1])


def test_resume_repeats_dropout_and_follows_the_schedule(tmp_path: Path) -> None:
    whole, first, second = (Regression(dropout=0.4) for _ in range(3))
    fit(whole, Points(), settings(tmp_path / "whole", steps=8, schedule="cosine"))
    first.hook = send(3, signal.SIGTERM)
    assert fit(first, Points(), settings(tmp_path / "parts", steps=8, schedule="cosine")).stopped == "SIGTERM"
    fit(second, Points(), settings(tmp_path / "parts", steps=8, schedule="cosine", resume="latest"))
    assert weights(whole) == weights(second)


def test_latest_without_a_checkpoint_starts_afresh(tmp_path: Path) -> None:
    task = Regression()
    result = fit(task, Points(), settings(tmp_path / "run", steps=2, resume="latest"))
    assert (result.step, task.seen) == (2, [0, 1])


@pytest.mark.parametrize(("warmup", "warned"), [(1, False), (2, True)])
def test_a_warm_up_that_outlasts_the_run_is_told(
    warmup: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(Regression(), Points(), settings(tmp_path / "run", steps=2, warmup=warmup))
    assert (f"training.warmup={warmup}, of 2 steps in all" in caplog.text) is warned


def test_a_run_cut_off_before_its_first_checkpoint_starts_afresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError):
        fit(Regression(), Vanishing(0), settings(tmp_path / "run", steps=2))
    task = Regression()
    assert fit(task, Points(), settings(tmp_path / "run", steps=2, resume="latest")).step == 2
    assert task.seen == [0, 1]
    assert f"{tmp_path}/run holds a run that was cut off before its first checkpoint: it starts afresh" in caplog.text


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml"])
def test_latest_in_a_folder_that_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(TrainingError, match="holds other files and no run to go on with; name another folder"):
        fit(Regression(), Points(), settings(tmp_path, steps=2, resume="latest"))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_a_killed_process_left_of_its_first_file_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".environment.json.99999999.partial").write_text("{")
    assert fit(Regression(), Points(), settings(tmp_path, steps=1)).step == 1


def test_resume_from_a_named_checkpoint_into_a_new_output(tmp_path: Path) -> None:
    whole, branch = Regression(), Regression()
    fit(whole, Points(), settings(tmp_path / "a", steps=6, checkpoint_every=3, keep=0))
    old = str(tmp_path / "a/checkpoint-3")
    with pytest.raises(DataError):
        fit(Regression(), Vanishing(3), settings(tmp_path / "b", steps=6, resume=old))
    with pytest.raises(CheckpointError, match=r"b holds no checkpoint, but its run had begun from one of step 3; name"):
        fit(Regression(), Points(), settings(tmp_path / "b", steps=6, resume="latest"))
    fit(branch, Points(), settings(tmp_path / "b", steps=6, resume=old))
    assert weights(whole) == weights(branch)
    with pytest.raises(TrainingError, match="checkpoint-6 is later"):
        fit(Regression(), Points(), settings(tmp_path / "a", steps=6, resume=old))
    with pytest.raises(TrainingError, match=r"b holds a run with checkpoints of its own; set training\.resume=latest"):
        fit(Regression(), Points(), settings(tmp_path / "b", steps=6, resume=old))


def test_a_finished_run_resumed_trains_no_further(tmp_path: Path) -> None:
    first, second = Regression(), Regression()
    fit(first, Points(), settings(tmp_path / "run", steps=3))
    result = fit(second, Points(), settings(tmp_path / "run", steps=3, resume="latest"))
    assert (result.step, second.seen) == (3, [])
    assert weights(first) == weights(second)


class Known(Points):
    """Clips that can be told from others."""

    mark = "sha256:12"

    def digest(self) -> str:
        return self.mark


def test_resume_refuses_other_clips(tmp_path: Path) -> None:
    fit(Regression(), Known(), settings(tmp_path / "run", steps=1))
    other = Known()
    other.mark = "sha256:13"
    with pytest.raises(CheckpointError, match="digest of the clips was sha256:12, is sha256:13"):
        fit(Regression(), other, settings(tmp_path / "run", steps=2, resume="latest"))


def test_resume_refuses_a_changed_task_and_tells_a_changed_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    fit(Regression(), Points(), settings(run, steps=2), config="decoder: {l1: 1.0}\n")
    with pytest.raises(CheckpointError, match=r"checkpoint-2 was made with other settings: decoder\.l1 was 1\.0, is 2"):
        fit(Regression(), Points(), settings(run, steps=3, resume="latest"), config="decoder: {l1: 2}\n")
    changed = settings(run, steps=3, lr=1e-3, resume="latest", preview_every=1)
    fit(Regression(), Points(), changed, config="decoder: {l1: 1.0}\n")
    assert [record.getMessage() for record in caplog.records] == [
        "training.steps was 2, is 3 from step 2 on", "training.lr was 0.01, is 0.001 from step 2 on",
    ]  # fmt: skip
    caplog.clear()
    fit(Regression(), Points(), changed, config="decoder: {l1: 1.0}\n")
    assert caplog.records == []
    assert (run / "config.yaml").read_text() == "decoder: {l1: 1.0}\n"


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch": 4}, {"accumulate": 2}, {"ema": 0.9}])
def test_resume_refuses_settings_that_would_change_the_run(tmp_path: Path, change: dict[str, Any]) -> None:
    fit(Regression(), Points(), settings(tmp_path / "run", steps=2, batch=2))
    task = Regression()
    before = weights(task)
    product = "training.batch x training.accumulate x processes"
    name = {"batch": product, "accumulate": product, "ema": "averaged weights"}.get(key := next(iter(change)), key)
    with pytest.raises(CheckpointError, match=rf"{name} was \w+, is \w+"):
        fit(task, Points(), settings(tmp_path / "run", **({"steps": 4, "batch": 2, "resume": "latest"} | change)))
    assert weights(task) == before


def test_a_changed_weight_decay_holds_after_a_resume(tmp_path: Path) -> None:
    tasks = [Regression(), Regression()]
    fit(Regression(), Points(), settings(tmp_path / "run", steps=2, keep=0))
    for task, decay in zip(tasks, (0.0, 5.0), strict=True):
        changed = settings(
            tmp_path / str(decay), steps=4, weight_decay=decay, resume=str(tmp_path / "run/checkpoint-2")
        )
        fit(task, Points(), changed)
    assert weights(tasks[0]) != weights(tasks[1])


# --- invariance -------------------------------------------------------------------------------------------------------


def test_two_batches_of_one_equal_one_batch_of_two(tmp_path: Path) -> None:
    tasks = [Regression(torch.float64), Regression(torch.float64)]
    for task, batch, accumulate in zip(tasks, (1, 2), (2, 1), strict=True):
        shape = {"batch": batch, "accumulate": accumulate}
        fit(task, Points(torch.float64), settings(tmp_path / str(batch), steps=12, ema=0.9, **shape))
    assert tasks[0].seen == tasks[1].seen
    assert weights(tasks[0]) == pytest.approx(weights(tasks[1]), abs=1e-9, rel=0)


def test_numbers_of_all_processes_partition_the_samples_of_a_step() -> None:
    shape = Training(batch=2, accumulate=3, steps=4)
    batches = [list(Numbers(Points(), shape, 2, process, step=1)) for process in (0, 1)]
    assert len(batches[0]) == len(Numbers(Points(), shape, 2, 0, 1)) == 9
    assert batches[0][0] == [12, 13]
    assert batches[1][0] == [14, 15]
    assert sorted(n for part in batches for batch in part for n in batch) == list(range(12, 48))


class Paired(Points):
    """Steps of even numbers and steps of odd ones by turns; a batch is as large as asked."""

    mark = "even, odd"

    def numbers(self, step: int, lanes: int, batch: int) -> list[int]:
        first = step // 2 * lanes * batch
        return [2 * place + step % 2 for place in range(first, first + lanes * batch)]

    def fingerprint(self) -> dict[str, str]:
        return {"pairs": self.mark}


def test_a_dataset_may_say_which_samples_form_a_step(tmp_path: Path) -> None:
    tasks = [Regression(torch.float64), Regression(torch.float64), Regression(torch.float64)]
    for task, batch, accumulate in zip(tasks, (1, 2), (2, 1), strict=False):
        shape = {"batch": batch, "accumulate": accumulate}
        fit(task, Paired(torch.float64), settings(tmp_path / str(batch), steps=6, **shape))
    assert tasks[0].seen == tasks[1].seen == [0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11]
    assert weights(tasks[0]) == pytest.approx(weights(tasks[1]), abs=1e-9, rel=0)
    lanes = [list(Numbers(Paired(), Training(batch=1, steps=6), 2, process, 0)) for process in (0, 1)]
    assert [n for pair in zip(*lanes, strict=True) for batch in pair for n in batch] == tasks[0].seen
    fit(tasks[2], Paired(torch.float64), settings(tmp_path / "parts", steps=3, batch=2))
    fit(tasks[2], Paired(torch.float64), settings(tmp_path / "parts", steps=6, batch=2, resume="latest"))
    assert tasks[2].seen == tasks[1].seen
    assert weights(tasks[2]) == weights(tasks[1])


def test_resume_refuses_a_dataset_whose_steps_differ(tmp_path: Path) -> None:
    fit(Regression(), Paired(), settings(tmp_path / "run", steps=1))
    other = Paired()
    other.mark = "odd, even"
    with pytest.raises(CheckpointError, match="pairs was even, odd, is odd, even"):
        fit(Regression(), other, settings(tmp_path / "run", steps=2, resume="latest"))


def test_what_became_of_the_clips_is_kept(tmp_path: Path) -> None:
    fit(Regression(), Points(), settings(tmp_path / "run", steps=1, batch=3), clips="a.mp4 used\n")
    assert (tmp_path / "run" / "clips.txt").read_text() == "a.mp4 used\n"
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_rates_are_functions_of_the_step() -> None:
    cosine = Training(steps=100, schedule="cosine", warmup=10)
    assert rate(cosine, 0) == pytest.approx(0.1, rel=1e-3)
    assert rate(cosine, 50) == pytest.approx(0.5)
    assert rate(cosine, 100) == pytest.approx(0)
    assert rate(cosine, 75, start=50) == pytest.approx(0.5)
    assert rate(Training(steps=10, schedule="linear"), 5) == pytest.approx(0.5)
    assert rate(Training(steps=10), 9) == 1


def test_gradients_are_clipped_to_the_limit(tmp_path: Path) -> None:
    task, limit = Regression(), 1e-3
    before = torch.tensor(weights(task))
    fit(task, Points(), settings(tmp_path / "run", steps=1, gradient_clip=limit, weight_decay=0.0))
    adam = torch.load(tmp_path / "run/checkpoint-1/map.optimizer.pt", weights_only=True)
    norm = torch.cat([state["exp_avg"].flatten() for state in adam.values()]).norm() / 0.1
    assert norm == pytest.approx(limit, rel=1e-3)
    assert not torch.equal(before, torch.tensor(weights(task)))


# --- players ----------------------------------------------------------------------------------------------------------


def test_two_players_train_in_the_same_loop_from_their_own_starts(tmp_path: Path) -> None:
    late = Adversarial(start=3)
    critic = [p.detach().clone() for p in late.critic.parameters()]
    fit(late, Points(), settings(tmp_path / "a", steps=3, batch=2))
    assert all(torch.equal(a, b) for a, b in zip(critic, late.critic.parameters(), strict=True))
    again = Adversarial(start=3)
    fit(again, Points(), settings(tmp_path / "b", steps=6, batch=2))
    assert any(not torch.equal(a, b) for a, b in zip(critic, again.critic.parameters(), strict=True))
    history = json.loads((tmp_path / "b/metrics.json").read_text())["history"]
    assert ["loss/critic" in row for row in history] == [False] * 3 + [True] * 3
    assert history[-1]["lr/critic"] == 3e-3
    assert again.leaks == []  # the critic is frozen in the generator's turn
    assert all(p.requires_grad for p in again.critic.parameters())


def test_each_player_gets_its_own_gradient_only(tmp_path: Path) -> None:
    task = Adversarial()
    before = weights(task)
    frozen = settings(tmp_path / "run", steps=2, lr=0.0)
    fit(task, Points(), frozen)
    moved = [a != b for a, b in zip(before, weights(task), strict=True)]
    count = sum(p.numel() for p in task.network.parameters())
    assert not any(moved[:count])  # learning rate 0
    assert any(moved[count:])


def test_frozen_parameters_stay_and_frozen_modules_are_in_eval_mode(tmp_path: Path) -> None:
    task = Regression()
    task.network[0].requires_grad_(False)
    kept = task.network[0].weight.detach().clone()
    fit(task, Points(), settings(tmp_path / "run", steps=2))
    assert torch.equal(kept, task.network[0].weight)
    assert not task.frozen[0].training
    assert not task.network.training


def test_players_that_cannot_train_are_refused(tmp_path: Path) -> None:
    shared, still, same = Regression(), Regression(), Adversarial()
    shared.players = [Player("a", shared.network, shared.loss), Player("b", shared.network, shared.loss)]
    still.network.requires_grad_(False)
    same.players[1].name = "map"
    for task, message in ((shared, "the same weights"), (still, "no trainable parameter"), (same, "its own name")):
        with pytest.raises(TrainingError, match=message):
            fit(task, Points(), settings(tmp_path / message.replace(" ", "-"), steps=1))
    with pytest.raises(TrainingError, match="fp16"):
        fit(Adversarial(), Points(), settings(tmp_path / "fp16", steps=1, precision="fp16"))


def test_the_average_is_what_is_exported(tmp_path: Path) -> None:
    task = Regression()
    result = fit(task, Points(), settings(tmp_path / "run", steps=5, ema=0.9))
    trained, average = task.network[0].weight, exported(result)["0.weight"]
    start = Regression().network[0].weight
    assert not torch.equal(trained, average)
    assert (average - start).norm() < (trained - start).norm()  # the average lags


def test_bf16_runs_the_network_in_bf16_and_keeps_float32_weights(tmp_path: Path) -> None:
    task, kinds = Regression(), []
    task.network[0].register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    fit(task, Points(), settings(tmp_path / "run", steps=1, precision="bf16"))
    assert set(kinds) == {torch.bfloat16}
    assert task.network[0].weight.dtype == torch.float32
    kinds.clear()
    task.network(torch.ones(1, 4))
    assert kinds == [torch.float32]  # given back without the autocast


def test_export_sees_the_network_at_full_precision(tmp_path: Path) -> None:
    class Measuring(Regression):
        def export(self, folder: Path) -> None:
            self.exported = self.players[0].network(torch.ones(1, 4)).dtype
            super().export(folder)

    task = Measuring()
    fit(task, Points(), settings(tmp_path / "run", steps=1, precision="bf16"))
    assert task.exported == torch.float32


# --- stops ------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(tmp_path: Path) -> None:
    data, task = Points(), Regression()
    fit(task, data, settings(tmp_path / "run", steps=2, batch=2))
    good = (tmp_path / "run/checkpoint-2/manifest.json").read_bytes()
    data.points[data.orders[0][5]] = torch.nan
    with pytest.raises(TrainingError, match=r"step 2: largest/map is not finite for sample numbers \[5\]"):
        fit(task, data, settings(tmp_path / "run", steps=4, batch=2, resume="latest"))
    assert all(torch.isfinite(p).all() for p in task.network.parameters())
    assert [p.name for p in numbered(tmp_path / "run")] == ["checkpoint-2"]
    assert (tmp_path / "run/checkpoint-2/manifest.json").read_bytes() == good


def test_a_parameter_that_is_not_finite_is_named(tmp_path: Path) -> None:
    task = Regression()
    with torch.no_grad():
        task.network[3].bias[1] = torch.inf
    with pytest.raises(TrainingError, match=r"parameter map\.3\.bias is not finite"):
        fit(task, Points(), settings(tmp_path / "run", steps=2))


class Overflowing(Regression):
    """A finite loss with an infinite gradient."""

    def loss(self, batch: Any, noise: Any, step: int) -> Any:
        loss, logs = super().loss(batch, noise, step)
        return loss + (self.network[3].bias[:1] * 0).sqrt(), logs


def test_a_gradient_that_is_not_finite_is_named_and_nothing_is_updated(tmp_path: Path) -> None:
    task = Overflowing()
    before = weights(task)
    with pytest.raises(TrainingError, match=r"the gradient of map\.3\.bias is not finite"):
        fit(task, Points(), settings(tmp_path / "run", steps=2))
    assert weights(task) == before


def test_a_loss_without_gradient_is_refused(tmp_path: Path) -> None:
    task, other = Regression(), nn.Linear(1, 1)
    task.players[0].loss = lambda batch, noise, step: (other(torch.ones(1, 1))[0], {})
    with pytest.raises(TrainingError, match="does not depend on its trainable parameters"):
        fit(task, Points(), settings(tmp_path / "run", steps=1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(tmp_path: Path, number: signal.Signals) -> None:
    whole, first, second = Regression(), Regression(), Regression()
    fit(whole, Points(), settings(tmp_path / "whole", steps=6))
    first.hook = send(2, number)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    result = fit(first, Points(), settings(tmp_path / "run", steps=6, workers=1))
    assert (result.step, result.stopped, result.export) == (3, number.name, None)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert "export" not in first.looked
    fit(second, Points(), settings(tmp_path / "run", steps=6, resume="latest"))
    assert weights(whole) == weights(second)


def test_a_signal_to_the_reader_processes_too_is_left_to_the_training_process(tmp_path: Path) -> None:
    task, readers = Regression(), []

    def hook(step: int) -> None:
        if step == 1:
            readers.extend(multiprocessing.active_children())
            for process in (*readers, multiprocessing.current_process()):
                os.kill(process.pid, signal.SIGTERM)

    task.hook = hook
    result = fit(task, Points(), settings(tmp_path / "run", steps=6, workers=2))
    assert (result.step, result.stopped, len(readers)) == (2, "SIGTERM", 2)
    for reader in readers:
        reader.join(10)
        assert reader.exitcode == 0


def test_readers_heed_a_signal_once_the_run_is_over() -> None:
    over = multiprocessing.Event()
    context = multiprocessing.get_context("fork")
    reader = context.Process(target=lambda: (loop.leave_signals(over, 0), ready.set(), time.sleep(60)))
    ready = context.Event()
    reader.start()
    ready.wait(10)
    reader.terminate()
    reader.join(0.3)
    assert reader.is_alive()
    over.set()
    reader.terminate()
    reader.join(10)
    assert reader.exitcode == 128 + signal.SIGTERM


def test_max_seconds_count_from_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Regression, "preview", lambda *_: time.sleep(0.5))
    result = fit(Regression(), Points(), settings(tmp_path / "run", steps=10**6, max_seconds=0.3))
    assert result.step > 0


def test_max_seconds_ends_with_checkpoint_evaluation_preview_and_export(tmp_path: Path) -> None:
    task = Regression()
    result = fit(task, Points(), settings(tmp_path / "run", steps=10**6, max_seconds=0.3, log_every=100))
    assert result.stopped == "max_seconds"
    assert 0 < result.step < 10**6
    assert (tmp_path / f"run/checkpoint-{result.step}/manifest.json").is_file()
    assert (tmp_path / f"run/samples/step-{result.step:06}/weight.txt").is_file()
    assert exported(result).keys() == task.network.state_dict().keys()
    assert [row["step"] for row in result.held_out] == [0, result.step]
    held_out = json.loads((tmp_path / "run/metrics.json").read_text())["held_out"]
    assert held_out == result.held_out


KILLED = """
import os, signal, sys
from pathlib import Path
from toy import Points, Regression, send, settings
from inflate.training.loop import fit
task = Regression()
task.hook = send(7, signal.SIGKILL)
fit(task, Points(), settings(Path(sys.argv[1]), steps=10, checkpoint_every=3, ema=0.9))
"""


@pytest.mark.slow
def test_kill_9_loses_at_most_one_interval(tmp_path: Path) -> None:
    tests = Path(loop.__file__).parents[2] / "tests"
    environment = {"PYTHONPATH": f"{tests}:{tests.parent}", "PATH": "/usr/bin:/bin", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run")]
    assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == -signal.SIGKILL
    whole, resumed = Regression(), Regression()
    fit(whole, Points(), settings(tmp_path / "whole", steps=10, ema=0.9))
    fit(resumed, Points(), settings(tmp_path / "run", steps=10, ema=0.9, resume="latest"))
    assert resumed.seen[0] == 6
    assert weights(whole) == weights(resumed)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_output_with_results_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match="run is not empty; name another folder"):
        fit(Regression(), Points(), settings(tmp_path / "run", steps=1), config="a: 1\n")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_an_unwritable_output_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file/run", Path("/proc/run")):
        task = Regression()
        with pytest.raises(DiskError, match="cannot be written"):
            fit(task, Points(), settings(output, steps=1))
        assert task.looked == []


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"batch": 0}, {"accumulate": 0}, {"ema": 1.0}, {"lr": float("nan")}, {"betas": (0.9, 1.0)}]
    + [{"max_seconds": 0.0}, {"keep": -1}, {"log_every": 0}],
)
def test_settings_out_of_range_are_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"training\.{next(iter(wrong))}="):
        fit(Regression(), Points(), settings(tmp_path / "run", **wrong))
    assert not (tmp_path / "run").exists()


def test_an_empty_dataset_and_an_unknown_tracker_are_refused(tmp_path: Path) -> None:
    class Empty(Points):
        def __len__(self) -> int:
            return 0

    with pytest.raises(TrainingError, match="no clip"):
        fit(Regression(), Empty(), settings(tmp_path / "run", steps=1))
    with pytest.raises(TrainingError, match=r"training\.tracker=nothing"):
        fit(Regression(), Points(), settings(tmp_path / "run", steps=1, tracker="nothing"))


def test_processes_that_do_not_see_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    with pytest.raises(TrainingError, match="ACCELERATE_USE_CPU"):
        fit(Regression(), Points(), settings(tmp_path / "run", steps=1))


def test_settings_are_a_structured_config_with_a_docstring_each_and_need_no_torch() -> None:
    merged = OmegaConf.merge(OmegaConf.structured(Training), {"precision": "bf16", "betas": [0.5, 0.9], "output": "x"})
    made = OmegaConf.to_object(merged)
    assert isinstance(made, Training)
    assert (made.precision, tuple(made.betas), made.output) == ("bf16", (0.5, 0.9), Path("x"))
    source = Path(sys.modules[Training.__module__].__file__ or "").read_text()
    assert source.count('    """\n') + source.count('."""\n') >= len(dataclasses.fields(Training))
    code = "import sys, inflate.training.settings; sys.exit('torch' in sys.modules)"
    root = Path(loop.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_clip_that_cannot_be_read_is_told_plainly(tmp_path: Path, workers: int) -> None:
    task = Regression()
    with pytest.raises(DataError) as caught:
        fit(task, Vanishing(3), settings(tmp_path / "run", steps=6, batch=1, workers=workers))
    assert str(caught.value) == "b.mp4 is gone; put it back"
    assert task.seen == [0, 1, 2]


def test_the_toy_epochs_hold_every_clip_once() -> None:
    data = Points()
    epoch = torch.stack([data[number]["x"] for number in range(CLIPS)])
    assert len(epoch.unique(dim=0)) == CLIPS
