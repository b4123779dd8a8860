"""Weights spread over two real processes over gloo: that they are, and that nothing else is different."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from helpers import randomise
from inflate.errors import TrainingError
from inflate.training import checkpoint, log
from inflate.training.loop import fit
from inflate.training.memory_settings import Memory
from inflate.training.player import Trainee, check_shardable
from inflate.training.processes import join_processes, start_accelerator
from inflate.training.sharding import Sharding, asked, own, units
from launch import launch
from tiny_svd import Clips, image_to_video, largest_difference
from toy import Adversarial, Points, Regression, send, settings

# Python 3.12 warns of forks of processes with threads; ours start after the fork.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
ZERO2 = FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"}
STEPS = 2
PART = {
    "trainable": "temporal",
    "memory": Memory("nested", {"down_blocks.*": "all_but_attention"}, feed_forward_parts=2, offload=True),
}
"""Most weights frozen, activations recomputed in every way."""


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def held(tensor: Tensor) -> Tensor:
    return own(tensor) if isinstance(tensor, DTensor) else tensor


def trained(output: Path, run: dict[str, Any], image: int = 0, stop: int = -1, **changes: Any) -> dict[str, Any]:
    """A run's final weights, held-out measures, log, and how much this process held while it trained."""
    task, lines = image_to_video(**changes), []
    player, unet = task.players[0], task.family.unet
    if join_processes().process_index:
        randomise(unet, seed=9)  # only the main process's weights count
    task.preview = lambda folder: None
    task.export = lambda folder: unet.save_pretrained(folder)
    sizes: dict[str, int] = {}
    hook = send(stop if join_processes().is_last_process else -1, signal.SIGTERM)

    def loss(batch: Any, noise: Any, step: int) -> Any:
        hook(step)
        sizes["weights"] = sum(held(p).numel() for p in player.network.parameters())
        sizes["bare"] = sum(p.numel() for p in unet.parameters())
        return task.loss(batch, noise, step)

    def stepped(optimizer: Any, *_: Any) -> None:
        tensors = [value for values in optimizer.state.values() for value in values.values() if value.ndim]
        sizes["optimizer"] = sum(tensor.numel() for tensor in tensors)

    player.loss = loss
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("inflate.training.processes").addHandler(handler)
    logging.getLogger("inflate.training.processes").setLevel(logging.INFO)
    removable = register_optimizer_step_post_hook(stepped)
    result = fit(task, Clips(image), settings(output, **{"steps": STEPS, "lr": 1e-3, "ema": 0.9} | run))
    removable.remove()
    logging.getLogger("inflate.training.processes").removeHandler(handler)
    assert all(type(p) is nn.Parameter for p in unet.parameters())
    weights = {name: p.detach() for name, p in unet.named_parameters()}
    return {"weights": weights, "held out": result.held_out, "sizes": sizes, "log": lines, "step": result.step}


def sharded(folder: Path) -> dict[str, dict[str, Any]]:
    """What two processes do one after the other, for starting them takes longest."""
    os.environ.update(FSDP2)
    whole = trained(folder / "sharded", {})
    stopped = trained(folder / "two first", {}, stop=0)
    save_again(folder / "one first/checkpoint-1", folder)
    os.environ.update(ZERO2)
    resumed = trained(folder / "one first", {"resume": "latest"})
    part = trained(folder / "sharded part", {"ema": 0.0}, 2, **PART)
    error = {"text": broken(folder / "broken")}
    return {"whole": whole, "stopped": stopped, "resumed": resumed, "part": part, "broken": error}


def broken(output: Path) -> str:
    """The error of a run whose last process meets a loss that is not finite."""
    task, factor = image_to_video(), torch.nan if join_processes().is_last_process else 1.0
    task.evaluate, task.preview = dict, lambda folder: None

    def loss(*arguments: Any) -> Any:
        losses, logs = task.loss(*arguments)
        return losses * factor, logs

    task.players[0].loss = loss
    with pytest.raises(TrainingError) as caught:
        fit(task, Clips(), settings(output, steps=1))
    return str(caught.value)


