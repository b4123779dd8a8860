"""Weights spread over two real processes over gloo: that they are, and that nothing else is different."""

from __future__ import annotations

import copy
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
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers import UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from safetensors.torch import load_file
from tiny_adapter import settings as adapter_settings
from tiny_adapter import video_unet
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from helpers import randomise, tiny_unet, unet_inputs
from inflate.adapters import attach, targets
from inflate.adapters.settings import KINDS, Kind
from inflate.errors import InflateError, TrainingError
from inflate.layers.image_context import ImageContext, QueryLayer
from inflate.layers.temporal import VideoUpsample
from inflate.models.unet import ANIMATEDIFF_V1, ANIMATEDIFF_V2, MODELSCOPE, VIDEO_LDM, TemporalSpec, VideoUNet
from inflate.surgery import inflate_unet
from inflate.training import adamw, checkpoint, log
from inflate.training.loop import fit
from inflate.training.memory_settings import Memory
from inflate.training.player import Trainee, check_shardable
from inflate.training.processes import join_processes, start_accelerator
from inflate.training.sharding import Sharding, asked, own, twin, units
from launch import FSDP2, Collectives, launch
from tiny_svd import Clips, image_to_video, largest_difference
from toy import Adversarial, Layered, Points, Regression, send, settings, weights

# Python 3.12 warns of forks of processes with threads; ours start after the fork.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

ZERO2 = FSDP2 | {"FSDP_RESHARD_AFTER_FORWARD": "false"}
GROUPS = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}
STEPS = 2
PART = {
    "trainable": "temporal",
    "memory": Memory("nested", {"down_blocks.*": "all_but_attention"}, feed_forward_parts=2, offload=True),
}
"""Most weights frozen, activations recomputed in every way."""
LEAN = {"precision": "pure_bf16", "optimizer": "adamw8bit"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log, "plot", lambda *_, **__: None)  # half a second each; has a test of its own
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
    lean = lean_runs(folder)
    return {"whole": whole, "stopped": stopped, "resumed": resumed, "part": part, "broken": error, **lean}


