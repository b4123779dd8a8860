"""Weights spread over two real processes over gloo: that they are, and that nothing else is different."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from inflate.errors import TrainingError
from inflate.training import log
from inflate.training.loop import fit
from inflate.training.player import check_shardable
from inflate.training.processes import join_processes
from inflate.training.sharding import Sharding, asked, local, units
from launch import launch
from tiny_svd import Clips, image_to_video, largest_difference
from toy import Adversarial, Points, Regression, send, settings

# Python 3.12 warns of forks of processes with threads; ours start after the fork.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
ZERO2 = FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"}
STEPS = 3


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(log, "plot", lambda *_, **__: None)  # half a second each; has a test of its own
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(
    environment: dict[str, str], output: Path, run: dict[str, Any], image: int = 0, stop: int = -1, **changes: Any
) -> dict[str, Any]:
    """A run's final weights, held-out measures, log, and how much each process held while it trained."""
    os.environ.update(environment)
    task, lines = image_to_video(**changes), []
    player, unet = task.players[0], task.family.unet
    task.preview = lambda folder: None
    task.export = lambda folder: unet.save_pretrained(folder)
    sizes: dict[str, int] = {}
    hook = send(stop if join_processes().is_last_process else -1, signal.SIGTERM)

    def loss(batch: Any, noise: Any, step: int) -> Any:
        hook(step)
        sizes["weights"] = sum(local(p).numel() for p in player.network.parameters())
        sizes["bare"] = sum(p.numel() for p in unet.parameters())
        return task.loss(batch, noise, step)

    def stepped(optimizer: Any, *_: Any) -> None:
        tensors = [value for values in optimizer.state.values() for value in values.values() if value.ndim]
        sizes["optimizer"] = sum(local(tensor).numel() for tensor in tensors)

    player.loss = loss
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("inflate.training.processes").addHandler(handler)
    logging.getLogger("inflate.training.processes").setLevel(logging.INFO)
    removable = register_optimizer_step_post_hook(stepped)
    result = fit(task, Clips(image), settings(output, **{"steps": STEPS, "lr": 1e-3, "ema": 0.9} | run))
    removable.remove()
    weights = {name: p.detach() for name, p in unet.named_parameters()}
    assert all(type(p) is nn.Parameter for p in unet.parameters())
    return {"weights": weights, "held out": result.held_out, "sizes": sizes, "log": lines, "step": result.step}