def save_again(found: Path, output: Path) -> None:
    """Load a checkpoint in shares and write what was loaded as OUTPUT/checkpoint-7."""
    training = settings(output, ema=0.9)
    accelerator = start_accelerator(training)
    trainee = Trainee(image_to_video().players[0], training)
    trainee.prepare(accelerator)
    checkpoint.load(found, [trainee])
    contents = checkpoint.contents(trainee)
    if accelerator.is_main_process:
        checkpoint.save(output, checkpoint.State(step=7), [contents])


@dataclass
class Runs:
    """The same runs by one process, which accumulates what two would see, and by two that share the weights."""

    folder: Path
    alone: dict[str, Any]
    part: dict[str, Any]
    first: dict[str, Any]
    second: dict[str, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder, two = tmp_path_factory.mktemp("runs"), {"accumulate": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "plot", lambda *_, **__: None)  # half a second each; has a test of its own
        alone, part = trained(folder / "alone", two), trained(folder / "part", {**two, "ema": 0.0}, 2, **PART)
        trained(folder / "one first", {**two, "steps": 1})
        yield Runs(folder, alone, part, *launch(sharded, folder))


# --- the same run -----------------------------------------------------------------------------------------------------


def test_each_process_holds_half_of_weights_and_optimiser_state(runs: Runs) -> None:
    for name, alone in (("whole", runs.alone), ("part", runs.part)):
        first, second = runs.first[name]["sizes"], runs.second[name]["sizes"]
        for kind in ("weights", "optimizer"):
            assert first[kind] + second[kind] == alone["sizes"][kind]
            assert first[kind] == pytest.approx(second[kind], rel=0.1)
        assert (first["bare"], second["bare"]) == (0, 0)
    assert 0 < runs.part["sizes"]["optimizer"] < runs.alone["sizes"]["optimizer"]


def test_the_run_says_how_weights_are_held(runs: Runs) -> None:
    assert runs.first["whole"]["log"][1:] == ["weights: sharded over 2 processes, gathered per layer"]
    assert runs.first["part"]["log"][1] == "weights: sharded over 2 processes, gathered per forward and backward pass"
    assert runs.second["whole"]["log"] == []


def test_the_trajectory_is_that_of_whole_weights(runs: Runs) -> None:
    first, second = runs.first["whole"]["weights"], runs.second["whole"]["weights"]
    assert largest_difference(runs.alone["weights"], first) < 1e-9
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frozen_layers_images_and_recomputation_change_nothing(runs: Runs) -> None:
    """One process sees nothing but images, which give the temporal layers a gradient of zero."""
    start = dict(image_to_video().family.unet.named_parameters())
    moved = [name for name, tensor in runs.first["part"]["weights"].items() if not torch.equal(tensor, start[name])]
    assert 0 < len(moved) < len(start)
    assert largest_difference(runs.part["weights"], runs.first["part"]["weights"]) < 1e-9


def test_a_value_that_is_not_finite_ends_both_processes(runs: Runs) -> None:
    assert (
        "step 0: loss/unet is not finite for sample numbers [1]; nothing was updated" in runs.second["broken"]["text"]
    )
    assert "the gradient of unet.conv_in.weight is not finite" in runs.first["broken"]["text"]


def exported(folder: Path) -> dict[str, Tensor]:
    assert json.loads((folder / "export/config.json").read_text())["_class_name"] == "VideoUNet"
    return load_file(folder / "export/diffusion_pytorch_model.safetensors")


def test_what_is_measured_and_exported_are_the_whole_averages(runs: Runs) -> None:
    ours = exported(runs.folder / "sharded")
    assert largest_difference(exported(runs.folder / "alone"), ours) < 1e-9
    assert largest_difference(runs.alone["weights"], ours) > 1e-6
    for row, expected in zip(runs.first["whole"]["held out"], runs.alone["held out"], strict=True):
        assert row == pytest.approx(expected, abs=1e-9, rel=0)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_signal_in_one_process_leaves_a_checkpoint_that_one_process_goes_on_with(runs: Runs) -> None:
    assert (runs.first["stopped"]["step"], runs.second["stopped"]["step"]) == (1, 1)
    resumed = trained(runs.folder / "two first", {"accumulate": 2, "resume": "latest"})
    assert largest_difference(runs.alone["weights"], resumed["weights"]) < 1e-9


def test_sharded_processes_go_on_with_the_checkpoint_of_one(runs: Runs) -> None:
    assert largest_difference(runs.alone["weights"], runs.first["resumed"]["weights"]) < 1e-9


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds of a player, by name."""
    state = torch.load(folder / "unet.optimizer.pt", weights_only=True)
    return {
        **load_file(folder / "unet.safetensors"),
        **{f"average.{name}": value for name, value in load_file(folder / "unet.average.safetensors").items()},
        **{f"{place}.{name}": value for place, values in state.items() for name, value in values.items()},
    }


def test_what_is_loaded_and_saved_again_in_shares_is_the_same_to_the_bit(runs: Runs) -> None:
    before, after = tensors(runs.folder / "one first/checkpoint-1"), tensors(runs.folder / "checkpoint-7")
    assert len(before) > 100
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- what is asked for, and refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sharding"), [("fsdp2", Sharding(True)), ("zero2", Sharding(False))])
def test_the_launch_configurations_ask_for_it(name: str, sharding: Sharding) -> None:
    file = Path(__file__).parents[2] / f"recipes/accelerate/{name}.yaml"
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(file), "--num_processes", "3", "--main_process_port", "0", "script.py"]
    )
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    assert arguments.nproc_per_node == "3"
    assert asked(environment) == sharding


def test_whole_weights_are_what_nobody_asked_to_spread() -> None:
    assert asked({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}) is None
    assert asked({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "false"}) is None


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        (FSDP2 | {"FSDP_VERSION": "1"}, "FSDP_VERSION=1 is not supported, only 2"),
        (FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"}, "=full_shard is not supported, only true and false"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        (FSDP2 | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism config"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "memory.recompute=units"),
    ],
)
def test_other_ways_are_refused_with_the_file_that_has_their_memory(
    environment: dict[str, str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(TrainingError, match=name) as caught:
        fit(Regression(), Points(), settings(tmp_path / "run", steps=1))
    assert "recipes/accelerate/zero2.yaml (the memory of ZeRO-2)" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_one_process_keeps_its_weights_whole_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for variable, value in FSDP2.items():
        monkeypatch.setenv(variable, value)
    assert fit(Regression(), Points(), settings(tmp_path / "run", steps=1)).step == 1
    assert "there is nobody to spread the weights over" in caplog.text
    assert "ACCELERATE_USE_FSDP" not in os.environ


def test_what_cannot_be_sharded_is_refused(tmp_path: Path) -> None:
    unet = image_to_video()
    check_shardable(unet.players, settings(tmp_path), Sharding(True))
    check_shardable(Adversarial().players, settings(tmp_path), None)
    with pytest.raises(TrainingError, match="precision=fp16 cannot scale"):
        check_shardable(unet.players, settings(tmp_path, precision="fp16"), Sharding(True))
    with pytest.raises(TrainingError, match=r"players \['map', 'critic'\] call each other's networks"):
        check_shardable(Adversarial().players, settings(tmp_path), Sharding(True))
    with pytest.raises(TrainingError, match="player 'map': Sequential names no layers .* recipes/accelerate/ddp.yaml"):
        check_shardable(Regression().players, settings(tmp_path), Sharding(True))


def test_inner_layers_come_before_those_that_hold_them() -> None:
    unet = image_to_video().family.unet
    found = units(unet)
    assert found[-1] is unet
    kinds = {"VideoResnet", "VideoBlock", "VideoTransformer", "VideoCrossAttnUpBlock", "VideoUNet"}
    assert {type(unit).__name__ for unit in found} == kinds
    places = {id(unit): place for place, unit in enumerate(found)}
    assert all(places.get(id(inner), -1) <= places[id(unit)] for unit in found for inner in unit.modules())