def lean_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Two steps in bfloat16 with moments in 8 bits, and the second of them again."""
    os.environ.update(FSDP2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw, "SMALL", 16)  # these networks have no weight that is not small
        whole = trained(folder / "lean", LEAN | {"checkpoint_every": 1})
        trained(folder / "lean parts", LEAN | {"resume": str(folder / "lean/checkpoint-1")})
        return {"lean": whole}


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


def tensors(folder: Path, player: str = "unet") -> dict[str, Tensor]:
    """All that a checkpoint holds of a player, by name."""
    state = torch.load(folder / f"{player}.optimizer.pt", weights_only=True)
    return {
        **load_file(folder / f"{player}.safetensors"),
        **{f"average.{name}": value for name, value in load_file(folder / f"{player}.average.safetensors").items()},
        **{f"{place}.{name}": value for place, values in state.items() for name, value in values.items()},
    }


def test_what_is_loaded_and_saved_again_in_shares_is_the_same_to_the_bit(runs: Runs) -> None:
    before, after = tensors(runs.folder / "one first/checkpoint-1"), tensors(runs.folder / "checkpoint-7")
    assert len(before) > 100
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bfloat16_weights_and_moments_in_8_bits_go_on_in_shares_and_alone(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (tensors(runs.folder / name / "checkpoint-2") for name in ("lean", "lean parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert {tensor.dtype for name, tensor in whole.items() if name.endswith(".root")} == {torch.uint8}
    assert largest_difference(runs.first["lean"]["weights"], runs.second["lean"]["weights"]) < 0.01  # frozen ones
    monkeypatch.setattr(adamw, "SMALL", 16)
    again = LEAN | {"accumulate": 2, "steps": 3, "resume": str(runs.folder / "lean/checkpoint-2")}
    alone = trained(runs.folder / "lean alone", again)
    assert 0 < largest_difference(runs.first["lean"]["weights"], alone["weights"]) < 0.1


# --- checkpoints in shares --------------------------------------------------------------------------------------------

LANES = 6
"""Forward passes per step, by however many processes."""


def learn(output: Path, steps: int, **changes: Any) -> list[float]:
    """The weights after going on to so many steps, by this process or with others, who then share the weights."""
    count, task = join_processes().num_processes, Layered()
    task.players[0].rates = {"0.weight": 0.2, "3.bias": 3.0}
    own = {"steps": steps, "accumulate": LANES // count, "ema": 0.9, "resume": "latest"}
    fit(task, Points(torch.float64), settings(output, **own | changes))
    return weights(task)


def learn_in_shares(output: Path, steps: int, **changes: Any) -> list[float]:
    os.environ.update(FSDP2)
    return learn(output, steps, sharded_checkpoints=True, **changes)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".json")


def shares(count: int) -> list[str]:
    files = [("map", "safetensors"), ("map.average", "safetensors"), ("map.optimizer", "pt")]
    return sorted(f"{name}.{n + 1}-of-{count}.{kind}" for name, kind in files for n in range(count))


def test_any_number_of_processes_goes_on_with_shares_and_with_the_whole(tmp_path: Path) -> None:
    alone, parts = tmp_path / "alone", tmp_path / "parts"
    expected = learn(alone, 4, resume=None)
    learn(parts, 1, resume=None)
    launch(learn_in_shares, parts, 2)
    assert names(parts / "checkpoint-2") == shares(2)
    launch(learn_in_shares, parts, 3, processes=3)
    assert names(parts / "checkpoint-3") == shares(3)
    assert learn(parts, 4, sharded_checkpoints=True) == pytest.approx(expected, abs=1e-9, rel=0)
    assert names(parts / "checkpoint-4") == ["map.average.safetensors", "map.optimizer.pt", "map.safetensors"]
    saved = tensors(parts / "checkpoint-4", "map")
    assert largest_difference(tensors(alone / "checkpoint-4", "map"), saved) < 1e-9


def learn_narrow(output: Path) -> list[float]:
    os.environ.update(FSDP2)
    task = Layered(torch.bfloat16)
    fit(task, Points(torch.bfloat16), settings(output, steps=2, ema=0.9, sharded_checkpoints=True))
    return weights(task)


def test_bfloat16_weights_are_shared_saved_and_loaded_to_the_bit(tmp_path: Path) -> None:
    first, second = launch(learn_narrow, tmp_path / "run")
    task = Layered(torch.bfloat16)
    before = weights(task)
    fit(task, Points(torch.bfloat16), settings(tmp_path / "run", steps=2, accumulate=2, ema=0.9, resume="latest"))
    assert weights(task) == first == second != before


def error_of_shares(output: Path, fault: str) -> str:
    """Of a run whose second process cannot write its share, or names another folder."""

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    if join_processes().process_index and fault == "full":
        checkpoint.save_file = fail
    if join_processes().process_index and fault == "elsewhere":
        output = output / "of another machine"
    with pytest.raises(InflateError) as caught:
        learn_in_shares(output, 1, resume=None)
    return str(caught.value)


def test_a_process_that_cannot_write_its_share_leaves_no_checkpoint(tmp_path: Path) -> None:
    first, second = launch(error_of_shares, tmp_path / "run", "full")
    assert "cannot be written: no space left; free space" in second
    assert first.startswith(f"process 1: {second.splitlines()[0]}")
    assert not [path for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name]


def test_a_process_that_does_not_see_the_folder_is_told_before_the_first_step(tmp_path: Path) -> None:
    first, second = launch(error_of_shares, tmp_path, "elsewhere")
    assert first == f"process 1: {second}"
    assert "of another machine of process 0 is not the folder of that name on" in second
    assert "set it to false" in second


def attending(spec: TemporalSpec) -> VideoUNet:
    """A UNet that attends to an image, all of whose layers do something."""
    unet, _ = inflate_unet(tiny_unet(True), spec)
    unet.add_image_context(ImageContext(embedding=6, width=8, depth=2, heads=2, head_width=4, queries=2, gate=True))
    randomise(unet)
    return unet


def gradients_in_shares() -> float:
    """The largest difference of gradients from those of whole weights, by a loss of clips and their images."""
    whole = attending(VIDEO_LDM).double()
    network = twin(copy.deepcopy(whole), Accelerator(cpu=True), Sharding(True))
    inputs = {name: each.double() for name, each in unet_inputs(batch=1).items()}
    features = torch.randn(1, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for one in (whole, network):
        one(**inputs, image_features=features).sample.square().mean().backward()
    expected = {name: parameter.grad for name, parameter in whole.named_parameters()}
    found = {name: parameter.grad.full_tensor() for name, parameter in network.named_parameters()}
    return largest_difference(found, expected)


def test_an_image_in_cross_attention_is_seen_through_shares() -> None:
    for difference in launch(gradients_in_shares):
        assert difference < 1e-10


# --- groups of processes that share the weights -----------------------------------------------------------------------


def in_groups(folder: Path) -> dict[str, Any]:
    """Two groups of two: weights after two steps, and what one step exchanges, by its number of forward passes."""
    os.environ.update(FSDP2 | GROUPS)
    found: dict[str, Any] = {"said": str(asked(os.environ))}
    for passes in (1, 2):
        with Collectives() as exchanged:
            found[f"weights {passes}"] = learn(
                folder / f"{passes}", 2, resume=None, accumulate=passes, sharded_checkpoints=True
            )
        found[f"exchanged {passes}"] = exchanged.counts
    return found


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("groups")
    return folder, launch(in_groups, folder, processes=4)


def test_each_group_of_processes_holds_all_weights_and_trains_the_same_model(
    groups: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, found = groups
    expected = learn(folder / "alone", 2, resume=None, accumulate=8)
    for one in found:
        assert one["said"] == "gathered per layer within each of 2 groups"
        assert one["weights 2"] == pytest.approx(expected, abs=1e-9, rel=0)
    assert names(folder / "2/checkpoint-2") == shares(2)
    resumed = [learn(folder / name, 3, accumulate=8) for name in ("alone", "2")]
    assert resumed[1] == pytest.approx(resumed[0], abs=1e-9, rel=0)


def test_only_the_last_pass_of_a_step_exchanges_gradients_between_groups(
    groups: tuple[Path, list[dict[str, Any]]],
) -> None:
    once, twice = (groups[1][0][f"exchanged {passes}"] for passes in (1, 2))
    assert once["allreduce"] == twice["allreduce"] > 0
    assert 2 * once["reduce_scatter_base"] == twice["reduce_scatter_base"] > 0


# --- what is asked for, and refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sharding", "here"),
    [
        ("ddp", None, 4),
        ("fsdp2", Sharding(True), 4),
        ("zero2", Sharding(False), 4),
        ("two_machines", None, 2),
        ("two_machines_fsdp2", Sharding(True, replicas=2), 2),
    ],
)
def test_the_launch_configurations_ask_for_it(name: str, sharding: Sharding | None, here: int) -> None:
    file = Path(__file__).parents[2] / f"recipes/accelerate/{name}.yaml"
    words = ["--config_file", str(file), "--num_processes", "4", "--main_process_port", "0", "script.py"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    environment = prepare_multi_gpu_env(arguments)
    assert arguments.nproc_per_node == str(here)
    assert asked({**environment, "WORLD_SIZE": "4"}) == sharding


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
        (GROUPS, "parallelism config"),
        (FSDP2 | GROUPS | {"PARALLELISM_CONFIG_TP_SIZE": "2"}, "PARALLELISM_CONFIG_TP_SIZE=2 is not supported, only 1"),
        (FSDP2 | GROUPS, "DP_REPLICATE_SIZE=2 and PARALLELISM_CONFIG_DP_SHARD_SIZE=1 do not divide 1 processes"),
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
    assert "recipes/accelerate/" in str(caught.value)
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
    stored = image_to_video(Memory(base="int8"), trainable="temporal")
    with pytest.raises(TrainingError, match="memory.base=int8 keeps the weights that do not learn whole"):
        check_shardable(stored.players, settings(tmp_path), Sharding(True))
    with pytest.raises(TrainingError, match=r"players \['map', 'critic'\] call each other's networks"):
        check_shardable(Adversarial().players, settings(tmp_path), Sharding(True))
    with pytest.raises(TrainingError, match="player 'map': Sequential names no layers .* recipes/accelerate/ddp.yaml"):
        check_shardable(Regression().players, settings(tmp_path), Sharding(True))


# --- what is gathered together ----------------------------------------------------------------------------------------


def test_weights_of_two_types_are_refused(tmp_path: Path) -> None:
    task = Layered()
    task.network[0].bfloat16()
    with pytest.raises(TrainingError, match=r"several types: torch.bfloat16, torch.float64; launch with .*ddp.yaml"):
        check_shardable(task.players, settings(tmp_path), Sharding(True))
    task.network[0].requires_grad_(False)
    check_shardable(task.players, settings(tmp_path), Sharding(True))


def test_inner_layers_come_before_those_that_hold_them() -> None:
    unet = image_to_video().family.unet
    found = units(unet)
    assert found[-1] is unet
    kinds = {"VideoResnet", "VideoBlock", "VideoTransformer", "VideoCrossAttnUpBlock", "VideoUNet"}
    assert {type(unit).__name__ for unit in found} == kinds
    places = {id(unit): place for place, unit in enumerate(found)}
    assert all(places.get(id(inner), -1) <= places[id(unit)] for unit in found for inner in unit.modules())


def parameters_of(network: nn.Module) -> dict[nn.Module, dict[str, nn.Parameter]]:
    """Those that each unit gathers, by their names in the network."""
    named, found = dict(network.named_parameters()), {}
    for unit in units(network):
        mine = {id(parameter) for parameter in unit.parameters()}
        found[unit] = {name: named.pop(name) for name, p in [*named.items()] if id(p) in mine}
    assert not named
    return found


AT_THE_ENDS = {"conv_in", "time_embedding", "class_embedding", "conv_norm_out", "conv_out"}
"""What the root gathers for the whole pass; where there is a layer after the input, `conv_in` belongs to it."""


@pytest.mark.parametrize(
    ("spec", "ends"),
    [
        (TemporalSpec(added_id_dim=8), AT_THE_ENDS),
        (MODELSCOPE, AT_THE_ENDS - {"conv_in", "class_embedding"}),
        (ANIMATEDIFF_V1, AT_THE_ENDS - {"class_embedding"}),
        (ANIMATEDIFF_V2, AT_THE_ENDS - {"class_embedding"}),
    ],
)
def test_every_layer_but_those_at_the_ends_is_gathered_by_itself(spec: TemporalSpec, ends: set[str]) -> None:
    unet, _ = inflate_unet(tiny_unet(True), spec)
    found = parameters_of(unet)
    assert {name.split(".")[0] for name in found[unet]} == ends
    upsampling = [unit for unit in found if isinstance(unit, VideoUpsample | Downsample2D)]
    assert len(upsampling) == 2
    assert [name for name, parameter in unet.named_parameters() if parameter.ndim == 0] == []


def test_layers_of_the_query_transformer_are_gathered_by_themselves() -> None:
    found = parameters_of(attending(MODELSCOPE))
    queries = [unit for unit in found if isinstance(unit, QueryLayer)]
    assert len(queries) == 2
    *_, root = found
    parts = {name.split(".")[1] for name in found[root] if name.startswith("query_transformer.")}
    assert parts == {"latents", "proj_in", "proj_out", "norm_out"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_gathered_with_its_layer(kind: Kind) -> None:
    unet = video_unet()
    before = {name for name in parameters_of(unet)[unet]}
    wanted = adapter_settings(kind)
    attach.create(unet, wanted, targets.resolve(unet, wanted))
    assert {name for name in parameters_of(unet)[unet]} == before
    assert [name for name, parameter in unet.named_parameters() if parameter.ndim == 0] == []


def test_what_stable_video_diffusion_gathers_for_the_whole_pass_is_small() -> None:
    with torch.device("meta"):
        parent = UNet2DConditionModel(
            in_channels=8,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
        unet = VideoUNet.from_2d(parent, TemporalSpec())
    sizes = {unit: sum(p.numel() for p in each.values()) for unit, each in parameters_of(unet).items()}
    every = sum(sizes.values())
    assert every == 1_524_623_082
    assert sizes[unet] == 4_710_084  # 0.3 %
    assert max(sizes.values()) < 0.06 * every
