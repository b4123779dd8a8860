"""Whole runs of both stages of I2VGen-XL: gone on with, loaded by a new process, and shared by two processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_i2vgen_xl as tiny
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny_video_ldm import FRAMES, clip
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from inflate.adapters import file, verify
from inflate.adapters.settings import AdapterSettings
from inflate.families.i2vgen_xl import I2VGenXL
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.models.unet import MODELSCOPE
from inflate.training import log
from inflate.training.adapting import Adapting
from inflate.training.denoising import Given
from inflate.training.i2vgen_xl import I2VGenXLSettings, I2VGenXLTask, Preview, spatial_rates
from inflate.training.i2vgen_xl_stages import FAMILIES, Stage
from inflate.training.loop import fit
from inflate.training.noise import Noise
from inflate.training.player import Trainee
from inflate.training.processes import join_processes
from inflate.training.refinement import RefinementPreview, RefinementTask
from inflate.training.settings import Training
from inflate.training.sharding import whole
from launch import FSDP2, ROOT, launch
from tiny_svd import largest_difference

# Python 3.12 warns of forks of processes with threads; ours start after the fork.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.usefixtures("on_cpu"),
]
STAGES: tuple[Stage, ...] = ("base", "refine")
LORA = AdapterSettings("lora", rank=2, targets=["attn2.to_v", "temporal*.attn1.to_q"], dropout=0.1)
GAMMA = 0.2
both_stages = pytest.mark.parametrize("stage", STAGES)
full_and_lora = pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])


class Clips:
    """Five clips; of every `image` samples the last is one frame only (0 = none)."""

    def __init__(self, image: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.image, self.dtype = image, dtype

    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: int) -> dict[str, Any]:
        single = self.image and number % self.image == self.image - 1
        found = in_type(clip(number % 5, 1 if single else FRAMES), self.dtype)
        return {name: values[0] for name, values in found.items()} | {"number": number}


def in_type(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A batch whose pixels are of a type."""
    return batch | {"pixels": batch["pixels"].to(dtype)}


def model(stage: Stage, folder: Path) -> I2VGenXL | Refiner:
    """The same model each time, with the temporal layers and the dropout of the released ones."""
    torch.manual_seed(5)
    return (tiny.base if stage == "base" else tiny.refiner)(folder, spec=MODELSCOPE)


def precise(stage: Stage, folder: Path) -> I2VGenXL | Refiner:
    """The same in float64 without dropout, which is drawn by each process for itself."""
    torch.manual_seed(5)
    spec = replace(MODELSCOPE, dropout=0.0)
    still = replace(tiny.HIERARCHY, dropout=0.0)
    made = tiny.base(folder, still, spec=spec) if stage == "base" else tiny.refiner(folder, spec=spec)
    for network in made.networks:
        network.double()
    return made


def task(
    family: I2VGenXL | Refiner, adapter: Adapting | None = None, gamma: float = 1.0
) -> I2VGenXLTask | RefinementTask:
    """A task that drops texts and images, and looks at nothing."""
    few = {"held_out_clips": 1, "bands": 1, "preview_clips": 1}
    drops = {"drop_text": 0.3, "drop_image": 0.2, "drop_both": 0.2}
    given = Given([in_type(clip(100), family.vae.dtype)], lr=1e-2, seed=3, adapter=adapter)
    made: I2VGenXLTask | RefinementTask
    if isinstance(family, I2VGenXL):
        settings = I2VGenXLSettings(**few, **drops, fade_in=3)
        made = I2VGenXLTask(family, settings, Preview(steps=1, spacing="trailing"), given, gamma)
    else:
        made = RefinementTask(family, I2VGenXLSettings(**few, **drops), RefinementPreview(steps=1), given, gamma)
    made.evaluate, made.preview = dict, lambda folder: None  # type: ignore[method-assign]
    return made


def training(output: Path, steps: int, **changes: Any) -> Training:
    quiet: dict[str, Any] = {"workers": 0, "tracker": "none", "progress": False, "log_every": 1}
    return Training(output, steps=steps, lr=1e-2, **quiet | changes)


def adapting(stage: Stage, family: I2VGenXL | Refiner, path: Path) -> Adapting | None:
    return Adapting.on(family.unet, LORA, FAMILIES[stage], str(path), seed=3)


# --- gone on with -----------------------------------------------------------------------------------------------------


def watched(stage: Stage, adapted: bool, output: Path, steps: int, resume: str | None = None) -> list[Any]:
    """What each step of a run draws and loses; of one that goes on, all that learns comes from the checkpoint."""
    family = model(stage, output.with_name(f"parent of {output.name} to {steps}"))
    adapter = adapting(stage, family, output) if adapted else None
    made, seen = task(family, adapter, 1.0 if adapted else GAMMA), list[Any]()
    if resume:
        for parameter in family.unet.parameters():
            parameter.data.mul_(not parameter.requires_grad)

    def loss(batch: Any, noise: Noise, step: int) -> Any:
        losses, logs = made.loss(batch, noise, step)
        drawn = [noise.uniform("timestep"), noise.uniform("drop"), noise.normal("noise", 3)]
        seen.append([step, *(values.tolist() for values in (batch["number"], *drawn, losses))])
        return losses, logs

    made.players[0].loss = loss
    settings = training(output, steps, batch=2, ema=0.5, checkpoint_every=2, warmup=3, resume=resume)
    fit(made, Clips(), settings)
    return seen