def exported(output: Path) -> dict[str, Tensor]:
    assert json.loads((output / "export/config.json").read_text())["_class_name"] == "VideoUNet"
    return load_file(output / "export/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run that the others should equal: one process, which accumulates what two would see."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    output = tmp_path_factory.mktemp("alone") / "run"
    return output, trained({}, output, {"accumulate": 2})


# --- the same run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("environment", "gathered"), [(FSDP2, "layer"), (ZERO2, "forward and backward pass")])
def test_each_process_holds_half_and_the_run_is_the_same(
    environment: dict[str, str], gathered: str, tmp_path: Path, alone: tuple[Path, dict[str, Any]]
) -> None:
    first, second = launch(trained, environment, tmp_path / "run", {})
    output, whole = alone
    assert largest_difference(whole["weights"], first["weights"]) < 1e-9
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert largest_difference(exported(output), exported(tmp_path / "run")) < 1e-9
    assert largest_difference(exported(output), whole["weights"]) > 1e-6  # it holds the averages
    for row, expected in zip(first["held out"], whole["held out"], strict=True):
        assert row == pytest.approx(expected, abs=1e-9, rel=0)
    for kind in ("weights", "optimizer"):
        assert first["sizes"][kind] + second["sizes"][kind] == whole["sizes"][kind]
        assert first["sizes"][kind] == pytest.approx(second["sizes"][kind], rel=0.1)
    assert (first["sizes"]["bare"], second["sizes"]["bare"]) == (0, 0)
    assert first["log"][1] == f"weights: sharded over 2 processes, gathered per {gathered}"


def test_frozen_layers_images_and_recomputation_change_nothing(tmp_path: Path) -> None:
    """One process sees nothing but images, which give the temporal layers a gradient of zero."""
    options = (2, -1)
    changes = {"trainable": "temporal", "gradient_checkpointing": True}
    whole = trained({}, tmp_path / "alone", {"accumulate": 2}, *options, **changes)
    first, second = launch(trained_in_part, tmp_path / "run")
    assert largest_difference(whole["weights"], first["weights"]) < 1e-9
    assert first["sizes"]["optimizer"] + second["sizes"]["optimizer"] == whole["sizes"]["optimizer"]
    assert 0 < whole["sizes"]["optimizer"] < whole["sizes"]["weights"]


def trained_in_part(output: Path) -> dict[str, Any]:
    return trained(FSDP2, output, {}, 2, trainable="temporal", gradient_checkpointing=True)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_signal_in_one_process_leaves_a_checkpoint_that_one_process_goes_on_with(
    tmp_path: Path, alone: tuple[Path, dict[str, Any]]
) -> None:
    parts = launch(trained, FSDP2, tmp_path / "run", {}, 0, 1)
    assert [part["step"] for part in parts] == [2, 2]
    resumed = trained({}, tmp_path / "run", {"accumulate": 2, "resume": "latest"})
    assert largest_difference(alone[1]["weights"], resumed["weights"]) < 1e-9


def test_sharded_processes_go_on_with_the_checkpoint_of_one(
    tmp_path: Path, alone: tuple[Path, dict[str, Any]]
) -> None:
    trained({}, tmp_path / "run", {"accumulate": 2}, 0, 1)
    resumed, _ = launch(trained, ZERO2, tmp_path / "run", {"resume": "latest"})
    assert largest_difference(alone[1]["weights"], resumed["weights"]) < 1e-9


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds of a player, by name."""
    state = torch.load(folder / "unet.optimizer.pt", weights_only=True)
    return {
        **load_file(folder / "unet.safetensors"),
        **{f"average.{name}": value for name, value in load_file(folder / "unet.average.safetensors").items()},
        **{f"{place}.{name}": value for place, values in state.items() for name, value in values.items()},
    }


def test_what_is_loaded_and_saved_again_in_shares_is_the_same_to_the_bit(tmp_path: Path) -> None:
    trained({}, tmp_path / "run", {"accumulate": 2, "steps": 1})
    before = tensors(tmp_path / "run/checkpoint-1")
    launch(trained, FSDP2, tmp_path / "run", {"steps": 1, "resume": "latest"})
    after = tensors(tmp_path / "run/checkpoint-1")
    assert len(before) > 100
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- what is asked for, and refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sharding"), [("fsdp2", Sharding(True)), ("zero2", Sharding(False))])
def test_the_launch_configurations_ask_for_it(name: str, sharding: Sharding) -> None:
    file = Path(__file__).parents[2] / f"recipes/accelerate/{name}.yaml"
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "--num_processes", "3", "script.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    assert arguments.nproc_per_node == "3"
    assert asked(environment) == sharding


def test_whole_weights_are_what_nobody_asked_to_spread() -> None:
    assert asked({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}) is None
    assert asked({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "false"}) is None


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP_VERSION=1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        (FSDP2 | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism config"),
        (FSDP2 | {"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS"),
        (FSDP2 | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "image_to_video.gradient_checkpointing"),
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
    with pytest.raises(TrainingError, match="player 'map': Sequential names no layers .* --multi_gpu"):
        check_shardable(Regression().players, settings(tmp_path), Sharding(True))


def test_layers_within_layers_are_units_of_their_own_and_come_first() -> None:
    unet = image_to_video().family.unet
    kinds = [type(unit).__name__ for unit in units(unet)]
    assert kinds[-1] == "VideoUNet"
    assert {"VideoResnet", "VideoBlock", "VideoTransformer", "CrossAttnUpBlock2D"} < set(kinds)
    for unit in unet.modules():
        inner = [kinds.index(type(one).__name__) for one in unit.modules() if type(one).__name__ in kinds]
        assert type(unit).__name__ not in kinds or max(inner) <= len(kinds)