def saved(folder: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds of the UNet, by name."""
    state = torch.load(folder / "unet.optimizer.pt", weights_only=True)
    return {
        **load_file(folder / "unet.safetensors"),
        **{f"average.{name}": value for name, value in load_file(folder / "unet.average.safetensors").items()},
        **{f"{place}.{name}": value for place, values in state.items() for name, value in values.items()},
    }


@both_stages
@full_and_lora
def test_a_run_that_was_cut_and_goes_on_is_the_run_in_one_go(stage: Stage, adapted: bool, tmp_path: Path) -> None:
    """Weights, averages and the optimiser's state to the bit, and all that later steps draw and lose."""
    expected = watched(stage, adapted, tmp_path / "whole", 4)
    watched(stage, adapted, tmp_path / "parts", 2)
    assert watched(stage, adapted, tmp_path / "parts", 4, "latest") == expected[2:]
    cut, ours, theirs = (
        saved(tmp_path / place) for place in ("parts/checkpoint-2", "parts/checkpoint-4", "whole/checkpoint-4")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert [name for name, value in ours.items() if torch.equal(value, cut[name])] == []


# --- loaded by a new process ------------------------------------------------------------------------------------------

LOADING = """
import sys
import torch
from inflate.cli import app
from inflate.families.i2vgen_xl import I2VGenXL
from inflate.families.i2vgen_xl_refiner import Refiner
from tiny_i2vgen_xl import drawn, weights
base, refine, target, *adapters = sys.argv[1:]
families = I2VGenXL.load(base), Refiner.load(refine)
torch.save([(drawn(family), weights(family)) for family in families], target)
for adapter in adapters:
    app(["adapter", "verify", adapter], standalone_mode=False)
"""


@dataclass(frozen=True)
class Loaded:
    """Of each stage, by its place in STAGES."""

    here: list[Any]
    """what a trained model draws, and its weights"""
    there: list[Any]
    """the same of its export in a new process"""
    proofs: list[str]
    """what a new process says of an adapter on the export"""


def trained(stage: Stage, folder: Path) -> tuple[Any, Path, Path]:
    """What a trained model draws and its weights, and the exports of its run and of an adapter's on it."""
    family = model(stage, folder / f"{stage} parent")
    result = fit(task(family, gamma=GAMMA), Clips(), training(folder / stage, 2, batch=2))
    assert result.export is not None
    start = (I2VGenXL if stage == "base" else Refiner).load(result.export)
    adapter = adapting(stage, start, result.export)
    adapted = fit(task(start, adapter), Clips(), training(folder / f"{stage} lora", 2, batch=2))
    assert adapted.export is not None
    return (tiny.drawn(family), tiny.weights(family)), result.export, adapted.export / file.NAME


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Starting the one new process takes longest."""
    folder = tmp_path_factory.mktemp("runs")
    here, exports, adapters = zip(*alone(lambda: [trained(stage, folder) for stage in STAGES]), strict=True)
    command = [sys.executable, "-c", LOADING, *map(str, exports), str(folder / "drawn.pt"), *map(str, adapters)]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    ended = subprocess.run(command, capture_output=True, text=True, env=paths, check=False)
    assert ended.returncode == 0, ended.stderr
    return Loaded([*here], torch.load(folder / "drawn.pt", weights_only=True), ended.stdout.splitlines())


def alone(work: Callable[[], Any]) -> Any:
    """What comes of work that knows nothing of earlier runs, and plots none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "plot", lambda *_, **__: None)  # half a second each; has a test of its own
        return work()


@both_stages
def test_an_export_is_the_trained_model_in_a_new_process(stage: Stage, loaded: Loaded, tmp_path: Path) -> None:
    """Tensors to the bit, what they draw to rounding: in a file they lie at other places of memory."""
    (clip, weights), (again, found) = loaded.here[STAGES.index(stage)], loaded.there[STAGES.index(stage)]
    assert largest_difference(weights, found) == 0
    torch.testing.assert_close(again, clip, atol=1e-5, rtol=0)
    assert float((clip - tiny.drawn(model(stage, tmp_path / "parent"))).abs().max()) > 1e-3


@both_stages
def test_an_adapter_is_proved_in_a_new_process(stage: Stage, loaded: Loaded) -> None:
    line = loaded.proofs[STAGES.index(stage)]
    words = re.fullmatch(r"(.*) on .*/export: (\S+) from what was trained, (\S+) from the base", line)
    assert words is not None, line
    assert f"/{stage} lora/" in words[1]
    assert float(words[2]) <= verify.TOLERANCE
    assert float(words[3]) > 1e-4


# --- shared by two processes ------------------------------------------------------------------------------------------


def learnt(stage: Stage, output: Path, accumulate: int = 1, steps: int = 2, gamma: float = GAMMA) -> dict[str, Any]:
    """The weights and averages that a process has after a run, and what its optimiser was given in the first step.

    Every third sample is an image. Of two processes the second begins with weights of its own, which do not count.
    """
    family, found = precise(stage, output.with_name(f"{output.name} parent {join_processes().process_index}")), {}
    if join_processes().process_index:
        tiny.randomise(family.unet, seed=9)
    made = task(family, gamma=gamma)
    made.export = lambda folder: None  # type: ignore[method-assign]

    def note(optimizer: Any, *_: Any) -> None:
        groups = [(group["multiplier"], sum(p.numel() for p in group["params"])) for group in optimizer.param_groups]
        idle = [p for group in optimizer.param_groups for p in group["params"] if p.grad is None or not p.grad.any()]
        found.setdefault("groups", {each: sum(n for m, n in groups if m == each) for each in (1.0, gamma)})
        found.setdefault("idle", sum(p.numel() for p in idle))

    def release(one: Trainee, accelerator: Any) -> None:
        found["averages"] = {
            name: whole(value, one.spread.get(name), everywhere=True) for name, value in one.average.items()
        }
        ending(one, accelerator)

    ending, removable = Trainee.release, register_optimizer_step_pre_hook(note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainee, "release", release)
        fit(made, Clips(3, torch.float64), training(output, steps, accumulate=accumulate, batch=1, ema=0.9))
    removable.remove()
    return {**found, "weights": {name: value.detach() for name, value in family.unet.named_parameters()}}


def whole_and_spread(folder: Path) -> dict[str, dict[str, Any]]:
    """What two processes do one after the other, for starting them takes longest."""
    found = {f"{stage} whole": learnt(stage, folder / f"{stage} whole") for stage in STAGES}
    os.environ.update(FSDP2)
    return found | {"base spread": learnt("base", folder / "base spread")}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The runs of one process, which accumulates what two would see, and of two with whole and with shared weights."""
    folder = tmp_path_factory.mktemp("together")
    one = alone(lambda: {stage: learnt(stage, folder / stage, accumulate=2) for stage in STAGES})
    return folder, one, alone(lambda: launch(whole_and_spread, folder))


def losses(output: Path) -> list[float]:
    """Of every step of a run."""
    return [row["loss/unet"] for row in json.loads((output / "metrics.json").read_text())["history"]]


@pytest.mark.parametrize(("stage", "way"), [("base", "whole"), ("refine", "whole"), ("base", "spread")])
def test_two_processes_train_what_one_does(stage: Stage, way: str, together: Any) -> None:
    """Losses, weights, and the averages of either process."""
    folder, one, found = together
    first, second = (each[f"{stage} {way}"] for each in found)
    assert losses(folder / f"{stage} {way}") == pytest.approx(losses(folder / stage), abs=1e-9, rel=0)
    for kind in ("weights", "averages"):
        assert largest_difference(one[stage][kind], first[kind]) < 1e-9
        assert all(torch.equal(first[kind][name], second[kind][name]) for name in first[kind])
    assert largest_difference(first["weights"], first["averages"]) > 1e-4
    start = dict(precise(stage, folder / f"{stage} {way} start").unet.named_parameters())
    assert [name for name, value in first["weights"].items() if torch.equal(value, start[name])] == []


@both_stages
def test_every_parameter_gets_a_gradient_in_each_process(stage: Stage, together: Any) -> None:
    _, one, found = together
    assert [each["idle"] for each in (one[stage], *(two[f"{stage} whole"] for two in found))] == [0, 0, 0]


def test_the_groups_of_gamma_are_shared_out_whole(together: Any) -> None:
    _, one, found = together
    expected = one["base"]["groups"]
    assert all(each["base whole"]["groups"] == expected for each in found)
    shares = [each["base spread"]["groups"] for each in found]
    for rate in (1.0, GAMMA):
        assert 0 < shares[0][rate] < expected[rate]
        assert sum(share[rate] for share in shares) == expected[rate]


# --- gamma ------------------------------------------------------------------------------------------------------------


@both_stages
def test_gamma_multiplies_the_update_of_the_image_models_layers_and_of_no_other(stage: Stage, tmp_path: Path) -> None:
    start = precise(stage, tmp_path / "start").unet
    before, spatial = dict(start.named_parameters()), spatial_rates(start, GAMMA)
    updates = []
    for gamma in (GAMMA, 1.0):
        after = learnt(stage, tmp_path / f"{gamma}", accumulate=2, steps=1, gamma=gamma)["weights"]
        updates.append({name: (value - before[name]).detach() for name, value in after.items()})
    assert 0 < len(spatial) < len(before)
    for name, slow in updates[0].items():
        expected = GAMMA if name in spatial else 1.0
        assert float(slow.norm() / updates[1][name].norm()) == pytest.approx(expected, rel=1e-6), name
